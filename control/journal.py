"""The journal: one durable JSON line per committed step, keyed by step; and the event log beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spheres.errors import ConfigError

__all__ = ["EventLog", "Journal"]


class Journal:
    """Append-only. Mutable state: the file, and step -> digest of the latest term for each step (N18)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._digests: dict[int, str] = {}
        if path.exists():
            _repair(path)
            for record in self.records():
                self._digests[record["step"]] = record["weights_digest"]
        try:
            self._file = path.open("ab")
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record; on disk when this returns."""
        self._file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        os.fdatasync(self._file.fileno())
        self._digests[record["step"]] = record["weights_digest"]

    def recorded_digest(self, step: int) -> str | None:
        """Return the weights' digest after ``step`` as it was recorded last; None where it was not."""
        return self._digests.get(step)

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the records from the first."""
        with self.path.open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)

    def close(self) -> None:
        self._file.close()


class EventLog:
    """events.jsonl: what happened besides steps; flushed, not synced."""

    def __init__(self, path: Path) -> None:
        if path.exists():
            _repair(path)
        self._file = path.open("a", encoding="utf-8")

    def append(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record, separators=(",", ":")) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _repair(path: Path) -> None:
    """Cut off a last line that a kill left unfinished."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole != len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
