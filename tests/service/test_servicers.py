"""``ControlService`` of a run in this process, over real gRPC: what is asked twice, watches and downloads."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from control.client import Client, state_name
from control.config import RunConfig
from control.lives import Started
from control.server import add_services
from control.servicers import ControlServicer
from control.testing import LocalTree, local_tree
from control.training import run as train
from spheres.errors import CheckpointError, ConfigError
from spheres.grpc_link import GrpcTransport
from spheres.server import Health
from spheres.testing.synthetic import Synthetic

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
