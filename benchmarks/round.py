"""A synchronous round: every sphere's float32 gradient summed, and every sphere holds the new weights.

    .venv/bin/python benchmarks/round.py [--n 2,4,8,12] [--megabytes 4,40,400] [--wires shm-zero-copy,inline] [--json]

n spheres, each a process that computes one microbatch, below control, a process without a gradient, all on this
machine, one level unless --fan-out says otherwise; against all_reduce of gloo and Open MPI over n processes. Systems
take turns: A B A B, each repetition in fresh processes that do some rounds to warm up and then --rounds of them. Of
each repetition the median counts, ratios are taken per repetition, and the figures are medians of those.

IN a round of ours: all of a step of a real run, from commit to commit - giving out, weights down, the task's call
(whose gradient stands already, `spheres.testing.synthetic:Standing`), finite checks, checksums, sums in canonical
order, the mean, norm and statistics, the digest of the new weights and its check at every sphere, versions, credit, the
journal's record on disk (fdatasync). OUT: the optimizer, plain SGD, which peers have none of: its update of as many
elements is timed alone, warm, in this process, and taken off; --with-optimizer leaves it in. Of peers: from a barrier
until the last has the sum.

shm-zero-copy: gradient and weights live in shared memory; shm-copy: the task keeps both in arrays of its own, one copy
in, one out; inline: in gRPC messages; inline-bf16: the same with both rounded to bfloat16. Weights of every repetition
are compared with each other and, up to --verify megabytes, with `control.reference`.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    Record,
    common_flags,
    curves,
    has_peer,
    listed,
    median,
    mpi_program,
    output_of,
    peer,
    phase_ms,
    report,
    skip,
    step_seconds,
    train_apart,
)

from control.config import OptimizerConfig
from control.config_sources import load_config
from control.optimizers import make_optimizer
from control.reference import reference
from spheres.tensors import Manifest, aligned_zeros
from spheres.testing.synthetic import Standing

NARROW = {"wire_dtype": "bfloat16", "weights_wire_dtype": "bfloat16"}
WIRES: dict[str, dict[str, Any]] = {
    "shm-zero-copy": {"wire": "shm"},
    "shm-copy": {"wire": "shm", "copies": True},
    "inline": {"wire": "inline"},
    "inline-bf16": {"wire": "inline", **NARROW},
}
WARM_UP = 3
MB = 10**6
#: what a system needs of memory, in models per process
MODELS = 3


def settings(wire: str, n: int, megabytes: float, steps: int, fan_out: int) -> Record:
    options = dict(WIRES[wire])
    copies = options.pop("copies", False)
    task = {"parameters": str(int(megabytes * MB) // 4), "samples": str(16 * n), "copies": str(copies)}
    return {
        "task": "spheres.testing.synthetic:Standing",
        "task_options": task,
        "spheres": n,
        "fan_out": fan_out,
        "microbatches": n,
        "batch_size": n,
        "steps": steps,
        "momentum": 0,
        "learning_rate": 0.001,
        **options,
    }


class Ours:
    """Mutable state: the digest of the weights of each kind of arithmetic, and what the journal said of the parts."""

    def __init__(self, rounds: int, fan_out: int, verify: float) -> None:
        self.rounds, self.fan_out, self.verify = rounds, fan_out, verify
        self._digests: dict[tuple[Any, ...], str] = {}

    def __call__(self, wire: str, n: int, megabytes: float) -> tuple[list[float], Record]:
        wanted = settings(wire, n, megabytes, self.rounds + WARM_UP, self.fan_out)
        summary, journal = train_apart(**wanted)
        # Equal arithmetic, equal bits: on every wire, with and without copies.
        key = n, megabytes, wanted.get("wire_dtype"), wanted.get("weights_wire_dtype")
        if key not in self._digests:
            self._digests[key] = summary["weights_sha256"]
            if megabytes <= self.verify:
                task = Standing(**wanted["task_options"])
                config = load_config({k: v for k, v in wanted.items() if k != "spheres"}, {})[0]
                self._digests[key] = reference(task, config).weights_sha256
        if summary["weights_sha256"] != self._digests[key]:
            raise SystemExit(f"{wire}, n={n}, {megabytes} MB: wrong weights {summary['weights_sha256']}")
        kept = journal[WARM_UP - 1 :]
        return step_seconds(kept), parts(kept)


def parts(journal: Sequence[Record]) -> Record:
    """Return where the time of whole steps went, in ms: control's parts, the spheres' phases, payload up and down.

    The first record only says when the step after it began.
    """
    whole, journal = step_seconds(journal), journal[1:]
    known = [(r["seconds"]["gather"], r["seconds"]["optimizer"]) for r in journal]
    return {
        "gather": 1e3 * median(gather for gather, _ in known),
        "update_and_digest": 1e3 * median(update for _, update in known),
        "journal_and_rest": 1e3 * median(step - sum(parts) for step, parts in zip(whole, known, strict=True)),
        "spheres": phase_ms(journal),
        "bytes_up": median(r["bytes_up"] for r in journal),
        "bytes_down": median(r["bytes_down"] for r in journal),
    }


def optimizer_seconds(megabytes: float, times: int = 5) -> float:
    """Return what plain SGD takes to update so much, the buffers warm: what is left out of our rounds."""
    size = int(megabytes * MB) // 4
    manifest = Manifest.of({"all": np.empty(size, np.float32)})
    optimizer = make_optimizer(OptimizerConfig(momentum=0), manifest)
    weights, gradient = aligned_zeros(manifest.size), aligned_zeros(manifest.size)
    weights.fill(1.0)
    gradient.fill(1.0)
    seconds = []
    for _ in range(times + 1):
        began = time.perf_counter()
        optimizer.begin()
        optimizer.update(weights, gradient, 1e-3, 0, manifest.size)
        seconds.append(time.perf_counter() - began)
    return median(seconds[1:])


def fit(cells: Sequence[tuple[int, float, float]]) -> Record | None:
    """Fit ``a + b n + c S + d n S`` to (n, S in MB, ms), errors in proportion; what is not linear shows as a bad fit.

    ``c`` is control's own: the update of a model, whatever the number of spheres.
    """
    if len(cells) < 5:
        return None
    n, size, ms = np.array(cells, np.float64).T
    terms = np.stack([np.ones_like(n), n, size, n * size], axis=1)
    found = np.linalg.lstsq(terms / ms[:, None], np.ones_like(ms), rcond=None)[0]
    guess = terms @ found
    squares = 1 - ((ms - guess) ** 2).sum() / ((ms - ms.mean()) ** 2).sum()
    return {
        "ms": found[0],
        "ms_per_sphere": found[1],
        "ms_per_mb": found[2],
        "ms_per_sphere_and_mb": found[3],
        "r_squared": float(squares),
        "worst_relative": float(np.abs(guess / ms - 1).max()),
    }


def available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return found[0] if found else 1 << 62


def peers(chosen: Sequence[str], rounds: int, directory: Path) -> tuple[dict[str, Callable[..., list[float]]], Record]:
    """Return name -> measures one repetition, of the peers that are there; and their versions."""
    found: dict[str, Callable[..., list[float]]] = {}
    versions: Record = {}
    if "gloo" in chosen and (version := has_peer("torch")):
        versions["torch"] = version
        found["gloo"] = lambda n, mb: peer("gloo_round.py", str(n), str(mb), str(rounds))
    if "mpi" in chosen:
        program, version = mpi_program(directory)
        if program is not None:
            versions["mpi"] = version
            flags = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
            found["mpi"] = lambda n, mb: output_of(
                ["mpirun", *flags, "-n", str(n), str(program), str(mb), str(rounds)], cwd=directory
            )
    if "flower" in chosen and (version := has_peer("flwr")):
        versions["flwr"] = version
        found["flower"] = lambda n, mb: peer("flower_round.py", str(n), str(mb), str(min(rounds, 2)))
    return found, versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=listed(int), default=[2, 4, 8, 12])
    parser.add_argument("--megabytes", type=listed(float), default=[4.0, 40.0, 400.0])
    parser.add_argument("--wires", type=listed(str), default=list(WIRES))
    parser.add_argument("--peers", type=listed(str), default=["gloo", "mpi", "flower"])
    parser.add_argument("--rounds", type=int, default=7, help="rounds of a repetition")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--fan-out", type=int, default=12, help="2 or 3 make more levels")
    parser.add_argument("--with-optimizer", action="store_true")
    parser.add_argument("--verify", type=float, default=40.0, help="largest model to compare with the reference, in MB")
    common_flags(parser)
    options = parser.parse_args()
    if unknown := [wire for wire in options.wires if wire not in WIRES]:
        parser.error(f"unknown wires {', '.join(unknown)}: choose from {', '.join(WIRES)}")
    ours = Ours(options.rounds, options.fan_out, options.verify)
    cells: list[Record] = []
    with tempfile.TemporaryDirectory() as directory:
        others, versions = peers(options.peers, options.rounds, Path(directory))
        for megabytes in options.megabytes:
            left_out = 0.0 if options.with_optimizer else optimizer_seconds(megabytes)
            for n in options.n:
                if MODELS * (n + 1) * megabytes * MB > available_bytes():
                    skip(f"n={n}, {megabytes:g} MB", "not enough memory")
                    continue
                cells.append(measure(ours, others, options, n, megabytes, left_out))
                show_cell(cells[-1])
    names = [*options.wires, *others]
    fits = {name: fit([(c["n"], c["megabytes"], c["ms"][name]) for c in cells]) for name in names}
    figures = {"cells": cells, "fits": fits, "versions": versions, "fan_out": options.fan_out}

    def show() -> None:
        print(f"\n{versions}")
        for name, found in fits.items():
            if found is not None:
                print(
                    f"{name}: {found['ms']:.1f} + {found['ms_per_sphere']:.2f} n + "
                    f"{found['ms_per_mb']:.3f} MB + {found['ms_per_sphere_and_mb']:.3f} n MB ms, "
                    f"R^2 {found['r_squared']:.4f}, worst {found['worst_relative']:.0%}"
                )

    charts = []
    for megabytes in options.megabytes:
        lines = {name: [(c["n"], c["ms"][name]) for c in cells if c["megabytes"] == megabytes] for name in names}
        title = f"{megabytes:g} MB: ms per round over n"
        charts.append(curves(title, lines, x_label="spheres with a gradient", y_label="ms"))
    report("round", figures, show, out=options.out, charts=charts)


def measure(
    ours: Ours, others: dict[str, Callable[..., list[float]]], options: Any, n: int, megabytes: float, left_out: float
) -> Record:
    """Let all systems take turns; return medians in ms, ratios to each peer per repetition, and our parts."""
    seconds: dict[str, list[float]] = {name: [] for name in [*options.wires, *others]}
    wheres: dict[str, Record] = {}
    for _ in range(options.repetitions):
        for wire in options.wires:
            whole, wheres[wire] = ours(wire, n, megabytes)
            seconds[wire].append(median(whole) - left_out)
        for name, run in others.items():
            seconds[name].append(median(run(n, megabytes)))
    ratios = {
        name: {other: [a / b for a, b in zip(seconds[name], seconds[other], strict=True)] for other in others}
        for name in [*options.wires, *others]
    }
    return {
        "n": n,
        "megabytes": megabytes,
        "optimizer_left_out_ms": 1e3 * left_out,
        "ms": {name: 1e3 * median(found) for name, found in seconds.items()},
        "all_ms": {name: [1e3 * one for one in found] for name, found in seconds.items()},
        "ratios": {name: {other: median(all_) for other, all_ in found.items()} for name, found in ratios.items()},
        "all_ratios": ratios,
        "parts": wheres,
    }


def show_cell(cell: Record) -> None:
    """Say a cell as soon as it is there: the whole takes long."""
    import sys

    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    say(f"\nn={cell['n']}, {cell['megabytes']:g} MB (optimizer left out: {cell['optimizer_left_out_ms']:.1f} ms)")
    for name, ms in cell["ms"].items():
        least, most = min(cell["all_ms"][name]), max(cell["all_ms"][name])
        ratios = ", ".join(f"{ratio:.2f} x {other}" for other, ratio in cell["ratios"][name].items() if other != name)
        say(f"  {name:<14} {ms:9.1f} ms ({least:.1f} to {most:.1f})  {ratios}")
    for wire, found in cell["parts"].items():
        spheres = ", ".join(f"{name} {ms['mean']:.1f}/{ms['slowest']:.1f}" for name, ms in found["spheres"].items())
        say(
            f"  {wire}: gather {found['gather']:.1f}, update and digest {found['update_and_digest']:.1f}, journal and "
            f"rest {found['journal_and_rest']:.1f} ms; up {found['bytes_up'] / MB:.0f} MB, down "
            f"{found['bytes_down'] / MB:.0f} MB; spheres, mean/slowest: {spheres}"
        )


if __name__ == "__main__":
    main()
