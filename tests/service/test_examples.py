"""The examples run as they stand, each a program of its own; the hello of docs/protocol.md is what a sphere says."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from control.config import RunConfig
from control.reference import reference
from control.sync_client import SyncClient
from control.testing import local_tree
from spheres.frames import decode
from spheres.task import load_task
from spheres.testing.memory import MemoryNetwork, MemoryTransport
from spheres.testing.synthetic import Synthetic
from spheres.transport import Rpc
from spheres.v1 import work_pb2 as pb
from tests.launching import listening

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
#: those that need no run
ALONE = [path.stem for path in sorted(EXAMPLES.glob("*.py")) if path.stem != "watch_run"]
#: seconds that all of them have together, on a machine that has other things to do too
PATIENCE = 200

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE + 20)]


def environment():
    return {key: value for key, value in os.environ.items() if not key.startswith("ARMILLARY_")}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Name -> (folder, exit code, output): all run at once, each in a folder of its own."""
    running = {}
    by_name = tmp_path_factory.mktemp("by-name")
    shutil.copy(EXAMPLES / "own_task.py", by_name)
    flags = ["--task", "own_task:Points", "--task-option", "samples=500", "--spheres", "1", "--steps", "3"]
    control_cli = Path(sys.executable).with_name("control-cli")
    commands = {name: [sys.executable, str(EXAMPLES / f"{name}.py")] for name in ALONE}
    commands["by-name"] = [str(control_cli), "start", *flags, "--run-dir", "run"]
    for name, command in commands.items():
        folder = by_name if name == "by-name" else tmp_path_factory.mktemp(name)
        running[name] = (
            folder,
            subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT),
        )
    try:
        done = {name: (folder, process.communicate(timeout=PATIENCE)[0]) for name, (folder, process) in running.items()}
    finally:
        for _, process in running.values():
            process.kill()  # does nothing to one that has ended
    return {name: (folder, running[name][1].returncode, said.decode()) for name, (folder, said) in done.items()}


def summary_of(folder):
    return json.loads((folder / "runs" / "latest" / "summary.json").read_text())


@pytest.mark.processes
@pytest.mark.parametrize("name", ["by-name", *ALONE])
def test_every_example_ends_well(ran, name):
    _, code, said = ran[name]
    assert (code, "Traceback" in said) == (0, False), said


@pytest.mark.processes
def test_the_task_of_the_example_learns_and_gives_the_reference_loops_bits(ran):
    folder, _, said = ran["own_task"]
    accuracy = re.search(r"test accuracy ([\d.]+)%", said)
    assert accuracy is not None, said
    assert float(accuracy[1]) > 85
    summary = summary_of(folder)
    config = RunConfig(task="own_task:Points", steps=summary["steps"], learning_rate=0.5)
    assert summary["weights_sha256"] == reference(own_task().Points(), config).weights_sha256


@pytest.mark.processes
def test_the_same_task_by_name_takes_its_option(ran):
    folder, _, _ = ran["by-name"]
    summary = json.loads((folder / "run" / "summary.json").read_text())
    config = RunConfig(task="own_task:Points", task_options={"samples": "500"}, steps=3)
    assert summary["weights_sha256"] == reference(own_task().Points(500), config).weights_sha256


@pytest.mark.processes
def test_the_tracker_of_the_example_hears_every_step(ran):
    folder, _, said = ran["tracker"]
    lines = (folder / said.strip().rpartition(": ")[2]).read_text().splitlines()
    steps = [int(line.split()[1]) for line in lines if "loss" in line]
    assert steps == list(range(summary_of(folder)["steps"]))
    assert sum("evaluation" in line for line in lines) == 2


@pytest.mark.processes
def test_the_steps_of_the_example_give_the_same_bits_again(ran):
    folder, _, said = ran["step"]
    assert "back at step 1\nthe same five steps again gave the same bits: True" in said
    config = RunConfig(task="digits", epochs=2)
    assert summary_of(folder)["weights_sha256"] == reference(load_task("digits"), config).weights_sha256


@pytest.mark.processes
def test_the_client_of_the_example_watches_a_run_to_its_end(tmp_path):
    control_cli = Path(sys.executable).with_name("control-cli")
    flags = ["--spheres", "1", "--min-spheres", "2", "--steps", "400"]
    with (tmp_path / "control.out").open("w") as said:
        control = subprocess.Popen([str(control_cli), "start", *flags], cwd=tmp_path, env=environment(), stdout=said)
    try:
        # the script shall find it alive: it waits for another sphere, and then for the script to say that it goes on
        address = listening(tmp_path / "runs" / "latest", control, seconds=PATIENCE)
        with SyncClient(address, deadline=PATIENCE) as client:
            client.pause()
            client.spawn()
            while [sphere.state for sphere in client.spheres()] != ["active", "active"]:
                time.sleep(0.05)
        script = [sys.executable, str(EXAMPLES / "watch_run.py")]
        done = subprocess.run(
            script, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        control.wait(timeout=PATIENCE)
    finally:
        control.kill()
        control.wait()
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    summary = summary_of(tmp_path)
    version = int(re.search(r"weights of version (\d+)", done.stdout)[1])
    seen = re.search(r"(\d+) steps were seen; the last loss was ([\d.]+)", done.stdout)
    assert (version, 0 < int(seen[1]) <= 400) == (0, True)  # without those between the call to go on and the watch
    assert seen[2] == f"{summary['loss']:.4f}"
    assert re.search(r"^s-1 active", done.stdout, re.MULTILINE)
    assert "state completed" in done.stdout


def own_task():
    spec = importlib.util.spec_from_file_location("own_task", EXAMPLES / "own_task.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- docs/protocol.md


class Recording(MemoryTransport):
    """Keeps the first message that is sent on a Work link."""

    first = b""

    async def dial(self, address, rpc):
        link = await super().dial(address, rpc)
        if rpc is Rpc.WORK:
            send = link.send

            async def noted(message):
                self.first = self.first or message
                await send(message)

            link.send = noted
        return link


def test_a_sphere_says_hello_with_the_fields_that_the_document_shows(run, tmp_path):
    frames = json.loads((ROOT / "protos" / "testdata" / "frames.json").read_text())["frames"]
    shown = pb.WorkRequest.FromString(bytes.fromhex(next(f["bytes"] for f in frames if f["name"] == "hello")))
    network = MemoryNetwork()
    sphere = Recording(network, "s-1")

    async def main():
        config = RunConfig(task="synthetic", steps=1, spheres=1, wire="inline", eval_every=None, checkpoint_every=None)
        task = Synthetic(parameters=10, samples=64)

        def transport(name):
            return sphere if name == "s-1" else MemoryTransport(network, name)

        async with local_tree(config, task, transport, directory=tmp_path) as tree:
            await tree.run()

    run(main())
    said = decode(pb.WorkRequest, sphere.first)
    assert fields(said) == fields(shown)
    same = ("protocol_version", "sphere_id", "incarnation", "parent_id", "parent_incarnation", "capacity")
    assert {name: getattr(said.hello, name) for name in same} == {name: getattr(shown.hello, name) for name in same}
    assert (said.session, said.tag.step, said.tag.weights_version) == (1, -1, -1)


def fields(message):
    return [(part, [f.name for f, _ in getattr(message, part).ListFields()]) for part in ("tag", "hello")]
