"""The task of the round's benchmark: its gradient is a pure function, whatever its buffer held before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from control.config import RunConfig
from control.reference import reference
from spheres.task import Sums
from spheres.tensors import Manifest, aligned_zeros
from spheres.testing.synthetic import Standing

PARAMETERS = 200_000


def gradient(task: Standing, out: np.ndarray, samples: Any = (1, 2), scale: float = 1.0) -> tuple[np.ndarray, Sums]:
    weights = task.init_weights(np.random.default_rng(0))
    manifest = Manifest.of(weights)
    flat = manifest.pack({name: weight * np.float32(scale) for name, weight in weights.items()})
    views = manifest.views(out)
    sums = task.gradient(manifest.views(flat, writeable=False), np.array(samples), np.random.default_rng(0), views)
    return np.concatenate([view.ravel() for view in views.values()]), sums


@pytest.mark.parametrize("copies", [False, True])
def test_a_buffer_that_is_new_zeroed_or_added_to_ends_the_same(copies: bool) -> None:
    task = Standing(parameters=PARAMETERS, copies=copies)
    size = Manifest.of(task.init_weights(np.random.default_rng(0))).size
    wanted, _ = gradient(Standing(parameters=PARAMETERS), aligned_zeros(size))
    out = aligned_zeros(size)
    for disturb in (lambda: None, lambda: out.fill(0), lambda: np.add(out, out, out=out), lambda: out.fill(np.nan)):
        disturb()
        found, sums = gradient(task, out)
        assert np.array_equal(found, wanted)
        assert sums.count == 2
    assert np.all(wanted != 0)


def test_the_first_elements_follow_weights_and_samples() -> None:
    task = Standing(parameters=PARAMETERS)
    out = aligned_zeros(Manifest.of(task.init_weights(np.random.default_rng(0))).size)
    first, _ = gradient(task, out)
    others, _ = gradient(task, out, samples=(3, 4))
    heavier, _ = gradient(task, out, scale=2.0)
    for found in (others, heavier):
        different = np.flatnonzero(found != first)
        assert different.size == 48  # 16 of each of 3 tensors


def test_the_rest_is_the_same_in_bfloat16() -> None:
    task = Standing(parameters=PARAMETERS, tensors=1)
    found, _ = gradient(task, aligned_zeros(Manifest.of(task.init_weights(np.random.default_rng(0))).size))
    assert not np.any(found[16:].view(np.uint32) & 0xFFFF)


def test_copies_train_to_the_same_weights() -> None:
    settings = {"task": "standing", "microbatches": 3, "batch_size": 6, "steps": 4, "learning_rate": 0.1}
    ends = {
        reference(Standing(parameters=5_000, samples=40, copies=copies), RunConfig(**settings)).weights_sha256
        for copies in (False, True)
    }
    assert len(ends) == 1
