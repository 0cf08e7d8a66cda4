"""How long until the next step is committed after a sphere is killed or stopped, and what is computed twice for it.

Twelve local spheres in two levels, steps of about 50 ms, default settings. A fault comes at a random moment of a step,
once all spheres are back and some steps were undisturbed.

    python benchmarks/recovery.py [--faults 50] [--stops 10] [--json]
"""

import argparse
import asyncio
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import uvloop
from common import report

from control.config_sources import load_config
from control.training import Training

#: seconds that each microbatch takes; one per sphere
COMPUTE_SECONDS = 0.025
#: steps without a fault before the next one
QUIET = 6
SPHERES = 12


class Recovery:
    """One run under faults. Mutable state: when steps were committed, and by how many attempts."""

    def __init__(self, training: Training) -> None:
        self.training, self.tree = training, training.controller.tree
        self.times: list[float] = []
        self.computed: dict[str, int] = {}
        self.news = asyncio.Event()
        publish = training.controller.publish

        def seen(record: Any) -> None:
            publish(record)
            if record["event"] == "step":
                self.times.append(time.perf_counter())
                self.news.set()

        training.controller.publish = seen

    async def steps(self, count: int) -> None:
        goal = len(self.times) + count
        while len(self.times) < goal:
            self.news.clear()
            await self.news.wait()

    async def whole(self) -> None:
        """Wait until every sphere is there, and some steps were undisturbed since."""
        while True:
            await self.tree.until(lambda: self.tree.living >= SPHERES)
            await self.steps(QUIET)
            if self.tree.living >= SPHERES:
                return

    def victims(self, inner: bool) -> list[str]:
        shape = self.tree.shape()
        return [name for name in shape if (name in shape.values()) is inner]

    async def fault(self, rng: random.Random, *, inner: bool, sign: signal.Signals) -> dict[str, float]:
        await self.whole()
        quiet = statistics.median(b - a for a, b in zip(self.times[-QUIET:-1], self.times[-QUIET + 1 :], strict=True))
        await asyncio.sleep(rng.random() * quiet)
        victim = rng.choice(self.victims(inner))
        pid = self.tree.spheres[victim].pid
        before, at = len(self.times), time.perf_counter()
        os.kill(pid, sign)
        try:
            # the step in hand may have had all that it needs of the victim: the one after it has not
            await self.steps(2)
        finally:
            if sign == signal.SIGSTOP:
                os.kill(pid, signal.SIGCONT)
        around = self.times[before - 1 : before + 2]
        return {
            "next": self.times[before] - at,
            "gap": max(b - a for a, b in pairwise(around)),
            "quiet": quiet,
        }


def settings(directory: str) -> dict[str, Any]:
    return {
        "task": "spheres.testing.synthetic:Synthetic",
        "task_options": {"parameters": "5000", "samples": "997", "compute_seconds": str(COMPUTE_SECONDS)},
        "steps": 1_000_000,
        "batch_size": 48,
        "microbatches": 12,
        "spheres": SPHERES,
        "fan_out": 3,
        "chunk_bytes": 4096,
        "window_chunks": 4,
        "checkpoint_every": "none",
        "eval_every": "none",
        "run_dir": Path(directory) / "run",
    }


async def measure(faults: int, stops: int) -> dict[str, Any]:
    rng = random.Random(0)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        config = load_config(settings(directory), {})[0]
        async with Training(config) as training:
            recovery = Recovery(training)
            training.resume()
            await recovery.whole()
            await recovery.steps(20)
            quiet = [b - a for a, b in zip(recovery.times[-20:-1], recovery.times[-19:], strict=True)]
            figures["step"] = statistics.median(quiet)
            plan = (
                ("leaf killed", False, signal.SIGKILL, faults),
                ("inner killed", True, signal.SIGKILL, faults),
                ("leaf stopped", False, signal.SIGSTOP, stops),
                ("inner stopped", True, signal.SIGSTOP, stops),
            )
            for name, inner, sign, count in plan:
                found = [await recovery.fault(rng, inner=inner, sign=sign) for _ in range(count)]
                figures[name] = summary(found)
    return figures


def summary(found: Iterable[dict[str, float]]) -> dict[str, float]:
    found = list(found)
    if not found:
        return {}
    figures: dict[str, float] = {"faults": len(found), "quiet": statistics.median(f["quiet"] for f in found)}
    for key in ("next", "gap"):
        values = sorted(f[key] for f in found)
        figures |= {f"{key}_median": statistics.median(values), f"{key}_worst": values[-1]}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        figures = runner.run(measure(options.faults, options.stops))

    def show() -> None:
        print(f"undisturbed step: {figures['step'] * 1e3:.0f} ms (median)")
        print("fault          n   to the next commit: median, worst   longest gap: median, worst   in steps")
        for name, row in figures.items():
            if isinstance(row, dict) and row:
                next_, gap = ([row[f"{key}_{of}"] * 1e3 for of in ("median", "worst")] for key in ("next", "gap"))
                steps = [value / row["quiet"] / 1e3 for value in gap]
                print(
                    f"{name:14} {row['faults']:2}   {next_[0]:8.0f} ms {next_[1]:8.0f} ms"
                    f"            {gap[0]:8.0f} ms {gap[1]:8.0f} ms     {steps[0]:.1f}, {steps[1]:.1f}"
                )

    report("recovery", figures, show)


if __name__ == "__main__":
    main()
