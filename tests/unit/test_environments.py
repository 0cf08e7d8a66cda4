"""Which microbatch is meant for which numeric environment, and who gets it when its own worker is lost. Rule N22."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from spheres.blocks import Block
from spheres.children import Children
from spheres.config import PROTOCOL_VERSION, NodeConfig
from spheres.environments import ANY, Environments, Range, next_shares
from spheres.errors import ProtocolError, RefusedError
from spheres.hub import Hub
from spheres.lease import Lease
from spheres.ledger import SELF, Action, Ledger, SendAssign, SendBegin, SendReady, Stuck
from spheres.tensors import Manifest
from spheres.v1 import work_pb2 as pb

CHUNKS = 4
ALL = Block(0, 8)


def tree(**children: str) -> Ledger:
    """Control with a child per name, whose environment is the value; 8 microbatches are given out."""
    made = Ledger(2, computes=False, root=True)
    for child, environment in children.items():
        made.child_joined(child, {environment: 1.0}, holds=False)
    made.start(8, CHUNKS, [ALL])
    return made


def ready(made: Ledger, child: str, *, held: tuple[Block, ...] = (), idle: bool = True, only: str = "") -> list[Action]:
    attempt = made.edges[child].attempt
    return made.child_ready(child, attempt, held, idle=idle, idle_environments=[only] if only else [])


def meant(made: Ledger) -> str:
    names = {k: name for lo, hi, name in made.environments for k in range(lo, hi)}
    return "".join(names.get(k, "-") for k in range(made.total))


def computed_by(made: Ledger, **environment: str) -> str:
    owners = {k: owner for slot, owner in made.slots.items() for k in range(*slot)}
    return "".join(environment[owners[k]] for k in range(made.total))


# ---- the plan


def test_the_plan_follows_the_capacities_and_nothing_else() -> None:
    plan = Environments.shared_out(8, {"b": 2.0, "a": 6.0})
    assert plan == Environments([Range(0, 6, "a"), Range(6, 8, "b")])
    assert plan == Environments.shared_out(8, {"a": 6.0, "b": 2.0})
    assert Environments.shared_out(8, {"": 3.0}) == ANY
    assert Environments.shared_out(8, {"a": 3.0}) == Environments([Range(0, 8, "a")])


def test_the_plan_does_not_depend_on_the_shape_of_the_tree() -> None:
    flat = tree(x="a", y="b", z="a", w="a")
    deep = Ledger(2, computes=False, root=True)
    deep.child_joined("inner", {"a": 2.0, "b": 1.0}, holds=False)
    deep.child_joined("leaf", {"a": 1.0}, holds=False)
    deep.start(8, CHUNKS, [ALL])
    assert meant(flat) == meant(deep) == "aaaaaabb"


def test_each_is_given_what_is_meant_for_its_own_environment() -> None:
    made = tree(x="b", y="a", z="a")
    assert computed_by(made, x="b", y="a", z="a") == meant(made)
    assert made.attempts == 0


def test_an_assignment_says_what_is_meant_for_whom() -> None:
    root = Ledger(2, computes=False, root=True)
    root.child_joined("inner", {"a": 3.0, "b": 1.0}, holds=False)
    [assign] = root.start(8, CHUNKS, [ALL])
    assert assign == SendAssign("inner", 0, 0, (ALL,), Environments([Range(0, 6, "a"), Range(6, 8, "b")]))
    inner = Ledger(2, computes=True, environment="a")
    for child, environment in {"p": "a", "q": "b", "r": "a"}.items():
        inner.child_joined(child, {environment: 1.0}, holds=False)
    inner.start(8, CHUNKS, assign.blocks, assign.environments)
    assert computed_by(inner, **{SELF: "a", "p": "a", "q": "b", "r": "a"}) == "aaaaaabb"


@pytest.mark.parametrize("ranges", [[(2, 2, "a")], [(0, 9, "a")], [(-1, 2, "a")], [(0, 4, "a"), (3, 8, "b")]])
def test_a_plan_that_makes_no_sense_is_refused(ranges: list[tuple[int, int, str]]) -> None:
    with pytest.raises(ProtocolError, match="environments of microbatches"):
        Environments.checked((Range(*r) for r in ranges), 8)


def test_blocks_are_cut_where_the_environment_changes() -> None:
    plan = Environments([Range(0, 3, "a"), Range(3, 6, "b")])
    assert plan.split([ALL]) == [
        ("a", [Block(0, 2), Block(2, 3)]),
        ("b", [Block(3, 4), Block(4, 6)]),
        (None, [Block(6, 8)]),
    ]
    assert ANY.split([ALL]) == [(None, [ALL])]
    assert plan.split([]) == []
    assert plan.of([Block(4, 6)]) == Environments([Range(3, 6, "b")])
    assert plan.unlike([Range(0, 4, "a"), Range(4, 6, "b")]) == 1


def test_the_plan_is_made_anew_when_an_environment_appears_and_a_step_after_one_was_lost() -> None:
    shares, none = {"a": 2.0, "b": 1.0}, frozenset[str]()
    assert next_shares({}, none, shares) == (shares, none)
    assert next_shares(shares, none, {"a": 9.0, "b": 1.0}) == (shares, none), "who else comes changes nothing"
    more = {**shares, "c": 1.0}
    assert next_shares(shares, none, more) == (more, none)
    assert next_shares(shares, none, {"a": 2.0}) == (shares, frozenset("b")), "it keeps its part for a step"
    assert next_shares(shares, {"b"}, {"a": 2.0}) == ({"a": 2.0}, none)
    assert next_shares(shares, {"b"}, {"b": 1.0}) == (shares, frozenset("a")), "another one"
    assert next_shares(shares, {"b"}, {"a": 2.0, "c": 1.0}) == ({"a": 2.0, "c": 1.0}, none)


def test_what_is_meant_for_an_environment_that_is_no_more_goes_to_the_one_that_has_most() -> None:
    plan = Environments([Range(0, 4, "a"), Range(4, 8, "b")])
    assert plan.handed_on([ALL], {"a": 1.0, "b": 2.0}) == (plan, set())
    assert plan.handed_on([Block(4, 6)], {"a": 1.0}) == (Environments([Range(0, 6, "a"), Range(6, 8, "b")]), {4, 5})
    assert plan.handed_on([ALL], {"d": 2.0, "c": 2.0, "e": 1.0}) == (Environments([Range(0, 8, "c")]), set(range(8)))


# ---- losses


def test_a_lost_microbatch_goes_to_an_idle_one_of_its_own_environment() -> None:
    made = tree(x="a", y="a", p="b", q="b")
    before = meant(made)
    held = {child: edge.assigned for child, edge in made.edges.items()}
    begun = made.child_lost("p")
    assert [action for action in begun if isinstance(action, SendBegin)]
    ready(made, "x", held=held["x"])
    ready(made, "y", held=held["y"])
    ready(made, "q", held=held["q"])
    assert made.slots
    assert meant(made) == before
    assert computed_by(made, x="a", y="a", q="b") == before
    assert not made.moved


def test_a_busy_one_of_its_own_environment_comes_before_an_idle_one_of_another() -> None:
    made = tree(x="a", p="b", q="b")
    before = meant(made)
    made.child_lost("p")
    ready(made, "x", idle=True)
    ready(made, "q", idle=False)
    assert computed_by(made, x="a", q="b") == before


def test_control_waits_a_moment_for_the_last_of_an_environment_then_takes_another_and_counts() -> None:
    made = tree(x="a", y="a", p="b")
    assert meant(made) == "aaaaaabb"
    made.child_lost("p")
    ready(made, "x")
    assert ready(made, "y") == []
    assert made.waiting is None or made.missing > 0
    actions = made.settled()
    assert [action for action in actions if isinstance(action, SendAssign)]
    assert meant(made) == "aaaaaaaa"
    assert made.moved == {6, 7}
    made.start(8, CHUNKS, [ALL])
    assert (meant(made), made.moved) == ("aaaaaaaa", {6, 7}), "it may come back, and keeps its part for this step"
    made.start(8, CHUNKS, [ALL])
    assert (meant(made), made.moved) == ("aaaaaaaa", set())
    assert dict(made.shares) == {"a": 2.0}


def test_one_that_flaps_between_two_steps_keeps_its_part() -> None:
    made = tree(x="a", y="a", p="b")
    made.active = False
    made.child_lost("p")
    made.start(8, CHUNKS, [ALL])
    assert made.moved == {6, 7}
    made.child_joined("p", {"b": 3.0}, holds=False)
    made.start(8, CHUNKS, [ALL])
    assert (meant(made), made.moved) == ("aaaaaabb", set())


def test_a_capacity_that_fell_to_next_to_nothing_ends_nothing() -> None:
    made = tree(x="a", p="b")
    made.child_changed("p", capacities={"b": 1e-6})
    made.start(8, CHUNKS, [ALL])
    assert meant(made) == "aaaabbbb"


def test_one_that_comes_back_in_that_moment_has_its_own_again() -> None:
    made = tree(x="a", y="a", p="b")
    made.child_lost("p")
    ready(made, "x")
    ready(made, "y")
    made.child_joined("p", {"b": 1.0}, holds=True)
    ready(made, "p")
    assert computed_by(made, x="a", y="a", p="b") == "aaaaaabb"
    assert not made.moved


def test_an_inner_node_without_the_environment_gives_back_what_it_owes() -> None:
    made = Ledger(2, computes=True, environment="a")
    made.child_joined("p", {"b": 1.0}, holds=False)
    made.start(8, CHUNKS, [Block(0, 4)], Environments([Range(0, 2, "a"), Range(2, 4, "b")]))
    assert made.slots == {Block(0, 2): SELF, Block(2, 4): "p"}
    made.child_lost("p")
    assert made.settled() == [Stuck((Block(2, 4),))]


def test_what_a_late_one_computes_is_open_to_its_own_environment_only() -> None:
    """N12."""
    made = tree(x="a", y="b")
    assert made.laggards(lambda slot, chunk: made.slots[slot] == "x") == frozenset()
    equal = tree(x="a", y="b", z="b")
    late = equal.laggards(lambda slot, chunk: equal.slots[slot] != "y")
    assert late == {"y"}
    theirs = next(slot for slot, owner in equal.slots.items() if owner == "y")
    held = {child: edge.assigned for child, edge in equal.edges.items()}
    equal.hurry(late)
    for child in ("x", "z"):
        ready(equal, child, held=held[child])
    equal.child_ready("y", equal.edges["y"].attempt, (), [theirs], idle=False)
    assert {owner for slot, owner in equal.slots.items() if slot.contains(theirs)} == {"z"}


def test_ready_says_in_which_environments_a_subtree_is_idle() -> None:
    made = Ledger(2, computes=True, environment="a")
    made.child_joined("p", {"b": 1.0}, holds=False)
    made.start(8, CHUNKS, [ALL], Environments([Range(0, 4, "a"), Range(4, 8, "b")]))
    made.next_unit()
    made.begin(1, 0)
    [answer] = ready(made, "p")
    assert isinstance(answer, SendReady)
    assert (answer.idle, answer.idle_environments) == (True, ("b",))
    made.begin(2, 0)
    [answer] = ready(made, "p", idle=False)
    assert isinstance(answer, SendReady)
    assert (answer.idle, answer.idle_environments) == (False, ())


def test_of_a_child_that_is_idle_in_one_environment_only_that_counts() -> None:
    made = Ledger(2, computes=False, root=True)
    made.child_joined("inner", {"a": 1.0, "b": 1.0}, holds=False)
    made.child_joined("x", {"a": 1.0}, holds=False)
    made.child_joined("p", {"b": 1.0}, holds=False)
    made.start(8, CHUNKS, [ALL])
    lost = {k for slot, owner in made.slots.items() if owner == "x" for k in range(*slot)}
    made.child_lost("x")
    ready(made, "inner", only="b")
    ready(made, "p", idle=False)
    owners = {k: owner for slot, owner in made.slots.items() for k in range(*slot)}
    assert {owners[k] for k in lost} == {"inner"}, "busy, but the only one of its environment"
    assert {owners[k] for k in range(8) if meant(made)[k] == "b"} == {"inner"}, "the one that is idle in it"


def test_what_a_child_says_of_environments_that_it_does_not_have_is_not_passed_on() -> None:
    made = Ledger(2, computes=True, environment="a")
    made.child_joined("p", {"b": 1.0}, holds=False)
    made.start(8, CHUNKS, [ALL], Environments([Range(0, 4, "a"), Range(4, 8, "b")]))
    made.next_unit()
    made.begin(1, 0)
    [answer] = made.child_ready("p", 1, (), idle=True, idle_environments=["b", *(f"x{n}" for n in range(9_999))])
    assert isinstance(answer, SendReady)
    assert answer.idle_environments == ("b",)


def test_an_inner_node_refuses_what_its_own_parent_would_refuse_it_for() -> None:
    """Else one child with too many names would keep the whole subtree out of the run."""
    config = NodeConfig(run_id="run", manifest=Manifest.of({"w": np.zeros(16, np.float32)}), chunk_bytes=4096)
    hub = Hub(config, "p", environment="own")
    hub.renewed([pb.Ancestor(id="control", incarnation=1)])
    children = Children(hub, environment="own", lease=Lease(10.0))

    async def join(number: int) -> None:
        hello = pb.Hello(protocol_version=PROTOCOL_VERSION, sphere_id=f"s-{number}", incarnation=1, parent_id="p")
        hello.environment_fingerprint, hello.capacity = f"e-{number}", 1.0
        message = pb.WorkRequest(tag=pb.Tag(run_id="run"), session=1, hello=hello)
        hub.admit(children._accept(message, lambda _: None), hello, message.tag)

    for number in range(63):
        asyncio.run(join(number))
    with pytest.raises(RefusedError, match="65 numeric environments below p; the limit is 64"):
        asyncio.run(join(63))
    assert len(hub.mixed_capacities) == 63
