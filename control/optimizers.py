"""SGD, Adam and AdamW over one flat float32 buffer laid out by a manifest, with parameter groups.

Every operation is elementwise and rounds to float32, so updating in pieces gives the same bits as at once.
No clipping, no schedule, no finite check: those are decided before an update begins (RECOVERY N16).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from control.config import OptimizerConfig, ParameterGroup
from spheres.errors import CheckpointError, ConfigError
from spheres.tensors import Manifest, aligned_zeros

__all__ = ["SGD", "Adam", "AdamW", "Optimizer", "make_optimizer"]

Array = npt.NDArray[np.float32]

#: elements updated at a time: weights, gradient, state and scratch of one block stay in the cache
BLOCK = 65_536
#: pieces that can be updated side by side
LANES = 2


class _Span(NamedTuple):
    """Elements ``[lo, hi)`` that share their settings. Padding and frozen tensors lie in no span."""

    lo: int
    hi: int
    learning_rate_scale: float
    weight_decay: float


class Optimizer(ABC):
    """Updates weights in place. Mutable state: ``count`` and the flat buffers of ``state()``.

    One update is ``begin()``, then ``update()`` over pieces that cover the buffer, in any order, each element once.
    """

    name: str

    def __init__(self, config: OptimizerConfig, manifest: Manifest) -> None:
        self._config = config
        self._size = manifest.size
        self._spans = _spans(config, manifest)
        self._starts = [span.lo for span in self._spans]
        size = min(BLOCK, manifest.size)
        self._scratch = [(aligned_zeros(size), aligned_zeros(size)) for _ in range(LANES)]
        #: updates begun since the start of the run
        self.count = 0

    def begin(self) -> None:
        """Start the next update; its pieces follow."""
        self.count += 1

    @abstractmethod
    def update(self, weights: Array, gradient: Array, learning_rate: float, lo: int, hi: int, lane: int = 0) -> None:
        """Update elements ``[lo, hi)`` of the flat buffer ``weights``; ``gradient`` is left as it is.

        Two threads may update different elements at once, each in a lane of its own, from 0 to ``LANES`` - 1.
        """

    @abstractmethod
    def state(self) -> dict[str, Array]:
        """Return name -> flat buffer of the model's size. References, not copies."""

    def restore(self, count: int, state: Mapping[str, Array]) -> None:
        """Copy a saved state in. Raises CheckpointError, with nothing changed, where it does not fit."""
        own = self.state()
        if set(state) != set(own):
            raise CheckpointError(
                f"optimizer state has {sorted(state) or 'no buffers'}, {self.name} needs {sorted(own) or 'none'}"
            )
        for name, buffer in own.items():
            saved = state[name]
            if saved.dtype != np.float32 or saved.shape != buffer.shape:
                raise CheckpointError(
                    f"optimizer state {name!r} is {saved.dtype}{saved.shape}, {self.name} needs float32{buffer.shape}"
                )
        if count < 0:
            raise CheckpointError(f"optimizer state has update count {count}; it cannot be negative")
        for name, buffer in own.items():
            np.copyto(buffer, state[name])
        self.count = count

    def _pieces(self, lo: int, hi: int, lane: int) -> Iterator[tuple[slice, _Span, Array, Array]]:
        """Yield what of the spans lies in ``[lo, hi)``, at most a block at a time, with scratch of that length."""
        if not 0 <= lo <= hi <= self._size:
            raise ValueError(f"elements [{lo}, {hi}) are not in a buffer of {self._size}")
        first, second = self._scratch[lane]
        for index in range(max(0, bisect_right(self._starts, lo) - 1), len(self._spans)):
            span = self._spans[index]
            if span.lo >= hi:
                return
            end = min(hi, span.hi)
            for start in range(max(lo, span.lo), end, BLOCK):
                stop = min(start + BLOCK, end)
                yield slice(start, stop), span, first[: stop - start], second[: stop - start]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} count={self.count} size={self._size} spans={len(self._spans)}>"


class SGD(Optimizer):
    """Stochastic gradient descent with momentum (Polyak) or Nesterov momentum, and weight decay as an L2 term.

    As in Sutskever et al., "On the importance of initialization and momentum in deep learning" (ICML 2013), in the
    form of the PyTorch documentation of ``torch.optim.SGD`` (dampening 0; the rate is outside of the momentum):
    g = g + decay w;  b = momentum b + g;  w = w - rate b, or w - rate (g + momentum b) with Nesterov.
    """

    name = "sgd"

    def __init__(self, config: OptimizerConfig, manifest: Manifest) -> None:
        super().__init__(config, manifest)
        self._momentum = aligned_zeros(manifest.size) if config.momentum else None

    def state(self) -> dict[str, Array]:
        return {} if self._momentum is None else {"momentum": self._momentum}

    @np.errstate(over="ignore", invalid="ignore")  # whether weights are finite is checked, not printed
    def update(self, weights: Array, gradient: Array, learning_rate: float, lo: int, hi: int, lane: int = 0) -> None:
        momentum = np.float32(self._config.momentum)
        for at, span, step, other in self._pieces(lo, hi, lane):
            w, g = weights[at], gradient[at]
            if span.weight_decay:
                np.multiply(w, np.float32(span.weight_decay), out=step)
                np.add(step, g, out=step)
                g = step
            if self._momentum is not None:
                b = self._momentum[at]
                np.multiply(b, momentum, out=b)
                np.add(b, g, out=b)
                if self._config.nesterov:
                    np.multiply(b, momentum, out=other)
                    g = np.add(g, other, out=step)
                else:
                    g = b
            np.multiply(g, np.float32(learning_rate * span.learning_rate_scale), out=step)
            np.subtract(w, step, out=w)


class Adam(Optimizer):
    """Adam (Kingma and Ba, ICLR 2015, algorithm 1), with weight decay as an L2 term of the gradient.

    g = g + decay w;  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g g;
    w = w - rate / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + epsilon), with t = ``count``.
    Factors are computed in float64 and rounded once.
    """

    name = "adam"
    decoupled = False

    def __init__(self, config: OptimizerConfig, manifest: Manifest) -> None:
        super().__init__(config, manifest)
        self._m = aligned_zeros(manifest.size)
        self._v = aligned_zeros(manifest.size)

    def state(self) -> dict[str, Array]:
        return {"m": self._m, "v": self._v}

    @np.errstate(over="ignore", invalid="ignore")
    def update(self, weights: Array, gradient: Array, learning_rate: float, lo: int, hi: int, lane: int = 0) -> None:
        if self.count < 1:
            raise ValueError("begin() comes before the first update()")
        config = self._config
        beta1, beta2 = np.float32(config.beta1), np.float32(config.beta2)
        one_minus1, one_minus2 = np.float32(1.0 - config.beta1), np.float32(1.0 - config.beta2)
        epsilon = np.float32(config.epsilon)
        correction1 = 1.0 - config.beta1**self.count
        root2 = np.float32(1.0 / math.sqrt(1.0 - config.beta2**self.count))
        for at, span, step, other in self._pieces(lo, hi, lane):
            w, g, m, v = weights[at], gradient[at], self._m[at], self._v[at]
            rate = learning_rate * span.learning_rate_scale
            if span.weight_decay and self.decoupled:
                np.multiply(w, np.float32(1.0 - rate * span.weight_decay), out=w)
            elif span.weight_decay:
                np.multiply(w, np.float32(span.weight_decay), out=step)
                g = np.add(step, g, out=step)
            # v first: it reads g, which may be ``step``, before step is used again
            np.multiply(g, g, out=other)
            np.multiply(other, one_minus2, out=other)
            np.multiply(v, beta2, out=v)
            np.add(v, other, out=v)
            np.multiply(g, one_minus1, out=step)
            np.multiply(m, beta1, out=m)
            np.add(m, step, out=m)
            np.sqrt(v, out=other)
            np.multiply(other, root2, out=other)
            np.add(other, epsilon, out=other)
            np.multiply(m, np.float32(rate / correction1), out=step)
            np.divide(step, other, out=step)
            np.subtract(w, step, out=w)


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter, ICLR 2019, algorithm 2).

    w = (1 - rate decay) w before the step, where rate has schedule and group scale in it, as in the PyTorch
    documentation of ``torch.optim.AdamW``; the decay is no part of the gradient or its moments.
    """

    name = "adamw"
    decoupled = True


def make_optimizer(config: OptimizerConfig, manifest: Manifest) -> Optimizer:
    """Return the optimizer that ``config`` names. Raises ConfigError for a parameter group that fits no tensor."""
    kinds: dict[str, type[SGD] | type[Adam]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}
    return kinds[config.name](config, manifest)


def _spans(config: OptimizerConfig, manifest: Manifest) -> list[_Span]:
    """Return the spans in order, neighbours merged where no padding lies between them."""
    names = [spec.name for spec in manifest.tensors]
    for group in config.parameter_groups:
        if not any(fnmatchcase(name, group.pattern) for name in names):
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ConfigError(f"parameter_groups: pattern {group.pattern!r} fits no tensor; the task has {shown}")
    spans: list[_Span] = []
    for spec in manifest.tensors:
        group = next((g for g in config.parameter_groups if fnmatchcase(spec.name, g.pattern)), _REST)
        if group.frozen or spec.size == 0:
            continue
        decay = config.weight_decay if group.weight_decay is None else group.weight_decay
        span = _Span(spec.offset, spec.offset + spec.size, group.learning_rate_scale, decay)
        if spans and spans[-1].hi == span.lo and spans[-1][2:] == span[2:]:
            spans[-1] = spans[-1]._replace(hi=span.hi)
        else:
            spans.append(span)
    return spans


_REST = ParameterGroup(pattern="*")
