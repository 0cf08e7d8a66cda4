"""The event table of a step, row by row, and every refusal. Rules N1 to N14 are those of docs/protocol.md."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from spheres.blocks import Block
from spheres.errors import CreditError, ProtocolError, StaleError
from spheres.ledger import SELF, Action, Ledger, SendAssign, SendBegin, SendCredit, SendReady, Stuck

WINDOW, CHUNKS = 2, 10
#: the whole of M = 8
ALL = Block(0, 8)


def ledger(*children: str, computes: bool = True, root: bool = False) -> Ledger:
    """A node whose children joined before the step; each is as fast as one sphere."""
    made = Ledger(WINDOW, computes=computes, root=root)
    for child in children:
        assert made.child_joined(child, {"": 1.0}, holds=False) == []
    return made


def started(*children: str, blocks: tuple[Block, ...] | None = (ALL,), root: bool = False) -> Ledger:
    """The same in a step of 8 microbatches and 10 chunks, given out to the children alone."""
    made = ledger(*children, computes=False, root=root)
    made.start(8, CHUNKS, blocks)
    return made


def ready(made: Ledger, child: str, *held: Block, idle: bool = True) -> list[Action]:
    return made.child_ready(child, made.edges[child].attempt, held, idle=idle)


def send_up(made: Ledger, through: int) -> list[Action]:
    """Chunks of all obligations go up, in the order of the ledger."""
    actions: list[Action] = []
    while (item := made.sendable(lambda block, index: index <= through)) is not None:
        actions += made.sent(*item)
    return actions


# ---- start


def test_start_gives_blocks_out_without_begin_or_ready() -> None:
    """N5: attempt 0."""
    made = ledger("a", "b", computes=True)
    assert made.start(12, CHUNKS, [Block(0, 12)]) == [
        SendAssign("a", 0, 0, (Block(4, 8),)),
        SendAssign("b", 0, 0, (Block(8, 12),)),
    ]
    assert made.slots == {Block(0, 4): SELF, Block(4, 8): "a", Block(8, 12): "b"}
    assert made.queue == [Block(0, 4)]
    assert (made.edges["a"].credit, made.allowed, made.frontier, made.attempts) == (1, 1, 0, 0)


def test_start_drops_all_of_the_step_before() -> None:
    """N14."""
    made = ledger("a")
    made.start(8, CHUNKS, [ALL])
    made.next_unit()
    made.computed(Block(0, 4))
    made.child_joined("b", {"": 1.0}, holds=True)
    assert made.waiting == {"a", "b"}
    assert made.edges["b"].attempt == 1
    made.start(8, CHUNKS, None)
    assert (made.held, made.computing, made.queue, made.slots, made.obligations) == (set(), None, [], {}, {})
    assert (made.waiting, made.attempts, made.frontier, list(made.holdings)) == (None, 0, 0, [])
    assert [edge.attempt for edge in made.edges.values()] == [0, 0]


def test_a_spare_waits_for_begin() -> None:
    made = ledger("a")
    assert made.start(8, CHUNKS, None) == []
    assert not made.assigned
    assert not made.finished
    assert made.next_unit() is None
    with pytest.raises(StaleError):  # attempt 0 comes with the start alone
        made.assign(0, 0, [ALL])
    assert made.begin(1, 3) == [SendBegin("a", 1, 3)]


def test_an_evaluation_has_one_unit_per_block() -> None:
    made = ledger(computes=True)
    made.start(8, 0, [ALL])
    assert made.chunks == 1
    assert made.sendable(lambda *_: True) == (ALL, 0)
    made.sent(ALL, 0)
    assert made.finished


def test_nobody_to_give_it_to_is_stuck_and_nothing_is_given_out() -> None:
    made = ledger("a", computes=False)
    made.child_changed("a", capacities={"": 0.0})
    assert made.start(8, CHUNKS, [ALL]) == [Stuck((ALL,))]
    assert made.stuck
    assert made.slots == {}
    assert made.sendable(lambda *_: False) is None


# ---- resume


def test_resume_keeps_caches_and_asks_below_again() -> None:
    """N14: a parent that came to this step later."""
    made = ledger("a", computes=True)
    made.start(8, CHUNKS, [ALL])
    made.next_unit()
    made.computed(Block(0, 4))
    made.relinked()
    assert made.resume([ALL]) == [SendBegin("a", 2, 0)]
    assert ready(made, "a", Block(4, 8)) == [SendAssign("a", 2, 0, (Block(4, 8),))]
    assert made.slots == {Block(0, 4): SELF, Block(4, 8): "a"}
    assert made.queue == []


def test_after_resume_the_parent_counts_its_attempts_from_0() -> None:
    made = ledger()
    made.start(8, CHUNKS, [ALL])
    made.begin(5, 3)
    made.resume([ALL])
    assert (made.attempt, made.frontier) == (0, 0)
    made.credit(0, 4)
    assert made.begin(1, 0) == [SendReady(1, (), (), idle=True)]


# ---- begin


def test_begin_is_passed_on_with_own_numbers_and_the_same_chunk() -> None:
    """N4."""
    made = started("a", "b")
    made.child_joined("c", {"": 1.0}, holds=True)
    assert made.begin(5, 7) == [SendBegin("a", 2, 7), SendBegin("b", 2, 7), SendBegin("c", 2, 7)]
    assert (made.slots, made.obligations, made.frontier) == ({}, {}, 7)
    assert made.sendable(lambda *_: True) is None


def test_begin_without_children_is_answered_at_once() -> None:
    """N4, N5: what is held and what is in compute is kept, and said."""
    made = ledger()
    made.start(8, CHUNKS, [Block(0, 2), Block(4, 6)])
    made.next_unit()
    made.computed(Block(0, 2))
    assert made.next_unit() == Block(4, 6)
    assert made.begin(1, 0) == [SendReady(1, (Block(0, 2),), (Block(4, 6),), idle=False)]
    assert made.computing == Block(4, 6)
    made.computed(Block(4, 6))
    assert made.begin(2, 0) == [SendReady(2, (Block(0, 2), Block(4, 6)), (), idle=True)]


def test_begin_from_below_the_frontier_is_followed() -> None:
    """N7: what a dead parent had of it, the new one has not."""
    made = ledger()
    made.start(8, CHUNKS, [ALL])
    made.next_unit()
    made.computed(ALL)
    made.credit(0, 9)
    send_up(made, 6)
    made.begin(1, 3)
    made.assign(1, 3, [ALL])
    assert made.sendable(lambda *_: True) == (ALL, 3)


@pytest.mark.parametrize(
    ("attempt", "from_chunk", "error"),
    [(1, 0, StaleError), (0, 0, StaleError), (2, -1, ProtocolError), (2, CHUNKS + 1, ProtocolError)],
)
def test_begin_is_refused(attempt: int, from_chunk: int, error: type[Exception]) -> None:
    made = started("a")
    made.begin(1, 0)
    with pytest.raises(error):
        made.begin(attempt, from_chunk)


# ---- assign


def test_assign_gives_held_blocks_to_their_holders_and_the_rest_to_the_idle() -> None:
    """N5, N9."""
    made = started("a", "b", "c")
    made.begin(1, 4)
    ready(made, "a", Block(0, 4), idle=False)
    ready(made, "b", idle=True)
    assert ready(made, "c", Block(6, 8), idle=False) == [SendReady(1, (Block(0, 4), Block(6, 8)), (), idle=True)]
    assert made.assign(1, 4, [ALL]) == [
        SendAssign("a", 1, 4, (Block(0, 4),)),
        SendAssign("b", 1, 4, (Block(4, 6),)),
        SendAssign("c", 1, 4, (Block(6, 8),)),
    ]
    assert made.allowed == 4 + WINDOW - 1
    assert made.edges["b"].credit == 4 + WINDOW - 1


def test_of_overlapping_held_blocks_the_largest_is_taken_whole() -> None:
    """N9: a part of a held block is of no use."""
    made = started("a", "b")
    made.begin(1, 0)
    ready(made, "a", Block(0, 2), Block(4, 5))
    ready(made, "b", Block(0, 4), Block(4, 8), idle=False)
    made.assign(1, 0, [Block(0, 4), Block(4, 6)])
    # b holds [4,8), but only [4,6) is owed: what a has of that is used, and a computes the rest
    assert made.slots == {Block(0, 4): "b", Block(4, 6): "a"}


def test_own_blocks_go_before_those_of_children() -> None:
    made = ledger("a")
    made.start(8, CHUNKS, [ALL])
    made.next_unit()
    made.computed(Block(0, 4))
    made.begin(1, 0)
    ready(made, "a", Block(0, 4), Block(4, 8))
    made.assign(1, 0, [ALL])
    assert made.slots == {Block(0, 4): SELF, Block(4, 8): "a"}


def test_where_nobody_is_idle_the_busy_ones_get_it() -> None:
    made = started("a", "b")
    made.begin(1, 0)
    ready(made, "a", idle=False)
    ready(made, "b", idle=False)
    made.assign(1, 0, [ALL])
    assert made.slots == {Block(0, 4): "a", Block(4, 8): "b"}


def test_an_assignment_that_comes_while_children_are_asked_waits_for_them() -> None:
    """N5: what changes after Ready heals locally."""
    made = started("a", blocks=None)
    made.begin(1, 0)
    ready(made, "a")
    assert made.child_joined("b", {"": 1.0}, holds=True) == [SendBegin("a", 2, 0), SendBegin("b", 1, 0)]
    assert made.assign(1, 0, [ALL]) == []
    assert ready(made, "b", Block(4, 8)) == []  # Ready is not said twice
    assert made.sendable(lambda *_: True) is None
    # who holds something is idle too: what nobody holds is cut over both
    assert ready(made, "a") == [
        SendAssign("a", 2, 0, (Block(0, 2),)),
        SendAssign("b", 1, 0, (Block(2, 4), Block(4, 8))),
    ]


def test_one_who_joined_after_ready_is_asked_before_the_parent_is_given_notice() -> None:
    made = started("a", blocks=None)
    made.begin(1, 0)
    ready(made, "a")
    assert made.child_joined("b", {"": 1.0}, holds=False) == []  # N13
    assert made.child_lost("a") == []
    assert made.assign(1, 0, [ALL]) == [SendBegin("b", 1, 0)]
    assert ready(made, "b") == [SendAssign("b", 1, 0, (ALL,))]


@pytest.mark.parametrize(
    ("attempt", "from_chunk", "error"),
    [(1, 4, StaleError), (3, 4, StaleError), (2, 3, ProtocolError), (2, CHUNKS + 1, ProtocolError)],
)
def test_assign_is_refused(attempt: int, from_chunk: int, error: type[Exception]) -> None:
    made = ledger()
    made.start(8, CHUNKS, None)
    made.begin(2, 4)
    with pytest.raises(error):
        made.assign(attempt, from_chunk, [ALL])
    made.assign(2, 4, [ALL])
    with pytest.raises(StaleError):
        made.assign(2, 4, [ALL])


# ---- relinked


def test_relinked_voids_what_is_owed_and_raises_the_attempts_below() -> None:
    """N5b: chunks that children still send for the session before are stale at once."""
    made = ledger("a", computes=True)
    made.start(8, CHUNKS, [ALL])
    made.next_unit()
    made.computed(Block(0, 4))
    made.relinked()
    assert (made.obligations, made.slots, made.queue, made.attempt) == ({}, {}, [], 0)
    assert made.held == {Block(0, 4)}
    assert made.edges["a"].attempt == 1
    with pytest.raises(StaleError):
        made.accepts("a", 0, Block(4, 8), 0)
    with pytest.raises(StaleError):
        made.credit(0, 5)
    assert made.sendable(lambda *_: True) is None
    # what the child was given may be held below: the next parent is to ask
    assert list(made.holdings) == [ALL]


# ---- child_joined


def test_a_joiner_that_holds_nothing_starts_no_attempt() -> None:
    """N13."""
    made = started("a")
    assert made.child_joined("b", {"": 1.0}, holds=False) == []
    assert made.slots == {ALL: "a"}


def test_a_joiner_that_holds_blocks_starts_one() -> None:
    """N4."""
    made = started("a")
    assert made.child_joined("b", {"": 1.0}, holds=True) == [SendBegin("a", 1, 0), SendBegin("b", 1, 0)]
    assert made.attempts == 1


def test_a_joiner_takes_part_in_what_is_being_gathered() -> None:
    """One attempt for all orphans of one parent; and the last one asked may be lost without a deadlock."""
    made = started("a", "b")
    made.child_lost("a")
    assert made.waiting == {"b"}
    assert made.child_joined("c", {"": 1.0}, holds=True) == [SendBegin("c", 1, 0)]
    assert made.child_joined("d", {"": 1.0}, holds=False) == [SendBegin("d", 1, 0)]
    ready(made, "c", Block(4, 8), idle=False)
    assert made.child_lost("b") == []
    assert ready(made, "d") == [SendAssign("c", 1, 0, (Block(4, 8),)), SendAssign("d", 1, 0, (Block(0, 4),))]
    assert made.attempts == 1


def test_a_joiner_gets_work_that_lies_unassigned() -> None:
    """N13."""
    made = started(root=True)
    assert made.stuck
    assert made.child_joined("a", {"": 1.0}, holds=False) == [SendBegin("a", 1, 0)]
    assert ready(made, "a") == [SendAssign("a", 1, 0, (ALL,))]
    assert not made.stuck


def test_between_steps_and_after_the_last_chunk_a_joiner_changes_nothing() -> None:
    made = started("a")
    send_up(made, CHUNKS)
    made.credit(0, CHUNKS)
    send_up(made, CHUNKS)
    assert made.finished
    assert made.child_joined("b", {"": 1.0}, holds=True) == []
    made.active = False
    assert made.child_joined("c", {"": 1.0}, holds=True) == []
    assert made.child_lost("a") == []


# ---- child_lost


def test_a_lost_child_that_owed_something_starts_an_attempt_from_the_frontier() -> None:
    """N4: nothing is said upward."""
    made = started("a", "b")
    made.credit(0, 5)
    send_up(made, 2)
    assert made.child_lost("a") == [SendBegin("b", 1, 3)]
    assert ready(made, "b", Block(4, 8)) == [SendAssign("b", 1, 3, (ALL,))]
    assert made.obligations == {ALL: 3}
    assert made.edges["b"].credit == 3 + WINDOW - 1


def test_a_lost_child_that_owed_nothing_starts_none() -> None:
    made = started("a")
    made.child_joined("b", {"": 1.0}, holds=False)
    assert made.child_lost("b") == []
    assert made.child_lost("b") == []


def test_a_lost_child_whose_blocks_have_gone_up_starts_none() -> None:
    made = started("a", "b", blocks=(Block(0, 4), Block(4, 8)))
    assert made.slots == {Block(0, 4): "a", Block(4, 8): "b"}
    made.sent(Block(0, 4), 0, last=True)
    assert made.child_lost("a") == []
    assert made.child_lost("b") == [Stuck((Block(4, 8),))]


def test_a_child_lost_while_it_is_asked_is_waited_for_no_longer() -> None:
    """N5: ready or gone."""
    made = started("a", "b", "c")
    made.child_lost("a")
    ready(made, "b")
    assert made.child_lost("c") == [SendAssign("b", 1, 0, (ALL,))]


def test_what_a_lost_child_had_offered_is_not_counted_on() -> None:
    made = started("a", "b", "c")
    made.child_lost("a")
    ready(made, "b", ALL)
    made.child_lost("b")
    assert ready(made, "c") == [SendAssign("c", 1, 0, (ALL,))]


# ---- child_ready


@pytest.mark.parametrize(
    "event",
    [
        lambda made: made.child_ready("a", 1, (), idle=True),  # an older attempt
        lambda made: made.child_ready("a", 3, (), idle=True),  # one that was never begun
        lambda made: (ready(made, "a"), ready(made, "a")),  # said before
    ],
)
def test_ready_is_refused(event: Callable[[Ledger], object]) -> None:
    made = started("a", "b")
    made.child_joined("c", {"": 1.0}, holds=True)
    made.child_lost("b")
    made.child_joined("d", {"": 1.0}, holds=True)
    made.begin(1, 0)
    assert made.edges["a"].attempt == 2
    with pytest.raises(StaleError):
        event(made)


def test_ready_merges_what_the_subtree_holds() -> None:
    """N5: its size does not follow the subtree."""
    made = started("a", "b")
    made.begin(1, 0)
    ready(made, "a", *(Block(i, i + 1) for i in range(5)), idle=False)
    assert ready(made, "b", Block(5, 6), Block(6, 8), idle=False) == [SendReady(1, (ALL,), (), idle=False)]


# ---- child_changed


def test_capacity_counts_for_what_is_cut_next() -> None:
    made = ledger("a", "b", computes=False)
    assert made.child_changed("a", capacities={"": 3.0}) == []
    assert made.capacity == 4.0
    made.start(8, CHUNKS, [ALL])
    assert made.slots == {Block(0, 4): "a", Block(4, 6): "a", Block(6, 8): "b"}


def test_one_that_leaves_gets_nothing_more_but_may_give_what_it_holds() -> None:
    made = started("a", "b")
    made.child_changed("a", leaving=True)
    assert made.capacity == 1.0
    made.begin(1, 0)
    ready(made, "a", Block(0, 4))
    ready(made, "b")
    made.assign(1, 0, [ALL])
    assert made.slots == {Block(0, 4): "a", Block(4, 8): "b"}


def test_work_that_lies_unassigned_goes_to_a_subtree_that_grew() -> None:
    made = ledger("a", computes=False, root=True)
    made.child_changed("a", capacities={"": 0.0})
    made.start(8, CHUNKS, [ALL])
    assert made.stuck
    assert made.child_changed("a", capacities={"": 2.0}) == [SendBegin("a", 1, 0)]
    assert made.child_changed("a", capacities={"": 3.0}) == []


# ---- next_unit, computed


def test_blocks_are_computed_one_by_one_in_canonical_order() -> None:
    made = ledger()
    made.start(8, CHUNKS, [Block(0, 2), Block(4, 8)])
    assert made.next_unit() == Block(0, 2)
    assert made.next_unit() is None
    made.computed(Block(0, 2))
    assert made.next_unit() == Block(4, 8)
    made.computed(Block(4, 8))
    assert made.next_unit() is None
    assert made.held == {Block(0, 2), Block(4, 8)}


# ---- sent, credit, sendable


def test_credit_follows_the_lowest_chunk_that_has_not_gone_up() -> None:
    """N6, I3: for all children alike, and only where it is news."""
    made = started("a", "b", blocks=(Block(0, 4), Block(4, 8)))
    made.credit(0, 9)
    assert made.sent(Block(0, 4), 0) == []  # [4,8) has not sent its chunk 0
    assert made.sent(Block(4, 8), 0) == [SendCredit("a", 0, 2), SendCredit("b", 0, 2)]
    assert made.frontier == 1
    assert made.sent(Block(0, 4), 1) == []


def test_no_credit_is_said_beyond_the_last_chunk() -> None:
    made = started("a")
    made.credit(0, 99)
    actions = send_up(made, CHUNKS)
    assert [action.through for action in actions if isinstance(action, SendCredit)] == [*range(2, 10)]


def test_chunks_go_up_chunk_by_chunk_across_all_blocks() -> None:
    """N6: chunk i of one may wait for chunk i of another from the same child."""
    made = ledger()
    made.start(8, CHUNKS, [Block(0, 4), Block(4, 6)])
    order = []
    while (item := made.sendable(lambda *_: True)) is not None:
        order.append(item)
        made.sent(*item)
    assert order == [(Block(0, 4), 0), (Block(4, 6), 0), (Block(0, 4), 1), (Block(4, 6), 1)]  # credit ends here
    made.credit(0, 2)
    assert made.sendable(lambda block, _: block == Block(4, 6)) == (Block(4, 6), 2)


def test_credit_never_falls() -> None:
    made = ledger()
    made.start(8, CHUNKS, [ALL])
    made.credit(0, 5)
    made.credit(0, 3)
    assert made.allowed == 5
    with pytest.raises(StaleError):
        made.credit(1, 9)


def test_control_needs_no_credit() -> None:
    made = started("a", root=True)
    send_up(made, CHUNKS)
    assert made.finished


def test_an_absent_block_is_done_with_one_message() -> None:
    """N16."""
    made = started("a")
    made.sent(ALL, 0, last=True)
    assert made.finished


def test_while_children_are_asked_nothing_goes_up() -> None:
    made = started("a", "b")
    made.child_lost("a")
    assert made.sendable(lambda *_: True) is None


# ---- accepts


def test_a_chunk_is_news_until_it_has_gone_up() -> None:
    made = started("a", "b", blocks=(Block(0, 4), Block(4, 8)))
    assert made.accepts("a", 0, Block(0, 4), 0)
    made.sent(Block(0, 4), 0)
    assert not made.accepts("a", 0, Block(0, 4), 0)
    assert made.accepts("a", 0, Block(0, 4), -1)  # a header


@pytest.mark.parametrize(
    ("attempt", "block", "index", "error"),
    [
        (1, Block(0, 4), 0, StaleError),
        (0, Block(0, 2), 0, ProtocolError),  # a part of what it owes (N3)
        (0, ALL, 0, ProtocolError),  # more than it owes
        (0, Block(4, 8), 0, ProtocolError),  # what another owes
        (0, Block(0, 4), WINDOW, CreditError),
    ],
)
def test_a_chunk_is_refused(attempt: int, block: Block, index: int, error: type[Exception]) -> None:
    made = started("a", "b")
    with pytest.raises(error):
        made.accepts("a", attempt, block, index)


def test_a_chunk_beyond_the_last_is_refused() -> None:
    made = started("a")
    made.edges["a"].credit = 99
    with pytest.raises(CreditError):
        made.accepts("a", 0, ALL, CHUNKS)


def test_no_chunk_is_taken_while_children_are_asked() -> None:
    """I6: it belongs to the attempt before."""
    made = started("a", "b")
    made.child_lost("b")
    with pytest.raises(StaleError):
        made.accepts("a", 1, Block(0, 4), 0)


def test_a_block_outside_all_obligations_has_no_cover() -> None:
    made = started("a", blocks=(Block(0, 4),))
    assert made.cover(Block(2, 3)) == Block(0, 4)
    with pytest.raises(ProtocolError):
        made.cover(Block(4, 5))
