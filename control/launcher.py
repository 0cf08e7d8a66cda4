"""Who starts and stops spheres: the seam, and which launcher a run has. What each of them does is its module's.

A launcher starts spheres and forgets them when they are told to leave; it knows nothing of trees, steps or weights.
Spheres that anybody else starts are welcome beside its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from control.config import RunConfig
from control.launcher_local import LocalSpheres
from control.lives import RunFacts, Started

__all__ = ["Launcher", "launcher_for"]


class Launcher(Protocol):
    """What control asks of a launcher. A sphere is known by what it says of itself: its host and its process id."""

    @property
    def living(self) -> int:
        """Spheres that were started, have not ended, and are not waiting for their next start."""

    @property
    def all_aside(self) -> bool:
        """Whether there are spheres, and each of them keeps failing."""

    def aside(self) -> list[tuple[str, str]]:
        """Return name and reason of those that keep failing and wait for their next start."""

    async def begin(self, count: int, *, came_back: bool) -> None:
        """See to ``count`` spheres at the start of a run; ``came_back``: an earlier control may have left some.

        Raises ArmillaryError or OSError.
        """

    async def start(self, count: int) -> list[Started]:
        """Start so many more. Returns when they are asked for, not when they have joined. Raises as ``begin``."""

    def joined(self, host: str, pid: int) -> object:
        """A sphere has joined the tree, one of these or not."""

    def dismiss(self, host: str, pid: int, *, at_once: bool) -> bool:
        """A sphere was told to leave by command: do not start it again. Returns whether it is one of these.

        ``at_once``: it is ended by force where the word does not reach it.
        """

    def expect_end(self) -> None:
        """The run is over: whoever ends from now on was told to, and nobody is started again."""

    def kill(self) -> None:
        """End all at once, for a process that ends now."""

    async def aclose(self) -> None:
        """End what still lives, within some seconds."""


def launcher_for(config: RunConfig) -> Callable[[RunFacts], Launcher]:
    """Return what makes the launcher of a run, once control listens. May block while it connects.

    Raises ConfigError where what it needs is not installed or does not fit, UnreachableError where nobody is there:
    before anything is written.
    """
    if config.launcher == "ray":
        from control.launcher_ray import ray_launcher

        return ray_launcher(config)
    if config.launcher == "kubernetes":
        from control.launcher_kubernetes import kubernetes_launcher

        return kubernetes_launcher(config)
    return LocalSpheres
