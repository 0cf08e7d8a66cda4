"""The journal: one durable JSON line per committed step, keyed by step; and the event log beside it.

What a record holds is the controller's (docs/journal.md); ``control.report`` and ``control.replay`` read it once more.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any, TypeAlias

from control.store import fsync_directory
from spheres.errors import ArmillaryError, ConfigError
from spheres.numerics import crc32c

__all__ = ["Broken", "EventLog", "Journal", "MadeIn", "Records", "read_lines", "read_records", "weights_of"]

log = logging.getLogger(__name__)

#: bytes read at a time while the end of the last whole line is searched
_TAIL_BYTES = 1 << 16
#: how a line ends: with the CRC-32C of all bytes before that member, so that whoever has the line can check it
_CHECKSUM = re.compile(rb',"crc32c":"(.{8})"\}\n', re.DOTALL)
_CHECKSUM_BYTES = len(b',"crc32c":"00000000"}\n')
#: made once: json.dumps makes one for each record
_encode = json.JSONEncoder(separators=(",", ":")).encode

#: ranges of microbatches with their environment, and how many of them had been meant for another
MadeIn: TypeAlias = tuple[tuple[tuple[int, int, str], ...], int]


@dataclass(frozen=True, slots=True)
class Broken:
    """A line that cannot be used; ``line`` counts from 1."""

    line: int
    what: str


@dataclass
class Records:
    """The records of some steps, the latest term of each; and which steps there are at all."""

    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    #: the first and the last step of the whole journal; None where it has none
    first: int | None = None
    last: int | None = None
    #: term -> what made its records
    origins: dict[int, dict[str, Any]] = field(default_factory=dict)
    broken: list[Broken] = field(default_factory=list)


class Journal:
    """Append-only. Mutable state: the file, and step -> (term, digest) of the latest term for each step (N18)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        #: highest term of a record; 0 where there is none
        self.term = 0
        self._digests: dict[int, tuple[int, str, MadeIn | None]] = {}
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
            _append(self._file, _checked_line(record), sync=True)
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
        """Return ``weights_of`` the latest term's record of ``step``; None where there is none."""
        found = self._digests.get(step)
        return None if found is None else found[1]

    def made_in(self, step: int) -> MadeIn | None:
        """Return in which environments that record's step was computed; None where it does not say."""
        found = self._digests.get(step)
        return None if found is None else found[2]

    def close(self) -> None:
        self._file.close()

    def _replay(self) -> None:
        broken: list[int] = []
        for number, record in read_lines(self.path):
            try:
                if isinstance(record, Broken):
                    raise ValueError(record.what)
                self._take(record)
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
        step, term, digest = int(record["step"]), int(record.get("term", 0)), weights_of(record)
        self.term = max(self.term, term)
        if term >= self._digests.get(step, (0,))[0]:
            self._digests[step] = (term, digest, _made_in(record))


@lru_cache(maxsize=64)
def _one_of_many(made_in: MadeIn) -> MadeIn:
    """The same object for equal ones: nearly every step of a run has the same."""
    return made_in


def _made_in(record: Mapping[str, Any]) -> MadeIn | None:
    ranges = record.get("environments")
    if ranges is None:
        return None
    parts = tuple((int(lo), int(hi), str(name)) for lo, hi, name in ranges)
    return _one_of_many((parts, int(record.get("mixed_recompute", 0))))


def weights_of(record: Mapping[str, Any]) -> str:
    """Return the digest in a record that all bits of control's weights went into: the master's, where it has one."""
    return str(record.get("master_digest") or record["weights_digest"])


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | Broken]]:
    """Yield the number of each line, from 1, and its record, or what is wrong with it. Raises OSError."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return  # a kill left it, or it is being written just now
            found = _CHECKSUM.fullmatch(line, max(0, len(line) - _CHECKSUM_BYTES))
            # a line without a checksum was written before there were any
            if found is not None and found[1] != b"%08x" % crc32c(line[: found.start()]):
                yield number, Broken(number, "does not fit its checksum")
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                yield number, Broken(number, "is no JSON object")
                continue
            record.pop("crc32c", None)
            yield number, record


def read_records(path: Path, steps: range) -> Records:
    """Return the records of ``steps``. Holds those alone in memory. Raises OSError."""
    found = Records()
    known: dict[int, int] = {}  # step -> its latest term
    for number, record in read_lines(path):
        if isinstance(record, Broken):
            found.broken.append(record)
            continue
        try:
            if record.get("event") == "forget":
                start = int(record["from_step"])
                known = {step: term for step, term in known.items() if step < start}
                found.steps = {step: each for step, each in found.steps.items() if step < start}
                continue
            step, term = int(record["step"]), int(record.get("term", 0))
            str(record["weights_digest"])
        except (ValueError, KeyError, TypeError):
            found.broken.append(Broken(number, "is no record of a step"))
            continue
        if isinstance(origin := record.get("origin"), dict):
            found.origins[term] = origin
        if term >= known.get(step, 0):
            known[step] = term
            if step in steps:
                found.steps[step] = record
    found.first, found.last = min(known, default=None), max(known, default=None)
    return found


class EventLog:
    """events.jsonl: what happened besides steps; written at once, not synced."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = _open(path)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record. A disk that takes no more is no reason to stop: the journal is what tells of that."""
        try:
            _append(self._file, _encode(record).encode() + b"\n")
        except OSError as error:
            log.warning("cannot write %s: %s", self._path, error.strerror)

    def close(self) -> None:
        self._file.close()


def _checked_line(record: Mapping[str, Any]) -> bytes:
    body = _encode(record).encode()[:-1]
    return body + b',"crc32c":"%08x"}\n' % crc32c(body)


def _append(file: FileIO, line: bytes, *, sync: bool = False) -> None:
    """Write a line whole or not at all. Raises OSError."""
    rest = memoryview(line)
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
