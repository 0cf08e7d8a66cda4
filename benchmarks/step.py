"""What a step costs beside its computation: a model of 10 KB whose gradient is nearly free, on real processes.

    .venv/bin/python benchmarks/step.py [--json] [--steps N]

Two trees: 4 spheres at fan-out 2 (steps per second), and 8 spheres at fan-out 3 (median of a step).
"""

import argparse
from itertools import pairwise
from typing import Any

from common import median, report, train

TREES = ((4, 2), (8, 3))
#: the first steps are of processes that warm up
WARM_UP = 50


def measure(spheres: int, fan_out: int, steps: int) -> dict[str, Any]:
    _, journal = train(
        task="spheres.testing.synthetic:Synthetic",
        task_options={"parameters": "2500", "samples": "4096"},
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
    found = [measure(spheres, fan_out, options.steps) for spheres, fan_out in TREES]

    def show() -> None:
        for f in found:
            print(f"\n{f['spheres']} spheres, fan-out {f['fan_out']}: {f['steps_per_second']:.0f} steps/s, ", end="")
            print(f"median step {f['step_ms']:.2f} ms")
            print(f"  control    gather {f['gather_ms']:.2f}, optimizer {f['optimizer_ms']:.2f}, ", end="")
            print(f"journal and the rest {f['journal_and_rest_ms']:.2f} ms")
            for phase, times in f["spheres_ms"].items():
                print(f"  {phase:<10} {times['mean_ms']:.2f} ms per sphere, slowest {times['slowest_ms']:.2f}")

    report("step", {"trees": found}, show)


if __name__ == "__main__":
    main()
