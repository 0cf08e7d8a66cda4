"""A store behind any fsspec URL, such as s3://bucket/prefix: the extra ``fsspec`` of the package.

Made for object stores, which have no rename and no directories: one object is whole or absent, and nothing else is
promised. So every change of what is published is the creation or the removal of one object.
"""

from __future__ import annotations

import errno
import logging
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from control.store import Fault, LocalStore, Store, no_fault
from spheres.errors import ConfigError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

__all__ = ["FsspecStore", "is_url", "store_at"]

logger = logging.getLogger(__name__)

_PUBLISHED = ".published"
_GENERATION = re.compile(r"\d{6,}-[0-9a-f]{8}")
#: bytes read ahead and, by stores that upload in parts, sent at a time
_BLOCK_BYTES = 8 << 20


def is_url(location: str) -> bool:
    """Whether a text is a URL rather than a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", location) is not None


def store_at(location: str | Path, fault: Fault | None = None) -> Store:
    """Return the store at a path or a URL. Raises ConfigError where the URL's kind is not known here."""
    if isinstance(location, str) and is_url(location):
        return FsspecStore(location, fault)
    return LocalStore(Path(location), fault)


class FsspecStore:
    """Directories below a URL. Mutable state: what is stored there alone.

    A directory NAME is a *generation* of it: the objects ``NAME/GENERATION/FILE``, and the empty object
    ``NAME/GENERATION.published`` that is made last and makes them count. Generations are numbered; of several that are
    published, between the making of one and the removal of the one before, the highest counts. A generation that is
    not published belongs to a writer at work or to one that was killed; the next writer removes it. Whoever reads while
    it is replaced may find files gone, and reads again.

    Fault points: those of LocalStore, where the rename is the making of the published object.
    """

    def __init__(self, url: str, fault: Fault | None = None, *, options: dict[str, Any] | None = None) -> None:
        """Open the file system of a URL; nothing is read yet. ``options`` are its own, beside its environment.

        Raises ConfigError where fsspec or the package for that kind of URL is missing.
        """
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise ConfigError(f"{url} needs the extra fsspec: pip install 'armillary[fsspec]'") from None
        self._url = url.rstrip("/")
        try:
            self._fs, self._root = url_to_fs(self._url, **(options or {}))
        except (ImportError, ValueError) as error:
            raise ConfigError(f"cannot use {url}: {error}") from error
        self._root = self._root.rstrip("/")
        self._fault = fault or no_fault

    def __repr__(self) -> str:
        return f"<FsspecStore {self._url}>"

    def names(self) -> list[str]:
        with _os_errors(self._url):
            return [name for name in self._list("") if self._published(name)]

    def location(self, name: str) -> str:
        return f"{self._url}/{name}"

    @contextmanager
    def open(self, name: str, file: str) -> Iterator[BinaryIO]:
        where = f"{self.location(name)}/{file}"
        with _os_errors(where):
            generations = self._published(name)
            if not generations:
                raise FileNotFoundError(errno.ENOENT, "No such checkpoint", where)
            stream = self._fs.open(f"{self._root}/{name}/{generations[-1]}/{file}", "rb", block_size=_BLOCK_BYTES)
        with stream:
            yield cast(BinaryIO, _Stream(stream, where))

    def begin(self, name: str) -> FsspecDraft:
        self._fault("save.begin")
        with _os_errors(self.location(name)):
            self._clean()
            known = [int(generation.partition("-")[0]) for generation in self._generations(name)]
        # a number above all, and a word of its own: not even two writers by mistake write the same objects
        generation = f"{max(known, default=0) + 1:06d}-{secrets.token_hex(4)}"
        draft = FsspecDraft(self._fs, f"{self._root}/{name}", generation, self._fault)
        self._fault("save.draft.created")
        return draft

    def delete(self, name: str) -> None:
        self._fault("retention.before")
        path = f"{self._root}/{name}"
        with _os_errors(self.location(name)):
            generations = self._published(name)
            if not generations:
                raise FileNotFoundError(errno.ENOENT, "No such checkpoint", self.location(name))
            for generation in generations:  # the one that counts goes last, else an older one would come back
                self._fs.rm_file(f"{path}/{generation}{_PUBLISHED}")
        self._fault("retention.renamed")
        with _os_errors(self.location(name)), suppress(FileNotFoundError):
            self._fs.invalidate_cache()
            self._fs.rm(path, recursive=True)
        self._fault("retention.removed")

    def _list(self, name: str) -> list[str]:
        """Return the last parts of what lies below a name, the newest state of it."""
        path = f"{self._root}/{name}".rstrip("/")
        self._fs.invalidate_cache()
        try:
            return sorted({entry.rstrip("/").rpartition("/")[2] for entry in self._fs.ls(path, detail=False)})
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _generations(self, name: str) -> dict[str, bool]:
        """Return generation -> whether it is published, in the order of their numbers."""
        entries = self._list(name)
        generations = {entry.removesuffix(_PUBLISHED) for entry in entries}
        ordered = sorted(filter(_GENERATION.fullmatch, generations), key=lambda g: int(g.partition("-")[0]))
        return {generation: f"{generation}{_PUBLISHED}" in entries for generation in ordered}

    def _published(self, name: str) -> list[str]:
        """Return the published generations, the one that counts last."""
        return [generation for generation, published in self._generations(name).items() if published]

    def _clean(self) -> None:
        for name in self._list(""):
            generations = self._generations(name)
            counts = [generation for generation, published in generations.items() if published][-1:]
            for generation in generations:
                if generation not in counts:
                    try:
                        _remove_generation(self._fs, f"{self._root}/{name}", generation)
                    except OSError as error:
                        logger.warning("cannot remove what an earlier save left in %s: %s", self.location(name), error)


class FsspecDraft:
    """A generation that is being written. Mutable state: what is stored, and whether it was published."""

    def __init__(self, fs: AbstractFileSystem, path: str, generation: str, fault: Fault) -> None:
        self._fs = fs
        self._path = path
        self._generation = generation
        self._fault = fault
        self._files: list[str] = []

    def __repr__(self) -> str:
        return f"<FsspecDraft {self._path}/{self._generation}>"

    @contextmanager
    def create(self, file: str) -> Iterator[BinaryIO]:
        path = f"{self._path}/{self._generation}/{file}"
        if file in self._files:
            raise FileExistsError(errno.EEXIST, "File exists", path)
        self._files.append(file)
        with _os_errors(path):
            stream = self._open(path)
        try:
            self._fault(f"save.file.{file}.opened")
            yield cast(BinaryIO, _Stream(stream, path))
        except BaseException:
            with suppress(OSError), _os_errors(path):
                stream.close()  # some libraries make an object of what there is; it is not published
            raise
        with _os_errors(path):
            stream.close()
        self._fault(f"save.file.{file}.written")

    def _open(self, path: str) -> BinaryIO:
        try:
            return cast(BinaryIO, self._fs.open(path, "wb", block_size=_BLOCK_BYTES))
        except FileNotFoundError:  # where there are directories, they must be there
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            return cast(BinaryIO, self._fs.open(path, "wb", block_size=_BLOCK_BYTES))

    def publish(self) -> None:
        self._fault("save.rename.before")
        with _os_errors(self._path):
            self._fs.invalidate_cache()
            entries = [entry.rpartition("/")[2] for entry in self._fs.ls(self._path, detail=False)]
            before = sorted(entry.removesuffix(_PUBLISHED) for entry in entries if entry.endswith(_PUBLISHED))
            self._fs.pipe_file(self._marker, b"")
        self._fault("save.rename.after")
        self._fault("save.published")
        with suppress(OSError), _os_errors(self._path):  # else the next writer does it
            for generation in before:
                _remove_generation(self._fs, self._path, generation)

    def discard(self) -> None:
        with suppress(OSError), _os_errors(self._path):
            _remove_generation(self._fs, self._path, self._generation)

    @property
    def _marker(self) -> str:
        return f"{self._path}/{self._generation}{_PUBLISHED}"


class _Stream:
    """An open file whose errors are OSErrors; those of whoever uses it are left alone."""

    def __init__(self, stream: BinaryIO, where: str) -> None:
        self._stream = stream
        self._where = where

    def read(self, size: int = -1) -> bytes:
        with _os_errors(self._where):
            return self._stream.read(size)

    def write(self, data: bytes) -> int:
        with _os_errors(self._where):
            return self._stream.write(data)


def _remove_generation(fs: AbstractFileSystem, path: str, generation: str) -> None:
    """Remove what makes it count first, so that it is gone as a whole at once."""
    with _os_errors(path):
        for part in (f"{path}/{generation}{_PUBLISHED}", f"{path}/{generation}"):
            fs.invalidate_cache()
            with suppress(FileNotFoundError):
                fs.rm(part, recursive=True)


@contextmanager
def _os_errors(where: str) -> Iterator[None]:
    """Make whatever a file system's library raises an OSError: callers know no other."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}", where) from error
