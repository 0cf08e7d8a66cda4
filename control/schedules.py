"""The learning rate of each step: a pure function of configuration, step and total.

No state, so a resumed run has the rate of the undisturbed one. Optimizers and parameter groups are elsewhere.
"""

from __future__ import annotations

import math

from control.config import ScheduleConfig

__all__ = ["follows_total", "learning_rate"]


def learning_rate(config: ScheduleConfig, base: float, step: int, total_steps: int) -> float:
    """Return the rate for the update that makes version ``step`` into ``step + 1``.

    Warm-up: ``base * (step + 1) / warmup_steps``, so that no step has rate 0 and step ``warmup_steps - 1`` reaches
    ``base``. Then, with p = the part done of the steps from the end of the warm-up to the end of the decay:
    cosine   floor + (base - floor) (1 + cos(pi p)) / 2   (Loshchilov and Hutter, SGDR, ICLR 2017, one period)
    linear   base + (floor - base) p
    step     base * gamma ** (steps after the warm-up // step_size), at least the floor
    where the floor is ``config.floor * base``, and stays once it is reached.

    Cosine and linear end at ``decay_steps``, counted from the start of the run, or at the run's total where that is
    not given. So a run that is resumed with a larger ``--steps`` or ``--epochs`` goes on on the curve of the new
    total, and the rate jumps up at that point (to the middle of the curve where the total was doubled).
    Give ``decay_steps`` for a curve that a growing total does not move; ``follows_total`` tells the two apart.
    """
    if step < config.warmup_steps:
        return base * (step + 1) / config.warmup_steps
    after = step - config.warmup_steps
    floor = config.floor * base
    if config.kind == "constant":
        return base
    if config.kind == "step":
        assert config.step_size is not None  # the configuration refuses "step" without it
        return max(floor, base * config.gamma ** (after // config.step_size))
    end = total_steps if config.decay_steps is None else config.decay_steps
    span = end - config.warmup_steps
    part = min(1.0, after / span) if span > 0 else 1.0
    if config.kind == "linear":
        return base + (floor - base) * part
    return floor + (base - floor) * (1.0 + math.cos(math.pi * part)) / 2.0


def follows_total(config: ScheduleConfig) -> bool:
    """Whether another total changes the rates, so that resuming with one is worth a word to the user."""
    return config.kind in ("cosine", "linear") and config.decay_steps is None
