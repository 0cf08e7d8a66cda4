"""Hosts with a network between them that is slow, loses frames, or is cut: real processes, real TCP, the same bits.

Control on host 1, three spheres each on hosts 2 and 3, which are network namespaces of this machine (`lab.py`).
"""

from __future__ import annotations

import json
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from control.config import RunConfig
from control.reference import reference
from spheres.testing.synthetic import Synthetic
from tests.fault.lab import Lab, missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.processes,
    pytest.mark.timeout(240),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

ROOT = Path(__file__).parents[2]
CONTROL = "10.77.0.1:7070"
PARAMETERS, SAMPLES = 20_000, 1_200
#: bytes of one copy of the weights: 20 chunks
MODEL_BYTES = 4 * PARAMETERS

Record = dict[str, Any]


def config(steps: int) -> RunConfig:
    settings = {"task": "spheres.testing.synthetic:Synthetic", "batch_size": 48, "microbatches": 12, "fan_out": 3}
    return RunConfig(**settings, steps=steps, chunk_bytes=4096, eval_every=None, checkpoint_every=None)


class Run:
    """A run on the hosts of a lab. Mutable state: its processes, and what control has printed and nobody has read."""

    def __init__(
        self,
        lab: Lab,
        directory: Path,
        *,
        steps: int,
        compute_seconds: float = 0.02,
        per_host: int = 3,
        fan_out: int = 3,
    ) -> None:
        self._lab, self._directory = lab, directory
        options = {"parameters": PARAMETERS, "samples": SAMPLES, "compute_seconds": compute_seconds}
        settings = config(steps)
        words = ["start", "--json", "--log-every", "1steps", "--run-dir", "run", "--spheres", "0"]
        words += ["--min-spheres", str(2 * per_host), "--fan-out", str(fan_out)]
        words += ["--listen", CONTROL, "--insecure", "--task", settings.task, "--steps", str(steps)]
        words += [word for name, value in options.items() for word in ("--task-option", f"{name}={value}")]
        words += ["--batch-size", "48", "--microbatches", "12", "--chunk-bytes", "4096"]
        words += ["--eval-every", "none", "--checkpoint-every", "none"]
        self._control = self._start(1, "control", [sys.executable, "-m", "control", *words], stdout=subprocess.PIPE)
        sphere = [sys.executable, "-m", "spheres", "start", "--control", CONTROL, "--listen", "0.0.0.0:0", "--insecure"]
        self._spheres = [
            self._start(
                host,
                f"sphere-{host}-{number}",
                [*sphere, "--host", f"host-{host}"],
            )
            for host in (2, 3)
            for number in range(1, per_host + 1)
        ]
        self._printed: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _start(self, host: int, name: str, words: list[str], **options: Any) -> subprocess.Popen[str]:
        with (self._directory / f"{name}.log").open("w") as log:
            return self._lab.start(host, words, cwd=self._directory, stderr=log, **{"stdout": log, **options})

    def _read(self) -> None:
        assert self._control.stdout is not None
        for line in self._control.stdout:
            self._printed.put(json.loads(line))
        self._printed.put(None)

    def close(self) -> None:
        for process in (self._control, *self._spheres):
            process.kill()
            process.wait()
        self._reader.join()

    def until(self, fits: Callable[[Record], bool], seconds: float) -> Record:
        """Read on until control prints what fits. Fails after ``seconds``."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                record = self._printed.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                pytest.fail(f"not within {seconds} s; control says: {self.log('control')}")
            if record is None:
                pytest.fail(f"the run ended before; control says: {self.log('control')}")
            if fits(record):
                return record

    def until_step(self, step: int, *, spheres: int | None = None, seconds: float) -> int:
        """Wait until so many steps are done, with so many spheres in the last one; return how many are."""

        def fits(record: Record) -> bool:
            return record["event"] == "step" and record["step"] >= step and spheres in (None, record["spheres"])

        return int(self.until(fits, seconds)["step"])

    def go_on(self, seconds: float) -> None:
        """Read what control prints for so long: how long a fault lasts."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            try:
                assert self._printed.get(timeout=left) is not None, self.log("control")
            except queue.Empty:
                return

    def on_host(self, host: int) -> set[str]:
        """The ids of its spheres. Fails where one of them has had more than one life: it enrolled anew."""
        names = set()
        for number in (1, 2, 3):
            lives = re.findall(r"(\S+) joins \S+ \(incarnation", self.log(f"sphere-{host}-{number}"))
            assert len(lives) == 1, lives
            names |= set(lives)
        assert len(names) == 3, names
        return names

    def top(self) -> int:
        """The host whose sphere hangs below control, where each host has one."""
        return next(host for host in (2, 3) if " joins control " in self.log(f"sphere-{host}-1"))

    def kill(self, host: int) -> None:
        """Kill the sphere of a host, where each host has one."""
        self._spheres[host - 2].kill()

    def stop(self) -> None:
        self._control.send_signal(signal.SIGINT)

    def ended(self, *, seconds: float = 60.0) -> Record:
        """Wait for the end of every process; return the summary."""
        summary = self.until(lambda record: record["event"] == "summary", seconds)
        assert self._control.wait(timeout=30) in (0, 128 + signal.SIGINT)
        assert [sphere.wait(timeout=30) for sphere in self._spheres] == [0] * 6
        return summary

    def journal(self) -> list[Record]:
        lines = (self._directory / "run" / "journal.jsonl").read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def log(self, name: str) -> str:
        return (self._directory / f"{name}.log").read_text()

    def check(self, summary: Record) -> None:
        """The bits of the reference loop, every microbatch of every step once."""
        steps = summary["steps"]
        wanted = reference(Synthetic(parameters=PARAMETERS, samples=SAMPLES), config(steps)).weights_sha256
        assert summary["weights_sha256"] == wanted
        journal = self.journal()
        assert [record["step"] for record in journal] == list(range(steps))
        assert not any(record["replayed"] for record in journal)
        for record in journal:
            parts = sorted(part[:2] for part in record["contributions"])
            assert (parts[0][0], parts[-1][1]) == (0, 12), record
            assert all(before[1] == after[0] for before, after in pairwise(parts)), record


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(3) as made:
        yield made


@pytest.fixture
def start(lab: Lab, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start(**settings: Any) -> Run:
        runs.append(Run(lab, tmp_path, **settings))
        return runs[-1]

    yield start
    for run in runs:
        run.close()


def contributors(record: Record) -> set[str]:
    return {part[2] for part in record["contributions"]}


def first(journal: list[Record], fits: Callable[[Record], bool]) -> float:
    """When, by the clock of the journal, the first step that fits was committed."""
    return float(next(record["time"] for record in journal if fits(record)))


def print_back(journal: list[Record], names: set[str], healed: float) -> None:
    """Say when each of them contributed again; fails where one did not."""
    back = [first(journal, lambda r, name=name: r["time"] > healed and name in contributors(r)) for name in names]
    print(f"contributions {min(back) - healed:.2f} to {max(back) - healed:.2f} s after healing")  # noqa: T201


def test_a_slow_network_that_loses_frames(lab: Lab, start: Callable[..., Run]) -> None:
    for host in (1, 2, 3):  # two cables lie between two hosts: 20 ms one way, 1 % loss
        lab.tell(f"slow {host} 10 20 0.5")
    run = start(steps=25)
    run.until_step(5, seconds=60)
    done = -1
    while done != len(run.journal()):  # no step has ended while it was counted
        done = len(run.journal())
        before = {host: int(lab.tell(f"count {host}").split()[1]) for host in (2, 3)}
    summary = run.ended()
    got = {host: int(lab.tell(f"count {host}").split()[1]) - before[host] for host in (2, 3)}
    run.check(summary)
    copies = {host: got[host] / MODEL_BYTES / (25 - done) for host in got}
    for host in (2, 3):
        names = run.on_host(host)
        above = [summary["tree"][name] for name in names]
        assert [parent for parent in above if parent not in names] == ["control"], "one edge leaves the host"
        assert 0.9 < copies[host] < 1.6, "one copy of the weights crosses it"
    seconds = [after["time"] - before["time"] for before, after in pairwise(run.journal())]
    print(f"\nslow: a step {median(seconds):.3f} s, copies of the weights per step and host {copies}")  # noqa: T201


@pytest.mark.parametrize("cuts", [{"": 8}, {"from": 6, "to": 6}], ids=["both ways", "one way, then the other"])
def test_a_host_that_is_cut_off_comes_back(cuts: dict[str, int], lab: Lab, start: Callable[..., Run]) -> None:
    run = start(steps=100_000)
    run.until_step(10, spheres=6, seconds=60)
    times = []
    for way, seconds in cuts.items():
        lab.tell(f"cut 3 {way}")
        cut = time.time()
        # the steps that are looked at below, on a machine of any speed
        run.until_step(run.until_step(0, spheres=3, seconds=15) + 8, spheres=3, seconds=30)
        run.go_on(cut + seconds - time.time())
        times.append((way, cut, time.time()))
        lab.tell("heal 3")
        run.until_step(run.until_step(0, spheres=6, seconds=30) + 5, seconds=30)
    run.stop()
    run.check(run.ended())
    journal, lost = run.journal(), run.on_host(3)
    for way, cut, healed in times:
        without = first(journal, lambda r, cut=cut: r["time"] > cut and not contributors(r) & lost)
        meanwhile = [record for record in journal if without <= record["time"] < healed]
        assert len(meanwhile) > 5
        assert not any(contributors(record) & lost for record in meanwhile)
        print(f"\nhost 3 cut {way}: the next step {without - cut:.2f} s after it, {len(meanwhile)} meanwhile; ")  # noqa: T201
        print_back(journal, lost, healed)


def test_a_machine_that_goes_holds_up_its_children_for_a_second_only(lab: Lab, start: Callable[..., Run]) -> None:
    """From where it was nothing comes any more, not even a refusal: a dial there takes its 5 s (N11)."""
    run = start(steps=100_000, per_host=1, fan_out=1)
    run.until_step(10, spheres=2, seconds=60)
    top = run.top()
    lab.tell(f"cut {top} to")  # first: its end is the last that comes from there
    run.kill(top)
    gone = time.time()
    run.until_step(run.until_step(0, spheres=1, seconds=10) + 5, seconds=30)
    run.stop()
    summary = run.until(lambda record: record["event"] == "summary", 60)
    run.check(summary)
    back = first(run.journal(), lambda record: record["time"] > gone + 0.1) - gone
    print(f"\nmachine gone: {back:.2f} s to the next step")  # noqa: T201
    assert back < 4


def test_a_control_that_is_cut_off_from_all_loses_no_step(lab: Lab, start: Callable[..., Run]) -> None:
    run = start(steps=100_000)
    run.until_step(10, spheres=6, seconds=60)
    lab.tell("cut 1")
    cut = time.time()
    run.go_on(8)
    healed = time.time()
    lab.tell("heal 1")
    run.until_step(run.until_step(0, spheres=6, seconds=30) + 5, seconds=30)
    run.stop()
    summary = run.ended()
    run.check(summary)
    journal, names = run.journal(), run.on_host(2) | run.on_host(3)
    assert not [record["step"] for record in journal if cut + 1 < record["time"] < healed]
    print_back(journal, names, healed)


# ---- the lab itself

#: says when it is on its host: before, it is not found there
SLEEPS = ["sh", "-c", "echo here; exec sleep 600"]


def made_hosts() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True, timeout=10).stdout
    return {line.split()[0] for line in listed.splitlines()}


def test_a_lab_whose_test_is_killed_removes_itself() -> None:
    code = "import sys; from tests.fault.lab import Lab; lab = Lab(2).__enter__()\n"
    code += f"lab.start(1, {SLEEPS}, stdout=-1).stdout.readline(); print(*lab.hosts, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as test:
        assert test.stdout is not None
        hosts = set(test.stdout.readline().split())
        assert len(hosts & made_hosts()) == 2
        test.kill()
    deadline = time.monotonic() + 30
    while hosts & made_hosts():
        assert time.monotonic() < deadline


def test_a_lab_whose_switch_is_killed_is_removed_by_the_next(lab: Lab) -> None:
    process = lab.start(2, SLEEPS, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    lab.kill()
    assert len(set(lab.hosts) & made_hosts()) == 3
    with Lab(1):
        assert not set(lab.hosts) & made_hosts()
        assert process.wait(timeout=10) == -signal.SIGKILL
