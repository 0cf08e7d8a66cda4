"""``sphere start --hold``: a sphere outlives its run, and takes part in what control does next: the same process."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from control.config import RunConfig
from control.reference import reference
from spheres.task import load_task

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

#: the command, asking again at once
SPHERE = """
import spheres.sphere
spheres.sphere._ASK_SECONDS = 0.1
from spheres.cli import main
main()
"""


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Node:
    """A process and what it says, line by line."""

    def __init__(self, command: list[str], cwd: Path, **environ: str) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []

    @property
    def pid(self) -> int:
        return self.process.pid

    def until(self, text: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if text in line:
                return line
        pytest.fail(f"it ended and has not said {text!r}: {''.join(self.lines[-20:])}")

    def ends(self, *signals: signal.Signals) -> int:
        for sign in signals:
            self.process.send_signal(sign)
        self.lines += self.process.communicate(timeout=100)[0].splitlines(keepends=True)
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Any]:
    """Return what makes control, and what makes a sphere, at one address."""
    address = f"127.0.0.1:{free_port()}"
    with contextlib.ExitStack() as stack:

        def made(command: list[str], **environ: str) -> Node:
            node = Node(command, tmp_path, **environ)
            stack.callback(node.close)
            return node

        def control(*flags: str, run: str = "run", **environ: str) -> Node:
            command = [sys.executable, "-m", "control", "start", "--resume", "auto", "--json", "--spheres", "0"]
            return made([*command, "--run-dir", run, "--listen", address, *flags], **environ)

        def sphere(*flags: str, **environ: str) -> Node:
            environ = {"ARMILLARY_HOLD": "true", **environ}
            words = ["start", "--control", address, *flags]
            return made([sys.executable, "-c", SPHERE, *words], **environ)

        yield control, sphere


def asked(address: str, service: str) -> str:
    command = [sys.executable, "-m", "spheres", "health", address, "--service", service]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.split()[-1]


@pytest.mark.slow
def test_the_same_processes_take_part_when_the_total_is_raised(nodes: Any, tmp_path: Path) -> None:
    control, sphere = nodes
    listens = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    # one below the other: who is above ends last
    flags = ("--min-spheres", "2", "--fan-out", "1", "--hold")
    first = control("--steps", "20", *flags)
    spheres = [sphere("--listen", listen) for listen in listens]
    summary = json.loads(first.until('"event": "summary"'))
    assert summary["state"] == "completed"
    for one, listen in zip(spheres, listens, strict=True):
        one.until("the run is over; this sphere stays, and asks again every 0.1 s (--hold)")
        assert one.process.poll() is None
        assert (asked(listen, ""), asked(listen, "ready")) == ("SERVING", "NOT_SERVING")
    assert first.ends(signal.SIGTERM) == 0

    second = control("--steps", "40", *flags)
    summary = json.loads(second.until('"event": "summary"'))
    wanted = reference(load_task("digits"), RunConfig(task="digits", steps=40)).weights_sha256
    assert (summary["state"], summary["steps"], summary["weights_sha256"]) == ("completed", 40, wanted)
    assert {report["pid"] for report in summary["spheres"]} == {one.pid for one in spheres}

    # held again, each signal ends one in order
    for one, sign in zip(spheres, (signal.SIGTERM, signal.SIGINT), strict=True):
        one.until("this sphere stays")
        assert one.ends(sign) == 0
        said = [line for line in one.lines if "this sphere stays" in line]
        assert len(said) == 2  # once for each run, however often control has refused it
    assert second.ends(signal.SIGTERM) == 0


@pytest.mark.slow
def test_the_next_run_is_computed_with_the_code_that_is_there_by_then(nodes: Any, tmp_path: Path) -> None:
    """A module is imported once in the life of a process, and what it has cached would stay too."""
    control, sphere = nodes
    source = """
        from spheres.testing.synthetic import Synthetic

        class Mine(Synthetic):
            def gradient(self, weights, samples, rng, out):
                sums = super().gradient(weights, samples, rng, out)
                for array in out.values():
                    array *= SCALE
                return sums

        SCALE = 1.0
    """
    held, shas = None, []
    for run, scale in (("one", "1.0"), ("two", "0.25")):
        (tmp_path / "mine.py").write_text(textwrap.dedent(source).replace("1.0", scale))
        first = control("--task", "mine:Mine", "--steps", "3", run=run)
        held = held or sphere(PYTHONPATH=str(tmp_path))
        shas.append(json.loads(first.until('"event": "summary"'))["weights_sha256"])
        first.ends()
    assert shas[0] != shas[1]
    assert held is not None
    assert held.ends(signal.SIGTERM) == 0


@pytest.mark.slow
def test_it_waits_for_a_control_that_is_gone_and_takes_another_run_of_another_task(nodes: Any) -> None:
    control, sphere = nodes
    first = control("--steps", "1000000", "--min-spheres", "2", "--fan-out", "1")
    held = [sphere("--orphan-timeout", "0.5s") for _ in range(2)]
    first.until('"event": "step"')
    first.process.kill()
    for one in held:
        one.until("this sphere stays, and asks again every 0.1 s (--hold)")
    task = ("--task", "spheres.testing.synthetic:Synthetic", "--steps", "3")
    second = control(*task, "--min-spheres", "2", run="other")
    summary = json.loads(second.until('"event": "summary"'))
    assert (summary["state"], summary["steps"]) == ("completed", 3)
    assert {report["pid"] for report in summary["spheres"]} == {one.pid for one in held}
    for one in held:
        assert one.ends(signal.SIGTERM) == 0


def test_local_spheres_of_a_control_that_is_held_end_with_the_run(nodes: Any) -> None:
    control, _ = nodes
    held = control("--steps", "3", "--spheres", "1", ARMILLARY_HOLD="true")
    (report,) = json.loads(held.until('"event": "summary"'))["spheres"]
    # before the summary is shown all spheres are gone from the tree; its process is a moment later
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(report["pid"])
        ended, _, _ = select.select([descriptor], [], [], 60.0)
        os.close(descriptor)
        assert ended, "it lives on"
    assert held.process.poll() is None
    assert held.ends(signal.SIGTERM) == 0


def test_who_is_told_to_leave_leaves(nodes: Any, tmp_path: Path) -> None:
    control, sphere = nodes
    control("--steps", "1000000")
    held = sphere()
    held.until("joins control")
    assert held.ends(signal.SIGTERM) == 0
    another = sphere()
    name = another.until("joins control").split(" joins ")[0].split()[-1]
    drain = [sys.executable, "-m", "control", "drain", name, "--run-dir", "run"]
    assert subprocess.run(drain, cwd=tmp_path, timeout=60, check=False).returncode == 0
    assert another.ends() == 0


def test_what_is_wrong_for_good_ends_it(nodes: Any, tmp_path: Path) -> None:
    control, sphere = nodes
    (tmp_path / "here").mkdir()
    source = """
        from spheres.tasks.digits import Digits

        class Mine(Digits):
            pass
    """
    (tmp_path / "here" / "only_here.py").write_text(textwrap.dedent(source))
    control("--task", "only_here:Mine", "--steps", "3", PYTHONPATH=str(tmp_path / "here"))
    held = sphere()
    assert held.ends() == 3
    assert "only_here" in held.lines[-1]
