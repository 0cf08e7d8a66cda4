"""Peak memory of spheres with a large model: 400 MB of float32, M = 4, 4 spheres in two levels, on real processes.

    .venv/bin/python benchmarks/memory.py [--json] [--megabytes N] [--steps N]

Prints the peak of a leaf and of an inner sphere against 3 x model + 128 MiB.
"""

import argparse
from typing import Any

from common import median, report, train

MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model = options.megabytes * 10**6
    summary, journal = train(
        task="spheres.testing.synthetic:Synthetic",
        task_options={"parameters": str(model // 4), "samples": "64"},
        spheres=4,
        fan_out=2,
        microbatches=4,
        batch_size=4,
        steps=options.steps,
        momentum=0,
        learning_rate=0.001,
    )
    peaks: dict[str, int] = {}
    for sphere in summary.spheres:
        peaks[sphere["role"]] = max(peaks.get(sphere["role"], 0), sphere["peak_resident_bytes"])
    limit = 3 * model + 128 * MIB
    figures: dict[str, Any] = {
        "model_bytes": model,
        "limit_bytes": limit,
        "peak_bytes": peaks,
        "step_seconds": median(r["seconds"]["step"] for r in journal),
        "tree": summary.tree,
    }

    def show() -> None:
        print(f"\nmodel {model / MIB:.0f} MiB, limit 3 x model + 128 MiB = {limit / MIB:.0f} MiB; {summary.tree}")
        for role, peak in sorted(peaks.items()):
            print(f"  {role:<6} {peak / MIB:.0f} MiB, {peak / model:.2f} x model: {'ok' if peak <= limit else 'OVER'}")
        print(f"  median step {figures['step_seconds']:.2f} s")

    report("memory", figures, show)


if __name__ == "__main__":
    main()
