"""Arithmetic that must give the same bits everywhere: checksums, norms, statistics, means, clipping.

Sums over a tensor run in float64 over fixed blocks, never through BLAS (whose order depends on its threads).
Pure; it does not know where buffers come from or which chunks they crossed the wire in.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import crc32c as _crc32c
import numpy as np
import numpy.typing as npt

from spheres.task import Sums
from spheres.tensors import Manifest

__all__ = [
    "BLOCK_ELEMENTS",
    "Run",
    "TensorStatistics",
    "add_sums",
    "clip_value",
    "crc32c",
    "global_norm",
    "in_turn",
    "is_finite",
    "mean",
    "scale",
    "statistics",
    "version_digest",
]

Array = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]

#: elements per partial sum; fixed, so that a norm does not depend on chunk sizes (DESIGN section 4)
BLOCK_ELEMENTS = 65_536


def crc32c(buffer: bytes | bytearray | memoryview | npt.NDArray[np.generic], before: int = 0) -> int:
    """Return the CRC-32C (Castagnoli) of a contiguous buffer, or of all up to its end where ``before`` came first."""
    return int(_crc32c.crc32c(buffer, before))  # type: ignore[arg-type]


def version_digest(manifest_digest: bytes, checksums: Sequence[int]) -> bytes:
    """Return the digest of one version of the weights: 16 bytes over the manifest's digest and each chunk's CRC-32C.

    The first 16 bytes of SHA-256 over the digest, then each checksum as uint32 little-endian, in chunk order: a node
    has it as soon as the last chunk is in, without a second pass over the weights.
    """
    return hashlib.sha256(manifest_digest + struct.pack(f"<{len(checksums)}I", *checksums)).digest()[:16]


def is_finite(flat: Array) -> bool:
    """Whether no element is infinite or NaN."""
    return all(bool(np.logical_and.reduce(np.isfinite(flat[block]))) for block in _blocks(0, flat.size))


def _blocks(start: int, size: int) -> Iterator[slice]:
    end = start + size
    for low in range(start, end, BLOCK_ELEMENTS):
        yield slice(low, min(low + BLOCK_ELEMENTS, end))


def _square_sum(block: Array, scratch: Wide) -> float:
    # a float32 squared cannot overflow a float64; NumPy's own pairwise sum depends on the length alone
    wide = scratch[: block.size]
    np.copyto(wide, block)
    np.multiply(wide, wide, out=wide)
    return float(np.add.reduce(wide))


#: does pieces of work that know nothing of each other, in any order or side by side, and returns when all are done
Run = Callable[[Sequence[Callable[[], None]]], None]


def in_turn(works: Sequence[Callable[[], None]]) -> None:
    """Do one after the other."""
    for work in works:
        work()


def global_norm(manifest: Manifest, flat: Array, run: Run = in_turn) -> float:
    """Return the Euclidean norm over all tensors, padding excluded; finite exactly when every element is.

    The squares of each block are summed apart, two halves of the blocks side by side where ``run`` can; the result does
    not depend on that.
    """
    blocks = [list(_blocks(spec.offset, spec.size)) for spec in manifest.tensors]
    every = [block for of_tensor in blocks for block in of_tensor]
    sums = [0.0] * len(every)

    def part(start: int, stop: int) -> None:
        scratch = np.empty(min(BLOCK_ELEMENTS, flat.size), np.float64)
        for index in range(start, stop):
            sums[index] = _square_sum(flat[every[index]], scratch)

    middle = len(every) // 2
    run([lambda: part(0, middle), lambda: part(middle, len(every))])
    total, done = 0.0, 0
    for of_tensor in blocks:
        tensor = 0.0
        for value in sums[done : done + len(of_tensor)]:
            tensor += value
        total += tensor
        done += len(of_tensor)
    return math.sqrt(total)


@dataclass(frozen=True, slots=True)
class TensorStatistics:
    """One tensor in three numbers. All 0 for a tensor without elements."""

    norm: float
    minimum: float
    maximum: float


def statistics(manifest: Manifest, flat: Array) -> dict[str, TensorStatistics]:
    """Return name -> statistics of every tensor. Reads each element three times: not for every step."""
    scratch = np.empty(min(BLOCK_ELEMENTS, flat.size), np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        return {spec.name: _tensor_statistics(flat, spec.offset, spec.size, scratch) for spec in manifest.tensors}


def _tensor_statistics(flat: Array, offset: int, size: int, scratch: Wide) -> TensorStatistics:
    if size == 0:
        return TensorStatistics(0.0, 0.0, 0.0)
    squares = 0.0
    lows: list[float] = []
    highs: list[float] = []
    for piece in _blocks(offset, size):
        block = flat[piece]
        lows.append(float(block.min()))
        highs.append(float(block.max()))
        squares += _square_sum(block, scratch)
    # np.min, unlike min(), passes a NaN on
    return TensorStatistics(math.sqrt(squares), float(np.min(lows)), float(np.max(highs)))


def scale(flat: Array, factor: float) -> None:
    """Multiply in place by ``float32(factor)``."""
    np.multiply(flat, np.float32(factor), out=flat)


def mean(flat: Array, count: int) -> None:
    """Turn a sum over ``count`` samples into their mean, in place: times ``float32(1 / count)``."""
    if count < 1:
        raise ValueError(f"no mean over {count} samples")
    scale(flat, 1.0 / count)


def clip_value(flat: Array, limit: float) -> None:
    """Bring every element into ``-limit .. limit``, in place; NaN stays."""
    bound = np.float32(limit)
    np.minimum(flat, bound, out=flat)
    np.maximum(flat, -bound, out=flat)


def add_sums(left: Sums, right: Sums) -> Sums:
    """Return left + right. A metric that only one side has passes unchanged; the left's keys come first."""
    metrics: Mapping[str, float]
    if left.metrics.keys() == right.metrics.keys():
        other = right.metrics
        metrics = {name: value + other[name] for name, value in left.metrics.items()}
    else:
        metrics = dict(left.metrics)
        for name, value in right.metrics.items():
            metrics[name] = metrics[name] + value if name in metrics else value
    return Sums(left.loss + right.loss, left.count + right.count, metrics)
