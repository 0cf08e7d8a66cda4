"""``Client`` against a control that answers as a script says, over real gRPC."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, Self

import grpc
import numpy as np
import pytest
from grpc import aio

from control import client as client_module
from control.client import Client, state_name
from control.lives import Started
from control.servicers import ControlServicer
from spheres import grpc_listener
from spheres.config import manifest_to_proto
from spheres.errors import (
    ArmillaryError,
    CheckpointError,
    ChecksumError,
    LinkClosedError,
    RefusedError,
    RunStateError,
    UnreachableError,
)
from spheres.numerics import crc32c
from spheres.tensors import Manifest
from spheres.v1 import control_pb2 as pb
from spheres.v1.control_pb2_grpc import ControlServiceServicer, add_ControlServiceServicer_to_server

RUNNING = pb.Run(run_id="r", state=pb.RUN_STATE_RUNNING, step=7)


class Control(ControlServiceServicer):
    """Answers GetRun; a test gives it what else it needs, and finds the requests it got."""

    def __init__(self, **answers: Callable[..., Any]) -> None:
        self.requests: list[Any] = []
        for name, answer in answers.items():
            setattr(self, name, answer)

    async def GetRun(self, request: pb.GetRunRequest, context: Any) -> pb.GetRunResponse:
        return pb.GetRunResponse(run=RUNNING)


@asynccontextmanager
async def serving(control: ControlServiceServicer, *, deadline: float = 5.0) -> AsyncIterator[Client]:
    server = aio.server(options=grpc_listener._SERVER)  # as control's own
    add_ControlServiceServicer_to_server(control, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with Client(f"127.0.0.1:{port}", deadline=deadline) as client:
            yield client
    finally:
        # what the client cut off ends in gRPC's own thread; when one more call is through, its news have come to this
        # loop, and not to that of the next test
        async with Client(f"127.0.0.1:{port}") as last:
            await last.status()
        await server.stop(None)


def aborts(code: grpc.StatusCode, details: str = "") -> Callable[..., Any]:
    async def answer(request: Any, context: Any) -> Any:
        await context.abort(code, details)

    return answer


# --- calls ------------------------------------------------------------------------------------------------------------


def test_what_control_answers(run: Any) -> None:
    async def stop(request: pb.StopRunRequest, context: Any) -> pb.StopRunResponse:
        control.requests.append(request)
        return pb.StopRunResponse(run=pb.Run(state=pb.RUN_STATE_STOPPED))

    async def save(request: pb.CreateCheckpointRequest, context: Any) -> pb.CreateCheckpointResponse:
        control.requests.append(request)
        return pb.CreateCheckpointResponse(checkpoint=pb.Checkpoint(name="step-000000001"))

    control = Control(StopRun=stop, CreateCheckpoint=save)

    async def calls() -> None:
        async with serving(control) as client:
            assert repr(client) == f"<Client {client.address}>"
            assert (await client.status()).step == 7
            assert state_name(await client.status()) == "running"
            assert state_name(await client.stop("enough")) == "stopped"
            for _ in range(2):
                assert (await client.checkpoint()).name == "step-000000001"
            await client.checkpoint("mine")

    run(calls())
    assert control.requests[0].reason == "enough"
    ids = [request.request_id for request in control.requests[1:]]
    assert len(set(ids)) == 3  # a repeated call is another wish, unless it says that it is the same
    assert all(ids[:2])
    assert ids[2] == "mine"


def test_words_that_are_no_utf_8_are_sent_as_well_as_can_be(run: Any) -> None:
    """A terminal gives what it was given: bytes that are no text come as lone surrogates."""

    async def drain(request: pb.DrainSphereRequest, context: Any) -> pb.DrainSphereResponse:
        control.requests.append((request.sphere_id, request.reason))
        return pb.DrainSphereResponse()

    async def call() -> None:
        async with serving(control) as client:
            await client.drain("s-\udcff", "caf\udce9")

    control = Control(DrainSphere=drain)
    run(call())
    assert control.requests == [("s-\\udcff", "caf\\udce9")]


@pytest.mark.parametrize(
    ("code", "details", "error", "exit_code"),
    [
        (grpc.StatusCode.FAILED_PRECONDITION, "RunStateError: the run is completed", RunStateError, 6),
        (grpc.StatusCode.FAILED_PRECONDITION, "no", RefusedError, 5),
        (grpc.StatusCode.DATA_LOSS, "CheckpointError: no checkpoint 'x'", CheckpointError, 4),
        (grpc.StatusCode.UNAVAILABLE, "control is starting", UnreachableError, 5),
        (grpc.StatusCode.UNIMPLEMENTED, "", UnreachableError, 5),
        (grpc.StatusCode.INTERNAL, "boom", ArmillaryError, 1),
    ],
)
def test_errors_are_those_that_control_meant(
    run: Any, code: grpc.StatusCode, details: str, error: type[ArmillaryError], exit_code: int
) -> None:
    async def call() -> None:
        async with serving(Control(PauseRun=aborts(code, details))) as client:
            with pytest.raises(error) as caught:
                await client.pause()
            assert caught.value.exit_code == exit_code
            assert details.partition(": ")[2] in str(caught.value)

    run(call())


def test_nobody_answers(run: Any) -> None:
    async def call() -> None:
        async with Client("127.0.0.1:1") as client:
            for question in (client.status, client.spheres, client.checkpoints, client.weights):
                with pytest.raises(
                    UnreachableError, match=r"^control at 127\.0\.0\.1:1 does not answer; is it running"
                ):
                    await question()
            with pytest.raises(UnreachableError):
                # at once, whatever has been seen before
                await anext(client.watch(after_event_id=5))

    run(call(), timeout=5.0)


def test_a_control_that_does_not_answer_in_time(run: Any) -> None:
    async def hangs(request: Any, context: Any) -> Any:
        await asyncio.get_running_loop().create_future()

    async def call() -> None:
        async with serving(Control(ResumeRun=hangs), deadline=0.2) as client:
            with pytest.raises(UnreachableError, match="does not answer"):
                await client.resume()

    run(call())


def test_pages_are_put_together(run: Any) -> None:
    names = [f"s-{n}" for n in range(1, 6)]

    async def spheres(request: pb.ListSpheresRequest, context: Any) -> pb.ListSpheresResponse:
        start = int(request.page_token or 0)
        more = str(start + 2) if start + 2 < len(names) else ""
        found = [pb.Sphere(sphere_id=name) for name in names[start : start + 2]]
        return pb.ListSpheresResponse(spheres=found, next_page_token=more)

    async def checkpoints(request: pb.ListCheckpointsRequest, context: Any) -> pb.ListCheckpointsResponse:
        token = request.page_token
        return pb.ListCheckpointsResponse(
            checkpoints=[pb.Checkpoint(name=token or "first")], next_page_token="" if token else "second"
        )

    async def calls() -> None:
        async with serving(Control(ListSpheres=spheres, ListCheckpoints=checkpoints)) as client:
            assert [sphere.sphere_id for sphere in await client.spheres()] == names
            assert [checkpoint.name for checkpoint in await client.checkpoints()] == ["first", "second"]

    run(calls())


# --- watching ---------------------------------------------------------------------------------------------------------


def event(number: int, name: str = "step", **record: Any) -> pb.WatchRunResponse:
    return pb.WatchRunResponse(event_id=number, event=name, record_json=json.dumps({"event": name, **record}))


def watching(*streams: list[pb.WatchRunResponse | grpc.StatusCode]) -> Control:
    """A control whose n-th watch sends the n-th of these; a code ends it so, else it ends well."""

    async def watch(request: pb.WatchRunRequest, context: Any) -> AsyncIterator[pb.WatchRunResponse]:
        control.requests.append(request.after_event_id)
        for item in streams[min(len(control.requests), len(streams)) - 1]:
            if isinstance(item, grpc.StatusCode):
                await context.abort(item, "cut")
            yield item

    control = Control(WatchRun=watch)
    return control


async def seen(control: ControlServiceServicer, after: int = 0, **options: Any) -> list[int]:
    async with serving(control) as client:
        return [event.id async for event in client.watch(after, **options)]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "WATCH_RETRY", 0.0)


CUT = grpc.StatusCode.UNAVAILABLE


@pytest.mark.usefixtures("at_once")
def test_a_cut_watch_is_taken_up_after_the_last_event_seen(run: Any) -> None:
    control = watching([event(4), event(5), CUT], [CUT], [event(6), CUT], [event(7), event(8)])
    assert run(seen(control)) == [4, 5, 6, 7, 8]
    assert control.requests == [0, 5, 5, 6]


@pytest.mark.usefixtures("at_once")
def test_a_watch_that_is_cut_before_its_first_event_is_taken_up_too(run: Any) -> None:
    control = watching([CUT], [event(3)])
    assert run(seen(control)) == [3]
    assert control.requests == [0, 0]


@pytest.mark.usefixtures("at_once")
def test_a_watch_goes_on_from_where_it_was_told_to(run: Any) -> None:
    control = watching([event(12)])
    assert run(seen(control, after=11)) == [12]
    assert control.requests == [11]


@pytest.mark.usefixtures("at_once")
def test_a_watch_that_finds_nobody_any_more_gives_up(run: Any) -> None:
    async def watch() -> None:
        control = watching([event(1), CUT], [CUT])
        async with serving(control) as client:
            events = client.watch(patience=2.0)  # on a busy machine too long enough for some attempts
            assert (await anext(events)).id == 1
            with pytest.raises(UnreachableError):
                await anext(events)
            assert len(control.requests) > 2

    run(watch())


@pytest.mark.usefixtures("at_once")
def test_a_watch_that_stood_again_has_all_its_patience_for_the_next_cut(run: Any) -> None:
    """A paused run has no events by which the client could know it."""

    async def watch(request: pb.WatchRunRequest, context: Any) -> AsyncIterator[pb.WatchRunResponse]:
        control.requests.append(request.after_event_id)
        await context.send_initial_metadata((("watch", "stands"),))
        if len(control.requests) < 4:
            await asyncio.sleep(0.3)  # longer than the patience
            await context.abort(CUT, "cut")
        yield event(1)

    control = Control(WatchRun=watch)
    assert run(seen(control, patience=0.25)) == [1]
    assert control.requests == [0, 0, 0, 0]


def test_control_says_at_once_that_a_watch_stands(run: Any) -> None:
    async def watch() -> None:
        control = Restarted(1, 0)
        control._over = False
        async with serving(control) as client:
            call = client._stub.WatchRun(pb.WatchRunRequest())
            assert (await call.initial_metadata())["watch"] == "stands"
            control.close()
            assert await call.read() is aio.EOF

    run(watch())


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("state", ["completed", "stopped", "error"])
def test_a_control_that_goes_after_the_last_event_was_no_cut(run: Any, state: str) -> None:
    control = watching([event(1, "state", state="running"), event(2, "state", state=state), CUT], [event(3)])
    assert run(seen(control)) == [1, 2]


@pytest.mark.usefixtures("at_once")
def test_events_that_are_no_longer_kept(run: Any) -> None:
    async def watch() -> None:
        async with serving(watching([grpc.StatusCode.OUT_OF_RANGE])) as client:
            with pytest.raises(RunStateError, match=r"no longer keeps the events after 3: read journal\.jsonl"):
                await anext(client.watch(3))

    run(watch())


@pytest.mark.usefixtures("at_once")
def test_a_watch_that_is_refused_is_not_tried_again(run: Any) -> None:
    async def watch() -> None:
        control = watching([grpc.StatusCode.INTERNAL])
        async with serving(control) as client:
            with pytest.raises(LinkClosedError, match="cut"):
                await anext(client.watch())
        assert control.requests == [0]

    run(watch())


@pytest.mark.timeout(220)
def test_the_command_watch_goes_on_where_control_was_started_again(run: Any) -> None:
    async def watch(control: Control, *words: str) -> subprocess.CompletedProcess[str]:
        async with serving(control) as client:
            command = [sys.executable, "-m", "control", "watch", "--json", "--address", client.address, *words]
            return await asyncio.to_thread(
                subprocess.run, command, capture_output=True, text=True, timeout=80, check=False
            )

    gone = grpc.StatusCode.OUT_OF_RANGE
    control = watching([event(7), CUT], [gone], [event(1, "state", state="completed")])
    done = run(watch(control), timeout=100)
    assert [json.loads(line)["event_id"] for line in done.stdout.splitlines()] == [7, 1]
    assert (done.returncode, control.requests) == (0, [0, 7, 0])
    assert "control was started again" in done.stderr
    done = run(watch(watching([gone]), "--after", "7"), timeout=100)
    assert (done.returncode, done.stdout) == (6, "")
    assert "no longer keeps the events after 7" in done.stderr


class Restarted(ControlServicer):
    """Control's own watches, of a run in this term that has had so many events."""

    GetRun = Control.GetRun  # type: ignore[assignment]

    def __init__(self, term: int, events: int) -> None:
        super().__init__()
        controller: Any = SimpleNamespace(tree=SimpleNamespace(term=term))
        self.attach(controller, spawn=no_one, aside=list)
        for number in range(events):
            controller.publish({"event": "step", "step": number})
        self.close()


async def no_one(count: int) -> list[Started]:
    return []


def test_numbers_of_events_begin_at_the_term(run: Any) -> None:
    assert run(seen(Restarted(7, 3), after=7_000_000_000)) == [7_000_000_001, 7_000_000_002, 7_000_000_003]
    assert run(seen(Restarted(7, 3), after=7_000_000_002)) == [7_000_000_003]
    assert run(seen(Restarted(7, 3), after=7_000_000_003)) == []


@pytest.mark.parametrize("term", [1, 3])
@pytest.mark.parametrize("events", [0, 1, 60])
def test_the_number_of_another_process_of_control_is_not_taken_for_one_of_its_own(
    run: Any, term: int, events: int
) -> None:
    """However many events it has had: what came in between would be passed over without a word."""
    seen_last = Restarted(2, 40)._last
    with pytest.raises(RunStateError, match=f"no longer keeps the events after {seen_last}: read journal"):
        run(seen(Restarted(term, events), after=seen_last))


class Relay:
    """Passes bytes on between a client and a control. A context manager: its ``address``."""

    #: a frame of HTTP/2 that is a PING, and no answer to one
    PING = bytes.fromhex("000008060000000000")

    def __init__(self, target: str) -> None:
        self._host, _, self._port = target.rpartition(":")
        self.pings, self.dialled = 0, 0
        self._news = asyncio.Event()
        self._passing: list[asyncio.Task[None]] = []
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = "{}:{}".format(*self._server.sockets[0].getsockname())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.hang_up()
        await asyncio.gather(*self._passing, return_exceptions=True)
        await asyncio.gather(*(writer.wait_closed() for writer in self._writers), return_exceptions=True)

    def hush(self) -> None:
        """Let the connections that there are go silent: they stay open, and nothing comes through."""
        for task in self._passing:
            task.cancel()

    def hang_up(self) -> None:
        """End the connections that there are, and take no more."""
        self._server.close()
        self.hush()
        for writer in self._writers:
            writer.close()

    async def until_pings(self, count: int) -> None:
        while self.pings < count:
            self._news.clear()
            await self._news.wait()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.dialled += 1
        self._writers.append(writer)
        far_reader, far_writer = await asyncio.open_connection(self._host, int(self._port))
        self._writers.append(far_writer)
        for one, other in ((reader, far_writer), (far_reader, writer)):
            self._passing.append(asyncio.create_task(self._pass(one, other)))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            self.pings += data.count(self.PING)
            self._news.set()
            writer.write(data)
        writer.close()


@pytest.fixture(params=[500])
def often(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Ping as often as gRPC does, about once a second, and wait half a second for the answer, or as said."""
    wait = request.param
    times = {"grpc.keepalive_time_ms": 50, "grpc.keepalive_timeout_ms": wait, "grpc.http2.ping_timeout_ms": wait}
    monkeypatch.setattr(client_module, "_KEEPALIVE", [(k, times.get(k, v)) for k, v in client_module._KEEPALIVE])


@pytest.mark.usefixtures("at_once", "often")
def test_a_control_that_goes_silent_is_noticed_and_the_watch_goes_on_once_it_is_back(run: Any) -> None:
    async def watch(request: pb.WatchRunRequest, context: Any) -> AsyncIterator[pb.WatchRunResponse]:
        control.requests.append(request.after_event_id)
        yield event(1 if len(control.requests) == 1 else 2)
        if len(control.requests) == 1:
            await asyncio.get_running_loop().create_future()

    async def follow() -> None:
        async with serving(control) as direct, Relay(direct.address) as relay, Client(relay.address) as client:
            events = client.watch()
            assert (await anext(events)).id == 1
            relay.hush()
            assert [event.id async for event in events] == [2]

    control = Control(WatchRun=watch)
    run(follow())
    assert control.requests[0] == 0
    assert set(control.requests[1:]) == {1}  # again, where an answer to a ping took half a second


@pytest.mark.slow
@pytest.mark.parametrize("often", [20_000], indirect=True)  # as long as they are answered at all
@pytest.mark.usefixtures("at_once", "often")
def test_control_bears_the_pings_of_a_watch_that_hears_nothing_for_long(run: Any) -> None:
    async def watch(request: pb.WatchRunRequest, context: Any) -> AsyncIterator[pb.WatchRunResponse]:
        control.requests.append(request.after_event_id)
        yield event(1)
        await enough.wait()
        yield event(2)

    async def follow() -> None:
        async with serving(control) as direct, Relay(direct.address) as relay, Client(relay.address) as client:
            events = client.watch()
            assert (await anext(events)).id == 1
            await relay.until_pings(8)  # by default a server ends the connection before
            enough.set()
            assert [event.id async for event in events] == [2]
            assert relay.dialled == 1

    enough = asyncio.Event()
    control = Control(WatchRun=watch)
    run(follow())
    assert control.requests == [0]


@pytest.mark.slow
def test_a_watch_dials_as_often_as_it_tries(run: Any) -> None:
    """gRPC by itself would dial after one second, then after 1.6 s, and after 17 s when patience is at its end."""

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        dialled.append(asyncio.get_running_loop().time())
        writer.close()
        await writer.wait_closed()

    async def follow() -> None:
        async with serving(watching([event(1), CUT])) as direct, Relay(direct.address) as relay:
            port = int(relay.address.rpartition(":")[2])
            async with Client(relay.address) as client:
                events = client.watch(patience=4.0)
                assert (await anext(events)).id == 1
                relay.hang_up()
                async with await asyncio.start_server(hang_up, "127.0.0.1", port):
                    with pytest.raises(UnreachableError):
                        await anext(events)

    dialled: list[float] = []
    run(follow())
    assert len(dialled) > 4  # of some sixteen; by itself after 1 s and 2.6 s, perhaps after 4 s


# --- weights ----------------------------------------------------------------------------------------------------------

MANIFEST = Manifest.of({"w": np.zeros((3, 5), np.float32), "b": np.zeros(40, np.float32)})


def download(spoil: Callable[[list[pb.DownloadWeightsResponse]], None] = lambda _: None) -> Control:
    """A control that sends its weights in chunks of 64 bytes, or what ``spoil`` makes of them."""
    flat = MANIFEST.pack({"w": np.arange(15, dtype=np.float32).reshape(3, 5), "b": np.ones(40, np.float32)})
    data = flat.tobytes()
    messages = [pb.DownloadWeightsResponse(manifest=manifest_to_proto(MANIFEST), weights_version=9)]
    for at in range(0, len(data), 64):
        chunk = data[at : at + 64]
        messages.append(pb.DownloadWeightsResponse(offset_bytes=at, data=chunk, crc32c=crc32c(chunk)))
    messages.append(pb.DownloadWeightsResponse(weights_sha256=MANIFEST.sha256(flat)))
    spoil(messages)

    async def weights(request: Any, context: Any) -> AsyncIterator[pb.DownloadWeightsResponse]:
        for message in messages:
            yield message

    return Control(DownloadWeights=weights)


def test_weights_arrive_as_they_were_sent(run: Any) -> None:
    async def fetch() -> None:
        async with serving(download()) as client:
            found = await client.weights()
        assert found.version == 9
        assert found["w"].tolist() == np.arange(15).reshape(3, 5).tolist()
        assert found["b"].tolist() == [1] * 40
        assert not found["w"].flags.writeable

    run(fetch())


def bad_byte(messages: list[pb.DownloadWeightsResponse]) -> None:
    messages[2].data = b"\1" + messages[2].data[1:]


def other_weights(messages: list[pb.DownloadWeightsResponse]) -> None:
    bad_byte(messages)
    messages[2].crc32c = crc32c(messages[2].data)


def cut_off(messages: list[pb.DownloadWeightsResponse]) -> None:
    del messages[-2:]


def no_digest(messages: list[pb.DownloadWeightsResponse]) -> None:
    del messages[-1]


def left_out(messages: list[pb.DownloadWeightsResponse]) -> None:
    del messages[2]


def twice(messages: list[pb.DownloadWeightsResponse]) -> None:
    messages.insert(2, messages[2])


def too_many(messages: list[pb.DownloadWeightsResponse]) -> None:
    messages.insert(
        -1, pb.DownloadWeightsResponse(offset_bytes=MANIFEST.size * 4, data=b"1234", crc32c=crc32c(b"1234"))
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (bad_byte, "corrupt at byte 64"),
        (left_out, "corrupt at byte 128"),
        (twice, "corrupt at byte 64"),
        (too_many, f"corrupt at byte {MANIFEST.size * 4}"),
        (cut_off, "are not those that were sent"),
        (no_digest, "are not those that were sent"),
        (other_weights, "are not those that were sent"),
    ],
)
def test_weights_that_are_not_whole_are_refused(run: Any, spoil: Callable[..., None], message: str) -> None:
    async def fetch() -> None:
        async with serving(download(spoil)) as client:
            with pytest.raises(ChecksumError, match=message):
                await client.weights()

    run(fetch())


def test_a_download_that_ends_before_it_begins(run: Any) -> None:
    async def fetch() -> None:
        async with serving(download(list.clear)) as client:
            with pytest.raises(LinkClosedError, match="ended the download before it began"):
                await client.weights()

    run(fetch())
