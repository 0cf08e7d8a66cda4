"""``trace.json``: what every node did when, on control's clock, as events for ui.perfetto.dev or chrome://tracing.

Spans come with heartbeats (``spheres.trace``); here they are written, in batches, from a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

from spheres.trace import Recorder, Span, Taken

__all__ = ["TraceFile", "traced"]

log = logging.getLogger(__name__)

#: seconds between two batches
_BATCH_SECONDS = 0.5
#: events in one file, about 250 MB: viewers read no more, and a long run must not fill the disk
_MOST_EVENTS = 1_500_000
#: what stands in one lane below another: name -> lane; what is not here is "other"
_LANES = {
    "step": "step",
    "evaluation": "step",
    "compute": "compute",
    "evaluate": "compute",
    "wait": "compute",
    "send_down": "receive weights",
    "receive": "receive gradients",
    "sum": "sum",
    "send_up": "send up",
    "optimizer": "optimizer",
    "journal": "journal",
    "checkpoint_copy": "checkpoint",
    "checkpoint_save": "checkpoint",
}
_ORDER = {lane: number for number, lane in enumerate([*dict.fromkeys(_LANES.values()), "other"])}
#: nanoseconds that two spans of one lane may overlap before the later one goes to a lane of its own: offsets of clocks
#: are estimated anew with every heartbeat, and that must not tear what one thread did in a row
_TOLERANCE = 2_000_000
#: where what overlaps is the rule: blocks of several children arrive at once
_OVERLAPPING = "receive gradients"
#: lanes of one kind and node
_MOST_LANES = 64
_END = b"\n]}\n"


class TraceFile:
    """One file in the trace event format, whole and readable after every batch, also where control is killed then.

    https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU describes the format. A node is a
    process there, a lane is a thread. Spans of one thread must not overlap, so those that do get a lane of their own.

    Mutable state: the file, and process and lane numbers. Raises OSError where it cannot be written.
    """

    def __init__(self, path: Path, *, run_id: str = "", most_events: int = _MOST_EVENTS) -> None:
        self.path, self._most = path, most_events
        self.events = 0
        #: spans that did not come, or for which there was no more room
        self.dropped = 0
        self._pids: dict[str, int] = {}
        # node and lane -> for each thread of it: tid and end of its last span
        self._lanes: dict[tuple[str, str], list[tuple[int, int]]] = {}
        self._tids = 0
        self._file = path.open("wb")
        head = {"run_id": run_id, "clock": "CLOCK_MONOTONIC of control", "started": time.time()}
        first = f'{{"displayTimeUnit":"ms","otherData":{json.dumps(head)},"traceEvents":[\n'.encode()
        lines: list[str] = []
        self._pid("control", lines)
        self._file.write(first + ",\n".join(lines).encode() + _END)
        self._file.flush()
        self._at = self._file.tell() - len(_END)

    def __repr__(self) -> str:
        return f"<TraceFile {self.path} events={self.events} dropped={self.dropped}>"

    def write(self, taken: Iterable[Taken]) -> None:
        """Append spans; the file is whole again when this returns."""
        lines: list[str] = []
        for node, spans, dropped in taken:
            pid = self._pid(node, lines)
            self.dropped += dropped
            if dropped and spans:
                at = spans[-1].start / 1000
                lines.append(_line(ph="i", s="p", name=f"{dropped} spans left out", pid=pid, tid=0, ts=at))
            room = max(0, self._most - self.events)
            self.dropped += len(spans) - len(spans[:room])
            for span in spans[:room]:
                lines.append(self._event(node, pid, span, lines))
            self.events += len(spans[:room])
        if lines:
            data = "".join(",\n" + line for line in lines).encode() + _END
            # over the end of the batch before, which is shorter: there is no moment without an end
            self._file.seek(self._at)
            self._file.write(data)
            self._file.flush()
            self._at += len(data) - len(_END)

    def close(self) -> None:
        self._file.close()

    def _pid(self, node: str, lines: list[str]) -> int:
        pid = self._pids.get(node)
        if pid is None:
            pid = self._pids[node] = len(self._pids) + 1
            lines.append(_line(ph="M", name="process_name", pid=pid, args={"name": node}))
            number = "".join(letter for letter in node if letter.isdecimal())[:9]
            order = 0 if node == "control" else int(number or pid)
            lines.append(_line(ph="M", name="process_sort_index", pid=pid, args={"sort_index": order}))
        return pid

    def _event(self, node: str, pid: int, span: Span, lines: list[str]) -> str:
        name, start, duration, step, detail = span
        tid, start, duration = self._place(node, pid, _LANES.get(name, "other"), start, duration, lines)
        # by hand: several times as fast as through a dict, and there may be thousands a second
        args = f'"step":{step}' if step >= 0 else ""
        if detail:
            args += f'{"," if args else ""}"detail":{json.dumps(detail)}'
        return (
            f'{{"ph":"X","name":{json.dumps(name)},"pid":{pid},"tid":{tid},'
            f'"ts":{start / 1000:.3f},"dur":{duration / 1000:.3f},"args":{{{args}}}}}'
        )

    def _place(
        self, node: str, pid: int, lane: str, start: int, duration: int, lines: list[str]
    ) -> tuple[int, int, int]:
        """Return the thread for a span, and the span cut by what overlaps within the tolerance."""
        end = start + duration
        tolerance = 0 if lane == _OVERLAPPING else _TOLERANCE
        lanes = self._lanes.setdefault((node, lane), [])
        for number, (tid, busy_until) in enumerate(lanes):
            if start >= busy_until - tolerance or number == _MOST_LANES - 1:
                start = max(start, busy_until)
                end = max(start, end)
                lanes[number] = (tid, end)
                return tid, start, end - start
        self._tids += 1
        lanes.append((self._tids, end))
        title = lane if len(lanes) == 1 else f"{lane} {len(lanes)}"
        lines.append(_line(ph="M", name="thread_name", pid=pid, tid=self._tids, args={"name": title}))
        order = _ORDER[lane] * _MOST_LANES + len(lanes)
        lines.append(_line(ph="M", name="thread_sort_index", pid=pid, tid=self._tids, args={"sort_index": order}))
        return self._tids, start, duration


def _line(**values: Any) -> str:
    return json.dumps(values, separators=(",", ":"))


@contextlib.asynccontextmanager
async def traced(recorder: Recorder | None, directory: Path, *, run_id: str, term: int) -> AsyncIterator[None]:
    """Write what the recorder has to the run directory, until the end; without a recorder do nothing.

    Each life of control has a file of its own: where ``trace.json`` is another one's, it is ``trace-TERM.json``. A
    disk that is full ends the trace, not the run.
    """
    if recorder is None:
        yield
        return
    path = directory / "trace.json"
    if path.exists():
        path = directory / f"trace-{term}.json"
    stop = asyncio.Event()
    writing = asyncio.create_task(_write(recorder, path, run_id, stop))
    try:
        yield
    finally:
        stop.set()
        await asyncio.wait({writing})


async def _write(recorder: Recorder, path: Path, run_id: str, stop: asyncio.Event) -> None:
    file: TraceFile | None = None
    try:
        file = await asyncio.to_thread(TraceFile, path, run_id=run_id)
        while True:
            last = stop.is_set()
            while taken := recorder.take():
                await asyncio.to_thread(file.write, taken)
            if last:
                break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_BATCH_SECONDS):
                    await stop.wait()
    except OSError as error:
        log.error("cannot write %s, the run goes on without a trace: %s", path, error.strerror)
    finally:
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()
            if file.dropped:
                log.warning("%s: %d spans were left out: there were too many, or a link broke", path, file.dropped)
