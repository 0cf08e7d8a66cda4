"""Cases: weights that arrive in part, wrong, or while something else is under way."""

from __future__ import annotations

import asyncio

from control.conformance.case import case
from control.conformance.parent import Edge
from control.conformance.play import Play
from control.conformance.script import SkippedError, breach_unless
from spheres.blocks import Block, halves
from spheres.errors import LinkClosedError
from spheres.numerics import crc32c
from spheres.v1 import common_pb2
from spheres.v1 import work_pb2 as pb

EVALUATE = common_pb2.WORK_KIND_EVALUATE


@case("small", "A step", changes={"chunk_bytes": 1 << 20})
async def small(play: Play) -> None:
    """A model of one chunk: header, assignment, chunk and footer in one message, and the gradient in one frame."""
    edge, script = await play.join(), play.script
    for step in range(3):
        await play.train(edge, script.tag(step, step), [script.all])
    play.note = f"{script.chunks} chunk{'s' if script.chunks > 1 else ''}"


@case("next-step", "N14", chunks=2, changes={"window_chunks": 1})
async def next_step(play: Play) -> None:
    """A header of the next step while gradients, or weights, of the last still flow: the new begins at once."""
    edge, script = await play.join(), play.script
    first, second, third = (script.tag(number, number) for number in range(3))
    await edge.weights(first, blocks=[script.all])
    arrival = edge.arrival(first, [script.all])
    await edge.collect(arrival, until=lambda: arrival.frontier > 0, credit=False)
    # half of the next version's weights, and then already the one after it
    await edge.weights(second, blocks=[script.all], through=script.chunks // 2 - 1)
    await play.train(edge, third, [script.all])
    # a header that crosses chunks which had credit to go
    await edge.weights(script.tag(3, 3), blocks=list(halves(script.all)))
    await play.train(edge, script.tag(4, 4), list(halves(script.all)))
    await edge.quiet(0.3, "N14 (older work is dropped)", "no frame more")


@case("term", "N1")
async def term(play: Play) -> None:
    """A higher term goes back to an earlier step and version, as after a restore."""
    edge, script = await play.join(), play.script
    await play.train(edge, script.tag(5, 5), [script.all])
    await play.train(edge, script.tag(2, 2, term=2), [script.all])


@case("go-on", "N17, A step (weights_header)", chunks=2)
async def go_on(play: Play) -> None:
    """Weights that come before it is known what is owed go on under the step's own header, at from_chunk."""
    edge, script = await play.join(), play.script
    for version, sent in ((1, script.chunks // 2), (2, script.chunks)):
        tag = script.tag(version, version)
        announced = script.tag(version, version, kind=EVALUATE)
        await edge.send(edge.header(announced))
        await edge.send(*(edge.chunk(announced, index, footer=False) for index in range(sent)))
        await edge.send(edge.header(tag, blocks=[script.all], from_chunk=sent))
        await edge.send(*(edge.chunk(tag, index) for index in range(sent, script.chunks)))
        if sent == script.chunks:
            footer = pb.WeightsFooter(digest=script.version(version).digest)
            await edge.send(pb.WorkResponse(tag=tag, weights_footer=footer))
        await play.collect(edge, edge.arrival(tag, [script.all]))


@case("resume", "N17, Joining (weights_chunks_held)", chunks=2)
async def resume(play: Play) -> None:
    """A transfer that was cut goes on over the next link: the hello says how many chunks are held."""
    edge, script = await play.join(), play.script
    tag, sent = script.tag(1, 1), script.chunks // 2
    await play.train(edge, script.tag(0, 0), [script.all])
    await edge.weights(tag, blocks=[script.all], through=sent - 1)
    # what the worker has read is known only by its answer to something that came later
    await edge.direct(pb.DIRECTIVE_KIND_REPORT_STATE, request_id=1)
    play.expect("A step (directive)", "state_report")
    await edge.saying("state_report")
    edge.end(LinkClosedError("the parent goes away"))
    again = await play.linked(what="another hello after the link ended")
    _held_in_part(again, 1, sent)
    await again.weights(tag, blocks=[script.all], from_chunk=sent)
    await play.collect(again, again.arrival(tag, [script.all]))
    play.note = f"{sent} of {script.chunks} chunks were held"


@case("checksum", "A step (weights_chunk), N17", chunks=2)
async def checksum(play: Play) -> None:
    """A chunk of weights that does not fit its CRC ends the link; the worker dials again and says what it holds."""
    edge, script = await play.join(), play.script
    tag = script.tag(1, 1)
    wrong = edge.chunk(tag, 1)
    wrong.weights_chunk.crc32c ^= 1
    await edge.weights(tag, blocks=[script.all], through=0)
    await edge.send(wrong)
    await play.ends_link(edge, "A step (weights_chunk)", "chunk 1 does not fit its CRC-32C")
    again = await play.linked(what="another hello after a chunk that was corrupt")
    _held_in_part(again, 1, 1)
    await again.weights(tag, blocks=[script.all], from_chunk=1)
    await play.collect(again, again.arrival(tag, [script.all]))


def _held_in_part(edge: Edge, version: int, chunks: int) -> None:
    hello, rule = edge.hello, "Joining (weights_chunks_held), N17"
    breach_unless(not hello.holds_weights, rule, "holds_weights false: the version is not whole", hello.weights_version)
    found = (hello.weights_chunks_held, hello.weights_version, hello.weights_term)
    breach_unless(
        found == (chunks, version, edge.script.term),
        rule,
        f"weights_chunks_held {chunks}, weights_version {version}, weights_term {edge.script.term}",
        f"{found[0]}, {found[1]} and {found[2]}",
    )


@case("order", "A step (weights_chunk)", chunks=3)
async def out_of_order(play: Play) -> None:
    """A chunk of weights that is not the next one, or of a wrong length, ends the link."""
    edge, script = await play.join(), play.script
    tag = script.tag(0, 0)
    await edge.weights(tag, blocks=[script.all], through=0)
    await edge.send(edge.chunk(tag, 2))
    await play.ends_link(edge, "A step (weights_chunk)", "chunk 2 came after chunk 0")
    again = await play.linked(what="another hello")
    short = again.chunk(tag, 0)
    whole = short.weights_chunk.data
    short.weights_chunk.data = whole[: len(whole) // 2]
    short.weights_chunk.crc32c = crc32c(short.weights_chunk.data)
    await again.send(again.header(tag, blocks=[script.all]), short)
    await play.ends_link(again, "A step (weights_chunk)", f"chunk 0 has {len(whole) // 2} of {len(whole)} bytes")
    await play.train(await play.linked(what="another hello"), tag, [script.all])


@case("digest", "A step (weights_footer), Digests")
async def digest(play: Play) -> None:
    """A footer whose digest is not that of the chunks ends the link, and no gradient is sent."""
    edge, script = await play.join(), play.script
    tag = script.tag(0, 0)
    last = edge.chunk(tag, script.chunks - 1)
    last.weights_footer.digest = script.version(1).digest
    if script.chunks == 1:
        last.MergeFrom(edge.header(tag, blocks=[script.all]))
    else:
        await edge.weights(tag, blocks=[script.all], through=script.chunks - 2)
    await edge.send(last)
    await play.ends_link(edge, "A step (weights_footer)", "the footer's digest is not that of the chunks")
    again = await play.linked(what="another hello after a wrong digest")
    said = again.hello
    breach_unless(
        not said.holds_weights and not said.weights_chunks_held,
        "A step (weights_footer)", "neither weights nor chunks held: nobody knows which are wrong",
        f"holds_weights {said.holds_weights}, weights_chunks_held {said.weights_chunks_held}",
    )  # fmt: skip
    await play.train(again, tag, [script.all])


@case("held-digest", "A step (weights_header)")
async def held_digest(play: Play) -> None:
    """Weights that the parent takes as held, and that are others here, end the link."""
    edge, script = await play.join(), play.script
    await play.train(edge, script.tag(0, 0), [script.all])
    wrong = edge.header(script.tag(1, 0), blocks=[script.all], held=script.version(1).digest)
    await edge.send(wrong)
    await play.ends_link(edge, "A step (weights_header)", "held_digest is not that of its weights")
    again = await play.linked(what="another hello after a wrong held_digest")
    await play.train(again, script.tag(1, 0), [script.all])


@case("layout", "A step (weights_header)")
async def layout(play: Play) -> None:
    """Weights of another layout (manifest_digest) end the link."""
    edge, script = await play.join(), play.script
    header = edge.header(script.tag(0, 0), blocks=[script.all])
    header.weights_header.manifest_digest = bytes(16)
    await edge.send(header)
    await play.ends_link(edge, "A step (weights_header)", "manifest_digest is not its own")
    await play.train(await play.linked(what="another hello"), script.tag(0, 0), [script.all])


@case("lost", "A step (a newer tag without weights_header)")
async def lost(play: Play) -> None:
    """A newer tag without a header ends the link: something has been lost before it."""
    edge, script = await play.join(), play.script
    await play.train(edge, script.tag(0, 0), [script.all])
    await edge.send(edge.chunk(script.tag(1, 1), 0))
    await play.ends_link(
        edge, "A step (a newer tag without weights_header)", "a chunk of step 1 came before its header"
    )
    await play.train(await play.linked(what="another hello"), script.tag(1, 1), [script.all])


@case("another-run", "A step (a tag of another run)")
async def another_run(play: Play) -> None:
    """A tag of another run ends the link."""
    edge, script = await play.join(), play.script
    header = edge.header(script.tag(0, 0), blocks=[script.all])
    header.tag.run_id = "another-run"
    await edge.send(header)
    await play.ends_link(edge, "A step (a tag of another run)", "a header of run 'another-run'")
    await play.train(await play.linked(what="another hello"), script.tag(0, 0), [script.all])


@case("garbage", "Failing")
async def garbage(play: Play) -> None:
    """Bytes that are no message end the link, and not the process."""
    edge, script = await play.join(), play.script
    await edge.send(b"\xff" * 40)
    await play.ends_link(edge, "Failing (the link must end)", "40 bytes of 0xff came")
    await play.train(await play.linked(what="another hello after garbage"), script.tag(0, 0), [script.all])


async def _narrow(play: Play) -> None:
    """Play two steps of a run that rounds; a worker that cannot must say so, and end, before it says hello."""
    play.may_end = True
    await play.start()
    if play.worker is not None:
        ending, dialling = asyncio.ensure_future(play.worker.exit_code()), asyncio.ensure_future(play.dialled())
        try:
            await asyncio.wait({ending, dialling}, return_when=asyncio.FIRST_COMPLETED)
            if ending.done() and not dialling.done():
                said, code = play.worker.tail(3), ending.result()
                breach_unless(
                    code and said, "Types on the wire", "an error and an exit code above 0", f"{code}: {said}"
                )
                raise SkippedError(f"the worker refuses (exit code {code}): {said[-1]}")
        finally:
            ending.cancel()
            if not dialling.done():
                dialling.cancel()
        edge = dialling.result()
    else:
        edge = await play.dialled()
    play.may_end = False
    await edge.welcome()
    script = play.script
    await play.train(edge, script.tag(0, 0), [script.all])
    await play.train(edge, script.tag(1, 1), [Block(k, k + 1) for k in range(*script.all)])


@case("bfloat16-gradients", "Types on the wire, N21", changes={"wire_dtype": "bfloat16"})
async def bfloat16_gradients(play: Play) -> None:
    """Gradients and sums are rounded to bfloat16; or the worker refuses such a run."""
    await _narrow(play)


@case("bfloat16-weights", "Types on the wire, N21", changes={"weights_wire_dtype": "bfloat16"})
async def bfloat16_weights(play: Play) -> None:
    """Weights come as bfloat16, and digests are over those bytes; or the worker refuses such a run."""
    await _narrow(play)


@case("bfloat16", "Types on the wire, N21", changes={"wire_dtype": "bfloat16", "weights_wire_dtype": "bfloat16"})
async def bfloat16(play: Play) -> None:
    """Both are bfloat16, so a chunk has twice as many elements; or the worker refuses such a run."""
    await _narrow(play)
