"""Callbacks that come with the project; ``docs/callbacks.md`` shows how to write one.

Checkpoints are the controller's own: they do not depend on a callback being there.
"""

from __future__ import annotations

from control.callbacks.early_stopping import EarlyStopping
from control.callbacks.metrics_files import MetricsFiles
from control.callbacks.progress import Progress
from control.callbacks.tensorboard import TensorBoard
from control.config import RunConfig
from control.events import Callback

__all__ = ["EarlyStopping", "MetricsFiles", "Progress", "TensorBoard", "configured"]


def configured(config: RunConfig) -> list[Callback]:
    """Return the callbacks that the configuration asks for. Raises ConfigError where an extra is missing."""
    callbacks: list[Callback] = []
    if config.early_stopping is not None:
        callbacks.append(EarlyStopping(config.early_stopping, config.best_metric, config.best_direction))
    if config.metrics_csv:
        callbacks.append(MetricsFiles())
    if config.tensorboard:
        callbacks.append(TensorBoard())
    return callbacks
