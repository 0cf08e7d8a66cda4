"""What a step costs beside its computation, on real processes: the whole of it, with journal, digests and statistics.

    .venv/bin/python benchmarks/step.py [--json] [--steps N] [--wire auto] [--only empty|real]

First a model of 10 KB on 4 spheres at fan-out 2, whose gradient is 16 microbatches of 4 samples; and an empty task
(256 bytes, whose gradient is nothing; and one of 10 KB) on 8 spheres at fan-out 3.

Then a real task, the perceptron of fashion-mnist on 4 spheres at batch 2048 and 256 (--short: that of digits). Outside
compute is the time from commit to commit less the time that 4 processes, which exchange nothing, take for the same
microbatches side by side (`bare_compute.py`): on 2 cores they wait for a core, and two hyperthreads are not two cores,
so neither a sphere's own compute time nor the time of one process over the number of cores would say what the system
adds. The latter is printed too. The bare round (`bare_round.py`) carries as many bytes up and down with nothing else.
"""

import argparse
import json
import sys

from common import (
    HERE,
    Record,
    bars,
    common_flags,
    median,
    output_of,
    phase_ms,
    report,
    step_seconds,
    train,
    train_apart,
)

from control.config import RunConfig
from control.initial import initial_weights
from spheres.task import load_task

TREES = (
    (4, 2, "10 KB", {"parameters": "2500"}),
    (8, 3, "empty", {"parameters": "64", "tensors": "1", "empty": "true"}),
    (8, 3, "empty, 10 KB", {"parameters": "2500", "empty": "true"}),
)
#: the first steps are of processes that warm up
WARM_UP, REAL_WARM_UP = 50, 5
#: of the real task
SPHERES, BATCHES = 4, (2048, 256)


def measure(spheres: int, fan_out: int, name: str, options: dict[str, str], steps: int, wire: str) -> Record:
    _, journal = train(
        task="spheres.testing.synthetic:Synthetic",
        task_options={"samples": "4096", **options},
        spheres=spheres,
        fan_out=fan_out,
        steps=steps + WARM_UP,
        batch_size=64,
        wire=wire,
    )
    kept = journal[WARM_UP:]
    whole = step_seconds(kept)
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
        "spheres_ms": phase_ms(kept),
    }


def real_task(batch: int, options: argparse.Namespace) -> Record:
    """Let whole steps, the bare computation and the bare round take turns; return medians and ratios."""
    task = "digits" if options.short else "fashion-mnist"
    size = 4 * initial_weights(load_task(task), RunConfig(task=task))[0].parameters
    steps = max(10, options.steps // (5 if batch < BATCHES[0] else 20))
    wanted: Record = {"task": task, "batch_size": batch, "microbatches": 16, "steps": steps + REAL_WARM_UP}
    rows: dict[str, list[float]] = {name: [] for name in ("step", "optimizer", "together", "one", "bare_round")}
    for _ in range(options.repetitions):
        _, journal = train_apart(**wanted, spheres=SPHERES, wire=options.wire)
        kept = journal[REAL_WARM_UP - 1 :]
        rows["step"].append(median(step_seconds(kept)))
        rows["optimizer"].append(median(r["seconds"]["optimizer"] for r in kept))
        bare = output_of(python("bare_compute.py", SPHERES, min(steps, 40) + REAL_WARM_UP, json.dumps(wanted)))
        rows["together"].append(median(bare["together"][REAL_WARM_UP:]))
        rows["one"].append(median(bare["one"][REAL_WARM_UP:]))
        rows["bare_round"].append(median(output_of(python("bare_round.py", SPHERES, size, 200))[20:]))
    outside = [step - bare for step, bare in zip(rows["step"], rows["together"], strict=True)]
    return {
        "task": task,
        "batch": batch,
        "model_bytes": size,
        **{f"{name}_ms": 1e3 * median(values) for name, values in rows.items()},
        "outside_ms": 1e3 * median(outside),
        "outside_part": median(part / whole for part, whole in zip(outside, rows["step"], strict=True)),
        "outside_to_bare_round": median(a / b for a, b in zip(outside, rows["bare_round"], strict=True)),
        "all_ms": {name: [1e3 * one for one in values] for name, values in rows.items()},
    }


def python(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(HERE / script), *map(str, arguments)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--repetitions", type=int, default=3, help="of the real task")
    parser.add_argument("--wire", default="auto", choices=("auto", "inline", "shm"))
    parser.add_argument("--short", action="store_true", help="digits instead of fashion-mnist")
    parser.add_argument("--only", choices=("empty", "real"), help="one half of it")
    common_flags(parser)
    options = parser.parse_args()
    found = [] if options.only == "real" else [measure(*tree, options.steps, options.wire) for tree in TREES]
    real = [] if options.only == "empty" else [real_task(batch, options) for batch in BATCHES]

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
                print(f"  {phase:<10} {times['mean']:.2f} ms per sphere, slowest {times['slowest']:.2f}")
        for r in real:
            print(f"\n{r['task']} at batch {r['batch']}, {SPHERES} spheres, model of {r['model_bytes'] / 1e6:.2f} MB")
            print(f"  step {r['step_ms']:.2f} ms; bare computation {r['together_ms']:.2f}, by one {r['one_ms']:.2f} ms")
            print(f"  outside compute {r['outside_ms']:.2f} ms: {r['outside_part']:.0%} of the step, and ", end="")
            print(f"{r['outside_to_bare_round']:.2f} x a bare round of {r['bare_round_ms']:.2f} ms")
            print(f"  control's update, journal left out: {r['optimizer_ms']:.2f} ms")

    charts = [
        bars(
            "A step of a real task, ms",
            {f"{what} {r['batch']}": r[f"{what}_ms"] for r in real for what in ("step", "together", "bare_round")},
            unit="ms",
        )
    ]
    report("step", {"trees": found, "real": real}, show, out=options.out, charts=charts if real else [])


if __name__ == "__main__":
    main()
