"""The seam at bytes: Link, and Transport that dials and listens. Implementations: ``grpc_link``, ``testing.memory``.

Everything above it is the same in production and in simulation; one suite holds the implementations to these words.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from spheres.config import MAX_MESSAGE_BYTES
from spheres.errors import ArmillaryError, ConfigError, LinkClosedError, MessageTooLargeError
from spheres.exposure import is_address

__all__ = [
    "GONE",
    "Closed",
    "Handlers",
    "Link",
    "LinkHandler",
    "Listener",
    "Rpc",
    "Transport",
    "attend",
    "check_size",
    "close",
    "first_end",
    "split_address",
    "told",
]

log = logging.getLogger(__name__)

#: sentence of the LinkClosedError of a link that broke off
GONE = "the other side has gone"


class Rpc(enum.Enum):
    """The two streams of an edge."""

    WORK = "Work"
    HEARTBEAT = "Heartbeat"


class Link(Protocol):
    """One end of a stream of messages. Order is kept; a message arrives whole or not at all.

    At most one task sends and one receives. Cancelling either spoils this end: all that is left is to close it.
    """

    #: the other end, for logs
    peer: str

    async def send(self, message: bytes) -> None:
        """Return when the transport has taken the message: a slow reader holds the sender up.

        Raises MessageTooLargeError before anything is sent, the error that the other side closed with, and
        LinkClosedError where either side has ended the link or the stream broke.
        """
        ...

    async def receive(self) -> bytes | None:
        """Return the next message, None when the other side has ended in order.

        Raises the error that the other side closed with, once what it sent before has been read; LinkClosedError where
        this side has closed or the stream broke; MessageTooLargeError.
        """
        ...

    async def aclose(self, error: ArmillaryError | None = None) -> None:
        """End the link. Calling it again does nothing.

        What the listening end gives is what the dialling end sees: the same class and sentence, or an end in order.
        The dialling end has no way to say why (a gRPC client sends no status): its link breaks off, and the handler at
        the other end is cancelled. What was not read by then may be lost.
        """
        ...


LinkHandler = Callable[[Link], Coroutine[Any, Any, None]]

#: how the listening end of a link has ended: the error that the other side sees, None for an end in order
Closed = asyncio.Future[ArmillaryError | None]


@dataclass(frozen=True)
class Handlers:
    """What a listener does with what comes in.

    The link is closed when its handler returns or raises; the handler is cancelled when its link ends before.
    """

    work: LinkHandler
    heartbeat: LinkHandler
    #: serialized EnrollSphereRequest -> EnrollSphereResponse; control only
    enroll: Callable[[bytes], Awaitable[bytes]] | None = None


class Listener(Protocol):
    """A place where others dial."""

    #: host:port under which it was bound, the port never 0
    address: str

    async def aclose(self) -> None:
        """Take no more links, end those that live, and wait for their handlers."""
        ...


class Transport(Protocol):
    """Dials and listens. Who dials or listens closes what it got."""

    async def dial(self, address: str, rpc: Rpc) -> Link:
        """Open a stream. Raises UnreachableError where nobody answers."""
        ...

    async def enroll(self, address: str, request: bytes, timeout: float) -> bytes:
        """Call EnrollSphere. Raises UnreachableError, RefusedError and its kinds."""
        ...

    async def look_up(self, address: str) -> str:
        """Return ``address`` with the number that its host's name stands for now, a number of one that has many.

        Raises UnreachableError where the name is not known, or not yet.
        """
        ...

    async def listen(self, address: str, handlers: Handlers) -> Listener:
        """Bind ``host:port``; port 0 chooses a free one. Raises ConfigError where the address cannot be bound."""
        ...

    async def aclose(self) -> None:
        """Let go of what the links share; they are closed by their owners."""
        ...


def check_size(message: bytes) -> None:
    """Raise MessageTooLargeError for a message over the limit."""
    if len(message) > MAX_MESSAGE_BYTES:
        raise MessageTooLargeError(f"a message of {len(message)} bytes; the limit is {MAX_MESSAGE_BYTES}")


def split_address(address: str) -> tuple[str, int]:
    """Return host and port to listen on. Raises ConfigError."""
    if not is_address(address):
        raise ConfigError(f"cannot listen on {address!r}: an address is HOST:PORT with a port from 0 to 65535")
    host, _, port = address.rpartition(":")
    return host, int(port)


def close(closed: Closed, error: ArmillaryError | None) -> None:
    """The link has ended so; only the first word counts."""
    if not closed.done():
        closed.set_result(error)


def told(error: BaseException, where: str) -> ArmillaryError:
    """Return what the other side is told of an exception here; one that nobody raised on purpose is logged."""
    if isinstance(error, ArmillaryError):
        return error
    log.error("%s failed", where, exc_info=error)
    return ArmillaryError(f"the other side failed with {type(error).__name__}: {error}")


async def attend(handling: asyncio.Task[None], link: Link, closed: Closed) -> None:
    """Wait until a link's handler or the link ends; after that ``closed`` is done and the handler cancelled or done.

    Cancelled by the transport where the other side has gone.
    """
    ends: set[asyncio.Future[Any]] = {handling, closed}
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        close(closed, LinkClosedError(GONE))
        raise
    finally:
        if not handling.done():
            handling.cancel()
            await asyncio.wait({handling})
        error = asyncio.CancelledError() if handling.cancelled() else handling.exception()
        if not closed.done():
            close(closed, None if error is None else told(error, f"the handler of {link.peer}"))


async def first_end(*jobs: Awaitable[object]) -> None:
    """Wait for the first of ``jobs`` to end, end the others, and raise what it raised; of several, the first in order.

    For both ends of an edge, whose link ends with its reader, its writer, or whatever else it lives by; and for a
    sphere's life.
    """
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
