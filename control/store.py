"""Durable storage of named directories of files: the seam that checkpoints lie behind, and the local file system.

A directory is published whole or not at all. What is in the files is in ``control.checkpoint``.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

__all__ = ["Draft", "Fault", "LocalStore", "Store", "atomic_file", "fsync_directory", "no_fault"]

logger = logging.getLogger(__name__)

#: called with the name of each point that has been reached, so that a test can kill or fail there
Fault = Callable[[str], None]


class Draft(Protocol):
    """A directory being written; nobody sees it before it is published."""

    def create(self, file: str) -> AbstractContextManager[BinaryIO]:
        """Open a new file; it is durable when the context ends without an error."""

    def publish(self) -> None:
        """Make the directory visible under its name, in place of an older one, and durable."""

    def discard(self) -> None:
        """Remove what is not published. Never raises OSError."""


class Store(Protocol):
    """Directories by name. One writer at a time; readers change nothing and need no lock.

    All methods may raise OSError. FileNotFoundError of ``open`` means that the directory or the file is not there.
    """

    def names(self) -> list[str]:
        """Return the published names, in no order."""

    def location(self, name: str) -> str:
        """Return where a directory is, for messages."""

    def open(self, name: str, file: str) -> AbstractContextManager[BinaryIO]:
        """Open a file of a published directory for reading."""

    def begin(self, name: str) -> Draft:
        """Begin a directory, after removing what writers that were killed left behind."""

    def delete(self, name: str) -> None:
        """Remove a directory; it is gone as a whole at once."""


#: prefixes of what is not published: being written, set aside while its successor takes its place, being removed
_DRAFT, _REPLACED, _REMOVED = ".draft-", ".replaced-", ".removed-"


class LocalStore:
    """A directory of directories on a local file system. Mutable state: the file system alone.

    Fault points: ``save.begin``, ``save.draft.created``, ``save.file.FILE.opened``, ``save.file.FILE.written``,
    ``save.rename.before``, ``save.rename.between`` (only where a directory of that name exists), ``save.rename.after``,
    ``save.published``, ``retention.before``, ``retention.renamed``, ``retention.removed``.
    """

    def __init__(self, root: Path, fault: Fault | None = None) -> None:
        self._root = root
        self._fault = fault or no_fault

    def __repr__(self) -> str:
        return f"<LocalStore {self._root}>"

    def names(self) -> list[str]:
        try:
            entries = [entry.name for entry in self._root.iterdir() if entry.is_dir()]
        except FileNotFoundError:
            return []
        names = {name for name in entries if not name.startswith(".")}
        return list(names | {name.removeprefix(_REPLACED) for name in entries if name.startswith(_REPLACED)})

    def location(self, name: str) -> str:
        return str(self._root / name)

    def open(self, name: str, file: str) -> BinaryIO:
        return (self._resolve(name) / file).open("rb")

    def begin(self, name: str) -> LocalDraft:
        self._fault("save.begin")
        if not self._root.is_dir():
            self._root.mkdir(parents=True)
            fsync_directory(self._root.parent)
        self._clean()
        path = self._root / f"{_DRAFT}{name}"
        draft = LocalDraft(path, self._root / name, self._root / f"{_REPLACED}{name}", self._fault)
        path.mkdir()
        try:
            self._fault("save.draft.created")
        except BaseException:
            draft.discard()
            raise
        return draft

    def delete(self, name: str) -> None:
        self._fault("retention.before")
        removed = self._root / f"{_REMOVED}{name}"
        self._resolve(name).rename(removed)
        self._fault("retention.renamed")
        shutil.rmtree(removed)
        self._fault("retention.removed")

    def _resolve(self, name: str) -> Path:
        # A writer killed between two renames leaves the older directory set aside: it still counts, and stays where
        # it is until the next writer, since a reader must not move what a living writer is about to replace.
        path, replaced = self._root / name, self._root / f"{_REPLACED}{name}"
        return replaced if not path.exists() and replaced.exists() else path

    def _clean(self) -> None:
        for entry in list(self._root.iterdir()):
            name = entry.name
            try:
                if name.startswith(_REPLACED) and not (published := self._root / name.removeprefix(_REPLACED)).exists():
                    entry.rename(published)
                elif name.startswith((_DRAFT, _REPLACED, _REMOVED)):
                    shutil.rmtree(entry)
            except OSError as error:
                logger.warning("cannot remove %s, left behind by an earlier save: %s", entry, error.strerror)


class LocalDraft:
    """A directory of a LocalStore that is being written. Mutable state: the file system, and whether it was moved."""

    def __init__(self, path: Path, final: Path, replaced: Path, fault: Fault) -> None:
        self._path = path
        self._final = final
        self._replaced = replaced
        self._fault = fault
        self._moved = False

    def __repr__(self) -> str:
        return f"<LocalDraft {self._path}>"

    @contextmanager
    def create(self, file: str) -> Iterator[BinaryIO]:
        with (self._path / file).open("xb") as stream:
            self._fault(f"save.file.{file}.opened")
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        self._fault(f"save.file.{file}.written")

    def publish(self) -> None:
        fsync_directory(self._path)
        self._fault("save.rename.before")
        replaces = self._final.exists()
        if replaces:
            # no portable call swaps two directories; readers look at the one set aside until the new one is there
            self._final.rename(self._replaced)
            self._fault("save.rename.between")
        self._path.rename(self._final)
        self._moved = True
        self._fault("save.rename.after")
        fsync_directory(self._final.parent)
        self._fault("save.published")
        if replaces:
            shutil.rmtree(self._replaced, ignore_errors=True)

    def discard(self) -> None:
        with suppress(OSError):
            if self._moved:  # but perhaps not durably: whoever hears of a failure is to find what was there before
                self._final.rename(self._path)
            if self._replaced.exists() and not self._final.exists():
                self._replaced.rename(self._final)
        shutil.rmtree(self._path, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that takes the place of ``path``, durably, when the context ends without an error.

    One writer of ``path`` at a time; what a killed one leaves behind is overwritten by the next.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make creations, renames and removals in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def no_fault(point: str) -> None:
    """Reach a point as it is reached outside of tests: nothing happens there."""
