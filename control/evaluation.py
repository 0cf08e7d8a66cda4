"""When the weights are evaluated on the test split, and what becomes of the figures.

That it is work of the tree like any other (ADR 0005), and when it is done, is the controller's.
"""

from __future__ import annotations

from typing import Any

from control.config import RunConfig
from control.position import Position
from spheres.config import NodeConfig
from spheres.task import Sums

__all__ = ["Evaluations"]


class Evaluations:
    """The evaluations of one run. Mutable state: the step of the last one."""

    def __init__(self, config: RunConfig, node: NodeConfig, total_steps: int) -> None:
        self._config, self._node, self._total_steps = config, node, total_steps
        #: steps committed when the last one began; -1: none since the start, or since a restore
        self.last = -1

    def __repr__(self) -> str:
        return f"<Evaluations last={self.last}>"

    def due(self, step: int) -> bool:
        """Whether one is to be done now, with so many steps committed."""
        return self.last != step and self.due_after(step)

    def due_after(self, step: int) -> bool:
        """Whether one belongs behind so many steps, done or not: where it is asked for, and at the end of the run."""
        if self._node.test_size == 0 or step == 0:
            return False
        every = self._config.eval_every
        if step >= self._total_steps:
            return True
        return every is not None and every.due(
            step=step, steps_per_epoch=self._node.sampler.steps_per_epoch, seconds=0.0
        )

    def note(self, position: Position, sums: Sums, *, moved: int, seconds: float) -> dict[str, Any]:
        """Take the figures over into ``position``, the best value too; return the event's record.

        ``moved``: microbatches computed in another environment than they were meant for. ``seconds``: what it took.
        """
        position.mixed_recomputes += moved
        metrics = {name: value / sums.count for name, value in sums.metrics.items()}
        loss = sums.loss / sums.count
        position.metrics.update({**metrics, "test_loss": loss})
        best = position.note_best({**metrics, "loss": loss}, self._config)
        epoch = self._node.sampler.epoch_of(position.step - 1)
        record: dict[str, Any] = {"step": position.step, "epoch": epoch, "loss": loss}
        record |= {"metrics": metrics, "samples": sums.count, "seconds": seconds, "best": best}
        record["mixed_recompute"] = moved
        return record
