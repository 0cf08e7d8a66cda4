"""The same training in one plain loop: no tree, no gRPC, no threads. The oracle of the tests; put breakpoints here.

from control.reference import reference; reference(task, config)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from control.config import RunConfig
from control.gradients import MOST_SKIPPED_STEPS, Outcome, decide, outcome
from control.initial import initial_weights, node_config
from control.optimizers import make_optimizer
from control.schedules import learning_rate
from spheres.blocks import Block, halves
from spheres.config import NodeConfig
from spheres.errors import GradientError
from spheres.narrow import add_rounded, round_in_place
from spheres.numerics import global_norm
from spheres.reducer import Held
from spheres.task import Sums, Task
from spheres.tensors import Manifest, aligned_zeros
from spheres.worker import Computer, limit_threads

__all__ = ["CanonicalSum", "ReferenceResult", "SeenWeights", "reference"]

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ReferenceResult:
    """What the loop ended with. ``losses`` has the mean training loss of each step, NaN where none was left.

    The weights are control's own, in float32; the evaluation is of what spheres would see of them.
    """

    weights_sha256: str
    weights: dict[str, Array]
    losses: list[float]
    evaluation: Sums | None
    #: what became of each step
    outcomes: list[Outcome]


class SeenWeights:
    """The weights as spheres see them: control's own, or a copy rounded to the run's type for them (N21).

    Mutable state: the copy, of the moment of the last ``refresh``.
    """

    def __init__(self, manifest: Manifest, master: Array, dtype: str) -> None:
        self._master, self._dtype = master, dtype
        self._flat = master if dtype == "float32" else aligned_zeros(manifest.size)
        self.views = manifest.views(self._flat, writeable=False)
        self.refresh()

    def refresh(self) -> None:
        """Follow the master."""
        if self._flat is not self._master:
            np.copyto(self._flat, self._master)
            round_in_place(self._flat, self._dtype)


class CanonicalSum:
    """The canonical sum, written down: left + right, rounded, at every node of the tree over microbatch indices.

    Mutable state: gradient buffers that are used again. ``release`` gives back what a call returned.
    """

    def __init__(self, node: NodeConfig, task: Task, weights: Mapping[str, Array]) -> None:
        self._computer, self._size, self._weights = Computer(node, task), node.manifest.size, weights
        self._dtype = node.gradient_dtype
        self._buffers: list[Array] = []

    def __call__(self, step: int, block: Block, see: Callable[[Block, Held], None] = lambda *_: None) -> Held:
        """Return the sum over a block. ``see`` is shown that of each canonical block in it; not to be kept.

        Raises GradientError where a microbatch is not finite and the run halts for that, or metrics are too many.
        """
        if block.width == 1:
            held = self._microbatch(step, block.lo)
        else:
            left, right = (self(step, half, see) for half in halves(block))
            held = self._add(left, right)
        see(block, held)
        return held

    def release(self, held: Held) -> None:
        if held.array is not None:
            self._buffers.append(held.array)

    def _microbatch(self, step: int, index: int) -> Held:
        out = self._buffers.pop() if self._buffers else aligned_zeros(self._size)
        held = self._computer.microbatch(self._weights, step, index, out)
        if held.array is None:  # an empty microbatch is no leaf of the tree, and neither is one that is left out
            self._buffers.append(out)
        return held

    def _add(self, left: Held, right: Held) -> Held:
        skipped = left.skipped + right.skipped
        if left.array is None or right.array is None or left.sums is None or right.sums is None:
            one = left if right.array is None else right
            return Held(one.array, one.sums, skipped)
        add_rounded(left.array, right.array, left.array, self._dtype)  # whether the sum is finite is looked at
        self._buffers.append(right.array)
        return Held(left.array, self._computer.add(left.sums, right.sums), skipped)


def reference(task: Task, config: RunConfig, *, steps: int | None = None) -> ReferenceResult:
    """Train ``steps`` steps (default: the configuration's total) and evaluate once.

    Raises GradientError where a run would halt for what is not finite.
    """
    limit_threads()
    manifest, flat = initial_weights(task, config)
    node = node_config(task, config, manifest, run_id="reference")
    sampler = node.sampler
    optimizer = make_optimizer(config.optimizer, manifest)
    seen = SeenWeights(manifest, flat, node.weights_dtype)
    total = config.total_steps(sampler.steps_per_epoch)
    canonical_sum = CanonicalSum(node, task, seen.views)
    losses: list[float] = []
    outcomes: list[Outcome] = []

    for step in range(min(total, steps if steps is not None else total)):
        summed = canonical_sum(step, Block(0, config.microbatches))
        gradient, sums = summed.array, summed.sums
        losses.append(math.nan if sums is None else sums.loss / sums.count)
        decision = None
        if gradient is not None and sums is not None and math.isfinite(sums.loss):
            norm = global_norm(manifest, gradient)
            decision = decide(norm, sums.count, clip_norm=config.clip_norm, clip_value=config.clip_value)
        decided = outcome(
            config.on_nonfinite,
            skipped=len(summed.skipped),
            count=0 if sums is None else sums.count,
            finite=decision is not None and decision.finite,
        )
        if decided is None:
            raise GradientError(f"the summed gradient of step {step} is not finite")
        outcomes.append(decided)
        if decided is not Outcome.SKIPPED_STEP:
            assert decision is not None
            assert gradient is not None
            decision.apply(gradient, 0, gradient.size)
            optimizer.begin()
            rate = learning_rate(config.schedule, config.learning_rate, step, total)
            optimizer.update(flat, gradient, rate, 0, flat.size)
            seen.refresh()
        canonical_sum.release(summed)
        if outcomes[-MOST_SKIPPED_STEPS:] == [Outcome.SKIPPED_STEP] * MOST_SKIPPED_STEPS:
            raise GradientError(f"{MOST_SKIPPED_STEPS} steps in a row were skipped, up to step {step}")

    computer = Computer(node, task)
    evaluation: Sums | None = None
    for index in range(config.eval_microbatches if node.test_size else 0):
        part = computer.evaluate(seen.views, index)
        evaluation = part if evaluation is None or part is None else computer.add(evaluation, part)
    return ReferenceResult(manifest.sha256(flat), manifest.views(flat, writeable=False), losses, evaluation, outcomes)
