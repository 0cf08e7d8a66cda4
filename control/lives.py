"""Spheres that a launcher keeps, life after life: numbered, started again with back-off, set aside, told to leave.

What one life is (a process, an actor) is the launcher's own; none of that is known here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from control.restarts import Restarts
from spheres.errors import ArmillaryError

__all__ = ["Ended", "Life", "Lives", "Outcome", "RunFacts", "Started"]

log = logging.getLogger(__name__)

#: seconds that spheres have to end by themselves, after a word, and after being killed
_GRACE_SECONDS = (1.0, 5.0, 5.0)


class Started(NamedTuple):
    """A sphere that was started: what the launcher calls it, and its process id where that is on control's machine."""

    name: str
    pid: int | None = None


class Outcome(NamedTuple):
    """How a life has ended: its exit code (negative: the signal; None: not known), and what it said of an error."""

    code: int | None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Ended:
    """A sphere that ended before it was told to."""

    name: str
    code: int | None
    #: where its log is, in words
    log: str
    error: str
    #: ends in a row, this one included
    count: int = 1

    def __str__(self) -> str:
        how = "" if self.code is None else f"exit code {self.code}" if self.code >= 0 else _signal_name(-self.code)
        text = f"{self.name} has ended{f' ({how})' if how else ''}{f': {self.error}' if self.error else ''}"
        return f"{text}; its log is {self.log}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # of the real-time signals only the first and the last have names
        return f"signal {number}"


def _nobody() -> AbstractSet[tuple[str, int]]:
    return frozenset()


@dataclass(frozen=True)
class RunFacts:
    """What a launcher is told of the run that it starts spheres for."""

    #: control's, as it listens
    address: str
    #: folder for what spheres say, where that is written on this machine
    logs: Path
    #: told of every sphere that ends before it was told to
    ended: Callable[[Ended], None]
    #: host and process id of the spheres that have a way to control
    linked: Callable[[], AbstractSet[tuple[str, int]]] = _nobody
    #: waits until a condition holds that may change whenever a sphere comes or goes; None: nobody comes
    until: Callable[[Callable[[], bool]], Awaitable[object]] | None = None
    #: seconds that spheres wait for a control that is gone
    orphan_timeout: float = 60.0
    #: folders that spheres import from, besides the working directory
    path: Sequence[str] = ()
    verbose: bool = False


class Life(Protocol):
    """One life of one sphere."""

    @property
    def where(self) -> tuple[str, int] | None:
        """Host and process id, as the sphere itself tells them to control; None while that is not known."""

    async def wait(self) -> Outcome:
        """Wait for its end."""

    def end(self, *, at_once: bool) -> None:
        """Tell it to leave, or kill it. Nothing where it has ended already."""


@dataclass
class _Slot:
    """One sphere, life after life."""

    number: int
    life: Life | None = None
    #: when it joined in this life
    joined: float | None = None
    restarts: Restarts = field(default_factory=Restarts)
    #: it was told to leave: not started again
    leaving: bool = False
    keeper: asyncio.Task[None] | None = None

    @property
    def forsaken(self) -> bool:
        """Whether its keeper has failed: nobody waits for its end, or starts it again."""
        keeper = self.keeper
        return keeper is not None and keeper.done() and not keeper.cancelled() and keeper.exception() is not None

    def end(self, *, at_once: bool) -> None:
        if self.life is not None:
            self.life.end(at_once=at_once)


class Lives:
    """Mutable state: the slots, one for each sphere. ``kind`` goes before their numbers: ``local-3``."""

    def __init__(
        self,
        kind: str,
        launch: Callable[[int], Awaitable[Life]],
        *,
        log_of: Callable[[int], str],
        ended: Callable[[Ended], None],
    ) -> None:
        """``launch`` begins a life of the sphere with this number; it may raise OSError or ArmillaryError.

        ``ended`` is told of every life that ends before it was told to, ``log_of`` says where a sphere's log is.
        """
        self._kind, self._launch, self._log_of, self._ended = kind, launch, log_of, ended
        self._slots: dict[int, _Slot] = {}
        # set when the run is over: nobody is started any more
        self._over = asyncio.Event()

    @property
    def living(self) -> int:
        return sum(1 for slot in self._slots.values() if slot.life is not None and not slot.forsaken)

    @property
    def all_aside(self) -> bool:
        """Whether there are spheres, and each of them keeps failing."""
        return bool(self._slots) and all(slot.restarts.aside and slot.life is None for slot in self._slots.values())

    def aside(self) -> list[tuple[str, str]]:
        """Return name and reason of those that keep failing and wait for their next start."""
        now = time.monotonic()
        waiting = [slot for slot in self._slots.values() if slot.restarts.aside and slot.restarts.due is not None]
        return [(f"{self._kind}-{slot.number}", slot.restarts.reason(now)) for slot in waiting]

    def has(self, number: int) -> bool:
        return number in self._slots

    async def start(self, count: int) -> list[Started]:
        """Start ``count`` more spheres. Raises what ``launch`` does; those before stay."""
        started = []
        for _ in range(count):
            slot = _Slot(self._free_number())
            self._slots[slot.number] = slot
            try:
                await self._begin(slot)
            except BaseException:
                del self._slots[slot.number]
                raise
            self._keep_on(slot)
            pid = slot.life.where[1] if slot.life is not None and slot.life.where is not None else None
            started.append(Started(f"{self._kind}-{slot.number}", pid))
        return started

    def adopt(self, number: int, life: Life) -> None:
        """Keep a life that was begun by somebody else, under a number that is free."""
        slot = self._slots[number] = _Slot(number, life, joined=time.monotonic())
        self._keep_on(slot)

    def joined(self, host: str, pid: int) -> bool:
        """A sphere has joined: it lives from now on. Returns whether it is one of these."""
        slot = self._slot_at(host, pid)
        if slot is not None and slot.joined is None:
            slot.joined = time.monotonic()
        return slot is not None

    def dismiss(self, host: str, pid: int, *, at_once: bool) -> bool:
        """A sphere was told to leave and is not started again; whether it is one of these.

        ``at_once``: it is killed where the word does not reach it.
        """
        slot = self._slot_at(host, pid)
        if slot is None:
            return False
        slot.leaving = True
        if at_once:
            asyncio.get_running_loop().call_later(_GRACE_SECONDS[0], lambda: slot.end(at_once=True))
        return True

    def _slot_at(self, host: str, pid: int) -> _Slot | None:
        found = (slot for slot in self._slots.values() if slot.life is not None and slot.life.where == (host, pid))
        return next(found, None)

    def _free_number(self) -> int:
        number = 1
        while number in self._slots:
            number += 1
        return number

    async def _begin(self, slot: _Slot) -> None:
        slot.life = await self._launch(slot.number)
        slot.joined = None
        slot.restarts.started()

    def _keep_on(self, slot: _Slot) -> None:
        def done(keeper: asyncio.Task[None]) -> None:
            if slot.forsaken:  # a bug of ours, or of a launcher
                name = f"{self._kind} sphere {slot.number}"
                log.error("%s is not watched any more, nor started again", name, exc_info=keeper.exception())

        slot.keeper = asyncio.create_task(self._keep(slot))
        slot.keeper.add_done_callback(done)

    async def _keep(self, slot: _Slot) -> None:
        """Start a sphere again whenever it ends, until it is told to leave or the run is over."""
        name = f"{self._kind} sphere {slot.number}"
        while True:
            outcome = Outcome(None, "it could not be started")
            if slot.life is not None:
                outcome = await slot.life.wait()
                slot.life = None
            if self._over.is_set() or slot.leaving:
                break
            now = time.monotonic()
            # what it took to load the task is no life: a task that takes long to fail fails all the same
            pause = slot.restarts.ended(now, lived=0.0 if slot.joined is None else now - slot.joined)
            self._ended(Ended(name, outcome.code, self._log_of(slot.number), outcome.error, slot.restarts.count))
            if slot.restarts.aside:
                log.warning("%s is set aside: %s", name, slot.restarts.reason(now))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._over.wait()
                    break
            slot.joined = None
            try:
                await self._begin(slot)
            except OSError as failure:  # no memory, no processes, no disk: the next try is later
                log.error("%s cannot be started: %s", name, failure.strerror)
            except ArmillaryError as failure:
                log.error("%s cannot be started: %s", name, failure)
        if slot.leaving:
            del self._slots[slot.number]

    def expect_end(self) -> None:
        """The run is over: whoever ends from now on was told to, and nobody is started again."""
        self._over.set()

    def kill(self) -> None:
        """End all at once."""
        self.expect_end()
        for slot in self._slots.values():
            slot.end(at_once=True)

    async def aclose(self) -> None:
        """End what still lives: some time, then a word, then by force."""
        self.expect_end()
        keepers = [slot.keeper for slot in self._slots.values() if slot.keeper is not None]
        for at_once, seconds in zip((None, False, True), _GRACE_SECONDS, strict=True):
            for slot in self._slots.values():
                if at_once is not None:
                    slot.end(at_once=at_once)
            _, pending = await asyncio.wait(keepers, timeout=seconds) if keepers else (set(), set())
            if not pending:
                return
