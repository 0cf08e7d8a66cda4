"""The directory of a run: its lock, where control listens, the durable term, the summary; and how a run is found."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from control.store import atomic_file
from spheres.errors import ConfigError, UnreachableError

__all__ = ["RunDirectory", "find"]

BASE = Path("runs")


class RunDirectory:
    """One run's directory, locked for this process until ``close``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = (path / "lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "?"
            self._lock.close()
            raise ConfigError(f"{path} is in use by process {holder}; stop it, or give another --run-dir") from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        self.info: dict[str, Any] = _read(path / "run.json") or {}

    @classmethod
    def create(cls, path: Path | None, task: str, *, base: Path = BASE) -> Self:
        """Make the directory of a new run; None: a new one below ``base``, to which ``latest`` then points.

        Raises ConfigError where it holds a run already, or cannot be written.
        """
        chosen = path
        if chosen is None:
            name = f"{time.strftime('%Y%m%d-%H%M%S')}-{''.join(c if c.isalnum() else '-' for c in task)}"
            chosen, n = base / name, 1
            while chosen.exists():
                n += 1
                chosen = base / f"{name}-{n}"
        elif (chosen / "run.json").exists():
            raise ConfigError(f"{chosen} holds a run already; go on with --resume, or give another --run-dir")
        try:
            run = cls(chosen)
        except OSError as error:
            raise ConfigError(f"cannot make the run directory {chosen}: {error.strerror}") from error
        run.info = {"run_id": f"r-{secrets.token_hex(4)}", "term": 0, "create_time": time.time()}
        if path is None:
            link = base / ".latest"
            link.unlink(missing_ok=True)
            link.symlink_to(chosen.name)
            link.replace(base / "latest")
        return run

    @classmethod
    def open(cls, path: Path | None) -> Self:
        """Open the directory of a run that exists; None: the latest. Raises ConfigError."""
        chosen = (path or BASE / "latest").resolve()
        if not (chosen / "run.json").exists():
            raise ConfigError(f"{path or BASE / 'latest'} holds no run to resume; start without --resume")
        return cls(chosen)

    @property
    def run_id(self) -> str:
        return str(self.info["run_id"])

    def raise_term(self, config: Mapping[str, Any]) -> int:
        """Count one more start or restore, durably (N1)."""
        self.info = {**self.info, "term": self.info["term"] + 1, "config": dict(config)}
        self.write_json("run.json", self.info)
        return int(self.info["term"])

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a file of the directory, whole or not at all."""
        with atomic_file(self.path / name) as file:
            file.write(json.dumps(value, indent=2).encode() + b"\n")

    def write_address(self, address: str) -> None:
        (self.path / "address").write_text(address + "\n")

    def close(self) -> None:
        """Nobody is to be found here any more."""
        (self.path / "address").unlink(missing_ok=True)
        (self.path / "lock").unlink(missing_ok=True)
        self._lock.close()


def find(address: str | None, run_dir: Path | None) -> str:
    """Return where a running control listens. Raises ConfigError, UnreachableError."""
    if address:
        return address
    path = run_dir or BASE / "latest"
    if not path.exists():
        raise ConfigError(f"no run at {path}; give --address HOST:PORT or --run-dir DIR")
    try:
        return (path / "address").read_text().strip()
    except OSError:
        state = (_read(path / "summary.json") or {}).get("state", "not running")
        raise UnreachableError(f"the run in {path} is {state}; nothing listens there") from None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
