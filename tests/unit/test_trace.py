"""Traces: what a recorder keeps and counts, the offset of clocks with its bound, the file."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.trace import TraceFile
from spheres import trace
from spheres.errors import ProtocolError
from spheres.phases import PhaseTimes
from spheres.trace import MOST_SPANS, ClockOffset, Recorder, Span, Taken, write
from spheres.v1 import work_pb2 as pb

SECOND = 1_000_000_000


class Clock:
    def __init__(self, now: int = 100 * SECOND) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


def recorder(clock: Clock | None = None, step: int = 3) -> Recorder:
    made = Recorder("s-1", clock=clock or Clock(), work=lambda: (step, False))
    made.begin()
    return made


def sent(recorder: Recorder, offset: int = 0) -> list[pb.Trace]:
    """What goes over the wire."""
    message = pb.HeartbeatRequest()
    write(message.traces, recorder.take(), offset)
    return list(pb.HeartbeatRequest.FromString(message.SerializeToString()).traces)


# ---- the recorder


def test_a_stretch_ends_now_and_belongs_to_the_step_that_it_was_done_for():
    clock, step = Clock(), 7
    made = Recorder("s-1", clock=clock, work=lambda: (step, False))
    made.begin()
    clock.now += SECOND
    made.add("sum", 0.25, "chunk 0")
    assert made.take() == [Taken("s-1", [Span("sum", clock.now - SECOND // 4, SECOND // 4, 7, "chunk 0")], 0)]
    step = 8
    made.begin()
    clock.now += 10
    made.add("send_up", 1e-6)  # began before step 8 did
    made.add("send_up", 5e-9)
    made.add("journal", 1.0, step=5)
    assert [(span.name, span.step) for span in made.take()[0].spans] == [("send_up", 7), ("send_up", 8), ("journal", 5)]


def test_a_stretch_since_a_moment_begins_there_however_late_it_is_told():
    clock = Clock()
    made, began = recorder(clock), clock.now
    clock.now += SECOND
    made.add_since("step", began, step=5)
    assert made.take()[0].spans == [Span("step", began, SECOND, 5)]


def test_between_two_blocks_the_compute_thread_waits():
    clock = Clock()
    made = recorder(clock)
    clock.now += 3 * SECOND
    made.add("compute", 1.0)
    clock.now += 5 * SECOND
    made.add("compute", 4.0)
    spans = made.take()[0].spans
    begin = 100 * SECOND
    assert [(s.name, s.start - begin, s.duration) for s in spans] == [
        ("wait", 0, 2 * SECOND),
        ("compute", 2 * SECOND, SECOND),
        ("wait", 3 * SECOND, SECOND),
        ("compute", 4 * SECOND, 4 * SECOND),
    ]


def test_an_evaluation_is_not_called_a_steps_computing():
    made = Recorder("s-1", clock=Clock(), work=lambda: (3, True))
    made.begin()
    made.add("compute", 0.0)
    assert [span.name for span in made.take()[0].spans] == ["evaluate"]


def test_a_block_of_a_child_arrives_from_its_header_to_its_footer():
    clock = Clock()
    made = recorder(clock)
    block, tag = pb.Block(lo=2, hi=4), pb.Tag(step=3)
    made.received("s-9", pb.WorkRequest(tag=tag, gradient_header=pb.GradientHeader(block=block)), clock.now)
    clock.now += SECOND
    made.received("s-9", pb.WorkRequest(tag=tag, gradient_chunk=pb.Chunk(block=block)), clock.now)
    assert not made
    clock.now += SECOND
    footer = pb.WorkRequest(tag=tag, gradient_footer=pb.GradientFooter(block=block))
    made.received("s-9", footer, clock.now)
    made.received("s-9", footer, clock.now)  # no header came for this one
    assert made.take()[0].spans == [Span("receive", 100 * SECOND, 2 * SECOND, 3, "[2,4) from s-9")]


def test_what_comes_while_too_much_waits_is_counted_and_left_out():
    made = recorder()
    for _ in range(MOST_SPANS + 10):
        made.add("sum", 0.0)
    assert len(made) == MOST_SPANS
    [(node, spans, dropped)] = made.take()
    assert (node, len(spans), dropped) == ("s-1", MOST_SPANS, 10)
    assert made.take() == []  # told once
    made.add("sum", 0.0)
    assert made.take()[0].dropped == 0


def test_spans_of_children_are_bounded_together_and_cannot_push_out_a_nodes_own(monkeypatch):
    monkeypatch.setattr(trace, "_MOST_BELOW", 25)
    above = recorder()
    for name in ("s-2", "s-3", "s-4"):
        below = Recorder(name, clock=Clock())
        for _ in range(10):
            below.add("sum", 0.0)
        above.take_in(sent(below))
    above.add("sum", 0.0)
    assert len(above) == 26
    assert [(t.node, len(t.spans), t.dropped) for t in above.take()] == [
        ("s-1", 1, 0), ("s-2", 10, 0), ("s-3", 10, 0), ("s-4", 5, 5),
    ]  # fmt: skip
    assert len(above) == 0


def test_nodes_below_have_turns_where_not_everything_fits_into_one_heartbeat():
    above = recorder()
    for name in ("s-2", "s-3"):
        below = Recorder(name, clock=Clock())
        for _ in range(5):
            below.add("sum", 0.0)
        above.take_in(sent(below))
    took = [[(t.node, len(t.spans)) for t in above.take(3)] for _ in range(4)]
    assert took == [[("s-2", 3)], [("s-3", 3)], [("s-2", 2), ("s-3", 1)], [("s-3", 1)]]


def test_the_longest_names_and_the_most_spans_fit_into_one_message():
    from spheres.config import MAX_MESSAGE_BYTES

    above = recorder()
    span = pb.Span(name="\N{GREEK SMALL LETTER ALPHA}" * 32, start_nanos=1, detail="\N{EURO SIGN}" * 128)
    for node in range(2 * MOST_SPANS):
        above.take_in([pb.Trace(sphere_id=f"{node:0255}", spans=[span, span])])
    while above:
        message = pb.HeartbeatRequest()
        write(message.traces, taken := above.take(), 1 << 60)
        assert sum(len(t.spans) for t in taken) > 100
        assert message.ByteSize() < MAX_MESSAGE_BYTES * 0.6


def test_times_are_told_by_the_receivers_clock():
    below = recorder(Clock(5 * SECOND))
    below.add("sum", 1.0)
    above = Recorder("control", clock=Clock())
    above.take_in(sent(below, 95 * SECOND))
    assert above.take() == [Taken("s-1", [Span("sum", 99 * SECOND, SECOND, 3)], 0)]


def test_spans_that_were_under_way_when_a_link_broke_are_counted():
    made = recorder()
    made.add("sum", 0.0)
    made.take_in([pb.Trace(sphere_id="s-2", spans=[pb.Span(name="sum")], dropped_count=2)])
    made.put_back(made.take())
    made.add("sum", 0.0)
    assert [(t.node, len(t.spans), t.dropped) for t in made.take()] == [("s-1", 1, 1), ("s-2", 0, 3)]


@pytest.mark.parametrize(
    "bad",
    [
        pb.Trace(sphere_id="s-2", spans=[pb.Span(name="sum")] * (MOST_SPANS + 1)),
        pb.Trace(sphere_id="s-2", spans=[pb.Span(name="sum", duration_nanos=-1)]),
        pb.Trace(sphere_id="s-2", spans=[pb.Span(name="sum", start_nanos=(1 << 62) + 1)]),
        pb.Trace(sphere_id="s-2", dropped_count=-1),
        pb.Trace(spans=[pb.Span(name="sum")]),
        pb.Trace(sphere_id="s" * 256),
    ],
    ids=["too many", "ends before it begins", "a wild clock", "fewer than none left out", "nobody's", "a long name"],
)
def test_what_is_no_trace_is_refused_and_nothing_of_it_kept(bad):
    made = recorder()
    with pytest.raises(ProtocolError):
        made.take_in([pb.Trace(sphere_id="s-3", spans=[pb.Span(name="sum")]), bad])
    assert made.take() == []


def test_phases_record_what_they_count_and_nothing_where_a_run_is_not_traced():
    phases = PhaseTimes()
    phases.add("compute", 0.5)
    clock = Clock()
    phases.recorder = recorder(clock)
    phases.clear()
    clock.now += SECOND
    phases.add("compute", 0.5)
    phases.close(1.0, computes=True)  # counts the rest as waited; that is no stretch of time
    assert phases.own == {"compute": 0.5, "wait": 0.5}
    assert [span.name for span in phases.recorder.take()[0].spans] == ["wait", "compute"]


# ---- clocks


@given(
    offset=st.integers(-(10**15), 10**15),
    ways=st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)), min_size=1, max_size=40),
)
def test_the_estimate_is_within_its_bound_however_unequal_the_ways_are(offset, ways):
    now, clock = 10**16, ClockOffset()
    for up, down in ways:
        clock.sample(now, now + up + offset, now + up + down)
        now += up + down + SECOND
    found = clock.estimate(now)
    assert found is not None
    estimate, error = found
    assert abs(estimate - offset) <= error
    latest = ways[-16:]
    assert error <= min((up + down + 1) // 2 for up, down in latest) + 15e-6 * (now - 10**16) + 1


def test_the_bound_is_reached_where_one_way_takes_all_the_time():
    clock = ClockOffset()
    clock.sample(1000, 1000 + 600, 1600)  # the answer was there at once: the clocks agree
    assert clock.estimate(1600) == (300, 300)


def test_the_quickest_answer_counts_until_it_is_too_old():
    clock, chance = ClockOffset(), random.Random(1)
    clock.sample(10, 10 + 1_000, 12)
    for k in range(1, 10):
        at, delay = k * SECOND, chance.randrange(10**6, 10**7)
        clock.sample(at, at + delay + 1_000, at + delay)
    assert clock.estimate(10 * SECOND)[0] == 999
    # clocks drift: at last a slow answer of today says more than a quick one of long ago
    clock.sample(10**14, 10**14 + 5_000 + 1_000, 10**14 + 5_000)
    assert clock.estimate(10**14)[0] == 3_500


def test_no_answer_is_no_estimate_and_nonsense_is_no_sample():
    clock = ClockOffset()
    clock.sample(5, 0, 9)  # a parent that does not say
    clock.sample(9, 7, 5)
    assert clock.estimate(10) is None
    assert not clock.settled


# ---- the file


def events(path):
    return json.loads(path.read_text())["traceEvents"]


def test_the_file_is_whole_json_after_every_batch(tmp_path):
    path = tmp_path / "trace.json"
    file = TraceFile(path, run_id="r-1")
    assert {e["ph"] for e in events(path)} == {"M"}
    for batch in range(3):
        spans = [Span("compute", batch * SECOND + k * 1_000, 500, batch, 'a "detail"\n') for k in range(5)]
        file.write([Taken("s-1", spans, 0), Taken("control", [Span("step", batch * SECOND, 9_000, batch)], 0)])
        assert sum(e["ph"] == "X" for e in events(path)) == 6 * (batch + 1)
    file.write([])
    file.close()
    assert json.loads(path.read_text())["otherData"]["run_id"] == "r-1"


def test_a_node_is_a_process_and_a_lane_is_a_thread(tmp_path):
    file = TraceFile(tmp_path / "trace.json")
    spans = [
        Span("wait", 0, 1_500, 0),
        Span("compute", 1_500, 2_500, 0),
        Span("sum", 4_000, 10, 0),
        Span("odd", 0, 1, 0),
    ]
    file.write([Taken("s-12", spans, 0)])
    file.close()
    found = events(tmp_path / "trace.json")
    processes = {e["args"]["name"]: e["pid"] for e in found if e["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in found if e["name"] == "thread_name"}
    assert processes.keys() == {"control", "s-12"}
    shown = [(e["name"], threads[e["pid"], e["tid"]], e["ts"], e["dur"]) for e in found if e["ph"] == "X"]
    assert shown == [
        ("wait", "compute", 0.0, 1.5), ("compute", "compute", 1.5, 2.5), ("sum", "sum", 4.0, 0.01),
        ("odd", "other", 0.0, 0.001),
    ]  # fmt: skip


@given(
    spans=st.lists(st.tuples(st.integers(0, 10**8), st.integers(0, 10**8)), max_size=60),
    name=st.sampled_from(["receive", "sum"]),
)
def test_no_two_spans_of_one_thread_overlap_and_none_lasts_less_than_nothing(spans, name, tmp_path_factory):
    path = tmp_path_factory.mktemp("t") / "trace.json"
    file = TraceFile(path)
    file.write([Taken("s-1", [Span(name, start, duration, 0) for start, duration in spans], 0)])
    file.close()
    ends: dict[int, float] = {}
    for event in events(path):
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert event["ts"] >= ends.get(event["tid"], 0.0) - 1e-6
            ends[event["tid"]] = event["ts"] + event["dur"]


def test_a_full_file_takes_no_more_and_counts(tmp_path):
    file = TraceFile(tmp_path / "trace.json", most_events=10)
    for _ in range(3):
        file.write([Taken("s-1", [Span("sum", k, 1, 0) for k in range(4)], 1)])
    file.close()
    assert (file.events, file.dropped) == (10, 2 + 3)
    assert sum(e["ph"] == "X" for e in events(tmp_path / "trace.json")) == 10
