"""The rows of the ledger's table that late, lost and failing nodes bring. Rules N5, N12, N13 of docs/protocol.md."""

from __future__ import annotations

from spheres.blocks import Block
from spheres.ledger import SELF, Action, Ledger, SendAssign, SendBegin, SendReady, Stuck

CHUNKS = 10
ALL = Block(0, 8)


def root(*children: tuple[str, float]) -> Ledger:
    """Control in a step of 8 microbatches, given out to these children."""
    made = Ledger(2, computes=False, root=True)
    for child, capacity in children:
        made.child_joined(child, {"": capacity}, holds=False)
    made.start(8, CHUNKS, [ALL])
    return made


def ready(made: Ledger, child: str, *held: Block, computing: tuple[Block, ...] = (), idle: bool = True) -> list[Action]:
    return made.child_ready(child, made.edges[child].attempt, held, computing, idle=idle)


def nobody(_: Block, __: int) -> bool:
    return False


def everybody_but(*late: Block):  # type: ignore[no-untyped-def]
    return lambda block, _: block not in late


# ---- late (N12)


def test_without_anybody_idle_nobody_is_late() -> None:
    made = root(("a", 1.0), ("b", 1.0))
    assert made.laggards(nobody) == frozenset()


def test_who_has_not_given_the_frontiers_chunk_is_late_where_another_is_done() -> None:
    made = root(("a", 1.0), ("b", 1.0))
    assert made.slots == {Block(0, 4): "a", Block(4, 8): "b"}
    assert made.laggards(everybody_but(Block(4, 8))) == {"b"}
    assert made.laggards(everybody_but()) == frozenset()


def test_a_spare_is_idle_and_one_that_leaves_is_not() -> None:
    made = root(("a", 1.0))
    made.child_joined("spare", {"": 1.0}, holds=False)
    assert made.laggards(nobody) == {"a"}
    made.child_changed("spare", leaving=True)
    assert made.laggards(nobody) == frozenset()


def test_a_node_can_be_late_itself() -> None:
    made = Ledger(2, computes=True)
    made.child_joined("a", {"": 1.0}, holds=False)
    made.start(8, CHUNKS, [ALL])
    made.next_unit()
    assert made.laggards(everybody_but(Block(0, 4))) == {SELF}


def test_nobody_is_late_while_answers_are_missing_or_all_is_sent() -> None:
    made = root(("a", 1.0), ("b", 1.0))
    made.hurry({"b"})
    assert made.laggards(everybody_but(Block(4, 8))) == frozenset()


def test_what_a_late_child_computes_is_given_to_an_idle_one() -> None:
    made = root(("a", 1.0), ("b", 1.0))
    assert made.hurry({"b"}) == [SendBegin("a", 1, 0), SendBegin("b", 1, 0)]
    ready(made, "a", Block(0, 4))
    assert ready(made, "b", computing=(Block(4, 8),), idle=False) == [
        SendAssign("a", 1, 0, (ALL,)),
    ]
    assert made.slots == {ALL: "a"}


def test_what_a_late_child_holds_stays_its_own() -> None:
    made = root(("a", 1.0), ("b", 1.0))
    made.hurry({"b"})
    ready(made, "a", Block(0, 4))
    ready(made, "b", Block(4, 6), computing=(Block(6, 8),), idle=False)
    assert made.slots == {Block(0, 4): "a", Block(4, 6): "b", Block(6, 8): "a"}


def test_where_nobody_is_idle_after_all_a_late_child_goes_on() -> None:
    made = root(("a", 1.0), ("b", 1.0))
    made.hurry({"b"})
    ready(made, "a", Block(0, 4), idle=False)
    ready(made, "b", computing=(Block(4, 8),), idle=False)
    assert made.slots == {Block(0, 4): "a", Block(4, 8): "b"}


def test_lateness_is_of_one_attempt() -> None:
    made = root(("a", 1.0), ("b", 1.0), ("c", 1.0))
    made.hurry({"b"})
    made.child_lost("c")
    ready(made, "a", Block(0, 4))
    ready(made, "b", computing=(Block(4, 8),), idle=False)
    assert made.late == {"b"}
    made.child_joined("d", {"": 1.0}, holds=True)
    assert made.late == frozenset()


def test_own_compute_is_given_away_where_it_is_late() -> None:
    made = Ledger(2, computes=True)
    made.child_joined("a", {"": 1.0}, holds=False)
    made.start(8, CHUNKS, [ALL])
    assert made.next_unit() == Block(0, 4)
    made.hurry({SELF})
    assert ready(made, "a", Block(4, 8)) == [SendAssign("a", 1, 0, (ALL,))]
    assert made.slots == {ALL: "a"}
    made.computed(Block(0, 4))  # in vain, but kept: another loss may need it (N7)
    assert made.held == {Block(0, 4)}


def test_ready_tells_what_is_computed_from_what_is_held() -> None:
    made = Ledger(2, computes=True)
    made.child_joined("a", {"": 1.0}, holds=False)
    made.start(8, CHUNKS, [ALL])
    made.next_unit()
    made.begin(1, 0)
    assert ready(made, "a", Block(4, 6), computing=(Block(6, 8),), idle=False) == [
        SendReady(1, (Block(4, 6),), (Block(0, 4), Block(6, 8)), idle=False)
    ]


def test_a_held_block_goes_before_the_same_one_in_compute() -> None:
    made = root(("a", 1.0), ("b", 1.0))
    made.hurry(())
    ready(made, "a", computing=(ALL,), idle=False)
    ready(made, "b", ALL)
    assert made.slots == {ALL: "b"}


# ---- an inner sphere is lost: its children come (N13)


def test_an_attempt_waits_for_the_children_of_a_lost_inner_sphere() -> None:
    made = root(("inner", 3.0), ("b", 1.0))
    assert made.child_lost("inner") == [SendBegin("b", 1, 0)]
    assert made.missing == 2.0
    assert ready(made, "b", Block(6, 8)) == []
    assert made.child_joined("x", {"": 1.0}, holds=True) == [SendBegin("x", 1, 0)]
    assert ready(made, "x", Block(0, 2)) == []  # one is still missing
    assert made.child_joined("y", {"": 1.0}, holds=True) == [SendBegin("y", 1, 0)]
    assert ready(made, "y", Block(2, 4)) != []
    assert (made.slots[Block(0, 2)], made.slots[Block(2, 4)]) == ("x", "y")
    assert made.attempts == 1


def test_it_does_not_wait_for_ever() -> None:
    made = root(("inner", 3.0), ("b", 1.0))
    made.child_lost("inner")
    ready(made, "b", Block(6, 8))
    assert made.settled() == [SendAssign("b", 1, 0, (ALL,))]
    assert made.settled() == []


def test_a_lost_leaf_is_waited_for_by_nobody() -> None:
    made = root(("a", 1.0), ("b", 1.0))
    made.child_lost("a")
    assert made.missing == 0.0


def test_a_new_step_or_link_waits_for_nobody() -> None:
    made = root(("inner", 3.0), ("b", 1.0))
    made.child_lost("inner")
    made.start(8, CHUNKS, [ALL])
    assert (made.missing, made.waiting) == (0.0, None)


# ---- a task that fails


def test_a_node_that_is_unable_gives_what_it_owes_to_its_children() -> None:
    made = Ledger(2, computes=True)
    made.child_joined("a", {"": 1.0}, holds=False)
    made.start(8, CHUNKS, [ALL])
    made.next_unit()
    assert made.unable() == [SendBegin("a", 1, 0)]
    assert made.capacity == 1.0
    assert ready(made, "a", Block(4, 8)) == [SendAssign("a", 1, 0, (ALL,))]
    assert made.next_unit() is None


def test_a_leaf_that_is_unable_is_stuck_and_keeps_what_it_holds() -> None:
    made = Ledger(2, computes=True)
    made.start(8, CHUNKS, [Block(0, 4), Block(6, 7)])
    made.next_unit()
    made.computed(Block(0, 4))
    made.next_unit()
    assert made.unable() == [Stuck((Block(6, 7),))]
    assert (made.held, made.capacity) == ({Block(0, 4)}, 0.0)


def test_a_node_that_is_unable_and_owes_nothing_more_begins_no_attempt() -> None:
    made = Ledger(2, computes=True)
    made.start(8, CHUNKS, [Block(0, 4)])
    made.next_unit()
    made.computed(Block(0, 4))
    assert made.unable() == []


def test_able_again_it_takes_up_what_nobody_could_compute() -> None:
    made = Ledger(2, computes=True)
    made.start(8, CHUNKS, [ALL])
    made.next_unit()
    made.unable()
    assert made.stuck
    made.able()
    assert (made.stuck, made.queue) == (False, [ALL])
