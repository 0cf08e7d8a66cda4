"""How payload crosses one edge: in the messages, or in memory that both ends share, with only references in them.

A carrier belongs to one end of one link. The parent's sends weights and reads gradients; the child's sends gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from spheres.blocks import Block
from spheres.config import NodeConfig
from spheres.errors import ProtocolError
from spheres.frames import encode_with_chunk
from spheres.narrow import to_wire, wire_itemsize
from spheres.numerics import crc32c
from spheres.segments import Attached, Key, Memory, Segment, key_of
from spheres.summing import Expression, add_up, chunk_scratch
from spheres.v1 import work_pb2 as pb
from spheres.weights import Weights

__all__ = ["Carrier", "Inline", "Piece", "Shared"]

Array = npt.NDArray[np.float32]

#: segments of one child that are mapped at once; the oldest goes first
_MOST_ATTACHED = 16
#: chunks that are summed at once for messages: enough for two threads
_INLINE_CHUNKS = 4


class Piece:
    """Chunks ``first`` to ``last`` of a block on their way up: what they are the sum of, and the rest of the message.

    ``held`` is the whole gradient where this node has it and nothing is to be added.
    """

    __slots__ = ("block", "expressions", "first", "held", "last", "message", "place")

    def __init__(
        self, message: pb.WorkRequest, block: Block, first: int, expressions: Sequence[Expression], held: Array | None
    ) -> None:
        self.message, self.block, self.first = message, block, first
        self.expressions, self.held = expressions, held
        self.last = first + len(expressions) - 1
        #: where the sum goes, of a carrier that needs to say so beforehand
        self.place: Array | None = None


class Carrier(Protocol):
    """What differs between the wires."""

    #: as people call it
    name: str
    #: W of this edge, in chunks (N6)
    window: int

    def weights(self, message: pb.WorkResponse, tag: bytes, weights: Weights, first: int) -> tuple[bytes, int, int]:
        """Encode ``message`` with what is here of the weights from chunk ``first`` on.

        ``tag`` is its encoded tag where it holds nothing else but the footer. Returns the bytes, the last chunk in
        them, and how many bytes of payload are handed over.
        """
        ...

    def most(self, first: int) -> int:
        """Return how many chunks from ``first`` on can be given to ``gradient`` at once."""
        ...

    def together(self) -> bool:
        """Whether those go in one message, or each in its own."""
        ...

    def encode(self, piece: Piece) -> tuple[bytes, int]:
        """Sum a piece and encode its message; for any thread. Returns the bytes, and how many of payload."""
        ...

    def reserve(self, piece: Piece) -> None:
        """Find the place for a piece's sum; on the loop."""
        ...

    def begin(self, *, attempt: bool) -> None:
        """A new step, of which the parent has let go what was sent for the one before; or a new attempt of this one.

        Then a sum of the parent's may be under way that counts as sent, and reads on.
        """
        ...

    def let_go(self) -> None:
        """The child begins a new attempt: what it has sent so far is read no more, but for what is being read now."""
        ...

    def gradient(self, reference: pb.GradientReference) -> Array:
        """Return the elements that a reference names, read-only. Raises ProtocolError, SegmentError."""
        ...


class Inline:
    """Payload in the messages."""

    name = "inline"

    def __init__(self, config: NodeConfig) -> None:
        self._config = config
        self.window = config.window

    def weights(self, message: pb.WorkResponse, tag: bytes, weights: Weights, first: int) -> tuple[bytes, int, int]:
        data = weights.frame(tag, first) if tag else None
        if data is None:
            data = encode_with_chunk(message, *weights.chunk(first))
            if tag and weights.intact:
                weights.keep_frame(tag, first, data)
        return data, first, self._config.elements(first, first) * wire_itemsize(self._config.weights_dtype)

    def most(self, first: int) -> int:
        return _INLINE_CHUNKS

    def together(self) -> bool:
        return False

    def reserve(self, piece: Piece) -> None:
        pass

    def encode(self, piece: Piece) -> tuple[bytes, int]:
        (expression,), block, dtype = piece.expressions, piece.block, self._config.gradient_dtype
        if isinstance(expression, tuple):
            out = chunk_scratch(self._config.elements(piece.first, piece.first))
            add_up(expression, out, dtype)
            expression = out
        payload = expression.data.cast("B") if expression.dtype == np.uint16 else to_wire(expression, dtype)
        chunk = pb.Chunk(
            block=pb.Block(lo=block.lo, hi=block.hi),
            index=piece.first,
            offset_bytes=4 * piece.first * self._config.chunk_elements,
            crc32c=crc32c(payload),
        )
        return encode_with_chunk(piece.message, chunk, payload), len(payload)

    def begin(self, *, attempt: bool) -> None:
        pass

    def let_go(self) -> None:
        pass

    def gradient(self, reference: pb.GradientReference) -> Array:
        raise ProtocolError("a gradient by reference on a link whose ends share no memory")


class Shared:
    """Payload in shared memory. Mutable state: segments for sums, and those of the other end that are mapped.

    A sum of chunk ``i`` lies at ``i`` modulo twice the window: within an attempt, chunks that the parent may still be
    reading are those of one window below its frontier, and credit ends one window above it (N6, N19). A new attempt
    makes new rings.
    """

    name = "shm"

    def __init__(self, config: NodeConfig, memory: Memory) -> None:
        self._config, self._memory = config, memory
        self.window = config.shared_window
        self._slots = min(2 * self.window, config.chunk_count)
        self._rings: list[Segment] = []
        self._areas: dict[Block, int] = {}
        self._attached: dict[Key, Attached] = {}

    def weights(self, message: pb.WorkResponse, tag: bytes, weights: Weights, first: int) -> tuple[bytes, int, int]:
        reference = weights.reference(first, weights.arrived - 1)
        if reference is None:
            raise ProtocolError("the weights lie in no segment")
        message.weights_reference.CopyFrom(reference)
        through = reference.through_chunk
        return message.SerializeToString(), through, 4 * self._config.elements(first, through)

    def most(self, first: int) -> int:
        return min(self.window, self._slots - first % self._slots)

    def together(self) -> bool:
        return True

    def reserve(self, piece: Piece) -> None:
        reference, elements = piece.message.gradient_reference, self._config.chunk_elements
        reference.block.lo, reference.block.hi = piece.block
        reference.from_chunk, reference.through_chunk = piece.first, piece.last
        segment = None if piece.held is None else self._memory.segment_of(piece.held)
        if segment is not None:
            offset = 4 * piece.first * elements
        else:
            segment = self._ring(piece.block)
            piece.place = segment.array
            offset = 4 * (piece.first % self._slots) * elements
        reference.segment.CopyFrom(segment.name)
        reference.offset_bytes = offset

    def encode(self, piece: Piece) -> tuple[bytes, int]:
        if piece.place is not None:
            elements = self._config.chunk_elements
            for index, expression in enumerate(piece.expressions, piece.first):
                start = index % self._slots * elements
                out = piece.place[start : start + self._config.elements(index, index)]
                add_up(expression, out, self._config.gradient_dtype)
        return piece.message.SerializeToString(), 4 * self._config.elements(piece.first, piece.last)

    def begin(self, *, attempt: bool) -> None:
        self._areas.clear()
        if attempt:
            self._rings.clear()  # what was sent keeps its place, others are made

    def let_go(self) -> None:
        self._attached.clear()

    def _ring(self, block: Block) -> Segment:
        area = self._areas.setdefault(block, len(self._areas))
        while len(self._rings) <= area:
            size = self._config.elements(0, self._slots - 1)
            self._rings.append(self._memory.make(size))
        return self._rings[area]

    def gradient(self, reference: pb.GradientReference) -> Array:
        size = self._config.elements(reference.from_chunk, reference.through_chunk)
        key = key_of(reference.segment)
        attached = self._attached.get(key)
        if attached is None:
            attached = Attached(reference.segment)
            if len(self._attached) >= _MOST_ATTACHED:
                del self._attached[next(iter(self._attached))]
            self._attached[key] = attached
        start, remainder = divmod(reference.offset_bytes, 4)
        if remainder or start < 0 or start + size > attached.array.size:
            raise ProtocolError(
                f"chunks {reference.from_chunk} to {reference.through_chunk} at byte {reference.offset_bytes} of a "
                f"segment of {attached.array.nbytes} bytes"
            )
        return attached.array[start : start + size]
