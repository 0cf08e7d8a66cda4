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
from collections.abc import Callable
from dataclasses import dataclass

from spheres.children import Children
from spheres.config import PROTOCOL_VERSION, NodeConfig
from spheres.environment import environment_fingerprint, resident_bytes
from spheres.errors import (
    FingerprintError,
    LinkClosedError,
    TaskError,
    UnreachableError,
)
from spheres.hub import Hub
from spheres.parent import Fingerprints, Parent
from spheres.task import Task, data_fingerprint, load_task, task_fingerprint
from spheres.transport import Handlers, Link, Transport
from spheres.v1 import common_pb2, control_pb2
from spheres.v1 import work_pb2 as pb
from spheres.worker import Worker

__all__ = ["Sphere", "SphereOptions"]

log = logging.getLogger(__name__)


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
    #: this host's name, for placement
    host: str = ""


class Sphere:
    """The life of one sphere. ``task`` is given by tests; otherwise it is loaded by the run's configuration.

    ``make_worker`` makes what computes; the simulation's knows no thread.
    """

    def __init__(
        self,
        options: SphereOptions,
        transport: Transport,
        *,
        task: Task | None = None,
        make_worker: Callable[[NodeConfig, Task], Worker] = Worker,
    ) -> None:
        self._options, self._transport, self._task = options, transport, task
        self._make_worker = make_worker
        self._stop = asyncio.Event()
        #: set once it has its place and serves children
        self.ready = asyncio.Event()
        self.hub: Hub | None = None
        self.parent: Parent | None = None
        self._children: Children | None = None

    def stop(self) -> None:
        """End: links are closed, children go to their fallbacks, work in hand is given up."""
        self._stop.set()

    async def run(self) -> None:
        """Take part until told to stop. Raises what made that impossible."""
        options = self._options
        listener = None
        worker: Worker | None = None
        try:
            if options.listen:
                listener = await self._transport.listen(options.listen, Handlers(self._work, self._heartbeat))
            address = options.advertise
            if listener is not None and not address:
                address = await asyncio.to_thread(_reachable, listener.address, options.control)
            granted = await self._enroll(address)
            config = NodeConfig.from_proto(granted.configuration)
            fingerprints = await asyncio.to_thread(self._prepare, config)
            worker = None if options.relay or self._task is None else self._make_worker(config, self._task)
            hub = self.hub = Hub(config, granted.sphere_id, incarnation=granted.incarnation, worker=worker)
            hub.address = address
            hub.hooks.directed = self._directed
            hub.hooks.stuck = self._stuck
            self._children = Children(hub, environment=fingerprints.environment)
            path = zip(granted.path_ids, granted.path_addresses, granted.path_incarnations, strict=True)
            ancestors = [pb.Ancestor(id=i, address=a, incarnation=n) for i, a, n in path]
            # This one works from here, whatever control believes of its own (0.0.0.0, for one).
            ancestors[0].address = options.control
            self.parent = Parent(
                hub,
                self._transport,
                fingerprints,
                ancestors,
                orphan_timeout=options.orphan_timeout,
                reports=self._reports,
            )
            self.ready.set()
            log.info("%s joins %s (incarnation %d)", hub.id, ancestors[-1].id, hub.incarnation)
            await self._live(self.parent)
        finally:
            if self._children is not None:
                self._children.drain(LinkClosedError("the sphere ends"))
            if listener is not None:
                await listener.aclose()
            if worker is not None:
                worker.close()
            await self._transport.aclose()

    async def _live(self, parent: Parent) -> None:
        running = asyncio.create_task(parent.run())
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (running, stopping):
                task.cancel()
            results = await asyncio.gather(running, stopping, return_exceptions=True)
        if isinstance(results[0], Exception) and not self._stop.is_set():
            raise results[0]

    async def _enroll(self, address: str) -> control_pb2.EnrollSphereResponse:
        """Ask control for a place, patiently: control may be about to start."""
        options = self._options
        request = control_pb2.EnrollSphereRequest(
            protocol_version=PROTOCOL_VERSION,
            request_id=uuid.uuid4().hex,
            host=options.host or socket.gethostname(),
            zone=options.zone,
            address=address,
            relay=options.relay,
            pid=os.getpid(),
            agent=f"python {sys.version_info.major}.{sys.version_info.minor}",
        ).SerializeToString()
        deadline = asyncio.get_running_loop().time() + options.orphan_timeout
        pause = 0.05
        while True:
            try:
                data = await self._transport.enroll(options.control, request, 10.0)
                return control_pb2.EnrollSphereResponse.FromString(data)
            except (UnreachableError, LinkClosedError) as error:
                if asyncio.get_running_loop().time() + pause > deadline:
                    raise UnreachableError(f"{error} (tried for {options.orphan_timeout:g} s)") from None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stop.wait()
                    raise UnreachableError("told to stop before control had answered")
            pause = min(2.0, pause * 2)

    def _prepare(self, config: NodeConfig) -> Fingerprints:
        """Load the task and compare it with control's. Raises TaskError, FingerprintError."""
        environment = environment_fingerprint()
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
            # Children have the directive in their outboxes: give the writers their turn before the links go.
            asyncio.get_running_loop().call_later(0.05, self._stop.set)
        elif directive.kind == pb.DIRECTIVE_KIND_REPORT_STATE:
            assert self.hub is not None
            state = getattr(self._task, "state_dict", None)
            text = json.dumps(state()).encode() if callable(state) else b""
            self.hub.report(pb.StateReport(request_id=directive.request_id, report=self.report(), task_state=text))
        else:
            log.warning("directive %d is not known here", directive.kind)

    def _stuck(self) -> None:
        """Nobody here can compute what is owed: give it back by ending the link (docs/adr/0004)."""
        if self.parent is not None:
            self.parent.cut(LinkClosedError("no sphere below can compute"))

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
        )

    def _reports(self, most: int) -> list[common_pb2.SphereReport]:
        """This sphere's report, then the longest waiting ones from below."""
        assert self._children is not None
        return [self.report(), *self._children.oldest(most)]


def _reachable(listening: str, control: str) -> str:
    """Return where others can dial what listens on ``listening``: for every address, that of the way to control."""
    host, _, port = listening.rpartition(":")
    if host.strip("[]") not in ("0.0.0.0", "::"):
        return listening
    name, _, number = control.rpartition(":")
    family, kind, _, _, target = socket.getaddrinfo(name.strip("[]"), number, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # a datagram socket: this asks for the route and sends nothing
        found = str(probe.getsockname()[0])
    return f"[{found}]:{port}" if family == socket.AF_INET6 else f"{found}:{port}"
