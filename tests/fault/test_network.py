"""Hosts with a network between them that is slow, loses frames, or is cut: real processes, real TCP, the same bits.

Control on host 1, three spheres each on hosts 2 and 3, which are network namespaces of this machine (`lab.py`).
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from control.config import RunConfig
from control.reference import reference
from spheres.testing.synthetic import Synthetic
from tests.fault.lab import Lab, missing

pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(60),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

CONTROL = "10.77.0.1:7070"
PARAMETERS, SAMPLES = 20_000, 1_200
#: bytes of one copy of the weights: 20 chunks
MODEL_BYTES = 4 * PARAMETERS
#: longer than the lease of 4 s
CUT_SECONDS = 8.0

Record = dict[str, Any]


def config(steps: int) -> RunConfig:
    settings = {"task": "spheres.testing.synthetic:Synthetic", "batch_size": 48, "microbatches": 12, "fan_out": 3}
    return RunConfig(**settings, steps=steps, chunk_bytes=4096, eval_every=None, checkpoint_every=None)


class Run:
    """A run on the hosts of a lab. Mutable state: its processes, and what control has printed and nobody has read."""

    def __init__(self, lab: Lab, directory: Path, *, steps: int, compute_seconds: float = 0.01) -> None:
        self._lab, self._directory = lab, directory
        options = {"parameters": PARAMETERS, "samples": SAMPLES, "compute_seconds": compute_seconds}
        settings = config(steps)
        words = ["start", "--json", "--log-every", "1steps", "--run-dir", "run", "--spheres", "0", "--min-spheres", "6"]
        words += ["--listen", CONTROL, "--insecure", "--task", settings.task, "--steps", str(steps)]
        words += [word for name, value in options.items() for word in ("--task-option", f"{name}={value}")]
        words += ["--fan-out", "3", "--batch-size", "48", "--microbatches", "12", "--chunk-bytes", "4096"]
        words += ["--eval-every", "none", "--checkpoint-every", "none"]
        self._control = self._start(1, "control", [sys.executable, "-m", "control", *words], stdout=subprocess.PIPE)
        self._spheres = [
            self._start(
                host,
                f"sphere-{host}-{number}",
                [sys.executable, "-m", "spheres", "start", "--control", CONTROL]
                + ["--listen", "0.0.0.0:0", "--insecure", "--host", f"host-{host}", "-v"],
            )
            for host in (2, 3)
            for number in range(3)
        ]
        self._printed: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _start(self, host: int, name: str, words: list[str], **options: Any) -> subprocess.Popen[str]:
        with (self._directory / f"{name}.log").open("w") as log:
            return self._lab.start(host, words, cwd=self._directory, stderr=log, **options)

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

    def spheres(self) -> dict[str, Record]:
        """What `control-cli spheres` says, asked on the host of control."""
        words = [sys.executable, "-m", "control", "spheres", "--json", "--address", CONTROL]
        return {sphere["sphere_id"]: sphere for sphere in json.loads(self._lab.call(1, words, timeout=20))}

    def stop(self) -> None:
        self._lab.call(1, [sys.executable, "-m", "control", "stop", "--address", CONTROL], timeout=20)

    def ended(self, *, seconds: float = 20.0) -> Record:
        """Wait for the end of every process; return the summary."""
        summary = self.until(lambda record: record["event"] == "summary", seconds)
        assert self._control.wait(timeout=10) == 0
        assert [sphere.wait(timeout=10) for sphere in self._spheres] == [0] * 6
        return summary

    def journal(self) -> list[Record]:
        lines = (self._directory / "run" / "journal.jsonl").read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def log(self, name: str) -> str:
        return (self._directory / f"{name}.log").read_text()[-2_000:]

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


def on_host(spheres: dict[str, Record], host: int) -> set[str]:
    return {name for name, sphere in spheres.items() if sphere["report"]["host"] == f"host-{host}"}


def lives(spheres: dict[str, Record]) -> dict[str, int]:
    return {name: int(sphere["report"]["incarnation"]) for name, sphere in spheres.items()}


def contributors(record: Record) -> set[str]:
    return {part[2] for part in record["contributions"]}


def print_times(what: str, cut: float, healed: float, journal: list[Record], cut_off: set[str]) -> None:
    """For docs/reliability.md: seconds after the cut and after its end, by the clock of control's records."""
    after = [record for record in journal if record["time"] > cut]
    without = next((r["time"] - cut for r in after if not contributors(r) & cut_off), None)
    times = [cut, *(record["time"] for record in after if record["time"] < healed), healed]
    back = {name: next(r["time"] - healed for r in after if r["time"] > healed and name in contributors(r)) for name in cut_off}
    print(f"\n{what}: next step without the cut off after {without}; longest pause {max(b - a for a, b in pairwise(times))}")  # noqa: T201
    print(f"{what}: contributions after healing: {back}")


def test_a_slow_network_that_loses_frames(lab: Lab, start: Callable[..., Run]) -> None:
    for host in (1, 2, 3):  # two cables lie between two hosts: 20 ms one way, 1 % loss
        lab.tell(f"slow {host} 10 20 0.5")
    run = start(steps=40)
    run.until_step(5, seconds=20)
    before = {host: int(lab.tell(f"count {host}").split()[1]) for host in (2, 3)}
    first = len(run.journal())
    spheres = run.spheres()
    summary = run.ended(seconds=30)
    got = {host: int(lab.tell(f"count {host}").split()[1]) - before[host] for host in (2, 3)}
    steps = summary["steps"] - first
    run.check(summary)
    for host in (2, 3):
        names = on_host(spheres, host)
        above = [spheres[name]["parent_id"] for name in names]
        assert len(names) == 3
        assert [parent for parent in above if parent not in names] == ["control"], "one edge leaves the host"
        assert steps * MODEL_BYTES * 0.9 < got[host] < 1.6 * steps * MODEL_BYTES, "one copy of the weights"


@pytest.mark.parametrize("way", ["", "from", "to"], ids=["both ways", "from it", "to it"])
def test_a_host_that_is_cut_off_comes_back(way: str, lab: Lab, start: Callable[..., Run]) -> None:
    run = start(steps=100_000)
    run.until_step(10, spheres=6, seconds=20)
    before = run.spheres()
    lab.tell(f"cut 3 {way}")
    cut = time.time()
    run.until_step(0, spheres=3, seconds=6)
    run.go_on(cut + CUT_SECONDS - time.time())
    lab.tell("heal 3")
    healed = time.time()
    done = run.until_step(0, spheres=6, seconds=15)
    run.until_step(done + 10, seconds=10)
    after = run.spheres()
    run.stop()
    summary = run.ended()
    run.check(summary)
    assert lives(after) == lives(before), "the same ids, the same lives"
    cut_off = on_host(before, 3)
    assert len(cut_off) == 3
    journal = run.journal()
    meanwhile = [record for record in journal if cut + 6 < record["time"] < healed]
    assert len(meanwhile) > 5
    assert not any(contributors(record) & cut_off for record in meanwhile)
    assert cut_off <= set().union(*map(contributors, journal[done - 1 :]))
    print_times(f"host 3 cut {way}", cut, healed, journal, cut_off)


def test_a_control_that_is_cut_off_from_all_loses_no_step(lab: Lab, start: Callable[..., Run]) -> None:
    run = start(steps=100_000)
    run.until_step(10, spheres=6, seconds=20)
    before = run.spheres()
    lab.tell("cut 1")
    cut = time.time()
    run.go_on(CUT_SECONDS)
    lab.tell("heal 1")
    healed = time.time()
    done = run.until_step(0, spheres=6, seconds=15)
    run.until_step(done + 10, seconds=10)
    after = run.spheres()
    run.stop()
    summary = run.ended()
    run.check(summary)
    assert lives(after) == lives(before)
    assert len(lives(after)) == 6
    journal = run.journal()
    assert not [record["step"] for record in journal if cut + 1 < record["time"] < healed]
    print_times("control cut", cut, healed, journal, set(lives(before)))
