from __future__ import annotations

import itertools

import pytest

from control.run_state import MOVES, RunState, move
from spheres.errors import RunStateError


def test_the_names_are_those_of_the_design() -> None:
    assert [str(state) for state in RunState] == [
        "idle", "initializing", "running", "paused", "checkpointing", "restoring", "completed", "stopped", "error",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "path",
    [
        "idle initializing running completed",
        "idle initializing restoring running paused running checkpointing running stopped",
        "idle initializing paused checkpointing paused restoring paused running checkpointing completed",
        "idle initializing running restoring running error",
        "idle initializing restoring completed",
    ],
)
def test_the_lives_that_a_run_may_have(path: str) -> None:
    state, *rest = (RunState(name) for name in path.split())
    for to in rest:
        state = move(state, to)
    assert state.ended == (path.rsplit(maxsplit=1)[-1] in ("completed", "stopped", "error"))


def test_whatever_is_not_in_the_table_is_refused() -> None:
    for state, to in itertools.product(RunState, RunState):
        if to in MOVES[state]:
            assert move(state, to) is to
        else:
            with pytest.raises(RunStateError):
                move(state, to)


def test_every_state_can_be_reached_and_every_living_one_can_stop_and_fail() -> None:
    reached = {RunState.IDLE}
    while new := {to for state in reached for to in MOVES[state]} - reached:
        reached |= new
    assert reached == set(RunState)
    for state in RunState:
        assert state.ended or {RunState.STOPPED, RunState.ERROR} <= MOVES[state]


@pytest.mark.parametrize(
    ("state", "to", "text"),
    [
        (RunState.PAUSED, RunState.PAUSED, "the run is paused already"),
        (
            RunState.COMPLETED,
            RunState.PAUSED,
            "the run is completed and has ended: it cannot become paused; .*--resume",
        ),
        (
            RunState.IDLE,
            RunState.RUNNING,
            "the run is idle: it cannot become running, only error, initializing, stopped",
        ),
        (RunState.CHECKPOINTING, RunState.RESTORING, "cannot become restoring"),
    ],
)
def test_the_message_says_what_is_possible(state: RunState, to: RunState, text: str) -> None:
    with pytest.raises(RunStateError, match=text):
        move(state, to)
