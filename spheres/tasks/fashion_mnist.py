"""Fashion-MNIST and a perceptron with two hidden layers; the data stays as bytes and is converted per microbatch.

It reads idx files, plain or gzipped, from a folder. It downloads nothing.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt

from spheres.errors import DataMissingError
from spheres.task import Sums
from spheres.tasks.mlp import Mlp
from spheres.tasks.options import widths

__all__ = ["FashionMnist"]

Array = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Samples = npt.NDArray[np.int64]

DEFAULT_FOLDER = "/usr/share/datasets/fashion-mnist"
_SIDE, _CLASSES = 28, 10
_STEMS = {"train": "train", "test": "t10k"}
#: what a file that is cut, damaged or not ours to read raises
_UNREADABLE = (OSError, EOFError, zlib.error)


class FashionMnist:
    """28x28 pictures of clothes in 10 classes: 60,000 to train on and 10,000 to test in the original files.

    ``data`` is the folder; without it ``ARMILLARY_DATA`` or its subfolder ``fashion-mnist``, else where Debian's
    package puts the files. Images are read when a split is first used, so a node that computes nothing has none.
    """

    #: every element of a gradient is written, so nobody needs to zero it before
    overwrites_out = True

    def __init__(self, data: str | None = None, hidden: int | str | tuple[int, ...] = (256, 128)) -> None:
        self._model = Mlp((_SIDE * _SIDE, *widths("hidden", hidden), _CLASSES), input_scale=1 / 255)
        folder = _find_folder(data)
        self._paths = {split: _find(folder, f"{stem}-images-idx3-ubyte") for split, stem in _STEMS.items()}
        self._labels: dict[str, Bytes] = {}
        for split, stem in _STEMS.items():
            path = _find(folder, f"{stem}-labels-idx1-ubyte")
            labels = self._labels[split] = _read(path, 1)
            images = _shape(self._paths[split], 3)
            if images != (len(labels), _SIDE, _SIDE):
                raise DataMissingError(f"{self._paths[split]} holds {images}, {path} {len(labels)} labels: not one set")
            if labels.size and labels.max() >= _CLASSES:
                raise DataMissingError(f"{path} has a label above {_CLASSES - 1}: not the labels of Fashion-MNIST")
        # mutable state: the images of a split, once it is used
        self._images: dict[str, Bytes] = {}

    def init_weights(self, rng: np.random.Generator) -> dict[str, Array]:
        return self._model.init(rng)

    def size(self, split: str) -> int:
        return len(self._labels.get(split, ()))

    def gradient(
        self, weights: Mapping[str, Array], samples: Samples, rng: np.random.Generator, out: Mapping[str, Array]
    ) -> Sums:
        x, y = self._gather("train", samples)
        return self._model.gradient(weights, x, y, out)

    def evaluate(self, weights: Mapping[str, Array], samples: Samples) -> Sums:
        x, y = self._gather("test", samples)
        return self._model.evaluate(weights, x, y)

    def data_fingerprint(self) -> str:
        """Return the sizes and the SHA-256 of the labels.

        Every sphere computes it at start, so it leaves out the images (47 MB to unpack and hash): sixty thousand
        labels in order tell apart other data, another order and a cut file; a changed pixel they do not.
        """
        digest = hashlib.sha256()
        for split, labels in self._labels.items():
            digest.update(f"{split} {len(labels)} ".encode() + labels.tobytes())
        return digest.hexdigest()

    def _gather(self, split: str, samples: Samples) -> tuple[Bytes, npt.NDArray[np.int64]]:
        images = self._images.get(split)
        if images is None:
            images = self._images[split] = _read(self._paths[split], 3).reshape(-1, _SIDE * _SIDE)
        return images.take(samples, axis=0), self._labels[split].take(samples).astype(np.int64)


def _find_folder(data: str | None) -> Path:
    if data:
        return Path(data)
    root = os.environ.get("ARMILLARY_DATA")
    if not root:
        return Path(DEFAULT_FOLDER)
    inner = Path(root) / "fashion-mnist"
    return inner if inner.is_dir() else Path(root)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataMissingError(
        f"Fashion-MNIST: no {name}[.gz] in {folder}; install Debian's package dataset-fashion-mnist, "
        "or name the folder that holds the idx files with --task-option data=FOLDER or ARMILLARY_DATA"
    )


def _open(path: Path) -> BinaryIO:
    return cast("BinaryIO", gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _header(file: BinaryIO, path: Path, axes: int) -> tuple[int, ...]:
    # two zero bytes, 8 for unsigned bytes, the number of axes; then each axis as a big-endian 32-bit number
    head = file.read(4 + 4 * axes)
    if len(head) < 4 + 4 * axes or head[:4] != bytes((0, 0, 8, axes)):
        raise DataMissingError(f"{path} is not an idx file of bytes with {axes} axes; get it again")
    return struct.unpack(f">{axes}I", head[4:])


def _shape(path: Path, axes: int) -> tuple[int, ...]:
    """Return the shape that the header gives; of a plain file its size is checked too, which costs nothing."""
    try:
        with _open(path) as file:
            shape = _header(file, path, axes)
            if path.suffix != ".gz":
                _check_size(path, shape, path.stat().st_size - file.tell())
            return shape
    except _UNREADABLE as error:
        raise DataMissingError(f"{path} cannot be read: {error}; get it again") from error


def _read(path: Path, axes: int) -> Bytes:
    try:
        with _open(path) as file:
            shape = _header(file, path, axes)
            content = np.frombuffer(file.read(), np.uint8)
    except _UNREADABLE as error:
        raise DataMissingError(f"{path} cannot be read: {error}; get it again") from error
    _check_size(path, shape, content.size)
    return content.reshape(shape)


def _check_size(path: Path, shape: tuple[int, ...], size: int) -> None:
    if size != math.prod(shape):
        raise DataMissingError(f"{path} has {size} bytes of {'x'.join(map(str, shape))}: it is not whole; get it again")
