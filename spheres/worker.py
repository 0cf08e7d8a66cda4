"""Computes blocks: the task's gradients, checked, and summed in canonical order, on one pinned thread.

It knows no tree and no wire. ``Computer`` is the pure-CPU part that the reference loop shares.
"""

from __future__ import annotations

import asyncio
import math
import threading
import traceback
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from spheres.blocks import Block, halves
from spheres.config import NodeConfig
from spheres.errors import GradientError
from spheres.narrow import add_rounded, round_and_check
from spheres.numerics import add_sums, crc32c
from spheres.reducer import Held, NonFinite
from spheres.sampling import evaluation_slice
from spheres.segments import Mark
from spheres.task import Sums, Task
from spheres.tensors import aligned_zeros
from spheres.words import MOST_ERROR, MOST_TRACEBACK, cut, is_encodable, raised

__all__ = ["MOST_SAMPLES", "Computer", "Failure", "Pool", "Unit", "Worker", "limit_threads", "sample_ids"]

Array = npt.NDArray[np.float32]

#: in a verdict on a microbatch, or a failure: names of tensors, ids of samples
_MOST_TENSORS, MOST_SAMPLES = 16, 64

_limiter: Any = None


def limit_threads() -> None:
    """Pin BLAS and OpenMP in this process to one thread, for good; bits differ between one thread and two."""
    global _limiter  # noqa: PLW0603 - the limit lasts as long as this object
    from threadpoolctl import ThreadpoolController

    controller = ThreadpoolController()
    if any(library.num_threads != 1 for library in controller.lib_controllers):
        _limiter = controller.limit(limits=1)


@dataclass(frozen=True)
class Failure:
    """A task raised, or gave something that is no gradient."""

    microbatch: int
    error: str
    traceback: str
    sample_ids: tuple[int, ...]
    #: not finite, or of a wrong shape or dtype, rather than an exception
    invalid: bool


@dataclass
class Unit:
    """A block to compute. ``cancelled`` is set when its step is over: the rest of it is skipped."""

    block: Block
    step: int
    train: bool
    #: the weights that it is computed on
    reads: Mark | None = None
    cancelled: bool = False
    samples: int = 0
    microbatches: int = 0
    seconds: float = 0.0


Done = Callable[[Unit, Held | Failure | None], None]
T = TypeVar("T")
#: what the compute thread does; it gives what is then called on the loop
_Job = tuple[asyncio.AbstractEventLoop, Callable[[], Callable[[], object]]]


class _NotFiniteError(GradientError):
    """A gradient, or sums with it, that are not finite; ``verdict`` is what is said of it where it is left out."""

    def __init__(self, message: str, verdict: NonFinite) -> None:
        super().__init__(message)
        self.verdict = verdict


class Computer:
    """Gradients of microbatches by calls of fixed shape on aligned buffers (DESIGN section 4)."""

    def __init__(self, config: NodeConfig, task: Task) -> None:
        self._config, self._task, self._sampler = config, task, config.sampler
        self._overwrites = bool(getattr(task, "overwrites_out", False))
        # out's id -> its views, for as long as somebody has it: these must not keep the memory of a buffer that is gone
        self._views: dict[int, tuple[weakref.ref[Array], dict[str, Array]]] = {}
        # set to the microbatch's own state each time: making a new one would ask the system for entropy
        self._generator = np.random.Generator(np.random.Philox(key=0))

    def gradient(self, weights: Mapping[str, Array], step: int, index: int, out: Array) -> Sums | None:
        """Write the gradient of one microbatch into ``out``, rounded as the run says; None where it holds no sample.

        Raises GradientError for a gradient that is not finite or not of the weights' shape and dtype; what the task
        raises passes through.
        """
        return self._gradient(weights, step, index, out, checksum=False).sums

    def microbatch(
        self, weights: Mapping[str, Array], step: int, index: int, out: Array, *, checksum: bool = False
    ) -> Held:
        """Do the same; one that is not finite is absent, with its verdict, where the run leaves those out (N16).

        The array of what it returns is ``out`` or None. Its CRC-32C is there where ``checksum`` asks for it.
        """
        try:
            return self._gradient(weights, step, index, out, checksum=checksum)
        except _NotFiniteError as error:
            if self._config.skips_nonfinite:
                return Held(None, None, (error.verdict,))
            raise

    def _gradient(self, weights: Mapping[str, Array], step: int, index: int, out: Array, *, checksum: bool) -> Held:
        if self._sampler.count(step, index) == 0:
            return Held(None, None)
        samples = self._sampler.microbatch(step, index)
        if not self._overwrites:
            out.fill(0)
        views = self._views_of(out)
        given = dict(views)
        self._generator.bit_generator.state = self._sampler.generator_state(step, index)
        sums = self._task.gradient(weights, samples, self._generator, given)
        for name, view in views.items():
            # A task that binds a new array instead of writing into the view is told so, not trained on zeros.
            if given.get(name) is not view:
                raise GradientError(f"gradient() replaced out[{name!r}]; write into it: out[{name!r}][...] = value")
        sums = _checked(sums, "gradient", samples.size, self._config)
        # after rounding, which makes infinite what the narrower type cannot hold (N21)
        finite, crc = round_and_check(out, self._config.gradient_dtype, checksum=checksum)
        bad = [] if finite else [name for name, view in views.items() if not np.isfinite(view).all()]
        wrong = _not_finite(sums)
        if wrong or bad:
            verdict = NonFinite(index, tuple([*wrong, *bad][:_MOST_TENSORS]), tuple(samples[:MOST_SAMPLES].tolist()))
            said = [f"gradient() returned {text}" for text in list(wrong.values())[:_MOST_TENSORS]]
            if bad:
                said.append(f"the gradient of {', '.join(bad[:_MOST_TENSORS])} is not finite")
            raise _NotFiniteError("; ".join(said), verdict)
        return Held(out, sums, crc32c=crc)

    def _views_of(self, out: Array) -> dict[str, Array]:
        known = self._views.get(id(out))
        if known is None:
            key, kept = id(out), self._views
            gone = weakref.ref(out, lambda _: kept.pop(key, None))
            known = kept[key] = (gone, self._config.manifest.views(out))
        return known[1]

    def evaluate(self, weights: Mapping[str, Array], index: int) -> Sums | None:
        """Return the sums of one slice of the test split; None where it is empty."""
        samples = evaluation_slice(self._config.test_size, self._config.evaluation_microbatches, index)
        if samples.size == 0:
            return None
        sums = self._task.evaluate(weights, samples)
        sums = _checked(sums, "evaluate", samples.size, self._config)
        for said in _not_finite(sums).values():
            raise GradientError(f"evaluate() returned {said}")
        return sums

    def add(self, left: Sums, right: Sums) -> Sums:
        """Return left + right. Raises GradientError where that has more metrics than fit into a message."""
        sums = add_sums(left, right)
        if len(sums.metrics) > max(len(left.metrics), len(right.metrics)):
            self._config.check_metrics(sums.metrics, "the microbatches of a step have")
        return sums


def _checked(sums: object, method: str, count: int, config: NodeConfig) -> Sums:
    """Return what a task returned in Python's own numbers: those of others may be added with other bits.

    Raises GradientError where it is not what was asked for, or cannot be sent.
    """
    if not isinstance(sums, Sums):
        raise GradientError(f"{method}() returned {type(sums).__name__}; return Sums(loss, count, metrics)")
    if sums.count != count:
        # a mean instead of a sum shows here, before it scales every gradient without a word
        given = f"{count:,} sample{'' if count == 1 else 's'}"
        raise GradientError(f"{method}() returned count {sums.count} for {given}: count what it was given")
    if not isinstance(sums.metrics, Mapping):
        raise GradientError(f"{method}() returned {type(sums.metrics).__name__} as metrics: give a dict, name -> sum")
    for name in sums.metrics:
        if not isinstance(name, str):
            raise GradientError(f"{method}() returned a metric named {name!r}: name each metric with a str")
        if not is_encodable(name):
            raise GradientError(f"{method}() returned a metric named {name!r}, which is no UTF-8: name it otherwise")
    config.check_metrics(sums.metrics, f"{method}() returned")
    metrics = {name: _number(value, f"{method}() returned {name} =") for name, value in sums.metrics.items()}
    return Sums(_number(sums.loss, f"{method}() returned loss"), count, metrics)


def sample_ids(config: NodeConfig, step: int, index: int) -> tuple[int, ...]:
    """Return the first samples of a microbatch, as many as are named in a failure."""
    return tuple(config.sampler.microbatch(step, index)[:MOST_SAMPLES].tolist())


def _number(value: Any, said: str) -> float:
    try:
        math.isfinite(value)  # takes no text, unlike float()
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise GradientError(f"{said} {cut(repr(value), 100)}, of type {type(value).__name__}: give a number") from None


def _not_finite(sums: Sums) -> dict[str, str]:
    """Return what of the sums is not finite, by its name in a verdict, and in words."""
    found = {} if math.isfinite(sums.loss) else {"(loss)": f"loss {sums.loss} over {sums.count} samples"}
    for name, value in sums.metrics.items():
        if not math.isfinite(value):
            found[f"(metric {name})"] = f"{name} = {value}: metrics are finite sums"
    return found


class _Generation:
    """Buffers that were made between two retirements: the free ones, and all of them by id."""

    __slots__ = ("free", "made")

    def __init__(self) -> None:
        self.free: list[Array] = []
        self.made: dict[int, Array] = {}


class Pool:
    """Gradient buffers, touched once and used again. The loop and the compute thread call it, without a lock.

    Mutable state: the generation in use. A buffer of an earlier one is dropped when it comes back.
    """

    def __init__(self, size: int, allocate: Callable[[int], Array]) -> None:
        self._size, self._allocate = size, allocate
        self._now = _Generation()

    def __len__(self) -> int:
        return len(self._now.free)

    def take(self) -> Array:
        while True:
            now = self._now
            try:
                out = now.free.pop()
            except IndexError:
                out = self._allocate(self._size)
                now.made[id(out)] = out
            if now is self._now:  # else it was retired meanwhile
                return out

    def give_back(self, array: Array) -> None:
        now = self._now
        if id(array) in now.made:
            now.free.append(array)

    def retire(self) -> None:
        self._now = _Generation()


class Worker:
    """One compute thread of a sphere. Mutable state: its gradient buffers, and how many units are in compute.

    ``allocate`` makes such a buffer of so many elements: zeros that start at a 64-byte address. It is called on the
    compute thread.
    """

    def __init__(self, config: NodeConfig, task: Task, allocate: Callable[[int], Array] = aligned_zeros) -> None:
        self._config = config
        self._computer = Computer(config, task)
        self._pool = Pool(config.manifest.size, allocate)
        # at most one unit that is not cancelled: the hub gives the next when the one before is done or cancelled
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._units = 0
        # a daemon: a task that is deep in its own code must not hold up the end of the process
        threading.Thread(target=self._work, name="compute", daemon=True).start()

    def submit(self, unit: Unit, weights: Mapping[str, Array], done: Done) -> None:
        """Compute a block; ``done`` is called on the loop, with None where it was cancelled.

        The buffer of what it gives goes back with ``release``.
        """

        def over(result: Held | Failure | None) -> None:
            self._units -= 1
            done(unit, result)

        self._units += 1
        self._jobs.put((asyncio.get_running_loop(), lambda: partial(over, self._computed(unit, weights))))

    def call(self, work: Callable[[], T], done: Callable[[T], object]) -> bool:
        """Do what touches the task, once what was submitted before is over; ``done`` is called on the loop.

        ``work`` must not raise. Returns False where a unit is in compute: cancelled or not, it may take long.
        """
        self._jobs.put((asyncio.get_running_loop(), lambda: partial(done, work())))
        return not self._units

    def release(self, held: Held) -> None:
        """The step is sealed: the buffer may be used again."""
        if held.array is not None:
            self._pool.give_back(held.array)

    def retire(self) -> None:
        """Use no buffer again that is free or given out now; who computes in one finishes. Others are allocated."""
        self._pool.retire()

    def close(self) -> None:
        """End the thread after what it computes now; that is told to nobody once the loop has ended."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            loop, work = job
            told = work()
            try:
                loop.call_soon_threadsafe(told)
            except RuntimeError:  # the loop has ended
                return

    def _computed(self, unit: Unit, weights: Mapping[str, Array]) -> Held | Failure | None:
        try:
            return self._compute(unit, weights)
        except BaseException as error:  # noqa: BLE001 - what a failure's own words raised; this thread must go on
            return Failure(unit.block.lo, cut(type(error).__name__, MOST_ERROR), "", (), invalid=False)

    def _compute(self, unit: Unit, weights: Mapping[str, Array]) -> Held | Failure | None:
        started = perf_counter()
        index = unit.block.lo

        def block(part: Block) -> Held | None:
            """Depth first and left before right: at most log2(width) + 1 buffers at a time."""
            nonlocal index
            if unit.cancelled:
                return None
            whole = part == unit.block  # its checksum is taken in the same pass
            if part.width == 1:
                index = part.lo
                return self._microbatch(unit, weights, part.lo, checksum=whole)
            left_part, right_part = halves(part)
            left = block(left_part)
            right = block(right_part) if left is not None else None
            if left is None or right is None:
                if left is not None:
                    self.release(left)
                return None
            return self._add(left, right, checksum=whole)

        try:
            held = block(unit.block)
            if held is None or held.array is None or held.crc32c:
                return held
            return replace(held, crc32c=crc32c(held.array))  # one side was absent, so there was no last add
        except BaseException as error:  # noqa: BLE001 - the task's own code: anything can come out, SystemExit too
            if unit.cancelled:
                return None  # it read weights that were being replaced (N14): what it says means nothing
            return self._failure(unit, index, error)
        finally:
            unit.seconds = perf_counter() - started

    def _microbatch(self, unit: Unit, weights: Mapping[str, Array], index: int, *, checksum: bool) -> Held:
        if not unit.train:
            return Held(None, self._computer.evaluate(weights, index))
        out = self._pool.take()
        try:
            held = self._computer.microbatch(weights, unit.step, index, out, checksum=checksum)
        except BaseException:
            self._pool.give_back(out)
            raise
        if held.array is None:
            self._pool.give_back(out)
        if held.sums is not None or held.skipped:
            unit.samples += self._config.sampler.count(unit.step, index)
            unit.microbatches += 1
        return held

    def _add(self, left: Held, right: Held, *, checksum: bool) -> Held:
        skipped = left.skipped + right.skipped
        if left.sums is None or right.sums is None:
            return replace(right if left.sums is None else left, skipped=skipped)
        sums = self._computer.add(left.sums, right.sums)
        if left.array is None or right.array is None:
            return Held(None, sums, skipped)
        # a sum that overflows is control's to judge
        crc = add_rounded(left.array, right.array, left.array, self._config.gradient_dtype, checksum=checksum)
        self._pool.give_back(right.array)
        return Held(left.array, sums, skipped, crc)

    def _failure(self, unit: Unit, index: int, error: BaseException) -> Failure:
        ids = sample_ids(self._config, unit.step, index) if unit.train else ()
        invalid = isinstance(error, GradientError)
        text = raised(error)
        if invalid:
            text = text.removeprefix(f"{type(error).__name__}: ")
        line = " ".join(cut(text, MOST_ERROR).split())
        try:
            details = "".join(traceback.format_exception(error))
        except Exception:  # noqa: BLE001 - it asks the exception, and what it came from, for their words
            details = ""
        return Failure(index, line, cut(details, MOST_TRACEBACK, end=True), ids, invalid)
