"""Rounding to bfloat16 and its bytes: held to exact arithmetic in plain Python, and to what needs no arithmetic."""

from __future__ import annotations

import math
import struct
import threading
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spheres.narrow import add_rounded, from_wire, round_and_check, round_in_place, to_wire, wire_itemsize
from spheres.numerics import BLOCK_ELEMENTS, crc32c
from spheres.tensors import aligned_zeros

Array = npt.NDArray[np.float32]
SIZES = [0, 1, 1000, BLOCK_ELEMENTS, 2 * BLOCK_ELEMENTS + 5]

words = st.integers(0, 2**32 - 1)


def exact(word: int) -> Fraction:
    """The value of a finite float32, or what its exponent would stand for were infinity a number."""
    exponent, fraction = word >> 23 & 0xFF, word & 0x7FFFFF
    value = Fraction(fraction + bool(exponent) * (1 << 23)) * Fraction(2) ** (max(exponent, 1) - 150)
    return -value if word >> 31 else value


def nearest(word: int) -> int | None:
    """The upper half of the float32 that a float32 rounds to, by comparing distances; None for a NaN."""
    if word & 0x7FFFFFFF > 0x7F800000:
        return None
    down = word >> 16
    if down & 0x7FFF == 0x7F80:
        return down
    up = down + 1  # the next one away from zero: of the largest, infinity
    below, above = (abs(exact(half << 16) - exact(word)) for half in (down, up))
    if below != above:
        return down if below < above else up
    return down if down % 2 == 0 else up


def floats(bits: list[int]) -> Array:
    return np.array(bits, np.uint32).view(np.float32)


def mixed(size: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    flat = aligned_zeros(size)
    flat[:] = rng.standard_normal(size) * 10.0 ** rng.integers(-30, 30, size)
    return flat


def rounded(array: Array) -> Array:
    copy = array.copy()
    round_in_place(copy, "bfloat16")
    return copy


@given(st.lists(words, min_size=1, max_size=50))
def test_it_is_the_nearest_and_of_two_equally_near_the_even_one(bits: list[int]) -> None:
    given_, before = floats(bits), list(bits)
    found = rounded(given_).view(np.uint32).tolist()
    sent = struct.unpack(f"<{len(bits)}H", to_wire(given_, "bfloat16"))
    assert given_.view(np.uint32).tolist() == before  # to_wire changes nothing
    for word, wide, half in zip(bits, found, sent, strict=True):
        expected = nearest(word)
        if expected is None:
            assert wide & 0x7FFFFFFF > 0x7F800000
            assert wide & 0xFFFF == 0
        else:
            assert wide == expected << 16
        assert half == wide >> 16


def test_every_upper_half_with_what_lies_around_a_tie() -> None:
    """All 65,536 of them: zeros, denormals, carries into the exponent, the largest, infinities, NaN."""
    upper = np.arange(1 << 16, dtype=np.uint32)
    odd = upper & 1
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (upper << 16 | np.uint32(low)).view(np.float32)
        is_nan = np.isnan(values)
        found = rounded(values)
        up = (odd == 1) if low == 0x8000 else np.full(upper.shape, low > 0x8000)
        up = up & (upper & 0x7FFF != 0x7F80)
        expected = (upper + up << 16).view(np.float32)
        assert (np.isnan(found) == is_nan).all()
        assert found[~is_nan].tobytes() == expected[~is_nan].tobytes()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1 + 2**-8, 1.0), (1 + 3 * 2**-8, 1 + 2**-6), (1 + 2**-8 + 2**-23, 1 + 2**-7), (-1 - 2**-8, -1.0),
        (3.3895313e38, 3.3895314e38), (3.4e38, math.inf), (-3.4e38, -math.inf), (math.inf, math.inf),
        (2.0**-149, 0.0), (2.0**-133, 2.0**-133), (-(2.0**-134), -0.0), (1.5 * 2.0**-133, 2.0**-132), (-0.0, -0.0),
    ],
)  # fmt: skip
def test_by_hand(value: float, expected: float) -> None:
    found = rounded(np.array([value], np.float32))
    assert found.tobytes() == np.array([expected], np.float32).tobytes()


@pytest.mark.parametrize("size", SIZES)
def test_rounding_again_changes_nothing_and_the_wire_brings_it_back(size: int) -> None:
    once = rounded(mixed(size))
    assert rounded(once).tobytes() == once.tobytes()
    sent = to_wire(once, "bfloat16")
    assert sent.nbytes == size * wire_itemsize("bfloat16") == size * 2
    assert sent == once.view(np.uint16)[1::2].tobytes()
    assert from_wire(sent, "bfloat16").tobytes() == once.tobytes()
    assert to_wire(mixed(size), "bfloat16") == sent


def test_buffers_of_the_callers_are_used() -> None:
    values, scratch, wide = rounded(mixed(1000)), np.zeros(1200, np.uint16), aligned_zeros(1200)
    sent = to_wire(values, "bfloat16", scratch)
    assert scratch[:1000].tobytes() == bytes(sent)
    assert not scratch[1000:].any()
    for data in (bytes(sent), bytearray(sent), sent):
        came = from_wire(data, "bfloat16", wide)
        assert np.shares_memory(came, wide)
        assert came.tobytes() == values.tobytes()
        assert not wide[1000:].any()
        wide.fill(0)


def test_float32_is_not_copied() -> None:
    values = mixed(100)
    sent = to_wire(values, "float32")
    assert np.shares_memory(np.frombuffer(sent, np.float32), values)
    assert np.shares_memory(from_wire(sent, "float32"), values)
    room = aligned_zeros(120)
    assert np.shares_memory(from_wire(sent, "float32", room), room)
    assert room[:100].tobytes() == values.tobytes()
    before = values.tobytes()
    round_in_place(values, "float32")
    assert values.tobytes() == before


def test_bytes_that_are_no_elements_and_types_that_are_none() -> None:
    for dtype, data in (("float32", b"\0" * 6), ("bfloat16", b"\0" * 3)):
        with pytest.raises(ValueError, match="buffer size must be a multiple"):
            from_wire(data, dtype)
    with pytest.raises(ValueError, match="no type 'float16' on the wire: float32, bfloat16"):
        wire_itemsize("float16")
    assert wire_itemsize("float32") == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES)
def test_the_pass_over_blocks_gives_what_single_passes_give(dtype: str, size: int) -> None:
    values = mixed(size)
    expected = values.copy()
    round_in_place(expected, dtype)
    assert round_and_check(values, dtype, checksum=True) == (True, crc32c(expected.tobytes()))
    assert values.tobytes() == expected.tobytes()
    assert round_and_check(values, dtype) == (True, 0)
    left, right = mixed(size, 1), mixed(size, 2)
    total = left + right
    round_in_place(total, dtype)
    assert add_rounded(left, right, left, dtype, checksum=True) == crc32c(total.tobytes())
    assert left.tobytes() == total.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_found_anywhere_and_all_is_rounded(dtype: str, bad: float) -> None:
    size = 2 * BLOCK_ELEMENTS + 5
    for position in (0, BLOCK_ELEMENTS - 1, BLOCK_ELEMENTS, size - 1):
        values = mixed(size)
        values[position] = bad
        expected = values.copy()
        round_in_place(expected, dtype)
        assert round_and_check(values, dtype)[0] is False
        assert values.tobytes() == expected.tobytes()


def test_infinity_after_rounding_is_not_finite() -> None:
    values = np.full(10, np.finfo(np.float32).max, np.float32)
    assert round_and_check(values.copy(), "float32") == (True, 0)
    assert round_and_check(values, "bfloat16") == (False, 0)
    assert np.isinf(values).all()
    largest = floats([0x7F7F0000])
    add_rounded(largest, floats([0x7B000000]), largest, "bfloat16")
    assert largest[0] == np.inf


def test_two_threads_at_once() -> None:
    inputs = [mixed(3 * BLOCK_ELEMENTS + 1, seed) for seed in range(2)]
    expected = [rounded(values).tobytes() for values in inputs]
    wrong: list[int] = []

    def work(n: int) -> None:
        for _ in range(20):
            values = inputs[n].copy()
            crc = round_and_check(values, "bfloat16", checksum=True)[1]
            if values.tobytes() != expected[n] or crc != crc32c(expected[n]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
