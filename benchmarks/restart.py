"""A worker is killed: restarting everything, as torchrun does, against going on with what is left.

Four torchrun workers over gloo, with a checkpoint every step or every 10 steps, and four spheres in two levels, all
with steps of about 50 ms. The kinds take turns, a kill each, and only one of them runs at a time.

    python benchmarks/restart.py --torch-python PATH [--kills 10] [--json]

PATH is a Python that has torch, which the project itself does not need:

    python -m venv torch-venv && torch-venv/bin/pip install torch==2.13.0    # then --torch-python torch-venv/bin/python
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import uvloop
from common import report

from control.config_sources import load_config
from control.training import Training

#: what a step computes; with what goes around it a step is about 50 ms
COMPUTE_SECONDS = 0.045
PARAMETERS = 20_000
WORKERS = 4
#: steps before the kill
QUIET = 20
#: bound of every wait, seconds
LIMIT = 120.0
WORKER = Path(__file__).with_name("restart_worker.py")
Found = dict[str, float]


# ---- restarting everything


class Torchrun:
    """One run. Mutable state: how much of the events was read."""

    def __init__(self, process: subprocess.Popen[bytes], events: Path, log: Path) -> None:
        self.process, self.log, self._path = process, log, events
        self.events: list[dict[str, Any]] = []

    def until(self, enough: Callable[[], bool]) -> None:
        """Wait, reading what workers say; ends the program where torchrun does, or where it takes too long."""
        limit = time.monotonic() + LIMIT
        while not enough():
            if self.process.poll() is not None or time.monotonic() > limit:
                sys.exit(f"torchrun has {'ended' if self.process.poll() is not None else 'stalled'}:\n"
                         f"{self.log.read_text()[-3000:]}")  # fmt: skip
            time.sleep(0.005)
            lines = self._path.read_text().splitlines(keepends=True) if self._path.exists() else []
            self.events = [json.loads(line) for line in lines if line.endswith("\n")]

    def steps(self, since: float = 0.0) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == "step" and e["time"] > since]

    def last(self, event: str) -> float:
        """Return when the last worker was so far."""
        return float(max(e["time"] for e in self.events if e["event"] == event))


@contextmanager
def torchrun(python: Path, every: int) -> Iterator[Torchrun]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        events, log = directory / "events.jsonl", directory / "torchrun.log"
        command = [str(python), "-m", "torch.distributed.run", f"--nproc-per-node={WORKERS}", "--max-restarts=3",
                   "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", str(WORKER),
                   f"--events={events}", f"--checkpoint={directory / 'checkpoint.pt'}", f"--every={every}",
                   f"--seconds={COMPUTE_SECONDS}", f"--parameters={PARAMETERS}"]  # fmt: skip
        # Without the second, workers that come back wait for ever; so they did with --master-port.
        environment = {"GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **environment})
        try:
            yield Torchrun(process, events, log)
        finally:
            process.terminate()  # it ends its workers
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()  # and they end themselves
                process.wait(30)


def restarted(python: Path, every: int, rng: random.Random) -> Found:
    """Kill one worker of a torchrun run, at a random moment of a step."""
    with torchrun(python, every) as run:
        run.until(lambda: len(run.steps()) > QUIET)
        quiet = statistics.median(b["time"] - a["time"] for a, b in pairwise(run.steps()[2:]))
        # so that the kill is at any distance from the last checkpoint
        goal = len(run.steps()) + rng.randrange(10)
        run.until(lambda: len(run.steps()) > goal)
        time.sleep(rng.random() * quiet)
        victim = rng.choice([e["pid"] for e in run.events if e["event"] == "grouped"])
        at = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        run.until(lambda: sum(e["event"] == "start" for e in run.events) == 2 * WORKERS)
        again = min(e["time"] for e in run.events if e["event"] == "start" and e["time"] > at)
        run.until(lambda: bool(run.steps(again)))
        before = max(e["step"] for e in run.steps() if e["time"] < again)
        run.until(lambda: run.steps(again)[-1]["step"] > before)
        first = run.steps(again)[0]
        return {
            "quiet": quiet,
            "next": first["time"] - at,
            "new": next(e["time"] for e in run.steps(again) if e["step"] > before) - at,
            "twice": before - first["step"] + 1,
            # where the time goes: until torchrun starts workers, until the last has imported torch, has its group
            "start": again - at,
            "import": run.last("imported") - again,
            "group": run.last("grouped") - run.last("imported"),
        }


# ---- going on


async def went_on(rng: random.Random) -> Found:
    """Kill one of four spheres, at a random moment of a step."""
    times: list[float] = []
    computed: list[set[str]] = []
    news = asyncio.Event()

    async def steps(count: int) -> None:
        goal = len(times) + count
        async with asyncio.timeout(LIMIT):
            while len(times) < goal:
                news.clear()
                await news.wait()

    with tempfile.TemporaryDirectory() as directory:
        async with Training(load_config(settings(directory), {})[0]) as training:
            controller, tree = training.controller, training.controller.tree
            publish = controller.publish

            def seen(record: Any) -> None:
                publish(record)
                if record["event"] == "step":
                    times.append(time.monotonic())
                    computed.append({sphere for _, _, sphere in record["contributions"]})
                    news.set()

            controller.publish = seen
            async with asyncio.timeout(LIMIT):
                await tree.until(lambda: tree.living >= WORKERS)
            training.resume()
            await steps(QUIET + rng.randrange(10))
            quiet = statistics.median(b - a for a, b in pairwise(times[2:]))
            await asyncio.sleep(rng.random() * quiet)
            victim = rng.choice(sorted(tree.spheres))
            inner = victim in tree.shape().values()
            pid = tree.spheres[victim].pid
            before, at = len(times), time.monotonic()
            os.kill(pid, signal.SIGKILL)
            await steps(2)
    # the step in hand may have had all that it needs of the victim: the one after it has not
    without = next(n for n in range(before, len(times)) if victim not in computed[n])
    gap = max(b - a for a, b in pairwise(times[before - 1 : before + 2]))
    # no step is ever done twice: each commit is of the next one
    return {
        "quiet": quiet,
        "next": times[without] - at,
        "new": times[without] - at,
        "gap": gap,
        "twice": 0,
        "inner": inner,
    }


def settings(directory: str) -> dict[str, Any]:
    return {
        "task": "spheres.testing.synthetic:Synthetic",
        "task_options": {
            "parameters": str(PARAMETERS),
            "samples": "997",
            "compute_seconds": str(COMPUTE_SECONDS),
        },
        "steps": 1_000_000,
        "batch_size": 16,
        "microbatches": WORKERS,
        "spheres": WORKERS,
        "fan_out": 2,
        "checkpoint_every": "none",
        "eval_every": "none",
        "run_dir": Path(directory) / "run",
    }


# ---- the table


def summary(found: list[Found]) -> dict[str, Any]:
    figures: dict[str, Any] = {"kills": len(found)}
    for key in sorted({key for one in found for key in one} - {"inner"}):
        values = sorted(one[key] for one in found)
        figures[key] = {"least": values[0], "median": statistics.median(values), "worst": values[-1]}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=10, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    asked = [options.torch_python, "-c", "import torch; print(torch.__version__)"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=LIMIT, check=True)
    except (OSError, subprocess.CalledProcessError):
        sys.exit(f"{options.torch_python} has no torch: give a Python that has it with --torch-python\n{__doc__}")
    rng = random.Random(options.seed)
    found: dict[str, list[Found]] = {
        "torchrun, checkpoint every step": [],
        "torchrun, every 10 steps": [],
        "spheres": [],
    }
    for _ in range(options.kills):
        for kind, every in (("torchrun, checkpoint every step", 1), ("torchrun, every 10 steps", 10)):
            found[kind].append(restarted(options.torch_python, every, rng))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            found["spheres"].append(runner.run(went_on(rng)))
    rows = {kind: summary(ones) for kind, ones in found.items()}

    def show() -> None:
        print(f"torch {told.stdout.strip()}; {options.kills} kills of each kind, which took turns")
        print("next: the first step that is done without the victim; new: the first that had never been done")
        print("median (least to worst)            step      kill to next step      kill to new step       steps twice")
        for kind, row in rows.items():
            print(f"{kind:32} {row['quiet']['median'] * 1e3:4.0f} ms", end="")
            for one in (row["next"], row["new"]):
                print(f"   {one['median']:5.2f} s ({one['least']:.2f} to {one['worst']:.2f})", end="")
            twice = row["twice"]
            print(f"   {twice['median']:.1f} ({twice['least']:.0f} to {twice['worst']:.0f})")
        gap = rows["spheres"]["gap"]
        print(
            f"spheres, longest gap between commits around the kill: {gap['median']:.2f} s, worst {gap['worst']:.2f} s"
        )
        parts = {part: rows["torchrun, checkpoint every step"][part]["median"] for part in ("start", "import", "group")}
        print("torchrun, medians: {start:.2f} s until it starts workers, {import:.2f} s until all have imported torch, "
              "{group:.2f} s until they are a group".format(**parts))  # fmt: skip

    report("restart", {"torch": told.stdout.strip(), "kinds": rows, "found": found}, show)


if __name__ == "__main__":
    main()
