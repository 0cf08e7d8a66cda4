"""Leases: who has been silent for too long, and whether this node itself was away (N10). Pure: times are given."""

from __future__ import annotations

from dataclasses import dataclass

from spheres.errors import LinkClosedError

__all__ = ["Lease"]

#: looks at the clock per lease
_TICKS = 16


@dataclass(slots=True)
class Lease:
    """One node's. Mutable state: when it last looked at the clock.

    A node that was stopped (SIGSTOP, a machine asleep) cannot know what others have decided about it meanwhile. So
    after a gap of more than the lease between two of its own ticks all its links are over, before it handles or sends
    anything that comes in on them.
    """

    #: the patience of the run
    seconds: float
    _ticked: float | None = None

    @property
    def interval(self) -> float:
        """Seconds between two ticks."""
        return self.seconds / _TICKS

    def check(self, now: float) -> None:
        """Raise LinkClosedError where this node was away for longer than its lease and has not ticked since."""
        if self._ticked is not None and now - self._ticked > self.seconds:
            raise self.away(now)

    def away(self, now: float) -> LinkClosedError:
        gap = now - (self._ticked if self._ticked is not None else now)
        return LinkClosedError(
            f"this node was stopped for {gap:.1f} s, longer than --patience: its links are over (N10)"
        )

    def tick(self, now: float) -> LinkClosedError | None:
        """Note that this node runs. Return why all its links are over, None where they are not."""
        error = self.away(now) if self._ticked is not None and now - self._ticked > self.seconds else None
        self._ticked = now
        return error

    def judges(self, now: float) -> bool:
        """Whether this node was attentive enough to say of others that they are silent: else they may wait unread."""
        return self._ticked is not None and now - self._ticked <= 3 * self.interval

    def silent(self, heard: float, now: float) -> bool:
        """Whether somebody last heard of then has been silent for longer than the lease."""
        return now - heard > self.seconds
