from __future__ import annotations

import itertools
import math

import pytest

from control.config import ScheduleConfig
from control.schedules import follows_total, learning_rate


def curve(config: ScheduleConfig, total: int, base: float = 0.2) -> list[float]:
    return [learning_rate(config, base, step, total) for step in range(total)]


def test_constant_is_the_base_to_the_bit() -> None:
    assert set(curve(ScheduleConfig(), 50)) == {0.2}


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "step"])
def test_warm_up_is_linear_without_a_zero_and_ends_at_the_base(kind: str) -> None:
    rates = curve(ScheduleConfig(kind=kind, warmup_steps=4, step_size=10), 40)
    assert rates[:4] == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert rates[4] == 0.2


def test_cosine_points() -> None:
    config = ScheduleConfig(kind="cosine", warmup_steps=10, floor=0.1)
    for step, factor in ((10, 1.0), (60, 0.55), (110, 0.1), (400, 0.1)):
        assert learning_rate(config, 2.0, step, 110) == pytest.approx(2.0 * factor)
    quarter = 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
    assert learning_rate(config, 2.0, 35, 110) == pytest.approx(2.0 * quarter)


def test_linear_points() -> None:
    config = ScheduleConfig(kind="linear", warmup_steps=10, floor=0.5)
    for step, factor in ((10, 1.0), (35, 0.875), (60, 0.75), (110, 0.5), (400, 0.5)):
        assert learning_rate(config, 2.0, step, 110) == pytest.approx(2.0 * factor)


def test_step_decay_drops_after_each_step_size_and_stops_at_the_floor() -> None:
    config = ScheduleConfig(kind="step", warmup_steps=2, step_size=3, gamma=0.5, floor=0.2)
    assert curve(config, 14, base=1.0)[2:] == pytest.approx([1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.2, 0.2, 0.2])


@pytest.mark.parametrize("kind", ["cosine", "linear", "step"])
def test_decay_never_rises_and_never_passes_the_floor(kind: str) -> None:
    rates = curve(ScheduleConfig(kind=kind, warmup_steps=5, step_size=7, gamma=0.3, floor=0.05), 300)[4:]
    assert all(after <= before for before, after in itertools.pairwise(rates))
    assert min(rates) >= 0.05 * 0.2


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_a_larger_total_moves_the_curve_unless_decay_steps_fix_it(kind: str) -> None:
    floating, fixed = ScheduleConfig(kind=kind), ScheduleConfig(kind=kind, decay_steps=100)
    assert follows_total(floating)
    assert learning_rate(floating, 1.0, 100, 200) == pytest.approx(0.5)
    assert not follows_total(fixed)
    assert curve(fixed, 200)[:100] == curve(fixed, 100) == curve(floating, 100)
    assert learning_rate(fixed, 1.0, 150, 200) == pytest.approx(0.0)


@pytest.mark.parametrize("kind", ["constant", "step"])
def test_schedules_without_an_end_do_not_follow_the_total(kind: str) -> None:
    config = ScheduleConfig(kind=kind, step_size=10)
    assert not follows_total(config)
    assert curve(config, 300)[:100] == curve(config, 100)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_a_total_within_the_warm_up_is_no_division_by_zero(kind: str) -> None:
    config = ScheduleConfig(kind=kind, warmup_steps=10)
    assert curve(config, 5, base=1.0) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert learning_rate(config, 1.0, 10, 10) == 0.0
