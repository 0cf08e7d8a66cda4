from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from control.config import RunConfig
from control.evaluation import Evaluations
from control.initial import initial_weights, node_config
from control.position import Position
from spheres.task import Sums
from spheres.testing.synthetic import Synthetic

TOTAL = 12


def evaluations(samples: int = 16, **settings: Any) -> Evaluations:
    config = RunConfig.model_validate({"task": "synthetic", "steps": TOTAL, **settings})
    task = Synthetic(parameters=8)
    manifest, _ = initial_weights(task, config)
    node = node_config(task, config, manifest, run_id="r-1")
    return Evaluations(config, replace(node, test_size=samples), TOTAL)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"eval_every": "5steps"}, [5, 10, 12]),
        ({"eval_every": None}, [12]),
        ({"eval_every": "5steps", "samples": 0}, []),
    ],
    ids=["where it is asked for and at the end", "at the end alone", "without a test split"],
)
def test_when_one_is_due(settings: dict[str, Any], steps: list[int]) -> None:
    made = evaluations(**settings)
    assert [step for step in range(TOTAL + 1) if made.due(step)] == steps


def test_one_that_was_begun_is_due_no_more_but_belongs_there_still() -> None:
    made = evaluations(eval_every="5steps")
    made.last = 5
    assert not made.due(5)
    assert made.due_after(5)
    assert made.due(10)


def test_the_figures_are_means_and_the_best_is_known() -> None:
    made = evaluations(best_metric="accuracy", best_direction="max")
    position = Position(step=5, mixed_recomputes=1)
    record = made.note(position, Sums(8.0, 16, {"accuracy": 12.0}), moved=2, seconds=0.5)
    assert (record["step"], record["loss"], record["metrics"]) == (5, 0.5, {"accuracy": 0.75})
    assert (record["samples"], record["seconds"], record["mixed_recompute"]) == (16, 0.5, 2)
    assert record["best"]
    assert position == Position(5, {"accuracy": 0.75, "test_loss": 0.5}, 0.75, 5, mixed_recomputes=3)
    position.step = 10
    assert not made.note(position, Sums(8.0, 16, {"accuracy": 8.0}), moved=0, seconds=0.5)["best"]
    assert (position.best_value, position.best_step, position.metrics["accuracy"]) == (0.75, 5, 0.5)
