"""Local sphere processes: started with control, ended with it. What they do is theirs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

__all__ = ["LocalSpheres"]

#: BLAS and OpenMP read these once, when numpy is first imported
SINGLE_THREAD = dict.fromkeys(
    ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)


class LocalSpheres:
    """Mutable state: the processes. Each writes its log to ``logs/`` of the run directory."""

    def __init__(self, address: str, logs: Path, *, orphan_timeout: float, verbose: bool = False) -> None:
        self._address, self._logs = address, logs
        self._orphan_timeout, self._verbose = orphan_timeout, verbose
        self.processes: list[asyncio.subprocess.Process] = []

    async def start(self, count: int) -> None:
        """Start ``count`` spheres."""
        self._logs.mkdir(exist_ok=True)
        for number in range(1, count + 1):
            command = [sys.executable, "-m", "spheres", "start", "--control", self._address]
            command += ["--orphan-timeout", f"{self._orphan_timeout:g}"]
            if self._verbose:
                command.append("--verbose")
            with (self._logs / f"sphere-{number}.log").open("ab") as log:
                # A session of its own: Ctrl+C reaches control alone, which ends the spheres in order.
                process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env={**os.environ, **SINGLE_THREAD},
                )
            self.processes.append(process)

    async def watch(self) -> int:
        """Wait until all processes have ended; return the first exit code that is not 0."""
        codes = await asyncio.gather(*(process.wait() for process in self.processes))
        return next((code for code in codes if code), 0)

    async def aclose(self, grace: float = 5.0) -> None:
        """End what still lives: a signal, then ``grace`` seconds, then SIGKILL."""
        living = [p for p in self.processes if p.returncode is None]
        for sign, seconds in ((None, 1.0), (signal.SIGTERM, grace), (signal.SIGKILL, grace)):
            for process in living:
                if sign is not None and process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        process.send_signal(sign)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await asyncio.gather(*(process.wait() for process in living))
                    return
