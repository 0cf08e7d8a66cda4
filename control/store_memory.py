"""A store in memory, for tests and the simulation: the same words and fault points as the others, no disk.

It does not outlive its process; ``files`` is what does, handed to the store of the next life.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from control.store import Fault, no_fault

__all__ = ["MemoryStore"]

#: name -> file -> bytes
Files = dict[str, dict[str, bytes]]


class MemoryStore:
    """Directories in a dictionary. Mutable state: ``files``, what is published; drafts are lost with the process.

    Fault points: those of LocalStore but ``save.rename.between``, since here a directory is replaced in one step.
    """

    def __init__(self, fault: Fault | None = None, files: Files | None = None) -> None:
        self.files: Files = {} if files is None else files
        self._fault = fault or no_fault

    def __repr__(self) -> str:
        return f"<MemoryStore {sorted(self.files)}>"

    def names(self) -> list[str]:
        return list(self.files)

    def location(self, name: str) -> str:
        return f"memory:{name}"

    def open(self, name: str, file: str) -> BinaryIO:
        try:
            return io.BytesIO(self.files[name][file])
        except KeyError:
            raise FileNotFoundError(f"{self.location(name)}/{file}") from None

    def begin(self, name: str) -> MemoryDraft:
        self._fault("save.begin")
        draft = MemoryDraft(self, name, self._fault)
        self._fault("save.draft.created")
        return draft

    def delete(self, name: str) -> None:
        self._fault("retention.before")
        if name not in self.files:
            raise FileNotFoundError(self.location(name))
        del self.files[name]
        self._fault("retention.renamed")
        self._fault("retention.removed")


class MemoryDraft:
    """A directory of a MemoryStore that is being written. Mutable state: its files, what it has taken the place of."""

    def __init__(self, store: MemoryStore, name: str, fault: Fault) -> None:
        self._store = store
        self._name = name
        self._fault = fault
        self._files: dict[str, bytes] = {}
        self._moved = False
        self._replaced: dict[str, bytes] | None = None

    def __repr__(self) -> str:
        return f"<MemoryDraft {self._name} {sorted(self._files)}>"

    @contextmanager
    def create(self, file: str) -> Iterator[BinaryIO]:
        if file in self._files:
            raise FileExistsError(f"{self._store.location(self._name)}/{file}")
        self._fault(f"save.file.{file}.opened")
        stream = io.BytesIO()
        yield stream
        self._files[file] = stream.getvalue()
        self._fault(f"save.file.{file}.written")

    def publish(self) -> None:
        self._fault("save.rename.before")
        self._replaced = self._store.files.get(self._name)
        self._store.files[self._name] = self._files
        self._moved = True
        self._fault("save.rename.after")
        self._fault("save.published")

    def discard(self) -> None:
        if not self._moved:
            return
        if self._replaced is None:
            self._store.files.pop(self._name, None)
        else:
            self._store.files[self._name] = self._replaced
