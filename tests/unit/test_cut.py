"""How microbatches are shared out: all of them once, the slowest as fast as it can be, in few canonical blocks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spheres.blocks import Block, decompose, is_canonical
from spheres.cut import cut

capacity = st.sampled_from([1.0, 1.0, 1.0, 2.0, 3.0, 7.0])


@st.composite
def cases(draw: st.DrawFn, most: int = 40, workers: int = 8) -> tuple[int, list[Block], list[tuple[str, float]]]:
    """A total, some canonical blocks of it (not always all), and workers."""
    total = draw(st.integers(1, most))
    indices = draw(st.sets(st.integers(0, total - 1), min_size=1)) if draw(st.booleans()) else set(range(total))
    capacities = draw(st.lists(capacity, min_size=1, max_size=workers))
    workers = [(f"w{k}", c) for k, c in enumerate(capacities)]
    return total, decompose(indices, Block(0, total)), sorted(workers, key=lambda worker: -worker[1])


def expand(blocks: Sequence[Block]) -> list[int]:
    return [i for block in blocks for i in range(block.lo, block.hi)]


def test_a_large_subtree_gets_one_block_whatever_stands_before_it() -> None:
    shares = cut([Block(0, 12)], [("a", 1.0), ("b", 1.0), ("host-2", 8.0), ("c", 1.0), ("d", 1.0)])
    assert shares[0] == ("host-2", [Block(0, 8)])
    assert [owner for owner, _ in shares[1:]] == ["a", "b", "c", "d"]
    assert cut([Block(0, 8)], [("own", 1.0), ("x", 1.0), ("y", 1.0), ("z", 1.0), ("host-3", 4.0)])[0][1] == [
        Block(0, 4)
    ]


@given(cases())
def test_every_microbatch_goes_to_exactly_one_worker(case: tuple[int, list[Block], list[tuple[str, float]]]) -> None:
    _, blocks, workers = case
    shares = cut(blocks, workers)
    assert [i for _, share in shares for i in expand(share)] == expand(sorted(blocks))
    owners = [owner for owner, _ in shares]
    assert owners == [owner for owner, _ in workers if owner in owners]  # the largest first, each once
    assert all(share for _, share in shares)


@given(cases())
def test_pieces_are_maximal_canonical_blocks_within_the_given_ones(
    case: tuple[int, list[Block], list[tuple[str, float]]],
) -> None:
    total, blocks, workers = case
    for _, share in cut(blocks, workers):
        indices = set(expand(share))
        assert share == [piece for block in sorted(blocks) for piece in decompose(indices, block)]
        assert all(is_canonical(piece, total) for piece in share)


@given(st.integers(65, 700), st.lists(capacity, min_size=1, max_size=14))
@settings(max_examples=40)
def test_many_microbatches_are_shared_as_evenly_in_few_blocks(total: int, capacities: list[float]) -> None:
    workers = [(f"w{k}", c) for k, c in enumerate(capacities)]
    blocks = [Block(0, total)]
    shares = cut(blocks, workers)
    assert [i for _, share in shares for i in expand(share)] == list(range(total))
    given = dict(workers)
    slowest = max(len(expand(share)) / given[owner] for owner, share in shares)
    assert slowest <= (total / sum(capacities)) + 1 / min(capacities)
    for owner, share in shares:
        assert share == decompose(set(expand(share)), Block(0, total)), owner
        assert len(share) <= 2 * total.bit_length()


@given(cases(most=16, workers=3))
@settings(max_examples=60)
def test_the_slowest_is_as_fast_as_it_can_be_and_then_blocks_are_few(
    case: tuple[int, list[Block], list[tuple[str, float]]],
) -> None:
    _, blocks, workers = case
    indices = expand(sorted(blocks))

    def cost(sizes: Sequence[int]) -> tuple[float, int, list[int]]:
        """What is made as small as can be, in this order: the slowest, the blocks, what comes late in the row."""
        ends = [sum(sizes[:k]) for k in range(len(sizes) + 1)]
        slowest = max(size / c for size, (_, c) in zip(sizes, workers, strict=True))
        parts = sum(len(decompose(set(indices[a:b]), block)) for a, b in pairwise(ends) for block in blocks)
        return slowest, parts, [-size for size in sizes]

    every = [s for s in product(range(len(indices) + 1), repeat=len(workers)) if sum(s) == len(indices)]
    share_of = {owner: len(expand(share)) for owner, share in cut(blocks, workers)}
    found = cost([share_of.get(owner, 0) for owner, _ in workers])
    best = min(cost(sizes) for sizes in every)
    assert found[0] == pytest.approx(best[0])
    limit = best[0] + 1e-9
    assert found[1:] == min(c[1:] for c in map(cost, every) if c[0] <= limit)


def test_by_hand() -> None:
    assert cut([Block(0, 16)], [("a", 1), ("b", 1)]) == [("a", [Block(0, 8)]), ("b", [Block(8, 16)])]
    # three times the capacity, three times the work
    assert cut([Block(0, 8)], [("a", 3), ("b", 1)]) == [("a", [Block(0, 4), Block(4, 6)]), ("b", [Block(6, 8)])]
    # [0,2) and [2,5): one block more than needed if the first took three
    assert cut([Block(0, 5)], [("a", 1), ("b", 1)]) == [("a", [Block(0, 2)]), ("b", [Block(2, 4), Block(4, 5)])]


def test_with_fewer_microbatches_than_workers_the_first_ones_work() -> None:
    # an inner node stands first in its own row: it must not rest while its children send it gradients
    shares = cut([Block(0, 3)], [(name, 1.0) for name in "abcdef"])
    assert shares == [("a", [Block(0, 1)]), ("b", [Block(1, 2)]), ("c", [Block(2, 3)])]


def test_the_answer_is_the_callers_own() -> None:
    first = cut([Block(0, 4)], [("a", 1.0)])
    first[0][1].clear()
    assert cut([Block(0, 4)], [("a", 1.0)]) == [("a", [Block(0, 4)])]
