"""Weights as a safetensors file: written at the end of a run, read by ``--init-from``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from spheres.errors import ConfigError
from spheres.tensors import Manifest

__all__ = ["read_safetensors", "write_safetensors"]

Array = npt.NDArray[np.float32]


def write_safetensors(path: Path, manifest: Manifest, flat: Array, metadata: Mapping[str, str]) -> None:
    """Write all tensors, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: np.ascontiguousarray(v) for name, v in manifest.views(flat).items()}, temporary, dict(metadata))
    temporary.replace(path)


def read_safetensors(path: Path) -> dict[str, Array]:
    """Return name -> float32 array. Raises ConfigError for a file that is missing, broken or of another dtype."""
    try:
        arrays = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read weights from {path}: {error}") from error
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise ConfigError(f"{path}: tensor {name!r} is {array.dtype}; float32 is needed")
    return arrays
