"""Progress of a run: a live display on a terminal, JSON lines elsewhere.

It is told everything by events and prints at most ten times a second; the journal has every step.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import IO, TYPE_CHECKING, Any

from control.events import Event, RunHandle

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

__all__ = ["Progress", "format_rate", "format_seconds"]

#: seconds between two lines or two pictures
INTERVAL_SECONDS = 0.1
#: seconds over which rates are taken
RATE_SECONDS = 5.0


class Progress:
    """Print to ``stream`` (standard output). ``json_lines``: None for "where it is no terminal"."""

    def __init__(
        self,
        *,
        json_lines: bool | None = None,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream or sys.stdout
        self._json = not self._stream.isatty() if json_lines is None else json_lines
        self._clock = clock
        # mutable: the display, totals of this process, and their values at times of the last seconds
        self._live: Live | None = None
        self._gone = False
        self._shown_at = -math.inf
        self._logged_at = clock()
        self._spheres = 0
        self._totals = _Totals()
        self._marks: deque[tuple[float, _Totals]] = deque()
        self._evaluation: Mapping[str, float] = {}

    # --- events

    def on_train_start(self, event: Event, run: RunHandle) -> None:
        self._spheres = max(run.config.spheres, run.living_spheres)
        self._marks.append((self._clock(), self._totals.copy()))
        if self._json:
            total = {"step": run.step, "total_steps": run.total_steps}
            self._line({"event": "train_start", "run_id": run.run_id, "run_dir": str(run.run_dir), **total})
            return
        from rich.console import Console
        from rich.live import Live

        # drawn on events only: a thread that draws would take time from the loop
        self._live = Live(console=Console(file=self._stream, highlight=False), auto_refresh=False)
        self._live.start()

    def on_train_end(self, event: Event, run: RunHandle) -> None:
        if self._totals.steps:
            self._show(run, force=True)
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._json:
            self._line({"event": "train_end", "step": run.step, "state": str(run.state)})

    def on_batch_end(self, event: Event, run: RunHandle) -> None:
        self._totals.add(event.record)
        every, now = run.config.log_every, self._clock()
        if every is None:
            self._show(run)
        elif every.unit != "epochs" and every.due(
            step=event.step + 1, steps_per_epoch=1, seconds=now - self._logged_at
        ):
            self._log(run)
        elif self._live is not None:
            self._show(run)

    def on_epoch_end(self, event: Event, run: RunHandle) -> None:
        every = run.config.log_every
        if every is not None and every.unit == "epochs" and (event.epoch + 1) % int(every.count) == 0:
            self._log(run)

    def on_evaluation(self, event: Event, run: RunHandle) -> None:
        record = event.record
        self._evaluation = {"loss": record["loss"], **record["metrics"]}
        values = ", ".join(f"{name} {format_value(name, value)}" for name, value in self._evaluation.items())
        self._say(record, f"step {record['step']}  evaluation: {values}{'  (best)' if record.get('best') else ''}")

    def on_checkpoint(self, event: Event, run: RunHandle) -> None:
        record = event.record
        failed = f"checkpoint failed: {record.get('error')}"
        self._say(record, None if record.get("ok", True) else failed)

    def on_sphere_joined(self, event: Event, run: RunHandle) -> None:
        self._spheres = max(self._spheres, run.living_spheres)
        self._say(event.record, None)

    def on_sphere_lost(self, event: Event, run: RunHandle) -> None:
        reason = event.record.get("reason") or "no reason given"
        self._say(event.record, f"step {event.step}  sphere {event.record.get('sphere')} lost: {reason}")

    def on_nonfinite(self, event: Event, run: RunHandle) -> None:
        # as often as the log: at the 1st, 2nd, 4th, 8th ...
        if event.record["loud"]:
            self._say(event.record, f"step {event.step}  {event.record['decision']}: {event.record['reason']}")

    def on_error(self, event: Event, run: RunHandle) -> None:
        self._say(event.record, f"error: {event.record.get('error') or event.record.get('reason')}")

    # --- printing

    def _log(self, run: RunHandle) -> None:
        self._logged_at = self._clock()
        if self._live is not None and self._totals.weight:
            text = " · ".join(_texts(self._figures(run, self._logged_at)))
            self._live.console.print(text, soft_wrap=True, markup=False)
        else:
            self._show(run, force=True)

    def _show(self, run: RunHandle, *, force: bool = False) -> None:
        now = self._clock()
        if not force and now - self._shown_at < INTERVAL_SECONDS:
            return
        self._shown_at = now
        figures = self._figures(run, now)
        if self._json:
            self._line(figures)
        elif self._live is not None:
            self._live.update(_picture(figures, self._live.console.width), refresh=True)

    def _figures(self, run: RunHandle, now: float) -> dict[str, Any]:
        """Return what is shown: means since the last time, rates over the last seconds."""
        totals, (since, mark) = self._totals, self._marks[0]
        steps, seconds = totals.steps - mark.steps, max(now - since, 1e-9)
        self._marks.append((now, totals.copy()))
        while len(self._marks) > 1 and now - self._marks[1][0] > RATE_SECONDS:
            self._marks.popleft()
        last = totals.last
        means, totals.sums, totals.weight = totals.means(), {}, 0
        left = run.total_steps - run.step
        return {
            "event": "step",
            "step": run.step,
            "total_steps": run.total_steps,
            "epoch": run.epoch,
            "loss": means.pop("loss", last.get("loss")),
            "metrics": means,
            "evaluation": dict(self._evaluation),
            "samples_per_second": round((totals.samples - mark.samples) / seconds, 1),
            "steps_per_second": round(steps / seconds, 2),
            "bytes_per_second": round((totals.bytes - mark.bytes) / seconds),
            "spheres": run.living_spheres,
            "known_spheres": max(self._spheres, run.living_spheres),
            "sync_fraction": last.get("sync_fraction"),
            "eta_seconds": round(left * seconds / steps, 1) if steps else None,
        }

    def _say(self, record: Mapping[str, Any], text: str | None) -> None:
        if self._json:
            self._line(record)
        elif text is not None and self._live is not None:
            self._live.console.print(text, soft_wrap=True, markup=False)

    def _line(self, record: Mapping[str, Any]) -> None:
        if self._gone:
            return
        try:
            self._stream.write(json.dumps(dict(record), default=str) + "\n")
            self._stream.flush()
        except BrokenPipeError:
            self._gone = True  # training does not depend on being watched


class _Totals:
    """Sums over the steps of this process; ``sums`` and ``weight`` since the last time they were shown."""

    def __init__(self) -> None:
        self.steps = 0
        self.samples = 0
        self.bytes = 0
        self.sums: dict[str, float] = {}
        self.weight = 0
        self.last: Mapping[str, Any] = {}

    def copy(self) -> _Totals:
        copy = _Totals()
        copy.steps, copy.samples, copy.bytes = self.steps, self.samples, self.bytes
        return copy

    def add(self, record: Mapping[str, Any]) -> None:
        # a mean is over what was not left out
        samples = record.get("used_samples", record["batch_samples"])
        self.steps += 1
        self.samples += record["batch_samples"]
        self.bytes += record["bytes_up"] + record["bytes_down"]
        self.weight += samples
        self.last = record
        for name, value in {"loss": record["loss"], **record["metrics"]}.items():
            if value is not None:
                self.sums[name] = self.sums.get(name, 0.0) + value * samples

    def means(self) -> dict[str, float]:
        return {name: value / max(1, self.weight) for name, value in self.sums.items()}


def _texts(figures: Mapping[str, Any]) -> list[str]:
    """Return the figures as texts, the most important first: a small terminal shows as many as it has room for."""
    named = {"loss": figures["loss"], **figures["metrics"]}
    shown = [f"{name} {format_value(name, value)}" for name, value in named.items() if value is not None]
    if figures["sync_fraction"] is not None:
        shown.append(f"sync {figures['sync_fraction']:.0%}")
    return [
        f"step {figures['step']}/{figures['total_steps']}",
        *shown[:2],
        f"spheres {figures['spheres']}/{figures['known_spheres']}",
        f"{figures['samples_per_second']:,.0f} samples/s",
        f"{format_rate(figures['bytes_per_second'])}",
        *shown[2:],
        *([f"ETA {format_seconds(figures['eta_seconds'])}"] if figures["eta_seconds"] is not None else []),
    ]


def _picture(figures: Mapping[str, Any], width: int) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    step, *texts = _texts(figures)
    eta = texts.pop() if texts[-1].startswith("ETA") else ""
    line = ""
    for text in texts:
        if len(line) + len(text) + 3 > width:
            break
        line += (" · " if line else "") + text
    top = Table.grid(padding=(0, 1), expand=True)
    total = max(1, figures["total_steps"])
    head: list[RenderableType] = [Text(step, "bold", no_wrap=True)]
    if width >= len(step) + len(eta) + 12:
        head += [ProgressBar(total=total, completed=min(figures["step"], total)), Text(eta, "cyan", no_wrap=True)]
    for index in range(len(head)):
        top.add_column(ratio=1 if index == 1 else None, no_wrap=True)
    top.add_row(*head)
    picture = Table.grid(expand=True)
    picture.add_row(top)
    picture.add_row(Text(line, no_wrap=True, overflow="crop"))
    return picture


def format_value(name: str, value: float) -> str:
    """Return accuracies in per cent, all else in four digits."""
    return f"{value:.2%}" if "accuracy" in name else f"{value:.4g}"


def format_rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e6:,.1f} MB/s"


def format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
