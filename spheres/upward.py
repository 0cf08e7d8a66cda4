"""What a node tells its parent beside gradients: news on its way to control, its capacity, its answers to ``begin``.

At the root the news has arrived: control's hooks are told. Gradients wait in ``batches``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from spheres.actions import SendReady
from spheres.config import MAX_MESSAGE_BYTES
from spheres.errors import MessageTooLargeError
from spheres.frames import blocks_to
from spheres.v1 import work_pb2 as pb
from spheres.words import MOST_ERROR, MOST_TRACEBACK, cut
from spheres.work import Hooks
from spheres.worker import MOST_SAMPLES

__all__ = ["Upward"]

#: spheres below whose latest changes are told again on a new link: they may have been lost with the old one. As many as
#: are remembered elsewhere: names are the peers' choice, memory is not
_MOST_KNOWN = 20_000


class Upward:
    """Mutable state: the session, the messages that wait, and the newest changes told in this session."""

    def __init__(self, hooks: Hooks, *, root: bool) -> None:
        self._hooks, self._root = hooks, root
        #: of what is told from now on; the hub's
        self.tag = pb.Tag()
        self.session = 0
        #: called when something may go up
        self.wake_up: Callable[[], None] = lambda: None
        #: why this node goes; empty while it stays
        self.leaving = ""
        #: in the order in which they go
        self.waiting: list[pb.WorkRequest] = []
        # (sphere, whether its link ended) -> the newest such change; in the order in which they were told
        self._said: dict[tuple[str, bool], pb.SphereChange] = {}

    def next(self) -> bytes:
        """Return the next message; there must be one."""
        return self.waiting.pop(0).SerializeToString()

    def relinked(self, session: int) -> list[pb.SphereChange]:
        """A new parent: return the changes that may have been lost with the link to the one before.

        What belongs to no step stays: a capacity that changed after the hello was written, for one.
        """
        self.session = session
        self.waiting = [m for m in self.waiting if not (m.HasField("ready") or m.HasField("sphere_change"))]
        said = list(self._said.values())
        self._said.clear()
        return said

    def begin(self) -> None:
        """A new step: nobody waits for an answer of the old one (N14)."""
        self._drop("ready")

    # ---- news: it goes to control, hop by hop

    def passes_on(self, message: pb.WorkRequest) -> bool:
        """Pass on what a child says that is control's alone. False where it is something else."""
        if message.HasField("task_failure"):
            self.fail(_bounded(message.task_failure))
        elif message.HasField("state_report"):
            self.report(message.state_report)
        elif message.HasField("log_report"):
            self.log(message.log_report)
        else:
            return False
        return True

    def fail(self, failure: pb.TaskFailure) -> None:
        """A task failed here or below: it goes to control, which halts the run."""
        if self._root:
            self._hooks.failed(failure)
        else:
            self._send(pb.WorkRequest(task_failure=failure))

    def change(self, change: pb.SphereChange) -> None:
        """A link here or below opened or ended: control's picture of the tree follows."""
        if self._root:
            self._hooks.changed(change)
        else:
            self._send(pb.WorkRequest(sphere_change=change))
            self._note(change)

    def _note(self, change: pb.SphereChange) -> None:
        """Remember a change for the next link: of each sphere the newest link that opened, and the newest that ended.

        Both, as control takes an end only of a link that it has heard of. What came late, of an older link, is not one.
        """
        key = (change.sphere_id, change.lost)
        known = self._said.get(key)
        if known is not None and (known.incarnation, known.session) > (change.incarnation, change.session):
            return
        self._said.pop(key, None)
        self._said[key] = change
        if len(self._said) > 2 * _MOST_KNOWN:
            del self._said[next(iter(self._said))]

    def report(self, report: pb.StateReport) -> None:
        """A sphere's state, on its way to control."""
        if self._root:
            self._hooks.reported(report)
        else:
            self._send(pb.WorkRequest(state_report=report))

    def log(self, report: pb.LogReport) -> None:
        """The last lines of a sphere's log, on their way to control."""
        if self._root:
            self._hooks.logged(report)
        else:
            self._send(pb.WorkRequest(log_report=report))

    # ---- what is the parent's

    def leave(self, reason: str) -> None:
        """Tell the parent that this node goes: it gets nothing new. The hello of a later link says so too."""
        self.leaving = reason
        self._send(pb.WorkRequest(leaving=pb.Leaving(reason=reason)))

    def resize(self, capacity: float, capacities: Mapping[str, float]) -> None:
        """Tell what this subtree computes at once, in all and by environment: only the latest waits."""
        self._hooks.resized()
        if not self._root:
            self._drop("capacity")
            self._send(pb.WorkRequest(capacity=pb.Capacity(capacity=capacity, capacities=capacities)))

    def answer(self, said: SendReady) -> None:
        """Answer the parent's ``begin``: only the latest answer waits."""
        ready = pb.Ready(held=blocks_to(said.held), computing=blocks_to(said.computing), idle=said.idle)
        ready.idle_environments.extend(said.idle_environments)
        self._drop("ready")
        self._send(pb.WorkRequest(attempt=said.attempt, ready=ready))

    def _drop(self, kind: Literal["ready", "capacity"]) -> None:
        self.waiting = [m for m in self.waiting if not m.HasField(kind)]

    def _send(self, message: pb.WorkRequest) -> None:
        """Raises MessageTooLargeError where a child's words leave no room for what is added here: its link ends."""
        message.tag.CopyFrom(self.tag)
        message.session = self.session
        if (size := message.ByteSize()) > MAX_MESSAGE_BYTES:
            raise MessageTooLargeError(f"{size} bytes to pass on to control; the limit is {MAX_MESSAGE_BYTES}")
        self.waiting.append(message)
        self.wake_up()


def _bounded(failure: pb.TaskFailure) -> pb.TaskFailure:
    """Return what a child says of a failure, within the bounds of a Python sphere's own: it must reach control."""
    failure.error = cut(failure.error, MOST_ERROR)
    failure.traceback = cut(failure.traceback, MOST_TRACEBACK, end=True)
    del failure.sample_ids[MOST_SAMPLES:]
    return failure
