"""Wishes of several clients at once, in a random order and at random moments: all answered, the bits as ever."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from control.config import RunConfig
from control.reference import reference
from control.run_state import RunState
from control.testing import LocalTree, local_tree
from spheres.errors import CheckpointError
from spheres.testing.memory import MemoryNetwork, MemoryTransport
from spheres.testing.synthetic import Synthetic

WISHES = 150
#: wishes under way at a time
MOST_PENDING = 6


async def wish(kind: str, tree: LocalTree) -> None:
    controller = tree.controller
    match kind:
        case "restore":
            await controller.restore(None)
        case "restore of what is not there":
            with pytest.raises(CheckpointError, match="no checkpoint"):
                await controller.restore("step-999999999")
        case "save":
            await controller.save()
        case "rebalance":
            await controller.between_steps(tree.tree.rebalance)
        case "copy":
            await controller.copy_weights()
        case "pause":
            controller.pause()
            await asyncio.sleep(0.01)
            controller.resume()


KINDS = ("restore", "restore of what is not there", "save", "rebalance", "copy", "pause")


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("wire", ["shm", "inline"])
@pytest.mark.parametrize("evaluations", ["1 steps", None])
def test_whatever_clients_wish_for_is_answered_and_the_weights_are_those_of_the_reference_loop(
    evaluations: str | None, wire: str, run: Any, tmp_path: Any
) -> None:
    rng = random.Random(f"{evaluations} {wire}")
    task = Synthetic(parameters=13_000, samples=200)

    def config(steps: int = 100_000) -> RunConfig:
        return RunConfig(
            task="synthetic",
            steps=steps,
            batch_size=48,
            microbatches=12,
            spheres=4,
            fan_out=2,
            chunk_bytes=4096,
            window_chunks=2,
            eval_every=evaluations,
            checkpoint_every="7 steps",
            wire=wire,
        )

    async def main() -> tuple[int, str]:
        network = MemoryNetwork()
        async with local_tree(config(), task, lambda name: MemoryTransport(network, name), directory=tmp_path) as tree:
            controller, pending = tree.controller, set[asyncio.Task[None]]()
            running = asyncio.create_task(tree.run())
            await controller.save()  # there is something to go back to
            for _ in range(WISHES):
                pending.add(asyncio.create_task(wish(rng.choice(KINDS), tree)))
                while len(pending) >= MOST_PENDING:
                    done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                    for answered in done:
                        answered.result()
                await asyncio.sleep(rng.choice((0.0, 0.001, 0.01, 0.03)))
            await asyncio.gather(*pending)
            # not where the last restore has put it back, but steps after that
            controller.resume()
            await controller.advance(3)
            controller.request_stop("enough")
            sha256 = await running
            assert controller.state is RunState.STOPPED
            assert tree.tree.living == 4, "no link has ended for it"
            return controller.step, sha256

    steps, sha256 = run(main(), timeout=150.0)
    assert sha256 == reference(task, config(), steps=steps).weights_sha256
