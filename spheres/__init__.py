"""The library of a node: the tree, its streams, the canonical sums, and what a task is."""

import os

from spheres.errors import ArmillaryError

# gRPC reads sockets in a pool of threads of its own (its "event engine") and hands what comes to the thread that
# asyncio waits for. Without that pool this thread reads them itself: two of five context switches of a step fewer. It
# is looked at once, when gRPC is first imported.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")

__all__ = ["ArmillaryError", "Sums", "Task"]

#: of the environment, read once, when numpy is first imported: bits differ between one BLAS thread and two
SINGLE_THREAD = dict.fromkeys(
    ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)


def set_environment() -> None:
    """Set what libraries read once, when they are first imported."""
    os.environ.update(SINGLE_THREAD)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what gRPC logs by itself, its errors say too


def __getattr__(name: str) -> object:
    # imported when used: a command that prints its help must not wait for numpy
    if name not in ("Sums", "Task"):
        raise AttributeError(f"module 'spheres' has no attribute {name!r}")
    from spheres import task

    return getattr(task, name)
