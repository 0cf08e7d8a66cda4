"""Checks before a run, each with what to do about it: the task and its gradients, memory, the wire, the run directory.

It starts no process and opens no socket: the checks that need one are in ``control.cli.doctor``.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from control.config import RunConfig
from control.initial import initial_weights, node_config
from control.optimizers import make_optimizer
from control.placement import CONTROL, Member, place
from control.run_dir import BASE
from spheres.blocks import Block
from spheres.config import NodeConfig
from spheres.cut import cut
from spheres.environment import describe, environment_fingerprint, resident_bytes
from spheres.errors import ArmillaryError, ConfigError, GradientError, SegmentError, TaskError
from spheres.narrow import wire_itemsize
from spheres.sampling import evaluation_slice
from spheres.segments import node_memory
from spheres.task import Sums, Task, data_fingerprint, described, load_task, split_size, task_fingerprint
from spheres.tensors import Manifest, aligned_zeros
from spheres.worker import Computer, limit_threads

__all__ = [
    "Result",
    "Trial",
    "answer",
    "check_directory",
    "check_memory",
    "check_other",
    "check_task",
    "check_wire",
    "read_answer",
]

Array = npt.NDArray[np.float32]
T = TypeVar("T")

#: what a process of a run holds beyond what this one does: gRPC, its threads and buffers
_GRPC_BYTES = 50 << 20


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of one check. ``message`` is one line: what was found, and what to do where it is not ok."""

    check: str
    state: Literal["ok", "warning", "failed"]
    message: str
    #: of the command, where this has failed
    exit_code: int = 0
    #: traceback, where there is one
    details: str = ""


@dataclass(frozen=True)
class Trial:
    """What one task object gave for one microbatch, to be compared with what another one gives for the same."""

    weights_sha256: str
    gradient: Array
    #: loss, count and metrics, as text that shows every bit
    sums: str
    #: task, data and environment
    fingerprints: Mapping[str, str]
    #: of this process, without weights and gradients: imports, the task and its data
    resident_bytes: int = 0
    manifest: Manifest = field(default_factory=lambda: Manifest(()))


def check_task(config: RunConfig) -> tuple[list[Result], Trial | None]:
    """Try the task out as a sphere would, and again; the trial is what a fresh process has to give too.

    None where it came to no gradient.
    """
    limit_threads()
    examination = _Examination(config)
    with suppress(_StopError):
        examination.run()
    return examination.results, examination.trial


class _StopError(Exception):
    """A check failed that all the others need."""


class _Examination:
    """Mutable state: the results so far, and what the next checks need."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.results: list[Result] = []
        self.trial: Trial | None = None

    def run(self) -> None:
        config, denormals = self.config, describe()["denormals"]
        task = self._needed("task", lambda: load_task(config.task, config.task_options))
        self._ok("task", f"{config.task} is {type(task).__module__}.{type(task).__qualname__}")
        sizes = self._needed("data", lambda: _sizes(task))
        self._ok("data", f"{sizes[0]:,} samples to train on, {sizes[1]:,} to test")
        prints = self._needed("fingerprints", lambda: _fingerprints(task, config))
        again = self._needed("fingerprints", lambda: _fingerprints(task, config))
        if prints == again:
            self._ok("fingerprints", ", ".join(f"{name} {text}" for name, text in prints.items()))
        else:
            self._fail("fingerprints", "data_fingerprint() gives another value each time: derive it from the data")
        manifest, flat = self._needed("init_weights", lambda: initial_weights(task, config))
        self._weights(task, manifest, flat)
        node = self._needed("data", lambda: node_config(task, config, manifest, run_id="doctor"))
        self._gradient(task, node, flat, prints)
        self._threads()
        now = describe()["denormals"]
        if now != denormals:
            self._fail("environment", f"denormals are {now} after the task ran, and were {denormals} before: a library "
                       "that it loads sets that, and bits depend on when")  # fmt: skip

    def _weights(self, task: Task, manifest: Manifest, flat: Array) -> None:
        again = self._needed("init_weights", lambda: initial_weights(task, self.config))[1]
        different = _difference(manifest, flat, again)
        if different:
            self._fail("init_weights", f"gives other weights each time ({different}): use the rng that it is given")
        else:
            text = f"{_many(len(manifest.tensors), 'tensor')}, {manifest.parameters:,} parameters"
            self._ok("init_weights", f"{text}, {_size(manifest.size * 4)} float32, finite, the same bits twice")

    def _gradient(self, task: Task, node: NodeConfig, flat: Array, prints: Mapping[str, str]) -> None:
        """The first microbatch, then another one and an evaluation, then the first again on another buffer."""
        computer, manifest, sampler = Computer(node, task), node.manifest, node.sampler
        weights, sha256 = manifest.views(flat, writeable=False), manifest.sha256(flat)
        filled = [index for index in range(node.microbatches) if sampler.count(0, index)]
        first, other = aligned_zeros(manifest.size), aligned_zeros(manifest.size)

        def gradient(index: int, out: Array) -> Sums:
            sums = _tried("gradient", lambda: computer.gradient(weights, 0, index, out))
            assert sums is not None  # the microbatch is not empty
            return sums

        sums = self._needed("gradient", lambda: gradient(filled[0], first))
        if not first.any():
            self._fail("gradient", "wrote nothing into out: add to out[name] in place, out[name] += value")
            raise _StopError
        loss = f"loss {sums.loss / sums.count:.4g}"
        self._ok("gradient", f"of {_many(sums.count, 'sample')}: finite, shapes and sums are right, {loss}")
        untouched = [name for name, view in manifest.views(first).items() if view.size and not view.any()]
        if untouched:
            self._warn("gradient", f"is 0 for all of {', '.join(untouched)}: is it written to out?")
        if getattr(task, "overwrites_out", False):
            for view in manifest.views(other).values():
                view.fill(1)
            self._needed("gradient", lambda: gradient(filled[0], other))
            different = _difference(manifest, first, other)
            if different:
                self._fail("gradient", f"has other bits where out held something before ({different}): write every "
                           "element of out, or do not say overwrites_out")  # fmt: skip
                raise _StopError
        self._needed("gradient", lambda: gradient(filled[-1], other))
        self._evaluate(computer, node, weights)
        repeated = self._needed("gradient repeats", lambda: gradient(filled[0], other))
        resident = resident_bytes()[0] - 3 * manifest.size * 4
        self.trial = Trial(sha256, first, _exact(sums), prints, resident, manifest)
        self._same("gradient repeats", "the second time", Trial(sha256, other, _exact(repeated), prints))
        self._fresh(task)
        if manifest.sha256(flat) == sha256:
            self._ok("weights", "were left as they were")
        else:
            self._fail("weights", "were changed by the task, though they are read-only: copy what you change")

    def _evaluate(self, computer: Computer, node: NodeConfig, weights: Mapping[str, Array]) -> None:
        parts = range(node.evaluation_microbatches)
        sizes = [evaluation_slice(node.test_size, node.evaluation_microbatches, part).size for part in parts]
        if not any(sizes):
            self._warn("evaluate", "there is no test split: nothing will be evaluated")
            return
        part = next(index for index in parts if sizes[index])

        def evaluation() -> Sums:
            sums = _tried("evaluate", lambda: computer.evaluate(weights, part))
            assert sums is not None  # the slice is not empty
            return sums

        try:
            one, two = evaluation(), evaluation()
        except ArmillaryError as error:
            self._fail("evaluate", str(error), error)
            return
        if _exact(one) != _exact(two):
            self._fail("evaluate", f"gives other sums each time ({_exact(one)}, then {_exact(two)})")
            return
        known = ["loss", *one.metrics]
        if self.config.best_metric not in known:
            self._warn("evaluate", f"has no {self.config.best_metric!r} for best_metric: choose of {', '.join(known)}")
        else:
            self._ok("evaluate", f"gives {', '.join(known)}, the same twice")

    def _fresh(self, task: Task) -> None:
        made = self._needed("gradient repeats", lambda: load_task(self.config.task, self.config.task_options))
        if made is not task:  # a ready object stands for itself
            trial = self._needed("gradient repeats", lambda: _try_out(made, self.config))
            self._same("new task object", "from a new task object", trial)

    def _same(self, check: str, when: str, trial: Trial) -> None:
        assert self.trial is not None
        self.results.append(check_other(self.trial, trial, check=check, when=when))

    def _threads(self) -> None:
        from threadpoolctl import threadpool_info

        counts = {f"{lib['user_api']} {lib['internal_api']}": lib["num_threads"] for lib in threadpool_info()}
        torch = sys.modules.get("torch")
        if torch is not None:
            counts["torch"] = torch.get_num_threads()
        many = [f"{name} has {count}" for name, count in counts.items() if count != 1]
        if many:
            self._fail("threads", f"{', '.join(many)} after the task ran: it must leave the one that spheres pin")
        elif not counts:
            self._warn("threads", "no BLAS library was found here: bits may differ with its number of threads")
        else:
            self._ok("threads", f"one each for {', '.join(counts)}")

    # ---- results

    def _needed(self, check: str, work: Callable[[], T]) -> T:
        """Return what ``work`` gives; where it raises, the check has failed and so has all that follows."""
        try:
            return work()
        except ArmillaryError as error:
            self._fail(check, str(error), error)
        except Exception as error:  # noqa: BLE001 - the task's own code: anything can come out of it
            self._fail(check, described(error), error)
        raise _StopError

    def _ok(self, check: str, message: str) -> None:
        self.results.append(Result(check, "ok", message))

    def _warn(self, check: str, message: str) -> None:
        self.results.append(Result(check, "warning", message))

    def _fail(self, check: str, message: str, error: Exception | None = None) -> None:
        code = error.exit_code if isinstance(error, ConfigError) else TaskError.exit_code
        self.results.append(Result(check, "failed", " ".join(message.split()), code, _trace(error)))


def check_other(trial: Trial, other: Trial | Exception, *, check: str, when: str) -> Result:
    """Compare with what another object or process gave for the same microbatch of the same run."""
    failed = TaskError.exit_code
    if isinstance(other, Exception):
        return Result(check, "failed", f"{when} it failed: {other}", failed, getattr(other, "details", ""))
    for name, mine in trial.fingerprints.items():
        if other.fingerprints[name] != mine:
            text = f"{when} the fingerprint of {name} is {other.fingerprints[name]}, not {mine}"
            hint = "derive data_fingerprint() from the data" if name == "data" else "the two are not alike"
            return Result(check, "failed", f"{text}: {hint}, or spheres are refused", failed)
    if other.weights_sha256 != trial.weights_sha256:
        text = f"{when} init_weights() gives other weights: use the rng that it is given"
        return Result(check, "failed", text, failed)
    different = _difference(trial.manifest, trial.gradient, other.gradient)
    if different is None and other.sums != trial.sums:
        different = f"sums {trial.sums}, then {other.sums}"
    if different is not None:
        hint = "use no randomness but the rng that gradient() is given, no clock, and keep nothing between two calls"
        return Result(check, "failed", f"{when} the gradient has other bits ({different}): {hint}", failed)
    return Result(check, "ok", f"{when} the same bits")


# ---- trials


def _try_out(task: Task, config: RunConfig) -> Trial:
    """Return the trial of a task object. Raises what the task raises."""
    manifest, flat = initial_weights(task, config)
    node = node_config(task, config, manifest, run_id="doctor")
    index = next(index for index in range(node.microbatches) if node.sampler.count(0, index))
    out = aligned_zeros(manifest.size)
    sums = Computer(node, task).gradient(manifest.views(flat, writeable=False), 0, index, out)
    assert sums is not None  # the microbatch is not empty
    return Trial(manifest.sha256(flat), out, _exact(sums), _fingerprints(task, config), 0, manifest)


def answer() -> None:
    """Be the fresh process: the configuration is read from standard input, the trial goes to standard output."""
    limit_threads()
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the task prints must not get in between
    head: dict[str, Any]
    body = b""
    try:
        config = RunConfig.from_json(sys.stdin.buffer.read())
        trial = _try_out(load_task(config.task, config.task_options), config)
        head = {"weights_sha256": trial.weights_sha256, "sums": trial.sums, "fingerprints": trial.fingerprints}
        body = trial.gradient.tobytes()
    except Exception as error:  # noqa: BLE001 - the task's own code: anything can come out of it
        text = str(error) if isinstance(error, ArmillaryError) else described(error)
        head = {"error": text, "details": _trace(error)}
    with output:
        output.write(json.dumps(head).encode() + b"\n" + body)


def read_answer(data: bytes) -> Trial | Exception:
    """Return what ``answer`` wrote. Raises ValueError where it did not come that far."""
    end = data.index(b"\n") + 1
    head = json.loads(data[:end])
    if "error" in head:
        return GradientError(head["error"], head["details"])
    return Trial(gradient=np.frombuffer(data, np.float32, offset=end), **head)


def _sizes(task: Task) -> tuple[int, int]:
    train, test = split_size(task, "train"), split_size(task, "test")
    if not train:
        raise TaskError("size('train') is 0: there is nothing to train on")
    return train, test


def _fingerprints(task: Task, config: RunConfig) -> dict[str, str]:
    return {
        "task": task_fingerprint(task, config.task, config.task_options),
        "data": data_fingerprint(task),
        "environment": environment_fingerprint(),
    }


def _tried(method: str, call: Callable[[], T]) -> T:
    """Return what a method of the task gives. Raises its own error as a GradientError that names the place."""
    try:
        return call()
    except ArmillaryError:
        raise
    except Exception as error:
        text = described(error)
        if "read-only" in text:
            text += "; weights are read-only: copy what you change"
        raise GradientError(f"{method}() raised {text}") from error


def _exact(sums: Sums) -> str:
    values = {"loss": sums.loss, "count": sums.count, **dict(sorted(sums.metrics.items()))}
    return ", ".join(f"{name} {float(value)!r}" for name, value in values.items())


def _difference(manifest: Manifest, left: Array, right: Array) -> str | None:
    """Return which tensor is the first that differs and by how much; None where all bits are the same."""
    if left.size != right.size:
        return f"{right.size:,} elements, not {left.size:,}"
    for (name, mine), theirs in zip(
        manifest.views(left, writeable=False).items(), manifest.views(right, writeable=False).values(), strict=True
    ):
        unequal = mine.reshape(-1).view(np.uint32) != theirs.reshape(-1).view(np.uint32)
        if unequal.any():
            largest = np.abs(mine.astype(np.float64) - theirs).max()
            return f"{name!r} differs in {int(unequal.sum()):,} of {mine.size:,} elements, by up to {largest:.3g}"
    return None


def _trace(error: Exception | None) -> str:
    return "" if error is None else "".join(traceback.format_exception(error))


# ---- estimates


@dataclass(frozen=True, slots=True)
class _Load:
    """What one node does in an undisturbed step."""

    #: blocks that it computes itself
    own: list[Block]
    #: blocks that it sends up
    up: int
    #: blocks of its own and of its children that it keeps apart
    slots: int
    children: int


def _loads(config: RunConfig) -> dict[str, _Load]:
    """Return the load of control and of each sphere, all spheres on one host and equally fast."""
    count = config.spheres or config.spheres_to_begin
    tree = place("host", [Member(f"s-{n + 1}", "host", address="host:1") for n in range(count)], config.fan_out)
    children: dict[str, list[str]] = {CONTROL: [], **{name: [] for name in tree}}
    capacity = dict.fromkeys(tree, 1.0)
    for name, parent in reversed(tree.items()):  # deepest first
        children[parent].insert(0, name)
        if parent != CONTROL:
            capacity[parent] += capacity[name]
    loads: dict[str, _Load] = {}
    given = {CONTROL: [Block(0, config.microbatches)]}
    for name in (CONTROL, *tree):
        workers = [(child, capacity[child]) for child in children[name]]
        pieces = dict(cut(given.get(name, []), workers if name == CONTROL else [(name, 1.0), *workers]))
        slots = sum(map(len, pieces.values()))
        loads[name] = _Load(pieces.pop(name, []), len(given.get(name, [])), slots, len(children[name]))
        given |= pieces
    return loads


def check_memory(config: RunConfig, trial: Trial, machine: int) -> Result:
    """Estimate what each process needs at its peak (RECOVERY, Memory) and compare with ``machine`` bytes."""
    try:
        buffers = _optimizer_buffers(config, trial.manifest)
    except ConfigError as error:
        return Result("memory", "failed", str(error), error.exit_code)
    model = trial.manifest.size * 4
    process = trial.resident_bytes + _GRPC_BYTES
    window = min(config.window * config.chunk_bytes, model)

    def sphere(load: _Load) -> int:
        # blocks that are done, and the stack of the one being computed
        held = max((done + block.width.bit_length() for done, block in enumerate(load.own)), default=0)
        return process + model * (1 + held) + (window * (load.slots + 1) if load.children else 0)

    loads = _loads(config)
    root = loads.pop(CONTROL)
    # besides its own weights those that spheres see, where these are rounded
    seen = 0 if config.weights_wire_dtype == "float32" else 1
    control = process + model * (2 + seen + buffers) + window * (root.slots + 1)
    leaves = [sphere(load) for load in loads.values() if not load.children]
    inner = [sphere(load) for load in loads.values() if load.children]
    parts = [f"control {_size(control)}", f"a leaf {_size(max(leaves))}"]
    parts += [f"an inner sphere {_size(max(inner))}"] if inner else []
    here = config.spheres if config.launcher == "local" else 0
    needed = control + (sum(leaves) + sum(inner) if here else 0)
    who = f"control and {here} local spheres" if here else "control alone"
    text = f"{', '.join(parts)}; {who} need {_size(needed)} of {_size(machine)}"
    if needed > machine:
        return Result("memory", "warning", f"{text}: that does not fit; start fewer local spheres")
    return Result("memory", "ok", text)


def check_wire(config: RunConfig, manifest: Manifest) -> Result:
    """Count the bytes of an undisturbed step: weights down every edge, one gradient per block up."""
    loads = _loads(config)
    edges = len(loads) - 1
    weights, gradient = (manifest.size * wire_itemsize(t) for t in (config.weights_wire_dtype, config.wire_dtype))
    root = loads.pop(CONTROL)
    up = sum(load.up for load in loads.values())
    idle = sum(1 for load in loads.values() if not load.own)
    text = (
        f"a step sends {_size(weights * edges)} down and {_size(gradient * up)} up over {_many(edges, 'edge')}; "
        f"control's share is {_size(weights * root.children)} and {_size(gradient * root.slots)}"
    )
    if idle:
        return Result("wire", "warning", f"{text}; {idle} of {edges} spheres have no microbatch: raise --microbatches")
    return Result("wire", "ok", text)


def check_shared_memory(config: RunConfig) -> Result:
    """Look whether processes of this host can share memory; another container's are another host's."""
    check = "shared memory"
    if config.wire == "inline":
        return Result(check, "ok", "not used: --wire inline")
    try:
        node_memory("shm")
    except SegmentError as error:
        if config.wire == "shm":
            return Result(check, "failed", f"{error}; start with --wire auto", ConfigError.exit_code)
        return Result(check, "warning", f"{error}: payload between local spheres goes in messages")
    return Result(check, "ok", "local spheres read weights and leave gradients where control has them at hand")


def check_directory(config: RunConfig, trial: Trial | None) -> list[Result]:
    """Look where the run directory would be, and whether checkpoints fit there. Makes nothing."""
    path = (config.run_dir or BASE).absolute()
    existing = next(place for place in (path, *path.parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        text = f"{path} cannot be written: {existing} is not writable or no directory; give another --run-dir"
        return [Result("run directory", "failed", text, ConfigError.exit_code)]
    if config.run_dir is not None and (path / "run.json").exists():
        text = f"{path} holds a run: go on with --resume, or give another --run-dir"
        results = [Result("run directory", "warning", text)]
    else:
        results = [Result("run directory", "ok", f"{path} can be written")]
    if trial is None:
        return results
    try:
        checkpoint = trial.manifest.size * 4 * (1 + _optimizer_buffers(config, trial.manifest))
    except ConfigError:
        return results  # said of the memory
    # the newest, the best, and the one that is being written
    count, free = config.keep + 2, shutil.disk_usage(existing).free
    text = f"up to {count} checkpoints of {_size(checkpoint)}; {_size(free)} are free"
    if count * checkpoint > free:
        return [*results, Result("disk", "warning", f"{text}: lower --keep, or give another --run-dir")]
    return [*results, Result("disk", "ok", text)]


def _optimizer_buffers(config: RunConfig, manifest: Manifest) -> int:
    """Return how many buffers of the model's size the optimizer has. Raises ConfigError for groups that do not fit."""
    small = Manifest.of({spec.name: np.zeros(1, np.float32) for spec in manifest.tensors})
    return len(make_optimizer(config.optimizer, small).state())


def _size(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB" if size >= 10 << 20 else f"{size / 2**20:,.2f} MiB"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
