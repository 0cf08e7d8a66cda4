"""How two checkpoints differ: tensors, optimizer, step and configuration, as JSON values for people and scripts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from control.checkpoint import as_json, number, read_snapshot
from control.config import RunConfig, flatten, identity
from control.schedules import follows_total
from control.snapshot import Snapshot
from spheres.config import manifest_from_proto
from spheres.errors import ConfigError
from spheres.numerics import BLOCK_ELEMENTS
from spheres.tensors import Manifest

__all__ = ["diff"]

Array = npt.NDArray[np.float32]


def diff(a: Path | str, b: Path | str) -> dict[str, Any]:
    """Compare two checkpoints, every byte of both checked first; both are held in memory. Raises CheckpointError.

    ``equal`` says whether a training goes on from both to the same bits: the same tensors and optimizer buffers to the
    bit, the same step and count of updates, the same configuration where it counts for that. What else differs is
    listed too: ``[a, b]`` for single values; ``tensors`` has those that differ, of weights and optimizer, with the
    count of elements whose bits differ, the largest difference, the norm of the difference over that of ``a``, and the
    largest distance in units in the last place.
    """
    left, right = read_snapshot(a), read_snapshot(b)
    values: dict[str, list[Any]] = {
        "step": [left.run.step, right.run.step],
        "optimizer_count": [left.run.optimizer_count, right.run.optimizer_count],
        "seed": [left.run.seed, right.run.seed],
    }
    told: dict[str, list[Any]] = {
        "run_id": [left.run.run_id, right.run.run_id],
        "term": [left.run.term, right.run.term],
        "task_fingerprint": [left.run.task_fingerprint, right.run.task_fingerprint],
        "data_fingerprint": [left.run.data_fingerprint, right.run.data_fingerprint],
    }
    tensors, only = _tensors(left, right)
    config, counts = _config(left, right)
    same = all(one == other for one, other in values.values())
    return {
        "a": str(a),
        "b": str(b),
        "equal": same and not tensors and not any(only.values()) and not counts,
        "values": {key: pair for key, pair in {**values, **told}.items() if pair[0] != pair[1]},
        "config": config,
        "tensors": tensors,
        **only,
    }


def _tensors(left: Snapshot, right: Snapshot) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    one, other = dict(_parts(left)), dict(_parts(right))
    found: list[dict[str, Any]] = []
    for name, (shape, flat) in one.items():
        if name not in other:
            continue
        other_shape, other_flat = other[name]
        if shape != other_shape:
            found.append({"name": name, "shapes": [list(shape), list(other_shape)]})
        elif (difference := _difference(flat, other_flat)) is not None:
            found.append({"name": name, "shape": list(shape), "elements": flat.size, **difference})
    return found, {
        "only_in_a": [name for name in one if name not in other],
        "only_in_b": [name for name in other if name not in one],
    }


def _parts(snapshot: Snapshot) -> Iterator[tuple[str, tuple[tuple[int, ...], Array]]]:
    """Yield name -> shape and elements of each tensor: ``layer0.bias``, ``optimizer/m/layer0.bias``."""
    layout: Manifest = manifest_from_proto(snapshot.run.manifest)
    for buffer, flat in snapshot.buffers.items():
        prefix = "" if buffer == "weights" else f"{buffer}/"
        if flat.size != layout.size:
            yield buffer, (flat.shape, flat)
            continue
        for spec in layout.tensors:
            yield f"{prefix}{spec.name}", (spec.shape, flat[spec.offset : spec.offset + spec.size])


def _difference(a: Array, b: Array) -> dict[str, Any] | None:
    """Return how two tensors of one size differ, None where they are equal to the bit."""
    count, largest, ulps, squares, reference = 0, 0.0, 0, 0.0, 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, a.size, BLOCK_ELEMENTS):
            one, other = a[start : start + BLOCK_ELEMENTS], b[start : start + BLOCK_ELEMENTS]
            wide = one.astype(np.float64)
            reference += float(np.add.reduce(wide * wide))
            differing = int(np.count_nonzero(one.view(np.uint32) != other.view(np.uint32)))
            if not differing:
                continue
            count += differing
            wide -= other
            # np.maximum, unlike max(), passes a NaN on
            largest = float(np.maximum(largest, np.max(np.abs(wide))))
            squares += float(np.add.reduce(wide * wide))
            ulps = max(ulps, int(np.max(np.abs(_ordered(one) - _ordered(other)))))
    if not count:
        return None
    relative = math.sqrt(squares / reference) if reference else math.inf if squares > 0 else squares
    return {
        "differing": count,
        "max_abs": number(largest),
        "relative_norm": number(relative),
        "max_ulp": ulps,
    }


def _ordered(flat: Array) -> npt.NDArray[np.int64]:
    """Return whole numbers in the order of the floats; neighbours are one apart, and both zeros are 0."""
    bits = flat.view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _config(left: Snapshot, right: Snapshot) -> tuple[dict[str, list[Any]], bool]:
    """Return key -> both values where they differ, and whether one of these counts for the bits."""
    (one, follows), (other, _) = (_flat(snapshot.run.config_json) for snapshot in (left, right))
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    counting = {*identity(RunConfig()), *(("steps", "epochs") if follows else ())}
    return {key: [one.get(key), other.get(key)] for key in keys}, not counting.isdisjoint(keys)


def _flat(text: str) -> tuple[Mapping[str, Any], bool]:
    """Return flat key -> value, and whether the rates follow the run's total."""
    try:
        config = RunConfig.from_json(text)
    except ConfigError:  # of another release
        found = as_json(text)
        return found if isinstance(found, dict) else {"config": found}, False
    return flatten(config), follows_total(config.schedule)
