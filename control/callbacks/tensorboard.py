"""TensorBoard scalars in ``tensorboard/`` of the run directory (extra ``tensorboard``)."""

from __future__ import annotations

import os
from typing import Any

from control.events import Event, RunHandle
from spheres.errors import ConfigError

__all__ = ["TensorBoard"]


class TensorBoard:
    """Loss, metrics, learning rate, norms and times per step; evaluations under ``evaluation/``."""

    def __init__(self) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "tensorboard needs the package tensorboardX: pip install 'armillary[tensorboard]'"
            ) from error
        self._make = SummaryWriter
        # mutable: made when the run directory is known, and anew after each restore; how often; the last step written
        self._writer: Any = None
        self._count = 0
        self._step = -1

    def on_train_start(self, event: Event, run: RunHandle) -> None:
        self._begin(run, run.step)

    def on_batch_end(self, event: Event, run: RunHandle) -> None:
        record = event.record
        if self._writer is None or event.step <= self._step:  # registered, or restored, in mid-run
            self._begin(run, event.step)
        self._step = event.step
        values = {"loss": record["loss"], "learning_rate": record["learning_rate"], **record["metrics"]}
        # statistics of large models come with some steps only
        for part in ("gradient", "weights"):
            values |= {f"{part}/{key}": record[part].get(key) for key in ("norm", "variance")}
        values |= {f"seconds/{name}": value for name, value in record["seconds"].items()}
        self._add("train", values, event)

    def on_evaluation(self, event: Event, run: RunHandle) -> None:
        if self._writer is None or event.step <= self._step:
            self._begin(run, event.step)
        self._add("evaluation", {"loss": event.record["loss"], **event.record["metrics"]}, event)

    def on_train_end(self, event: Event, run: RunHandle) -> None:
        if self._writer is not None:
            self._writer.close()

    def _begin(self, run: RunHandle, step: int) -> None:
        if self._writer is not None:
            self._writer.close()
        self._count += 1
        # purge_step: the viewer drops what a restore takes back; the suffix: files of one second have one name
        self._writer = self._make(
            str(run.run_dir / "tensorboard"), purge_step=step, filename_suffix=f".{os.getpid()}.{self._count}"
        )
        self._step = step - 1

    def _add(self, group: str, values: dict[str, Any], event: Event) -> None:
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"{group}/{name}", value, event.step, event.time)
