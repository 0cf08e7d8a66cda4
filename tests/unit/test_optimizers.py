from __future__ import annotations

import itertools

import numpy as np
import pytest

from control.config import OptimizerConfig, ParameterGroup
from control.optimizers import BLOCK, Optimizer, make_optimizer
from spheres.errors import CheckpointError, ConfigError
from spheres.tensors import Manifest, aligned_zeros

RATE = 0.05
# 67 and 3 leave padding behind them; "wide" is longer than one block
SHAPES = {
    "layer0.weight": (13, 5),
    "layer0.bias": (67,),
    "wide": (BLOCK + 1000,),
    "head.weight": (16, 4),
    "scalar": (3,),
}
MANIFEST = Manifest.of({name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()})

CONFIGS = {
    "sgd plain": OptimizerConfig(name="sgd", momentum=0.0),
    "sgd decay": OptimizerConfig(name="sgd", momentum=0.0, weight_decay=0.01),
    "sgd momentum": OptimizerConfig(name="sgd", momentum=0.9, weight_decay=0.01),
    "sgd nesterov": OptimizerConfig(name="sgd", momentum=0.8, nesterov=True),
    "sgd nesterov decay": OptimizerConfig(name="sgd", momentum=0.8, nesterov=True, weight_decay=0.02),
    "adam": OptimizerConfig(name="adam"),
    "adam decay": OptimizerConfig(name="adam", weight_decay=0.1, beta1=0.8, beta2=0.99, epsilon=1e-6),
    "adamw": OptimizerConfig(name="adamw", weight_decay=0.1),
}
GROUPS = (
    ParameterGroup(pattern="layer0.weight", frozen=True),
    ParameterGroup(pattern="*.bias", weight_decay=0.0, learning_rate_scale=0.5),
    ParameterGroup(pattern="layer0.*", learning_rate_scale=9.0),  # never reached: both are taken above
    ParameterGroup(pattern="head.*", weight_decay=0.3, learning_rate_scale=2.0),
)
EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def random_flat(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return MANIFEST.pack({name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()})


def padding() -> np.ndarray:
    mask = np.ones(MANIFEST.size, bool)
    for spec in MANIFEST.tensors:
        mask[spec.offset : spec.offset + spec.size] = False
    return mask


def step_whole(optimizer: Optimizer, weights: np.ndarray, gradient: np.ndarray, rate: float = RATE) -> None:
    optimizer.begin()
    optimizer.update(weights, gradient, rate, 0, weights.size)


def textbook(
    config: OptimizerConfig, weights: np.ndarray, gradients: list[np.ndarray], rate: float, decay: float
) -> np.ndarray:
    """The published formulas on whole float64 arrays, with the hats of Adam written out."""
    w = weights.astype(np.float64)
    b = m = v = np.zeros_like(w)
    for t, gradient in enumerate(gradients, 1):
        g = gradient.astype(np.float64)
        if config.name == "sgd":
            g = g + decay * w
            b = config.momentum * b + g
            w = w - rate * (g + config.momentum * b if config.nesterov else b)
            continue
        if config.name == "adam":
            g = g + decay * w
        else:
            w = w - rate * decay * w
        m = config.beta1 * m + (1 - config.beta1) * g
        v = config.beta2 * v + (1 - config.beta2) * g**2
        m_hat, v_hat = m / (1 - config.beta1**t), v / (1 - config.beta2**t)
        w = w - rate * m_hat / (np.sqrt(v_hat) + config.epsilon)
    return w


@EVERY_CONFIG
def test_twelve_updates_follow_the_published_formula(config: OptimizerConfig) -> None:
    optimizer, weights = make_optimizer(config, MANIFEST), random_flat(0)
    gradients = [random_flat(seed) for seed in range(1, 13)]
    expected = textbook(config, weights, gradients, RATE, config.weight_decay)
    for gradient in gradients:
        step_whole(optimizer, weights, gradient)
    assert optimizer.count == 12
    np.testing.assert_allclose(weights, expected, rtol=2e-4, atol=2e-5)


@EVERY_CONFIG
def test_settings_of_groups_reach_their_tensors_and_no_others(config: OptimizerConfig) -> None:
    config = config.model_copy(update={"parameter_groups": GROUPS})
    optimizer, weights = make_optimizer(config, MANIFEST), random_flat(0)
    before = weights.copy()
    gradients = [random_flat(seed) for seed in range(1, 6)]
    for gradient in gradients:
        step_whole(optimizer, weights, gradient)
    settings = {
        "layer0.bias": (0.5, 0.0),
        "wide": (1.0, config.weight_decay),
        "head.weight": (2.0, 0.3),
        "scalar": (1.0, config.weight_decay),
    }
    for name, (scale, decay) in settings.items():
        start = [MANIFEST.views(flat)[name].ravel() for flat in (before, *gradients)]
        expected = textbook(config, start[0], start[1:], RATE * scale, decay)
        np.testing.assert_allclose(MANIFEST.views(weights)[name].ravel(), expected, rtol=2e-4, atol=2e-5, err_msg=name)
    frozen = MANIFEST.views(weights)["layer0.weight"]
    assert frozen.tobytes() == MANIFEST.views(before)["layer0.weight"].tobytes()
    for name, buffer in optimizer.state().items():
        assert not MANIFEST.views(buffer)["layer0.weight"].any(), name


@EVERY_CONFIG
@pytest.mark.parametrize("seed", range(3))
def test_random_pieces_in_any_order_give_the_bits_of_the_whole(config: OptimizerConfig, seed: int) -> None:
    config = config.model_copy(update={"parameter_groups": GROUPS})
    whole, pieces = make_optimizer(config, MANIFEST), make_optimizer(config, MANIFEST)
    one, other = random_flat(0), random_flat(0)
    rng = np.random.default_rng(seed)
    for update in range(4):
        gradient = random_flat(update + 1)
        step_whole(whole, one, gradient)
        cuts = [0, *sorted(rng.choice(MANIFEST.size, 15, replace=False).tolist()), MANIFEST.size]
        ranges = list(itertools.pairwise(cuts))
        rng.shuffle(ranges)
        pieces.begin()
        for lo, hi in ranges:
            pieces.update(other, gradient, RATE, int(lo), int(hi))
    assert one.tobytes() == other.tobytes()
    assert {n: b.tobytes() for n, b in whole.state().items()} == {n: b.tobytes() for n, b in pieces.state().items()}


@EVERY_CONFIG
def test_padding_stays_zero_and_gradient_stays_as_it_is(config: OptimizerConfig) -> None:
    optimizer, weights, gradient = make_optimizer(config, MANIFEST), random_flat(0), random_flat(1)
    gradient[padding()] = np.nan  # as if another language had sent what it liked
    before = gradient.copy()
    for _ in range(3):
        step_whole(optimizer, weights, gradient)
    assert not weights[padding()].any()
    assert not any(buffer[padding()].any() for buffer in optimizer.state().values())
    assert gradient.tobytes() == before.tobytes()


@EVERY_CONFIG
def test_a_restored_optimizer_goes_on_with_the_same_bits(config: OptimizerConfig) -> None:
    first, weights = make_optimizer(config, MANIFEST), random_flat(0)
    for seed in (1, 2, 3):
        step_whole(first, weights, random_flat(seed))
    second = make_optimizer(config, MANIFEST)
    second.restore(first.count, {name: buffer.copy() for name, buffer in first.state().items()})
    other = weights.copy()
    for seed in (4, 5):
        step_whole(first, weights, random_flat(seed))
        step_whole(second, other, random_flat(seed))
    assert weights.tobytes() == other.tobytes()
    assert first.count == second.count == 5


def test_restore_refuses_what_does_not_fit_and_changes_nothing() -> None:
    optimizer = make_optimizer(CONFIGS["adam"], MANIFEST)
    step_whole(optimizer, random_flat(0), random_flat(1))
    before = {name: buffer.tobytes() for name, buffer in optimizer.state().items()}
    good = aligned_zeros(MANIFEST.size)
    for state, what in (
        ({"momentum": good}, "momentum"),
        ({"m": good}, "needs"),
        ({"m": good, "v": good[:-16]}, "'v'"),
        ({"m": good, "v": good.astype(np.float64)}, "float64"),
    ):
        with pytest.raises(CheckpointError, match=what):
            optimizer.restore(7, state)
    assert {name: buffer.tobytes() for name, buffer in optimizer.state().items()} == before
    assert optimizer.count == 1


def test_a_group_that_fits_no_tensor_is_an_error_that_names_the_tensors() -> None:
    config = OptimizerConfig(parameter_groups=(ParameterGroup(pattern="encoder.*", frozen=True),))
    with pytest.raises(ConfigError, match=r"'encoder\.\*' fits no tensor; the task has layer0\.weight"):
        make_optimizer(config, MANIFEST)


def test_neighbours_without_padding_between_them_keep_their_own_decay() -> None:
    manifest = Manifest.of({name: np.zeros(16, np.float32) for name in ("weight", "bias", "other")})
    groups = (ParameterGroup(pattern="bias", weight_decay=0.0),)
    config = OptimizerConfig(momentum=0.0, weight_decay=0.5, parameter_groups=groups)
    weights = aligned_zeros(48)
    weights.fill(1)
    step_whole(make_optimizer(config, manifest), weights, aligned_zeros(48), rate=1.0)
    assert weights.tolist() == [0.5] * 16 + [1.0] * 16 + [0.5] * 16


def test_state_is_given_by_reference_and_only_what_is_needed() -> None:
    assert make_optimizer(CONFIGS["sgd plain"], MANIFEST).state() == {}
    adam = make_optimizer(CONFIGS["adamw"], MANIFEST)
    assert list(adam.state()) == ["m", "v"]
    assert adam.state()["m"] is adam.state()["m"]


def test_pieces_outside_of_the_buffer_are_refused() -> None:
    optimizer, weights = make_optimizer(CONFIGS["sgd plain"], MANIFEST), random_flat(0)
    for lo, hi in ((-1, 5), (5, 4), (0, MANIFEST.size + 1)):
        with pytest.raises(ValueError, match="are not in a buffer"):
            optimizer.update(weights, weights.copy(), RATE, lo, hi)


def test_overflow_shows_in_the_weights_not_as_a_warning() -> None:
    optimizer, weights = make_optimizer(CONFIGS["sgd plain"], MANIFEST), random_flat(0)
    gradient = random_flat(1) * np.float32(1e37)
    step_whole(optimizer, weights, gradient, rate=1e9)
    assert not np.isfinite(weights).all()
