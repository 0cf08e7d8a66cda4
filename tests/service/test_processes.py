"""Runs of real processes: the reference loop's bits, signals, and what becomes of spheres when control dies."""

import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from control.client import Client
from control.config import RunConfig
from control.reference import reference
from control.run_dir import log_lines
from control.run_state import RunState
from control.training import Training
from control.training import run as run_training
from spheres.errors import TaskError
from spheres.task import load_task
from tests.launching import listening, spawn_one

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]


@pytest.mark.parametrize(
    "changes",
    [
        {"spheres": 3, "fan_out": 1, "microbatches": 8, "batch_size": 50, "clip_norm": 0.5},
        {"spheres": 6, "fan_out": 2, "optimizer": {"name": "adamw"}, "learning_rate": 0.01, "chunk_bytes": 4096},
    ],
    ids=["a chain of 3", "6 in two levels"],
)
def test_a_tree_of_processes_gives_the_reference_loops_bits(changes, run, tmp_path):
    config = RunConfig(**{"task": "digits", "steps": 24, "run_dir": tmp_path / "run", **changes})
    summary = run(run_training(config), timeout=100)
    assert summary.error is None
    assert summary.weights_sha256 == reference(load_task("digits"), config).weights_sha256
    saved = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert saved["weights_sha256"] == summary.weights_sha256
    wanted = {"state", "steps", "epochs", "samples", "loss", "metrics", "weights_sha256", "wall_seconds"}
    assert wanted | {"samples_per_second", "sync_fraction", "spheres"} <= saved.keys()
    assert "accuracy" in saved["metrics"]
    steps, events = (
        [json.loads(line) for line in (tmp_path / "run" / name).read_text().splitlines()]
        for name in ("journal.jsonl", "events.jsonl")
    )
    for step in steps:  # every microbatch by somebody, and by nobody else
        blocks = sorted((lo, hi) for lo, hi, _ in step["contributions"])
        assert [*range(config.microbatches)] == [index for lo, hi in blocks for index in range(lo, hi)]
    assert sum(step["batch_samples"] for step in steps) == saved["samples"]
    # of one whose link is lost, as on a machine under heavy load, the summary may have an older word
    if "sphere_lost" not in {event["event"] for event in events}:
        assert sum(sphere["samples"] for sphere in saved["spheres"]) == saved["samples"]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "checkpoints", "events.jsonl", "journal.jsonl", "logs", "report.html", "run.json", "summary.json",
        "weights.safetensors",
    }  # fmt: skip


SHIFTED = """
    from spheres.tasks.digits import Digits
    from spheres.worker import Worker

    microbatch = Worker._microbatch

    def shifted(worker, unit, weights, index, **more):
        return microbatch(worker, unit, weights, (index + 1) % worker._config.microbatches, **more)

    Worker._microbatch = shifted
"""


def test_a_tree_of_processes_that_sums_in_another_order_does_not(tmp_path):
    """The twin of the test above: every microbatch stands in its neighbour's place, and is summed once still."""
    (tmp_path / "shifted.py").write_text(textwrap.dedent(SHIFTED))
    process = _start(tmp_path, "--task", "shifted:Digits", "--steps", "24", "--spheres", "6", "--fan-out", "2")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    summary = json.loads(out.splitlines()[-1])
    assert summary["steps"] == 24
    assert summary["weights_sha256"] != reference(load_task("digits"), RunConfig(steps=24)).weights_sha256


def test_a_run_that_is_moved_by_hand(run, tmp_path):
    """Create, step, save, pause, resume, run; then another goes on from its checkpoint and its weights."""
    config = RunConfig(task="digits", steps=30, spheres=2, run_dir=tmp_path / "run", checkpoint_every=None)

    async def first() -> None:
        async with Training(config) as training:
            assert training.summary.steps == 0
            await training.step(3)
            assert (training.summary.state, training.summary.steps) == ("paused", 3)
            info = await training.save()
            assert info.step == 3
            await training.step()
            await training.restore("step-000000003")
            assert training.summary.steps == 3
            await training.step(7)
            training.stop("enough for today")
        assert (training.summary.state, training.summary.reason) == ("stopped", "enough for today")

    async def second() -> str:
        async with Training(config.model_copy(update={"spheres": 1}), resume="") as training:
            return (await training.run()).weights_sha256

    run(first(), timeout=60)
    assert run(second(), timeout=60) == reference(load_task("digits"), config).weights_sha256
    start = RunConfig(task="digits", steps=1, spheres=1, init_from=tmp_path / "run" / "weights.safetensors")
    again = run(run_training(start.model_copy(update={"run_dir": tmp_path / "again"})), timeout=60)
    assert again.metrics["loss"] < 0.5  # trained weights, not new ones: those begin above 2


def _start(directory: Path, *flags: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "control", "start", "--json", "--run-dir", str(directory / "run"), *flags]
    variables = {**os.environ, **(environment or {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=directory, env=variables, text=True, **pipes)


def _until_step(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        record = json.loads(line)
        if record["event"] == "step" and record["step"] >= step:
            return
    pytest.fail(f"the run ended before step {step}: {process.stderr.read() if process.stderr else ''}")


async def _sphere_pids(directory: Path) -> list[int]:
    address = (directory / "run" / "address").read_text().split()[0]
    async with Client(address) as client:
        return [sphere.report.pid for sphere in await client.spheres()]


def _wait_for_end(pids: list[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            ended, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ended:
                os.kill(pid, signal.SIGKILL)
                pytest.fail(f"process {pid} still lives after {seconds} s")
        finally:
            os.close(descriptor)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_ends_every_process(sign, run, tmp_path):
    process = _start(tmp_path, "--spheres", "3", "--fan-out", "2", "--steps", "100000")
    _until_step(process, 5)
    pids = run(_sphere_pids(tmp_path))
    assert len(pids) == 3
    process.send_signal(sign)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + sign
    assert "Traceback" not in err
    _wait_for_end(pids, 60)
    summary = json.loads(out.splitlines()[-1])
    assert (summary["event"], summary["state"], summary["reason"]) == ("summary", "stopped", sign.name)
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved[-1] == f"step-{summary['steps']:09d}"
    assert not (tmp_path / "run" / "address").exists()


TOLD_TASK = """
    import os, signal
    from spheres.task import IN_SPHERE
    from spheres.tasks.digits import Digits

    class Told(Digits):
        def __init__(self):
            if IN_SPHERE not in os.environ:
                os.kill(os.getpid(), signal.SIGTERM)
            super().__init__()
"""


def test_a_signal_while_the_run_opens_ends_it_in_order_before_its_first_step(tmp_path):
    (tmp_path / "told.py").write_text(textwrap.dedent(TOLD_TASK))
    process = _start(tmp_path, "--task", "told:Told", "--spheres", "2")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    summary = json.loads(out.splitlines()[-1])
    assert (summary["state"], summary["reason"], summary["steps"]) == ("stopped", "SIGTERM", 0)
    assert not (tmp_path / "run" / "logs").exists()  # no sphere was started


def test_local_spheres_write_the_log_format_of_control_and_not_to_its_port(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = ("--spheres", "2", "--steps", "100000", "--log-format", "json")
    process = _start(tmp_path, *flags, environment={"ARMILLARY_LISTEN": address})
    _until_step(process, 5)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    run_id = json.loads(out.splitlines()[-1])["run_id"]
    (line,) = [json.loads(line) for line in err.splitlines()]
    assert (line["run_id"], line["message"].split(":")[0]) == (run_id, "SIGTERM")
    for number in (1, 2):
        text = (tmp_path / "run" / "logs" / f"sphere-{number}.log").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        # the last word but for that of a signal: control's to one that takes its time to end
        (told,) = [line for line in lines if line["message"] == "told to stop: the run is over"]
        assert told["run_id"] == run_id
        assert told["sphere_id"] in ("s-1", "s-2")
        assert any(f"{told['sphere_id']} joins control" in line["message"] for line in lines)
    found = log_lines(tmp_path / "run", "s-2", 100)
    assert any("s-2 joins control" in line for line in found)


LOGGING_TASK = """
    import logging, os
    from spheres.tasks.digits import Digits

    class Logging(Digits):
        def gradient(self, weights, samples, rng, out):
            if rng.bit_generator.state["state"]["key"][1] == 1:
                logging.getLogger("task").info("reads %s", os.fsdecode(b"caf\\xe9"))
            return super().gradient(weights, samples, rng, out)
"""


def test_a_run_in_a_folder_whose_name_is_no_utf_8(run, tmp_path):
    """It can be asked and saved, and a log line with such a name is there."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / "logs_names.py").write_text(textwrap.dedent(LOGGING_TASK))
    command = [sys.executable, "-m", "control", "start", "--json", "--run-dir", "run", "--spheres", "1"]
    command += ["--task", "logs_names:Logging", "--steps", "100000"]
    process = subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    async def ask():
        async with Client((folder / "run" / "address").read_text().split()[0]) as client:
            saved = await client.checkpoint()
            return saved.path, (await client.status()).run_dir, await client.logs("s-1")

    try:
        _until_step(process, 3)
        path, run_dir, lines = run(ask())
    finally:
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert run_dir == f"{tmp_path}/caf\\udce9/run"
    assert path.startswith("run/checkpoints/step-")
    assert any("reads caf\\udce9" in line for line in lines)
    assert "reads caf\\udce9" in (folder / "run" / "logs" / "sphere-1.log").read_text()


SLOW_TASK = """
    import time
    from spheres.tasks.digits import Digits

    class Slow(Digits):
        def gradient(self, weights, samples, rng, out):
            if rng.bit_generator.state["state"]["key"][1] == 3:
                time.sleep(60)
            return super().gradient(weights, samples, rng, out)
"""


def test_a_second_signal_ends_at_once_with_a_step_in_hand(run, tmp_path):
    (tmp_path / "slow.py").write_text(textwrap.dedent(SLOW_TASK))
    process = _start(tmp_path, "--task", "slow:Slow", "--spheres", "2", "--log-every", "1steps")
    _until_step(process, 2)  # the next does not end before both signals have come
    pids = run(_sphere_pids(tmp_path))
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert "once more to end at once" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    _wait_for_end(pids, 60)
    process.communicate()
    assert not (tmp_path / "run" / "address").exists()


LOADING_TASK = """
    import os, time
    from spheres.task import IN_SPHERE
    from spheres.tasks.digits import Digits

    class Loading(Digits):
        def __init__(self):
            if IN_SPHERE in os.environ:
                print("loading", flush=True)
                time.sleep(60)
            super().__init__()
"""


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_sphere_that_still_loads_its_task(sign, tmp_path):
    """Nobody counts on it yet: it does not load to the end first."""
    (tmp_path / "loading.py").write_text(textwrap.dedent(LOADING_TASK))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    control = _start(tmp_path, "--task", "loading:Loading", "--spheres", "0", "--listen", address)
    command = [sys.executable, "-m", "spheres", "start", "--control", address]
    sphere = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
    try:
        assert sphere.stdout is not None
        while sphere.stdout.readline().strip() != "loading":
            assert sphere.poll() is None
        sphere.send_signal(sign)
        out, _ = sphere.communicate(timeout=60)
    finally:
        sphere.kill()
        control.terminate()
        control.communicate(timeout=60)
    assert sphere.returncode == 0
    assert "a signal before this sphere takes part" in out.splitlines()[-1]


HELD_UP = """
    import asyncio, time
    from spheres import cli, sphere

    async def run(self):
        self.hub = object()  # it takes part
        print("runs", flush=True)
        await asyncio.to_thread(time.sleep, 60)

    sphere.Sphere.run = run
    sphere.Sphere.drain = lambda self, reason: print("leaves", flush=True)
    cli.main(["start", "--control", "127.0.0.1:1"])
"""


def test_a_second_signal_ends_a_sphere_whatever_its_threads_are_at(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(HELD_UP)]
    sphere = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
    try:
        assert sphere.stdout is not None
        for word in ("runs", "leaves"):
            while sphere.stdout.readline().strip() != word:
                assert sphere.poll() is None
            sphere.terminate()
        assert sphere.wait(timeout=30) == 0
    finally:
        sphere.kill()
        sphere.communicate()


@pytest.mark.slow
def test_spheres_end_by_themselves_after_control_was_killed_and_the_run_goes_on(run, tmp_path):
    flags = ("--fan-out", "1", "--orphan-timeout", "1s", "--steps", "150", "--checkpoint-every", "20steps")
    process = _start(tmp_path, "--spheres", "1", "--min-spheres", "2", *flags, "--log-every", "1steps")
    assert process.stdout is not None
    fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)  # some ten steps: it waits until they are read
    while json.loads(process.stdout.readline())["event"] != "sphere_joined":
        pass
    pids = run(_sphere_pids(tmp_path))  # asked before the first step, for which the second is waited for
    pids.append(run(spawn_one(tmp_path / "run")))
    assert len(pids) == 2
    _until_step(process, 45)
    process.kill()
    process.communicate(timeout=10)
    _wait_for_end(pids, 60)
    resumed = subprocess.run(
        [sys.executable, "-m", "control", "start", "--json", "--resume", str(tmp_path / "run"), "--spheres", "3"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stderr
    summary = json.loads(resumed.stdout.splitlines()[-1])
    config = RunConfig(task="digits", steps=150)
    assert summary["weights_sha256"] == reference(load_task("digits"), config).weights_sha256
    journal = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    assert {r["step"] for r in journal} == set(range(150))
    assert [r["replayed"] for r in journal if r["term"] == 2].count(True) == len(journal) - 150


UNGUARDED = """
    from control import train
    from spheres.tasks.digits import Digits

    class Mine(Digits):
        pass

    train(Mine, steps=2, spheres=2, run_dir="run")
"""


@pytest.mark.slow
def test_a_script_without_a_guard_is_told_so_and_starts_no_runs_of_its_own(tmp_path):
    (tmp_path / "script.py").write_text(textwrap.dedent(UNGUARDED))
    ended = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert 'put the call under if __name__ == "__main__"' in ended.stderr.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["run", "script.py"]


def test_a_sphere_finds_control_and_is_found_when_both_listen_on_every_address(run, tmp_path):
    """As on two machines: 0.0.0.0 is no address that anybody could dial, and nobody gets it."""
    flags = ("--listen", "0.0.0.0:0", "--insecure", "--spheres", "0", "--min-spheres", "2", "--fan-out", "1")
    process = _start(tmp_path, *flags, "--steps", "30")
    address = listening(tmp_path / "run", process, seconds=60)
    assert address.startswith("0.0.0.0:")
    control = address.replace("0.0.0.0", "127.0.0.1")
    command = [sys.executable, "-m", "spheres", "start", "--control", control, "--listen", "0.0.0.0:0", "--insecure"]
    spheres = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    summary = json.loads(out.splitlines()[-1])
    assert summary["tree"] == {"s-1": "control", "s-2": "s-1"}
    assert summary["weights_sha256"] == reference(load_task("digits"), RunConfig(steps=30)).weights_sha256
    assert [sphere.wait(timeout=60) for sphere in spheres] == [0, 0]
    for sphere in spheres:
        sphere.communicate()


BAD_TASK = """
    import os
    from spheres.tasks.digits import Digits

    class Elsewhere(Digits):
        '''Loads in control and not in the spheres.'''
        def __init__(self):
            if os.environ.get("ELSEWHERE") != str(os.getpid()):
                raise RuntimeError("not on this machine")
            super().__init__()
"""


def test_a_sphere_that_cannot_start_ends_the_run_with_its_reason(run, tmp_path, monkeypatch):
    (tmp_path / "elsewhere_task.py").write_text(textwrap.dedent(BAD_TASK))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("ELSEWHERE", str(os.getpid()))
    config = RunConfig(task="elsewhere_task:Elsewhere", steps=5, spheres=2, run_dir=tmp_path / "run")
    summary = run(run_training(config), timeout=60)
    assert summary.state == RunState.ERROR
    assert isinstance(summary.error, TaskError)
    assert "exit code 3" in str(summary.error)
    assert "not on this machine" in str(summary.error)


@pytest.mark.slow
def test_local_spheres_that_are_all_killed_are_started_again(run, tmp_path):
    config = RunConfig(task="digits", steps=40, spheres=2, run_dir=tmp_path / "run")

    class KillsAll:
        def on_batch_end(self, event: Any, run: Any) -> None:
            if event.step == 5:
                for sphere in training.controller.tree.spheres.values():
                    os.kill(sphere.pid, signal.SIGKILL)

    async def train() -> Any:
        async with training:
            await training.step(20)
            # who is back first trains on: the run could be over before the other is
            await training.controller.tree.wait_for(2)
            await training.run()
        return training.summary

    training = Training(config, callbacks=[KillsAll()])
    summary = run(train(), timeout=60)
    assert summary.error is None
    assert summary.weights_sha256 == reference(load_task("digits"), config).weights_sha256
    ended = {sphere["id"]: sphere["state"] for sphere in summary.spheres}
    assert ended == {"s-1": "lost", "s-2": "lost", "s-3": "active", "s-4": "active"}
    assert sorted(path.name for path in (tmp_path / "run" / "logs").iterdir()) == ["sphere-1.log", "sphere-2.log"]
