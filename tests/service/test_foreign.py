"""Foreign workers that do wrong, below a real control and below a real sphere: refused with a code and a reason that
their author can act on, while training ends with the bits that it has without them.

What they send is bytes over a plain gRPC channel, as from another language.
"""

import asyncio
import contextlib
import json
import re
import socket
import sys

import grpc
import numpy as np
import pytest

from control.config import RunConfig
from control.reference import CanonicalSum, reference
from control.starting import start_process
from control.testing import HOST, local_tree
from control.training import Training
from spheres import children, watchdog
from spheres.blocks import Block
from spheres.config import MAX_MESSAGE_BYTES, NodeConfig
from spheres.environment import environment_fingerprint
from spheres.grpc_link import GrpcTransport
from spheres.narrow import to_wire
from spheres.numerics import add_sums, crc32c
from spheres.task import load_task
from spheres.v1 import common_pb2, control_pb2
from spheres.v1 import work_pb2 as pb
from spheres.worker import Computer, limit_threads

DIGITS = load_task("digits")
PARENTS = ["control", "sphere"]
#: what control answers, test_refusals.py sees too
MOSTLY_SPHERE = [pytest.param("control", marks=pytest.mark.slow), "sphere"]
STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def threads():
    limit_threads()


@pytest.fixture(autouse=True)
def unhurried(request, monkeypatch):
    """Nobody is late, however long this machine lets a worker stand: an attempt more (N12) would be another test."""
    if "hurried" not in request.fixturenames:
        monkeypatch.setattr(watchdog, "_SHORTEST", 60.0)


@pytest.fixture
def hurried():
    """For a test of what is late."""


def config(**changes):
    values = {"task": "digits", "steps": STEPS, "batch_size": 50, "microbatches": 8, "chunk_bytes": 4096,
              "window_chunks": 2, "spheres": 1, "wire": "inline", "patience": "20s"}  # fmt: skip
    return RunConfig(**{**values, **changes})


_expected = {}


def expected(chosen):
    """The weights of the run without anybody else."""
    key = chosen.model_dump_json()
    if key not in _expected:
        _expected[key] = reference(DIGITS, chosen).weights_sha256
    return _expected[key]


class Foreign:
    """A worker that knows how it is done. Tests have it do otherwise."""

    def __init__(self, control, *, host=HOST):
        self.control, self.host, self.channels, self.beating = control, host, [], None
        self.chunks, self.tag, self.blocks, self.session = {}, None, [], 0
        self.evaluates = True

    def _channel(self, address):
        channel = grpc.aio.insecure_channel(address, options=[("grpc.max_send_message_length", -1)])
        self.channels.append(channel)
        return channel

    async def enroll(self):
        request = control_pb2.EnrollSphereRequest(protocol_version=1, request_id="a-1", host=self.host, agent="raw")
        call = self._channel(self.control).unary_unary("/spheres.v1.ControlService/EnrollSphere")
        self.place = control_pb2.EnrollSphereResponse.FromString(await call(request.SerializeToString(), timeout=10))
        self.config = NodeConfig.from_proto(self.place.configuration)
        self.parent, self.address = self.place.path_ids[-1], self.place.path_addresses[-1]

    def stream(self, method):
        return self._channel(self.address).stream_stream(f"/spheres.v1.SphereService/{method}")()

    def hello(self, *, run_id=None, **changes):
        self.session += 1
        values = {
            "protocol_version": 1,
            "sphere_id": self.place.sphere_id,
            "incarnation": self.place.incarnation,
            "parent_id": self.parent,
            "task_fingerprint": self.config.task_fingerprint,
            "data_fingerprint": self.config.data_fingerprint,
            "environment_fingerprint": "of another language",
            "capacity": 1.0,
            "member": common_pb2.Member(host=self.host),
        }
        tag = pb.Tag(run_id=self.config.run_id if run_id is None else run_id)
        return pb.WorkRequest(tag=tag, session=self.session, hello=pb.Hello(**values | changes))

    async def join(self, *, beats=True, **changes):
        self.call = self.stream("Work")
        await self.send(self.hello(**changes))
        assert (await self.receive()).HasField("welcome")
        if beats:
            self.beating = asyncio.create_task(self._beat())

    def beat(self, **changes):
        report = common_pb2.SphereReport(sphere_id=self.place.sphere_id, incarnation=self.place.incarnation)
        values = {"run_id": self.config.run_id, "sphere_id": self.place.sphere_id, "session": self.session,
                  "incarnation": self.place.incarnation, "reports": [report]}  # fmt: skip
        return pb.HeartbeatRequest(**values | changes)

    async def _beat(self):
        call = self.stream("Heartbeat")
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await call.write(self.beat().SerializeToString())
                if await call.read() is grpc.aio.EOF:
                    return
                await asyncio.sleep(self.config.heartbeat_seconds)

    async def send(self, *messages):
        for message in messages:
            await self.call.write(message if isinstance(message, bytes) else message.SerializeToString())

    async def receive(self):
        while (data := await self.call.read()) is not grpc.aio.EOF:
            message = pb.WorkResponse.FromString(data)
            if message.directive.kind != pb.DIRECTIVE_KIND_REPORT_STATE:
                return message
            report = common_pb2.SphereReport(sphere_id=self.place.sphere_id, incarnation=self.place.incarnation)
            state = pb.StateReport(request_id=message.directive.request_id, report=report)
            await self.send(pb.WorkRequest(tag=message.tag, session=self.session, state_report=state))
        return None

    async def status(self):
        """Read to the end: name of the code, and the details."""
        try:
            while await self.call.read() is not grpc.aio.EOF:
                pass
        except grpc.aio.AioRpcError as error:
            return error.code().name, error.details()
        return (await self.call.code()).name, ""

    async def assigned(self):
        """Take messages until a training step's blocks and its weights are here. False where the run is over."""
        self.blocks, done = [], False
        while not (self.blocks and done):
            message = await self.receive()
            if message is None or message.directive.kind == pb.DIRECTIVE_KIND_STOP:
                return False
            if message.HasField("weights_header"):
                self.tag, self.attempt, self.through = message.tag, 0, -1
                done = bool(message.weights_header.held_digest)
            if message.HasField("begin"):
                owed = [pb.Block(lo=block.lo, hi=block.hi) for block in self.blocks]
                self.attempt, self.blocks = message.begin.attempt, []
                await self.send(self.frame(ready=pb.Ready(idle=not owed, computing=owed)))
            if message.HasField("assign"):
                self.blocks = [Block(block.lo, block.hi) for block in message.assign.blocks]
                self.from_chunk = message.assign.from_chunk
                self.through = self.from_chunk + self.config.window - 1
            if message.HasField("weights_chunk"):
                self.chunks[message.weights_chunk.index] = message.weights_chunk.data
            if message.HasField("weights_footer"):
                self.digest, done = message.weights_footer.digest, True
            self.through = max(self.through, message.credit.through_chunk)
            if self.blocks and done and self.tag.kind == common_pb2.WORK_KIND_EVALUATE and self.evaluates:
                await self.evaluate()
                self.blocks = []
        self.canonical = CanonicalSum(self.config, DIGITS, self.views())
        self.block = self.blocks[0]
        return True

    async def evaluate(self):
        computer = Computer(self.config, DIGITS)
        for block in self.blocks:
            sums = None
            for index in range(*block):
                part = computer.evaluate(self.views(), index)
                sums = part if sums is None else add_sums(sums, part)
            metrics = [common_pb2.MetricSum(name=name, value=value) for name, value in sorted(sums.metrics.items())]
            place = pb.Block(lo=block.lo, hi=block.hi)
            header = pb.GradientHeader(
                block=place, weights_digest=self.digest, samples_count=sums.count, loss_sum=sums.loss, metrics=metrics
            )
            message = self.frame(gradient_header=header, gradient_chunk=pb.Chunk(block=place))
            message.MergeFrom(self.footer(block))
            await self.send(message)

    def views(self):
        flat = np.frombuffer(b"".join(self.chunks[index] for index in sorted(self.chunks)), np.float32)
        return self.config.manifest.views(flat, writeable=False)

    def gradient(self, block):
        held = self.canonical(self.tag.step, block)
        return held.array, held.sums

    def frame(self, **fields):
        place = {"tag": self.tag, "session": self.session, "attempt": self.attempt}
        return pb.WorkRequest(**place | fields)

    def header(self, block=None, *, tag=None, **changes):
        block = block or self.block
        _, sums = self.gradient(self.block)
        metrics = [common_pb2.MetricSum(name=name, value=value) for name, value in sorted(sums.metrics.items())]
        values = {"block": pb.Block(lo=block.lo, hi=block.hi), "weights_digest": self.digest,
                  "samples_count": sums.count, "loss_sum": sums.loss, "metrics": metrics}  # fmt: skip
        return self.frame(gradient_header=pb.GradientHeader(**values | changes), tag=tag or self.tag)

    def chunk(self, index, block=None, **changes):
        block = block or self.block
        size = self.config.chunk_elements
        array, _ = self.gradient(self.block)
        data = bytes(to_wire(array[index * size : (index + 1) * size], self.config.gradient_dtype))
        data = changes.pop("data", data)
        values = {"block": pb.Block(lo=block.lo, hi=block.hi), "index": index, "offset_bytes": 4 * index * size,
                  "crc32c": crc32c(data), "data": data}  # fmt: skip
        return self.frame(gradient_chunk=pb.Chunk(**values | changes))

    def footer(self, block):
        part = pb.Block(lo=block.lo, hi=block.hi)
        contribution = pb.Contribution(block=part, sphere_id=self.place.sphere_id)
        return self.frame(gradient_footer=pb.GradientFooter(block=part, contributions=[contribution]))

    async def deliver(self):
        """Send what is owed, as credit comes."""
        for index in range(self.from_chunk, self.config.chunk_count):
            while index > self.through:
                message = await self.receive()
                assert message is not None
                assert message.HasField("credit"), message
                self.through = message.credit.through_chunk
            for block in self.blocks:
                self.block = block
                message = self.chunk(index)
                if index == self.from_chunk:
                    message.MergeFrom(self.header())
                if index == self.config.chunk_count - 1:
                    message.MergeFrom(self.footer(self.block))
                await self.send(message)

    async def behave(self):
        """Work to the end of the run; return the steps that it took part in."""
        steps = []
        while await self.assigned():
            steps.append(self.tag.step)
            await self.deliver()
        return steps

    async def aclose(self):
        if self.beating is not None:
            self.beating.cancel()
            await asyncio.gather(self.beating, return_exceptions=True)
        for channel in self.channels:
            await channel.close()


class Stage:
    """A run with one sphere, and a foreign worker below control or below that sphere."""

    def __init__(self, local, foreign, chosen):
        self.local, self.foreign, self.chosen = local, foreign, chosen
        self.running = None

    @property
    def refused(self):
        """What the foreign worker's parent has counted, without what good spheres' frames crossed."""
        hub = self.local.tree.hub if self.foreign.parent == "control" else self.local.spheres["s-1"].hub
        return hub.counts.refused

    def start(self):
        self.running = asyncio.create_task(self.local.run())

    async def ends_undisturbed(self):
        assert await self.running == expected(self.chosen)
        self.local.tree.stop_spheres("the run is over")


@contextlib.asynccontextmanager
async def stage(tmp_path, parent, **changes):
    chosen = config(**changes, fan_out=1 if parent == "sphere" else 4)
    async with local_tree(chosen, DIGITS, lambda _: GrpcTransport(), directory=tmp_path) as local:
        await local.tree.wait_for(1)
        foreign = Foreign(local.tree.address)
        await foreign.enroll()
        assert foreign.parent == ("s-1" if parent == "sphere" else "control")
        made = Stage(local, foreign, chosen)
        try:
            yield made
        finally:
            if made.running is not None:
                made.running.cancel()
                await asyncio.gather(made.running, return_exceptions=True)
            await foreign.aclose()


@pytest.mark.parametrize("changes", [{}, {"wire_dtype": "bfloat16"}], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("parent", PARENTS)
def test_a_foreign_worker_that_does_right_takes_part_to_the_end(run, tmp_path, parent, changes):
    """What the others deviate from."""

    async def main():
        async with stage(tmp_path, parent, **changes) as made:
            await made.foreign.join()
            working = asyncio.create_task(made.foreign.behave())
            made.start()
            await made.ends_undisturbed()
            assert await working == list(range(STEPS))
            assert not made.refused

    run(main())


@pytest.mark.processes
@pytest.mark.timeout(200)  # five commands, one after the other
def test_what_a_foreign_worker_is_written_in_is_shown(run, tmp_path):
    """It hangs below a sphere, so control hears of its language and environment hop by hop."""

    async def shown(*flags):
        command = [sys.executable, "-m", "control", "spheres", "--run-dir", str(tmp_path / "run"), *flags]
        process = await start_process(*command, stdout=asyncio.subprocess.PIPE)
        out, _ = await process.communicate()
        assert process.returncode == 0
        return out.decode()

    async def both():
        tree, listed = await asyncio.gather(shown(), shown("--json"))
        of_each = [(sphere["agent"], sphere["environment_fingerprint"]) for sphere in json.loads(listed)]
        return of_each, [re.sub(r"^\W+", "", line).split("  ") for line in tree.splitlines()[1:]]

    async def to_the_end(foreign):
        await foreign.behave()
        await foreign.aclose()

    async def main():
        here = (f"python {sys.version_info.major}.{sys.version_info.minor}", environment_fingerprint())
        async with Training(config(run_dir=tmp_path / "run", fan_out=1)) as training:
            await training.controller.tree.wait_for(1)
            foreign = Foreign(training.controller.tree.address, host=socket.gethostname())
            await foreign.enroll()
            assert foreign.parent == "s-1"
            of_each, lines = await both()
            assert of_each == [here, ("raw", "")]
            assert lines[1][:3] == ["s-2 joining", f"on {foreign.host}:0", "raw"]
            await foreign.join(member=common_pb2.Member(host=foreign.host, agent="raw 2"))
            ending = asyncio.create_task(to_the_end(foreign))
            await training.controller.tree.wait_for(2)
            of_each, lines = await both()
            assert of_each == [here, ("raw 2", "of another language")]
            # its reports, whether one has come by now or not, do not say where it is
            assert lines[1][:3] == ["s-2 active", f"on {foreign.host}:0", "raw 2"]
            assert not any(text.startswith("python") for text in lines[0])  # as most are
        await ending

    run(main(), timeout=180)


# ---- a hello that does not fit

HELLOS = {
    "another protocol": ({"protocol_version": 2}, "FAILED_PRECONDITION", ["speaks protocol 2", "speaks 1", "install"]),
    "another run": ({"run_id": "r-old"}, "NOT_FOUND", ["'r-old'", "'r-test'"]),
    "no run": ({"run_id": ""}, "NOT_FOUND", ["''", "'r-test'"]),
    "another task": ({"task_fingerprint": "beef"}, "FAILED_PRECONDITION", ["other task", "beef", "the same code"]),
    "other data": ({"data_fingerprint": "beef"}, "FAILED_PRECONDITION", ["other data", "beef", "the same data set"]),
    "no name": ({"sphere_id": ""}, "INVALID_ARGUMENT", ["0 characters of name"]),
    "another parent": ({"parent_id": "s-77"}, "FAILED_PRECONDITION", ["looks for s-77; this is "]),
    "no capacity that is a number": ({"capacity": float("nan")}, "INVALID_ARGUMENT", ["capacity is nan"]),
    "chunks held below 0": (
        {"weights_chunks_held": -3}, "INVALID_ARGUMENT", ["weights_chunks_held -3", "0 to 5"],
    ),
    "more chunks held than there are": (
        {"weights_chunks_held": 99}, "INVALID_ARGUMENT", ["weights_chunks_held 99", "0 to 5"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HELLOS)
@pytest.mark.parametrize("parent", MOSTLY_SPHERE)
def test_a_hello_that_does_not_fit_is_refused(run, tmp_path, parent, name):
    changes, code, reasons = HELLOS[name]

    async def main():
        async with stage(tmp_path, parent, steps=2) as made:
            foreign = made.foreign
            foreign.call = foreign.stream("Work")
            await foreign.send(foreign.hello(**changes))
            status, details = await foreign.status()
            assert status == code, details
            assert all(reason in details for reason in reasons), details
            made.start()
            await made.ends_undisturbed()

    run(main())


# ---- frames that do not fit


def sending(*make):
    async def misdeed(foreign):
        for message in make:
            await foreign.send(message(foreign))

    return misdeed


def bfloat16_data(foreign):
    return foreign.chunk(0, data=bytes(to_wire(foreign.gradient(foreign.block)[0][:1024], "bfloat16")))


def float32_data(foreign):
    array = foreign.gradient(foreign.block)[0]
    return foreign.chunk(0, data=bytes(to_wire(array[: foreign.config.chunk_elements], "float32")))


def header(foreign):
    return foreign.header()


def header_of(lo, hi):
    return lambda foreign: foreign.header(Block(lo, hi))


MISDEEDS = {
    "a wrong type: bfloat16 where the run has float32": (
        sending(header, bfloat16_data), "INVALID_ARGUMENT", ["chunk 0 of", "2048 bytes", "4096 bytes (float32)"],
    ),
    "a chunk too short": (
        sending(header, lambda f: f.chunk(0, data=bytes(4092))),
        "INVALID_ARGUMENT", ["chunk 0 of", "4092 bytes", "expected byte 0, 4096 bytes"],
    ),
    "a chunk too long": (
        sending(header, lambda f: f.chunk(0, data=bytes(4100))),
        "INVALID_ARGUMENT", ["4100 bytes", "expected byte 0, 4096 bytes"],
    ),
    "a chunk at another offset": (
        sending(header, lambda f: f.chunk(1, offset_bytes=1024)),
        "INVALID_ARGUMENT", ["chunk 1 of", "at byte 1024", "expected byte 4096"],
    ),
    "a wrong checksum": (
        sending(header, lambda f: f.chunk(0, crc32c=7)),
        "DATA_LOSS", ["chunk 0 of", "does not fit its checksum", "00000007", "CRC-32C"],
    ),
    "a microbatch that is not of the step": (
        sending(header_of(100, 101)), "INVALID_ARGUMENT", ["[100,101)", "does not owe", "it owes ["],
    ),
    "a block that another owes": (
        sending(header_of(0, 8)), "INVALID_ARGUMENT", ["[0,8)", "does not owe", "it owes ["],
    ),
    "a block below 0": (sending(header_of(-4, 0)), "INVALID_ARGUMENT", ["[-4,0)", "does not owe"]),
    "a block that ends before it begins": (
        sending(header_of(7, 3)), "INVALID_ARGUMENT", ["[7,3)", "does not owe"],
    ),
    "the digest of other weights": (
        sending(lambda f: f.header(weights_digest=b"\1" * 16)), "INVALID_ARGUMENT", ["01" * 16, "v0 is"],
    ),
    "a count of samples that is too large": (
        sending(lambda f: f.header(samples_count=1000)), "INVALID_ARGUMENT", ["1000 samples", "expected 2"],
    ),
    "a count of samples that is too small": (
        sending(lambda f: f.header(samples_count=1)), "INVALID_ARGUMENT", ["1 samples", "expected 2"],
    ),
    "a count of samples below 0": (
        sending(lambda f: f.header(samples_count=-25)), "INVALID_ARGUMENT", ["-25 samples", "expected 2"],
    ),
    "samples that are said to be absent": (
        sending(lambda f: f.header(absent=True)), "INVALID_ARGUMENT", ["absent", "expected 2"],
    ),
    "a loss that is no number": (
        sending(lambda f: f.header(loss_sum=float("nan"))), "INVALID_ARGUMENT", ["loss nan"],
    ),
    "a metric that is no number": (
        sending(lambda f: f.header(metrics=[common_pb2.MetricSum(name="accuracy", value=float("nan"))])),
        "INVALID_ARGUMENT", ["accuracy", "nan"],
    ),
    "microbatches left out where the run leaves none out": (
        sending(lambda f: f.header(skipped=[pb.NonFinite(microbatch=f.block.lo)])),
        "INVALID_ARGUMENT", ["left out"],
    ),
    "a chunk before its header": (
        sending(lambda f: f.chunk(0)), "INVALID_ARGUMENT", ["chunk 0 of", "before its header"],
    ),
    "beyond credit": (
        sending(header, lambda f: f.chunk(2)), "OUT_OF_RANGE", ["chunk 2 of", "beyond its credit 1"],
    ),
    "another run": (
        sending(lambda f: f.header(tag=pb.Tag(run_id="r-old"))), "NOT_FOUND", ["'r-old'", "'r-test'"],
    ),
    "garbage": (sending(lambda f: b"\xff\xfe" * 50), "INVALID_ARGUMENT", ["100 bytes that are no WorkRequest"]),
    "an empty message": (sending(lambda f: b""), "NOT_FOUND", ["run ''", "every message has a tag"]),
    "a message over the limit": (
        sending(lambda f: bytes(MAX_MESSAGE_BYTES + 1)),
        "RESOURCE_EXHAUSTED", [f"{MAX_MESSAGE_BYTES + 1} bytes", f"limit is {MAX_MESSAGE_BYTES}"],
    ),
    "a message far over the limit": (sending(lambda f: bytes(4 << 20)), "RESOURCE_EXHAUSTED", ["larger than max"]),
    "a capacity that is no number": (
        sending(lambda f: f.frame(capacity=pb.Capacity(capacity=float("nan")))),
        "INVALID_ARGUMENT", ["capacity is nan"],
    ),
    "a capacity without end": (
        sending(lambda f: f.frame(capacity=pb.Capacity(capacity=1e300))), "INVALID_ARGUMENT", ["capacity is 1e+300"],
    ),
    "blocks held that are none": (
        sending(lambda f: f.frame(ready=pb.Ready(held=[pb.Block(lo=1, hi=3)]))),
        "INVALID_ARGUMENT", ["[1,3) is no canonical block of 8 microbatches"],
    ),
}  # fmt: skip


async def is_refused(made, misdeed, code, reasons):
    foreign = made.foreign
    await foreign.join()
    made.start()
    assert await foreign.assigned()
    await misdeed(foreign)
    status, details = await foreign.status()
    assert status == code, details
    assert all(reason in details for reason in reasons), details
    await made.ends_undisturbed()


@pytest.mark.parametrize("name", MISDEEDS)
@pytest.mark.parametrize("parent", MOSTLY_SPHERE)
def test_a_frame_that_does_not_fit_ends_its_link_and_the_run_goes_on(run, tmp_path, parent, name):
    async def main():
        async with stage(tmp_path, parent) as made:
            await is_refused(made, *MISDEEDS[name])

    run(main())


@pytest.mark.parametrize("parent", PARENTS)
def test_float32_where_the_run_has_bfloat16_is_refused(run, tmp_path, parent):
    async def main():
        async with stage(tmp_path, parent, wire_dtype="bfloat16") as made:
            reasons = ["chunk 0 of", "4096 bytes", "2048 bytes (bfloat16)"]
            await is_refused(made, sending(header, float32_data), "INVALID_ARGUMENT", reasons)

    run(main())


# ---- what is late is no fault

STALE = {
    "an older step": lambda m: setattr(m.tag, "step", m.tag.step - 1),
    "a later step": lambda m: setattr(m.tag, "step", m.tag.step + 1),
    "an older term": lambda m: setattr(m.tag, "term", 0),
    "another attempt": lambda m: setattr(m, "attempt", 9),
    "another session": lambda m: setattr(m, "session", 0),
}


@pytest.mark.parametrize("name", STALE)
@pytest.mark.parametrize("parent", MOSTLY_SPHERE)
def test_what_is_late_is_dropped_and_counted_and_the_link_lives(run, tmp_path, parent, name):
    async def main():
        async with stage(tmp_path, parent) as made:
            foreign = made.foreign
            await foreign.join()
            made.start()
            assert await foreign.assigned()
            for message in (foreign.header(samples_count=3), foreign.chunk(0, data=b"of no matter")):
                STALE[name](message)
                await foreign.send(message)
            await foreign.deliver()
            working = asyncio.create_task(foreign.behave())
            await made.ends_undisturbed()
            assert await working == list(range(1, STEPS))
            assert made.refused == {"stale": 2}

    run(main())


# ---- nothing at all


async def says_nothing(made):
    made.foreign.call = made.foreign.stream("Work")
    await made.foreign.call.wait_for_connection()
    return "INVALID_ARGUMENT", "no hello came in 0.3 s"


async def says_an_empty_hello(made):
    made.foreign.call = made.foreign.stream("Work")
    await made.foreign.send(b"")
    return "INVALID_ARGUMENT", "must be a hello"


async def gives_no_sign_of_life(made):
    await made.foreign.join(beats=False)
    return "UNAVAILABLE", "gave no sign of life for"


@pytest.mark.parametrize("silent", [says_nothing, says_an_empty_hello, gives_no_sign_of_life])
@pytest.mark.parametrize("parent", PARENTS)
def test_one_that_is_silent_is_given_up(run, tmp_path, parent, silent, monkeypatch):
    async def given_up(patience):
        folder = tmp_path / patience
        folder.mkdir()
        async with stage(folder, parent, patience=patience) as made:
            with monkeypatch.context() as patch:
                if silent is says_nothing:
                    patch.setattr(children, "HELLO_SECONDS", 0.3)
                code, reason = await silent(made)
                made.start()
                status, details = await made.foreign.status()
            await made.ends_undisturbed()
            return status == code and reason in details, details

    for patience in ("1s", "4s", "10s"):
        right, details = run(given_up(patience))
        if "this node was stopped for" not in details:  # by a busy machine, for longer than patience: another end (N10)
            break
    assert right, details


@pytest.mark.slow
@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("answers", [True, False], ids=["answers begin", "answers nothing"])
@pytest.mark.parametrize("parent", PARENTS)
def test_one_that_lives_and_never_sends_a_gradient_holds_nothing_up(run, tmp_path, parent, answers):
    """Its heartbeats come. What it owes is computed elsewhere (N12); where it does not even answer, its link ends."""

    async def main():
        async with stage(tmp_path, parent, patience="1s", steps=3) as made:
            foreign = made.foreign
            await foreign.join()

            foreign.evaluates = False

            async def idle():
                while await foreign.assigned():
                    pass

            reading = asyncio.create_task(idle() if answers else foreign.status())
            made.start()
            await made.ends_undisturbed()
            ended = await reading
            if not answers:
                assert ended[0] == "UNAVAILABLE"
                assert "did not answer begin" in ended[1]

    run(main(), timeout=55)


@pytest.mark.parametrize("parent", PARENTS)
def test_a_flood_of_heartbeats_and_reports_disturbs_nobody(run, tmp_path, parent):
    async def main():
        async with stage(tmp_path, parent) as made:
            foreign = made.foreign
            await foreign.join()
            flood = foreign.stream("Heartbeat")
            made.start()

            async def pour():
                for number in range(200):
                    names = [f"x-{number}-{index}" for index in range(32)]
                    reports = [common_pb2.SphereReport(sphere_id=name, activity="y" * 200) for name in names]
                    await flood.write(foreign.beat(reports=reports).SerializeToString())
                    await flood.read()

            pouring = asyncio.create_task(pour())
            working = asyncio.create_task(foreign.behave())
            await made.ends_undisturbed()
            assert await working == list(range(STEPS))
            pouring.cancel()
            await asyncio.gather(pouring, return_exceptions=True)

    run(main())


# ---- what is passed on to control

#: what fills a message to a few bytes below the limit; a sphere above has a tag and a session of its own to add
FILLED = {
    "the words of a failure": lambda most: {"task_failure": pb.TaskFailure(error="é" * (most // 2))},
    "the traceback of a failure": lambda most: {"task_failure": pb.TaskFailure(error="no", traceback="x" * most)},
    "the samples of a failure": lambda most: {"task_failure": pb.TaskFailure(error="no", sample_ids=[1] * most)},
}


@pytest.mark.parametrize("name", FILLED)
def test_news_of_a_failure_is_made_to_fit_where_it_is_passed_on(run, tmp_path, name):
    """The sphere above lives on, and control hears of it, once."""

    async def main():
        async with stage(tmp_path, "sphere") as made:
            foreign = made.foreign
            await foreign.join()
            heard = []
            failed = made.local.tree.hub.hooks.failed
            made.local.tree.hub.hooks.failed = lambda failure: heard.append(failure) or failed(failure)
            made.start()
            assert await foreign.assigned()
            message = pb.WorkRequest(**FILLED[name](MAX_MESSAGE_BYTES - 22))
            message.task_failure.sphere_id, message.task_failure.step = foreign.place.sphere_id, foreign.tag.step
            message.task_failure.failures_count = 1
            assert MAX_MESSAGE_BYTES - 10 < message.ByteSize() <= MAX_MESSAGE_BYTES
            await foreign.send(message)
            await foreign.deliver()
            working = asyncio.create_task(foreign.behave())
            await made.ends_undisturbed()
            await working
            (failure,) = heard
            assert failure.sphere_id == foreign.place.sphere_id
            assert failure.ByteSize() < 100_000

    run(main())


LONG = "x" * (MAX_MESSAGE_BYTES - 300)
LARGE = {
    "state": lambda: {"state_report": pb.StateReport(task_state=LONG.encode() + b"y" * 292)},
    "log": lambda: {"log_report": pb.LogReport(lines=[LONG + "y" * 289])},
    "change": lambda: {"sphere_change": pb.SphereChange(sphere_id="s-9", lost=True, reason=LONG + "y" * 281)},
}


@pytest.mark.parametrize("name", LARGE)
def test_news_that_is_too_large_to_be_passed_on_ends_the_link_of_who_sent_it(run, tmp_path, name):
    async def main():
        async with stage(tmp_path, "sphere") as made:
            foreign, above = made.foreign, made.local.spheres["s-1"]
            await foreign.join()
            message = pb.WorkRequest(**LARGE[name]())
            assert MAX_MESSAGE_BYTES - 10 < message.ByteSize() <= MAX_MESSAGE_BYTES
            await foreign.send(message)
            code, details = await foreign.status()
            assert (code, "to pass on to control; the limit is" in details) == ("RESOURCE_EXHAUSTED", True)
            made.start()
            await made.ends_undisturbed()
            assert above.parent._session == 1

    run(main())
