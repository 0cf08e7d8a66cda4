"""What control knows of its spheres: states, places, what is forgotten. No loop, no clock."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from time import process_time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control import membership
from control.membership import Membership
from control.placement import CONTROL, Member, levels, order
from control.rebalance import batches, mending_moves
from spheres.v1 import common_pb2
from spheres.v1 import work_pb2 as pb

HOME = "host-0"


class Tree:
    """A membership with the events of its spheres in short."""

    def __init__(self, fan_out: int = 2, *, term: int = 1, hosts_per_host: int | None = None) -> None:
        self.forgotten: list[str] = []
        self.members = Membership(HOME, fan_out, hosts_per_host=hosts_per_host, forgotten=self.forgotten.append)
        self.term, self.now = term, 0.0
        self.sessions: Counter[str] = Counter()

    def enroll(self, host: str = HOME, **changes: Any) -> str:
        agent = changes.pop("agent", "")
        member = Member(**{"id": "", "host": host, "address": "a:1", **changes})
        return self.members.enroll(member, pid=7, term=self.term, now=self.now, agent=agent).id

    def opens(self, id: str, parent: str | None = None, *, incarnation: int = 0, **said: Any) -> bool:
        self.sessions[id] += 1
        known = self.members.spheres.get(id)
        change = pb.SphereChange(
            sphere_id=id,
            incarnation=incarnation or (known.incarnation if known else 1),
            session=self.sessions[id],
            parent_id=parent or self.members.parent_of(id),
        )
        if said:
            change.address = said.pop("address")
            change.member.CopyFrom(common_pb2.Member(**said))
        return self.members.change(change)

    def ends(self, id: str, *, session: int = 0, reason: str = "gone") -> bool:
        change = pb.SphereChange(
            sphere_id=id,
            incarnation=self.members.spheres[id].incarnation if id in self.members.spheres else 1,
            session=session or self.sessions[id],
            lost=True,
            reason=reason,
        )
        return self.members.change(change)

    def joins(self, host: str = HOME, **changes: Any) -> str:
        id = self.enroll(host, **changes)
        self.opens(id)
        return id

    def states(self) -> dict[str, str]:
        return {id: sphere.state for id, sphere in self.members.spheres.items()}

    def hosts(self) -> set[str]:
        return {HOME, *(s.member.host for s in self.members.spheres.values())}

    def shape(self) -> dict[str, str]:
        return {s.id: s.parent for s in self.members.spheres.values() if s.active}


def test_spheres_that_start_at_once_are_placed_below_others_that_are_on_their_way() -> None:
    tree = Tree(2)
    ids = [tree.enroll() for _ in range(7)]
    assert ids == [f"s-{n}" for n in range(1, 8)]
    parents = [tree.members.parent_of(id) for id in ids]
    assert parents == [CONTROL, CONTROL, "s-1", "s-1", "s-2", "s-2", "s-3"]
    assert tree.members.path_to("s-7") == [CONTROL, "s-1", "s-3"]
    assert set(tree.states().values()) == {"joining"}
    assert tree.members.living == 0


def test_states_follow_the_links() -> None:
    tree = Tree(2)
    for _ in range(4):
        tree.joins()
    assert set(tree.states().values()) == {"active"}
    assert tree.ends("s-1", reason="its link broke off")
    assert tree.states() == {"s-1": "lost", "s-2": "active", "s-3": "lost", "s-4": "lost"}
    assert tree.members.reason_of("s-1") == "its link broke off"
    assert tree.members.reason_of("s-3") == "s-1 has no way to control"
    assert tree.members.living == 1
    assert tree.opens("s-3", CONTROL)
    assert not tree.ends("s-3", session=1)  # the news of its older link come late
    assert tree.states() == {"s-1": "lost", "s-2": "active", "s-3": "active", "s-4": "lost"}
    tree.members.leave("s-2", "enough")
    assert (tree.members.state_of("s-2"), tree.members.reason_of("s-2")) == ("draining", "enough")
    assert tree.members.living == 2
    tree.ends("s-2")
    assert (tree.members.state_of("s-2"), tree.members.reason_of("s-2")) == ("lost", "enough")


def test_an_inner_sphere_that_comes_back_brings_those_below_it() -> None:
    tree = Tree(1)
    for _ in range(4):
        tree.joins()
    tree.ends("s-1")
    assert tree.members.living == 0
    tree.opens("s-2", CONTROL)
    assert tree.shape() == {"s-2": CONTROL, "s-3": "s-2", "s-4": "s-3"}
    assert dict(tree.members.levels) == {1: 1, 2: 1, 3: 1}


def test_nobody_is_placed_below_one_that_is_lost_or_leaves_or_has_no_way_to_control() -> None:
    tree = Tree(2)
    for _ in range(6):  # s-1: s-3 and s-4; s-2: s-5 and s-6
        tree.joins()
    tree.ends("s-1")
    tree.members.leave("s-5", "drained")
    assert tree.members.parent_of(tree.joins()) == CONTROL
    # not s-1 (lost), s-3 and s-4 (no way), s-5 (leaves): the newcomer and s-6
    assert [tree.members.parent_of(tree.joins()) for _ in range(4)] == ["s-7", "s-7", "s-6", "s-6"]


def test_a_place_that_is_promised_is_taken() -> None:
    tree = Tree(2)
    tree.joins()
    tree.enroll()
    assert tree.members.parent_of(tree.enroll()) == "s-1"
    tree.members.move("s-1", "elsewhere")  # whoever is told to move keeps its old place until it has gone
    assert tree.members.parent_of(tree.enroll()) == "s-1"


def test_who_enrolled_and_did_not_come_gives_its_place_back() -> None:
    tree = Tree(1)
    tree.enroll()
    tree.now = 601.0
    assert tree.members.parent_of(tree.enroll()) == CONTROL
    assert tree.forgotten == ["s-1"]


def test_an_enrolment_is_the_same_when_it_is_asked_for_again() -> None:
    members = Membership(HOME, 2)
    asked = {"pid": 7, "term": 3, "now": 0.0, "request_id": "r"}
    first = members.enroll(Member("", HOME), **asked)
    assert members.enroll(Member("", HOME), **asked) is first
    assert first.id == "s-3.1"  # a later term: no life before can have had it
    again = members.enroll(Member("s-3.1", HOME), pid=8, term=3, now=0.0, request_id="another")
    assert again.incarnation > first.incarnation
    assert members.enroll(Member("", HOME), pid=7, term=4, now=0.0).incarnation > again.incarnation


def test_a_new_life_of_a_sphere_ends_the_old_one_with_what_hung_below_it() -> None:
    tree = Tree(1)
    tree.joins()
    tree.joins()
    tree.enroll(id="s-1")
    assert tree.states() == {"s-1": "joining", "s-2": "lost"}
    assert tree.members.living == 0
    tree.opens("s-1")
    assert set(tree.states().values()) == {"active"}


def test_strangers_are_taken_up_with_their_old_life() -> None:
    """Control was killed; its spheres come back to one that has never heard of them (DESIGN section 5)."""
    tree = Tree(2, term=2)
    assert tree.opens("s-3", "s-1", incarnation=44, host="host-1", pid=300, address="b:1")  # from below, too early
    assert tree.states() == {"s-3": "lost"}
    assert tree.opens("s-1", CONTROL, incarnation=41, host=HOME, pid=100, address="a:1")
    assert tree.states() == {"s-3": "active", "s-1": "active"}
    found = tree.members.spheres["s-3"]
    assert (found.incarnation, found.pid, found.member.host, found.member.address) == (44, 300, "host-1", "b:1")
    assert tree.enroll() == "s-2.1"
    assert tree.members.path_to("s-2.1") == [CONTROL]


def test_what_a_sphere_is_written_in_is_as_its_newest_link_or_else_its_enrolment_says() -> None:
    tree = Tree(2)

    def said(id: str) -> tuple[str, str]:
        sphere = tree.members.spheres[id]
        return sphere.agent, sphere.environment

    id, place = tree.enroll(agent="node 20"), {"host": HOME, "pid": 7, "address": "a:1"}
    assert said(id) == ("node 20", "")
    tree.opens(id, **place, environment_fingerprint="ab")  # it need not say it twice
    assert said(id) == ("node 20", "ab")
    tree.ends(id)
    assert said(id) == ("node 20", "ab")
    tree.opens(id, **place, environment_fingerprint="ac", agent="node 22")
    assert said(id) == ("node 22", "ac")
    tree.opens(
        "s-9", CONTROL, incarnation=44, **place, environment_fingerprint="ab", agent="c++17"
    )  # an earlier control's
    assert said("s-9") == ("c++17", "ab")


def test_the_lost_are_forgotten_the_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = Tree(5)
    for _ in range(5):
        tree.joins()
    monkeypatch.setattr(membership, "_MOST_LOST", 2 - 2 * 5)
    for id in ("s-2", "s-1"):
        tree.ends(id)
    tree.opens("s-2", CONTROL)
    for id in ("s-3", "s-4"):
        tree.ends(id)
    assert tree.forgotten == ["s-1"]
    assert tree.states() == {"s-2": "active", "s-3": "lost", "s-4": "lost", "s-5": "active"}


def test_memory_does_not_grow_with_churn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "_MOST_LOST", 10)
    tree, rng = Tree(3), random.Random(1)
    peak = 0
    for _ in range(30):
        tree.joins(f"host-{rng.randrange(4)}")
    members = tree.members
    for _ in range(3_000):
        tree.ends(rng.choice([id for id, state in tree.states().items() if state == "active"]))
        for id, state in tree.states().items():
            # one in five dies with the sphere above it, and nobody is left to say so
            if state == "lost" and members.spheres[id].linked and rng.random() < 0.8:
                tree.opens(id, members.place_for(members.spheres[id].member, moving=members.spheres[id]))
        while members.living < 30:
            tree.joins(f"host-{rng.randrange(4)}")
        peak = max(peak, members.living)
    assert len(members.spheres) <= peak + 10 + 2 * peak
    assert members._entries == sum(map(len, members._free.values())) < 4_000
    assert len(members._below) <= 3 * peak + 10
    assert not members._moving
    assert not members._coming


# --- against a plain count of everything ------------------------------------------------------------------------------


def plain_place(tree: dict[str, str], members: Sequence[Member], newcomer: Member, fan_out: int) -> str:
    """The rule of ``place_for`` by looking at everybody."""
    level, children = {CONTROL: 0, **levels(tree)}, Counter(tree.values())
    free = []
    for rank, member in enumerate([Member(CONTROL, HOME, address="c:1"), *sorted(members, key=order)]):
        own = member.host == newcomer.host
        if member.address and (own or member.reachable) and children[member.id] < fan_out:
            zone = member.id != CONTROL and member.zone == newcomer.zone
            free.append((not own, level[member.id], not own and not zone, rank, member.id))
    return min(free)[-1] if free else CONTROL


@st.composite
def newcomers(draw: st.DrawFn) -> list[Member]:
    hosts, zones = st.sampled_from([HOME, "host-1", "host-2"]), st.sampled_from(["", "east"])
    addresses = st.sampled_from(["a:1", "a:1", "127.0.0.1:1", ""])
    count = draw(st.integers(0, 40))
    return [Member(f"s-{n}", draw(hosts), draw(zones), draw(st.booleans()), draw(addresses)) for n in range(count)]


@given(newcomers(), st.integers(1, 4))
def test_newcomers_get_the_place_that_looking_at_everybody_gives(spheres: list[Member], fan_out: int) -> None:
    tree = Tree(fan_out)
    for n, newcomer in enumerate(spheres):
        wanted = plain_place(tree.shape(), spheres[:n], newcomer, fan_out)
        assert tree.members.place_for(newcomer) in (wanted, None)
        tree.joins(**{field: getattr(newcomer, field) for field in ("host", "zone", "id", "relay", "address")})
        assert tree.members.parent_of(newcomer.id) == wanted
    assert tree.members.relays == sum(member.relay for member in spheres)


def disturb(tree: Tree, rng: random.Random, events: int) -> None:
    """Kill, re-link to the grandparent or control, join, drain; the way an orphan goes is a sphere's own (N11)."""
    for _ in range(events):
        active = [id for id, state in tree.states().items() if state == "active"]
        match rng.randrange(4):
            case 0 if active:
                victim = rng.choice(active)
                above = tree.members.path_to(victim)
                orphans = [id for id in tree.members.children_of(victim) if tree.members.spheres[id].linked]
                tree.ends(victim)
                for orphan in orphans:
                    tree.opens(orphan, rng.choice([above[-1], CONTROL]))
            case 1 if active:
                tree.members.leave(rng.choice(active), "")
            case _:
                tree.joins(
                    rng.choice([HOME, "host-1", "host-2"]), address=rng.choice(["a:1", "a:1", "127.0.0.1:1", ""])
                )


def hosts_below(tree: Tree, *, linked: bool = False) -> dict[str, set[str]]:
    """Host -> the other hosts that hang on it, by looking at every edge: of active spheres, or of all with a place."""
    found: dict[str, set[str]] = {host: set() for host in tree.hosts()}
    for sphere in tree.members.spheres.values():
        above = tree.members.host_of(sphere.parent)
        placed = sphere.id in tree.members.children_of(sphere.parent) if linked else sphere.active
        if placed and above and above != sphere.member.host:
            found[above].add(sphere.member.host)
    return found


def chain(tree: Tree) -> dict[str, set[str]]:
    return {host: below for host, below in hosts_below(tree).items() if below}


@given(st.integers(1, 4), st.integers())
def test_what_is_counted_is_what_is_there(fan_out: int, seed: int) -> None:
    tree = Tree(fan_out)
    disturb(tree, random.Random(seed), 60)
    members, shape = tree.members, tree.shape()
    at = levels(shape)  # raises where one that counts as active has no way
    assert (members.living, members.levels) == (len(shape), Counter(at.values()))
    assert {s.id: s.level for s in members.spheres.values() if s.active} == at
    children = Counter(s.parent for s in members.spheres.values() if s.linked or not s.joined)
    assert set(members.overfull) == {parent for parent, count in children.items() if count > fan_out}


@given(st.integers(2, 4), st.sampled_from([None, 1, 2]), st.integers())
def test_a_tree_that_losses_have_disturbed_is_mended_and_then_left_alone(
    fan_out: int, hosts_per_host: int | None, seed: int
) -> None:
    tree = Tree(fan_out, hosts_per_host=hosts_per_host)
    disturb(tree, random.Random(seed), 60)
    for _ in range(60):
        moves = mending_moves(tree.members, 0.0, most=8)
        if not moves:
            break
        for id, parent in moves:
            above = tree.members.spheres.get(parent)
            assert above is None or above.member.reachable or above.member.host == tree.members.host_of(id)
            tree.opens(id, parent)
        assert all(state != "lost" or not tree.members.spheres[id].linked for id, state in tree.states().items())
    else:
        pytest.fail("it moves for ever")
    movable = {s.id for s in tree.members.spheres.values() if s.active and not s.leaving}
    for parent in tree.members.overfull:  # only where there is room for nobody
        for id in set(tree.members.children_of(parent)) & movable:
            sphere = tree.members.spheres[id]
            assert tree.members.place_for(sphere.member, moving=sphere) is None
    assert hosts_below(tree, linked=True) == {host: set(tree.members.hosts_below(host)) for host in tree.hosts()}
    for host in tree.members.crowded_hosts():  # only where no other may carry those that are too many
        crossing = [id for id in movable if tree.members.host_of(tree.members.parent_of(id)) == host]
        assert all(
            tree.members.room_abroad(tree.members.spheres[id].member, moving=tree.members.spheres[id]) is None
            for id in crossing
            if tree.members.host_of(id) != host
        )


@given(st.integers(1, 4), st.sampled_from([None, 1, 2]), st.integers())
def test_a_rebalance_from_the_top_down_makes_no_circle_and_ends_at_the_goal(
    fan_out: int, hosts_per_host: int | None, seed: int
) -> None:
    tree = Tree(fan_out, hosts_per_host=hosts_per_host)
    disturb(tree, random.Random(seed), 40)
    staying = {s.id for s in tree.members.spheres.values() if s.active and not s.leaving}
    for batch in batches(tree.members):
        for id, parent in batch:
            assert not tree.members.is_below(parent, id)
            above = tree.members.spheres.get(parent)
            own = above is None or above.member.host == tree.members.host_of(id)
            assert own or above.member.reachable
            if tree.members.parent_of(id) != parent:
                tree.opens(id, parent)
    goal = dict(move for batch in batches(tree.members) for move in batch)
    assert set(goal) == staying
    assert all(tree.members.parent_of(id) == parent for id, parent in goal.items())


# --- moves ------------------------------------------------------------------------------------------------------------


def test_children_beyond_the_fan_out_are_moved_and_nobody_else() -> None:
    tree = Tree(2)
    for _ in range(6):
        tree.joins()
    tree.ends("s-1")
    for orphan in ("s-3", "s-4"):
        tree.opens(orphan, CONTROL)
    assert list(tree.members.overfull) == [CONTROL]
    # s-3 and s-4 are leaves: one of them goes below the other
    assert mending_moves(tree.members, 0.0, most=8) == [("s-3", "s-4")]
    assert mending_moves(tree.members, 0.0, most=8) == []  # it is under way
    tree.opens("s-3", "s-4")
    assert not tree.members.overfull
    assert mending_moves(tree.members, 0.0, most=8) == []


def test_a_sphere_that_did_not_arrive_is_left_alone_for_a_while() -> None:
    tree = Tree(1)
    tree.joins()
    tree.joins()
    tree.opens("s-2", CONTROL)
    assert mending_moves(tree.members, 0.0, most=8) == [("s-1", "s-2")]
    tree.members.arrived("s-1")
    tree.members.spheres["s-1"].rests_until = 30.0
    assert mending_moves(tree.members, 29.0, most=8) == [("s-2", "s-1")]


def test_a_sphere_goes_home_to_its_host_when_there_is_room() -> None:
    tree = Tree(3)
    head = tree.joins("host-1")
    tree.opens(tree.enroll("host-1"), CONTROL)
    assert mending_moves(tree.members, 0.0, most=8) == [("s-2", head)]


@pytest.mark.parametrize("fan_out", [2, 3, 12])
def test_hosts_whose_spheres_join_in_any_order_form_a_chain(fan_out: int) -> None:
    rng = random.Random(fan_out)
    for _ in range(20):
        tree = Tree(fan_out, hosts_per_host=1)
        hosts = [f"host-{n}" for n in (0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3)]
        rng.shuffle(hosts)
        for host in hosts:
            tree.joins(host)
        assert max(map(len, chain(tree).values())) == 1
        crossing = [s for s in tree.members.spheres.values() if tree.members.host_of(s.parent) != s.member.host]
        assert len({s.member.host for s in crossing}) == 3
        assert mending_moves(tree.members, 0.0, most=32) == []
        assert len(crossing) == 3 or fan_out == 2  # one each, but where control's own host fills its places


def test_without_a_limit_every_host_hangs_where_there_is_room_first() -> None:
    tree = Tree(12)
    for host in ("host-1", "host-2", "host-3"):
        tree.joins(host)
    assert chain(tree) == {HOME: {"host-1", "host-2", "host-3"}}


def test_hosts_that_a_loss_has_left_on_control_form_a_chain_again() -> None:
    tree = Tree(12, hosts_per_host=1)
    for host in ("host-1", "host-1", "host-2", "host-2", "host-3"):
        tree.joins(host)
    assert tree.shape() == {"s-1": CONTROL, "s-2": "s-1", "s-3": "s-1", "s-4": "s-3", "s-5": "s-3"}
    tree.ends("s-1")
    for orphan in ("s-2", "s-3"):
        tree.opens(orphan, CONTROL)
    assert chain(tree) == {HOME: {"host-1", "host-2"}, "host-2": {"host-3"}}
    # host-2 carries host-3 already: the other is moved, to the end of the chain
    assert mending_moves(tree.members, 0.0, most=8) == [("s-2", "s-5")]
    assert tree.members.hosts_below("host-3") == ["host-1"]  # promised
    assert mending_moves(tree.members, 0.0, most=8) == []
    tree.opens("s-2", "s-5")
    assert chain(tree) == {HOME: {"host-2"}, "host-2": {"host-3"}, "host-3": {"host-1"}}
    assert mending_moves(tree.members, 0.0, most=8) == []


def test_a_host_that_nobody_may_carry_reaches_control_all_the_same() -> None:
    tree = Tree(12, hosts_per_host=1)
    tree.joins("host-1", address="")  # a dead end
    assert tree.members.parent_of(tree.joins("host-2")) == CONTROL
    assert mending_moves(tree.members, 0.0, most=8) == [("s-1", "s-2")]
    tree.opens("s-1", "s-2")
    assert mending_moves(tree.members, 0.0, most=8) == []


def test_a_deep_chain_of_hosts_is_no_tree_out_of_shape() -> None:
    tree = Tree(12, hosts_per_host=1)
    for n in range(9):
        tree.joins(f"host-{n + 1}")
    assert max(tree.members.levels) == 9
    assert mending_moves(tree.members, 0.0, most=8) == []
    assert dict(move for batch in batches(tree.members) for move in batch) == tree.shape()


def test_the_deepest_are_moved_up_when_that_gains_two_levels() -> None:
    tree = Tree(2)
    for _ in range(6):
        tree.joins()
    for below, id in enumerate(("s-3", "s-4", "s-5", "s-6"), 2):
        tree.opens(id, f"s-{below}")
    assert max(tree.members.levels) == 5  # 2 would do for six
    tree.opens("s-3", "s-1")
    assert mending_moves(tree.members, 0.0, most=8) == [("s-6", "s-1"), ("s-5", "s-2")]


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_ten_thousand_spheres_enroll_and_churn_in_time_that_follows_their_number() -> None:
    def seconds(count: int) -> float:
        tree, rng = Tree(12), random.Random(3)
        began = process_time()
        ids = [tree.joins(f"host-{n % 50}") for n in range(count)]
        for id in rng.sample(ids, count // 10):
            tree.ends(id)
            tree.joins(HOME)
        return process_time() - began  # of this process: whatever else the machine does

    small, large = min(seconds(1_000) for _ in range(3)), seconds(10_000)
    assert large < 40 * small  # ten times as many; N^2 would be a hundred times as much
