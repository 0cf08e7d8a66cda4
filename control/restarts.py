"""When a local sphere that has ended is started again. Pure: times are given.

The first time at once, then each pause is twice the one before, up to a minute. Ten seconds of life take one failure
back, a minute all of them: who is killed now and then comes back quickly, who cannot live is tried ever more rarely.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Restarts"]

#: seconds of the first pause, and of the longest
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 60.0
#: seconds of life that take one failure back, and all
_LIFE_PER_FAILURE, _HEALTHY_SECONDS = 10.0, 60.0
#: failures from which on a sphere counts as set aside
_ASIDE = 5


@dataclass
class Restarts:
    """Of one local sphere. Mutable state: what its lives so far have cost."""

    #: ends that no life has taken back
    failures: float = 0.0
    #: ends since the first of them, and when that was
    count: int = 0
    since: float = 0.0
    #: when it is started again; None while it lives
    due: float | None = None

    @property
    def aside(self) -> bool:
        """Whether it keeps failing."""
        return self.failures >= _ASIDE

    def ended(self, now: float, *, lived: float) -> float:
        """It has ended after ``lived`` seconds; return the pause before the next start, in seconds."""
        if lived >= _HEALTHY_SECONDS:
            self.failures = 0.0
        self.failures = max(0.0, self.failures - lived / _LIFE_PER_FAILURE)
        if not self.failures:
            self.count, self.since = 0, now - lived
        self.failures += 1
        self.count += 1
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(int(self.failures) - 1, 32))
        self.due = now + pause
        return pause

    def started(self) -> None:
        self.due = None

    def reason(self, now: float) -> str:
        """Say why it does not live."""
        left = 0.0 if self.due is None else max(0.0, self.due - now)
        times = "once" if self.count == 1 else f"{self.count} times"
        return f"ended {times} in {now - self.since:.3g} s, next start in {left:.2g} s"
