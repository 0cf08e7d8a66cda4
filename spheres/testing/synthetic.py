"""Tasks of any size for tests and benchmarks: gradients of a few passes over memory, or none; they learn nothing.

Sums of the gradients of ``Synthetic`` show their order: float32 addition of them is visibly not associative.
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

__all__ = ["Standing", "Synthetic"]

Array = npt.NDArray[np.float32]
Samples = npt.NDArray[np.int64]

#: elements computed at a time, so that no temporary is of the size of the model
_BLOCK = 65_536
#: each sample's share is scaled by 2**-0 to 2**-11
_MAGNITUDES = 12
#: first elements of the first tensor, over which the loss is taken
_LOSS_ELEMENTS = 64
#: of ``Standing``: first elements of each tensor that follow from weights and samples, and places at which it looks
#: whether the rest of a buffer is as it was left
_MOVING, _LOOKS = 16, 64


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


class Standing:
    """A gradient that stands in ``out`` but for a few elements per tensor: what is left of a step is the round.

    The rest follows from the place of an element alone, in values that a narrower type on the wire holds too, and is
    written where a look finds something else: a new buffer, or one that was zeroed or added to. The weights follow
    every step and sample through the few elements, so ``control.reference`` shows what was lost or swapped.
    ``copies`` keeps gradient and weights in arrays of the task's own, as a framework does: one copy in and one out.
    """

    #: every element of ``out`` is written, or known to hold its value
    overwrites_out = True

    def __init__(
        self,
        parameters: int | str = 2_500,
        samples: int | str = 4096,
        tensors: int | str = 3,
        copies: bool | str = False,
    ) -> None:
        self._shape = Synthetic(parameters, samples, tensors=tensors)
        self._copies = str(copies).lower() == "true"
        # mutable state: the arrays of its own
        self._gradient: dict[str, Array] = {}
        self._weights: dict[str, Array] = {}

    def init_weights(self, rng: np.random.Generator) -> dict[str, Array]:
        return self._shape.init_weights(rng)

    def size(self, split: str) -> int:
        return self._shape.size(split) if split == "train" else 0

    def gradient(
        self, weights: Mapping[str, Array], samples: Samples, rng: np.random.Generator, out: Mapping[str, Array]
    ) -> Sums:
        c, d = _coefficients(samples)
        slope, shift = np.float32(c), np.float32(d)
        if self._copies and not self._weights:
            self._weights = {name: weight.copy() for name, weight in weights.items()}
            self._gradient = {name: np.zeros_like(weight) for name, weight in weights.items()}
        for name, weight in weights.items():
            target = self._gradient[name] if self._copies else out[name]
            _stand(target)
            if self._copies:
                weight, mine = self._weights[name], weight
                np.copyto(weight, mine)
            target[:_MOVING] = weight[:_MOVING] * slope + shift
            if self._copies:
                np.copyto(out[name], target)
        return Sums(float(slope), samples.size)

    def evaluate(self, weights: Mapping[str, Array], samples: Samples) -> Sums:
        return Sums(0.0, samples.size)

    def data_fingerprint(self) -> str:
        """Return what the samples are made from: their number."""
        return self._shape.data_fingerprint()


def _stand(target: Array) -> None:
    """Have all but the first elements of ``target`` hold their value, by a look at a few of them."""
    places = np.linspace(_MOVING, target.size - 1, _LOOKS).astype(np.int64) if target.size > _MOVING else None
    if places is not None and not np.array_equal(target[places], _values(places)):
        for start in range(0, target.size, _BLOCK):
            part = target[start : start + _BLOCK]
            part[:] = _values(np.arange(start, start + part.size))


def _values(places: npt.NDArray[np.int64]) -> Array:
    """Return multiples of 2**-17 with 7 bits after the first: float32 and bfloat16 hold them alike."""
    return ((128 + places % 127) * np.float32(2.0**-17)).astype(np.float32)


def _coefficients(samples: Samples) -> tuple[float, float]:
    """Return the sums of ``c`` in [0, 1) and ``d`` in [-0.5, 0.5), each scaled by the sample's magnitude."""
    c = d = 0.0
    for sample in samples.tolist():
        word = mix64(sample + 1)
        magnitude = 2.0 ** -(word % _MAGNITUDES)
        c += (word >> 40) / 2**24 * magnitude
        d += ((word >> 16 & 0xFFFFFF) / 2**24 - 0.5) * magnitude
    return c, d
