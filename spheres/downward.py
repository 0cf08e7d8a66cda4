"""The children of a node: whose links are open, what they are told, and through which of them a sphere is reached.

What each owes is the ledger's to say; ``children`` reads and writes the links, from what waits in each outbox.
"""

from __future__ import annotations

from collections.abc import Iterable

from spheres.actions import SendAssign, SendBegin, SendCredit
from spheres.errors import LinkClosedError
from spheres.frames import blocks_to
from spheres.v1 import work_pb2 as pb
from spheres.work import Child

__all__ = ["Downward"]

#: spheres of which it is known by which child they are reached; directives to others go to all children
_MOST_WAYS = 20_000


class Downward:
    """Mutable state: the children with an open link, the ways to those below them, what newcomers are told too."""

    def __init__(self) -> None:
        self.children: dict[str, Child] = {}
        #: of what children are told from now on; the hub's
        self.tag = pb.Tag()
        #: child -> when it was last sent begin, by the loop's clock
        self.asked: dict[str, float] = {}
        # sphere further down -> the child that leads there
        self._ways: dict[str, str] = {}
        # the run is over: newcomers are told so, too
        self._farewell: pb.Directive | None = None
        # of links that have ended
        self._sent_bytes = 0

    @property
    def sent_bytes(self) -> int:
        """Payload bytes sent to children, those of links that have ended included."""
        return self._sent_bytes + sum(child.outbox.sent_bytes for child in self.children.values())

    def add(self, child: Child, hello: pb.Hello, tag: pb.Tag, *, term: int) -> None:
        """A link has opened: of the weights, in this ``term``, the child has what its hello says (N17)."""
        self.children[child.id] = child
        if hello.holds_weights:
            child.outbox.holds = (term, hello.weights_version, hello.weights_digest)
        elif hello.weights_chunks_held:
            child.outbox.interrupted = (hello.weights_term, hello.weights_version, hello.weights_chunks_held)
        child.outbox.reached = (tag.term, tag.step, tag.kind)

    def remove(self, child: Child) -> None:
        """Its link has ended."""
        del self.children[child.id]
        self.asked.pop(child.id, None)
        self._sent_bytes += child.outbox.sent_bytes

    # ---- of the present step

    def header(self) -> None:
        """The work of ``tag`` begins: all children are told, each when its transfer gets there."""
        for child in self.children.values():
            child.outbox.header(self.tag)

    def abort(self) -> None:
        """The weights are about to be written: no transfer may read them any more (N15, N17)."""
        for child in self.children.values():
            child.outbox.abort()

    def begin(self, action: SendBegin, now: float) -> None:
        """A new attempt of a child begins."""
        child = self.children[action.child]
        child.outbox.carrier.let_go()
        self.asked[child.id] = now
        begin = pb.Begin(attempt=action.attempt, from_chunk=action.from_chunk)
        child.outbox.step(pb.WorkResponse(tag=self.tag, begin=begin))

    def assign(self, action: SendAssign) -> None:
        assign = pb.Assign(attempt=action.attempt, from_chunk=action.from_chunk, blocks=blocks_to(action.blocks))
        for lo, hi, environment in action.environments:
            assign.environments.add(lo=lo, hi=hi, environment_fingerprint=environment)
        self.children[action.child].outbox.step(pb.WorkResponse(tag=self.tag, assign=assign))

    def credit(self, action: SendCredit) -> None:
        credit = pb.Credit(attempt=action.attempt, through_chunk=action.through)
        self.children[action.child].outbox.credit(pb.WorkResponse(tag=self.tag, credit=credit))

    # ---- what belongs to no step

    def notice(self, message: pb.WorkResponse, children: Iterable[Child] | None = None) -> None:
        """Tell children, all or these; the link of one that has stopped reading ends."""
        for child in self.children.values() if children is None else children:
            try:
                child.outbox.notice(message)
            except LinkClosedError as error:
                child.close(error)

    def direct(self, directive: pb.Directive) -> None:
        """Send a directive down, hop by hop: to the child that leads to its sphere, to all where that is not known."""
        target = directive.target_sphere_id
        if directive.kind == pb.DIRECTIVE_KIND_STOP and not target:
            self._farewell = directive
        child = self.children.get(target) or self.children.get(self._ways.get(target, ""))
        self.notice(pb.WorkResponse(directive=directive), [child] if child is not None else None)

    def part(self, child: Child) -> None:
        """Tell a newcomer that the run is over, where it is: it was between two parents when everybody was told."""
        if self._farewell is not None:
            child.outbox.notice(pb.WorkResponse(directive=self._farewell))

    def release(self, child: Child) -> None:
        """It leaves. Where the run is over it waits for the end of its link: all that it had to say has been read."""
        if self._farewell is not None:
            child.close(LinkClosedError(self._farewell.reason))

    def note_way(self, change: pb.SphereChange, child: Child) -> None:
        """Remember by which child a sphere further down is reached."""
        if not change.lost:
            self._ways[change.sphere_id] = child.id
            if len(self._ways) > _MOST_WAYS:
                del self._ways[next(iter(self._ways))]
        elif self._ways.get(change.sphere_id) == child.id:
            del self._ways[change.sphere_id]
