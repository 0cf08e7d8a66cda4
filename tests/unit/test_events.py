from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest

from control.config import RunConfig
from control.events import EVENTS, CallbackError, CallbackRegistry, Event
from control.run_state import RunState
from spheres.errors import ConfigError


class StillRun:
    run_id, state, step, total_steps, epoch = "r", RunState.RUNNING, 3, 10, 0
    metrics: ClassVar[dict[str, float]] = {}
    config = RunConfig()
    run_dir = Path("run")
    living_spheres = 2

    def request_stop(self, reason: str) -> None:
        raise AssertionError(reason)

    def request_checkpoint(self) -> None:
        raise AssertionError


RUN = StillRun()


def event(name: str = "batch_end", **record: Any) -> Event:
    return Event(name, 3, 0, record)


class Hears:
    def __init__(self, heard: list[Any], name: str = "") -> None:
        self.heard, self.name = heard, name

    def on_batch_end(self, event: Event, run: Any) -> None:
        self.heard.append((self.name, event.name))

    def on_error(self, event: Event, run: Any) -> None:
        self.heard.append((self.name, event.record))


class Raises:
    def on_batch_end(self, event: Event, run: Any) -> None:
        raise ValueError("broken")


class RaisesAtErrors(Raises):
    def on_error(self, event: Event, run: Any) -> None:
        raise KeyError("broken too")


class Counts:
    def __init__(self) -> None:
        self.count = 0

    def on_batch_end(self, event: Event, run: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def test_several_callbacks_of_one_event_are_called_in_the_order_of_registration() -> None:
    heard: list[Any] = []
    registry = CallbackRegistry()
    for name in "abc":
        registry.register(Hears(heard, name))
    registry.emit(event(), RUN)
    assert heard == [("a", "batch_end"), ("b", "batch_end"), ("c", "batch_end")]


def test_a_function_is_called_for_the_events_that_it_was_registered_for() -> None:
    heard: list[str] = []
    registry = CallbackRegistry()
    registry.register(lambda event, run: heard.append(event.name), ["checkpoint", "train_end", "checkpoint"])
    for name in EVENTS:
        registry.emit(event(name), RUN)
    assert heard == ["train_end", "checkpoint"]
    assert registry.wants("checkpoint")
    assert not registry.wants("batch_end")


def test_events_select_methods_of_an_object() -> None:
    heard: list[Any] = []
    registry = CallbackRegistry()
    registry.register(Hears(heard), ["error"])
    registry.emit(event(), RUN)
    assert heard == []


def test_unregistered_callbacks_hear_nothing_more() -> None:
    heard: list[Any] = []
    registry = CallbackRegistry()
    first, second = registry.register(Hears(heard, "a")), registry.register(Hears(heard, "b"))
    registry.unregister(first)
    registry.unregister(first)
    registry.emit(event(), RUN)
    registry.unregister(second)
    registry.emit(event(), RUN)
    assert heard == [("b", "batch_end")]
    assert not registry.wants("batch_end")


def test_a_callback_may_unregister_itself_while_an_event_is_under_way() -> None:
    heard: list[str] = []
    registry = CallbackRegistry()

    def once(event: Event, run: Any) -> None:
        heard.append("once")
        registry.unregister(token)

    token = registry.register(once, ["batch_end"])
    registry.register(lambda event, run: heard.append("always"), ["batch_end"])
    registry.emit(event(), RUN)
    registry.emit(event(), RUN)
    assert heard == ["once", "always", "always"]


def test_an_exception_reaches_no_other_callback_and_is_logged_counted_and_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    heard: list[Any] = []
    registry = CallbackRegistry()
    registry.register(Raises())
    registry.register(Hears(heard))
    registry.emit(event(), RUN)
    report, after = heard
    assert after == ("", "batch_end")
    assert report[1]["during"] == "batch_end"
    assert report[1]["error"].endswith("Raises failed at batch_end: ValueError: broken")
    assert registry.error_count == 1
    assert "ValueError: broken" in caplog.text


def test_a_callback_that_fails_at_errors_too_is_not_told_of_itself() -> None:
    heard: list[Any] = []
    registry = CallbackRegistry()
    registry.register(RaisesAtErrors())
    registry.register(RaisesAtErrors())
    registry.register(Hears(heard))
    registry.emit(event(), RUN)
    # each fails at the step, and each at being told of the other
    assert registry.error_count == 4
    assert [entry for entry in heard if entry[1] == "batch_end"] == [("", "batch_end")]
    registry.emit(event("error", error="the run's own"), RUN)
    assert registry.error_count == 6


def test_raise_stops_the_run_after_all_others_were_called() -> None:
    heard: list[Any] = []
    registry = CallbackRegistry(on_error="raise")
    registry.register(Raises())
    registry.register(Hears(heard))
    with pytest.raises(CallbackError, match="Raises failed at batch_end: ValueError: broken") as caught:
        registry.emit(event(), RUN)
    assert isinstance(caught.value.__cause__, ValueError)
    assert ("", "batch_end") in heard


class MisspeltMethod:
    def on_batch_ends(self, event: Event, run: Any) -> None: ...


class AsyncMethod:
    async def on_batch_end(self, event: Event, run: Any) -> None: ...


@pytest.mark.parametrize(
    ("callback", "events", "says"),
    [
        (lambda event, run: None, None, "name the events"),
        (lambda event, run: None, ["batch_ends"], "no event 'batch_ends'"),
        (MisspeltMethod(), None, "on_batch_ends fits no event"),
        (object(), None, "it has no method for any event"),
        (AsyncMethod(), None, "never be awaited"),
    ],
)
def test_a_callback_that_could_hear_nothing_is_refused(callback: Any, events: Any, says: str) -> None:
    registry = CallbackRegistry()
    with pytest.raises(ConfigError, match=says):
        registry.register(callback, events)


def test_states_go_into_a_checkpoint_and_come_back_by_name() -> None:
    before, after = CallbackRegistry(), CallbackRegistry()
    mine = [Counts(), Counts()]
    for counts in mine:
        before.register(counts)
    before.register(Hears([]))
    mine[1].count = 7
    states = before.states()
    assert len(states) == 2
    theirs = [Counts(), Counts(), Counts()]
    for counts in theirs:
        after.register(counts)
    after.restore({**states, "gone.Callback": {"x": 1}})
    assert [counts.count for counts in theirs] == [0, 7, 0]


def test_events_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        event().step = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        Event("train_start", 0, 0).record["a"] = 1  # type: ignore[index]


class NoWordsError(Exception):
    def __str__(self) -> str:
        return str(self.args[0])


class WithoutWords:
    def on_batch_end(self, event: Event, run: Any) -> None:
        raise NoWordsError

    def state_dict(self) -> dict[str, Any]:
        raise NoWordsError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def test_what_a_callback_raises_need_not_have_words() -> None:
    registry = CallbackRegistry()
    registry.register(WithoutWords())
    told: list[Any] = []
    registry.on_failure = told.append
    registry.emit(event(), RUN)
    assert registry.states() == {}
    assert [record["error"].split(": ")[-1] for record in told] == ["NoWordsError", "NoWordsError"]
