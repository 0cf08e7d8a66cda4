"""Narrower types: what a run rounds its gradients and weights to, and their bytes on the wire (N21).

Rounding is to nearest even. Pure, safe from several threads at once; when something is rounded is its callers' to know.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import numpy.typing as npt

from spheres.numerics import BLOCK_ELEMENTS, crc32c

__all__ = ["add_rounded", "from_wire", "round_and_check", "round_in_place", "to_wire", "wire_itemsize"]

Array = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint16]

# ml_dtypes, and not integer arithmetic in NumPy. benchmarks/rounding.py, GB of float32 per CPU second of a Zen 4 core,
# blocks in L2: to the wire 9.4 against 4.9, from the wire 18.8 against 12.2; in place 7.2 against 7.1, where integers
# need five passes, and a sixth to find NaN that is not in this figure. Two threads at once, on two cores that had other
# work: 3.1 against 1.3, 6.2 against 3.6, 2.1 against 2.0. Both leave the interpreter's lock to others meanwhile.
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_ITEMSIZES = {"float32": 4, "bfloat16": 2}


def wire_itemsize(dtype: str) -> int:
    """Return the bytes of one element on the wire. Raises ValueError for a type that is not known."""
    try:
        return _ITEMSIZES[dtype]
    except KeyError:
        raise ValueError(f"no type {dtype!r} on the wire: {', '.join(_ITEMSIZES)}") from None


def to_wire(array: Array, dtype: str, out: Words | None = None) -> memoryview:
    """Return the little-endian bytes of a contiguous array on the wire.

    Of float32 that is a view of the array. Of bfloat16 it is a view of ``out``, which has at least as many elements, or
    of a new buffer: the upper half of each element that is rounded already, and of others of what they round to.
    """
    if wire_itemsize(dtype) == 4:
        return array.data.cast("B")
    words = np.empty(array.size, np.uint16) if out is None else out[: array.size]
    with np.errstate(invalid="ignore", over="ignore"):
        words.view(_BFLOAT16)[...] = array
    return words.data.cast("B")


def from_wire(data: bytes | bytearray | memoryview, dtype: str, out: Array | None = None) -> Array:
    """Return the elements that came as ``data``: in ``out``, which has at least as many, or in a new array.

    Of float32 without ``out`` it is a view of the data. Raises ValueError for a part of an element.
    """
    if wire_itemsize(dtype) == 4:
        found = np.frombuffer(data, np.float32)
        if out is None:
            return found
        out[: found.size] = found
        return out[: found.size]
    words = np.frombuffer(data, np.uint16)
    wide = np.empty(words.size, np.float32) if out is None else out[: words.size]
    with np.errstate(invalid="ignore"):
        wide[...] = words.view(_BFLOAT16)
    return wide


def round_in_place(array: Array, dtype: str) -> None:
    """Round each element to ``dtype``, to nearest even. What is too large becomes infinite; NaN stays NaN."""
    if wire_itemsize(dtype) == 4:
        return
    scratch = np.empty(min(array.size, BLOCK_ELEMENTS), _BFLOAT16)
    with np.errstate(invalid="ignore", over="ignore"):
        for part in _blocks(array.size):
            _round(array[part], scratch)


def round_and_check(array: Array, dtype: str, *, checksum: bool = False) -> tuple[bool, int]:
    """Round in place; return whether all is finite then, and the CRC-32C of it, 0 unless ``checksum``.

    One pass: what takes three over a model is bound by memory, and a block stays in the cache.
    """
    narrow = wire_itemsize(dtype) == 2
    scratch = np.empty(min(array.size, BLOCK_ELEMENTS) if narrow else 0, _BFLOAT16)
    finite, crc = True, 0
    with np.errstate(invalid="ignore", over="ignore"):
        for part in _blocks(array.size, BLOCK_ELEMENTS if narrow else 2 * BLOCK_ELEMENTS):
            block = array[part]
            if narrow:
                _round(block, scratch)
            # rounded to the end, so that whoever looks for the tensors sees them all
            finite = finite and _is_finite(block)
            if checksum:
                crc = crc32c(block, crc)
    return finite, crc


def add_rounded(left: Array, right: Array, out: Array, dtype: str, *, checksum: bool = False) -> int:
    """Write left + right, rounded, into ``out``, which may be either; return its CRC-32C, 0 unless ``checksum``.

    It is a node of the canonical sum. A sum that overflows is infinite, without a warning.
    """
    narrow = wire_itemsize(dtype) == 2
    if not narrow and not checksum:
        with np.errstate(invalid="ignore", over="ignore"):
            np.add(left, right, out=out)
        return 0
    scratch = np.empty(min(out.size, BLOCK_ELEMENTS) if narrow else 0, _BFLOAT16)
    crc = 0
    with np.errstate(invalid="ignore", over="ignore"):
        for part in _blocks(out.size):
            block = np.add(left[part], right[part], out=out[part])
            if narrow:
                _round(block, scratch)
            if checksum:
                crc = crc32c(block, crc)
    return crc


def _is_finite(block: Array) -> bool:
    """Whether all of a block is finite: it is where its sum of squares is, which BLAS has in half the time.

    Where squares have overflowed each element is looked at. In which order BLAS adds makes no difference.
    """
    return math.isfinite(np.dot(block, block)) or bool(np.logical_and.reduce(np.isfinite(block)))


def _blocks(size: int, step: int = BLOCK_ELEMENTS) -> Iterator[slice]:
    for low in range(0, size, step):
        yield slice(low, min(low + step, size))


def _round(block: Array, scratch: npt.NDArray[np.generic]) -> None:
    narrow = scratch[: block.size]
    narrow[...] = block
    block[...] = narrow
