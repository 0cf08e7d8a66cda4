"""Which spheres should move, between two steps (N11). Pure: reads the membership, returns moves.

Two questions: what mends a tree that losses have put out of shape, with as few moves as can be; and how all spheres get
to the places that ``placement.place`` gives them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from control.membership import Membership, Sphere
from control.placement import levels, lowest_depth, place

__all__ = ["batches", "mending_moves"]

#: a sphere and its new parent
Move = tuple[str, str]

#: levels that a move of the deepest must gain
_GAIN = 2


def mending_moves(members: Membership, now: float, *, most: int) -> list[Move]:
    """Return up to ``most`` moves that mend the shape; none where it is good enough. Their places are taken.

    In this order: children beyond a node's fan-out; spheres that hang below another host while their own has room for
    them; hosts beyond those that one may carry, where another may; the deepest, where the tree is deeper than it must
    be by more than one level. No move makes a tree that needs the next one: each takes a free place, and who is moved
    for its depth gains two levels.
    """
    moves: list[Move] = []
    for find in (_surplus, _away_from_their_host, _beyond_their_hosts, _deepest):
        for sphere, parent in find(members, now):
            members.move(sphere.id, parent)
            moves.append((sphere.id, parent))
            if len(moves) == most:
                return moves
    return moves


def _movable(members: Membership, ids: Iterable[str], now: float) -> list[Sphere]:
    found = [members.spheres[id] for id in ids]
    return [s for s in found if s.active and not s.leaving and s.rests_until <= now and members.moving_to(s.id) is None]


def _surplus(members: Membership, now: float) -> Iterator[tuple[Sphere, str]]:
    """Children beyond the fan-out: those with the fewest children first, they disturb the least."""
    for parent in list(members.overfull):
        children = members.children_of(parent)
        going = sum(1 for id in children if members.moving_to(id) is not None)
        movable = _movable(members, children, now)
        movable.sort(key=lambda s: (len(members.children_of(s.id)), s.rank))
        surplus = len(children) - going - members.fan_out
        for sphere in movable:
            goal = members.place_for(sphere.member, moving=sphere) if surplus > 0 else None
            if goal is not None:
                surplus -= 1
                yield sphere, goal


def _away_from_their_host(members: Membership, now: float) -> Iterator[tuple[Sphere, str]]:
    """Spheres whose parent is on another host, but for one per host (DESIGN section 2): that one is its head."""
    heads: dict[str, Sphere] = {}
    crossing: list[Sphere] = []
    for sphere in members.spheres.values():
        if not sphere.active or members.host_of(sphere.parent) == sphere.member.host:
            continue
        if sphere.member.host == members.host:
            crossing.append(sphere)  # control itself is the head of its own host
            continue
        head = heads.setdefault(sphere.member.host, sphere)
        if head is not sphere:
            better = (sphere.level, -len(members.children_of(sphere.id)), sphere.rank)
            if better < (head.level, -len(members.children_of(head.id)), head.rank):
                heads[sphere.member.host], sphere = sphere, head
            crossing.append(sphere)
    for sphere in _movable(members, [s.id for s in crossing], now):
        room = members.room_on(sphere.member.host, moving=sphere)
        if room is not None:
            yield sphere, room[1]


def _beyond_their_hosts(members: Membership, now: float) -> Iterator[tuple[Sphere, str]]:
    """Spheres of hosts that hang on one that carries too many: the latest, and first those that carry no others."""
    for host in members.crowded_hosts():
        crossing = [s for s in members.spheres.values() if s.member.host != host == members.host_of(s.parent)]
        movable = _movable(members, [s.id for s in crossing], now)
        movable.sort(key=lambda s: s.rank, reverse=True)
        movable.sort(key=lambda s: len(members.hosts_below(s.member.host)))
        surplus = len(members.hosts_below(host)) - (members.hosts_per_host or 0)
        for sphere in movable:
            room = members.room_abroad(sphere.member, moving=sphere) if surplus > 0 else None
            if room is not None:
                surplus -= 1
                yield sphere, room[1]


def _deepest(members: Membership, now: float) -> Iterator[tuple[Sphere, str]]:
    depth = max(members.levels, default=0)
    limit = lowest_depth(members.living, members.fan_out) + 1
    if depth <= limit:
        return
    deep = [id for id, sphere in members.spheres.items() if sphere.level > limit]
    for sphere in sorted(_movable(members, deep, now), key=lambda s: (-s.level, s.rank)):
        above = members.spheres.get(sphere.parent)
        room = members.room_on(sphere.member.host, moving=sphere)
        if room is None or room[0] + 1 > sphere.level - _GAIN:
            if above is not None and above.member.host == sphere.member.host:
                continue  # it would leave its host
            room = members.room_abroad(sphere.member, moving=sphere)
        if room is not None and room[0] + 1 <= sphere.level - _GAIN:
            yield sphere, room[1]


def batches(members: Membership) -> list[list[Move]]:
    """Return the goal of a full rebalance by levels, from the top down: sphere and its parent.

    Carried out in this order no circle can come up: whoever gets children stands where it will stay.
    """
    staying = [s.member for s in members.spheres.values() if s.active and not s.leaving]
    goal = place(members.host, staying, members.fan_out, hosts_per_host=members.hosts_per_host)
    found: dict[int, list[Move]] = {}
    level = levels(goal)
    for id, parent in goal.items():
        found.setdefault(level[id], []).append((id, parent))
    return [found[level] for level in sorted(found)]
