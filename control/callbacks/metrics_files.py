"""``metrics.csv`` (a row per step) and ``evaluations.jsonl`` (a line per evaluation) in the run directory."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
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
        # mutable: the open files, and the columns, which follow from the first step
        self._csv: IO[str] | None = None
        self._evaluations: IO[str] | None = None
        self._columns: list[str] = []

    def on_train_start(self, event: Event, run: RunHandle) -> None:
        steps, evaluations = run.run_dir / "metrics.csv", run.run_dir / "evaluations.jsonl"
        self._close()
        _cut(steps, lambda line: not (number := line.partition(",")[0]).isdecimal() or int(number) < run.step)
        # an evaluation of step s is of the weights before s: at the restored step it is done again
        _cut(evaluations, lambda line: json.loads(line)["step"] < run.step)
        with steps.open("a+", newline="", encoding="utf-8") as file:
            file.seek(0)
            self._columns = next(csv.reader(file), [])
        self._csv = steps.open("a", newline="", encoding="utf-8")
        self._evaluations = evaluations.open("a", encoding="utf-8")

    def on_batch_end(self, event: Event, run: RunHandle) -> None:
        assert self._csv is not None  # train_start comes first
        writer = csv.writer(self._csv, lineterminator="\n")
        if not self._columns:
            self._columns = [*COLUMNS, *(f"metrics.{name}" for name in event.record["metrics"])]
            writer.writerow(self._columns)
        writer.writerow([_pick(event.record, column) for column in self._columns])

    def on_epoch_end(self, event: Event, run: RunHandle) -> None:
        if self._csv is not None:
            self._csv.flush()

    def on_evaluation(self, event: Event, run: RunHandle) -> None:
        assert self._evaluations is not None
        self._evaluations.write(json.dumps(dict(event.record)) + "\n")
        self._evaluations.flush()

    def on_train_end(self, event: Event, run: RunHandle) -> None:
        self._close()

    def _close(self) -> None:
        for file in (self._csv, self._evaluations):
            if file is not None:
                file.close()
        self._csv = self._evaluations = None


def _pick(record: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        record = record.get(part, {})
    return "" if record == {} else record


def _cut(path: Path, keep: Callable[[str], bool]) -> None:
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        # a last line without an end was cut by a crash
        path.write_text("".join(line for line in lines if line.endswith("\n") and keep(line)), encoding="utf-8")
