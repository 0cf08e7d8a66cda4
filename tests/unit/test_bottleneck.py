"""What takes most of a step, of made-up records whose answer is plain."""

from __future__ import annotations

from typing import Any

import pytest

from control.bottleneck import bottleneck

TREE = {"s-1": "control", "s-2": "control", "s-3": "s-1"}


def record(gather: float = 1.0, optimizer: float = 0.0, **changes: Any) -> dict[str, Any]:
    """A step; phases are given as name=(most, who)."""
    phases = {name: value for name, value in changes.items() if isinstance(value, tuple)}
    seconds = {name: value for name, value in changes.items() if not isinstance(value, tuple)}
    return {
        "seconds": {"step": gather + optimizer, "gather": gather, "optimizer": optimizer, **seconds},
        "phases": {name: {"sum": most * 2, "max": most, "slowest": who} for name, (most, who) in phases.items()},
    }


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([record(compute=(0.72, "s-2"), send_up=(0.2, "s-1"))], "compute on s-2: 72 % of the step"),
        (
            [record(compute=(0.39, "s-1"), send_up=(0.5, "s-3"), send_down=(0.1, "s-2"))],
            "edge s-3 -> s-1: 61 % of the step (gradients up)",
        ),
        (
            [record(compute=(0.2, "s-1"), send_up=(0.1, "s-3"), send_down=(0.5, "s-2"))],
            "edge s-2 -> control: 80 % of the step (weights down)",
        ),
        ([record(compute=(0.2, "s-1"), send_up=(0.1, "s-3"), sum=(0.5, "s-1"))], "sum on s-1: 80 % of the step"),
    ],
    ids=["compute", "up", "down", "a sphere's sum"],
)
def test_the_largest_part_of_the_gathering_is_named(steps, expected):
    assert bottleneck(steps, TREE) == expected


def test_controls_sum_is_given_apart_from_its_phases():
    found = bottleneck(
        [
            {
                **record(compute=(0.2, "s-1"), send_up=(0.1, "s-1")),
                "seconds": {"step": 1.0, "gather": 1.0, "optimizer": 0.0, "sum": 0.6},
            }
        ],
        TREE,
    )
    assert found == "sum on control: 60 % of the step"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"optimizer": 3.0}, "optimizer on control: 75 % of the step"),
        ({"journal": 3.0}, "journal on control: 75 % of the step"),
        ({"checkpoint_stall": 3.0}, "checkpoint on control: 75 % of the step"),
    ],
)
def test_what_control_does_between_the_spheres_work_counts(seconds, expected):
    assert bottleneck([record(compute=(0.9, "s-1"), **seconds)], TREE) == expected


def test_steps_are_added_up_and_the_sphere_with_most_of_it_is_named():
    steps = [record(compute=(0.9, "s-2")), record(compute=(0.9, "s-1")), record(compute=(0.9, "s-2"))]
    assert bottleneck(steps, TREE) == "compute on s-2: 90 % of the step"
    # one slow save among many steps is none of them
    steps = [record(compute=(0.9, "s-2"), checkpoint_stall=1.5), *steps]
    assert bottleneck(steps, TREE).startswith("compute on s-2: ")


def test_more_computing_than_there_was_time_is_no_more_than_the_time():
    assert bottleneck([record(0.6, 0.4, compute=(9.0, "s-1"))], TREE) == "compute on s-1: 60 % of the step"


def test_a_sphere_that_has_left_and_steps_that_say_nothing():
    assert bottleneck([], TREE) == ""
    assert bottleneck([record(0.0)], TREE) == ""
    assert (
        bottleneck([record(send_up=(0.5, "s-9"))], TREE) == "edge s-9 -> its parent: 100 % of the step (gradients up)"
    )
    assert bottleneck([record()], TREE) == "exchange: 100 % of the step"
