"""Saving in the background: from a copy, one checkpoint at a time, in a thread beside the steps that follow.

When one is due is known here too; the controller begins it, between two steps. How files become durable is in
``control.checkpoint`` and below.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

from control.checkpoint import CheckpointInfo, Checkpoints
from control.position import Copies
from control.snapshot import Snapshot
from spheres.errors import CheckpointError, RunStateError
from spheres.numerics import is_finite
from spheres.units import Every
from spheres.v1.checkpoint_pb2 import SphereRecord

__all__ = ["Saver"]

log = logging.getLogger(__name__)


class Saver:
    """Saves snapshots of one run. Belongs to one loop.

    Mutable state: the buffers of the copy, the save under way, who waits for the next one, when the latest began and
    how it ended, and for how long steps have waited. ``told`` is called with the step and what becomes of each save:
    ``ok`` with ``path`` and ``size_bytes``, or ``error``; ``seconds`` from its beginning to the disk, and
    ``stall_seconds`` of these for which no step could run.
    """

    def __init__(self, checkpoints: Checkpoints, told: Callable[[int, dict[str, Any]], None]) -> None:
        self.checkpoints = checkpoints
        self._told = told
        self.copies = Copies()
        #: the newest that this saver has saved
        self.latest: CheckpointInfo | None = None
        #: the latest could not be saved
        self.failed = False
        #: somebody wants one of the next moment between two steps
        self.wanted = False
        self._waiting: list[asyncio.Future[CheckpointInfo]] = []
        self._task: asyncio.Task[None] | None = None
        self._stall = 0.0
        # step and time of the last save begun
        self._saved_at = (-1, time.monotonic())

    def __repr__(self) -> str:
        return f"<Saver busy={self.busy} wanted={self.wanted} failed={self.failed} latest={self.latest}>"

    @property
    def busy(self) -> bool:
        """Whether a save is under way; ``begin`` may not be called then."""
        return self._task is not None

    def mark(self, step: int) -> None:
        """The state of so many steps is being saved, or was put back from a checkpoint: what is due counts from it."""
        self._saved_at = (step, time.monotonic())

    def due(self, step: int, every: Every | None, steps_per_epoch: int) -> bool:
        """Whether a save is to begin now, with so many steps committed: one is wanted, or ``every`` says so.

        One that is due while another is still being saved is left out.
        """
        due = self.wanted
        if every is not None and step and self._saved_at[0] != step:
            seconds = time.monotonic() - self._saved_at[1]
            due |= every.due(step=step, steps_per_epoch=steps_per_epoch, seconds=seconds)
        return due and not self.busy

    def unsaved(self, step: int) -> bool:
        """Whether a run that ends with so many steps still has something to save, once no save is under way."""
        return bool(step) and (self._saved_at[0] != step or self.wanted or self.failed)

    def ask(self) -> asyncio.Future[CheckpointInfo]:
        """Want a checkpoint; the future is done when it is on disk, and raises CheckpointError where it failed."""
        answer: asyncio.Future[CheckpointInfo] = asyncio.get_running_loop().create_future()
        self._waiting.append(answer)
        self.wanted = True
        return answer

    async def begin(
        self,
        take: Callable[[], Snapshot],
        spheres: Coroutine[Any, Any, Sequence[SphereRecord]],
        *,
        copied: bool = True,
    ) -> None:
        """Take a snapshot, copy its buffers, and begin to save it. Returns when they may change.

        ``copied`` False is for the end, when they change no more. ``spheres`` is begun before the copy, and awaited
        after it. Raises nothing of its own: a failure is told, and the checkpoints before stand.
        """
        assert not self.busy
        began = perf_counter()
        asking = asyncio.ensure_future(spheres)
        failure: CheckpointError | None = None
        try:
            snapshot = take()
            try:
                if copied:
                    snapshot = await asyncio.to_thread(self.copies.of, snapshot)
            except CheckpointError as error:
                log.error("%s", error)
                failure = error
        except BaseException:
            asking.cancel()
            raise
        # whoever has asked while it was copied gets what was asked for
        self.wanted, waiting, self._waiting = False, self._waiting, []
        stall = perf_counter() - began
        self._stall += stall

        async def save() -> None:
            outcome = failure or await self._save(snapshot, asking)
            asking.cancel()
            self._task = None
            self._settle(outcome, waiting)
            times = {"seconds": perf_counter() - began, "stall_seconds": stall}
            self._told(snapshot.run.step, {**_record(outcome), **times})

        self._task = asyncio.create_task(save())

    async def _save(
        self, snapshot: Snapshot, asking: asyncio.Future[Sequence[SphereRecord]]
    ) -> CheckpointInfo | CheckpointError:
        try:
            spheres = await asking

            def save() -> CheckpointInfo:
                finite = is_finite(snapshot.buffers["weights"])
                return self.checkpoints.save(replace(snapshot, spheres=spheres, finite=finite))

            return await asyncio.to_thread(save)
        except CheckpointError as error:
            log.error("%s", error)
            return error
        except Exception as error:  # whatever it is: the run does not end for it, and those who wait must learn of it
            log.exception("the save of step %d failed", snapshot.run.step)
            return CheckpointError(f"{type(error).__name__}: {error} (not expected)")

    def _settle(
        self, outcome: CheckpointInfo | CheckpointError, waiting: Sequence[asyncio.Future[CheckpointInfo]]
    ) -> None:
        self.failed = isinstance(outcome, CheckpointError)
        if isinstance(outcome, CheckpointInfo):
            self.latest = outcome
        for answer in waiting:
            if answer.done():  # whoever asked has gone
                continue
            if isinstance(outcome, CheckpointError):
                answer.set_exception(outcome)
            else:
                answer.set_result(outcome)

    async def done(self) -> None:
        """Wait for the save under way; how it went is told by itself."""
        if self._task is not None:
            await asyncio.wait({self._task})

    def close(self) -> None:
        """The run has ended: whoever still waits learns of it."""
        for answer in self._waiting:
            if not answer.done():
                answer.set_exception(RunStateError("the run has ended"))
        self._waiting.clear()

    def take_stall(self) -> Mapping[str, float]:
        """Return the seconds that steps have waited since the last call, as ``checkpoint_stall``; empty where none."""
        stall, self._stall = self._stall, 0.0
        return {"checkpoint_stall": stall} if stall else {}


def _record(outcome: CheckpointInfo | CheckpointError) -> dict[str, Any]:
    if isinstance(outcome, CheckpointError):
        return {"ok": False, "error": str(outcome)}
    return {"ok": True, "path": outcome.path, "size_bytes": outcome.size_bytes}
