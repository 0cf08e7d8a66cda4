"""Link and Transport over grpc.aio: bytes in, bytes out, with identity serializers.

Settings that make a dead peer show within seconds are here; what a message means is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

import grpc
import grpc.aio

from spheres.config import MAX_MESSAGE_BYTES
from spheres.errors import ArmillaryError, ConfigError, LinkClosedError, UnreachableError
from spheres.status import code_of, from_rpc_error, from_status
from spheres.transport import (
    GONE,
    Closed,
    Handlers,
    Link,
    LinkHandler,
    Rpc,
    attend,
    check_size,
    close,
    split_address,
    told,
)

__all__ = ["GrpcListener", "GrpcTransport"]

log = logging.getLogger(__name__)

SERVICE = "spheres.v1.SphereService"
ENROLL = "/spheres.v1.ControlService/EnrollSphere"

#: Who has gone silent is for leases to say (N10). These pings are a net below them, for ends that have no lease yet;
#: they leave a longer --patience its time. gRPC's keepalive alone would wait a minute for a ping (docs/assumptions.md).
_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 30_000),
    ("grpc.http2.ping_timeout_ms", 30_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
#: Only a backstop against memory: links check the limit themselves, and then can say what was wrong.
_LIMITS = [
    ("grpc.max_send_message_length", 2 * MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", 2 * MAX_MESSAGE_BYTES),
]
_CLIENT = [
    *_KEEPALIVE,
    *_LIMITS,
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    # a proxy of the environment is for the web, not for a node that is named by its address
    ("grpc.enable_http_proxy", 0),
]
_SERVER = [
    *_KEEPALIVE,
    *_LIMITS,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
]

#: what the library raises from a stream that is over
_ENDED = (grpc.RpcError, asyncio.InvalidStateError, grpc.aio.BaseError)

#: what the library makes of a write that fails
_SAYS_NOTHING = (grpc.StatusCode.INTERNAL, "Internal error from Core")

#: seconds in which a dialled address must take the connection
DIAL_SECONDS = 5.0
#: seconds that handlers have to end in order, and their last words to leave, when their listener closes
_LAST_WORDS_SECONDS = 1.0
_CLOSING = "the listener has closed"
#: seconds in which it becomes known that a client has gone, and not only ended its side; or why a link has ended
_GONE_SECONDS = 0.2
#: seconds between two looks at whether a server still takes calls
_LOOK_SECONDS = 0.5
#: seconds for which a listener whose server has failed tries to have its port again
_REBIND_SECONDS = 60.0
#: seconds that links of a server that has failed may live on: as long as they like
_FOR_EVER = 1e9


class _ClientLink:
    """The dialling end. Cancelling its read or write makes the library cancel the call."""

    def __init__(self, channel: grpc.aio.Channel, rpc: Rpc, peer: str) -> None:
        self.peer = peer
        self._channel = channel
        self._status: tuple[grpc.StatusCode, str] | None = None
        self._told = asyncio.Event()
        self._call: Any = channel.stream_stream(f"/{SERVICE}/{rpc.value}")()
        self._call.add_done_callback(self._ended)

    def _ended(self, call: Any) -> None:
        # Kept here, because a write that fails afterwards replaces the status with one that says nothing
        # (github.com/grpc/grpc/issues/36066). Up to 1.83 the library calls this once more then; and where the write
        # fails first, the status of the other side comes second.
        if self._status is None or self._status == _SAYS_NOTHING:
            self._status = _at_once(call.code()), _at_once(call.details())
        if self._status != _SAYS_NOTHING:
            self._told.set()

    async def send(self, message: bytes) -> None:
        check_size(message)
        try:
            await self._call.write(message)
        except _ENDED:
            raise await self._why() from None
        except asyncio.CancelledError:
            self._raise_unless_cancelled()
            raise

    async def receive(self) -> bytes | None:
        try:
            message = await self._call.read()
        except _ENDED:
            raise await self._why() from None
        except asyncio.CancelledError:
            self._raise_unless_cancelled()
            raise
        if message is grpc.aio.EOF:
            return None
        check_size(message)
        return bytes(message)

    async def _why(self) -> ArmillaryError:
        if self._status == _SAYS_NOTHING:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._told.wait(), _GONE_SECONDS)
        if self._status is None or self._status[0] is grpc.StatusCode.OK:
            return LinkClosedError("the other side has ended the link")
        return from_status(*self._status)

    def _raise_unless_cancelled(self) -> None:
        # The library raises CancelledError also where only the call was cancelled, not the task: by aclose().
        task = asyncio.current_task()
        if task is not None and not task.cancelling():
            raise LinkClosedError("the link is closed") from None

    async def aclose(self, error: ArmillaryError | None = None) -> None:
        self._call.cancel()
        await self._channel.close()


def _at_once(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return what a coroutine returns that does not have to wait."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    coroutine.close()
    raise RuntimeError("a call that has ended has no status")


class _ServerLink:
    """The listening end, for as long as its method runs: later the library's context must not be touched."""

    def __init__(self, context: Any) -> None:
        self.peer = context.peer()
        self.closed: Closed = asyncio.get_running_loop().create_future()
        self._context = context
        self._usable = True

    async def send(self, message: bytes) -> None:
        check_size(message)
        self._check_usable()
        try:
            await self._context.write(message)
        except _ENDED:
            raise LinkClosedError(GONE) from None
        except asyncio.CancelledError:
            self._usable = False
            raise

    async def receive(self) -> bytes | None:
        self._check_usable()
        try:
            message = await self._context.read()
            if message is grpc.aio.EOF:
                # So read() ends both where the client has ended its side and where it has gone; only then is the
                # method cancelled too, a moment later.
                await asyncio.wait({self.closed}, timeout=_GONE_SECONDS)
                self._check_usable()
                return None
        except _ENDED:
            raise LinkClosedError(GONE) from None
        except asyncio.CancelledError:
            self._usable = False
            raise
        check_size(message)
        return bytes(message)

    def _check_usable(self) -> None:
        if self.closed.done() or not self._usable:
            raise LinkClosedError("the link is closed")

    async def aclose(self, error: ArmillaryError | None = None) -> None:
        close(self.closed, error)


class GrpcListener:
    """A grpc.aio server with SphereService, and what else its owner adds before it starts.

    One request whose path is no UTF-8, as a port scanner may send, ends what a grpc.aio server takes calls with: since
    1.84 the library decodes it outside of any handler (grpc/grpc, aio/server.pyx.pxi: _server_main_loop). Open links
    live on, and nobody gets in any more. So a server that has failed is followed by another one on its address.

    Mutable state: the server that takes calls, those that have failed and still have links, the links that live, by the
    tasks of their handlers, and whether the listener closes.
    """

    def __init__(self, make_server: Callable[[GrpcListener], grpc.aio.Server]) -> None:
        self.address = ""
        self._make_server = make_server
        self._server = make_server(self)
        #: each with the task that frees it once its last link has ended
        self._failed: dict[grpc.aio.Server, asyncio.Task[None]] = {}
        self._live: dict[asyncio.Task[None], Closed] = {}
        self._closing = False

    async def open(self, address: str) -> None:
        """Bind and serve. Raises ConfigError."""
        host, _ = split_address(address)
        port = _bind(self._server, address)
        if port == 0:
            raise ConfigError(f"cannot listen on {address}: the port is in use or the address is not of this machine")
        await self._server.start()
        self.address = f"{host}:{port}"
        self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        """Follow each server that has failed by another one."""
        while (error := await _failure(self._server)) is not None:
            log.warning(
                "the gRPC server of %s has failed and takes no calls (%s: %s), perhaps at a request that is none of "
                "ours; another one takes its place, and links that are open live on",
                self.address,
                type(error).__name__,
                error,
            )
            self._outlive(self._server)
            if not await self._follow():
                return

    def _outlive(self, failed: grpc.aio.Server) -> None:
        freeing = self._failed[failed] = asyncio.create_task(failed.stop(grace=_FOR_EVER))
        freeing.add_done_callback(lambda _: self._failed.pop(failed))

    async def _follow(self) -> bool:
        """Start another server on the address; False where it cannot be had."""
        server = self._make_server(self)
        loop = asyncio.get_running_loop()
        until = loop.time() + _REBIND_SECONDS
        while _bind(server, self.address) == 0:
            if loop.time() > until:
                log.error("%s cannot be had again: nobody can join or ask here any more", self.address)
                return False
            await asyncio.sleep(_LOOK_SECONDS)
        self._server = server
        starting = asyncio.create_task(server.start())
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            await starting  # one turn of the loop: what has not quite started cannot be stopped
            raise
        return True

    def serve(self, handler: LinkHandler) -> Callable[[Any, Any], Awaitable[None]]:
        async def method(_requests: Any, context: Any) -> None:
            # Where headers leave with a first message that is cancelled on its way, the library sends them once more
            # with the status, and neither arrives (grpc/grpc, aio/server.pyx.pxi: metadata_sent).
            try:
                await context.send_initial_metadata(())
            except _ENDED:
                return
            link = _ServerLink(context)
            if self._closing:
                close(link.closed, LinkClosedError(_CLOSING))
            # A task of its own: the library cancels its task when the client goes, and when the server's time is up.
            handling = asyncio.create_task(handler(link))
            self._live[handling] = link.closed
            handling.add_done_callback(self._live.pop)
            await attend(handling, link, link.closed)
            error = link.closed.result()
            if error is not None:
                await context.abort(*code_of(error))

        return method

    async def aclose(self) -> None:
        # Whoever closes may be cancelled; a server that nobody stops would hold its port for ever.
        await asyncio.shield(asyncio.create_task(self._close()))

    async def _close(self) -> None:
        self._closing = True
        self._watching.cancel()
        await asyncio.wait({self._watching})
        for closed in self._live.values():
            close(closed, LinkClosedError(_CLOSING))
        freed = list(self._failed.values())
        servers = (self._server, *self._failed)
        await asyncio.gather(*(server.stop(grace=_LAST_WORDS_SECONDS) for server in servers), *freed)
        if self._live:
            await asyncio.wait(self._live)


class GrpcTransport:
    """Dials one channel per link, so that links do not share a connection's fate or flow control."""

    def __init__(self, add_services: Callable[[grpc.aio.Server], None] | None = None) -> None:
        self._add_services = add_services

    async def dial(self, address: str, rpc: Rpc) -> Link:
        channel = grpc.aio.insecure_channel(address, options=_CLIENT)
        connecting = asyncio.create_task(_connects(channel))
        connected = False
        try:
            await asyncio.wait({connecting}, timeout=DIAL_SECONDS)
            connected = connecting.done() and connecting.result()
        finally:
            if not connected:
                # Closing ends the watch on the channel; cancelling it would leave it behind in the library.
                await channel.close()
                await asyncio.wait({connecting})
        if not connected:
            raise UnreachableError(f"nobody answers at {address}")
        return _ClientLink(channel, rpc, address)

    async def enroll(self, address: str, request: bytes, timeout: float) -> bytes:
        async with grpc.aio.insecure_channel(address, options=_CLIENT) as channel:
            try:
                return bytes(await channel.unary_unary(ENROLL, _same, _same)(request, timeout=timeout))
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error, f"control at {address}") from None

    async def listen(self, address: str, handlers: Handlers) -> GrpcListener:
        listener = GrpcListener(lambda listener: self._server(listener, handlers))
        await listener.open(address)
        return listener

    def _server(self, listener: GrpcListener, handlers: Handlers) -> grpc.aio.Server:
        """Return a server, not bound yet."""
        server = grpc.aio.server(options=_SERVER)
        methods: dict[str, Any] = {
            Rpc.WORK.value: grpc.stream_stream_rpc_method_handler(listener.serve(handlers.work)),
            Rpc.HEARTBEAT.value: grpc.stream_stream_rpc_method_handler(listener.serve(handlers.heartbeat)),
        }
        generic = [grpc.method_handlers_generic_handler(SERVICE, methods)]
        if handlers.enroll is not None:
            enroll: dict[str, Any] = {"EnrollSphere": grpc.unary_unary_rpc_method_handler(_answer(handlers.enroll))}
            generic.append(grpc.method_handlers_generic_handler("spheres.v1.ControlService", enroll))
        server.add_generic_rpc_handlers(tuple(generic))
        # Services add each method twice. While a server waits for calls of methods that it has by name, its failure
        # frees what gRPC writes to a moment later (_server_main_loop cancels them), and the process may crash.
        server.add_registered_method_handlers = _add_nothing  # type: ignore[method-assign]
        if self._add_services is not None:
            self._add_services(server)
        return server

    async def aclose(self) -> None:
        """Nothing is shared between links."""


def _add_nothing(service_name: str, method_handlers: Mapping[str, Any]) -> None:
    """The same methods were added by a generic handler."""


def _bind(server: grpc.aio.Server, address: str) -> int:
    """Return the port that was bound; 0 where it cannot be."""
    try:
        return server.add_insecure_port(address)
    except RuntimeError:
        return 0


async def _failure(server: grpc.aio.Server) -> Exception | None:
    """Return what a server has failed with; None once it was stopped."""
    while True:
        # Without a time limit the library would wait for its last link first, and cancelling would harm it.
        waiting = server.wait_for_termination(_LOOK_SECONDS)
        (lives,) = await asyncio.gather(waiting, return_exceptions=True)
        if isinstance(lives, Exception):
            return lives
        if not lives:
            return None


async def _connects(channel: grpc.aio.Channel) -> bool:
    """Wait until the channel is connected, or has failed to."""
    while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
        if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
            return False
        await channel.wait_for_state_change(state)
    return True


def _answer(handler: Callable[[bytes], Awaitable[bytes]]) -> Callable[[bytes, Any], Awaitable[bytes]]:
    async def method(request: bytes, context: Any) -> bytes:
        try:
            return await handler(request)
        except Exception as error:
            await context.abort(*code_of(told(error, "EnrollSphere")))
            raise

    return method


def _same(data: bytes) -> bytes:
    return data
