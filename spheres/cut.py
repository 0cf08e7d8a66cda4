"""How a node cuts microbatches among itself and its children. Pure; knows capacities, not nodes."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TypeVar

from spheres.blocks import Block, halves, is_canonical

__all__ = ["cut"]

Owner = TypeVar("Owner")

#: microbatches up to which the best cut is looked for; that takes a time that grows with their square
_MOST_EXACT = 64


def cut(blocks: Sequence[Block], workers: Sequence[tuple[Owner, float]]) -> list[tuple[Owner, list[Block]]]:
    """Share ``blocks`` out over ``workers`` (owner, capacity > 0) in contiguous pieces, the largest capacity first.

    Widths that fall are aligned: of twelve, a child that has eight spheres below and comes first sends one block up;
    after four single ones it would send two that only its parent can add. Equal ones come in the order given. The
    slowest worker gets as little as it can get, counted in microbatches per capacity; of the cuts that keep to that
    it is one with the fewest canonical blocks, since every block is one gradient on the wire; of those the one that
    gives the earlier workers more. Of many microbatches it is one with few blocks, found border by border. Workers that
    get nothing are left out. Each piece is a list of maximal canonical blocks, none reaching across two of ``blocks``.
    """
    workers = sorted(workers, key=lambda worker: -worker[1])
    # The same from step to step, for as long as nobody comes or goes.
    shares = _shares(tuple(sorted(blocks)), tuple(capacity for _, capacity in workers))
    return [(owner, list(share)) for (owner, _), share in zip(workers, shares, strict=True) if share]


@lru_cache(maxsize=64)
def _shares(blocks: tuple[Block, ...], capacities: tuple[float, ...]) -> list[list[Block]]:
    indices = [(i, block) for block in blocks for i in range(block.lo, block.hi)]
    limits = _limits(len(indices), capacities)
    return _best(indices, limits) if len(indices) <= _MOST_EXACT else _good(indices, limits)


def _good(indices: Sequence[tuple[int, Block]], limits: Sequence[int]) -> list[list[Block]]:
    """Return each worker's blocks: from the first worker on, the border where the largest blocks can end."""
    count = len(indices)

    def alignment(border: int) -> int:
        if border in (0, count) or indices[border - 1][1] is not indices[border][1]:
            return count
        index = indices[border][0]
        return index & -index

    shares: list[list[Block]] = []
    start, later = 0, sum(limits)
    for limit in limits:
        later -= limit
        borders = range(start + max(0, count - start - later), start + min(limit, count - start) + 1)
        end = max(borders, key=lambda border: (alignment(border), border))
        shares.append(list(_pieces(indices, start, end - start))[-1] if end > start else [])
        start = end
    return shares


def _best(indices: Sequence[tuple[int, Block]], limits: Sequence[int]) -> list[list[Block]]:
    """Return each worker's blocks: from the last worker back, the best cut of all that may be left to it."""
    count = len(indices)
    pieces = [list(_pieces(indices, start, max(limits))) for start in range(count)]
    # fewest[start]: blocks that the workers from here on make of what begins at ``start``; None: too much for them
    fewest: list[int | None] = [None] * count + [0]
    takes: list[list[int]] = []
    for limit in reversed(limits):
        found: list[tuple[int, int] | None] = []
        for start in range(count + 1):
            options = (
                (rest + (len(pieces[start][take - 1]) if take else 0), -take)
                for take in range(min(limit, count - start) + 1)
                if (rest := fewest[start + take]) is not None
            )
            found.append(min(options, default=None))
        fewest = [None if best is None else best[0] for best in found]
        takes.append([0 if best is None else -best[1] for best in found])
    shares: list[list[Block]] = []
    start = 0
    for take_from in reversed(takes):
        take = take_from[start]
        shares.append(pieces[start][take - 1] if take else [])
        start += take
    assert start == count  # the limits were made to add up to at least every index
    return shares


def _pieces(indices: Sequence[tuple[int, Block]], start: int, most: int) -> Iterator[list[Block]]:
    """Yield the maximal canonical blocks of one, two, ... up to ``most`` microbatches from ``start`` on."""
    stack: list[Block] = []
    for index, top in indices[start : start + most]:
        stack.append(Block(index, index + 1))
        while len(stack) > 1:
            both = Block(stack[-2].lo, index + 1)
            # ``top`` is canonical itself: what is canonical of a total that ends with it is a node below it.
            if both.lo < top.lo or not is_canonical(both, top.hi) or halves(both) != (stack[-2], stack[-1]):
                break
            stack[-2:] = [both]
        yield list(stack)


def _limits(count: int, capacities: Sequence[float]) -> list[int]:
    """Most microbatches per worker such that the slowest is as fast as it can be."""
    taken = [0] * len(capacities)
    heap = [(1 / capacity, k) for k, capacity in enumerate(capacities)]
    heapq.heapify(heap)
    slowest = 0.0
    for _ in range(count):
        slowest, k = heapq.heappop(heap)
        taken[k] += 1
        heapq.heappush(heap, ((taken[k] + 1) / capacities[k], k))
    return [max(t, int(slowest * capacity + 1e-9)) for t, capacity in zip(taken, capacities, strict=True)]
