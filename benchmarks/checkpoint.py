"""How long training stands still for a checkpoint: saved beside the steps from a copy, against saved while they wait.

    .venv/bin/python benchmarks/checkpoint.py [--json] [--parameters N] [--rounds N] [--directory DIR]

A model of 100 million float32 parameters with SGD's momentum: 400 MB of weights, 800 MB in a checkpoint. Both kinds of
save alternate, on one machine and disk, by the shipped Saver, Checkpoints and optimizer. Beside a save in the
background steps go on that are an optimizer's update and a line of the journal on disk; they are timed alone too.
"""

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from common import median, report

from control.checkpoint import Checkpoints
from control.config import OptimizerConfig
from control.journal import Journal
from control.optimizers import Optimizer, make_optimizer
from control.saver import Saver
from control.snapshot import Snapshot
from spheres.config import manifest_to_proto
from spheres.tensors import Manifest, aligned_zeros
from spheres.v1.checkpoint_pb2 import RunRecord, SphereRecord


class Training:
    """Weights, optimizer and journal of a run whose gradients cost nothing."""

    def __init__(self, parameters: int, directory: Path) -> None:
        self.manifest = Manifest.of({f"layer{i}": np.empty(parameters // 10, np.float32) for i in range(10)})
        self.weights, self.gradient = aligned_zeros(self.manifest.size), aligned_zeros(self.manifest.size)
        self.weights[:] = np.random.default_rng(1).standard_normal(self.manifest.size, np.float32)
        self.gradient[:] = np.random.default_rng(2).standard_normal(self.manifest.size, np.float32)
        self.optimizer: Optimizer = make_optimizer(OptimizerConfig(), self.manifest)
        self.journal = Journal(directory / "journal.jsonl")
        self.steps = 0

    def step(self) -> float:
        """Do one step; return its seconds."""
        began = time.perf_counter()
        self.optimizer.begin()
        self.optimizer.update(self.weights, self.gradient, 1e-3, 0, self.gradient.size)
        self.journal.append({"step": self.steps, "weights_digest": "0" * 32, "filler": "x" * 1500})
        self.steps += 1
        return time.perf_counter() - began

    def snapshot(self) -> Snapshot:
        run = RunRecord(run_id="r-1", term=1, step=self.steps, manifest=manifest_to_proto(self.manifest))
        return Snapshot(run, {"weights": self.weights, "optimizer/momentum": self.optimizer.state()["momentum"]})


async def no_spheres() -> list[SphereRecord]:
    return []


async def measure(parameters: int, rounds: int, directory: Path) -> dict[str, Any]:
    training = Training(parameters, directory)
    told: list[dict[str, Any]] = []
    checkpoints = Checkpoints(directory / "checkpoints", keep=2)
    saver = Saver(checkpoints, lambda _, record: told.append(record))
    saver.copies.reserve(training.weights, training.optimizer)
    alone: list[float] = []
    blocking: list[float] = []
    beside: list[list[float]] = []
    for number in range(rounds + 1):
        alone += [await asyncio.to_thread(training.step) for _ in range(3)]
        # as training stood still before: everything but the copy, and waited for
        began = time.perf_counter()
        await saver.begin(training.snapshot, no_spheres(), copied=False)
        await saver.done()
        blocking.append(time.perf_counter() - began)
        await asyncio.to_thread(training.step)
        sha256 = training.manifest.sha256(training.weights) if number == 0 else ""
        await saver.begin(training.snapshot, no_spheres())
        beside.append([])
        while saver.busy:
            beside[-1].append(await asyncio.to_thread(training.step))
        await saver.done()
        assert all(record["ok"] for record in told), told[-1]
        if number == 0:  # the steps beside it have changed nothing of what was saved
            assert checkpoints.load().run.weights_sha256 == sha256
    training.journal.close()
    background = told[1::2]
    del blocking[0], background[0], beside[0], alone[:3]  # the first of each kind warms up
    stalls = [record["stall_seconds"] for record in background]
    steps = [seconds for each in beside for seconds in each]
    return {
        "weights_mb": 4 * training.manifest.parameters / 1e6,
        "checkpoint_mb": checkpoints.list()[0].size_bytes / 1e6,
        "rounds": rounds,
        "blocking_seconds": median(blocking),
        "blocking_all": blocking,
        "stall_seconds": median(stalls),
        "stall_all": stalls,
        "stall_part": median(stalls) / median(blocking),
        "background_seconds": median(record["seconds"] for record in background),
        "step_alone_seconds": median(alone),
        "step_beside_seconds": median(steps),
        "step_beside_longest_seconds": max(steps),
        "steps_beside": len(steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to save; none: the system's place for temporary files")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=options.directory) as directory,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        f = runner.run(measure(options.parameters, options.rounds, Path(directory)))

    def show() -> None:
        print(f"\n{f['weights_mb']:.0f} MB of weights, {f['checkpoint_mb']:.0f} MB in a checkpoint, ", end="")
        print(f"{f['rounds']} rounds")
        print(f"  a save that steps wait for     {f['blocking_seconds']:.3f} s")
        print(f"  stall of one beside the steps  {f['stall_seconds']:.3f} s, {f['stall_part']:.1%} of that")
        print(f"  until that one is on disk      {f['background_seconds']:.3f} s, ", end="")
        print(f"while {f['steps_beside']} steps were done")
        print(f"  a step alone                   {f['step_alone_seconds']:.3f} s")
        print(f"  a step beside a save           {f['step_beside_seconds']:.3f} s, ", end="")
        print(f"the longest {f['step_beside_longest_seconds']:.3f} s")

    report("checkpoint", f, show)


if __name__ == "__main__":
    main()
