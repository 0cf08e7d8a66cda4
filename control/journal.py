"""The journal: one durable JSON line per committed step, keyed by step; and the event log beside it.

What a record holds is the controller's; ``control.report`` reads both files once more.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from control.store import fsync_directory
from spheres.errors import ArmillaryError, ConfigError

__all__ = ["EventLog", "Journal"]

log = logging.getLogger(__name__)

#: bytes read at a time while the end of the last whole line is searched
_TAIL_BYTES = 1 << 16


class Journal:
    """Append-only. Mutable state: the file, and step -> (term, digest) of the latest term for each step (N18)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._digests: dict[int, tuple[int, str]] = {}
        self._file = _open(path)
        try:
            # the entry of a new file is as durable as the lines that come into it
            fsync_directory(path.parent)
        except OSError as error:
            self._file.close()
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error
        self._replay()

    def __repr__(self) -> str:
        return f"<Journal {self.path} steps={len(self._digests)}>"

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record; on disk when this returns. Raises ArmillaryError, with the file as it was before."""
        try:
            _append(self._file, record, sync=True)
        except OSError as error:
            raise ArmillaryError(
                f"cannot write {self.path}: {error.strerror}; make room, then go on with --resume"
            ) from error
        self._take(record)

    def forget(self, from_step: int) -> None:
        """Compare no step from ``from_step`` on with what was recorded so far, in this process and all later ones.

        For a run that goes on with another total and a schedule that follows it: the steps that it does again then
        differ from the recorded ones rightly.
        """
        self.append({"event": "forget", "from_step": from_step})

    def recorded_digest(self, step: int) -> str | None:
        """Return the weights' digest after ``step`` as the latest term recorded it; None where there is none."""
        found = self._digests.get(step)
        return None if found is None else found[1]

    def close(self) -> None:
        self._file.close()

    def _replay(self) -> None:
        broken: list[int] = []
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    self._take(json.loads(line))
                except (ValueError, KeyError, TypeError, AttributeError):
                    broken.append(number)
        if broken:
            # Not an error: no weight depends on the journal, so a bad sector in it must not cost the run. Nor does a
            # difference stay hidden, as every step builds on the one before: the next one that is recorded tells.
            log.warning(
                "%s: %d broken lines are passed over, the first is line %d: their steps, done again, are not compared",
                self.path,
                len(broken),
                broken[0],
            )

    def _take(self, record: Mapping[str, Any]) -> None:
        if record.get("event") == "forget":
            start = int(record["from_step"])
            self._digests = {step: found for step, found in self._digests.items() if step < start}
            return
        step, term, digest = int(record["step"]), int(record.get("term", 0)), str(record["weights_digest"])
        if term >= self._digests.get(step, (0, ""))[0]:
            self._digests[step] = (term, digest)


class EventLog:
    """events.jsonl: what happened besides steps; written at once, not synced."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = _open(path)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record. A disk that takes no more is no reason to stop: the journal is what tells of that."""
        try:
            _append(self._file, record)
        except OSError as error:
            log.warning("cannot write %s: %s", self._path, error.strerror)

    def close(self) -> None:
        self._file.close()


def _append(file: FileIO, record: Mapping[str, Any], *, sync: bool = False) -> None:
    """Write a line whole or not at all. Raises OSError."""
    rest = memoryview(json.dumps(record, separators=(",", ":")).encode() + b"\n")
    size = file.seek(0, os.SEEK_END)
    try:
        # unbuffered: a line that could not be written must not follow later, at the next one or at close
        while rest:
            rest = rest[file.write(rest) :]
        if sync:
            os.fdatasync(file.fileno())
    except OSError:
        with suppress(OSError):
            file.truncate(size)
        raise


def _open(path: Path) -> FileIO:
    """Open a file of lines for appending, without the last line where a kill left it unfinished."""
    try:
        file = FileIO(path, "a+")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    end = file.seek(0, os.SEEK_END)
    whole = end
    while whole:
        start = max(0, whole - _TAIL_BYTES)
        file.seek(start)
        if (found := file.read(whole - start).rfind(b"\n")) >= 0:
            whole = start + found + 1
            break
        whole = start
    if whole != end:
        file.truncate(whole)
    return file
