"""The shuffle against a second implementation in plain integers, its golden vectors, and the arithmetic of steps.

``python tests/unit/test_sampling.py`` writes the golden vectors anew.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spheres.errors import ConfigError
from spheres.sampling import Sampler, evaluation_slice, mix64, permute, permute_range

GOLDEN = Path(__file__).parents[2] / "protos" / "testdata" / "shuffle.json"
MASK = (1 << 64) - 1


def reference_mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def reference_shuffle(seed: int, epoch: int, size: int, position: int) -> int:
    """The algorithm of docs/protocol-shuffle.md, word for word, in Python integers."""
    half = 1
    while 4**half < size:
        half += 1
    start = reference_mix((reference_mix((seed + 0x9E3779B97F4A7C15) & MASK) + epoch) & MASK)
    keys = [reference_mix((start + r * 0x9E3779B97F4A7C15) & MASK) for r in range(1, 7)]
    x = position
    while True:
        left, right = x >> half, x & ((1 << half) - 1)
        for key in keys:
            left, right = right, left ^ (reference_mix((right + key) & MASK) >> (64 - half))
        x = left << half | right
        if x < size:
            return x


def reference_microbatch(seed: int, size: int, batch: int, total: int, step: int, index: int) -> list[int]:
    per_epoch = (size + batch - 1) // batch
    epoch, within = step // per_epoch, step % per_epoch
    count = min(batch, size - within * batch)
    first, end = index * count // total, (index + 1) * count // total
    return [reference_shuffle(seed, epoch, size, within * batch + k) for k in range(first, end)]


def golden() -> dict[str, object]:
    cases = [
        (0, 0, 1),
        (0, 0, 10),
        (0, 1, 10),
        (7, 3, 17),
        (42, 5, 1437),
        (2**63 - 1, 1_000_000, 60_000),
        (1, 0, 2**40 + 3),
    ]
    shuffles = []
    for seed, epoch, size in cases:
        positions = sorted({*range(min(size, 10)), size - 1})
        samples = [reference_shuffle(seed, epoch, size, p) for p in positions]
        shuffles.append({"seed": str(seed), "epoch": epoch, "size": size, "positions": positions, "samples": samples})
    steps = [(42, 1437, 64, 16, 0, 0), (42, 1437, 64, 16, 22, 15), (42, 1437, 64, 16, 23, 3), (9, 100, 10, 12, 4, 5)]
    keys = ("seed", "size", "batch_size", "microbatches", "step", "index")
    microbatches = []
    for case in steps:
        named: dict[str, object] = dict(zip(keys, case, strict=True))
        microbatches.append(named | {"seed": str(case[0]), "samples": reference_microbatch(*case)})
    words = [0, 1, 0x9E3779B97F4A7C15, MASK]
    return {
        "about": "docs/protocol-shuffle.md; seeds and 64-bit words are strings, hexadecimal for words",
        "mix64": [{"word": f"{w:016x}", "mixed": f"{reference_mix(w):016x}"} for w in words],
        "shuffles": shuffles,
        "microbatches": microbatches,
    }


def test_golden_vectors_are_those_of_the_reference() -> None:
    assert json.loads(GOLDEN.read_text()) == golden()


def test_golden_vectors() -> None:
    vectors = json.loads(GOLDEN.read_text())
    for case in vectors["mix64"]:
        assert mix64(int(case["word"], 16)) == int(case["mixed"], 16)
    for case in vectors["shuffles"]:
        found = permute(int(case["seed"]), case["epoch"], case["size"], case["positions"])
        assert found.tolist() == case["samples"]
    for case in vectors["microbatches"]:
        sampler = Sampler(int(case["seed"]), case["size"], case["batch_size"], case["microbatches"])
        assert sampler.microbatch(case["step"], case["index"]).tolist() == case["samples"]


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**40), st.integers(1, 2**62), st.data())
def test_random_access_agrees_with_the_reference(seed: int, epoch: int, size: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, size - 1), max_size=5))
    expected = [reference_shuffle(seed, epoch, size, p) for p in positions]
    assert permute(seed, epoch, size, positions).tolist() == expected


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 64, 65, 257, 1437, 4096, 4097, 5000, 20_000])
def test_every_sample_once_in_an_epoch(size: int) -> None:
    order = permute_range(11, 2, size, 0, size)
    assert sorted(order.tolist()) == list(range(size))


def test_few_positions_and_many_give_one_order() -> None:
    # one position walks; all positions go through a table of the domain; a range goes through kept windows
    everything = permute(5, 1, 9001, np.arange(9001))
    assert [int(permute(5, 1, 9001, [p])[0]) for p in range(0, 9001, 500)] == everything[::500].tolist()
    for start, stop in [(0, 0), (7, 7), (0, 1), (4000, 4200), (4095, 4096), (4096, 8192), (100, 9001)]:
        assert permute_range(5, 1, 9001, start, stop).tolist() == everything[start:stop].tolist()
    assert permute_range(5, 1, 200_000, 10, 150_000)[-1] == permute(5, 1, 200_000, 149_999)


def test_orders_differ_by_seed_and_epoch() -> None:
    orders = {tuple(permute_range(seed, epoch, 50, 0, 50).tolist()) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


def test_no_sample_prefers_a_position() -> None:
    size, epochs = 12, 3000
    seen = np.zeros((size, size))
    for epoch in range(epochs):
        seen[np.arange(size), permute(4, epoch, size, np.arange(size))] += 1
    expected = epochs / size
    chi_square = float(((seen - expected) ** 2 / expected).sum())
    # 121 degrees of freedom: mean 121, deviation 15.6
    assert chi_square < 121 + 5 * 15.6


def test_neighbours_in_an_epoch_are_not_neighbours_in_the_data() -> None:
    order = permute_range(3, 0, 10_000, 0, 10_000)
    steps = np.abs(np.diff(order))
    # two independent draws lie a third of the range apart
    assert 3200 < float(steps.mean()) < 3470
    assert abs(float(np.corrcoef(order[:-1], order[1:])[0, 1])) < 0.05


@given(st.integers(0, 2**63 - 1), st.integers(1, 300), st.integers(1, 400), st.integers(1, 20), st.integers(0, 5))
def test_an_epoch_of_steps_takes_every_sample_once(
    seed: int, size: int, batch_size: int, microbatches: int, epoch: int
) -> None:
    sampler = Sampler(seed, size, batch_size, microbatches)
    first = epoch * sampler.steps_per_epoch
    taken: list[int] = []
    for step in range(first, first + sampler.steps_per_epoch):
        assert sampler.epoch_of(step) == epoch
        assert sampler.samples_before(step) == epoch * size + len(taken)
        parts = [sampler.microbatch(step, index).tolist() for index in range(microbatches)]
        assert [sampler.count(step, index) for index in range(microbatches)] == [len(part) for part in parts]
        assert sampler.empty(step) == {index for index, part in enumerate(parts) if not part}
        joined = [sample for part in parts for sample in part]
        assert sampler.batch_count(step) == len(joined)
        taken += joined
    assert sorted(taken) == list(range(size))


def test_the_last_step_of_an_epoch_is_short() -> None:
    sampler = Sampler(0, 1437, 64, 16)
    assert sampler.steps_per_epoch == 23
    assert [sampler.batch_count(step) for step in (0, 21, 22, 23, 45)] == [64, 64, 29, 64, 29]
    assert sampler.samples_before(24) == 1437 + 64


def test_the_samples_of_a_step_do_not_depend_on_the_number_of_microbatches() -> None:
    def of_step(microbatches: int) -> list[int]:
        sampler = Sampler(8, 500, 37, microbatches)
        return [s for index in range(microbatches) for s in sampler.microbatch(3, index).tolist()]

    assert of_step(1) == of_step(12) == of_step(50)


def test_generators_depend_on_seed_step_and_index_alone() -> None:
    sampler = Sampler(5, 100, 10, 4)
    draws = {
        key: Sampler(key[0], 100, 10, 4).generator(key[1], key[2]).integers(0, 2**63)
        for key in [(5, 0, 0), (5, 0, 1), (5, 1, 0), (6, 0, 0), (2**63 - 1, 2**40, 3)]
    }
    assert len(set(draws.values())) == len(draws)
    sampler.generator(0, 0).random(100)
    assert sampler.generator(0, 0).integers(0, 2**63) == draws[5, 0, 0]
    assert Sampler(5, 7, 3, 2).generator(0, 1).integers(0, 2**63) == draws[5, 0, 1]


def test_a_microbatch_cannot_be_written_through() -> None:
    # it may be a view of a window that other microbatches share
    samples = Sampler(5, 100, 10, 4).microbatch(0, 0)
    with pytest.raises(ValueError, match="read-only"):
        samples[0] = 1


@given(st.integers(0, 1000), st.integers(1, 40))
def test_evaluation_slices_cover_the_split_in_order(size: int, total: int) -> None:
    parts = [evaluation_slice(size, total, index) for index in range(total)]
    assert np.concatenate(parts).tolist() == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(part.dtype == np.int64 for part in parts)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ((-1, 10, 1, 1), "seed"),
        ((2**63, 10, 1, 1), "seed"),
        ((0, 0, 1, 1), "size"),
        ((0, 10, 0, 1), "batch_size"),
        ((0, 10, 1, 0), "microbatches"),
        ((0, 10, 1.5, 1), "batch_size"),
        ((0, 10, True, 1), "batch_size"),
    ],
)
def test_nonsense_is_refused_by_name(values: tuple[int, int, int, int], name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is"):
        Sampler(*values)


def test_positions_and_microbatches_out_of_range_are_refused() -> None:
    sampler = Sampler(0, 10, 5, 2)
    for step, index in [(0, 2), (0, -1), (-1, 0)]:
        with pytest.raises(ConfigError, match="no microbatch"):
            sampler.microbatch(step, index)
    with pytest.raises(ConfigError, match="position 10"):
        permute(0, 0, 10, [3, 10])
    with pytest.raises(ConfigError, match="index"):
        evaluation_slice(10, 2, 2)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden(), indent=1) + "\n")
