"""``ControlService`` of a run in this process, over real gRPC: what is asked twice, watches and downloads."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import aio

from control import client as client_module
from control import servicers
from control.client import Client, state_name
from control.config import RunConfig
from control.lives import Started
from control.server import add_services
from control.servicers import ControlServicer
from control.testing import LocalTree, local_tree
from control.training import run as train
from spheres.errors import CheckpointError, ConfigError, RefusedError
from spheres.grpc_link import GrpcTransport
from spheres.server import Health
from spheres.testing.synthetic import Synthetic
from spheres.v1 import control_pb2 as pb

SETTINGS: dict[str, Any] = {"task": "synthetic", "microbatches": 2, "batch_size": 10, "spheres": 1, "eval_every": None}


class Served:
    """A run that is paused until it is told to step, the servicer that answers for it, and a client."""

    def __init__(self, local: LocalTree, servicer: ControlServicer, client: Client) -> None:
        self.local, self.servicer, self.client = local, servicer, client
        self.controller = local.controller
        self.spawned: list[int] = []
        servicer.attach(local.controller, spawn=self.spawn, aside=list)

    async def spawn(self, count: int) -> list[Started]:
        self.spawned.append(count)
        return [Started(name=f"new-{number}", pid=number) for number in range(1, count + 1)]


@contextlib.asynccontextmanager
async def served(directory: Path, task: Synthetic | None = None, **changes: Any) -> AsyncIterator[Served]:
    servicer = ControlServicer()

    def transport(name: str) -> GrpcTransport:
        return GrpcTransport((lambda server: add_services(server, servicer, Health())) if name == "control" else None)

    config = RunConfig(**{**SETTINGS, "steps": 100, **changes})
    task = task or Synthetic(parameters=2_500, samples=100)
    async with local_tree(config, task, transport, directory=directory) as local, Client(local.tree.address) as client:
        found = Served(local, servicer, client)
        local.controller.pause()
        loop = asyncio.create_task(local.controller.run())
        try:
            yield found
        finally:
            servicer.close()
            local.controller.request_stop("the test is over")
            await loop


# ---- what is asked for twice


def test_an_id_is_one_of_its_method(run: Any, tmp_path: Path) -> None:
    async def main() -> None:
        async with served(tmp_path) as at:
            await at.controller.advance(2)
            name = (await at.client.checkpoint("job-1")).name
            await at.controller.advance(2)
            assert (await at.client.checkpoint("job-1")).name == name  # the answer of the first
            assert (await at.client.restore(name, "job-1")).step == 2
            assert await at.client.spawn(2, "job-1") == [1, 2]

    run(main())


def test_an_id_that_is_known_asks_for_the_same(run: Any, tmp_path: Path) -> None:
    async def main() -> None:
        async with served(tmp_path) as at:
            for _ in range(2):
                assert await at.client.spawn(1, "grow") == [1]
            with pytest.raises(ConfigError, match="request_id 'grow' was that of another request: a new wish needs a"):
                await at.client.spawn(2, "grow")
            assert await at.client.spawn(2, "grow more") == [1, 2]
            assert at.spawned == [1, 2]

    run(main())


def test_an_id_whose_request_failed_may_ask_again_and_for_something_else(run: Any, tmp_path: Path) -> None:
    async def main() -> None:
        async with served(tmp_path) as at:
            await at.controller.advance(1)
            name = (await at.client.checkpoint()).name
            for _ in range(2):
                with pytest.raises(CheckpointError):
                    await at.client.restore("step-none", "back")
            assert (await at.client.restore(name, "back")).step == 1

    run(main())


# ---- watches


@pytest.mark.processes
def test_watches_end_with_the_run_also_where_control_is_held(run: Any, tmp_path: Path) -> None:
    config = RunConfig(task="digits", steps=40, spheres=1, run_dir=tmp_path / "run")
    before_the_first = 1_000_000_000  # events of the first term

    class Begins:
        def on_train_start(self, event: Any, run: Any) -> None:
            began.set()

    async def main() -> None:
        held = asyncio.get_running_loop().create_future()
        training = asyncio.create_task(train(config, callbacks=[Begins()], hold=held.set_result))
        await began.wait()
        async with Client(run_dir=config.run_dir) as client:
            events = [event async for event in client.watch(before_the_first)]
            assert [event.record["state"] for event in events if event.name == "state"][-1] == "completed"
            assert (tmp_path / "run" / "summary.json").exists()
            await held
            assert [event async for event in client.watch()] == []
            assert [event.id async for event in client.watch(events[-3].id)] == [event.id for event in events[-2:]]
            assert state_name(await client.status()) == "completed"
        assert not training.done()
        training.cancel()
        await asyncio.gather(training, return_exceptions=True)

    began = asyncio.Event()
    run(main())


# ---- downloads

#: more than what waits in the network's buffers for a client that does not read
LARGE = 6_000_000


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC takes all of it in for a client that does not read, once it has found the way to be long and broad."""
    monkeypatch.setattr(client_module, "_KEEPALIVE", [*client_module._KEEPALIVE, ("grpc.http2.bdp_probe", 0)])


async def begun(client: Client) -> Any:
    """A download of which the header was read, and nothing else is."""
    call = client._stub.DownloadWeights(pb.DownloadWeightsRequest())
    assert (await anext(aiter(call))).HasField("manifest")
    return call


async def freed(at: Served, most: int) -> None:
    async with asyncio.timeout(10):
        while len(at.servicer._copies) > most:
            await at.client.status()


@pytest.mark.usefixtures("small_buffers")
def test_downloads_of_one_version_share_a_copy_which_goes_with_the_last(run: Any, tmp_path: Path) -> None:
    async def main() -> None:
        async with served(tmp_path, Synthetic(parameters=LARGE, samples=100), checkpoint_every=None) as at:
            calls = await asyncio.gather(*(begun(at.client) for _ in range(6)))
            assert len(at.servicer._copies) == 1
            flat = next(iter(at.servicer._copies.values())).flat
            weights = await at.client.weights()
            assert weights.sha256 == at.local.sha256
            assert len(at.servicer._copies) == 1
            await at.controller.advance(1)
            calls.append(await begun(at.client))
            assert len(at.servicer._copies) == 2
            assert weights.sha256 != at.local.sha256
            assert np.shares_memory(flat, next(iter(at.servicer._copies.values())).flat)
            for call in calls:
                call.cancel()
            await freed(at, 0)

    run(main())


@pytest.mark.usefixtures("small_buffers")
def test_so_many_versions_are_kept_for_downloads_and_no_more(run: Any, tmp_path: Path) -> None:
    async def main() -> None:
        async with served(tmp_path, Synthetic(parameters=LARGE, samples=100), checkpoint_every=None) as at:
            calls = []
            for _ in range(servicers._MOST_COPIES):
                calls.append(await begun(at.client))
                await at.controller.advance(1)
            with pytest.raises(RefusedError, match="4 other versions of the weights are being downloaded; call again"):
                await at.client.weights()
            calls.pop().cancel()
            await freed(at, servicers._MOST_COPIES - 1)
            assert (await at.client.weights()).version == servicers._MOST_COPIES
            for call in calls:
                call.cancel()
            await freed(at, 0)

    run(main())


@pytest.mark.usefixtures("small_buffers")
def test_a_client_that_does_not_read_on_holds_no_copy(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with served(tmp_path, Synthetic(parameters=LARGE, samples=100), checkpoint_every=None) as at:
            call = await begun(at.client)
            await freed(at, 0)
            with pytest.raises(aio.AioRpcError, match=r"a piece of the weights was not taken within 2 s") as caught:
                [_ async for _ in call]
            assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED

    monkeypatch.setattr(servicers, "_PIECE_SECONDS", 2.0)
    run(main())


@pytest.mark.usefixtures("small_buffers")
def test_a_run_that_is_over_is_downloaded_too(run: Any, tmp_path: Path) -> None:
    async def main() -> None:
        async with served(tmp_path, Synthetic(parameters=LARGE, samples=100), checkpoint_every=None) as at:
            at.controller.request_stop("enough")
            await at.controller.until(lambda: False)
            call = await begun(at.client)
            both = await asyncio.gather(at.client.weights(), at.client.weights())
            assert [weights.sha256 for weights in both] == [at.local.sha256] * 2
            assert len(at.servicer._copies) == 1
            call.cancel()
            await freed(at, 0)

    run(main())
