"""The seam at bytes: Link, and Transport that dials and listens. Implementations: ``grpc_link``, ``testing.memory``.

Everything above it is the same in production and in simulation; one suite holds the implementations to these words.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from spheres.errors import ArmillaryError

__all__ = ["Handlers", "Link", "LinkHandler", "Listener", "Rpc", "Transport"]


class Rpc(enum.Enum):
    """The two streams of an edge."""

    WORK = "Work"
    HEARTBEAT = "Heartbeat"


class Link(Protocol):
    """One end of a stream of messages. Order is kept; a message arrives whole or not at all."""

    #: the other end, for logs
    peer: str

    async def send(self, message: bytes) -> None:
        """Return when the transport has taken the message: a slow reader holds the sender up.

        Raises LinkClosedError (or the error that the other side closed with).
        """
        ...

    async def receive(self) -> bytes | None:
        """Return the next message, None when the other side has ended in order.

        Raises the error that the other side closed with, LinkClosedError where the stream broke, and DecodeError for
        a message over the limit.
        """
        ...

    async def aclose(self, error: ArmillaryError | None = None) -> None:
        """End the link, with a reason that the other side will see. Calling it again does nothing."""
        ...


LinkHandler = Callable[[Link], Awaitable[None]]


@dataclass(frozen=True)
class Handlers:
    """What a listener does with what comes in. The link is closed when its handler returns or raises."""

    work: LinkHandler
    heartbeat: LinkHandler
    #: serialized EnrollSphereRequest -> EnrollSphereResponse; control only
    enroll: Callable[[bytes], Awaitable[bytes]] | None = None


class Listener(Protocol):
    """A place where others dial."""

    #: host:port under which it was bound, the port never 0
    address: str

    async def aclose(self) -> None:
        """Take no more links and end those that live."""
        ...


class Transport(Protocol):
    """Dials and listens."""

    async def dial(self, address: str, rpc: Rpc) -> Link:
        """Open a stream. Raises UnreachableError where nobody answers."""
        ...

    async def enroll(self, address: str, request: bytes, timeout: float) -> bytes:
        """Call EnrollSphere. Raises UnreachableError, RefusedError and its kinds."""
        ...

    async def listen(self, address: str, handlers: Handlers) -> Listener:
        """Bind ``host:port``; port 0 chooses a free one. Raises ConfigError where the address cannot be bound."""
        ...

    async def aclose(self) -> None:
        """End what was dialled."""
        ...
