"""What went wrong in the step in hand, and when it is enough to halt the run. Pure.

An exception is no death (DESIGN section 5): a task that raises is tried once more elsewhere, and a sphere that dies is
replaced; but what every sphere fails on must not run through all of them one by one.

| event                    | what is noted                   | halt                                        |
|--------------------------|---------------------------------|---------------------------------------------|
| start                    | nothing of the step before      | no                                          |
| an invalid gradient      | -                               | yes: it is the same everywhere              |
| raised                   | the sphere, for that microbatch | where another sphere has raised on it       |
| lost, while it computed  | that life of it, for that block | with the third                              |
| back                     | only its link had broken        | no                                          |
| nobody                   | -                               | where one has raised: there is no elsewhere |
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
    #: microbatch -> sphere -> what it said
    _raised: dict[int, dict[str, pb.TaskFailure]] = field(default_factory=dict)
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
        of = self._raised.setdefault(failure.microbatch, {})
        of[failure.sphere_id] = failure
        if failure.invalid_gradient:
            return self._error(failure, ())
        others = [sphere for sphere in of if sphere != failure.sphere_id]
        return self._error(failure, others) if others else None

    def lost(self, change: pb.SphereChange) -> GradientError | None:
        """A link ended; what its child was computing is in ``change``."""
        if not change.HasField("computing") or change.step != self.step:
            return None
        lives = self._lost.setdefault(change.computing.lo, set())
        lives.add((change.sphere_id, change.incarnation))
        if len(lives) < self.most_lost:
            return None
        names = ", ".join(sorted(name for name, _ in lives))
        return GradientError(
            f"{len(lives)} spheres ({names}) were lost while they computed microbatch {change.computing.lo} of step "
            f"{self.step}: the task seems to end its process there (out of memory?)"
        )

    def back(self, change: pb.SphereChange) -> None:
        """The same life has a link again: it did not die."""
        for lives in self._lost.values():
            lives.discard((change.sphere_id, change.incarnation))

    def nobody(self) -> GradientError | None:
        """Nobody is left who can compute what is owed."""
        for of in self._raised.values():
            for failure in of.values():
                return self._error(failure, ())
        return None

    def _error(self, failure: pb.TaskFailure, others: Sequence[str]) -> GradientError:
        ids = failure.sample_ids
        samples = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
        also = f" and before that on {', '.join(others)}" if others else ""
        return GradientError(
            f"task failed on {failure.sphere_id}{also} in step {self.step}, microbatch {failure.microbatch} "
            f"(samples {samples or 'of the test split'}): {failure.error}",
            failure.traceback,
        )
