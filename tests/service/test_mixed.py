"""Trees of several numeric environments (N22): the same bits whatever the tree and whoever dies.

The spheres of environment "b" compute gradients that are a little off, as another CPU or language would.
"""

import asyncio
import contextlib
import json
import threading

import numpy as np
import pytest

from control.config import RunConfig
from control.testing import local_tree
from spheres.testing.memory import MemoryNetwork, MemoryTransport
from spheres.testing.synthetic import Synthetic

#: s-1, s-2, ...
MIXED = "aababa"


class Tilted(Synthetic):
    """``tilt`` times its gradient; ``at`` the given call it tells the test, and waits until it may go on."""

    tilt = 1.0
    at = 0
    calls = 0

    def gradient(self, weights, samples, rng, out):
        self.calls += 1
        if self.calls == self.at:
            self.reached()
            self.go_on.wait(10)
        sums = super().gradient(weights, samples, rng, out)
        for array in out.values():
            array *= np.float32(self.tilt)
        return sums


def config(**changes):
    settings = {"task": "synthetic", "steps": 8, "batch_size": 48, "microbatches": 12, "fan_out": 2}
    small = {"chunk_bytes": 4096, "window_chunks": 2, "eval_every": None, "checkpoint_every": None}
    return RunConfig(**{**settings, **small, **changes})


@contextlib.asynccontextmanager
async def tree_of(directory, environments=MIXED, task_of=None, **options):
    network = MemoryNetwork()
    names = {f"s-{n}": environment for n, environment in enumerate(environments, 1)}

    def task(name):
        made = Tilted(parameters=13_000, samples=200)
        made.tilt = 1.0 if names.get(name, "a") == "a" else 1.0 + 2.0**-20
        return made

    settings = options.pop("config", None) or config(spheres=len(environments))
    async with local_tree(
        settings,
        task("control"),
        lambda name: MemoryTransport(network, name),
        directory=directory,
        sphere_task=task_of or task,
        environment=lambda name: names[name],
        **options,
    ) as tree:
        yield tree


def journal(directory):
    lines = [json.loads(line) for line in (directory / "journal.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "step"]


@pytest.fixture
def undisturbed(run, tmp_path_factory):
    """The weights of a flat tree of the same spheres, in another order."""
    directory = tmp_path_factory.mktemp("undisturbed")

    async def main():
        async with tree_of(directory, "bbaaaa", config=config(spheres=6, fan_out=6)) as tree:
            return await tree.run()

    sha256 = run(main())
    assert {record["mixed_recompute"] for record in journal(directory)} == {0}
    return sha256


def test_the_bits_do_not_depend_on_where_in_the_tree_an_environment_is(run, tmp_path, undisturbed):
    async def main():
        async with tree_of(tmp_path) as tree:
            return await tree.run()

    assert run(main()) == undisturbed
    records = journal(tmp_path)
    assert {json.dumps(record["environments"]) for record in records} == {json.dumps([[0, 8, "a"], [8, 12, "b"]])}
    computed = {
        k: MIXED[int(sphere.removeprefix("s-")) - 1]
        for lo, hi, sphere in records[-1]["contributions"]
        for k in range(lo, hi)
    }
    assert "".join(computed[k] for k in range(12)) == "aaaaaaaabbbb"


@pytest.mark.parametrize("who", ["s-3", "s-1"])
def test_a_lost_one_is_replaced_by_an_equal_one(who, run, tmp_path, undisturbed):
    """A foreign leaf, and an inner sphere with others below, each in mid-gradient; the rest of the run is as it was."""

    async def main():
        loop, reached, go_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
        async with tree_of(tmp_path) as tree:
            task = tree.spheres[who]._task
            task.reached, task.go_on = lambda: loop.call_soon_threadsafe(reached.set), go_on
            task.at = 5
            training = asyncio.create_task(tree.run())
            await reached.wait()
            await tree.kill(who)
            go_on.set()
            return await training

    assert run(main()) == undisturbed
    records = journal(tmp_path)
    assert {record["mixed_recompute"] for record in records} == {0}
    assert any(record["attempts"] for record in records)
    assert who not in {part[2] for part in records[-1]["contributions"]}


def test_the_last_of_its_environment_is_replaced_by_another_and_that_is_counted(run, tmp_path, caplog):
    async def main():
        loop, reached, go_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
        async with tree_of(tmp_path, "aab") as tree:
            task = tree.spheres["s-3"]._task
            task.reached, task.go_on = lambda: loop.call_soon_threadsafe(reached.set), go_on
            task.at = 5
            training = asyncio.create_task(tree.run())
            await reached.wait()
            await tree.kill("s-3")
            go_on.set()
            await training
            return tree.controller.mixed_recomputes

    assert run(main()) == 8, "in its step, and in the next, for which it might have come back"
    records = journal(tmp_path)
    counts = [record["mixed_recompute"] for record in records]
    assert sorted(counts) == [0] * 6 + [4, 4]
    at = counts.index(4)
    assert {json.dumps(r["environments"]) for r in records[:at]} == {json.dumps([[0, 8, "a"], [8, 12, "b"]])}
    assert {json.dumps(r["environments"]) for r in records[at:]} == {json.dumps([[0, 12, "a"]])}
    assert all(sum(hi - lo for lo, hi, _ in record["contributions"]) == 12 for record in records)
    [warning, _] = [r.message for r in caplog.records if "another numeric environment" in r.message]
    assert warning.startswith(f"step {at}: 4 microbatches")


@pytest.mark.slow
def test_a_step_done_again_by_others_is_counted_and_the_run_goes_on(run, tmp_path):
    """A checkpoint, two steps, control lost; what comes back has no "b" any more."""

    async def first():
        async with tree_of(tmp_path, "aab") as tree:
            controller = tree.controller
            controller.pause()
            training = asyncio.create_task(tree.run())
            await controller.advance(2)
            name = (await controller.save()).name
            snapshot = controller.checkpoints.load(name, print)
            await controller.advance(3)
            training.cancel()
            return snapshot

    async def again(snapshot, environments):
        async with tree_of(tmp_path, environments, snapshot=snapshot) as tree:
            tree.tree.term = 2
            await tree.run()
            return tree.controller.mixed_recomputes

    snapshot = run(first())
    assert dict(snapshot.run.environment_shares) == {"a": 2.0, "b": 1.0}
    assert run(again(snapshot, "aab")) == 0, "with the same spheres it gives the same bits"
    assert run(again(snapshot, "aaa")) == 4
    counts = [record["mixed_recompute"] for record in journal(tmp_path)]
    assert counts[-6:] == [4, 0, 0, 0, 0, 0], "counted where it began; what follows is compared with nothing"


def test_the_shares_stay_while_each_environment_is_there(run, tmp_path):
    """Who joins or leaves changes nothing; a rebalance, or an environment that is new, decides anew."""

    async def main():
        async with tree_of(tmp_path, "aabb") as tree:
            controller = tree.controller
            controller.pause()
            training = asyncio.create_task(tree.run())
            await controller.advance(2)
            await tree.kill("s-4")
            await controller.advance(2)
            await controller.between_steps(tree.tree.rebalance)
            await controller.advance(2)
            controller.resume()
            await training

    run(main())
    shares = [[hi - lo for lo, hi, _ in record["environments"]] for record in journal(tmp_path)]
    assert shares == [[6, 6]] * 4 + [[8, 4]] * 4
