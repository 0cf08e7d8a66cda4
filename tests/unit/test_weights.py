"""One version of the weights on one node: chunk by chunk, checked, and whole only after its footer (N17)."""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import pytest

from spheres.config import NodeConfig
from spheres.errors import ChecksumError, DecodeError, SegmentError
from spheres.narrow import round_in_place
from spheres.numerics import crc32c
from spheres.segments import Attached, Memory, Segment
from spheres.tensors import Manifest
from spheres.v1 import work_pb2 as pb
from spheres.weights import Weights

#: five chunks of 64 bytes, the last one half
CONFIG = NodeConfig(
    run_id="run", manifest=Manifest.of({"w": np.zeros(64, np.float32), "b": np.zeros(8, np.float32)}), chunk_bytes=64
)


def source(version: int = 3, *, config: NodeConfig = CONFIG) -> Weights:
    """A node that has a version whole."""
    weights = Weights(config)
    weights.flat[:] = np.random.default_rng(version).standard_normal(weights.flat.size)
    weights.publish(term=1, version=version)
    return weights


def offer_through(weights: Weights, end: int) -> None:
    """Control's next chunks are final."""
    weights.prepare(weights.arrived, end)
    weights.offer(end)


def chunk(weights: Weights, index: int) -> pb.Chunk:
    head, data = weights.chunk(index)
    head.data = bytes(data)
    return head


def sink(from_chunk: int = 0, *, version: int = 3) -> Weights:
    """A node that has so many chunks of the version."""
    weights, origin = Weights(CONFIG), source(version)
    weights.begin(term=1, version=version, previous_digest=b"", from_chunk=0)
    for index in range(from_chunk):
        weights.put(chunk(origin, index))
    return weights


def test_a_version_arrives_chunk_by_chunk_and_can_be_passed_on_as_it_comes() -> None:
    origin, weights = source(), sink()
    assert CONFIG.chunk_count == 5
    for index in range(5):
        weights.put(chunk(origin, index))
        assert weights.arrived == index + 1
        assert chunk(weights, index) == chunk(origin, index)
        assert not weights.complete
    weights.finish(origin.digest)
    assert weights.complete
    assert weights.digest == origin.digest
    assert weights.flat.tobytes() == origin.flat.tobytes()
    assert weights.views["b"].tobytes() == origin.flat[64:72].tobytes()


def test_the_tasks_views_are_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        source().views["w"][0] = 1.0


@pytest.mark.parametrize("index", [0, 1, 3, 4, -1, 5, 1 << 30])
def test_a_chunk_out_of_order_is_refused(index: int) -> None:
    origin, weights = source(), sink(2)
    wrong = chunk(origin, index) if 0 <= index < 5 else pb.Chunk(index=index, offset_bytes=index * 64)
    with pytest.raises(DecodeError, match="expected chunk 2 of 5"):
        weights.put(wrong)
    weights.put(chunk(origin, 2))  # nothing was half applied


def test_an_empty_chunk_past_the_end_is_refused() -> None:
    """Where the size is a multiple of the chunk's, its offset and its length would fit."""
    config = NodeConfig(run_id="run", manifest=Manifest.of({"w": np.zeros(32, np.float32)}), chunk_bytes=64)
    origin, weights = source(config=config), Weights(config)
    weights.begin(term=1, version=3, previous_digest=b"", from_chunk=0)
    for index in range(2):
        weights.put(chunk(origin, index))
    with pytest.raises(DecodeError):
        weights.put(pb.Chunk(index=2, offset_bytes=128))


@pytest.mark.parametrize(("length", "offset"), [(63, 0), (65, 0), (0, 0), (64, 64), (64, -64)])
def test_a_chunk_of_a_wrong_length_or_place_is_refused(length: int, offset: int) -> None:
    weights = sink()
    good = chunk(source(), 0)
    with pytest.raises(DecodeError):
        weights.put(pb.Chunk(index=0, offset_bytes=offset, crc32c=good.crc32c, data=(good.data + b"x")[:length]))
    assert weights.arrived == 0


def test_the_short_last_chunk_must_have_its_length() -> None:
    weights, good = sink(4), chunk(source(), 4)
    assert len(good.data) == CONFIG.manifest.size * 4 - 4 * 64
    with pytest.raises(DecodeError):
        weights.put(pb.Chunk(index=4, offset_bytes=256, crc32c=good.crc32c, data=good.data + b"\0"))


def test_a_chunk_that_does_not_fit_its_checksum_is_not_used_or_passed_on() -> None:
    weights, good = sink(1), chunk(source(), 1)
    before = weights.flat.tobytes()
    with pytest.raises(ChecksumError, match="chunk 1 of v3"):
        weights.put(pb.Chunk(index=1, offset_bytes=64, crc32c=good.crc32c ^ 1, data=good.data))
    assert weights.arrived == 1
    assert weights.flat.tobytes() == before


def test_a_footer_too_early_is_refused() -> None:
    weights = sink(4)
    with pytest.raises(DecodeError, match="end after 4 of 5 chunks"):
        weights.finish(source().digest)


def test_a_footer_with_another_digest_is_refused() -> None:
    """Each chunk fits its checksum; one of them is of another version."""
    weights = sink(4)
    weights.put(chunk(source(4), 4))
    with pytest.raises(ChecksumError, match="is not the footer's"):
        weights.finish(source().digest)
    assert not weights.complete


def test_no_chunk_follows_the_footer() -> None:
    weights = sink(5)
    weights.finish(source().digest)
    with pytest.raises(DecodeError):
        weights.put(chunk(source(), 0))


def test_an_interrupted_version_goes_on_where_it_was() -> None:
    weights, origin = sink(3), source()
    weights.begin(term=1, version=3, previous_digest=b"p", from_chunk=3)
    for index in (3, 4):
        weights.put(chunk(origin, index))
    weights.finish(origin.digest)
    assert weights.flat.tobytes() == origin.flat.tobytes()


@pytest.mark.parametrize(("term", "version", "from_chunk"), [(2, 3, 3), (1, 4, 3), (1, 3, 2), (1, 3, 4), (1, 3, -1)])
def test_another_version_or_place_to_go_on_is_refused(term: int, version: int, from_chunk: int) -> None:
    weights = sink(3)
    with pytest.raises(DecodeError, match="go on at chunk"):
        weights.begin(term=term, version=version, previous_digest=b"", from_chunk=from_chunk)


def test_a_version_that_is_begun_anew_holds_nothing_until_it_is_whole() -> None:
    weights = sink(5)
    weights.finish(source().digest)
    weights.begin(term=1, version=4, previous_digest=weights.digest, from_chunk=0)
    assert (weights.complete, weights.arrived, weights.digest, weights.version) == (False, 0, b"", 4)


def test_what_is_published_is_whole_and_names_the_version_before() -> None:
    weights = source(3)
    first = weights.digest
    weights.withdraw()
    assert (weights.complete, weights.arrived) == (False, 0)
    weights.flat[7] += 1
    weights.publish(term=1, version=4)
    assert weights.complete
    assert weights.arrived == 5
    assert weights.previous_digest == first
    assert weights.digest != first
    # a digest says what the weights are, not when
    weights.flat[7] -= 1
    weights.flat[:] = source(3).flat
    weights.publish(term=2, version=9)
    assert weights.digest == first


# ---- in shared memory

MEMORY = Memory()
NARROW = replace(CONFIG, weights_dtype="bfloat16")


def shared(version: int = 3, *, config: NodeConfig = CONFIG) -> Weights:
    """Control, with a version whole in a segment."""
    weights = Weights(config, memory=MEMORY, root=True)
    write(weights, version)
    weights.publish(term=1, version=version)
    return weights


def write(weights: Weights, version: int) -> None:
    weights.flat[:] = np.random.default_rng(version).standard_normal(weights.flat.size)


def reference(weights: Weights, first: int = 0, through: int = 4) -> pb.WeightsReference:
    found = weights.reference(first, through)
    assert found is not None
    return found


def reader(origin: Weights, *, config: NodeConfig = CONFIG) -> Weights:
    """A node that reads a version where it lies."""
    weights = Weights(config, memory=MEMORY)
    arrive(weights, origin)
    return weights


def arrive(weights: Weights, origin: Weights, *, term: int = 1) -> None:
    weights.begin(term=term, version=origin.version, previous_digest=b"", from_chunk=0)
    weights.refer(reference(origin))
    weights.finish(origin.digest)


def inline(weights: Weights, origin: Weights, *, term: int = 1, chunks: int = 5) -> None:
    weights.begin(term=term, version=origin.version, previous_digest=b"", from_chunk=0)
    for index in range(chunks):
        weights.put(chunk(origin, index))
    if chunks == 5:
        weights.finish(origin.digest)


def test_weights_by_reference_are_read_where_they_lie() -> None:
    origin = shared()
    weights = reader(origin)
    assert weights.held
    assert weights.digest == origin.digest
    assert weights.views["w"].tobytes() == origin.views["w"].tobytes()
    assert weights.served.ctypes.data != origin.served.ctypes.data
    assert not weights.served.flags.writeable
    assert weights._own is None, "memory of its own that nobody needs"
    for index in range(5):
        assert chunk(weights, index) == chunk(origin, index)
    passed, came = reference(weights, 1, 2), reference(origin, 1, 2)
    assert passed.segment.nonce == came.segment.nonce
    assert passed.segment.fd != came.segment.fd, "found here, also when its owner is gone"
    passed.ClearField("segment")
    came.ClearField("segment")
    assert passed == came, "it is passed on as it came"


def test_a_reader_sees_that_the_next_version_is_being_written() -> None:
    origin = shared()
    weights = reader(origin)
    views = weights.views
    before = views["w"].copy()
    assert weights.intact
    origin.withdraw()
    assert not weights.intact, "before the first byte is written"
    assert views["w"].tobytes() == before.tobytes()
    assert weights.complete
    assert not weights.held
    write(origin, 4)
    assert not weights.intact
    assert views["w"].tobytes() != before.tobytes()
    origin.publish(term=1, version=4)
    assert not weights.intact, "nor is it ever again, until the new one has come"
    arrive(weights, origin)
    assert weights.held
    assert weights.views is views
    assert weights.views["w"].tobytes() == origin.views["w"].tobytes()


def test_no_number_is_of_two_versions() -> None:
    origin, seen = shared(), []
    for version in range(4, 12):
        origin.announce(term=1, version=version)
        seen.append(reference(origin).generation)
        offer_through(origin, 2)
        if version % 3:  # else it is given up half way
            offer_through(origin, 5)
            origin.seal()
    assert all(generation % 2 == 0 for generation in seen)
    complete = [generation for generation, version in zip(seen, range(4, 12), strict=True) if version % 3]
    assert sorted(set(complete)) == complete


def test_a_version_that_was_given_up_half_way_has_a_number_of_its_own() -> None:
    """Who has passed half of it on must see that it is being overwritten."""
    middle = Weights(CONFIG, memory=MEMORY)
    inline(middle, source(3), chunks=2)
    below = Weights(CONFIG, memory=MEMORY)
    below.begin(term=1, version=3, previous_digest=b"", from_chunk=0)
    below.refer(reference(middle, 0, 1))
    assert below.intact
    inline(middle, source(4), chunks=1)
    assert not below.intact


def test_chunks_that_arrive_are_intact_while_those_behind_are_being_written() -> None:
    """They are passed on as they come, whatever the wire of the next edge."""
    origin, weights = shared(), Weights(CONFIG, memory=MEMORY)
    origin.announce(term=1, version=4)
    weights.begin(term=1, version=4, previous_digest=origin.previous_digest, from_chunk=0)
    for index in range(5):
        origin.flat[index * 16 : (index + 1) * 16] = index
        offer_through(origin, index + 1)
        weights.refer(reference(origin, index, index))
        assert weights.intact
        assert not weights.held
        assert chunk(weights, index).data == np.full(16, index, np.float32).tobytes()[: len(chunk(weights, index).data)]
    origin.seal()
    weights.finish(origin.digest)
    assert weights.held
    assert origin.digest == source_of(origin).digest


def source_of(other: Weights) -> Weights:
    weights = Weights(other.config)
    weights.flat[:] = other.flat
    weights.publish(term=1, version=other.version)
    return weights


def test_chunk_by_chunk_gives_the_digest_of_the_whole() -> None:
    whole, streamed = shared(4), shared(3)
    streamed.announce(term=1, version=4)
    assert (streamed.arrived, streamed.complete, streamed.digest) == (0, False, b"")
    write(streamed, 4)
    for through in (1, 1, 3, 5):
        offer_through(streamed, through)
        assert streamed.arrived == through
        assert not streamed.complete
    streamed.seal()
    assert streamed.digest == whole.digest
    assert streamed.previous_digest == shared(3).digest


def test_only_a_whole_version_is_sealed() -> None:
    weights = shared()
    weights.announce(term=1, version=4)
    offer_through(weights, 4)
    with pytest.raises(AssertionError):
        weights.seal()


def test_a_version_that_is_withdrawn_twice_is_overwritten_once() -> None:
    weights = shared()
    weights.withdraw()
    first = reference(weights).generation
    weights.announce(term=1, version=4)
    assert reference(weights).generation == first


@pytest.mark.parametrize(
    ("first", "through", "count"), [(1, 4, 4), (0, 5, 6), (0, -1, 0), (3, 2, 0), (-1, 4, 6), (0, 4, 4), (0, 4, 6)]
)
def test_a_reference_to_other_chunks_than_the_next_is_refused(first: int, through: int, count: int) -> None:
    named = reference(shared())
    named.from_chunk, named.through_chunk = first, through
    named.crc32c[:] = [0] * count
    weights = Weights(CONFIG, memory=MEMORY)
    weights.begin(term=1, version=3, previous_digest=b"", from_chunk=0)
    with pytest.raises(DecodeError):
        weights.refer(named)
    assert weights.arrived == 0


def test_a_reference_with_other_checksums_is_refused_at_the_footer() -> None:
    origin = shared()
    named = reference(origin)
    named.crc32c[2] ^= 1
    weights = Weights(CONFIG, memory=MEMORY)
    weights.begin(term=1, version=3, previous_digest=b"", from_chunk=0)
    weights.refer(named)
    with pytest.raises(ChecksumError):
        weights.finish(origin.digest)


def test_a_segment_that_is_too_small_is_refused() -> None:
    origin, small = shared(), Segment(CONFIG.manifest.size - 1)
    named = reference(origin)
    named.segment.CopyFrom(small.name)
    weights = Weights(CONFIG, memory=MEMORY)
    weights.begin(term=1, version=3, previous_digest=b"", from_chunk=0)
    with pytest.raises(DecodeError, match="none of the weights"):
        weights.refer(named)
    with pytest.raises(SegmentError):
        weights.refer(pb.WeightsReference(through_chunk=4, crc32c=[0] * 5, segment=pb.Segment(pid=1, fd=-1)))


@pytest.mark.parametrize("other", ["segment", "generation"])
def test_chunks_that_lie_elsewhere_than_those_before_are_refused(other: str) -> None:
    origin, another = shared(), shared()
    weights = Weights(CONFIG, memory=MEMORY)
    weights.begin(term=1, version=3, previous_digest=b"", from_chunk=0)
    weights.refer(reference(origin, 0, 1))
    named = reference(another if other == "segment" else origin, 2, 4)
    if other == "generation":
        named.generation += 2
    with pytest.raises(SegmentError, match="elsewhere"):
        weights.refer(named)
    assert weights.arrived == 2
    weights.refer(reference(origin, 2, 4))
    weights.finish(origin.digest)


def test_a_reference_after_chunks_in_messages_is_refused_and_the_other_way_round() -> None:
    origin = shared()
    weights = Weights(CONFIG, memory=MEMORY)
    inline(weights, origin, chunks=2)
    with pytest.raises(SegmentError, match="elsewhere"):
        weights.refer(reference(origin, 2, 4))
    weights.begin(term=1, version=3, previous_digest=b"", from_chunk=0)
    weights.refer(reference(origin, 0, 1))
    with pytest.raises(DecodeError, match="by reference"):
        weights.put(chunk(origin, 2))


def test_a_node_without_memory_takes_no_reference() -> None:
    weights = Weights(CONFIG)
    weights.begin(term=1, version=3, previous_digest=b"", from_chunk=0)
    with pytest.raises(DecodeError, match="takes none"):
        weights.refer(reference(shared()))
    assert source().reference(0, 4) is None


def test_a_node_goes_from_one_wire_to_the_other_and_back() -> None:
    origin = shared(3)
    weights = reader(origin)
    views = weights.views
    before = views["w"].tobytes()
    inline(weights, source(4))
    assert weights.held
    assert views["w"].tobytes() == before, "what lies with another is not overwritten from here"
    assert weights.views["w"].tobytes() == source(4).views["w"].tobytes()
    own = reference(weights)
    assert own.segment != reference(origin).segment, "those below map this node's own now"
    below = reader(weights)
    assert below.views["w"].tobytes() == source(4).views["w"].tobytes()
    arrive(weights, origin)
    assert reference(weights).segment.nonce == reference(origin).segment.nonce
    assert weights._own is None
    assert below.held, "who has mapped it keeps it"


def test_what_lies_with_another_is_not_gone_on_with() -> None:
    weights = Weights(CONFIG, memory=MEMORY)
    inline(weights, source(), chunks=3)
    assert weights.resumable == 3
    weights = Weights(CONFIG, memory=MEMORY)
    weights.begin(term=1, version=3, previous_digest=b"", from_chunk=0)
    origin = shared()
    weights.refer(reference(origin, 0, 2))
    assert weights.arrived == 3
    assert weights.resumable == 0
    assert sink(5).resumable == 5
    complete = sink(5)
    complete.finish(source().digest)
    assert complete.resumable == 0


def test_a_node_that_gets_its_version_again_overwrites_nothing() -> None:
    """Its parent did not know that it held it. Children that read its memory, on other links too, go on."""
    middle = Weights(CONFIG, memory=MEMORY)
    inline(middle, source())
    below = reader(middle)
    for chunks in (2, 4, 5):
        inline(middle, source(), chunks=chunks)
        assert below.held
    assert middle.held
    inline(middle, source(), term=2)  # nor where another life of control makes the same bytes anew
    assert below.held
    inline(middle, source(4), chunks=1)
    assert middle.flat[:16].tobytes() == source(4).flat[:16].tobytes()


def test_half_of_a_version_and_then_all_of_it() -> None:
    middle = Weights(CONFIG, memory=MEMORY)
    inline(middle, source(), chunks=3)
    inline(middle, source())
    assert middle.flat.tobytes() == source().flat.tobytes()
    below = reader(middle)
    inline(middle, source(4))
    assert middle.flat.tobytes() == source(4).flat.tobytes()
    assert not below.intact


def test_one_version_with_two_contents_does_not_pass_for_the_first() -> None:
    """It cannot be; were it, readers must see that their bytes have changed."""
    middle, other = Weights(CONFIG, memory=MEMORY), source(4)
    inline(middle, source())
    below = reader(middle)
    other.version = 3
    middle.begin(term=1, version=3, previous_digest=b"", from_chunk=0)
    middle.put(chunk(other, 0))
    assert not below.intact


@pytest.mark.parametrize("chunks", [2, 5])
def test_what_a_lost_node_has_left_can_be_found_with_who_reads_it(chunks: int) -> None:
    """A child that joins below a reader of dead memory would else ask for it again and again."""
    origin = shared()
    weights = reader(origin)
    views, digest = weights.views, origin.digest
    dead = reference(origin).segment
    del origin
    gc.collect()
    with pytest.raises(SegmentError):
        Attached(dead)
    below = Weights(CONFIG, memory=MEMORY)
    below.begin(term=1, version=3, previous_digest=b"", from_chunk=0)
    below.refer(reference(weights, 0, chunks - 1))
    assert below.intact
    if chunks == 5:
        below.finish(digest)
        assert below.views["w"].tobytes() == views["w"].tobytes() == source().views["w"].tobytes()


def test_weights_that_nobody_has_any_more_leave_no_memory() -> None:
    origin = shared()
    weights = reader(origin)
    name = reference(origin).segment
    del origin
    gc.collect()
    assert weights.held, "its owner has died; its bytes are whole"
    with pytest.raises(SegmentError):
        reader_of(name)


def reader_of(name: pb.Segment) -> None:
    weights = Weights(CONFIG, memory=MEMORY)
    weights.begin(term=1, version=3, previous_digest=b"", from_chunk=0)
    weights.refer(pb.WeightsReference(through_chunk=4, crc32c=[0] * 5, segment=name))


# ---- rounded


@pytest.mark.parametrize("wire", ["inline", "shm"])
def test_spheres_see_rounded_weights_and_control_keeps_the_master(wire: str) -> None:
    origin = Weights(NARROW, memory=MEMORY if wire == "shm" else None, root=True)
    write(origin, 3)
    master = origin.flat.copy()
    origin.publish(term=1, version=3)
    assert origin.flat.tobytes() == master.tobytes(), "the master was rounded"
    rounded = master.copy()
    round_in_place(rounded, "bfloat16")
    assert rounded.tobytes() != master.tobytes()
    assert origin.served.tobytes() == rounded.tobytes()
    weights = Weights(NARROW, memory=MEMORY)
    (arrive if wire == "shm" else inline)(weights, origin)
    assert weights.flat.tobytes() == weights.served.tobytes() == rounded.tobytes()
    assert weights.digest == origin.digest
    head, data = weights.chunk(1)
    assert len(data) == 32
    assert head.crc32c == crc32c(data)


def test_the_digest_of_rounded_weights_is_the_same_on_either_wire() -> None:
    one, other = Weights(NARROW, memory=MEMORY, root=True), Weights(NARROW, root=True)
    for weights in (one, other):
        write(weights, 3)
        weights.publish(term=1, version=3)
    assert one.digest == other.digest
    other.withdraw()
    other.flat[5] = np.nextafter(other.flat[5], np.float32(100))  # less than the narrower type can hold
    other.publish(term=1, version=3)
    assert one.digest == other.digest


def test_float32_weights_are_served_from_the_master_itself() -> None:
    weights = shared()
    assert weights.served is weights.flat or weights.served.ctypes.data == weights.flat.ctypes.data
