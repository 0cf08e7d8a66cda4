"""Weights as a safetensors file: written at the end of a run, read by ``--init-from``."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from control.store import atomic_file
from spheres.errors import ConfigError
from spheres.tensors import Manifest

__all__ = ["read_safetensors", "write_safetensors"]

Array = npt.NDArray[np.float32]


def write_safetensors(path: Path, manifest: Manifest, flat: Array, metadata: Mapping[str, str]) -> None:
    """Write all tensors, whole or not at all. Raises ConfigError where the file cannot be written."""
    # Encoded here: the library's file is readable by its owner alone, and a kill leaves one of a random name behind.
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for spec in manifest.tensors:
        header[spec.name] = {"dtype": "F32", "shape": spec.shape, "data_offsets": [at, at + 4 * spec.size]}
        at += 4 * spec.size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    try:
        with atomic_file(path) as file:
            file.write(struct.pack("<Q", len(head)) + head)
            for spec in manifest.tensors:
                file.write(np.ascontiguousarray(flat[spec.offset : spec.offset + spec.size], "<f4").data)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def read_safetensors(path: Path) -> dict[str, Array]:
    """Return name -> float32 array. Raises ConfigError for a file that is missing, broken or of another dtype."""
    arrays: dict[str, Array] = {}
    try:
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if (dtype := file.get_slice(name).get_dtype()) != "F32":
                    raise ConfigError(f"{path}: tensor {name!r} is {dtype}; float32 is needed")
                arrays[name] = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read weights from {path}: {error}") from error
    return arrays
