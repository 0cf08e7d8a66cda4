"""From a sealed step to the next version of the weights: mean, clipping, optimizer, digest, and their statistics.

It owns the optimizer. Which step is done, and what becomes of the figures, is the controller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from control.config import RunConfig
from control.gradients import GradientDecision, Outcome, decide, outcome
from control.optimizers import LANES, make_optimizer
from control.schedules import learning_rate
from spheres.errors import GradientError
from spheres.numerics import BLOCK_ELEMENTS, Run, crc32c, global_norm, in_turn, is_finite, version_digest
from spheres.task import Sums
from spheres.tensors import Manifest
from spheres.weights import Weights

__all__ = ["Update", "Updater", "master_digest"]

Array = npt.NDArray[np.float32]

#: of larger models statistics are taken at every tenth step only
_STATISTICS_ELEMENTS = 1 << 16
_STATISTICS_EVERY = 10
#: chunks that are updated before children may have them
_CHUNKS = 4


@dataclass(frozen=True, slots=True)
class Update:
    """What one update did. The statistics are over all tensors together; None where they were left out."""

    outcome: Outcome
    #: None where the step was skipped
    decision: GradientDecision | None
    learning_rate: float
    #: of the sum of the gradients, before it became their mean; 0 where no microbatch had one
    gradient_crc32c: int
    gradient: dict[str, float] | None
    weights: dict[str, float] | None
    #: digest of control's own weights, in hexadecimal, where spheres see rounded ones; else theirs is the same
    master_digest: str | None = None


class Updater:
    """Mutable state: the optimizer's buffers."""

    def __init__(self, config: RunConfig, manifest: Manifest, total_steps: int) -> None:
        self.optimizer = make_optimizer(config.optimizer, manifest)
        self._config, self._manifest, self._total_steps = config, manifest, total_steps

    def apply(
        self,
        weights: Weights,
        gradient: Array,
        sums: Sums | None,
        *,
        step: int,
        term: int,
        skipped: int = 0,
        rate: float | None = None,
        announce: Callable[[], None] = lambda: None,
        progress: Callable[[], None] = lambda: None,
        run: Run = in_turn,
    ) -> Update:
        """Turn the summed ``gradient`` into its clipped mean and the weights into version ``step + 1``, in place.

        What it updates is the float32 master, ``weights.flat``; what spheres see of it is made by ``weights.publish``.

        Every decision comes before the first change (N16). Then ``announce`` is called, and ``progress`` whenever more
        of the new version may be read, the last time when it is whole. ``run`` may do what it is given side by side.

        ``sums`` None: no microbatch has a gradient. ``skipped`` of them were left out. ``rate`` None: the schedule's.
        Of a skipped step the next version is the same bytes, and the optimizer counts nothing. Raises GradientError,
        with nothing changed, where the sum is not finite and the run halts for that (N16); and where the new weights
        are not, which only a checkpoint can undo.
        """
        config, manifest = self._config, self._manifest
        if rate is None:
            rate = learning_rate(config.schedule, config.learning_rate, step, self._total_steps)
        decided, decision, checksum = self._decide(gradient, sums, skipped, run)
        if decided is None:
            weights.publish(term=term, version=step)  # as they were
            raise GradientError(
                f"the summed gradient of step {step} is not finite, though each microbatch's is: "
                "the loss has grown too large; lower the learning rate"
            )
        weights.announce(term=term, version=step + 1)
        announce()
        if decision is not None:
            self.optimizer.begin()
        self._renew(weights, gradient, decision, rate, step=step, progress=progress, run=run)
        weights.seal()
        progress()
        wanted = manifest.size <= _STATISTICS_ELEMENTS or step % _STATISTICS_EVERY == 0
        return Update(
            decided,
            decision,
            rate,
            checksum,
            _overall(manifest, gradient) if wanted and decision is not None else None,
            _overall(manifest, weights.flat) if wanted else None,
            master_digest(config, manifest, weights.flat),
        )

    def _decide(
        self, gradient: Array, sums: Sums | None, skipped: int, run: Run
    ) -> tuple[Outcome | None, GradientDecision | None, int]:
        """Return what becomes of the step (None: the run halts), how the sum is applied, if it is, and its CRC-32C."""
        config, checksum, decision = self._config, [0], None
        if sums is not None:

            def check() -> None:
                checksum[0] = crc32c(gradient)

            norm = global_norm(self._manifest, gradient, lambda works: run([check, *works]))
            decision = decide(norm, sums.count, clip_norm=config.clip_norm, clip_value=config.clip_value)
        decided = outcome(
            config.on_nonfinite,
            skipped=skipped,
            count=0 if sums is None else sums.count,
            finite=decision is not None and sums is not None and decision.finite and math.isfinite(sums.loss),
        )
        return decided, None if decided is Outcome.SKIPPED_STEP else decision, checksum[0]

    def _renew(
        self,
        weights: Weights,
        gradient: Array,
        decision: GradientDecision | None,
        rate: float,
        *,
        step: int,
        progress: Callable[[], None],
        run: Run,
    ) -> None:
        """Make the new version, some chunks at a time; each may be read from then on."""
        finite = [True] * LANES
        chunk, count = weights.config.chunk_elements, weights.config.chunk_count

        def some(first: int, lane: int) -> None:
            for index in range(first, min(first + _CHUNKS, count)):
                if decision is not None:
                    end = min((index + 1) * chunk, gradient.size)
                    # everything that is done to a block while it is in the cache
                    for lo in range(index * chunk, end, BLOCK_ELEMENTS):
                        hi = min(lo + BLOCK_ELEMENTS, end)
                        decision.apply(gradient, lo, hi)
                        self.optimizer.update(weights.flat, gradient, rate, lo, hi, lane)
                        finite[lane] = finite[lane] and is_finite(weights.flat[lo:hi])
                weights.prepare(index, index + 1)

        for first in range(0, count, LANES * _CHUNKS):
            end = min(first + LANES * _CHUNKS, count)
            run([partial(some, start, lane) for lane, start in enumerate(range(first, end, _CHUNKS))])
            if not all(finite):
                raise GradientError(f"the weights are not finite after step {step}; lower the learning rate or clip")
            weights.offer(end)
            progress()


def master_digest(config: RunConfig, manifest: Manifest, flat: Array) -> str | None:
    """Return the digest of control's float32 weights where spheres see rounded ones; None where it is theirs.

    It is made as that of a version is, with chunks of ``BLOCK_ELEMENTS``. Two masters may round to the same weights:
    without it a replay would miss bits.
    """
    if config.weights_wire_dtype == "float32":
        return None
    checksums = [crc32c(flat[start : start + BLOCK_ELEMENTS]) for start in range(0, flat.size, BLOCK_ELEMENTS)]
    return version_digest(manifest.digest, checksums).hex()


def _overall(manifest: Manifest, flat: Array) -> dict[str, float]:
    """Return norm, min, max, mean and variance over all tensors together.

    Tensor by tensor is ``numerics.statistics``; this one is for every step.
    """
    total = squares = 0.0
    for start in range(0, flat.size, BLOCK_ELEMENTS):
        wide = flat[start : start + BLOCK_ELEMENTS].astype(np.float64)
        total += float(np.add.reduce(wide))
        np.multiply(wide, wide, out=wide)
        squares += float(np.add.reduce(wide))
    # padding is zeros: it changes no sum, but it must not be a minimum or maximum
    views = [flat[spec.offset : spec.offset + spec.size] for spec in manifest.tensors if spec.size]
    count = manifest.parameters
    mean = total / count
    return {
        "norm": math.sqrt(squares),
        "min": min(float(np.minimum.reduce(view)) for view in views),
        "max": max(float(np.maximum.reduce(view)) for view in views),
        "mean": mean,
        "variance": max(0.0, squares / count - mean * mean),
    }
