"""Control's end of the tree: who takes part, where each is placed, and the hub at the root that runs a step's work."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches

from control.failures import Failures
from control.membership import Membership, Sphere
from control.placement import CONTROL, Member
from control.rebalance import batches, mending_moves
from spheres.children import Children
from spheres.config import PROTOCOL_VERSION, NodeConfig
from spheres.environment import environment_fingerprint
from spheres.errors import (
    ArmillaryError,
    ConfigError,
    DecodeError,
    RefusedError,
    StaleError,
    UnreachableError,
    VersionMismatchError,
)
from spheres.hub import EVALUATE, Array, Hub, Work
from spheres.lease import Lease
from spheres.numerics import Run
from spheres.segments import node_memory
from spheres.summing import Summer
from spheres.trace import Recorder
from spheres.transport import Handlers, Listener, Transport
from spheres.v1 import common_pb2, control_pb2
from spheres.v1 import work_pb2 as pb
from spheres.words import MOST_REASON, RUN_OVER, cut

__all__ = ["Tree"]

log = logging.getLogger(__name__)

#: moves that are told between two steps, at most, and seconds that training waits for their arrival
_MOST_MOVES, _MOVE_SECONDS = 32, 1.0
#: seconds that a sphere whose link has ended has to come back, before it counts as dead
_BACK_SECONDS = 3.0
#: seconds beside patience within which a sphere finds a control that came back: its longest pause, and a dial
_STRAY_SECONDS = 2.0
#: seconds without a change after which the shape is looked at, and those after which it is in any case
_SETTLE_SECONDS, _LOOK_SECONDS = 1.0, 5.0
#: seconds for which a sphere that did not arrive is left alone
_REST_SECONDS = 30.0
#: of a full rebalance: moves under way at a time, and seconds that they have
_REBALANCE_MOVES, _REBALANCE_SECONDS = 256, 5.0
#: seconds that a sphere has to send the end of its log
_LOG_SECONDS = 5.0


class Tree:
    """Mutable state: the members, and the work, the moves and the questions that are under way."""

    def __init__(
        self,
        config: NodeConfig,
        transport: Transport,
        *,
        host: str,
        term: int,
        hosts_per_host: int | None = None,
        speculate: bool = True,
    ) -> None:
        self.config, self._transport = config, transport
        self.members = Membership(host, config.fan_out, hosts_per_host=hosts_per_host, forgotten=self._forgotten)
        #: raised at each start and restore: what spheres cached of the one before is dropped (N1)
        self.term = term
        self.hub = Hub(config, CONTROL, incarnation=term, memory=node_memory(config.wire))
        self._summer = Summer()
        self.hub.hooks.run, self.hub.hooks.broken = self._summer.run, self._broken
        self.hub.watchdog.enabled = speculate
        self.failures = Failures()
        self.hub.hooks.sealed = self._sealed
        self.hub.hooks.failed = self._failed
        self.hub.hooks.reported = self._reported
        self.hub.hooks.changed = self._changed
        self.hub.hooks.resized = self._resized
        self.hub.hooks.logged = self._logged
        lease = Lease(config.patience_seconds)
        self.children = Children(self.hub, environment=environment_fingerprint(), lease=lease)
        self.children.vet = self._vet
        #: what every node did, where the run is traced
        self.recorder: Recorder | None = None
        if config.trace:
            hub = self.hub
            self.recorder = Recorder(CONTROL, work=lambda: (hub.work.step, hub.work.kind == EVALUATE))
            hub.phases.recorder = self.children.recorder = self.recorder
        self._keeping: asyncio.Task[None] | None = None
        #: told when a sphere joins or is lost, wherever in the tree: event, sphere, reason
        self.changed: Callable[[str, str, str], None] = lambda _event, _sphere, _reason: None
        #: told who is told to leave by command, and whether at once; whether it will see to that itself
        self.dismissed: Callable[[str, bool], bool] = lambda _sphere, _at_once: False
        #: told what the run cannot go on with, whatever it does now
        self.fail: Callable[[ArmillaryError], None] = lambda _error: None
        self._open = True
        # sphere -> when its link ended, while it has no other; and those that may come back after the end
        self._lost_at: dict[str, float] = {}
        self._absent: dict[str, float] = {}
        # until when spheres may come that an earlier control had; who they are is not known here
        self._strays_until = 0.0
        self._done: asyncio.Future[None] | None = None
        self._arrivals = asyncio.Event()
        self._listener: Listener | None = None
        self._states: dict[str, pb.StateReport] = {}
        self._asked: set[str] = set()
        self._request_id = 0
        # request -> who waits for the end of a log
        self._logs: dict[int, asyncio.Future[list[str]]] = {}
        # first and latest change of the tree since its shape was looked at
        self._changed_at: tuple[float, float] | None = None
        self.address = ""

    # ---- life

    async def listen(self, address: str) -> None:
        """Take spheres. Raises ConfigError where the address cannot be bound."""
        loop = asyncio.get_running_loop()
        self.hub.hooks.clock, self.hub.hooks.call_later = loop.time, loop.call_later
        handlers = Handlers(self.children.work, self.children.heartbeat, self.enroll)
        self._listener = await self._transport.listen(address, handlers)
        self._keeping = loop.create_task(self.children.keep(fence=lambda _: None, look=self.hub.watch))
        self._keeping.add_done_callback(self._kept_no_more)
        self.address = self.hub.address = self._listener.address
        self.hub.renewed([])

    def came_back(self) -> None:
        """An earlier control was killed that had listened here: for a while its spheres may look for this one."""
        self._strays_until = asyncio.get_running_loop().time() + self.config.patience_seconds + _STRAY_SECONDS

    async def aclose(self) -> None:
        """End every link; spheres that were not told to stop will look for control until they give up."""
        self._open = False
        if self._keeping is not None:
            self._keeping.cancel()
        self._summer.close()
        self.children.drain(RefusedError(RUN_OVER))
        if self._listener is not None:
            await self._listener.aclose()

    @property
    def side_by_side(self) -> Run:
        """Does work in two threads, for a third one that waits."""
        return self._summer.wait

    def stop_spheres(self, reason: str) -> None:
        """Tell every sphere to end."""
        self._open = False
        self._absent = self._between_parents()
        self.hub.direct(pb.Directive(kind=pb.DIRECTIVE_KIND_STOP, reason=reason))

    def _between_parents(self) -> dict[str, float]:
        """Return sphere -> since when it has had no way to control, by its own loss or that of one above it.

        Those who have just enrolled are on their way too.
        """
        found = self.members.coming(asyncio.get_running_loop().time() - _BACK_SECONDS)
        for top, when in self._lost_at.items():
            for id in (top, *self._below(top)):
                if not self.spheres[id].leaving:
                    found[id] = max(when, found.get(id, 0.0))
        return found

    def _below(self, top: str) -> Iterator[str]:
        """Yield all that hang below a sphere."""
        due = [top]
        while due:
            below = self.members.children_of(due.pop())
            due += below
            yield from below

    async def all_gone(self, timeout: float) -> bool:
        """Wait until no child is left, nor one that lost its link just before may come; False after ``timeout``.

        ``timeout`` in seconds; longer where spheres of an earlier control may still come.
        """
        now = asyncio.get_running_loop().time
        timeout = max(timeout, self._strays_until + _BACK_SECONDS - now())
        try:
            async with asyncio.timeout(timeout):
                await self.until(lambda: not self.hub.children)
                # Between two parents, by a move or a loss, a sphere has not heard that the run is over: it comes back,
                # and is told then.
                while (left := self._nobody_comes_after() - now()) > 0:
                    await self.until(lambda: bool(self.hub.children), left)
                    await self.until(lambda: not self.hub.children)
        except TimeoutError:
            return False
        return True

    def _nobody_comes_after(self) -> float:
        """Return the time until which spheres may come that have not heard that the run is over."""
        return max(self._strays_until, max(self._absent.values(), default=0.0) + _BACK_SECONDS)

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
            raise RefusedError(RUN_OVER)
        member = Member(
            id=request.sphere_id,
            host=request.host,
            zone=request.zone,
            address=request.address,
            relay=request.relay,
        )
        now = asyncio.get_running_loop().time()
        sphere = self.members.enroll(
            member, pid=request.pid, term=self.term, now=now, request_id=request.request_id, agent=request.agent
        )
        path = [self._ancestor(id) for id in self.members.path_to(sphere.id)]
        return control_pb2.EnrollSphereResponse(
            sphere_id=sphere.id,
            incarnation=sphere.incarnation,
            configuration=self.config.to_proto(),
            path_ids=[node.id for node in path],
            path_addresses=[node.address for node in path],
            path_incarnations=[node.incarnation for node in path],
            term=self.term,
        )

    def _vet(self, hello: pb.Hello) -> None:
        """Raise StaleError where the id has been given to a later life: then the sphere enrolls anew."""
        sphere = self.spheres.get(hello.sphere_id)
        if sphere is not None and hello.incarnation < sphere.incarnation:
            raise StaleError(f"{hello.sphere_id} is another sphere's by now: enroll anew")

    def _ancestor(self, id: str) -> pb.Ancestor:
        if id == CONTROL:
            return pb.Ancestor(id=CONTROL, incarnation=self.hub.incarnation, address=self.address)
        sphere = self.spheres[id]
        return pb.Ancestor(id=id, incarnation=sphere.incarnation, address=sphere.member.address)

    @property
    def spheres(self) -> dict[str, Sphere]:
        """All spheres that are known, by id."""
        return self.members.spheres

    @property
    def living(self) -> int:
        """Spheres that have a way to control."""
        return self.members.living

    @property
    def computing(self) -> int:
        """Spheres that can compute and have a way to control."""
        return round(self.hub.ledger.capacity)

    async def wait_for(self, spheres: int) -> None:
        """Wait until so many spheres, relays included, have a way to control."""
        await self.until(lambda: self.computing + self.members.relays >= spheres)
        ledger = self.hub.ledger
        if len(ledger.shares) < 2:
            return
        # Of a run that goes on: without them other environments would do their part, to other bits (N22).
        if not await self.until(lambda: not ledger.shares.keys() - ledger.capacities.keys(), _BACK_SECONDS):
            log.warning("some spheres of this run's mixed tree have not come back: others take their microbatches over")

    async def until(self, condition: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait until ``condition`` holds; it is asked whenever a sphere has come, gone, moved or answered.

        Returns whether it holds: False after so many seconds.
        """
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    self._arrivals.clear()
                    await self._arrivals.wait()
        except TimeoutError:
            return False
        return True

    def _resized(self) -> None:
        self._arrivals.set()

    def report_of(self, sphere: str) -> tuple[float, common_pb2.SphereReport] | None:
        """Return the age in seconds of a sphere's newest report, and the report."""
        found = self.children.reports.get(sphere)
        return None if found is None else (asyncio.get_running_loop().time() - found[0], found[1])

    def names(self) -> list[str]:
        """Return the ids of all spheres, in the order in which people count."""
        return sorted(self.spheres, key=lambda name: self.spheres[name].rank[-1])

    def parent_of(self, sphere: str) -> str:
        """Return the parent that a sphere is linked to, or else where control has placed it."""
        return self.members.parent_of(sphere)

    def shape(self) -> dict[str, str]:
        """Return sphere -> parent of those that have a way to control."""
        return {sphere.id: sphere.parent for sphere in self.spheres.values() if sphere.active}

    def state_of(self, sphere: str) -> str:
        """Return joining, active, draining or lost: active is who has an open way to control."""
        return self.members.state_of(sphere)

    def _changed(self, change: pb.SphereChange) -> None:
        if not self.members.change(change):
            return
        if change.lost:
            self._asked.discard(change.sphere_id)  # what it was asked went with its link
            self.failures.lost(change)
            # A sphere that steps aside ends its link too, and comes back at once.
            asyncio.get_running_loop().call_later(_BACK_SECONDS, lambda: self._halt(self.failures.dead()))
        else:
            self.failures.back(change)
        now = asyncio.get_running_loop().time()
        self._changed_at = (now if self._changed_at is None else self._changed_at[0], now)
        if not change.lost:
            self._lost_at.pop(change.sphere_id, None)
        elif change.sphere_id in self.spheres:  # it may be one too many to be remembered
            self._lost_at[change.sphere_id] = now
        if not self._open:
            # A sphere ends after those below it, and after word of that has gone up: else they have not heard of it.
            orphans = (id for id in self._below(change.sphere_id) if self.spheres[id].linked) if change.lost else ()
            self._absent |= dict.fromkeys(orphans, now)
            self._absent = {id: when for id, when in self._absent.items() if not self._is_back(id)}
            self._arrivals.set()
            return
        if not change.lost and self.spheres[change.sphere_id].leaving:
            # its link broke before it could hear of that, or after: told twice is told once
            self.hub.direct(self._leave(change.sphere_id, pb.DIRECTIVE_KIND_DRAIN))
        self._arrivals.set()
        self.changed("sphere_lost" if change.lost else "sphere_joined", change.sphere_id, change.reason)

    def _is_back(self, id: str) -> bool:
        sphere = self.spheres.get(id)
        return sphere is None or sphere.active

    def _forgotten(self, sphere: str) -> None:
        self.children.reports.pop(sphere, None)
        self._lost_at.pop(sphere, None)

    # ---- by command

    def drain(self, sphere: str, reason: str) -> None:
        """Let a sphere finish its step and leave. Idempotent. Raises ConfigError where no such one can be reached."""
        self._dismiss(sphere, cut(reason, MOST_REASON) or "drained by request", at_once=False)

    def terminate(self, sphere: str, reason: str) -> None:
        """End a sphere at once. Idempotent. Raises ConfigError where no such one can be reached."""
        self._dismiss(sphere, cut(reason, MOST_REASON) or "terminated by request", at_once=True)

    def _dismiss(self, id: str, reason: str, *, at_once: bool) -> None:
        sphere = self._known(id)
        if sphere.leaving and not sphere.active:
            return  # it has gone as it was told
        if not self.dismissed(id, at_once) and not sphere.active:
            raise ConfigError(f"{id} is {sphere.state} and cannot be told; see control-cli spheres")
        self.members.leave(id, reason)
        log.info("%s is told to leave: %s", id, reason)
        self.hub.direct(self._leave(id, pb.DIRECTIVE_KIND_STOP if at_once else pb.DIRECTIVE_KIND_DRAIN))

    def _leave(self, id: str, kind: pb.DirectiveKind.ValueType) -> pb.Directive:
        return pb.Directive(target_sphere_id=id, kind=kind, reason=self.spheres[id].reason)

    def _known(self, id: str) -> Sphere:
        sphere = self.spheres.get(id)
        if sphere is None:
            near = get_close_matches(id, self.spheres, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "see control-cli spheres"
            raise ConfigError(f"there is no sphere {id!r}; {hint}")
        return sphere

    async def log_of(self, sphere: str, lines: int) -> list[str]:
        """Ask a sphere for the end of its log. Raises ConfigError where it cannot be asked, UnreachableError."""
        if not self._known(sphere).active:
            raise ConfigError(f"{sphere} is {self.state_of(sphere)} and cannot be asked; see control-cli spheres")
        self._request_id += 1
        number = self._request_id
        answer: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        self._logs[number] = answer
        self.hub.direct(
            pb.Directive(target_sphere_id=sphere, kind=pb.DIRECTIVE_KIND_REPORT_LOG, request_id=number, lines=lines)
        )
        try:
            async with asyncio.timeout(_LOG_SECONDS):
                return await answer
        except TimeoutError:
            raise UnreachableError(f"{sphere} did not send its log in {_LOG_SECONDS:g} s; try again") from None
        finally:
            del self._logs[number]

    def _logged(self, report: pb.LogReport) -> None:
        answer = self._logs.get(report.request_id)
        if answer is not None and not answer.done():
            answer.set_result(list(report.lines))

    # ---- the shape, between two steps (N11)

    async def tidy(self) -> None:
        """Where losses have put the tree out of shape, move some spheres; waits a moment for them. Mostly does nothing.

        Looked at once changes have settled, and now and then where they never do; one bounded batch at a time.
        """
        if self._changed_at is None:
            return
        now = asyncio.get_running_loop().time()
        first, latest = self._changed_at
        if now - latest < _SETTLE_SECONDS and now - first < _LOOK_SECONDS:
            return
        self._changed_at = None
        moves = mending_moves(self.members, now, most=_MOST_MOVES)
        if not moves:
            return
        late = await self._move(moves, _MOVE_SECONDS, "the tree is out of shape")
        log.info("moved %d spheres to other parents; %d more did not arrive in time", len(moves) - len(late), len(late))
        if len(moves) == _MOST_MOVES:  # there may be more: at the next boundary
            self._changed_at = (-_LOOK_SECONDS, -_LOOK_SECONDS)

    async def rebalance(self) -> tuple[list[str], list[str]]:
        """Place all spheres anew, from the top down. Returns who has moved, and who has not arrived in time."""
        moved: list[str] = []
        late: list[str] = []
        self.hub.ledger.shares = {}  # of a mixed tree: who does how much is decided anew too
        for level in batches(self.members):
            due = [(id, parent) for id, parent in level if self.members.parent_of(id) != parent]
            for start in range(0, len(due), _REBALANCE_MOVES):
                batch = [move for move in due[start : start + _REBALANCE_MOVES] if self._can_move(*move)]
                for id, parent in batch:
                    self.members.move(id, parent)
                missing = await self._move(batch, _REBALANCE_SECONDS, "rebalanced by request")
                late += missing
                moved += [id for id, _ in batch if id not in missing]
        return moved, late

    def _can_move(self, id: str, parent: str) -> bool:
        """Whether both are still there, and the new parent does not hang below because it was late itself."""
        above, sphere = self.spheres.get(parent), self.spheres.get(id)
        there = parent == CONTROL or (above is not None and above.active)
        return sphere is not None and sphere.active and there and not self.members.is_below(parent, id)

    async def _move(self, moves: Iterable[tuple[str, str]], timeout: float, reason: str) -> set[str]:
        """Tell spheres to move, and wait until they have. Returns those that have not arrived in time."""
        goal = dict(moves)
        for id, parent in goal.items():
            self.hub.direct(
                pb.Directive(
                    target_sphere_id=id,
                    kind=pb.DIRECTIVE_KIND_MOVE,
                    parent=self._ancestor(parent),
                    reason=reason,
                )
            )
        await self.until(lambda: not any(self.members.moving_to(id) is not None for id in goal), timeout)
        late = {id for id, parent in goal.items() if self.members.parent_of(id) != parent}
        for id in late:
            self.members.arrived(id)  # given up: its place is free again
            if id in self.spheres:
                self.spheres[id].rests_until = asyncio.get_running_loop().time() + _REST_SECONDS
        return late

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

    def _broken(self, error: BaseException) -> None:
        log.error("a sum failed", exc_info=error)
        self._halt(ArmillaryError(f"summing gradients failed: {error!r}"))

    def _kept_no_more(self, keeping: asyncio.Task[None]) -> None:
        """Leases are not kept any more (N10): who goes silent from now on would be waited for for ever."""
        if keeping.cancelled() or (cause := keeping.exception()) is None:
            return
        log.error("leases are not kept any more", exc_info=cause)
        error = ArmillaryError(f"leases are not kept any more: {type(cause).__name__}: {cause} (not expected)")
        self._halt(error)
        self.fail(error)

    def _failed(self, failure: pb.TaskFailure) -> None:
        log.warning("task failed on %s, microbatch %d: %s", failure.sphere_id, failure.microbatch, failure.error)
        self._halt(self.failures.raised(failure))

    def _halt(self, error: ArmillaryError | None) -> None:
        if error is not None and self._done is not None and not self._done.done():
            self._done.set_exception(error)

    # ---- states for a checkpoint

    async def states(self, timeout: float) -> list[pb.StateReport]:
        """Ask every sphere for its state; those that do not answer in time are left out."""
        self._request_id += 1
        self._states = {}
        wanted = self._asked = {sphere.id for sphere in self.spheres.values() if sphere.active}
        self.hub.direct(pb.Directive(kind=pb.DIRECTIVE_KIND_REPORT_STATE, request_id=self._request_id))
        if not await self.until(lambda: wanted <= self._states.keys(), timeout):
            log.warning("no state from %s", ", ".join(sorted(wanted - self._states.keys())))
        return [self._states[name] for name in sorted(self._states)]

    def _reported(self, report: pb.StateReport) -> None:
        if report.request_id == self._request_id:
            self._states[report.report.sphere_id] = report
            self.children.reports[report.report.sphere_id] = (asyncio.get_running_loop().time(), report.report)
            self._arrivals.set()
