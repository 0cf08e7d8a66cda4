"""Bytes to messages and back, with their limits; the hand-made encoding of a message that carries a chunk.

It checks form only. Whether a message fits the step is the hub's to decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from google.protobuf.message import DecodeError as ProtobufDecodeError

from spheres.blocks import Block
from spheres.config import MAX_MESSAGE_BYTES
from spheres.errors import DecodeError, MessageTooLargeError
from spheres.v1 import work_pb2 as pb

__all__ = [
    "block_from",
    "blocks_from",
    "blocks_to",
    "capacities_from",
    "decode",
    "decode_with_chunk",
    "encode_with_chunk",
    "varint",
]

Message = TypeVar("Message", pb.WorkRequest, pb.WorkResponse, pb.HeartbeatRequest, pb.HeartbeatResponse)

#: key of field 15, length-delimited: the chunk in its message, and the data in its chunk
_KEY_15 = b"\x7a"
#: below this many bytes a copy costs less than looking for the chunk
_WORTH_A_VIEW = 2048


def decode(kind: type[Message], data: bytes) -> Message:
    """Return the message. Raises DecodeError for bytes that are none, MessageTooLargeError."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise MessageTooLargeError(f"a message of {len(data)} bytes; the limit is {MAX_MESSAGE_BYTES}")
    try:
        return kind.FromString(data)
    except ProtobufDecodeError as error:
        raise DecodeError(f"{len(data)} bytes that are no {kind.DESCRIPTOR.name}: {error}") from None


def decode_with_chunk(kind: type[Message], data: bytes) -> tuple[Message, memoryview | None]:
    """Return the message, and its chunk's data as a view of ``data`` instead of in the message: no copy.

    That is for messages as ``encode_with_chunk`` makes them, with the chunk last and its data last in it. Of others,
    and where there is little to save, the data are in the message and the view is None. Raises as ``decode`` does.
    """
    if len(data) < _WORTH_A_VIEW or len(data) > MAX_MESSAGE_BYTES:
        return decode(kind, data), None
    outer = _last_field(data, 0)
    inner = None if outer is None else _last_field(data, outer[1])
    if outer is None or inner is None:
        return decode(kind, data), None
    try:
        message = kind.FromString(data[: outer[0]])
        chunk = pb.Chunk.FromString(data[outer[1] : inner[0]])
    except ProtobufDecodeError:
        return decode(kind, data), None
    if isinstance(message, pb.WorkRequest):
        message.gradient_chunk.CopyFrom(chunk)
    elif isinstance(message, pb.WorkResponse):
        message.weights_chunk.CopyFrom(chunk)
    else:
        return decode(kind, data), None
    return message, memoryview(data)[inner[1] :]


def _last_field(data: bytes, position: int) -> tuple[int, int] | None:
    """Return where field 15 begins and where its contents do, if it is the first of that number and fills the rest."""
    end = len(data)
    while position < end:
        start, key = position, data[position]
        position += 1
        if key > 0x7F:
            return None  # a field above 15: not made by us
        wire = key & 7
        if wire == 0:
            while position < end and data[position] > 0x7F:
                position += 1
            position += 1
        elif wire == 1:
            position += 8
        elif wire == 5:
            position += 4
        elif wire == 2:
            length = shift = 0
            while position < end:
                byte = data[position]
                position += 1
                length |= (byte & 0x7F) << shift
                shift += 7
                if byte <= 0x7F:
                    break
                if shift >= 35:
                    return None
            if key == _KEY_15[0]:
                return (start, position) if position + length == end else None
            position += length
        else:
            return None
    return None


def encode_with_chunk(message: pb.WorkRequest | pb.WorkResponse, chunk: pb.Chunk, data: memoryview | bytes) -> bytes:
    """Return ``message`` with its field 15 set to ``chunk`` holding ``data``: one copy of the data instead of five.

    ``message`` must not have field 15 set, nor ``chunk`` its data; the bytes are those that protobuf would make.
    """
    head = chunk.SerializeToString()
    size = len(data)
    if not size:
        return b"".join((message.SerializeToString(), _KEY_15, varint(len(head)), head))
    length = varint(size)
    inside = len(head) + 1 + len(length) + size
    return b"".join((message.SerializeToString(), _KEY_15, varint(inside), head, _KEY_15, length, data))


def varint(value: int) -> bytes:
    """Return a whole number from 0 as protobuf writes lengths and keys."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def block_from(message: pb.Block) -> Block:
    return Block(message.lo, message.hi)


def blocks_from(messages: Iterable[pb.Block]) -> list[Block]:
    return [Block(m.lo, m.hi) for m in messages]


def blocks_to(blocks: Iterable[Block]) -> list[pb.Block]:
    return [pb.Block(lo=b.lo, hi=b.hi) for b in blocks]


def capacities_from(capacity: float, capacities: Mapping[str, float], environment: str) -> dict[str, float]:
    """Return what a child's subtree computes at once by environment; ``environment`` is the child's own."""
    return dict(capacities) or {environment: capacity}
