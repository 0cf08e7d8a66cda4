"""The checkpoints of a run: saving with retention, listing, restoring the newest good one, checking, looking inside.

What stands in the files is in ``control.snapshot``; how they become durable and visible is in ``control.store``.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from control.snapshot import (
    NewerFormatError,
    Problem,
    Snapshot,
    find_problems,
    read_files,
    read_manifest,
    read_term,
    write_files,
)
from control.store import Fault, LocalStore, Store, no_fault
from control.store_fsspec import is_url, store_at
from control.weights_file import write_safetensors
from spheres.config import manifest_from_proto
from spheres.errors import CheckpointError, ConfigError
from spheres.numerics import global_norm, statistics
from spheres.v1.checkpoint_pb2 import CheckpointManifest

__all__ = [
    "CheckpointInfo",
    "Checkpoints",
    "as_json",
    "export",
    "inspect",
    "number",
    "read_snapshot",
    "verify",
]

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-\d{9,}")


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint as its manifest describes it."""

    name: str
    path: str
    step: int
    #: in which it was saved; one that was saved again after a restore belongs to the later (N1)
    term: int
    size_bytes: int
    create_time: datetime
    weights_sha256: str
    metrics: Mapping[str, float]
    #: no evaluation up to its step was better
    best: bool
    finite: bool


class Checkpoints:
    """The checkpoints of one run, in a directory or another store. Mutable state: the store alone.

    One ``save`` at a time, from any thread; ``list`` and ``load`` may run beside it. ``fault`` is called at the named
    points of the store, and at ``save.file.FILE.piece``, ``save.manifest.before`` and ``retention.done``.
    """

    def __init__(
        self, directory: Path | Store, *, keep: int, keep_every: int | None = None, fault: Fault | None = None
    ) -> None:
        if keep < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(f"keep={keep}, keep_every={keep_every}: both count from 1")
        self._store = LocalStore(directory, fault) if isinstance(directory, Path) else directory
        self._keep = keep
        self._keep_every = keep_every
        self._fault = fault or no_fault

    def __repr__(self) -> str:
        return f"<Checkpoints {self._store!r} keep={self._keep} keep_every={self._keep_every}>"

    def save(self, snapshot: Snapshot) -> CheckpointInfo:
        """Save durably, then apply retention. Raises CheckpointError, with nothing half-saved and none older gone.

        A checkpoint of the same step is replaced by the new one when that is whole.
        """
        name = f"step-{snapshot.run.step:09d}"
        try:
            draft = self._store.begin(name)
            try:
                manifest, size = write_files(draft, snapshot, self._fault)
                draft.publish()
            except BaseException:
                draft.discard()
                raise
        except OSError as error:
            raise CheckpointError(
                f"cannot save checkpoint {self._store.location(name)}: {error.strerror or error}; older ones stand"
            ) from error
        info = self._info(name, manifest, size, snapshot.run.term)
        try:
            self._retain(info)
        except (OSError, CheckpointError) as error:
            logger.warning("cannot remove an old checkpoint of %r: %s", self._store, error)
        return info

    def list(self) -> list[CheckpointInfo]:
        """Return what can be told from manifest and first record, the newest first. Other bytes are not looked at.

        Newest is by term, then by step: after a restore to an earlier step, with another total perhaps, those saved
        since go before the higher steps that were left behind.
        """
        return [info for _, info in self._entries() if info is not None]

    def none_saved(self) -> bool:
        """Whether there is not one, good or bad. Raises CheckpointError where that cannot be told."""
        return not self._names()

    def load(self, name: str | Path | None = None, passed_over: Callable[[str], object] = lambda _: None) -> Snapshot:
        """Return a snapshot, every byte of it checked. Raises CheckpointError.

        None is the newest that verifies and is finite; each one passed over is logged as a warning, and told to
        ``passed_over``. One of a newer format is not passed over: it is good, and going back behind it would be a
        loss. A string is the name of a checkpoint of this run; a path or URL may lead anywhere.
        """
        if isinstance(name, Path) or (name is not None and is_url(name)):
            return read_snapshot(name)
        if name is not None:
            if name not in self._names():
                raise CheckpointError(f"no checkpoint {name!r} in {self._store.location('')}; {self._available()}")
            return read_files(self._store, name)
        for candidate, _ in self._entries():
            try:
                snapshot = read_files(self._store, candidate)
            except NewerFormatError:
                raise
            except CheckpointError as error:
                problem = str(error)
            else:
                if snapshot.finite:
                    return snapshot
                problem = f"checkpoint {candidate} holds weights that are not finite"
            logger.warning("passed over: %s", problem)
            passed_over(problem)
        raise CheckpointError(f"no good checkpoint in {self._store.location('')}; {self._available()}")

    def _entries(self) -> Sequence[tuple[str, CheckpointInfo | None]]:
        """Return all names, the newest first; with None where it cannot be told what is there."""
        entries: list[tuple[str, CheckpointInfo | None]] = []
        for name in self._names():
            try:
                info = self._info(name, *read_manifest(self._store, name), read_term(self._store, name))
            except CheckpointError as error:
                logger.debug("not listed: %s", error)
                entries.append((name, None))
            else:
                entries.append((name, info))
        # what is broken counts as of the latest term: nobody is to wonder why it was not taken
        latest = max((info.term for _, info in entries if info is not None), default=0)
        return sorted(entries, key=lambda entry: latest if entry[1] is None else entry[1].term, reverse=True)

    def _names(self) -> Sequence[str]:
        try:
            names = [name for name in self._store.names() if _NAME.fullmatch(name)]
        except OSError as error:
            raise CheckpointError(
                f"cannot list checkpoints in {self._store.location('')}: {error.strerror or error}"
            ) from error
        return sorted(names, key=lambda name: int(name.removeprefix("step-")), reverse=True)

    def _available(self) -> str:
        names = [info.name for info in self.list()]
        return f"there are {', '.join(names)}" if names else "start without --resume, or name another run's"

    def _info(self, name: str, manifest: CheckpointManifest, size: int, term: int) -> CheckpointInfo:
        return CheckpointInfo(
            name=name,
            path=self._store.location(name),
            step=manifest.step,
            term=term,
            size_bytes=size,
            create_time=manifest.create_time.ToDatetime(UTC),
            weights_sha256=manifest.weights_sha256,
            metrics=dict(manifest.metrics),
            best=manifest.best,
            finite=manifest.finite,
        )

    def _retain(self, saved: CheckpointInfo) -> None:
        infos = self.list()
        kept = {saved.name, *(info.name for info in infos[: self._keep])}
        kept |= {info.name for info in infos if self._keep_every and info.step % self._keep_every == 0}
        # each was the best of all before it, so the last of them is the best
        kept |= {info.name for info in [info for info in infos if info.best and info.finite][:1]}
        doomed = [info for info in infos if info.name not in kept]
        if doomed and not any(self._is_good(info) for info in infos if info.name in kept):
            spared = next((info for info in doomed if self._is_good(info)), None)
            doomed = [info for info in doomed if info is not spared]
        for info in reversed(doomed):
            self._store.delete(info.name)
        self._fault("retention.done")

    def _is_good(self, info: CheckpointInfo) -> bool:
        return info.finite and not find_problems(self._store, info.name)


def verify(path: Path | str) -> list[Problem]:
    """Return the first problem of each file of a checkpoint, none for a good one. Changes nothing."""
    return find_problems(*_at(path))


def read_snapshot(path: Path | str) -> Snapshot:
    """Return the snapshot in a checkpoint directory, everything checked. Raises CheckpointError.

    Of a URL that is not a checkpoint's but a run's, the newest good one.
    """
    store, name = _at(path)
    if isinstance(path, str) and is_url(path) and not _NAME.fullmatch(name):
        return Checkpoints(store_at(path), keep=1).load()
    return read_files(store, name)


def inspect(path: Path | str) -> dict[str, Any]:
    """Return what is in a checkpoint as JSON values, for people and scripts. Raises CheckpointError."""
    store, name = _at(path)
    manifest, size = read_manifest(store, name)
    snapshot = read_files(store, name)
    run = snapshot.run
    layout = manifest_from_proto(run.manifest)
    of_tensors = statistics(layout, snapshot.buffers["weights"])
    optimizer = {
        buffer.removeprefix("optimizer/"): {
            "elements": flat.size,
            "norm": number(global_norm(layout, flat)) if flat.size == layout.size else None,
        }
        for buffer, flat in snapshot.buffers.items()
        if buffer != "weights"
    }
    return {
        "path": store.location(name),
        "format_version": manifest.format_version,
        "create_time": manifest.create_time.ToDatetime(UTC).isoformat(),
        "size_bytes": size,
        "run_id": run.run_id,
        "term": run.term,
        "step": run.step,
        "epoch": run.epoch,
        "samples": run.samples_count,
        "seed": run.seed,
        "wall_seconds": number(run.wall_seconds),
        "weights_version": run.weights_version,
        "weights_digest": run.weights_digest.hex(),
        "weights_sha256": run.weights_sha256,
        "finite": snapshot.finite,
        "best": snapshot.best,
        "metrics": {key: number(value) for key, value in sorted(run.metrics.items())},
        "best_value": number(run.best_value) if run.HasField("best_value") else None,
        "best_step": run.best_step,
        "parameters": layout.parameters,
        "tensors": [
            {
                "name": spec.name,
                "shape": list(spec.shape),
                "dtype": spec.dtype,
                "norm": number(of_tensors[spec.name].norm),
                "minimum": number(of_tensors[spec.name].minimum),
                "maximum": number(of_tensors[spec.name].maximum),
            }
            for spec in layout.tensors
        ],
        "optimizer": {"count": run.optimizer_count, "buffers": optimizer},
        "spheres": [
            {"sphere_id": record.report.sphere_id, "host": record.report.host, "role": record.report.role}
            for record in snapshot.spheres
        ],
        "tree": dict(sorted(snapshot.tree.items())),
        "callbacks": sorted(run.callback_states),
        "config": as_json(run.config_json),
        "files": [
            {"name": file.name, "size_bytes": file.size_bytes, "records": file.records_count} for file in manifest.files
        ],
    }


def export(path: Path | str, file: Path, *, force: bool = False) -> dict[str, Any]:
    """Write a checkpoint's weights as a safetensors file, whole or not at all; return what was written.

    Raises CheckpointError, and ConfigError where the file exists and not ``force``, or cannot be written.
    """
    if file.exists() and not force:
        raise ConfigError(f"{file} exists already; give --force to overwrite it")
    snapshot = read_snapshot(path)
    run = snapshot.run
    layout = manifest_from_proto(run.manifest)
    about = {"step": str(run.step), "weights_sha256": run.weights_sha256, "run_id": run.run_id}
    write_safetensors(file, layout, snapshot.buffers["weights"], about)
    return {
        "path": str(file),
        "step": run.step,
        "tensors": len(layout.tensors),
        "parameters": layout.parameters,
        "weights_sha256": run.weights_sha256,
    }


def _at(path: Path | str) -> tuple[Store, str]:
    if isinstance(path, str) and is_url(path):
        parent, _, name = path.rstrip("/").rpartition("/")
        return store_at(parent), name
    path = Path(path).resolve()
    return LocalStore(path.parent), path.name


def number(value: float) -> float | str:
    """Return a number as JSON can have it."""
    # JSON has no NaN and no infinity; as text they are what protobuf's own JSON has
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def as_json(text: str) -> Any:
    """Return what a JSON text says, None for an empty one, or the text itself where it is no JSON."""
    try:
        return json.loads(text) if text else None
    except ValueError:
        return text
