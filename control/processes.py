"""What can be learnt of a process by its id, before anybody sends it a signal: ids are used again. And of its end.

Linux only (/proc): elsewhere nothing is known, and so nothing is done.
"""

from __future__ import annotations

import asyncio
import os
from itertools import pairwise
from pathlib import Path

__all__ = ["command_of", "end_of", "environment_of", "folder_of", "is_sphere", "log_of", "spheres_of"]

_PROC = Path("/proc")


def command_of(pid: int) -> list[str]:
    """Return the words that a process was started with; [] where it is gone, a zombie, or hidden."""
    try:
        text = (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return []
    return [word.decode(errors="replace") for word in text.split(b"\0")[:-1]]


def is_sphere(pid: int, control: str) -> bool:
    """Whether a process is a sphere that was started for the control at this address.

    The port decides: the same control may have been named by another host name.
    """
    words = command_of(pid)
    if "start" not in words or not any(word in ("spheres", "sphere") or word.endswith("/sphere") for word in words):
        return False
    named = [after for word, after in pairwise(words) if word == "--control"]
    named += [word.removeprefix("--control=") for word in words if word.startswith("--control=")]
    return any(address.rpartition(":")[2] == control.rpartition(":")[2] for address in named)


def log_of(pid: int) -> Path | None:
    """Return the file that a process writes its standard output to."""
    try:
        return (_PROC / str(pid) / "fd" / "1").readlink()
    except OSError:
        return None


def folder_of(pid: int) -> str:
    """Return a process's working directory; "" where that is not known."""
    try:
        return str((_PROC / str(pid) / "cwd").readlink())
    except OSError:
        return ""


def environment_of(pid: int) -> dict[str, str]:
    """Return the environment that a process was started with; {} where that is not known."""
    try:
        text = (_PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return {}
    pairs = (pair.decode(errors="replace").partition("=") for pair in text.split(b"\0") if pair)
    return {name: value for name, _, value in pairs}


def spheres_of(control: str) -> list[int]:
    """Return the processes on this machine that are spheres of the control at this address."""
    pids = [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdecimal()] if _PROC.is_dir() else []
    return [pid for pid in pids if is_sphere(pid, control)]


async def end_of(descriptor: int) -> None:
    """Wait for the end of a process that need be nobody's child, held by this descriptor; then close that."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
