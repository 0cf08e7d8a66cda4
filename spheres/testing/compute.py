"""A worker on virtual time: the real gradients and canonical sums, computed on the loop, told after a while.

It reads half of the weights when a block begins and half when it ends, so that weights that change meanwhile show in
the bits. It can raise, or give what is no number, when it is told to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from spheres.blocks import Block, halves
from spheres.config import NodeConfig
from spheres.errors import GradientError
from spheres.narrow import add_rounded
from spheres.numerics import add_sums
from spheres.reducer import Held
from spheres.task import Task
from spheres.tensors import aligned_zeros
from spheres.worker import Computer, Failure, Pool, Unit

__all__ = ["VirtualWorker"]

T = TypeVar("T")

Array = npt.NDArray[np.float32]
Done = Callable[[Unit, Held | Failure | None], None]


class VirtualWorker:
    """Stands for ``spheres.worker.Worker``.

    ``seconds`` gives the time that a unit takes. ``computed`` hears of each microbatch whose gradient was computed.
    A buffer that comes back is spoilt at once: who reads it still, and says what it read, shows in the bits.
    Mutable state: the buffers, when it is free again, the gradients that it has given and not got back.
    """

    def __init__(
        self,
        config: NodeConfig,
        task: Task,
        *,
        seconds: Callable[[Unit], float],
        computed: Callable[[int, int], None] = lambda _step, _index: None,
        allocate: Callable[[int], Array] = aligned_zeros,
    ) -> None:
        self._config, self._seconds, self._told = config, seconds, computed
        self._computer = Computer(config, task)
        self._pool = Pool(config.manifest.size, allocate)
        self.busy_until = 0.0
        self.given: dict[int, Held] = {}
        self._closed = False

    def submit(self, unit: Unit, weights: Mapping[str, Array], done: Done) -> None:
        loop = asyncio.get_running_loop()
        start = max(loop.time(), self.busy_until)
        unit.seconds = self._seconds(unit)
        self.busy_until = start + unit.seconds
        first: dict[str, Array] = {}

        def begin() -> None:
            first.update({name: view.reshape(-1)[: view.size // 2].copy() for name, view in weights.items()})

        def end() -> None:
            if self._closed:
                return
            mixed: dict[str, Array] = {}
            for name, view in weights.items():
                now = view.copy()
                now.reshape(-1)[: view.size // 2] = first[name]
                mixed[name] = now
            result = self._compute(unit, mixed)
            if isinstance(result, Held) and result.array is not None:
                self.given[id(result.array)] = result
            done(unit, result)

        if start > loop.time():
            loop.call_at(start, begin)
        else:
            begin()
        loop.call_at(self.busy_until, end)

    def call(self, work: Callable[[], T], done: Callable[[T], object]) -> bool:
        loop = asyncio.get_running_loop()
        loop.call_at(max(loop.time(), self.busy_until), lambda: self._closed or done(work()))
        return self.busy_until <= loop.time()

    def release(self, held: Held) -> None:
        if held.array is not None:
            assert self.given.pop(id(held.array)) is held, "a gradient was released twice"
            before = len(self._pool)
            self._pool.give_back(held.array)
            if len(self._pool) > before:  # else it was retired, and keeps what is in it
                held.array.fill(np.nan)

    def retire(self) -> None:
        self._pool.retire()

    def close(self) -> None:
        self._closed = True

    def _compute(self, unit: Unit, weights: Mapping[str, Array]) -> Held | Failure | None:
        if unit.cancelled:
            return None
        index = unit.block.lo

        def block(part: Block) -> Held:
            nonlocal index
            if part.width == 1:
                index = part.lo
                return self._microbatch(unit, weights, index)
            left, right = (block(half) for half in halves(part))
            if left.sums is None or right.sums is None:
                return right if left.sums is None else left
            sums = add_sums(left.sums, right.sums)
            if left.array is None or right.array is None:
                return Held(None, sums)
            add_rounded(left.array, right.array, left.array, self._config.gradient_dtype)
            self._pool.give_back(right.array)
            return Held(left.array, sums)

        try:
            return block(unit.block)
        except Exception as error:  # noqa: BLE001 - the task's own code
            invalid = isinstance(error, GradientError)
            text = str(error) if invalid else f"{type(error).__name__}: {error}"
            ids = tuple(int(i) for i in self._config.sampler.microbatch(unit.step, index)[:64]) if unit.train else ()
            return Failure(index, text, "", ids, invalid)

    def _microbatch(self, unit: Unit, weights: Mapping[str, Array], index: int) -> Held:
        if not unit.train:
            return Held(None, self._computer.evaluate(weights, index))
        out = self._pool.take()
        sums = self._computer.gradient(weights, unit.step, index, out)
        if sums is None:
            self._pool.give_back(out)
            return Held(None, None)
        unit.samples += self._config.sampler.count(unit.step, index)
        unit.microbatches += 1
        self._told(unit.step, index)
        return Held(out, sums)
