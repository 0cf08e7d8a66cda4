"""A task of any size for tests and benchmarks: its gradient costs a few passes over memory and learns nothing.

Sums of its gradients show their order: float32 addition of them is visibly not associative.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from spheres.errors import ConfigError
from spheres.sampling import mix64
from spheres.task import Sums
from spheres.tasks.options import number, whole

__all__ = ["Synthetic"]

Array = npt.NDArray[np.float32]
Samples = npt.NDArray[np.int64]

#: elements computed at a time, so that no temporary is of the size of the model
_BLOCK = 65_536
#: each sample's share is scaled by 2**-0 to 2**-11
_MAGNITUDES = 12
#: first elements of the first tensor, over which the loss is taken
_LOSS_ELEMENTS = 64


class Synthetic:
    """The loss ``sum over samples of c * w**2 / 2 + d * w``, with ``c`` and ``d`` of mixed magnitude per sample.

    ``c >= 0``, so descent with a learning rate up to 1 stays finite. The reported loss covers the first elements
    only. Metric ``sample_sum`` is the exact sum of the sample ids: it shows a sample lost or counted twice.
    ``compute_seconds`` is what each gradient takes at least, as a model that computes would. ``empty`` leaves the
    gradient at zero: what is left of a step is what the system itself costs.
    """

    def __init__(
        self,
        parameters: int | str = 2_500,
        samples: int | str = 4096,
        compute_seconds: float | str = 0.0,
        tensors: int | str = 3,
        empty: bool | str = False,
    ) -> None:
        self._parameters = whole("parameters", parameters, lowest=1)
        self._samples = whole("samples", samples, lowest=1)
        self._compute_seconds = number("compute_seconds", compute_seconds)
        self._tensors = whole("tensors", tensors, lowest=1)
        self._empty = str(empty).lower() == "true"
        #: every element of a gradient is written, unless it is left as it is
        self.overwrites_out = not self._empty
        if self._tensors > self._parameters:
            raise ConfigError(f"task option tensors={tensors!r}: more tensors than the {parameters} parameters")

    def init_weights(self, rng: np.random.Generator) -> dict[str, Array]:
        weights: dict[str, Array] = {}
        for n in range(self._tensors):
            size = (n + 1) * self._parameters // self._tensors - n * self._parameters // self._tensors
            weights[f"tensor{n}"] = rng.standard_normal(size, dtype=np.float32)
        return weights

    def size(self, split: str) -> int:
        return {"train": self._samples, "test": -(-self._samples // 4)}.get(split, 0)

    def gradient(
        self, weights: Mapping[str, Array], samples: Samples, rng: np.random.Generator, out: Mapping[str, Array]
    ) -> Sums:
        if self._empty:
            return Sums(0.0, samples.size)
        began = time.monotonic()
        c, d = _coefficients(samples)
        slope, shift = np.float32(c), np.float32(d)
        for name, weight in weights.items():
            for start in range(0, weight.size, _BLOCK):
                target = out[name][start : start + _BLOCK]
                np.multiply(weight[start : start + _BLOCK], slope, out=target)
                np.add(target, shift, out=target)
        sums = self._sums(weights, samples, c, d)
        if (left := self._compute_seconds - (time.monotonic() - began)) > 0:
            time.sleep(left)
        return sums

    def evaluate(self, weights: Mapping[str, Array], samples: Samples) -> Sums:
        return self._sums(weights, samples, *_coefficients(samples))

    def data_fingerprint(self) -> str:
        """Return what the samples are made from: their number."""
        return f"synthetic {self._samples}"

    def _sums(self, weights: Mapping[str, Array], samples: Samples, c: float, d: float) -> Sums:
        if not samples.size:
            return Sums(0.0, 0, {"sample_sum": 0.0})
        few = next(iter(weights.values()))[:_LOSS_ELEMENTS].astype(np.float64)
        loss = float(np.add.reduce(few * few)) * c / 2 + float(np.add.reduce(few)) * d
        return Sums(loss, samples.size, {"sample_sum": float(np.add.reduce(samples))})


def _coefficients(samples: Samples) -> tuple[float, float]:
    """Return the sums of ``c`` in [0, 1) and ``d`` in [-0.5, 0.5), each scaled by the sample's magnitude."""
    c = d = 0.0
    for sample in samples.tolist():
        word = mix64(sample + 1)
        magnitude = 2.0 ** -(word % _MAGNITUDES)
        c += (word >> 40) / 2**24 * magnitude
        d += ((word >> 16 & 0xFFFFFF) / 2**24 - 0.5) * magnitude
    return c, d
