"""The child's side of an edge, over real gRPC: what it makes of a parent that breaks the protocol, refuses or goes."""

import asyncio
import logging
import socket
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest

from spheres import grpc_link
from spheres import parent as parent_module
from spheres.config import MAX_MESSAGE_BYTES
from spheres.errors import (
    FingerprintError,
    LinkClosedError,
    RefusedError,
    StaleError,
    UnreachableError,
    VersionMismatchError,
    WrongRunError,
)
from spheres.frames import decode
from spheres.grpc_link import GrpcTransport
from spheres.hub import Hub
from spheres.lease import Lease
from spheres.numerics import crc32c, version_digest
from spheres.parent import Fingerprints, Parent
from spheres.transport import Handlers
from spheres.v1 import common_pb2
from spheres.v1 import work_pb2 as pb
from spheres.worker import Worker

NOBODY = "127.0.0.1:1"


class Above:
    """A parent that follows a script: the first link gets the first part of it, the last part is repeated."""

    def __init__(self, small, *script, name="control"):
        self.small, self.name = small, name
        self._script = list(script)
        self.hellos = []
        self.beats = []
        self.beating = asyncio.Event()
        #: the gradient of step 0, once a child has sent it whole
        self.trained = asyncio.get_running_loop().create_future()
        #: set when a child has ended its link
        self.left = asyncio.Event()
        chunks = [small.slice_of(small.flat, index) for index in range(small.config.chunk_count)]
        self.digest = version_digest(small.config.manifest.digest, [crc32c(data) for data in chunks])

    async def work(self, link):
        message = decode(pb.WorkRequest, await link.receive())
        self.hellos.append(message)
        part = self._script.pop(0) if len(self._script) > 1 else self._script[0]
        try:
            await part(self, link)
        except asyncio.CancelledError:
            self.left.set()
            raise

    async def heartbeat(self, link):
        while (data := await link.receive()) is not None:
            beat = decode(pb.HeartbeatRequest, data)
            self.beats.append(beat)
            self.beating.set()
            await link.send(pb.HeartbeatResponse(sent_nanos=beat.sent_nanos).SerializeToString())

    def message(self, **fields):
        tag = pb.Tag(run_id="r-small", term=1, step=0, kind=common_pb2.WORK_KIND_TRAIN, weights_version=0)
        return pb.WorkResponse(tag=tag, **fields)

    def welcome(self, *names):
        path = [pb.Ancestor(id=name, incarnation=1) for name in names or (self.name,)]
        return self.message(welcome=pb.Welcome(path=path))

    def header(self, **changes):
        values = {"manifest_digest": self.small.config.manifest.digest}
        return self.message(weights_header=pb.WeightsHeader(**values | changes))

    def chunk(self, index, **changes):
        data = self.small.slice_of(self.small.flat, index)
        values = {
            "index": index,
            "offset_bytes": index * self.small.config.chunk_bytes,
            "crc32c": crc32c(data),
            "data": data,
        }
        return self.message(weights_chunk=pb.Chunk(**values | changes))

    def footer(self, digest=None):
        return self.message(weights_footer=pb.WeightsFooter(digest=digest or self.digest))

    def assign(self, *blocks, attempt=0):
        return pb.Assign(attempt=attempt, blocks=[pb.Block(lo=lo, hi=hi) for lo, hi in blocks])


async def send(link, *messages):
    for message in messages:
        await link.send(message if isinstance(message, bytes) else message.SerializeToString())


async def idle(above, link):
    """Take the child, and nothing more."""
    await send(link, above.welcome())
    await asyncio.Event().wait()


async def train(above, link):
    """Take the child and have it compute the whole of step 0."""
    small = above.small
    header = above.header()
    header.assign.CopyFrom(above.assign((0, 4)))
    chunks = [above.chunk(index) for index in range(small.config.chunk_count)]
    await send(link, above.welcome(), header, *chunks, above.footer())
    gradient = np.zeros(small.config.manifest.size, np.float32)
    for index in range(small.config.chunk_count):
        while not (message := decode(pb.WorkRequest, await link.receive())).HasField("gradient_chunk"):
            pass
        assert (message.attempt, message.gradient_chunk.index) == (0, index)
        part = np.frombuffer(message.gradient_chunk.data, np.float32)
        gradient[index * small.config.chunk_elements :][: part.size] = part
        await send(link, above.message(credit=pb.Credit(attempt=0, through_chunk=index + small.config.window)))
    if not above.trained.done():
        above.trained.set_result(gradient)
    await asyncio.Event().wait()


class Dialling(GrpcTransport):
    """Notes the links that were dialled and have not been closed."""

    def __init__(self):
        super().__init__()
        self.open = []

    async def dial(self, address, rpc):
        link = await super().dial(address, rpc)
        close = link.aclose

        async def aclose(error=None):
            self.open.remove(link)
            await close(error)

        link.aclose = aclose
        self.open.append(link)
        return link


class Below:
    """A child: a hub that computes, and its link upward."""

    def __init__(self, small, ancestors, *, orphan_timeout, heartbeat_seconds, control):
        config = replace(small.config, heartbeat_seconds=heartbeat_seconds)
        self.worker = Worker(config, small.task)
        self.hub = Hub(config, "s-1", worker=self.worker)
        self.transport = Dialling()
        self.parent = Parent(
            self.hub,
            self.transport,
            Fingerprints(config.task_fingerprint, config.data_fingerprint, "here"),
            [pb.Ancestor(id=name, incarnation=1, address=address) for name, address in ancestors],
            member=common_pb2.Member(host="here"),
            lease=Lease(config.patience_seconds),
            orphan_timeout=orphan_timeout,
            reports=lambda most: [common_pb2.SphereReport(sphere_id="s-1", activity=self.hub.activity)],
            control=control,
        )


@asynccontextmanager
async def child_of(small, *ancestors, orphan_timeout=20.0, heartbeat_seconds=1.0, control=""):
    """Run a child below these, control first; a name and an address each. Gives it and the task of its link.

    ``control`` is the number that control's name once stood for.
    """
    settings = {"orphan_timeout": orphan_timeout, "heartbeat_seconds": heartbeat_seconds, "control": control}
    below = Below(small, ancestors, **settings)
    running = asyncio.create_task(below.parent.run())
    try:
        yield below, running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        below.worker.close()
    assert not below.transport.open


@asynccontextmanager
async def serving(above):
    listener = await GrpcTransport().listen("127.0.0.1:0", Handlers(above.work, above.heartbeat))
    try:
        yield listener.address
    finally:
        await listener.aclose()


def after_welcome(*make):
    """A parent that takes the child, then sends these."""

    async def part(above, link):
        await send(link, above.welcome(), *(message(above) for message in make))
        await asyncio.Event().wait()

    return part


def over_the_limit(above, link):
    return link._context.write(bytes(MAX_MESSAGE_BYTES + 1))


def header_with(*blocks):
    def make(above):
        message = above.header()
        message.assign.CopyFrom(above.assign(*blocks))
        return message

    return make


def with_run(message, run_id):
    message.tag.run_id = run_id
    return message


def with_kind(message, kind):
    message.tag.kind = kind
    return message


async def too_large(above, link):
    await send(link, above.welcome())
    await over_the_limit(above, link)
    await asyncio.Event().wait()


async def too_large_for_a_welcome(above, link):
    await over_the_limit(above, link)
    await asyncio.Event().wait()


def instead_of_welcome(make):
    async def part(above, link):
        await send(link, make(above))
        await asyncio.Event().wait()

    return part


async def no_answer(above, link):
    """End in order, without a word."""


HEADER = lambda above: above.header()  # noqa: E731
CHUNK_0 = lambda above: above.chunk(0)  # noqa: E731
GARBAGE = b"\xff" * 40

#: what the parent does -> how the child counts it, and why it says that the link has ended
MISDEEDS = {
    # in the place of a welcome
    "garbage for a welcome": (instead_of_welcome(lambda _: GARBAGE), "DecodeError", "40 bytes that are no WorkResp"),
    "no welcome": (instead_of_welcome(HEADER), "ProtocolError", "answered hello with something else than welcome"),
    "an oversized welcome": (too_large_for_a_welcome, "MessageTooLargeError", "the limit is"),
    "another's welcome": (
        instead_of_welcome(lambda above: above.welcome("control", "s-9")),
        None,
        "the welcome came from s-9, not from control",
    ),
    "a welcome from nobody": (
        instead_of_welcome(lambda above: above.message(welcome=pb.Welcome())),
        None,
        "the welcome came from nobody, not from control",
    ),
    "a welcome from below": (
        instead_of_welcome(lambda above: above.welcome("s-1", "control")),
        None,
        "control is below s-1: the link would close a circle (N11)",
    ),
    "an end without an answer": (no_answer, None, "control ended the link without an answer"),
    # later
    "garbage": (after_welcome(lambda _: GARBAGE), "DecodeError", "40 bytes that are no WorkResponse"),
    "an oversized message": (too_large, "MessageTooLargeError", f"{MAX_MESSAGE_BYTES + 1} bytes; the limit is"),
    "another run": (
        after_welcome(lambda above: with_run(above.header(), "r-other")),
        None,
        "a message of run 'r-other'; this is run 'r-small'",
    ),
    "a new place below the child": (
        after_welcome(lambda above: above.welcome("s-1", "control")),
        None,
        "control is below s-1: the link would close a circle (N11)",
    ),
    "a new place of nobody": (
        after_welcome(lambda above: above.message(welcome=pb.Welcome())),
        None,
        "the welcome came from nobody",
    ),
    "work of a kind that is none": (
        after_welcome(lambda above: with_kind(above.header(), 77)),
        "ProtocolError",
        "work of kind 77 is not known here",
    ),
    "weights of another layout": (
        after_welcome(lambda above: above.header(manifest_digest=bytes(16))),
        "ProtocolError",
        "weights of another layout",
    ),
    "weights that the child is said to hold": (
        after_welcome(lambda above: above.header(held_digest=above.digest)),
        "ProtocolError",
        "the parent takes weights v0 as held",
    ),
    "weights from the middle": (
        after_welcome(lambda above: above.header(from_chunk=2)),
        "DecodeError",
        "weights v0 go on at chunk 2",
    ),
    "weights chunks out of order": (
        after_welcome(HEADER, lambda above: above.chunk(1)),
        "DecodeError",
        "expected chunk 0 of 3",
    ),
    "a weights chunk twice": (after_welcome(HEADER, CHUNK_0, CHUNK_0), "DecodeError", "expected chunk 1 of 3"),
    "a weights chunk at another offset": (
        after_welcome(HEADER, lambda above: above.chunk(0, offset_bytes=64)),
        "DecodeError",
        "weights chunk 0 at byte 64 with 4096 bytes",
    ),
    "a weights chunk too short": (
        after_welcome(HEADER, lambda above: above.chunk(0, data=bytes(64))),
        "DecodeError",
        "weights chunk 0 at byte 0 with 64 bytes",
    ),
    "a weights chunk with a wrong checksum": (
        after_welcome(HEADER, CHUNK_0, lambda above: above.chunk(1, crc32c=1)),
        "ChecksumError",
        "weights chunk 1 of v0 does not fit its checksum",
    ),
    "a footer too early": (
        after_welcome(HEADER, CHUNK_0, lambda above: above.footer()),
        "DecodeError",
        "weights v0 end after 1 of 3 chunks",
    ),
    "a wrong digest": (
        after_welcome(HEADER, *(lambda above, i=i: above.chunk(i) for i in range(3)), lambda a: a.footer(bytes(16))),
        "ChecksumError",
        f"is not the footer's {'00' * 16}",
    ),
    "blocks that overlap": (
        after_welcome(header_with((0, 2), (0, 1))),
        "ProtocolError",
        "assigned blocks [0,1) and [0,2) overlap",
    ),
    "a block twice": (
        after_welcome(header_with((0, 2), (0, 2))),
        "ProtocolError",
        "assigned blocks [0,2) and [0,2) overlap",
    ),
    "a block that is not canonical": (
        after_welcome(header_with((1, 3))),
        "ProtocolError",
        "[1,3) is no canonical block of 4 microbatches",
    ),
    "a block beyond the step": (
        after_welcome(header_with((4, 8))),
        "ProtocolError",
        "[4,8) is no canonical block of 4 microbatches",
    ),
    "an attempt beyond the model": (
        after_welcome(header_with((0, 4)), lambda above: above.message(begin=pb.Begin(attempt=1, from_chunk=9))),
        "ProtocolError",
        "begin from chunk 9 of 3",
    ),
    "an attempt below 0": (
        after_welcome(header_with((0, 4)), lambda above: above.message(begin=pb.Begin(attempt=1, from_chunk=-1))),
        "ProtocolError",
        "begin from chunk -1 of 3",
    ),
}


@pytest.mark.parametrize("name", MISDEEDS)
def test_a_child_ends_the_link_of_a_parent_that_breaks_the_protocol_and_dials_again(small, run, caplog, name):
    misdeed, counted, reason = MISDEEDS[name]
    caplog.set_level(logging.INFO, "spheres.parent")

    async def main():
        above = Above(small, misdeed, train)
        async with serving(above) as address, child_of(small, ("control", address)) as (below, running):
            np.testing.assert_array_equal(await above.trained, small.gradient()[0])
            assert not running.done()
            first, second = above.hellos
            assert (first.session, second.session) == (1, 2)
            assert first.hello.incarnation == second.hello.incarnation
            # What arrived in part, or did not fit its digest, counts as nothing (N17).
            assert not second.hello.holds_weights
            assert below.hub.counts.refused == ({counted: 1} if counted else {})
        assert [r.message for r in caplog.records if "has ended" in r.message and reason in r.message]

    run(main())


@pytest.mark.parametrize("what", ["credit", "assign"])
def test_what_belongs_to_another_attempt_is_dropped_and_counted_and_the_link_lives(small, run, what):
    """It may have crossed a newer one (I6)."""

    async def part(above, link):
        stale = {
            "credit": above.message(credit=pb.Credit(attempt=5, through_chunk=2)),
            "assign": above.message(assign=above.assign((0, 2), attempt=5)),
        }
        header = above.header()
        header.assign.CopyFrom(above.assign((0, 4)))
        chunks = [above.chunk(index) for index in range(3)]
        await send(link, above.welcome(), header, stale[what], *chunks, above.footer())
        sent = [decode(pb.WorkRequest, await link.receive()).gradient_chunk.index for _ in range(small.config.window)]
        above.trained.set_result(sent)
        await asyncio.Event().wait()

    async def main():
        above = Above(small, part)
        async with serving(above) as address, child_of(small, ("control", address)) as (below, _):
            assert await above.trained == [0, 1]
            assert below.hub.counts.refused == {"stale": 1}
            assert (below.parent.linked, len(above.hellos)) == (True, 1)

    run(main())


# ---- refusals


def refuse(error):
    async def part(above, link):
        raise error

    return part


@pytest.mark.parametrize("error", [VersionMismatchError, FingerprintError, WrongRunError, StaleError])
def test_a_refusal_of_control_that_no_other_attempt_can_cure_ends_the_child(small, run, error):
    async def main():
        above = Above(small, refuse(error("install the same on both")))
        async with serving(above) as address, child_of(small, ("control", address)) as (_, running):
            with pytest.raises(error, match=r"^install the same on both$"):
                await running
            assert len(above.hellos) == 1

    run(main())


@pytest.mark.parametrize("error", [VersionMismatchError, FingerprintError, WrongRunError, StaleError, RefusedError])
def test_a_refusal_of_another_node_sends_the_child_to_the_next(small, run, error):
    """Where a sphere was, one of another run may listen by now."""

    async def main():
        stranger, above = Above(small, refuse(error("not here")), name="s-9"), Above(small, train)
        async with (
            serving(above) as up,
            serving(stranger) as near,
            child_of(small, ("control", up), ("s-9", near)) as (below, running),
        ):
            np.testing.assert_array_equal(await above.trained, small.gradient()[0])
            assert (len(stranger.hellos), below.parent.id) == (1, "control")
            assert not running.done()

    run(main())


@pytest.mark.parametrize("error", [RefusedError, LinkClosedError])
def test_a_refusal_that_may_pass_is_tried_again(small, run, error):
    async def main():
        above = Above(small, refuse(error("not now")), refuse(error("not now")), train)
        async with serving(above) as address, child_of(small, ("control", address)):
            await above.trained
            assert [message.session for message in above.hellos] == [1, 2, 3]

    run(main())


# ---- fallbacks, orphans


def test_a_child_whose_parent_goes_turns_to_the_next_with_what_it_holds(small, run):
    async def goes_after_a_chunk(above, link):
        await send(link, above.welcome("control", "s-9"))
        header = above.header()
        header.assign.CopyFrom(above.assign((0, 4)))
        await send(link, header, *(above.chunk(index) for index in range(3)), above.footer())
        await link.receive()  # the first chunk: so all is computed
        raise LinkClosedError("this sphere ends")

    async def main():
        near = Above(small, goes_after_a_chunk, refuse(StaleError("not here any more")), name="s-9")
        above = Above(small, train)
        async with (
            serving(above) as up,
            serving(near) as address,
            child_of(small, ("control", up), ("s-9", address)) as (below, _),
        ):
            np.testing.assert_array_equal(await above.trained, small.gradient()[0])
            first, second = near.hellos[0], above.hellos[0]
            assert second.session > first.session
            assert second.hello.incarnation == first.hello.incarnation
            assert second.hello.holds_weights
            assert second.hello.weights_digest == above.digest
            assert [(block.lo, block.hi) for block in second.hello.held] == [(0, 4)]
            assert below.hub.counts.microbatches == 4  # nothing was computed twice

    run(main())


def test_a_fallback_is_dialled_beside_a_parent_from_whom_nothing_comes(small, run, monkeypatch):
    """N11: where a machine is gone not even a refusal comes."""

    async def main():
        above = Above(small, train)
        with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel takes the connection, nobody speaks
            near = "{}:{}".format(*silent.getsockname())
            async with serving(above) as up, child_of(small, ("control", up), ("s-9", near)) as (below, _):
                await above.trained
                await above.beating.wait()
                assert below.parent.id == "control"
                assert len(below.transport.open) == 2  # Work and Heartbeat: the other dial is over

    monkeypatch.setattr(parent_module, "_NEXT_SECONDS", 0.1)
    monkeypatch.setattr(grpc_link, "DIAL_SECONDS", 60.0)
    run(main())


@pytest.mark.parametrize(
    ("next_after", "seconds", "taken"),
    [(0.1, (60.0, 0.0), "control"), (0.1, (0.4, 60.0), "s-9"), (60.0, (0.0, 0.0), "s-9")],
)
def test_of_two_that_are_dialled_who_answers_first_is_taken(small, run, monkeypatch, next_after, seconds, taken):
    slow = {}
    dial = Dialling.dial

    async def dial_slowly(self, address, rpc):
        await asyncio.sleep(slow.pop(address, 0.0))
        return await dial(self, address, rpc)

    async def main():
        above, near = Above(small, train), Above(small, train, name="s-9")
        async with serving(above) as up, serving(near) as address:
            slow[address], slow[up] = seconds
            async with child_of(small, ("control", up), ("s-9", address)) as (below, _):
                await asyncio.wait({above.trained, near.trained}, return_when=asyncio.FIRST_COMPLETED)
                assert below.parent.id == taken
                assert len(above.hellos) + len(near.hellos) == 1

    monkeypatch.setattr(parent_module, "_NEXT_SECONDS", next_after)
    monkeypatch.setattr(Dialling, "dial", dial_slowly)
    run(main())


def test_who_is_ended_while_it_gives_up_the_other_dial_keeps_no_link_open(small, run, monkeypatch):
    """The dial that is given up takes a moment to end: who has answered meanwhile is not forgotten."""
    dial = Dialling.dial

    async def main():
        ending = asyncio.Event()

        async def dial_slowly(self, address, rpc):
            if address != NOBODY:
                return await dial(self, address, rpc)
            try:
                await asyncio.Event().wait()
            finally:
                ending.set()
                await asyncio.sleep(0.05)

        monkeypatch.setattr(Dialling, "dial", dial_slowly)
        above = Above(small, idle)
        async with serving(above) as address, child_of(small, ("control", address), ("s-9", NOBODY)):
            await ending.wait()  # the child is ended now; that none of its links is open then is looked at there

    monkeypatch.setattr(parent_module, "_NEXT_SECONDS", 0.1)
    run(main())


class Names:
    """Control's name, for a transport that is asked for it: it stands for a number, is unknown, or is waited for."""

    ADDRESS = "control:7070"

    def __init__(self, monkeypatch):
        #: what happens to who dials the name
        self.then = self.hang
        self.asked = 0
        self._slow = asyncio.Event()
        dial = Dialling.dial

        async def dial_by_name(transport, address, rpc):
            if address == self.ADDRESS:
                self.asked += 1
                address = await self.then()
            try:
                return await dial(transport, address, rpc)
            except asyncio.CancelledError:
                self._slow.set()
                raise

        monkeypatch.setattr(Dialling, "dial", dial_by_name)
        monkeypatch.setattr(parent_module, "_NEXT_SECONDS", 0.1)

    async def hang(self):
        """Until the number was given up, where this machine was too busy for it: then both are dialled again."""
        self._slow.clear()
        await self._slow.wait()
        raise UnreachableError("nobody has told that name")

    async def fail(self):
        raise UnreachableError("that name is not known")


@pytest.mark.parametrize("then", ["hang", "fail"])
def test_where_nobody_knows_the_name_of_control_by_now_its_number_is_dialled(small, run, monkeypatch, then):
    """What tells names may go when a machine goes, or lose a question."""
    names = Names(monkeypatch)
    names.then = getattr(names, then)

    async def main():
        above, gone = Above(small, train), ("s-9", NOBODY)
        async with (
            serving(above) as number,
            child_of(small, ("control", names.ADDRESS), gone, control=number) as (below, _),
        ):
            await above.trained
            await above.beating.wait()
            # what is dialled next, and handed on, is the name: control may be elsewhere then
            assert [node.address for node in below.hub.path[:-1]] == [names.ADDRESS]

    run(main())


def test_a_refusal_under_the_number_is_not_final_since_another_run_may_live_there(small, run, monkeypatch):
    names = Names(monkeypatch)
    names.then = names.fail

    async def main():
        twice = asyncio.Event()

        async def refuse_again(above, link):
            twice.set()
            raise WrongRunError("another run")

        stranger, above = Above(small, refuse(WrongRunError("another run")), refuse_again), Above(small, train)
        async with (
            serving(above) as by_name,
            serving(stranger) as number,
            child_of(small, ("control", names.ADDRESS), control=number),
        ):
            await twice.wait()

            async def found():
                return by_name

            names.then = found
            await above.trained

    run(main())


def test_a_number_that_nobody_answers_at_does_not_keep_a_child_from_the_name(small, run, monkeypatch):
    names = Names(monkeypatch)
    monkeypatch.setattr(grpc_link, "DIAL_SECONDS", 60.0)

    async def main():
        above = Above(small, train)
        with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel takes the connection, nobody speaks
            number = "{}:{}".format(*silent.getsockname())
            async with serving(above) as by_name:

                async def found_in_the_end():
                    if names.asked <= 3:
                        await names.fail()
                    return by_name

                names.then = found_in_the_end
                async with child_of(small, ("control", names.ADDRESS), control=number):
                    await above.trained
            names.then = names.fail
            async with child_of(small, ("control", names.ADDRESS), control=number, orphan_timeout=0.3) as (_, running):
                with pytest.raises(UnreachableError, match=f"nobody answers at {number}$"):
                    await running

    run(main())


def test_an_orphan_ends_in_time_and_says_why(small, run):
    async def main():
        async with child_of(small, ("control", NOBODY), orphan_timeout=0.3) as (_, running):
            with pytest.raises(
                UnreachableError, match=r"^no way to control for 0\.3 s .*nobody answers at 127\.0\.0\.1:1"
            ):
                await running

    run(main())


def test_a_parent_that_does_not_answer_a_hello_is_given_up(small, run, monkeypatch):
    async def silent(above, link):
        monkeypatch.setattr(parent_module, "WELCOME_SECONDS", 20.0)  # of the next hello, which is answered
        await asyncio.Event().wait()

    async def main():
        above = Above(small, silent, train)
        async with serving(above) as address, child_of(small, ("control", address)):
            await above.trained
            assert len(above.hellos) == 2
            await above.left.wait()

    monkeypatch.setattr(parent_module, "WELCOME_SECONDS", 0.1)
    run(main())


def test_a_new_place_of_the_parent_is_handed_on(small, run):
    """N11: fallbacks are renewed on each re-parenting."""

    async def moves(above, link):
        await send(link, above.welcome("control", "s-9"), above.welcome("control", "s-7", "s-9"), GARBAGE)
        await asyncio.Event().wait()

    async def main():
        again = asyncio.Event()

        async def silent(above, link):
            again.set()
            await asyncio.Event().wait()

        above = Above(small, moves, silent, name="s-9")
        async with (
            serving(above) as address,
            child_of(small, ("control", NOBODY), ("s-9", address)) as (below, _),
        ):
            await again.wait()  # by then all that came before the garbage has been seen
            assert [node.id for node in below.hub.path] == ["control", "s-7", "s-9", "s-1"]
            assert [node.address for node in below.hub.path[:3]] == [NOBODY, "", address]

    run(main())


# ---- heartbeats, cutting, ending


def test_heartbeats_have_a_stream_of_their_own_and_begin_at_once(small, run):
    async def main():
        above = Above(small, idle)
        async with serving(above) as address, child_of(small, ("control", address), heartbeat_seconds=60.0):
            await above.beating.wait()  # within the time of this test, which is less
            beat = above.beats[0]
            assert (beat.run_id, beat.sphere_id, beat.incarnation, beat.session) == ("r-small", "s-1", 1, 1)
            assert [report.sphere_id for report in beat.reports] == ["s-1"]

    run(main())


def test_the_end_of_the_heartbeats_does_not_end_the_edge(small, run):
    class Heartless(Above):
        async def heartbeat(self, link):
            self.beats.append(await link.receive())
            if len(self.beats) == 3:
                self.beating.set()
            raise StaleError("no heartbeats here")

    async def main():
        above = Heartless(small, train)
        async with (
            serving(above) as address,
            child_of(small, ("control", address), heartbeat_seconds=0.02) as (below, _),
        ):
            await above.trained
            await above.beating.wait()
            assert (below.parent.linked, len(above.hellos)) == (True, 1)

    run(main())


def test_a_link_that_is_cut_from_inside_is_dialled_anew(small, run, caplog):
    caplog.set_level(logging.INFO, "spheres.parent")

    async def main():
        above = Above(small, idle, train)
        async with serving(above) as address, child_of(small, ("control", address)) as (below, _):
            await above.beating.wait()
            below.parent.cut(LinkClosedError("no sphere below can compute"))
            await above.trained
            assert len(above.hellos) == 2

    run(main())
    assert any("has ended: no sphere below can compute" in record.message for record in caplog.records)


def test_a_child_that_is_ended_closes_its_links(small, run):
    async def main():
        above = Above(small, idle)
        async with serving(above) as address:
            async with child_of(small, ("control", address)):
                await above.beating.wait()
            await above.left.wait()

    run(main())
