"""The listening side over grpc.aio: a server for links and for what its owner adds, which outlives its own failure."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
import grpc.aio

from spheres.config import MAX_MESSAGE_BYTES
from spheres.errors import ArmillaryError, ConfigError, LinkClosedError
from spheres.status import code_of
from spheres.transport import (
    GONE,
    Closed,
    Handlers,
    LinkHandler,
    Rpc,
    attend,
    check_size,
    close,
    split_address,
    told,
)

__all__ = ["ENDED", "KEEPALIVE", "LIMITS", "SERVICE", "GrpcListener"]

log = logging.getLogger(__name__)

SERVICE = "spheres.v1.SphereService"

#: Who has gone silent is for leases to say (N10). These pings are a net below them, for ends that have no lease yet;
#: they leave a longer --patience its time. gRPC's keepalive alone would wait a minute for a ping (docs/assumptions.md).
KEEPALIVE = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 30_000),
    ("grpc.http2.ping_timeout_ms", 30_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
#: Only a backstop against memory: links check the limit themselves, and then can say what was wrong.
LIMITS = [
    ("grpc.max_send_message_length", 2 * MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", 2 * MAX_MESSAGE_BYTES),
]
_SERVER = [
    *KEEPALIVE,
    *LIMITS,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
]

#: what the library raises from a stream that is over
ENDED = (grpc.RpcError, asyncio.InvalidStateError, grpc.aio.BaseError)

#: seconds that handlers have to end in order, and their last words to leave, when their listener closes
_LAST_WORDS_SECONDS = 1.0
_CLOSING = "the listener has closed"
#: seconds in which it becomes known that a client has gone, and not only ended its side
_GONE_SECONDS = 0.2
#: seconds between two looks at whether a server still takes calls
_LOOK_SECONDS = 0.5
#: seconds for which a listener whose server has failed tries to have its port again
_REBIND_SECONDS = 60.0
#: seconds that links of a server that has failed may live on: as long as they like
_FOR_EVER = 1e9


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
        except ENDED:
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
        except ENDED:
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

    def __init__(self, handlers: Handlers, add_services: Callable[[grpc.aio.Server], None] | None) -> None:
        self.address = ""
        self._handlers, self._add_services = handlers, add_services
        self._server = self._make_server()
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
        server = self._make_server()
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

    def _make_server(self) -> grpc.aio.Server:
        """Return a server, not bound yet."""
        server = grpc.aio.server(options=_SERVER)
        methods: dict[str, Any] = {
            Rpc.WORK.value: grpc.stream_stream_rpc_method_handler(self._serve(self._handlers.work)),
            Rpc.HEARTBEAT.value: grpc.stream_stream_rpc_method_handler(self._serve(self._handlers.heartbeat)),
        }
        generic = [grpc.method_handlers_generic_handler(SERVICE, methods)]
        if self._handlers.enroll is not None:
            enroll: dict[str, Any] = {
                "EnrollSphere": grpc.unary_unary_rpc_method_handler(_answer(self._handlers.enroll))
            }
            generic.append(grpc.method_handlers_generic_handler("spheres.v1.ControlService", enroll))
        server.add_generic_rpc_handlers(tuple(generic))
        # Services add each method twice. While a server waits for calls of methods that it has by name, its failure
        # frees what gRPC writes to a moment later (_server_main_loop cancels them), and the process may crash.
        server.add_registered_method_handlers = _add_nothing  # type: ignore[method-assign]
        if self._add_services is not None:
            self._add_services(server)
        return server

    def _serve(self, handler: LinkHandler) -> Callable[[Any, Any], Awaitable[None]]:
        async def method(_requests: Any, context: Any) -> None:
            # Where headers leave with a first message that is cancelled on its way, the library sends them once more
            # with the status, and neither arrives (grpc/grpc, aio/server.pyx.pxi: metadata_sent).
            try:
                await context.send_initial_metadata(())
            except ENDED:
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


def _answer(handler: Callable[[bytes], Awaitable[bytes]]) -> Callable[[bytes, Any], Awaitable[bytes]]:
    async def method(request: bytes, context: Any) -> bytes:
        try:
            return await handler(request)
        except Exception as error:
            await context.abort(*code_of(told(error, "EnrollSphere")))
            raise

    return method
