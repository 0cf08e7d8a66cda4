"""Rounding to bfloat16: ml_dtypes, as shipped, against integer arithmetic in NumPy; and what a leaf does per block.

    .venv/bin/python benchmarks/rounding.py [--json] [--elements N] [--repeats N]

Variants alternate within one run. GB of float32 per second: of CPU in one thread, and of wall clock in two at once.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable

import numpy as np
from common import median, report

from spheres.narrow import add_rounded, from_wire, round_and_check, round_in_place, to_wire
from spheres.numerics import BLOCK_ELEMENTS, crc32c, is_finite
from spheres.tensors import aligned_zeros


class Buffers:
    """What one thread works on."""

    def __init__(self, elements: int, seed: int) -> None:
        self.flat, self.other, self.total = (aligned_zeros(elements) for _ in range(3))
        self.flat[:] = np.random.default_rng(seed).standard_normal(elements, dtype=np.float32)
        self.other[:] = self.flat
        self.half = np.zeros(elements, np.uint16)
        to_wire(self.flat, "bfloat16", self.half)
        self.scratch = np.zeros(BLOCK_ELEMENTS, np.uint32)

    def parts(self) -> list[slice]:
        return [slice(low, low + BLOCK_ELEMENTS) for low in range(0, self.flat.size, BLOCK_ELEMENTS)]


def rounded_by_integers(words: np.ndarray, into: np.ndarray) -> None:
    """Round a block without looking for NaN, which would be a pass more."""
    np.right_shift(words, 16, out=into)
    np.bitwise_and(into, 1, out=into)
    np.add(into, 0x7FFF, out=into)
    np.add(words, into, out=into)


def in_place_by_integers(b: Buffers) -> None:
    words = b.flat.view(np.uint32)
    for part in b.parts():
        block = words[part]
        into = b.scratch[: block.size]
        rounded_by_integers(block, into)
        np.bitwise_and(into, 0xFFFF0000, out=block)


def to_wire_by_integers(b: Buffers) -> None:
    words = b.flat.view(np.uint32)
    for part in b.parts():
        into = b.scratch[: words[part].size]
        rounded_by_integers(words[part], into)
        b.half[part] = into.view(np.uint16)[1::2]


def from_wire_by_integers(b: Buffers) -> None:
    words = b.total.view(np.uint32)
    for part in b.parts():
        words[part] = b.half[part]
        np.left_shift(words[part], 16, out=words[part])


def leaf_in_passes(b: Buffers) -> None:
    is_finite(b.flat)
    crc32c(b.flat)


def add_in_passes(b: Buffers) -> None:
    np.add(b.flat, b.other, out=b.total)
    crc32c(b.total)


VARIANTS: dict[str, Callable[[Buffers], object]] = {
    "round in place, ml_dtypes": lambda b: round_in_place(b.flat, "bfloat16"),
    "round in place, integers": in_place_by_integers,
    "to the wire, ml_dtypes": lambda b: to_wire(b.flat, "bfloat16", b.half),
    "to the wire, integers": to_wire_by_integers,
    "from the wire, ml_dtypes": lambda b: from_wire(b.half.data.cast("B"), "bfloat16", b.total),
    "from the wire, integers": from_wire_by_integers,
    "leaf float32: check and CRC, one pass": lambda b: round_and_check(b.flat, "float32", checksum=True),
    "leaf float32: check and CRC, two passes": leaf_in_passes,
    "leaf bfloat16: round, check and CRC, one pass": lambda b: round_and_check(b.flat, "bfloat16", checksum=True),
    "last add float32 and CRC, one pass": lambda b: add_rounded(b.flat, b.other, b.total, "float32", checksum=True),
    "last add float32 and CRC, two passes": add_in_passes,
    "add bfloat16": lambda b: add_rounded(b.flat, b.other, b.total, "bfloat16"),
}


def both(work: Callable[[Buffers], object], buffers: list[Buffers]) -> float:
    threads = [threading.Thread(target=work, args=(each,)) for each in buffers]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    buffers = [Buffers(options.elements, seed) for seed in range(2)]
    alone: dict[str, list[float]] = {name: [] for name in VARIANTS}
    two: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(options.repeats):
        for name, work in VARIANTS.items():
            started = time.thread_time()
            work(buffers[0])
            alone[name].append(time.thread_time() - started)
            two[name].append(both(work, buffers))
    size = options.elements * 4 / 1e9
    figures = {
        name: {
            "cpu": size / median(alone[name]),
            "two": 2 * size / median(two[name]),
            "two_quarter": 2 * size / statistics.quantiles(two[name], n=4)[0],
        }
        for name in VARIANTS
    }

    def show() -> None:
        for name, found in figures.items():
            print(f"{name:46} {found['cpu']:5.1f} {found['two']:5.1f} (best quarter from {found['two_quarter']:.1f})")

    report("rounding", {"elements": options.elements, "figures": figures}, show)


if __name__ == "__main__":
    main()
