"""The same bits whatever the tree: whole trees over real gRPC and in memory against the plain reference loop.

The whole grid is benchmarks/grid.py; here are cells that differ in every dimension. Each has a twin that breaks the
order of the sums on purpose and must fail.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from control.config import RunConfig
from control.reference import reference
from control.testing import local_tree
from spheres.grpc_link import GrpcTransport
from spheres.task import load_task
from spheres.testing.memory import MemoryNetwork, MemoryTransport
from spheres.testing.synthetic import Synthetic
from spheres.transport import Transport
from spheres.worker import Worker


class Cell(NamedTuple):
    spheres: int
    fan_out: int
    microbatches: int
    batch: int
    settings: dict[str, Any] = {}  # noqa: RUF012 - never changed

    def __str__(self) -> str:
        extra = "-".join(f"{k}={v}" for k, v in self.settings.items())
        return f"{self.spheres}x{self.fan_out}-M{self.microbatches}-B{self.batch}{'-' + extra if extra else ''}"


ADAMW = {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1}
#: 52 chunks of 4 KiB with a window of 2, so that credit, not the size of the model, is the bound
SMALL_CHUNKS = {"chunk_bytes": 4096, "window_chunks": 2}

#: by turns: wire, and types on it
WIRES: list[dict[str, Any]] = [
    {"wire": "inline"},
    {"wire": "shm"},
    {"wire": "shm", "wire_dtype": "bfloat16"},
    {"wire": "inline", "wire_dtype": "bfloat16", "weights_wire_dtype": "bfloat16"},
    {"wire": "shm", "wire_dtype": "bfloat16", "weights_wire_dtype": "bfloat16"},
    {"wire": "inline", "wire_dtype": "bfloat16"},
]

CELLS = [
    Cell(1, 12, 8, 64),
    Cell(2, 1, 8, 37, ADAMW),
    Cell(2, 3, 16, 64, {"clip_norm": 0.5}),
    Cell(3, 1, 12, 50, SMALL_CHUNKS),
    Cell(3, 2, 16, 33, ADAMW),
    Cell(5, 1, 12, 61, {**ADAMW, "clip_norm": 0.1, **SMALL_CHUNKS}),
    Cell(5, 2, 8, 7, {"nesterov": True}),
    Cell(5, 12, 16, 64, {"clip_value": 0.01}),
    Cell(8, 2, 12, 45, {**SMALL_CHUNKS, "clip_norm": 0.2}),
    Cell(8, 3, 8, 64, ADAMW),
    Cell(12, 1, 8, 64),
    Cell(12, 2, 16, 39, {**ADAMW, "clip_norm": 0.3}),
    Cell(12, 3, 12, 96, SMALL_CHUNKS),
    Cell(12, 12, 16, 16),
]
#: parameters such that 4 KiB chunks make 52 of them
PARAMETERS = 53_000
STEPS = 4


def config_of(cell: Cell) -> RunConfig:
    flat = dict(cell.settings)
    optimizer = {"name": flat.pop("optimizer", "sgd")}
    optimizer |= {key: flat.pop(key) for key in ("weight_decay", "nesterov") if key in flat}
    return RunConfig(
        task="digits",
        steps=STEPS,
        batch_size=cell.batch,
        microbatches=cell.microbatches,
        spheres=cell.spheres,
        fan_out=cell.fan_out,
        optimizer=optimizer,
        eval_every=None,
        checkpoint_every=None,
        **{**WIRES[CELLS.index(cell) % len(WIRES)], **flat},
    )


async def tree_sha256(config: RunConfig, transport: Callable[[str], Transport], directory: Path) -> str:
    # an odd number of samples: the last step of an epoch is short, and some microbatches of it are empty
    async with local_tree(config, task(), transport, directory=directory) as tree:
        return await tree.run()


def task() -> Synthetic:
    return Synthetic(parameters=PARAMETERS, samples=131)


def memory() -> Callable[[str], Transport]:
    network = MemoryNetwork()
    return lambda name: MemoryTransport(network, name)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_tree_over_grpc_gives_the_reference_loops_bits(cell, run, tmp_path):
    config = config_of(cell)
    assert run(tree_sha256(config, lambda _: GrpcTransport(), tmp_path)) == reference(task(), config).weights_sha256


def _sum_in_another_order(monkeypatch):
    """Put gradients in their neighbours' places: each is summed once still, but with other partners.

    Only where both have as many samples: a block with a wrong count is refused.
    """
    microbatch = Worker._microbatch

    def rotated(worker: Worker, unit: Any, weights: Any, index: int, **more: Any) -> Any:
        if unit.train:
            count = worker._config.sampler.count
            equal = [k for k in range(worker._config.microbatches) if count(unit.step, k) == count(unit.step, index)]
            index = equal[(equal.index(index) + 1) % len(equal)]
        return microbatch(worker, unit, weights, index, **more)

    monkeypatch.setattr(Worker, "_microbatch", rotated)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_tree_that_sums_in_another_order_does_not(cell, run, tmp_path, monkeypatch):
    config = config_of(cell)
    expected = reference(task(), config).weights_sha256
    _sum_in_another_order(monkeypatch)
    assert run(tree_sha256(config, memory(), tmp_path)) != expected


@pytest.mark.parametrize("cell", CELLS[::3], ids=str)
def test_a_tree_in_memory_gives_the_same(cell, run, tmp_path):
    config = config_of(cell)
    assert run(tree_sha256(config, memory(), tmp_path)) == reference(task(), config).weights_sha256


def test_digits_over_three_levels_with_relays_and_spares(run, tmp_path):
    """Two relays at the top; 9 spheres for 6 microbatches, so that some have nothing to do."""
    config = RunConfig(task="digits", steps=8, batch_size=32, microbatches=6, spheres=9, fan_out=2)
    digits = load_task("digits")

    async def train() -> str:
        async with local_tree(config, digits, lambda _: GrpcTransport(), directory=tmp_path, relays=2) as tree:
            return await tree.run()

    result = reference(digits, config)
    assert run(train()) == result.weights_sha256


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_decides(seed, run, tmp_path):
    config = config_of(CELLS[4]).model_copy(update={"seed": seed})
    other = config.model_copy(update={"seed": 1 - seed})
    assert run(tree_sha256(config, memory(), tmp_path)) != reference(task(), other).weights_sha256
