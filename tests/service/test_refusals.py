"""What control answers to a child that breaks the protocol, over real gRPC; the tree goes on without it."""

import asyncio
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import numpy as np
import pytest

from control.tree import Tree
from spheres import children, grpc_listener
from spheres.blocks import Block
from spheres.config import MAX_MESSAGE_BYTES, PROTOCOL_VERSION
from spheres.environment import environment_fingerprint
from spheres.grpc_link import GrpcTransport
from spheres.sphere import Sphere, SphereOptions
from spheres.tensors import aligned_zeros
from spheres.v1 import common_pb2, control_pb2
from spheres.v1 import work_pb2 as pb

TRAIN = common_pb2.WORK_KIND_TRAIN


class Stage:
    """Control, with good spheres below it."""

    def __init__(self, small, fan_out):
        self.small = small
        self.tree = Tree(replace(small.config, fan_out=fan_out), GrpcTransport(), host="here", term=1)
        self.hub = self.tree.hub
        self.hub.weights.flat[:] = small.flat
        self.hub.weights.publish(term=1, version=0)
        self.gradient = aligned_zeros(small.config.manifest.size)
        #: sphere -> why it was lost
        self.lost = {}
        self.tree.changed = self._changed
        self.spheres = []
        self._tasks = []
        self._news = asyncio.Event()

    def _changed(self, event, sphere, reason):
        if event == "sphere_lost":
            self.lost[sphere] = reason
        self._news.set()

    async def until_lost(self, sphere):
        while sphere not in self.lost:
            self._news.clear()
            await self._news.wait()
        return self.lost[sphere]

    @property
    def refused(self):
        return Counter(self.hub.counts.refused)

    async def add_sphere(self):
        options = SphereOptions(control=self.tree.address, host="here", orphan_timeout=5.0)
        sphere = Sphere(options, GrpcTransport(), task=self.small.task)
        self.spheres.append(sphere)
        self._tasks.append(asyncio.create_task(sphere.run()))
        await self.tree.wait_for(len(self.spheres))
        await sphere.parent.placed.wait()

    def begin(self):
        """Start step 0."""
        return self.tree.compute(0, TRAIN, self.gradient)

    async def finish(self, step=None):
        """The step ends with the right bits, each microbatch counted once."""
        await (step or self.begin())
        gradient, sums = self.small.gradient()
        np.testing.assert_array_equal(self.gradient, gradient)
        assert (self.hub.sums.count, self.hub.sums.metrics) == (sums.count, sums.metrics)

    async def aclose(self):
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.tree.aclose()

    def contributors(self):
        """Who computed something of the step."""
        return {part.sphere for part in self.hub.gradients.contributions(Block(0, self.hub.ledger.total))}


@asynccontextmanager
async def control(small, *, spheres=1, fan_out=4):
    stage = Stage(small, fan_out)
    await stage.tree.listen("127.0.0.1:0")
    try:
        for _ in range(spheres):
            await stage.add_sphere()
        yield stage
    finally:
        await stage.aclose()


class Raw:
    """A client of gRPC alone, as one in another language would be. It can say what no sphere says."""

    def __init__(self, small, address, method="SphereService/Work"):
        self.small, self.session = small, 1
        self._channel = grpc.aio.insecure_channel(address, options=[("grpc.max_send_message_length", -1)])
        self.call = self._channel.stream_stream(f"/spheres.v1.{method}")()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        self.call.cancel()
        await self._channel.close()

    async def send(self, message):
        await self.call.write(message if isinstance(message, bytes) else message.SerializeToString())

    async def receive(self):
        data = await self.call.read()
        assert data is not grpc.aio.EOF
        return pb.WorkResponse.FromString(data)

    async def status(self):
        """Read to the end: name of the code, and the details."""
        try:
            while await self.call.read() is not grpc.aio.EOF:
                pass
        except grpc.aio.AioRpcError as error:
            return error.code().name, error.details()
        return "OK", ""

    def hello(self, *, run_id=None, session=1, **changes):
        config = self.small.config
        self.session = session
        values = {
            "protocol_version": PROTOCOL_VERSION,
            "sphere_id": "raw",
            "incarnation": 1,
            "parent_id": "control",
            "task_fingerprint": config.task_fingerprint,
            "data_fingerprint": config.data_fingerprint,
            "environment_fingerprint": environment_fingerprint(),
            "capacity": 1.0,
        }
        tag = pb.Tag(run_id=config.run_id if run_id is None else run_id)
        return pb.WorkRequest(tag=tag, session=session, hello=pb.Hello(**values | changes))

    async def join(self, **changes):
        await self.send(self.hello(**changes))
        welcome = await self.receive()
        assert [node.id for node in welcome.welcome.path] == ["control"]

    async def assigned(self):
        """Wait for blocks; note what belongs to them."""
        while not (message := await self.receive()).HasField("assign"):
            pass
        self.tag, self.attempt = message.tag, message.assign.attempt
        self.from_chunk = message.assign.from_chunk
        self.blocks = [Block(block.lo, block.hi) for block in message.assign.blocks]
        assert self.blocks
        self.block = self.blocks[0]

    def frame(self, **fields):
        return pb.WorkRequest(tag=self.tag, session=self.session, attempt=self.attempt, **fields)

    def header(self, block=None, **changes):
        header = self.small.header(block or self.block, self.digest)
        header.MergeFrom(pb.GradientHeader(**changes))
        return self.frame(gradient_header=header)

    def chunk(self, index, block=None, **changes):
        chunk = self.small.chunk(block or self.block, index)
        for name, value in changes.items():
            setattr(chunk, name, value)
        return self.frame(gradient_chunk=chunk)

    def chunk_number(self, index):
        message = self.chunk(0)
        message.gradient_chunk.index = index
        return message

    def footer(self, block):
        part = pb.Block(lo=block.lo, hi=block.hi)
        contribution = pb.Contribution(block=part, sphere_id="raw")
        return self.frame(gradient_footer=pb.GradientFooter(block=part, contributions=[contribution]))

    async def deliver(self):
        """Send all that is owed, chunk by chunk across the blocks, as credit allows (N6)."""
        for block in self.blocks:
            await self.send(self.header(block))
        through = self.from_chunk + self.small.config.window - 1
        for index in range(self.from_chunk, self.small.config.chunk_count):
            while index > through:
                through = max(through, (await self.receive()).credit.through_chunk)
            for block in self.blocks:
                message = self.chunk(index, block)
                if index == self.small.config.chunk_count - 1:
                    message.MergeFrom(self.footer(block))
                await self.send(message)


@asynccontextmanager
async def child_in_a_step(small):
    """Control in step 0, which a good sphere and a raw child share."""
    async with control(small) as stage, Raw(small, stage.tree.address) as raw:
        await raw.join()
        raw.digest = stage.hub.weights.digest
        step = stage.begin()
        try:
            await raw.assigned()
            yield stage, raw, step
        finally:
            step.cancel()
            await asyncio.gather(step, return_exceptions=True)


# ---- hello

HELLOS = {
    "no hello": (lambda raw: pb.WorkRequest(capacity=pb.Capacity(capacity=1)), "INVALID_ARGUMENT", "must be a hello"),
    "an empty message": (lambda raw: b"", "INVALID_ARGUMENT", "must be a hello"),
    "garbage": (lambda raw: b"\xff" * 40, "INVALID_ARGUMENT", "40 bytes that are no WorkRequest"),
    "a message over the limit": (
        lambda raw: bytes(MAX_MESSAGE_BYTES + 1),
        "RESOURCE_EXHAUSTED",
        f"{MAX_MESSAGE_BYTES + 1} bytes; the limit is {MAX_MESSAGE_BYTES}",
    ),
    "a message far over the limit": (lambda raw: bytes(5 << 20), "RESOURCE_EXHAUSTED", "larger than max"),
    "another protocol": (
        lambda raw: raw.hello(protocol_version=99),
        "FAILED_PRECONDITION",
        "raw speaks protocol 99, control speaks 1; install the same release on both",
    ),
    "another run": (
        lambda raw: raw.hello(run_id="r-other"),
        "NOT_FOUND",
        "raw belongs to run 'r-other'; this is run 'r-small'",
    ),
    "another task": (
        lambda raw: raw.hello(task_fingerprint="0"),
        "FAILED_PRECONDITION",
        "raw has other task than the run (0 against",
    ),
    "other data": (
        lambda raw: raw.hello(data_fingerprint="0"),
        "FAILED_PRECONDITION",
        "give it the same data set",
    ),
    "another parent": (
        lambda raw: raw.hello(parent_id="s-7"),
        "FAILED_PRECONDITION",
        "raw looks for s-7; this is control",
    ),
    "a later life of control": (
        lambda raw: raw.hello(parent_incarnation=9),
        "FAILED_PRECONDITION",
        "raw looks for control",
    ),
    "the name of control": (
        lambda raw: raw.hello(sphere_id="control"),
        "FAILED_PRECONDITION",
        "control is above control: a link would close a circle (N11)",
    ),
    "no name": (lambda raw: raw.hello(sphere_id=""), "INVALID_ARGUMENT", "0 characters of name"),
    "a name without end": (lambda raw: raw.hello(sphere_id="x" * 9999), "INVALID_ARGUMENT", "9999 characters of name"),
    "a capacity that is no number": (
        lambda raw: raw.hello(capacity=float("nan")),
        "INVALID_ARGUMENT",
        "capacity is nan",
    ),
    "a capacity without end": (lambda raw: raw.hello(capacity=float("inf")), "INVALID_ARGUMENT", "capacity is inf"),
    "a capacity below zero": (lambda raw: raw.hello(capacity=-1.0), "INVALID_ARGUMENT", "capacity is -1.0"),
    "a capacity next to nothing": (lambda raw: raw.hello(capacity=1e-320), "INVALID_ARGUMENT", "0, or from 1e-06"),
    "capacities that do not add up": (
        lambda raw: raw.hello(capacity=1.0, capacities={"a": 1.0, "b": 2.0}),
        "INVALID_ARGUMENT",
        "capacity is 1, and of {",
    ),
    "environments without end": (
        lambda raw: raw.hello(capacity=1.0, capacities={f"e{n}": 1 / 128 for n in range(128)}),
        "INVALID_ARGUMENT",
        "names 128 environments; the limit is 64",
    ),
    "no environment": (
        lambda raw: raw.hello(environment_fingerprint=""),
        "INVALID_ARGUMENT",
        "environment_fingerprint of 0 characters; give it 1 to 255: a hash",
    ),
    "an environment that is a list of all flags": (
        lambda raw: raw.hello(environment_fingerprint="sse4.2 " * 99),
        "INVALID_ARGUMENT",
        "environment_fingerprint of 693 characters",
    ),
}


@pytest.mark.parametrize("name", HELLOS)
def test_a_hello_that_does_not_fit_is_refused_and_the_tree_goes_on(small, run, name):
    make, code, reason = HELLOS[name]

    async def main():
        async with control(small) as stage, Raw(small, stage.tree.address) as raw:
            await raw.send(make(raw))
            status, details = await raw.status()
            assert (status, reason in details) == (code, True), details
            assert list(stage.hub.children) == ["s-1"]
            if "far" not in name:  # there gRPC itself refused
                assert sum(stage.refused.values()) == 1
            await stage.finish()

    run(main())


def test_a_link_that_says_nothing_is_ended(small, run, monkeypatch):
    async def main():
        async with control(small, spheres=0) as stage, Raw(small, stage.tree.address) as raw:
            assert await raw.status() == ("INVALID_ARGUMENT", "ProtocolError: no hello came in 0.1 s")

    monkeypatch.setattr(children, "HELLO_SECONDS", 0.1)
    run(main())


def test_a_sphere_is_refused_by_a_node_below_it(small, run):
    """N11: stale fallbacks made circles. In the chain control, s-1, s-2 a raw client plays s-1."""

    async def main():
        async with control(small, spheres=2, fan_out=1) as stage:
            last = stage.spheres[1].hub
            assert [node.id for node in last.path] == ["control", "s-1", "s-2"]
            async with Raw(small, last.address) as raw:
                await raw.send(raw.hello(sphere_id="s-1", incarnation=9_000_000, parent_id="s-2"))
                assert await raw.status() == (
                    "FAILED_PRECONDITION",
                    "RefusedError: s-1 is above s-2: a link would close a circle (N11)",
                )
            assert not last.children
            await stage.finish()

    run(main())


@pytest.mark.parametrize(
    ("first", "second"),
    [((2, 5), (1, 9)), ((2, 5), (2, 4)), ((2, 5), (2, 5))],
    ids=["older incarnation", "older session", "the same session"],
)
@pytest.mark.parametrize("alive", [True, False], ids=["linked", "after its link ended"])
def test_an_older_session_is_refused_whether_or_not_the_newer_one_lives(small, run, first, second, alive):
    async def main():
        async with control(small) as stage, Raw(small, stage.tree.address) as newer:
            await newer.join(incarnation=first[0], session=first[1])
            if not alive:
                newer.call.cancel()
                await stage.until_lost("raw")
            async with Raw(small, stage.tree.address) as older:
                await older.send(older.hello(incarnation=second[0], session=second[1]))
                status, details = await older.status()
                why = f"raw: incarnation and session {second} are not above {first}"
                if second[0] < first[0]:  # what control knows of lives, it knows first
                    why = "raw is another sphere's by now: enroll anew"
                assert (status, details) == ("ABORTED", f"StaleError: {why}")
            assert ("raw" in stage.hub.children) == alive
            assert "s-1" in stage.hub.children

    run(main())


@pytest.mark.parametrize("newer", [{"session": 6}, {"session": 1, "incarnation": 3}], ids=["session", "incarnation"])
def test_a_newer_session_takes_the_place_of_the_older(small, run, newer):
    async def main():
        async with control(small) as stage, Raw(small, stage.tree.address) as old:
            await old.join(incarnation=2, session=5)
            async with Raw(small, stage.tree.address) as new:
                await new.join(**{"incarnation": 2} | newer)
                assert await old.status() == ("ABORTED", "StaleError: a newer session took this one's place")
                step = stage.begin()
                new.digest = stage.hub.weights.digest
                await new.assigned()
                await new.deliver()
                await stage.finish(step)

    run(main())


# ---- a step


def wrong_block(raw):
    """A block of the step that another owes."""
    return next(block for block in (Block(0, 2), Block(2, 4)) if block not in raw.blocks)


async def beyond_credit(raw):
    await raw.send(raw.header())
    await raw.send(raw.chunk(2))  # window 2: chunks 0 and 1


async def beyond_the_model(raw):
    await raw.send(raw.header())
    await raw.send(raw.chunk_number(3))


def after_header(*make):
    async def misdeed(raw):
        await raw.send(raw.header())
        for message in make:
            await raw.send(message(raw))

    return misdeed


def at_once(make):
    async def misdeed(raw):
        await raw.send(make(raw))

    return misdeed


def with_tag(message, **changes):
    for name, value in changes.items():
        setattr(message.tag, name, value)
    return message


MISDEEDS = {
    "beyond credit": (beyond_credit, "OUT_OF_RANGE", "raw sent chunk 2 of"),
    "beyond the model": (beyond_the_model, "OUT_OF_RANGE", "raw sent chunk 3 of"),
    "a chunk before its header": (at_once(lambda raw: raw.chunk(0)), "INVALID_ARGUMENT", "came before its header"),
    "chunks out of order": (
        after_header(lambda raw: raw.chunk(1)),  # the first word that is wrong must be the last: its link ends there
        "INVALID_ARGUMENT",
        "chunk 1 of [2,4) came; expected chunk 0",
    ),
    "a chunk twice": (
        after_header(lambda raw: raw.chunk(0), lambda raw: raw.chunk(0)),
        "INVALID_ARGUMENT",
        "chunk 0 of [2,4) came; expected chunk 1",
    ),
    "a block without samples": (
        at_once(lambda raw: raw.header(samples_count=-1)),
        "INVALID_ARGUMENT",
        "has -1 samples",
    ),
    "a loss that is no number": (
        at_once(lambda raw: raw.header(loss_sum=float("nan"))),
        "INVALID_ARGUMENT",
        "loss nan",
    ),
    "a chunk at another offset": (
        after_header(lambda raw: raw.chunk(0, offset_bytes=4096)),
        "INVALID_ARGUMENT",
        "at byte 4096, 4096 bytes",
    ),
    "a chunk too short": (
        after_header(lambda raw: raw.chunk(0, data=bytes(4092))),
        "INVALID_ARGUMENT",
        "at byte 0, 4092 bytes",
    ),
    "a chunk too long": (
        after_header(lambda raw: raw.chunk(0, data=bytes(4100))),
        "INVALID_ARGUMENT",
        "at byte 0, 4100 bytes",
    ),
    "a chunk without data": (
        after_header(lambda raw: raw.chunk(0, data=b"")),
        "INVALID_ARGUMENT",
        "at byte 0, 0 bytes",
    ),
    "a chunk below 0": (after_header(lambda raw: raw.chunk_number(-1)), "INVALID_ARGUMENT", "chunk -1 of"),
    "a wrong checksum": (
        after_header(lambda raw: raw.chunk(1, crc32c=1)),
        "DATA_LOSS",
        "does not fit its checksum",
    ),
    "a header of a block of another": (
        at_once(lambda raw: raw.header(wrong_block(raw))),
        "INVALID_ARGUMENT",
        "which it does not owe",
    ),
    "a chunk of a block of another": (
        at_once(lambda raw: raw.chunk(0, wrong_block(raw))),
        "INVALID_ARGUMENT",
        "which it does not owe",
    ),
    "a footer of a block of another": (
        at_once(lambda raw: raw.footer(wrong_block(raw))),
        "INVALID_ARGUMENT",
        "which it does not owe",
    ),
    "the merger of two blocks": (  # N3
        at_once(lambda raw: raw.header(Block(0, 4))),
        "INVALID_ARGUMENT",
        "block [0,4), which it does not owe",
    ),
    "a part of a block": (  # N3
        at_once(lambda raw: raw.header(Block(raw.block.lo, raw.block.lo + 1))),
        "INVALID_ARGUMENT",
        "which it does not owe",
    ),
    "other weights": (
        at_once(lambda raw: raw.header(weights_digest=bytes(16))),
        "INVALID_ARGUMENT",
        f"on weights {'00' * 16}, v0 is ",
    ),
    "a capacity that is no number": (
        at_once(lambda raw: raw.frame(capacity=pb.Capacity(capacity=float("nan")))),
        "INVALID_ARGUMENT",
        "capacity is nan",
    ),
    "a capacity without end": (
        at_once(lambda raw: raw.frame(capacity=pb.Capacity(capacity=float("inf")))),
        "INVALID_ARGUMENT",
        "capacity is inf",
    ),
    "another run": (
        at_once(lambda raw: with_tag(raw.header(), run_id="r-other")),
        "NOT_FOUND",
        "a message of run 'r-other'; this is run 'r-small'",
    ),
    "garbage": (at_once(lambda raw: b"\xff" * 40), "INVALID_ARGUMENT", "40 bytes that are no WorkRequest"),
    "a message over the limit": (
        at_once(lambda raw: bytes(MAX_MESSAGE_BYTES + 1)),
        "RESOURCE_EXHAUSTED",
        f"the limit is {MAX_MESSAGE_BYTES}",
    ),
}


@pytest.mark.parametrize("name", MISDEEDS)
def test_a_child_that_breaks_the_protocol_is_cut_off_and_the_step_ends_with_the_same_bits(small, run, name):
    misdeed, code, reason = MISDEEDS[name]

    async def main():
        async with child_in_a_step(small) as (stage, raw, step):
            await misdeed(raw)
            status, details = await raw.status()
            assert (status, reason in details) == (code, True), details
            assert reason in await stage.until_lost("raw")
            del stage.hub.counts.refused["stale"]  # of the good sphere, where it crossed the new attempt
            assert list(stage.refused.values()) == [1]
            await stage.finish(step)
            # What raw had sent of its block before was dropped with it.
            assert stage.contributors() == {"s-1"}

    run(main())


STALE = {
    "attempt": lambda message: setattr(message, "attempt", 7),
    "session": lambda message: setattr(message, "session", 9),
    "step": lambda message: setattr(message.tag, "step", 5),
    "term": lambda message: setattr(message.tag, "term", 0),
    "kind": lambda message: setattr(message.tag, "kind", common_pb2.WORK_KIND_EVALUATE),
}


@pytest.mark.parametrize("what", STALE)
def test_a_stale_frame_is_dropped_and_counted_and_the_link_lives(small, run, what):
    """I6: no frame of another attempt, session, step or term changes state, though its content would be wrong here."""

    async def main():
        async with child_in_a_step(small) as (stage, raw, step):
            for message in (raw.header(), raw.chunk(2, data=b"nothing of this is looked at")):
                STALE[what](message)
                await raw.send(message)
            await raw.deliver()
            await stage.finish(step)
            assert stage.refused == {"stale": 2}
            assert stage.contributors() == {"s-1", "raw"}
            assert set(stage.hub.children) == {"s-1", "raw"}

    run(main())


@pytest.mark.parametrize("how", ["breaks off", "ends in order"])
def test_a_child_that_goes_in_the_middle_of_its_block_is_replaced(small, run, monkeypatch, how):
    async def main():
        async with child_in_a_step(small) as (stage, raw, step):
            await raw.send(raw.header())
            await raw.send(raw.chunk(0))
            if how == "breaks off":
                monkeypatch.setattr(grpc_listener, "_GONE_SECONDS", 20.0)  # it is known in time, if not at once
                raw.call.cancel()
                assert await stage.until_lost("raw") == "its link broke off"
            else:
                await raw.call.done_writing()
                while await raw.call.read() is not grpc.aio.EOF:
                    pass
                assert (await raw.call.code()).name == "OK"
                assert await stage.until_lost("raw") == "it ended its link"
            assert stage.refused.keys() <= {"stale"}  # of the good sphere, where it crossed the new attempt
            await stage.finish(step)

    run(main())


# ---- heartbeats and the rest


def beat(**changes):
    values = {"run_id": "r-small", "sphere_id": "raw", "incarnation": 1, "session": 1, "sent_nanos": 17}
    return pb.HeartbeatRequest(**values | changes)


def reports(count):
    return [common_pb2.SphereReport(sphere_id=f"x-{number}") for number in range(count)]


BEATS = {
    "another run": (beat(run_id="r-other"), "NOT_FOUND", "a heartbeat of run 'r-other'; this is run 'r-small'"),
    "nobody's": (beat(sphere_id="who"), "ABORTED", "a heartbeat of who, session 1, which has no link here"),
    "an older session": (beat(session=0), "ABORTED", "a heartbeat of raw, session 0, which has no link here"),
    "an older life": (beat(incarnation=0), "ABORTED", "which has no link here"),
    "too many reports": (beat(reports=reports(33)), "INVALID_ARGUMENT", "raw sent 33 reports at once; the limit is 32"),
    "garbage": (b"\xff" * 40, "INVALID_ARGUMENT", "40 bytes that are no HeartbeatRequest"),
}


@pytest.mark.parametrize("name", BEATS)
def test_a_heartbeat_that_does_not_fit_is_refused_and_its_link_for_work_lives(small, run, name):
    message, code, reason = BEATS[name]

    async def main():
        async with control(small, spheres=0) as stage, Raw(small, stage.tree.address) as raw:
            await raw.join()
            async with Raw(small, stage.tree.address, "SphereService/Heartbeat") as beating:
                await beating.send(message)
                status, details = await beating.status()
                assert (status, reason in details) == (code, True), details
            assert not stage.tree.children.reports
            assert "raw" in stage.hub.children

    run(main())


def test_a_heartbeat_is_answered_and_the_newest_report_of_each_sphere_is_kept(small, run):
    async def main():
        async with control(small, spheres=0) as stage, Raw(small, stage.tree.address) as raw:
            await raw.join()
            async with Raw(small, stage.tree.address, "SphereService/Heartbeat") as beating:

                async def tell(*reports):
                    await beating.send(beat(reports=reports))
                    assert pb.HeartbeatResponse.FromString(await beating.call.read()).sent_nanos == 17

                def report(sphere, incarnation, activity):
                    return common_pb2.SphereReport(sphere_id=sphere, incarnation=incarnation, activity=activity)

                await tell(report("raw", 1, "old"), report("below", 4, "fresh"))
                await tell(report("raw", 1, "new"), report("below", 3, "of an older life"))
                told = {name: newest.activity for name, (_, newest) in stage.tree.children.reports.items()}
                assert told == {"raw": "new", "below": "fresh"}
                assert [r.sphere_id for r in stage.tree.children.oldest(1)] == ["raw"]
                assert [r.sphere_id for r in stage.tree.children.oldest(5)] == ["below"]

    run(main())


def test_only_so_many_spheres_are_remembered(small, run, monkeypatch):
    """Names are the peers' choice, memory is not."""

    async def main():
        async with control(small, spheres=0) as stage:
            for number in range(5):
                async with Raw(small, stage.tree.address) as raw:
                    name = f"raw-{number}"
                    await raw.join(sphere_id=name)
                    async with Raw(small, stage.tree.address, "SphereService/Heartbeat") as beating:
                        await beating.send(beat(sphere_id=name, reports=[common_pb2.SphereReport(sphere_id=name)]))
                        await beating.call.read()
            assert list(stage.tree.children.reports) == ["raw-2", "raw-3", "raw-4"]
            assert list(stage.tree.children._orders) == ["raw-2", "raw-3", "raw-4"]
            assert [report.sphere_id for report in stage.tree.children.oldest(9)] == ["raw-2", "raw-3", "raw-4"]

    monkeypatch.setattr(children, "_MOST_KNOWN", 3)
    run(main())


@pytest.mark.parametrize(
    ("request_", "code", "reason"),
    [
        (b"\xff" * 9, "INVALID_ARGUMENT", "DecodeError: 9 bytes that are no EnrollSphereRequest"),
        (
            control_pb2.EnrollSphereRequest(protocol_version=99).SerializeToString(),
            "FAILED_PRECONDITION",
            "VersionMismatchError: the sphere speaks protocol 99, control speaks 1; install the same release on both",
        ),
    ],
    ids=["garbage", "another protocol"],
)
def test_an_enrolment_that_does_not_fit_is_refused(small, run, request_, code, reason):
    async def main():
        async with control(small, spheres=0) as stage:
            async with grpc.aio.insecure_channel(stage.tree.address) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary("/spheres.v1.ControlService/EnrollSphere")(request_, timeout=5)
            assert (caught.value.code().name, caught.value.details()) == (code, reason)
            assert not stage.tree.spheres

    run(main())


def test_a_method_that_does_not_exist_is_unimplemented(small, run):
    async def main():
        async with control(small, spheres=0) as stage, Raw(small, stage.tree.address, "SphereService/Play") as raw:
            assert (await raw.status())[0] == "UNIMPLEMENTED"

    run(main())
