"""What every test stands on: one BLAS thread, a fresh uvloop per coroutine, reproducible properties, the wire."""

import gc
import os
import signal

# Whoever starts commands in the background may have them ignore Ctrl+C, which what tests start would inherit.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The bits of a gradient depend on the number of BLAS threads; it is read once, when numpy is first imported.
for _name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"

import asyncio
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

import hypothesis
import pytest
import uvloop

from control.config import RunConfig
from tests import reaper

T = TypeVar("T")

# `make test-inline`: the whole suite on the other wire, wherever a test does not name one itself.
if _wire := os.environ.get("TEST_WIRE"):
    RunConfig.model_fields["wire"].default = _wire
    RunConfig.model_rebuild(force=True)
    assert RunConfig().wire == _wire

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


class Run(Protocol):
    """The type of the `run` fixture."""

    def __call__(self, coro: Coroutine[Any, Any, T], *, timeout: float = 30.0) -> T: ...


async def _bounded(coro: Coroutine[Any, Any, T], timeout: float) -> T:
    loop = asyncio.get_running_loop()
    reports: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: reports.append(context))
    async with asyncio.timeout(timeout):
        result = await coro
    pending = asyncio.all_tasks() - {asyncio.current_task()}
    if pending:  # a task that was told to end may need some more turns of the loop
        _, pending = await asyncio.wait(pending, timeout=1.0)
    if pending:
        pytest.fail("tasks left pending:\n" + "\n".join(f"  {task!r}" for task in pending))
    if reports:
        pytest.fail("reported to the loop, handled by nobody:\n" + "\n".join(f"  {report}" for report in reports))
    return result


def _run(coro: Coroutine[Any, Any, T], *, timeout: float = 30.0) -> T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_bounded(coro, timeout))


def pytest_collection_finish() -> None:
    """Modules and thousands of tests are there, and stay: no garbage collection needs to look at them again."""
    gc.collect()
    gc.freeze()


def pytest_sessionstart() -> None:
    """What tests start ends with this process, however that ends."""
    reaper.watch()


@pytest.fixture(scope="session")
def run() -> Run:
    """Run a coroutine on a fresh loop, within a timeout; tasks that it leaves behind fail the test.

    It keeps no state, so it may be used under `@hypothesis.given` too.
    """
    return _run
