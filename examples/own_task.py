"""A task of your own: logistic regression on points that the task makes up itself.

Run it from here:          python examples/own_task.py
or by name, from its folder:  cd examples && control-cli start --task own_task:Points --spheres 3 --epochs 5
"""

from __future__ import annotations

import numpy as np

from spheres.task import Sums


class Points:
    """Two clouds of points, and a line between them. No base class: a task is any object with these four methods."""

    def __init__(self, samples: int | str = 2000) -> None:
        made = np.random.default_rng(7)  # its own seed: every sphere makes the same points
        count = int(samples)  # options come as text from --task-option
        labels = made.integers(0, 2, count)
        points = (made.standard_normal((count, 2)) + 2.0 * labels[:, None]).astype(np.float32)
        held_out = count // 5
        self.x = {"train": points[held_out:], "test": points[:held_out]}
        self.y = {"train": labels[held_out:], "test": labels[:held_out]}

    def init_weights(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"slope": rng.standard_normal(2, dtype=np.float32), "offset": np.zeros(1, np.float32)}

    def size(self, split: str) -> int:
        return len(self.y[split])

    def gradient(self, weights, samples, rng, out) -> Sums:
        x, error, sums = self._forward(weights, "train", samples)
        out["slope"] += x.T @ error  # sums over the samples, not means; written into out, never bound anew
        out["offset"] += error.sum()
        return sums

    def evaluate(self, weights, samples) -> Sums:
        return self._forward(weights, "test", samples)[2]

    def _forward(self, weights, split, samples):
        x, y = self.x[split][samples], self.y[split][samples]
        score = x @ weights["slope"] + weights["offset"]
        loss = float(np.logaddexp(0, np.where(y == 1, -score, score)).sum(dtype=np.float64))
        error = (1 / (1 + np.exp(-score)) - y).astype(np.float32)
        return x, error, Sums(loss, len(samples), {"accuracy": float(np.sum((score > 0) == (y == 1)))})


if __name__ == "__main__":  # spheres import this file too: only the script itself may start a run
    from control.training import train

    summary = train(Points, spheres=2, epochs=5, learning_rate=0.5)
    print(f"{summary.steps} steps, test accuracy {summary.metrics['accuracy']:.1%}, weights in {summary.run_dir}")
