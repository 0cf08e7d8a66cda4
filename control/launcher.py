"""Local sphere processes: started with control, ended with it. What they do is theirs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Ended", "LocalSpheres"]

#: BLAS and OpenMP read these once, when numpy is first imported
SINGLE_THREAD = dict.fromkeys(
    ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)
#: seconds that spheres have to end by themselves, after a signal, and after SIGKILL
_GRACE_SECONDS = (1.0, 5.0, 5.0)


@dataclass(frozen=True, slots=True)
class Ended:
    """A process that ended: its exit code (negative: the signal), and what it said of an error."""

    name: str
    code: int
    log: Path
    error: str

    def __str__(self) -> str:
        how = f"exit code {self.code}" if self.code >= 0 else f"{signal.Signals(-self.code).name}"
        return f"{self.name} has ended ({how}){f': {self.error}' if self.error else ''}; its log is {self.log}"


class LocalSpheres:
    """Mutable state: the processes. Each writes its log to ``logs/`` of the run directory."""

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
        self._processes: list[asyncio.subprocess.Process] = []
        self._watchers: list[asyncio.Task[None]] = []
        self._closing = False

    @property
    def living(self) -> int:
        return sum(1 for process in self._processes if process.returncode is None)

    async def start(self, count: int) -> None:
        """Start ``count`` spheres."""
        if count:
            self._logs.mkdir(exist_ok=True)
        environment = {**os.environ, **SINGLE_THREAD}
        if self._path:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [*self._path, os.environ.get("PYTHONPATH")]))
        for number in range(1, count + 1):
            command = [sys.executable, "-m", "spheres", "start", "--control", self._address]
            command += ["--orphan-timeout", f"{self._orphan_timeout:g}"]
            if self._verbose:
                command.append("--verbose")
            path = self._logs / f"sphere-{number}.log"
            with path.open("ab") as log:
                # A session of its own: Ctrl+C reaches control alone, which ends the spheres in order.
                process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env=environment,
                )
            self._processes.append(process)
            self._watchers.append(asyncio.create_task(self._watch(process, f"local sphere {number}", path)))

    async def _watch(self, process: asyncio.subprocess.Process, name: str, path: Path) -> None:
        code = await process.wait()
        if not self._closing:
            self._ended(Ended(name, code, path, _last_error(path)))

    def expect_end(self) -> None:
        """The run is over: whoever ends from now on was told to."""
        self._closing = True

    def kill(self) -> None:
        """End all at once."""
        for process in self._processes:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()

    async def aclose(self) -> None:
        """End what still lives: some time, then SIGTERM, then SIGKILL."""
        self.expect_end()
        for sign, seconds in zip((None, signal.SIGTERM, signal.SIGKILL), _GRACE_SECONDS, strict=True):
            for process in self._processes:
                if sign is not None and process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        process.send_signal(sign)
            _, pending = await asyncio.wait(self._watchers, timeout=seconds) if self._watchers else (set(), set())
            if not pending:
                return


def _last_error(path: Path) -> str:
    """Return the error with which a sphere's command ended, "" where it said none."""
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 4096))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines and lines[-1].startswith("error: ") else ""
