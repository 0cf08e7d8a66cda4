"""Link and Transport in memory, for tests and simulation: the same words, no sockets.

Bounded like a real connection: a sender waits while ``DEPTH`` messages lie unread.
"""

from __future__ import annotations

import asyncio
from collections import deque

from spheres.errors import ArmillaryError, ConfigError, LinkClosedError, RefusedError, UnreachableError
from spheres.transport import (
    GONE,
    Closed,
    Handlers,
    Link,
    Rpc,
    attend,
    check_size,
    close,
    split_address,
    told,
)

__all__ = ["MemoryLink", "MemoryNetwork", "MemoryTransport"]

#: messages that one direction holds before its sender waits
DEPTH = 8


class _Pipe:
    """One direction. Mutable state: the messages under way and how it ended."""

    def __init__(self) -> None:
        self.messages: deque[bytes] = deque()
        self.changed = asyncio.Event()
        self.ended = False
        self.error: ArmillaryError | None = None

    def end(self, error: ArmillaryError | None) -> None:
        """Nothing more is sent; what lies here can still be read."""
        if not self.ended:
            self.ended, self.error = True, error
            self.changed.set()

    async def put(self, message: bytes) -> None:
        while not self.ended and len(self.messages) >= DEPTH:
            self.changed.clear()
            await self.changed.wait()
        if self.ended:
            raise self.error or LinkClosedError("the other side has ended the link")
        self.messages.append(bytes(message))
        self.changed.set()

    async def get(self) -> bytes | None:
        while not self.messages:
            if self.ended:
                if self.error is not None:
                    raise self.error
                return None
            self.changed.clear()
            await self.changed.wait()
        self.changed.set()
        return self.messages.popleft()


class MemoryLink:
    """One end of a pair of pipes. ``closed`` is resolved by the listening end, or by the dialling end's leaving."""

    def __init__(self, out: _Pipe, into: _Pipe, peer: str, closed: Closed, *, listening: bool) -> None:
        self.peer = peer
        self._out, self._in, self._closed, self._listening = out, into, closed, listening
        self._usable = True

    async def send(self, message: bytes) -> None:
        check_size(message)
        self._check_usable()
        try:
            await self._out.put(message)
            # Give the reader its turn, as a socket would: a sender that never waits would starve the loop.
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self._usable = False
            raise

    async def receive(self) -> bytes | None:
        self._check_usable()
        try:
            message = await self._in.get()
        except asyncio.CancelledError:
            self._usable = False
            raise
        if message is not None:
            check_size(message)
        return message

    def _check_usable(self) -> None:
        if not self._usable:
            raise LinkClosedError("the link is closed")

    async def aclose(self, error: ArmillaryError | None = None) -> None:
        self._usable = False
        if self._listening:
            close(self._closed, error)
            return
        self._in.messages.clear()
        self._in.end(LinkClosedError("the link is closed"))
        self._out.messages.clear()
        self._out.end(LinkClosedError(GONE))
        close(self._closed, LinkClosedError(GONE))


class _Listener:
    """Mutable state: the links that live, each with the task that serves it."""

    def __init__(self, network: MemoryNetwork, address: str, handlers: Handlers) -> None:
        self.address, self.handlers = address, handlers
        self._network = network
        self._live: dict[asyncio.Task[None], Closed] = {}

    def accept(self, rpc: Rpc, peer: str) -> MemoryLink:
        loop = asyncio.get_running_loop()
        up, down, closed = _Pipe(), _Pipe(), loop.create_future()
        task = loop.create_task(self._serve(rpc, up, down, closed, peer))
        self._live[task] = closed
        task.add_done_callback(self._live.pop)
        return MemoryLink(up, down, self.address, closed, listening=False)

    async def _serve(self, rpc: Rpc, up: _Pipe, down: _Pipe, closed: Closed, peer: str) -> None:
        link = MemoryLink(down, up, peer, closed, listening=True)
        handler = self.handlers.work if rpc is Rpc.WORK else self.handlers.heartbeat
        await attend(asyncio.create_task(handler(link)), link, closed)
        await link.aclose()
        down.end(closed.result())
        up.messages.clear()
        up.end(closed.result())

    async def aclose(self) -> None:
        self._network.listeners.pop(self.address, None)
        live = dict(self._live)
        for closed in live.values():
            close(closed, LinkClosedError("the listener has closed"))
        if live:
            await asyncio.wait(live)


class MemoryNetwork:
    """Where addresses live. Mutable state: who listens."""

    def __init__(self) -> None:
        self.listeners: dict[str, _Listener] = {}
        self._ports = 50_000

    def free_port(self) -> int:
        self._ports += 1
        return self._ports


class MemoryTransport:
    """Dials and listens on a MemoryNetwork."""

    def __init__(self, network: MemoryNetwork, name: str = "node") -> None:
        self._network, self._name = network, name

    async def dial(self, address: str, rpc: Rpc) -> Link:
        listener = self._network.listeners.get(address)
        if listener is None:
            raise UnreachableError(f"nobody answers at {address}")
        return listener.accept(rpc, self._name)

    async def enroll(self, address: str, request: bytes, timeout: float) -> bytes:
        listener = self._network.listeners.get(address)
        what = f"control at {address}"
        if listener is None:
            raise UnreachableError(f"{what} does not answer; is it running, and is the address right?")
        if listener.handlers.enroll is None:
            raise RefusedError(f"{what} does not serve this; is it control, and of the same release?")
        try:
            async with asyncio.timeout(timeout):
                return await listener.handlers.enroll(request)
        except TimeoutError:
            raise UnreachableError(f"{what} does not answer; is it running, and is the address right?") from None
        except Exception as error:  # noqa: BLE001 - as a server does; what was not raised on purpose is logged
            raise told(error, "EnrollSphere") from None

    async def listen(self, address: str, handlers: Handlers) -> _Listener:
        host, port = split_address(address)
        address = f"{host}:{port or self._network.free_port()}"
        if address in self._network.listeners:
            raise ConfigError(f"cannot listen on {address}: the port is in use or the address is not of this machine")
        listener = _Listener(self._network, address, handlers)
        self._network.listeners[address] = listener
        return listener

    async def aclose(self) -> None:
        """Nothing is shared between links."""
