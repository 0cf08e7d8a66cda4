"""Cases: directives, signals, and how a worker goes."""

from __future__ import annotations

import json
import signal

from control.conformance.case import case
from control.conformance.parent import Edge
from control.conformance.play import Play
from control.conformance.refusals import below_another
from control.conformance.script import breach_unless
from spheres.errors import RefusedError
from spheres.v1 import work_pb2 as pb

#: seconds of silence after which the other side counts as dead, where a case waits for that: longer than a busy machine
#: may let a worker stand
_SHORT_PATIENCE = 5.0
_LINES = 5


@case("stop", "A step (directive STOP)")
async def stop(play: Play) -> None:
    """STOP, to all or to the worker alone, ends it with exit code 0; one for another sphere does not."""
    edge = await play.join()
    await edge.direct(pb.DIRECTIVE_KIND_STOP, target_sphere_id="s-99", reason="another one's")
    await play.train(edge, play.script.tag(0, 0), [play.script.all])
    play.expect("A step (directive STOP)", "heartbeats, after a STOP that was for another")
    await play.control.beats_after(len(play.control.beats) + 2)
    play.may_end = True  # before it is told to: which is seen first, that it was told or that it has ended, is chance
    await edge.direct(pb.DIRECTIVE_KIND_STOP, target_sphere_id="", reason="the run is over")
    await play.ends(0, "A step (directive STOP)")


@case("reports", "A step (directives REPORT_STATE, REPORT_LOG)")
async def reports(play: Play) -> None:
    """REPORT_STATE is answered with state_report, REPORT_LOG with log_report."""
    edge, script = await play.join(), play.script
    await play.train(edge, script.tag(0, 0), [script.all])
    await edge.direct(pb.DIRECTIVE_KIND_REPORT_STATE, request_id=17, target_sphere_id="")
    rule = "A step (directive REPORT_STATE)"
    play.expect(rule, "state_report")
    said = (await edge.saying("state_report")).state_report
    breach_unless(said.request_id == 17, rule, "request_id 17, echoed", said.request_id)
    report, digest = said.report, script.version(0).digest
    for what, found, expected in (
        ("sphere_id", report.sphere_id, edge.hello.sphere_id),
        ("incarnation", report.incarnation, edge.hello.incarnation),
        ("weights_digest", report.weights_digest.hex(), digest.hex()),
        ("microbatches_count", report.microbatches_count, script.all.width),
        ("samples_count", report.samples_count, script.node.sampler.batch_count(0)),
    ):
        breach_unless(found == expected, rule, f"report.{what} {expected!r}", repr(found))
    if said.task_state:
        try:
            json.loads(said.task_state)
        except ValueError as error:
            breach_unless(False, rule, "task_state as JSON, or empty", error)
    await edge.direct(pb.DIRECTIVE_KIND_REPORT_LOG, request_id=18, lines=_LINES)
    rule = "A step (directive REPORT_LOG)"
    play.expect(rule, "log_report")
    log = (await edge.saying("log_report")).log_report
    breach_unless(log.request_id == 18, rule, "request_id 18, echoed", log.request_id)
    breach_unless(log.sphere_id == edge.hello.sphere_id, rule, f"sphere_id {edge.hello.sphere_id!r}", log.sphere_id)
    breach_unless(len(log.lines) <= _LINES, rule, f"{_LINES} lines at most", len(log.lines))


@case("move", "A step (directive MOVE), N11")
async def move(play: Play) -> None:
    """MOVE: the worker dials the new parent; one that does not take it sends it back to its fallbacks."""
    edge, script = await play.join(), play.script
    await play.train(edge, script.tag(0, 0), [script.all])
    target = await play.add_node("p-1", play.control)
    await edge.direct(pb.DIRECTIVE_KIND_MOVE, parent=target.ancestor)
    play.expect("A step (directive MOVE)", "a hello at p-1")
    found = await play.found(target, play.control)
    breach_unless(found is target, "A step (directive MOVE)", "a hello at p-1", f"one at {found.id}")
    moved = await play.linked(target)
    breach_unless(moved.hello.holds_weights, "When the link ends", "weights kept over the move", "none held")
    await moved.have(script.tag(1, 0), [script.all])
    await play.collect(moved, moved.arrival(script.tag(1, 0), [script.all]))
    full = await play.add_node("p-2", play.control)
    await moved.direct(pb.DIRECTIVE_KIND_MOVE, parent=full.ancestor)
    refused = await play.dialled(full)
    refused.end(RefusedError("p-2 takes no more children"))
    play.expect("A step (directive MOVE)", "a hello at p-1 or control after p-2 has refused")
    back = await play.found(target, play.control)
    await play.linked(back)


async def _owing(play: Play) -> tuple[Edge, pb.Tag]:
    """Bring the worker to where it owes chunks for which it has no credit."""
    edge, script = await play.join(), play.script
    tag = script.tag(0, 0)
    await edge.weights(tag, blocks=[script.all])
    arrival = edge.arrival(tag, [script.all])
    await edge.collect(arrival, until=lambda: arrival.frontier > 0, credit=False)
    play.arrival = arrival
    return edge, tag


async def _finishes(play: Play, edge: Edge) -> None:
    """The worker says that it leaves, sends what it owes, and goes when the next step begins."""
    rule, script, arrival = "Leaving", play.script, play.arrival
    play.expect(rule, "leaving")
    await edge.saying("leaving")
    assert arrival is not None
    arrival.credit = script.chunks - 1
    await edge.send(pb.WorkResponse(tag=arrival.tag, credit=pb.Credit(through_chunk=arrival.credit)))
    await play.collect(edge, arrival)
    # what it computed may be asked for again until the step is sealed
    ready = await play.begin(edge, arrival.tag, 1)
    breach_unless(ready.held, f"{rule} (keep what you computed until the next header comes)", "blocks held", "none")
    await play.assign(edge, arrival.tag, 1, [script.all])
    play.may_end = True
    await edge.send(edge.header(script.tag(1, 1)))
    await play.ends(0, rule)


@case("drain", "A step (directive DRAIN), Leaving", chunks=2, changes={"window_chunks": 1})
async def drain(play: Play) -> None:
    """DRAIN in mid-step: the worker says leaving, finishes what it owes, and ends at the next header: exit code 0."""
    edge, _ = await _owing(play)
    await edge.direct(pb.DIRECTIVE_KIND_DRAIN, reason="a test")
    await _finishes(play, edge)


@case("sigterm", "Leaving", chunks=2, changes={"window_chunks": 1}, process=True)
async def sigterm(play: Play) -> None:
    """SIGTERM in mid-step does the same as DRAIN."""
    edge, _ = await _owing(play)
    assert play.worker is not None
    play.worker.signal(signal.SIGTERM)
    await _finishes(play, edge)


@case("drain-idle", "Leaving (between two steps, for patience)", patience=_SHORT_PATIENCE)
async def drain_idle(play: Play) -> None:
    """DRAIN between two steps: the worker says leaving, and is gone when no step has come for patience."""
    edge = await play.join()
    await play.train(edge, play.script.tag(0, 0), [play.script.all])
    play.expect("Leaving", "leaving")
    play.may_end = True
    await edge.direct(pb.DIRECTIVE_KIND_DRAIN, reason="a test")
    await edge.saying("leaving")
    await play.ends(0, "Leaving")


@case("silent", "N10, Joining (heartbeat)", patience=_SHORT_PATIENCE)
async def silent(play: Play) -> None:
    """A parent that gives no sign of life for patience counts as dead: the worker dials its parent."""
    parent = await below_another(play)
    edge = await play.join()
    await play.train(edge, play.script.tag(0, 0), [play.script.all])
    parent.mute = True
    await play.ends_link(edge, "N10 (leases)", f"p-1 has been silent for {_SHORT_PATIENCE:g} s (patience)")
    play.expect("Joining (heartbeat: dial its parent first)", "a hello at control")
    found = await play.found(parent, play.control)
    breach_unless(found is play.control, "Joining (heartbeat)", "control, the parent's parent, first", f"{found.id}")
    again = await play.linked(play.control)
    breach_unless(again.hello.holds_weights, "When the link ends", "weights kept", "none held")
