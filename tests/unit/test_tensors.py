"""The manifest's layout, views on the flat buffer, and the digests that others rely on."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spheres.errors import TaskError
from spheres.tensors import ALIGNMENT, Manifest, aligned_zeros

Array = npt.NDArray[np.float32]
shapes = st.lists(st.lists(st.integers(0, 7), max_size=3), min_size=1, max_size=6)


def arrays_of(all_shapes: list[list[int]]) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    return {f"t{n}": rng.standard_normal(shape).astype(np.float32) for n, shape in enumerate(all_shapes)}


@pytest.mark.parametrize("size", [0, 1, 15, 16, 1000, 100_003])
def test_zeros_start_at_an_aligned_address(size: int) -> None:
    kept = [aligned_zeros(size) for _ in range(20)]
    assert all(flat.ctypes.data % ALIGNMENT == 0 for flat in kept if size)
    assert all(flat.size == size and not flat.any() and flat.dtype == np.float32 for flat in kept)


@given(shapes)
def test_tensors_lie_in_order_aligned_and_apart(all_shapes: list[list[int]]) -> None:
    arrays = arrays_of(all_shapes)
    manifest = Manifest.of(arrays)
    end = 0
    for spec, (name, array) in zip(manifest.tensors, arrays.items(), strict=True):
        assert (spec.name, spec.shape, spec.size) == (name, array.shape, array.size)
        assert spec.offset * 4 % ALIGNMENT == 0
        assert end <= spec.offset < end + ALIGNMENT // 4
        end = spec.offset + spec.size
    assert end <= manifest.size < end + ALIGNMENT // 4
    assert manifest.parameters == sum(array.size for array in arrays.values())


@given(shapes)
def test_pack_then_views_gives_the_arrays_back(all_shapes: list[list[int]]) -> None:
    arrays = arrays_of(all_shapes)
    manifest = Manifest.of(arrays)
    flat = manifest.pack(arrays)
    assert flat.size == manifest.size
    views = manifest.views(flat)
    assert list(views) == list(arrays)
    for name, array in arrays.items():
        assert views[name].shape == array.shape
        assert views[name].tobytes() == array.tobytes()


def test_views_share_the_buffer_and_can_be_read_only() -> None:
    arrays = arrays_of([[2, 3], [4]])
    manifest = Manifest.of(arrays)
    flat = manifest.pack(arrays)
    manifest.views(flat)["t1"][0] = 42
    assert flat[16] == 42
    with pytest.raises(ValueError, match="read-only"):
        manifest.views(flat, writeable=False)["t1"][0] = 1
    assert flat.flags.writeable


def test_sha256_leaves_the_padding_out() -> None:
    arrays = arrays_of([[5], [2, 2], []])
    manifest = Manifest.of(arrays)
    flat = manifest.pack(arrays)
    flat[5:16] = 7
    expected = hashlib.sha256(b"".join(array.astype("<f4").tobytes() for array in arrays.values())).hexdigest()
    assert manifest.sha256(flat) == expected
    flat[16] += 1
    assert manifest.sha256(flat) != expected


def test_the_digest_tells_layouts_apart() -> None:
    def digest(*names_and_shapes: tuple[str, tuple[int, ...]]) -> bytes:
        return Manifest.of({name: np.zeros(shape, np.float32) for name, shape in names_and_shapes}).digest

    first = digest(("a", (2, 3)), ("b", (4,)))
    assert first == digest(("a", (2, 3)), ("b", (4,)))
    assert len(first) == 16
    others = [
        digest(("a", (3, 2)), ("b", (4,))),
        digest(("b", (4,)), ("a", (2, 3))),
        digest(("a", (2, 3)), ("c", (4,))),
    ]
    assert len({first, *others}) == 4


@given(st.integers(1, 5000), st.integers(1, 700))
def test_chunks_cover_the_buffer(size: int, chunk: int) -> None:
    manifest = Manifest.of({"t": np.zeros(size, np.float32)})
    count = manifest.chunk_count(chunk)
    assert (count - 1) * chunk < manifest.size <= count * chunk


def test_what_is_not_float32_is_refused_by_name() -> None:
    with pytest.raises(TaskError, match="no tensors"):
        Manifest.of({})
    with pytest.raises(TaskError, match=r"'w'.*float64"):
        Manifest.of({"w": np.zeros(3)})  # type: ignore[dict-item]
    with pytest.raises(TaskError, match=r"'w'.*list"):
        Manifest.of({"w": [1.0]})  # type: ignore[dict-item]


def test_pack_refuses_other_names_shapes_and_dtypes() -> None:
    manifest = Manifest.of({"a": np.zeros(3, np.float32)})
    with pytest.raises(TaskError, match="are not the manifest's"):
        manifest.pack({"b": np.zeros(3, np.float32)})
    with pytest.raises(TaskError, match=r"float32\(4,\)"):
        manifest.pack({"a": np.zeros(4, np.float32)})
    with pytest.raises(TaskError, match="float64"):
        manifest.pack({"a": np.zeros(3)})  # type: ignore[dict-item]


@pytest.mark.parametrize("name", [3, "w\udce9", None])
def test_a_name_that_cannot_be_sent_is_refused(name: object) -> None:
    with pytest.raises(TaskError, match=r"^weights are named .*: name each with a str that is UTF-8"):
        Manifest.of({"v": np.zeros(1, np.float32), name: np.zeros(1, np.float32)})  # type: ignore[dict-item]
