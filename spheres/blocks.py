"""Canonical blocks: the fixed binary tree over microbatch indices that every sum follows (DESIGN section 4).

A block is ``[lo, hi)`` with ``hi = min(lo + 2**k, M)`` and ``lo`` a multiple of ``2**k``. Pure; knows no node.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from spheres.errors import ProtocolError

__all__ = ["Block", "BlockSet", "checked", "decompose", "halves", "is_canonical"]


class Block(NamedTuple):
    """The microbatches ``lo`` to ``hi - 1``."""

    lo: int
    hi: int

    def contains(self, other: Block) -> bool:
        return self.lo <= other.lo and other.hi <= self.hi

    @property
    def width(self) -> int:
        return self.hi - self.lo

    def __str__(self) -> str:
        return f"[{self.lo},{self.hi})"


@lru_cache(maxsize=4096)  # every step asks for the same few, many times
def halves(block: Block) -> tuple[Block, Block]:
    """Return the two canonical blocks whose sum, left + right, is ``block``; it has at least two microbatches."""
    half = 1 << (block.width - 1).bit_length() - 1
    return Block(block.lo, block.lo + half), Block(block.lo + half, block.hi)


def is_canonical(block: Block, total: int) -> bool:
    """Whether ``block`` is a node of the tree over ``total`` microbatches."""
    lo, hi = block
    if not 0 <= lo < hi <= total:
        return False
    width = 1 << (hi - lo - 1).bit_length()
    return lo % width == 0 and hi == min(lo + width, total)


def checked(blocks: Iterable[Block], total: int, *, what: str) -> list[Block]:
    """Return what a neighbour named, in order. Raises ProtocolError where it is not canonical or overlaps (N3)."""
    ordered = sorted(blocks)
    for block in ordered:
        if not is_canonical(block, total):
            raise ProtocolError(f"{block} is no canonical block of {total} microbatches")
    for before, after in pairwise(ordered):
        if before.hi > after.lo:
            raise ProtocolError(f"{what} blocks {before} and {after} overlap")
    return ordered


def decompose(indices: set[int] | frozenset[int], top: Block) -> list[Block]:
    """Return the maximal canonical blocks below ``top`` whose microbatches all are in ``indices``, in order."""
    wanted = range(top.lo, top.hi)
    if indices.isdisjoint(wanted):
        return []
    if indices.issuperset(wanted):
        return [top]
    left, right = halves(top)
    return decompose(indices, left) + decompose(indices, right)


class BlockSet:
    """A set of microbatches, kept as indices and given out as maximal canonical blocks below a total."""

    __slots__ = ("_indices", "_top")

    def __init__(self, total: int, blocks: Iterable[Block] = ()) -> None:
        self._top = Block(0, total)
        self._indices: set[int] = set()
        for block in blocks:
            self.add(block)

    def add(self, block: Block) -> None:
        self._indices.update(range(block.lo, block.hi))

    def discard(self, block: Block) -> None:
        self._indices.difference_update(range(block.lo, block.hi))

    def covers(self, block: Block) -> bool:
        return self._indices.issuperset(range(block.lo, block.hi))

    def within(self, tops: Iterable[Block]) -> list[Block]:
        """Maximal canonical blocks of the set that lie below one of ``tops``."""
        return [block for top in tops for block in decompose(self._indices, top)]

    def __iter__(self) -> Iterator[Block]:
        return iter(decompose(self._indices, self._top))

    def __len__(self) -> int:
        return len(self._indices)

    def __repr__(self) -> str:
        return f"BlockSet({' '.join(map(str, self))})"
