"""A multilayer perceptron in NumPy: ReLU between layers, softmax cross-entropy summed over samples.

A building block for tasks that classify; it holds no data and no weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from spheres.errors import ConfigError
from spheres.task import Sums
from spheres.tensors import aligned_zeros

__all__ = ["Mlp"]

Array = npt.NDArray[np.float32]
Inputs = npt.NDArray[np.float32] | npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

#: rows of one forward pass of an evaluation: bounds its memory, whatever the slice
_EVALUATION_ROWS = 1024
#: batch sizes for which scratch is kept: a run has two or three
_SIZES_KEPT = 4


def _aligned(rows: int, columns: int) -> Array:
    return aligned_zeros(rows * columns).reshape(rows, columns)


class _Scratch:
    """The buffers of one pass over ``rows`` samples. BLAS sees aligned addresses only (DESIGN section 4)."""

    __slots__ = ("activations", "deltas", "rows")

    def __init__(self, layers: Sequence[int], rows: int) -> None:
        self.rows = np.arange(rows)
        self.activations = [_aligned(rows, width) for width in layers]
        self.deltas: list[Array] = []

    def prepare_backward(self, layers: Sequence[int]) -> None:
        if not self.deltas:
            rows = self.rows.size
            self.deltas = [_aligned(rows, width) for width in layers[1:]]


class Mlp:
    """A perceptron with these layer widths, inputs first; tensors are ``layer0.weight``, ``layer0.bias`` and so on.

    Inputs (float32 or uint8) are multiplied by ``input_scale`` as they are taken in. Safe to call from several
    threads. Same weights, inputs and shapes give the same bits, as long as weights and ``out`` start at 64-byte
    addresses and BLAS has one thread.
    """

    def __init__(self, layers: Sequence[int], input_scale: float = 1.0) -> None:
        if len(layers) < 2 or min(layers) < 1:
            raise ConfigError(f"layers {tuple(layers)}: give the widths of the inputs, hidden layers and classes")
        self.layers = tuple(layers)
        self._scale = np.float32(input_scale)
        self._names = [(f"layer{n}.weight", f"layer{n}.bias") for n in range(len(layers) - 1)]
        # mutable state: scratch that no call uses at present, by number of rows
        self._free: dict[int, list[_Scratch]] = {}

    def init(self, rng: np.random.Generator) -> dict[str, Array]:
        """Return weights after He (normal, for ReLU) and zero biases."""
        weights: dict[str, Array] = {}
        for (weight, bias), (i, o) in zip(self._names, pairwise(self.layers), strict=True):
            weights[weight] = rng.standard_normal((i, o), dtype=np.float32) * np.float32(math.sqrt(2.0 / i))
            weights[bias] = np.zeros(o, np.float32)
        return weights

    def gradient(self, weights: Mapping[str, Array], x: Inputs, y: Labels, out: Mapping[str, Array]) -> Sums:
        """Write the gradient of the summed loss over ``out``; ``accuracy`` is the number of correct answers."""
        if not len(y):
            for name in (name for pair in self._names for name in pair):
                out[name].fill(0)
            return Sums(0.0, 0, {"accuracy": 0.0})
        scratch = self._take(len(y))
        scratch.prepare_backward(self.layers)
        # a run that diverges is found by its caller, who looks for what is not finite; warnings add nothing
        with np.errstate(over="ignore", invalid="ignore"):
            sums = self._forward(scratch, weights, x, y)
            logits, delta = scratch.activations[-1], scratch.deltas[-1]
            # _forward left exp(logits - max) here: over their sum it is the softmax, less 1 at the label
            np.divide(logits, np.add.reduce(logits, axis=1, keepdims=True), out=delta)
            delta[scratch.rows, y] -= 1
            for n in range(len(self._names) - 1, -1, -1):
                weight, bias = self._names[n]
                inputs = scratch.activations[n]
                np.matmul(inputs.T, delta, out=out[weight])
                np.add.reduce(delta, axis=0, out=out[bias])
                if n:
                    below = scratch.deltas[n - 1]
                    np.matmul(delta, weights[weight].T, out=below)
                    np.multiply(below, inputs > 0, out=below)
                    delta = below
        self._give_back(scratch)
        return sums

    def evaluate(self, weights: Mapping[str, Array], x: Inputs, y: Labels) -> Sums:
        """Return the summed loss and the number of correct answers, in passes of bounded size."""
        loss, correct = 0.0, 0.0
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, len(y), _EVALUATION_ROWS):
                labels = y[start : start + _EVALUATION_ROWS]
                scratch = self._take(len(labels))
                part = self._forward(scratch, weights, x[start : start + _EVALUATION_ROWS], labels)
                self._give_back(scratch)
                loss += part.loss
                correct += part.metrics["accuracy"]
        return Sums(loss, len(y), {"accuracy": correct})

    def _forward(self, scratch: _Scratch, weights: Mapping[str, Array], x: Inputs, y: Labels) -> Sums:
        below = scratch.activations[0]
        np.multiply(x, self._scale, out=below)
        for n, (weight, bias) in enumerate(self._names):
            if n:
                np.maximum(below, 0, out=below)
            above = scratch.activations[n + 1]
            np.matmul(below, weights[weight], out=above)
            above += weights[bias]
            below = above
        # log-softmax with the largest logit at 0: exp cannot overflow, and its sum is at least 1
        below -= np.maximum.reduce(below, axis=1, keepdims=True)
        at_label = below[scratch.rows, y]
        correct = np.count_nonzero(below.argmax(axis=1) == y)
        np.exp(below, out=below)
        losses = np.log(np.add.reduce(below, axis=1)) - at_label
        return Sums(float(np.add.reduce(losses, dtype=np.float64)), len(y), {"accuracy": float(correct)})

    def _take(self, rows: int) -> _Scratch:
        try:
            return self._free[rows].pop()
        except (KeyError, IndexError):
            return _Scratch(self.layers, rows)

    def _give_back(self, scratch: _Scratch) -> None:
        rows = scratch.rows.size
        if rows not in self._free and len(self._free) >= _SIZES_KEPT:
            self._free.clear()
        self._free.setdefault(rows, []).append(scratch)
