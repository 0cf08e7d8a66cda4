"""Replay: a run proved from its directory, or the step, the block and the sphere where it went wrong.

Runs are whole trees in memory with the run directory's files; the command line is there too.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import control.replay
from control.cli import app
from control.cli.output import run as run_command
from control.config import RunConfig
from control.initial import initial_weights, node_config
from control.journal import Journal, _checked_line
from control.metrics import StepTimes, origin, step_record
from control.reference import CanonicalSum, SeenWeights, reference
from control.replay import Replay, ReplayedStep
from control.testing import LocalTree, local_tree
from control.update import Updater, master_digest
from spheres.blocks import Block
from spheres.environments import ANY
from spheres.errors import CheckpointError, ConfigError, FingerprintError
from spheres.gradients import Contribution
from spheres.numerics import crc32c
from spheres.phases import PhaseTimes
from spheres.reducer import Reducer
from spheres.summing import add_up
from spheres.testing.memory import MemoryNetwork, MemoryTransport
from spheres.testing.synthetic import Synthetic
from spheres.weights import Weights

STEPS, M, SAMPLES = 12, 12, 131


def config(**changes: Any) -> RunConfig:
    settings: dict[str, Any] = {"task": "digits", "steps": STEPS, "batch_size": 40, "microbatches": M, "spheres": 5}
    settings |= {"fan_out": 2, "chunk_bytes": 4096, "eval_every": None, "checkpoint_every": None, "keep": 9}
    settings |= {"optimizer": {"name": "adam"}, "learning_rate": 0.01}
    return RunConfig(**{**settings, **changes})


class Task(Synthetic):
    """``wrong``: from this step on one element of each gradient is another. ``nan``: step -> a sample that gives it."""

    def __init__(self, *, wrong: int | None = None, nan: dict[int, int] | None = None) -> None:
        super().__init__(parameters=4_000, samples=SAMPLES)
        self.wrong, self.nan = wrong, nan or {}

    def gradient(self, weights, samples, rng, out):
        sums = super().gradient(weights, samples, rng, out)
        step = int(rng.bit_generator.state["state"]["key"][1])
        if self.wrong is not None and step >= self.wrong:
            out["tensor1"][7] += 0.5
        if self.nan.get(step) in samples.tolist():
            out["tensor0"][0] = np.nan
        return sums


def write_run(directory: Path, config: RunConfig) -> None:
    info = {"run_id": "r-test", "term": 1, "config": config.model_dump(mode="json")}
    (directory / "run.json").write_text(json.dumps(info))


@contextlib.asynccontextmanager
async def tree_of(config: RunConfig, directory: Path, task: Any = None, **more: Any) -> AsyncIterator[LocalTree]:
    write_run(directory, config)
    network, term = MemoryNetwork(), more.pop("term", 1)
    task = task or Task()
    async with local_tree(config, task, lambda n: MemoryTransport(network, n), directory=directory, **more) as tree:
        tree.tree.term = term
        yield tree


async def trained(
    config: RunConfig, directory: Path, task: Any = None, *, save: tuple[int, ...] = (), **more: Any
) -> str:
    async with tree_of(config, directory, task, **more) as tree:
        running = asyncio.create_task(tree.run())
        for step in save:
            await tree.controller.advance(step - tree.controller.step)
            await tree.controller.save()
        tree.controller.resume()
        return await running


def replayed(directory: Path, first: int, last: int | None = None, task: Any = None, **more: Any) -> list[ReplayedStep]:
    return list(Replay(directory, first, last, task=task or Task(), **more).steps())


def change_record(directory: Path, step: int, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a record as somebody would who knows how a journal is written."""
    path = directory / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    (at,) = [n for n, line in enumerate(lines) if json.loads(line)["step"] == step]
    record = json.loads(lines[at])
    del record["crc32c"]
    change(record)
    lines[at] = _checked_line(record)
    path.write_bytes(b"".join(lines))


@pytest.mark.parametrize(("first", "last", "start"), [(0, 11, 0), (3, 3, 0), (4, 4, 4), (5, 7, 4), (11, None, 8)])
def test_a_good_run_is_proved_from_the_nearest_checkpoint(first, last, start, run, tmp_path):
    sha256 = run(trained(config(), tmp_path, save=(4, 8)))
    assert sha256 == reference(Task(), config()).weights_sha256
    made = Replay(tmp_path, first, last, task=Task())
    assert (made.start, made.notes) == (start, [])
    steps = list(made.steps())
    assert [s.step for s in steps] == list(range(start, (last or first) + 1))
    for each in steps:
        assert (each.equal, each.recorded, each.decision) == (True, each.computed, "applied")


def test_a_replay_goes_across_a_resume_on_another_tree(run, tmp_path):
    async def train() -> None:
        async with tree_of(config(), tmp_path) as tree:
            running = asyncio.create_task(tree.run())
            await tree.controller.advance(6)
            await tree.controller.save()
            await tree.controller.advance(3)
            snapshot = tree.controller.checkpoints.load("step-000000006")
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        async with tree_of(config(spheres=3, fan_out=1), tmp_path, snapshot=snapshot, term=2) as tree:
            await tree.run()

    run(train())
    # steps 6 to 8 have a record of each term: the latest is compared
    steps = replayed(tmp_path, 0, 11)
    assert [(s.step, s.term, s.equal) for s in steps if s.step < 6] == [(n, 1, True) for n in range(6)]
    assert [(s.step, s.term) for s in replayed(tmp_path, 8)] == [(6, 2), (7, 2), (8, 2)]
    change_first_of(tmp_path, 7)
    assert all(s.equal for s in replayed(tmp_path, 8))


def change_first_of(directory: Path, step: int) -> None:
    """Change the digest in the first record of a step, which a later term has done again."""
    path = directory / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    at = [n for n, line in enumerate(lines) if json.loads(line)["step"] == step]
    assert len(at) == 2
    record = json.loads(lines[at[0]])
    del record["crc32c"]
    record["weights_digest"] = "00" * 16
    lines[at[0]] = _checked_line(record)
    path.write_bytes(b"".join(lines))


def test_a_replay_goes_across_a_larger_total_with_a_schedule_that_follows_it(run, tmp_path):
    """As --resume --steps 12 does: steps from the checkpoint on are forgotten, and done again at other rates."""
    before, after = (config(steps=total, schedule={"kind": "cosine"}) for total in (8, 12))

    async def train() -> None:
        async with tree_of(before, tmp_path) as tree:
            running = asyncio.create_task(tree.run())
            await tree.controller.advance(4)
            await tree.controller.save()
            tree.controller.resume()
            await running
            snapshot = tree.controller.checkpoints.load("step-000000004")
        async with tree_of(after, tmp_path, snapshot=snapshot, term=2) as tree:
            tree.controller._journalling.journal.forget(4)
            await tree.run()

    run(train())
    made = Replay(tmp_path, 10, task=Task())
    # the last checkpoint of the first total, at step 8, is on the way no longer
    assert (made.start, len(made.notes)) == (4, 1)
    assert "step-000000008 has other weights than the journal after step 7" in made.notes[0]
    assert [(s.step, s.term, s.equal) for s in made.steps()] == [(n, 2, True) for n in range(4, 11)]
    for path in (tmp_path / "checkpoints").iterdir():
        for file in path.iterdir():
            file.unlink()
    assert [(s.step, s.term, s.equal) for s in replayed(tmp_path, 10)] == [(n, 1 + (n >= 4), True) for n in range(11)]


@pytest.mark.parametrize("policy", ["skip-microbatch", "skip-step"])
def test_a_replay_makes_the_recorded_decisions(policy, run, tmp_path):
    from spheres.sampling import Sampler

    sampler = Sampler(seed=0, size=SAMPLES, batch_size=40, microbatches=M)
    task = Task(nan={n: int(sampler.microbatch(n, 5)[0]) for n in (2, 6)})
    run(trained(config(on_nonfinite=policy), tmp_path, task, save=(4,)))
    steps = replayed(tmp_path, 0, 3, task) + replayed(tmp_path, 4, 11, task)
    assert all(s.equal for s in steps)
    skipped = "skipped_microbatches" if policy == "skip-microbatch" else "skipped_step"
    assert [s.decision for s in steps] == [skipped if n in (2, 6) else "applied" for n in range(12)]
    # a task that is finite where the run's was not, and the other way round
    *_, last = replayed(tmp_path, 0, 11, Task())
    assert (last.step, last.computed, last.equal) == (2, None, False)
    assert last.differences[0] == f"microbatch 5 of {sphere_of(tmp_path, 2, 5)} was not finite, and is here"
    *_, last = replayed(tmp_path, 0, 11, Task(nan={**task.nan, 1: int(sampler.microbatch(1, 3)[0])}))
    assert last.step == 1
    assert f"microbatch 3 of {sphere_of(tmp_path, 1, 3)} was finite, and is not here" in last.differences


def sphere_of(directory: Path, step: int, microbatch: int) -> str:
    lines = [json.loads(line) for line in (directory / "journal.jsonl").read_text().splitlines()]
    return next(who for lo, hi, who in lines[step]["contributions"] if lo <= microbatch < hi)


@pytest.mark.parametrize("culprit", ["s-1", "s-4"])  # an inner sphere, a leaf
def test_a_sphere_that_computes_something_else_is_found(culprit, run, tmp_path):
    wrong = Task(wrong=7)
    run(trained(config(), tmp_path, save=(4,), sphere_task=lambda name: wrong if name == culprit else Task()))
    steps = replayed(tmp_path, 5, 11)
    assert [(s.step, s.equal) for s in steps] == [(4, True), (5, True), (6, True), (7, False)]
    last = steps[-1]
    assert {d.sphere for d in last.blocks} == {culprit}
    for found in last.blocks:
        assert sphere_of(tmp_path, 7, found.block.lo) == culprit
    assert last.differences[0].startswith(f"block {last.blocks[0].block} of {culprit}: its gradient has checksum")
    assert last.recorded != last.computed


def test_a_run_on_another_task_or_machine_differs_in_every_block(run, tmp_path):
    run(trained(config(), tmp_path))
    (last,) = replayed(tmp_path, 0, 11, Task(wrong=0))
    assert {d.sphere for d in last.blocks} == {f"s-{n}" for n in range(1, 6)}
    assert any(line.startswith("every block differs") for line in last.differences)


def test_an_update_that_went_wrong_at_control_is_told_from_a_sum_that_did(run, tmp_path, monkeypatch):
    directories = [tmp_path / "update", tmp_path / "sum"]
    for directory in directories:
        directory.mkdir()
    apply, collect = Updater.apply, Reducer.collect

    def wrong_update(self, weights, gradient, sums, *, step, **more):
        if step == 3:
            weights.flat[5] = np.nextafter(weights.flat[5], np.float32(9))
        return apply(self, weights, gradient, sums, step=step, **more)

    with monkeypatch.context() as patched:
        patched.setattr(Updater, "apply", wrong_update)
        run(trained(config(), directories[0]))
    *_, last = replayed(directories[0], 0, 11)
    assert (last.step, last.blocks) == (3, ())
    assert last.differences[-1].startswith("the summed gradient is the recorded one: the update at control went wrong")

    def wrong_sum(self, block, index):
        value = collect(self, block, index)
        if isinstance(value, tuple) and index == 2:
            left = np.empty(1024, np.float32)
            add_up(value, left)
            left[0] += 0.5
            value = left
        return value

    with monkeypatch.context() as patched:
        patched.setattr(Reducer, "collect", wrong_sum)
        run(trained(config(optimizer={"name": "sgd"}), directories[1]))
    *_, last = replayed(directories[1], 0, 11)
    assert (last.step, last.blocks) == (0, ())
    assert last.differences[-1].startswith("every block is as its sphere computed it, their sum is not")


def test_a_changed_record_is_found(run, tmp_path):
    run(trained(config(), tmp_path))
    journal = (tmp_path / "journal.jsonl").read_bytes()

    def last(key: str, value: Any) -> ReplayedStep:
        (tmp_path / "journal.jsonl").write_bytes(journal)
        change_record(tmp_path, 5, lambda record: record.__setitem__(key, value))
        *_, found = replayed(tmp_path, 0, 11)
        assert found.step == 5
        return found

    assert "the weights' digest was 0000" in last("weights_digest", "00" * 16).differences[0]
    assert (
        "learning rate 0.02 was recorded, the run's configuration gives 0.01" in last("learning_rate", 0.02).differences
    )
    assert "the decision was skipped_step, and is applied here" in last("decision", "skipped_step").differences
    assert "the loss was 1.5" in last("loss", 1.5).differences[0]
    assert len(last("contributions_crc32c", [1] * M).blocks) > 1


def test_a_flipped_byte_in_the_journal_is_named_by_its_line(run, tmp_path):
    run(trained(config(), tmp_path, save=(4,)))
    path = tmp_path / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[5] = lines[5].replace(b'"loss":', b'"lost":')
    path.write_bytes(b"".join(lines))
    with pytest.raises(ConfigError, match=r"no record of step 5 in .*journal.jsonl; line 6 does not fit its checksum"):
        replayed(tmp_path, 5)
    # on the way to others it is computed, and compared with nothing
    steps = replayed(tmp_path, 6, 11)
    assert [(s.step, s.recorded is None, s.equal) for s in steps[:3]] == [
        (4, False, True),
        (5, True, True),
        (6, False, True),
    ]


def test_what_stands_in_the_way_is_a_clear_error(run, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="holds no run; name one with --run-dir"):
        Replay(tmp_path, 0)
    write_run(tmp_path, config())
    with pytest.raises(ConfigError, match=r"cannot read .*journal.jsonl: No such file"):
        Replay(tmp_path, 0, task=Task())
    run(trained(config(), tmp_path, save=(4,)))
    for first, last, said in ((12, None, "step 12"), (3, 40, "step 40")):
        with pytest.raises(ConfigError, match=f"no {said} in .*journal.jsonl: it has steps 0 to 11"):
            Replay(tmp_path, first, last, task=Task())
    with pytest.raises(ConfigError, match="there are no steps 5 to 3"):
        Replay(tmp_path, 5, 3)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"run.json is broken"):
        Replay(tmp_path, 5)

    class Other(Task):
        def data_fingerprint(self) -> str:
            return "other"

    write_run(tmp_path, config())
    with pytest.raises(FingerprintError, match=r"the data are not the run's: fingerprint \w+, recorded \w+; put back"):
        Replay(tmp_path, 5, task=Other())
    made = Replay(tmp_path, 5, task=Other(), anyway=True)
    assert "the data are not the run's" in made.notes[0]
    assert all(s.equal for s in made.steps())
    monkeypatch.setattr(control.replay, "describe", lambda: {"numpy": "9.9"})
    assert "this machine is not the run's, and may compute other bits: " in Replay(tmp_path, 5, task=Task()).notes[0]


def test_without_a_checkpoint_or_the_first_weights_there_is_no_replay(run, tmp_path):
    from safetensors.numpy import save_file

    first = tmp_path / "first.safetensors"
    save_file(Task().init_weights(np.random.default_rng(5)), first)
    chosen = config(init_from=first)
    run(trained(chosen, tmp_path, save=(4,)))
    assert all(s.equal for s in replayed(tmp_path, 0, 11))
    first.unlink()
    assert all(s.equal for s in replayed(tmp_path, 4, 11))
    with pytest.raises(CheckpointError, match="no checkpoint at or before step 3, and the initial weights cannot be"):
        replayed(tmp_path, 3)


def test_a_broken_checkpoint_is_passed_over(run, tmp_path):
    run(trained(config(), tmp_path, save=(4, 8)))
    control_pb = tmp_path / "checkpoints" / "step-000000008" / "control.pb"
    data = bytearray(control_pb.read_bytes())
    data[-100] ^= 1
    control_pb.write_bytes(data)
    made = Replay(tmp_path, 9, task=Task())
    assert (made.start, len(made.notes)) == (4, 1)
    assert "passed over: checkpoint" in made.notes[0]
    assert all(s.equal for s in made.steps())


# ---- the command


@pytest.fixture
def digits(run, tmp_path):
    from spheres.task import load_task

    chosen = config(batch_size=60, chunk_bytes=1 << 20)
    run(trained(chosen, tmp_path, load_task("digits"), save=(4,)))
    return tmp_path


def test_the_command_proves_steps(digits, capsys):
    assert run_command(app, ["replay", "--run-dir", str(digits), "--step", "5", "--until", "7"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"from checkpoint {digits}/checkpoints/step-000000004, 4 steps to compute"
    records = [json.loads(line) for line in (digits / "journal.jsonl").read_text().splitlines()]
    assert lines == [f"step {n}: as recorded in term 1, weights {records[n]['weights_digest']}" for n in (5, 6, 7)]
    assert run_command(app, ["replay", "--run-dir", str(digits), "--step", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["equal"], found["from"], found["notes"]) == (True, {"step": 0, "checkpoint": None}, [])
    assert [s["step"] for s in found["steps"]] == [2]


def test_the_command_says_where_it_went_wrong(digits, capsys):
    change_record(digits, 6, lambda record: record["contributions_crc32c"].__setitem__(1, 77))
    sphere = json.loads((digits / "journal.jsonl").read_text().splitlines()[6])["contributions"][1]
    assert run_command(app, ["replay", "--run-dir", str(digits), "--step", "8"]) == 1
    out = capsys.readouterr().out
    assert "step 6: not as recorded in term 1\n" in out
    assert f"block [{sphere[0]},{sphere[1]}) of {sphere[2]}: its gradient has checksum 0000004d in the journal" in out
    assert run_command(app, ["replay", "--run-dir", str(digits), "--step", "8", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    (last,) = found["steps"]
    assert (found["equal"], last["step"], last["blocks"][0]["sphere"]) == (False, 6, sphere[2])


def test_the_command_has_the_exit_codes_of_its_errors(digits, capsys):
    for words, code, said in (
        (["--run-dir", str(digits / "none"), "--step", "1"], 2, "holds no run"),
        (["--run-dir", str(digits), "--step", "99"], 2, "it has steps 0 to 11"),
        (["--run-dir", str(digits)], 2, "Missing option '--step'"),
    ):
        assert run_command(app, ["replay", *words]) == code
        assert said in capsys.readouterr().err


# ---- types on the wire


NARROW = {"wire_dtype": "bfloat16", "weights_wire_dtype": "bfloat16"}


def written_down(config: RunConfig, directory: Path, *, nudge: int = -1) -> str:
    """Train in one loop and write the journal of it; return the weights' SHA-256.

    After step ``nudge`` the last bit of one of control's own weights is another one, which rounding swallows.
    """
    write_run(directory, config)
    task = Task()
    manifest, flat = initial_weights(task, config)
    node = node_config(task, config, manifest, run_id="r-test")
    weights, updater = Weights(node), Updater(config, manifest, STEPS)
    weights.flat[:] = flat
    seen = SeenWeights(manifest, weights.flat, node.weights_dtype)
    add, journal = CanonicalSum(node, task, seen.views), Journal(directory / "journal.jsonl")
    for step in range(STEPS):
        summed = add(step, Block(0, M))
        parts = [Contribution(Block(0, M), "s-1", crc32c(summed.array))]
        update = updater.apply(weights, summed.array, summed.sums, step=step, term=1)
        if step == nudge:
            weights.flat.view(np.uint32)[5] ^= 1
            weights.publish(term=1, version=step + 1)
            update = replace(update, master_digest=master_digest(config, manifest, weights.flat))
        seen.refresh()
        add.release(summed)
        made = {"sums": summed.sums, "skipped": (), "update": update, "digest": weights.digest}
        made |= {"times": StepTimes(0.0, 0.0, 0.0), "phases": PhaseTimes(), "spheres": 1, "contributions": parts}
        made |= {"environments": ANY, "moved": 0}
        record = step_record(step, term=1, sampler=node.sampler, attempts=0, bytes_up=0, bytes_down=0, **made)
        journal.append({**record, "origin": origin(config, node)} if step == 0 else record)
    journal.close()
    return manifest.sha256(weights.flat)


@pytest.mark.parametrize("types", [{}, {"wire_dtype": "bfloat16"}, {"weights_wire_dtype": "bfloat16"}, NARROW])
def test_a_run_of_narrower_types_is_proved_to_the_last_bit(types, tmp_path):
    chosen = config(**types)
    sha256 = written_down(chosen, tmp_path)
    assert sha256 == reference(Task(), chosen).weights_sha256
    assert types == {} or sha256 != reference(Task(), config()).weights_sha256
    steps = replayed(tmp_path, 0, 11)
    assert [(s.step, s.differences) for s in steps] == [(n, ()) for n in range(STEPS)]
    records = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert all(("master_digest" in record) == ("weights_wire_dtype" in types) for record in records)
    assert [s.recorded for s in steps] == [r.get("master_digest", r["weights_digest"]) for r in records]


def test_a_bit_of_the_masters_weights_that_rounding_swallows_is_found(tmp_path):
    written_down(config(**NARROW), tmp_path, nudge=3)
    *_, last = replayed(tmp_path, 0, 11)
    assert (last.step, last.blocks) == (3, ())
    assert last.differences[0].startswith("the weights' digest was ")
    assert last.differences[-1].startswith("the summed gradient is the recorded one: the update at control went wrong")


def test_what_spheres_saw_is_compared_too(tmp_path):
    written_down(config(**NARROW), tmp_path)
    change_record(tmp_path, 5, lambda record: record.__setitem__("weights_digest", "00" * 16))
    *_, last = replayed(tmp_path, 0, 11)
    assert last.step == 5
    assert last.differences[0].startswith("the digest of what spheres saw was 0000")


def test_rounded_gradients_of_one_sphere_are_those_of_the_reference(run, tmp_path):
    chosen = config(spheres=1, wire_dtype="bfloat16")
    sha256 = run(trained(chosen, tmp_path, save=(4,)))
    assert sha256 == reference(Task(), chosen).weights_sha256
    assert all(s.equal for s in replayed(tmp_path, 5, 11))


def test_a_run_that_goes_on_can_be_replayed(run, tmp_path):
    """Nothing is locked or written: what is in the journal by now is compared."""

    async def train() -> list[ReplayedStep]:
        async with tree_of(config(), tmp_path) as tree:
            running = asyncio.create_task(tree.run())
            await tree.controller.advance(6)
            before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
            steps = await asyncio.to_thread(replayed, tmp_path, 5)
            assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
            tree.controller.resume()
            await running
            return steps

    steps = run(train())
    assert [(s.step, s.equal) for s in steps] == [(n, True) for n in range(6)]
