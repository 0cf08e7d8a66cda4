from __future__ import annotations

import numpy as np
import pytest

from control.gradients import GradientDecision, decide
from spheres.numerics import global_norm
from spheres.tensors import Manifest

SHAPES = {"a": (7, 5), "b": (200,)}
MANIFEST = Manifest.of({name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()})


def summed(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return MANIFEST.pack({name: (9 * rng.standard_normal(shape)).astype(np.float32) for name, shape in SHAPES.items()})


def prepare(
    manifest: Manifest, flat: np.ndarray, count: int, *, clip_norm: float | None, clip_value: float | None
) -> GradientDecision:
    """Decide, and turn the whole sum into the clipped mean; a sum that is not finite is left as it is."""
    decision = decide(global_norm(manifest, flat), count, clip_norm=clip_norm, clip_value=clip_value)
    if decision.finite:
        decision.apply(flat, 0, flat.size)
    return decision


def test_mean_without_clipping() -> None:
    flat, before = summed(), summed()
    decision = prepare(MANIFEST, flat, 48, clip_norm=None, clip_value=None)
    assert flat.tobytes() == (before * np.float32(1 / 48)).tobytes()
    assert decision.finite
    assert not decision.clipped
    assert decision.norm == pytest.approx(np.linalg.norm(before.astype(np.float64)) / 48, rel=1e-6)


def test_a_norm_above_its_limit_is_brought_down_to_it_and_one_below_is_not_touched() -> None:
    flat = summed()
    decision = prepare(MANIFEST, flat, 48, clip_norm=0.5, clip_value=None)
    assert decision.clipped
    assert decision.norm > 0.5
    assert global_norm(MANIFEST, flat) == pytest.approx(0.5, rel=1e-5)
    untouched, plain = summed(), summed()
    assert not prepare(MANIFEST, untouched, 48, clip_norm=1e6, clip_value=None).clipped
    prepare(MANIFEST, plain, 48, clip_norm=None, clip_value=None)
    assert untouched.tobytes() == plain.tobytes()


def test_values_are_clipped_after_the_norm() -> None:
    flat, expected = summed(), summed()
    prepare(MANIFEST, expected, 48, clip_norm=1.0, clip_value=None)
    prepare(MANIFEST, flat, 48, clip_norm=1.0, clip_value=0.05)
    assert np.abs(expected).max() > 0.05
    assert flat.tobytes() == np.clip(expected, np.float32(-0.05), np.float32(0.05)).tobytes()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_left_as_it_is(bad: float) -> None:
    flat = summed()
    flat[MANIFEST.tensors[1].offset + 3] = bad
    before = flat.copy()
    decision = prepare(MANIFEST, flat, 48, clip_norm=1.0, clip_value=1.0)
    assert not decision.finite
    assert not decision.clipped
    assert flat.tobytes() == before.tobytes()
    with pytest.raises(ValueError, match="not finite"):
        decision.apply(flat, 0, flat.size)


def test_applied_in_pieces_gives_the_bits_of_the_whole() -> None:
    whole, pieces = summed(), summed()
    prepare(MANIFEST, whole, 37, clip_norm=0.7, clip_value=0.06)
    decision = decide(global_norm(MANIFEST, pieces), 37, clip_norm=0.7, clip_value=0.06)
    for lo, hi in ((100, MANIFEST.size), (0, 33), (33, 100)):
        decision.apply(pieces, lo, hi)
    assert pieces.tobytes() == whole.tobytes()
