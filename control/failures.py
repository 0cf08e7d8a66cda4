"""What went wrong in the step in hand, and when it is enough to halt the run. Pure.

An exception is no death (DESIGN section 5): a task that raises is tried once more elsewhere, and a sphere that dies is
replaced; but what every sphere fails on must not run through all of them one by one.

| event                    | what is noted                   | halt                                        |
|--------------------------|---------------------------------|---------------------------------------------|
| start                    | nothing of the step before      | no                                          |
| an invalid gradient      | -                               | yes: it is the same everywhere              |
| raised                   | who, for that microbatch        | with the second try: another sphere, or the |
|                          |                                 | same after its rest, if nobody else came    |
| lost, while it computed  | that life of it, for that block | no: perhaps only its link broke             |
| dead, some time later    | -                               | where three lives have not come back        |
| back                     | only its link had broken        | no                                          |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from spheres.errors import GradientError
from spheres.v1 import work_pb2 as pb

__all__ = ["Failures"]


@dataclass(slots=True)
class Failures:
    """Mutable state: of one step. Each method returns the error with which to halt, or None."""

    #: lives lost on one block that halt the run
    most_lost: int = 3
    step: int = -1
    #: microbatch -> (sphere, its count of failures) of each try
    _raised: dict[int, dict[tuple[str, int], None]] = field(default_factory=dict)
    #: first microbatch of a block -> (sphere, incarnation) that were lost at it
    _lost: dict[int, set[tuple[str, int]]] = field(default_factory=dict)

    def start(self, step: int) -> None:
        self.step = step
        self._raised.clear()
        self._lost.clear()

    def raised(self, failure: pb.TaskFailure) -> GradientError | None:
        """A task raised, or gave something that is no gradient."""
        if failure.step != self.step:
            return None  # the step went on without it
        tries = self._raised.setdefault(failure.microbatch, {})
        tries.setdefault((failure.sphere_id, failure.failures_count))
        if failure.invalid_gradient or len(tries) > 1:
            return self._error(failure, [sphere for sphere, _ in list(tries)[:-1]])
        return None

    def lost(self, change: pb.SphereChange) -> None:
        """A link ended; what its child was computing is in ``change``."""
        if change.HasField("computing") and change.step == self.step:
            lives = self._lost.setdefault(change.computing.lo, set())
            lives.add((change.sphere_id, change.incarnation))

    def dead(self) -> GradientError | None:
        """Those that were lost have had the time to come back."""
        for microbatch, lives in self._lost.items():
            if len(lives) >= self.most_lost:
                names = ", ".join(sorted(name for name, _ in lives))
                return GradientError(
                    f"{len(lives)} spheres ({names}) were lost while they computed microbatch {microbatch} of step "
                    f"{self.step}: the task seems to end its process there (out of memory?)"
                )
        return None

    def back(self, change: pb.SphereChange) -> None:
        """The same life has a link again: it did not die."""
        for lives in self._lost.values():
            lives.discard((change.sphere_id, change.incarnation))

    def _error(self, failure: pb.TaskFailure, others: Sequence[str]) -> GradientError:
        ids = failure.sample_ids
        samples = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
        also = f" and before that on {', '.join(others)}" if others else ""
        return GradientError(
            f"task failed on {failure.sphere_id}{also} in step {self.step}, microbatch {failure.microbatch} "
            f"(samples {samples or 'of the test split'}): {failure.error}",
            failure.traceback,
        )
