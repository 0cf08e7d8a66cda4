"""The next version streams down while control is still making it (N18): the same bits, whatever comes in between.

Where weights travel: in shared memory they lie where they are read.
"""

import asyncio
import json
from typing import Any

import pytest

from control.config import RunConfig
from control.journal import Journal
from control.reference import reference
from control.run_state import RunState
from control.testing import local_tree
from spheres.testing.memory import MemoryNetwork, MemoryTransport
from spheres.testing.synthetic import Synthetic
from spheres.work import EVALUATE

#: large enough that the update runs beside the loop, in 19 chunks
PARAMETERS, CHUNK = 300_000, 65_536
WIRES = ["inline", "shm"]


def config(**changes: Any) -> RunConfig:
    settings: dict[str, Any] = {"task": "synthetic", "steps": 8, "batch_size": 40, "microbatches": 8, "spheres": 4}
    settings |= {"fan_out": 2, "chunk_bytes": CHUNK, "eval_every": None, "checkpoint_every": None}
    return RunConfig(**{**settings, **changes})


def task() -> Synthetic:
    return Synthetic(parameters=PARAMETERS, samples=130)


def tree_of(chosen: RunConfig, directory: Any) -> Any:
    network = MemoryNetwork()
    return local_tree(chosen, task(), lambda name: MemoryTransport(network, name), directory=directory)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def types(request):
    return {"wire_dtype": request.param, "weights_wire_dtype": request.param}


@pytest.fixture(scope="module")
def expected(types):
    return reference(task(), config(**types)).weights_sha256


def test_weights_are_on_their_way_before_their_step_is_in_the_journal(types, expected, run, tmp_path, monkeypatch):
    early: list[int] = []

    async def train() -> str:
        async with tree_of(config(wire="inline", **types), tmp_path) as tree:
            hub, append = tree.tree.hub, Journal.append
            before = 0

            def appending(journal: Journal, record: dict[str, Any]) -> None:
                nonlocal before
                early.append(hub.work.step)
                assert hub.work.kind == EVALUATE or record["step"] == 7, "nobody knows yet what he owes (N18)"
                append(journal, record)

            monkeypatch.setattr(Journal, "append", appending)
            return await tree.run()

    assert run(train()) == expected
    assert early == [1, 2, 3, 4, 5, 6, 7, 7]  # after the last step nothing comes


@pytest.mark.parametrize("wire", WIRES)
def test_an_evaluation_a_pause_a_restore_and_a_stop_come_in_between(wire, types, expected, run, tmp_path):
    async def train() -> tuple[str, int]:
        async with tree_of(config(wire=wire, eval_every="3steps", **types), tmp_path) as tree:
            controller = tree.controller
            training = asyncio.create_task(tree.run())
            await controller.advance(2)
            assert controller.state is RunState.PAUSED
            info = await controller.save()
            await controller.advance(3)
            await controller.restore(info.name)
            assert controller.step == 2
            controller.resume()
            sha256 = await training
            return sha256, controller.step

    assert run(train()) == (expected, 8)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "evaluation"] == [3, 3, 6, 8]


@pytest.mark.parametrize("who", ["s-1", "s-4"])
def test_a_sphere_is_lost_while_the_next_version_is_on_its_way(who, types, expected, run, tmp_path, monkeypatch):
    """An inner one, whose children are left with half a version, and a leaf."""

    async def train() -> str:
        async with tree_of(config(wire="inline", **types), tmp_path) as tree:
            hub = tree.tree.hub
            announce = hub.announce
            lost: list[asyncio.Task[None]] = []

            def announcing(work: Any) -> None:
                announce(work)
                if work.step == 4:
                    lost.append(asyncio.ensure_future(tree.kill(who)))

            monkeypatch.setattr(hub, "announce", announcing)
            sha256 = await tree.run()
            await asyncio.gather(*lost)
            assert lost
            return sha256

    assert run(train()) == expected


def test_a_stop_after_the_announcement_ends_the_run_there(run, tmp_path, monkeypatch):
    async def train() -> tuple[RunState, int]:
        async with tree_of(config(wire="inline"), tmp_path) as tree:
            controller, hub = tree.controller, tree.tree.hub
            announce = hub.announce

            def announcing(work: Any) -> None:
                announce(work)
                if work.step == 4:
                    controller.request_stop("a test")

            monkeypatch.setattr(hub, "announce", announcing)
            await tree.run()
            return controller.state, controller.step

    assert run(train()) == (RunState.STOPPED, 4)
