"""What is measured of a run: the record of a step, as the journal has it, and the totals of this process's steps."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from control.update import Update
from spheres.blocks import Block
from spheres.phases import PhaseTimes
from spheres.sampling import Sampler
from spheres.task import Sums

__all__ = ["StepTimes", "Totals", "step_record"]


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Clock readings of one step, in seconds: work given out, step sealed, weights updated."""

    began: float
    sealed: float
    updated: float


def step_record(
    step: int,
    *,
    term: int,
    sampler: Sampler,
    sums: Sums,
    update: Update,
    digest: bytes,
    times: StepTimes,
    phases: PhaseTimes,
    spheres: int,
    contributions: Sequence[tuple[Block, str]],
    attempts: int,
    bytes_up: int,
    bytes_down: int,
) -> dict[str, Any]:
    """Return the record of a committed step. Seconds, bytes, samples; phases are sums over the spheres."""
    seconds = times.updated - times.began
    shown = {p: {"sum": total, "max": most, "slowest": who} for p, (total, most, who) in phases.below.items()}
    compute = float(phases.below.get("compute", (0.0, 0.0, ""))[1])
    return {
        "event": "step",
        "step": step,
        "epoch": sampler.epoch_of(step),
        "term": term,
        "weights_version": step + 1,
        "samples": sampler.samples_before(step + 1),
        "batch_samples": sampler.batch_count(step),
        "loss": sums.loss / sums.count,
        "metrics": {name: value / sums.count for name, value in sums.metrics.items()},
        "learning_rate": update.learning_rate,
        "gradient": {
            **(update.gradient or {}),
            # of the mean gradient before clipping; the other figures are of what the optimizer got
            "norm": update.decision.norm,
            "clipped": update.decision.clipped,
        },
        "weights": update.weights or {},
        "weights_digest": digest.hex(),
        "seconds": {
            "step": seconds,
            "gather": times.sealed - times.began,
            "optimizer": times.updated - times.sealed,
        },
        "phases": shown,
        # the slowest sphere's compute is what a step would take without any exchange
        "sync_fraction": max(0.0, 1 - compute / seconds) if seconds else 0.0,
        "spheres": spheres,
        "contributions": [[block.lo, block.hi, sphere] for block, sphere in contributions],
        "attempts": attempts,
        "bytes_up": bytes_up,
        "bytes_down": bytes_down,
        "replayed": False,
        "time": time.time(),
    }


@dataclass(slots=True)
class Totals:
    """Sums over the steps of this process."""

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    compute: float = 0.0
    up_bytes: int = 0
    down_bytes: int = 0
    #: phase -> seconds, summed over the spheres; ``optimizer`` is control's own
    phase_seconds: dict[str, float] = field(default_factory=dict)

    def add(self, record: Mapping[str, Any]) -> None:
        """Count one committed step."""
        self.steps += 1
        self.samples += record["batch_samples"]
        self.seconds += record["seconds"]["step"]
        self.compute += record["seconds"]["step"] * (1 - record["sync_fraction"])
        self.up_bytes += record["bytes_up"]
        self.down_bytes += record["bytes_down"]
        phases = {phase: times["sum"] for phase, times in record["phases"].items()}
        for phase, seconds in {**phases, "optimizer": record["seconds"]["optimizer"]}.items():
            self.phase_seconds[phase] = self.phase_seconds.get(phase, 0.0) + seconds

    @property
    def sync_fraction(self) -> float:
        """Share of the time of steps that no sphere's compute accounts for."""
        return 1 - self.compute / self.seconds if self.seconds else 0.0

    def rates(self) -> dict[str, float]:
        """Return name -> rate over the time of these steps; empty before the first."""
        if not self.seconds:
            return {}
        return {
            "steps_per_second": self.steps / self.seconds,
            "weight_updates_per_second": self.steps / self.seconds,
            "samples_per_second": self.samples / self.seconds,
            "up_bytes_per_second": self.up_bytes / self.seconds,
            "down_bytes_per_second": self.down_bytes / self.seconds,
            "sync_fraction": self.sync_fraction,
        }
