"""Saving beside the steps of a run: what goes on, what waits, what a fault of the disk or a kill does to it.

Run as a script it is the control that is killed in the midst of a save: RUN_DIR POINT.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from control.checkpoint import Checkpoints, verify
from control.config import RunConfig
from control.position import Copies
from control.reference import reference
from control.run_state import RunState
from control.saver import Saver
from control.snapshot import Snapshot
from control.store_memory import MemoryStore
from control.testing import LocalTree, local_tree
from spheres.config import manifest_to_proto
from spheres.errors import ArmillaryError, CheckpointError, RunStateError
from spheres.task import load_task
from spheres.tensors import Manifest
from spheres.testing.memory import MemoryNetwork, MemoryTransport
from spheres.v1.checkpoint_pb2 import RunRecord, SphereRecord

DIGITS = load_task("digits")
SECONDS = 20.0


def config(**changes: Any) -> RunConfig:
    return RunConfig(
        **{
            "task": "digits", "steps": 12, "batch_size": 100, "microbatches": 8, "spheres": 2, "eval_every": None,
            "checkpoint_every": "2steps", **changes,
        }
    )  # fmt: skip


@contextlib.asynccontextmanager
async def tree_of(
    chosen: RunConfig, directory: Path, checkpoints: Checkpoints, **more: Any
) -> AsyncIterator[LocalTree]:
    network = MemoryNetwork()
    async with local_tree(chosen, DIGITS, lambda n: MemoryTransport(network, n), directory=directory, **more) as tree:
        tree.controller._saver.checkpoints = checkpoints
        yield tree


def lines(directory: Path, name: str, event: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (directory / name).read_text().splitlines()]
    return [record for record in records if record["event"] == event]


class Held:
    """A fault point at which the first save waits until it is let go on."""

    def __init__(self, point: str) -> None:
        self._point = point
        self._go = threading.Event()
        self.reached = threading.Event()

    def __call__(self, point: str) -> None:
        if point == self._point and not self.reached.is_set():
            self.reached.set()
            assert self._go.wait(SECONDS)

    def let_go(self) -> None:
        self._go.set()


@pytest.fixture
def held() -> Iterator[Held]:
    held = Held("save.file.control.pb.opened")
    yield held
    held.let_go()


def weights_after(steps: int) -> str:
    return reference(DIGITS, config(steps=steps)).weights_sha256


# --- steps go on


def test_steps_go_on_while_a_checkpoint_is_saved_and_it_holds_what_was_copied(run, tmp_path, held):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=9, fault=held)

    async def train() -> str:
        async with tree_of(config(), tmp_path, checkpoints) as tree:
            controller = tree.controller
            running = asyncio.create_task(tree.run())
            await controller.advance(9)
            # seven steps, and three checkpoints that were due, since the save of step 2 began
            assert (controller.step, controller.state) == (9, RunState.PAUSED)
            assert await asyncio.to_thread(held.reached.wait, SECONDS)  # steps may be faster than the disk
            assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == [".draft-step-000000002"]
            assert lines(tmp_path, "events.jsonl", "checkpoint") == []
            held.let_go()
            controller.resume()
            return await running

    assert run(train()) == weights_after(12)
    found = {info.step: info.weights_sha256 for info in checkpoints.list()}
    assert found[2] == weights_after(2)
    assert found[12] == weights_after(12)
    assert not {4, 6, 8} & found.keys()
    assert all(verify(tmp_path / "checkpoints" / f"step-{step:09d}") == [] for step in found)


def test_the_stall_is_that_of_the_copy_and_stands_in_events_and_journal(run, tmp_path, monkeypatch):
    copying = Copies.of
    taken: list[int] = []

    def slow_copy(self: Copies, snapshot: Snapshot) -> Snapshot:
        taken.append(snapshot.run.step)
        assert threading.Event().wait(0.05) is False  # the copy of a large model
        return copying(self, snapshot)

    monkeypatch.setattr(Copies, "of", slow_copy)
    states: list[RunState] = []

    async def train() -> None:
        checkpoints = Checkpoints(tmp_path / "checkpoints", keep=9, fault=lambda _: states.append(controller.state))
        async with tree_of(config(), tmp_path, checkpoints) as tree:
            controller = tree.controller
            await tree.run()

    run(train())
    assert set(states) == {RunState.RUNNING}  # "checkpointing" is while the copy is taken
    saved = lines(tmp_path, "events.jsonl", "checkpoint")
    # where the one before took until the end, the last is saved without a copy
    assert [record["step"] for record in saved if record["step"] in {*taken, *range(12)}] == taken
    assert all(
        record["ok"] and record["seconds"] > record["stall_seconds"] >= 0.05
        for record in saved
        if record["step"] in taken
    )
    stalls = {r["step"]: r["seconds"].get("checkpoint_stall") for r in lines(tmp_path, "journal.jsonl", "step")}
    # in the record of the step that had to wait: the one after the copy
    assert {step for step, stall in stalls.items() if stall} == {step for step in taken if step < 12}
    assert all(stalls[r["step"]] == r["stall_seconds"] for r in saved if r["step"] < 12)


def test_a_sphere_that_does_not_answer_stops_no_step(run, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=9)

    async def train() -> str:
        async with tree_of(config(), tmp_path, checkpoints) as tree:
            answer = asyncio.Event()

            async def states(timeout: float) -> list[Any]:
                await answer.wait()
                return []

            monkeypatch.setattr(tree.tree, "states", states)
            running = asyncio.create_task(tree.run())
            await tree.controller.advance(9)
            assert checkpoints.list() == []
            answer.set()
            tree.controller.resume()
            return await running

    assert run(train()) == weights_after(12)
    assert {2, 12} <= {info.step for info in checkpoints.list()}
    assert checkpoints.load("step-000000002").spheres == []


# --- one at a time


def test_one_that_is_asked_for_waits_its_turn_and_returns_when_it_is_on_disk(run, tmp_path, held):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=9, fault=held)

    async def train() -> None:
        async with tree_of(config(), tmp_path, checkpoints) as tree:
            controller = tree.controller
            running = asyncio.create_task(tree.run())
            await controller.advance(5)
            asked = [asyncio.create_task(controller.save()) for _ in range(3)]
            gone = asyncio.create_task(controller.save())
            await asyncio.to_thread(held.reached.wait, SECONDS)
            gone.cancel()
            await asyncio.wait({gone})
            assert not any(task.done() for task in asked)
            held.let_go()
            infos = await asyncio.gather(*asked)
            # one save for all who asked meanwhile
            assert [info.step for info in infos] == [5, 5, 5]
            assert controller.latest_checkpoint == infos[0]
            assert [info.step for info in checkpoints.list()] == [5, 2]
            assert [r["step"] for r in lines(tmp_path, "events.jsonl", "checkpoint")] == [2, 5]
            controller.resume()
            await running
            with pytest.raises(RunStateError, match="the run is completed and has ended"):
                await controller.save()

    run(train())


def test_a_stop_waits_for_the_save_under_way_and_then_for_its_own(run, tmp_path, held):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=9, fault=held)

    async def train() -> None:
        async with tree_of(config(), tmp_path, checkpoints) as tree:
            controller = tree.controller
            running = asyncio.create_task(tree.run())
            await controller.advance(5)
            controller.request_stop("enough")
            controller.resume()
            await asyncio.to_thread(held.reached.wait, SECONDS)
            assert not controller.state.ended
            held.let_go()
            await running
            assert (controller.state, controller.step) == (RunState.STOPPED, 5)

    run(train())
    assert [info.step for info in checkpoints.list()] == [5, 2]


def test_a_loop_that_is_cancelled_leaves_no_thread_that_writes(run, tmp_path, held):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=9, fault=held)

    async def train() -> None:
        async with tree_of(config(), tmp_path, checkpoints) as tree:
            running = asyncio.create_task(tree.controller.run())
            await tree.controller.advance(5)
            running.cancel()
            await asyncio.to_thread(held.reached.wait, SECONDS)
            assert not running.done()
            held.let_go()
            await asyncio.wait({running})
            assert running.cancelled()

    run(train())
    assert [info.step for info in checkpoints.list()] == [2]


def test_a_restore_waits_for_the_save_under_way(run, tmp_path, held):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=9, fault=held)

    async def train() -> str:
        async with tree_of(config(), tmp_path, checkpoints) as tree:
            controller = tree.controller
            running = asyncio.create_task(tree.run())
            await controller.advance(5)
            restoring = asyncio.create_task(controller.restore(None))
            await controller.until(lambda: controller.state is RunState.RESTORING)
            held.let_go()
            await restoring
            assert controller.step == 2  # it is the newest, now that it is there
            controller.resume()
            return await running

    assert run(train()) == weights_after(12)


# --- what goes wrong


def test_a_restore_falls_back_to_the_newest_good_one_and_says_so(run, tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=9)

    async def train() -> str:
        async with tree_of(config(checkpoint_every=None), tmp_path, checkpoints) as tree:
            controller = tree.controller
            running = asyncio.create_task(tree.run())
            for _ in range(2):
                await controller.advance(3)
                await controller.save()
            path = tmp_path / "checkpoints" / "step-000000006" / "control.pb"
            data = bytearray(path.read_bytes())
            data[-9] ^= 4
            path.write_bytes(data)
            await controller.restore(None)
            assert controller.step == 3
            controller.resume()
            return await running

    assert run(train()) == weights_after(12)
    (told,) = lines(tmp_path, "events.jsonl", "checkpoint_passed_over")
    assert told["ok"] is False
    assert "step-000000006: control.pb record" in told["error"]
    assert [r.levelno for r in caplog.records if "passed over" in r.getMessage()] == [logging.WARNING]


@pytest.mark.parametrize("point", ["save.begin", "save.file.control.pb.piece", "save.rename.after"])
def test_a_disk_that_is_full_is_told_and_the_run_goes_on(run, tmp_path, caplog, point):
    full = False

    def fault(passing: str) -> None:
        if full and passing == point:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=9, fault=fault)

    async def train() -> str:
        nonlocal full
        async with tree_of(config(checkpoint_every="3steps"), tmp_path, checkpoints) as tree:
            controller = tree.controller
            running = asyncio.create_task(tree.run())
            await controller.advance(4)
            await controller._saver.done()
            full = True
            await controller.advance(3)
            with pytest.raises(CheckpointError, match="No space left on device; older ones stand"):
                await controller.save()
            assert [info.step for info in checkpoints.list()] == [3]
            full = False
            controller.resume()
            return await running

    assert run(train()) == weights_after(12)
    # that of step 12 at the end
    saved = [(record["step"], record["ok"]) for record in lines(tmp_path, "events.jsonl", "checkpoint")]
    assert {(3, True), (6, False), (7, False), (12, True)} <= set(saved)
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2
    assert all("No space left on device; older ones stand" in error for error in errors)


def test_a_last_save_that_failed_beside_the_steps_is_tried_once_more(run, tmp_path):
    failures = iter([OSError(errno.EIO, "once")])

    def fault(passing: str) -> None:
        if passing == "save.begin" and (error := next(failures, None)) is not None:
            raise error

    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=9, fault=fault)

    async def train() -> None:
        async with tree_of(config(checkpoint_every="12steps"), tmp_path, checkpoints) as tree:
            await tree.run()

    run(train())
    assert [record["ok"] for record in lines(tmp_path, "events.jsonl", "checkpoint")] == [False, True]
    assert [info.step for info in checkpoints.list()] == [12]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 128 KiB."""
    home = tmp_path / "disk"
    home.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(home)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system of our own needs root and the right to mount")
    try:
        yield home
    finally:
        subprocess.run(["umount", str(home)], check=True)


def test_a_real_disk_that_is_full(run, tmp_path, small_disk):
    checkpoints = Checkpoints(small_disk / "checkpoints", keep=9)  # three of 40 KB fit

    async def train() -> str:
        async with tree_of(config(checkpoint_every="1steps"), tmp_path, checkpoints) as tree:
            running = asyncio.create_task(tree.run())
            for _ in range(5):
                await tree.controller.advance(1)
                await tree.controller._saver.done()
            tree.controller.resume()
            return await running

    assert run(train()) == weights_after(12)
    saved = lines(tmp_path, "events.jsonl", "checkpoint")
    assert [record["ok"] for record in saved][:2] == [True, True]
    assert "No space left on device" in saved[-1]["error"]
    good = [info.step for info in checkpoints.list()]
    assert good == [record["step"] for record in reversed(saved) if record["ok"]]
    assert all(verify(small_disk / "checkpoints" / f"step-{step:09d}") == [] for step in good)
    assert sorted(path.name for path in (small_disk / "checkpoints").iterdir()) == sorted(
        f"step-{step:09d}" for step in good
    )


def test_a_directory_that_cannot_be_written(run, tmp_path):
    if os.geteuid() == 0:
        home = Path("/proc")  # not even root makes a directory there
    else:
        home = tmp_path / "readonly"
        home.mkdir(mode=0o500)
    checkpoints = Checkpoints(home / "checkpoints", keep=9)

    async def train() -> str:
        async with tree_of(config(), tmp_path, checkpoints) as tree:
            return await tree.run()

    assert run(train()) == weights_after(12)
    saved = lines(tmp_path, "events.jsonl", "checkpoint")
    assert saved
    assert all(f"cannot save checkpoint {home}/checkpoints" in record["error"] for record in saved)


def test_a_step_that_could_not_be_journalled_is_in_no_checkpoint(run, tmp_path):
    """Its weights are the next version already: saved under the step before, that would be done twice."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=9)

    async def train() -> None:
        async with tree_of(config(checkpoint_every="2steps"), tmp_path, checkpoints) as tree:
            journal = tree.controller._journalling.journal
            append = journal.append

            def full(record: Any) -> None:
                if record["step"] == 5:
                    raise ArmillaryError("cannot write the journal")
                append(record)

            journal.append = full
            with pytest.raises(ArmillaryError, match="cannot write the journal"):
                await tree.run()
            assert tree.controller.step == 5

    run(train())
    found = {info.step: info.weights_sha256 for info in checkpoints.list()}
    assert 5 not in found
    assert found[2] == weights_after(2)


def test_a_callback_that_may_end_the_run_does_so_from_a_save(run, tmp_path):
    class Raises:
        def on_checkpoint(self, event: Any, run: Any) -> None:
            raise ZeroDivisionError("no luck")

    async def train() -> tuple[RunState, str]:
        checkpoints = Checkpoints(tmp_path / "checkpoints", keep=9)
        chosen = config(steps=2000, on_callback_error="raise")
        async with tree_of(chosen, tmp_path, checkpoints, callbacks=[Raises()]) as tree:
            await tree.controller.run()
            return tree.controller.state, str(tree.controller.error)

    state, error = run(train())
    assert state is RunState.ERROR
    assert "Raises failed at checkpoint: ZeroDivisionError: no luck" in error


# --- the saver alone


LAYOUT = Manifest.of({"w": np.zeros(40, np.float32)})


def taken(step: int = 3) -> Snapshot:
    run = RunRecord(run_id="r-1", step=step, manifest=manifest_to_proto(LAYOUT))
    return Snapshot(run, {"weights": np.full(LAYOUT.size, step, np.float32)})


async def no_spheres() -> list[SphereRecord]:
    return []


def saver_of(fault: Callable[[str], None] | None = None) -> tuple[Saver, list[dict[str, Any]]]:
    told: list[dict[str, Any]] = []
    return Saver(Checkpoints(MemoryStore(fault), keep=2, fault=fault), lambda step, record: told.append(record)), told


def test_the_copy_is_made_once_and_used_again(run):
    saver, _ = saver_of()

    async def saves() -> None:
        addresses = set()
        for step in range(1, 4):
            await saver.begin(lambda step=step: taken(step), no_spheres())
            await saver.done()
            addresses.add(saver.copies._buffers["weights"].ctypes.data)
            assert saver.checkpoints.load().buffers["weights"].tolist() == [step] * LAYOUT.size
        assert len(addresses) == 1
        assert addresses.pop() % 64 == 0
        assert saver.take_stall()["checkpoint_stall"] > 0
        assert saver.take_stall() == {}
        assert "busy=False" in repr(saver)
        assert "weights" in repr(saver.copies)

    run(saves())


def test_no_memory_for_the_copy_is_an_error_of_the_checkpoint(run, monkeypatch):
    saver, told = saver_of()

    def no_memory(size: int) -> Any:
        raise MemoryError

    async def saves() -> None:
        answer = saver.ask()
        with monkeypatch.context() as patch:
            patch.setattr("control.position.aligned_zeros", no_memory)
            await saver.begin(taken, no_spheres())
            with pytest.raises(CheckpointError, match="no memory to copy the 192 bytes of weights; older ones stand"):
                await answer
        await saver.done()
        assert (saver.failed, saver.busy, told[0]["ok"]) == (True, False, False)
        await saver.begin(taken, no_spheres())
        await saver.done()
        assert not saver.failed

    run(saves())


def test_what_nobody_expected_is_told_too(run, caplog):
    def fault(point: str) -> None:
        if point == "save.manifest.before":
            raise ZeroDivisionError("in a library")

    saver, told = saver_of(fault)

    async def saves() -> None:
        answer = saver.ask()
        await saver.begin(taken, no_spheres())
        with pytest.raises(CheckpointError, match=r"ZeroDivisionError: in a library \(not expected\)"):
            await answer
        await saver.done()

    run(saves())
    assert told[0]["error"] == "ZeroDivisionError: in a library (not expected)"
    assert caplog.records[0].exc_info is not None


def test_whoever_waits_when_the_run_ends_learns_of_it(run):
    saver, _ = saver_of()

    async def ends() -> None:
        answer = saver.ask()
        saver.close()
        with pytest.raises(RunStateError, match="the run has ended"):
            await answer

    run(ends())


# --- control is killed in the midst of a save


KILLED = {"steps": 12, "checkpoint_every": "3steps", "keep": 1, "orphan_timeout": "1s"}
KILL_POINTS = [
    "save.begin",
    "save.file.control.pb.piece",
    "save.manifest.before",
    "save.rename.before",
    "save.rename.after",
    "retention.renamed",
]


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(180)
@pytest.mark.parametrize("point", KILL_POINTS)
def test_control_killed_in_a_save_beside_its_steps_goes_on_to_the_same_bits(tmp_path: Path, point: str) -> None:
    where = tmp_path / "run"
    killed = subprocess.run([sys.executable, __file__, str(where), point], timeout=80, check=False, cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL
    names = sorted(path.name for path in (where / "checkpoints").iterdir() if path.name.startswith("step-"))
    assert names, "the checkpoint before, or the one that was killed when it was there"
    assert all(verify(where / "checkpoints" / name) == [] for name in names)
    command = [sys.executable, "-m", "control", "start", "--resume", str(where), "--json"]
    done = subprocess.run(command, timeout=80, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["weights_sha256"] == weights_after(12)
    # from the newest checkpoint that there was, and not from the beginning
    done_again = [record["step"] for record in lines(where, "journal.jsonl", "step") if record["term"] == 2]
    assert done_again == list(range(int(names[-1].removeprefix("step-")), 12))


def _train_and_be_killed(directory: Path, point: str) -> None:
    import control.beginning
    import control.training

    saves = 0

    def fault(passing: str) -> None:
        nonlocal saves
        saves += passing == "save.begin"
        if saves == 2 and passing == point:
            os.kill(os.getpid(), signal.SIGKILL)

    control.beginning.Checkpoints = functools.partial(Checkpoints, fault=fault)  # type: ignore[misc]
    store_at = control.beginning.store_at
    control.beginning.store_at = lambda location: store_at(location, fault)
    # the second save is begun for sure, however slow the disk: it is that of the end at the latest
    asyncio.run(control.training.run(config(**KILLED, run_dir=directory)))


if __name__ == "__main__":
    _train_and_be_killed(Path(sys.argv[1]), sys.argv[2])
