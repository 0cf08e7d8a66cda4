"""One version of the weights on one node: how it arrives, its digest, and who may read it when.

It arrives in messages, into this node's own buffer, or lies in a segment of another process, where tasks and children
read it in place. A buffer is overwritten by the next version (N15), never by itself: the hub says when. Who maps it
sees by its generation that it is being overwritten, and publishes nothing that it has read meanwhile (N19, N20).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from spheres.config import NodeConfig
from spheres.errors import ChecksumError, DecodeError, SegmentError
from spheres.narrow import from_wire, round_in_place, to_wire, wire_itemsize
from spheres.numerics import crc32c, version_digest
from spheres.segments import Attached, Mark, Memory, Segment
from spheres.tensors import aligned_zeros
from spheres.v1 import work_pb2 as pb

__all__ = ["Weights"]

Array = npt.NDArray[np.float32]

#: bytes of encoded chunks that are kept for other children
_FRAME_BYTES = 32 << 20


class Weights:
    """The node's weights. Mutable: version, how many chunks have arrived, checksums, digest, where they lie.

    ``root``: control's, whose ``flat`` is the master; what others read of it is rounded to the run's type.
    """

    def __init__(self, config: NodeConfig, *, memory: Memory | None = None, root: bool = False) -> None:
        self.config = config
        self._memory = memory
        self._segment: Segment | None = None
        self._attached: Attached | None = None
        self._own: Array | None = None
        self._master: Array | None = None
        self._itemsize = wire_itemsize(config.weights_dtype)
        self.version = -1
        self.term = 0
        #: chunks 0 .. arrived-1 of the version are here and fit their checksums
        self.arrived = 0
        #: every chunk is here and the footer's digest agreed: only now may it be used (N17)
        self.complete = False
        self.digest = b""
        self.previous_digest = b""
        self._checksums = [0] * config.chunk_count
        # so many chunks of the version that begins to arrive lie here already
        self._known = 0
        # the generation of the segment in which the version is whole
        self._generation = 0
        self._views: Mapping[str, Array] | None = None
        # encoded chunks, for one tag
        self._frames: dict[int, bytes] = {}
        self._frames_tag = b""
        if memory is None:
            self._allocate()  # it will be needed, and takes long: not while the first chunks are coming
        if root:
            own = self._allocate()
            # rounded weights are another buffer than the master
            self._master = own if config.weights_dtype == "float32" else aligned_zeros(config.manifest.size)

    def __repr__(self) -> str:
        return f"Weights(v{self.version}, {self.arrived}/{len(self._checksums)} chunks, complete={self.complete})"

    def _allocate(self) -> Array:
        if self._own is None:
            size = self.config.manifest.size
            if self._memory is None:
                self._own = aligned_zeros(size)
            else:
                self._segment = self._memory.make(size)
                self._own = self._segment.array
        return self._own

    @property
    def flat(self) -> Array:
        """Control's master weights; elsewhere what is read here."""
        return self.served if self._master is None else self._master

    @property
    def served(self) -> Array:
        """What tasks and children read: the weights as they are on the wire, as float32."""
        return self._allocate() if self._attached is None else self._attached.array[: self.config.manifest.size]

    @property
    def views(self) -> Mapping[str, Array]:
        """Read-only, for tasks."""
        if self._views is None:
            self._views = self.config.manifest.views(self.served, writeable=False)
        return self._views

    @property
    def mark(self) -> Mark:
        """What is read here now; to be asked after reading whether it was intact (N19)."""
        return Mark(self._attached, self._generation)

    @property
    def intact(self) -> bool:
        """Whether nobody has begun to overwrite what lies here; always, in a buffer of its own."""
        return self.mark.intact

    @property
    def held(self) -> bool:
        """Whether the version is whole here and can be read."""
        return self.complete and self.intact

    @property
    def resumable(self) -> int:
        """Chunks of an interrupted version to go on from (N17); what lies with another is asked for again."""
        return 0 if self.complete or self._attached is not None else self.arrived

    # ---- arriving

    def begin(self, *, term: int, version: int, previous_digest: bytes, from_chunk: int) -> None:
        """A version starts to arrive at ``from_chunk``: 0, or where the same version was interrupted (N17)."""
        if from_chunk:
            if (term, version, from_chunk) != (self.term, self.version, self.arrived):
                raise DecodeError(f"weights v{version} go on at chunk {from_chunk}; held: {self!r}")
        else:
            again = version == self.version and self._attached is None
            self._known = max(self.arrived, self._known) if again else 0
            self.arrived = 0
        self.term, self.version, self.previous_digest = term, version, previous_digest
        self.complete = False
        self.digest = b""

    def put(self, chunk: pb.Chunk, data: memoryview | bytes | None = None) -> None:
        """Take the next chunk. Raises DecodeError for one out of order or of a wrong length, ChecksumError.

        ``data`` where it does not lie in the chunk itself.
        """
        index = chunk.index
        if data is None:
            data = chunk.data
        first = index * self.config.chunk_elements
        size = self.config.elements(index, index)
        expected = not self.complete and index == self.arrived < len(self._checksums)
        if not expected or chunk.offset_bytes != 4 * first or len(data) != size * self._itemsize:
            raise DecodeError(
                f"weights chunk {index} at byte {chunk.offset_bytes} with {len(data)} bytes; "
                f"expected chunk {self.arrived} of {len(self._checksums)}"
            )
        checksum = crc32c(data)
        if checksum != chunk.crc32c:
            raise ChecksumError(f"weights chunk {index} of v{self.version} does not fit its checksum")
        if index < self._known and checksum == self._checksums[index]:
            # Sent again on a new link. Nothing is overwritten: children on other links read on.
            self.arrived = index + 1
            return
        if index == 0 or index < self._known:
            self._overwrite()
        elif self._attached is not None:
            raise DecodeError(f"weights chunk {index} of v{self.version} came in a message, those before by reference")
        from_wire(data, self.config.weights_dtype, out=self._allocate()[first : first + size])
        self._checksums[index], self._known = checksum, 0
        self.arrived = index + 1

    def refer(self, reference: pb.WeightsReference) -> None:
        """Take the next chunks, which lie in a segment. Raises DecodeError, SegmentError."""
        first, through, count = reference.from_chunk, reference.through_chunk, len(self._checksums)
        if self.complete or first != self.arrived or not first <= through < count:
            raise DecodeError(f"weights chunks {first} to {through}; expected chunk {self.arrived} of {count}")
        if len(reference.crc32c) != through + 1 - first:
            raise DecodeError(f"{len(reference.crc32c)} checksums for weights chunks {first} to {through}")
        if self._memory is None:
            raise DecodeError("weights by reference; this node said that it takes none")
        attached = self._attached
        if attached is None or attached.name.nonce != reference.segment.nonce:
            attached = Attached(reference.segment, keep=True)
        if attached.array.size < self.config.manifest.size:
            raise DecodeError(f"a segment of {attached.array.nbytes} bytes is none of the weights")
        if first and (attached is not self._attached or reference.generation != self._generation):
            raise SegmentError(f"weights chunks {first} to {through} lie elsewhere than those before")
        if attached is not self._attached:
            # a buffer of its own is not needed any more; who has mapped it keeps it
            self._attached, self._views, self._own, self._segment = attached, None, None, None
        self._generation = reference.generation
        self._checksums[first : through + 1] = reference.crc32c
        self.arrived = through + 1

    def finish(self, digest: bytes) -> None:
        """The footer came. Raises ChecksumError where its digest is not that of the chunks."""
        if self.arrived != len(self._checksums):
            raise DecodeError(f"weights v{self.version} end after {self.arrived} of {len(self._checksums)} chunks")
        own = version_digest(self.config.manifest.digest, self._checksums)
        if own != digest:
            self.arrived = 0  # none of it can be gone on from
            raise ChecksumError(f"weights v{self.version}: digest {own.hex()} is not the footer's {digest.hex()}")
        self.digest, self.complete = digest, True
        if self._attached is None and self._segment is not None:
            self._segment.generation = self._generation

    def _overwrite(self) -> None:
        """This node's own buffer is about to be written: who has mapped it must see that first."""
        if self._attached is not None:
            self._attached, self._views = None, None
        self._allocate()
        now = 0 if self._segment is None else self._segment.generation
        self._generation = now + 2 + now % 2  # never that of a version which was not finished
        if self._segment is not None:
            self._segment.generation = self._generation - 1

    # ---- control's own

    def publish(self, *, term: int, version: int) -> None:
        """The buffer was written in place (by control's update, or a restore): make it ``version``."""
        self.announce(term=term, version=version)
        self.prepare(0, len(self._checksums))
        self.offer(len(self._checksums))
        self.seal()

    def announce(self, *, term: int, version: int) -> None:
        """``version`` is coming, chunk by chunk; nothing of it is here yet."""
        self.withdraw()
        self.previous_digest, self.digest = self.digest or self.previous_digest, b""
        self.term, self.version = term, version

    def prepare(self, first: int, end: int) -> None:
        """Chunks ``first`` to ``end`` - 1 are final: round them to the run's type, and take their checksums.

        For any thread, several at once.
        """
        flat, served = self.flat, self.served
        for index in range(first, end):
            part = slice(index * self.config.chunk_elements, (index + 1) * self.config.chunk_elements)
            if served is not flat:
                served[part] = flat[part]
                round_in_place(served[part], self.config.weights_dtype)
            self._checksums[index] = crc32c(to_wire(served[part], self.config.weights_dtype))

    def offer(self, end: int) -> None:
        """Chunks before ``end`` are prepared: they may be sent."""
        self.arrived = end

    def seal(self) -> None:
        """Every chunk is published: the version is whole."""
        assert self.arrived == len(self._checksums)
        self.digest = version_digest(self.config.manifest.digest, self._checksums)
        if self._segment is not None:
            self._segment.generation = self._generation
        self.complete = True

    def withdraw(self) -> None:
        """The buffer is about to be written: nobody may read it until it is published again."""
        if self.complete or not self._generation:
            self._overwrite()
        self.arrived, self.complete = 0, False

    # ---- passing on

    def chunk(self, index: int) -> tuple[pb.Chunk, memoryview]:
        """Return chunk ``index`` without its data, and the data as it goes on the wire."""
        elements = self.config.chunk_elements
        head = pb.Chunk(index=index, offset_bytes=4 * index * elements, crc32c=self._checksums[index])
        part = self.served[index * elements : (index + 1) * elements]
        return head, memoryview(to_wire(part, self.config.weights_dtype))

    def reference(self, first: int, through: int) -> pb.WeightsReference | None:
        """Return where chunks ``first`` to ``through`` lie, None where they lie in no segment.

        What lies with another is named as this process has it: it can be found for as long as this one lives.
        """
        where = self._attached or self._segment
        if where is None:
            return None
        return pb.WeightsReference(
            from_chunk=first,
            through_chunk=through,
            segment=where.name,
            generation=self._generation,
            crc32c=self._checksums[first : through + 1],
        )

    def frame(self, tag: bytes, index: int) -> bytes | None:
        """Return the whole message with chunk ``index`` as it was sent to, or came from, somebody under that tag."""
        return self._frames.get(index) if tag == self._frames_tag else None

    def keep_frame(self, tag: bytes, index: int, data: bytes) -> None:
        """Keep a message that holds nothing but tag, chunk and footer: the next child gets the same bytes."""
        if tag != self._frames_tag:
            self._frames.clear()
            self._frames_tag = tag
        self._frames[index] = data
        while len(self._frames) > max(2, _FRAME_BYTES // len(data)):
            del self._frames[next(iter(self._frames))]
