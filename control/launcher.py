"""Local sphere processes: started with control, started again when they die, ended with it. What they do is theirs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from control.processes import is_sphere, log_of, spheres_of
from control.restarts import Restarts
from spheres.logs import said_error

__all__ = ["Ended", "LocalSpheres"]

log = logging.getLogger(__name__)

#: BLAS and OpenMP read these once, when numpy is first imported
SINGLE_THREAD = dict.fromkeys(
    ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)
#: seconds in which spheres of a control that was killed come back: they dial again with pauses of up to a second, and
#: control's start has taken some of that time already
_COME_BACK_SECONDS = 3.0
#: seconds between two looks at which of them live
_LOOK_SECONDS = 0.2
#: seconds that spheres have to end by themselves, after a signal, and after SIGKILL
_GRACE_SECONDS = (1.0, 5.0, 5.0)


@dataclass(frozen=True, slots=True)
class Ended:
    """A process that ended: its exit code (negative: the signal; None: not known), and what it said of an error."""

    name: str
    code: int | None
    log: Path
    error: str
    #: ends in a row, this one included
    count: int = 1

    def __str__(self) -> str:
        how = (
            "" if self.code is None else f"exit code {self.code}" if self.code >= 0 else signal.Signals(-self.code).name
        )
        text = f"{self.name} has ended{f' ({how})' if how else ''}{f': {self.error}' if self.error else ''}"
        return f"{text}; its log is {self.log}"


class _Process(Protocol):
    """What this module asks of a process: asyncio's own, or one that was adopted."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    async def wait(self) -> int: ...
    def send_signal(self, signal: int) -> None: ...


class _Adopted:
    """A sphere that an earlier control had started; held by a descriptor, so that its id cannot become another's."""

    def __init__(self, pid: int) -> None:
        """Raises OSError where it is gone."""
        self.pid = pid
        self.returncode: int | None = None
        self._descriptor = os.pidfd_open(pid)

    async def wait(self) -> int:
        """Wait for its end; whose child it is not, that is all that can be known: -1 stands for any code."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(self._descriptor, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._descriptor)
            self.returncode = -1
            os.close(self._descriptor)
        return self.returncode

    def send_signal(self, sign: int) -> None:
        signal.pidfd_send_signal(self._descriptor, sign)


@dataclass
class _Slot:
    """One local sphere, life after life."""

    number: int
    process: _Process | None = None
    adopted: bool = False
    #: when it joined in this life
    joined: float | None = None
    restarts: Restarts = field(default_factory=Restarts)
    #: where in its log this life begins
    log_start: int = 0
    #: it was told to leave: not started again
    leaving: bool = False
    keeper: asyncio.Task[None] | None = None

    @property
    def living(self) -> bool:
        return self.process is not None and self.process.returncode is None

    def send(self, sign: signal.Signals) -> None:
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(sign)


class LocalSpheres:
    """Mutable state: the slots. Each has its log in ``logs/`` of the run directory, over all its lives."""

    def __init__(
        self,
        address: str,
        logs: Path,
        *,
        orphan_timeout: float,
        ended: Callable[[Ended], None],
        path: Sequence[str] = (),
        verbose: bool = False,
    ) -> None:
        self._address, self._logs = address, logs
        self._orphan_timeout, self._verbose = orphan_timeout, verbose
        # told of every process that ends before it was told to
        self._ended = ended
        # folders that spheres import from, besides the working directory
        self._path = path
        self._slots: dict[int, _Slot] = {}
        # set when the run is over: nobody is started any more
        self._over = asyncio.Event()

    @property
    def living(self) -> int:
        return sum(1 for slot in self._slots.values() if slot.living)

    @property
    def all_aside(self) -> bool:
        """Whether there are local spheres, and each of them keeps failing."""
        return bool(self._slots) and all(slot.restarts.aside and not slot.living for slot in self._slots.values())

    def aside(self) -> list[tuple[str, str]]:
        """Return name and reason of those that keep failing and wait for their next start."""
        now = time.monotonic()
        waiting = [slot for slot in self._slots.values() if slot.restarts.aside and slot.restarts.due is not None]
        return [(f"local-{slot.number}", slot.restarts.reason(now)) for slot in waiting]

    async def start(self, count: int) -> list[int]:
        """Start ``count`` more spheres; return their process ids."""
        if count:
            self._logs.mkdir(exist_ok=True)
        pids = []
        for _ in range(count):
            slot = _Slot(self._free_number())
            self._slots[slot.number] = slot
            try:
                pids.append(await self._launch(slot))
            except BaseException:
                del self._slots[slot.number]
                raise
            slot.keeper = asyncio.create_task(self._keep(slot))
        return pids

    async def adopt_who_comes_back(
        self, linked: Callable[[], set[int]], until: Callable[[Callable[[], bool]], Awaitable[None]]
    ) -> int:
        """Wait for spheres that a control that was killed has left, and keep them; return how many.

        ``linked`` gives the processes of this machine that have a way to control; ``until`` waits for a change there.
        """
        deadline = time.monotonic() + _COME_BACK_SECONDS
        left: set[int] = set()

        def all_back() -> bool:
            return left <= linked()

        while time.monotonic() < deadline:
            left = set(await asyncio.to_thread(spheres_of, self._address))  # each time: some may die on the way
            if all_back():
                break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await until(all_back)
        adopted = [pid for pid in linked() if self.adopt(pid)]
        log.info("adopted %d spheres", len(adopted))
        return len(adopted)

    def adopt(self, pid: int) -> bool:
        """Keep a sphere that an earlier control had started for this run; False where that is another process."""
        path = log_of(pid)
        found = re.fullmatch(r"sphere-(\d+)\.log", path.name) if path is not None else None
        if path is None or found is None or path.parent != self._logs.resolve() or not is_sphere(pid, self._address):
            return False
        number = int(found[1])
        if number in self._slots:
            return False
        try:
            slot = _Slot(number, _Adopted(pid), adopted=True, joined=time.monotonic())
        except OSError:
            return False
        self._slots[number] = slot
        slot.keeper = asyncio.create_task(self._keep(slot))
        return True

    def joined(self, pid: int) -> None:
        """A sphere has joined: it lives from now on."""
        for slot in self._slots.values():
            if slot.process is not None and slot.process.pid == pid and slot.joined is None:
                slot.joined = time.monotonic()

    def dismiss(self, pid: int, *, at_once: bool) -> bool:
        """A sphere was told to leave and is not started again; whether it is one of these.

        ``at_once``: it is killed where the word does not reach it.
        """
        for slot in self._slots.values():
            if slot.process is not None and slot.process.pid == pid and slot.living:
                slot.leaving = True
                if at_once:
                    asyncio.get_running_loop().call_later(_GRACE_SECONDS[0], slot.send, signal.SIGKILL)
                return True
        return False

    def _free_number(self) -> int:
        number = 1
        while number in self._slots:
            number += 1
        return number

    def _log(self, slot: _Slot) -> Path:
        return self._logs / f"sphere-{slot.number}.log"

    async def _launch(self, slot: _Slot) -> int:
        """Start a slot's process. Raises OSError."""
        environment = {**os.environ, **SINGLE_THREAD}
        if self._path:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [*self._path, os.environ.get("PYTHONPATH")]))
        # the address by flag: a variable of control's own environment would be the same for all of them
        command = [sys.executable, "-m", "spheres", "start", "--control", self._address, "--listen", "127.0.0.1:0"]
        command += ["--orphan-timeout", f"{self._orphan_timeout:g}"]
        if self._verbose:
            command.append("--verbose")
        with self._log(slot).open("ab") as file:
            slot.log_start = file.tell()
            # A session of its own: Ctrl+C reaches control alone, which ends the spheres in order.
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                env=environment,
            )
        slot.process, slot.adopted, slot.joined = process, False, None
        slot.restarts.started()
        return process.pid

    async def _keep(self, slot: _Slot) -> None:
        """Start a sphere again whenever it ends, until it is told to leave or the run is over."""
        path, name = self._log(slot), f"local sphere {slot.number}"
        while True:
            code: int | None = None
            error = "it could not be started"
            if slot.process is not None:
                code = await slot.process.wait()
                code, error = (None, "") if slot.adopted else (code, _last_error(path, slot.log_start))
                slot.process = None
            if self._over.is_set() or slot.leaving:
                break
            now = time.monotonic()
            # what it took to load the task is no life: a task that takes long to fail fails all the same
            pause = slot.restarts.ended(now, lived=0.0 if slot.joined is None else now - slot.joined)
            self._ended(Ended(name, code, path, error, slot.restarts.count))
            if slot.restarts.aside:
                log.warning("%s is set aside: %s", name, slot.restarts.reason(now))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._over.wait()
                    break
            slot.joined = None
            try:
                await self._launch(slot)
            except OSError as failure:  # no memory, no processes, no disk: the next try is later
                log.error("%s cannot be started: %s", name, failure.strerror)
        if slot.leaving:
            del self._slots[slot.number]

    def expect_end(self) -> None:
        """The run is over: whoever ends from now on was told to, and nobody is started again."""
        self._over.set()

    def kill(self) -> None:
        """End all at once."""
        self.expect_end()
        for slot in self._slots.values():
            slot.send(signal.SIGKILL)

    async def aclose(self) -> None:
        """End what still lives: some time, then SIGTERM, then SIGKILL."""
        self.expect_end()
        keepers = [slot.keeper for slot in self._slots.values() if slot.keeper is not None]
        for sign, seconds in zip((None, signal.SIGTERM, signal.SIGKILL), _GRACE_SECONDS, strict=True):
            for slot in self._slots.values():
                if sign is not None:
                    slot.send(sign)
            _, pending = await asyncio.wait(keepers, timeout=seconds) if keepers else (set(), set())
            if not pending:
                return


def _last_error(path: Path, start: int) -> str:
    """Return the error with which a sphere's command ended, "" where it said none; its log begins at ``start``."""
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(start, file.tell() - 4096))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return said_error(lines[-1]) if lines else ""
