"""The step loop: one coroutine that owns the run's state, and hands work to the tree, the optimizer and the journal.

The order of a commit is N18: update, journal on disk, then the step is visible. What others ask for (pause, stop,
checkpoint, restore) is noted, and looked at between two steps.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

from control.checkpoint import CheckpointInfo, Checkpoints
from control.config import RunConfig
from control.evaluation import Evaluations
from control.events import CallbackRegistry
from control.gradients import MOST_SKIPPED_STEPS, Outcome
from control.journal import EventLog, Journal
from control.journalling import Journalling
from control.metrics import StepTimes, Totals, nonfinite_reason, step_record
from control.position import Standing
from control.renewal import Renewal
from control.requests import Requests, unexpected
from control.run_state import RunState, move
from control.saver import Saver
from control.snapshot import Snapshot
from control.telling import Teller
from control.tree import Tree
from control.update import Updater
from spheres.blocks import Block
from spheres.config import NodeConfig
from spheres.errors import (
    ArmillaryError,
    CheckpointError,
    ConfigError,
    GradientError,
    RefusedError,
    RunStateError,
)
from spheres.hub import EVALUATE, TRAIN, Array
from spheres.v1 import checkpoint_pb2

__all__ = ["Controller"]

log = logging.getLogger(__name__)

T = TypeVar("T")

#: seconds between two looks at the clock (max_time) while a step is in hand
_LOOK_SECONDS = 1.0


class Controller:
    """A run. It is the RunHandle that callbacks see.

    Mutable state: the state of the run and why it is in it, and through its parts all that a checkpoint holds.
    """

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
        self._renewal = Renewal(tree, Updater(config, node.manifest, self.total_steps))
        # raises the run's term, durably (N1): the run directory's
        self._raise_term = raise_term
        self._hub = tree.hub
        tree.fail = self.fail
        self._requests = Requests()
        # set when the state has changed, for those who wait for it
        self._changed = asyncio.Event()
        optimizer = self._renewal.updater.optimizer
        self._standing = Standing(config, node, tree, optimizer, callbacks)
        self._evaluations = Evaluations(config, node, self.total_steps)
        self._teller = Teller(self, node.sampler, events=events, callbacks=callbacks, recorder=tree.recorder)
        self._journalling = Journalling(journal, self._teller, config, node)
        self._saver = Saver(checkpoints, self._told_of_save)
        if config.checkpoint_every is not None:
            self._saver.copies.reserve(self._hub.weights.flat, optimizer)

    def __repr__(self) -> str:
        return f"Controller({self.run_id}, {self.state}, step {self.step}/{self.total_steps})"

    # ---- what callbacks and clients see

    @property
    def step(self) -> int:
        """Steps committed."""
        return self._standing.position.step

    @property
    def publish(self) -> Callable[[Mapping[str, Any]], None]:
        """What hears every record, of steps and of events; WatchRun sets it."""
        return self._teller.publish

    @publish.setter
    def publish(self, hears: Callable[[Mapping[str, Any]], None]) -> None:
        self._teller.publish = hears

    @property
    def latest_checkpoint(self) -> CheckpointInfo | None:
        """The newest that was saved by this process."""
        return self._saver.latest

    @property
    def checkpoints(self) -> Checkpoints:
        return self._saver.checkpoints

    @property
    def metrics(self) -> dict[str, float]:
        return self._standing.position.metrics

    @property
    def best_value(self) -> float | None:
        return self._standing.position.best_value

    @property
    def epoch(self) -> int:
        return self.node.sampler.epoch_of(self.step)

    @property
    def samples(self) -> int:
        return self.node.sampler.samples_before(self.step)

    @property
    def mixed_recomputes(self) -> int:
        """Microbatches of all steps that were lost and computed in another environment than they were meant for."""
        return self._standing.position.mixed_recomputes

    @property
    def living_spheres(self) -> int:
        return self.tree.living

    @property
    def complete(self) -> bool:
        """Whether no step and no evaluation is left, so that no sphere is needed."""
        return self.step >= self.total_steps and not self._evaluations.due(self.step)

    @property
    def train_seconds(self) -> float:
        """Seconds since training began, those of earlier terms included."""
        return self._standing.train_seconds

    def request_stop(self, reason: str) -> None:
        """End after the step in hand, with a checkpoint."""
        self._requests.stop(reason)

    def request_checkpoint(self) -> None:
        """Save after the step in hand."""
        self._saver.wanted = True
        self._requests.look_now()

    def fail(self, error: ArmillaryError) -> None:
        """End the run with this error, now if it only waits for spheres, else after the step in hand."""
        self._requests.fail(error)

    def pause(self) -> None:
        """Finish the step in hand, then wait. Raises RunStateError where the run has ended."""
        self._not_ended()
        self._requests.pause_now()

    def resume(self) -> None:
        """Go on after a pause. Raises RunStateError where the run has ended."""
        self._not_ended()
        self._requests.go_on()

    async def advance(self, steps: int) -> None:
        """Do so many steps, 0 or more, then pause. Returns when the run is paused after them, or has ended.

        Raises ConfigError for less than 0, RunStateError where the run has ended.
        """
        if steps < 0:
            raise ConfigError(f"cannot do {steps} steps: give 0 or more; restore goes back")
        self._not_ended()
        self._requests.go_on(self.step + steps)
        await self.until(lambda: self._requests.pause and self.state is RunState.PAUSED)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a change of state after which ``condition`` holds, or the run has ended."""
        while not (condition() or self.state.ended):
            self._changed.clear()
            await self._changed.wait()

    async def between_steps(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do ``work`` when no step is in hand; return what it gave. Raises RunStateError where the run ends first."""
        self._not_ended()
        return await self._requests.between_steps(work)

    async def save(self) -> CheckpointInfo:
        """Checkpoint after the step in hand, and after a save under way; return when it is on disk.

        Raises CheckpointError; the run goes on. RunStateError where the run ends first.
        """
        self._not_ended()
        answer = self._saver.ask()
        self._requests.look_now()
        return await answer

    async def restore(self, name: str | None) -> None:
        """Go to a checkpoint of this run between two steps. Raises CheckpointError; then the run goes on as it was."""
        await self.between_steps(lambda: self._restore(name))

    async def copy_weights(self) -> tuple[int, Array]:
        """Return the version of the weights between two steps, and a copy of the flat buffer.

        Raises RefusedError where there is no memory for the copy; the run goes on.
        """
        return await self._copy() if self.state.ended else await self.between_steps(self._copy)

    async def _copy(self) -> tuple[int, Array]:
        flat = self._hub.weights.flat
        try:
            return self.step, await asyncio.to_thread(flat.copy)
        except MemoryError:
            raise RefusedError(
                f"control has no memory for a copy of the weights ({flat.nbytes} bytes); take them from a checkpoint "
                "(control-cli checkpoint export)"
            ) from None

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
                self._standing.begin()
                begun = True
                self._teller.emit("train_start", {})
                while await self._between_steps():
                    await self._train_step()
            await self._finish()
        except ArmillaryError as error:
            await self._fail(error, save=begun)
        except Exception as error:  # whoever waits for the run must learn that it is over
            log.exception("the step loop failed")
            await self._fail(unexpected(error), save=False)
        finally:
            await self._saver.done()  # also where the loop is cancelled: a thread that writes cannot be
            self._saver.close()
            self._requests.close()
            if begun:
                self._teller.emit("train_end", {"state": str(self.state)})

    async def _while_waiting(self, work: Awaitable[None], *, always: bool = False) -> bool:
        """Wait for ``work``; False where a stop came while no sphere could finish it (or ``always``)."""
        task, requests = asyncio.ensure_future(work), self._requests
        task.add_done_callback(requests.stir)
        try:
            while not task.done():
                # by the clock too: nobody says when max_time is over
                await requests.stirred(_LOOK_SECONDS)
                waiting = not task.done() and (always or not self._hub.children or self._hub.ledger.stuck)
                self.reason = "waiting for spheres" if waiting else ""
                if not waiting:
                    continue
                if requests.failure is not None:
                    raise requests.failure
                self._look_at_clock()
                if requests.stop_reason is not None:
                    return False
            task.result()
            return True
        finally:
            self.reason = ""
            task.cancel()

    def _look_at_clock(self) -> None:
        limit = self.config.max_time
        if limit is not None and self._requests.stop_reason is None and self._standing.latest_seconds >= limit:
            self._requests.stop(f"max_time of {limit:g} s is over")

    async def _between_steps(self) -> bool:
        """Do what is due or asked for between two steps; whether there is another step."""
        requests = self._requests
        while True:
            if requests.failure is not None:
                raise requests.failure
            if requests.work_waits:
                await requests.do_one()
                continue
            if self._evaluations.due(self.step):
                await self._evaluate()
                continue
            if self._saver.due(self.step, self.config.checkpoint_every, self.node.sampler.steps_per_epoch):
                await self._checkpoint()
                continue
            self._look_at_clock()
            if requests.stop_reason is not None or self.step >= self.total_steps:
                return False
            if not requests.pauses_at(self.step):
                if self.state is RunState.PAUSED:
                    self._move(RunState.RUNNING)
                await self.tree.tidy()
                return True
            if self.state is RunState.RUNNING:
                self._move(RunState.PAUSED)
            self._changed.set()  # it may have been paused before, and somebody waits for that
            await requests.asked()

    async def _train_step(self) -> None:
        step, sampler, hub = self.step, self.node.sampler, self._hub
        if step % sampler.steps_per_epoch == 0:
            self._teller.emit("epoch_start", {"epoch": self.epoch})
        self._teller.emit("batch_start", {"step": step})
        traced, began, up, down = self._teller.clock(), perf_counter(), hub.received_bytes, hub.sent_down_bytes
        if not await self._while_waiting(self.tree.compute(step, TRAIN, self._renewal.gradient)):
            return
        sealed = perf_counter()
        attempts = hub.ledger.attempts
        sums, skipped = hub.sums, hub.gradients.skipped
        contributions = hub.gradients.contributions(Block(0, self.node.microbatches))
        environments, moved = hub.ledger.environments, len(hub.ledger.moved)
        phases = hub.phases.copy()
        update = await self._renewal.make(step, early=self._trains_next)
        times = StepTimes(began, sealed, perf_counter())
        self._teller.span("optimizer", times.updated - times.sealed, step)
        norm = None if update.decision is None else update.decision.norm
        self._teller.emit("gradient_sync", {"step": step, "norm": norm})
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
        self._teller.span_since("step", traced, step)

    def _trains_next(self) -> bool:
        """Whether the step in hand is followed by another at once, as far as is known now, and weights then travel."""
        if all(child.outbox.carrier.together() for child in self._hub.children.values()):
            return False  # they lie where their readers are
        following = self.step + 1
        if following >= self.total_steps or not self._requests.lets_pass(following):
            return False
        return not self._evaluations.due_after(following)

    async def _commit(self, record: dict[str, Any]) -> None:
        """Journal the step, then show it (N18). Raises what keeps it from being committed: the run ends with that."""
        step = record["step"]
        record["seconds"] |= {"journal": self._journalling.seconds, **self._saver.take_stall()}
        try:
            await self._journalling.write(record)
        except BaseException:
            # These weights are ahead of the step that did not become one: no checkpoint may take them for its own.
            self._hub.weights.withdraw()
            raise
        self._standing.position.step += 1
        self._standing.position.mixed_recomputes += record["mixed_recompute"]
        shown = {"loss": record["loss"], **{f"train_{name}": value for name, value in record["metrics"].items()}}
        self.metrics.update({name: value for name, value in shown.items() if value is not None})
        self.totals.add(record)
        self.publish(record)
        if record["decision"] != Outcome.APPLIED:
            self._teller.nonfinite(record, self.metrics)
        self._teller.emit("weight_update", {"step": step, "weights_version": self.step})
        self._teller.emit("batch_end", record, step=step)
        if self.step % self.node.sampler.steps_per_epoch == 0:
            self._teller.emit("epoch_end", {"epoch": record["epoch"]}, step=step)
        if self.totals.skipped_in_a_row >= MOST_SKIPPED_STEPS:
            raise GradientError(
                f"{MOST_SKIPPED_STEPS} steps in a row were skipped, up to step {step}: {nonfinite_reason(record)}; go "
                "back to a checkpoint before them, and lower the learning rate or look at those samples"
            )

    # ---- evaluation

    async def _evaluate(self) -> None:
        began = perf_counter()
        self._evaluations.last = self.step
        if not await self._while_waiting(self.tree.compute(self.step, EVALUATE, None)):
            return
        sums, moved = self._hub.sums, len(self._hub.ledger.moved)
        assert sums is not None  # the test split is not empty
        self._teller.mixed(self.step, moved)
        record = self._evaluations.note(self._standing.position, sums, moved=moved, seconds=perf_counter() - began)
        self._teller.span("evaluation", record["seconds"], self.step)
        self._teller.tell("evaluation", record)

    # ---- checkpoints

    async def _checkpoint(self, *, copied: bool = True) -> None:
        """Take a copy and begin to save it beside the steps that follow; without a copy where none follows.

        A failure is loud, and the run goes on: the checkpoint before stands.
        """
        before = self.state
        self._move(RunState.CHECKPOINTING)
        self._saver.mark(self.step)
        began = perf_counter()
        try:
            # asked before the next step is given out, so that a task's state is that between the two
            await self._saver.begin(self._standing.take, self._sphere_records(), copied=copied)
        finally:
            self._teller.span("checkpoint_copy", perf_counter() - began, self.step)
            self._move(before)

    async def _sphere_records(self) -> list[checkpoint_pb2.SphereRecord]:
        states = await self.tree.states(timeout=self.config.patience)
        return [checkpoint_pb2.SphereRecord(report=s.report, task_state=s.task_state) for s in states]

    def _told_of_save(self, step: int, record: dict[str, Any]) -> None:
        self._teller.span("checkpoint_save", record["seconds"] - record["stall_seconds"], step)
        try:
            self._teller.emit("checkpoint", self._teller.note("checkpoint", {"step": step, **record}), step=step)
        except ArmillaryError as error:  # a callback that may end the run
            self.fail(error)
        finally:
            self._requests.look_now()  # one that was asked for meanwhile may begin

    async def _save_at_end(self) -> None:
        """Save the last state, unless it is saved already. Returns when it is on disk, or that has failed."""
        await self._saver.done()
        if self._saver.unsaved(self.step):
            await self._checkpoint(copied=False)
            await self._saver.done()

    def start_from(self, weights: Array) -> None:
        """Take these first weights."""
        self._standing.start_from(weights)

    def load(self, snapshot: Snapshot, *, evaluated: bool = False) -> None:
        """Take over a snapshot's state. Raises CheckpointError, with nothing changed, where it is of another model.

        ``evaluated``: the evaluation that may be due at its step has been done.
        """
        self._standing.put_back(snapshot)
        self._saver.mark(self.step)
        self._evaluations.last = self.step if evaluated else -1

    async def _restore(self, name: str | None) -> None:
        before = self.state
        self._move(RunState.RESTORING)
        try:
            # it may be the one that is wanted, and its retention must not remove what is being read
            await self._saver.done()
            passed_over: list[str] = []
            try:
                snapshot = await asyncio.to_thread(self.checkpoints.load, name or None, passed_over.append)
            except MemoryError:
                raise CheckpointError(
                    "control has no memory to read the checkpoint; the run goes on as it was"
                ) from None
            self.tell_passed_over(passed_over)
            # before anything is changed: under the old term spheres would take what comes now for what they had
            self.tree.term = await asyncio.to_thread(self._raise_term)
            self.load(snapshot)
            self._standing.begin()
        finally:
            # published anew, in another generation, also where nothing was put back: nobody holds them any more (N20)
            self._hub.seal()
            self._hub.weights.publish(term=self.tree.term, version=self.step)
            self._move(before)

    def tell_passed_over(self, problems: Sequence[str]) -> None:
        """Write to the event log which checkpoints were newer than the one restored, and why they were not taken."""
        for problem in problems:
            self._teller.note("checkpoint_passed_over", {"ok": False, "error": problem})

    # ---- the end

    async def _finish(self) -> None:
        await self._save_at_end()
        ended = RunState.COMPLETED if self.step >= self.total_steps else RunState.STOPPED
        self._move(ended, self._requests.stop_reason or "")

    async def _fail(self, error: ArmillaryError, *, save: bool) -> None:
        """End in an error. What is committed is whole, unless the update itself failed: --resume goes on from there."""
        self.error = error
        try:
            self._teller.tell("error", {"error": str(error)})
            await self._saver.done()
            # where a step was not committed, its weights are already the next ones: done again it would count twice
            if save and self._hub.weights.complete and self._hub.weights.version == self.step:
                await self._save_at_end()
        except ArmillaryError as another:  # events that cannot be written, a callback that raises
            log.error("%s", another)
        finally:
            self.state, self.reason = move(self.state, RunState.ERROR), str(error)
            self._changed.set()
        self._teller.note("state", {"state": str(self.state), "reason": self.reason})

    # ---- what has changed

    def _move(self, to: RunState, reason: str = "") -> None:
        if to is not self.state:
            self.state = move(self.state, to)
            self.reason = reason
            if to not in (RunState.CHECKPOINTING, RunState.RESTORING):
                self._teller.note("state", {"state": str(to), "reason": reason})
            self._changed.set()

    def sphere_changed(self, event: str, sphere: str, reason: str) -> None:
        """A sphere joined or was lost."""
        try:
            self._teller.tell(event, {"sphere": sphere, "reason": reason})
        except ArmillaryError as error:  # a callback that may end the run: not the link that it is told of
            self.fail(error)
