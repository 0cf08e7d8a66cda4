"""The framing of checkpoint files: length-delimited CheckpointRecord messages, each with its checksum.

What records mean and in which order they come is in ``control.snapshot``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO, Literal

import crc32c as _crc32c
from google.protobuf.message import DecodeError

from spheres.errors import CheckpointError
from spheres.frames import varint
from spheres.v1.checkpoint_pb2 import CheckpointRecord

__all__ = ["CHUNK_BYTES", "Field", "RecordError", "RecordReader", "RecordWriter", "body"]

#: bytes of a buffer in one record
CHUNK_BYTES = 1 << 20
#: a record that claims more is taken for a broken one before anything of that size is read
_LARGEST_RECORD = 256 << 20

Field = Literal["run", "buffer_header", "sphere", "buffer_chunk"]
_TAGS: dict[str, bytes] = {
    field.name: bytes([field.number << 3 | 2])  # wire type 2; all numbers are below 16, so a tag is one byte
    for field in CheckpointRecord.DESCRIPTOR.fields
    if field.name != "crc32c"
}


class RecordError(CheckpointError):
    """One record of a file, counted from 0, cannot be read."""

    def __init__(self, record: int, what: str) -> None:
        super().__init__(f"record {record}: {what}")
        self.record = record
        self.what = what


class RecordWriter:
    """Writes records and keeps ``size``, ``checksum`` and ``count`` of what it has written."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.size = 0
        self.checksum = 0
        self.count = 0

    def write(self, field: Field, data: bytes | memoryview, checksum: int | None = None) -> None:
        """Write one record; ``checksum`` is the CRC-32C of ``data`` where the caller knows it already."""
        # Encoded here and not by protobuf, which would copy each chunk three times. crc32c is field 1, a fixed32.
        if len(data) > _LARGEST_RECORD - 64:
            raise RecordError(self.count, f"would hold {len(data)} bytes; at most {_LARGEST_RECORD} can be read back")
        checksum = _crc32c.crc32c(data) if checksum is None else checksum
        head = b"\x0d" + struct.pack("<I", checksum) + _TAGS[field] + varint(len(data))
        head = varint(len(head) + len(data)) + head
        for part in (head, data):
            self._stream.write(part)
            self.size += len(part)
            self.checksum = _crc32c.crc32c(part, self.checksum)
        self.count += 1


class RecordReader:
    """Reads records and keeps ``size``, ``checksum`` and ``count`` of what it has read."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.size = 0
        self.checksum = 0
        self.count = 0

    def __iter__(self) -> Iterator[CheckpointRecord]:
        """Yield the records up to the end of the file. Raises RecordError; ``body`` checks their checksums."""
        while (length := self._length()) is not None:
            if length > _LARGEST_RECORD:
                raise RecordError(self.count, f"claims {length} bytes, more than any record has")
            try:
                record = CheckpointRecord.FromString(self._read(length))
            except DecodeError:
                raise RecordError(self.count, "is no CheckpointRecord") from None
            self.count += 1
            yield record

    def _length(self) -> int | None:
        value = 0
        for shift in range(0, 35, 7):
            byte = self._stream.read(1)
            if not byte and shift == 0:
                return None
            self._took(byte, 1)
            value |= (byte[0] & 0x7F) << shift
            if byte[0] < 0x80:
                return value
        raise RecordError(self.count, "has a length that is no length")

    def _read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._took(data, size)
        return data

    def _took(self, data: bytes, wanted: int) -> None:
        self.size += len(data)
        self.checksum = _crc32c.crc32c(data, self.checksum)
        if len(data) < wanted:
            raise RecordError(self.count, "is cut off")


def body(record: CheckpointRecord, field: Field, index: int) -> bytes:
    """Return what a record holds in ``field``. Raises RecordError where its checksum differs."""
    data: bytes = getattr(record, field)
    if _crc32c.crc32c(data) != record.crc32c:
        raise RecordError(index, f"checksum of its {field} differs")
    return data
