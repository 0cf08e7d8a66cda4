"""The step loop: one coroutine that owns the run's state, and hands work to the tree, the optimizer and the journal.

The order of a commit is N18: update, journal on disk, then the step is visible. What a user asks for (pause, stop,
checkpoint, restore) is a flag that the loop looks at between two steps.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from control.checkpoint import CheckpointInfo, Checkpoints
from control.config import RunConfig
from control.events import CallbackRegistry, Event
from control.gradients import GradientDecision, prepare
from control.journal import EventLog, Journal
from control.optimizers import make_optimizer
from control.run_state import RunState, move
from control.schedules import learning_rate
from control.snapshot import Snapshot
from control.tree import Tree
from spheres.config import NodeConfig, manifest_to_proto
from spheres.errors import ArmillaryError, CheckpointError, GradientError
from spheres.hub import EVALUATE, TRAIN, Array
from spheres.numerics import is_finite, statistics
from spheres.task import Sums
from spheres.tensors import aligned_zeros
from spheres.v1 import checkpoint_pb2

__all__ = ["Controller"]

log = logging.getLogger(__name__)

#: models up to this many elements are updated on the loop: a thread would cost more than the update
_INLINE_ELEMENTS = 1 << 18
#: statistics read each element three times: of larger models only every tenth step
_STATISTICS_ELEMENTS = 1 << 16


class Controller:
    """A run. It is the RunHandle that callbacks see. Mutable state: everything that a checkpoint holds."""

    def __init__(
        self,
        config: RunConfig,
        node: NodeConfig,
        weights: Array,
        tree: Tree,
        *,
        run_dir: Path,
        term: int,
        journal: Journal,
        events: EventLog,
        checkpoints: Checkpoints,
        callbacks: CallbackRegistry,
    ) -> None:
        self.config, self.node, self.tree, self.run_dir = config, node, tree, run_dir
        self.run_id = node.run_id
        self.state = RunState.IDLE
        self.reason = ""
        self.step = 0
        self.total_steps = config.total_steps(node.sampler.steps_per_epoch)
        self.metrics: dict[str, float] = {}
        self.best_value: float | None = None
        self.best_step = 0
        self.error: ArmillaryError | None = None
        self.wall_seconds = 0.0
        self.totals = {"steps": 0.0, "samples": 0.0, "seconds": 0.0, "compute": 0.0, "up_bytes": 0.0, "down_bytes": 0.0}
        self.phase_seconds: dict[str, float] = {}
        self.start_time = time.time()
        self.latest_checkpoint: CheckpointInfo | None = None
        self.checkpoints = checkpoints
        self.optimizer = make_optimizer(config.optimizer, node.manifest)
        #: hears every record: steps and events, for WatchRun
        self.publish: Callable[[Mapping[str, Any]], None] = lambda _: None
        self._term = term
        self._journal, self._events, self._callbacks = journal, events, callbacks
        self._gradient = aligned_zeros(node.manifest.size)
        self._hub = tree.hub
        self._hub.weights.flat[:] = weights
        self._wake = asyncio.Event()
        self._stop_reason: str | None = None
        self._pause = False
        self._saves: list[asyncio.Future[CheckpointInfo] | None] = []
        self._restores: list[tuple[str | None, asyncio.Future[None]]] = []
        self._saved_at = (-1, time.monotonic())
        self._evaluated = -1
        self._started = time.monotonic()

    def __repr__(self) -> str:
        return f"Controller({self.run_id}, {self.state}, step {self.step}/{self.total_steps})"

    # ---- what callbacks and clients see

    @property
    def epoch(self) -> int:
        return self.node.sampler.epoch_of(self.step)

    @property
    def samples(self) -> int:
        return self.node.sampler.samples_before(self.step)

    @property
    def living_spheres(self) -> int:
        return sum(1 for name in self.tree.spheres if self.tree.state_of(name) == "active")

    @property
    def weights_sha256(self) -> str:
        return self.node.manifest.sha256(self._hub.weights.flat)

    def request_stop(self, reason: str) -> None:
        self._stop_reason = self._stop_reason or reason
        self._wake.set()

    def request_checkpoint(self) -> None:
        self._saves.append(None)
        self._wake.set()

    def pause(self) -> None:
        self._pause = True
        self._wake.set()

    def resume(self) -> None:
        self._pause = False
        self._wake.set()

    async def save(self) -> CheckpointInfo:
        """Checkpoint after the step in hand. Raises CheckpointError; the run goes on."""
        future: asyncio.Future[CheckpointInfo] = asyncio.get_running_loop().create_future()
        self._saves.append(future)
        self._wake.set()
        return await future

    async def restore(self, name: str | None) -> None:
        """Go to a checkpoint of this run between two steps. Raises CheckpointError; then the run goes on as it was."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._restores.append((name, future))
        self._wake.set()
        await future

    # ---- the loop

    async def run(self) -> None:
        """Train until the total, a stop, or an error, which is kept in ``error``."""
        try:
            if self.state is RunState.IDLE:
                self._move(RunState.INITIALIZING)
            self._hub.weights.publish(term=self._term, version=self.step)
            self.tree.restart(self._term)
            await self._until_stop(self.tree.wait_for(self.config.spheres_to_begin), "waiting for spheres")
            self._move(RunState.RUNNING)
            self._emit("train_start", {})
            self._started = time.monotonic()
            while await self._between_steps():
                await self._train_step()
            await self._finish()
        except ArmillaryError as error:
            self.error = error
            self._move(RunState.ERROR, str(error))
            self._tell("error", {"error": str(error)})
        finally:
            for waiting in self._saves:
                if waiting is not None and not waiting.done():
                    waiting.set_exception(CheckpointError("the run has ended"))
            self._emit("train_end", {"state": str(self.state)})

    async def _until_stop(self, work: Awaitable[None], reason: str) -> bool:
        """Wait for ``work``; give it up where a stop is asked for and no sphere is left to finish it."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                self._wake.clear()
                waker = asyncio.ensure_future(self._wake.wait())
                await asyncio.wait({task, waker}, return_when=asyncio.FIRST_COMPLETED, timeout=1.0)
                waker.cancel()
                waiting = not self._hub.children or self._hub.ledger.stuck
                self.reason = reason if waiting else ""
                if self._stop_reason is not None and not task.done() and waiting:
                    return False
            await task
            self.reason = ""
            return True
        finally:
            task.cancel()

    async def _between_steps(self) -> bool:
        """Do what is due or asked for between two steps; whether there is another step."""
        while True:
            if self._restores:
                await self._restore(*self._restores.pop(0))
                continue
            if self._evaluation_due():
                await self._evaluate()
                continue
            if self._saves or self._checkpoint_due():
                await self._checkpoint()
                continue
            limit = self.config.max_time
            if limit is not None and self._stop_reason is None and time.monotonic() - self._started >= limit:
                self._stop_reason = f"max_time of {limit:g} s is over"
            if self._stop_reason is not None or self.step >= self.total_steps:
                return False
            if not self._pause:
                if self.state is RunState.PAUSED:
                    self._move(RunState.RUNNING)
                return True
            if self.state is RunState.RUNNING:
                self._move(RunState.PAUSED)
            self._wake.clear()
            await self._wake.wait()

    async def _train_step(self) -> None:
        step, sampler, hub = self.step, self.node.sampler, self._hub
        within = step % sampler.steps_per_epoch
        if within == 0:
            self._emit("epoch_start", {"epoch": self.epoch})
        self._emit("batch_start", {"step": step})
        began, up, down = perf_counter(), hub.received_bytes, hub.sent_down_bytes
        if not await self._until_stop(self.tree.compute(step, TRAIN, self._gradient), "waiting for spheres"):
            return
        sealed = perf_counter()
        sums = hub.sums
        assert sums is not None  # every step has at least one sample
        hub.seal()
        attempts, contributions = hub.ledger.attempts, hub.contributors_of_all()
        if self.node.manifest.size <= _INLINE_ELEMENTS:
            decision, figures = self._update(step, sums)
        else:
            decision, figures = await asyncio.to_thread(self._update, step, sums)
        updated = perf_counter()
        self._emit("gradient_sync", {"step": step, "norm": decision.norm})
        record = self._record(step, sums, decision, figures, began, sealed, updated)
        record |= {
            "bytes_up": hub.received_bytes - up,
            "bytes_down": hub.sent_down_bytes - down,
            "contributions": [[b.lo, b.hi, who] for b, who in contributions],
            "attempts": attempts,
        }
        recorded = self._journal.recorded_digest(step)
        if recorded is not None:
            record["replayed"] = True
            if recorded != record["weights_digest"]:
                raise CheckpointError(
                    f"step {step} done again gave weights {record['weights_digest']}, the journal has {recorded}"
                )
        self._journal.append(record)
        self.step += 1
        self.metrics["loss"] = record["loss"]
        for name, value in record["metrics"].items():
            self.metrics[f"train_{name}"] = value
        self._count(record)
        self.publish(record)
        self._emit("weight_update", {"step": step, "weights_version": self.step})
        self._emit("batch_end", record, step=step)
        if self.step % sampler.steps_per_epoch == 0:
            self._emit("epoch_end", {"epoch": sampler.epoch_of(step)}, step=step)

    def _update(self, step: int, sums: Sums) -> tuple[GradientDecision, dict[str, Any]]:
        """Mean, clip, optimizer, new version. Nothing is changed before the sum is known to be finite (N16)."""
        manifest, weights, gradient = self.node.manifest, self._hub.weights, self._gradient
        config = self.config
        decision = prepare(manifest, gradient, sums.count, clip_norm=config.clip_norm, clip_value=config.clip_value)
        if not decision.finite:
            raise GradientError(f"the summed gradient of step {step} is not finite")
        rate = learning_rate(config.schedule, config.learning_rate, step, self.total_steps)
        self.optimizer.begin()
        self.optimizer.update(weights.flat, gradient, rate, 0, gradient.size)
        if not is_finite(weights.flat):
            raise GradientError(f"the weights are not finite after step {step}; lower the learning rate or clip")
        weights.publish(term=self._term, version=step + 1)
        figures: dict[str, Any] = {"learning_rate": rate}
        if manifest.size <= _STATISTICS_ELEMENTS or step % 10 == 0:
            figures["gradient"] = _overall(manifest, gradient)
            figures["weights"] = _overall(manifest, weights.flat)
        return decision, figures

    def _record(
        self,
        step: int,
        sums: Sums,
        decision: GradientDecision,
        figures: dict[str, Any],
        began: float,
        sealed: float,
        updated: float,
    ) -> dict[str, Any]:
        sampler, hub = self.node.sampler, self._hub
        phases: dict[str, dict[str, Any]] = {
            phase: {"sum": total, "max": largest, "slowest": slowest}
            for phase, (total, largest, slowest) in hub.phases.below.items()
        }
        seconds = updated - began
        compute = phases.get("compute", {}).get("max", 0.0)
        return {
            "event": "step",
            "step": step,
            "epoch": sampler.epoch_of(step),
            "term": self._term,
            "weights_version": step + 1,
            "samples": sampler.samples_before(step + 1),
            "batch_samples": sampler.batch_count(step),
            "loss": sums.loss / sums.count,
            "metrics": {name: value / sums.count for name, value in sums.metrics.items()},
            "learning_rate": figures["learning_rate"],
            "gradient": {**figures.get("gradient", {}), "norm": decision.norm, "clipped": decision.clipped},
            "weights": figures.get("weights", {}),
            "weights_digest": hub.weights.digest.hex(),
            "seconds": {"step": seconds, "gather": sealed - began, "optimizer": updated - sealed},
            "phases": phases,
            "sync_fraction": max(0.0, 1 - compute / seconds) if seconds else 0.0,
            "spheres": self.tree.computing,
            "replayed": False,
            "time": time.time(),
        }

    def _count(self, record: Mapping[str, Any]) -> None:
        totals = self.totals
        totals["steps"] += 1
        totals["samples"] += record["batch_samples"]
        totals["seconds"] += record["seconds"]["step"]
        totals["compute"] += record["seconds"]["step"] * (1 - record["sync_fraction"])
        totals["up_bytes"] += record["bytes_up"]
        totals["down_bytes"] += record["bytes_down"]
        for phase, times in record["phases"].items():
            self.phase_seconds[phase] = self.phase_seconds.get(phase, 0.0) + times["sum"]
        optimizer = record["seconds"]["optimizer"]
        self.phase_seconds["optimizer"] = self.phase_seconds.get("optimizer", 0.0) + optimizer

    # ---- evaluation

    def _evaluation_due(self) -> bool:
        if self.node.test_size == 0 or self._evaluated == self.step or self.step == 0:
            return False
        if self.step >= self.total_steps:
            return True
        every = self.config.eval_every
        return every is not None and every.due(
            step=self.step, steps_per_epoch=self.node.sampler.steps_per_epoch, seconds=0.0
        )

    async def _evaluate(self) -> None:
        began = perf_counter()
        if not await self._until_stop(self.tree.compute(self.step, EVALUATE, None), "waiting for spheres"):
            self._evaluated = self.step
            return
        self._evaluated = self.step
        sums = self._hub.sums
        assert sums is not None  # the test split is not empty
        metrics = {name: value / sums.count for name, value in sums.metrics.items()}
        loss = sums.loss / sums.count
        self.metrics |= {**metrics, "test_loss": loss}
        name, up = self.config.best_metric, self.config.best_direction == "max"
        value = loss if name == "loss" else metrics.get(name)
        best = value is not None and (
            self.best_value is None or (value > self.best_value if up else value < self.best_value)
        )
        if best and value is not None:
            self.best_value, self.best_step = value, self.step
        record: dict[str, Any] = {"step": self.step, "epoch": self.node.sampler.epoch_of(self.step - 1), "loss": loss}
        record |= {"metrics": metrics, "samples": sums.count, "seconds": perf_counter() - began, "best": best}
        self._tell("evaluation", record)

    # ---- checkpoints

    def _checkpoint_due(self) -> bool:
        every = self.config.checkpoint_every
        if every is None or self.step == 0 or self._saved_at[0] == self.step:
            return False
        return every.due(
            step=self.step,
            steps_per_epoch=self.node.sampler.steps_per_epoch,
            seconds=time.monotonic() - self._saved_at[1],
        )

    async def _checkpoint(self) -> None:
        """Save now. A failure is loud, and the run goes on: the checkpoint before stands."""
        waiting, self._saves = self._saves, []
        before = self.state
        self._move(RunState.CHECKPOINTING)
        began = perf_counter()
        info: CheckpointInfo | None = None
        failure: CheckpointError | None = None
        try:
            snapshot = await self._snapshot()
            info = await asyncio.to_thread(self.checkpoints.save, snapshot)
            self.latest_checkpoint = info
        except CheckpointError as error:
            failure = error
            log.error("%s", error)
        self._saved_at = (self.step, time.monotonic())
        self._move(before)
        record: dict[str, Any] = {"step": self.step, "seconds": perf_counter() - began, "ok": info is not None}
        if info is not None:
            record |= {"path": info.path, "size_bytes": info.size_bytes}
        else:
            record["error"] = str(failure)
        self._tell("checkpoint", record)
        for future in waiting:
            if future is not None and not future.done():
                if info is not None:
                    future.set_result(info)
                else:
                    future.set_exception(failure or CheckpointError("not saved"))

    async def _snapshot(self) -> Snapshot:
        weights = self._hub.weights
        run = checkpoint_pb2.RunRecord(
            run_id=self.run_id,
            term=self._term,
            step=self.step,
            weights_version=weights.version,
            weights_digest=weights.digest,
            weights_sha256=self.weights_sha256,
            manifest=manifest_to_proto(self.node.manifest),
            config_json=self.config.to_json(),
            optimizer_count=self.optimizer.count,
            epoch=self.epoch,
            samples_count=self.samples,
            seed=self.config.seed,
            metrics={k: v for k, v in self.metrics.items() if math.isfinite(v)},
            best_value=self.best_value,
            best_step=self.best_step,
            task_fingerprint=self.node.task_fingerprint,
            data_fingerprint=self.node.data_fingerprint,
            wall_seconds=self.wall_seconds + time.monotonic() - self._started,
            callback_states={name: json.dumps(state) for name, state in self._callbacks.states().items()},
        )
        states = await self.tree.states(timeout=self.config.patience)
        spheres = [checkpoint_pb2.SphereRecord(report=s.report, task_state=s.task_state) for s in states]
        buffers: dict[str, Array] = {"weights": weights.flat}
        buffers |= {f"optimizer/{name}": buffer for name, buffer in self.optimizer.state().items()}
        best = self.best_value is not None and self.best_step == self.step
        return Snapshot(
            run=run,
            buffers=buffers,
            spheres=spheres,
            tree=dict(self.tree.parents),
            finite=is_finite(weights.flat),
            best=best,
        )

    def load(self, snapshot: Snapshot) -> None:
        """Take over a snapshot's state. Raises CheckpointError, with nothing changed, where it is of another model."""
        run = snapshot.run
        if run.manifest.digest != self.node.manifest.digest:
            raise CheckpointError("the checkpoint is of a model with another layout; is it the same task?")
        buffers = {k.removeprefix("optimizer/"): v for k, v in snapshot.buffers.items() if k.startswith("optimizer/")}
        self.optimizer.restore(run.optimizer_count, buffers)
        self._hub.seal()
        np.copyto(self._hub.weights.flat, snapshot.buffers["weights"])
        self.step = run.step
        self.metrics = dict(run.metrics)
        self.best_value = run.best_value if run.HasField("best_value") else None
        self.best_step, self.wall_seconds = run.best_step, run.wall_seconds
        self._saved_at, self._evaluated = (run.step, time.monotonic()), -1
        self._callbacks.restore({name: json.loads(text) for name, text in run.callback_states.items()})

    async def _restore(self, name: str | None, answer: asyncio.Future[None]) -> None:
        before = self.state
        self._move(RunState.RESTORING)
        try:
            snapshot = await asyncio.to_thread(self.checkpoints.load, name or None)
            self.load(snapshot)
            self._term = self.raise_term()
            self.tree.restart(self._term)
            self._hub.weights.publish(term=self._term, version=self.step)
        except CheckpointError as error:
            answer.set_exception(error)
        else:
            answer.set_result(None)
        self._move(before)

    #: raises the run's term, durably (N1); the run directory's
    raise_term: Callable[[], int]

    # ---- the end

    async def _finish(self) -> None:
        ended = RunState.COMPLETED if self.step >= self.total_steps else RunState.STOPPED
        if self._saved_at[0] != self.step or self._saves:
            await self._checkpoint()
        self._move(ended, self._stop_reason or "")

    def _move(self, to: RunState, reason: str = "") -> None:
        if to is not self.state:
            self.state = move(self.state, to)
            self.reason = reason
            if to not in (RunState.CHECKPOINTING, RunState.RESTORING):
                self._note("state", {"state": str(to), "reason": reason})

    def sphere_changed(self, event: str, sphere: str, reason: str) -> None:
        """A sphere joined or was lost."""
        self._tell(event, {"sphere": sphere, "reason": reason})

    def _tell(self, event: str, record: dict[str, Any]) -> None:
        """Write an event to its log, to watchers and to callbacks."""
        self._emit(event, self._note(event, record))

    def _note(self, event: str, record: dict[str, Any]) -> dict[str, Any]:
        full = {"event": event, "step": self.step, **record, "time": time.time()}
        self._events.append(full)
        self.publish(full)
        return full

    def _emit(self, name: str, record: Mapping[str, Any], *, step: int | None = None) -> None:
        if self._callbacks.wants(name):
            at = self.step if step is None else step
            self._callbacks.emit(Event(name, at, self.node.sampler.epoch_of(at), record), self)


def _overall(manifest: Any, flat: Array) -> dict[str, float]:
    """Return norm, min, max, mean and variance over all tensors together."""
    parts = list(statistics(manifest, flat).values())
    sizes = [spec.size for spec in manifest.tensors]
    count = sum(sizes)
    mean = sum(p.mean * n for p, n in zip(parts, sizes, strict=True)) / count
    squares = sum(p.norm**2 for p in parts)
    return {
        "norm": math.sqrt(squares),
        "min": min(p.minimum for p in parts),
        "max": max(p.maximum for p in parts),
        "mean": mean,
        "variance": max(0.0, squares / count - mean * mean),
    }
