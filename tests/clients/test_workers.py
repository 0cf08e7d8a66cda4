"""Workers in every language that is here: vectors, conformance, and whole runs beside Python spheres, with kills.

Real processes and real signals. `make test-clients` builds what there is; what is not built is skipped, aloud.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from control.config import RunConfig
from control.conformance import CASES
from control.reference import reference
from control.sync_client import SyncClient
from spheres.task import load_task
from tests.launching import listening

pytestmark = [pytest.mark.clients, pytest.mark.processes, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
CLIENTS = ROOT / "examples" / "clients"
#: name -> command, and what must be there for it
WORKERS = {
    "python": ([str(BIN / "sphere"), "start"], [BIN / "sphere"]),
    "node": (["node", str(CLIENTS / "node" / "worker.js")], [CLIENTS / "node" / "node_modules" / ".made"]),
    "cpp": ([str(CLIENTS / "cpp" / "build" / "worker")], [CLIENTS / "cpp" / "build" / "worker"]),
}
FOREIGN = [name for name in WORKERS if name != "python"]
MICROBATCHES, BATCH, SAMPLES = 12, 48, 1437
#: relative difference of the last loss from that of Python alone: other languages round otherwise, step by step
CLOSE = 1e-3
#: seconds for what takes a moment on a machine that has nothing else to do
PATIENCE = 120


def command_of(name):
    command, needed = WORKERS[name]
    missing = [str(path.relative_to(ROOT)) for path in needed if not path.exists()]
    if shutil.which(command[0]) is None:
        missing.insert(0, command[0])
    if missing:
        pytest.skip(
            f"NO {name.upper()} WORKER HERE: {', '.join(missing)} is missing; build it with `make clients-{name}`"
        )
    return command


class Run:
    """``control-cli start`` with Python spheres of its own; its lines are read one by one."""

    def __init__(self, folder, stack, *, spheres, others, steps, fan_out=12):
        self.folder, self.stack, self.others = folder, stack, []
        flags = {"task": "digits", "steps": steps, "microbatches": MICROBATCHES, "batch-size": BATCH,
                 "chunk-bytes": 4096, "window-chunks": 2, "spheres": spheres, "min-spheres": spheres + others,
                 "fan-out": fan_out, "patience": "3s", "run-dir": folder / "run",
                 "log-every": "1steps"}  # fmt: skip
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        self.errors = (folder / "control.err").open("w")
        stack.callback(self.errors.close)
        self.process = subprocess.Popen(
            [str(BIN / "control-cli"), "start", "--json", *words],
            stdout=subprocess.PIPE, stderr=self.errors, text=True, cwd=folder,
        )  # fmt: skip
        stack.callback(self._end)
        errors = folder / "control.err"
        self.address = listening(folder / "run", self.process, seconds=PATIENCE, errors=errors)

    def _end(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process.stdout.close()

    def add(self, name):
        """Start a worker beside the run's own spheres."""
        log = (self.folder / f"{name}-{len(self.others)}.log").open("w")
        self.stack.callback(log.close)
        worker = subprocess.Popen(
            command_of(name), env={**os.environ, "ARMILLARY_CONTROL": self.address}, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        self.stack.callback(self._kill, worker)
        self.others.append(worker)
        return worker

    @staticmethod
    def _kill(worker):
        if worker.poll() is None:
            worker.kill()
        worker.wait()

    def until_step(self, step):
        """Read lines until so many steps are done."""
        for line in self.process.stdout:
            event = json.loads(line)
            if event["event"] == "step" and event["step"] >= step:
                return
        pytest.fail(f"the run ended before step {step}: {(self.folder / 'control.err').read_text()}")

    def until_stuck(self):
        """Wait until no step ends any more, because somebody who takes part has stopped: no step takes so long.

        It is below ``patience``, by which control would give up who has stopped before anybody kills it.
        """
        journal, size = self.folder / "run" / "journal.jsonl", -1
        while size != (now := journal.stat().st_size):
            size = now
            time.sleep(1.5)

    def stop(self):
        """End the run: it goes on for as long as a test needs it."""
        with SyncClient(self.address, deadline=PATIENCE) as client:
            client.stop("seen enough")

    def summary(self):
        """Read to the end."""
        last = None
        for line in self.process.stdout:
            last = json.loads(line)
        assert self.process.wait(timeout=PATIENCE) == 0, (self.folder / "control.err").read_text()
        assert last["event"] == "summary"
        return last

    def journal(self):
        return [json.loads(line) for line in (self.folder / "run" / "journal.jsonl").read_text().splitlines()]


@contextmanager
def run_of(folder, **more):
    with ExitStack() as stack:
        yield Run(folder, stack, **more)


def counts_each_sample_once(records, steps):
    """Of every step each microbatch was computed by somebody once, and no sample is missing."""
    assert [record["step"] for record in records] == list(range(steps))
    for record in records:
        at = 0
        for lo, hi, sphere in record["contributions"]:
            assert (lo, bool(sphere)) == (at, True), record["contributions"]
            at = hi
        assert at == MICROBATCHES
        first = record["step"] * BATCH % (-(-SAMPLES // BATCH) * BATCH)
        assert record["used_samples"] == record["batch_samples"] == min(BATCH, SAMPLES - first)


def learns_as_python_alone(records, steps):
    losses = reference(
        load_task("digits"), RunConfig(steps=steps, microbatches=MICROBATCHES, batch_size=BATCH, chunk_bytes=4096)
    ).losses
    assert [record["loss"] for record in records] == pytest.approx(losses, rel=CLOSE)


def contributors(records):
    return {sphere for record in records for _, _, sphere in record["contributions"]}


@pytest.mark.parametrize("name", FOREIGN)
def test_the_vectors_decode(name):
    command = [*command_of(name), "--vectors", str(ROOT / "protos" / "testdata")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for path in (ROOT / "protos" / "testdata").iterdir():
        assert path.name in done.stdout


@pytest.mark.parametrize("name", FOREIGN)
def test_vectors_that_are_wrong_are_noticed(name, tmp_path):
    """The twin of the test above: one digit of a checksum is another one."""
    folder = tmp_path / "testdata"
    shutil.copytree(ROOT / "protos" / "testdata", folder)
    digests = (folder / "digests.json").read_text()
    assert digests.count("e3069283") == 1
    (folder / "digests.json").write_text(digests.replace("e3069283", "e3069284"))
    command = [*command_of(name), "--vectors", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stdout + done.stderr


@pytest.mark.parametrize("name", WORKERS)
def test_every_case_of_the_conformance_command_passes(name, tmp_path):
    command = [str(BIN / "control-cli"), "conformance", "--timeout", "60s", "--log-dir", str(tmp_path / "logs")]
    done = subprocess.run(
        [*command, "--", *command_of(name)], capture_output=True, text=True, timeout=800, check=False, cwd=tmp_path
    )
    sys.stdout.write(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"{len(CASES)} passed; logs in {tmp_path / 'logs'}"


@pytest.mark.parametrize("name", WORKERS)
def test_two_of_them_beside_two_python_spheres_finish_a_run(name, tmp_path):
    steps = 60
    command_of(name)
    with run_of(tmp_path, spheres=2, others=2, steps=steps) as run:
        workers = [run.add(name) for _ in range(2)]
        summary = run.summary()
        assert [worker.wait(timeout=PATIENCE) for worker in workers] == [0, 0]
    assert (summary["state"], summary["steps"]) == ("completed", steps)
    records = run.journal()
    counts_each_sample_once(records, steps)
    learns_as_python_alone(records, steps)
    assert len(contributors(records)) == 4


@pytest.mark.parametrize("name", WORKERS)
def test_each_is_killed_in_mid_step_and_the_run_survives(name, tmp_path):
    """SIGKILL, one after the other, at a moment when the steps run; another takes its place each time."""
    command_of(name)
    # without end: it shall not be over before it has come to the last of what is done to it
    with run_of(tmp_path, spheres=2, others=1, steps=1_000_000) as run:
        worker = run.add(name)
        for step in (20, 120, 220):
            run.until_step(step)
            if step == 20:  # those after it may not have joined yet
                worker.send_signal(signal.SIGSTOP)
                run.until_stuck()
            worker.send_signal(signal.SIGKILL)
            assert worker.wait(timeout=PATIENCE) == -signal.SIGKILL
            worker = run.add(name)
        run.until_step(400)
        run.stop()
        summary = run.summary()
    assert summary["state"] == "stopped"
    records = run.journal()
    assert len(records) > 400
    counts_each_sample_once(records, len(records))
    # what two more languages round otherwise grows over so many steps: the first of them are compared
    learns_as_python_alone(records[:40], 40)
    assert len(contributors(records)) >= 3
    assert any(record["attempts"] for record in records)


def test_all_of_them_in_one_tree(tmp_path):
    """Two levels: those in other languages hang below Python spheres where there is no more room at control."""
    steps = 60
    names = [name for name in FOREIGN if all(path.exists() for path in WORKERS[name][1])]
    if not names:
        pytest.skip("NO WORKER IN ANOTHER LANGUAGE HERE: build them with `make clients-node clients-cpp`")
    with run_of(tmp_path, spheres=2, others=2 * len(names), steps=steps, fan_out=2) as run:
        workers = [run.add(name) for name in names for _ in range(2)]
        summary = run.summary()
        assert [worker.wait(timeout=PATIENCE) for worker in workers] == [0] * len(workers)
    assert (summary["state"], summary["steps"]) == ("completed", steps)
    records = run.journal()
    counts_each_sample_once(records, steps)
    learns_as_python_alone(records, steps)
    assert len(contributors(records)) == 2 + len(workers)
    parents = {sphere["parent"] for sphere in summary["spheres"]}
    assert len(parents - {"control"}) >= 1
