"""Where the time of a step goes: seconds per phase, summed over a subtree, with the slowest sphere of each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from spheres.trace import Recorder
from spheres.v1 import common_pb2

__all__ = ["PHASES", "PhaseTimes"]

#: in the order in which people read them; ``optimizer`` is control's alone
PHASES = ("compute", "wait", "sum", "send_up", "send_down", "optimizer")


class PhaseTimes:
    """Mutable state: this node's seconds of the present step and of its incarnation, and what its children said."""

    def __init__(self) -> None:
        self.own: dict[str, float] = {}
        self.incarnation: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        #: child -> the times of its subtree in this step; what it says in a later attempt replaces them
        self._children: dict[str, list[tuple[str, float, float, str]]] = {}
        #: where the run is traced
        self.recorder: Recorder | None = None

    @property
    def below(self) -> dict[str, tuple[float, float, str]]:
        """The children's subtrees: phase -> sum, largest, whose."""
        found: dict[str, tuple[float, float, str]] = {}
        for times in self._children.values():
            for time in times:
                _merge(found, *time)
        return found

    def clear(self) -> None:
        """A new step begins."""
        self.own.clear()
        self._children.clear()
        if self.recorder is not None:
            self.recorder.begin()

    def add(self, phase: str, seconds: float, detail: str = "") -> None:
        """Count a stretch that ends now."""
        self._count(phase, seconds)
        if self.recorder is not None:
            self.recorder.add(phase, seconds, detail)

    def _count(self, phase: str, seconds: float) -> None:
        self.own[phase] = self.own.get(phase, 0.0) + seconds
        self.incarnation[phase] += seconds

    def close(self, elapsed: float, *, computes: bool) -> None:
        """The step's work is done here, for now: what was spent on nothing else was spent waiting."""
        if computes:
            busy = sum(seconds for phase, seconds in self.own.items() if phase != "wait")
            # no stretch of time: a trace has the gaps themselves
            self._count("wait", max(0.0, elapsed - busy) - self.own.get("wait", 0.0))

    def merge(self, child: str, phases: Iterable[common_pb2.PhaseTime]) -> None:
        """Take in what a child says of its subtree; only the footer of its last block says it."""
        # Not the messages themselves: each would keep the whole frame that it came in.
        times = [(p.phase, p.sum_seconds, p.max_seconds, p.slowest_sphere_id) for p in phases]
        if times:
            self._children[child] = times

    def write(self, field: Any, own_id: str) -> None:
        """Write the subtree's times, this node's included, into a repeated PhaseTime field."""
        times = self.below
        for phase, seconds in self.own.items():
            _merge(times, phase, seconds, seconds, own_id)
        for phase, (total, largest, slowest) in times.items():
            field.add(phase=phase, sum_seconds=total, max_seconds=largest, slowest_sphere_id=slowest)


def _merge(into: dict[str, tuple[float, float, str]], phase: str, total: float, largest: float, slowest: str) -> None:
    before = into.get(phase, (0.0, -1.0, ""))
    peak = (largest, slowest) if largest > before[1] else before[1:]
    into[phase] = (before[0] + total, *peak)
