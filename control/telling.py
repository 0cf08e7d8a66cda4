"""What happens in a run, told to all who should hear: the event log, watchers, callbacks, the trace, and warnings.

When something has happened is the controller's to say. Records of steps are written by ``control.journalling``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from control.events import CallbackRegistry, Event, RunHandle
from control.gradients import Outcome
from control.journal import EventLog
from control.metrics import nonfinite_reason
from spheres.sampling import Sampler
from spheres.trace import Recorder

__all__ = ["Teller"]

log = logging.getLogger(__name__)


class Teller:
    """Tells of one run, of which it only reads. Mutable state: the event log, and who watches."""

    def __init__(
        self,
        run: RunHandle,
        sampler: Sampler,
        *,
        events: EventLog,
        callbacks: CallbackRegistry,
        recorder: Recorder | None,
    ) -> None:
        self._run, self._sampler = run, sampler
        self._events, self._callbacks, self._recorder = events, callbacks, recorder
        callbacks.on_failure = self._callback_failed
        #: hears every record: steps and events, for WatchRun
        self.publish: Callable[[Mapping[str, Any]], None] = lambda _: None

    def tell(self, event: str, record: dict[str, Any]) -> None:
        """Write an event to its log, to watchers and to callbacks. Raises CallbackError as ``emit`` does."""
        self.emit(event, self.note(event, record))

    def note(self, event: str, record: dict[str, Any]) -> dict[str, Any]:
        """Write an event to its log and to watchers; return what was written."""
        full = {"event": event, "step": self._run.step, **record, "time": time.time()}
        self._events.append(full)
        self.publish(full)
        return full

    def emit(self, name: str, record: Mapping[str, Any], *, step: int | None = None) -> None:
        """Call the callbacks of an event; it belongs to the step in hand, or to ``step``.

        Raises CallbackError where one fails, and the run is to end for that.
        """
        if self._callbacks.wants(name):
            at = self._run.step if step is None else step
            self._callbacks.emit(Event(name, at, self._sampler.epoch_of(at), record), self._run)

    def clock(self) -> int:
        """Return nanoseconds by the clock of the trace; 0 where the run is not traced."""
        return 0 if self._recorder is None else self._recorder.clock()

    def span_since(self, name: str, began: int, step: int) -> None:
        """Record what began then, by ``clock``, and has just ended, where the run is traced."""
        if self._recorder is not None:
            self._recorder.add_since(name, began, step=step)

    def span(self, name: str, seconds: float, step: int) -> None:
        """Record what has just ended, where the run is traced."""
        if self._recorder is not None:
            self._recorder.add(name, seconds, step=step)

    def nonfinite(self, record: Mapping[str, Any], metrics: dict[str, float]) -> None:
        """Say that a step was skipped, or was applied without some of its microbatches; count it in ``metrics``."""
        step, decision = record["step"], record["decision"]
        key = "skipped_steps" if decision == Outcome.SKIPPED_STEP else "skipped_microbatches"
        before = int(metrics.get(key, 0))
        count = before + (1 if key == "skipped_steps" else len(record["nonfinite"]))
        metrics[key] = float(count)  # checkpoints keep it
        reason = nonfinite_reason(record)
        # a run that diverges must not fill the log: at the 1st, 2nd, 4th, 8th ...
        loud = before.bit_length() != count.bit_length()
        if loud:
            log.warning("step %d: %s (%s; %d %s so far)", step, decision, reason, count, key.replace("_", " "))
        told = {"step": step, "decision": decision, "nonfinite": record["nonfinite"], "reason": reason}
        told |= {key: count, "loud": loud}
        self.emit("nonfinite", self.note("nonfinite", told), step=step)

    def mixed(self, step: int, moved: int) -> None:
        """Warn of microbatches that were computed in another environment than the one they were meant for (N22)."""
        if moved:
            log.warning(
                "step %d: %d microbatches were computed in another numeric environment than the one that they were "
                "meant for, of which no sphere was left, or went on: bits may differ from those of an undisturbed run",
                step,
                moved,
            )

    def _callback_failed(self, record: Mapping[str, Any]) -> None:
        self.note("error", dict(record))
