"""Memory of spheres with a large model: 400 MB of float32, one microbatch each, on real processes in two levels.

    .venv/bin/python benchmarks/memory.py [--json] [--megabytes N] [--steps N] [--wire auto|shm|inline] [--synthetic]

Once a step is done, each sphere's smaps_rollup is read a few times a second: private is Private_Clean +
Private_Dirty, what the process has for itself; shared is what it maps together with others, resident their sum, as the
peak that the sphere itself reports. Printed are the peaks of a leaf and of an inner sphere in models. On `shm` a leaf's
private memory is to be at most 0.5 x model, on any wire the resident peak at most 3 x model + 128 MiB. The task's
gradient stands where it is sent from (`Standing`); --synthetic takes one that adds to zeros.
"""

import argparse
import threading
import time
from pathlib import Path

from common import Record, bars, common_flags, median, report, step_seconds, train

MIB = 1 << 20
SECONDS = 0.2


class Sampler:
    """Reads the memory of this process's children while it is entered. Mutable state: what it has read, and when."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, int, dict[str, int]]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(SECONDS):
            for pid in children():
                self._samples.append((time.time(), pid, memory_of(pid)))

    def peaks(self, pid: int, since: float) -> dict[str, int]:
        """Return kind -> the most bytes that a process had, from a time on."""
        found: dict[str, int] = {}
        for when, whose, sizes in self._samples:
            for kind, size in sizes.items() if whose == pid and when >= since else ():
                found[kind] = max(found.get(kind, 0), size)
        return found


def children() -> list[int]:
    found = []
    for task in Path("/proc/self/task").glob("*/children"):
        try:
            found += [int(word) for word in task.read_text().split()]
        except OSError:  # a thread that has just ended
            continue
    return found


def memory_of(pid: int) -> dict[str, int]:
    """Return bytes private to a process and shared with others; nothing where it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return {}
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    if not sizes.get("Rss"):
        return {}
    return {
        "private": sizes["Private_Clean"] + sizes["Private_Dirty"],
        "shared": sizes["Shared_Clean"] + sizes["Shared_Dirty"],
        "resident": sizes["Rss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--wire", default="auto", choices=("auto", "inline", "shm"))
    parser.add_argument("--synthetic", action="store_true")
    common_flags(parser)
    options = parser.parse_args()
    model = options.megabytes * 10**6
    with Sampler() as sampler:
        summary, journal = train(
            task=f"spheres.testing.synthetic:{'Synthetic' if options.synthetic else 'Standing'}",
            task_options={"parameters": str(model // 4), "samples": "64"},
            spheres=4,
            fan_out=2,
            microbatches=4,
            batch_size=4,
            steps=options.steps,
            momentum=0,
            learning_rate=0.001,
            wire=options.wire,
        )
    peaks: dict[str, Record] = {}
    for sphere in summary.spheres:
        role = peaks.setdefault(sphere["role"], {})
        # A segment counts as private until the other side has touched it too, which it has once a step is done.
        seen = {**sampler.peaks(sphere["pid"], journal[0]["time"]), "reported": sphere["peak_resident_bytes"]}
        for kind, size in seen.items():
            role[kind] = max(role.get(kind, 0), size)
    limit = 3 * model + 128 * MIB
    figures: Record = {
        "model_bytes": model,
        "wire": options.wire,
        "limit_bytes": limit,
        "peak_bytes": {role: found["reported"] for role, found in peaks.items()},
        "peaks": peaks,
        "step_seconds": median(step_seconds(journal)),
        "tree": summary.tree,
    }

    def verdict(role: str, found: Record) -> str:
        if options.wire != "shm":
            return ": ok" if found["reported"] <= limit else ": OVER"
        if role == "leaf":  # resident memory counts what is shared in every process that maps it
            return ": ok" if found["private"] <= model / 2 else ": OVER"
        return ""

    def show() -> None:
        print(f"\nmodel {model / MIB:.0f} MiB, wire {options.wire}, limit 3 x model + 128 MiB = {limit / MIB:.0f} MiB")
        for role, found in sorted(peaks.items()):
            said = ", ".join(f"{kind} {size / MIB:.0f} MiB ({size / model:.2f} x)" for kind, size in found.items())
            print(f"  {role:<6} {said}{verdict(role, found)}")
        print(f"  median step {figures['step_seconds']:.2f} s; {summary.tree}")

    values = {f"{role} {kind}": found[kind] / model for role, found in sorted(peaks.items()) for kind in found}
    charts = [bars(f"Peak memory of a sphere, wire {options.wire}", values, unit="x model")]
    report("memory", figures, show, out=options.out, charts=charts)


if __name__ == "__main__":
    main()
