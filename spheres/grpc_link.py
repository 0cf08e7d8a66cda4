"""Link and Transport over grpc.aio: bytes in, bytes out, with identity serializers.

Settings that make a dead peer show within seconds are here; what a message means is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import grpc
import grpc.aio

from spheres.errors import ArmillaryError, LinkClosedError, UnreachableError
from spheres.grpc_listener import ENDED, KEEPALIVE, LIMITS, SERVICE, GrpcListener
from spheres.status import from_rpc_error, from_status
from spheres.transport import Handlers, Link, Rpc, check_size

__all__ = ["GrpcTransport"]

ENROLL = "/spheres.v1.ControlService/EnrollSphere"

_CLIENT = [
    *KEEPALIVE,
    *LIMITS,
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    # a proxy of the environment is for the web, not for a node that is named by its address
    ("grpc.enable_http_proxy", 0),
]

#: what the library makes of a write that fails
_SAYS_NOTHING = (grpc.StatusCode.INTERNAL, "Internal error from Core")

#: seconds in which a dialled address must take the connection
DIAL_SECONDS = 5.0
#: seconds in which it becomes known why a link has ended
_WHY_SECONDS = 0.2


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
        except ENDED:
            raise await self._why() from None
        except asyncio.CancelledError:
            self._raise_unless_cancelled()
            raise

    async def receive(self) -> bytes | None:
        try:
            message = await self._call.read()
        except ENDED:
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
                await asyncio.wait_for(self._told.wait(), _WHY_SECONDS)
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

    async def look_up(self, address: str) -> str:
        name, _, port = address.rpartition(":")
        try:
            # in a thread: a loop's own, uvloop's for one, leaves out which interface an address of one link is for
            found = await asyncio.to_thread(socket.getaddrinfo, name.strip("[]"), port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:  # the latter where it cannot be a name at all
            why = error.strerror if isinstance(error, OSError) else "that is no name of a host"
            raise UnreachableError(f"no way to {address}: {why}; is the name right?") from None
        # not found[0][4][0], which leaves it out, too
        host, _ = socket.getnameinfo(found[0][4], socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def listen(self, address: str, handlers: Handlers) -> GrpcListener:
        listener = GrpcListener(handlers, self._add_services)
        await listener.open(address)
        return listener

    async def aclose(self) -> None:
        """Nothing is shared between links."""


async def _connects(channel: grpc.aio.Channel) -> bool:
    """Wait until the channel is connected, or has failed to."""
    while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
        if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
            return False
        await channel.wait_for_state_change(state)
    return True


def _same(data: bytes) -> bytes:
    return data
