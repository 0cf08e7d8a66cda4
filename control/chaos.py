"""Faults on purpose: which, when, on whom, and what is to be said of it. Pure; ``control.cli.chaos`` carries it out."""

from __future__ import annotations

import random
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Fault", "Outcome", "Target", "choose", "parse_rate", "schedule", "table"]

_PER = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_rate(text: str) -> float:
    """Return faults per second of a text such as ``0.2/s``, ``6/m``, ``30/h``; ``0`` is none. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:/\s*([smh]))?\s*", text)
    if match is None or (match[2] is None and float(match[1])):
        raise ValueError(f"{text!r} is no rate; give one such as 0.2/s, 6/m, 30/h")
    return float(match[1]) / _PER[match[2] or "s"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault to come."""

    #: seconds from the start
    at: float
    #: kill, stop or control
    kind: str
    #: in [0, 1): who of those that are there then
    draw: float


@dataclass(frozen=True, slots=True)
class Target:
    """A process that a fault may hit."""

    sphere: str
    pid: int
    #: leaf, inner or relay
    role: str


@dataclass(slots=True)
class Outcome:
    """What became of a fault."""

    #: seconds from the start when it was done
    at: float
    kind: str
    sphere: str
    role: str
    pid: int
    #: steps committed when it was done
    step: int
    #: seconds until the next step was committed; None where none was seen
    seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def schedule(rates: Mapping[str, float], *, duration: float, seed: int, control_kills: int = 0) -> list[Fault]:
    """Return the faults of ``duration`` seconds in order: per kind a Poisson process; control's at even chances.

    The same seed gives the same times and draws, and those of one kind do not depend on the others.
    """
    faults: list[Fault] = []
    for kind, rate in rates.items():
        rng, at = random.Random(f"{seed}/{kind}"), 0.0
        while rate > 0 and (at := at + rng.expovariate(rate)) < duration:
            faults.append(Fault(at, kind, rng.random()))
    rng = random.Random(f"{seed}/control")
    faults += [Fault(rng.uniform(0, duration), "control", 0.0) for _ in range(control_kills)]
    return sorted(faults, key=lambda fault: (fault.at, fault.kind))


def choose(fault: Fault, targets: Sequence[Target]) -> Target | None:
    """Return who is hit of those that are there now, in order of their ids; None where nobody is."""
    return targets[int(fault.draw * len(targets))] if targets else None


def table(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """Return a row per kind and role: faults, those after which no step was seen, median and worst seconds."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.kind, outcome.role), []).append(outcome)
    rows = []
    for (kind, role), found in sorted(groups.items()):
        seconds = [outcome.seconds for outcome in found if outcome.seconds is not None]
        rows.append(
            {
                "kind": kind,
                "role": role,
                "faults": len(found),
                "without_commit": len(found) - len(seconds),
                "median_seconds": statistics.median(seconds) if seconds else None,
                "worst_seconds": max(seconds, default=None),
            }
        )
    return rows
