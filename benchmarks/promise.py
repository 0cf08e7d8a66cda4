"""What the promise costs: a fixed order of sums, gradients kept until the seal, chunks sent again, and checks.

    python benchmarks/promise.py [--json] [--only order,memory,faults,checks] [--rounds 9] [--faults 30]

What is compared takes turns in one run (A B A B). The order of sums: the shipped Reducer against adding what has come.
Memory: real processes with a model of 100 MB and with one of 10 KB. Faults: a whole tree in one process, in which a
sphere is killed at a random moment of a step. Checks: the same over gRPC, with clocks around each check.
"""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from common import median, report, train

from control.config import RunConfig
from control.testing import LocalTree, local_tree
from spheres import numerics
from spheres.blocks import Block
from spheres.grpc_link import GrpcTransport
from spheres.reducer import Reducer
from spheres.task import Sums
from spheres.tensors import aligned_zeros
from spheres.testing.memory import MemoryNetwork, MemoryTransport, Pipe
from spheres.testing.synthetic import Synthetic
from spheres.transport import Rpc
from spheres.v1 import work_pb2 as pb

Array = npt.NDArray[np.float32]
Figures = dict[str, Any]
MIB = 1 << 20
#: seconds that any wait may take
LIMIT = 120.0


def spread(values: list[float]) -> Figures:
    ordered = sorted(values)
    return {"least": ordered[0], "median": statistics.median(ordered), "worst": ordered[-1]}


# ---- a: canonical order against the order of arrival

CHILDREN, WINDOW, CHUNK_BYTES = 8, 4, MIB


def arrivals(rng: random.Random, chunks: int) -> list[tuple[int, int]]:
    """Return (child, chunk) in an order that credit allows: nobody is more than a window ahead of the last (N6)."""
    sent = [0] * CHILDREN
    order: list[tuple[int, int]] = []
    while len(order) < CHILDREN * chunks:
        child = rng.choice([c for c in range(CHILDREN) if sent[c] < min(chunks, min(sent) + WINDOW)])
        order.append((child, sent[child]))
        sent[child] += 1
    return order


class Added(NamedTuple):
    """``seconds`` of all sums, ``after_last`` of them from the last arrival of a chunk to its sum; chunks waiting."""

    seconds: float
    after_last: float
    most: int
    mean: float


def canonical(order: list[tuple[int, int]], gradients: list[Array], total: Array) -> Added:
    """Sum with the shipped reducer: a chunk waits until all that stand before it in the tree have come."""
    elements = CHUNK_BYTES // 4
    whole = Block(0, CHILDREN)
    reducer = Reducer(elements)
    reducer.forget({Block(i, i + 1): f"s-{i}" for i in range(CHILDREN)})
    for i in range(CHILDREN):
        reducer.header(Block(i, i + 1), Sums(0.0, 1), absent=False)
    waiting: list[int] = []
    due, adding = 0, 0.0
    began = time.perf_counter()
    for child, index in order:
        part = slice(index * elements, (index + 1) * elements)
        reducer.chunk(Block(child, child + 1), index, gradients[child][part])
        waiting.append(reducer.pending)
        while due * elements < total.size and reducer.has(whole, due):
            started = time.perf_counter()
            total[due * elements : (due + 1) * elements] = reducer.take(whole, due)
            adding += time.perf_counter() - started
            due += 1
    return Added(time.perf_counter() - began, adding / due, max(waiting), statistics.fmean(waiting))


def as_it_comes(order: list[tuple[int, int]], gradients: list[Array], total: Array) -> Added:
    """Sum in the order of arrival: one buffer per chunk that is not whole."""
    elements = CHUNK_BYTES // 4
    spare: list[Array] = []
    open_: dict[int, tuple[Array, int]] = {}
    waiting: list[int] = []
    done, adding = 0, 0.0
    began = time.perf_counter()
    for child, index in order:
        part = gradients[child][index * elements : (index + 1) * elements]
        started = time.perf_counter()
        if index not in open_:
            buffer = spare.pop() if spare else aligned_zeros(elements)
            np.copyto(buffer[: part.size], part)
            open_[index] = (buffer, 1)
        else:
            buffer, count = open_[index]
            np.add(buffer[: part.size], part, out=buffer[: part.size])
            open_[index] = (buffer, count + 1)
        waiting.append(len(open_))
        if open_[index][1] == CHILDREN:
            total[index * elements : (index + 1) * elements] = buffer[: part.size]
            spare.append(open_.pop(index)[0])
            adding += time.perf_counter() - started
            done += 1
    return Added(time.perf_counter() - began, adding / done, max(waiting), statistics.fmean(waiting))


def order_of_sums(megabytes: int, rounds: int) -> Figures:
    rng, numbers = random.Random(0), np.random.default_rng(0)
    size = megabytes * 10**6 // 4 // 16 * 16
    chunks = -(-size * 4 // CHUNK_BYTES)
    gradients = [numbers.standard_normal(size, dtype=np.float32) for _ in range(CHILDREN)]
    total = aligned_zeros(size)
    ways = {"canonical": canonical, "arrival": as_it_comes}
    found: dict[str, list[Added]] = {name: [] for name in ways}
    bits: dict[str, set[int]] = {name: set() for name in ways}
    for number in range(rounds + 1):
        order = arrivals(rng, chunks)
        for name, way in ways.items():
            added = way(order, gradients, total)
            bits[name].add(numerics.crc32c(total))
            if number:  # the first is for the caches
                found[name].append(added)
    assert len(bits["canonical"]) == 1
    figures: Figures = {"chunks": chunks, "different_sums": {name: len(sums) for name, sums in bits.items()}}
    for name, rows in found.items():
        figures[name] = {key: spread([getattr(row, key) for row in rows]) for key in Added._fields}
    for key in Added._fields:
        pairs = zip(found["canonical"], found["arrival"], strict=True)
        figures[f"{key}_ratio"] = spread([getattr(a, key) / getattr(b, key) for a, b in pairs])
    return figures


# ---- b: gradients kept until the seal


def kept_gradients(megabytes: int, rounds: int) -> Figures:
    """Peak resident memory of real spheres, above that of the same spheres with a tiny model."""
    model, chunk, window, slots = megabytes * 10**6, MIB, 4, 3
    peaks: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(rounds):
        for name, size in (("tiny", 10_000), ("large", model)):
            summary, _ = train(
                task="spheres.testing.synthetic:Synthetic",
                task_options={"parameters": str(size // 4), "samples": "64"},
                spheres=4,
                fan_out=2,
                microbatches=4,
                batch_size=4,
                steps=4,
                momentum=0,
                learning_rate=0.001,
                chunk_bytes=chunk,
                window_chunks=window,
            )
            for role in ("leaf", "inner"):
                mine = [s["peak_resident_bytes"] for s in summary.spheres if s["role"] == role]
                peaks[role][name].append(max(mine))
    in_flight = {"leaf": 0, "inner": window * chunk * (slots + 1)}
    figures: Figures = {"model_bytes": model}
    for role, found in peaks.items():
        figures[role] = {
            "tiny_bytes": median(found["tiny"]),
            "large_bytes": median(found["large"]),
            "above_bytes": median(a - b for a, b in zip(found["large"], found["tiny"], strict=True)),
            "formula_bytes": 2 * model + in_flight[role],
            "kept_nothing_bytes": model + in_flight[role],
        }
    return figures


# ---- c: what a fault costs

CHUNKS, FAULT_WINDOW = 64, 4
SMALL_CHUNK = 4096
MICROBATCHES = 8
#: the steps before the fault, and the one in which it comes
QUIET = 3


class Counting(MemoryNetwork):
    """A network that counts payload. Mutable state: per step, what crossed and what the same sender had sent before."""

    def __init__(self) -> None:
        super().__init__()
        self.gradient: Counter[int] = Counter()
        self.again: Counter[int] = Counter()
        self.weights: Counter[int] = Counter()
        self._sent: dict[tuple[int, str, int], set[int]] = defaultdict(set)

    def carry(self, pipe: Pipe, message: bytes) -> None:
        if pipe.connection.rpc is Rpc.WORK:
            self._count(pipe, message)
        super().carry(pipe, message)

    def _count(self, pipe: Pipe, message: bytes) -> None:
        if not pipe.up:
            down = pb.WorkResponse.FromString(message)
            self.weights[down.tag.step] += len(down.weights_chunk.data)
            return
        up = pb.WorkRequest.FromString(message)
        if not up.HasField("gradient_chunk"):
            return
        step, chunk = up.tag.step, up.gradient_chunk
        self.gradient[step] += len(chunk.data)
        microbatches = set(range(chunk.block.lo, chunk.block.hi))
        before = self._sent[step, pipe.connection.dialler, chunk.index]
        if microbatches & before:
            self.again[step] += len(chunk.data)
        before |= microbatches


class Computed(Synthetic):
    """A task that counts. Mutable state: gradients begun per step, by all the spheres that share it."""

    def __init__(self, compute_seconds: float) -> None:
        super().__init__(CHUNKS * SMALL_CHUNK // 4, 997, compute_seconds, 1)
        self.begun: Counter[int] = Counter()

    def gradient(self, weights: Any, samples: Any, rng: np.random.Generator, out: Any) -> Sums:
        self.begun[rng.bit_generator.state["state"]["key"][1]] += 1
        return super().gradient(weights, samples, rng, out)


async def one_fault(rng: random.Random, *, inner: bool) -> Figures:
    """Kill one of 8 spheres at fan-out 2 at a random moment of a step; return its figures, in chunks."""
    network, task = Counting(), Computed(0.01)
    config = RunConfig(
        task="digits",  # not used: the task is given
        steps=QUIET + 3,
        batch_size=MICROBATCHES * 4,
        microbatches=MICROBATCHES,
        spheres=8,
        fan_out=2,
        chunk_bytes=SMALL_CHUNK,
        window_chunks=FAULT_WINDOW,
        eval_every=None,
        checkpoint_every=None,
    )
    times: list[float] = []
    reached = asyncio.Event()
    with tempfile.TemporaryDirectory() as directory:
        async with local_tree(config, task, lambda n: MemoryTransport(network, n), directory=Path(directory)) as tree:
            publish = tree.controller.publish

            def seen(record: Any) -> None:
                publish(record)
                if record["event"] == "step":
                    times.append(time.perf_counter())
                    if len(times) == QUIET:
                        reached.set()

            tree.controller.publish = seen
            shape = tree.tree.shape()
            victim = rng.choice(sorted(name for name in shape if (name in shape.values()) is inner))
            training = asyncio.create_task(tree.run())
            await asyncio.wait_for(reached.wait(), LIMIT)
            quiet = times[-1] - times[-2]
            await asyncio.sleep(rng.random() * quiet)
            # a step that began in the meantime is the one that is disturbed
            step, crossed = len(times), network.gradient[len(times)]
            await tree.kill(victim)
            await asyncio.wait_for(training, LIMIT)
    chunk = SMALL_CHUNK
    return {
        "extra": (network.gradient[step] - network.gradient[1]) / chunk,
        "again": network.again[step] / chunk,
        "weights": (network.weights[step] - network.weights[1]) / chunk,
        "computed": task.begun[step] - MICROBATCHES,
        "quiet": network.gradient[1] / chunk,
        "crossed": crossed / chunk,
    }


async def faults(count: int) -> Figures:
    rng = random.Random(0)
    found: dict[str, list[Figures]] = {"leaf": [], "inner": []}
    for _ in range(count):
        for kind, rows in found.items():
            rows.append(await one_fault(rng, inner=kind == "inner"))
    figures: Figures = {"chunks": CHUNKS, "window": FAULT_WINDOW, "faults": count, "found": found}
    for kind, rows in found.items():
        figures[kind] = {key: spread([row[key] for row in rows]) for key in rows[0]}
        figures[kind]["in_flight"] = sum(0 < row["crossed"] < row["quiet"] for row in rows)
    return figures


# ---- d: checksums, digests, the finite check

CHECKS = ("crc32c", "is_finite", "version_digest", "global_norm")


def rates(megabytes: int, rounds: int) -> Figures:
    """MB/s of each check over one buffer, and of adding another to it, which is what a sum costs at least."""
    size = megabytes * 10**6 // 4
    flat, other = aligned_zeros(size), aligned_zeros(size)
    checksums = [0] * -(-size * 4 // MIB)
    data = flat.data.cast("B")
    ways: dict[str, Callable[[], Any]] = {
        "crc32c": lambda: [numerics.crc32c(data[i : i + MIB]) for i in range(0, size * 4, MIB)],
        "is_finite": lambda: numerics.is_finite(flat),
        "version_digest": lambda: numerics.version_digest(bytes(16), checksums),
        "adding": lambda: np.add(flat, other, out=flat),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if number:
                found[name].append(size * 4 / 1e6 / (time.perf_counter() - began))
    return {name: spread(values) for name, values in found.items()}


@contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """Count the CPU seconds of each check, wherever the shipped modules call it."""
    spent: dict[str, float] = defaultdict(float)

    def clocked(name: str, check: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any) -> Any:
            began = time.thread_time()
            try:
                return check(*values)
            finally:
                spent[name] += time.thread_time() - began

        return call

    held = []
    for name in CHECKS:
        check: Callable[..., Any] = getattr(numerics, name)
        for module in list(sys.modules.values()):
            ours = getattr(module, "__name__", "").partition(".")[0] in ("spheres", "control")
            if ours and module is not numerics and getattr(module, name, None) is check:
                held.append((module, name, check))
                setattr(module, name, clocked(name, check))
    try:
        yield spent
    finally:
        for module, name, check in held:
            setattr(module, name, check)


async def share(megabytes: int, steps: int) -> Figures:
    """Run a tree of 4 spheres over gRPC in one process; return the share of its CPU that the checks take."""
    config = RunConfig(
        task="digits",  # not used: the task is given
        steps=steps,
        batch_size=4,
        microbatches=4,
        spheres=4,
        fan_out=2,
        learning_rate=0.001,
        eval_every=None,
        checkpoint_every=None,
    )
    task = Synthetic(megabytes * 10**6 // 4, 64)
    with tempfile.TemporaryDirectory() as directory, clocks() as spent:
        async with local_tree(config, task, lambda _: GrpcTransport(), directory=Path(directory)) as tree:
            spent.clear()
            began = time.process_time()
            await trained(tree)
            seconds = time.process_time() - began
    return {
        "cpu_seconds_per_step": seconds / steps,
        "checks": {name: {"seconds": spent[name] / steps, "share": spent[name] / seconds} for name in CHECKS},
    }


async def trained(tree: LocalTree) -> None:
    async with asyncio.timeout(10 * LIMIT):
        await tree.run()


# ---- the tables


def show_order(f: Figures) -> None:
    print(f"\nOrder of sums: {CHILDREN} children, {f['chunks']} chunks of 1 MiB, window {WINDOW}; medians")
    print("                    canonical     arrival   ratio (least to worst)")
    units = {"seconds": ("all sums", 1e3, "ms"), "after_last": ("after the last", 1e3, "ms"),
             "most": ("most waiting", 1, "chunks"), "mean": ("mean waiting", 1, "chunks")}  # fmt: skip
    for key, (name, factor, unit) in units.items():
        both = [f"{f[way][key]['median'] * factor:8.2f} {unit:6}" for way in ("canonical", "arrival")]
        ratio = f[f"{key}_ratio"]
        print(f"  {name:15} {' '.join(both)} {ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['worst']:.2f})")
    print(f"  different sums of the same gradients: {f['different_sums']}")


def show_memory(f: Figures) -> None:
    print(
        f"\nKept gradients: model {f['model_bytes'] / MIB:.0f} MiB, 4 spheres in two levels, one microbatch each; MiB"
    )
    print("          tiny model   this model   above it   formula   one gradient less")
    for role in ("leaf", "inner"):
        keys = ("tiny_bytes", "large_bytes", "above_bytes", "formula_bytes", "kept_nothing_bytes")
        print(f"  {role:6} {'   '.join(f'{f[role][key] / MIB:9.0f}' for key in keys)}")


def show_faults(f: Figures) -> None:
    print(f"\nFaults: 8 spheres at fan-out 2, {f['chunks']} chunks, window {f['window']}, {f['faults']} kills of each")
    print("  median (least to worst), chunks       more than undisturbed       sent again by the same sphere")
    for kind in ("leaf", "inner"):
        row = f[kind]
        cells = [
            f"{row[k]['median']:6.1f} ({row[k]['least']:.0f} to {row[k]['worst']:.0f})" for k in ("extra", "again")
        ]
        print(f"  {kind:36} {'        '.join(cells)}")
        model, step = ([100 * row["again"][of] / whole for of in ("median", "worst")]
                       for whole in (f["chunks"], row["quiet"]["median"]))  # fmt: skip
        print(f"    sent again: {model[0]:.1f} % of the model over all edges, worst {model[1]:.1f} %; of the "
              f"{row['quiet']['median']:.0f} chunks of an undisturbed step {step[0]:.1f} %, worst {step[1]:.1f} %; "
              f"{row['in_flight']} kills came while gradients were on the way")  # fmt: skip
        print(f"    microbatches begun more than once: median {row['computed']['median']:.1f}, "
              f"worst {row['computed']['worst']:.0f} of {MICROBATCHES}; weights sent more: "
              f"median {row['weights']['median']:.0f} chunks, worst {row['weights']['worst']:.0f}")  # fmt: skip


def show_checks(f: Figures) -> None:
    print("\nChecks, over one buffer: " + ", ".join(f"{k} {v['median']:,.0f} MB/s" for k, v in f["rates"].items()))
    step = f["step"]
    print(f"  of a step's CPU ({step['cpu_seconds_per_step']:.2f} s, control and 4 spheres): ", end="")
    print(", ".join(f"{name} {100 * one['share']:.1f} %" for name, one in step["checks"].items()))


SHOW = {"order": show_order, "memory": show_memory, "faults": show_faults, "checks": show_checks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SHOW), help="parts to measure (default: all)")
    parser.add_argument("--megabytes", type=int, default=40, help="gradients of the sums and the checks")
    parser.add_argument("--model", type=int, default=100, help="MB of the model whose memory is measured")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--faults", type=int, default=30, help="of each kind")
    parser.add_argument("--steps", type=int, default=10, help="of the run whose checks are clocked")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    parts = options.only.split(",")
    if unknown := set(parts) - set(SHOW):
        parser.error(f"--only {','.join(sorted(unknown))}: give some of {','.join(SHOW)}")
    figures: Figures = {}
    if "order" in parts:
        figures["order"] = order_of_sums(options.megabytes, options.rounds)
    if "memory" in parts:
        figures["memory"] = kept_gradients(options.model, max(1, options.rounds // 3))
    if "faults" in parts:
        figures["faults"] = asyncio.run(faults(options.faults))
    if "checks" in parts:
        step = asyncio.run(share(options.megabytes, options.steps))
        figures["checks"] = {"rates": rates(options.megabytes, options.rounds), "step": step}

    def show() -> None:
        for part in figures:
            SHOW[part](figures[part])

    report("promise", figures, show)


if __name__ == "__main__":
    main()
