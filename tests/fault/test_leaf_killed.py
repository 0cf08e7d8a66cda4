"""A leaf that dies in mid-step (N4): training goes on, and the weights are the undisturbed run's, bit for bit.

In process at named points of the leaf's step, over chunks of 4 KiB and a window of 2; and a real process by SIGKILL.
"""

import asyncio
import json
import textwrap
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from control import restarts
from control.config import RunConfig
from control.reference import reference
from control.testing import local_tree
from control.training import run as run_training
from spheres.frames import decode
from spheres.task import load_task
from spheres.testing.memory import MemoryNetwork, MemoryTransport
from spheres.testing.synthetic import Synthetic
from spheres.transport import Link, Rpc
from spheres.v1 import work_pb2 as pb

LEAF = "s-5"
STEP = 2


class SilentFrom:
    """A link that goes silent at a named point: the message that fits is never sent, nor is any after it."""

    def __init__(self, link: Link, fits: Callable[[pb.WorkRequest], bool], reached: asyncio.Event) -> None:
        self.peer = link.peer
        self._link, self._fits, self._reached = link, fits, reached

    async def send(self, message: bytes) -> None:
        if self._fits(decode(pb.WorkRequest, message)):
            self._reached.set()
        if self._reached.is_set():
            await asyncio.get_running_loop().create_future()
        await self._link.send(message)

    async def receive(self) -> bytes | None:
        return await self._link.receive()

    async def aclose(self, error: Any = None) -> None:
        await self._link.aclose(error)


class SilentTransport(MemoryTransport):
    """Dials Work links that go silent at a named point."""

    def __init__(self, network: MemoryNetwork, name: str, fits: Callable[[pb.WorkRequest], bool]) -> None:
        super().__init__(network, name)
        self._fits = fits
        self.reached = asyncio.Event()

    async def dial(self, address: str, rpc: Rpc) -> Link:
        link = await super().dial(address, rpc)
        return SilentFrom(link, self._fits, self.reached) if rpc is Rpc.WORK else link


def _chunk(index: int) -> Callable[[pb.WorkRequest], bool]:
    def fits(message: pb.WorkRequest) -> bool:
        return message.tag.step == STEP and message.HasField("gradient_chunk") and message.gradient_chunk.index == index

    return fits


def _reference(message: pb.WorkRequest) -> bool:
    return message.tag.step == STEP and message.HasField("gradient_reference")


POINTS: dict[str, tuple[str, Callable[[pb.WorkRequest], bool]]] = {
    "before its first chunk": ("inline", _chunk(0)),
    "after its first chunk": ("inline", _chunk(1)),
    "in the middle": ("inline", _chunk(25)),
    "before its last chunk": ("inline", _chunk(51)),
    "before it says where its gradient lies": ("shm", _reference),
}


def config(**changes: Any) -> RunConfig:
    settings = {"task": "digits", "steps": 5, "batch_size": 48, "microbatches": 12, "spheres": 6, "fan_out": 2}
    small = {"chunk_bytes": 4096, "window_chunks": 2, "eval_every": None, "checkpoint_every": None}
    return RunConfig(**{**settings, **small, **changes})


@pytest.mark.parametrize("point", POINTS)
def test_a_leaf_lost_at_a_named_point(point, run, tmp_path):
    task = Synthetic(parameters=53_000, samples=200)
    network = MemoryNetwork()
    wire, fits = POINTS[point]

    async def train() -> str:
        silent = SilentTransport(network, LEAF, fits)

        def transport(name: str) -> MemoryTransport:
            return silent if name == LEAF else MemoryTransport(network, name)

        async with local_tree(config(wire=wire), task, transport, directory=tmp_path) as tree:
            assert tree.tree.parent_of(LEAF) == "s-2"
            training = asyncio.create_task(tree.run())
            await silent.reached.wait()
            assert tree.controller.step == STEP
            await tree.kill(LEAF)
            return await training

    assert run(train()) == reference(task, config()).weights_sha256
    records = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    # Nothing is said upward about it: the attempt is the parent's, not control's.
    assert [r["attempts"] for r in records] == [0, 0, 0, 0, 0]
    for record in records:
        parts = sorted(tuple(part[:2]) for part in record["contributions"])
        assert parts[0][0] == 0
        assert parts[-1][1] == 12
        assert all(before[1] == after[0] for before, after in pairwise(parts))
    # Control is told, though the leaf was not its child. After the last step the tree is taken down, one by one:
    # whoever has lost its parent by then may come to control.
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    events = [event for event in events if event["step"] < 5]
    assert [(e["sphere"], e["step"]) for e in events if e["event"] == "sphere_lost"] == [(LEAF, STEP)]
    assert sorted(e["sphere"] for e in events if e["event"] == "sphere_joined") == [f"s-{n}" for n in range(1, 7)]
    assert LEAF in {sphere for *_, sphere in records[STEP - 1]["contributions"]}
    assert LEAF not in {sphere for r in records[STEP:] for *_, sphere in r["contributions"]}


def test_a_leaf_lost_while_it_computes(run, tmp_path):
    """What it was computing is computed again, by another; nothing else is."""
    import threading

    computing, released = threading.Event(), threading.Event()

    class StopsComputing(Synthetic):
        def gradient(self, weights, samples, rng, out):
            if rng.bit_generator.state["state"]["key"][1] == STEP:
                computing.set()
                released.wait(20)
            return super().gradient(weights, samples, rng, out)

    class Same(StopsComputing):
        gradient = Synthetic.gradient

    task, stopping = Same(parameters=53_000, samples=200), StopsComputing(parameters=53_000, samples=200)
    network = MemoryNetwork()

    async def train() -> str:
        async with local_tree(
            config(),
            task,
            lambda name: MemoryTransport(network, name),
            directory=tmp_path,
            sphere_task=lambda name: stopping if name == LEAF else task,
        ) as tree:
            training = asyncio.create_task(tree.run())
            await asyncio.to_thread(computing.wait, 20)
            await tree.kill(LEAF)
            sha256 = await training
            released.set()
            return sha256

    assert run(train()) == reference(task, config()).weights_sha256


DYING_TASK = """
    import os, signal
    from pathlib import Path
    from spheres.tasks.digits import Digits

    class Dying(Digits):
        '''Kills its own process once, in the middle of step 7, when it is given the named sample.'''

        def __init__(self, marker="", sample="-1"):
            super().__init__()
            self.marker, self.sample = Path(marker), int(sample)

        def gradient(self, weights, samples, rng, out):
            if rng.bit_generator.state["state"]["key"][1] == 7 and self.sample in samples:
                try:
                    self.marker.touch(exist_ok=False)
                except FileExistsError:
                    pass
                else:
                    os.kill(os.getpid(), signal.SIGKILL)
            return super().gradient(weights, samples, rng, out)
"""


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_a_leaf_process_killed_by_sigkill_in_mid_step(run, tmp_path, monkeypatch):
    (tmp_path / "dying.py").write_text(textwrap.dedent(DYING_TASK))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(restarts, "_FIRST_PAUSE", 60.0)  # nobody comes in its place before the run is over
    settings = config(steps=12, chunk_bytes=4096)
    digits = load_task("digits")

    def train(name: str, sample: int) -> list[dict[str, Any]]:
        options = {"marker": str(tmp_path / "marker"), "sample": str(sample)}
        changes = {"task": "dying:Dying", "task_options": options, "run_dir": tmp_path / name}
        summary = run(run_training(settings.model_copy(update=changes)), timeout=55)
        assert summary.error is None
        assert summary.weights_sha256 == reference(digits, settings).weights_sha256
        return [json.loads(line) for line in (tmp_path / name / "journal.jsonl").read_text().splitlines()]

    undisturbed = train("undisturbed", -1)
    tree = json.loads((tmp_path / "undisturbed" / "summary.json").read_text())["tree"]
    lo, leaf = next((lo, who) for lo, _, who in undisturbed[7]["contributions"] if who not in tree.values())
    from spheres.sampling import Sampler

    sample = Sampler(seed=0, size=1437, batch_size=48, microbatches=12).microbatch(7, lo)[0]
    disturbed = train("disturbed", int(sample))
    assert (tmp_path / "marker").exists()
    # seven steps with six spheres; from the death on, five
    assert [r["spheres"] for r in disturbed] == [6] * 7 + [5] * 5
    lost = json.loads((tmp_path / "disturbed" / "summary.json").read_text())
    assert [s["state"] for s in lost["spheres"]].count("lost") == 1
    assert leaf in tree
