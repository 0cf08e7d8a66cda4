"""What others ask of a run (stop, pause, go on, work between two steps), noted until the step loop looks.

Anybody on the loop asks, at any time; what is done about it, and when, is the controller's.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from spheres.errors import ArmillaryError, RunStateError

__all__ = ["Requests", "unexpected"]

T = TypeVar("T")


def unexpected(cause: BaseException) -> ArmillaryError:
    """Return the error that stands for one which is nobody's on purpose."""
    return ArmillaryError(f"{type(cause).__name__}: {cause} (not expected)")


class Requests:
    """Belongs to one loop. Mutable state: what is asked and not done yet, and how the step loop is woken to see it."""

    def __init__(self) -> None:
        #: why the run is to end in order, after the step in hand; the first reason stays
        self.stop_reason: str | None = None
        #: what the run is to end with
        self.failure: ArmillaryError | None = None
        #: nothing is to follow the step in hand
        self.pause = False
        self._pause_at: int | None = None
        self._works: deque[tuple[Callable[[], Awaitable[Any]], asyncio.Future[Any]]] = deque()
        # set by whatever the loop should look at while no step is in hand
        self._wake = asyncio.Event()
        # the same while a step is in hand; asyncio.wait for this and the step would cost more than all else in a wait
        self._interrupt: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return (
            f"<Requests stop={self.stop_reason!r} failure={self.failure!r} pause={self.pause} "
            f"pause_at={self._pause_at} works={len(self._works)}>"
        )

    # ---- for those who ask

    def stop(self, reason: str) -> None:
        """End after the step in hand, with a checkpoint."""
        self.stop_reason = self.stop_reason or reason
        self.look_now()

    def fail(self, error: ArmillaryError) -> None:
        """End with this error; of several with the first."""
        self.failure = self.failure or error
        self.look_now()

    def pause_now(self) -> None:
        """Let nothing follow the step in hand."""
        self.pause = True
        self.look_now()

    def go_on(self, until: int | None = None) -> None:
        """Pause no longer, or not before so many steps are committed."""
        self.pause, self._pause_at = False, until
        self.look_now()

    def between_steps(self, work: Callable[[], Awaitable[T]]) -> asyncio.Future[T]:
        """Want ``work`` done when no step is in hand; the future has what it gave, or raised.

        It raises RunStateError where the run ends first.
        """
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._works.append((work, answer))
        self.look_now()
        return answer

    def look_now(self) -> None:
        """Something was asked for: let the loop see it."""
        self._wake.set()
        self.stir()

    def stir(self, _: object = None) -> None:
        """Let who waits while a step is in hand look again."""
        if self._interrupt is not None and not self._interrupt.done():
            self._interrupt.set_result(None)

    # ---- for the step loop

    @property
    def work_waits(self) -> bool:
        """Whether somebody wants something done between two steps."""
        return bool(self._works)

    def pauses_at(self, step: int) -> bool:
        """Whether the run is to pause with so many steps committed."""
        if self._pause_at is not None and step >= self._pause_at:
            self.pause, self._pause_at = True, None
        return self.pause

    def lets_pass(self, step: int) -> bool:
        """Whether nothing that is asked for now keeps the loop from going on at once with so many steps committed."""
        if self.failure is not None or self.stop_reason is not None or self._works or self.pause:
            return False
        return self._pause_at is None or step < self._pause_at

    async def do_one(self) -> None:
        """Do the work that has waited longest, and answer whoever wants it, however it ends.

        Raises what is no ArmillaryError: nobody knows what such work has left behind.
        """
        work, answer = self._works.popleft()
        if answer.cancelled():
            return  # whoever asked has gone
        try:
            result = await work()
        except BaseException as error:
            if not answer.done():
                answer.set_exception(_told(error))
            if not isinstance(error, ArmillaryError):
                raise
        else:
            if not answer.done():
                answer.set_result(result)

    async def asked(self) -> None:
        """Wait, while no step is in hand, until something is asked for."""
        self._wake.clear()
        await self._wake.wait()

    async def stirred(self, seconds: float) -> None:
        """Wait, while a step is in hand, until somebody stirs, or for so long."""
        loop = asyncio.get_running_loop()
        self._interrupt = loop.create_future()
        look = loop.call_later(seconds, self.stir)
        try:
            await self._interrupt
        finally:
            look.cancel()

    def close(self) -> None:
        """The run has ended: whoever still waits for work between two steps learns of it."""
        while self._works:
            _, answer = self._works.popleft()
            if not answer.done():
                answer.set_exception(_over())


def _over() -> RunStateError:
    return RunStateError("the run has ended")


def _told(error: BaseException) -> ArmillaryError:
    """What whoever asked is told of an error; where the loop itself is ended, that the run has."""
    if isinstance(error, ArmillaryError):
        return error
    return unexpected(error) if isinstance(error, Exception) else _over()
