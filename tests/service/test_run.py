"""The life of a run: evaluation, pause, steps by hand, stop, resume on another tree, restore, callbacks, failures.

Whole trees in memory; processes and the command line are in test_processes.py and test_cli.py.
"""

import asyncio
import contextlib
import gc
import json
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from control.config import RunConfig
from control.events import CallbackError
from control.reference import reference
from control.run_state import RunState
from control.testing import LocalTree, local_tree
from control.training import train
from spheres.errors import (
    ArmillaryError,
    CheckpointError,
    ConfigError,
    GradientError,
    LinkClosedError,
    RefusedError,
    RunStateError,
)
from spheres.lease import Lease
from spheres.task import Sums, load_task
from spheres.testing.memory import MemoryNetwork, MemoryTransport

DIGITS = load_task("digits")


def config(**changes: Any) -> RunConfig:
    return RunConfig(**{"task": "digits", "steps": 12, "batch_size": 100, "microbatches": 12, "spheres": 3, **changes})


@contextlib.asynccontextmanager
async def tree_of(config: RunConfig, directory: Any, **more: Any) -> AsyncIterator[LocalTree]:
    network = MemoryNetwork()
    task = more.pop("task", DIGITS)
    async with local_tree(config, task, lambda n: MemoryTransport(network, n), directory=directory, **more) as tree:
        yield tree


def records(directory: Any, name: str = "journal.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


class Recorder:
    """Hears every event."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int]] = []

    def __getattr__(self, name: str) -> Any:
        from control.events import EVENTS

        if name.startswith("on_") and name[3:] in EVENTS:
            return lambda event, run: self.heard.append((event.name, event.step))
        raise AttributeError(name)


def test_evaluation_is_the_reference_loops_and_the_last_step_is_evaluated(run, tmp_path):
    chosen = config(eval_every="5steps", eval_microbatches=7)

    async def train() -> tuple[str, dict[str, float]]:
        async with tree_of(chosen, tmp_path) as tree:
            return await tree.run(), dict(tree.controller.metrics)

    sha256, metrics = run(train())
    expected = reference(DIGITS, chosen)
    assert sha256 == expected.weights_sha256
    assert metrics["test_loss"] == expected.evaluation.loss / 360
    assert metrics["accuracy"] == expected.evaluation.metrics["accuracy"] / 360
    assert [r["step"] for r in records(tmp_path, "events.jsonl") if r["event"] == "evaluation"] == [5, 10, 12]


def test_every_sample_of_an_epoch_is_counted_once(run, tmp_path):
    from spheres.testing.synthetic import Synthetic

    task = Synthetic(parameters=100, samples=101)
    chosen = config(steps=None, epochs=2, batch_size=30, microbatches=8)

    async def train() -> None:
        async with tree_of(chosen, tmp_path, task=task) as tree:
            await tree.run()

    run(train())
    steps = records(tmp_path)
    assert [r["batch_samples"] for r in steps] == [30, 30, 30, 11] * 2
    for epoch in (0, 1):
        # the metric is the sum of the sample ids: each of 0..100 exactly once
        total = sum(r["metrics"]["sample_sum"] * r["batch_samples"] for r in steps if r["epoch"] == epoch)
        assert round(total) == 100 * 101 // 2


def test_no_step_while_paused_and_the_same_bits_after_it(run, tmp_path):
    """Pause in mid-epoch (an epoch of 1,437 samples has 15 steps)."""

    async def train() -> str:
        async with tree_of(config(), tmp_path) as tree:
            controller = tree.controller
            running = asyncio.create_task(tree.run())
            await controller.advance(5)
            assert (controller.state, controller.step) == (RunState.PAUSED, 5)
            sent = tree.tree.hub.sent_down_bytes
            await controller.advance(2)
            assert (controller.state, controller.step) == (RunState.PAUSED, 7)
            assert tree.tree.hub.sent_down_bytes > sent
            sent = tree.tree.hub.sent_down_bytes
            # what is asked for while paused is done: the loop turns, and makes no step
            await controller.save()
            assert (controller.step, len(records(tmp_path)), tree.tree.hub.sent_down_bytes) == (7, 7, sent)
            controller.resume()
            return await running

    assert run(train()) == reference(DIGITS, config()).weights_sha256


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_stopped_at_a_third_ends_in_the_same_bits_on_another_tree(optimizer, run, tmp_path):
    chosen = config(optimizer={"name": optimizer}, learning_rate=0.01, schedule={"kind": "cosine", "warmup_steps": 3})
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()

    async def train() -> str:
        async with tree_of(chosen.model_copy(update={"spheres": 5, "fan_out": 2}), first) as tree:
            running = asyncio.create_task(tree.run())
            await tree.controller.advance(4)
            tree.controller.request_stop("a third is done")
            await running
            assert (tree.controller.state, tree.controller.step) == (RunState.STOPPED, 4)
            snapshot = tree.controller.checkpoints.load()
        other = chosen.model_copy(update={"spheres": 4, "fan_out": 1})
        async with tree_of(other, second, snapshot=snapshot) as tree:
            sha256 = await tree.run()
            assert tree.controller.state is RunState.COMPLETED
            return sha256

    assert run(train()) == reference(DIGITS, chosen).weights_sha256
    assert [r["step"] for r in records(first)] == [0, 1, 2, 3]
    assert [r["step"] for r in records(second)] == list(range(4, 12))


def test_no_steps_are_a_pause_and_less_than_none_are_refused(run, tmp_path):
    async def train() -> list[int]:
        async with tree_of(config(steps=100_000), tmp_path) as tree:
            controller, seen = tree.controller, list[int]()
            running = asyncio.create_task(tree.run())
            for steps in (0, 2, 0, 0):
                await controller.advance(steps)
                assert controller.state is RunState.PAUSED
                seen.append(controller.step)
            with pytest.raises(ConfigError, match="cannot do -1 steps"):
                await controller.advance(-1)
            controller.resume()
            await controller.advance(0)  # before the loop has seen that it may go on
            await controller.advance(0)
            seen.append(controller.step)
            controller.resume()
            await controller.until(lambda: controller.state is RunState.RUNNING)
            await controller.advance(0)
            assert controller.state is RunState.PAUSED
            controller.request_stop("enough")
            await running
            return seen

    assert run(train()) == [0, 2, 2, 2, 2]


def test_a_restore_goes_back_and_the_replay_is_compared_with_the_journal(run, tmp_path):
    """N18: replayed commits carry replayed = true and have the recorded digest."""

    async def train() -> str:
        async with tree_of(config(checkpoint_every="3steps"), tmp_path) as tree:
            running = asyncio.create_task(tree.run())
            await tree.controller.advance(8)
            with pytest.raises(CheckpointError, match="no checkpoint 'step-000000004'"):
                await tree.controller.restore("step-000000004")
            assert (tree.controller.state, tree.controller.step) == (RunState.PAUSED, 8)
            await tree.controller.restore("step-000000003")
            assert (tree.controller.step, tree.tree.term) == (3, 2)
            tree.controller.resume()
            return await running

    assert run(train()) == reference(DIGITS, config()).weights_sha256
    steps = [(r["step"], r["term"], r["replayed"]) for r in records(tmp_path)]
    assert steps == [(s, 1, False) for s in range(8)] + [(s, 2, s < 8) for s in range(3, 12)]


@pytest.mark.parametrize("wire", ["shm", "inline"])
@pytest.mark.parametrize("at_fault", ["no such checkpoint", "the term cannot be raised"])
def test_a_restore_that_fails_after_an_evaluation_leaves_the_run_as_it_was(at_fault, wire, run, tmp_path):
    """Spheres hold the version since the evaluation; the next step must not count on that (N20)."""
    chosen = config(eval_every="1steps", wire=wire)

    async def train() -> str:
        async with tree_of(chosen, tmp_path) as tree:
            running = asyncio.create_task(tree.run())
            await tree.controller.advance(3)
            name = None
            if at_fault == "no such checkpoint":
                name = "step-777777777"
            else:
                await tree.controller.save()
                tree.controller._raise_term = _full
            with pytest.raises(ArmillaryError, match=r"no checkpoint|No space left on device"):
                await tree.controller.restore(name)
            tree.controller.resume()
            sha256 = await running
            assert not [r for r in records(tmp_path, "events.jsonl") if r["event"] == "sphere_lost"]
            return sha256

    assert run(train()) == reference(DIGITS, chosen).weights_sha256


def _full() -> int:
    raise ConfigError("cannot write run.json: No space left on device")


def test_a_replay_that_differs_ends_the_run(run, tmp_path):
    async def train() -> None:
        async with tree_of(config(checkpoint_every="3steps"), tmp_path) as tree:
            running = asyncio.create_task(tree.run())
            await tree.controller.advance(8)
            await tree.controller.restore("step-000000003")
            # as a machine that computes other bits would
            tree.tree.hub.weights.flat[0] = np.nextafter(tree.tree.hub.weights.flat[0], np.float32(9))
            tree.tree.hub.weights.publish(term=tree.tree.term, version=3)
            tree.controller.resume()
            await running

    with pytest.raises(CheckpointError, match="step 3 done again gave weights"):
        run(train())


def test_events_come_in_the_order_of_the_loop(run, tmp_path):
    recorder = Recorder()

    async def train() -> None:
        chosen = config(steps=16, eval_every="1epochs", checkpoint_every="1epochs")
        async with tree_of(chosen, tmp_path, callbacks=[recorder]) as tree:
            await tree.run()

    run(train())
    # a checkpoint is told when it is on disk; meanwhile steps go on
    saved = [item for item in recorder.heard if item[0] == "checkpoint"]
    assert saved == [("checkpoint", 15), ("checkpoint", 16)]
    assert recorder.heard.index(("evaluation", 15)) < recorder.heard.index(saved[0])
    assert recorder.heard.index(saved[1]) < recorder.heard.index(("train_end", 16))
    heard = [item for item in recorder.heard if not item[0].startswith("sphere_") and item not in saved]
    step = [("batch_start", 0), ("gradient_sync", 0), ("weight_update", 1), ("batch_end", 0)]
    assert heard[:6] == [("train_start", 0), ("epoch_start", 0), *step]
    tail = heard[heard.index(("batch_end", 14)) :]
    assert tail == [
        ("batch_end", 14),
        ("epoch_end", 14),
        ("evaluation", 15),
        ("epoch_start", 15),
        ("batch_start", 15),
        ("gradient_sync", 15),
        ("weight_update", 16),
        ("batch_end", 15),
        ("evaluation", 16),
        ("train_end", 16),
    ]
    assert [item[0] for item in recorder.heard[:3]] == ["sphere_joined"] * 3


def test_callbacks_come_and_go_in_mid_run_and_may_ask_for_the_end(run, tmp_path):
    class Late:
        seen: list[int] = []  # noqa: RUF012

        def on_batch_end(self, event, run):
            self.seen.append(event.step)
            if event.step == 6:
                run.request_checkpoint()
            if event.step == 8:
                run.request_stop("enough")

    async def train() -> Any:
        async with tree_of(config(checkpoint_every=None), tmp_path) as tree:
            running = asyncio.create_task(tree.controller.run())
            await tree.controller.advance(3)
            token = tree.controller.callbacks.register(Late())
            await tree.controller.advance(2)
            tree.controller.callbacks.unregister(token)
            await tree.controller.advance(1)
            tree.controller.callbacks.register(Late())
            tree.controller.resume()
            await running
            return tree.controller.state, tree.controller.reason, [c.step for c in tree.controller.checkpoints.list()]

    assert run(train()) == (RunState.STOPPED, "enough", [9, 7])
    assert Late.seen == [3, 4, 6, 7, 8]


def test_early_stopping_ends_the_run(run, tmp_path):
    chosen = config(steps=40, learning_rate=0.0, eval_every="2steps", early_stopping=3)
    from control.callbacks import configured

    async def train() -> Any:
        async with tree_of(chosen, tmp_path, callbacks=configured(chosen)) as tree:
            await tree.run()
            return tree.controller.state, tree.controller.step

    # nothing gets better at rate 0: the first evaluation is the best, three more and it stops
    assert run(train()) == (RunState.STOPPED, 8)


def test_max_time_ends_the_run_with_a_checkpoint(run, tmp_path):
    async def train() -> Any:
        async with tree_of(config(steps=100_000, max_time=0.2), tmp_path) as tree:
            await tree.run()
            return tree.controller.state, tree.controller.reason, tree.controller.checkpoints.list()[0].step

    state, reason, saved = run(train())
    assert (state, reason) == (RunState.STOPPED, "max_time of 0.2 s is over")
    assert saved == len(records(tmp_path)) > 0


def test_a_stop_while_waiting_for_spheres_ends_the_wait(run, tmp_path):
    async def train() -> Any:
        async with tree_of(config(min_spheres=5), tmp_path) as tree:
            running = asyncio.create_task(tree.controller.run())
            await tree.controller.until(lambda: tree.controller.state is RunState.INITIALIZING)
            tree.controller.request_stop("changed my mind")
            await running
            return tree.controller.state, tree.controller.step

    assert run(train()) == (RunState.STOPPED, 0)


def test_what_is_asked_of_a_run_that_ends_is_answered(run, tmp_path):
    async def train() -> None:
        async with tree_of(config(steps=1), tmp_path) as tree:
            await tree.run()
            for ask in (tree.controller.save(), tree.controller.restore(None), tree.controller.advance(1)):
                with pytest.raises(RunStateError, match="has ended"):
                    await ask
            version, flat = await tree.controller.copy_weights()
            assert version == 1
            assert flat.tobytes() == tree.tree.hub.weights.flat.tobytes()

    run(train())


class _Refuses:
    def on_sphere_lost(self, event: Any, run: Any) -> None:
        raise ValueError(f"no {event.name}")


class _RefusesToo:
    def on_sphere_joined(self, event: Any, run: Any) -> None:
        raise ValueError(f"no {event.name}")


@pytest.mark.parametrize("how", ["killed", "silent", "joined"])
def test_a_callback_that_raises_at_who_comes_or_goes_ends_the_run_and_no_link(how, run, tmp_path, monkeypatch):
    event, callback = ("sphere_joined", _RefusesToo()) if how == "joined" else ("sphere_lost", _Refuses())
    chosen = config(steps=100_000, on_callback_error="raise")

    async def train() -> None:
        async with tree_of(chosen, tmp_path, callbacks=[callback]) as tree:
            await tree.tree.wait_for(3)
            running = asyncio.create_task(tree.controller.run())
            if how != "joined":
                await tree.controller.advance(2)
                tree.controller.resume()
            if how == "killed":
                await tree.kill("s-2")
            elif how == "silent":
                silent = LinkClosedError("s-2 is silent")
                monkeypatch.setattr(Lease, "silent", lambda _lease, name, *_: silent if name == "s-2" else None)
            await running
            assert isinstance(tree.controller.error, CallbackError)
            assert f"no {event}" in str(tree.controller.error)
            assert tree.tree._keeping is not None
            assert not tree.tree._keeping.done(), "whoever else goes silent would never be noticed"

    run(train())


@pytest.mark.parametrize("when", [pytest.param("in a step", marks=pytest.mark.slow), "paused"])
def test_a_run_whose_leases_are_not_kept_any_more_ends(when, run, tmp_path, monkeypatch):
    async def train() -> None:
        async with tree_of(config(steps=100_000), tmp_path) as tree:
            running = asyncio.create_task(tree.controller.run())
            await tree.controller.advance(2)
            if when == "in a step":
                for sphere in tree.spheres.values():
                    sphere.hub.next_up = lambda: None
                tree.controller.resume()
            lease, judges = tree.tree.children._lease, Lease.judges
            monkeypatch.setattr(Lease, "judges", lambda self, now: 1 / 0 if self is lease else judges(self, now))
            await running
            assert "leases are not kept any more: ZeroDivisionError: division by zero" in str(tree.controller.error)

    run(train())


class _Large(np.ndarray):
    """There is no memory for another one."""

    def copy(self, order: Any = "C") -> Any:
        raise MemoryError


def test_no_memory_for_a_download_or_to_read_a_checkpoint_does_not_end_the_run(run, tmp_path, monkeypatch):
    chosen = config(checkpoint_every="3steps")

    async def train() -> str:
        async with tree_of(chosen, tmp_path) as tree:
            controller, weights = tree.controller, tree.tree.hub.weights
            running = asyncio.create_task(tree.run())
            await controller.advance(4)
            with monkeypatch.context() as patch:
                patch.setattr(weights, "_master", weights.flat.view(_Large))
                patch.setattr(controller.checkpoints, "load", _Large.copy)
                with pytest.raises(RefusedError, match=f"no memory for a copy of the weights .{weights.flat.nbytes} b"):
                    await controller.copy_weights()
                with pytest.raises(CheckpointError, match="no memory to read the checkpoint; the run goes on"):
                    await controller.restore(None)
            assert (controller.state, controller.step) == (RunState.PAUSED, 4)
            controller.resume()
            await running
            monkeypatch.setattr(weights, "_master", weights.flat.view(_Large))
            with pytest.raises(RefusedError, match="no memory"):
                await controller.copy_weights()
            return tree.sha256

    assert run(train()) == reference(DIGITS, chosen).weights_sha256


def test_a_restore_that_fails_half_way_ends_the_run_and_is_answered(run, tmp_path, monkeypatch):
    async def train() -> None:
        async with tree_of(config(checkpoint_every="3steps"), tmp_path) as tree:
            running = asyncio.create_task(tree.controller.run())
            await tree.controller.advance(4)
            monkeypatch.setattr(tree.controller, "load", _Large.copy)
            with pytest.raises(ArmillaryError, match="MemoryError"):
                await tree.controller.restore(None)
            await running
            assert "MemoryError" in str(tree.controller.error)
            assert tree.controller.state is RunState.ERROR

    run(train())


class _Broken:
    """Digits whose gradient goes wrong in one way from the 30th call on: in step 2."""

    def __init__(self, fault: str) -> None:
        self._fault, self._calls = fault, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(DIGITS, name)

    def gradient(self, weights, samples, rng, out):
        self._calls += 1
        sums = DIGITS.gradient(weights, samples, rng, out)
        if self._calls < 30:
            return sums
        match self._fault:
            case "raises":
                raise ZeroDivisionError("no luck")
            case "nan":
                out["layer0.bias"][3] = np.nan
            case "replaces":
                out["layer0.bias"] = np.zeros(64, np.float32)
            case "returns":
                return float(sums.loss)
            case "counts":
                return Sums(sums.loss, 0, {})
            case "loss":
                return Sums(float("nan"), sums.count, {})
        return sums


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raises", r"ZeroDivisionError: no luck"),
        ("nan", r"gradient of layer0.bias is not finite"),
        ("replaces", r"replaced out\['layer0.bias'\]; write into it"),
        ("returns", r"gradient\(\) returned float; return Sums"),
        ("counts", r"returned count 0 for \d samples: count what it was given"),
        ("loss", r"loss nan"),
    ],
)
def test_a_task_that_fails_halts_the_run_and_says_where(fault, said, run, tmp_path):
    async def train() -> Any:
        async with tree_of(config(), tmp_path, task=_Broken(fault)) as tree:
            with pytest.raises(GradientError, match=said) as caught:
                await tree.run()
            # what was committed is saved: nothing is lost
            assert [info.step for info in tree.controller.checkpoints.list()] == [2]
            return tree.controller.state, caught.value

    state, error = run(train())
    assert state is RunState.ERROR
    # sphere, step, microbatch and samples; the traceback is the sphere's own
    assert "on s-" in str(error)
    assert "microbatch" in str(error)
    assert "(samples " in str(error)
    assert "Traceback" in error.details
    if fault == "raises":
        assert 'raise ZeroDivisionError("no luck")' in error.details


def test_a_fault_of_our_own_ends_the_run_too(run, tmp_path, monkeypatch):
    """Nobody must wait for a loop that is no more."""

    async def train() -> Any:
        async with tree_of(config(), tmp_path) as tree:
            running = asyncio.create_task(tree.controller.run())
            await tree.controller.advance(2)
            monkeypatch.setattr(tree.tree.hub, "seal", lambda: 1 / 0)
            tree.controller.resume()
            await tree.controller.until(lambda: False)
            await running
            return tree.controller.state, str(tree.controller.error)

    assert run(train()) == (RunState.ERROR, "ZeroDivisionError: division by zero (not expected)")


def test_a_task_with_state_has_it_in_the_checkpoint(run, tmp_path):
    class Counting(_Broken):
        def state_dict(self):
            return {"calls": self._calls}

    async def train() -> None:
        async with tree_of(config(), tmp_path, task=Counting(""), sphere_task=lambda _: Counting("")) as tree:
            await tree.run()
            snapshot = tree.controller.checkpoints.load()
            assert [r.report.sphere_id for r in snapshot.spheres] == ["s-1", "s-2", "s-3"]
            # 12 microbatches in 12 steps, and nobody else computed them
            assert sum(json.loads(r.task_state)["calls"] for r in snapshot.spheres) == 144
            assert dict(snapshot.tree) == {"s-1": "control", "s-2": "control", "s-3": "control"}

    run(train())


def test_train_says_what_to_write_where_a_loop_is_running(run, tmp_path, recwarn):
    """As in a notebook. Nothing is begun, and no coroutine left behind."""

    async def cell() -> None:
        with pytest.raises(ArmillaryError, match=r"`await run\(config\)` there, or `async with Training\(config\)`"):
            train("digits", steps=3, spheres=1, run_dir=tmp_path / "run")

    run(cell())
    gc.collect()
    assert not recwarn.list
    assert not (tmp_path / "run").exists()
