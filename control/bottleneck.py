"""What takes most of a step, in one line: the slowest sphere's computing, an edge, a sum, or control itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["RECENT_STEPS", "bottleneck"]

#: steps that are looked at
RECENT_STEPS = 50
#: what control does while no sphere works: member of a record's ``seconds`` -> words
_OWN = {
    "optimizer": "optimizer on control",
    "journal": "journal on control",
    "checkpoint_stall": "checkpoint on control",
}
#: what exchange a sphere's phase is
_WAYS = {"send_up": "gradients up", "send_down": "weights down"}


def bottleneck(records: Iterable[Mapping[str, Any]], parents: Mapping[str, str]) -> str:
    """Return what takes most of these steps, such as ``compute on s-4: 72 % of the step``; empty without steps.

    ``records`` are the journal's, ``parents`` the tree. Every moment of a step is somebody's: the slowest sphere's
    computing first, since no exchange could make a step shorter than that; then control's sum. What is left of the time
    until all gradients were there is exchange, and counts for the phase and the sphere that had most of it.
    """
    total = 0.0
    spent: Counter[str] = Counter()
    # kind -> whose part of it, in seconds: among equal spheres another one is the slowest in each step
    whose: dict[str, Counter[str]] = {}
    for record in records:
        seconds, phases = record["seconds"], record["phases"]
        total += seconds["step"] + seconds.get("journal", 0.0) + seconds.get("checkpoint_stall", 0.0)
        for name in _OWN:
            spent[name] += seconds.get(name, 0.0)
        left = seconds["gather"]
        compute, sphere = _slowest(phases, "compute")
        compute = min(left, compute)
        spent["compute"] += compute
        whose.setdefault("compute", Counter())[sphere] += compute
        left -= compute
        own_sum = min(left, seconds.get("sum", 0.0))
        spent["sum on control"] += own_sum
        left -= own_sum
        longest, sphere, kind = max((*_slowest(phases, kind), kind) for kind in ("sum", *_WAYS))
        kind = kind if longest > 0 else "exchange"
        spent[kind] += left
        whose.setdefault(kind, Counter())[sphere] += left
    if total <= 0:
        return ""
    kind = max(spent, key=lambda name: spent[name])
    sphere = max(whose[kind], key=lambda name: whose[kind][name]) if kind in whose else ""
    if kind in _WAYS:
        # a sphere that has left is in no tree any more
        what, more = f"edge {sphere} -> {parents.get(sphere, 'its parent')}", f" ({_WAYS[kind]})"
    else:
        what, more = _OWN.get(kind, f"{kind} on {sphere}" if sphere else kind), ""
    return f"{what}: {spent[kind] / total:.0%} of the step{more}".replace("%", " %", 1)


def _slowest(phases: Mapping[str, Any], phase: str) -> tuple[float, str]:
    found = phases.get(phase)
    return (float(found["max"]), str(found["slowest"])) if found else (0.0, "")
