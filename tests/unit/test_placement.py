from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.placement import CONTROL, Member, Tree, levels, natural, place

HOME = "host-0"


def spheres(count: int, host: str = HOME, *, first: int = 1, zone: str = "", address: str = "a:1") -> list[Member]:
    return [Member(f"s-{n}", host, zone, address=address) for n in range(first, first + count)]


def per_level(tree: Tree) -> list[int]:
    counted = Counter(levels(tree).values())
    return [counted[level] for level in sorted(counted)]


def crossings(tree: Tree, members: list[Member]) -> Counter[str]:
    """Host -> edges that leave it towards the root."""
    host = {CONTROL: HOME, **{member.id: member.host for member in members}}
    return Counter(host[child] for child, parent in tree.items() if host[child] != host[parent])


def complete_depth(count: int, fan_out: int) -> int:
    depth = 0
    while count > 0:
        depth += 1
        count -= fan_out**depth
    return depth


@pytest.mark.parametrize(
    ("count", "fan_out", "expected"),
    [
        (0, 4, []),
        (3, 1, [1, 1, 1]),
        (4, 2, [2, 2]),
        (6, 2, [2, 4]),
        (8, 3, [3, 5]),
        (12, 3, [3, 9]),
        (12, 12, [12]),
        (13, 12, [12, 1]),
    ],
)
def test_on_one_host_it_is_the_complete_tree(count: int, fan_out: int, expected: list[int]) -> None:
    assert per_level(place(HOME, spheres(count), fan_out)) == expected


def test_the_complete_tree_is_filled_in_the_order_people_count() -> None:
    tree = place(HOME, spheres(12), 3)
    assert [child for child in tree if tree[child] == CONTROL] == ["s-1", "s-2", "s-3"]
    assert [child for child in tree if tree[child] == "s-3"] == ["s-10", "s-11", "s-12"]


def test_three_hosts_send_one_sum_each() -> None:
    members = spheres(4) + spheres(4, "host-1", first=5) + spheres(4, "host-2", first=9)
    tree = place(HOME, members, 12)
    assert crossings(tree, members) == {"host-1": 1, "host-2": 1}
    assert per_level(tree) == [6, 6]


def test_hosts_form_a_chain_when_each_may_carry_one() -> None:
    members = [m for n in range(4) for m in spheres(4, f"host-{n}", first=1 + 4 * n)]
    tree = place(HOME, members, 12, hosts_per_host=1)
    host = {CONTROL: HOME, **{member.id: member.host for member in members}}
    edges = {(host[child], host[parent]) for child, parent in tree.items() if host[child] != host[parent]}
    assert edges == {("host-1", "host-0"), ("host-2", "host-1"), ("host-3", "host-2")}
    assert set(crossings(tree, members).values()) == {1}


def test_a_tall_host_is_hung_high() -> None:
    # at fan-out 2 both of control's places would go to its own host; host-1 alone has three levels
    members = spheres(6) + spheres(7, "host-1", first=7)
    assert len(per_level(place(HOME, members, 2))) == 3


def test_a_head_prefers_its_own_zone() -> None:
    members = [
        *spheres(1, "host-1", first=1, zone="east"),
        *spheres(1, "host-2", first=2, zone="west"),
        *spheres(1, "host-3", first=3, zone="west"),
        *spheres(1, "host-4", first=4, zone="east"),
    ]
    tree = place(HOME, members, 2)
    assert (tree["s-3"], tree["s-4"]) == ("s-2", "s-1")


def test_relays_stand_above() -> None:
    members = [
        Member("s-1", HOME, address="a:1"),
        Member("s-2", HOME, address="a:1"),
        Member("s-3", HOME, address="a:1", relay=True),
    ]
    assert place(HOME, members, 1) == {"s-3": CONTROL, "s-1": "s-3", "s-2": "s-1"}


def test_who_cannot_be_dialled_has_no_children() -> None:
    members = spheres(3, address="") + spheres(2, first=4)
    tree = place(HOME, members, 2)
    assert {tree["s-4"], tree["s-5"]} == {CONTROL}
    assert {tree["s-1"], tree["s-2"], tree["s-3"]} == {"s-4", "s-5"}


def test_who_listens_on_loopback_has_children_of_its_own_host_only() -> None:
    local = spheres(2, address="127.0.0.1:1") + spheres(3, "host-1", first=3, address="localhost:1")
    others = spheres(2, "host-2", first=6)
    tree = place(HOME, local + others, 2)
    assert tree == {
        "s-1": CONTROL,
        "s-6": CONTROL,
        "s-2": "s-1",
        "s-7": "s-6",
        "s-3": "s-6",
        "s-4": "s-3",
        "s-5": "s-3",
    }
    # nobody of another host can be dialled: control takes a head of each, however many they are
    lonely = [member for n in range(4) for member in spheres(2, f"host-{n}", first=1 + 2 * n, address="[::1]:1")]
    tree = place(HOME, lonely, 2)
    assert [tree[f"s-{n}"] for n in (3, 5, 7)] == [CONTROL] * 3
    assert [tree[f"s-{n}"] for n in (4, 6, 8)] == ["s-3", "s-5", "s-7"]


def test_where_nobody_can_be_dialled_control_takes_all() -> None:
    assert set(place(HOME, spheres(5, "host-1", address=""), 2).values()) == {CONTROL}


def test_ids_must_be_unique_and_fan_out_positive() -> None:
    for members in (spheres(1) + spheres(1), [Member(CONTROL, HOME)]):
        with pytest.raises(ValueError, match="unique"):
            place(HOME, members, 2)
    with pytest.raises(ValueError, match="fan_out"):
        place(HOME, spheres(1), 0)


def test_levels() -> None:
    tree = place(HOME, spheres(7), 2)
    assert levels(tree) == {"s-1": 1, "s-2": 1, "s-3": 2, "s-4": 2, "s-5": 2, "s-6": 2, "s-7": 3}
    for broken in ({"a": "b", "b": "a"}, {"a": "gone"}):
        with pytest.raises(ValueError, match="does not reach"):
            levels(broken)


def test_ten_thousand_spheres_in_a_chain_are_no_recursion() -> None:
    tree = place(HOME, spheres(10_000), 1)
    assert max(levels(tree).values()) == 10_000


def test_ids_are_ordered_as_people_count() -> None:
    assert sorted(["s-10", "x", "s-2.10", "s-9", "s-2.9", "s-2"], key=natural) == [
        "s-2",
        "s-2.9",
        "s-2.10",
        "s-9",
        "s-10",
        "x",
    ]


# --- properties -------------------------------------------------------------------------------------------------------


@st.composite
def memberships(draw: st.DrawFn, addresses: tuple[str, ...] = ("a:1",)) -> list[Member]:
    count = draw(st.integers(0, 40))
    return [
        Member(
            f"s-{n}",
            draw(st.sampled_from(["host-0", "host-1", "host-2", "host-3", f"alone-{n}"])),
            draw(st.sampled_from(["", "east"])),
            draw(st.booleans()),
            draw(st.sampled_from(addresses)),
        )
        for n in range(count)
    ]


fan_outs = st.integers(1, 5)


@given(memberships(), fan_outs, st.sampled_from([None, 1, 2]))
def test_every_sphere_reaches_control_within_the_fan_out(
    members: list[Member], fan_out: int, hosts_per_host: int | None
) -> None:
    tree = place(HOME, members, fan_out, hosts_per_host=hosts_per_host)
    assert set(tree) == {member.id for member in members}
    levels(tree)  # raises on a cycle or an unknown parent
    assert max(Counter(tree.values()).values(), default=0) <= fan_out


@given(memberships(), st.integers(2, 5))
def test_one_edge_leaves_each_host_and_none_enters_controls(members: list[Member], fan_out: int) -> None:
    tree = place(HOME, members, fan_out)
    assert crossings(tree, members) == dict.fromkeys({member.host for member in members} - {HOME}, 1)


@given(memberships(), st.integers(2, 5))
def test_a_chain_of_hosts_has_no_host_with_two_below_it(members: list[Member], fan_out: int) -> None:
    host = {CONTROL: HOME, **{member.id: member.host for member in members}}
    tree = place(HOME, members, fan_out, hosts_per_host=1)
    below = Counter(host[parent] for child, parent in tree.items() if host[child] != host[parent])
    assert set(below.values()) <= {1}


@given(memberships(addresses=("a:1", "a:1", "")), fan_outs)
def test_without_some_addresses_all_reach_control_and_only_it_is_overfull(members: list[Member], fan_out: int) -> None:
    tree = place(HOME, members, fan_out)
    assert set(levels(tree)) == {member.id for member in members}
    children = Counter(tree.values())
    assert not any(children[member.id] > (fan_out if member.address else 0) for member in members)
    places = fan_out * (1 + sum(1 for member in members if member.address))
    assert (children[CONTROL] > fan_out) == (len(members) > places)
    if children[CONTROL] > fan_out:
        assert all(children[member.id] == fan_out for member in members if member.address)


@given(memberships(addresses=("a:1", "127.0.0.1:1", "127.0.0.1:1", "")), fan_outs, st.sampled_from([None, 1, 2]))
def test_nobody_is_placed_where_it_cannot_dial_and_only_control_is_overfull(
    members: list[Member], fan_out: int, hosts_per_host: int | None
) -> None:
    tree = place(HOME, members, fan_out, hosts_per_host=hosts_per_host)
    assert set(levels(tree)) == {member.id for member in members}
    known = {member.id: member for member in members}
    for child, parent in tree.items():
        assert parent == CONTROL or known[parent].reachable or known[parent].host == known[child].host
    children = Counter(tree.values())
    assert not any(children[member.id] > (fan_out if member.address else 0) for member in members)


@given(memberships(addresses=("a:1", "127.0.0.1:1", "")), fan_outs, st.integers())
def test_the_order_of_the_arguments_does_not_matter(members: list[Member], fan_out: int, seed: int) -> None:
    shuffled = list(members)
    random.Random(seed).shuffle(shuffled)
    assert list(place(HOME, shuffled, fan_out).items()) == list(place(HOME, members, fan_out).items())


@given(st.integers(0, 60), st.integers(0, 60), st.integers(2, 6))
def test_spheres_at_home_and_spheres_alone_make_a_tree_as_shallow_as_can_be(
    home: int, alone: int, fan_out: int
) -> None:
    members = spheres(home) + [Member(f"r-{n}", f"remote-{n}", address="a:1") for n in range(alone)]
    tree = place(HOME, members, fan_out)
    best = complete_depth(home + alone, fan_out)
    # spheres of control's own host cannot stand below others, which may cost a level
    assert max(levels(tree).values(), default=0) <= best + (1 if home and alone else 0)
