"""A memory network with delays and faults, from one seed, for any loop whose time it can ask.

Faults happen below the codec, to bytes. Nothing is lost or changed on a connection that lives, unless a fault says so:
a partition holds bytes back until it is healed, as retransmission does.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterable
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any

from spheres.errors import LinkClosedError, UnreachableError
from spheres.testing.memory import Connection, MemoryListener, MemoryNetwork, Pipe
from spheres.transport import GONE, Rpc

__all__ = ["TAMPERS", "FaultyNetwork", "Tamper"]

#: seconds that a dialler waits for a connection
_DIAL_SECONDS = 5.0
#: from this size on a message ends with payload, so that what is changed there is a checksum's to find
_PAYLOAD_BYTES = 1024
#: what can happen to one message
Tamper = str
TAMPERS = ("duplicate", "reorder", "corrupt")


@dataclass(frozen=True)
class _Cut:
    """Who is cut off from whom until when; ``both``: in both directions."""

    inside: frozenset[str]
    until: float
    both: bool

    def stops(self, source: str, target: str) -> bool:
        outward = source in self.inside and target not in self.inside
        return outward or (self.both and target in self.inside and source not in self.inside)


class FaultyNetwork(MemoryNetwork):
    """Mutable state: the connections, each pair's latency, what is cut off or slow until when, who is gone."""

    def __init__(
        self,
        rng: random.Random,
        *,
        latencies: Iterable[float] = (0.001,),
        bytes_per_second: float = 1e9,
        keepalive: float | None = None,
    ) -> None:
        super().__init__()
        self._rng, self._choices, self._rate = rng, tuple(latencies), bytes_per_second
        #: seconds of silence after which an end takes its connection for broken; None: never
        self.keepalive = keepalive
        self.connections: dict[Connection, None] = {}
        self._latency: dict[tuple[str, str], float] = {}
        self._cuts: list[_Cut] = []
        # pair -> seconds more, until when
        self._spikes: dict[tuple[str, str], tuple[float, float]] = {}
        self._tampers: dict[Pipe, Tamper] = {}
        self._overtaken: dict[Pipe, bytes] = {}
        self._broken: set[Connection] = set()
        self._gone: set[str] = set()
        # pipes whose sender has been away for longer than its lease, and when it came back
        self._fenced: dict[Pipe, float] = {}
        #: who sent on one of them all the same (N10)
        self.published_after_fence: list[str] = []
        self._ends: dict[MemoryListener, asyncio.Future[None]] = {}
        # what the network does belongs to nobody's process
        self._context = copy_context()
        #: messages on Work streams, by who sent or received them
        self.messages: Counter[str] = Counter()
        #: of every message: when, how long
        self.fingerprint = 0
        #: when the last message on a Work stream arrived
        self.last_arrival = 0.0
        #: Work streams that have opened or ended
        self.changes = 0
        self.heard: Callable[[Pipe, bytes], None] | None = None

    # ---- delays

    def latency(self, source: str, target: str) -> float:
        """Return the seconds that a small message takes, without jitter."""
        pair = (source, target) if source < target else (target, source)
        found = self._latency.get(pair)
        if found is None:
            found = self._latency[pair] = self._rng.choice(self._choices)
        return found

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _delay(self, source: str, target: str, now: float) -> float:
        """Return the seconds that something small takes that leaves now."""
        seconds = self.latency(source, target) * (0.5 + self._rng.random())
        if self._spikes:
            more, until = self._spikes.get((source, target), (0.0, 0.0))
            seconds += more if now < until else 0.0
        return max(seconds, self.blocked(source, target) - now + seconds) if self._cuts else seconds

    def blocked(self, source: str, target: str) -> float:
        """Return until when nothing gets from ``source`` to ``target``; 0.0 where it does."""
        now = self._now()
        self._cuts = [cut for cut in self._cuts if cut.until > now]
        return max((cut.until for cut in self._cuts if cut.stops(source, target)), default=0.0)

    def _due(self, pipe: Pipe, size: int) -> float:
        source, target = _ends(pipe)
        now = self._now()
        due = now + self._delay(source, target, now)
        if size >= _PAYLOAD_BYTES:
            due += size / self._rate
        # timers that fall due at one time keep no order
        pipe.due = due = max(due, pipe.due + 1e-9)
        return due

    def _at(self, when: float, act: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_at(when, act, context=self._context)

    # ---- what a network does

    def carry(self, pipe: Pipe, message: bytes) -> None:
        if self._fenced and pipe.asked >= self._fenced.get(pipe, float("inf")):
            self.published_after_fence.append(f"{_ends(pipe)[0]} on {pipe.connection} at {pipe.asked:.6f} s")
        if pipe.connection in self._broken:
            return
        if pipe in self._overtaken:
            before = self._overtaken.pop(pipe)
            self._send(pipe, message)
            self._send(pipe, before)
            return
        tamper = self._tampers.pop(pipe, None) if self._tampers else None
        if tamper == "corrupt":
            message = self._corrupt(message)
        elif tamper == "duplicate":
            pipe.on_the_way += 1
            self._send(pipe, message)
        elif tamper == "reorder":
            self._overtaken[pipe] = message
            self._at(self._now() + 0.1, lambda: self._flush(pipe))
            return
        self._send(pipe, message)

    def _send(self, pipe: Pipe, message: bytes) -> None:
        self._follow(pipe, len(message), partial(self._bring, pipe, message))

    def _follow(self, pipe: Pipe, size: int, act: Callable[[], None]) -> None:
        """Do what comes by a pipe when it is due, after all that is on the way: timers of a real loop keep no order."""
        pipe.way.append(act)
        self._at(self._due(pipe, size), pipe.next_comes)

    def _flush(self, pipe: Pipe) -> None:
        if pipe in self._overtaken:
            self._send(pipe, self._overtaken.pop(pipe))

    def _corrupt(self, message: bytes) -> bytes:
        if len(message) < _PAYLOAD_BYTES:
            return message[:-1]
        changed = bytearray(message)
        changed[-1 - self._rng.randrange(64)] ^= 1 << self._rng.randrange(8)
        return bytes(changed)

    def _bring(self, pipe: Pipe, message: bytes) -> None:
        connection = pipe.connection
        source, target = _ends(pipe)
        if connection in self._broken or target in self._gone:
            return
        if connection.rpc is Rpc.WORK:
            now = self.last_arrival = self._now()
            self.messages[source] += 1
            self.messages[target] += 1
            self.fingerprint = (self.fingerprint * 1_000_003 + int(now * 1e9) + len(message)) & 0xFFFFFFFFFFFFFFFF
            if self.heard is not None:
                self.heard(pipe, message)
        pipe.arrive(message)

    def tell(self, pipe: Pipe, news: Callable[[], None]) -> None:
        if pipe.connection not in self._broken:
            self._follow(pipe, 0, news)

    def changed(self, connection: Connection) -> None:
        if not self._forget_if_over(connection):
            self.connections.setdefault(connection)
        self.changes += connection.rpc is Rpc.WORK

    def _forget_if_over(self, connection: Connection) -> bool:
        if not (connection.dialler_knows and connection.listener_knows):
            return False
        self.connections.pop(connection, None)
        self._broken.discard(connection)
        for pipe in (connection.up, connection.down):
            self._tampers.pop(pipe, None)
            self._overtaken.pop(pipe, None)
            self._fenced.pop(pipe, None)
        return True

    async def reach(self, source: str, address: str) -> MemoryListener | None:
        listener = self.listeners.get(address)
        owner = address if listener is None else listener.owner
        blocked = max(self.blocked(source, owner), self.blocked(owner, source))
        now = self._now()
        if blocked - now > _DIAL_SECONDS:
            await asyncio.sleep(_DIAL_SECONDS)
            return None
        await asyncio.sleep(max(0.0, blocked - now) + 2 * self._delay(source, owner, now))
        return self.listeners.get(address)

    async def call(self, source: str, listener: MemoryListener, request: bytes) -> bytes:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._delay(source, listener.owner, self._now()))
        gone = self._ends.get(listener)
        if gone is None or gone.done():
            gone = self._ends[listener] = loop.create_future()
        assert listener.handlers.enroll is not None
        answering = loop.create_task(_as_coroutine(listener, request), context=listener.context)
        try:
            ends: set[asyncio.Future[Any]] = {answering, gone}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            answering.cancel()
        if not answering.done():
            raise UnreachableError(f"control at {listener.address} has gone")
        await asyncio.sleep(self._delay(listener.owner, source, self._now()))
        return answering.result()

    # ---- faults

    def lost(self, name: str, *, silent: bool = False) -> None:
        """A process has been killed: its ends are gone at once, the others learn it. ``silent``: as a host goes."""
        self._gone.add(name)
        for listener in [found for found in self.listeners.values() if found.owner == name]:
            del self.listeners[listener.address]
            gone = self._ends.get(listener)
            if gone is not None and not gone.done():
                gone.set_result(None)
        for connection in list(self.connections):
            if name in (connection.dialler, connection.listener):
                self._leave(connection, name, silent=silent)
                self._forget_if_over(connection)

    def _leave(self, connection: Connection, name: str, *, silent: bool) -> None:
        after = self.keepalive if silent else None
        if name == connection.dialler:
            connection.dialler_knows = True
            pipe, news = connection.up, connection.listener_learns
        else:
            connection.listener_knows = True
            pipe, news = connection.down, lambda: connection.dialler_learns(LinkClosedError(GONE))
        if not silent:
            when = self._due(pipe, 0)
            self._at(when, news)
        elif after is not None:
            self._at(self._now() + after, news)

    def break_off(self, connection: Connection, dialler_after: float | None, listener_after: float | None) -> None:
        """A connection breaks; each end learns it so many seconds later, None: never, or by keepalive."""
        self._broken.add(connection)
        for after, knows, news in (
            (dialler_after, connection.dialler_knows, lambda: connection.dialler_learns(LinkClosedError(GONE))),
            (listener_after, connection.listener_knows, connection.listener_learns),
        ):
            after = self.keepalive if after is None else after
            if after is not None and not knows:
                self._at(self._now() + after, news)

    def cut_off(self, names: Iterable[str], seconds: float, *, both: bool = True) -> None:
        """Hold back what these send to others (``both``: and what others send to them) for so long."""
        cut = _Cut(frozenset(names), self._now() + seconds, both)
        self._cuts.append(cut)
        if self.keepalive is not None and seconds > self.keepalive:
            for connection in self.connections:
                if (connection.dialler in cut.inside) != (connection.listener in cut.inside):
                    self.break_off(connection, self.keepalive, self.keepalive)

    def silence(self, name: str, seconds: float) -> None:
        """A process does not run for so long: who talks with it notices that by keepalive."""
        if self.keepalive is None or seconds <= self.keepalive:
            return
        for connection in self.connections:
            if name in (connection.dialler, connection.listener):
                self.break_off(connection, self.keepalive, self.keepalive)

    def streams_from(self, name: str) -> list[Pipe]:
        """Return the directions of Work streams in which this process sends."""
        pipes = [pipe for c in self.connections if c.rpc is Rpc.WORK for pipe in (c.up, c.down)]
        return [pipe for pipe in pipes if _ends(pipe)[0] == name]

    def fence(self, pipes: Iterable[Pipe]) -> None:
        """Their sender was away for longer than its lease: it must send nothing more on them (N10)."""
        for pipe in pipes:
            if pipe.connection in self.connections:
                self._fenced[pipe] = self._now()

    def slow_down(self, source: str, target: str, seconds: float, *, lasting: float) -> None:
        """Let everything from one to the other take so many seconds more, for a while."""
        self._spikes[source, target] = (seconds, self._now() + lasting)

    def tamper(self, pipe: Pipe, how: Tamper) -> None:
        """Do this to the next message in ``pipe``: duplicate, reorder, corrupt."""
        self._tampers[pipe] = how


async def _as_coroutine(listener: MemoryListener, request: bytes) -> bytes:
    assert listener.handlers.enroll is not None
    return await listener.handlers.enroll(request)


def _ends(pipe: Pipe) -> tuple[str, str]:
    connection = pipe.connection
    if pipe.up:
        return connection.dialler, connection.listener
    return connection.listener, connection.dialler
