"""When a step counts as late on one node: from how long steps have taken here (N12, N13). Pure: times are given."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

__all__ = ["Watchdog"]

#: a step is late after so many times the longest of the latest undisturbed ones: the model's bound is twice
_FACTOR = 3.0
#: seconds; below this an attempt costs more than it saves
_SHORTEST = 0.5
_REMEMBERED = 8
#: times that a step has to be late, less by one for each level, before children that stand still count no longer
_HOPELESS = 4
#: patiences that a child has to answer begin, at the least: the answer needs no computing, only the way there and back
_ANSWER_PATIENCES = 3


@dataclass(slots=True)
class Watchdog:
    """Mutable state: the latest durations, when something last moved, how often it has fired in this step."""

    #: seconds without progress that count as late before anything was measured
    patience: float
    enabled: bool = True
    _durations: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    _began: float = 0.0
    _moved: float = 0.0
    #: in this step
    firings: int = 0

    def start(self, now: float) -> None:
        """A step begins."""
        self._began = self._moved = now
        self.firings = 0

    def progress(self, now: float) -> None:
        """Something came, or was given out (N12)."""
        self._moved = now

    def finish(self, now: float) -> None:
        """An undisturbed step is done here."""
        self._durations.append(now - self._began)

    @property
    def deadline(self) -> float:
        """Seconds without progress after which it fires; doubled with each firing in a step."""
        first = max(_SHORTEST, _FACTOR * max(self._durations)) if self._durations else self.patience
        return float(first * 2**self.firings)

    def due(self, now: float) -> bool:
        return self.enabled and now - self._moved > self.deadline

    def fire(self, now: float) -> None:
        self.firings += 1
        self._moved = now

    def hopeless(self, level: int) -> bool:
        """Whether those that live and stand still are waited for no longer (N22); control's ``level`` is 1."""
        return self.firings > max(1, _HOPELESS - level)

    def answer_seconds(self, level: int) -> float:
        """Return how long a child has to answer ``begin``: the shorter, the further down its parent is (N13)."""
        return _ANSWER_PATIENCES * self.patience * (1 + 1 / max(1, level))
