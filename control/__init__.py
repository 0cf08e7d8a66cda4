"""The application on top of ``spheres``: a run with optimizer, journal, checkpoints, and the commands around it."""

import importlib
import os
from typing import Any

__all__ = ["Client", "RunConfig", "Summary", "SyncClient", "Training", "train"]

# Control starts processes while gRPC runs; they exec at once, so gRPC's own handling of forks only makes noise.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

_HOMES = {
    "Client": "control.client",
    "RunConfig": "control.config",
    "Summary": "control.training",
    "SyncClient": "control.sync_client",
    "Training": "control.training",
    "train": "control.training",
}


def __getattr__(name: str) -> Any:
    # imported when used: a command that prints its help must not wait for numpy and gRPC
    if name not in _HOMES:
        raise AttributeError(f"module 'control' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
