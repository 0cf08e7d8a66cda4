"""``metrics.csv`` (a row per step) and ``evaluations.jsonl`` (a line per evaluation) in the run directory."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import IO, Any

from control.events import Event, RunHandle

__all__ = ["MetricsFiles"]

#: columns before the task's own metrics; dots go into the record
COLUMNS = (
    "step", "epoch", "samples", "loss", "learning_rate", "gradient.norm", "weights.norm", "seconds.step",
    "sync_fraction", "bytes_up", "bytes_down",
)  # fmt: skip


class MetricsFiles:
    """For spreadsheets and plots; the journal has the same and more. What a restore takes back is cut off."""

    def __init__(self) -> None:
        # mutable: the open files, the columns, which follow from the first step, and the last steps written
        self._csv: IO[str] | None = None
        self._evaluations: IO[str] | None = None
        self._columns: list[str] = []
        self._step = self._evaluated = -1

    def on_train_start(self, event: Event, run: RunHandle) -> None:
        self._begin(run.run_dir, run.step)

    def on_batch_end(self, event: Event, run: RunHandle) -> None:
        if self._csv is None:  # registered in mid-run
            self._begin(run.run_dir, event.step)
        assert self._csv is not None
        if event.step <= self._step:
            # a restore in mid-run. An evaluation of step s is of the weights before s: that of this step stands.
            self._take_back(event.step, evaluations_from=event.step + 1)
        writer = csv.writer(self._csv, lineterminator="\n")
        if not self._columns:
            self._columns = [*COLUMNS, *(f"metrics.{name}" for name in event.record["metrics"])]
            writer.writerow(self._columns)
        writer.writerow([_pick(event.record, column) for column in self._columns])
        self._step = event.step

    def on_evaluation(self, event: Event, run: RunHandle) -> None:
        if self._evaluations is None:
            self._begin(run.run_dir, event.step)
        assert self._evaluations is not None
        if event.step <= self._evaluated:
            self._take_back(event.step, evaluations_from=event.step)
        self._evaluations.write(json.dumps(dict(event.record)) + "\n")
        self._evaluated = event.step

    def on_train_end(self, event: Event, run: RunHandle) -> None:
        self._close()

    def _begin(self, run_dir: Path, step: int) -> None:
        self._close()
        self._csv = _open(run_dir / "metrics.csv")
        self._evaluations = _open(run_dir / "evaluations.jsonl")
        self._take_back(step, evaluations_from=step)
        self._csv.seek(0)
        self._columns = next(csv.reader([self._csv.readline()]), [])
        self._csv.seek(0, 2)

    def _take_back(self, step: int, *, evaluations_from: int) -> None:
        """Cut off rows from ``step`` on and evaluations from that step on."""
        assert self._csv is not None
        assert self._evaluations is not None
        _cut(self._csv, step)
        _cut(self._evaluations, evaluations_from)
        self._step, self._evaluated = step - 1, evaluations_from - 1

    def _close(self) -> None:
        for file in (self._csv, self._evaluations):
            if file is not None:
                file.close()
        self._csv = self._evaluations = None


def _pick(record: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        record = record.get(part, {})
    return "" if record == {} else record


def _open(path: Path) -> IO[str]:
    # a line is out when it is written: a kill must not take rows of steps that the checkpoint has
    return path.open("a+", buffering=1, newline="", encoding="utf-8")


def _cut(file: IO[str], step: int) -> None:
    """Cut a file at the first line of ``step`` or later, or that a kill left without an end."""
    file.seek(0)
    at = 0
    while (line := file.readline()).endswith("\n") and _step_of(line) < step:
        at += len(line.encode())
    file.seek(at)
    file.truncate()
    file.seek(0, 2)


def _step_of(line: str) -> int:
    """Return the step of a row or of an evaluation, -1 for headings and for what is neither."""
    number = line.partition(",")[0]
    if number.isdecimal():
        return int(number)
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1
