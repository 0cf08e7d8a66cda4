"""The parent's side of an edge: takes hellos, then reads from and writes to each child until its link ends.

What the messages mean is the hub's; this module owns the two tasks of a link and who may have one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from time import monotonic_ns
from typing import TypeVar

from spheres.carrier import Carrier, Inline, Shared
from spheres.config import PROTOCOL_VERSION
from spheres.errors import (
    ArmillaryError,
    FingerprintError,
    ProtocolError,
    RefusedError,
    StaleError,
    VersionMismatchError,
    WrongRunError,
)
from spheres.frames import decode, decode_with_chunk
from spheres.hub import Child, Hub
from spheres.lease import Lease
from spheres.outbox import Outbox
from spheres.trace import Recorder
from spheres.transport import Link, first_end
from spheres.v1 import common_pb2
from spheres.v1 import work_pb2 as pb

__all__ = ["Children"]

log = logging.getLogger(__name__)
Value = TypeVar("Value")

#: seconds that a new link has to say hello
HELLO_SECONDS = 10.0
#: reports on one heartbeat (HeartbeatRequest.reports)
MOST_REPORTS = 32
#: spheres that are remembered after their link has ended, the latest: names are the peers' choice, memory is not
_MOST_KNOWN = 20_000
_LONGEST_NAME = 255
#: spheres in one subtree: far more than there can be, and still a number to calculate with
_MOST_CAPACITY = 1e6
_LEAST_CAPACITY = 1e-6
#: numeric environments in one subtree
_MOST_ENVIRONMENTS = 64


class Children:
    """Serves Work and Heartbeat to the children of one hub.

    Mutable state: the latest reports from below, and the highest session of each child.
    """

    def __init__(self, hub: Hub, *, environment: str, lease: Lease) -> None:
        self._hub = hub
        self._environment, self._lease = environment, lease
        #: raises where a child's hello is to be refused; the owner's
        self.vet: Callable[[pb.Hello], None] = lambda _: None
        #: seconds for which this node has had no way to control
        self.alone: Callable[[], float] = lambda: 0.0
        #: where the run is traced
        self.recorder: Recorder | None = None
        #: what children compare their own clocks with
        self.clock: Callable[[], int] = monotonic_ns
        #: sphere id -> (when, report)
        self.reports: dict[str, tuple[float, common_pb2.SphereReport]] = {}
        #: whose newest report has not gone up, in the order in which they came
        self._unsent: dict[str, None] = {}
        self._draining: ArmillaryError | None = None
        #: fingerprints of numeric environments, other than this node's, that have been told of in the log
        self._unlike: set[str] = set()
        #: sphere id -> (incarnation, session): only a higher one is taken (N1)
        self._orders: dict[str, tuple[int, int]] = {}
        # a link has ended
        self._left = asyncio.Event()

    def drain(self, reason: ArmillaryError) -> None:
        """Take no new links, and end those that live: children go to their fallbacks."""
        self._draining = reason
        self.drop(reason)

    def drop(self, reason: ArmillaryError) -> None:
        """End the links that live; nothing that comes in on them counts from now on."""
        for child in list(self._hub.children.values()):
            self._end(child, reason)

    def _end(self, child: Child, reason: ArmillaryError) -> None:
        """End a link, and what it had, at once: its tasks end a moment later."""
        child.close(reason)
        self._hub.dismiss(child, str(reason))

    def look(self, now: float) -> None:
        """End the links of children whose lease has run out (N10)."""
        for child in list(self._hub.children.values()):
            error = self._lease.silent(child.id, child.heard, now)
            if error is not None:
                log.warning("%s: %s", self._hub.id, error)
                self._end(child, error)

    async def keep(self, *, fence: Callable[[ArmillaryError], None], look: Callable[[float], None]) -> None:
        """Keep this node's lease and those of its children until cancelled; ``look`` is called at most ticks.

        Where this node itself was away for too long all links below end, and ``fence`` ends the one above (N10).
        """
        loop, lease = asyncio.get_running_loop(), self._lease
        lease.tick(loop.time())
        while True:
            await asyncio.sleep(lease.interval)
            now = loop.time()
            attentive = lease.judges(now)
            error = lease.tick(now)
            if error is not None:
                log.warning("%s: %s", self._hub.id, error)
                self.drop(error)
                fence(error)
            if attentive:  # else the signs of life of others may lie here unread
                self.look(now)
                look(now)

    async def work(self, link: Link) -> None:
        """Serve one Work stream. What it raises is the reason with which the link is closed."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def close(error: Exception) -> None:
            if not ended.done():
                ended.set_exception(error)

        try:
            message = await self._first(link)
            if message is None:
                return
            child = self._accept(message, close)
        except (ProtocolError, RefusedError) as error:
            self._count(error, link.peer)
            raise
        reason = "its link broke off"
        try:
            self._hub.admit(child, message.hello, message.tag)
            await first_end(ended, self._read(child, link), self._write(child, link))
            reason = "it ended its link"
        except ArmillaryError as error:
            reason = str(error)
            if isinstance(error, ProtocolError | RefusedError) and error is not self._draining:
                self._count(error, child.id)
            raise
        finally:
            self._hub.dismiss(child, reason)
            self._left.set()

    async def gone(self, seconds: float) -> None:
        """Wait until no child has a link, for so many seconds at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._hub.children:
                    self._left.clear()
                    await self._left.wait()

    def _count(self, error: ArmillaryError, whose: str) -> None:
        self._hub.counts.refused[type(error).__name__] += 1
        log.warning("%s: the link of %s ends: %s", self._hub.id, whose, error)

    async def _first(self, link: Link) -> pb.WorkRequest | None:
        """Return the message that must be a hello; None where the link ended before."""
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                data = await link.receive()
        except TimeoutError:
            raise ProtocolError(f"no hello came in {HELLO_SECONDS:g} s") from None
        return None if data is None else decode(pb.WorkRequest, data)

    async def _read(self, child: Child, link: Link) -> None:
        now = asyncio.get_running_loop().time
        while (data := await link.receive()) is not None:
            arrived = now()
            self._lease.check(arrived)
            child.heard = arrived
            came = self.clock()
            message, payload = decode_with_chunk(pb.WorkRequest, data)
            if message.HasField("capacity"):
                _check_capacity(child.id, message.capacity)
                self._check_room(child.id, message.capacity, child.environment)
            self._hub.on_request(child, message, payload)
            if self.recorder is not None:
                self.recorder.received(child.id, message, came)

    async def _write(self, child: Child, link: Link) -> None:
        outbox, now = child.outbox, asyncio.get_running_loop().time
        while self._hub.children.get(child.id) is child:  # what was fenced sends nothing more (N10)
            self._lease.check(now())
            data = outbox.next()
            if data is not None:
                await link.send(data)
            else:
                outbox.wake.clear()
                await outbox.wake.wait()

    def _accept(self, message: pb.WorkRequest, close: Callable[[Exception], None]) -> Child:
        """Check a hello; what an older link of the child had ends here. Raises the refusal."""
        if not message.HasField("hello"):
            raise ProtocolError("the first message of a Work stream must be a hello")
        hub, hello, tag = self._hub, message.hello, message.tag
        if self._draining is not None:
            raise self._draining
        self._check_peer(hello, tag)
        self.vet(hello)
        order = (hello.incarnation, message.session)
        known = self._orders.get(hello.sphere_id)
        if known is not None and order <= known:
            raise StaleError(f"{hello.sphere_id}: incarnation and session {order} are not above {known}")
        carrier = self._carrier(hello)
        _keep(self._orders, hello.sphere_id, order)
        older = hub.children.get(hello.sphere_id)
        if older is not None:
            hub.dismiss(older, "a newer session took its place")
            older.close(StaleError("a newer session took this one's place"))
        member = common_pb2.Member()
        member.CopyFrom(hello.member)
        member.environment_fingerprint = hello.environment_fingerprint  # control learns it with the link
        return Child(
            id=hello.sphere_id,
            incarnation=hello.incarnation,
            session=message.session,
            address=hello.address,
            outbox=Outbox(hub.weights, carrier),
            close=close,
            environment=hello.environment_fingerprint,
            member=member,
            heard=asyncio.get_running_loop().time(),
        )

    def _carrier(self, hello: pb.Hello) -> Carrier:
        """How payload is to travel. Raises RefusedError where the run insists on shared memory and there is none."""
        hub = self._hub
        if hub.memory is not None and hello.HasField("segment") and hub.memory.shares(hello.segment):
            return Shared(hub.config, hub.memory)
        if hub.config.wire == "shm":
            raise RefusedError(
                f"{hello.sphere_id} shares no memory with {hub.id}, and the run was started with --wire shm; start it "
                "with --wire auto, or this sphere in the same container or host"
            )
        return Inline(hub.config)

    def _check_peer(self, hello: pb.Hello, tag: pb.Tag) -> None:
        hub, config, child = self._hub, self._hub.config, hello.sphere_id
        if not 0 < len(child) <= _LONGEST_NAME or len(hello.address) > _LONGEST_NAME:
            raise ProtocolError(f"a hello with {len(child)} characters of name and {len(hello.address)} of address")
        if not 0 < len(hello.environment_fingerprint) <= _LONGEST_NAME:
            raise ProtocolError(
                f"{child} has an environment_fingerprint of {len(hello.environment_fingerprint)} characters; give it 1 "
                f"to {_LONGEST_NAME}: a hash of all that the bits of its gradients depend on"
            )
        _check_capacity(child, hello)
        if not 0 <= hello.weights_chunks_held <= config.chunk_count:
            raise ProtocolError(
                f"{child} says weights_chunks_held {hello.weights_chunks_held}; expected 0 to {config.chunk_count}"
            )
        self._check_room(child, hello, hello.environment_fingerprint)
        if hello.protocol_version != PROTOCOL_VERSION:
            raise VersionMismatchError(
                f"{child} speaks protocol {hello.protocol_version}, {hub.id} speaks {PROTOCOL_VERSION}; "
                "install the same release on both"
            )
        if tag.run_id != config.run_id:
            raise WrongRunError(f"{child} belongs to run {tag.run_id!r}; this is run {config.run_id!r}")
        # Control that came back is still the run's: who knew the one before is taken in.
        earlier = hub.root and hello.parent_incarnation < hub.incarnation
        if hello.parent_id != hub.id or not (earlier or hello.parent_incarnation in (0, hub.incarnation)):
            raise RefusedError(f"{child} looks for {hello.parent_id}; this is {hub.id}")
        if child == hub.id or any(node.id == child for node in hub.path):
            raise RefusedError(f"{child} is above {hub.id}: a link would close a circle (N11)")
        for what, theirs, ours in (
            ("task", hello.task_fingerprint, config.task_fingerprint),
            ("data", hello.data_fingerprint, config.data_fingerprint),
        ):
            if theirs != ours:
                raise FingerprintError(
                    f"{child} has other {what} than the run ({theirs} against {ours}); "
                    f"give it the same {'code' if what == 'task' else 'data set'}"
                )
        if hello.environment_fingerprint != self._environment and hello.environment_fingerprint not in self._unlike:
            if len(self._unlike) < _MOST_ENVIRONMENTS:  # else it is told again each time
                self._unlike.add(hello.environment_fingerprint)
            log.warning(
                "%s (%s) computes with another CPU, library or language than %s: bits are equal among equal "
                "environments only, so each keeps its own share of the microbatches",
                child,
                hello.member.agent or "?",
                hub.id,
            )

    def _check_room(self, child: str, said: pb.Hello | pb.Capacity, environment: str) -> None:
        """Refuse what this node could not say of itself: else its own parent would refuse it."""
        if self._hub.root:
            return
        edges = self._hub.ledger.edges
        names = {self._hub.ledger.environment, *(said.capacities or (environment,))}
        names.update(name for id, edge in edges.items() if id != child for name in edge.capacities)
        if len(names) > _MOST_ENVIRONMENTS:
            raise RefusedError(
                f"with {child} there would be {len(names)} numeric environments below {self._hub.id}; the limit is "
                f"{_MOST_ENVIRONMENTS}: it has to join elsewhere"
            )

    def oldest(self, most: int) -> list[common_pb2.SphereReport]:
        """Take up to ``most`` reports that have not been passed on, the longest waiting first."""
        chosen = list(self._unsent)[:most]
        for sphere in chosen:
            del self._unsent[sphere]
        return [self.reports[sphere][1] for sphere in chosen]

    async def heartbeat(self, link: Link) -> None:
        """Serve one Heartbeat stream: keep the newest report of each sphere below."""
        try:
            while (data := await link.receive()) is not None:
                came = self.clock()
                message = decode(pb.HeartbeatRequest, data)
                self._take(message)
                answer = pb.HeartbeatResponse(sent_nanos=message.sent_nanos, alone_seconds=self.alone())
                # half way between the two, so that what was to be done in between favours neither direction
                answer.received_nanos = (came + self.clock()) // 2
                await link.send(answer.SerializeToString())
        except (ProtocolError, RefusedError) as error:
            self._count(error, link.peer)
            raise

    def _take(self, message: pb.HeartbeatRequest) -> None:
        if message.run_id != self._hub.config.run_id:
            raise WrongRunError(f"a heartbeat of run {message.run_id!r}; this is run {self._hub.config.run_id!r}")
        self._lease.check(asyncio.get_running_loop().time())
        child = self._hub.children.get(message.sphere_id)
        if child is None or child.order != (message.incarnation, message.session):
            raise StaleError(f"a heartbeat of {message.sphere_id}, session {message.session}, which has no link here")
        if len(message.reports) > MOST_REPORTS:
            raise ProtocolError(f"{child.id} sent {len(message.reports)} reports at once; the limit is {MOST_REPORTS}")
        now = child.heard = asyncio.get_running_loop().time()
        for report in message.reports:
            known = self.reports.get(report.sphere_id)
            if known is None or known[1].incarnation <= report.incarnation:
                forgotten = _keep(self.reports, report.sphere_id, (now, report))
                self._unsent.setdefault(report.sphere_id)
                if forgotten is not None:
                    self._unsent.pop(forgotten, None)
        if self.recorder is not None:
            self.recorder.take_in(message.traces)


def _check_capacity(child: str, said: pb.Hello | pb.Capacity) -> None:
    parts = said.capacities
    given = (said.capacity, *parts.values())
    if not all(capacity == 0 or _LEAST_CAPACITY <= capacity <= _MOST_CAPACITY for capacity in given):
        raise ProtocolError(
            f"{child} says that its capacity is {said.capacity}{f' ({dict(parts)})' if parts else ''}; it must be "
            f"0, or from {_LEAST_CAPACITY:g} to {_MOST_CAPACITY:g}: 1 for a worker without children"
        )
    if not parts:
        return
    if len(parts) > _MOST_ENVIRONMENTS or any(len(name) > _LONGEST_NAME for name in parts):
        raise ProtocolError(f"{child} names {len(parts)} environments; the limit is {_MOST_ENVIRONMENTS}")
    if abs(sum(parts.values()) - said.capacity) > 1e-6 * max(1.0, said.capacity):
        raise ProtocolError(f"{child} says that its capacity is {said.capacity:g}, and of {dict(parts)} by environment")


def _keep(table: dict[str, Value], name: str, value: Value) -> str | None:
    """Note ``value`` as the latest; return the name that was forgotten for it."""
    table.pop(name, None)
    table[name] = value
    if len(table) <= _MOST_KNOWN:
        return None
    oldest = next(iter(table))
    del table[oldest]
    return oldest
