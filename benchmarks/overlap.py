"""What it brings that the next version streams down while control is still making it: with and without, in turns.

    .venv/bin/python benchmarks/overlap.py [--json] [--megabytes N] [--wire inline]

Four spheres below control, one microbatch each, a model whose gradient costs nothing. Traced: of each step it is looked
up how much of the spheres' receiving of weights lies inside control's optimizer on the common time line.
"""

import argparse
import asyncio
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import uvloop
from common import common_flags, median, report, step_seconds

from control.config_sources import load_config
from control.controller import Controller
from control.training import run

WARM_UP = 3


def measure(megabytes: int, wire: str, steps: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory:
        where = Path(directory) / "run"
        task = {"parameters": str(megabytes * 250_000), "samples": "64"}
        settings: dict[str, Any] = {"task": "spheres.testing.synthetic:Standing", "task_options": task, "spheres": 4}
        settings |= {"microbatches": 4, "batch_size": 4, "steps": steps + WARM_UP, "momentum": 0.9, "trace": True}
        settings |= {"learning_rate": 0.001, "checkpoint_every": "none", "eval_every": "none", "wire": wire}
        config = load_config({"run_dir": where, **settings}, {})[0]
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            summary = runner.run(run(config))
        if summary.error is not None:
            raise summary.error
        journal = [json.loads(line) for line in (where / "journal.jsonl").read_text().splitlines()]
        spans = json.loads((where / "trace.json").read_text())["traceEvents"]
    optimizer = [(e["ts"], e["ts"] + e["dur"]) for e in spans if e["ph"] == "X" and e["name"] == "optimizer"]
    inside: dict[int, float] = defaultdict(float)
    total = 0.0
    for e in spans:
        if e["ph"] == "X" and e["name"] == "send_down":
            total += e["dur"]
            for number, (begin, end) in enumerate(optimizer):
                inside[number] += max(0.0, min(end, e["ts"] + e["dur"]) - max(begin, e["ts"]))
    kept = journal[WARM_UP:]
    return {
        "step_ms": 1e3 * median(step_seconds(kept)),
        "optimizer_ms": 1e3 * median(r["seconds"]["optimizer"] for r in kept),
        "gather_ms": 1e3 * median(r["seconds"]["gather"] for r in kept),
        "receiving_inside_optimizer": sum(inside.values()) / total if total else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=40)
    parser.add_argument("--wire", default="inline", choices=("inline", "shm"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repetitions", type=int, default=3)
    common_flags(parser)
    options = parser.parse_args()
    trains_next = Controller._trains_next
    found: dict[str, list[dict[str, float]]] = {"overlapped": [], "one after the other": []}
    for _ in range(options.repetitions):
        for name, kept in found.items():
            Controller._trains_next = trains_next if name == "overlapped" else lambda _: False
            kept.append(measure(options.megabytes, options.wire, options.steps))
    figures = {name: {key: median(r[key] for r in kept) for key in kept[0]} for name, kept in found.items()}
    ratio = median(
        a["step_ms"] / b["step_ms"] for a, b in zip(found["overlapped"], found["one after the other"], strict=True)
    )

    def show() -> None:
        for name, f in figures.items():
            print(f"{name:<20} step {f['step_ms']:.1f} ms: gather {f['gather_ms']:.1f}, update {f['optimizer_ms']:.1f}")
            print(f"{'':<20} {f['receiving_inside_optimizer']:.0%} of the receiving of weights lies inside the update")
        print(f"a step overlapped is {ratio:.2f} of one that is not")

    report("overlap", {"settings": vars(options) | {"out": None}, "figures": figures, "ratio": ratio}, show,
           out=options.out)  # fmt: skip


if __name__ == "__main__":
    main()
