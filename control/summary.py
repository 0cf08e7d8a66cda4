"""How a run is and how it ended: the summary, and what is written of it into the run directory at the end.

``control.report`` makes the page of it; ``summary.json`` tells the next start whether the run was completed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from control.bottleneck import bottleneck
from control.controller import Controller
from control.report import write_report
from control.run_dir import RunDirectory
from control.run_state import RunState
from control.tree import Tree
from control.weights_file import write_safetensors
from spheres.errors import ArmillaryError

__all__ = ["Summary", "completed_at", "summarize", "write_results"]


@dataclass
class Summary:
    """How a run ended; ``summary.json`` is the same."""

    state: str
    steps: int = 0
    epochs: int = 0
    samples: int = 0
    loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    weights_sha256: str = ""
    wall_seconds: float = 0.0
    #: seconds of training, those of earlier terms included
    train_seconds: float = 0.0
    samples_per_second: float = 0.0
    steps_per_second: float = 0.0
    sync_fraction: float = 0.0
    phase_seconds: dict[str, float] = field(default_factory=dict)
    #: what took most of the latest steps
    bottleneck: str = ""
    #: microbatches computed in another numeric environment than they were meant for: 0 where all bits are reproducible
    mixed_recompute: int = 0
    spheres: list[dict[str, Any]] = field(default_factory=list)
    tree: dict[str, str] = field(default_factory=dict)
    run_id: str = ""
    run_dir: str = ""
    reason: str = ""
    report: str = ""
    error: ArmillaryError | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "error": None if self.error is None else str(self.error)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Return the summary of a run that ended without an error."""
        return cls(**{f.name: value[f.name] for f in fields(cls) if f.name in value and f.name != "error"})


def summarize(controller: Controller, *, wall_seconds: float) -> Summary:
    """Return how the run is now. ``wall_seconds``: since this process began with it."""
    tree = controller.tree
    totals, rates, weights = controller.totals, controller.totals.rates(), tree.hub.weights
    spheres = [_sphere_summary(tree, name) for name in tree.names()]
    return Summary(
        state=str(controller.state),
        steps=controller.step,
        epochs=controller.step // controller.node.sampler.steps_per_epoch,
        samples=controller.samples,
        loss=controller.metrics.get("loss"),
        metrics=dict(controller.metrics),
        # not complete: an update that was not committed, which are the weights of no step
        weights_sha256=controller.node.manifest.sha256(weights.flat) if weights.complete else "",
        wall_seconds=wall_seconds,
        train_seconds=controller.train_seconds,
        samples_per_second=rates.get("samples_per_second", 0.0),
        steps_per_second=rates.get("steps_per_second", 0.0),
        sync_fraction=totals.sync_fraction,
        phase_seconds=dict(totals.phase_seconds),
        bottleneck=bottleneck(totals.recent, tree.shape()),
        mixed_recompute=controller.mixed_recomputes,
        spheres=spheres,
        tree={s["id"]: s["parent"] for s in spheres},
        run_id=controller.run_id,
        run_dir=str(controller.run_dir),
        reason=controller.reason,
        error=controller.error,
    )


def _sphere_summary(tree: Tree, name: str) -> dict[str, Any]:
    sphere: dict[str, Any] = {"id": name, "parent": tree.parent_of(name), "state": tree.state_of(name)}
    found = tree.report_of(name)
    if found is not None:
        report = found[1]
        sphere |= {
            "host": report.host,
            "pid": report.pid,
            "role": report.role,
            "microbatches": report.microbatches_count,
            "samples": report.samples_count,
            "phase_seconds": dict(report.phase_seconds),
            "sent_up_bytes": report.sent_up_bytes,
            "sent_down_bytes": report.sent_down_bytes,
            "peak_resident_bytes": report.peak_resident_bytes,
        }
    return sphere


def write_results(directory: RunDirectory, controller: Controller, summary: Summary) -> None:
    """Write weights, summary and report of a run that is over, and note in the summary where the report is.

    Raises ConfigError. For a thread.
    """
    weights = controller.tree.hub.weights
    if controller.step and weights.complete:
        write_safetensors(
            directory.path / "weights.safetensors",
            controller.node.manifest,
            weights.flat,
            {"step": str(controller.step), "weights_sha256": summary.weights_sha256, "run_id": controller.run_id},
        )
    summary.report = str(directory.path / "report.html")
    directory.write_json("summary.json", summary.to_dict())
    write_report(directory.path)


def completed_at(run_dir: Path, step: int) -> Summary | None:
    """Return how the run of a directory was completed at this step; None where it was not."""
    try:
        saved = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        found = (saved["state"], saved["steps"]) == (RunState.COMPLETED, step)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Summary.from_dict(saved) if found else None
