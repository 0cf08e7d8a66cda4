"""The events of a run and who hears them: ``Event``, ``RunHandle``, ``CallbackRegistry``.

It runs nothing by itself: the controller emits. Built-in callbacks are in ``control.callbacks``.
"""

from __future__ import annotations

import inspect
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeAlias

from control.config import RunConfig
from control.run_state import RunState
from spheres.errors import ArmillaryError, ConfigError
from spheres.words import raised

__all__ = ["EVENTS", "Callback", "CallbackError", "CallbackRegistry", "Event", "Listener", "RunHandle"]

log = logging.getLogger(__name__)

#: every event that there is
EVENTS = (
    "train_start",
    "train_end",
    "epoch_start",
    "epoch_end",
    "batch_start",
    "batch_end",
    "gradient_sync",
    "weight_update",
    "nonfinite",
    "evaluation",
    "checkpoint",
    "sphere_joined",
    "sphere_lost",
    "error",
)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened.

    The loop in pseudo-code::

        train_start
        while step < total_steps:
            [evaluation]                    # of the weights before this step, where one is due
            [epoch_start]                   # at the first step of an epoch
            batch_start
            ...                             # weights go down, gradients come up and are summed
            ...                             # the step is sealed; mean, clipping, optimizer
            gradient_sync                   # the record has the norm of the mean gradient
            ...                             # the step's record is written to the journal, and on disk
            [nonfinite]                     # the step was skipped, or microbatches of it were left out
            weight_update                   # weights_version is one higher
            batch_end                       # record = the journal's record of the step
            [epoch_end]                     # after the last step of an epoch
            [checkpoint]                    # where one was due or asked for
        [evaluation]
        [checkpoint]
        train_end

    ``sphere_joined``, ``sphere_lost`` and ``error`` come at any time. Nothing is emitted twice, except that steps done
    again after a restore come with ``record["replayed"]`` true.
    """

    #: one of EVENTS
    name: str
    #: step that it belongs to, from 0
    step: int
    #: epoch of that step, from 0
    epoch: int
    #: what is known of it; not to be changed
    record: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    #: unix time
    time: float = field(default_factory=time.time)


class RunHandle(Protocol):
    """What a callback sees of the run, and the two things that it may ask for."""

    @property
    def run_id(self) -> str: ...
    @property
    def state(self) -> RunState: ...
    @property
    def step(self) -> int:
        """Steps committed."""
        ...

    @property
    def total_steps(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def metrics(self) -> Mapping[str, float]:
        """Latest values: loss, accuracy, ..."""
        ...

    @property
    def config(self) -> RunConfig: ...
    @property
    def run_dir(self) -> Path: ...
    @property
    def living_spheres(self) -> int: ...

    def request_stop(self, reason: str) -> None:
        """End after the step in hand, with a checkpoint."""
        ...

    def request_checkpoint(self) -> None:
        """Save a checkpoint after the step in hand."""
        ...


#: what is called for an event. It runs on the event loop: what takes long belongs in a thread.
Listener: TypeAlias = Callable[[Event, RunHandle], None]

#: a plain function (registered for named events), or any object with methods ``on_<event>(event, run)``. Where it also
#: has ``state_dict() -> dict`` and ``load_state_dict(dict)``, its state (as JSON) is part of checkpoints.
Callback: TypeAlias = Any


class CallbackError(ArmillaryError):
    """A callback raised, and ``on_callback_error`` is ``raise``."""

    def __init__(self, name: str, event: str, cause: Exception) -> None:
        super().__init__(f"callback {name} failed at {event}: {raised(cause)}")


class CallbackRegistry:
    """Callbacks in the order of their registration; what one of them raises does not reach the others."""

    def __init__(self, *, on_error: Literal["log", "raise"] = "log") -> None:
        self._on_error = on_error
        #: exceptions that callbacks have raised
        self.error_count = 0
        #: hears the record of each; its owner sets it
        self.on_failure: Callable[[Mapping[str, Any]], None] = lambda _: None
        # mutable: token -> (name, callback), and per event (token, listener) in order
        self._callbacks: dict[int, tuple[str, Callback]] = {}
        self._listeners: dict[str, tuple[tuple[int, Listener], ...]] = {}
        self._tokens = itertools.count(1)

    def __repr__(self) -> str:
        names = ", ".join(name for name, _ in self._callbacks.values())
        return f"<CallbackRegistry [{names}] errors={self.error_count}>"

    def register(self, callback: Callback, events: Iterable[str] | None = None) -> int:
        """Add a callback and return the token that removes it. Raises ConfigError for one that could hear nothing.

        ``events`` names what a plain function is called for; of an object it selects some of its methods.
        """
        name = _name(callback)
        wanted = tuple(EVENTS if events is None else dict.fromkeys(events))
        if unknown := [event for event in wanted if event not in EVENTS]:
            raise ConfigError(f"callback {name}: no event {unknown[0]!r}; there are {', '.join(EVENTS)}")
        listeners = {event: method for event in wanted if callable(method := getattr(callback, f"on_{event}", None))}
        if not listeners and callable(callback):
            if events is None:
                raise ConfigError(f"callback {name}: name the events that the function is called for")
            listeners = dict.fromkeys(wanted, callback)
        misspelt = [a for a in dir(callback) if a.startswith("on_") and a[3:] not in EVENTS]
        if misspelt or not listeners:
            raise ConfigError(
                f"callback {name}: {f'{misspelt[0]} fits no event' if misspelt else 'it has no method for any event'}; "
                f"methods are on_<event>, with the events {', '.join(EVENTS)}"
            )
        if any(inspect.iscoroutinefunction(listener) for listener in listeners.values()):
            raise ConfigError(f"callback {name}: coroutine functions would never be awaited; use plain ones")
        token = next(self._tokens)
        names = {taken for taken, _ in self._callbacks.values()}
        numbered = (name if i == 1 else f"{name}#{i}" for i in itertools.count(1))
        self._callbacks[token] = (next(free for free in numbered if free not in names), callback)
        for event, listener in listeners.items():
            self._listeners[event] = (*self._listeners.get(event, ()), (token, listener))
        return token

    def unregister(self, token: int) -> None:
        """Remove a callback, also from within one; unknown tokens are fine. An event in progress still reaches it."""
        self._callbacks.pop(token, None)
        for event, listeners in list(self._listeners.items()):
            self._listeners[event] = tuple(item for item in listeners if item[0] != token)

    def wants(self, event: str) -> bool:
        """Whether anybody listens: saves the making of events that nobody hears."""
        return bool(self._listeners.get(event))

    def emit(self, event: Event, run: RunHandle) -> None:
        """Call every listener of the event, in order.

        What one raises is logged, counted and told to listeners of ``error``. With ``on_error="raise"`` the first such
        exception is raised as CallbackError, after all others were called.
        """
        first: CallbackError | None = None
        # a tuple that is never changed in place: callbacks may register and unregister meanwhile
        for token, listener in self._listeners.get(event.name, ()):
            try:
                listener(event, run)
            except Exception as error:  # noqa: BLE001 - somebody else's code
                failure = self._failed(token, event, run, error)
                first = first or failure
        if first is not None and self._on_error == "raise":
            raise first from first.__cause__

    def states(self) -> dict[str, Any]:
        """Return name -> state of the callbacks that have one, for a checkpoint; one that fails is left out."""
        states: dict[str, Any] = {}
        for name, callback in self._stateful():
            try:
                state = callback.state_dict()
                json.dumps(state)
            except Exception as error:  # noqa: BLE001 - somebody else's code
                self._no_state(name, error)
            else:
                states[name] = state
        return states

    def restore(self, states: Mapping[str, Any]) -> None:
        """Hand back what ``states`` returned. A callback that is new, or gone, is passed over."""
        for name, callback in self._stateful():
            if name in states:
                try:
                    callback.load_state_dict(states[name])
                except Exception as error:  # noqa: BLE001 - somebody else's code
                    self._no_state(name, error)

    def _no_state(self, name: str, error: Exception) -> None:
        self.error_count += 1
        log.error("the state of callback %s is no part of the checkpoint", name, exc_info=error)
        self.on_failure({"callback": name, "during": "checkpoint", "error": raised(error)})

    def _stateful(self) -> list[tuple[str, Callback]]:
        return [item for item in self._callbacks.values() if hasattr(item[1], "state_dict")]

    def _failed(self, token: int, event: Event, run: RunHandle, cause: Exception) -> CallbackError:
        name = self._callbacks.get(token, ("(unregistered)", None))[0]
        self.error_count += 1
        log.error("callback %s failed at %s", name, event.name, exc_info=cause)
        failure = CallbackError(name, event.name, cause)
        failure.__cause__ = cause
        if event.name == "error":
            return failure  # a listener of errors that fails is not told of its own failure
        record = {"event": "error", "callback": name, "during": event.name, "error": str(failure)}
        report = Event("error", event.step, event.epoch, record)
        self.on_failure(record)
        for other, listener in self._listeners.get("error", ()):
            if other == token:
                continue
            try:
                listener(report, run)
            except Exception as error:  # noqa: BLE001 - somebody else's code
                self._failed(other, report, run, error)
        return failure


def _name(callback: Callback) -> str:
    """Return a name that is the same in the next process: states are found by it."""
    named = callback if inspect.isroutine(callback) or inspect.isclass(callback) else type(callback)
    return f"{named.__module__}.{named.__qualname__}"
