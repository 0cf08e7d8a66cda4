"""Shared memory under real signals: a reader that was stopped at the worst moment publishes nothing of what it read
(N19, N20), nothing is left behind by SIGKILL, and who shares no memory is refused or served inline.

Handshakes go over named pipes: a process says that it has come to the point, and goes on when it is told to.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import spheres.batches
import spheres.carrier
from control.config import RunConfig
from control.reference import reference
from control.starting import start_process
from control.training import Training
from spheres.task import load_task

pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(180),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="shared memory needs Linux"),
]


def config(**changes: Any) -> RunConfig:
    settings = {"task": "digits", "steps": 12, "batch_size": 48, "microbatches": 12, "spheres": 5, "fan_out": 2}
    small = {"chunk_bytes": 4096, "eval_every": None, "checkpoint_every": None, "patience": 1.0, "wire": "shm"}
    return RunConfig(**{**settings, **small, **changes})


HELD_UP = """
    import os
    from pathlib import Path
    from spheres.tasks.digits import Digits

    def hold_up(folder):
        '''Once, in one process: say who it is, and wait to be told to go on.'''
        try:
            Path(folder, "marker").touch(exist_ok=False)
        except FileExistsError:
            return False
        Path(folder, "reached").write_text(str(os.getpid()))  # a pipe: this waits for its reader
        Path(folder, "go").read_text()
        return True

    class HeldUp(Digits):
        '''In step 3 it reads half of the weights, waits, and reads the other half.'''

        def __init__(self, folder=""):
            super().__init__()
            self.folder = folder

        def gradient(self, weights, samples, rng, out):
            if self.folder and rng.bit_generator.state["state"]["key"][1] == 3 and self.may_wait():
                half = {name: view[: len(view) // 2].copy() for name, view in weights.items()}
                if hold_up(self.folder):
                    mixed = {name: view.copy() for name, view in weights.items()}
                    torn = [name for name in mixed if (mixed[name][: len(half[name])] != half[name]).any()]
                    Path(self.folder, "torn").write_text(" ".join(torn))
                    for name, first in half.items():
                        mixed[name][: len(first)] = first
                    weights = mixed
            return super().gradient(weights, samples, rng, out)

        def may_wait(self):
            return True

    class HeldUpSum(HeldUp):
        '''A sphere that adds up what children have sent waits in step 3 before it reads it.'''

        step = 0

        def __init__(self, folder=""):
            super().__init__(folder)
            import spheres.carrier
            import spheres.batches
            add_up = spheres.carrier.add_up
            spheres.batches._INLINE_ELEMENTS = 0  # beside the loop, as with a large model

            def held_up(*arguments, **named):
                if self.folder and self.step == 3:
                    hold_up(self.folder)
                add_up(*arguments, **named)

            spheres.carrier.add_up = held_up

        def gradient(self, weights, samples, rng, out):
            self.step = rng.bit_generator.state["state"]["key"][1]
            return super().gradient(weights, samples, rng, out)

        def may_wait(self):
            return False
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "held.py").write_text(textwrap.dedent(HELD_UP))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    # what HeldUpSum changes in spheres is changed in control's process, this one, too: put back afterwards
    monkeypatch.setattr(spheres.batches, "_INLINE_ELEMENTS", spheres.batches._INLINE_ELEMENTS)
    monkeypatch.setattr(spheres.carrier, "add_up", spheres.carrier.add_up)
    monkeypatch.delitem(sys.modules, "held", raising=False)
    for name in ("reached", "go"):
        os.mkfifo(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("task", ["HeldUp", "HeldUpSum"], ids=["in a gradient", "in a sum"])
def test_a_reader_that_was_stopped_publishes_nothing_of_what_it_read(task, run, folder):
    """It holds half of the weights, or is to add up what children sent that relink elsewhere, and compute on there."""
    chosen = config(task=f"held:{task}", task_options={"folder": str(folder)}, run_dir=folder / "run")

    async def main() -> tuple[str, Any]:
        async with Training(chosen) as training:
            tree = training.controller.tree
            await training.step(3)
            rest = asyncio.create_task(training.step(4))
            pid = int(await asyncio.to_thread((folder / "reached").read_text))
            name = next(n for n in tree.names() if tree.spheres[n].pid == pid)
            incarnation = tree.spheres[name].link[0]
            if task == "HeldUpSum":
                assert name in {tree.parent_of(other) for other in tree.names()}
            os.kill(pid, signal.SIGSTOP)
            try:
                await rest  # this step and three more without it
                assert tree.state_of(name) == "lost"
                # those below it may still be on their way to another parent
                await tree.until(lambda: all(tree.state_of(n) == "active" for n in tree.names() if n != name))
                assert tree.state_of(name) == "lost"
            finally:
                os.kill(pid, signal.SIGCONT)
                await asyncio.to_thread((folder / "go").write_text, "on")
            await tree.until(lambda: tree.state_of(name) == "active")
            assert tree.spheres[name].link[0] == incarnation, "it was not dead: the same life"
            await training.run()
        return name, training.summary

    name, summary = run(main(), timeout=120)
    assert summary.error is None
    assert summary.weights_sha256 == reference(load_task("digits"), config()).weights_sha256
    records = [json.loads(line) for line in (folder / "run" / "journal.jsonl").read_text().splitlines()]
    who = [{part[2] for part in record["contributions"]} for record in records]
    assert name in who[2]
    assert not any(name in of for of in who[3:7])
    if task == "HeldUp":
        assert (folder / "torn").read_text(), "the weights did not change under it: this test shows nothing"


# ---- nothing is left


def segments(process: Path) -> dict[int, int]:
    """The segments that a process has mapped or open: their inodes, and how many KiB of each it has mapped and used."""
    found: dict[int, int] = {}
    for descriptor in (process / "fd").iterdir():
        with contextlib.suppress(OSError):
            if "memfd:armillary" in str(descriptor.readlink()):
                found.setdefault(descriptor.stat().st_ino, 0)
    inode = None
    for line in (process / "smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            inode = int(words[4]) if "memfd:armillary" in line else None
        elif inode is not None and words[0] == "Rss:":
            found[inode] = found.get(inode, 0) + int(words[1])
    return found


def users() -> dict[int, tuple[int, dict[int, int]]]:
    """Each process of this machine that has segments: its parent, and which they are."""
    found: dict[int, tuple[int, dict[int, int]]] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if its := segments(process):
                parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                found[int(process.name)] = parent, its
    return found


def test_nothing_is_left_of_a_run_whose_processes_are_all_killed(tmp_path):
    """SIGKILL, control included: the kernel removes what it has no user of any more.

    What the whole machine uses is not looked at: others come and go meanwhile.
    """
    files = set(Path("/dev/shm").glob("*armillary*"))
    command = [sys.executable, "-m", "control", "start", "--json", "--run-dir", str(tmp_path / "run")]
    command += ["--task", "spheres.testing.synthetic:Synthetic", "--task-option", "parameters=6000000"]
    command += ["--steps", "100000", "--spheres", "3", "--microbatches", "3", "--batch-size", "3"]
    command += ["--task-option", "samples=64"]
    command += ["--wire", "shm", "--eval-every", "none", "--checkpoint-every", "none"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    ) as control:
        assert control.stdout is not None
        used: dict[int, int] = {}
        pids: list[int] = []
        try:
            for line in control.stdout:
                record = json.loads(line)
                if record.get("event") == "step" and record["step"] >= 2:
                    break
            for pid, (parent, its) in users().items():
                if control.pid in (pid, parent):
                    pids.append(pid)
                    used |= {inode: max(kib, used.get(inode, 0)) for inode, kib in its.items()}
            assert len(pids) == 4
        finally:
            for pid in {*pids, control.pid}:
                os.kill(pid, signal.SIGKILL)
        control.wait(20)
    for pid in pids:
        _wait_until_gone(pid)
    assert sum(used.values()) > 60_000, "a run of this size holds 24 MB in each of four processes"
    assert not [pid for pid, (_, its) in users().items() if its.keys() & used.keys()]
    assert set(Path("/dev/shm").glob("*armillary*")) == files


def _wait_until_gone(pid: int) -> None:
    """It is no child of this process."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([fd], [], [], 20.0)[0], f"{pid} lives"
    finally:
        os.close(fd)


# ---- where no memory is shared

NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


def _no_namespaces() -> str:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return "another PID namespace needs root and unshare (util-linux)"
    tried = subprocess.run([*NAMESPACE, "true"], check=False, capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"another PID namespace cannot be made: {tried.stderr.strip()}"


@pytest.mark.slow
@pytest.mark.parametrize("wire", ["auto", "shm"])
def test_a_sphere_in_another_container(wire, run, tmp_path):
    """It sees no process of this one's: its payload goes inline, or it is refused with a word on what to do."""
    if reason := _no_namespaces():
        pytest.skip(reason)
    chosen = config(wire=wire, spheres=1, min_spheres=1, steps=8, patience=4.0, run_dir=tmp_path / "run")

    async def main() -> tuple[Any, int, str, set[str]]:
        async with Training(chosen) as training:
            tree = training.controller.tree
            await training.step(1)
            command = [*NAMESPACE, sys.executable, "-m", "spheres", "start", "--control", tree.address]
            command += ["--orphan-timeout", "4s"]  # for so long one that is refused looks for another place
            other = await start_process(*command, stdout=subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE)
            assert other.stderr is not None
            try:
                if wire == "shm":
                    said = (await other.stderr.read()).decode()
                    code = await other.wait()
                else:
                    await tree.until(lambda: len([n for n in tree.names() if tree.state_of(n) == "active"]) == 2)
                    said, code = "", 0
                await training.run()
            finally:
                if other.returncode is None:
                    other.kill()
                await other.wait()
            carriers = {type(child.outbox.carrier).__name__ for child in tree.hub.children.values()}
        return training.summary, code, said, carriers

    summary, code, said, _ = run(main(), timeout=120)
    assert summary.error is None
    assert summary.weights_sha256 == reference(load_task("digits"), chosen).weights_sha256
    if wire == "shm":
        assert code != 0
        assert "shares no memory with control" in said
        assert "--wire auto" in said
    else:
        records = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
        assert len({part[2] for record in records for part in record["contributions"]}) == 2
