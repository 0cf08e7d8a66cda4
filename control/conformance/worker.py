"""The process of a worker under test: told where control is played, watched, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from control.starting import start_process
from spheres.errors import ConfigError

__all__ = ["WorkerProcess"]

#: seconds that a worker which failed has to say why
_WORDS_SECONDS = 0.3


class WorkerProcess:
    """One process, and what it has started, in a group of its own. What it prints goes to a file."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.command, self.log = list(command), log
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, address: str) -> None:
        """Start it with ARMILLARY_CONTROL. Raises ConfigError where there is no such command."""
        environment = {**os.environ, "ARMILLARY_CONTROL": address}
        with self.log.open("ab") as output:
            try:
                starting = asyncio.ensure_future(
                    start_process(
                        *self.command,
                        stdin=asyncio.subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        env=environment,
                        start_new_session=True,  # so that what it has started itself is ended with it
                    )
                )
                try:
                    self._process = await asyncio.shield(starting)
                except asyncio.CancelledError:
                    self._process = await starting  # Ctrl+C at this very moment: it runs, and has to be ended
                    raise
            except OSError as error:
                raise ConfigError(f"cannot start {self.command[0]!r}: {error.strerror}") from None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def exit_code(self) -> int:
        """Wait for its end; 128 + N where signal N ended it."""
        assert self._process is not None
        code = await self._process.wait()
        return code if code >= 0 else 128 - code

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def aclose(self) -> None:
        """End it at once, with all that it has started."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()

    async def last_words(self) -> list[str]:
        """Return the last lines that it printed: why it did what failed may be said a moment after it is seen."""
        if self._process is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_WORDS_SECONDS):
                    await self._process.wait()
        return self.tail()

    def tail(self, lines: int = 12) -> list[str]:
        """Return the last lines that it printed."""
        try:
            return self.log.read_text(errors="replace").splitlines()[-lines:]
        except OSError:
            return []
