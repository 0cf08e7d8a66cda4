"""What the simulation trains: gradients that show order, loss and double counting of microbatches in their bits."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from spheres.sampling import mix64
from spheres.task import Sums

#: elements per row: the first of each is -0.0, the last what ``share`` gives
ROW = 16
#: seed-free noise of mixed magnitude, long enough that no two microbatches start at the same place
_NOISE = 1 << 15


@lru_cache(maxsize=1)
def _noise() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.standard_normal(_NOISE) * 10.0 ** rng.integers(-3, 4, _NOISE)).astype(np.float32)


def share(index: int, microbatches: int) -> float:
    """What microbatch ``index`` adds to the last of each row: a bit of its own, where float32 has room for all."""
    return float(1 << index) if microbatches <= 20 else 1.0


class RowTask:
    """``elements`` weights. ``trouble`` is asked before each gradient: "", "raise", "nan"."""

    def __init__(self, elements: int, train: int, test: int, microbatches: int) -> None:
        self._elements, self._sizes, self._microbatches = elements, {"train": train, "test": test}, microbatches
        self.trouble = lambda: ""

    def init_weights(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"w": rng.standard_normal(self._elements, dtype=np.float32)}

    def size(self, split: str) -> int:
        return self._sizes.get(split, 0)

    def gradient(
        self, weights: Mapping[str, np.ndarray], samples: np.ndarray, rng: np.random.Generator, out: Mapping
    ) -> Sums:
        state = rng.bit_generator.state["state"]
        step, index = int(state["key"][1]), int(state["counter"][3])
        trouble = self.trouble()
        if trouble == "raise":
            raise RuntimeError(f"told to fail at step {step}, microbatch {index}")
        w, grad = weights["w"], out["w"]
        word = mix64(int(samples[0]) + 1_000_003 * step + 7 * index + 1)
        noise, start, done = _noise(), word % _NOISE, 0
        while done < w.size:
            piece = noise[start : start + w.size - done]
            grad[done : done + piece.size] = piece
            done, start = done + piece.size, 0
        grad += w * np.float32(1 + index % 3)
        grad[::ROW] = -0.0
        grad[ROW - 1 :: ROW] = share(index, self._microbatches)
        if trouble == "nan":
            grad[0] = np.nan
        loss = ((word >> 11) / 2**53 - 0.5) * 1e3 + float(w[0])
        return Sums(loss, samples.size, {"sample_sum": float(samples.sum()), "accuracy": loss * 1e-7})

    def evaluate(self, weights: Mapping[str, np.ndarray], samples: np.ndarray) -> Sums:
        loss = float(weights["w"][:64].astype(np.float64).sum()) * (1 + int(samples[0]))
        return Sums(loss, samples.size, {"accuracy": loss * 1e-7, "sample_sum": float(samples.sum())})
