"""The child's side of an edge: dials the parent, says hello, reads and writes until the link ends, then dials again.

What the messages mean is the hub's; this module owns the link's tasks, the fallbacks and the wait of an orphan.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic_ns, perf_counter

from spheres.carrier import Carrier, Inline, Shared
from spheres.config import PROTOCOL_VERSION
from spheres.errors import (
    ArmillaryError,
    FingerprintError,
    LinkClosedError,
    ProtocolError,
    RefusedError,
    StaleError,
    UnreachableError,
    VersionMismatchError,
    WrongRunError,
)
from spheres.frames import blocks_to, decode, decode_with_chunk
from spheres.hub import Hub, Outgoing
from spheres.lease import Lease
from spheres.trace import ClockOffset, Recorder, Taken, write
from spheres.transport import Link, Rpc, Transport, first_end
from spheres.v1 import common_pb2
from spheres.v1 import work_pb2 as pb

__all__ = ["Fingerprints", "Parent"]

log = logging.getLogger(__name__)

#: Refusals that no other attempt can cure, if they come from control: at another address another run may have moved in.
#: After StaleError the sphere enrolls anew: control has given its id to another.
_FINAL = (VersionMismatchError, FingerprintError, WrongRunError, StaleError)
#: seconds that a parent has to answer: it may itself be loading its task
WELCOME_SECONDS = 20.0
#: seconds after which the next ancestor is dialled, too: nothing at all may come from where a machine is gone
_NEXT_SECONDS = 1.0
#: seconds before dialling again, and up to which they are doubled each time
_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
#: reports of other spheres that ride on one heartbeat
_REPORTS = 31
#: seconds between two heartbeats of a traced run until the offset of the parent's clock is known well
_SETTLING_PAUSE = 0.02


@dataclass(frozen=True)
class Fingerprints:
    """What must be equal in one run (DESIGN section 4)."""

    task: str
    data: str
    environment: str


class Parent:
    """The link upward. Mutable state: the session number and the ancestors to dial, nearest last."""

    def __init__(
        self,
        hub: Hub,
        transport: Transport,
        fingerprints: Fingerprints,
        ancestors: Sequence[pb.Ancestor],
        *,
        member: common_pb2.Member,
        lease: Lease,
        orphan_timeout: float,
        reports: Callable[[int], list[common_pb2.SphereReport]],
        control: str = "",
    ) -> None:
        self._hub, self._transport, self._fingerprints = hub, transport, fingerprints
        self._member, self._lease = member, lease
        self._ancestors = list(ancestors)
        # the number that control's name stood for, where it has a name: what tells names may go when a machine goes
        self._number = control if control != self._ancestors[0].address else ""
        # when something last came from the parent; the parent whose lease ran out, which is not dialled first
        self._heard = 0.0
        self._silent = ""
        # parents that see this node's memory, while it does not see theirs: payload of those links goes inline
        self._hidden: set[tuple[str, int]] = set()
        # since when there is no way to control: no link, or a parent that has none; None where there is one
        self._alone_since: float | None = None
        self._orphan_timeout = orphan_timeout
        self._reports = reports
        self._session = 0
        #: why there was no link, or the last one ended
        self._last_error: ArmillaryError | None = None
        self._wake = asyncio.Event()
        self._unlinked = asyncio.Event()
        self._unlinked.set()
        #: set once the first welcome has come: only then is there a path to hand on
        self.placed = asyncio.Event()
        #: where the run is traced
        self.recorder: Recorder | None = None
        self.clock: Callable[[], int] = monotonic_ns
        #: the present parent's clock
        self.offset = ClockOffset()
        # a heartbeat is wanted at once; everything that waited when it was asked for has gone up
        self._hurry, self._flushed = asyncio.Event(), asyncio.Event()
        self._cut: asyncio.Future[None] | None = None
        #: told when a link has come up, and when it is gone
        self.link_changed: Callable[[bool], None] = lambda _: None
        hub.up.wake_up = self._wake.set

    @property
    def linked(self) -> bool:
        return not self._unlinked.is_set()

    @property
    def id(self) -> str:
        return self._ancestors[-1].id

    async def run(self) -> None:
        """Keep a link until cancelled. Raises what cannot be cured: a refusal, or UnreachableError of an orphan."""
        now = asyncio.get_running_loop().time
        self._alone_since = now()
        pause = _PAUSE
        while True:
            order = self._in_order()
            while (found := await self._connect(order)) is not None:
                began = now()
                if await self._link(*found):
                    # A parent that ends every link at once is not dialled at full speed.
                    if now() - began > _LONGEST_PAUSE:
                        pause = _PAUSE
                    break
            if self._alone_since is None:
                self._alone_since = now()
            left = self._alone_since + self._orphan_timeout - now()
            if left <= 0:
                raise UnreachableError(
                    f"no way to control for {self._orphan_timeout:g} s (--orphan-timeout); the last attempt: "
                    f"{self._last_error}"
                )
            await asyncio.sleep(min(pause, left))
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def _connect(self, order: list[pb.Ancestor]) -> tuple[pb.Ancestor, Link] | None:
        """Dial ancestors, nearest first, and return who answers first; the next is dialled where one takes long.

        Who is returned, and who has failed, is taken out of ``order``. None where that is all of them.
        """
        left, dialling = list(order), dict[asyncio.Task[Link], pb.Ancestor]()
        try:
            while left or dialling:
                if left:
                    ancestor = left.pop(0)
                    dialling[asyncio.ensure_future(self._dial(ancestor))] = ancestor
                wait = _NEXT_SECONDS if left else None
                await asyncio.wait(dialling, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
                for task in [task for task in dialling if task.done()]:
                    ancestor = dialling.pop(task)
                    order.remove(ancestor)
                    try:
                        link = task.result()
                    except UnreachableError as error:
                        self._last_error = error
                        log.debug("%s: %s", self._hub.id, error)
                        continue
                    try:
                        await _give_up(dialling)
                    except asyncio.CancelledError:
                        await link.aclose()
                        raise
                    return ancestor, link
        finally:
            await _give_up(dialling)
        return None

    async def _dial(self, ancestor: pb.Ancestor) -> Link:
        """Dial an ancestor. The number of old has a second: control may be elsewhere by now, and nobody say so."""
        try:
            async with asyncio.timeout(_NEXT_SECONDS if ancestor.address == self._number else None):
                return await self._transport.dial(ancestor.address, Rpc.WORK)
        except TimeoutError:
            raise UnreachableError(f"nobody answers at {ancestor.address}") from None

    async def _link(self, ancestor: pb.Ancestor, link: Link) -> bool:
        """Work for an ancestor until the link ends. False where it did not take this node. Raises a final refusal."""
        reason: ArmillaryError = LinkClosedError("it ended the link")
        try:
            await self._serve(link, ancestor)
        except ArmillaryError as error:
            if isinstance(error, _FINAL) and not self.linked and ancestor == self._ancestors[0]:
                raise
            reason = error
        finally:
            was_linked = self.linked
            self._unlinked.set()
            self.link_changed(False)
        self._last_error = reason
        log.info("%s: the link to %s has ended: %s", self._hub.id, ancestor.id, reason)
        return was_linked

    def _in_order(self) -> list[pb.Ancestor]:
        """Return whom to dial: the nearest first, but a parent that has gone silent last; then control by number.

        That one is none of the ancestors: another run may live there by now, so what is refused there is not final.
        """
        silent, self._silent = self._silent, ""
        order = self._ancestors[::-1]
        order.sort(key=lambda ancestor: ancestor.id == silent)
        if self._number:
            control = self._ancestors[0]
            order.append(pb.Ancestor(id=control.id, incarnation=control.incarnation, address=self._number))
        return order

    def cut(self, error: ArmillaryError) -> None:
        """End the present link and dial again."""
        if self._cut is not None and not self._cut.done():
            self._cut.set_exception(error)

    def move(self, target: pb.Ancestor) -> None:
        """Leave the parent for another; where that one does not take this sphere, it goes back (N11)."""
        if target.id not in (self._hub.id, self.id):
            # Control's, for one, may believe that its own address is 0.0.0.0; the one that worked is kept.
            target.address = self._addresses.get(target.id) or target.address
            self._ancestors.append(target)
            self.cut(LinkClosedError(f"moving to {target.id}"))

    def look(self, now: float) -> None:
        """End the link where the parent's lease has run out (N10)."""
        if self.linked and (error := self._lease.silent(self.id, self._heard, now)) is not None:
            self._silent = self.id
            self.cut(error)

    def alone(self) -> float:
        """Return the seconds for which there has been no way to control; 0 where there is one."""
        return 0.0 if self._alone_since is None else asyncio.get_running_loop().time() - self._alone_since

    def _hear(self) -> None:
        """Something came from the parent: it counts as alive. Raises LinkClosedError where this node was away."""
        now = asyncio.get_running_loop().time()
        self._lease.check(now)
        self._heard = now

    async def _serve(self, link: Link, ancestor: pb.Ancestor) -> None:
        """Say hello and work until the link ends."""
        error: ArmillaryError | None = None
        try:
            self._cut = None
            await self._hello(link, ancestor)
            self._cut = asyncio.get_running_loop().create_future()
            await first_end(self._read(link, ancestor), self._write(link), self._beat(ancestor), self._cut)
        except ProtocolError as caught:
            error = caught
            self._hub.counts.refused[type(caught).__name__] += 1
            log.warning("%s: the link to %s ends: %s", self._hub.id, ancestor.id, caught)
            raise
        finally:
            await link.aclose(error)

    async def _hello(self, link: Link, ancestor: pb.Ancestor) -> None:
        hub = self._hub
        self._session += 1
        hello = pb.Hello(
            protocol_version=PROTOCOL_VERSION,
            sphere_id=hub.id,
            incarnation=hub.incarnation,
            parent_id=ancestor.id,
            parent_incarnation=ancestor.incarnation,
            task_fingerprint=self._fingerprints.task,
            data_fingerprint=self._fingerprints.data,
            environment_fingerprint=self._fingerprints.environment,
            holds_weights=hub.weights.held,
            weights_version=max(0, hub.weights.version),
            weights_digest=hub.weights.digest,
            held=blocks_to(hub.ledger.holdings),
            capacity=hub.ledger.capacity,
            capacities=hub.mixed_capacities,
            address=hub.address,
            member=self._member,
            weights_chunks_held=hub.weights.resumable,
            weights_term=hub.weights.term,
            leaving=bool(hub.up.leaving),
        )
        if hub.memory is not None and (ancestor.id, ancestor.incarnation) not in self._hidden:
            hello.segment.CopyFrom(hub.memory.probe)
        message = pb.WorkRequest(tag=hub.tag, session=self._session, hello=hello)
        try:
            async with asyncio.timeout(WELCOME_SECONDS):
                await link.send(message.SerializeToString())
                data = await link.receive()
        except TimeoutError:
            raise LinkClosedError(f"{ancestor.id} did not answer hello in {WELCOME_SECONDS:g} s") from None
        if data is None:
            raise LinkClosedError(f"{ancestor.id} ended the link without an answer")
        answer = decode(pb.WorkResponse, data)
        if not answer.HasField("welcome"):
            raise ProtocolError(f"{ancestor.id} answered hello with something else than welcome")
        carrier = self._carrier(answer.welcome, ancestor)
        self._ancestors = self._path(answer.welcome, ancestor)
        self._hear()
        hub.relinked(self._session, self._ancestors, carrier)
        self._unlinked.clear()
        self.link_changed(True)
        self._alone_since = None
        self.placed.set()

    def _carrier(self, welcome: pb.Welcome, ancestor: pb.Ancestor) -> Carrier:
        """How payload travels, as the parent says. Raises LinkClosedError where it says what cannot be."""
        hub = self._hub
        if not welcome.HasField("segment"):
            return Inline(hub.config)
        if hub.memory is None or not hub.memory.shares(welcome.segment):
            self._hidden.add((ancestor.id, ancestor.incarnation))
            raise LinkClosedError(f"{ancestor.id} sees this node's memory, and this node does not see that of its own")
        return Shared(hub.config, hub.memory)

    def _path(self, welcome: pb.Welcome, ancestor: pb.Ancestor) -> list[pb.Ancestor]:
        """Return the nodes from control to this parent. Raises RefusedError where they are not that (N11)."""
        path = list(welcome.path)
        if not path or path[-1].id != ancestor.id:
            raise RefusedError(f"the welcome came from {path[-1].id if path else 'nobody'}, not from {ancestor.id}")
        if any(node.id == self._hub.id for node in path):
            raise RefusedError(f"{ancestor.id} is below {self._hub.id}: the link would close a circle (N11)")
        # The address that worked is kept: what a parent believes of its own may not be reachable from here.
        known = self._addresses
        for node in path:
            node.address = known.get(node.id) or node.address
        return path

    @property
    def _addresses(self) -> dict[str, str]:
        return {ancestor.id: ancestor.address for ancestor in self._ancestors}

    async def _read(self, link: Link, ancestor: pb.Ancestor) -> None:
        while (data := await link.receive()) is not None:
            if self._cut is None or self._cut.done():
                return  # what came with the word that ends the link is of the past too (N10)
            self._hear()
            message, payload = decode_with_chunk(pb.WorkResponse, data)
            if message.HasField("welcome"):  # the parent itself has a new parent (N11)
                self._ancestors = self._path(message.welcome, ancestor)
                self._hub.renewed(self._ancestors)
            else:
                self._hub.on_response(message, payload, data)

    async def _write(self, link: Link) -> None:
        hub, now = self._hub, asyncio.get_running_loop().time
        while self._cut is not None and not self._cut.done():
            self._lease.check(now())  # an item that is taken counts as sent
            item = hub.next_up()
            if item is None:
                self._wake.clear()
                await self._wake.wait()
            elif isinstance(item, Outgoing):
                started = perf_counter()
                await link.send(item.data)
                hub.went_up(item, perf_counter() - started)
            else:
                await link.send(item)

    async def _beat(self, ancestor: pb.Ancestor) -> None:
        """Send reports at heartbeat rate, on a stream of their own; its end alone does not end the edge."""
        self.offset = ClockOffset()
        while True:
            try:
                link = await self._transport.dial(ancestor.address, Rpc.HEARTBEAT)
            except UnreachableError:
                await asyncio.sleep(self._hub.config.heartbeat_seconds)
                continue
            taken: list[Taken] = []
            try:
                while True:
                    message = pb.HeartbeatRequest(
                        run_id=self._hub.config.run_id,
                        sphere_id=self._hub.id,
                        incarnation=self._hub.incarnation,
                        session=self._session,
                        reports=self._reports(_REPORTS),
                    )
                    taken = self._add_spans(message)
                    message.sent_nanos = self.clock()  # as late as can be
                    await link.send(message.SerializeToString())
                    data = await link.receive()
                    if data is None:
                        break
                    arrived = self.clock()
                    taken = []
                    self._hear()
                    answer = decode(pb.HeartbeatResponse, data)
                    self.offset.sample(answer.sent_nanos, answer.received_nanos, arrived)
                    self._alone_since = self._heard - answer.alone_seconds if answer.alone_seconds > 0 else None
                    await self._rest()
            except ArmillaryError as error:
                log.debug("%s: heartbeat to %s: %s", self._hub.id, ancestor.id, error)
            finally:
                if self.recorder is not None:
                    self.recorder.put_back(taken)
                await link.aclose()
            await asyncio.sleep(self._hub.config.heartbeat_seconds)

    def _add_spans(self, message: pb.HeartbeatRequest) -> list[Taken]:
        """Let spans ride along, by the parent's clock; not before enough answers have told of that clock.

        After a stop of this process the first answer alone may be wrong by seconds. At the end it has to do.
        """
        estimate = self.offset.estimate(self.clock())
        if self.recorder is None or estimate is None or not (self.offset.settled or self._hurry.is_set()):
            return []
        taken = self.recorder.take()
        write(message.traces, taken, estimate[0])
        return taken

    async def _rest(self) -> None:
        """Wait until the next heartbeat is due."""
        recorder, pause = self.recorder, self._hub.config.heartbeat_seconds
        if recorder is None:
            await asyncio.sleep(pause)
            return
        if not recorder:
            self._hurry.clear()
            self._flushed.set()
        if recorder or not self.offset.settled:
            pause = min(pause, _SETTLING_PAUSE)  # what did not fit into the last one does not wait long
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await self._hurry.wait()

    async def released(self, seconds: float) -> None:
        """Wait until the parent has ended the link, for so many seconds at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._unlinked.wait()

    async def flush(self, seconds: float) -> None:
        """Send up the spans that wait, at once; what has not gone up after so many seconds stays here."""
        if not self.recorder or not self.linked:
            return
        self._flushed.clear()
        self._hurry.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._flushed.wait()


async def _give_up(dialling: dict[asyncio.Task[Link], pb.Ancestor]) -> None:
    """End these dials. One that has answered by now, too late, is a link that is closed."""
    for task in dialling:
        task.cancel()
    if dialling:
        await asyncio.wait(dialling)
    while dialling:
        task, _ = dialling.popitem()
        if not task.cancelled() and task.exception() is None:
            await task.result().aclose()
