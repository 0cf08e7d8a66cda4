"""What every launcher must do, seen from a whole run: started, spawned, terminated, the same bits, nothing left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from control.client import Client
from control.config import RunConfig
from control.lives import Ended
from control.reference import reference
from control.run_dir import find
from control.starting import start_process
from control.training import Summary, Training
from spheres.errors import ArmillaryError
from spheres.task import load_task

STEPS = 60


def wanted(steps: int = STEPS) -> str:
    """Return the digest of the weights of an undisturbed run of digits."""
    return reference(load_task("digits"), RunConfig(task="digits", steps=steps)).weights_sha256


async def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for what other processes do and nobody tells."""
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        await asyncio.sleep(0.02)
    pytest.fail(f"it did not come to that in {seconds:g} s")


def listening(run_dir: Path, control: subprocess.Popen[Any], *, seconds: float, errors: Path | None = None) -> str:
    """Wait until control has a port, and return where that is. ``errors`` is where it says why it has ended instead."""
    deadline = time.monotonic() + seconds
    while control.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(ArmillaryError):
            return find(None, run_dir)
        time.sleep(0.02)
    return pytest.fail(f"control does not listen: {errors.read_text() if errors else control.poll()}")


async def spawn_one(run_dir: Path) -> int:
    """Have a running control start one more sphere, and return its process id."""
    async with Client(find(None, run_dir)) as client:
        (pid,) = await client.spawn(1)
        return pid


async def cli(*words: str) -> tuple[int, str, str]:
    """Return exit code, output and errors of ``control-cli``."""
    process = await start_process(
        sys.executable, "-m", "control", *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


class NotingTraining(Training):
    """Notes whose end was not expected: those that the launcher, and nobody else, has started again."""

    def _sphere_ended(self, ended: Ended) -> None:
        self.__dict__.setdefault("ended", []).append(ended)
        super()._sphere_ended(ended)


async def run_with(config: RunConfig, *, name: str) -> Summary:
    """Train with a launcher, and hold it to what all of them promise. ``name`` is how its names begin.

    ``config`` has 3 spheres and ``STEPS`` steps.
    """
    async with NotingTraining(config) as training:
        launcher, tree = training._launcher, training._tree
        await training.step(5)
        assert launcher.living == 3
        assert not launcher.all_aside
        assert launcher.aside() == []

        # somebody else's spheres are none of its business
        launcher.joined("nowhere", 1)
        assert not launcher.dismiss("nowhere", 1, at_once=True)
        assert launcher.living == 3

        # spawn, over RPC and by the command; a request that is said again is the same
        async with Client(tree.address) as client:
            started: list[Any] = list(await client.spawn(1, "once"))
            assert await client.spawn(1, "once") == started
        code, out, err = await cli("spawn", "1", "--run-dir", str(config.run_dir), "--json")
        assert code == 0, err
        answer = json.loads(out)
        started += answer["pids"] or answer["names"]
        assert len(set(started)) == 2
        assert all(isinstance(one, int) if name == "local" else one.startswith(name) for one in started)
        assert launcher.living == 5
        await eventually(lambda: tree.living == 5)
        await training.step(5)

        # terminate: it goes, and nobody comes in its place
        victim = next(iter(sphere.id for sphere in tree.spheres.values() if sphere.active))
        life = tree.spheres[victim].incarnation
        code, _, err = await cli("terminate", victim, "--run-dir", str(config.run_dir))
        assert code == 0, err
        await eventually(lambda: launcher.living == 4)
        await eventually(lambda: tree.living == 4)
        assert not tree.spheres[victim].active or tree.spheres[victim].incarnation > life
        await training.step(5)
        assert launcher.living == 4
        summary = await training.run()
        assert tree.living == 4
    assert "ended" not in training.__dict__  # all that went were told to
    launcher.expect_end()
    launcher.kill()  # after its end nothing is left to do, and nothing fails
    await launcher.aclose()
    assert (summary.state, summary.weights_sha256) == ("completed", wanted())
    return summary
