"""A loop on virtual time, and processes that live on it: each can be stopped, continued and killed like a real one.

Nothing sleeps: where nothing is ready, the clock jumps to the next timer. One thread, no descriptor; what is given to
an executor runs on the loop, after a pause of virtual time.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import sys
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextvars import Context, ContextVar, copy_context
from typing import Any, TypeVar

__all__ = ["Process", "StalledError", "VirtualLoop", "abandon", "virtual_time"]

T = TypeVar("T")

#: whose code runs; what belongs to no process (the network, the test itself) runs under None
_PROCESS: ContextVar[Process | None] = ContextVar("process", default=None)
#: what ``time.time()`` is when a virtual clock starts
_EPOCH = 1_700_000_000.0
#: cancelled timers that may lie in the heap before it is cleaned
_MOST_CANCELLED = 200


class StalledError(AssertionError):
    """Nothing is left to run, or a bound on time or events is reached."""


class Process:
    """What a signal can reach: the callbacks and tasks that its code has started, wherever they were started from.

    Mutable state: whether it runs, what waits until it is continued, its tasks.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.stopped = self.dead = False
        #: callbacks that became due while it was stopped, in their order
        self.parked: deque[asyncio.Handle] = deque()
        self.tasks: list[asyncio.Task[Any]] = []
        #: called after each of its callbacks
        self.after: Callable[[], None] = lambda: None
        self.main: asyncio.Task[Any] | None = None

    def __repr__(self) -> str:
        return f"<Process {self.name} {'dead' if self.dead else 'stopped' if self.stopped else 'runs'}>"

    @property
    def runs(self) -> bool:
        return not (self.stopped or self.dead)

    def context(self) -> Context:
        """Return a new context that belongs to this process."""
        context = copy_context()
        context.run(_PROCESS.set, self)
        return context

    def start(self, main: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begin to run; all that ``main`` starts is this process's."""
        self.main = task = asyncio.get_running_loop().create_task(main, context=self.context())
        return task

    def stop(self) -> None:
        """As SIGSTOP does: nothing of it runs until ``go_on``, and its timers fall due unheard."""
        self.stopped = True

    def go_on(self) -> None:
        """As SIGCONT does: all that has become due runs, in order, at a time that has jumped."""
        self.stopped = False
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.again(self.parked)
        self.parked.clear()

    def kill(self) -> None:
        """As SIGKILL does: nothing of it runs ever again, no ``finally`` either."""
        self.dead = True
        self.parked.clear()

    def left(self) -> list[asyncio.Task[Any]]:
        """Return its tasks that have not ended."""
        self.tasks = [task for task in self.tasks if not task.done()]
        return self.tasks


def current_process() -> Process | None:
    """Return the process whose code calls."""
    return _PROCESS.get()


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop whose time is a number. Mutable state: the time and what was counted.

    ``pause`` gives the seconds that a call in an executor takes; it runs in the middle of them.
    """

    def __init__(
        self, *, most_seconds: float, most_events: int, pause: Callable[[], float] = lambda: 0.0, started: float = 0.0
    ) -> None:
        super().__init__()
        self._now = started
        self._ends, self._most_events = started + most_seconds, most_events
        self._pause = pause
        #: callbacks that have run
        self.events = 0
        #: tasks of no process
        self.tasks: list[asyncio.Task[Any]] = []
        self._names = 0
        #: what was reported to the loop and handled by nobody
        self.reports: list[dict[str, Any]] = []
        self.set_exception_handler(lambda _, context: self.reports.append(context))

    # the private half of the loop and its handles, which typeshed leaves out
    _ready: deque[Any]
    _scheduled: list[Any]
    _stopping: bool
    _timer_cancelled_count: int

    def time(self) -> float:
        return self._now

    def again(self, handles: Iterable[asyncio.Handle]) -> None:
        """Run these after what is ready."""
        self._ready.extend(handles)

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Context | None = None) -> asyncio.Handle:  # type: ignore[override]
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        future: asyncio.Future[T] = self.create_future()
        half = self._pause() / 2

        def act() -> None:
            try:
                result = func(*args)
            except BaseException as error:  # noqa: BLE001 - as an executor does
                self.call_later(half, self._finish, future, None, error)
            else:
                self.call_later(half, self._finish, future, result, None)

        self.call_later(half, act)
        return future

    @staticmethod
    def _finish(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def create_task(self, coro: Any, *, name: str | None = None, context: Context | None = None) -> asyncio.Task[Any]:  # type: ignore[override]
        self._names += 1
        process = _PROCESS.get() if context is None else context.get(_PROCESS)
        name = name or f"task {self._names}"
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name, context=context)
        tasks = self.tasks if process is None else process.tasks
        tasks.append(task)
        if len(tasks) > 500:
            tasks[:] = [kept for kept in tasks if not kept.done()]
        return task

    def _run_once(self) -> None:
        ready, scheduled = self._ready, self._scheduled
        if self._timer_cancelled_count > _MOST_CANCELLED and self._timer_cancelled_count * 2 > len(scheduled):
            self._sweep()
        if not ready and not self._stopping:
            while scheduled and scheduled[0]._cancelled:
                heapq.heappop(scheduled)._scheduled = False
                self._timer_cancelled_count -= 1
            if not scheduled:
                raise StalledError("nothing is left to run")
            self._now = max(self._now, scheduled[0]._when)
            if self._now > self._ends:
                raise StalledError(f"not over at {self._now:.3f} s")
        while scheduled and scheduled[0]._when <= self._now:
            timer = heapq.heappop(scheduled)
            timer._scheduled = False
            if timer._cancelled:
                self._timer_cancelled_count -= 1
            else:
                ready.append(timer)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            process = handle._context.get(_PROCESS)
            if process is None:
                handle._run()
            elif process.runs:
                handle._run()
                process.after()
            elif process.stopped and not process.dead:
                process.parked.append(handle)
            self.events += 1
        if self.events > self._most_events:
            raise StalledError(f"{self.events} events at {self._now:.3f} s")

    def _sweep(self) -> None:
        kept = [timer for timer in self._scheduled if not timer._cancelled]
        for timer in self._scheduled:
            if timer._cancelled:
                timer._scheduled = False
        heapq.heapify(kept)
        self._scheduled[:] = kept
        self._timer_cancelled_count = 0


def abandon(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Let go of tasks that will never run again, without a word; their ``finally`` blocks must not matter any more."""
    for task in tasks:
        if task.done():
            continue
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        coroutine = task.get_coro()
        for _ in range(50):  # one turn for each ``finally`` that awaits
            try:
                coroutine.close()
            except BaseException:  # noqa: BLE001 - nobody is there to hear it
                continue
            break


_CLOCKS = {
    name: getattr(time, name) for name in ("time", "monotonic", "perf_counter", "monotonic_ns", "perf_counter_ns")
}
#: where this project's modules have them, by the number of modules that were there to look through
_places: tuple[int, list[tuple[Any, str, str]]] = (0, [])


def _find_clocks() -> list[tuple[Any, str, str]]:
    """Return module, attribute and clock of each place that must show another time."""
    global _places  # noqa: PLW0603 - looking through every module costs as much as a small run
    if _places[0] != len(sys.modules):
        found = [(time, name, name) for name in _CLOCKS]
        for module_name, module in list(sys.modules.items()):
            if module_name.partition(".")[0] in ("spheres", "control"):
                for attribute, value in vars(module).items():
                    found += [(module, attribute, name) for name, real in _CLOCKS.items() if value is real]
        _places = (len(sys.modules), found)
    return _places[1]


@contextlib.contextmanager
def virtual_time(loop: VirtualLoop) -> Iterator[None]:
    """Let all clocks that this project's modules read show the loop's time."""
    fakes: dict[str, Callable[[], Any]] = {
        "time": lambda: _EPOCH + loop.time(),
        "monotonic": loop.time,
        "perf_counter": loop.time,
        "monotonic_ns": lambda: int(loop.time() * 1e9),
        "perf_counter_ns": lambda: int(loop.time() * 1e9),
    }
    places = _find_clocks()
    try:
        for module, attribute, name in places:
            setattr(module, attribute, fakes[name])
        yield
    finally:
        for module, attribute, name in places:
            setattr(module, attribute, _CLOCKS[name])
