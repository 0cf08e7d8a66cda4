"""Local processes: started again with back-off, set aside, adopted, told to leave; and chaos among them."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from control import launcher_local, lives, restarts
from control.cli import app
from control.cli.output import run as run_words
from control.client import Client
from control.config import RunConfig
from control.launcher_local import LocalSpheres
from control.lives import Ended, RunFacts
from control.processes import command_of, is_sphere, log_of, spheres_of
from control.reference import reference
from control.run_dir import log_lines, process_of
from control.training import run as run_training
from spheres.errors import ConfigError, TaskError
from spheres.task import load_task
from spheres.testing.synthetic import Synthetic
from tests.launching import spawn_one

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

DIES = "#!/bin/sh\necho 'error: no task here' >&2\nexit 3\n"
SLEEPS = "#!/bin/sh\necho looking for control at nowhere\nexec sleep 60\n"


async def eventually(condition: Callable[[], bool], *, seconds: float = 25.0) -> None:
    """Wait for what another process does and nobody tells."""
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"it did not come to that in {seconds:g} s")


class Local:
    """LocalSpheres whose spheres are a script, and what they said."""

    def __init__(self, folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
        folder.mkdir(exist_ok=True)
        file = folder / "python"
        file.write_text(script)
        file.chmod(0o755)
        monkeypatch.setattr(launcher_local.sys, "executable", str(file))
        self.ended: list[Ended] = []
        #: when each of them was told, before the pause that follows it has begun
        self.times: list[float] = []
        self.news = asyncio.Event()
        self.spheres = LocalSpheres(RunFacts("127.0.0.1:1", folder / "logs", self._ended, orphan_timeout=1.0))

    def _ended(self, ended: Ended) -> None:
        self.ended.append(ended)
        self.times.append(time.monotonic())
        self.news.set()

    async def until_ended(self, count: int) -> None:
        while len(self.ended) < count:
            self.news.clear()
            await self.news.wait()


def test_a_sphere_that_cannot_live_is_tried_ever_more_rarely_and_set_aside(run, tmp_path, monkeypatch):
    monkeypatch.setattr(restarts, "_FIRST_PAUSE", 0.005)

    async def main() -> None:
        local = Local(tmp_path, DIES, monkeypatch)
        await local.spheres.start(1)
        await local.until_ended(6)
        assert [(e.code, e.error, e.count) for e in local.ended] == [(3, "no task here", n) for n in range(1, 7)]
        assert str(local.ended[0]).startswith("local sphere 1 has ended (exit code 3): no task here; its log is ")
        assert local.times[-1] - local.times[-2] > 4 * 0.005 * 2
        ((name, reason),) = local.spheres.aside()
        assert name == "local-1"
        assert reason.startswith("ended 6 times in ")
        assert local.spheres.all_aside
        await local.spheres.aclose()  # in its pause: at once
        assert len(local.ended) == 6

    run(main())
    assert (tmp_path / "logs" / "sphere-1.log").read_text().count("error: no task here") == 6


def test_one_that_is_killed_comes_back_at_once_in_its_own_log(run, tmp_path, monkeypatch):
    async def main() -> None:
        local = Local(tmp_path, SLEEPS, monkeypatch)
        first, _ = (sphere.pid for sphere in await local.spheres.start(2))
        os.kill(first, signal.SIGKILL)
        await local.until_ended(1)
        assert (local.ended[0].code, local.ended[0].error) == (-signal.SIGKILL, "")
        assert "(SIGKILL)" in str(local.ended[0])
        await eventually(lambda: local.spheres.living == 2)
        assert local.spheres.aside() == []
        local.spheres.kill()
        await local.spheres.aclose()

    run(main())
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["sphere-1.log", "sphere-2.log"]


@pytest.mark.parametrize("gone", ["logs/sphere-1.log", "logs"])
def test_one_whose_log_was_removed_comes_back_with_a_new_one(run, tmp_path, monkeypatch, gone):
    async def main() -> None:
        local = Local(tmp_path, SLEEPS, monkeypatch)
        (first,) = (sphere.pid for sphere in await local.spheres.start(1))
        path = tmp_path / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        os.kill(first, signal.SIGKILL)
        await local.until_ended(1)
        assert (local.ended[0].code, local.ended[0].error) == (-signal.SIGKILL, "")
        await eventually((tmp_path / "logs" / "sphere-1.log").exists)
        await eventually(lambda: local.spheres.living == 1)
        local.spheres.kill()
        await local.spheres.aclose()

    run(main())


def test_a_signal_without_a_name_is_told_by_its_number():
    assert "has ended (signal 37);" in str(Ended("local sphere 1", -37, "logs/sphere-1.log", ""))
    assert "has ended (SIGRTMIN);" in str(Ended("local sphere 1", -signal.SIGRTMIN, "logs/sphere-1.log", ""))


def test_a_keeper_that_fails_says_so_and_its_sphere_does_not_count_as_living(run, caplog):
    class Odd:
        where = ("here", 7)

        async def wait(self) -> lives.Outcome:
            await asyncio.sleep(0)
            raise ZeroDivisionError("of a launcher")

        def end(self, *, at_once: bool) -> None:
            pass

    async def launch(number: int) -> Odd:
        return Odd()

    async def main() -> None:
        kept = lives.Lives("odd", launch, log_of=str, ended=lambda ended: None)
        await kept.start(1)
        assert kept.living == 1
        await eventually(lambda: bool(caplog.records))
        assert kept.living == 0
        await kept.aclose()

    run(main())
    (told,) = caplog.records
    assert (told.levelname, told.getMessage()) == ("ERROR", "odd sphere 1 is not watched any more, nor started again")
    assert told.exc_info is not None
    assert isinstance(told.exc_info[1], ZeroDivisionError)


@pytest.mark.parametrize("at_once", [False, True])
def test_who_is_told_to_leave_is_not_started_again(run, tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(lives, "_GRACE_SECONDS", (0.1, 5.0, 5.0))

    async def main() -> None:
        local = Local(tmp_path, SLEEPS, monkeypatch)
        first, second = (sphere.pid for sphere in await local.spheres.start(2))
        host = socket.gethostname()
        assert not local.spheres.dismiss(host, 1, at_once=at_once)  # somebody else's
        assert local.spheres.dismiss(host, first, at_once=at_once)
        if not at_once:  # at once: deaf as it is, it is killed
            os.kill(first, signal.SIGTERM)
        await eventually(lambda: local.spheres.living == 1)
        assert local.ended == []
        (third,) = await local.spheres.start(1)  # takes the place that is free
        assert third.name == "local-1"
        assert third.pid not in (first, second)
        await local.spheres.aclose()

    run(main())
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["sphere-1.log", "sphere-2.log"]


def test_only_spheres_of_this_run_are_taken_for_that(run, tmp_path, monkeypatch):
    async def main(patch: pytest.MonkeyPatch) -> None:
        local = Local(tmp_path, SLEEPS, patch)
        assert not local.spheres.adopt(os.getpid())
        assert not local.spheres.adopt(1 << 22)

    with monkeypatch.context() as patch:
        run(main(patch))
    command = [sys.executable, "-m", "spheres", "start", "--control", "127.0.0.1:9", "--orphan-timeout", "120"]
    (tmp_path / "logs").mkdir(exist_ok=True)
    with (tmp_path / "logs" / "sphere-4.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not command_of(process.pid) or command_of(process.pid)[1:3] != ["-m", "spheres"]:  # between fork and exec
            assert time.monotonic() < deadline
        assert is_sphere(process.pid, "127.0.0.1:9")
        assert is_sphere(process.pid, "localhost:9")
        assert not is_sphere(process.pid, "127.0.0.1:90")
        assert not is_sphere(os.getpid(), "127.0.0.1:9")
        assert process.pid in spheres_of("127.0.0.1:9")
        assert log_of(process.pid) == tmp_path / "logs" / "sphere-4.log"
    finally:
        process.kill()
        process.wait()
    assert command_of(process.pid) == []


def test_the_log_of_a_sphere_that_is_gone_is_found_in_the_files(tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    text = "{0} INFO spheres.cli: looking for control at h:1\n{0} INFO spheres.sphere: {1} joins control (1)\n{0} {2}\n"
    (logs / "sphere-1.log").write_text(text.format("t1", "s-1", "one") + text.format("t2", "s-11", "two"))
    (logs / "sphere-2.log").write_text(text.format("t1", "s-2", "three"))
    assert log_lines(tmp_path, "s-1", 10)[-1] == "t1 one"
    assert len(log_lines(tmp_path, "s-1", 10)) == 3
    assert log_lines(tmp_path, "s-11", 1) == ["t2 two"]
    assert len(log_lines(tmp_path, "local-1", 100)) == 6
    assert log_lines(tmp_path, "s-3", 10) == log_lines(tmp_path, "local-9", 10) == []


# --- whole runs -------------------------------------------------------------------------------------------------------


def _start(directory: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "control", "start", "--json", *flags]
    return subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _until(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        record = json.loads(line)
        if record["event"] == "step" and record["step"] >= step:
            return
    pytest.fail(f"the run ended before step {step}: {process.stderr.read() if process.stderr else ''}")


def _until_joined(process: subprocess.Popen[str], count: int) -> None:
    """Read on until so many spheres have joined, of a run that waits for more."""
    assert process.stdout is not None
    for line in process.stdout:
        count -= json.loads(line)["event"] == "sphere_joined"
        if not count:
            return
    pytest.fail(f"the run ended before it began: {process.stderr.read() if process.stderr else ''}")


async def _spheres(directory: Path) -> dict[str, int]:
    async with Client((directory / "run" / "address").read_text().split()[0]) as client:
        return {sphere.sphere_id: sphere.report.pid for sphere in await client.spheres()}


@pytest.mark.slow
def test_spheres_of_a_control_that_was_killed_go_on_under_the_next(run, tmp_path):
    """DESIGN section 5: they keep their lives, their ids and their processes, and so do the weights their bits."""
    flags = ("--fan-out", "2", "--steps", "160", "--checkpoint-every", "20steps", "--log-every", "1steps")
    process = _start(tmp_path, "--run-dir", "run", "--spheres", "3", "--min-spheres", "4", *flags)
    assert process.stdout is not None
    fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)  # some ten steps: it waits until they are read
    _until_joined(process, 3)
    before = run(_spheres(tmp_path))  # asked before the first step, for which the fourth is waited for
    before["s-4"] = run(spawn_one(tmp_path / "run"))
    _until(process, 50)
    process.kill()
    process.communicate(timeout=30)
    os.kill(before["s-4"], signal.SIGKILL)  # one does not come back, and is started anew
    resumed = _start(tmp_path, "--resume", "run", "--spheres", "4", "-v", "--hold")
    _until(resumed, 60)
    after = run(_spheres(tmp_path))  # by then the run may be over
    assert resumed.stdout is not None
    summary = next(record for record in map(json.loads, resumed.stdout) if record["event"] == "summary")
    resumed.terminate()
    _, err = resumed.communicate(timeout=60)
    assert resumed.returncode == 0, err
    assert {name: after[name] for name in ("s-1", "s-2", "s-3")} == {n: p for n, p in before.items() if n != "s-4"}
    assert set(after) == {"s-1", "s-2", "s-3", "s-2.1"}
    assert "adopted " in err
    wanted = reference(load_task("digits"), RunConfig(task="digits", steps=160)).weights_sha256
    assert summary["weights_sha256"] == wanted
    for pid in after.values():  # told to end, as if they had been this control's own
        assert not is_sphere(pid, "")
        assert command_of(pid) == []


STUBBORN = """
    import os
    from pathlib import Path
    from spheres.tasks.digits import Digits

    class Stubborn(Digits):
        '''Once it has been made so often, it cannot be made any more.'''
        def __init__(self, marks="", most="0"):
            with open(marks, "a") as file:
                file.write("x")
            if Path(marks).stat().st_size > int(most):
                raise RuntimeError("no more")
            super().__init__()

        def gradient(self, weights, samples, rng, out):
            if rng.bit_generator.state["state"]["key"][1] == 5:
                os._exit(9)
            return super().gradient(weights, samples, rng, out)
"""


ELSEWHERE = """
    import os
    from spheres.tasks.digits import Digits

    def deep(some):
        deeper(some) if some else deepest()

    def deeper(some):
        deep(some - 1)

    def deepest():
        raise RuntimeError("only there")

    class Elsewhere(Digits):
        def __init__(self):
            if str(os.getpid()) != os.environ["HERE"]:
                deep(50)
            super().__init__()
"""


@pytest.mark.slow
def test_a_task_that_no_sphere_can_load_any_more_ends_the_run_after_some_tries(run, tmp_path, monkeypatch):
    monkeypatch.setattr(restarts, "_FIRST_PAUSE", 0.001)
    (tmp_path / "stubborn.py").write_text(textwrap.dedent(STUBBORN))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = {"marks": str(tmp_path / "marks"), "most": "2"}  # control's and that of one sphere
    config = RunConfig(task="stubborn:Stubborn", task_options=options, steps=9, spheres=1, run_dir=tmp_path / "run")
    summary = run(run_training(config), timeout=110)
    assert summary.state == "error"
    assert "no sphere can be started: after 5 tries local sphere 1 has ended (exit code 3)" in str(summary.error)
    assert isinstance(summary.error, TaskError)
    assert "no more" in str(summary.error)
    assert summary.steps == 5


@pytest.mark.slow
def test_why_a_sphere_has_ended_is_known_from_json_logs_too(run, tmp_path, monkeypatch):
    """The line has a traceback as well, here one of some ten thousand characters."""
    monkeypatch.setenv("ARMILLARY_LOG_FORMAT", "json")
    (tmp_path / "elsewhere.py").write_text(textwrap.dedent(ELSEWHERE))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HERE", str(os.getpid()))
    config = RunConfig(task="elsewhere:Elsewhere", steps=9, spheres=1, run_dir=tmp_path / "run")
    summary = run(run_training(config), timeout=110)
    line = (tmp_path / "run" / "logs" / "sphere-1.log").read_text().splitlines()[-1]
    assert len(line) > 4096
    assert isinstance(summary.error, TaskError)
    assert json.loads(line)["message"] in str(summary.error)
    assert "only there" in str(summary.error)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_commands_and_chaos_on_a_running_tree(run, tmp_path, capsys, request):
    """spawn, drain, terminate, logs; then kills, a stop and a kill of control. The bits are the reference loop's."""
    process = _start(tmp_path, "--run-dir", "run", "--spheres", "3", "--fan-out", "2", "--steps", "1000000",
                     "--checkpoint-every", "20steps", "--task", "spheres.testing.synthetic:Synthetic",
                     "--task-option", "compute_seconds=0.004", "--log-every", "20steps")  # fmt: skip
    assert process.stdout is not None
    fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 1 << 20)  # nobody reads on: for some 50,000 steps
    _until(process, 20)
    directory = tmp_path / "run"

    def kill_control() -> None:
        pid = process_of(directory)  # chaos has started it, and it would train on where this test fails
        if pid is not None:
            os.kill(pid, signal.SIGKILL)

    request.addfinalizer(kill_control)

    async def commands() -> None:
        async with Client((directory / "address").read_text().split()[0]) as client:
            pids = await client.spawn(2, "once")
            assert await client.spawn(2, "once") == pids
            with pytest.raises(ConfigError, match="cannot start 0 spheres: give a number from 1 to 1000"):
                await client.spawn(0)
            names: dict[int, str] = {}
            async for _ in client.watch():
                names = {s.report.pid: s.sphere_id for s in await client.spheres() if s.state == "active"}
                if names.keys() >= set(pids):
                    break
            await client.drain(names[pids[0]])
            await client.terminate(names[pids[1]])
            with pytest.raises(ConfigError, match=r"there is no sphere 's-9'; did you mean"):
                await client.drain("s-9")
            await eventually(lambda: not any(is_sphere(pid, client.address) for pid in pids))
            assert any("s-1 joins control" in line for line in await client.logs("s-1"))
            moved, late = await client.rebalance()
            assert late == []
            assert isinstance(moved, list)

    def cli(*words: str) -> tuple[int, str]:
        """Return the exit code of a command, and what it printed."""
        code = run_words(app, [*words, "--run-dir", str(directory)])
        said = capsys.readouterr()
        return code, said.out + said.err

    try:
        run(commands(), timeout=100)
        code, tree = cli("spheres")
        assert (code, tree.splitlines()[-1]) == (0, "2 lost; --all shows them")
        assert len(tree.splitlines()) == 1 + 3 + 1  # control, who is there, and that line
        assert "s-4 lost" in cli("spheres", "--all")[1]
        # one that is there is told, whatever the others are
        code, said = cli("drain", "s-44", "s-5")
        assert code == 2
        assert "s-5 is told" in said
        assert "error: there is no sphere 's-44'; did you mean s-4" in said
        code, said = cli("logs", "s-1", "-n", "2", "--json")
        assert (code, json.loads(said)["sphere"], len(json.loads(said)["lines"])) == (0, "s-1", 2)
        assert "s-5 joins" in cli("logs", "s-5")[1]  # it has gone; its file has not
        assert cli("rebalance")[0] == 0
        code, said = cli("chaos", "--kill", "often")
        assert (code, said) == (2, "error: 'often' is no rate; give one such as 0.2/s, 6/m, 30/h\n")
        assert "no fault in all that time" in cli("chaos")[1]
        flags = ["--kill", "0.5/s", "--stop", "0.4/s", "--stop-for", "0.5s", "--control-kill", "1", "--duration", "4s"]
        command = [sys.executable, "-m", "control", "chaos", *flags, "--seed", "6", "--run-dir", "run", "--json"]
        done = subprocess.run(
            [*command, "--report", "report.json"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        process.kill()
        process.communicate(timeout=10)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    report = json.loads((tmp_path / "report.json").read_text())
    assert {**report, "event": "chaos"} == records[-1]
    faults = report["faults"]
    # the last may come before the control that came back knows of a sphere
    missed = [record["kind"] for record in records if record["event"] == "nobody"]
    assert [*(fault["kind"] for fault in faults), *missed] == ["kill", "stop", "control", "kill"]
    assert all(fault["seconds"] is not None and fault["seconds"] > 0 for fault in faults)
    assert sum(row["faults"] for row in report["table"]) == len(faults)
    started = next(record["pid"] for record in records if record["event"] == "control_started")
    # the run was not over before the last fault, however long all that took: it is stopped here
    assert process_of(directory) == started
    assert cli("stop")[0] == 0
    run(eventually(lambda: process_of(directory) is None, seconds=60), timeout=70)
    summary: dict[str, Any] = json.loads((directory / "summary.json").read_text())
    # as slow as its spheres, it learns the same
    wanted = reference(Synthetic(), RunConfig(steps=summary["steps"])).weights_sha256
    assert (summary["state"], summary["weights_sha256"]) == ("stopped", wanted)
    assert "s-1 joins" in cli("logs", "s-1")[1]
    code, said = cli("logs", "s-999")
    assert code == 5
    assert "stopped" in said
