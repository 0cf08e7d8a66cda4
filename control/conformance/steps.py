"""Cases: weights, gradients and evaluations of undisturbed steps."""

from __future__ import annotations

from functools import partial

from control.conformance.arrival import Arrival
from control.conformance.case import case
from control.conformance.play import Play
from control.conformance.script import SkippedError
from spheres.blocks import Block, halves
from spheres.v1 import common_pb2
from spheres.v1 import work_pb2 as pb

EVALUATE = common_pb2.WORK_KIND_EVALUATE
#: seconds in which a worker that goes beyond its credit would have done so
_QUIET_SECONDS = 0.3


@case("weights", "A step, N17")
async def weights(play: Play) -> None:
    """Weights in chunks; only after the footer is a gradient computed and sent."""
    edge, script = await play.join(), play.script
    tag, last = script.tag(0, 0), Block(script.all.hi - 1, script.all.hi)
    final = edge.chunk(tag, script.chunks - 1)
    footer = pb.WorkResponse(tag=tag, weights_footer=final.weights_footer)
    final.ClearField("weights_footer")
    await edge.weights(tag, blocks=[last], through=script.chunks - 2)
    await edge.send(final)
    rule = "A step (weights_footer: only now may the weights be used)"
    await edge.quiet(_QUIET_SECONDS, rule, "no frame before the footer")
    await edge.send(footer)
    await play.collect(edge, edge.arrival(tag, [last]))
    play.note = f"{script.chunks} chunks"


@case("gradient", "A step, N2, N3, Canonical sums, Which samples")
async def gradient(play: Play) -> None:
    """Gradients of single microbatches and wide blocks, of several steps and versions, agree with Python's."""
    edge, script = await play.join(), play.script
    everything = script.all
    epoch = script.node.sampler.steps_per_epoch
    blocks = _single_and_wide(everything)
    # other samples for each step, the short last one of an epoch and the first of the next among them
    for version, step in enumerate((0, 1, epoch - 1, epoch, 3 * epoch + 2)):
        await play.train(edge, script.tag(step, version), [everything] if version % 2 else blocks)


def _beyond(arrival: Arrival, index: int) -> bool:
    return arrival.frontier > index


def _single_and_wide(everything: Block) -> list[Block]:
    """Return a partition into canonical blocks of different widths."""
    blocks, rest = [], everything
    while rest.width > 1:
        left, rest = halves(rest)
        blocks.append(left)
    return [*blocks, rest]


@case("evaluation", "A step (evaluation)")
async def evaluation(play: Play) -> None:
    """Evaluation: one frame per block, without a gradient; then a step on the weights that are held."""
    edge, script = await play.join(), play.script
    if not script.node.test_size:
        raise SkippedError("the task has no test split")
    total = script.node.evaluation_microbatches
    tag = script.tag(4, 2, kind=EVALUATE)
    everything = Block(0, total)
    blocks = _single_and_wide(everything)
    await edge.weights(tag, blocks=blocks)
    await play.collect(edge, edge.arrival(tag, blocks))
    # the step's training on the same version: the parent says that the worker holds it
    train = script.tag(4, 2)
    await edge.have(train, [script.all])
    await play.collect(edge, edge.arrival(train, [script.all]))
    play.note = f"{len(blocks)} blocks of {total} slices, then a step on the weights that were held"


@case("credit", "N6", changes={"window_chunks": 1}, chunks=3)
async def credit(play: Play) -> None:
    """A worker sends no chunk beyond its credit, and goes on when it gets some."""
    edge, script = await play.join(), play.script
    tag, blocks = script.tag(0, 0), list(halves(script.all)) if script.all.width > 1 else [script.all]
    await edge.weights(tag, blocks=blocks)
    arrival = edge.arrival(tag, blocks)
    for index in range(script.chunks):
        play.expect("N6 (credit)", f"chunk {index} of every block")
        await edge.collect(arrival, until=partial(_beyond, arrival, index), credit=False)
        if index < script.chunks - 1:
            await edge.quiet(_QUIET_SECONDS, "N6 (credit)", f"no chunk beyond {arrival.credit} before there is credit")
            arrival.credit = index + 1
            await edge.send(pb.WorkResponse(tag=tag, credit=pb.Credit(through_chunk=arrival.credit)))
    await play.collect(edge, arrival)


@case("absent", "N16 (absent blocks)", changes={"batch_size": 3})
async def absent(play: Play) -> None:
    """A block without samples is one frame with header and footer, and takes no part in a sum."""
    edge, script = await play.join(), play.script
    empty = script.node.sampler.empty(0)
    if not empty:
        raise SkippedError("no microbatch is empty: give more --microbatches")
    tag, blocks = script.tag(0, 0), [Block(k, k + 1) for k in range(*script.all)]
    await play.train(edge, tag, blocks)
    await play.train(edge, script.tag(1, 1), [script.all])
    play.note = f"{len(empty)} of {len(blocks)} microbatches are empty"


@case("late", "A step (an older tag, another attempt)", chunks=2)
async def late(play: Play) -> None:
    """What belongs to an older step or another attempt is ignored, and the link lives."""
    edge, script = await play.join(), play.script
    left = halves(script.all)[0]
    await play.train(edge, script.tag(3, 1), [script.all])
    tag, old = script.tag(4, 2), script.tag(3, 1)
    await edge.send(
        edge.header(tag, blocks=[script.all]),
        # of the step before, and of an older term: a header, weights, credit
        edge.header(old, blocks=[left]),
        edge.chunk(old, 0),
        edge.header(script.tag(9, 3, term=0), blocks=[left]),
        pb.WorkResponse(tag=old, begin=pb.Begin(attempt=7, from_chunk=1)),
        # of this step, but of an attempt that is not running
        pb.WorkResponse(tag=tag, assign=pb.Assign(attempt=5, blocks=[pb.Block(lo=left.lo, hi=left.hi)])),
        pb.WorkResponse(tag=tag, credit=pb.Credit(attempt=5, through_chunk=script.chunks)),
        *(edge.chunk(tag, index) for index in range(script.chunks)),
    )
    await play.collect(edge, edge.arrival(tag, [script.all]))
