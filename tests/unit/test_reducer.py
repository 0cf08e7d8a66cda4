"""Chunk sums: by the halves of canonical blocks, absent blocks passed over, chunks let go as they are used."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spheres.blocks import Block
from spheres.ledger import SELF
from spheres.reducer import Held, Reducer
from spheres.summing import add_up
from spheres.task import Sums
from tests.sums import canonical

CHUNK = 4
Array = npt.NDArray[np.float32]


def values(seed: int, size: int = CHUNK) -> Array:
    """Floats of very different size: any other order of adding them gives other bits."""
    q = np.random.default_rng(seed)
    return (q.standard_normal(size) * 10.0 ** q.integers(-6, 7, size)).astype(np.float32)


def bits(array: Array | None) -> bytes | None:
    return None if array is None else array.tobytes()


def sums(index: int) -> Sums:
    return Sums(0.1 * index, 1, {"accuracy": 1.0})


def reducer(slots: dict[Block, str]) -> Reducer:
    made = Reducer(CHUNK)
    made.forget(slots)
    return made


def take(made: Reducer, block: Block, index: int) -> Array | None:
    """What a chunk is the sum of, added up."""
    found = made.collect(block, index)
    if not isinstance(found, tuple):
        return found
    leaf = found
    while isinstance(leaf, tuple):
        leaf = leaf[0]
    out = np.empty(leaf.size, np.float32)
    add_up(found, out)
    return out


def give(made: Reducer, block: Block, array: Array | None, index: int = 0) -> None:
    """A child sends a chunk of a block, or says that it is absent."""
    made.header(block, None if array is None else sums(block.lo), absent=array is None)
    if array is not None:
        made.chunk(block, index, array.copy())


@given(st.integers(1, 24), st.data())
def test_sums_have_the_bits_of_the_canonical_sum(total: int, data: st.DataObject) -> None:
    absent = data.draw(st.sets(st.integers(0, total - 1)))
    own = data.draw(st.sets(st.integers(0, total - 1)))
    leaves: dict[int, Array | None] = {i: None if i in absent else values(i) for i in range(total)}
    made = reducer({Block(i, i + 1): SELF if i in own else "a" for i in range(total)})
    for i in data.draw(st.permutations(range(total))):
        assert not made.has(Block(0, total), 0)
        array = leaves[i]
        if i in own:
            made.cache[Block(i, i + 1)] = Held(array, None if array is None else sums(i))
        else:
            give(made, Block(i, i + 1), array)
    top = Block(0, total)
    assert made.has(top, 0)
    assert made.absent(top) == (len(absent) == total)
    expected = canonical(top, leaves)
    for _ in range(2 if len(own) == total else 1):  # what is computed here can be asked for again (N7)
        assert bits(take(made, top, 0)) == bits(expected)
    assert made.pending == 0


def test_the_order_is_by_halves_and_not_from_left_to_right() -> None:
    """The twin that shows that the values above can tell."""
    leaves: dict[int, Array | None] = {i: values(i) for i in range(8)}
    left_to_right = leaves[0]
    for i in range(1, 8):
        left_to_right = left_to_right + leaves[i]  # type: ignore[operator]
    assert bits(canonical(Block(0, 8), leaves)) != bits(left_to_right)


def test_absent_plus_x_is_x_with_its_sign() -> None:
    """N16: adding a zero would make +0.0 of it."""
    minus_zero = np.array([-0.0, 1.0, -2.0, -0.0], np.float32)
    for block in (Block(0, 1), Block(1, 2)):
        made = reducer({Block(0, 1): "a", Block(1, 2): "b"})
        for slot in made.slots:
            give(made, slot, minus_zero if slot == block else None)
        taken = take(made, Block(0, 2), 0)
        assert taken is not None
        assert np.signbit(taken).tolist() == [True, False, True, True]


def test_nothing_is_summed_before_every_slot_has_its_chunk() -> None:
    """N8: per chunk, never by counting."""
    made = reducer({Block(0, 2): "a", Block(2, 3): SELF, Block(3, 4): "b"})
    give(made, Block(0, 2), values(0), index=0)
    give(made, Block(0, 2), values(1), index=1)
    made.cache[Block(2, 3)] = Held(values(2, 2 * CHUNK), sums(2))
    assert not made.has(Block(0, 4), 0)
    give(made, Block(3, 4), values(3), index=1)
    assert not made.has(Block(0, 4), 0)
    assert made.has(Block(0, 4), 1)


def test_a_held_block_that_is_no_slot_counts_for_nothing() -> None:
    """N9: it was computed for an earlier attempt, and another owes that part now."""
    made = reducer({Block(0, 1): "a", Block(1, 2): "a"})
    made.cache[Block(0, 2)] = Held(values(9), sums(0))
    assert not made.has(Block(0, 2), 0)
    give(made, Block(0, 1), values(0))
    give(made, Block(1, 2), values(1))
    assert bits(take(made, Block(0, 2), 0)) == bits(values(0) + values(1))


def test_a_new_attempt_drops_what_children_sent_and_keeps_what_was_computed_here() -> None:
    """N4, N7."""
    made = reducer({Block(0, 1): SELF, Block(1, 2): "a"})
    made.cache[Block(0, 1)] = Held(values(0), sums(0))
    give(made, Block(1, 2), values(1))
    assert made.pending == 1
    made.forget({Block(0, 1): SELF, Block(1, 2): "b"})
    assert made.pending == 0
    assert not made.has_header(Block(1, 2))
    assert made.has(Block(0, 1), 0)
    assert not made.has(Block(0, 2), 0)


def test_taken_chunks_are_let_go() -> None:
    """I4: memory is the window, not the model."""
    made = reducer({Block(0, 1): "a", Block(1, 2): "b", Block(2, 3): "a", Block(3, 4): "b"})
    for index in range(20):
        for slot in made.slots:
            give(made, slot, values(index + 100 * slot.lo), index)
        assert made.pending == 4
        taken = take(made, Block(0, 4), index)
        assert taken is not None
        assert made.pending == 0


def test_a_sum_never_changes_what_is_held() -> None:
    made = reducer({Block(0, 1): SELF, Block(1, 2): SELF})
    held = [values(i) for i in range(2)]
    for i, array in enumerate(held):
        array.flags.writeable = False
        made.cache[Block(i, i + 1)] = Held(array, sums(i))
    assert bits(take(made, Block(0, 2), 0)) == bits(held[0] + held[1])
    assert bits(take(made, Block(0, 1), 0)) == bits(held[0])


def test_the_last_chunk_may_be_short() -> None:
    made = reducer({Block(0, 1): SELF, Block(1, 2): "a"})
    made.cache[Block(0, 1)] = Held(values(0, CHUNK + 1), sums(0))
    give(made, Block(1, 2), values(1, 1), index=1)
    taken = take(made, Block(0, 2), 1)
    assert bits(taken) == bits(values(0, CHUNK + 1)[CHUNK:] + values(1, 1))


def test_sums_travel_in_the_same_order() -> None:
    losses = [0.1, 0.2, 0.3, 1e16]
    made = reducer({Block(i, i + 1): "a" for i in range(4)})
    for i, loss in enumerate(losses):
        made.header(Block(i, i + 1), Sums(loss, i + 1, {"accuracy": loss}), absent=False)
    found = made.sums(Block(0, 4))
    assert found == Sums((0.1 + 0.2) + (0.3 + 1e16), 10, {"accuracy": (0.1 + 0.2) + (0.3 + 1e16)})


@pytest.mark.parametrize("where", [0, 1])
def test_sums_pass_over_what_is_absent(where: int) -> None:
    made = reducer({Block(0, 1): "a", Block(1, 2): SELF})
    made.header(Block(0, 1), None if where == 0 else sums(0), absent=where == 0)
    made.cache[Block(1, 2)] = Held(None, None if where == 1 else sums(1))
    assert made.sums(Block(0, 2)) == sums(1 - where)


def test_the_first_header_of_an_attempt_stands() -> None:
    made = reducer({Block(0, 1): "a"})
    give(made, Block(0, 1), values(0))
    made.header(Block(0, 1), sums(5), absent=False)
    assert made.has(Block(0, 1), 0)
    assert made.sums(Block(0, 1)) == sums(0)
