"""How a node cuts microbatches among itself and its children. Pure; knows capacities, not nodes."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TypeVar

from spheres.blocks import Block, decompose

__all__ = ["cut"]

Owner = TypeVar("Owner")


def cut(blocks: Sequence[Block], workers: Sequence[tuple[Owner, float]]) -> list[tuple[Owner, list[Block]]]:
    """Share ``blocks`` out over ``workers`` (owner, capacity > 0) in contiguous pieces, in the order given.

    The slowest worker gets as little as it can get, counted in microbatches per capacity; within that, each cut lies
    where it leaves the fewest canonical blocks, since every block is one gradient on the wire. Workers that get nothing
    are left out. Each piece is a list of maximal canonical blocks, none reaching across two of ``blocks``.
    """
    indices = [i for block in sorted(blocks) for i in range(block.lo, block.hi)]
    limits = _limits(len(indices), [capacity for _, capacity in workers])
    pieces: list[tuple[Owner, list[Block]]] = []
    start = 0
    later = sum(limits)
    for (owner, _), limit in zip(workers, limits, strict=True):
        later -= limit
        rest = len(indices) - start
        fewest, most = max(0, rest - later), min(limit, rest)
        best: tuple[int, int, list[Block]] | None = None
        for take in range(most, fewest - 1, -1):
            part = set(indices[start : start + take])
            piece = [b for block in sorted(blocks) for b in decompose(part, block)]
            # A cut at take == rest ends the work, one before it costs the next worker nothing more.
            if best is None or len(piece) < best[0]:
                best = (len(piece), take, piece)
        assert best is not None  # fewest <= most: the limits were made to add up to at least every index
        if best[1]:
            pieces.append((owner, best[2]))
            start += best[1]
    return pieces


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
