"""What control's gRPC server serves besides the tree: ControlService, health checking, reflection."""

from __future__ import annotations

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from control.servicers import ControlServicer
from spheres.v1 import control_pb2, control_pb2_grpc, work_pb2

__all__ = ["add_services"]


def add_services(server: grpc.aio.Server, servicer: ControlServicer) -> None:
    """Add the services to a server that has not been started."""
    control_pb2_grpc.add_ControlServiceServicer_to_server(servicer, server)
    standard = health.aio.HealthServicer()
    standard._server_status[""] = health_pb2.HealthCheckResponse.SERVING  # its setter is a coroutine
    health_pb2_grpc.add_HealthServicer_to_server(standard, server)
    served = [d.services_by_name.values() for d in (control_pb2.DESCRIPTOR, work_pb2.DESCRIPTOR)]
    names = [service.full_name for found in served for service in found]
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
