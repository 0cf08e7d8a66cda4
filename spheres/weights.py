"""One version of the weights on one node: how it arrives chunk by chunk, its digest, and who may read it when.

One flat buffer, overwritten in place by the next version (N15); it never overwrites itself: the hub says when.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from spheres.config import NodeConfig
from spheres.errors import ChecksumError, DecodeError
from spheres.numerics import crc32c, version_digest
from spheres.tensors import aligned_zeros
from spheres.v1 import work_pb2 as pb

__all__ = ["Weights"]


class Weights:
    """The node's weights. Mutable: version, how many chunks have arrived, checksums, digest."""

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self.flat: npt.NDArray[np.float32] = aligned_zeros(config.manifest.size)
        self._bytes = self.flat.data.cast("B")
        self.version = -1
        self.term = 0
        #: chunks 0 .. arrived-1 of the version are here and fit their checksums
        self.arrived = 0
        #: every chunk is here and the footer's digest agreed: only now may it be used (N17)
        self.complete = False
        self.digest = b""
        self.previous_digest = b""
        self._checksums = [0] * config.chunk_count
        #: read-only, for tasks
        self.views = config.manifest.views(self.flat, writeable=False)

    def __repr__(self) -> str:
        return f"Weights(v{self.version}, {self.arrived}/{len(self._checksums)} chunks, complete={self.complete})"

    def begin(self, *, term: int, version: int, previous_digest: bytes, from_chunk: int) -> None:
        """A version starts to arrive at ``from_chunk``: 0, or where the same version was interrupted (N17)."""
        if from_chunk:
            if (term, version, from_chunk) != (self.term, self.version, self.arrived):
                raise DecodeError(f"weights v{version} go on at chunk {from_chunk}; held: {self!r}")
        else:
            self.arrived = 0
        self.term, self.version, self.previous_digest = term, version, previous_digest
        self.complete = False
        self.digest = b""

    def put(self, chunk: pb.Chunk) -> None:
        """Take the next chunk. Raises DecodeError for one out of order or of a wrong length, ChecksumError."""
        index, data = chunk.index, chunk.data
        start = index * self.config.chunk_bytes
        length = min(self.config.chunk_bytes, len(self._bytes) - start)
        expected = not self.complete and index == self.arrived < len(self._checksums)
        if not expected or chunk.offset_bytes != start or len(data) != length:
            raise DecodeError(
                f"weights chunk {index} at byte {chunk.offset_bytes} with {len(data)} bytes; "
                f"expected chunk {self.arrived} of {len(self._checksums)}"
            )
        checksum = crc32c(data)
        if checksum != chunk.crc32c:
            raise ChecksumError(f"weights chunk {index} of v{self.version} does not fit its checksum")
        self._bytes[start : start + length] = data
        self._checksums[index] = checksum
        self.arrived = index + 1

    def finish(self, digest: bytes) -> None:
        """The footer came. Raises ChecksumError where its digest is not that of the chunks."""
        if self.arrived != len(self._checksums):
            raise DecodeError(f"weights v{self.version} end after {self.arrived} of {len(self._checksums)} chunks")
        own = version_digest(self.config.manifest.digest, self._checksums)
        if own != digest:
            raise ChecksumError(f"weights v{self.version}: digest {own.hex()} is not the footer's {digest.hex()}")
        self.digest, self.complete = digest, True

    def publish(self, *, term: int, version: int) -> None:
        """The buffer was written in place (by control's update, or a restore): make it ``version``."""
        chunk = self.config.chunk_bytes
        for index in range(len(self._checksums)):
            self._checksums[index] = crc32c(self._bytes[index * chunk : (index + 1) * chunk])
        self.previous_digest = self.digest
        self.term, self.version = term, version
        self.arrived = len(self._checksums)
        self.digest = version_digest(self.config.manifest.digest, self._checksums)
        self.complete = True

    def withdraw(self) -> None:
        """The buffer is about to be written: nobody may read it until it is published again."""
        self.arrived, self.complete = 0, False

    def chunk(self, index: int) -> tuple[pb.Chunk, memoryview]:
        """Return chunk ``index`` without its data, and the data as a view."""
        start = index * self.config.chunk_bytes
        head = pb.Chunk(index=index, offset_bytes=start, crc32c=self._checksums[index])
        return head, self._bytes[start : start + self.config.chunk_bytes]
