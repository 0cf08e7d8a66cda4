"""Link and Transport in memory, for tests and simulation: the same words, no sockets.

Bounded like a real connection: a sender waits while ``DEPTH`` messages lie unread.
"""

from __future__ import annotations

import asyncio
from collections import deque

from spheres.config import MAX_MESSAGE_BYTES
from spheres.errors import ArmillaryError, ConfigError, LinkClosedError, MessageTooLargeError, UnreachableError
from spheres.transport import Handlers, Link, Rpc

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
        if not self.ended:
            self.ended, self.error = True, error
            self.changed.set()

    async def put(self, message: bytes) -> None:
        while True:
            if self.ended:
                raise self.error or LinkClosedError("the link is closed")
            if len(self.messages) < DEPTH:
                break
            self.changed.clear()
            await self.changed.wait()
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
        message = self.messages.popleft()
        self.changed.set()
        return message


class MemoryLink:
    """One end of a pair of pipes."""

    def __init__(self, out: _Pipe, into: _Pipe, peer: str) -> None:
        self.peer = peer
        self._out, self._in = out, into
        self._closed = False

    async def send(self, message: bytes) -> None:
        if len(message) > MAX_MESSAGE_BYTES:
            error = MessageTooLargeError(f"a message of {len(message)} bytes; the limit is {MAX_MESSAGE_BYTES}")
            await self.aclose(error)
            raise error
        if self._closed:
            raise LinkClosedError("the link is closed")
        await self._out.put(message)
        # Give the reader its turn, as a socket would: a sender that never waits would starve the loop.
        await asyncio.sleep(0)

    async def receive(self) -> bytes | None:
        return await self._in.get()

    async def aclose(self, error: ArmillaryError | None = None) -> None:
        self._closed = True
        self._out.end(error)
        self._in.end(error or LinkClosedError("the link is closed"))


class _Listener:
    def __init__(self, network: MemoryNetwork, address: str, handlers: Handlers) -> None:
        self.address, self.handlers = address, handlers
        self._network = network
        self._tasks: set[asyncio.Task[None]] = set()

    def accept(self, rpc: Rpc, peer: str) -> MemoryLink:
        up, down = _Pipe(), _Pipe()
        ours = MemoryLink(down, up, peer)
        handler = self.handlers.work if rpc is Rpc.WORK else self.handlers.heartbeat
        task = asyncio.get_running_loop().create_task(self._serve(handler(ours), ours))  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return MemoryLink(up, down, self.address)

    async def _serve(self, handled: asyncio.Future[None], link: MemoryLink) -> None:
        error: ArmillaryError | None = None
        try:
            await handled
        except ArmillaryError as caught:
            error = caught
        except asyncio.CancelledError:
            error = LinkClosedError("the server has stopped")
            raise
        finally:
            await link.aclose(error)

    async def aclose(self) -> None:
        self._network.listeners.pop(self.address, None)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class MemoryNetwork:
    """Where addresses live. Mutable state: who listens."""

    def __init__(self) -> None:
        self.listeners: dict[str, _Listener] = {}
        self._ports = 50_000


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
        if listener is None or listener.handlers.enroll is None:
            raise UnreachableError(f"control at {address} does not answer; is it running, and is the address right?")
        async with asyncio.timeout(timeout):
            return await listener.handlers.enroll(request)

    async def listen(self, address: str, handlers: Handlers) -> _Listener:
        host, _, port = address.rpartition(":")
        if port == "0":
            self._network._ports += 1
            address = f"{host}:{self._network._ports}"
        if address in self._network.listeners:
            raise ConfigError(f"cannot listen on {address}: the port is in use or the address is not of this machine")
        listener = _Listener(self._network, address, handlers)
        self._network.listeners[address] = listener
        return listener

    async def aclose(self) -> None:
        """Nothing is shared between links."""
