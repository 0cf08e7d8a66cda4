"""Link and Transport over grpc.aio: bytes in, bytes out, with identity serializers.

Settings that make a dead peer show within seconds are here; what a message means is not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from spheres.config import MAX_MESSAGE_BYTES
from spheres.errors import ArmillaryError, ConfigError, LinkClosedError, UnreachableError
from spheres.status import code_of, from_rpc_error, from_status
from spheres.transport import Handlers, Link, LinkHandler, Rpc

__all__ = ["GrpcListener", "GrpcTransport"]

SERVICE = "spheres.v1.SphereService"
ENROLL = "/spheres.v1.ControlService/EnrollSphere"

#: A stopped peer is noticed by a ping without an answer; keepalive alone would wait a minute (docs/assumptions.md).
_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 4_000),
    ("grpc.http2.ping_timeout_ms", 4_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
_LIMITS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
]
_CLIENT = [*_KEEPALIVE, *_LIMITS, ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
_SERVER = [
    *_KEEPALIVE,
    *_LIMITS,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
]

#: what reading or writing a server's stream raises once its client has gone
_ENDED = (grpc.RpcError, asyncio.InvalidStateError, grpc.aio.BaseError)

#: seconds in which a dialled address must take the connection
DIAL_SECONDS = 5.0


class _ClientLink:
    """The dialling end."""

    def __init__(self, channel: grpc.aio.Channel, rpc: Rpc, peer: str) -> None:
        self.peer = peer
        self._channel = channel
        self._call: Any = channel.stream_stream(f"/{SERVICE}/{rpc.value}")()
        self._closed = False

    async def send(self, message: bytes) -> None:
        try:
            await self._call.write(message)
        except asyncio.InvalidStateError:
            raise await self._why() from None
        except grpc.RpcError as error:
            raise _meaning(error) from None

    async def receive(self) -> bytes | None:
        try:
            message = await self._call.read()
        except grpc.RpcError as error:
            raise _meaning(error) from None
        except asyncio.InvalidStateError:
            raise await self._why() from None
        if message is not grpc.aio.EOF:
            return bytes(message)
        if self._closed or await self._call.code() is grpc.StatusCode.OK:
            return None
        raise await self._why()

    async def _why(self) -> ArmillaryError:
        if self._closed:
            return LinkClosedError("the link is closed")
        return from_status(await self._call.code(), await self._call.details())

    async def aclose(self, error: ArmillaryError | None = None) -> None:
        if self._closed:
            return
        self._closed = True
        self._call.cancel()
        await self._channel.close()


class _ServerLink:
    """The listening end; the stream ends with its handler."""

    def __init__(self, context: Any) -> None:
        self.peer = context.peer()
        self._context = context
        self._closed: ArmillaryError | None = None

    async def send(self, message: bytes) -> None:
        if self._closed is not None:
            raise self._closed
        try:
            await self._context.write(message)
        except _ENDED:
            raise LinkClosedError("the stream has ended") from None

    async def receive(self) -> bytes | None:
        if self._closed is not None:
            raise self._closed
        try:
            message = await self._context.read()
        except _ENDED:
            raise LinkClosedError("the stream has ended") from None
        return None if message is grpc.aio.EOF else bytes(message)

    async def aclose(self, error: ArmillaryError | None = None) -> None:
        self._closed = self._closed or error or LinkClosedError("the link is closed")


def _meaning(error: grpc.RpcError) -> ArmillaryError:
    code = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    return from_status(code, (error.details() if hasattr(error, "details") else "") or "")


class GrpcListener:
    """A grpc.aio server with SphereService, and what else its owner adds before it starts."""

    def __init__(self, server: grpc.aio.Server, address: str) -> None:
        self.address = address
        self._server = server

    async def aclose(self) -> None:
        await self._server.stop(grace=0.2)


class GrpcTransport:
    """Dials one channel per link, so that links do not share a connection's fate or flow control."""

    def __init__(self, add_services: Callable[[grpc.aio.Server], None] | None = None) -> None:
        self._add_services = add_services

    async def dial(self, address: str, rpc: Rpc) -> Link:
        channel = grpc.aio.insecure_channel(address, options=_CLIENT)
        try:
            async with asyncio.timeout(DIAL_SECONDS):
                state = channel.get_state(try_to_connect=True)
                while state is not grpc.ChannelConnectivity.READY:
                    if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
                        raise TimeoutError
                    await channel.wait_for_state_change(state)
                    state = channel.get_state(try_to_connect=True)
        except BaseException as error:
            await channel.close()
            if isinstance(error, TimeoutError):
                raise UnreachableError(f"nobody answers at {address}") from None
            raise
        return _ClientLink(channel, rpc, address)

    async def enroll(self, address: str, request: bytes, timeout: float) -> bytes:
        async with grpc.aio.insecure_channel(address, options=_CLIENT) as channel:
            try:
                return bytes(await channel.unary_unary(ENROLL, _same, _same)(request, timeout=timeout))
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error, f"control at {address}") from None

    async def listen(self, address: str, handlers: Handlers) -> GrpcListener:
        server = grpc.aio.server(options=_SERVER)
        methods: dict[str, Any] = {
            Rpc.WORK.value: grpc.stream_stream_rpc_method_handler(_serve(handlers.work)),
            Rpc.HEARTBEAT.value: grpc.stream_stream_rpc_method_handler(_serve(handlers.heartbeat)),
        }
        generic = [grpc.method_handlers_generic_handler(SERVICE, methods)]
        if handlers.enroll is not None:
            enroll: dict[str, Any] = {"EnrollSphere": grpc.unary_unary_rpc_method_handler(_answer(handlers.enroll))}
            generic.append(grpc.method_handlers_generic_handler("spheres.v1.ControlService", enroll))
        server.add_generic_rpc_handlers(tuple(generic))
        if self._add_services is not None:
            self._add_services(server)
        try:
            port = server.add_insecure_port(address)
        except RuntimeError:
            port = 0
        if port == 0:
            raise ConfigError(f"cannot listen on {address}: the port is in use or the address is not of this machine")
        await server.start()
        return GrpcListener(server, f"{address.rpartition(':')[0]}:{port}")

    async def aclose(self) -> None:
        """Each link closes its own channel."""


def _serve(handler: LinkHandler) -> Callable[[Any, Any], Awaitable[None]]:
    async def method(_requests: Any, context: Any) -> None:
        try:
            await handler(_ServerLink(context))
        except ArmillaryError as error:
            code, details = code_of(error)
            await context.abort(code, details)
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no hello came in time")

    return method


def _answer(handler: Callable[[bytes], Awaitable[bytes]]) -> Callable[[bytes, Any], Awaitable[bytes]]:
    async def method(request: bytes, context: Any) -> bytes:
        try:
            return await handler(request)
        except ArmillaryError as error:
            await context.abort(*code_of(error))
            raise

    return method


def _same(data: bytes) -> bytes:
    return data
