"""Rows of DESIGN section 5 over whole trees in one process: a drain, a move, a task that raises, an id given twice.

Each ends with the weights of the undisturbed run, bit for bit.
"""

import asyncio
import contextlib
import json
import logging
import os
import threading
from itertools import pairwise

import pytest

import control.tree
import spheres.computing
from control.checkpoint import read_snapshot
from control.config import RunConfig
from control.reference import reference
from control.testing import control_node, local_tree
from spheres.computing import Computing
from spheres.errors import GradientError, LinkClosedError, StaleError
from spheres.hub import Hub
from spheres.task import Sums
from spheres.testing.memory import MemoryNetwork, MemoryTransport
from spheres.testing.synthetic import Synthetic
from spheres.v1 import control_pb2
from spheres.v1 import work_pb2 as pb

PARAMETERS, SAMPLES = 13_000, 200


def config(**changes):
    settings = {"task": "synthetic", "steps": 8, "batch_size": 48, "microbatches": 12, "spheres": 6, "fan_out": 2}
    small = {"chunk_bytes": 4096, "window_chunks": 2, "eval_every": None, "checkpoint_every": None}
    return RunConfig(**{**settings, **small, **changes})


def journal(directory):
    records = [json.loads(line) for line in (directory / "journal.jsonl").read_text().splitlines()]
    for record in records:  # every microbatch once
        parts = sorted(tuple(part[:2]) for part in record["contributions"])
        assert (parts[0][0], parts[-1][1]) == (0, 12)
        assert all(before[1] == after[0] for before, after in pairwise(parts))
    return records


def contributors(record):
    return {part[2] for part in record["contributions"]}


@contextlib.asynccontextmanager
async def tree_of(directory, task=None, **options):
    network = options.pop("network", None) or MemoryNetwork()
    task = task or Synthetic(parameters=PARAMETERS, samples=SAMPLES)
    settings = options.pop("config", config())
    async with local_tree(
        settings, task, lambda name: MemoryTransport(network, name), directory=directory, **options
    ) as tree:
        yield tree


@pytest.fixture
def expected():
    return reference(Synthetic(parameters=PARAMETERS, samples=SAMPLES), config()).weights_sha256


@pytest.mark.parametrize("who", ["s-5", "s-1"])
def test_a_sphere_that_drains_hands_over_and_goes(who, run, tmp_path, expected):
    """A leaf, and an inner sphere with its children: what it computed goes up, and nothing is computed twice for it."""

    async def main():
        async with tree_of(tmp_path) as tree:
            controller = tree.controller
            controller.pause()
            training = asyncio.create_task(tree.run())
            await controller.advance(3)
            going = asyncio.create_task(controller.advance(3))
            tree.spheres[who].drain("a test")
            await going
            await asyncio.wait_for(asyncio.shield(tree.tasks[who]), 10)  # it ends by itself, without an error
            del tree.tasks[who]
            await tree.tree.until(lambda: len(tree.tree.shape()) == 5)  # its children are with their fallbacks
            controller.resume()
            sha256 = await training
            return sha256, set(tree.tree.shape())

    sha256, members = run(main())
    assert sha256 == expected
    assert members == {f"s-{n}" for n in range(1, 7)} - {who}
    records = journal(tmp_path)
    assert who in contributors(records[2])
    assert who not in contributors(records[-1])
    if who == "s-5":
        assert [record["attempts"] for record in records] == [0] * 8, "nobody had to ask anybody again"


def test_a_sphere_told_to_drain_by_a_directive_goes(run, tmp_path, expected):
    async def main():
        async with tree_of(tmp_path) as tree:
            tree.controller.pause()
            training = asyncio.create_task(tree.run())
            await tree.controller.advance(2)
            tree.tree.drain("s-6", "a test")
            tree.controller.resume()
            sha256 = await training
            await asyncio.wait_for(asyncio.shield(tree.tasks.pop("s-6")), 10)
            return sha256

    assert run(main()) == expected


def test_a_sphere_that_is_moved_takes_its_children_along(run, tmp_path, expected):
    """N11: between steps. s-1, with s-3 and s-4, goes below s-2's child s-5."""

    async def main():
        async with tree_of(tmp_path) as tree:
            controller, root = tree.controller, tree.tree
            root.tidy = leave_it  # this tree is deeper than control likes it
            controller.pause()
            training = asyncio.create_task(tree.run())
            await controller.advance(2)
            target = tree.spheres["s-5"].hub
            new = pb.Ancestor(id="s-5", incarnation=target.incarnation, address=target.address)
            root.hub.direct(pb.Directive(target_sphere_id="s-1", kind=pb.DIRECTIVE_KIND_MOVE, parent=new))
            await asyncio.wait_for(root.until(lambda: root.parent_of("s-1") == "s-5"), 10)
            controller.resume()
            return await training, root.shape(), [node.id for node in tree.spheres["s-3"].hub.path]

    async def leave_it():
        pass

    sha256, shape, path = run(main())
    assert path == ["control", "s-2", "s-5", "s-1", "s-3"]
    assert sha256 == expected
    assert shape == {"s-1": "s-5", "s-2": "control", "s-3": "s-1", "s-4": "s-1", "s-5": "s-2", "s-6": "s-2"}
    assert [record["attempts"] for record in journal(tmp_path)] == [0] * 8


async def all_end(tree):
    """Tell all that the run is over: every sphere ends by itself, without an error."""
    tree.tree.stop_spheres("the run is over")
    assert await tree.tree.all_gone(5)
    await tree.tree.aclose()  # as the end of control: nobody answers any more
    await asyncio.wait_for(asyncio.gather(*tree.tasks.values()), 2)
    tree.tasks.clear()


class SlowDial(MemoryNetwork):
    """From one sphere every dial takes as long as all the others need to end."""

    async def reach(self, source, address):
        if source == "s-3":
            await asyncio.sleep(0.5)
        return await super().reach(source, address)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["s-3", "s-1"])
def test_spheres_between_two_parents_hear_that_the_run_is_over(who, run, tmp_path):
    """Else they would look for control until their --orphan-timeout.

    Who lost its link; and children of one that was about to leave.
    """

    async def main():
        async with tree_of(tmp_path, network=SlowDial()) as tree:
            await tree.run()
            assert tree.tree.shape()["s-3"] == "s-1"
            lost = asyncio.ensure_future(tree.tree.until(lambda: not tree.tree.spheres[who].active))
            if who == "s-3":
                tree.spheres["s-3"].parent.cut(LinkClosedError("a test"))
            else:
                tree.tree.drain("s-1", "a test")
                await tree.kill("s-1")
            await lost
            await all_end(tree)

    run(main())


@pytest.mark.slow
def test_a_run_that_ends_as_soon_as_its_control_is_back_tells_the_spheres_of_the_one_before(run, tmp_path):
    """They look for it, and it knows nothing of them: else they would until their --orphan-timeout."""
    chosen, network = config(spheres=3, patience=0.5), MemoryNetwork()
    task = Synthetic(parameters=PARAMETERS, samples=SAMPLES)
    (tmp_path / "again").mkdir()

    async def main():
        async with tree_of(tmp_path, task, network=network, config=chosen) as tree:
            await tree.tree.wait_for(3)
            killed = tree.tree
            await killed._listener.aclose()
            killed.children.drop(LinkClosedError("killed"))
            again = control_node(
                chosen, task, MemoryTransport(network, "control.2"), directory=tmp_path / "again", term=2
            )
            try:
                await again.tree.listen(killed.address)
                again.tree.came_back()
                again.tree.stop_spheres("the run is over")
                assert await again.tree.all_gone(0.1)
            finally:
                await again.tree.aclose()
                again.close()
            await asyncio.gather(*tree.tasks.values())

    run(main())


class SlowWord(MemoryNetwork):
    """Between a parent and its child the word that all is over takes a second."""

    def __init__(self):
        super().__init__()
        self.on_its_way = asyncio.Event()

    def carry(self, pipe, message):
        slow = (pipe.connection.dialler, pipe.up) == ("s-3", False) and b"the run is over" in message
        if slow:
            self.on_its_way.set()
        asyncio.get_running_loop().call_later(1.0 if slow else 0.0, pipe.arrive, message)


@pytest.mark.parametrize("how", ["killed", "drained", "told to end at once"])
def test_a_parent_that_ends_before_its_children_have_heard_leaves_nobody_behind(how, run, tmp_path, monkeypatch):
    monkeypatch.setattr(control.tree, "_BACK_SECONDS", 1.5)

    async def main():
        network = SlowWord()
        async with tree_of(tmp_path, network=network) as tree:
            await tree.run()
            ending = asyncio.ensure_future(all_end(tree))
            inner = tree.spheres["s-1"]
            await network.on_its_way.wait()
            if how == "killed":
                await tree.kill("s-1")
            elif how == "drained":
                inner.drain("a test")
            else:
                inner.drain("a test")
                inner.stop()
            await ending

    run(main())


def test_a_parent_ends_when_its_children_have_heard(run, tmp_path):
    """However slow the way down is: its own link is the only one on which they can hear it."""

    async def main():
        async with tree_of(tmp_path, network=SlowWord()) as tree:
            await tree.run()
            assert tree.tree.shape()["s-3"] == "s-1"
            await all_end(tree)

    run(main())


def test_a_move_to_where_nobody_is_ends_at_the_old_parent(run, tmp_path, expected):
    async def main():
        async with tree_of(tmp_path) as tree:
            controller, root = tree.controller, tree.tree
            controller.pause()
            training = asyncio.create_task(tree.run())
            await controller.advance(2)
            nobody = pb.Ancestor(id="s-9", incarnation=1, address="127.0.0.1:1")
            root.hub.direct(pb.Directive(target_sphere_id="s-3", kind=pb.DIRECTIVE_KIND_MOVE, parent=nobody))
            # it has a new link to the same parent: the second time that it joined
            await asyncio.wait_for(
                root.until(lambda: root.spheres["s-3"].link[1] > 1 and root.spheres["s-3"].active), 10
            )
            controller.resume()
            return await training, root.parent_of("s-3")

    assert run(main()) == (expected, "s-1")


def test_a_sphere_whose_id_control_has_given_to_another_enrolls_anew(run, tmp_path, expected):
    async def main():
        async with tree_of(tmp_path) as tree:
            controller, root, sphere = tree.controller, tree.tree, tree.spheres["s-2"]
            controller.pause()
            training = asyncio.create_task(tree.run())
            await controller.advance(2)
            root.grant(
                control_pb2.EnrollSphereRequest(protocol_version=1, request_id="x", sphere_id="s-2", host="else")
            )
            sphere.parent.cut(StaleError("a test"))
            await asyncio.wait_for(root.until(lambda: "s-7" in root.shape()), 10)
            controller.resume()
            return await training, sphere.hub.id

    assert run(main()) == (expected, "s-7")


class Fails(Synthetic):
    """Raises in step 3, so often, on whatever it is given."""

    times = 1

    def gradient(self, weights, samples, rng, out):
        if self.times and rng.bit_generator.state["state"]["key"][1] == 3:
            self.times -= 1
            raise ArithmeticError("no luck")
        return super().gradient(weights, samples, rng, out)


@pytest.mark.parametrize("who", ["s-5", "s-1"])
def test_a_task_that_raises_on_one_sphere_is_computed_elsewhere(who, run, tmp_path, expected, monkeypatch):
    """DESIGN section 5: an exception is no death. s-1 has children: they compute what it could not."""
    bad = Fails(parameters=PARAMETERS, samples=SAMPLES)
    good = Fails(parameters=PARAMETERS, samples=SAMPLES)
    good.times = 0
    set_aside, rests = Hub._set_aside, []

    def noted(hub):
        set_aside(hub)
        rests.append((hub.id, hub.activity.split(" for ")[0]))

    async def main():
        async with tree_of(tmp_path, good, sphere_task=lambda name: bad if name == who else good) as tree:
            sha256 = await tree.run()
            await asyncio.wait_for(tree.tree.until(lambda: who in tree.tree.shape()), 10)  # it comes back
            return sha256

    monkeypatch.setattr(Hub, "_set_aside", noted)
    assert run(main()) == expected
    assert bad.times == 0
    assert who not in contributors(journal(tmp_path)[3])
    assert rests == [(who, "set aside")]


@pytest.fixture
def short_rest(monkeypatch):
    """A sphere whose task has failed tries again soon; not once more, while its second word is on its way."""
    set_aside = Computing.set_aside

    def rest(computing, now):
        monkeypatch.setattr(spheres.computing, "ASIDE_SECONDS", 0.1 if computing.failures == 1 else 2.0)
        return set_aside(computing, now)

    monkeypatch.setattr(Computing, "set_aside", rest)


@pytest.mark.usefixtures("short_rest")
def test_a_task_that_raises_on_two_spheres_halts_the_run(run, tmp_path):
    bad = Fails(parameters=PARAMETERS, samples=SAMPLES)
    bad.times = 100

    async def main():
        async with tree_of(tmp_path, bad) as tree:
            with pytest.raises(GradientError, match=r"task failed on s-\d and before that on s-\d in step 3") as info:
                await tree.run()
            assert tree.controller.step == 3
            return info.value.details, 100 - bad.times

    details, tried = run(main())
    assert "raise ArithmeticError" in details
    assert tried <= 12, "never a run through all microbatches on all spheres"


@pytest.mark.usefixtures("short_rest")
def test_a_task_that_raises_where_there_is_nobody_else_halts_the_run(run, tmp_path):
    bad = Fails(parameters=PARAMETERS, samples=SAMPLES)
    bad.times = 100

    async def main():
        async with tree_of(tmp_path, bad, config=config(spheres=1)) as tree:
            with pytest.raises(GradientError, match=r"task failed on s-1 and before that on s-1 in step 3"):
                await tree.run()

    run(main())
    assert bad.times == 98


class Raises(Synthetic):
    error = None

    def gradient(self, *args):
        raise self.error


class NoWordsError(Exception):
    def __str__(self):
        return self.args[0]


@pytest.mark.usefixtures("short_rest")
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("x" * 2_000_000), "ValueError: xxx"),
        (ValueError(os.fsdecode(b"/data/caf\xe9.npz")), r"ValueError: /data/caf\\udce9.npz"),
        (NoWordsError(), "NoWordsError"),
    ],
    ids=["too long for a message", "no UTF-8", "no words"],
)
def test_a_run_halts_whatever_the_words_of_its_task_are(error, said, run, tmp_path):
    async def main():
        task = Raises(parameters=PARAMETERS, samples=SAMPLES)
        task.error = error
        async with tree_of(tmp_path, task=task) as tree:
            await tree.run()

    with pytest.raises(GradientError, match=said):
        run(main(), timeout=30)


class Stateful(Synthetic):
    state = None

    def state_dict(self):
        if self.state is None:
            raise RuntimeError("no state now")
        return self.state


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (None, "RuntimeError: no state now"),
        ({"x": {1, 2}}, "TypeError: Object of type set is not JSON serializable"),
        ({"x": "y" * (1 << 20)}, "is 1,048,585 bytes of JSON; at most 1,048,576 go into a checkpoint"),
    ],
    ids=["raises", "no JSON", "too large"],
)
def test_a_task_whose_state_cannot_be_had_is_trained_and_saved_without_it(state, said, run, tmp_path, expected, caplog):
    """Each sphere says so once, and the checkpoints can be gone on from."""
    settings = config(checkpoint_every="4steps")

    async def main():
        task = Stateful(parameters=PARAMETERS, samples=SAMPLES)
        task.state = state
        async with tree_of(tmp_path, task=task, config=settings) as tree:
            controller = tree.controller
            controller.pause()
            training = asyncio.create_task(tree.run())
            await controller.advance(5)
            await controller.restore("step-000000004")
            controller.resume()
            return await training

    with caplog.at_level(logging.WARNING):
        assert run(main(), timeout=30) == expected
    told = [record.getMessage() for record in caplog.records if "state_dict()" in record.getMessage()]
    assert len(told) == 6
    assert all(said in line for line in told)
    saved = read_snapshot(tmp_path / "checkpoints" / "step-000000008")
    assert [(record.report.sphere_id, record.task_state) for record in saved.spheres] == [
        (f"s-{n}", b"") for n in range(1, 7)
    ]


class Slow(Synthetic):
    """Has its state only once it is told."""

    def __init__(self, asked, **options):
        super().__init__(**options)
        self.asked, self.ready, self.threads = asked, threading.Event(), []

    def gradient(self, *given):
        self.threads.append(threading.get_ident())
        return super().gradient(*given)

    def state_dict(self):
        self.asked()
        assert self.ready.wait(5), "the loop is held up"
        return {"on the thread that computes": {*self.threads} == {threading.get_ident()}}


def test_the_loop_goes_on_while_a_task_gives_its_state(run, tmp_path):
    async def main():
        loop, asked = asyncio.get_running_loop(), asyncio.Semaphore(0)
        tasks = [Slow(lambda: loop.call_soon_threadsafe(asked.release), parameters=PARAMETERS, samples=SAMPLES)
                 for _ in range(7)]  # fmt: skip
        given = dict(zip([f"s-{n}" for n in range(1, 7)], tasks, strict=False))
        async with tree_of(tmp_path, task=tasks[6], sphere_task=given.__getitem__) as tree:
            tree.controller.pause()
            training = asyncio.create_task(tree.run())
            await tree.controller.advance(2)
            saving = asyncio.create_task(tree.controller.save())
            for _ in given:
                await asked.acquire()  # by this loop, while none of them has answered
            for task in tasks:
                task.ready.set()
            await saving
            saved = read_snapshot(tmp_path / "checkpoints" / "step-000000002")
            assert {record.task_state for record in saved.spheres} == {b'{"on the thread that computes": true}'}
            tree.controller.resume()
            await training

    run(main(), timeout=30)


class StillInside(Synthetic):
    """Does not come out of one gradient; others take it over."""

    def __init__(self, *, stays=False):
        super().__init__(parameters=PARAMETERS, samples=SAMPLES)
        self.out = threading.Event()
        if not stays:
            self.out.set()

    def gradient(self, *given):
        assert self.out.wait(20)
        return super().gradient(*given)

    def state_dict(self):
        return {"it": "has one"}


@pytest.mark.slow
def test_a_checkpoint_does_not_wait_for_a_straggler(run, tmp_path):
    """Whose block others have computed, while its own thread is still at it: its state is left out, and it alone."""

    async def main():
        tasks = {f"s-{n}": StillInside(stays=n == 3) for n in range(1, 7)}
        async with tree_of(tmp_path, task=StillInside(), sphere_task=tasks.__getitem__) as tree:
            tree.controller.pause()
            training = asyncio.create_task(tree.run())
            await tree.controller.advance(2)
            async with asyncio.timeout(tree.tree.config.patience_seconds - 1):
                await tree.controller.save()
            saved = read_snapshot(tmp_path / "checkpoints" / "step-000000002")
            states = {record.report.sphere_id: record.task_state for record in saved.spheres}
            assert states.pop("s-3") == b""
            assert set(states.values()) == {b'{"it": "has one"}'}
            tasks["s-3"].out.set()
            tree.controller.resume()
            await training

    run(main(), timeout=30)


class MetricsOfSamples(Synthetic):
    """Each microbatch has few enough metrics, but others than the next one."""

    def _sums(self, weights, samples, *more):
        sums = super()._sums(weights, samples, *more)
        own = {f"{int(samples[0])} {i} {'x' * 200}": 1.0 for i in range(13)}
        return Sums(sums.loss, sums.count, {**sums.metrics, **own})


def test_metrics_that_do_not_fit_into_a_message_together_halt_the_run(run, tmp_path):
    """Those of each block of up to 8 microbatches do; an inner sphere could not send those of many, on any link."""

    async def main():
        task = MetricsOfSamples(parameters=PARAMETERS, samples=SAMPLES)
        async with tree_of(tmp_path, task=task) as tree:
            await tree.run()

    with pytest.raises(GradientError, match="the same ones for every microbatch"):
        run(main(), timeout=30)
