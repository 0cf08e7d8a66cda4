"""The step loop: one coroutine that owns the run's state, and hands work to the tree, the optimizer and the journal.

The order of a commit is N18: update, journal on disk, then the step is visible. What others ask for (pause, stop,
checkpoint, restore) is noted, and looked at between two steps.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import numpy as np

from control.checkpoint import CheckpointInfo, Checkpoints
from control.config import RunConfig
from control.events import CallbackRegistry, Event
from control.gradients import MOST_SKIPPED_STEPS, Outcome
from control.journal import EventLog, Journal, weights_of
from control.metrics import StepTimes, Totals, nonfinite_reason, origin, step_record
from control.position import Position, put_back, take_snapshot
from control.run_state import RunState, move
from control.saver import Saver
from control.snapshot import Snapshot
from control.tree import Tree
from control.update import Update, Updater
from spheres.blocks import Block
from spheres.config import NodeConfig
from spheres.environments import Environments, Range
from spheres.errors import ArmillaryError, CheckpointError, GradientError, RunStateError
from spheres.hub import EVALUATE, TRAIN, Array, Work
from spheres.numerics import Run, in_turn
from spheres.tensors import aligned_zeros
from spheres.v1 import checkpoint_pb2

__all__ = ["Controller"]

log = logging.getLogger(__name__)

T = TypeVar("T")

#: models up to this many elements are updated on the loop: a thread would cost more than the update
_INLINE_ELEMENTS = 1 << 18
#: seconds between two looks at the clock (max_time) while a step is in hand
_LOOK_SECONDS = 1.0


def _nothing() -> None:
    """Nobody is to hear of it."""


class Controller:
    """A run. It is the RunHandle that callbacks see. Mutable state: everything that a checkpoint holds."""

    def __init__(
        self,
        config: RunConfig,
        node: NodeConfig,
        tree: Tree,
        *,
        run_dir: Path,
        journal: Journal,
        events: EventLog,
        checkpoints: Checkpoints,
        callbacks: CallbackRegistry,
        raise_term: Callable[[], int],
    ) -> None:
        self.config, self.node, self.tree, self.run_dir = config, node, tree, run_dir
        self.run_id = node.run_id
        self.state = RunState.IDLE
        self.reason = ""
        self.total_steps = config.total_steps(node.sampler.steps_per_epoch)
        self.error: ArmillaryError | None = None
        self.totals = Totals()
        self.start_time = time.time()
        self.callbacks = callbacks
        callbacks.on_failure = self._callback_failed
        #: hears every record: steps and events, for WatchRun
        self.publish: Callable[[Mapping[str, Any]], None] = lambda _: None
        self._position = Position()
        self._updater = Updater(config, node.manifest, self.total_steps)
        self._journal, self._events = journal, events
        # raises the run's term, durably (N1): the run directory's
        self._raise_term = raise_term
        self._gradient = aligned_zeros(node.manifest.size)
        self._hub = tree.hub
        # set by whatever the loop should look at; and set when the state has changed, for those who wait for it
        self._wake, self._changed = asyncio.Event(), asyncio.Event()
        # the same while a step is in hand; asyncio.wait for this and the step would cost more than all else in a wait
        self._interrupt: asyncio.Future[None] | None = None
        self._stop_reason: str | None = None
        self._failure: ArmillaryError | None = None
        self._pause = False
        self._pause_at: int | None = None
        self._requests: deque[tuple[Callable[[], Awaitable[Any]], asyncio.Future[Any]]] = deque()
        self._saver = Saver(checkpoints, self._told_of_save)
        if config.checkpoint_every is not None:
            self._saver.copies.reserve(self._hub.weights.flat, self._updater.optimizer)
        # step and time of the last save begun; step of the last evaluation
        self._saved_at = (-1, time.monotonic())
        self._evaluated = -1
        # what the last record took to reach the disk; the next one says it
        self._journal_seconds = 0.0
        self._started = time.monotonic()

    def __repr__(self) -> str:
        return f"Controller({self.run_id}, {self.state}, step {self.step}/{self.total_steps})"

    # ---- what callbacks and clients see

    @property
    def step(self) -> int:
        """Steps committed."""
        return self._position.step

    @property
    def latest_checkpoint(self) -> CheckpointInfo | None:
        """The newest that was saved by this process."""
        return self._saver.latest

    @property
    def checkpoints(self) -> Checkpoints:
        return self._saver.checkpoints

    @property
    def metrics(self) -> dict[str, float]:
        return self._position.metrics

    @property
    def best_value(self) -> float | None:
        return self._position.best_value

    @property
    def epoch(self) -> int:
        return self.node.sampler.epoch_of(self.step)

    @property
    def samples(self) -> int:
        return self.node.sampler.samples_before(self.step)

    @property
    def mixed_recomputes(self) -> int:
        """Microbatches of all steps that were lost and computed in another environment than they were meant for."""
        return self._position.mixed_recomputes

    @property
    def living_spheres(self) -> int:
        return self.tree.living

    @property
    def complete(self) -> bool:
        """Whether no step and no evaluation is left, so that no sphere is needed."""
        return self.step >= self.total_steps and not self._evaluation_due()

    @property
    def train_seconds(self) -> float:
        """Seconds since training began, those of earlier terms included."""
        return self._position.earlier_seconds + time.monotonic() - self._started

    def request_stop(self, reason: str) -> None:
        """End after the step in hand, with a checkpoint."""
        self._stop_reason = self._stop_reason or reason
        self._look_now()

    def request_checkpoint(self) -> None:
        """Save after the step in hand."""
        self._saver.wanted = True
        self._look_now()

    def fail(self, error: ArmillaryError) -> None:
        """End the run with this error, now if it only waits for spheres, else after the step in hand."""
        self._failure = self._failure or error
        self._look_now()

    def pause(self) -> None:
        """Finish the step in hand, then wait. Raises RunStateError where the run has ended."""
        self._not_ended()
        self._pause = True
        self._look_now()

    def resume(self) -> None:
        """Go on after a pause. Raises RunStateError where the run has ended."""
        self._not_ended()
        self._pause, self._pause_at = False, None
        self._look_now()

    async def advance(self, steps: int) -> None:
        """Do so many steps, then pause. Returns when the run is paused after them, or has ended."""
        self._not_ended()
        self._pause, self._pause_at = False, self.step + steps
        self._look_now()
        await self.until(lambda: self._pause and self.state is RunState.PAUSED)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a change of state after which ``condition`` holds, or the run has ended."""
        while not (condition() or self.state.ended):
            self._changed.clear()
            await self._changed.wait()

    async def between_steps(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do ``work`` when no step is in hand; return what it gave. Raises RunStateError where the run ends first."""
        self._not_ended()
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._requests.append((work, answer))
        self._look_now()
        return await answer

    async def save(self) -> CheckpointInfo:
        """Checkpoint after the step in hand, and after a save under way; return when it is on disk.

        Raises CheckpointError; the run goes on. RunStateError where the run ends first.
        """
        self._not_ended()
        answer = self._saver.ask()
        self._look_now()
        return await answer

    async def restore(self, name: str | None) -> None:
        """Go to a checkpoint of this run between two steps. Raises CheckpointError; then the run goes on as it was."""
        await self.between_steps(lambda: self._restore(name))

    async def copy_weights(self) -> tuple[int, Array]:
        """Return the version of the weights between two steps, and a copy of the flat buffer."""
        if self.state.ended:
            return self.step, self._hub.weights.flat.copy()
        return await self.between_steps(self._copy)

    async def _copy(self) -> tuple[int, Array]:
        return self.step, await asyncio.to_thread(self._hub.weights.flat.copy)

    def _not_ended(self) -> None:
        if self.state.ended:
            raise RunStateError(f"the run is {self.state} and has ended; go on with --resume")

    # ---- the loop

    async def run(self) -> None:
        """Train until the total, a stop, or an error, which is kept in ``error``."""
        begun = False
        try:
            self._move(RunState.INITIALIZING)
            self._hub.weights.publish(term=self.tree.term, version=self.step)
            if self.complete or await self._while_waiting(
                self.tree.wait_for(self.config.spheres_to_begin), always=True
            ):
                self._move(RunState.RUNNING)
                self._started = time.monotonic()
                begun = True
                self._emit("train_start", {})
                while await self._between_steps():
                    await self._train_step()
            await self._finish()
        except ArmillaryError as error:
            await self._fail(error, save=begun)
        except Exception as error:  # whoever waits for the run must learn that it is over
            log.exception("the step loop failed")
            await self._fail(ArmillaryError(f"{type(error).__name__}: {error} (not expected)"), save=False)
        finally:
            await self._saver.done()  # also where the loop is cancelled: a thread that writes cannot be
            self._saver.close()
            while self._requests:
                _, answer = self._requests.popleft()
                if not answer.done():
                    answer.set_exception(RunStateError("the run has ended"))
            if begun:
                self._emit("train_end", {"state": str(self.state)})

    async def _while_waiting(self, work: Awaitable[None], *, always: bool = False) -> bool:
        """Wait for ``work``; False where a stop came while no sphere could finish it (or ``always``)."""
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
        task.add_done_callback(self._stir)
        try:
            while not task.done():
                self._interrupt = loop.create_future()
                # by the clock too: nobody says when max_time is over
                look = loop.call_later(_LOOK_SECONDS, self._stir)
                try:
                    await self._interrupt
                finally:
                    look.cancel()
                waiting = not task.done() and (always or not self._hub.children or self._hub.ledger.stuck)
                self.reason = "waiting for spheres" if waiting else ""
                if not waiting:
                    continue
                if self._failure is not None:
                    raise self._failure
                self._look_at_clock()
                if self._stop_reason is not None:
                    return False
            task.result()
            return True
        finally:
            self.reason = ""
            task.cancel()

    def _look_now(self) -> None:
        """Something was asked for: let the loop see it."""
        self._wake.set()
        self._stir()

    def _stir(self, _: object = None) -> None:
        """Let who waits while a step is in hand look again."""
        if self._interrupt is not None and not self._interrupt.done():
            self._interrupt.set_result(None)

    def _look_at_clock(self) -> None:
        limit = self.config.max_time
        if limit is not None and self._stop_reason is None and time.monotonic() - self._started >= limit:
            self._stop_reason = f"max_time of {limit:g} s is over"

    async def _between_steps(self) -> bool:
        """Do what is due or asked for between two steps; whether there is another step."""
        while True:
            if self._failure is not None:
                raise self._failure
            if self._requests:
                await self._answer(*self._requests.popleft())
                continue
            if self._evaluation_due():
                await self._evaluate()
                continue
            if self._checkpoint_due():
                await self._checkpoint()
                continue
            self._look_at_clock()
            if self._stop_reason is not None or self.step >= self.total_steps:
                return False
            if self._pause_at is not None and self.step >= self._pause_at:
                self._pause, self._pause_at = True, None
            if not self._pause:
                if self.state is RunState.PAUSED:
                    self._move(RunState.RUNNING)
                await self.tree.tidy()
                return True
            if self.state is RunState.RUNNING:
                self._move(RunState.PAUSED)
            self._wake.clear()
            await self._wake.wait()

    async def _answer(self, work: Callable[[], Awaitable[Any]], answer: asyncio.Future[Any]) -> None:
        if answer.cancelled():
            return  # whoever asked has gone
        try:
            result = await work()
        except ArmillaryError as error:
            if not answer.done():
                answer.set_exception(error)
        else:
            if not answer.done():
                answer.set_result(result)

    async def _train_step(self) -> None:
        step, sampler, hub = self.step, self.node.sampler, self._hub
        if step % sampler.steps_per_epoch == 0:
            self._emit("epoch_start", {"epoch": self.epoch})
        self._emit("batch_start", {"step": step})
        began, up, down = perf_counter(), hub.received_bytes, hub.sent_down_bytes
        if not await self._while_waiting(self.tree.compute(step, TRAIN, self._gradient)):
            return
        sealed = perf_counter()
        attempts = hub.ledger.attempts
        sums, skipped = hub.sums, hub.gradients.skipped
        contributions = hub.gradients.contributions(Block(0, self.node.microbatches))
        environments, moved = hub.ledger.environments, len(hub.ledger.moved)
        phases = hub.phases.copy()
        update = await self._update(step)
        times = StepTimes(began, sealed, perf_counter())
        self._span("optimizer", times.updated - times.sealed, step)
        norm = None if update.decision is None else update.decision.norm
        self._emit("gradient_sync", {"step": step, "norm": norm})
        record = step_record(
            step,
            term=self.tree.term,
            sampler=sampler,
            sums=sums,
            skipped=skipped,
            update=update,
            digest=hub.weights.digest,
            times=times,
            phases=phases,
            spheres=self.tree.computing,
            contributions=contributions,
            environments=environments,
            moved=moved,
            attempts=attempts,
            bytes_up=hub.received_bytes - up,
            bytes_down=hub.sent_down_bytes - down,
        )
        await self._commit(record)
        self._span("step", perf_counter() - began, step)

    async def _update(self, step: int) -> Update:
        sums, skipped = self._hub.sums, len(self._hub.gradients.skipped)
        hub, term = self._hub, self.tree.term
        hub.seal()

        def apply(run: Run, announce: Callable[[], None] = _nothing, progress: Callable[[], None] = _nothing) -> Update:
            return self._updater.apply(
                hub.weights,
                self._gradient,
                sums,
                step=step,
                term=term,
                skipped=skipped,
                announce=announce,
                progress=progress,
                run=run,
            )

        if self.node.manifest.size <= _INLINE_ELEMENTS:
            return apply(in_turn)
        side_by_side = self.tree.side_by_side
        if not self._trains_next():
            return await asyncio.to_thread(apply, side_by_side)
        # Children get the new version while it is being made; what they owe, which makes the step visible, after its
        # record is on disk (N18).
        loop = asyncio.get_running_loop()
        coming = Work(term, step + 1, EVALUATE)

        def announce() -> None:
            loop.call_soon_threadsafe(hub.announce, coming)

        def progress() -> None:
            loop.call_soon_threadsafe(hub.stream)

        return await asyncio.to_thread(apply, side_by_side, announce, progress)

    def _trains_next(self) -> bool:
        """Whether the step in hand is followed by another at once, as far as is known now, and weights then travel."""
        if all(child.outbox.carrier.together() for child in self._hub.children.values()):
            return False  # they lie where their readers are
        following = self.step + 1
        if self._failure is not None or self._stop_reason is not None or self._requests or self._pause:
            return False
        if following >= self.total_steps or (self._pause_at is not None and following >= self._pause_at):
            return False
        return not self._evaluates_at(following)

    async def _commit(self, record: dict[str, Any]) -> None:
        """Journal the step, then show it (N18). Raises what keeps it from being committed: the run ends with that."""
        step = record["step"]
        record["seconds"] |= {"journal": self._journal_seconds, **self._saver.take_stall()}
        try:
            await self._record(record)
        except BaseException:
            # These weights are ahead of the step that did not become one: no checkpoint may take them for its own.
            self._hub.weights.withdraw()
            raise
        self._position.step += 1
        self._position.mixed_recomputes += record["mixed_recompute"]
        shown = {"loss": record["loss"], **{f"train_{name}": value for name, value in record["metrics"].items()}}
        self.metrics.update({name: value for name, value in shown.items() if value is not None})
        self.totals.add(record)
        self.publish(record)
        if record["decision"] != Outcome.APPLIED:
            self._tell_nonfinite(record)
        self._emit("weight_update", {"step": step, "weights_version": self.step})
        self._emit("batch_end", record, step=step)
        if self.step % self.node.sampler.steps_per_epoch == 0:
            self._emit("epoch_end", {"epoch": record["epoch"]}, step=step)
        if self.totals.skipped_in_a_row >= MOST_SKIPPED_STEPS:
            raise GradientError(
                f"{MOST_SKIPPED_STEPS} steps in a row were skipped, up to step {step}: {nonfinite_reason(record)}; go "
                "back to a checkpoint before them, and lower the learning rate or look at those samples"
            )

    def _warn_of_mixed(self, step: int, moved: int) -> None:
        if moved:
            log.warning(
                "step %d: %d microbatches were computed in another numeric environment than the one that they were "
                "meant for, of which no sphere was left, or went on: bits may differ from those of an undisturbed run",
                step,
                moved,
            )

    async def _redone_elsewhere(self, record: dict[str, Any]) -> bool:
        """Whether a step done again has other bits since others computed it: counted, and what follows is new too."""
        before = self._journal.made_in(record["step"])
        if before is None:
            return False
        parts, moved = before
        others = Environments(Range(*part) for part in parts).unlike(Range(*part) for part in record["environments"])
        if not (others or moved or record["mixed_recompute"]):
            return False
        record["mixed_recompute"] = max(others, record["mixed_recompute"], 1)
        await asyncio.to_thread(self._journal.forget, record["step"])
        return True

    async def _record(self, record: dict[str, Any]) -> None:
        """Compare a step that is done again with its record, and append the new one."""
        recorded = self._journal.recorded_digest(record["step"])
        if recorded is not None:
            record["replayed"] = True
            if recorded != weights_of(record) and not await self._redone_elsewhere(record):
                raise CheckpointError(
                    f"step {record['step']} done again gave weights {weights_of(record)}, the journal has "
                    f"{recorded}: the task is not deterministic, or this machine computes other bits; see control-cli "
                    "doctor and control-cli replay"
                )
        self._warn_of_mixed(record["step"], record["mixed_recompute"])
        if self._journal.term != record["term"]:
            # what a replay needs to know of this process, once
            record["origin"] = await asyncio.to_thread(origin, self.config, self.node)
        # Off the loop: on a slow disk heartbeats must not wait for it. A record that cannot be written is not tried
        # again: the disk is full or gone, and the last checkpoint is where it is safe to go on from.
        began = perf_counter()
        await asyncio.to_thread(self._journal.append, record)
        self._journal_seconds = perf_counter() - began
        self._span("journal", self._journal_seconds, record["step"])

    def _tell_nonfinite(self, record: Mapping[str, Any]) -> None:
        """Say that a step was skipped, or was applied without some of its microbatches."""
        step, decision = record["step"], record["decision"]
        key = "skipped_steps" if decision == Outcome.SKIPPED_STEP else "skipped_microbatches"
        before = int(self.metrics.get(key, 0))
        count = before + (1 if key == "skipped_steps" else len(record["nonfinite"]))
        self.metrics[key] = float(count)  # checkpoints keep it
        reason = nonfinite_reason(record)
        # a run that diverges must not fill the log: at the 1st, 2nd, 4th, 8th ...
        loud = before.bit_length() != count.bit_length()
        if loud:
            log.warning("step %d: %s (%s; %d %s so far)", step, decision, reason, count, key.replace("_", " "))
        told = {"step": step, "decision": decision, "nonfinite": record["nonfinite"], "reason": reason}
        told |= {key: count, "loud": loud}
        self._emit("nonfinite", self._note("nonfinite", told), step=step)

    # ---- evaluation

    def _evaluation_due(self) -> bool:
        return self._evaluated != self.step and self._evaluates_at(self.step)

    def _evaluates_at(self, step: int) -> bool:
        if self.node.test_size == 0 or step == 0:
            return False
        every = self.config.eval_every
        if step >= self.total_steps:
            return True
        return every is not None and every.due(
            step=step, steps_per_epoch=self.node.sampler.steps_per_epoch, seconds=0.0
        )

    async def _evaluate(self) -> None:
        began = perf_counter()
        self._evaluated = self.step
        if not await self._while_waiting(self.tree.compute(self.step, EVALUATE, None)):
            return
        sums, moved = self._hub.sums, len(self._hub.ledger.moved)
        assert sums is not None  # the test split is not empty
        self._position.mixed_recomputes += moved
        self._warn_of_mixed(self.step, moved)
        metrics = {name: value / sums.count for name, value in sums.metrics.items()}
        loss = sums.loss / sums.count
        self.metrics.update({**metrics, "test_loss": loss})
        best = self._position.note_best({**metrics, "loss": loss}, self.config)
        record: dict[str, Any] = {"step": self.step, "epoch": self.node.sampler.epoch_of(self.step - 1), "loss": loss}
        record |= {"metrics": metrics, "samples": sums.count, "seconds": perf_counter() - began, "best": best}
        record["mixed_recompute"] = moved
        self._span("evaluation", record["seconds"], self.step)
        self._tell("evaluation", record)

    # ---- checkpoints

    def _checkpoint_due(self) -> bool:
        """Whether one is to begin now. One that is due while another is still being saved is left out."""
        every = self.config.checkpoint_every
        due = self._saver.wanted
        if every is not None and self.step and self._saved_at[0] != self.step:
            seconds = time.monotonic() - self._saved_at[1]
            due |= every.due(step=self.step, steps_per_epoch=self.node.sampler.steps_per_epoch, seconds=seconds)
        return due and not self._saver.busy

    async def _checkpoint(self, *, copied: bool = True) -> None:
        """Take a copy and begin to save it beside the steps that follow; without a copy where none follows.

        A failure is loud, and the run goes on: the checkpoint before stands.
        """
        before = self.state
        self._move(RunState.CHECKPOINTING)
        self._saved_at = (self.step, time.monotonic())
        began = perf_counter()
        try:
            # asked before the next step is given out, so that a task's state is that between the two
            await self._saver.begin(self._snapshot, self._sphere_records(), copied=copied)
        finally:
            self._span("checkpoint_copy", perf_counter() - began, self.step)
            self._move(before)

    async def _sphere_records(self) -> list[checkpoint_pb2.SphereRecord]:
        states = await self.tree.states(timeout=self.config.patience)
        return [checkpoint_pb2.SphereRecord(report=s.report, task_state=s.task_state) for s in states]

    def _told_of_save(self, step: int, record: dict[str, Any]) -> None:
        self._span("checkpoint_save", record["seconds"] - record["stall_seconds"], step)
        try:
            self._emit("checkpoint", self._note("checkpoint", {"step": step, **record}), step=step)
        except ArmillaryError as error:  # a callback that may end the run
            self.fail(error)
        finally:
            self._look_now()  # one that was asked for meanwhile may begin

    async def _save_at_end(self) -> None:
        """Save the last state, unless it is saved already. Returns when it is on disk, or that has failed."""
        await self._saver.done()
        if self.step and (self._saved_at[0] != self.step or self._saver.wanted or self._saver.failed):
            await self._checkpoint(copied=False)
            await self._saver.done()

    def _snapshot(self) -> Snapshot:
        return take_snapshot(
            self._position,
            config=self.config,
            node=self.node,
            term=self.tree.term,
            weights=self._hub.weights,
            optimizer=self._updater.optimizer,
            seconds=self.train_seconds,
            tree=self.tree.shape(),
            environment_shares=self._hub.ledger.shares,
            callback_states=self.callbacks.states(),
        )

    def start_from(self, weights: Array) -> None:
        """Take these first weights."""
        np.copyto(self._hub.weights.flat, weights)

    def load(self, snapshot: Snapshot, *, evaluated: bool = False) -> None:
        """Take over a snapshot's state. Raises CheckpointError, with nothing changed, where it is of another model.

        ``evaluated``: the evaluation that may be due at its step has been done.
        """
        self._hub.seal()
        self._position = put_back(
            snapshot, node=self.node, weights=self._hub.weights, optimizer=self._updater.optimizer
        )
        self._hub.ledger.shares = dict(snapshot.run.environment_shares)
        self._saved_at, self._evaluated = (self.step, time.monotonic()), self.step if evaluated else -1
        self.callbacks.restore({name: json.loads(text) for name, text in snapshot.run.callback_states.items()})

    async def _restore(self, name: str | None) -> None:
        before = self.state
        self._move(RunState.RESTORING)
        try:
            # it may be the one that is wanted, and its retention must not remove what is being read
            await self._saver.done()
            passed_over: list[str] = []
            snapshot = await asyncio.to_thread(self.checkpoints.load, name or None, passed_over.append)
            self.tell_passed_over(passed_over)
            # before anything is changed: under the old term spheres would take what comes now for what they had
            self.tree.term = await asyncio.to_thread(self._raise_term)
            self.load(snapshot)
            self._started = time.monotonic()
        finally:
            self._hub.weights.publish(term=self.tree.term, version=self.step)
            self._move(before)

    def tell_passed_over(self, problems: Sequence[str]) -> None:
        """Write to the event log which checkpoints were newer than the one restored, and why they were not taken."""
        for problem in problems:
            self._note("checkpoint_passed_over", {"ok": False, "error": problem})

    # ---- the end

    async def _finish(self) -> None:
        await self._save_at_end()
        ended = RunState.COMPLETED if self.step >= self.total_steps else RunState.STOPPED
        self._move(ended, self._stop_reason or "")

    async def _fail(self, error: ArmillaryError, *, save: bool) -> None:
        """End in an error. What is committed is whole, unless the update itself failed: --resume goes on from there."""
        self.error = error
        try:
            self._tell("error", {"error": str(error)})
            await self._saver.done()
            # where a step was not committed, its weights are already the next ones: done again it would count twice
            if save and self._hub.weights.complete and self._hub.weights.version == self.step:
                await self._save_at_end()
        except ArmillaryError as another:  # events that cannot be written, a callback that raises
            log.error("%s", another)
        finally:
            self.state, self.reason = move(self.state, RunState.ERROR), str(error)
            self._changed.set()
        self._note("state", {"state": str(self.state), "reason": self.reason})

    # ---- saying what happens

    def _move(self, to: RunState, reason: str = "") -> None:
        if to is not self.state:
            self.state = move(self.state, to)
            self.reason = reason
            if to not in (RunState.CHECKPOINTING, RunState.RESTORING):
                self._note("state", {"state": str(to), "reason": reason})
            self._changed.set()

    def sphere_changed(self, event: str, sphere: str, reason: str) -> None:
        """A sphere joined or was lost."""
        self._tell(event, {"sphere": sphere, "reason": reason})

    def _span(self, name: str, seconds: float, step: int) -> None:
        """Record what has just ended, where the run is traced."""
        if self.tree.recorder is not None:
            self.tree.recorder.add(name, seconds, step=step)

    def _callback_failed(self, record: Mapping[str, Any]) -> None:
        self._note("error", dict(record))

    def _tell(self, event: str, record: dict[str, Any]) -> None:
        """Write an event to its log, to watchers and to callbacks."""
        self._emit(event, self._note(event, record))

    def _note(self, event: str, record: dict[str, Any]) -> dict[str, Any]:
        full = {"event": event, "step": self.step, **record, "time": time.time()}
        self._events.append(full)
        self.publish(full)
        return full

    def _emit(self, name: str, record: Mapping[str, Any], *, step: int | None = None) -> None:
        if self.callbacks.wants(name):
            at = self.step if step is None else step
            self.callbacks.emit(Event(name, at, self.node.sampler.epoch_of(at), record), self)
