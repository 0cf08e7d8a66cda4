"""A store in memory, on a disk that can be full; what is published outlives control."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from typing import BinaryIO


@dataclass
class Disk:
    full: bool = False

    def check(self) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")


class DiskFile(FileIO):
    """A file on it: where it is full, half of a line may still find room."""

    disk: Disk

    def write(self, data) -> int:
        if self.disk.full:
            if len(data) > 60:
                return super().write(data[: len(data) // 2])
            self.disk.check()
        return super().write(data)


class MemoryStore:
    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.directories: dict[str, dict[str, bytes]] = {}

    def names(self) -> list[str]:
        return list(self.directories)

    def location(self, name: str) -> str:
        return f"memory/{name}"

    @contextmanager
    def open(self, name: str, file: str) -> Iterator[BinaryIO]:
        try:
            yield io.BytesIO(self.directories[name][file])
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, "No such file", f"{name}/{file}") from None

    def begin(self, name: str) -> Draft:
        self.disk.check()
        return Draft(self, name)

    def delete(self, name: str) -> None:
        self.disk.check()
        del self.directories[name]


class Draft:
    def __init__(self, store: MemoryStore, name: str) -> None:
        self.store, self.name = store, name
        self.files: dict[str, bytes] = {}

    @contextmanager
    def create(self, file: str) -> Iterator[BinaryIO]:
        self.store.disk.check()
        stream = io.BytesIO()
        yield stream
        self.files[file] = stream.getvalue()

    def publish(self) -> None:
        self.store.disk.check()
        self.store.directories[self.name] = self.files

    def discard(self) -> None:
        self.files = {}
