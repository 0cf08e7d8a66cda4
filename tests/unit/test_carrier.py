"""How payload crosses an edge: one suite for both wires, held to the same words, the same sums and the same bits."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spheres.blocks import Block
from spheres.carrier import _MOST_ATTACHED, Carrier, Inline, Piece, Shared
from spheres.config import NodeConfig
from spheres.errors import DecodeError, ProtocolError, SegmentError
from spheres.frames import decode, decode_with_chunk, encode_with_chunk, varint
from spheres.hub import Hub
from spheres.narrow import from_wire, round_in_place
from spheres.numerics import crc32c
from spheres.outbox import Outbox
from spheres.segments import Memory
from spheres.tensors import Manifest
from spheres.v1 import work_pb2 as pb
from spheres.weights import Weights

Array = npt.NDArray[np.float32]

WIRES = ["inline", "shm"]
DTYPES = ["float32", "bfloat16"]
MEMORY = Memory()
#: of 64 bytes; the last one is short
CHUNKS = 11
BLOCK = Block(0, 4)


def config(dtype: str = "float32", *, weights: str = "float32", window: int = 2, chunks: int = CHUNKS) -> NodeConfig:
    size = 16 if dtype == weights == "float32" or dtype != weights else 32
    manifest = Manifest.of({"w": np.zeros(size * (chunks - 1) + 16, np.float32)})
    settings: dict[str, Any] = {"chunk_bytes": 64, "window": window}
    return NodeConfig("run", manifest, gradient_dtype=dtype, weights_dtype=weights, **settings)


class Narrow(NodeConfig):
    """A window that is smaller than the model, though all of it would have room."""

    @property
    def shared_window(self) -> int:  # type: ignore[override]
        return self.window


def narrow(dtype: str = "float32", **more: Any) -> NodeConfig:
    made = config(dtype, **more)
    return Narrow(**{name: getattr(made, name) for name in made.__dataclass_fields__})


def carrier(wire: str, config: NodeConfig) -> Carrier:
    return Inline(config) if wire == "inline" else Shared(config, MEMORY)


def gradient(config: NodeConfig, seed: int) -> Array:
    """Rounded as the run's gradients are, of mixed magnitude."""
    q = np.random.default_rng(seed)
    made = (q.standard_normal(config.manifest.size) * 10.0 ** q.integers(-4, 5, config.manifest.size)).astype(
        np.float32
    )
    round_in_place(made, config.gradient_dtype)
    return made


def chunk_of(config: NodeConfig, array: Array, index: int) -> Array:
    return array[index * config.chunk_elements : (index + 1) * config.chunk_elements]


def piece(config: NodeConfig, first: int, last: int, *sources: Array, held: Array | None = None) -> Piece:
    expressions: list[Any] = []
    for index in range(first, last + 1):
        expression: Any = chunk_of(config, sources[0], index)
        for source in sources[1:]:
            expression = (expression, chunk_of(config, source, index))
        expressions.append(expression)
    return Piece(pb.WorkRequest(tag=pb.Tag(run_id="run")), BLOCK, first, expressions, held)


def send(sender: Carrier, config: NodeConfig, first: int, last: int, *sources: Array, held: Any = None) -> list[bytes]:
    """The messages of chunks ``first`` to ``last``, cut as the hub cuts them."""
    found: list[bytes] = []
    while first <= last:
        through = min(last, first + sender.most(first) - 1)
        ranges = [(first, through)] if sender.together() else [(i, i) for i in range(first, through + 1)]
        for low, high in ranges:
            one = piece(config, low, high, *sources, held=held)
            sender.reserve(one)
            data, size = sender.encode(one)
            assert size == sum(
                chunk_of(config, sources[0], i).size
                * (4 if sender.together() or config.gradient_dtype == "float32" else 2)
                for i in range(low, high + 1)
            )
            found.append(data)
        first = through + 1
    return found


def receive(receiver: Carrier, config: NodeConfig, messages: list[bytes]) -> dict[int, Array]:
    """Chunk by chunk, as the parent sees them: views where they lie in shared memory."""
    found: dict[int, Array] = {}
    for data in messages:
        message = decode(pb.WorkRequest, data)
        if message.HasField("gradient_chunk"):
            chunk = message.gradient_chunk
            assert crc32c(chunk.data) == chunk.crc32c
            assert chunk.offset_bytes == 4 * chunk.index * config.chunk_elements
            found[chunk.index] = from_wire(chunk.data, config.gradient_dtype)
        else:
            reference = message.gradient_reference
            elements = receiver.gradient(reference)
            assert not elements.flags.writeable
            for index in range(reference.from_chunk, reference.through_chunk + 1):
                found[index] = chunk_of(config, elements, index - reference.from_chunk)
    return found


def total(config: NodeConfig, *sources: Array) -> Array:
    """Left + right, each rounded."""
    result = sources[0]
    for source in sources[1:]:
        result = result + source
        round_in_place(result, config.gradient_dtype)
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_sums_arrive_with_the_bits_of_the_plain_sum(wire: str, dtype: str, count: int) -> None:
    made = config(dtype)
    assert made.chunk_count == CHUNKS
    assert made.manifest.size % made.chunk_elements == (0 if made.chunk_elements == 16 else 16)
    sources = [gradient(made, seed) for seed in range(count)]
    sender, receiver = carrier(wire, made), carrier(wire, made)
    found = receive(receiver, made, send(sender, made, 0, CHUNKS - 1, *sources))
    assert sorted(found) == list(range(CHUNKS))
    assert np.concatenate([found[i] for i in range(CHUNKS)]).tobytes() == total(made, *sources).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wire", WIRES)
def test_a_short_last_chunk_has_its_length(wire: str, dtype: str) -> None:
    made = config(dtype, weights=dtype)
    made = NodeConfig(
        "run",
        Manifest.of({"w": np.zeros(5 * (32 if dtype == "float32" else 64) + 16, np.float32)}),
        gradient_dtype=dtype,
        weights_dtype=dtype,
        chunk_bytes=128,
    )
    assert 0 < made.manifest.size % made.chunk_elements < made.chunk_elements
    sources = [gradient(made, seed) for seed in range(2)]
    last, sender = made.chunk_count - 1, carrier(wire, made)
    found = receive(carrier(wire, made), made, send(sender, made, 0, last, *sources))
    assert found[last].size == made.manifest.size % made.chunk_elements
    assert np.concatenate([found[i] for i in range(last + 1)]).tobytes() == total(made, *sources).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wire", WIRES)
def test_what_a_node_computed_itself_goes_as_it_is(wire: str, dtype: str) -> None:
    made = config(dtype)
    own = MEMORY.allocate(made.manifest.size)
    own[:] = gradient(made, 3)
    sender, receiver = carrier(wire, made), carrier(wire, made)
    messages = send(sender, made, 0, CHUNKS - 1, own, held=own)
    found = receive(receiver, made, messages)
    assert np.concatenate([found[i] for i in range(CHUNKS)]).tobytes() == own.tobytes()
    if wire == "shm":
        own[0] += 1
        assert found[0][0] == own[0], "it was copied"
        assert decode(pb.WorkRequest, messages[0]).gradient_reference.segment == MEMORY.segment_of(own).name  # type: ignore[union-attr]


def test_what_a_node_computed_in_memory_of_its_own_goes_through_the_ring() -> None:
    made = config()
    own, sender = gradient(made, 3), carrier("shm", made)
    found = receive(carrier("shm", made), made, send(sender, made, 0, CHUNKS - 1, own, held=own))
    assert np.concatenate([found[i] for i in range(CHUNKS)]).tobytes() == own.tobytes()


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_ring_keeps_what_two_windows_hold_and_no_more(window: int, dtype: str) -> None:
    """Credit: chunks that the parent may still read are those of one window below its frontier (N6, N19)."""
    made = narrow(dtype, window=window)
    sources = [gradient(made, seed) for seed in range(2)]
    sender, receiver = Shared(made, MEMORY), Shared(made, MEMORY)
    expected, found = total(made, *sources), {}
    for index in range(CHUNKS):
        found |= receive(receiver, made, send(sender, made, index, index, *sources))
        for known in range(max(0, index + 1 - 2 * window), index + 1):
            assert found[known].tobytes() == chunk_of(made, expected, known).tobytes(), f"{known} at {index}"
    assert sum(ring.array.nbytes for ring in sender._rings) == 4 * 2 * window * made.chunk_elements
    assert found[0].tobytes() == chunk_of(made, expected, (CHUNKS - 1) // (2 * window) * 2 * window).tobytes()


def test_blocks_that_are_under_way_at_once_lie_apart() -> None:
    made = narrow()
    sources = [gradient(made, seed) for seed in range(4)]
    sender, receiver = Shared(made, MEMORY), Shared(made, MEMORY)
    one, other = piece(made, 0, 1, *sources[:2]), piece(made, 0, 1, *sources[2:])
    other.block = Block(4, 8)
    for each in (one, other):
        sender.reserve(each)
    messages = [sender.encode(each)[0] for each in (one, other)]
    first, second = (receive(receiver, made, [message]) for message in messages)
    assert first[1].tobytes() == chunk_of(made, total(made, *sources[:2]), 1).tobytes()
    assert second[1].tobytes() == chunk_of(made, total(made, *sources[2:]), 1).tobytes()


def test_what_is_reserved_says_the_same_before_and_after_the_sum() -> None:
    """The place is the loop's to find, the sum another thread's: nothing else passes between them."""
    made = narrow()
    sender = Shared(made, MEMORY)
    one = piece(made, 3, 4, gradient(made, 0), gradient(made, 1))
    sender.reserve(one)
    before = one.message.SerializeToString()
    assert sender.encode(one)[0] == before
    with pytest.raises(ProtocolError):
        sender.gradient(pb.GradientReference(segment=MEMORY.probe, from_chunk=3, through_chunk=4))


def test_how_much_goes_at_once() -> None:
    made = narrow(window=4)
    shared, inline = Shared(made, MEMORY), Inline(made)
    assert shared.together()
    assert not inline.together()
    assert [shared.most(first) for first in range(9)] == [4, 4, 4, 4, 4, 3, 2, 1, 4], "a run of slots has no gap"
    assert shared.window == inline.window == 4
    wide = config(window=2)
    assert Shared(wide, MEMORY).window == CHUNKS, "all of a small model"
    assert Shared(wide, MEMORY).most(0) == CHUNKS
    assert Inline(wide).window == 2


# ---- what must be refused


def reference(made: NodeConfig, sender: Shared, **changes: Any) -> pb.GradientReference:
    [data] = send(sender, made, 2, 3, gradient(made, 0), gradient(made, 1))
    found = decode(pb.WorkRequest, data).gradient_reference
    for name, value in changes.items():
        setattr(found, name, value)
    return found


@pytest.mark.parametrize("offset", [1, 2, 3, -4, -64, 64 * 4 + 2, 2**62, -(2**62)])
def test_an_offset_that_is_none_is_refused(offset: int) -> None:
    made = narrow()
    sender = Shared(made, MEMORY)
    with pytest.raises(ProtocolError, match=f"at byte {offset} of a segment"):
        Shared(made, MEMORY).gradient(reference(made, sender, offset_bytes=offset))


def test_chunks_that_reach_beyond_the_segment_are_refused() -> None:
    made = narrow()
    sender, receiver = Shared(made, MEMORY), Shared(made, MEMORY)
    receiver.gradient(reference(made, sender, offset_bytes=4 * 32))
    with pytest.raises(ProtocolError):
        receiver.gradient(reference(made, sender, offset_bytes=4 * 33))
    with pytest.raises(ProtocolError):
        receiver.gradient(reference(made, sender, offset_bytes=0, through_chunk=6))


def test_a_segment_that_is_gone_is_refused() -> None:
    made = narrow()
    sender = Shared(made, MEMORY)
    named = reference(made, sender)
    sender._rings.clear()
    gc.collect()
    with pytest.raises(SegmentError):
        Shared(made, MEMORY).gradient(named)


def test_a_reference_where_no_memory_is_shared_is_refused() -> None:
    made = narrow()
    with pytest.raises(ProtocolError, match="share no memory"):
        Inline(made).gradient(reference(made, Shared(made, MEMORY)))


def test_weights_that_lie_in_no_segment_cannot_be_referred_to() -> None:
    made = config()
    weights = Weights(made)
    weights.publish(term=1, version=0)
    with pytest.raises(ProtocolError, match="in no segment"):
        Shared(made, MEMORY).weights(pb.WorkResponse(), b"", weights, 0)


def test_a_new_attempt_writes_nothing_that_was_sent_for_the_one_before() -> None:
    """A sum of the parent's that is under way counts as sent: a new attempt of its children does not recall it (N4)."""
    made = narrow()
    sources = [gradient(made, seed) for seed in range(4)]
    sender, receiver = Shared(made, MEMORY), Shared(made, MEMORY)
    found = receive(receiver, made, send(sender, made, 0, 1, *sources[:2]))
    sender.begin(attempt=True)
    receive(receiver, made, send(sender, made, 0, 3, *sources[2:]))
    assert found[0].tobytes() == chunk_of(made, total(made, *sources[:2]), 0).tobytes()
    assert found[1].tobytes() == chunk_of(made, total(made, *sources[:2]), 1).tobytes()


def test_a_new_step_uses_the_rings_of_the_one_before() -> None:
    made = narrow()
    sender = Shared(made, MEMORY)
    first = reference(made, sender).segment
    sender.begin(attempt=False)
    assert reference(made, sender).segment == first
    assert len(sender._rings) == 1


def test_segments_of_a_child_that_makes_ever_new_ones_do_not_pile_up() -> None:
    made = config(chunks=1)
    receiver = Shared(made, MEMORY)
    for _ in range(_MOST_ATTACHED + 10):
        own = MEMORY.allocate(made.manifest.size)
        receive(receiver, made, send(Shared(made, MEMORY), made, 0, 0, own, held=own))
    assert len(receiver._attached) == _MOST_ATTACHED


# ---- encoded once


def published(made: NodeConfig) -> Weights:
    weights = Weights(made, root=True)
    weights.flat[:] = gradient(made, 1)
    weights.publish(term=1, version=1)
    return weights


def following(outbox: Outbox) -> list[bytes]:
    found: list[bytes] = []
    while (data := outbox.next()) is not None:
        found.append(data)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_children_get_the_same_object(dtype: str) -> None:
    made = config(weights=dtype)
    weights = published(made)
    tag = pb.Tag(run_id="run", term=1, step=1, kind=1, weights_version=1)
    children = [Outbox(weights), Outbox(weights)]
    sent = []
    for outbox in children:
        outbox.header(tag)
        sent.append([data for data in following(outbox) if decode(pb.WorkResponse, data).HasField("weights_chunk")])
    assert len(sent[0]) == CHUNKS
    assert all(one is other for one, other in zip(*sent, strict=True))
    for index, data in enumerate(sent[0]):  # and they are what protobuf would make
        message = pb.WorkResponse(tag=tag)
        head, payload = weights.chunk(index)
        message.weights_chunk.CopyFrom(head)
        message.weights_chunk.data = bytes(payload)
        if index == CHUNKS - 1:
            message.weights_footer.digest = weights.digest
        assert data == message.SerializeToString()


def test_bytes_that_were_made_for_another_step_are_not_sent_in_this_one() -> None:
    weights = published(config())
    for step in (1, 2):
        tag = pb.Tag(run_id="run", term=1, step=step, kind=1, weights_version=1)
        outbox = Outbox(weights)
        outbox.header(tag)
        assert {decode(pb.WorkResponse, data).tag.step for data in following(outbox)} == {step}


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_came_is_passed_on_in_the_bytes_in_which_it_came(dtype: str) -> None:
    made = config(weights=dtype)
    weights = published(made)
    parent, hub = Outbox(weights), Hub(made, "s-1")
    hub.relinked(1, [pb.Ancestor(id="control", incarnation=1)])
    from spheres.work import Child

    child = Child("s-2", 1, 1, "", Outbox(hub.weights), lambda _: None)
    hub.admit(child, pb.Hello(), pb.Tag())
    tag = pb.Tag(run_id="run", term=1, step=1, kind=1, weights_version=1)
    parent.header(tag)
    came: dict[int, bytes] = {}
    for data in following(parent):
        message, payload = decode_with_chunk(pb.WorkResponse, data)
        if message.HasField("weights_chunk"):
            came[message.weights_chunk.index] = data
        hub.on_response(message, payload, data)
    assert hub.weights.complete
    passed = {}
    for data in following(child.outbox):
        message = decode(pb.WorkResponse, data)
        if message.HasField("weights_chunk"):
            passed[message.weights_chunk.index] = data
    assert sorted(passed) == list(range(CHUNKS))
    assert all(passed[index] is came[index] for index in passed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_by_reference_come_with_the_checksums_of_what_goes_inline(dtype: str) -> None:
    """An edge inline below one by reference passes them on: one digest, whatever the way."""
    made = config(weights=dtype)
    weights = Weights(made, memory=MEMORY, root=True)
    weights.flat[:] = gradient(made, 1)
    weights.publish(term=1, version=1)
    data, through, size = Shared(made, MEMORY).weights(pb.WorkResponse(), b"", weights, 2)
    found = decode(pb.WorkResponse, data).weights_reference
    assert (found.from_chunk, found.through_chunk, through) == (2, CHUNKS - 1, CHUNKS - 1)
    assert size == 4 * (made.manifest.size - 2 * made.chunk_elements)
    assert list(found.crc32c) == [weights.chunk(index)[0].crc32c for index in range(2, CHUNKS)]
    assert list(found.crc32c) == [crc32c(weights.chunk(index)[1]) for index in range(2, CHUNKS)]
    assert found.generation % 2 == 0


# ---- bytes to messages, without a copy of the chunk


def both(kind: Any, data: bytes) -> tuple[Any, Any]:
    """What protobuf makes of the bytes, and what we make of them with the data put back; or the error's class."""
    expected: Any
    found: Any
    try:
        expected = decode(kind, data)
    except DecodeError as error:
        expected = type(error)
    try:
        found, payload = decode_with_chunk(kind, data)
        if payload is not None:
            field = "gradient_chunk" if kind is pb.WorkRequest else "weights_chunk"
            assert not getattr(found, field).data
            getattr(found, field).data = bytes(payload)
    except DecodeError as error:
        found = type(error)
    return expected, found


KINDS = [pb.WorkRequest, pb.WorkResponse, pb.HeartbeatRequest]
PAD = 3000
#: keys and lengths that make fields of what follows them
field = st.tuples(st.sampled_from([0, 1, 2, 3, 5, 7, 9, 12, 13, 14, 15, 16, 200]), st.integers(0, 7))
keys = field.map(lambda parts: varint(parts[0] << 3 | parts[1]))
pieces = st.one_of(
    keys,
    st.binary(max_size=6),
    st.integers(0, 2 * PAD).map(lambda n: varint(n)),
    st.just(bytes(PAD)),
    st.just(b"\x7a"),
)


@given(kind=st.sampled_from(KINDS), parts=st.lists(pieces, max_size=12))
@example(kind=pb.WorkRequest, parts=[b"\x7a", varint(PAD + 3), b"\x7a", varint(PAD), bytes(PAD)])
@example(kind=pb.WorkRequest, parts=[b"\x7a", varint(PAD + 3), b"\x7a", varint(PAD - 1), bytes(PAD)])
@example(kind=pb.WorkRequest, parts=[b"\x7a", varint(PAD), b"\x7a", varint(PAD - 1), bytes(PAD)])
def test_any_bytes_give_what_protobuf_gives(kind: Any, parts: list[bytes]) -> None:
    expected, found = both(kind, b"".join(parts))
    assert found == expected


chunks = st.builds(pb.Chunk, index=st.integers(0, 100), offset_bytes=st.integers(0, 2**40), crc32c=st.integers(0, 9))


@given(
    kind=st.sampled_from([pb.WorkRequest, pb.WorkResponse]),
    chunk=chunks,
    size=st.integers(1900, 4200),
    changes=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=3),
    tail=st.binary(max_size=4) | st.sampled_from([b"\x7a\x00", b"\x7a\x02\x08\x01", b"\x0a\x00", b"\x80\x01\x01"]),
    cut=st.integers(0, 3),
    last=st.booleans(),
)
@example(kind=pb.WorkRequest, chunk=pb.Chunk(), size=3000, changes=[], tail=b"\x7a\x02\x08\x01", cut=0, last=True)
def test_a_chunks_message_with_some_bytes_changed_gives_what_protobuf_gives(
    kind: Any, chunk: Any, size: int, changes: list[tuple[int, int]], tail: bytes, cut: int, last: bool
) -> None:
    message = kind(tag=pb.Tag(run_id="run", term=1, step=300))
    data = bytearray(encode_with_chunk(message, chunk, bytes([7]) * size))
    if not last:  # the chunk first, the tag behind it
        head = message.SerializeToString()
        data = data[len(head) :] + head
    for place, byte in changes:
        data[place] = byte
    data = data[: len(data) - cut] + tail
    expected, found = both(kind, bytes(data))
    assert found == expected


@pytest.mark.parametrize("kind", [pb.WorkRequest, pb.WorkResponse])
def test_the_data_of_a_large_chunk_are_a_view_of_the_message(kind: Any) -> None:
    data = encode_with_chunk(kind(tag=pb.Tag(run_id="run")), pb.Chunk(index=1), bytes(5000))
    _, payload = decode_with_chunk(kind, data)
    assert payload is not None
    assert payload.obj is data
    _, payload = decode_with_chunk(kind, encode_with_chunk(kind(), pb.Chunk(index=1), bytes(100)))
    assert payload is None
