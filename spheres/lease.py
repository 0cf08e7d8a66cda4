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
        if (error := self._away(now)) is not None:
            raise error

    def tick(self, now: float) -> LinkClosedError | None:
        """Note that this node runs. Return why all its links are over, None where they are not."""
        error, self._ticked = self._away(now), now
        return error

    def _away(self, now: float) -> LinkClosedError | None:
        gap = 0.0 if self._ticked is None else now - self._ticked
        if gap <= self.seconds:
            return None
        return LinkClosedError(
            f"this node was stopped for {gap:.1f} s, longer than --patience: its links are over (N10)"
        )

    def judges(self, now: float) -> bool:
        """Whether this node was attentive enough to say of others that they are silent: else they may wait unread."""
        return self._ticked is not None and now - self._ticked <= 3 * self.interval

    def silent(self, name: str, heard: float, now: float) -> LinkClosedError | None:
        """Return why the link of a neighbour last heard of then is over: its lease has run out. None: it has not."""
        if now - heard <= self.seconds:
            return None
        return LinkClosedError(f"{name} gave no sign of life for {now - heard:.1f} s (--patience)")
