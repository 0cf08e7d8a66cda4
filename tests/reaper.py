"""Ends what a test run leaves behind, however it has ended: by itself, by a time limit, by SIGKILL.

Where pytest is killed no fixture ends what it has started, and some of that never ends by itself: a sphere that a test
has stopped sees nothing of its death, one that is held waits for another control, a run of 100,000 steps trains on. So
a process beside pytest waits for its end, and kills whoever has the mark of this test run in its environment: all that
was started from it, by whomever, in whatever session. Needs Linux.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import sys
from pathlib import Path

__all__ = ["watch"]

_NAME = "TEST_RUN"


def watch() -> None:
    """Mark what this process starts from now on, and have it killed once this process has ended."""
    if sys.platform != "linux":
        return
    mark = f"{os.getpid()}-{secrets.token_hex(8)}"
    nowhere = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in range(3)]
    command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), mark]
    # It outlives this process, which does not wait for it; whoever kills this one's session leaves it.
    os.posix_spawn(sys.executable, command, os.environ, file_actions=nowhere, setsid=True)
    os.environ[_NAME] = mark  # it has none itself


def _has(pid: int, mark: str) -> bool:
    try:
        return f"{_NAME}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it is gone, or somebody else's
        return False


def _marked(mark: str) -> list[int]:
    return [pid for process in Path("/proc").glob("[0-9]*") if _has(pid := int(process.name), mark)]


def _kill(pid: int, mark: str) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.pidfd_open(pid)
        try:
            if _has(pid, mark):  # with the process held: its id cannot become another's
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                select.select([descriptor], [], [], 10.0)
        finally:
            os.close(descriptor)


def main(pid: int, mark: str) -> None:
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        select.select([descriptor], [], [])
    # until there is nobody: one of them may have started another meanwhile
    for _ in range(10):
        found = _marked(mark)
        if not found:
            return
        for one in found:
            _kill(one, mark)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
