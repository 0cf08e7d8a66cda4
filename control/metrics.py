"""What is measured of a run: the record of a step, as the journal has it, and the totals of this process's steps."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from control.bottleneck import RECENT_STEPS
from control.config import RunConfig
from control.gradients import Outcome
from control.update import Update
from spheres.config import NodeConfig
from spheres.environment import describe
from spheres.environments import Environments
from spheres.gradients import Contribution
from spheres.phases import PhaseTimes
from spheres.reducer import NonFinite
from spheres.sampling import Sampler
from spheres.task import Sums

__all__ = ["StepTimes", "Totals", "nonfinite_reason", "origin", "step_record"]


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
    sums: Sums | None,
    skipped: Sequence[NonFinite],
    update: Update,
    digest: bytes,
    times: StepTimes,
    phases: PhaseTimes,
    spheres: int,
    contributions: Sequence[Contribution],
    environments: Environments,
    moved: int,
    attempts: int,
    bytes_up: int,
    bytes_down: int,
) -> dict[str, Any]:
    """Return the record of a committed step, which docs/journal.md explains. Phases are sums over the spheres.

    ``sums`` None: no microbatch had a gradient.
    """
    seconds = times.updated - times.began
    below = phases.below
    shown = {p: {"sum": total, "max": most, "slowest": who} for p, (total, most, who) in below.items()}
    compute = below.get("compute", (0.0, 0.0, ""))[1]
    return {
        "event": "step",
        "step": step,
        "epoch": sampler.epoch_of(step),
        "term": term,
        "weights_version": step + 1,
        "samples": sampler.samples_before(step + 1),
        "batch_samples": sampler.batch_count(step),
        "used_samples": 0 if sums is None else sums.count,
        "decision": str(update.outcome),
        "nonfinite": [_verdict(verdict, contributions) for verdict in skipped],
        "loss": None if sums is None else _finite(sums.loss / sums.count),
        "metrics": {} if sums is None else {name: _finite(v / sums.count) for name, v in sums.metrics.items()},
        "learning_rate": update.learning_rate,
        "gradient": {
            **(update.gradient or {}),
            # of the mean gradient before clipping; the other figures are of what the optimizer got
            "norm": None if update.decision is None else update.decision.norm,
            "clipped": update.decision is not None and update.decision.clipped,
        },
        "gradient_crc32c": update.gradient_crc32c,
        "weights": update.weights or {},
        "weights_digest": digest.hex(),
        **({} if update.master_digest is None else {"master_digest": update.master_digest}),
        "seconds": {
            "step": seconds,
            "gather": times.sealed - times.began,
            "optimizer": times.updated - times.sealed,
            # control's own part of the gathering
            "sum": phases.own.get("sum", 0.0),
        },
        "phases": shown,
        # the slowest sphere's compute is what a step would take without any exchange
        "sync_fraction": max(0.0, 1 - compute / seconds) if seconds else 0.0,
        "spheres": spheres,
        "contributions": [[part.block.lo, part.block.hi, part.sphere] for part in contributions],
        "contributions_crc32c": [part.crc32c for part in contributions],
        "environments": [list(part) for part in environments],
        "mixed_recompute": moved,
        "attempts": attempts,
        "bytes_up": bytes_up,
        "bytes_down": bytes_down,
        "replayed": False,
        "time": time.time(),
    }


def _finite(value: float) -> float | None:
    """JSON has no number for what is not finite; a sum of finite losses may overflow."""
    return value if math.isfinite(value) else None


def _verdict(verdict: NonFinite, contributions: Sequence[Contribution]) -> dict[str, Any]:
    # where a step has so many that not all were told in full, who computed a block still says whose it was
    index = verdict.microbatch
    sphere = verdict.sphere or next((p.sphere for p in contributions if p.block.lo <= index < p.block.hi), "")
    found: dict[str, Any] = {"microbatch": index, "sphere": sphere}
    if verdict.tensors or verdict.sample_ids:
        found |= {"tensors": list(verdict.tensors), "samples": list(verdict.sample_ids)}
    return found


def nonfinite_reason(record: Mapping[str, Any]) -> str:
    """Return in one line why a step was not applied whole."""
    verdicts = record["nonfinite"]
    if not verdicts:
        return "the sum of gradients and losses that are finite is not"
    first = verdicts[0]
    text = f"microbatch {first['microbatch']} of {first['sphere'] or 'a sphere'} is not finite"
    if first.get("tensors"):
        text += f" in {', '.join(first['tensors'])}"
    if first.get("samples"):
        text += f", samples {', '.join(map(str, first['samples'][:8]))}{', ...' if len(first['samples']) > 8 else ''}"
    return text + (f"; and {len(verdicts) - 1} more" if len(verdicts) > 1 else "")


def origin(config: RunConfig, node: NodeConfig) -> dict[str, Any]:
    """Return what made the records of this process and term: ``origin`` of the first of them."""
    return {
        "config": config.model_dump(mode="json"),
        "task_fingerprint": node.task_fingerprint,
        "data_fingerprint": node.data_fingerprint,
        "environment": describe(),
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
    #: steps that were skipped, the last ones in a row
    skipped_in_a_row: int = 0
    #: phase -> seconds, summed over the spheres; ``optimizer`` is control's own
    phase_seconds: dict[str, float] = field(default_factory=dict)
    #: ``seconds`` and ``phases`` of the latest, for what holds steps up now
    recent: deque[Mapping[str, Any]] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))

    def add(self, record: Mapping[str, Any]) -> None:
        """Count one committed step."""
        self.steps += 1
        self.recent.append({key: record[key] for key in ("seconds", "phases")})
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if record["decision"] == Outcome.SKIPPED_STEP else 0
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
