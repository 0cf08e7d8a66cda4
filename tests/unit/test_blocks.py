"""The canonical tree over microbatches: its nodes, their halves, and what a set of microbatches is cut into."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spheres.blocks import Block, BlockSet, decompose, halves, is_canonical

totals = st.integers(1, 130)


def tree(total: int) -> set[Block]:
    """All nodes, from the definition: ``[lo, lo + 2**k)``, ``lo`` a multiple of ``2**k``, clipped at the total."""
    nodes = set()
    for k in range(9):
        nodes |= {Block(lo, min(lo + 2**k, total)) for lo in range(0, total, 2**k)}
    return nodes


@st.composite
def subsets(draw: st.DrawFn) -> tuple[int, set[int]]:
    total = draw(totals)
    return total, draw(st.sets(st.integers(0, total - 1)))


@pytest.mark.parametrize("total", [1, 2, 3, 7, 8, 12, 16, 100])
def test_canonical_is_exactly_the_tree(total: int) -> None:
    ranges = {Block(lo, hi) for lo in range(-1, total + 2) for hi in range(-1, total + 3)}
    assert {block for block in ranges if is_canonical(block, total)} == tree(total)


@given(totals)
def test_halves_of_a_node_are_nodes_that_meet(total: int) -> None:
    for block in tree(total):
        if block.width > 1:
            left, right = halves(block)
            assert (left.lo, left.hi, right.hi) == (block.lo, right.lo, block.hi)
            assert is_canonical(left, total)
            assert is_canonical(right, total)
            assert left.width >= right.width >= 1


@pytest.mark.parametrize(
    ("block", "left", "right"),
    [((0, 8), (0, 4), (4, 8)), ((0, 12), (0, 8), (8, 12)), ((8, 11), (8, 10), (10, 11)), ((4, 6), (4, 5), (5, 6))],
)
def test_halves_by_hand(block: tuple[int, int], left: tuple[int, int], right: tuple[int, int]) -> None:
    assert halves(Block(*block)) == (Block(*left), Block(*right))


def test_decompose_by_hand() -> None:
    # the example of the design: a node that owns [2, 7) of 8 sends three blocks
    assert decompose({2, 3, 4, 5, 6}, Block(0, 8)) == [Block(2, 4), Block(4, 6), Block(6, 7)]
    assert decompose(set(range(12)), Block(0, 12)) == [Block(0, 12)]
    assert decompose({8, 9, 10, 11}, Block(0, 12)) == [Block(8, 12)]
    assert decompose({1, 2}, Block(0, 4)) == [Block(1, 2), Block(2, 3)]
    assert decompose(set(), Block(0, 4)) == []


@given(subsets())
def test_decompose_gives_exactly_the_set_in_maximal_nodes(case: tuple[int, set[int]]) -> None:
    total, indices = case
    blocks = decompose(indices, Block(0, total))
    assert [i for block in blocks for i in range(block.lo, block.hi)] == sorted(indices)
    nodes = tree(total)
    for block in blocks:
        assert block in nodes
        wider = [node for node in nodes if node.contains(block) and node != block]
        assert not any(set(range(node.lo, node.hi)) <= indices for node in wider)


@given(totals, st.data())
def test_a_range_has_few_blocks(total: int, data: st.DataObject) -> None:
    lo = data.draw(st.integers(0, total - 1))
    hi = data.draw(st.integers(lo + 1, total))
    assert len(decompose(set(range(lo, hi)), Block(0, total))) <= max(1, 2 * (total - 1).bit_length())


@given(subsets())
def test_decompose_ignores_what_lies_outside_the_top(case: tuple[int, set[int]]) -> None:
    total, indices = case
    for top in tree(total):
        inside = {i for i in indices if top.lo <= i < top.hi}
        assert decompose(indices, top) == decompose(inside, top)


@given(subsets(), subsets())
def test_block_set_is_a_set_of_microbatches(first: tuple[int, set[int]], second: tuple[int, set[int]]) -> None:
    total = max(first[0], second[0])
    top = Block(0, total)
    added, removed = decompose(first[1], top), decompose(second[1], top)
    found = BlockSet(total, added)
    for block in removed:
        assert found.covers(block) == all(i in first[1] for i in range(block.lo, block.hi))
    for block in removed:
        found.discard(block)
    left = first[1] - second[1]
    assert list(found) == decompose(left, top)
    assert len(found) == len(left)
    assert found.within(removed) == []
    assert [i for b in found.within([top]) for i in range(b.lo, b.hi)] == sorted(left)


def test_blocks_show_themselves() -> None:
    assert str(Block(2, 7)) == "[2,7)"
    assert repr(BlockSet(8, [Block(0, 2), Block(2, 3)])) == "BlockSet([0,2) [2,3))"
    assert Block(0, 4).contains(Block(2, 4))
    assert not Block(2, 4).contains(Block(0, 4))
