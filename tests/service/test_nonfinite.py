"""Gradients that are not finite (N16): one decision for all, the same bits on every tree, after a loss and a resume."""

import asyncio
import contextlib
import json
import logging
import math
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from control.config import RunConfig
from control.gradients import MOST_SKIPPED_STEPS
from control.initial import initial_weights, node_config
from control.reference import reference
from control.run_state import RunState
from control.testing import LocalTree, local_tree
from spheres.errors import ArmillaryError, ConfigError, GradientError
from spheres.sampling import Sampler
from spheres.task import Sums
from spheres.testing.memory import MemoryNetwork, MemoryTransport
from spheres.testing.synthetic import Synthetic

M, BATCH, SAMPLES = 11, 40, 131
STEPS = 6
SHAPES = [(1, 12), (3, 1), (5, 2), (6, 12)]
SKIPS = ["skip-microbatch", "skip-step"]


class Poisoned(Synthetic):
    """Gives what is not finite for the named samples, in the named steps only."""

    def __init__(self, poison: dict[int, Iterable[int]], how: str = "nan", parameters: int = 9_000) -> None:
        super().__init__(parameters=parameters, samples=SAMPLES)
        self.poison = {step: set(samples) for step, samples in poison.items()}
        self.how = how

    def gradient(self, weights, samples, rng, out):
        sums = super().gradient(weights, samples, rng, out)
        step = int(rng.bit_generator.state["state"]["key"][1])
        if not self.poison.get(step, set()) & set(samples.tolist()):
            return sums
        match self.how:
            case "nan" | "inf":
                out["tensor1"][-1] = float(self.how)
            case "huge":  # finite, but two of them are not
                out["tensor1"][-1] = 3e38
            case "loss":
                return Sums(math.inf, sums.count, sums.metrics)
            case "metric":
                return Sums(sums.loss, sums.count, {"sample_sum": math.nan})
        return sums


def config(policy: str, **changes: Any) -> RunConfig:
    settings: dict[str, Any] = {"task": "digits", "steps": STEPS, "batch_size": BATCH, "microbatches": M, "spheres": 3}
    small = {"chunk_bytes": 4096, "window_chunks": 2, "eval_every": None, "checkpoint_every": None}
    adam = {"optimizer": {"name": "adam"}, "learning_rate": 0.01}
    return RunConfig(**{**settings, **small, **adam, "on_nonfinite": policy, **changes})


def samples_of(step: int, *microbatches: int, seed: int = 0) -> list[int]:
    """The first sample of each of the microbatches."""
    sampler = Sampler(seed=seed, size=SAMPLES, batch_size=BATCH, microbatches=M)
    return [int(sampler.microbatch(step, index)[0]) for index in microbatches]


def left_out() -> dict[int, list[int]]:
    """Step -> microbatches: alone, neighbours, first, last, and a whole step."""
    return {0: [4], 1: [0, 1, 10], 2: [], 4: list(range(M))}


def poisoned(how: str = "nan") -> Poisoned:
    return Poisoned({step: samples_of(step, *which) for step, which in left_out().items()}, how)


@contextlib.asynccontextmanager
async def tree_of(config: RunConfig, task: Any, directory: Path, **more: Any) -> AsyncIterator[LocalTree]:
    network = MemoryNetwork()
    transport = more.pop("transport", lambda name: MemoryTransport(network, name))
    async with local_tree(config, task, transport, directory=directory, **more) as tree:
        yield tree


def records(directory: Path, name: str = "journal.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


async def trained(config: RunConfig, task: Any, directory: Path, **more: Any) -> str:
    async with tree_of(config, task, directory, **more) as tree:
        return await tree.run()


@pytest.mark.parametrize("policy", SKIPS)
@pytest.mark.parametrize(("spheres", "fan_out"), SHAPES)
def test_a_tree_that_skips_gives_the_reference_loops_bits(policy, spheres, fan_out, run, tmp_path):
    chosen, task = config(policy, spheres=spheres, fan_out=fan_out), poisoned()
    expected = reference(task, chosen)
    assert run(trained(chosen, task, tmp_path)) == expected.weights_sha256
    # and what is skipped matters: without the poison the bits are others
    assert expected.weights_sha256 != reference(Poisoned({}), chosen).weights_sha256
    steps = records(tmp_path)
    assert [r["decision"] for r in steps] == [str(outcome) for outcome in expected.outcomes]
    assert [[v["microbatch"] for v in r["nonfinite"]] for r in steps] == [left_out().get(s, []) for s in range(STEPS)]
    part = "skipped_microbatches" if policy == "skip-microbatch" else "skipped_step"
    assert [r["decision"] for r in steps] == [part, part, "applied", "applied", "skipped_step", "applied"]
    for record in steps:
        assert record["weights_version"] == record["step"] + 1
        who = {index: sphere for lo, hi, sphere in record["contributions"] for index in range(lo, hi)}
        for verdict in record["nonfinite"]:
            assert verdict["sphere"] == who[verdict["microbatch"]]
            assert verdict["tensors"] == ["tensor1"]
            assert samples_of(record["step"], verdict["microbatch"]) == verdict["samples"][:1]


@pytest.mark.parametrize("how", ["inf", "loss", "metric"])
def test_a_loss_or_metric_that_is_not_finite_counts_as_a_gradient_that_is_not(how, run, tmp_path):
    chosen = config("skip-microbatch")
    assert run(trained(chosen, poisoned(how), tmp_path)) == reference(poisoned("nan"), chosen).weights_sha256
    named = {"inf": "tensor1", "loss": "(loss)", "metric": "(metric sample_sum)"}[how]
    assert records(tmp_path)[0]["nonfinite"][0]["tensors"] == [named]


def test_the_mean_is_over_the_samples_that_are_left(run, tmp_path):
    """The reference's skipping held to arithmetic written down once more, by hand."""
    chosen, task = config("skip-microbatch", steps=1, optimizer={"name": "sgd", "momentum": 0.0}), poisoned()
    manifest, flat = initial_weights(task, chosen)
    node = node_config(task, chosen, manifest, run_id="")
    views, total, count = manifest.views(flat.copy()), None, 0
    parts: list[np.ndarray | None] = []
    for index in range(M):
        out = np.zeros_like(flat)
        samples = node.sampler.microbatch(0, index)
        Synthetic.gradient(task, views, samples, node.sampler.generator(0, index), manifest.views(out))
        parts.append(None if index == 4 else out)
        count += 0 if index == 4 else samples.size

    def add(*pair: np.ndarray | None) -> np.ndarray | None:
        there = [each for each in pair if each is not None]
        return there[0] + there[1] if len(there) == 2 else there[0] if there else None

    while len(parts) > 1:  # neighbours of neighbours: the canonical tree from below
        parts = [add(*parts[at : at + 2]) for at in range(0, len(parts), 2)]
    (total,) = parts
    assert total is not None
    expected = flat - np.float32(0.01) * (total * np.float32(1 / count))
    assert run(trained(chosen, task, tmp_path)) == manifest.sha256(expected)
    assert records(tmp_path)[0]["used_samples"] == count == BATCH - 4


@pytest.mark.parametrize("policy", SKIPS)
def test_a_skipped_step_moves_the_version_and_nothing_else(policy, run, tmp_path):
    chosen = config(policy)

    async def train() -> None:
        async with tree_of(chosen, poisoned(), tmp_path) as tree:
            running = asyncio.create_task(tree.run())
            await tree.controller.advance(4)
            optimizer = tree.controller._renewal.updater.optimizer
            before = optimizer.count, {name: each.tobytes() for name, each in optimizer.state().items()}
            digest, version = tree.tree.hub.weights.digest, tree.tree.hub.weights.version
            await tree.controller.advance(1)
            assert (optimizer.count, {name: each.tobytes() for name, each in optimizer.state().items()}) == before
            weights = tree.tree.hub.weights
            assert (weights.version, weights.digest, version) == (5, digest, 4)
            assert tree.controller.step == 5
            tree.controller.resume()
            await running
            skipped = {"skip-step": (3.0, None), "skip-microbatch": (1.0, 4.0)}[policy]
            counts = [tree.controller.metrics.get(f"skipped_{what}") for what in ("steps", "microbatches")]
            assert tuple(counts) == skipped

    run(train())
    record = records(tmp_path)[4]
    assert (record["loss"], record["metrics"], record["used_samples"]) == (None, {}, 0)
    assert record["gradient"] == {"norm": None, "clipped": False}
    assert record["weights_digest"] == records(tmp_path)[3]["weights_digest"]
    assert record["batch_samples"] > 0  # they are consumed: the next step has the next ones


@pytest.mark.parametrize("policy", SKIPS)
def test_a_leaf_that_dies_in_the_step_with_the_verdict(policy, run, tmp_path):
    """The microbatch is computed again elsewhere and gives the same verdict."""
    from spheres.frames import decode
    from spheres.transport import Link, Rpc
    from spheres.v1 import work_pb2 as pb

    reached = asyncio.Event()

    class SilentAfterVerdict(MemoryTransport):
        async def dial(self, address: str, rpc: Rpc) -> Link:
            link = await super().dial(address, rpc)
            real = link.send

            async def send(message: bytes) -> None:
                frame = decode(pb.WorkRequest, message) if rpc is Rpc.WORK else None
                if frame is not None and (reached.is_set() or len(frame.gradient_header.skipped)):
                    reached.set()
                    await asyncio.get_running_loop().create_future()
                await real(message)

            link.send = send  # type: ignore[method-assign]
            return link

    chosen = config(policy, spheres=6, fan_out=2)
    task = Poisoned({1: samples_of(1, *range(M)), 3: samples_of(3, 2, 6)})
    network = MemoryNetwork()

    async def train() -> str:
        kinds = {"s-5": SilentAfterVerdict}

        def transport(name):
            return kinds.get(name, MemoryTransport)(network, name)

        async with tree_of(chosen, task, tmp_path, transport=transport) as tree:
            running = asyncio.create_task(tree.run())
            await reached.wait()
            assert tree.controller.step == 1
            await tree.kill("s-5")
            return await running

    assert run(train()) == reference(task, chosen).weights_sha256
    steps = records(tmp_path)
    assert [v["microbatch"] for v in steps[1]["nonfinite"]] == list(range(M))
    assert "s-5" not in {v["sphere"] for v in steps[1]["nonfinite"]}


def test_halt_names_sphere_tensor_microbatch_and_samples(run, tmp_path):
    task = Poisoned({2: samples_of(2, 7)})
    samples = ", ".join(map(str, Sampler(seed=0, size=SAMPLES, batch_size=BATCH, microbatches=M).microbatch(2, 7)))
    said = rf"on s-\d in step 2, microbatch 7 \(samples {samples}\): the gradient of tensor1 is not finite"

    async def train() -> Any:
        async with tree_of(config("halt"), task, tmp_path) as tree:
            with pytest.raises(GradientError, match=said):
                await tree.run()
            return tree.controller.step

    assert run(train()) == 2
    with pytest.raises(GradientError, match="the gradient of tensor1 is not finite"):
        reference(task, config("halt"))


@pytest.mark.parametrize("policy", ["halt", *SKIPS])
def test_a_sum_that_overflows_skips_the_step_or_halts(policy, run, tmp_path):
    chosen, task = config(policy), Poisoned({1: range(SAMPLES)}, "huge")

    async def train() -> str:
        async with tree_of(chosen, task, tmp_path) as tree:
            return await tree.run()

    if policy == "halt":
        with pytest.raises(GradientError, match="summed gradient of step 1 is not finite, though each microbatch's is"):
            run(train())
        with pytest.raises(GradientError, match="summed gradient of step 1 is not finite"):
            reference(task, chosen)
        return
    assert run(train()) == reference(task, chosen).weights_sha256
    record = records(tmp_path)[1]
    assert (record["decision"], record["nonfinite"]) == ("skipped_step", [])
    (event,) = [e for e in records(tmp_path, "events.jsonl") if e["event"] == "nonfinite"]
    assert event["reason"] == "the sum of gradients and losses that are finite is not"


@pytest.mark.parametrize("policy", SKIPS)
def test_a_run_that_only_skips_ends_with_a_clear_error(policy, run, tmp_path, caplog):
    chosen = config(policy, steps=300)
    task = Poisoned(dict.fromkeys(range(3, 300), range(SAMPLES)), parameters=200)

    async def train() -> Any:
        async with tree_of(chosen, task, tmp_path) as tree:
            with (
                caplog.at_level(logging.WARNING, "control.telling"),
                pytest.raises(
                    GradientError,
                    match=r"100 steps in a row were skipped, up to step 102: microbatch 0 of s-\d is",
                ),
            ):
                await tree.run()
            return tree.controller.step, tree.controller.state, tree.controller.checkpoints.list()[0].step

    step = 3 + MOST_SKIPPED_STEPS
    assert run(train()) == (step, RunState.ERROR, step)
    assert len(records(tmp_path)) == step
    with pytest.raises(GradientError, match="100 steps in a row"):
        reference(task, chosen)
    # loud, but not once per step: at the 1st, 2nd, 4th ... 64th
    said = [r.getMessage() for r in caplog.records if "so far" in r.getMessage()]
    assert [message.split("(")[0] for message in said] == [
        f"step {n + 2}: skipped_step " for n in (1, 2, 4, 8, 16, 32, 64)
    ]
    assert sum(e["event"] == "nonfinite" for e in records(tmp_path, "events.jsonl")) == 100


@pytest.mark.parametrize("policy", SKIPS)
@pytest.mark.parametrize("at", [1, 5])
def test_a_resumed_run_makes_the_same_decisions(policy, at, run, tmp_path):
    chosen, task = config(policy), poisoned()

    async def train() -> str:
        async with tree_of(chosen, task, tmp_path) as tree:
            running = asyncio.create_task(tree.run())
            await tree.controller.advance(at)
            await tree.controller.save()
            tree.controller.resume()
            sha256 = await running
            counts = {k: v for k, v in tree.controller.metrics.items() if k.startswith("skipped")}
            snapshot = tree.controller.checkpoints.load(f"step-{at:09d}")
        other = config(policy, spheres=5, fan_out=2)
        async with tree_of(other, task, tmp_path, snapshot=snapshot) as tree:
            assert await tree.run() == sha256
            assert {k: v for k, v in tree.controller.metrics.items() if k.startswith("skipped")} == counts
        return sha256

    assert run(train()) == reference(task, chosen).weights_sha256
    steps = records(tmp_path)
    again = [r for r in steps if r["replayed"]]
    assert [r["step"] for r in again] == list(range(at, STEPS))
    for record in again:
        first = steps[record["step"]]
        assert [record[key] for key in ("decision", "weights_digest")] == [
            first[k] for k in ("decision", "weights_digest")
        ]


def test_a_run_that_halted_may_go_on_by_skipping_and_no_other_way_round():
    from control.config import compare_identity, identity

    compare_identity(identity(config("halt")), identity(config("skip-step")))
    for before, now in (("skip-step", "halt"), ("skip-step", "skip-microbatch"), ("skip-microbatch", "halt")):
        with pytest.raises(ConfigError, match=f"on_nonfinite is {now} now and was {before}"):
            compare_identity(identity(config(before)), identity(config(now)))


def test_callbacks_hear_of_it_between_the_journal_and_the_next_step(run, tmp_path):
    heard: list[Any] = []

    class Listens:
        def on_nonfinite(self, event, run):
            heard.append((event.name, event.step, event.record["decision"], len(records(tmp_path)), run.step))

        def on_weight_update(self, event, run):
            heard.append(event.name)

    run(trained(config("skip-step", steps=2), Poisoned({1: samples_of(1, 3)}), tmp_path, callbacks=[Listens()]))
    assert heard == ["weight_update", ("nonfinite", 1, "skipped_step", 2, 2), "weight_update"]


def test_a_disk_that_is_full_leaves_no_checkpoint_of_a_step_that_was_not_committed(run, tmp_path, monkeypatch):
    """N18: the update is done, its record is not durable: these weights are those of no step."""
    from control.journal import Journal

    chosen, task = config("halt"), Poisoned({})
    append = Journal.append

    def full(journal: Journal, record: Any) -> None:
        if record["step"] == 3:
            raise ArmillaryError("cannot write journal.jsonl: No space left on device; make room, then go on")
        append(journal, record)

    async def train() -> str:
        async with tree_of(chosen, task, tmp_path) as tree:
            running = asyncio.create_task(tree.controller.run())
            await tree.controller.advance(2)
            await tree.controller.save()
            with monkeypatch.context() as patched:
                patched.setattr(Journal, "append", full)
                tree.controller.resume()
                await running
            assert (tree.controller.state, tree.controller.step) == (RunState.ERROR, 3)
            assert [info.step for info in tree.controller.checkpoints.list()] == [2]
            snapshot = tree.controller.checkpoints.load()
        async with tree_of(chosen, task, tmp_path, snapshot=snapshot) as tree:
            return await tree.run()

    assert run(train()) == reference(task, chosen).weights_sha256
    assert [r["step"] for r in records(tmp_path)] == [0, 1, 2, 2, 3, 4, 5]


@pytest.mark.processes
def test_what_was_not_committed_is_no_result_either(run, tmp_path, monkeypatch):
    """The weights in memory are a step ahead of the journal: they are neither written nor named."""
    from control.journal import Journal
    from control.training import run as run_training

    append = Journal.append

    def full(journal: Journal, record: Any) -> None:
        if record["step"] == 3:
            raise ArmillaryError("cannot write journal.jsonl: No space left on device; make room, then go on")
        append(journal, record)

    monkeypatch.setattr(Journal, "append", full)
    settings = config("halt", spheres=1, run_dir=tmp_path / "run")
    summary = run(run_training(settings))
    assert (summary.state, summary.steps, summary.weights_sha256) == ("error", 3, "")
    assert "No space left" in str(summary.error)
    assert not (tmp_path / "run" / "weights.safetensors").exists()
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
