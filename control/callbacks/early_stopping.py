"""Stop when evaluations have stopped getting better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from control.events import Event, RunHandle
from spheres.errors import ConfigError

__all__ = ["EarlyStopping"]


class EarlyStopping:
    """Ask for a stop after ``patience`` evaluations in a row that were no better than the best by ``min_delta``."""

    def __init__(
        self,
        patience: int,
        metric: str = "accuracy",
        direction: Literal["max", "min"] = "max",
        *,
        min_delta: float = 0.0,
    ) -> None:
        if patience < 1:
            raise ConfigError(f"early stopping: patience must be at least 1 evaluation, not {patience}")
        self.patience = patience
        self.metric = metric
        self._sign = 1.0 if direction == "max" else -1.0
        self._min_delta = min_delta
        # mutable: best value so far, evaluations since, and the step of the latest one
        self._best: float | None = None
        self._waited = 0
        self._step = -1

    def on_evaluation(self, event: Event, run: RunHandle) -> None:
        values = {"loss": event.record.get("loss"), **event.record.get("metrics", {})}
        value = values.get(self.metric)
        if value is None:
            raise ConfigError(f"early stopping: no metric {self.metric!r}; evaluations have {', '.join(values)}")
        if event.step <= self._step:
            return  # done again after a restore
        self._step = event.step
        # a value that is not a number is no better than any
        if self._best is None or self._sign * (value - self._best) > self._min_delta:
            self._best, self._waited = value, 0
            return
        self._waited += 1
        if self._waited >= self.patience:
            run.request_stop(
                f"early stopping: {self.metric} no better than {self._best:.6g} for {self._waited} evaluations"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "waited": self._waited, "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._best, self._waited, self._step = state["best"], state["waited"], state["step"]
