"""The reference loop with narrower types, against the same three steps written down with plain numbers."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest

from control.config import RunConfig
from control.reference import reference
from spheres.sampling import Sampler
from spheres.task import Sums

RATE, STEPS, M = 0.25, 3, 5


class Pulls:
    """One weight, pulled by each sample a little differently; the loss and the evaluation show what is seen of it."""

    def init_weights(self, rng: Any) -> dict[str, Any]:
        return {"w": np.array([1.2345678], np.float32)}

    def size(self, split: str) -> int:
        return {"train": M, "test": 1}.get(split, 0)

    def gradient(self, weights: Any, samples: Any, rng: Any, out: Any) -> Sums:
        out["w"][...] = weights["w"] * np.float32(0.1 + samples[0])
        return Sums(float(weights["w"][0]), samples.size)

    def evaluate(self, weights: Any, samples: Any) -> Sums:
        return Sums(float(weights["w"][0]), samples.size)


def f32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def as_float32(value: float) -> float:
    return value


def as_bfloat16(value: float) -> float:
    """Of a positive number with room above."""
    (word,) = struct.unpack("<I", struct.pack("<f", value))
    word = (word + 0x7FFF + (word >> 16 & 1)) >> 16 << 16
    return float(struct.unpack("<f", struct.pack("<I", word))[0])


ROUND = {"float32": as_float32, "bfloat16": as_bfloat16}


def by_hand(gradient_dtype: str, weights_dtype: str) -> tuple[float, list[float]]:
    """Return the master weight after the steps, and what was seen of it in each step and at the end."""
    narrow, seen_of = ROUND[gradient_dtype], ROUND[weights_dtype]
    master, seen = f32(1.2345678), []
    sampler = Sampler(seed=0, size=M, batch_size=M, microbatches=M)
    for step in range(STEPS):
        seen.append(seen_of(master))
        a, b, c, d, e = (
            narrow(f32(seen[-1] * f32(0.1 + int(sampler.microbatch(step, k)[0])))) for k in range(M)
        )  # [0,5) is [0,4) and [4,5)
        total = narrow(f32(narrow(f32(narrow(f32(a + b)) + narrow(f32(c + d)))) + e))
        mean = f32(total * f32(1 / M))
        master = f32(master - f32(RATE * mean))
    return master, [*seen, seen_of(master)]


@pytest.mark.parametrize("gradient_dtype", ROUND)
@pytest.mark.parametrize("weights_dtype", ROUND)
def test_what_is_rounded_and_what_is_not(gradient_dtype: Any, weights_dtype: Any) -> None:
    config = RunConfig(
        task="digits", steps=STEPS, batch_size=M, microbatches=M, learning_rate=RATE, optimizer={"momentum": 0.0},
        wire_dtype=gradient_dtype, weights_wire_dtype=weights_dtype,
    )  # type: ignore[arg-type]  # fmt: skip
    result = reference(Pulls(), config)
    master, seen = by_hand(gradient_dtype, weights_dtype)
    assert float(result.weights["w"][0]) == master
    assert result.losses == seen[:-1]
    assert result.evaluation == Sums(seen[-1], 1)


def test_the_types_give_four_different_runs() -> None:
    assert len({by_hand(gradient, weights)[0] for gradient in ROUND for weights in ROUND}) == 4
