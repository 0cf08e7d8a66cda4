"""Cases: a hello that is refused, with each status code, by control and by another parent."""

from __future__ import annotations

from control.conformance.case import case
from control.conformance.parent import Node
from control.conformance.play import Play
from control.conformance.script import breach_unless
from spheres.errors import (
    ArmillaryError,
    FingerprintError,
    LinkClosedError,
    ProtocolError,
    RefusedError,
    StaleError,
    VersionMismatchError,
    WrongRunError,
)
from spheres.v1 import work_pb2 as pb


async def below_another(play: Play) -> Node:
    """Place the worker below a node that is not control."""
    parent = await play.add_node("p-1", play.control)
    play.place = [play.control, parent]
    return parent


async def _turned_away(play: Play, error: ArmillaryError, code: str) -> None:
    """A parent refuses a hello; the worker has to dial control, and to be taken in there."""
    parent = await below_another(play)
    await play.start()
    edge = await play.dialled(parent)
    edge.end(error)
    play.expect(f"Status codes ({code} from a parent)", "a hello at the next fallback, control")
    found = await play.found(parent, play.control)
    breach_unless(len(play.enrolments) == 1, f"Status codes ({code} from a parent)", "no other EnrollSphere", "one")
    breach_unless(found is play.control, f"Status codes ({code})", "control, the next fallback", f"{found.id} again")
    await play.linked(play.control)


@case("refused-by-control", "Status codes (FAILED_PRECONDITION)")
async def refused_by_control(play: Play) -> None:
    """A hello that control refuses with FAILED_PRECONDITION, VersionMismatchError, ends the worker: exit code 5."""
    await play.start()
    edge = await play.dialled()
    edge.end(VersionMismatchError("s-1 speaks another protocol; install the same release on both"))
    await play.ends(5, "Status codes (FAILED_PRECONDITION from control)")


@case("refused-for-now", "Status codes (FAILED_PRECONDITION)")
async def refused_for_now(play: Play) -> None:
    """RefusedError of control is none for good: the worker dials again."""
    await play.start()
    edge = await play.dialled()
    edge.end(RefusedError("control has no place for s-1 now"))
    await play.linked(what="another hello after RefusedError")


@case("wrong-run", "Status codes (NOT_FOUND)")
async def wrong_run(play: Play) -> None:
    """NOT_FOUND from control: another run lives there, and the worker ends with exit code 5."""
    await play.start()
    edge = await play.dialled()
    edge.end(WrongRunError("s-1 belongs to another run"))
    await play.ends(5, "Status codes (NOT_FOUND from control)")


@case("parent-unavailable", "Status codes (UNAVAILABLE)")
async def parent_unavailable(play: Play) -> None:
    """UNAVAILABLE from a parent: the worker dials a fallback."""
    await _turned_away(play, LinkClosedError("p-1 leaves"), "UNAVAILABLE")


@case("parent-refuses", "Status codes (FAILED_PRECONDITION)")
async def parent_refuses(play: Play) -> None:
    """FAILED_PRECONDITION from a parent that is not control: the worker dials the next fallback."""
    await _turned_away(play, FingerprintError("s-1 has other data than the run"), "FAILED_PRECONDITION")


@case("parent-stale", "Status codes (ABORTED)")
async def parent_stale(play: Play) -> None:
    """ABORTED from a parent that is not control: the worker dials the next fallback, and does not enroll again."""
    await _turned_away(play, StaleError("s-1: incarnation and session are not above"), "ABORTED")


@case("fault", "Status codes (INVALID_ARGUMENT)")
async def fault(play: Play) -> None:
    """A link that the parent ends with INVALID_ARGUMENT is dialled again."""
    edge = await play.join()
    edge.end(ProtocolError("s-1 sent block [0,1), which it does not owe"))
    await play.linked(what="another hello after INVALID_ARGUMENT")


@case("circle", "Joining (dial), N11")
async def circle(play: Play) -> None:
    """A welcome whose path has the worker itself in it would close a circle: the worker ends the link."""
    parent = await below_another(play)
    await play.start()
    edge = await play.dialled(parent)
    own = pb.Ancestor(id=edge.hello.sphere_id, incarnation=edge.hello.incarnation, address=parent.address)
    await edge.welcome([play.control.ancestor, own, parent.ancestor])
    await play.ends_link(edge, "N11", "its own id is in the welcome's path")
    again = await play.found(parent, play.control)
    await play.linked(again)


@case("fallbacks", "Joining (a later welcome), N11")
async def fallbacks(play: Play) -> None:
    """A later welcome replaces the path: when the parent is gone, the worker dials it from its end."""
    parent = await below_another(play)
    between = await play.add_node("p-2", play.control)
    edge = await play.join()
    parent.path = [*between.path, parent.ancestor]
    await edge.welcome()
    await play.train(edge, play.script.tag(0, 0), [play.script.all])
    await parent.aclose()
    play.expect("N11 (fallbacks)", "a hello at p-2, which the later welcome has named above p-1")
    found = await play.found(play.control, between)
    breach_unless(found is between, "N11 (fallbacks)", "p-2, the nearest that is left", found.id)
    again = await play.linked(between)
    await again.have(play.script.tag(1, 0), [play.script.all])
    await play.collect(again, again.arrival(play.script.tag(1, 0), [play.script.all]))
