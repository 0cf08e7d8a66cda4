"""Bytes to messages and back, with their limits; the hand-made encoding of a message that carries a chunk.

It checks form only. Whether a message fits the step is the hub's to decide.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from google.protobuf.message import DecodeError as ProtobufDecodeError

from spheres.blocks import Block
from spheres.config import MAX_MESSAGE_BYTES
from spheres.errors import DecodeError, MessageTooLargeError
from spheres.v1 import work_pb2 as pb

__all__ = ["block_from", "blocks_from", "blocks_to", "decode", "encode_with_chunk", "varint"]

Message = TypeVar("Message", pb.WorkRequest, pb.WorkResponse, pb.HeartbeatRequest, pb.HeartbeatResponse)

#: key of field 15, length-delimited: the chunk in its message, and the data in its chunk
_KEY_15 = b"\x7a"


def decode(kind: type[Message], data: bytes) -> Message:
    """Return the message. Raises DecodeError for bytes that are none, MessageTooLargeError."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise MessageTooLargeError(f"a message of {len(data)} bytes; the limit is {MAX_MESSAGE_BYTES}")
    try:
        return kind.FromString(data)
    except ProtobufDecodeError as error:
        raise DecodeError(f"{len(data)} bytes that are no {kind.DESCRIPTOR.name}: {error}") from None


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
