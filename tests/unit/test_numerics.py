"""Norms, statistics, digests and sums: right within float64, and the same bits however the work was cut."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spheres.numerics import (
    BLOCK_ELEMENTS,
    add_sums,
    clip_value,
    crc32c,
    global_norm,
    in_turn,
    is_finite,
    mean,
    scale,
    statistics,
    version_digest,
)
from spheres.task import Sums
from spheres.tensors import Manifest, aligned_zeros

Array = npt.NDArray[np.float32]


def model(*sizes: int, seed: int = 0) -> tuple[Manifest, Array]:
    rng = np.random.default_rng(seed)
    arrays = {
        f"t{n}": (rng.standard_normal(size) * 10.0 ** rng.integers(-6, 6, size)).astype(np.float32)
        for n, size in enumerate(sizes)
    }
    manifest = Manifest.of(arrays)
    return manifest, manifest.pack(arrays)


def test_crc32c_is_castagnoli_over_any_buffer() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    array = np.arange(100, dtype=np.float32)
    assert crc32c(array) == crc32c(array.tobytes()) == crc32c(memoryview(array).cast("B"))
    assert crc32c(array[10:20]) == crc32c(array.tobytes()[40:80])


def test_version_digest_is_what_the_protocol_says() -> None:
    content = b"\x01" * 16 + (1).to_bytes(4, "little") + (0xE3069283).to_bytes(4, "little")
    assert version_digest(b"\x01" * 16, [1, 0xE3069283]) == hashlib.sha256(content).digest()[:16]
    assert version_digest(b"\x01" * 16, [1, 2]) != version_digest(b"\x01" * 16, [2, 1])
    assert version_digest(b"\x01" * 16, [1]) != version_digest(b"\x02" * 16, [1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [1, 1000, 2 * BLOCK_ELEMENTS + 5])
def test_one_element_that_is_not_finite_is_found(bad: float, size: int) -> None:
    flat = aligned_zeros(size)
    flat[:] = 3e38
    assert is_finite(flat)
    for position in {0, size // 2, size - 1}:
        flat[position] = bad
        assert not is_finite(flat)
        flat[position] = 0
    assert is_finite(flat)


@pytest.mark.parametrize("sizes", [(1,), (17, 0, 5), (2000, 64, 640, 10), (BLOCK_ELEMENTS + 1, 3 * BLOCK_ELEMENTS, 7)])
def test_global_norm_is_the_norm_of_all_tensors(sizes: tuple[int, ...]) -> None:
    manifest, flat = model(*sizes)
    exact = math.sqrt(math.fsum(float(x) ** 2 for view in manifest.views(flat).values() for x in view))
    assert global_norm(manifest, flat) == pytest.approx(exact, rel=1e-13)


def test_padding_is_in_no_norm_and_no_statistic() -> None:
    manifest, flat = model(5, 20)
    before = global_norm(manifest, flat), statistics(manifest, flat)
    flat[5:16] = 1e30
    assert (global_norm(manifest, flat), statistics(manifest, flat)) == before


def test_the_norm_is_the_same_bits_however_the_buffer_fills() -> None:
    manifest, flat = model(3 * BLOCK_ELEMENTS + 11, 40, BLOCK_ELEMENTS, 9)
    whole = global_norm(manifest, flat)
    for order in (1, -1):
        assert global_norm(manifest, flat, lambda works, order=order: in_turn(works[::order])).hex() == whole.hex()


def test_the_norm_is_the_same_bits_at_every_address() -> None:
    manifest, flat = model(BLOCK_ELEMENTS + 7, 2000, 3)
    found = set()
    for shift in range(17):
        room = aligned_zeros(manifest.size + 32)[shift : shift + manifest.size]
        room[:] = flat
        found.add(global_norm(manifest, room).hex())
    assert len(found) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_norm_is_finite_exactly_when_the_elements_are(bad: float) -> None:
    manifest, flat = model(100, 100)
    flat[:] = np.finfo(np.float32).max
    assert math.isfinite(global_norm(manifest, flat))
    flat[150] = bad
    assert not math.isfinite(global_norm(manifest, flat))


def test_statistics_of_each_tensor() -> None:
    manifest, flat = model(2 * BLOCK_ELEMENTS + 100, 33, 1)
    for name, found in statistics(manifest, flat).items():
        wide = manifest.views(flat)[name].astype(np.float64)
        assert found.minimum == wide.min()
        assert found.maximum == wide.max()
        assert found.norm == pytest.approx(np.sqrt((wide * wide).sum()), rel=1e-12)


def test_statistics_of_nothing_and_of_nan() -> None:
    manifest, flat = model(0, 4)
    flat[1] = np.nan
    found = statistics(manifest, flat)
    assert (found["t0"].norm, found["t0"].minimum, found["t0"].maximum) == (0.0, 0.0, 0.0)
    assert math.isnan(found["t1"].minimum)
    assert math.isnan(found["t1"].maximum)
    assert math.isnan(found["t1"].norm)


def test_scale_and_mean_round_the_factor_to_float32_once() -> None:
    flat = np.array([1, 3, -7, 0.1], np.float32)
    expected = flat * np.float32(1 / 3)
    scaled, averaged = flat.copy(), flat.copy()
    scale(scaled, 1 / 3)
    mean(averaged, 3)
    assert scaled.tobytes() == averaged.tobytes() == expected.tobytes()
    with pytest.raises(ValueError, match="0 samples"):
        mean(flat, 0)


def test_clip_value() -> None:
    flat = np.array([-5, -2, -0.5, 0, 2, 7, np.nan], np.float32)
    clip_value(flat, 2.0)
    assert flat[:6].tolist() == [-2, -2, -0.5, 0, 2, 2]
    assert np.isnan(flat[6])


def test_sums_add_left_then_right() -> None:
    left = Sums(0.1, 3, {"accuracy": 2.0, "top5": 3.0})
    right = Sums(0.2, 4, {"extra": 1.0, "accuracy": 4.0})
    added = add_sums(left, right)
    assert added == Sums(0.1 + 0.2, 7, {"accuracy": 6.0, "top5": 3.0, "extra": 1.0})
    assert list(added.metrics) == ["accuracy", "top5", "extra"]
    assert left.metrics == {"accuracy": 2.0, "top5": 3.0}


def test_a_metric_of_one_side_passes_unchanged() -> None:
    # absent + x = x (N16): adding a zero would lose the sign of -0.0
    added = add_sums(Sums(0.0, 1), Sums(0.0, 1, {"m": -0.0}))
    assert math.copysign(1, added.metrics["m"]) == -1


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), min_size=2, max_size=2))
def test_sums_add_as_float64(pairs: list[tuple[float, float]]) -> None:
    (a, b), (c, d) = pairs
    added = add_sums(Sums(a, 1, {"m": b}), Sums(c, 1, {"m": d}))
    assert (added.loss, added.metrics["m"]) == (a + c, b + d)
