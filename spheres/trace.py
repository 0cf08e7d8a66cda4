"""What a node did when, for a trace: a bounded record of spans, and how far another node's clock is from this one's.

It writes no file: spans go to control with heartbeats (``parent``, ``children``), and control writes them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from time import monotonic_ns
from typing import Any, NamedTuple

from spheres.errors import ProtocolError
from spheres.v1 import work_pb2 as pb

__all__ = ["MOST_SPANS", "ClockOffset", "Recorder", "Span", "Taken", "write"]

#: spans on one heartbeat (HeartbeatRequest.traces), and bytes of them: they must fit into a message with the reports
MOST_SPANS, _MOST_BYTES = 4_096, 1 << 19
#: spans that wait here: this node's own, and those of all nodes below, which cannot push out its own
_MOST_OWN, _MOST_BELOW = 4_096, 65_536
#: nodes whose spans wait here, and letters of what they are called
_MOST_NODES = 20_000
_LONGEST_ID, _LONGEST_NAME, _LONGEST_DETAIL = 255, 32, 128
#: children's blocks that are arriving at once
_MOST_ARRIVING = 4_096
#: nanoseconds that a clock may be said to show, and a span to last: 146 years
_MOST_NANOS = 1 << 62


class Span(NamedTuple):
    """One stretch of time, by this node's monotonic clock in nanoseconds."""

    name: str
    start: int
    duration: int
    step: int
    detail: str = ""


class Taken(NamedTuple):
    """What has been taken out of a recorder of one node: spans in order of their ends, and how many were left out."""

    node: str
    spans: list[Span]
    dropped: int


class _Waiting:
    """What waits of one node."""

    __slots__ = ("dropped", "spans")

    def __init__(self) -> None:
        self.spans: deque[Span] = deque()
        self.dropped = 0


class Recorder:
    """What this node and those below it did. Bounded: what comes while too much waits is counted and left out.

    Mutable state: the spans that wait, and the present step. Belongs to one loop. Where a run is not traced there is
    none, and the places that would record compare with None.
    """

    def __init__(
        self,
        node: str,
        *,
        clock: Callable[[], int] = monotonic_ns,
        work: Callable[[], tuple[int, bool]] = lambda: (-1, False),
    ) -> None:
        self.node, self.clock = node, clock
        #: the step that is being worked at, and whether it is an evaluation
        self._work = work
        self._own = _Waiting()
        self._below: dict[str, _Waiting] = {}
        self._below_count = 0
        self._step, self._step_before, self._evaluates = -1, -1, False
        self._began = 0
        # when the compute thread had nothing to do any more
        self._idle_since: int | None = None
        # child, lo and hi of its block -> when its header came
        self._arriving: dict[tuple[str, int, int], int] = {}

    def __repr__(self) -> str:
        return f"<Recorder {self.node} {len(self)} waiting, {self._own.dropped} left out>"

    def __len__(self) -> int:
        """Return how many spans wait."""
        return len(self._own.spans) + self._below_count

    # ---- this node's own

    def begin(self) -> None:
        """Work begins that is another step's."""
        self._step_before = self._step
        self._step, self._evaluates = self._work()
        self._began = self.clock()
        self._arriving.clear()
        if self._idle_since is None:
            self._idle_since = self._began

    def add(self, name: str, seconds: float, detail: str = "", *, step: int | None = None) -> None:
        """Record a stretch that ends now. Without ``step`` it is of the present one.

        What is counted from is a duration: callers may measure it by any clock, also where two clocks of this process
        differ (on Linux ``perf_counter`` and ``monotonic`` both are CLOCK_MONOTONIC).
        """
        end = self.clock()
        duration = max(0, round(seconds * 1e9))
        start = end - duration
        if step is None:
            # the last message of a step may count as sent after the next one has begun
            step = self._step_before if name == "send_up" and start < self._began else self._step
        if name == "compute":
            if self._evaluates:
                name = "evaluate"
            if self._idle_since is not None and start > self._idle_since:
                self._put(Span("wait", self._idle_since, start - self._idle_since, step))
            self._idle_since = end
        self._put(Span(name, start, duration, step, detail))

    def add_since(self, name: str, began: int, *, step: int) -> None:
        """Record a stretch from ``began`` by this clock until now: all that came in between lies in it.

        A duration that was measured a moment ago would lie later by as long as this process was held up in between.
        """
        self._put(Span(name, began, max(0, self.clock() - began), step))

    def received(self, child: str, message: pb.WorkRequest, came: int) -> None:
        """A child's message, which came at ``came``, was taken in: from a block's header to its footer is one span."""
        if message.HasField("gradient_header"):
            block = message.gradient_header.block
            if len(self._arriving) < _MOST_ARRIVING:
                self._arriving[child, block.lo, block.hi] = came
        if message.HasField("gradient_footer"):
            block = message.gradient_footer.block
            began = self._arriving.pop((child, block.lo, block.hi), None)
            if began is not None:
                seconds = (self.clock() - began) / 1e9
                self.add("receive", seconds, f"[{block.lo},{block.hi}) from {child}", step=message.tag.step)

    def _put(self, span: Span) -> None:
        if len(self._own.spans) < _MOST_OWN:
            self._own.spans.append(span)
        else:
            self._own.dropped += 1

    # ---- on the way to control

    def take_in(self, traces: Iterable[pb.Trace]) -> None:
        """Keep what a child says of itself and of those below it, until it goes further up.

        Raises ProtocolError, with nothing kept, for more than fits into one heartbeat or for what is no span.
        """
        traces = list(traces)
        count = sum(len(trace.spans) for trace in traces)
        if count > MOST_SPANS:
            raise ProtocolError(f"a heartbeat with {count} spans; the limit is {MOST_SPANS}")
        taken = [_checked(trace) for trace in traces]
        for node, spans, dropped in taken:
            waiting = self._below.get(node)
            if waiting is None:
                if len(self._below) >= _MOST_NODES:
                    continue
                waiting = self._below[node] = _Waiting()
            kept = spans[: max(0, _MOST_BELOW - self._below_count)]
            waiting.spans.extend(kept)
            waiting.dropped += dropped + len(spans) - len(kept)
            self._below_count += len(kept)

    def take(self, most: int = MOST_SPANS, most_bytes: int = _MOST_BYTES) -> list[Taken]:
        """Take out the spans that have waited longest: this node's own first, then those of nodes below in turn."""
        found: list[Taken] = []
        for node, waiting in [(self.node, self._own), *self._below.items()]:
            if most <= 0 or most_bytes <= 0:
                break
            spans: list[Span] = []
            most_bytes -= len(node.encode()) + 16
            while waiting.spans and most > 0 and most_bytes > 0:
                span = waiting.spans.popleft()
                spans.append(span)
                most -= 1
                most_bytes -= len(span.name.encode()) + len(span.detail.encode()) + 48
            dropped, waiting.dropped = waiting.dropped, 0
            if spans or dropped:
                found.append(Taken(node, spans, dropped))
            if waiting is not self._own:
                self._below_count -= len(spans)
                # whoever was not emptied has its turn again after all others
                del self._below[node]
                if waiting.spans:
                    self._below[node] = waiting
        return found

    def put_back(self, taken: Iterable[Taken]) -> None:
        """Count what was taken and has not arrived as left out: whether the parent had it is not known."""
        for node, spans, dropped in taken:
            lost = dropped + len(spans)
            if node == self.node:
                self._own.dropped += lost
            elif node in self._below or len(self._below) < _MOST_NODES:
                self._below.setdefault(node, _Waiting()).dropped += lost


def write(field: Any, taken: Iterable[Taken], offset: int) -> None:
    """Write what was taken into ``HeartbeatRequest.traces``, with times by a clock that is ``offset`` ahead."""
    for node, spans, dropped in taken:
        trace = field.add(sphere_id=node, dropped_count=dropped)
        for name, start, duration, step, detail in spans:
            trace.spans.add(
                name=name, start_nanos=start + offset, duration_nanos=duration, step=max(0, step), detail=detail
            )


def _checked(trace: pb.Trace) -> Taken:
    node = trace.sphere_id
    if not 0 < len(node) <= _LONGEST_ID or trace.dropped_count < 0:
        raise ProtocolError(f"a trace with {len(node)} letters of name and {trace.dropped_count} spans left out")
    spans = []
    for s in trace.spans:
        if not (0 <= s.duration_nanos <= _MOST_NANOS and abs(s.start_nanos) <= _MOST_NANOS):
            raise ProtocolError(f"a span of {node} that lasts {s.duration_nanos} ns from {s.start_nanos} ns on")
        # not the message: it would keep the whole heartbeat that it came in
        spans.append(Span(s.name[:_LONGEST_NAME], s.start_nanos, s.duration_nanos, s.step, s.detail[:_LONGEST_DETAIL]))
    return Taken(node, spans, trace.dropped_count)


#: samples that are kept of one clock
_SAMPLES = 16
#: what two monotonic clocks may drift apart: NTP's own tolerance (RFC 5905, PHI), which adds to the error with age
_DRIFT = 15e-6


class ClockOffset:
    """How far another node's monotonic clock is ahead of this one's, from questions and answers.

    The other's clock was read somewhere between question and answer. Taken as half way, the reading is wrong by half
    the round trip at most, however unequal the two ways were; so of the last samples the one with the least error
    counts. That is Cristian's probabilistic clock synchronization (Distributed Computing 3, 1989) with the clock
    filter of NTP (RFC 5905, section 10).

    Mutable state: the last samples.
    """

    def __init__(self) -> None:
        # (when the answer came, offset, half the round trip), in nanoseconds
        self._samples: deque[tuple[int, int, int]] = deque(maxlen=_SAMPLES)

    def sample(self, sent: int, received: int, arrived: int) -> None:
        """Note an answer: ``sent`` and ``arrived`` by this node's clock, ``received`` by the other's.

        0 is a parent that does not say; an answer before its question is no sample.
        """
        if received > 0 and arrived >= sent:
            # the longer half, where the round trip is odd: the bound must hold to the nanosecond
            self._samples.append((arrived, received - (sent + arrived) // 2, (arrived - sent + 1) // 2))

    @property
    def settled(self) -> bool:
        """Whether there were enough samples for a lucky one among them."""
        return len(self._samples) >= _SAMPLES // 2

    def estimate(self, now: int) -> tuple[int, int] | None:
        """Return the offset and the bound of its error, in nanoseconds; None before the first answer."""
        if not self._samples:
            return None
        errors = [(half + int(max(0, now - at) * _DRIFT), offset) for at, offset, half in self._samples]
        error, offset = min(errors)
        return offset, error
