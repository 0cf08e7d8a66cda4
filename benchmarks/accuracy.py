"""Test accuracy of fashion-mnist: a perceptron 784-256-128-10, 10 epochs at batch 256, over 3 seeds, on real processes.

    .venv/bin/python benchmarks/accuracy.py [--json] [--seeds N] [--epochs N]

Needs the data: Debian's package dataset-fashion-mnist, or ARMILLARY_DATA.
"""

import argparse

from common import median, report, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    runs = []
    for seed in range(options.seeds):
        summary, _ = train(
            task="fashion-mnist",
            spheres=6,
            fan_out=2,
            batch_size=256,
            epochs=options.epochs,
            learning_rate=0.1,
            schedule="cosine",
            seed=seed,
        )
        runs.append(
            {
                "seed": seed,
                "accuracy": summary.metrics["accuracy"],
                "train_seconds": summary.train_seconds,
                "samples_per_second": summary.samples_per_second,
                "weights_sha256": summary.weights_sha256,
            }
        )

    def show() -> None:
        for r in runs:
            print(
                f"seed {r['seed']}: {r['accuracy']:.2%} in {r['train_seconds']:.0f} s, {r['samples_per_second']:,.0f}/s"
            )
        print(f"median {median(r['accuracy'] for r in runs):.2%}")

    report("accuracy", {"runs": runs}, show)


if __name__ == "__main__":
    main()
