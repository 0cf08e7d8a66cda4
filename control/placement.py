"""Who is whose parent: spheres and fan-out in, tree out (DESIGN section 2).

A pure function of its arguments, whatever their order: the goal of a full rebalance. Who is alive, where a newcomer
goes, and when spheres move, is decided elsewhere.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from spheres.exposure import is_loopback

__all__ = ["CONTROL", "Member", "Tree", "levels", "lowest_depth", "natural", "order", "place"]

#: the id of the root
CONTROL = "control"

#: id -> id of the parent; the root has no entry
Tree = dict[str, str]


@dataclass(frozen=True, slots=True)
class Member:
    """What placement knows of a sphere."""

    id: str
    #: machine; spheres with one ``host`` share its memory and network card
    host: str
    zone: str = ""
    #: sums and passes on only, so it stands above those that compute
    relay: bool = False
    #: where children can dial it; without one it can only be a leaf, and with one on loopback only its own host can
    address: str = ""

    @property
    def reachable(self) -> bool:
        """Whether spheres of other hosts can dial it."""
        return bool(self.address) and not is_loopback(self.address.rpartition(":")[0])


def place(
    control_host: str,
    spheres: Iterable[Member],
    fan_out: int,
    *,
    hosts_per_host: int | None = None,
) -> Tree:
    """Return the tree: id -> parent's id, in breadth-first order.

    One host's spheres stand below one of them (the host's head), so one edge leaves each host; those on control's
    host stand below control, alone they are the breadth-first complete tree of the fan-out. No node has more than
    ``fan_out`` children, the tree is as shallow as filling it level by level gets it, and ties go to the same zone.
    ``hosts_per_host`` limits how many other hosts hang on one host: 1 makes a chain of hosts.

    A sphere on loopback has children of its own host only. Where too few spheres can be dialled for all that, the rules
    give way so that everyone reaches control: first that of one edge per host and last, where there are no places at
    all, the fan-out, of control alone. Raises ValueError for ids that are not unique.
    """
    members = sorted(spheres, key=order)
    ids = {member.id for member in members}
    if len(ids) < len(members) or CONTROL in ids:
        raise ValueError(f"ids of spheres must be unique, and {CONTROL!r} is the root's")
    if fan_out < 1 or (hosts_per_host is not None and hosts_per_host < 1):
        raise ValueError("fan_out and hosts_per_host must be at least 1")
    local = [member for member in members if member.host == control_host]
    groups = _groups([member for member in members if member.host != control_host], fan_out)

    def fill(depth: int) -> _Filling:
        return _Filling(control_host, fan_out, hosts_per_host).fill(local, groups, depth)

    # without a limit nothing is urgent, so this one places whatever can be placed
    best = fill(len(members) + 1)
    if not best.left:
        for depth in range(lowest_depth(len(members), fan_out), best.depth):
            found = fill(depth)
            if not found.left:
                best = found
                break
    best.take_the_rest()
    if best.overfull and len(members) <= fan_out * (1 + sum(1 for member in members if member.reachable)):
        # there are places enough once hosts do not count
        best = _Filling(control_host, fan_out, None)
        best.fill([_anywhere(member, control_host) for member in members], [], len(members))
    return best.tree


def levels(tree: Mapping[str, str]) -> dict[str, int]:
    """Return id -> level, 1 for control's children. Raises ValueError for a tree that does not reach control."""
    found = {CONTROL: 0}
    for start in tree:
        path = [start]
        while path[-1] not in found:
            parent = tree.get(path[-1])
            if parent is None or len(path) > len(tree):
                raise ValueError(f"{start} does not reach {CONTROL}")
            path.append(parent)
        base = found[path[-1]]
        for distance, member in enumerate(reversed(path[:-1]), 1):
            found[member] = base + distance
    del found[CONTROL]
    return found


def order(member: Member) -> tuple[bool, bool, bool, list[tuple[int, str]]]:
    """Who comes first is nearer to the root."""
    return (not member.address, not member.reachable, not member.relay, natural(member.id))


def natural(id: str) -> list[tuple[int, str]]:
    """Return a key by which ids are in the order in which people count: s-2 before s-10."""
    # (0, text) and (number, ""): parts of ids are compared with their like
    parts = [(int(part) + 1, "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", id)]
    return [*parts, (0, id)]


def lowest_depth(count: int, fan_out: int) -> int:
    """Return the levels of the complete tree of so many spheres."""
    depth, places, width = 0, 0, 1
    while places < count:
        depth, width = depth + 1, width * fan_out
        places += width
    return depth


def _anywhere(member: Member, control_host: str) -> Member:
    """Return a sphere as if on control's host, where hosts do not count: children only where all can dial it."""
    return replace(member, host=control_host, address=member.address if member.reachable else "")


@dataclass(frozen=True, slots=True)
class _Group:
    """The spheres of one host: the head first; ``height`` levels when nothing else stands between them."""

    members: tuple[Member, ...]
    height: int


def _groups(members: list[Member], fan_out: int) -> list[_Group]:
    """Return the hosts other than control's; who has no place below its host's head is a group of its own."""
    hosts: dict[str, list[Member]] = {}
    for member in members:
        hosts.setdefault(member.host, []).append(member)
    groups: list[_Group] = []
    for group in hosts.values():
        addressable = sum(1 for member in group if member.address)
        room = addressable * fan_out + 1
        groups += [_Group((member,), 1) for member in group[room:]]
        groups.append(_Group(tuple(group[:room]), _height(addressable, len(group[:room]), fan_out)))
    # the tallest are hardest to place; those that bring no places come last
    groups.sort(key=lambda group: (-group.height, order(group.members[0])))
    return groups


def _height(addressable: int, count: int, fan_out: int) -> int:
    height, width = 1, 1
    while count > width:
        parents = min(width, addressable)
        addressable, count, width = addressable - parents, count - width, parents * fan_out
        height += 1
    return height


class _Filling:
    """Fills a tree level by level. Mutable state: the tree, the free places of the present level, who waits."""

    def __init__(self, control_host: str, fan_out: int, hosts_per_host: int | None) -> None:
        self._control_host = control_host
        self._fan_out = fan_out
        self._hosts_per_host = hosts_per_host
        self._hosts_below: dict[str, int] = {}
        self._members: dict[str, Member] = {}
        # id -> those of its group that wait for a place; one queue for the whole group
        self._queues: dict[str, deque[Member]] = {}
        # free places as the parent's id, once per place: on control's host for its own spheres, there for anyone's,
        # and on others by zone
        self._inside: deque[str] = deque()
        self._home: deque[str] = deque()
        self._abroad: dict[str, deque[str]] = {}
        self._placed: list[str] = []
        self.tree: Tree = {}
        self.depth = 0
        self.left: list[Member] = []

    def fill(self, local: Sequence[Member], groups: Sequence[_Group], depth: int) -> _Filling:
        """Place what can be placed in ``depth`` levels; the rest is in ``left``.

        At each level: first the spheres of groups whose head is placed, then groups that fit at no deeper level, then
        spheres of control's host and more groups, those that anyone can dial first: they bring places for the others.
        """
        home_zone = local[0].zone if local else ""
        waiting_local = deque(local)
        waiting = deque(group for group in groups if group.members[0].reachable)
        closed = deque(group for group in groups if not group.members[0].reachable)
        parents: list[str] = [CONTROL]
        for level in range(1, depth + 1):
            self._inside, self._home, self._abroad, self._placed = deque(), deque(), {}, []
            for parent in parents:
                self._offer(parent)
            # the first of either groups is always the tallest left
            for those in (waiting, closed):
                while those and level + those[0].height > depth and self._place_head(those[0], home_zone):
                    those.popleft()
            # of those that only their own host can dial one is enough here: below it the others of control's host fit
            while waiting_local and self._home:
                first = len(waiting_local) == len(local)
                if not waiting_local[0].reachable and not (first and waiting_local[0].address):
                    break
                self._put(waiting_local.popleft(), self._home.popleft())
            while waiting and self._place_head(waiting[0], home_zone):
                waiting.popleft()
            while waiting_local and self._inside:
                self._put(waiting_local.popleft(), self._inside.popleft())
            while closed and self._place_head(closed[0], home_zone):
                closed.popleft()
            while waiting_local and self._home:
                self._put(waiting_local.popleft(), self._home.popleft())
            if not self._placed:
                break
            self.depth, parents = level, self._placed
        self.left = [*waiting_local, *(member for group in (*waiting, *closed) for member in group.members)]
        for queue in self._queues.values():
            while queue:
                self.left.append(queue.popleft())
        return self

    def take_the_rest(self) -> None:
        """Place those left at the shallowest free places of any host, then on control beyond its fan-out."""
        children = Counter(self.tree.values())
        # parents with the order in which they were placed: those that anyone can dial, and those that one host can
        places: dict[str, deque[tuple[int, str]]] = {"": deque()}

        def offer(number: int, parent: str) -> None:
            host = "" if parent == CONTROL or self._members[parent].reachable else self._members[parent].host
            places.setdefault(host, deque()).append((number, parent))

        for number, parent in enumerate([CONTROL, *self.tree]):
            offer(number, parent)
        for member in sorted(self.left, key=order):
            found = []
            for waiting in (places[""], places.get(member.host, deque())):
                while waiting and children[waiting[0][1]] >= self._room(waiting[0][1]):
                    waiting.popleft()
                found += [waiting[0]] if waiting else []
            parent = min(found)[1] if found else CONTROL
            self._put(member, parent)
            children[parent] += 1
            offer(len(self.tree), member.id)
        self.left = []

    @property
    def overfull(self) -> bool:
        return sum(1 for parent in self.tree.values() if parent == CONTROL) > self._fan_out

    def _room(self, parent: str) -> int:
        return self._fan_out if parent == CONTROL or self._members[parent].address else 0

    def _offer(self, parent: str) -> None:
        """Give the places of ``parent`` to its own group first, the rest to anyone of this level."""
        room = self._room(parent)
        if parent == CONTROL or self._members[parent].host == self._control_host:
            anyones = parent == CONTROL or self._members[parent].reachable
            (self._home if anyones else self._inside).extend([parent] * room)
            return
        queue = self._queues[parent]
        inside = min(room, len(queue))
        for _ in range(inside):
            member = queue.popleft()
            self._queues[member.id] = queue
            self._put(member, parent)
        if self._members[parent].reachable:
            self._abroad.setdefault(self._members[parent].zone, deque()).extend([parent] * (room - inside))

    def _place_head(self, group: _Group, home_zone: str) -> bool:
        """Place a group's head at this level if it can be; the others follow at the next levels."""
        head, *others = group.members
        # elsewhere before control's own host: its network card has the most to carry
        near = [self._home] if home_zone == head.zone else []
        for places in (self._abroad.get(head.zone, deque()), *near, *self._abroad.values(), self._home):
            while places:
                parent = places[0]
                host = self._control_host if places is self._home else self._members[parent].host
                below = self._hosts_below.get(host, 0)
                if self._hosts_per_host is not None and below >= self._hosts_per_host:
                    if places is self._home:
                        break  # full for other hosts, not for its own spheres
                    places.popleft()
                    continue
                places.popleft()
                self._hosts_below[host] = below + 1
                self._queues[head.id] = deque(others)
                self._put(head, parent)
                return True
        return False

    def _put(self, member: Member, parent: str) -> None:
        self._members[member.id] = member
        self.tree[member.id] = parent
        self._placed.append(member.id)
