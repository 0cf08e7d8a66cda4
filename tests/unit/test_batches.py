"""Batches: what is claimed for the parent is summed here or beside the loop, and goes unless it was recalled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import spheres.batches
from spheres.batches import Batches
from spheres.gradients import Batch, Outgoing
from spheres.work import Hooks

FIRST, SECOND = Outgoing(b"first", 0), Outgoing(b"second", 0)
LARGE = spheres.batches._INLINE_ELEMENTS + 1


class Beside:
    """Sums beside the loop, when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[BaseException | None], None]] = []
        self.broken: list[BaseException] = []
        self.done: list[Batch] = []
        self.batches = Batches(Hooks(run=self.run, broken=self.broken.append))

    def run(self, works: Sequence[Callable[[], None]], ended: Callable[[BaseException | None], None]) -> None:
        self.waiting.append(ended)

    def add_up(self, batch: Batch) -> bool:
        return self.batches.add_up(batch, self.done.append)


def batch(elements: int, *messages: Outgoing, works: Sequence[Callable[[], None]] = ()) -> Batch:
    return Batch(list(works), elements, list(messages), [])


def test_a_small_batch_is_summed_at_once() -> None:
    beside, summed = Beside(), list[int]()
    small = batch(LARGE - 1, FIRST, SECOND, works=[lambda: summed.append(1), lambda: summed.append(2)])
    assert beside.add_up(small)
    assert summed == [1, 2]
    assert beside.batches.end(small)
    assert list(beside.batches.ready) == [FIRST, SECOND]
    assert beside.batches.batch is None
    assert not beside.waiting


def test_a_large_one_waits_for_its_sum() -> None:
    beside, large = Beside(), batch(LARGE, FIRST)
    assert not beside.add_up(large)
    assert beside.batches.batch is large
    assert not beside.done
    beside.waiting[0](None)
    assert beside.done == [large]
    assert beside.batches.end(large)
    assert list(beside.batches.ready) == [FIRST]


def test_what_was_recalled_does_not_go_whether_it_was_summed_or_not() -> None:
    """N4: it belongs to an attempt that is over; that its sum failed meanwhile breaks nothing."""
    for error in (None, MemoryError()):
        beside, early, late = Beside(), batch(0, FIRST), batch(LARGE, SECOND)
        assert beside.add_up(early)
        assert beside.batches.end(early)
        beside.add_up(late)
        beside.batches.recall()
        beside.waiting[0](error)
        assert beside.done == [late]
        assert not beside.batches.end(late)
        assert not beside.batches.ready
        assert not beside.broken


def test_a_sum_that_fails_is_told_and_the_next_can_be_claimed() -> None:
    def fails() -> None:
        raise MemoryError

    for elements in (0, LARGE):
        beside = Beside()
        assert not beside.add_up(batch(elements, FIRST, works=[fails]))
        for ended in beside.waiting:
            ended(MemoryError())
        assert [type(error) for error in beside.broken] == [MemoryError]
        assert beside.batches.batch is None
        assert not beside.batches.ready
        assert not beside.done
