"""Cases: links that end, and what a worker makes of it."""

from __future__ import annotations

from control.conformance.case import case
from control.conformance.play import Play
from control.conformance.script import breach_unless, named
from spheres.blocks import BlockSet, halves
from spheres.errors import LinkClosedError
from spheres.frames import blocks_from, blocks_to
from spheres.v1 import work_pb2 as pb


@case("cut", "When the link ends, N5, N9", chunks=2, changes={"window_chunks": 1})
async def cut(play: Play) -> None:
    """A link that ends in mid-step is dialled again; what was computed is held, not computed again: the same bits."""
    edge, script = await play.join(), play.script
    left, right = halves(script.all)
    tag = script.tag(0, 0)
    await edge.weights(tag, blocks=[left])
    arrival = edge.arrival(tag, [left])
    await edge.collect(arrival, until=lambda: arrival.frontier > 0, credit=False)
    edge.end(LinkClosedError("the parent goes away"))
    again = await play.linked(what="another Work stream after the link ended")
    rule, hello, version = "When the link ends", again.hello, script.version(0)
    breach_unless(again.message.tag.step == 0 and again.message.tag.term == tag.term, rule,
                  "the tag of the step in the hello, since it holds blocks of it", again.message.tag)  # fmt: skip
    breach_unless(
        hello.holds_weights and (hello.weights_version, hello.weights_digest) == (0, version.digest),
        rule, f"weights kept: holds_weights, version 0, digest {version.digest.hex()}", hello,
    )  # fmt: skip
    breach_unless(BlockSet(script.all.hi, again.held).covers(left), rule, f"held with {left}", named(again.held))
    # the parent is in the same step: a header without chunks, then a new attempt
    await again.have(tag)
    await again.send(pb.WorkResponse(tag=tag, begin=pb.Begin(attempt=1, from_chunk=0)))
    play.expect("N5 (ready)", "ready of attempt 1")
    ready = await again.frame()
    breach_unless(ready.HasField("ready") and ready.attempt == 1, "N5 (ready)", "ready of attempt 1", ready)
    held = BlockSet(script.all.hi, blocks_from(ready.ready.held))
    breach_unless(held.covers(left), "N5 (ready)", f"held with {left}", named(list(held)))
    await again.send(pb.WorkResponse(tag=tag, assign=pb.Assign(attempt=1, blocks=blocks_to([left, right]))))
    resent = again.arrival(tag, [left, right], attempt=1)
    await play.collect(again, resent)
    size = script.node.chunk_elements
    same = (resent.values(left)[:size] == arrival.values(left)[:size]).all()
    breach_unless(same, "N7 (what was computed is kept)", f"the bits of {left} as before the cut", "others")
    computed = _computed(play)
    if computed is not None:
        breach_unless(
            computed <= script.all.width, "N7", f"{script.all.width} microbatches computed, each once", computed
        )


def _computed(play: Play) -> int | None:
    """Return the microbatches that the worker says it has computed, where a heartbeat told."""
    beats = play.control.beats
    return beats[-1][1].reports[0].microbatches_count if beats and beats[-1][1].reports else None
