"""Samples per second of a real task, by 1 to 8 spheres, against one process and against torch's DDP over gloo.

    .venv/bin/python benchmarks/scaling.py [--n 1,2,4,8] [--batch 2048,256] [--wire auto] [--short] [--json]

The perceptron of fashion-mnist, 784-256-128-10 (--short: that of digits), SGD with momentum, the same batch everywhere.
Ours: whole steps of a real run with everything on, from commit to commit, 16 microbatches on one level. One process:
`control.reference`, a plain loop over the same microbatches, its start and evaluation taken off. DDP: as many processes
as spheres, one torch thread each, each with its share of the batch in one piece. Systems take turns, each repetition in
fresh processes; medians. On a machine with two cores more than two of anything cannot be faster: what more spheres
cost is what the picture shows.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import (
    HERE,
    Record,
    common_flags,
    curves,
    has_peer,
    listed,
    median,
    output_of,
    peer,
    report,
    step_seconds,
    train_apart,
)

from control.config_sources import load_config
from control.reference import reference
from spheres.task import load_task
from spheres.tasks.digits import Digits
from spheres.tasks.fashion_mnist import FashionMnist

WARM_UP = 5


def one_process(settings: Record, steps: int) -> float:
    """Return the samples per second of the plain loop; run as a process of its own by ``alone``."""
    config = load_config({**settings, "steps": steps}, {})[0]
    task = load_task(config.task, config.task_options)
    reference(task, config, steps=WARM_UP)
    seconds = []
    for count in (0, steps):
        began = time.perf_counter()
        reference(task, config, steps=count)
        seconds.append(time.perf_counter() - began)
    return steps * config.batch_size / (seconds[1] - seconds[0])


def save_data(short: bool, path: Path) -> None:
    """Write what DDP trains on: the same samples and layers."""
    task = Digits() if short else FashionMnist()
    count = task.size("train")
    if isinstance(task, FashionMnist):
        x, y = task._gather("train", np.arange(count))
    else:
        x, y = task._images["train"], task._labels["train"]
    weights = task.init_weights(np.random.default_rng(0))
    shapes = [weight.shape for name, weight in weights.items() if weight.ndim == 2]
    widths = [shapes[0][0], *(shape[1] for shape in shapes)]
    np.savez(path, x=x, y=y, widths=widths, input_scale=1 / (16 if short else 255))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=listed(int), default=[1, 2, 4, 8])
    parser.add_argument("--batch", type=listed(int), default=[2048, 256])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--wire", default="auto", choices=("auto", "inline", "shm"))
    parser.add_argument("--short", action="store_true", help="digits instead of fashion-mnist")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    common_flags(parser)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(one_process(json.loads(options.alone), options.steps)))
        return
    torch = has_peer("torch")
    rows: list[Record] = []
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "data.npz"
        if torch:
            save_data(options.short, data)
        rows += [measure(batch, options, data if torch else None) for batch in options.batch]

    def show() -> None:
        for row in rows:
            print(f"\n{row['task']}, batch {row['batch']}: one process {row['one']:,.0f} samples/s")
            for n in map(str, options.n):
                ddp = f", DDP {row['ddp'][n]:,.0f} ({row['to_ddp'][n]:.2f} x)" if n in row["ddp"] else ""
                print(f"  {n} spheres {row['ours'][n]:,.0f} samples/s, {row['to_one'][n]:.2f} x one process{ddp}")

    charts = [
        curves(
            f"{row['task']}, batch {row['batch']}: samples/s",
            {name: [(float(n), speed) for n, speed in row[name].items()] for name in ("ours", "ddp") if row[name]}
            | {"one process": [(float(n), row["one"]) for n in options.n]},
            x_label="spheres or processes",
            y_label="samples/s",
        )
        for row in rows
    ]
    report("scaling", {"rows": rows, "versions": {"torch": torch}}, show, out=options.out, charts=charts)


def measure(batch: int, options: argparse.Namespace, data: Path | None) -> Record:
    settings: Record = {"task": "digits" if options.short else "fashion-mnist", "batch_size": batch, "microbatches": 16}
    one: list[float] = []
    ours: dict[str, list[float]] = {str(n): [] for n in options.n}
    ddp: dict[str, list[float]] = {str(n): [] for n in options.n} if data else {}
    for _ in range(options.repetitions):
        words = [sys.executable, str(HERE / "scaling.py"), "--steps", str(options.steps), "--alone"]
        one.append(output_of([*words, json.dumps(settings)]))
        for n in options.n:
            wanted = {**settings, "spheres": n, "wire": options.wire, "steps": options.steps + WARM_UP}
            _, journal = train_apart(**wanted)
            ours[str(n)].append(batch / median(step_seconds(journal[WARM_UP - 1 :])))
            if data:
                words = [str(data), str(n), str(batch), str(options.steps), str(WARM_UP)]
                ddp[str(n)].append(peer("ddp.py", *words))
    return {
        "task": settings["task"],
        "batch": batch,
        "one": median(one),
        "ours": {n: median(found) for n, found in ours.items()},
        "ddp": {n: median(found) for n, found in ddp.items()},
        "to_one": {n: median(a / b for a, b in zip(found, one, strict=True)) for n, found in ours.items()},
        "to_ddp": {n: median(a / b for a, b in zip(ours[n], found, strict=True)) for n, found in ddp.items()},
    }


if __name__ == "__main__":
    main()
