"""Hosts that are cut off, again and again: seconds until training goes on, and until they contribute again (root).

python -m benchmarks.network [CUTS]
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

from tests.fault.lab import Lab
from tests.fault.test_network import Run, contributors, first


def measure(host: int, way: str, cuts: int) -> None:
    """Cut a host off for 5 to 11 s and heal it, so often in one run; check its bits, and print a line."""
    times = []
    with Lab(3) as lab, tempfile.TemporaryDirectory() as directory:
        run = Run(lab, Path(directory), steps=1_000_000)
        try:
            run.until_step(10, spheres=6, seconds=30)
            for _ in range(cuts):
                lab.tell(f"cut {host} {way}")
                cut = time.time()
                run.go_on(random.uniform(5, 11))
                lab.tell(f"heal {host}")
                times.append((cut, time.time()))
                run.until_step(run.until_step(0, spheres=6, seconds=30) + 10, seconds=20)
            run.stop()
            run.check(run.ended())
            journal, lost = run.journal(), run.on_host(3) | (run.on_host(2) if host == 1 else set())
        finally:
            run.close()
    back = [
        max(first(journal, lambda r, t=t, n=n: r["time"] > t[1] and n in contributors(r)) - t[1] for n in lost)
        for t in times
    ]
    usual = median(after["time"] - before["time"] for before, after in pairwise(journal))
    what = "control" if host == 1 else f"host {host}"
    print(f"{what} cut {way or 'both ways'}, {cuts} times; a step takes {usual:.3f} s")
    if host != 1:  # without control there is no step
        paused = [first(journal, lambda r, t=t: r["time"] > t[0] and not contributors(r) & lost) - t[0] for t in times]
        print(f"  seconds to the next step: {median(paused):.2f} (worst {max(paused):.2f})")
    print(f"  from healing to the last of its spheres' next contribution: {median(back):.2f} (worst {max(back):.2f})")


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    for host, way in ((3, ""), (3, "from"), (3, "to"), (1, "")):
        measure(host, way, count)
