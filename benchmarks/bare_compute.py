"""The computation of a run's steps and nothing else: N processes that only wait for each other between two steps.

    python benchmarks/bare_compute.py N STEPS CONFIG     CONFIG: settings of a run as JSON

Each process computes as many microbatches, summed in canonical order, as one of N spheres would, on the first weights;
nothing is sent. Prints, as JSON, the seconds of each step with N processes side by side and, beside them, those that
one process takes for the same alone. `benchmarks/step.py` takes the first off a step: it knows what N processes cost
each other on these cores, which dividing by the number of cores does not (two threads of one core are not two cores).
"""

import json
import multiprocessing
import os
import sys
import time
from typing import Any

for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

from control.config_sources import load_config
from control.initial import initial_weights, node_config
from control.reference import CanonicalSum
from spheres.blocks import Block
from spheres.task import load_task
from spheres.worker import limit_threads


def compute(config: Any, ranges: list[tuple[int, int]], steps: int, barrier: Any, results: Any) -> None:
    """Compute some ranges of each step; put down when each began and ended, by the clock that all processes share."""
    limit_threads()
    task = load_task(config.task, config.task_options)
    manifest, flat = initial_weights(task, config)
    node = node_config(task, config, manifest, run_id="bare")
    total = CanonicalSum(node, task, manifest.views(flat, writeable=False))
    times = []
    for step in range(steps):
        barrier.wait()
        began = time.monotonic()
        for lo, hi in ranges:
            total.release(total(step, Block(lo, hi)))
        times.append((began, time.monotonic()))  # the barrier is no part of it
        barrier.wait()
    results.put(times)


def measure(config: Any, groups: list[list[tuple[int, int]]], steps: int) -> list[float]:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(len(groups)), context.SimpleQueue()
    work = [context.Process(target=compute, args=(config, group, steps, barrier, results)) for group in groups]
    for process in work:
        process.start()
    found = [results.get() for _ in work]
    for process in work:
        process.join()
    return [max(end for _, end in each) - min(begin for begin, _ in each) for each in zip(*found, strict=True)]


def main() -> None:
    n, steps = int(sys.argv[1]), int(sys.argv[2])
    config = load_config(json.loads(sys.argv[3]), {})[0]
    width = config.microbatches // n
    shares = [(k * width, (k + 1) * width) for k in range(n)]
    print(
        json.dumps({"together": measure(config, [[s] for s in shares], steps), "one": measure(config, [shares], steps)})
    )


if __name__ == "__main__":
    main()
