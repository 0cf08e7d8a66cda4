"""What every node's gRPC server serves besides its own services: health checking and reflection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from spheres.v1 import work_pb2

__all__ = ["LIVE", "READY", "Health", "add_services"]

#: the process serves
LIVE = ""
#: of a sphere: its link to a parent is up; of control: the run has opened
READY = "ready"

_NAME = "grpc.health.v1.Health"


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """``grpc.health.v1.Health``. The library's own sets a status by a coroutine; links come up and go at once.

    Mutable state: whether this node is ready.
    """

    def __init__(self) -> None:
        self._ready = False
        self._changed = asyncio.Event()

    def set_ready(self, ready: bool) -> None:
        """Say from now on whether this node is ready."""
        if ready != self._ready:
            self._ready = ready
            self._changed.set()
            self._changed = asyncio.Event()

    async def Check(self, request: pb.HealthCheckRequest, context: Any) -> pb.HealthCheckResponse:
        status = self._status(request.service)
        if status == pb.HealthCheckResponse.SERVICE_UNKNOWN:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f'no service {request.service!r} here: "" is liveness, "ready" readiness'
            )
        return pb.HealthCheckResponse(status=status)

    async def Watch(self, request: pb.HealthCheckRequest, context: Any) -> AsyncIterator[pb.HealthCheckResponse]:
        last = None
        while True:
            changed, status = self._changed, self._status(request.service)
            if status != last:
                yield pb.HealthCheckResponse(status=status)
                last = status
            await changed.wait()

    def _status(self, service: str) -> int:
        if service not in (LIVE, READY):
            return int(pb.HealthCheckResponse.SERVICE_UNKNOWN)
        up = service == LIVE or self._ready
        return int(pb.HealthCheckResponse.SERVING if up else pb.HealthCheckResponse.NOT_SERVING)


def add_services(
    server: grpc.aio.Server, health: Health, files: Sequence[FileDescriptor] = (work_pb2.DESCRIPTOR,)
) -> None:
    """Add health, and reflection of it and of the services in ``files``, to a server that has not been started."""
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = [service.full_name for file in files for service in file.services_by_name.values()]
    reflection.enable_server_reflection([*names, _NAME, reflection.SERVICE_NAME], server)
