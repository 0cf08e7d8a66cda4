"""The default task: 8x8 handwritten digits and a small perceptron, from 57 KB of package data.

``data/README.md`` has the source and the licence of the data.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from spheres.errors import DataMissingError
from spheres.sampling import permute
from spheres.task import Sums
from spheres.tasks.mlp import Mlp
from spheres.tasks.options import widths

__all__ = ["Digits"]

Array = npt.NDArray[np.float32]
Samples = npt.NDArray[np.int64]

_FILE = Path(__file__).parent / "data" / "digits.csv.gz"
_PIXELS, _CLASSES = 64, 10
_SAMPLES, _TRAIN = 1797, 1437
#: pixels count the dark points of a 4x4 field
_BRIGHTEST = 16
#: the split is part of the task: another seed would be another benchmark
_SPLIT_SEED = 0


class Digits:
    """UCI digits, 1,437 to train on and 360 to test, and a perceptron with one hidden layer (or more)."""

    #: every element of a gradient is written, so nobody needs to zero it before
    overwrites_out = True

    def __init__(self, hidden: int | str | tuple[int, ...] = 64) -> None:
        self._model = Mlp((_PIXELS, *widths("hidden", hidden), _CLASSES), input_scale=1 / _BRIGHTEST)
        try:
            packed = _FILE.read_bytes()
        except FileNotFoundError as error:
            raise DataMissingError(f"{_FILE} is missing: install the package again") from error
        self._fingerprint = hashlib.sha256(packed).hexdigest()
        text = gzip.decompress(packed).strip().replace(b"\n", b",")
        rows = np.fromstring(text, np.uint8, sep=",").reshape(_SAMPLES, _PIXELS + 1)
        # the file is ordered by writer, so its tail would be other people's digits
        order = permute(_SPLIT_SEED, 0, _SAMPLES, np.arange(_SAMPLES))
        split = {"train": rows[order[:_TRAIN]], "test": rows[order[_TRAIN:]]}
        self._images = {name: np.ascontiguousarray(part[:, :_PIXELS]) for name, part in split.items()}
        self._labels = {name: part[:, _PIXELS].astype(np.int64) for name, part in split.items()}

    def init_weights(self, rng: np.random.Generator) -> dict[str, Array]:
        return self._model.init(rng)

    def size(self, split: str) -> int:
        return len(self._labels.get(split, ()))

    def gradient(
        self, weights: Mapping[str, Array], samples: Samples, rng: np.random.Generator, out: Mapping[str, Array]
    ) -> Sums:
        x = self._images["train"].take(samples, axis=0)
        return self._model.gradient(weights, x, self._labels["train"].take(samples), out)

    def evaluate(self, weights: Mapping[str, Array], samples: Samples) -> Sums:
        x = self._images["test"].take(samples, axis=0)
        return self._model.evaluate(weights, x, self._labels["test"].take(samples))

    def data_fingerprint(self) -> str:
        """Return the SHA-256 of the data file."""
        return self._fingerprint
