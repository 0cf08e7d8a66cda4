"""The library of a node: the tree, its streams, the canonical sums, and what a task is."""

from spheres.errors import ArmillaryError

__all__ = ["ArmillaryError", "Sums", "Task"]


def __getattr__(name: str) -> object:
    # imported when used: a command that prints its help must not wait for numpy
    if name not in ("Sums", "Task"):
        raise AttributeError(f"module 'spheres' has no attribute {name!r}")
    from spheres import task

    return getattr(task, name)
