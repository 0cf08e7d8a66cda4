"""From the sum of all gradients to what the optimizer gets: whether a step is applied, mean, clipping.

Decided once, for all, from the verdicts of the leaves and the norm of the sum (RECOVERY N16), then applied in pieces or
at once, with the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np
import numpy.typing as npt

from spheres.numerics import clip_value, mean, scale

__all__ = ["MOST_SKIPPED_STEPS", "GradientDecision", "Outcome", "Policy", "decide", "outcome"]

Array = npt.NDArray[np.float32]

#: what is done about gradients that are not finite: ``RunConfig.on_nonfinite``
Policy = Literal["halt", "skip-microbatch", "skip-step"]

#: A run ends when so many steps in a row were skipped. Neither weights nor optimizer move then, so only other samples
#: could help, and a hundred batches of them did not: it has diverged, and would compute for nothing till its total.
MOST_SKIPPED_STEPS = 100


class Outcome(StrEnum):
    """What becomes of a step, one decision for the whole run; ``decision`` in the journal."""

    APPLIED = "applied"
    #: the mean is over the microbatches that are left
    SKIPPED_MICROBATCHES = "skipped_microbatches"
    #: weights and optimizer stay as they are, under the next version
    SKIPPED_STEP = "skipped_step"


def outcome(policy: Policy, *, skipped: int, count: int, finite: bool) -> Outcome | None:
    """Decide from the number of microbatches left out, the samples left, and whether their sum is finite.

    None is: the run halts. A sum can overflow though each microbatch is finite; no part of it is to blame then, so both
    skipping policies skip the step.
    """
    if not skipped and finite:
        return Outcome.APPLIED
    if policy == "halt":
        return None
    if policy == "skip-microbatch" and count and finite:
        return Outcome.SKIPPED_MICROBATCHES
    return Outcome.SKIPPED_STEP


@dataclass(frozen=True, slots=True)
class GradientDecision:
    """What is done to the sum of one step's gradients."""

    #: whether every element is; where not, nothing is applied
    finite: bool
    #: norm of the mean gradient, before clipping
    norm: float
    #: samples in the sum
    count: int
    #: factor that brings the norm down to its limit; 1 where it is within
    clip_factor: float
    #: limit of each element, after the norm was clipped
    value_limit: float | None

    @property
    def clipped(self) -> bool:
        """Whether the norm was above its limit; clipping by value is not counted."""
        return self.clip_factor != 1.0

    def apply(self, flat: Array, lo: int, hi: int) -> None:
        """Turn elements ``[lo, hi)`` of the sum into the clipped mean, in place; each element once."""
        if not self.finite:
            raise ValueError("a gradient that is not finite must not be applied")
        piece = flat[lo:hi]
        mean(piece, self.count)
        if self.clipped:
            scale(piece, self.clip_factor)
        if self.value_limit is not None:
            clip_value(piece, self.value_limit)


def decide(sum_norm: float, count: int, *, clip_norm: float | None, clip_value: float | None) -> GradientDecision:
    """Decide from the norm of the sum over ``count`` samples, which can be gathered while chunks arrive."""
    norm = sum_norm * float(np.float32(1.0 / count))
    factor = clip_norm / norm if clip_norm is not None and clip_norm < norm < math.inf else 1.0
    return GradientDecision(math.isfinite(norm), norm, count, factor, clip_value)
