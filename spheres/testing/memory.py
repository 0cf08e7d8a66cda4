"""Link and Transport in memory, for tests and simulation: the same words, no sockets.

Bounded like a real connection: a sender waits while ``DEPTH`` messages lie unread. Here everything arrives at once;
``network`` has delays and faults.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextvars import Context, copy_context

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

__all__ = ["Connection", "MemoryLink", "MemoryListener", "MemoryNetwork", "MemoryTransport", "Pipe"]

#: messages that one direction holds before its sender waits
DEPTH = 8


class Pipe:
    """One direction. Mutable state: messages that can be read, how many are on the way, how either side has ended."""

    def __init__(self, connection: Connection, *, up: bool) -> None:
        self.connection, self.up = connection, up
        self.messages: deque[bytes] = deque()
        self.on_the_way = 0
        #: what arrives by it, in order, where the network takes time
        self.way: deque[Callable[[], None]] = deque()
        #: when the last of them arrives, where that is later than now
        self.due = 0.0
        #: when its sender came with the latest message; it may have waited for room since
        self.asked = 0.0
        self._ended = False
        self._error: ArmillaryError | None = None
        self._refusal: ArmillaryError | None = None
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None

    async def put(self, message: bytes) -> None:
        self.asked = asyncio.get_running_loop().time()
        while self._refusal is None and len(self.messages) + self.on_the_way >= DEPTH:
            self._writer = asyncio.get_running_loop().create_future()
            await self._writer
        if self._refusal is not None:
            raise self._refusal
        self.on_the_way += 1
        self.connection.network.carry(self, bytes(message))

    def next_comes(self) -> None:
        self.way.popleft()()

    def arrive(self, message: bytes) -> None:
        """The network has brought it."""
        self.on_the_way -= 1
        if not self._ended:
            self.messages.append(message)
            _wake(self._reader)

    def end(self, error: ArmillaryError | None, *, unread: bool = True) -> None:
        """The reader learns that nothing more comes; ``unread``: what lies here can still be read."""
        if not unread:
            self.messages.clear()
        if not self._ended:
            self._ended, self._error = True, error
            _wake(self._reader)

    def refuse(self, error: ArmillaryError | None) -> None:
        """The sender learns that nothing more is taken."""
        if self._refusal is None:
            self._refusal = error or LinkClosedError("the other side has ended the link")
            _wake(self._writer)

    async def get(self) -> bytes | None:
        while not self.messages:
            if self._ended:
                if self._error is not None:
                    raise self._error
                return None
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        message = self.messages.popleft()
        _wake(self._writer)
        return message


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


class Connection:
    """Both directions of one stream, and what each end knows of its end."""

    def __init__(self, network: MemoryNetwork, rpc: Rpc, dialler: str, listener: str) -> None:
        self.network, self.rpc, self.dialler, self.listener = network, rpc, dialler, listener
        self.up, self.down = Pipe(self, up=True), Pipe(self, up=False)
        #: resolved by the listening end, or by the news that the dialling end has gone
        self.closed: Closed = asyncio.get_running_loop().create_future()
        #: which ends know that it is over; with both it is forgotten
        self.dialler_knows = self.listener_knows = False

    def __repr__(self) -> str:
        return f"<{self.rpc.value} {self.dialler} -> {self.listener}>"

    def dialler_learns(self, error: ArmillaryError | None, *, unread: bool = True) -> None:
        """The dialling end has closed, or hears that the other one has, or that the stream broke."""
        self.down.end(error, unread=unread)
        self.up.refuse(error)
        self.dialler_knows = True
        self.network.changed(self)

    def listener_learns(self) -> None:
        """The listening end hears that the other one has gone, or that the stream broke."""
        self.up.end(LinkClosedError(GONE), unread=False)
        self.down.refuse(LinkClosedError(GONE))
        close(self.closed, LinkClosedError(GONE))
        self.listener_knows = True
        self.network.changed(self)


class MemoryLink:
    """One end of a connection."""

    def __init__(self, connection: Connection, *, listening: bool) -> None:
        self.peer = connection.dialler if listening else connection.listener
        self._connection, self._listening = connection, listening
        up, down = connection.up, connection.down
        self._out, self._in = (down, up) if listening else (up, down)
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
        connection = self._connection
        if self._listening:
            close(connection.closed, error)
        elif not connection.dialler_knows:
            connection.dialler_learns(LinkClosedError("the link is closed"), unread=False)
            connection.network.tell(connection.up, connection.listener_learns)


class MemoryListener:
    """Mutable state: the links that live, each with the task that serves it."""

    def __init__(self, network: MemoryNetwork, address: str, handlers: Handlers, owner: str) -> None:
        self.address, self.handlers, self.owner = address, handlers, owner
        self._network = network
        # what dials in is served by whoever listens, not by whoever dials
        self._context = copy_context()
        self._live: dict[asyncio.Task[None], Closed] = {}

    @property
    def context(self) -> Context:
        return self._context.copy()

    def accept(self, rpc: Rpc, dialler: str) -> MemoryLink:
        connection = Connection(self._network, rpc, dialler, self.owner)
        self._network.changed(connection)
        task = asyncio.get_running_loop().create_task(self._serve(connection), context=self.context)
        self._live[task] = connection.closed
        task.add_done_callback(self._live.pop)
        return MemoryLink(connection, listening=False)

    async def _serve(self, connection: Connection) -> None:
        link, closed = MemoryLink(connection, listening=True), connection.closed
        handler = self.handlers.work if connection.rpc is Rpc.WORK else self.handlers.heartbeat
        await attend(asyncio.create_task(handler(link)), link, closed)
        await link.aclose()
        error = closed.result()
        connection.up.end(error, unread=False)
        connection.down.refuse(error)
        if not connection.listener_knows:
            connection.listener_knows = True
            self._network.tell(connection.down, lambda: connection.dialler_learns(error))
        self._network.changed(connection)

    async def aclose(self) -> None:
        self._network.listeners.pop(self.address, None)
        live = dict(self._live)
        for closed in live.values():
            close(closed, LinkClosedError("the listener has closed"))
        if live:
            await asyncio.wait(live)


class MemoryNetwork:
    """Where addresses live. Mutable state: who listens.

    ``carry``, ``tell``, ``changed``, ``reach`` and ``call`` are where a network with delays and faults differs.
    """

    def __init__(self) -> None:
        self.listeners: dict[str, MemoryListener] = {}
        self._ports = 50_000

    def free_port(self) -> int:
        self._ports += 1
        return self._ports

    def carry(self, pipe: Pipe, message: bytes) -> None:
        """Bring a message to the other end of ``pipe``."""
        pipe.arrive(message)

    def tell(self, pipe: Pipe, news: Callable[[], None]) -> None:
        """Bring the news of an end to the other end of ``pipe``, after the messages on the way."""
        news()

    def changed(self, connection: Connection) -> None:
        """A connection has opened, or one of its ends knows of its end."""

    async def reach(self, source: str, address: str) -> MemoryListener | None:
        """Return who listens there, None where nobody answers."""
        return self.listeners.get(address)

    async def call(self, source: str, listener: MemoryListener, request: bytes) -> bytes:
        """Have ``request`` answered by the listener's enroll. Raises what that raised."""
        assert listener.handlers.enroll is not None
        answering = asyncio.get_running_loop().create_task(
            _answer(listener.handlers, request), context=listener.context
        )
        try:
            await asyncio.wait({answering})
        finally:
            answering.cancel()
        return answering.result()


async def _answer(handlers: Handlers, request: bytes) -> bytes:
    assert handlers.enroll is not None
    return await handlers.enroll(request)


class MemoryTransport:
    """Dials and listens on a MemoryNetwork."""

    def __init__(self, network: MemoryNetwork, name: str = "node") -> None:
        self._network, self._name = network, name

    async def dial(self, address: str, rpc: Rpc) -> Link:
        listener = await self._network.reach(self._name, address)
        if listener is None:
            raise UnreachableError(f"nobody answers at {address}")
        return listener.accept(rpc, self._name)

    async def enroll(self, address: str, request: bytes, timeout: float) -> bytes:
        what = f"control at {address}"
        try:
            async with asyncio.timeout(timeout):
                listener = await self._network.reach(self._name, address)
                if listener is None:
                    raise UnreachableError(f"{what} does not answer; is it running, and is the address right?")
                if listener.handlers.enroll is None:
                    raise RefusedError(f"{what} does not serve this; is it control, and of the same release?")
                return await self._network.call(self._name, listener, request)
        except TimeoutError:
            raise UnreachableError(f"{what} does not answer; is it running, and is the address right?") from None
        except Exception as error:  # noqa: BLE001 - as a server does; what was not raised on purpose is logged
            raise told(error, "EnrollSphere") from None

    async def look_up(self, address: str) -> str:
        return await asyncio.to_thread(str, address)  # takes a moment, as a name does

    async def listen(self, address: str, handlers: Handlers) -> MemoryListener:
        host, port = split_address(address)
        address = f"{host}:{port or self._network.free_port()}"
        if address in self._network.listeners:
            raise ConfigError(f"cannot listen on {address}: the port is in use or the address is not of this machine")
        listener = MemoryListener(self._network, address, handlers, self._name)
        self._network.listeners[address] = listener
        return listener

    async def aclose(self) -> None:
        """Nothing is shared between links."""
