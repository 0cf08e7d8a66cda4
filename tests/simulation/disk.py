"""A disk that can be full: for the journal's files, and at the fault points of the store."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from io import FileIO


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
