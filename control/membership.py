"""Who takes part and where: all that control knows of its spheres. Pure: it is told what happens, and when.

| enrolled | its link | links of all above | told to leave | state |
|---|---|---|---|---|
| yes | had none yet | any | any | joining |
| any | open | open | no | active |
| any | open | open | yes | draining |
| any | open | one has ended | any | lost |
| any | ended | any | any | lost |

| event | what follows |
|---|---|
| enrolment | joining, with a place that counts as taken; an id that is known begins a new life |
| a link opened, later than the newest known | that link; a stranger is taken up: an earlier control had enrolled it |
| a link opened, not later | nothing: old news |
| a link ended that is the newest known | lost, and so are all below until they have another way |
| any other link ended | nothing: there is a newer one |
| told to leave | takes no more children |
| told to move | a place at the new parent is taken until it arrives, or is given up |

*aside* is no state of this table: a local process that keeps failing has no sphere (``control.lives``).

Every event costs what changes below that sphere, never the number of all spheres.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from control.placement import CONTROL, Member, order
from spheres.v1 import common_pb2
from spheres.v1 import work_pb2 as pb

__all__ = ["Membership", "Sphere"]

#: lost spheres that are remembered, the latest, besides two for each that was ever active at one time: a whole tree may
#: lose its way to control and come back
_MOST_LOST = 1_000
#: seconds for which a place is kept for a sphere that has enrolled: it may load a large task, or have died
_JOINING_SECONDS = 600.0
#: incarnations of one term: across control's own restarts the term keeps them rising (N1)
_LIVES_PER_TERM = 1_000_000_000


@dataclass
class Sphere:
    """A sphere as control sees it."""

    member: Member
    incarnation: int
    pid: int
    #: the parent that it is linked to, or else where control has placed it
    parent: str = CONTROL
    #: incarnation and session of its newest link, open or ended
    link: tuple[int, int] = (0, 0)
    #: whether that link is open
    linked: bool = False
    #: has had a link in this life
    joined: bool = False
    leaving: bool = False
    #: why its link has ended, or why it leaves
    reason: str = ""
    #: distance from control, 0 where there is no way, not even a planned one
    level: int = 0
    #: whether open links lead from it to control
    active: bool = False
    #: not to be moved before: seconds of control's clock
    rests_until: float = 0.0
    request_id: str = ""
    #: what it says it is written in, and of its numeric environment; the latter not before its first link
    agent: str = ""
    environment: str = ""
    rank: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.rank = order(self.member)

    @property
    def id(self) -> str:
        return self.member.id

    @property
    def state(self) -> str:
        """Joining, active, draining or lost."""
        if self.active:
            return "draining" if self.leaving else "active"
        return "lost" if self.joined else "joining"

    def enrolled_report(self) -> common_pb2.SphereReport:
        """What is known of it before its first report."""
        return common_pb2.SphereReport(
            sphere_id=self.id,
            incarnation=self.incarnation,
            host=self.member.host,
            pid=self.pid,
            address=self.member.address,
        )


class Membership:
    """Mutable state: the spheres, who hangs below whom, places that are promised, and where there is room."""

    def __init__(
        self,
        host: str,
        fan_out: int,
        *,
        hosts_per_host: int | None = None,
        forgotten: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.host, self.fan_out, self.hosts_per_host = host, fan_out, hosts_per_host
        self.spheres: dict[str, Sphere] = {}
        #: active spheres, those that are told to leave included
        self.living = 0
        #: relays among them
        self.relays = 0
        #: nodes with more children than the fan-out
        self.overfull: dict[str, None] = {}
        #: active spheres per level
        self.levels: Counter[int] = Counter()
        #: told the id of a sphere that is no longer known
        self._forgotten = forgotten
        # parent -> those that hang there, by an open link or, before they had one, by their placement
        self._below: dict[str, dict[str, None]] = {}
        # sphere -> the parent that it is told to move to; and how many are on their way to each
        self._moving: dict[str, str] = {}
        self._coming: Counter[str] = Counter()
        # edges between hosts, promised ones included: by their child as host above and host below, and counted
        self._crossing: dict[tuple[str, bool], tuple[str, str]] = {}
        self._hosts_below: dict[str, Counter[str]] = {}
        # those that joined and are not active, in the order in which that happened
        self._lost: dict[str, None] = {}
        self._most_living = 0
        self._joining: deque[tuple[float, str, int]] = deque()
        self._requests: dict[str, str] = {}
        self._numbers = self._lives = 0
        # nodes with room, the shallowest first: by host, for its own spheres; for others' those that they can dial
        # ("reachable"), by host, by zone, and all; what no longer holds is dropped on top
        self._free: dict[tuple[str, str], list[tuple[int, Any, str]]] = {}
        self._entries = 0
        self._offer(CONTROL)

    def __repr__(self) -> str:
        return f"<Membership {self.living} of {len(self.spheres)} spheres, {len(self._moving)} moving>"

    # ---- what is known

    def state_of(self, id: str) -> str:
        return self.spheres[id].state

    def parent_of(self, id: str) -> str:
        """Return the parent that a sphere is linked to, or else where control has placed it; "" for a stranger."""
        sphere = self.spheres.get(id)
        return "" if sphere is None else sphere.parent

    def reason_of(self, id: str) -> str:
        """Return why a sphere is lost or leaves, in words; "" where there is nothing to say."""
        sphere = self.spheres[id]
        if sphere.linked and not sphere.active:
            return f"{sphere.parent} has no way to control"
        return sphere.reason if sphere.leaving or not sphere.linked else ""

    def path_to(self, id: str) -> list[str]:
        """Return the nodes from control to a sphere's parent; from where the way is broken, control alone."""
        path: list[str] = []
        parent = self.spheres[id].parent
        while parent != CONTROL:
            above = self.spheres.get(parent)
            if above is None or not above.level:
                return [CONTROL]
            path.append(parent)
            parent = above.parent
        return [CONTROL, *reversed(path)]

    def is_below(self, id: str, top: str) -> bool:
        """Whether ``top`` is ``id`` or one of the nodes between it and control."""
        for _ in range(len(self.spheres) + 1):
            if id == top:
                return True
            sphere = self.spheres.get(id)
            if sphere is None:
                return False
            id = sphere.parent
        return False

    def children_of(self, id: str) -> list[str]:
        """Return those that hang below a node."""
        return list(self._below.get(id, ()))

    def host_of(self, id: str) -> str:
        """Return the host of a node; "" for a stranger."""
        sphere = self.spheres.get(id)
        return self.host if id == CONTROL else "" if sphere is None else sphere.member.host

    def hosts_below(self, host: str) -> list[str]:
        """Return the other hosts that hang on a host, those included that are on their way there."""
        return list(self._hosts_below.get(host, ()))

    def crowded_hosts(self) -> list[str]:
        """Return the hosts on which more others hang than may."""
        most = self.hosts_per_host
        return [] if most is None else [host for host, below in self._hosts_below.items() if len(below) > most]

    def moving_to(self, id: str) -> str | None:
        """Return where a sphere is told to move to, as long as it has not arrived."""
        return self._moving.get(id)

    # ---- events

    def enroll(
        self, member: Member, *, pid: int, term: int, now: float, request_id: str = "", agent: str = ""
    ) -> Sphere:
        """Take a sphere in: give it an id where it has none, an incarnation and a place. Idempotent by request_id."""
        known = self.spheres.get(self._requests.get(request_id, ""))
        if known is not None:
            return known
        self._expire(now)
        id = member.id or self._new_id(term)
        before = self.spheres.get(id)
        if before is not None:
            self._take_off(before)
            self._drop(before)
        self._lives += 1
        member = replace(member, id=id)
        sphere = Sphere(member, term * _LIVES_PER_TERM + self._lives, pid, request_id=request_id, agent=agent)
        if before is not None:
            sphere.link = before.link
        self.spheres[id] = sphere
        if request_id:
            self._requests[request_id] = id
        self._joining.append((now, id, sphere.incarnation))
        self._hang(sphere, self.place_for(member) or CONTROL)
        return sphere

    def change(self, change: pb.SphereChange) -> bool:
        """Take a link that opened or ended; whether that was news."""
        sphere, link = self.spheres.get(change.sphere_id), (change.incarnation, change.session)
        if change.lost:
            if sphere is None or not sphere.linked or sphere.link != link:
                return False
            sphere.linked, sphere.reason = False, sphere.reason if sphere.leaving else change.reason
            self._take_off(sphere)
            while len(self._lost) > _MOST_LOST + 2 * self._most_living:
                self._forget(self.spheres[next(iter(self._lost))])
            return True
        if sphere is not None and (link <= sphere.link or change.incarnation < sphere.incarnation):
            return False
        if sphere is None or change.HasField("member"):
            sphere = self._take_up(change, sphere)
        self.arrived(sphere.id)
        sphere.link, sphere.incarnation = link, change.incarnation
        sphere.linked = sphere.joined = True
        self._hang(sphere, change.parent_id)
        if not sphere.active:
            self._lost.setdefault(sphere.id)
        return True

    def leave(self, id: str, reason: str) -> None:
        """A sphere is told to leave."""
        sphere = self.spheres[id]
        sphere.leaving, sphere.reason = True, reason

    def move(self, id: str, parent: str) -> None:
        """A sphere is told to move: its place is taken from now on."""
        self.arrived(id)
        self._moving[id] = parent
        self._coming[parent] += 1
        self._cross(id, parent, planned=True)

    def arrived(self, id: str) -> None:
        """A move is over, or given up."""
        parent = self._moving.pop(id, None)
        if parent is not None:
            self._uncross(id, planned=True)
            self._coming[parent] -= 1
            if not self._coming[parent]:
                del self._coming[parent]
            self._offer(parent)

    def _take_up(self, change: pb.SphereChange, known: Sphere | None) -> Sphere:
        """Take up what a link says of its child."""
        said = change.member
        member = Member(change.sphere_id, said.host, said.zone, said.relay, change.address)
        if known is None:
            known = self.spheres[change.sphere_id] = Sphere(member, change.incarnation, said.pid)
        else:
            self._take_off(known)  # what it counts for may be another now
            known.member, known.pid, known.rank = member, said.pid, order(member)
        known.agent, known.environment = said.agent or known.agent, said.environment_fingerprint
        return known

    def _new_id(self, term: int) -> str:
        """Return an id that no life of this run has had: those of later terms carry the term."""
        while True:
            self._numbers += 1
            id = f"s-{self._numbers}" if term <= 1 else f"s-{term}.{self._numbers}"
            if id not in self.spheres:
                return id

    def coming(self, since: float) -> dict[str, float]:
        """Return who has enrolled after ``since`` and has had no link, and when each has."""
        found: dict[str, float] = {}
        for when, id, incarnation in reversed(self._joining):
            if when < since:
                break
            sphere = self.spheres.get(id)
            if sphere is not None and sphere.incarnation == incarnation and not sphere.joined:
                found[id] = when
        return found

    def _expire(self, now: float) -> None:
        """Give up on those that enrolled long ago and have not come."""
        while self._joining and self._joining[0][0] < now - _JOINING_SECONDS:
            _, id, incarnation = self._joining.popleft()
            sphere = self.spheres.get(id)
            if sphere is not None and sphere.incarnation == incarnation and not sphere.joined:
                self._forget(sphere)

    def _forget(self, sphere: Sphere) -> None:
        self._take_off(sphere)
        self._drop(sphere)
        del self.spheres[sphere.id]
        self._forgotten(sphere.id)

    def _drop(self, sphere: Sphere) -> None:
        """Drop what is noted of a life outside of the sphere itself."""
        self._lost.pop(sphere.id, None)
        self.arrived(sphere.id)
        if self._requests.get(sphere.request_id) == sphere.id:
            del self._requests[sphere.request_id]

    # ---- the tree

    def _hang(self, sphere: Sphere, parent: str) -> None:
        self._take_off(sphere)
        sphere.parent = parent
        below = self._below.setdefault(parent, {})
        below[sphere.id] = None
        self._cross(sphere.id, parent, planned=False)
        if len(below) > self.fan_out:
            self.overfull[parent] = None
        self._renew(sphere)

    def _take_off(self, sphere: Sphere) -> None:
        """Take a sphere, with all below it, out of the ways to control."""
        below = self._below.get(sphere.parent, {})
        if sphere.id in below:
            del below[sphere.id]
            self._uncross(sphere.id, planned=False)
            if len(below) <= self.fan_out:
                self.overfull.pop(sphere.parent, None)
            if not below:
                del self._below[sphere.parent]
            self._offer(sphere.parent)
        self._renew(sphere)

    def _cross(self, id: str, parent: str, *, planned: bool) -> None:
        """Note an edge that leads from one host to another."""
        above, below = self.host_of(parent), self.host_of(id)
        if above and above != below:
            self._crossing[id, planned] = above, below
            self._hosts_below.setdefault(above, Counter())[below] += 1

    def _uncross(self, id: str, *, planned: bool) -> None:
        above, below = self._crossing.pop((id, planned), ("", ""))
        if above:
            counted = self._hosts_below[above]
            counted[below] -= 1
            if not counted[below]:
                del counted[below]
            if not counted:
                del self._hosts_below[above]

    def _renew(self, top: Sphere) -> None:
        """Carry down what follows from the place of ``top``: levels, and who is active."""
        waiting = [top]
        while waiting:
            sphere = waiting.pop()
            level, active = 0, False
            if sphere.id in self._below.get(sphere.parent, ()):
                above = self.spheres.get(sphere.parent)
                if sphere.parent == CONTROL:
                    level, active = 1, sphere.linked
                elif above is not None and above.level:
                    level, active = above.level + 1, sphere.linked and above.active
            if (level, active) == (sphere.level, sphere.active):
                continue  # and so are all below: a circle of old news ends here
            self._count(sphere, -1)
            sphere.level, sphere.active = level, active
            self._count(sphere, 1)
            if active:
                self._lost.pop(sphere.id, None)
            elif sphere.joined:
                self._lost.setdefault(sphere.id)
            self._offer(sphere.id)
            waiting += [self.spheres[id] for id in self._below.get(sphere.id, ())]

    def _count(self, sphere: Sphere, by: int) -> None:
        if sphere.active:
            self.living += by
            self._most_living = max(self._most_living, self.living)
            self.relays += by * sphere.member.relay
            self.levels[sphere.level] += by
            if not self.levels[sphere.level]:
                del self.levels[sphere.level]

    # ---- where there is room

    def place_for(self, member: Member, *, moving: Sphere | None = None) -> str | None:
        """Return the parent for a newcomer, or for one that is to move; None where nobody has room.

        The shallowest free place on its own host; where that has none, the shallowest anywhere, in its own zone first
        and, if there is one, on a host that may carry one more (``hosts_per_host``). Never below one that is lost or
        leaves, nor on another host below one whose address is loopback, nor, for one that moves, below itself or
        another that moves (N11).
        """
        own = self._shallowest(("host", member.host), moving)
        if own is not None:
            return own[1]
        if self.hosts_per_host is not None and (allowed := self.room_abroad(member, moving=moving)) is not None:
            return allowed[1]
        best, near = self._shallowest(("", ""), moving), self._shallowest(("zone", member.zone), moving)
        if best is None:
            return None
        return near[1] if near is not None and near[0] == best[0] else best[1]

    def room_on(self, host: str, *, moving: Sphere | None = None) -> tuple[int, str] | None:
        """Return level and id of the shallowest node on a host that has room."""
        return self._shallowest(("host", host), moving)

    def room_abroad(self, member: Member, *, moving: Sphere | None = None) -> tuple[int, str] | None:
        """Return level and id of the shallowest node with room on a host that ``member``'s may hang on.

        Ties go to the same zone. Asked for one sphere per host, as a rule, so a look at every host is not dear.
        """
        most = self.hosts_per_host
        if most is None:
            return self._shallowest(("", ""), moving)
        found = []
        for kind, host in list(self._free):
            others = self._hosts_below.get(host, {}).keys() - {member.host}
            own = host == member.host
            if kind != ("host" if own else "reachable") or (not own and len(others) >= most):
                continue
            room = self._shallowest((kind, host), moving)
            if room is not None:
                level, id = room
                zone, rank = ("", ()) if id == CONTROL else (self.spheres[id].member.zone, self.spheres[id].rank)
                found.append((level, zone != member.zone, rank, id))
        return (min(found)[0], min(found)[-1]) if found else None

    def _steady(self, id: str, moving: Sphere) -> bool:
        """Whether neither ``moving`` nor another that is told to move stands between ``id`` and control."""
        while id != CONTROL:
            if id == moving.id or id in self._moving:
                return False
            id = self.spheres[id].parent
        return True

    def _room(self, id: str) -> int:
        return self.fan_out - len(self._below.get(id, ())) - self._coming[id]

    def _offer(self, id: str) -> None:
        """Note that a node may have room."""
        if self._room(id) <= 0:
            return
        if id == CONTROL:
            entry, keys = (0, (), id), [("host", self.host), ("reachable", self.host), ("", "")]
        else:
            sphere = self.spheres.get(id)
            if sphere is None or not sphere.level or not sphere.member.address or sphere.leaving:
                return
            entry = (sphere.level, sphere.rank, id)
            keys = [("host", sphere.member.host)]
            if sphere.member.reachable:
                keys += [("reachable", sphere.member.host), ("zone", sphere.member.zone), ("", "")]
        for key in keys:
            heapq.heappush(self._free.setdefault(key, []), entry)
        self._entries += len(keys)
        if self._entries > 1_000 + 20 * len(self.spheres):  # most say the same again
            for heap in self._free.values():
                heap[:] = sorted({entry[2]: entry for entry in heap if self._holds(entry)}.values())
            self._free = {key: heap for key, heap in self._free.items() if heap}
            self._entries = sum(map(len, self._free.values()))

    def _holds(self, entry: tuple[int, Any, str]) -> bool:
        level, rank, id = entry
        if self._room(id) <= 0:
            return False
        if id == CONTROL:
            return True
        sphere = self.spheres.get(id)
        return sphere is not None and (sphere.level, sphere.rank) == (level, rank) and not sphere.leaving

    def _shallowest(self, key: tuple[str, str], moving: Sphere | None) -> tuple[int, str] | None:
        heap = self._free.get(key, [])
        passed_over: list[tuple[int, Any, str]] = []
        found = None
        while heap:
            level, _, id = entry = heap[0]
            if not self._holds(entry):
                heapq.heappop(heap)
                self._entries -= 1
            elif moving is not None and not self._steady(id, moving):
                passed_over.append(heapq.heappop(heap))
            else:
                found = (level, id)
                break
        for entry in passed_over:
            heapq.heappush(heap, entry)
        if not heap:
            self._free.pop(key, None)
        return found
