"""Test accuracy of fashion-mnist, float32 against bfloat16: a perceptron 784-256-128-10, batch 256, over some seeds.

    .venv/bin/python benchmarks/accuracy.py [--json] [--seeds N] [--epochs N] [--spheres N]

In one loop, by control.reference, whose bits are those of every tree; with --spheres on so many real processes.
Needs the data: Debian's package dataset-fashion-mnist, or ARMILLARY_DATA.
"""

import argparse
import sys
import time
from typing import Any

from common import median, report, train

from control.config_sources import load_config
from control.reference import reference
from spheres.task import load_task

#: name -> the types of the wire
TYPES = {
    "float32": {"wire_dtype": "float32", "weights_wire_dtype": "float32"},
    "bfloat16 gradients": {"wire_dtype": "bfloat16", "weights_wire_dtype": "float32"},
    "bfloat16 both": {"wire_dtype": "bfloat16", "weights_wire_dtype": "bfloat16"},
}


def measured(settings: dict[str, Any], spheres: int) -> dict[str, Any]:
    """Train once; return the accuracy, the bits and the time."""
    started = time.perf_counter()
    if spheres:
        summary, _ = train(**settings, spheres=spheres, fan_out=2)
        accuracy, loss, sha256 = summary.metrics["accuracy"], summary.metrics["test_loss"], summary.weights_sha256
    else:
        config, _ = load_config(settings, {})
        result = reference(load_task(config.task, config.task_options), config)
        assert result.evaluation is not None
        accuracy = result.evaluation.metrics["accuracy"] / result.evaluation.count
        loss, sha256 = result.evaluation.loss / result.evaluation.count, result.weights_sha256
    seconds = time.perf_counter() - started
    return {"accuracy": accuracy, "test_loss": loss, "weights_sha256": sha256, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--spheres", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    common = {"task": "fashion-mnist", "batch_size": 256, "epochs": options.epochs}
    common |= {"learning_rate": 0.1, "schedule": "cosine"}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in TYPES}
    for seed in range(options.seeds):
        for name, types in TYPES.items():
            runs[name].append({"seed": seed, **measured({**common, **types, "seed": seed}, options.spheres)})
            print(f"seed {seed}, {name}: {runs[name][-1]['accuracy']:.2%}", file=sys.stderr, flush=True)

    def show() -> None:
        for name, found in runs.items():
            each = ", ".join(f"{run['accuracy']:.2%}" for run in found)
            print(f"{name:18}: {each}; median {median(run['accuracy'] for run in found):.2%}")

    report("accuracy", {"epochs": options.epochs, "spheres": options.spheres, "runs": runs}, show)


if __name__ == "__main__":
    main()
