"""The same training in one plain loop: no tree, no gRPC, no threads. The oracle of the tests; put breakpoints here.

from control.reference import reference; reference(task, config)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from control.config import RunConfig
from control.gradients import prepare
from control.initial import initial_weights, node_config
from control.optimizers import make_optimizer
from control.schedules import learning_rate
from spheres.blocks import Block, halves
from spheres.numerics import add_sums
from spheres.task import Sums, Task
from spheres.tensors import aligned_zeros
from spheres.worker import Computer, limit_threads

__all__ = ["ReferenceResult", "reference"]

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ReferenceResult:
    """What the loop ended with. ``losses`` has the mean training loss of each step."""

    weights_sha256: str
    weights: dict[str, Array]
    losses: list[float]
    evaluation: Sums | None


def reference(task: Task, config: RunConfig, *, steps: int | None = None) -> ReferenceResult:
    """Train ``steps`` steps (default: the configuration's total) and evaluate once."""
    limit_threads()
    manifest, flat = initial_weights(task, config)
    node = node_config(task, config, manifest, run_id="reference")
    computer, sampler = Computer(node, task), node.sampler
    optimizer = make_optimizer(config.optimizer, manifest)
    weights = manifest.views(flat, writeable=False)
    total = config.total_steps(sampler.steps_per_epoch)
    buffers: list[Array] = []
    losses: list[float] = []

    def block_sum(step: int, block: Block) -> tuple[Array, Sums] | None:
        """The canonical sum, written down: left + right at every node of the tree over microbatch indices."""
        if block.width == 1:
            out = buffers.pop() if buffers else aligned_zeros(manifest.size)
            sums = computer.gradient(weights, step, block.lo, out)
            if sums is None:  # an empty microbatch is no leaf
                buffers.append(out)
                return None
            return out, sums
        left, right = (block_sum(step, half) for half in halves(block))
        if left is None or right is None:
            return left or right
        np.add(left[0], right[0], out=left[0])
        buffers.append(right[0])
        return left[0], add_sums(left[1], right[1])

    for step in range(min(total, steps if steps is not None else total)):
        summed = block_sum(step, Block(0, config.microbatches))
        assert summed is not None  # a step has at least one sample
        gradient, sums = summed
        prepare(manifest, gradient, sums.count, clip_norm=config.clip_norm, clip_value=config.clip_value)
        optimizer.begin()
        rate = learning_rate(config.schedule, config.learning_rate, step, total)
        optimizer.update(flat, gradient, rate, 0, flat.size)
        losses.append(sums.loss / sums.count)
        buffers.append(gradient)

    evaluation: Sums | None = None
    for index in range(config.eval_microbatches if node.test_size else 0):
        part = computer.evaluate(weights, index)
        evaluation = part if evaluation is None or part is None else add_sums(evaluation, part)
    return ReferenceResult(manifest.sha256(flat), weights, losses, evaluation)
