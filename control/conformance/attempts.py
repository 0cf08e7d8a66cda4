"""Cases: another attempt at a step, as after the loss of a sphere."""

from __future__ import annotations

import numpy as np

from control.conformance.arrival import Arrival
from control.conformance.case import case
from control.conformance.play import Play
from control.conformance.script import SkippedError, breach_unless, named
from spheres.blocks import Block, BlockSet, halves
from spheres.frames import blocks_from
from spheres.narrow import add_rounded
from spheres.v1 import work_pb2 as pb

_FEW = "with so few microbatches there is nothing to give to another: give 4 --microbatches or more"


def _same(one: Arrival, other: Arrival, block: Block, why: str) -> None:
    """Hold a block that was sent again to its bits."""
    breach_unless(
        np.array_equal(one.values(block).view(np.uint32), other.values(block).view(np.uint32)),
        "N7 (what was computed is kept)", f"the same bits of {block} again: {why}", "others",
    )  # fmt: skip


def _holds(ready: pb.Ready, total: int, *blocks: Block) -> None:
    held = BlockSet(total, blocks_from(ready.held))
    for block in blocks:
        breach_unless(held.covers(block), "N5 (ready)", f"held with {block}, which was computed", named(list(held)))


@case("substitution", "N4, N5, N7, Attempts")
async def substitution(play: Play) -> None:
    """A new attempt: ready says what is held, and blocks are sent again, in parts, in wholes and with others."""
    edge, script = await play.join(), play.script
    total = script.all.hi
    if total < 4:
        raise SkippedError(_FEW)
    tag, (left, right) = script.tag(0, 0), halves(script.all)
    first = await play.train(edge, tag, [left])
    ready = await play.begin(edge, tag, 1)
    _holds(ready, total, left)
    breach_unless(ready.idle and not ready.computing, "N5 (ready)", "idle, and nothing in compute", ready)
    again = await play.assign(edge, tag, 1, [left])
    _same(first, again, left, "it was held")
    # its halves are parts of what is held; the right half is new
    await play.begin(edge, tag, 2)
    parts = await play.assign(edge, tag, 2, [*halves(left), right])
    ready = await play.begin(edge, tag, 3)
    _holds(ready, total, left, right)
    whole = await play.assign(edge, tag, 3, [left, right])
    _same(first, whole, left, "it was held, and its halves were sent meanwhile")
    _same(parts, whole, right, "it was held")
    # of the whole step both halves are held: they are to be added as the canonical sum says
    await play.begin(edge, tag, 4)
    everything = await play.assign(edge, tag, 4, [script.all])
    total_sum = np.empty(script.node.manifest.size, np.float32)
    add_rounded(whole.values(left), whole.values(right), total_sum, script.node.gradient_dtype)
    breach_unless(
        np.array_equal(total_sum, everything.values(script.all)),
        "Canonical sums", f"{script.all} = {left} + {right} in float32, of the blocks that were held", "another sum",
    )  # fmt: skip
    # a step later nothing of it is left
    await edge.send(edge.header(script.tag(1, 0), held=script.version(0).digest))
    ready = await play.begin(edge, script.tag(1, 0), 1)
    breach_unless(not ready.held, "N14 (a header drops the blocks before)", "no block held", ready.held)


@case("from-chunk", "N4 (from_chunk)", chunks=3, changes={"window_chunks": 1})
async def from_chunk(play: Play) -> None:
    """A new attempt begins at the parent's frontier: chunks below it are not sent again."""
    edge, script = await play.join(), play.script
    tag, at = script.tag(0, 0), script.chunks - 2
    blocks = list(halves(script.all)) if script.all.width > 1 else [script.all]
    await edge.weights(tag, blocks=blocks)
    arrival = edge.arrival(tag, blocks)
    await edge.collect(arrival, until=lambda: arrival.frontier >= at)
    await play.begin(edge, tag, 1, from_chunk=at)
    await play.assign(edge, tag, 1, blocks, from_chunk=at)
    play.note = f"from chunk {at} of {script.chunks}"


@case("older-attempt", "A step (assign, credit), N6", chunks=2, changes={"window_chunks": 1})
async def older_attempt(play: Play) -> None:
    """Assign and credit of an attempt before the last ready are ignored."""
    edge, script = await play.join(), play.script
    tag, (left, right) = script.tag(0, 0), halves(script.all)
    await edge.weights(tag, blocks=[left])
    old = edge.arrival(tag, [left])
    await edge.collect(old, until=lambda: old.frontier > 0, credit=False)
    await play.begin(edge, tag, 1)
    await play.begin(edge, tag, 2)
    await edge.send(
        pb.WorkResponse(tag=tag, assign=pb.Assign(attempt=1, blocks=[pb.Block(lo=left.lo, hi=left.hi)])),
        pb.WorkResponse(tag=tag, credit=pb.Credit(attempt=1, through_chunk=script.chunks)),
    )
    rule = "A step (assign: its attempt must be the one of your last ready)"
    await edge.quiet(0.3, rule, "no frame for an assignment of attempt 1 after ready of attempt 2")
    await play.assign(edge, tag, 2, [left, right])


@case("spare", "A step (a header without assign)")
async def spare(play: Play) -> None:
    """A header without assign makes a spare: it sends nothing until a begin and an assign come."""
    edge, script = await play.join(), play.script
    tag = script.tag(0, 0)
    await edge.weights(tag)
    await edge.quiet(0.3, "A step (a header without assign)", "no frame of a spare")
    ready = await play.begin(edge, tag, 1)
    breach_unless(ready.idle and not ready.held, "N5 (ready)", "idle, and nothing held", ready)
    await play.assign(edge, tag, 1, [script.all])
