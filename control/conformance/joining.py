"""Cases: how a worker comes in, and signs of life."""

from __future__ import annotations

from control.conformance.case import case
from control.conformance.play import Play
from control.conformance.script import breach_unless
from spheres.config import PROTOCOL_VERSION
from spheres.errors import FingerprintError, LinkClosedError, StaleError
from spheres.transport import split_address

#: most reports on one heartbeat, and heartbeats that are looked at
_MOST_REPORTS, _BEATS = 32, 4
#: what a control that listens on every interface believes of itself; nobody is at this port
_NOWHERE = "0.0.0.0:1"


@case("enroll", "Joining (enroll)")
async def enroll(play: Play) -> None:
    """EnrollSphere is called, and again on UNAVAILABLE with the same request_id."""
    play.refusals += [LinkClosedError("control is about to start")] * 2
    await play.start()
    await play.enrolled(1)
    first = play.enrolments[0]
    rule = "Joining (enroll)"
    breach_unless(
        first.protocol_version == PROTOCOL_VERSION, rule, f"protocol_version {PROTOCOL_VERSION}", first.protocol_version
    )
    breach_unless(first.request_id, rule, "a request_id of its choice", "none")
    breach_unless(first.host, rule, "the host's name", "none")
    if first.address:
        try:
            split_address(first.address)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is no address
            breach_unless(False, rule, "address HOST:PORT, or none where it takes no children", error)
    play.expect(rule, "EnrollSphere again after UNAVAILABLE")
    await play.enrolled(3)
    ids = {request.request_id for request in play.enrolments}
    breach_unless(len(ids) == 1, rule, "the same request_id for retries", sorted(ids))
    await play.linked()
    play.note = f"{first.agent or 'no agent'}, {f'serves at {first.address}' if first.address else 'takes no children'}"


@case("enroll-refused", "Status codes")
async def enroll_refused(play: Play) -> None:
    """A refusal of EnrollSphere with FAILED_PRECONDITION is final: exit code 5."""
    play.refusals.append(FingerprintError("the code of the task differs; install the same files"))
    await play.start()
    await play.enrolled()
    await play.ends(5, "Status codes (FAILED_PRECONDITION from control)")
    breach_unless(
        len(play.enrolments) == 1, "Joining (enroll)", "one call: any other code is final", len(play.enrolments)
    )


@case("hello", "Joining (dial)")
async def hello(play: Play) -> None:
    """The first message of the Work stream is a hello with all that the parent must know."""
    edge = await play.join()
    rule, said = "Joining (dial)", edge.hello
    breach_unless(edge.session == 1, rule, "session 1 on the first Work stream", edge.session)
    breach_unless(said.capacity == 1, rule, "capacity 1", said.capacity)
    breach_unless(not said.holds_weights and not said.weights_chunks_held, rule, "no weights held yet", said)
    breach_unless(not said.held, rule, "no block held yet", edge.held)
    breach_unless(not said.leaving, rule, "a worker that has come to stay", "leaving")
    address = play.enrolments[0].address
    breach_unless(said.address == address, rule, f"address {address!r} as it enrolled", repr(said.address))


@case("address", "Joining (dial: addresses)")
async def own_address(play: Play) -> None:
    """Control names an address of its own that is none from here: the worker dials the one where it enrolled."""
    control, script = play.control, play.script
    control.believed = _NOWHERE
    control.path = [control.ancestor]
    await play.start()
    await play.enrolled()
    wanted = f"a hello (to {control.address}, where it enrolled, and not to {_NOWHERE})"
    edge = await play.dialled(what=wanted)
    await edge.welcome()
    await play.train(edge, script.tag(0, 0), [script.all])
    edge.end(LinkClosedError("control goes away"))
    again = await play.linked(what=f"{wanted}, also after a welcome that names that one,")
    await again.have(script.tag(1, 0), [script.all])
    await play.collect(again, again.arrival(script.tag(1, 0), [script.all]))


@case("heartbeat", "Joining (heartbeat)")
async def heartbeat(play: Play) -> None:
    """Heartbeats come on a stream of their own at heartbeat_interval, each with the worker's report."""
    edge = await play.join()
    rule, pause = "Joining (heartbeat)", play.script.node.heartbeat_seconds
    play.expect(rule, f"{_BEATS} heartbeats, one every {pause:g} s")
    await play.control.beats_after(_BEATS)
    beats = play.control.beats[:_BEATS]
    for _, beat in beats:
        for what, found, expected in (
            ("run_id", beat.run_id, play.script.node.run_id),
            ("sphere_id", beat.sphere_id, edge.hello.sphere_id),
            ("incarnation", beat.incarnation, edge.hello.incarnation),
            ("session", beat.session, edge.session),
        ):
            breach_unless(found == expected, rule, f"{what} {expected!r}", repr(found))
        breach_unless(1 <= len(beat.reports) <= _MOST_REPORTS, rule, "1 to 32 reports", len(beat.reports))
        report = beat.reports[0]
        breach_unless(
            (report.sphere_id, report.incarnation) == (edge.hello.sphere_id, edge.hello.incarnation),
            rule, "the worker's own report first", f"that of {report.sphere_id!r} ({report.incarnation})",
        )  # fmt: skip
        breach_unless(not beat.traces, rule, "no traces: the run is not traced", f"{len(beat.traces)} of them")
    took = beats[-1][0] - beats[0][0]
    least = 0.5 * pause * (_BEATS - 1)
    breach_unless(took >= least, rule, f"{_BEATS} heartbeats in no less than {least:g} s", f"they came in {took:.2f} s")


@case("enroll-again", "Status codes (ABORTED)")
async def enroll_again(play: Play) -> None:
    """ABORTED from control: the id has gone to another, so the worker enrolls anew with another request_id."""
    await play.start()
    edge = await play.dialled()
    edge.end(StaleError("s-1 is another sphere's by now: enroll anew"))
    play.expect("Status codes (ABORTED from control)", "EnrollSphere with a new request_id")
    await play.enrolled(2)
    one, other = (request.request_id for request in play.enrolments[:2])
    breach_unless(one != other, "Status codes (ABORTED)", "a request_id that is not the first one's", other)
    again = await play.linked()
    breach_unless(again.session == 1, "Joining (dial)", "session 1 of the new incarnation", again.session)
