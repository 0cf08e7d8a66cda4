"""What a node computes itself: a block at a time on its compute thread, and what becomes of one that fails.

Which block is next is the ledger's to say. What follows for the tree is the hub's.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto

from spheres.gradients import Gradients
from spheres.ledger import Ledger
from spheres.reducer import Held
from spheres.v1 import work_pb2 as pb
from spheres.weights import Weights
from spheres.work import TRAIN, Counts, Work
from spheres.worker import Failure, Unit, Worker

__all__ = ["Computing", "Outcome", "told"]

#: seconds for which a sphere whose task has failed computes nothing, doubled each time up to the longest
ASIDE_SECONDS, LONGEST_ASIDE = 2.0, 64.0
#: far more than the longest rest needs, and few enough for a float
_MOST_DOUBLINGS = 32


def told(failure: Failure, *, sphere: str, step: int, count: int = 0) -> pb.TaskFailure:
    """Return what control is told of a failure on ``sphere``, the ``count``-th there."""
    return pb.TaskFailure(
        failures_count=count,
        sphere_id=sphere,
        microbatch=failure.microbatch,
        error=failure.error,
        traceback=failure.traceback,
        sample_ids=failure.sample_ids,
        invalid_gradient=failure.invalid,
        step=step,
    )


class Outcome(Enum):
    """What came of a block that the compute thread was given."""

    #: its step is over: it says nothing
    PAST = auto()
    #: its weights were overwritten meanwhile: it says nothing, and is still to be computed
    TORN = auto()
    #: the task failed at it: see ``Computing.failure``
    FAILED = auto()
    #: it is held here now
    COMPUTED = auto()


class Computing:
    """Mutable state: the block in compute, and how often the task has failed and until when this node rests after it.

    A node without a worker, control or a relay, is never able. Times are by the loop's clock, in seconds.
    """

    def __init__(
        self,
        node_id: str,
        worker: Worker | None,
        *,
        ledger: Ledger,
        weights: Weights,
        gradients: Gradients,
        counts: Counts,
    ) -> None:
        self._id, self._worker, self._counts = node_id, worker, counts
        self._ledger, self._weights, self._gradients = ledger, weights, gradients
        #: what is being computed
        self.unit: Unit | None = None
        #: of the present step's computation here
        self.failure: pb.TaskFailure | None = None
        #: how often the task has failed here
        self.failures = 0
        self._aside_until = 0.0

    def able(self, now: float) -> bool:
        """Whether this node computes: it has a task, and does not rest after a failure."""
        return self._worker is not None and self._aside_until <= now

    def activity(self, now: float) -> str:
        """What this node computes, or why it does not, in words; empty where it has nothing to compute."""
        if self.unit is not None:
            return f"computing {self.unit.block} of step {self.unit.step}"
        if (left := self._aside_until - now) > 0:
            return f"set aside for {left:.0f} s: its task has failed {self.failures} times"
        return ""

    def retire(self) -> None:
        """Write no gradient again where one lies that was computed until now (N19)."""
        if self._worker is not None:
            self._worker.retire()

    def drop(self) -> None:
        """The step is over: what is in compute ends in a buffer that nobody reads (N14), what was kept goes."""
        if self.unit is not None:
            self.unit.cancelled = True
        self.unit = self.failure = None
        cache = self._gradients.reducer.cache
        if self._worker is not None:
            for held in cache.values():
                self._worker.release(held)
        cache.clear()

    def go_on(self, work: Work, done: Callable[[Unit, Held | Failure | None], None]) -> None:
        """Give the compute thread its next block, once the weights are whole (N17). ``done`` is called on the loop."""
        if self._worker is None or self.unit is not None or not self._weights.held:
            return
        block = self._ledger.next_unit()
        if block is None:
            return
        self.unit = Unit(block, work.step, work.kind == TRAIN, reads=self._weights.mark)
        self._worker.submit(self.unit, self._weights.views, done)

    def take(self, unit: Unit, result: Held | Failure | None) -> Outcome:
        """Take what the compute thread gives for a block."""
        assert self._worker is not None
        if unit is not self.unit:
            if isinstance(result, Held):
                self._worker.release(result)
            return Outcome.PAST
        self.unit = None
        if unit.reads is not None and not unit.reads.intact:
            # Overwritten while they were read: that step is sealed (N15), or they came anew; this says nothing (N19).
            self._counts.refused["torn"] += 1
            self._ledger.spoilt(unit.block)
            if isinstance(result, Held):
                self._worker.release(result)
            return Outcome.TORN
        self._gradients.phases.add("compute", unit.seconds, str(unit.block))
        self._counts.microbatches += unit.microbatches
        self._counts.samples += unit.samples
        if isinstance(result, Failure):
            self.failures += 1
            self.failure = told(result, sphere=self._id, step=unit.step, count=self.failures)
            return Outcome.FAILED
        assert result is not None  # only a cancelled unit gives nothing, and that is not self.unit
        self._gradients.reducer.cache[unit.block] = result
        self._ledger.computed(unit.block)
        return Outcome.COMPUTED

    def set_aside(self, now: float) -> float:
        """Rest after a failure; return for how many seconds."""
        seconds = min(ASIDE_SECONDS * 2.0 ** min(self.failures - 1, _MOST_DOUBLINGS), LONGEST_ASIDE)
        self._aside_until = now + seconds
        return seconds

    def rested(self, now: float) -> bool:
        """Whether the rest is over; then the failure is of the past."""
        if not self.able(now):
            return False
        self.failure = None
        return True
