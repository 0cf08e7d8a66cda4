"""What a step costs beside its computation, on real processes: the whole of it, with journal, digests and statistics.

    .venv/bin/python benchmarks/step.py [--json] [--steps N]

A model of 10 KB on 4 spheres at fan-out 2, whose gradient is 16 microbatches of 4 samples; and an empty task
(256 bytes, whose gradient is nothing) on 8 spheres at fan-out 3.
"""

import argparse
from itertools import pairwise
from typing import Any

from common import median, report, train

TREES = (
    (4, 2, "10 KB", {"parameters": "2500"}),
    (8, 3, "empty", {"parameters": "64", "tensors": "1", "empty": "true"}),
)
#: the first steps are of processes that warm up
WARM_UP = 50


def measure(spheres: int, fan_out: int, name: str, options: dict[str, str], steps: int) -> dict[str, Any]:
    _, journal = train(
        task="spheres.testing.synthetic:Synthetic",
        task_options={"samples": "4096", **options},
        spheres=spheres,
        fan_out=fan_out,
        steps=steps + WARM_UP,
        batch_size=64,
    )
    kept = journal[WARM_UP:]
    whole = [after["time"] - before["time"] for before, after in pairwise(kept)]
    phases = {
        phase: {
            # per sphere, and the slowest of them
            "mean_ms": 1e3 * median(r["phases"][phase]["sum"] / r["spheres"] for r in kept if phase in r["phases"]),
            "slowest_ms": 1e3 * median(r["phases"][phase]["max"] for r in kept if phase in r["phases"]),
        }
        for phase in ("compute", "send_down", "wait", "sum", "send_up")
    }
    step = median(whole)
    gather, optimizer = (median(r["seconds"][part] for r in kept) for part in ("gather", "optimizer"))
    return {
        "task": name,
        "spheres": spheres,
        "fan_out": fan_out,
        "steps_per_second": len(whole) / (kept[-1]["time"] - kept[0]["time"]),
        "step_ms": 1e3 * step,
        "gather_ms": 1e3 * gather,
        "optimizer_ms": 1e3 * optimizer,
        "journal_and_rest_ms": 1e3 * (step - gather - optimizer),
        "spheres_ms": phases,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = [measure(*tree, options.steps) for tree in TREES]

    def show() -> None:
        for f in found:
            print(
                f"\n{f['task']}, {f['spheres']} spheres, fan-out {f['fan_out']}: {f['steps_per_second']:.0f} steps/s, ",
                end="",
            )
            print(f"median step {f['step_ms']:.2f} ms")
            print(f"  control    gather {f['gather_ms']:.2f}, optimizer {f['optimizer_ms']:.2f}, ", end="")
            print(f"journal and the rest {f['journal_and_rest_ms']:.2f} ms")
            for phase, times in f["spheres_ms"].items():
                print(f"  {phase:<10} {times['mean_ms']:.2f} ms per sphere, slowest {times['slowest_ms']:.2f}")

    report("step", {"trees": found}, show)


if __name__ == "__main__":
    main()
