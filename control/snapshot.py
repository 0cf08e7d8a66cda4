"""A snapshot of a run as the files of a checkpoint, and back: which records stand in which order, every check.

Which checkpoints there are, and which are kept, is in ``control.checkpoint``.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from control.records import CHUNK_BYTES, RecordError, RecordReader, RecordWriter, body
from control.store import Draft, Fault, Store
from spheres.config import manifest_from_proto
from spheres.errors import ArmillaryError, CheckpointError
from spheres.numerics import crc32c
from spheres.tensors import Manifest, aligned_zeros
from spheres.v1.checkpoint_pb2 import (
    BufferHeader,
    CheckpointFile,
    CheckpointManifest,
    CheckpointRecord,
    RunRecord,
    SphereRecord,
)

__all__ = [
    "FORMAT_VERSION",
    "BrokenError",
    "NewerFormatError",
    "Problem",
    "Snapshot",
    "find_problems",
    "read_files",
    "read_manifest",
    "read_term",
    "write_files",
]

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.float32]
Records = Iterator[tuple[int, CheckpointRecord]]

#: raised when a reader of today could not read the files
FORMAT_VERSION = 1
_CONTROL, _SPHERES, _MANIFEST = "control.pb", "spheres.pb", "manifest.pb"
_WEIGHTS = "weights"


@dataclass(frozen=True)
class Snapshot:
    """All that a run needs to go on. Saving only reads it; whoever trains on while it is saved hands in a copy."""

    run: RunRecord
    #: flat buffers: "weights", and "optimizer/NAME" for each of the optimizer's
    buffers: Mapping[str, Array]
    spheres: Sequence[SphereRecord] = ()
    #: sphere id -> parent id
    tree: Mapping[str, str] = field(default_factory=dict)
    #: whether all weights are finite
    finite: bool = True
    #: whether no evaluation so far was better
    best: bool = False


@dataclass(frozen=True)
class Problem:
    """What is wrong with one file of a checkpoint; ``record`` counts from 0, None where it is the file as a whole."""

    file: str
    record: int | None
    what: str

    def __str__(self) -> str:
        return f"{self.file} {self.what}" if self.record is None else f"{self.file} record {self.record} {self.what}"


class BrokenError(CheckpointError):
    """A checkpoint that cannot be used; ``problem`` is the first that was found."""

    def __init__(self, location: str, problem: Problem, hint: str) -> None:
        super().__init__(f"checkpoint {location}: {problem}; {hint}")
        self.problem = problem


class NewerFormatError(BrokenError):
    """A checkpoint that a newer release of the project saved. It is good, but not for this one."""


def write_files(draft: Draft, snapshot: Snapshot, fault: Fault) -> tuple[CheckpointManifest, int]:
    """Write all files of a snapshot, the manifest last; return the manifest and the bytes in all."""
    run = snapshot.run
    if _WEIGHTS not in snapshot.buffers:
        raise CheckpointError(f"a snapshot without weights; it has {sorted(snapshot.buffers) or 'no buffers'}")
    if not run.weights_sha256:
        sha256 = manifest_from_proto(run.manifest).sha256(snapshot.buffers[_WEIGHTS])
        # the caller's record stays as it is
        changed = RunRecord()
        changed.CopyFrom(run)
        changed.weights_sha256 = sha256
        run = changed

    def control(records: RecordWriter) -> None:
        records.write("run", run.SerializeToString())
        for name, flat in snapshot.buffers.items():
            _write_buffer(records, name, flat, lambda: fault(f"save.file.{_CONTROL}.piece"))

    def spheres(records: RecordWriter) -> None:
        for sphere in snapshot.spheres:
            records.write("sphere", sphere.SerializeToString())
            fault(f"save.file.{_SPHERES}.piece")

    manifest = CheckpointManifest(
        format_version=FORMAT_VERSION,
        files=[_write_file(draft, _CONTROL, control), _write_file(draft, _SPHERES, spheres)],
        run_id=run.run_id,
        step=run.step,
        weights_version=run.weights_version,
        weights_digest=run.weights_digest,
        weights_sha256=run.weights_sha256,
        tree=snapshot.tree,
        finite=snapshot.finite,
        best=snapshot.best,
        metrics=run.metrics,
    )
    manifest.create_time.FromDatetime(datetime.now(UTC))
    fault("save.manifest.before")
    data = manifest.SerializeToString()
    with draft.create(_MANIFEST) as stream:
        stream.write(data + struct.pack("<I", crc32c(data)))
    return manifest, sum(file.size_bytes for file in manifest.files) + len(data) + 4


def read_manifest(store: Store, name: str) -> tuple[CheckpointManifest, int]:
    """Return the manifest of a checkpoint and the bytes of all its files. Raises BrokenError."""
    with _broken_at(store, name, _MANIFEST), store.open(name, _MANIFEST) as stream:
        data = stream.read()
        if len(data) < 4 or crc32c(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
            raise _WrongError("does not fit its checksum")
        manifest = CheckpointManifest.FromString(data[:-4])
    if manifest.format_version > FORMAT_VERSION:
        what = f"has format version {manifest.format_version}, this release reads {FORMAT_VERSION}"
        hint = "use the release that saved it, or a newer one"
        raise NewerFormatError(store.location(name), Problem(_MANIFEST, None, what), hint)
    with _broken_at(store, name, _MANIFEST):
        if manifest.format_version < 1:
            raise _WrongError("has no format version")
        for needed in (_CONTROL, _SPHERES):
            if needed not in {file.name for file in manifest.files}:
                raise _WrongError(f"does not list {needed}")
    return manifest, sum(file.size_bytes for file in manifest.files) + len(data)


def read_term(store: Store, name: str) -> int:
    """Return the term in which a checkpoint was saved; the first record alone is read. Raises BrokenError."""
    run = RunRecord()
    with _broken_at(store, name, _CONTROL), store.open(name, _CONTROL) as stream:
        _, record = _next(enumerate(RecordReader(stream)), "the run")
        run = RunRecord.FromString(body(record, "run", 0))
    return run.term


def read_files(store: Store, name: str) -> Snapshot:
    """Return the snapshot, everything checked. Raises BrokenError for the first problem."""
    manifest, _ = read_manifest(store, name)
    buffers: dict[str, Array] = {}
    run = _read_control(store, name, manifest, buffers)
    spheres = _read_spheres(store, name, manifest)
    return Snapshot(run, buffers, spheres, dict(manifest.tree), manifest.finite, manifest.best)


def find_problems(store: Store, name: str) -> list[Problem]:
    """Return the first problem of every file; none means that the checkpoint restores. Holds one record at a time."""
    try:
        manifest, _ = read_manifest(store, name)
    except BrokenError as error:
        return [error.problem]
    problems: list[Problem] = []
    for read in (lambda: _read_control(store, name, manifest, None), lambda: _read_spheres(store, name, manifest)):
        try:
            read()
        except BrokenError as error:
            problems.append(error.problem)
    return problems


# --- writing


def _write_file(draft: Draft, name: str, write: Callable[[RecordWriter], None]) -> CheckpointFile:
    with draft.create(name) as stream:
        records = RecordWriter(stream)
        write(records)
    return CheckpointFile(name=name, size_bytes=records.size, crc32c=records.checksum, records_count=records.count)


def _write_buffer(records: RecordWriter, name: str, flat: Array, after_piece: Callable[[], None]) -> None:
    data = np.ascontiguousarray(flat, "<f4").data.cast("B")  # no copy where the machine is little-endian
    pieces = [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]
    # the header comes first and holds a checksum over all chunks, so they are read twice: 25 GB/s, once in the cache
    checksums = [crc32c(piece) for piece in pieces]
    header = BufferHeader(name=name, size_bytes=len(data), crc32c=_combined(checksums))
    records.write("buffer_header", header.SerializeToString())
    for piece, checksum in zip(pieces, checksums, strict=True):
        records.write("buffer_chunk", piece, checksum)
        after_piece()


def _combined(checksums: list[int]) -> int:
    return crc32c(struct.pack(f"<{len(checksums)}I", *checksums))


# --- reading


class _WrongError(Exception):
    """What is wrong with the file at hand, or with ``record`` of it."""

    def __init__(self, what: str, record: int | None = None) -> None:
        super().__init__(what)
        self.record = record


@contextmanager
def _broken_at(store: Store, name: str, file: str) -> Iterator[None]:
    """Turn whatever can be wrong with one file into a BrokenError that names it."""
    hint = "restore another checkpoint; --resume without a path takes the newest good one"
    record: int | None = None
    try:
        yield
    except BrokenError:
        raise
    except FileNotFoundError:
        what = "is missing"
        if file == _MANIFEST:
            what, hint = "is missing: no checkpoint is here, or its save was cut off", "name a step-... directory"
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
    except RecordError as error:
        what, record = error.what, error.record
    except _WrongError as error:
        what, record = str(error), error.record
    except (DecodeError, ArmillaryError, UnicodeDecodeError) as error:
        what = f"cannot be understood: {error}"
    else:
        return
    raise BrokenError(store.location(name), Problem(file, record, what), hint)


@contextmanager
def _records(store: Store, name: str, manifest: CheckpointManifest, file: str) -> Iterator[Records]:
    """Open a file's records; at the end the file is compared with what the manifest says of it."""
    listed = next(entry for entry in manifest.files if entry.name == file)
    with _broken_at(store, name, file), store.open(name, file) as stream:
        reader = RecordReader(stream)
        records = enumerate(reader)
        yield records
        for index, _ in records:
            raise _WrongError("is one too many", index)
        if reader.size != listed.size_bytes:
            raise _WrongError(f"has {reader.size} bytes, the manifest says {listed.size_bytes}")
        if reader.checksum != listed.crc32c:
            raise _WrongError("does not fit its checksum in the manifest")
        if reader.count != listed.records_count:
            raise _WrongError(f"has {reader.count} records, the manifest says {listed.records_count}")


def _read_spheres(store: Store, name: str, manifest: CheckpointManifest) -> list[SphereRecord]:
    with _records(store, name, manifest, _SPHERES) as records:
        return [SphereRecord.FromString(body(record, "sphere", index)) for index, record in records]
    raise AssertionError("unreachable: _broken_at always raises")  # for mypy: a context manager may swallow


def _read_control(store: Store, name: str, manifest: CheckpointManifest, buffers: dict[str, Array] | None) -> RunRecord:
    """Read control's file through. ``buffers`` None: check only, and keep one record in memory at a time."""
    run = RunRecord()
    with _records(store, name, manifest, _CONTROL) as records:
        index, record = _next(records, "the run")
        run = RunRecord.FromString(body(record, "run", index))
        layout = manifest_from_proto(run.manifest)
        sha256 = _Sha256(layout)
        seen: set[str] = set()
        for index, record in records:
            header = BufferHeader.FromString(body(record, "buffer_header", index))
            is_weights = header.name == _WEIGHTS
            if header.name in seen:
                raise _WrongError(f"holds buffer {header.name!r} a second time", index)
            if header.size_bytes % 4 or (is_weights and header.size_bytes != layout.size * 4):
                raise _WrongError(f"announces {header.size_bytes} bytes of {header.name!r}, which do not fit", index)
            seen.add(header.name)
            flat = None if buffers is None else aligned_zeros(header.size_bytes // 4)
            for at, data in _buffer(records, header):
                if is_weights:
                    sha256.update(data)
                if flat is not None:
                    flat.view(np.uint8)[at : at + len(data)] = np.frombuffer(data, np.uint8)
            if flat is not None and buffers is not None:
                buffers[header.name] = flat.view("<f4").astype(np.float32, copy=False)
        if _WEIGHTS not in seen:
            raise _WrongError("holds no weights")
        if not sha256.hexdigest() == run.weights_sha256 == manifest.weights_sha256:
            # every byte is as it was written: the weights had changed before
            raise _WrongError("holds weights that do not fit their SHA-256; they changed while they were saved")
    return run


def _buffer(records: Records, header: BufferHeader) -> Iterator[tuple[int, bytes]]:
    """Yield offset and bytes of the chunks that follow a buffer's header."""
    at = 0
    checksums: list[int] = []
    while at < header.size_bytes:
        index, record = _next(records, f"the rest of {header.name!r}")
        data = body(record, "buffer_chunk", index)
        if not 0 < len(data) <= min(CHUNK_BYTES, header.size_bytes - at):
            raise _WrongError(f"holds {len(data)} bytes of {header.name!r}, which do not fit", index)
        checksums.append(record.crc32c)
        yield at, data
        at += len(data)
    if _combined(checksums) != header.crc32c:
        raise _WrongError(f"holds buffer {header.name!r}, which does not fit its checksum")


def _next(records: Records, what: str) -> tuple[int, CheckpointRecord]:
    try:
        return next(records)
    except StopIteration:
        raise _WrongError(f"ends before {what}") from None


class _Sha256:
    """``Manifest.sha256`` of a flat buffer that comes in pieces. Mutable state: the position and the digest."""

    def __init__(self, layout: Manifest) -> None:
        self._spans = [(spec.offset * 4, (spec.offset + spec.size) * 4) for spec in layout.tensors]
        self._span = 0
        self._at = 0
        self._digest = hashlib.sha256()

    def update(self, data: bytes) -> None:
        start, end = self._at, self._at + len(data)
        view = memoryview(data)
        while self._span < len(self._spans) and (lo := self._spans[self._span][0]) < end:
            hi = self._spans[self._span][1]
            self._digest.update(view[max(lo - start, 0) : max(min(hi, end) - start, 0)])
            if hi > end:
                break
            self._span += 1
        self._at = end

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
