"""What a supervisor does that knows one command line: first start, start after a kill, start of a run that is over."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from control.client import Client
from control.config import RunConfig
from control.reference import reference
from spheres.errors import RefusedError
from spheres.grpc_link import GrpcTransport
from spheres.sphere import Sphere, SphereOptions
from spheres.task import load_task

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]


def _start(directory: Path, *flags: str) -> subprocess.Popen[str]:
    """Start what a Pod starts each time: the same words."""
    command = [sys.executable, "-m", "control", "start", "--resume", "auto", "--json", *flags]
    environ = {**os.environ, "ARMILLARY_RUN_DIR": str(directory / "run")}
    return subprocess.Popen(
        command, cwd=directory, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _until(process: subprocess.Popen[str], event: str, step: int = 0) -> dict[str, object]:
    assert process.stdout is not None
    for line in process.stdout:
        record = json.loads(line)
        if record["event"] == event and (event != "step" or record["step"] >= step):
            return record
    pytest.fail(f"no {event} before the end: {process.stderr.read() if process.stderr else ''}")


def _summary(process: subprocess.Popen[str]) -> dict[str, object]:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def _journal(directory: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (directory / "run" / "journal.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_every", ["none", "10steps"])
def test_one_command_line_begins_goes_on_and_knows_when_it_is_done(checkpoint_every, tmp_path):
    flags = ("--steps", "60", "--checkpoint-every", checkpoint_every, "--orphan-timeout", "1s")
    first = _start(tmp_path, *flags, "--spheres", "2", "--log-every", "1steps")
    assert first.stdout is not None
    fcntl.fcntl(first.stdout, fcntl.F_SETPIPE_SZ, 4096)  # some ten steps: it waits until they are read
    if checkpoint_every != "none":
        _until(first, "checkpoint")  # it is saved beside the steps, and takes as long as the disk does
    _until(first, "step", 25)
    first.kill()
    first.communicate(timeout=30)
    second = _summary(_start(tmp_path, *flags, "--spheres", "2"))
    wanted = reference(load_task("digits"), RunConfig(task="digits", steps=60)).weights_sha256
    assert (second["state"], second["weights_sha256"]) == ("completed", wanted)
    journal = _journal(tmp_path)
    assert {record["step"] for record in journal} == set(range(60))
    begun = min(int(str(record["step"])) for record in journal if record["term"] == 2)
    assert begun == 0 if checkpoint_every == "none" else begun >= 10
    # with no sphere at all, and nothing else is done: no step, no evaluation, no checkpoint
    third = _summary(_start(tmp_path, *flags, "--spheres", "0"))
    assert third == second
    assert _journal(tmp_path) == journal
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {
        k: v for k, v in second.items() if k != "event"
    }
    # a larger total is more to do
    fourth = _summary(_start(tmp_path, "--steps", "70", "--spheres", "1"))
    assert (fourth["state"], fourth["steps"]) == ("completed", 70)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again(tmp_path):
    _summary(_start(tmp_path, "--steps", "4", "--spheres", "1"))
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    (saved / "control.pb").write_bytes(b"")
    again = _start(tmp_path, "--steps", "6", "--spheres", "1")
    _, err = again.communicate(timeout=60)
    assert again.returncode == 4
    assert "no good checkpoint" in err


@pytest.mark.slow
def test_a_run_that_another_control_still_has_is_waited_for(tmp_path):
    """As a Pod of control that was deleted by force, and goes on for a while beside the next one."""
    flags = ("--steps", "60", "--checkpoint-every", "none", "--spheres", "1")
    first = _start(tmp_path, *flags, "--log-every", "1steps")
    assert first.stdout is not None
    fcntl.fcntl(first.stdout, fcntl.F_SETPIPE_SZ, 4096)
    _until(first, "step", 5)
    second = _start(tmp_path, *flags)
    assert second.stderr is not None
    assert f"is in use by process {first.pid}: waiting for it, up to 60 s" in second.stderr.readline()
    first.kill()
    first.communicate(timeout=30)
    assert _summary(second)["state"] == "completed"
    assert {record["term"] for record in _journal(tmp_path)} == {1, 2}


@pytest.mark.slow
@pytest.mark.parametrize("end", ["completed", "stopped", "restarted"])
def test_a_run_that_is_over_and_held_answers_until_it_is_told_to_go(end, run, tmp_path):
    flags = ("--spheres", "1", "--steps", "100000" if end == "stopped" else "20")
    if end == "restarted":
        _summary(_start(tmp_path, *flags))
    process = _start(tmp_path, *flags, "--hold")

    async def stop() -> None:
        async with Client((tmp_path / "run" / "address").read_text().split()[0]) as client:
            await client.stop("enough")

    if end == "stopped":
        _until(process, "step", 5)
        run(stop())
    summary = _until(process, "summary")
    state = "stopped" if end == "stopped" else "completed"
    assert summary["state"] == state
    address = (tmp_path / "run" / "address").read_text().split()[0]

    async def look() -> None:
        async with Client(address) as client:
            assert (await client.status()).step == summary["steps"]
        with pytest.raises(RefusedError, match="the run is over"):
            await Sphere(SphereOptions(control=address, orphan_timeout=25.0), GrpcTransport()).run()

    run(look())
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, ""), err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["state"] == state
