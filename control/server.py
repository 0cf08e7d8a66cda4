"""What control's gRPC server serves besides the tree: ControlService, health checking, reflection."""

from __future__ import annotations

import grpc.aio

from control.servicers import ControlServicer
from spheres import server as node
from spheres.v1 import control_pb2, control_pb2_grpc, work_pb2

__all__ = ["add_services"]


def add_services(server: grpc.aio.Server, servicer: ControlServicer, health: node.Health) -> None:
    """Add the services to a server that has not been started."""
    control_pb2_grpc.add_ControlServiceServicer_to_server(servicer, server)
    node.add_services(server, health, (control_pb2.DESCRIPTOR, work_pb2.DESCRIPTOR))
