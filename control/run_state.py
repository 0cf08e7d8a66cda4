"""The states of a run and the one table of moves between them.

It decides nothing else: who asks for a move, and what follows from it, is the controller's.
"""

from __future__ import annotations

from enum import StrEnum

from spheres.errors import RunStateError

__all__ = ["MOVES", "RunState", "move"]


class RunState(StrEnum):
    """The same names in protos, CLI, journal and metrics. ``running`` may carry a reason ("waiting for spheres")."""

    IDLE = "idle"
    INITIALIZING = "initializing"
    RUNNING = "running"
    PAUSED = "paused"
    CHECKPOINTING = "checkpointing"  # only while the copy is taken
    RESTORING = "restoring"
    COMPLETED = "completed"
    STOPPED = "stopped"
    ERROR = "error"

    @property
    def ended(self) -> bool:
        """Whether no move leads out of this state."""
        return not MOVES[self]


_S = RunState

#: state -> states that it may move to
MOVES: dict[RunState, frozenset[RunState]] = {
    _S.IDLE: frozenset({_S.INITIALIZING, _S.STOPPED, _S.ERROR}),
    # paused: a run created in order to be stepped by hand
    _S.INITIALIZING: frozenset({_S.RESTORING, _S.RUNNING, _S.PAUSED, _S.STOPPED, _S.ERROR}),
    # completed: a checkpoint restored at its last step has nothing left to do
    _S.RESTORING: frozenset({_S.RUNNING, _S.PAUSED, _S.COMPLETED, _S.STOPPED, _S.ERROR}),
    _S.RUNNING: frozenset({_S.PAUSED, _S.CHECKPOINTING, _S.RESTORING, _S.COMPLETED, _S.STOPPED, _S.ERROR}),
    # completed: the step done by hand was the last one
    _S.PAUSED: frozenset({_S.RUNNING, _S.CHECKPOINTING, _S.RESTORING, _S.COMPLETED, _S.STOPPED, _S.ERROR}),
    # back to where it came from, or on: the last checkpoint of a run comes before its end
    _S.CHECKPOINTING: frozenset({_S.RUNNING, _S.PAUSED, _S.COMPLETED, _S.STOPPED, _S.ERROR}),
    _S.COMPLETED: frozenset(),
    _S.STOPPED: frozenset(),
    _S.ERROR: frozenset(),
}


def move(state: RunState, to: RunState) -> RunState:
    """Return ``to``. Raises RunStateError where the table has no such move; a move to the same state is none."""
    if to in MOVES[state]:
        return to
    if state is to:
        raise RunStateError(f"the run is {state} already")
    if state.ended:
        raise RunStateError(f"the run is {state} and has ended: it cannot become {to}; start it again with --resume")
    allowed = ", ".join(sorted(MOVES[state]))
    raise RunStateError(f"the run is {state}: it cannot become {to}, only {allowed}")
