"""One version of the weights on one node: chunk by chunk, checked, and whole only after its footer (N17)."""

from __future__ import annotations

import numpy as np
import pytest

from spheres.config import NodeConfig
from spheres.errors import ChecksumError, DecodeError
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
