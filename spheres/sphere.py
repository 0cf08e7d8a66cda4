"""One sphere: enrolls with control, loads the task, then is a hub between its parent and its children until the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import sys
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from time import monotonic_ns
from typing import Any, TypeVar

from spheres.children import Children
from spheres.config import PROTOCOL_VERSION, NodeConfig
from spheres.environment import environment_fingerprint, resident_bytes
from spheres.errors import (
    ArmillaryError,
    FingerprintError,
    LinkClosedError,
    RefusedError,
    StaleError,
    TaskError,
    UnreachableError,
    WrongRunError,
)
from spheres.exposure import is_every_address, is_loopback
from spheres.hub import EVALUATE, Hub
from spheres.lease import Lease
from spheres.parent import Fingerprints, Parent
from spheres.segments import node_memory
from spheres.summing import Summer
from spheres.task import Task, data_fingerprint, described, load_task, task_fingerprint
from spheres.tensors import aligned_zeros
from spheres.trace import Recorder
from spheres.transport import Handlers, Link, Listener, Transport, first_end
from spheres.v1 import common_pb2, control_pb2
from spheres.v1 import work_pb2 as pb
from spheres.words import RUN_OVER, cut
from spheres.worker import Array, Worker

__all__ = ["Sphere", "SphereOptions"]

log = logging.getLogger(__name__)

T = TypeVar("T")

_AGENT = f"python {sys.version_info.major}.{sys.version_info.minor}"
#: seconds between two looks of a sphere that leaves at whether it is needed still
_LOOK_SECONDS = 0.05
#: seconds that a sphere waits for its children to end before it ends itself, and those that its last words have to go
#: up. Control waits longer than the first.
_FAREWELL_SECONDS, _FLUSH_SECONDS = 3.0, 1.0
#: seconds for which the task's state may wait for a unit that is still in compute between two steps
_STATE_SECONDS = 0.5
#: seconds after which a sphere that stays when the run is over asks control again
_ASK_SECONDS = 10.0
#: of a task's state as JSON, and of what is said of one that cannot be had
_MOST_STATE_BYTES, _MOST_WHY_BYTES = 1 << 20, 4_096


@dataclass(frozen=True)
class SphereOptions:
    """What a sphere is started with."""

    #: host:port of control
    control: str
    #: host:port to take children on; port 0 chooses one; empty takes none
    listen: str = "127.0.0.1:0"
    #: host:port under which children reach it, where that is another
    advertise: str = ""
    zone: str = ""
    #: sums and passes on only
    relay: bool = False
    #: seconds without a way to control after which the sphere ends
    orphan_timeout: float = 60.0
    #: stay when the run is over, or control is gone for that long, and take part again once there is something to do
    hold: bool = False
    #: this host's name, for placement
    host: str = ""
    #: whether idle nodes may compute what late ones have in compute; tests switch it off, since it hides deadlocks
    speculate: bool = True
    #: in place of the fingerprint of this process's numeric environment; tests give spheres different ones
    environment: str = ""
    #: what a trace's times are read from, in nanoseconds; tests give spheres clocks that differ
    clock: Callable[[], int] = monotonic_ns


class Sphere:
    """The life of one sphere. ``task`` is given by tests; otherwise it is loaded by the run's configuration.

    ``make_worker`` makes what computes; the simulation's knows no thread. ``link_changed`` is told when a link to a
    parent has come up, and when it is gone.
    """

    def __init__(
        self,
        options: SphereOptions,
        transport: Transport,
        *,
        task: Task | None = None,
        make_worker: Callable[[NodeConfig, Task, Callable[[int], Array]], Worker] = Worker,
        log_lines: Callable[[int], list[str]] = lambda _: [],
        link_changed: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self._options, self._transport, self._task = options, transport, task
        self._make_worker, self._log_lines = make_worker, log_lines
        self._link_changed = link_changed
        # where it listens, and what others dial to reach it
        self._listening = self._address = ""
        # the number that control's name stood for when this sphere enrolled
        self._control = ""
        self._leaving: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        # every sphere was told to end, and this one has nothing left to do
        self._over = False
        # it waits between two runs, and what it had said of that last
        self._holding, self._said = False, ""
        self._warned_of_state = self._told_of_address = False
        #: whether the command shall begin anew: with ``hold``, when a run is over that it took part in
        self.anew = False
        #: set once it has its place and serves children
        self.ready = asyncio.Event()
        self.hub: Hub | None = None
        self.parent: Parent | None = None
        self._children: Children | None = None
        self._worker: Worker | None = None

    def stop(self) -> None:
        """End: links are closed, children go to their fallbacks, work in hand is given up."""
        self._stop.set()

    def drain(self, reason: str) -> None:
        """Finish the step in hand, hand children over, then end. A second call changes nothing."""
        if self._leaving is None:
            self._leaving = asyncio.get_running_loop().create_task(self._leave(reason))

    async def run(self) -> None:
        """Take part until told to stop. Raises what made that impossible.

        With ``hold`` until this one is told to stop, or ``anew`` is set: then begin in a process whose memory is new.
        """
        options = self._options
        listener: Listener | None = None
        try:
            if options.listen:
                listener = await self._transport.listen(options.listen, Handlers(self._work, self._heartbeat))
                self._listening = listener.address
            while not self._stop.is_set():
                why = ""
                try:
                    await self._take_part()
                    if self._over and self._holds:
                        why = RUN_OVER
                except StaleError as error:
                    log.warning("enrolling anew: %s", error)
                except (UnreachableError, RefusedError) as error:
                    if self._stop.is_set() or not (self._holds and _may_pass(error)):
                        raise
                    why = str(error)
                if why:
                    await self._hold(why)
        finally:
            for task in (self._leaving, self._ending):
                if task is not None:
                    task.cancel()
            if listener is not None:
                await listener.aclose()
            await self._transport.aclose()

    @property
    def _holds(self) -> bool:
        """Whether it stays where a run is over: nobody has told this one to leave."""
        return self._options.hold and self._leaving is None

    async def _hold(self, why: str) -> None:
        """Wait until control is to be asked again, or this sphere ends; meanwhile it listens: alive, and not ready.

        One that has taken part does not wait: it ends to begin anew. The next run may have other code by the same name,
        which a process that has imported it once would not see; and memory of two runs would add up.
        """
        level = logging.INFO if why == RUN_OVER else logging.WARNING
        if self.hub is not None:
            log.log(level, "%s; this sphere begins anew (--hold)", why)
            self.anew = True
            self._stop.set()
            return
        if why != self._said:
            log.log(level, "%s; this sphere stays, and asks again every %g s (--hold)", why, _ASK_SECONDS)
        self._said, self._holding = why, True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ASK_SECONDS):
                await self._stop.wait()
        self._holding = False

    async def _take_part(self) -> None:
        """One incarnation. Raises StaleError where control has given its id to another."""
        options = self._options
        granted = await self._enroll()
        config = NodeConfig.from_proto(granted.configuration)
        fingerprints = await asyncio.to_thread(self._prepare, config)
        memory = node_memory(config.wire)
        worker: Worker | None = None
        if not options.relay and self._task is not None:
            worker = self._make_worker(config, self._task, aligned_zeros if memory is None else memory.allocate)
        self._worker = worker
        summer = Summer()
        hub = self.hub = Hub(
            config,
            granted.sphere_id,
            incarnation=granted.incarnation,
            worker=worker,
            memory=memory,
            environment=fingerprints.environment,
        )
        hub.hooks.run, hub.hooks.broken = summer.run, self._broken
        hub.address = self._address
        hub.watchdog.enabled = options.speculate
        hub.hooks.directed, hub.hooks.stuck = self._directed, self._stuck
        hub.hooks.clock, hub.hooks.call_later = (loop := asyncio.get_running_loop()).time, loop.call_later
        lease = Lease(config.patience_seconds)
        children = self._children = Children(hub, environment=fingerprints.environment, lease=lease)
        path = zip(granted.path_ids, granted.path_addresses, granted.path_incarnations, strict=True)
        ancestors = [pb.Ancestor(id=i, address=a, incarnation=n) for i, a, n in path]
        # This one works from here, whatever control believes of its own (0.0.0.0, for one).
        ancestors[0].address = options.control
        self.parent = Parent(
            hub,
            self._transport,
            fingerprints,
            ancestors,
            member=self._member(),
            lease=lease,
            orphan_timeout=options.orphan_timeout,
            reports=self._reports,
            control=self._control,
        )
        self.parent.link_changed = self._link_changed
        children.alone = self.parent.alone
        if config.trace:
            self._trace(hub, self.parent, children)
        self.ready.set()
        log.info("%s joins %s (incarnation %d)", hub.id, ancestors[-1].id, hub.incarnation)
        self._tell_of_address()
        try:
            await self._live(hub, self.parent, children)
        finally:
            hub.ledger.active = False  # what children leave open is for others now
            children.drain(LinkClosedError("the sphere ends"))
            if worker is not None:
                worker.close()
            summer.close()

    def _tell_of_address(self) -> None:
        """Say once where spheres of other hosts cannot dial this one, though control is to be dialled from there."""
        if (
            self._told_of_address
            or not (self._address and _is_local(self._address))
            or _is_local(self._options.control)
        ):
            return
        self._told_of_address = True
        log.info(
            "only this machine reaches %s: no sphere of another host is placed below this one. For children from there "
            "give --listen 0.0.0.0:PORT --insecure, and --advertise HOST:PORT where they see another address",
            self._address,
        )

    def _trace(self, hub: Hub, parent: Parent, children: Children) -> None:
        clock = self._options.clock
        recorder = Recorder(hub.id, clock=clock, work=lambda: (hub.work.step, hub.work.kind == EVALUATE))
        hub.phases.recorder = parent.recorder = children.recorder = recorder
        parent.clock = children.clock = clock

    async def _live(self, hub: Hub, parent: Parent, children: Children) -> None:
        def look(now: float) -> None:
            parent.look(now)
            hub.watch(now)

        try:
            await first_end(parent.run(), children.keep(fence=parent.cut, look=look), self._stop.wait())
        except Exception:
            if not self._stop.is_set():
                raise

    async def _leave(self, reason: str) -> None:
        """Tell the parent, wait until nobody needs this node, let the children go to their fallbacks, end."""
        hub = self.hub
        if hub is not None and self.parent is not None and self._children is not None:
            log.info("%s leaves: %s", hub.id, reason)
            hub.up.leave(reason)
            # Between two steps no step turns: then, after a while, it goes, and what it held can be computed again.
            idle_until = asyncio.get_running_loop().time() + hub.config.patience_seconds
            while self.parent.linked and not hub.may_leave and self._ending is None:
                now = asyncio.get_running_loop().time()
                if hub.ledger.assigned and not hub.ledger.finished:
                    idle_until = now + hub.config.patience_seconds
                if now > idle_until:
                    break
                await asyncio.sleep(_LOOK_SECONDS)
            if self._ending is not None:
                return  # the run is over, and the children are told
            self._children.drain(LinkClosedError(f"{hub.id} leaves"))
            await self.parent.flush(_FLUSH_SECONDS)
        self._stop.set()

    async def _end(self) -> None:
        """End once the children have: they are told through this node, and without it would look for control.

        Control, too, must hear of their end before it hears of this one, or it waits for them. Where the run is traced
        their last spans go up before.
        """
        assert self.hub is not None
        assert self._children is not None
        assert self.parent is not None
        inner = bool(self.hub.children)
        await self._children.gone(_FAREWELL_SECONDS)
        await self.parent.flush(_FLUSH_SECONDS)
        if inner:
            self.hub.up.leave(RUN_OVER)
            await self.parent.released(_FLUSH_SECONDS)
        self._over = True
        self._stop.set()

    def _member(self) -> common_pb2.Member:
        options = self._options
        host = options.host or socket.gethostname()
        return common_pb2.Member(host=host, zone=options.zone, relay=options.relay, pid=os.getpid(), agent=_AGENT)

    async def _enroll(self) -> control_pb2.EnrollSphereResponse:
        """Ask control for a place, patiently: control may be about to start, and its name to be known."""
        options, member = self._options, self._member()
        request = control_pb2.EnrollSphereRequest(
            protocol_version=PROTOCOL_VERSION,
            request_id=uuid.uuid4().hex,
            host=member.host,
            zone=member.zone,
            relay=member.relay,
            pid=member.pid,
            agent=_AGENT,
        )
        deadline = asyncio.get_running_loop().time() + options.orphan_timeout
        pause = 0.05
        while True:
            try:
                return await self._unless_stopped(self._ask_for_place(request))
            except (UnreachableError, LinkClosedError) as error:
                if self._stop.is_set() or asyncio.get_running_loop().time() + pause > deadline:
                    raise UnreachableError(f"{error} (tried for {options.orphan_timeout:g} s)") from None
            await self._unless_stopped(asyncio.sleep(pause))
            pause = min(2.0, pause * 2)

    async def _ask_for_place(self, request: control_pb2.EnrollSphereRequest) -> control_pb2.EnrollSphereResponse:
        options = self._options
        self._control = await self._transport.look_up(options.control)
        self._address = options.advertise or _reachable(self._listening, self._control)
        request.address = self._address
        data = await self._transport.enroll(options.control, request.SerializeToString(), 10.0)
        return control_pb2.EnrollSphereResponse.FromString(data)

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what ``work`` gives. Raises UnreachableError, at once, where this sphere is told to stop."""
        job, stop = asyncio.ensure_future(work), asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({job, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not job.done():
                raise UnreachableError("told to stop before control had answered")
            return job.result()
        finally:
            for task in (job, stop):
                task.cancel()
            await asyncio.gather(job, stop, return_exceptions=True)

    def _prepare(self, config: NodeConfig) -> Fingerprints:
        """Load the task and compare it with control's. Raises TaskError, FingerprintError."""
        environment = self._options.environment or environment_fingerprint()
        if self._options.relay:
            return Fingerprints(config.task_fingerprint, config.data_fingerprint, environment)
        if self._task is None:
            self._task = load_task(config.task, config.task_options)
        found = Fingerprints(
            task_fingerprint(self._task, config.task, config.task_options), data_fingerprint(self._task), environment
        )
        if found.task != config.task_fingerprint:
            raise FingerprintError(
                f"the code or options of task {config.task!r} differ from control's; install the same files here"
            )
        if found.data != config.data_fingerprint:
            raise FingerprintError(f"the data of task {config.task!r} differ from control's; copy the same data here")
        if self._task.size("train") != config.train_size:
            raise TaskError(
                f"task {config.task!r} has {self._task.size('train')} samples, control's {config.train_size}"
            )
        return found

    async def _work(self, link: Link) -> None:
        if self._holding:
            raise LinkClosedError("no run here: dial another")
        # A child may dial while this sphere still loads its task, or has no parent: it waits here, not at a fallback.
        await self.ready.wait()
        assert self.parent is not None
        await self.parent.placed.wait()
        assert self._children is not None
        await self._children.work(link)

    async def _heartbeat(self, link: Link) -> None:
        await self.ready.wait()
        assert self._children is not None
        await self._children.heartbeat(link)

    def _directed(self, directive: pb.Directive) -> None:
        if directive.kind == pb.DIRECTIVE_KIND_STOP:
            log.info("told to stop: %s", directive.reason)
            if directive.target_sphere_id:  # only this one: its children go to their fallbacks
                self._stop.set()
            else:
                self._ending = self._ending or asyncio.get_running_loop().create_task(self._end())
        elif directive.kind == pb.DIRECTIVE_KIND_REPORT_STATE:
            self._report_state(directive.request_id)
        elif directive.kind == pb.DIRECTIVE_KIND_DRAIN:
            self.drain(directive.reason or "a directive")
        elif directive.kind == pb.DIRECTIVE_KIND_MOVE:
            assert self.parent is not None
            self.parent.move(directive.parent)
        elif directive.kind == pb.DIRECTIVE_KIND_REPORT_LOG:
            assert self.hub is not None
            lines = self._log_lines(directive.lines)
            self.hub.up.log(pb.LogReport(request_id=directive.request_id, sphere_id=self.hub.id, lines=lines))
        else:
            log.warning("directive %d is not known here", directive.kind)

    def _report_state(self, request_id: int) -> None:
        """Answer with what is known of this sphere, and the task's state: from the thread that computes with it."""
        hub, state = self.hub, getattr(self._task, "state_dict", None)
        assert hub is not None

        answered = False

        def told(state: bytes) -> None:
            nonlocal answered
            if hub is self.hub and not answered:  # else it has enrolled anew, or was not waited for
                answered = True
                hub.up.report(pb.StateReport(request_id=request_id, report=self.report(), task_state=state))

        if not callable(state):
            told(b"")
        elif self._worker is not None:
            if not self._worker.call(lambda: self._task_state(state), told):
                # a cancelled unit is still in the task's code: the checkpoint is not to wait for that
                asyncio.get_running_loop().call_later(_STATE_SECONDS, told, b"")
        else:  # a relay's task computes nothing
            asking = asyncio.get_running_loop().run_in_executor(None, self._task_state, state)
            asking.add_done_callback(lambda asked: None if asked.cancelled() else told(asked.result()))

    def _task_state(self, state: Callable[[], object]) -> bytes:
        """Return the task's state as JSON; empty where it has none that can be sent. No weight depends on it."""
        try:
            text = json.dumps(state()).encode()
            if len(text) <= _MOST_STATE_BYTES:
                return text
            why = f"is {len(text):,} bytes of JSON; at most {_MOST_STATE_BYTES:,} go into a checkpoint"
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the task's own code: anything can come out
            why = f"is no JSON, or raised: {cut(described(error), _MOST_WHY_BYTES)}"
        if not self._warned_of_state:
            log.warning("state_dict() %s; checkpoints are saved without the task's state of this sphere", why)
        self._warned_of_state = True
        return b""

    def _broken(self, error: BaseException) -> None:
        """A sum failed, for want of memory for one: give back what is owed, as where nobody can compute it."""
        log.error("a sum failed", exc_info=error)
        if self.parent is not None:
            self.parent.cut(LinkClosedError(f"a sum failed: {error!r}"))

    def _stuck(self) -> None:
        """Nobody here can compute what is owed: give it back by ending the link (docs/adr/0004)."""
        if self.parent is not None and self.hub is not None:
            spoilt = self.hub.weights.complete and not self.hub.weights.intact
            reason = "its weights were overwritten" if spoilt else "no sphere below can compute"
            self.parent.cut(LinkClosedError(reason))

    def report(self) -> common_pb2.SphereReport:
        """What this sphere says of itself now."""
        hub = self.hub
        assert hub is not None
        resident, peak = resident_bytes()
        role = "relay" if self._options.relay else "inner" if hub.children else "leaf"
        return common_pb2.SphereReport(
            sphere_id=hub.id,
            incarnation=hub.incarnation,
            parent_id=self.parent.id if self.parent else "",
            role=role,
            host=self._options.host or socket.gethostname(),
            pid=os.getpid(),
            address=hub.address,
            weights_version=max(0, hub.weights.version),
            weights_digest=hub.weights.digest,
            microbatches_count=hub.counts.microbatches,
            samples_count=hub.counts.samples,
            phase_seconds=hub.phases.incarnation,
            sent_up_bytes=hub.counts.up_bytes,
            sent_down_bytes=hub.sent_down_bytes,
            refused_counts=hub.counts.refused,
            resident_bytes=resident,
            peak_resident_bytes=peak,
            children_count=len(hub.children),
            activity=hub.activity,
            wire=hub.gradients.carrier.name,
        )

    def _reports(self, most: int) -> list[common_pb2.SphereReport]:
        """This sphere's report, then the longest waiting ones from below."""
        assert self._children is not None
        return [self.report(), *self._children.oldest(most)]


def _is_local(address: str) -> bool:
    """Whether it leads to this machine, whoever dials it."""
    host = address.rpartition(":")[0]
    return is_loopback(host) or is_every_address(host)


def _may_pass(error: ArmillaryError) -> bool:
    """Whether a later run, or control, may take this sphere as it is: nothing is wrong with its files or release."""
    return isinstance(error, UnreachableError | WrongRunError) or str(error) == RUN_OVER


def _reachable(listening: str, control: str) -> str:
    """Return where others can dial what listens on ``listening``: for every address, that of the way to control.

    ``control`` has a number, not a name: nothing is looked up. Raises UnreachableError where there is no way to it.
    """
    host, _, port = listening.rpartition(":")
    if not is_every_address(host):
        return listening
    name, _, number = control.rpartition(":")
    try:
        family, kind, _, _, target = socket.getaddrinfo(
            name.strip("[]"), number, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST
        )[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # a datagram socket: this asks for the route and sends nothing
            found = str(probe.getsockname()[0])
    except OSError as error:
        raise UnreachableError(f"no way to control at {control}: {error.strerror or error}") from None
    return f"[{found}]:{port}" if family == socket.AF_INET6 else f"{found}:{port}"
