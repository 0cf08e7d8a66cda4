"""The parent's side of an edge: takes hellos, then reads from and writes to each child until its link ends.

What the messages mean is the hub's; this module owns the two tasks of a link and who may have one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import monotonic

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
from spheres.frames import decode
from spheres.hub import Child, Hub
from spheres.outbox import Outbox
from spheres.transport import Link
from spheres.v1 import common_pb2
from spheres.v1 import work_pb2 as pb

__all__ = ["Children"]

log = logging.getLogger(__name__)

#: seconds that a new link has to say hello
HELLO_SECONDS = 10.0


class Children:
    """Serves Work and Heartbeat to the children of one hub. Mutable state: the latest reports from below."""

    def __init__(self, hub: Hub, *, environment: str) -> None:
        self._hub = hub
        self._environment = environment
        #: sphere id -> (when, report)
        self.reports: dict[str, tuple[float, common_pb2.SphereReport]] = {}
        #: whose newest report has not gone up, in the order in which they came
        self._unsent: dict[str, None] = {}
        self._draining: ArmillaryError | None = None
        self._orders: dict[str, tuple[int, int]] = {}

    def drain(self, reason: ArmillaryError) -> None:
        """Take no new links, and end those that live: children go to their fallbacks."""
        self._draining = reason
        for child in list(self._hub.children.values()):
            child.close(reason)

    async def work(self, link: Link) -> None:
        """Serve one Work stream. What it raises is the reason with which the link is closed."""
        async with asyncio.timeout(HELLO_SECONDS):
            data = await link.receive()
        if data is None:
            return
        message = decode(pb.WorkRequest, data)
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def close(error: Exception) -> None:
            if not ended.done():
                ended.set_exception(error)

        child = self._accept(message, close)
        reason = "it ended its link"
        writer = asyncio.create_task(self._write(child, link))
        reader = asyncio.create_task(self._read(child, link))
        tasks: set[asyncio.Future[None]] = {reader, writer, ended}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except ArmillaryError as error:
            reason = str(error)
            if isinstance(error, ProtocolError):
                self._hub.counts.refused[type(error).__name__] += 1
                log.warning("%s: the link of %s ends: %s", self._hub.id, child.id, error)
            raise
        finally:
            self._hub.dismiss(child, reason)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, child: Child, link: Link) -> None:
        while (data := await link.receive()) is not None:
            self._hub.on_request(child, decode(pb.WorkRequest, data))

    async def _write(self, child: Child, link: Link) -> None:
        outbox = child.outbox
        while True:
            data = outbox.next()
            if data is not None:
                await link.send(data)
            else:
                outbox.wake.clear()
                await outbox.wake.wait()

    def _accept(self, message: pb.WorkRequest, close: Callable[[Exception], None]) -> Child:
        """Check a hello and open the edge. Raises the refusal."""
        if not message.HasField("hello"):
            raise ProtocolError("the first message of a Work stream must be a hello")
        hub, hello, tag = self._hub, message.hello, message.tag
        if self._draining is not None:
            raise self._draining
        self._check_peer(hello, tag)
        order = (hello.incarnation, message.session)
        known = self._orders.get(hello.sphere_id)
        if known is not None and order <= known:
            raise StaleError(f"{hello.sphere_id}: incarnation and session {order} are not above {known}")
        self._orders[hello.sphere_id] = order
        older = hub.children.get(hello.sphere_id)
        if older is not None:
            hub.dismiss(older, "a newer session took its place")
            older.close(StaleError("a newer session took this one's place"))
        child = Child(
            id=hello.sphere_id,
            incarnation=hello.incarnation,
            session=message.session,
            address=hello.address,
            outbox=Outbox(hub.weights),
            close=close,
            environment=hello.environment_fingerprint,
        )
        hub.admit(child, hello, tag)
        return child

    def _check_peer(self, hello: pb.Hello, tag: pb.Tag) -> None:
        hub, config, child = self._hub, self._hub.config, hello.sphere_id
        if hello.protocol_version != PROTOCOL_VERSION:
            raise VersionMismatchError(
                f"{child} speaks protocol {hello.protocol_version}, {hub.id} speaks {PROTOCOL_VERSION}; "
                "install the same release on both"
            )
        if tag.run_id != config.run_id:
            raise WrongRunError(f"{child} belongs to run {tag.run_id!r}; this is run {config.run_id!r}")
        if hello.parent_id != hub.id or hello.parent_incarnation not in (0, hub.incarnation):
            raise StaleError(f"{child} looks for {hello.parent_id}; this is {hub.id}")
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
        if hello.environment_fingerprint != self._environment:
            log.warning(
                "%s computes with another CPU or library than %s: equal bits hold only among equal environments",
                child,
                hub.id,
            )

    def oldest(self, most: int) -> list[common_pb2.SphereReport]:
        """Take up to ``most`` reports that have not been passed on, the longest waiting first."""
        chosen = list(self._unsent)[:most]
        for sphere in chosen:
            del self._unsent[sphere]
        return [self.reports[sphere][1] for sphere in chosen]

    async def heartbeat(self, link: Link) -> None:
        """Serve one Heartbeat stream: keep the newest report of each sphere below."""
        while (data := await link.receive()) is not None:
            message = decode(pb.HeartbeatRequest, data)
            if message.run_id != self._hub.config.run_id:
                raise WrongRunError(f"a heartbeat of run {message.run_id!r}")
            now = monotonic()
            for report in message.reports:
                known = self.reports.get(report.sphere_id)
                if known is None or known[1].incarnation <= report.incarnation:
                    self.reports[report.sphere_id] = (now, report)
                    self._unsent.setdefault(report.sphere_id)
            await link.send(pb.HeartbeatResponse(sent_nanos=message.sent_nanos).SerializeToString())
