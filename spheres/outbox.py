"""What waits to be sent to one child: notices, the step's messages, and a cursor into the node's weights.

No queue of payload: each child reads the one weights buffer at its own pace (N17). Pure but for the wake-up event.
"""

from __future__ import annotations

import asyncio
from collections import deque

from spheres.carrier import Carrier, Inline
from spheres.errors import LinkClosedError
from spheres.v1 import work_pb2 as pb
from spheres.weights import Weights

__all__ = ["Outbox"]

#: control messages that may wait for one child; a child that reads nothing for so long is cut off
_MOST_WAITING = 1024


class Outbox:
    """Mutable state: what is due, and how far the child is in the weights."""

    def __init__(self, weights: Weights, carrier: Carrier | None = None) -> None:
        self._weights = weights
        self.carrier = carrier or Inline(weights.config)
        #: welcome and directives: they belong to no step
        self._notices: deque[pb.WorkResponse] = deque()
        #: begin and assign of the present step
        self._steps: deque[pb.WorkResponse] = deque()
        self._credit: pb.WorkResponse | None = None
        self._header: pb.WorkResponse | None = None
        self._tag = pb.Tag()
        self._encoded_tag = b""
        #: next chunk to send; None where the version is whole at the child, or must not be read
        self._cursor: int | None = None
        #: term and version that the cursor belongs to
        self._version = (0, -1)
        #: term and version that the child holds whole, and its digest
        self.holds: tuple[int, int, bytes] | None = None
        #: term and version of which the child holds so many chunks, from a link that broke off (N17)
        self.interrupted: tuple[int, int, int] | None = None
        #: term, step and kind where the child is: one that is ahead gets no header until its parent is there too (N14)
        self.reached = (0, -1, 0)
        self.wake = asyncio.Event()
        self.sent_bytes = 0

    def notice(self, message: pb.WorkResponse) -> None:
        """Add a message that belongs to no step. Raises LinkClosedError where the child has stopped reading."""
        if len(self._notices) >= _MOST_WAITING:
            raise LinkClosedError(f"{_MOST_WAITING} messages wait for a child that reads none")
        self._notices.append(message)
        self.wake.set()

    def header(self, tag: pb.Tag) -> None:
        """A step starts: what waits of the one before is dropped (N14)."""
        self._steps.clear()
        self._credit = None
        if (tag.term, tag.step, tag.kind) < self.reached:
            return
        self._tag, self._encoded_tag = tag, tag.SerializeToString()
        self._header = pb.WorkResponse(tag=tag)
        self.wake.set()

    def abort(self) -> None:
        """The weights are about to be overwritten: a transfer that is under way ends here (N17), and its step too.

        A header that waits is dropped with the rest: it would go out with the next version's chunks under the old tag.
        """
        self._cursor = self._header = self._credit = None
        self.holds = None  # it may come again, the same bytes in another place
        self._steps.clear()

    def step(self, message: pb.WorkResponse) -> None:
        """Add begin or assign. That of attempt 0 rides on the header (N5); a begin ends all that waits before it."""
        if message.HasField("begin"):
            self._steps.clear()
        first = message.HasField("assign") and message.assign.attempt == 0
        if self._header is not None and first and not self._steps:
            self._header.assign.CopyFrom(message.assign)
        else:
            self._steps.append(message)
        self._credit = None
        self.wake.set()

    def credit(self, message: pb.WorkResponse) -> None:
        """Only the latest counts."""
        self._credit = message
        self.wake.set()

    def next(self) -> bytes | None:
        """Return the next message, or None where nothing can be sent now."""
        if self._notices:
            return self._notices.popleft().SerializeToString()
        if self._header is not None:
            return self._start(self._header)
        if self._steps:
            return self._steps.popleft().SerializeToString()
        if self._credit is not None:
            message, self._credit = self._credit, None
            return message.SerializeToString()
        if self._cursor is None:
            return None
        return self._go_on(pb.WorkResponse(tag=self._tag), self._encoded_tag)

    def _start(self, message: pb.WorkResponse) -> bytes:
        self._header = None
        weights = self._weights
        header = message.weights_header
        header.manifest_digest = weights.config.manifest.digest
        if weights.held and self.holds == (weights.term, weights.version, weights.digest):
            header.held_digest = weights.digest
            return message.SerializeToString()
        self.holds = None
        header.previous_digest = weights.previous_digest
        # Another step on the same version (a joiner got half of it during an evaluation) goes on where it was (N17).
        if self._cursor is None or self._version != (weights.term, weights.version):
            term, version, chunks = self.interrupted or (0, -1, 0)
            if self.carrier.together():
                chunks = 0  # what is referred to is referred to as a whole
            self._cursor = chunks if (term, version) == (weights.term, weights.version) else 0
        self.interrupted = None
        self._version = (weights.term, weights.version)
        header.from_chunk = self._cursor
        if weights.arrived > self._cursor and (weights.config.chunk_count == 1 or self.carrier.together()):
            return self._go_on(message) or message.SerializeToString()
        return message.SerializeToString()

    def _go_on(self, message: pb.WorkResponse, tag: bytes = b"") -> bytes | None:
        """Send what is here of the weights, with the footer if it is the last.

        ``tag`` is the message's tag where it holds nothing else: then its bytes are the same for every child.
        """
        weights, index = self._weights, self._cursor
        assert index is not None
        count = weights.config.chunk_count
        together = self.carrier.together()
        # nothing is gained by a reference to a part: it costs as much as one to all of it, and moves nothing
        if index < count and (index >= weights.arrived or (together and not weights.complete)):
            return None
        last = weights.complete and (index >= count - 1 or together)
        if last:
            message.weights_footer.digest = weights.digest
            self.holds = (weights.term, weights.version, weights.digest)
        if index < count:
            footless = index == count - 1 and not last
            data, through, size = self.carrier.weights(message, b"" if footless else tag, weights, index)
            if not weights.intact:
                # They lie with another, who overwrites them by now: their step is sealed (N15), nobody waits for it.
                self.abort()
                message.ClearField("weights_footer")
                message.ClearField("weights_reference")
                return None
            self._cursor = None if last else through + 1
            self.sent_bytes += size
            return data
        if last:
            self._cursor = None
            return message.SerializeToString()
        return None
