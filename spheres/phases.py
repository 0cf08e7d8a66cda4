"""Where the time of a step goes: seconds per phase, summed over a subtree, with the slowest sphere of each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from spheres.v1 import common_pb2

__all__ = ["PHASES", "PhaseTimes"]

#: in the order in which people read them; ``optimizer`` is control's alone
PHASES = ("compute", "wait", "sum", "send_up", "send_down", "optimizer")


class PhaseTimes:
    """Mutable state: this node's seconds of the present step and of its incarnation, and its subtree's of the step."""

    def __init__(self) -> None:
        self.own: dict[str, float] = {}
        self.incarnation: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        #: phase -> sum, largest, whose
        self.below: dict[str, tuple[float, float, str]] = {}

    def clear(self) -> None:
        """A new step begins."""
        self.own.clear()
        self.below.clear()

    def add(self, phase: str, seconds: float) -> None:
        self.own[phase] = self.own.get(phase, 0.0) + seconds
        self.incarnation[phase] += seconds

    def close(self, elapsed: float, *, computes: bool) -> None:
        """The step's work is done here: what was spent on nothing else was spent waiting."""
        if computes:
            busy = sum(seconds for phase, seconds in self.own.items() if phase != "wait")
            self.add("wait", max(0.0, elapsed - busy))

    def merge(self, phases: Iterable[common_pb2.PhaseTime]) -> None:
        """Add a child's subtree."""
        for p in phases:
            self._merge(p.phase, p.sum_seconds, p.max_seconds, p.slowest_sphere_id)

    def _merge(self, phase: str, total: float, largest: float, slowest: str) -> None:
        before = self.below.get(phase, (0.0, -1.0, ""))
        peak = (largest, slowest) if largest > before[1] else before[1:]
        self.below[phase] = (before[0] + total, *peak)

    def write(self, field: Any, own_id: str) -> None:
        """Write the subtree's times, this node's included, into a repeated PhaseTime field."""
        for phase, seconds in self.own.items():
            self._merge(phase, seconds, seconds, own_id)
        for phase, (total, largest, slowest) in self.below.items():
            field.add(phase=phase, sum_seconds=total, max_seconds=largest, slowest_sphere_id=slowest)
