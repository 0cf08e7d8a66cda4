"""A run taken step by step, as in a notebook: look at it, save, change your mind, go back, go on.

Run it: python examples/step.py. In a notebook leave main() out and write ``async with`` and ``await`` in the cells.
"""

from __future__ import annotations

import asyncio

from control.config import RunConfig
from control.training import Training


async def main() -> None:
    config = RunConfig(task="digits", spheres=2, fan_out=2, epochs=2, checkpoint_every=None)
    async with Training(config) as training:  # control and its spheres start; the run is paused before its first step
        await training.step()
        print(f"step {training.summary.steps}: loss {training.summary.loss:.3f}")

        saved = await training.save()
        await training.step(5)
        after_six = training.summary.weights_sha256
        print(f"step {training.summary.steps}: loss {training.summary.loss:.3f}")

        await training.restore(saved.name)
        print(f"back at step {training.summary.steps}")
        await training.step(5)
        print(f"the same five steps again gave the same bits: {training.summary.weights_sha256 == after_six}")

        summary = await training.run()  # the rest
    print(f"{summary.state} after {summary.steps} steps, test accuracy {summary.metrics['accuracy']:.1%}")


if __name__ == "__main__":
    asyncio.run(main())
