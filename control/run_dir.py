"""The directory of a run: its lock, where control listens, the durable term, the summary; and how a run is found."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from control.store import atomic_file, fsync_directory
from spheres.errors import ConfigError, UnreachableError

__all__ = ["RunDirectory", "find", "log_lines", "meant", "process_of", "saved_config", "wait_until_free"]

logger = logging.getLogger(__name__)

BASE = Path("runs")
#: the run that is meant where none is named
LATEST = BASE / "latest"
#: of each log, the end that is searched; and what a sphere says first
_MOST_LOG_BYTES = 4 << 20
_BEGINS = "looking for control at"
#: what flock says where a file system (NFS) has no locks on directories
_NO_LOCKS = (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
#: seconds that a directory is waited for that another process has, and between two looks: a Pod that was deleted by
#: force, or whose node is cut off, holds on for a while to what the next one needs
_FREE_SECONDS, _LOOK_SECONDS = 60.0, 0.2


class RunDirectory:
    """One run's directory, locked for this process until ``close``. Mutable state: the lock, ``info`` and files.

    The lock is on the directory itself and ends with the process, so no end leaves a file behind, but for ``address``
    after a kill: from that the next start and ``find`` learn what has happened.
    """

    def __init__(self, path: Path) -> None:
        """Lock a directory that exists. Raises ConfigError where another process has it, or it is no directory."""
        self.path = path
        self._lock: int | None = None
        self._becomes_latest = False
        try:
            # not inherited: spheres outlive a control that was killed, and must not keep its lock
            self._lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            _lock(self._lock)
        except BlockingIOError:
            self._unlock()
            _, pid = _read_address(path)
            who = "another process" if pid is None else f"process {pid}"
            raise ConfigError(f"{path} is in use by {who}; stop it, or give another --run-dir") from None
        except OSError as error:
            if self._lock is None or error.errno not in _NO_LOCKS:
                self._unlock()
                raise ConfigError(f"cannot use the run directory {path}: {error.strerror}") from error
            logger.warning("%s cannot be locked on its file system: take care that no second run uses it", path)
        self.info: dict[str, Any] = _read_json(path / "run.json") or {}
        #: where a control that was killed had listened; spheres that it left behind dial there for a while
        self.last_address = _read_address(path)[0]

    def __repr__(self) -> str:
        closed = " closed" if self._lock is None else ""
        return f"<RunDirectory {self.path} term={self.info.get('term')}{closed}>"

    @classmethod
    def create(cls, path: Path | None, task: str, *, base: Path = BASE) -> Self:
        """Make the directory of a new run; None: a new one below ``base``, to which ``latest`` then points.

        Raises ConfigError where it holds a run already, is in use, or cannot be written.
        """
        try:
            if path is None:
                chosen = _new_below(base, "".join(c if c.isalnum() else "-" for c in task))
            else:
                chosen = path
                chosen.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            where = error.filename2 or error.filename or path or base
            raise ConfigError(f"cannot make the run directory: {where}: {error.strerror}") from error
        run = cls(chosen)
        if (chosen / "run.json").exists():
            run._unlock()
            raise ConfigError(f"{chosen} holds a run already; go on with --resume, or give another --run-dir")
        run.info = {"run_id": f"r-{secrets.token_hex(4)}", "term": 0, "create_time": time.time()}
        run._becomes_latest = path is None
        run._take_over()
        return run

    @classmethod
    def open(cls, path: Path | None) -> Self:
        """Open the directory of a run that exists; None: the latest. Raises ConfigError."""
        shown = path or LATEST
        chosen = shown.resolve()
        if not (chosen / "run.json").exists():
            raise ConfigError(f"{shown} holds no run to resume; start without --resume")
        run = cls(chosen)
        if not isinstance(run.info.get("run_id"), str) or not isinstance(run.info.get("term"), int):
            run._unlock()
            raise _broken(chosen)
        run._take_over()
        return run

    @property
    def run_id(self) -> str:
        return str(self.info["run_id"])

    def raise_term(self, config: Mapping[str, Any]) -> int:
        """Count one more start or restore, durably (N1)."""
        self.info = {**self.info, "term": self.info["term"] + 1, "config": dict(config)}
        self.write_json("run.json", self.info)
        if self._becomes_latest:
            # only now is there a run: a start that fails takes nothing away from the run before
            _point_latest(self.path)
            self._becomes_latest = False
        return int(self.info["term"])

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a file of the directory, whole or not at all. Raises ConfigError."""
        try:
            with atomic_file(self.path / name) as file:
                file.write(json.dumps(value, indent=2).encode() + b"\n")
        except OSError as error:
            raise ConfigError(f"cannot write {self.path / name}: {error.strerror}") from error

    def write_address(self, address: str) -> None:
        """Say where control listens, and below it which process that is. Raises ConfigError."""
        try:
            with atomic_file(self.path / "address") as file:  # somebody may be waiting to read it
                file.write(f"{address}\n{os.getpid()}\n".encode())
        except OSError as error:
            raise ConfigError(f"cannot write {self.path / 'address'}: {error.strerror}") from error

    def close(self) -> None:
        """Nobody is to be found here any more. May be called again."""
        if self._lock is not None:
            with suppress(OSError):
                (self.path / "address").unlink(missing_ok=True)
                if not (self.path / "run.json").exists():  # the start failed: only what is empty goes
                    self.path.rmdir()
                    if self._becomes_latest:
                        self.path.parent.rmdir()
            self._unlock()

    def _take_over(self) -> None:
        """Say who has the directory, and remove what a killed process was writing."""
        try:
            self.write_address("")
            for leftover in self.path.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
        except BaseException:
            self._unlock()
            raise

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def meant(address: str | None, run_dir: Path | None) -> tuple[str | None, Path | None]:
    """Return which run is meant: the one that is given, else what the environment has; neither: the latest run.

    Of the environment it takes ARMILLARY_CONTROL, else ARMILLARY_RUN_DIR.
    """
    if address or run_dir:
        return address, run_dir
    named = os.environ.get("ARMILLARY_RUN_DIR")
    return os.environ.get("ARMILLARY_CONTROL"), Path(named) if named else None


def find(address: str | None, run_dir: Path | None) -> str:
    """Return where the control that is ``meant`` listens. Raises ConfigError, UnreachableError."""
    address, run_dir = meant(address, run_dir)
    if address:
        return address
    path = run_dir or LATEST
    if not path.is_dir():
        raise ConfigError(f"no run directory at {path}; give --address HOST:PORT or --run-dir DIR")
    found, pid = _read_address(path)
    if pid is None and not found:
        state = (_read_json(path / "summary.json") or {}).get("state", "not running")
        raise UnreachableError(f"the run in {path} is {state}; nothing listens there")
    if pid is not None and not _lives(path, pid):
        raise UnreachableError(
            f"the run in {path} was killed: its process {pid} is gone; go on with: control-cli start --resume {path}"
        )
    if not found:
        raise UnreachableError(f"the run in {path} is only starting (process {pid}); try again in a moment")
    return found


def wait_until_free(path: Path) -> None:
    """Wait while another process has a run directory, for a minute at most, and say so. One that is not there is free.

    Where a file system has no locks nobody can know, and nothing is waited for.
    """
    deadline, said = time.monotonic() + _FREE_SECONDS, False
    while _is_locked(path) and time.monotonic() < deadline:
        if not said:
            _, pid = _read_address(path)
            who = "another process" if pid is None else f"process {pid}"
            logger.warning("%s is in use by %s: waiting for it, up to %g s", path, who, _FREE_SECONDS)
            said = True
        time.sleep(_LOOK_SECONDS)


def process_of(path: Path) -> int | None:
    """Return the process of the control that has a run directory; None where nobody has it."""
    _, pid = _read_address(path)
    return pid if pid is not None and _lives(path, pid) else None


def log_lines(path: Path, sphere: str, count: int) -> list[str]:
    """Return the last lines that a local sphere wrote in its latest life; [] where none of the logs knows it.

    ``sphere`` is its id, or ``local-N`` for all that ``logs/sphere-N.log`` has.
    """
    slot = re.fullmatch(r"local-(\d+)", sphere)
    if slot is not None:
        return _tail(path / "logs" / f"sphere-{slot[1]}.log")[-count:]
    for file in sorted((path / "logs").glob("sphere-*.log")):
        lives: list[list[str]] = [[]]
        for line in _tail(file):
            if _BEGINS in line:
                lives.append([])
            lives[-1].append(line)
        for life in reversed(lives):
            if any(f"{before}{sphere} joins " in line for line in life for before in (" ", '"')):  # text, JSON
                return life[-count:]
    return []


def saved_config(path: Path) -> dict[str, Any]:
    """Return the keys that the run in a directory was last started with. Raises ConfigError: run.json is broken."""
    config = (_read_json(path / "run.json") or {}).get("config")
    if not isinstance(config, dict):
        raise _broken(path.resolve())
    return config


def _broken(path: Path) -> ConfigError:
    return ConfigError(f"{path / 'run.json'} is broken: put back a copy, or start anew in another --run-dir")


def _tail(file: Path) -> list[str]:
    try:
        with file.open("rb") as opened:
            opened.seek(0, os.SEEK_END)
            opened.seek(max(0, opened.tell() - _MOST_LOG_BYTES))
            return opened.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def _new_below(base: Path, task: str) -> Path:
    """Make a new directory. Raises OSError."""
    base.mkdir(parents=True, exist_ok=True)
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{task}"
    for number in itertools.count(1):
        chosen = base / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):  # another start in this second
            chosen.mkdir()
            break
    fsync_directory(base)
    return chosen


def _point_latest(chosen: Path) -> None:
    """Make ``latest`` beside a directory point to it. Raises ConfigError."""
    link = chosen.parent / f".latest-{chosen.name}"
    try:
        link.symlink_to(chosen.name)
        link.replace(chosen.parent / "latest")
    except OSError as error:
        link.unlink(missing_ok=True)
        raise ConfigError(f"cannot make {chosen.parent / 'latest'}: {error.strerror}") from error


def _lock(descriptor: int) -> None:
    """Lock a directory. Raises BlockingIOError where another has it for more than a moment."""
    for _ in range(2):
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.01)  # ``find`` has a look just now
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _lives(path: Path, pid: int) -> bool:
    """Whether control still has the directory: the lock knows, also of another container's process and of zombies."""
    locked = _is_locked(path)
    if locked is not None:
        return locked
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _is_locked(path: Path) -> bool | None:
    """Whether a process has the directory; None where its file system has no locks."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def _read_address(path: Path) -> tuple[str, int | None]:
    """Return what the file ``address`` says: where control listens (may be empty), and its process."""
    try:
        first, second, *_ = [*(path / "address").read_text(encoding="utf-8").split("\n"), "", ""]
    except (OSError, UnicodeDecodeError):
        return "", None
    return first.strip(), int(second) if second.strip().isdecimal() else None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
