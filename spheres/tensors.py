"""The manifest of a model and its flat, aligned buffer; how chunks lie on it.

It does not know about versions, digests of contents, or the wire.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from spheres.errors import TaskError
from spheres.words import is_encodable

__all__ = ["ALIGNMENT", "Manifest", "TensorSpec", "aligned_zeros"]

Array = npt.NDArray[np.float32]

#: bytes; offsets and base addresses are multiples of it (DESIGN section 6)
ALIGNMENT = 64
_ELEMENTS = ALIGNMENT // 4


def aligned_zeros(size: int) -> Array:
    """Return ``size`` float32 zeros that start at a 64-byte address, each page touched."""
    raw = np.empty(size * 4 + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    flat = raw[start : start + size * 4].view(np.float32)
    flat.fill(0)
    return flat


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor: ``offset`` and ``size`` count float32 elements of the flat buffer."""

    name: str
    shape: tuple[int, ...]
    offset: int
    dtype: str = "float32"

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Manifest:
    """The layout of a model: tensors back to back in order, each at a 64-byte aligned offset."""

    tensors: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, arrays: Mapping[str, npt.NDArray[np.float32]]) -> Manifest:
        """Lay out ``arrays`` in their order.

        Raises TaskError for no tensors, a dtype that is not float32, or a name that is no text.
        """
        if not isinstance(arrays, Mapping) or not arrays:
            what = "no tensors" if isinstance(arrays, Mapping) else type(arrays).__name__
            raise TaskError(f"init_weights returned {what}; return name -> float32 array")
        specs: list[TensorSpec] = []
        offset = 0
        for name, array in arrays.items():
            if not isinstance(name, str) or not is_encodable(name):
                raise TaskError(f"weights are named {name!r}: name each with a str that is UTF-8")
            if not isinstance(array, np.ndarray) or array.dtype != np.float32:
                kind = getattr(array, "dtype", type(array).__name__)
                raise TaskError(f"weights {name!r} are {kind}; return float32 arrays")
            specs.append(TensorSpec(name, tuple(array.shape), offset))
            offset += -(-array.size // _ELEMENTS) * _ELEMENTS
        return cls(tuple(specs))

    @cached_property
    def size(self) -> int:
        """Elements of the flat buffer, padding included."""
        last = self.tensors[-1]
        return last.offset + -(-last.size // _ELEMENTS) * _ELEMENTS

    @cached_property
    def parameters(self) -> int:
        """Elements of all tensors, without padding."""
        return sum(spec.size for spec in self.tensors)

    @cached_property
    def digest(self) -> bytes:
        """16 bytes over names, shapes, dtypes and offsets."""
        text = json.dumps([[s.name, list(s.shape), s.offset, s.dtype] for s in self.tensors], separators=(",", ":"))
        return hashlib.sha256(text.encode()).digest()[:16]

    def views(self, flat: Array, *, writeable: bool = True) -> dict[str, Array]:
        """Return name -> view of ``flat`` in the tensor's shape."""
        views: dict[str, Array] = {}
        for spec in self.tensors:
            view = flat[spec.offset : spec.offset + spec.size].reshape(spec.shape)
            view.flags.writeable = writeable
            views[spec.name] = view
        return views

    def pack(self, arrays: Mapping[str, npt.NDArray[np.float32]]) -> Array:
        """Return a new flat buffer with ``arrays`` copied in. Raises TaskError where names, shapes or dtypes differ."""
        if list(arrays) != [s.name for s in self.tensors]:
            raise TaskError(f"tensors {list(arrays)} are not the manifest's {[s.name for s in self.tensors]}")
        flat = aligned_zeros(self.size)
        for spec in self.tensors:
            array = arrays[spec.name]
            if tuple(array.shape) != spec.shape or array.dtype != np.float32:
                raise TaskError(
                    f"{spec.name!r} is {array.dtype}{tuple(array.shape)}, the manifest has float32{spec.shape}"
                )
            flat[spec.offset : spec.offset + spec.size] = array.reshape(-1)
        return flat

    def chunk_count(self, chunk_elements: int) -> int:
        """Number of chunks of the flat buffer; the last may be short (N2)."""
        return -(-self.size // chunk_elements)

    def sha256(self, flat: Array) -> str:
        """SHA-256 over all tensors back to back in manifest order, little-endian, without padding."""
        digest = hashlib.sha256()
        for spec in self.tensors:
            part = flat[spec.offset : spec.offset + spec.size]
            digest.update(np.ascontiguousarray(part, dtype="<f4").data.cast("B"))
        return digest.hexdigest()
