"""Whether the weights are the same bits on every tree: the whole grid in one process over real gRPC.

    .venv/bin/python benchmarks/grid.py [--json] [--quick]

Spheres 1, 2, 3, 5, 8, 12 x fan-out 1 (a chain), 2, 3, 12 x M = 8, 12, 16 x SGD and AdamW x with and without
clipping, with batch sizes that do not divide. Exit code 1 where one cell differs from the plain reference loop.
"""

import argparse
import asyncio
import itertools
import sys
import tempfile
import time
from pathlib import Path

import uvloop
from common import report

from control.config import RunConfig
from control.reference import reference
from control.testing import local_tree
from spheres.grpc_link import GrpcTransport
from spheres.testing.synthetic import Synthetic

SPHERES = (1, 2, 3, 5, 8, 12)
FAN_OUTS = (1, 2, 3, 12)
#: M and a batch size that it does not divide
MICROBATCHES = ((8, 37), (12, 50), (16, 67))
OPTIMIZERS = ("sgd", "adamw")
CLIPS = (None, 0.3)
STEPS = 5
#: 4 KiB chunks make 52 of them; the window is 2
PARAMETERS = 53_000


async def train(config: RunConfig, task: Synthetic) -> str:
    with tempfile.TemporaryDirectory() as directory:
        async with local_tree(config, task, lambda _: GrpcTransport(), directory=Path(directory)) as tree:
            return await tree.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every seventh cell")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    # an odd number of samples: the last step of an epoch is short
    task = Synthetic(parameters=PARAMETERS, samples=131)
    expected: dict[tuple[object, ...], str] = {}
    wrong: list[str] = []
    cells = list(itertools.product(MICROBATCHES, OPTIMIZERS, CLIPS, SPHERES, FAN_OUTS))[:: 7 if options.quick else 1]
    began = time.monotonic()
    for (microbatches, batch), optimizer, clip, spheres, fan_out in cells:
        config = RunConfig(
            task="spheres.testing.synthetic:Synthetic",
            steps=STEPS,
            batch_size=batch,
            microbatches=microbatches,
            optimizer={"name": optimizer},
            learning_rate=0.01,
            clip_norm=clip,
            spheres=spheres,
            fan_out=fan_out,
            chunk_bytes=4096,
            window_chunks=2,
            eval_every=None,
            checkpoint_every=None,
        )
        key = (microbatches, optimizer, clip)
        if key not in expected:
            expected[key] = reference(task, config).weights_sha256
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            found = runner.run(train(config, task))
        if found != expected[key]:
            wrong.append(f"{spheres} spheres, fan-out {fan_out}, M {microbatches}, {optimizer}, clip {clip}: {found}")
        elif not options.json and sys.stderr.isatty():
            print(f"\r{len(cells)} cells", end="", file=sys.stderr)
    figures = {"cells": len(cells), "different": wrong, "seconds": time.monotonic() - began}

    def show() -> None:
        print(f"{len(cells)} cells, {len(wrong)} with other bits than the reference loop, {figures['seconds']:.0f} s")
        for line in wrong:
            print(f"  {line}")

    report("grid", figures, show)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
