"""The launcher ``local``: sphere processes on control's machine, started with control and ended with it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Protocol

from control.lives import Lives, Outcome, RunFacts, Started
from control.processes import end_of, is_sphere, log_of, spheres_of
from control.starting import start_process
from spheres import SINGLE_THREAD
from spheres.logs import said_error

__all__ = ["LocalSpheres"]

log = logging.getLogger(__name__)

#: seconds in which spheres of a control that was killed come back: they dial again with pauses of up to a second, and
#: control's start has taken some of that time already
_COME_BACK_SECONDS = 3.0
#: seconds between two looks at which of them live
_LOOK_SECONDS = 0.2
#: of the last line of a log: as JSON it has a traceback
_MOST_LINE_BYTES = 1 << 20


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
        try:
            await end_of(self._descriptor)
        finally:
            self.returncode = -1
        return self.returncode

    def send_signal(self, sign: int) -> None:
        signal.pidfd_send_signal(self._descriptor, sign)


class _Life:
    """One process. ``log_start`` is where in its log this life begins."""

    def __init__(self, process: _Process, path: Path, log_start: int = 0) -> None:
        self._process, self._path, self._log_start = process, path, log_start
        self.where = (socket.gethostname(), process.pid)

    async def wait(self) -> Outcome:
        code = await self._process.wait()
        if isinstance(self._process, _Adopted):
            return Outcome(None)
        return Outcome(code, _last_error(self._path, self._log_start))

    def end(self, *, at_once: bool) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL if at_once else signal.SIGTERM)


class LocalSpheres:
    """Mutable state: the lives of its processes. Each sphere has its log in ``logs/`` of the run directory."""

    def __init__(self, facts: RunFacts) -> None:
        self._facts = facts
        self._lives = Lives("local", self._launch, log_of=lambda n: str(self._log(n)), ended=facts.ended)
        self.joined, self.dismiss = self._lives.joined, self._lives.dismiss
        self.aside, self.expect_end = self._lives.aside, self._lives.expect_end
        self.kill, self.aclose = self._lives.kill, self._lives.aclose

    @property
    def living(self) -> int:
        return self._lives.living

    @property
    def all_aside(self) -> bool:
        return self._lives.all_aside

    async def begin(self, count: int, *, came_back: bool) -> None:
        """Keep the spheres that a control that was killed has left, and start what is missing. Raises OSError."""
        await self.start(max(0, count - (await self._adopt_who_comes_back() if came_back else 0)))

    async def start(self, count: int) -> list[Started]:
        """Start ``count`` more spheres. Raises OSError."""
        return await self._lives.start(count)

    async def _adopt_who_comes_back(self) -> int:
        """Wait for spheres that a control that was killed has left, and keep them; return how many."""
        host, until = socket.gethostname(), self._facts.until
        assert until is not None
        deadline = time.monotonic() + _COME_BACK_SECONDS
        left: set[int] = set()

        def linked() -> set[int]:
            return {pid for name, pid in self._facts.linked() if name == host}

        def all_back() -> bool:
            return left <= linked()

        while time.monotonic() < deadline:
            # each time: some may die on the way
            left = set(await asyncio.to_thread(spheres_of, self._facts.address))
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
        if path is None or found is None or path.parent != self._facts.logs.resolve():
            return False
        number = int(found[1])
        if not is_sphere(pid, self._facts.address) or self._lives.has(number):
            return False
        try:
            life = _Life(_Adopted(pid), path)
        except OSError:
            return False
        self._lives.adopt(number, life)
        return True

    def _log(self, number: int) -> Path:
        return self._facts.logs / f"sphere-{number}.log"

    async def _launch(self, number: int) -> _Life:
        """Start a process. Raises OSError."""
        facts = self._facts
        environment = {**os.environ, **SINGLE_THREAD}
        environment.pop("ARMILLARY_HOLD", None)  # control's own: its spheres end with the run
        if facts.path:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [*facts.path, os.environ.get("PYTHONPATH")]))
        # the address by flag: a variable of control's own environment would be the same for all of them
        command = [sys.executable, "-m", "spheres", "start", "--control", facts.address, "--listen", "127.0.0.1:0"]
        command += ["--orphan-timeout", f"{facts.orphan_timeout:g}"]
        if facts.verbose:
            command.append("--verbose")
        path = self._log(number)
        path.parent.mkdir(exist_ok=True)
        with path.open("ab") as file:
            log_start = file.tell()
            # A session of its own: Ctrl+C reaches control alone, which ends the spheres in order.
            process = await start_process(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                env=environment,
            )
        return _Life(process, path, log_start)


def _last_error(path: Path, start: int) -> str:
    """Return the error with which a sphere's command ended, "" where it said none; its log begins at ``start``."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(start, file.tell() - _MOST_LINE_BYTES))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:  # somebody has removed it
        return ""
    return said_error(lines[-1]) if lines else ""
