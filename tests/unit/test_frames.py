"""Bytes to messages: any bytes give a value or a clean error, and the hand-made encoding is protobuf's own."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spheres.blocks import Block
from spheres.config import MAX_MESSAGE_BYTES
from spheres.errors import DecodeError, MessageTooLargeError
from spheres.frames import block_from, blocks_from, blocks_to, decode, encode_with_chunk
from spheres.v1 import work_pb2 as pb

KINDS = [pb.WorkRequest, pb.WorkResponse, pb.HeartbeatRequest, pb.HeartbeatResponse]

int32 = st.integers(-(2**31), 2**31 - 1)
int64 = st.integers(-(2**63), 2**63 - 1)
text = st.text(st.characters(codec="utf-8"), max_size=8)
doubles = st.floats(allow_nan=False)
blocks = st.builds(pb.Block, lo=int32, hi=int32)
tags = st.builds(pb.Tag, run_id=text, term=int64, step=int64, kind=int32, weights_version=int64)
# Only what data around a chunk may stand in; messages with maps have no order of their own.
requests = st.builds(
    pb.WorkRequest,
    tag=st.none() | tags,
    session=int64,
    attempt=int32,
    ready=st.none() | st.builds(pb.Ready, held=st.lists(blocks, max_size=3), idle=st.booleans()),
    gradient_header=st.none()
    | st.builds(
        pb.GradientHeader,
        block=blocks,
        weights_digest=st.binary(max_size=16),
        samples_count=int64,
        loss_sum=doubles,
        absent=st.booleans(),
    ),
    gradient_footer=st.none()
    | st.builds(
        pb.GradientFooter,
        block=blocks,
        contributions=st.lists(st.builds(pb.Contribution, block=blocks, sphere_id=text), max_size=3),
    ),
)
responses = st.builds(
    pb.WorkResponse,
    tag=st.none() | tags,
    weights_header=st.none() | st.builds(pb.WeightsHeader, manifest_digest=st.binary(max_size=16), from_chunk=int32),
    assign=st.none() | st.builds(pb.Assign, attempt=int32, blocks=st.lists(blocks, max_size=3)),
    weights_footer=st.none() | st.builds(pb.WeightsFooter, digest=st.binary(max_size=16)),
)
chunks = st.builds(
    pb.Chunk,
    block=st.none() | blocks,
    index=int32,
    offset_bytes=int64,
    crc32c=st.integers(0, 2**32 - 1),
)


def whole(message, chunk, data):
    """The message that protobuf makes of the parts."""
    expected = type(message)()
    expected.CopyFrom(message)
    field = expected.gradient_chunk if isinstance(message, pb.WorkRequest) else expected.weights_chunk
    field.CopyFrom(chunk)
    field.data = bytes(data)
    return expected


# ---- decode


@given(kind=st.sampled_from(KINDS), data=st.binary(max_size=300))
@example(kind=pb.WorkRequest, data=b"")
@example(kind=pb.WorkRequest, data=b"\xff" * 20)
@example(kind=pb.WorkRequest, data=b"\x22\x03\x12\x01\xff")  # a name that is no UTF-8
@example(kind=pb.WorkResponse, data=b"\x7a\x02\x7a\xff")  # a chunk cut off in its data
@example(kind=pb.WorkResponse, data=b"\x0b" * 300)  # groups in groups in groups
def test_any_bytes_give_a_value_or_a_clean_error(kind, data):
    result = decoded(kind, data)
    if isinstance(result, DecodeError):
        assert str(len(data)) in str(result)
        assert kind.DESCRIPTOR.name in str(result)


@given(
    kind=st.sampled_from(KINDS),
    message=requests | responses,
    changes=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 200),
)
def test_a_message_with_some_bytes_changed_gives_a_value_or_a_clean_error(kind, message, changes, cut):
    data = bytearray(message.SerializeToString())[: 200 - cut]
    for place, byte in changes:
        if place < len(data):
            data[place] = byte
    decoded(kind, bytes(data))


def decoded(kind, data):
    """The message, or the clean error; any other exception passes through."""
    try:
        message = decode(kind, data)
    except DecodeError as error:
        return error
    assert isinstance(message, kind)
    return message


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_over_the_limit_are_not_looked_at(kind):
    with pytest.raises(MessageTooLargeError, match=f"{MAX_MESSAGE_BYTES + 1} bytes; the limit is {MAX_MESSAGE_BYTES}"):
        decode(kind, bytes(MAX_MESSAGE_BYTES + 1))
    with pytest.raises(DecodeError):  # at the limit it is: zeros are no message
        decode(kind, bytes(MAX_MESSAGE_BYTES))


@given(message=requests | responses)
def test_what_is_encoded_is_decoded(message):
    assert decode(type(message), message.SerializeToString()) == message


# ---- the hand-made encoding

# Where the length of the data, or of the chunk around it, needs one byte more.
borders = st.sampled_from([2**7, 2**14]).flatmap(lambda border: st.integers(border - 70, border + 2))


@given(
    message=requests | responses,
    chunk=chunks,
    size=st.just(0) | st.integers(0, 300) | borders,
    byte=st.integers(0, 255),
)
@example(message=pb.WorkResponse(), chunk=pb.Chunk(), size=0, byte=0)
@example(message=pb.WorkRequest(), chunk=pb.Chunk(index=1), size=2**21, byte=1)  # the length needs four bytes
@example(message=pb.WorkRequest(), chunk=pb.Chunk(index=1), size=2**21 - 1, byte=1)
@settings(max_examples=300)
def test_the_hand_made_encoding_is_protobufs_own(message, chunk, size, byte):
    data = bytes([byte]) * size
    encoded = encode_with_chunk(message, chunk, memoryview(data) if byte % 2 else data)
    assert encoded == whole(message, chunk, data).SerializeToString()


@given(message=requests | responses, chunk=chunks, data=st.binary(max_size=200))
def test_a_chunk_survives_the_way(message, chunk, data):
    assert decode(type(message), encode_with_chunk(message, chunk, data)) == whole(message, chunk, data)


# ---- sizes


def test_the_limit_is_1_1_mib():
    assert MAX_MESSAGE_BYTES <= 1.1 * 2**20


def test_a_full_chunk_with_header_and_footer_fits_in_one_message():
    """4096 microbatches, each by another of 10,000 spheres: the largest that the configuration allows."""
    tag = pb.Tag(run_id="r" * 32, term=2**31, step=2**40, kind=1, weights_version=2**40)
    message = pb.WorkRequest(tag=tag, session=2**31, attempt=2**31 - 1)
    message.gradient_header.block.lo, message.gradient_header.block.hi = 0, 4096
    message.gradient_header.weights_digest = bytes(16)
    message.gradient_header.samples_count = 2**31
    message.gradient_header.loss_sum = 0.1
    for number in range(16):
        message.gradient_header.metrics.add(name=f"metric number {number}", value=0.1)
    message.gradient_footer.block.lo, message.gradient_footer.block.hi = 0, 4096
    for number in range(16):
        message.gradient_footer.phases.add(phase=f"phase number {number}", slowest_sphere_id="s-10000")
    for index in range(4096):
        message.gradient_footer.contributions.add(block=pb.Block(lo=index, hi=index + 1), sphere_id="s-10000")
    chunk = pb.Chunk(block=pb.Block(lo=0, hi=4096), index=2**20, offset_bytes=2**40, crc32c=2**32 - 1)
    data = encode_with_chunk(message, chunk, bytes(2**20))
    assert len(data) <= MAX_MESSAGE_BYTES
    assert decode(pb.WorkRequest, data).gradient_chunk.index == 2**20


# ---- blocks


@given(st.lists(st.tuples(int32, int32), max_size=5))
def test_blocks_survive_the_way(pairs):
    expected = [Block(lo, hi) for lo, hi in pairs]
    messages = blocks_to(expected)
    assert blocks_from(messages) == expected
    assert [block_from(message) for message in messages] == expected
