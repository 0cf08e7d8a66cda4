"""What a case is, the list of all, and how one is run to a result within its time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any, Literal

from control.config import RunConfig
from control.conformance.play import Play
from control.conformance.script import BreachError, Script, SkippedError
from spheres.task import Task

__all__ = ["Case", "Result", "case", "named_cases", "play_case"]

Scene = Callable[[Play], Coroutine[Any, Any, None]]

#: of every case, unless silence is what it is about: no stop of this machine ends a link
_PATIENCE = 20.0


@dataclass(frozen=True)
class Case:
    """A short scenario. ``changes`` are keys of the run's configuration that it needs otherwise."""

    name: str
    #: where docs/protocol.md says what is to be seen
    rules: str
    #: one line
    title: str
    scene: Scene
    changes: Mapping[str, Any] = field(default_factory=dict)
    patience: float = _PATIENCE
    #: chunks that the model must have at least
    chunks: int = 1
    #: the worker's process is needed: to be signalled
    process: bool = False


@dataclass(frozen=True)
class Result:
    """How a case went."""

    case: Case
    state: Literal["passed", "failed", "skipped"]
    seconds: float
    #: what was seen, or why it was skipped
    note: str = ""
    rule: str = ""
    expected: str = ""
    came: str = ""
    #: the end of what was said on the links, and of what the worker printed
    exchange: Sequence[str] = ()
    output: Sequence[str] = ()


_all: list[Case] = []


def named_cases(*modules: ModuleType) -> dict[str, Case]:
    """Return name -> case, of these modules in this order."""
    return {case.name: case for module in modules for case in _all if case.scene.__module__ == module.__name__}


def case(name: str, rules: str, **more: Any) -> Callable[[Scene], Scene]:
    """Add a scene to the list; its docstring's first line is the title. Other arguments are keys of ``Case``."""

    def add(scene: Scene) -> Scene:
        title = (scene.__doc__ or "").strip().splitlines()[0].rstrip(".")
        _all.append(Case(name, rules, title, scene, **more))
        return scene

    return add


async def play_case(
    case: Case,
    task: Task,
    config: RunConfig,
    command: Sequence[str] | None,
    *,
    seconds: float,
    log: Path,
    say: Callable[[str], None] = lambda _: None,
) -> Result:
    """Run a case, with a worker that is started for it and ended after it."""
    began = perf_counter()
    changed = RunConfig.model_validate({**config.model_dump(), **case.changes})
    script = Script(task, changed, run_id=f"conformance-{case.name}", patience=case.patience)
    why = ""
    if script.chunks < case.chunks:
        why = f"the model has {script.chunks} chunks, this needs {case.chunks}: give a smaller --chunk-bytes"
    elif case.process and command is None:
        why = "the worker was not started from here"
    if why:
        return Result(case, "skipped", 0.0, why)
    async with Play(script, command, address=config.listen, log=log) as play:
        if command is None:
            say(f"{case.name}: start a worker with ARMILLARY_CONTROL={play.control.address}")
        failed: BreachError | None = None
        try:
            await _within(play, case.scene(play), seconds)
        except SkippedError as error:
            return Result(case, "skipped", perf_counter() - began, str(error), exchange=tuple(play.lines))
        except BreachError as error:
            failed = error
        took = perf_counter() - began
        if failed is None:
            said = [text for text in (play.note, play.closeness) if text]
            return Result(case, "passed", took, "; ".join(said), exchange=tuple(play.lines))
        output = await play.worker.last_words() if play.worker is not None else ()
        return Result(
            case,
            "failed",
            took,
            rule=failed.rule,
            expected=failed.expected,
            came=failed.came,
            exchange=tuple(play.lines),
            output=output,
        )


async def _within(play: Play, scene: Awaitable[None], seconds: float) -> None:
    """Wait for a scene's end, for the worker's where nobody expects that, or for its time to be over."""
    running = asyncio.ensure_future(scene)
    dying = asyncio.ensure_future(_death(play))
    try:
        done, _ = await asyncio.wait({running, dying}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if running in done:
            running.result()
            return
        rule, expected = play.waiting
        if dying in done:
            raise BreachError(rule, expected, f"the worker's process ended with exit code {dying.result()}")
        raise BreachError(rule, expected, f"nothing more came within {seconds:g} s (--timeout)")
    finally:
        for task in (running, dying):
            task.cancel()
        await asyncio.gather(running, dying, return_exceptions=True)


async def _death(play: Play) -> int:
    """Return the exit code of a worker that ends where nobody waits for that."""
    if play.worker is None:
        await asyncio.Event().wait()
        raise AssertionError
    await play.started.wait()
    code = await play.worker.exit_code()
    if play.may_end:
        await asyncio.Event().wait()
    return code
