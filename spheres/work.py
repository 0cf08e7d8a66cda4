"""The plain records of a hub's work: which step it is, its children, what it counts, whom it tells."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from spheres.blocks import Block
from spheres.outbox import Outbox
from spheres.v1 import common_pb2
from spheres.v1 import work_pb2 as pb
from spheres.words import MOST_REASON, cut

__all__ = ["EVALUATE", "TRAIN", "Child", "Counts", "Hooks", "Work"]

TRAIN, EVALUATE = common_pb2.WORK_KIND_TRAIN, common_pb2.WORK_KIND_EVALUATE


@dataclass(frozen=True, order=True, slots=True)
class Work:
    """Which step's messages: ordered as steps follow each other (N1)."""

    term: int
    step: int
    kind: common_pb2.WorkKind.ValueType


@dataclass
class Child:
    """A child with an open link."""

    id: str
    incarnation: int
    session: int
    address: str
    outbox: Outbox
    #: ends its link, with the reason
    close: Callable[[Exception], None]
    environment: str = ""
    member: common_pb2.Member = field(default_factory=common_pb2.Member)
    #: when something last came from it, by the loop's clock
    heard: float = 0.0

    @property
    def order(self) -> tuple[int, int]:
        return self.incarnation, self.session

    def joined(self, parent: str) -> pb.SphereChange:
        """Return what control is told where this link to ``parent`` opens."""
        change = self._change(parent)
        change.member.CopyFrom(self.member)
        change.address = self.address
        return change

    def lost(self, parent: str, reason: str, *, step: int, computing: Block | None) -> pb.SphereChange:
        """Return what control is told where this link to ``parent`` ends; ``computing`` is what the child was at."""
        change = self._change(parent)
        change.lost, change.reason = True, cut(reason, MOST_REASON)  # what a peer sent may be quoted in it
        if computing is not None:
            change.step = step
            change.computing.lo, change.computing.hi = computing
        return change

    def _change(self, parent: str) -> pb.SphereChange:
        return pb.SphereChange(sphere_id=self.id, incarnation=self.incarnation, session=self.session, parent_id=parent)


def _broken(error: BaseException) -> None:
    raise error


@dataclass
class Hooks:
    """What a node does with what its hub finds; each is set once by its owner."""

    #: the root has everything of a step
    sealed: Callable[[], None] = lambda: None
    #: blocks are owed that nobody below can compute
    stuck: Callable[[], None] = lambda: None
    failed: Callable[[pb.TaskFailure], None] = lambda _: None
    reported: Callable[[pb.StateReport], None] = lambda _: None
    directed: Callable[[pb.Directive], None] = lambda _: None
    #: a link opened or ended, here or below
    changed: Callable[[pb.SphereChange], None] = lambda _: None
    #: the subtree's capacity is another
    resized: Callable[[], None] = lambda: None
    #: the last lines of a sphere's log, on their way to whoever asked
    logged: Callable[[pb.LogReport], None] = lambda _: None
    #: the loop's clock, in seconds, and a call after so many of them; without a loop at once
    clock: Callable[[], float] = time.monotonic
    call_later: Callable[[float, Callable[[], None]], object] = lambda _, call: call()
    #: has work done side by side beside the loop, then calls on the loop with the first error or None; None: do it here
    run: Callable[[Sequence[Callable[[], None]], Callable[[BaseException | None], None]], None] | None = None
    #: a sum failed, for want of memory for one: this node cannot go on with its step
    broken: Callable[[BaseException], None] = field(default=_broken)


@dataclass
class Counts:
    """What this node has done in its incarnation."""

    microbatches: int = 0
    samples: int = 0
    up_bytes: int = 0
    refused: Counter[str] = field(default_factory=Counter)
