"""``SyncClient``: the calls of ``Client`` without ``await``, in a thread that never outlives it."""

from __future__ import annotations

import ast
import asyncio
import gc
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from control.client import Client, RunEvent, state_name
from control.sync_client import SyncClient, _Loop
from spheres.config import manifest_to_proto
from spheres.errors import ChecksumError, ConfigError, LinkClosedError, RunStateError, UnreachableError
from spheres.numerics import crc32c
from spheres.tensors import Manifest
from spheres.v1 import control_pb2 as pb
from spheres.v1.control_pb2_grpc import ControlServiceServicer, add_ControlServiceServicer_to_server

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
MANIFEST = Manifest.of({"w": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float32)})


class Control(ControlServiceServicer):
    """Answers in threads: it needs no event loop. A pause is never answered: it hangs until its caller goes away."""

    def __init__(self) -> None:
        self.hangs, self.gone, self.watches = threading.Event(), threading.Event(), 0
        self.spoils = self.silent = self.obeys = False

    def GetRun(self, request: Any, context: Any) -> pb.GetRunResponse:
        return pb.GetRunResponse(run=pb.Run(state=pb.RUN_STATE_RUNNING, step=7))

    def PauseRun(self, request: Any, context: Any) -> pb.PauseRunResponse:
        if self.obeys:
            return pb.PauseRunResponse()
        gone = threading.Event()
        context.add_callback(gone.set)
        self.hangs.set()
        assert gone.wait(30)
        self.gone.set()
        return pb.PauseRunResponse()

    def ResumeRun(self, request: Any, context: Any) -> Any:
        if not self.obeys:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "RunStateError: the run is completed")
        return pb.ResumeRunResponse()

    def WatchRun(self, request: pb.WatchRunRequest, context: Any) -> Iterator[pb.WatchRunResponse]:
        self.watches += 1
        if self.silent:
            self.PauseRun(request, context)
        for number in range(request.after_event_id + 1, 4):
            yield pb.WatchRunResponse(event_id=number, event="step", record_json=json.dumps({"step": number}))
            if self.watches == number == 1:
                context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
        yield pb.WatchRunResponse(event_id=4, event="state", record_json='{"state": "completed"}')

    def DownloadWeights(self, request: Any, context: Any) -> Iterator[pb.DownloadWeightsResponse]:
        flat = MANIFEST.pack({"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)})
        data = flat.tobytes()
        yield pb.DownloadWeightsResponse(manifest=manifest_to_proto(MANIFEST), weights_version=9)
        yield pb.DownloadWeightsResponse(data=data, crc32c=crc32c(data) ^ self.spoils)
        yield pb.DownloadWeightsResponse(weights_sha256=MANIFEST.sha256(flat))


@pytest.fixture
def control() -> Iterator[Control]:
    control = Control()
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool)
        add_ControlServiceServicer_to_server(control, server)
        control.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"  # type: ignore[attr-defined]
        server.start()
        yield control
        server.stop(None).wait(10)


@pytest.fixture
def client(control: Any) -> Iterator[SyncClient]:
    with SyncClient(control.address) as client:
        yield client
    assert threads() == []


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "armillary-client"]


# ---- the same calls


def public(cls: type) -> dict[str, Any]:
    return {name: method for name, method in vars(cls).items() if inspect.isfunction(method) and name[0] != "_"}


def test_it_has_the_methods_of_the_async_client_with_the_same_signatures() -> None:
    there, here = public(Client), public(SyncClient)
    assert there.keys() - {"aclose"} == here.keys()
    for name, method in here.items():
        mine, other = inspect.signature(method), inspect.signature(there[name])
        assert str(mine) == str(other).replace("AsyncIterator", "Iterator"), name
        assert method.__doc__ == there[name].__doc__, name
    assert inspect.signature(Client.__init__) == inspect.signature(SyncClient.__init__)


def test_every_method_passes_on_all_that_it_is_given(client: SyncClient) -> None:
    """Where each argument has a value of its own, the async method gets these, in these places."""
    for name, method in public(SyncClient).items():
        if name == "watch":
            continue
        parameters = list(inspect.signature(method).parameters)[1:]
        heard: list[Any] = []

        async def noted(*values: Any, heard: list[Any] = heard) -> None:
            heard.extend(values)

        client._client = type("Noting", (), {name: staticmethod(noted)})()
        method(client, *parameters)
        assert heard == parameters, name


def test_calls_return_what_control_answers_and_raise_what_it_meant(control: Any, client: SyncClient) -> None:
    assert state_name(client.status()) == "running"
    with pytest.raises(RunStateError, match="the run is completed"):
        client.resume()
    weights = client.weights()
    assert (weights.version, weights["w"].tolist(), list(weights)) == (9, [[0, 1, 2], [3, 4, 5]], ["w", "b"])
    assert repr(weights) == "<DownloadedWeights version=9 tensors=2 parameters=10>"
    control.spoils = True
    with pytest.raises(ChecksumError):
        client.weights()


def test_a_watch_is_a_plain_iterator_that_survives_a_cut(control: Any, client: SyncClient) -> None:
    events = list(client.watch())
    assert all(isinstance(event, RunEvent) for event in events)
    assert [(event.id, event.name) for event in events] == [(1, "step"), (2, "step"), (3, "step"), (4, "state")]
    assert events[2].record == {"step": 3}
    assert control.watches == 2


EXAMPLES = [
    code
    for code in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    if "Client() as client" in code
]


@pytest.mark.parametrize("code", EXAMPLES, ids=["SyncClient", "Client"])
def test_the_examples_of_the_docs_run_as_they_stand(
    run: Any, control: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, code: str
) -> None:
    monkeypatch.setenv("ARMILLARY_CONTROL", control.address)
    control.obeys = True

    async def cell() -> None:  # in a notebook, where a loop is running
        result = eval(compile(code, "example", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), {})
        if inspect.isawaitable(result):
            await result

    run(cell())
    said = capsys.readouterr().out
    assert said.startswith(("running 7 ", "7\n"))
    assert control.watches == 2


# ---- where it may be used


def test_it_works_where_a_loop_is_running(run: Any, control: Any) -> None:
    async def cell() -> tuple[int, int]:
        with SyncClient(control.address) as client:
            return client.status().step, len(list(client.watch(1)))

    assert run(cell()) == (7, 3)
    assert threads() == []


def test_it_works_beside_an_async_client_of_the_same_process(run: Any, control: Any) -> None:
    """Two loops share gRPC's queue; what the one has cut off must not disturb the other."""

    def one_by_one() -> None:
        for _ in range(5):
            with SyncClient(control.address) as client, ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(client.pause)
                assert control.hangs.wait(10)
                control.hangs.clear()
                next(client.watch())
                client.close()
                assert isinstance(waiting.exception(10), LinkClosedError)

    async def both() -> None:
        other = asyncio.create_task(asyncio.to_thread(one_by_one))
        async with Client(control.address) as client:
            while not other.done():
                assert (await client.status()).step == 7
        await other

    run(both())  # fails where something is reported to its loop


def test_news_that_come_after_the_end_of_its_loop_disturb_nobody() -> None:
    loop = _Loop()
    loop.close()
    loop.call_soon_threadsafe(pytest.fail, "nobody waits for it any more")


def test_several_threads_may_call(client: SyncClient) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert {run.step for run in pool.map(lambda _: client.status(), range(100))} == {7}


# ---- its end


@pytest.mark.parametrize("call", [SyncClient.pause, lambda client: list(client.watch())], ids=["call", "watch"])
def test_ctrl_c_ends_a_call_and_the_client_goes_on(control: Any, client: SyncClient, call: Any) -> None:
    control.silent = True

    def interrupt() -> None:
        assert control.hangs.wait(10)
        os.kill(os.getpid(), signal.SIGINT)

    killer = threading.Thread(target=interrupt)
    killer.start()
    with pytest.raises(KeyboardInterrupt):
        call(client)
    killer.join()
    assert control.gone.wait(10)  # control hears that nobody waits any more
    assert client.status().step == 7


def test_close_ends_what_is_under_way_and_what_comes_after(control: Any) -> None:
    client = SyncClient(control.address)
    events = client.watch()
    next(events)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.pause)
        assert control.hangs.wait(10)
        client.close()
        with pytest.raises(LinkClosedError, match=f"this client of {control.address} is closed: make another one"):
            waiting.result(10)
    for call in (client.status, client.weights, lambda: next(events), lambda: next(client.watch())):
        with pytest.raises(LinkClosedError, match="is closed: make another one"):
            call()
    client.close()  # again
    assert repr(client) == f"<SyncClient {control.address} closed>"
    assert threads() == []


def test_one_that_nobody_closes_goes_with_its_last_reference(control: Any) -> None:
    client = SyncClient(control.address)
    events = client.watch()
    next(events)
    del client
    gc.collect()
    assert next(events).id == 2  # the iterator holds it
    del events
    gc.collect()
    assert threads() == []


def test_one_that_nobody_closes_does_not_hold_up_the_end_of_python(control: Any) -> None:
    script = "import sys; from control import SyncClient; c = SyncClient(sys.argv[1]); e = c.watch(); print(next(e).id)"
    command = [sys.executable, "-W", "error", "-c", script, control.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_an_address_that_is_nobodys_or_that_cannot_be_found(tmp_path: Any) -> None:
    with SyncClient("127.0.0.1:1", deadline=5) as client, pytest.raises(UnreachableError, match="does not answer"):
        client.status()
    with pytest.raises(ConfigError, match=r"no run directory at .*nowhere; give --address"):
        SyncClient(run_dir=tmp_path / "nowhere")
    assert threads() == []
