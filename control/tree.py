"""Control's end of the tree: who takes part, where each is placed, and the hub at the root that runs a step's work."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from control.failures import Failures
from control.placement import Member, ancestors, place_newcomer
from spheres.children import Children
from spheres.config import PROTOCOL_VERSION, NodeConfig
from spheres.environment import environment_fingerprint
from spheres.errors import DecodeError, GradientError, RefusedError, VersionMismatchError
from spheres.hub import Array, Hub, Work
from spheres.lease import Lease
from spheres.transport import Handlers, Listener, Transport
from spheres.v1 import common_pb2, control_pb2
from spheres.v1 import work_pb2 as pb

__all__ = ["Sphere", "Tree"]

log = logging.getLogger(__name__)

CONTROL = "control"

#: seconds that spheres on their way to another parent have, before nobody can compute what a task failed on
_ELSEWHERE_SECONDS = 1.0


@dataclass
class Sphere:
    """A sphere as control sees it."""

    member: Member
    incarnation: int
    pid: int
    relay: bool
    #: has had a link
    joined: bool = False

    @property
    def id(self) -> str:
        return self.member.id

    def enrolled_report(self) -> common_pb2.SphereReport:
        """What is known of it before its first report."""
        return common_pb2.SphereReport(
            sphere_id=self.id,
            incarnation=self.incarnation,
            host=self.member.host,
            pid=self.pid,
            address=self.member.address,
        )


class Tree:
    """Mutable state: the members, their parents, and the work that is under way."""

    def __init__(
        self,
        config: NodeConfig,
        transport: Transport,
        *,
        host: str,
        term: int,
        speculate: bool = True,
    ) -> None:
        self.config, self._transport, self._host = config, transport, host
        #: raised at each start and restore: what spheres cached of the one before is dropped (N1)
        self.term = term
        self.hub = Hub(config, CONTROL, incarnation=term)
        self.hub.watchdog.enabled = speculate
        self.failures = Failures()
        self.hub.hooks.sealed = self._sealed
        self.hub.hooks.failed = self._failed
        self.hub.hooks.stuck = self._stuck
        self.hub.hooks.reported = self._reported
        self.hub.hooks.changed = self._changed
        self.hub.hooks.resized = self._resized
        lease = Lease(config.patience_seconds)
        self.children = Children(self.hub, environment=environment_fingerprint(), lease=lease)
        self._keeping: asyncio.Task[None] | None = None
        self.spheres: dict[str, Sphere] = {}
        self.parents: dict[str, str] = {}
        # sphere -> incarnation and session of its open link, and its parent
        self._links: dict[str, tuple[tuple[int, int], str]] = {}
        #: told when a sphere joins or is lost, wherever in the tree: event, sphere, reason
        self.changed: Callable[[str, str, str], None] = lambda _event, _sphere, _reason: None
        self._requests: dict[str, str] = {}
        self._open = True
        self._done: asyncio.Future[None] | None = None
        self._arrivals = asyncio.Event()
        self._listener: Listener | None = None
        self._states: dict[str, pb.StateReport] = {}
        self._asked: set[str] = set()
        self._request_id = 0
        self.address = ""

    # ---- life

    async def listen(self, address: str) -> None:
        """Take spheres. Raises ConfigError where the address cannot be bound."""
        loop = asyncio.get_running_loop()
        self.hub.hooks.clock, self.hub.hooks.call_later = loop.time, loop.call_later
        self._keeping = loop.create_task(self.children.keep(fence=lambda _: None, look=self.hub.watch))
        handlers = Handlers(self.children.work, self.children.heartbeat, self.enroll)
        self._listener = await self._transport.listen(address, handlers)
        self.address = self.hub.address = self._listener.address
        self.hub.renewed([])

    async def aclose(self) -> None:
        """End every link; spheres that were not told to stop will look for control until they give up."""
        self._open = False
        if self._keeping is not None:
            self._keeping.cancel()
        self.children.drain(RefusedError("the run is over"))
        if self._listener is not None:
            await self._listener.aclose()

    def stop_spheres(self, reason: str) -> None:
        """Tell every sphere to end."""
        self._open = False
        self.hub.direct(pb.Directive(kind=pb.DIRECTIVE_KIND_STOP, reason=reason))

    async def all_gone(self, timeout: float) -> bool:
        """Wait until no child is left; False where some still are after ``timeout`` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while self.hub.children:
                    self._arrivals.clear()
                    await self._arrivals.wait()
        except TimeoutError:
            return False
        return True

    # ---- membership

    async def enroll(self, data: bytes) -> bytes:
        """Serve EnrollSphere."""
        try:
            request = control_pb2.EnrollSphereRequest.FromString(data)
        except Exception as error:
            raise DecodeError(f"{len(data)} bytes that are no EnrollSphereRequest") from error
        return self.grant(request).SerializeToString()

    def grant(self, request: control_pb2.EnrollSphereRequest) -> control_pb2.EnrollSphereResponse:
        """Give a sphere its id, incarnation and place. Idempotent by request_id."""
        if request.protocol_version != PROTOCOL_VERSION:
            raise VersionMismatchError(
                f"the sphere speaks protocol {request.protocol_version}, control speaks {PROTOCOL_VERSION}; "
                "install the same release on both"
            )
        if not self._open:
            raise RefusedError("the run is over")
        known = self._requests.get(request.request_id)
        sphere = self.spheres.get(known) if known else None
        if sphere is None:
            sphere = self._add(request)
        path = [CONTROL, *reversed([p for p in ancestors(self.parents, sphere.id) if p != CONTROL])]
        return control_pb2.EnrollSphereResponse(
            sphere_id=sphere.id,
            incarnation=sphere.incarnation,
            configuration=self.config.to_proto(),
            path_ids=path,
            path_addresses=[self.address if p == CONTROL else self.spheres[p].member.address for p in path],
            path_incarnations=[self.hub.incarnation if p == CONTROL else self.spheres[p].incarnation for p in path],
            term=self.term,
        )

    def _add(self, request: control_pb2.EnrollSphereRequest) -> Sphere:
        before = self.spheres.get(request.sphere_id) if request.sphere_id else None
        name = request.sphere_id or self._new_id()
        member = Member(id=name, host=request.host, zone=request.zone, address=request.address, relay=request.relay)
        # Across control's own restarts the term keeps incarnations rising (N1).
        incarnation = max(before.incarnation if before else 0, self.term * 1_000_000) + 1
        sphere = Sphere(member, incarnation, request.pid, request.relay)
        places = {id: parent for id, parent in self.parents.items() if id != name}
        members = [s.member for s in self.spheres.values() if s.id != name]
        self.parents[name] = place_newcomer(self._host, places, members, member, self.config.fan_out)
        self.spheres[name] = sphere
        if request.request_id:
            self._requests[request.request_id] = name
        return sphere

    def _new_id(self) -> str:
        number = len(self.spheres) + 1
        while f"s-{number}" in self.spheres:
            number += 1
        return f"s-{number}"

    @property
    def computing(self) -> int:
        """Spheres that can compute and have a way to control."""
        return round(self.hub.ledger.capacity)

    async def wait_for(self, spheres: int) -> None:
        """Wait until so many spheres, relays included, have a way to control."""
        while self.computing + sum(1 for s in self.spheres.values() if s.relay) < spheres:
            self._arrivals.clear()
            await self._arrivals.wait()

    def _resized(self) -> None:
        self._arrivals.set()

    def report_of(self, sphere: str) -> tuple[float, common_pb2.SphereReport] | None:
        """Return the age in seconds of a sphere's newest report, and the report."""
        found = self.children.reports.get(sphere)
        return None if found is None else (asyncio.get_running_loop().time() - found[0], found[1])

    def names(self) -> list[str]:
        """Return the ids of all spheres, in the order in which people count."""
        return sorted(self.spheres, key=lambda name: (len(name), name))

    def parent_of(self, sphere: str) -> str:
        """Return the parent that a sphere is linked to, or else where control has placed it."""
        link = self._links.get(sphere)
        return link[1] if link is not None else self.parents.get(sphere, "")

    def shape(self) -> dict[str, str]:
        """Return sphere -> parent of those that are active."""
        return {name: self.parent_of(name) for name in self.spheres if self.state_of(name) == "active"}

    def state_of(self, sphere: str) -> str:
        """Return joining, active or lost: active is who has an open way to control."""
        link = self._links.get(sphere)
        if link is None:
            return "lost" if self.spheres[sphere].joined else "joining"
        above = link[1]
        for _ in self.spheres:
            if above == CONTROL:
                return "active"
            link = self._links.get(above)
            if link is None:
                break
            above = link[1]
        return "lost"

    def _changed(self, change: pb.SphereChange) -> None:
        order, known = (change.incarnation, change.session), self._links.get(change.sphere_id)
        if change.lost:
            # Whoever lost its parent may have a newer link by now: then this is the news of the older one.
            if known is None or known[0] != order:
                return
            del self._links[change.sphere_id]
            self._asked.discard(change.sphere_id)  # what it was asked went with its link
            self._halt(self.failures.lost(change))
        else:
            if known is not None and known[0] >= order:
                return
            self._links[change.sphere_id] = (order, change.parent_id)
            self.failures.back(change)
            self.parents[change.sphere_id] = change.parent_id
            if (sphere := self.spheres.get(change.sphere_id)) is not None:
                sphere.joined = True
        if self._open:
            self.changed("sphere_lost" if change.lost else "sphere_joined", change.sphere_id, change.reason)
        self._arrivals.set()

    # ---- work

    def compute(self, step: int, kind: common_pb2.WorkKind.ValueType, gradient: Array | None) -> asyncio.Future[None]:
        """Have one step's work done on the published weights; its sum is in ``gradient``, the rest in the hub.

        The future is done when everything has come. It raises GradientError where a task failed, and waits for as long
        as there is no sphere.
        """
        self._done = asyncio.get_running_loop().create_future()
        self.failures.start(step)
        self.hub.start(Work(self.term, step, kind), gradient)
        return self._done

    def _sealed(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _failed(self, failure: pb.TaskFailure) -> None:
        log.warning("task failed on %s, microbatch %d: %s", failure.sphere_id, failure.microbatch, failure.error)
        self._halt(self.failures.raised(failure))
        self._stuck()

    def _stuck(self) -> None:
        """Nobody can compute what is owed: where that lasts, and not for want of spheres, the run halts."""
        step = self.hub.work.step

        def look() -> None:
            if self.hub.ledger.stuck and self.hub.work.step == step:
                self._halt(self.failures.nobody())

        if self.hub.ledger.stuck:
            asyncio.get_running_loop().call_later(_ELSEWHERE_SECONDS, look)

    def _halt(self, error: GradientError | None) -> None:
        if error is not None and self._done is not None and not self._done.done():
            self._done.set_exception(error)

    # ---- states for a checkpoint

    async def states(self, timeout: float) -> list[pb.StateReport]:
        """Ask every sphere for its state; those that do not answer in time are left out."""
        self._request_id += 1
        self._states = {}
        wanted = self._asked = {s for s in self.spheres if self.state_of(s) == "active"}
        self.hub.direct(pb.Directive(kind=pb.DIRECTIVE_KIND_REPORT_STATE, request_id=self._request_id))
        try:
            async with asyncio.timeout(timeout):
                while not wanted <= self._states.keys():
                    self._arrivals.clear()
                    await self._arrivals.wait()
        except TimeoutError:
            log.warning("no state from %s", ", ".join(sorted(wanted - self._states.keys())))
        return [self._states[name] for name in sorted(self._states)]

    def _reported(self, report: pb.StateReport) -> None:
        if report.request_id == self._request_id:
            self._states[report.report.sphere_id] = report
            self.children.reports[report.report.sphere_id] = (asyncio.get_running_loop().time(), report.report)
            self._arrivals.set()
