"""Which samples a microbatch holds: the stateless shuffle, and the seeds that go with it.

``docs/protocol-shuffle.md`` writes the shuffle down for other languages. Pure: knows no node, no data, no file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from spheres.errors import ConfigError

__all__ = ["ROUNDS", "Sampler", "evaluation_slice", "mix64", "permute", "permute_range"]

Samples = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

#: rounds of the Feistel network; part of the protocol
ROUNDS = 6
#: positions shuffled by one vectorised call; a kept window makes the small microbatches that follow nearly free
_WINDOW = 4096
#: windows kept in the process, so memory stays constant (1 MiB) whatever the size of the data
_WINDOWS_KEPT = 32
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_LARGEST = 1 << 62
#: the buffer of a Philox from which nothing was drawn
_NO_WORDS = np.zeros(4, np.uint64)


def mix64(word: int) -> int:
    """Return ``word``, 0 to 2**64 - 1, with its bits mixed: a bijection of the 64-bit words."""
    word = ((word ^ word >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ word >> 27) * 0x94D049BB133111EB) & _MASK
    return word ^ word >> 31


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    start = mix64((mix64((seed + _GOLDEN) & _MASK) + epoch) & _MASK)
    return tuple(mix64((start + (number + 1) * _GOLDEN) & _MASK) for number in range(ROUNDS))


def permute(seed: int, epoch: int, size: int, positions: npt.ArrayLike) -> Samples:
    """Return the sample at each of ``positions`` (each below ``size``) in the order of this epoch.

    A bijection of ``0 .. size - 1`` for each ``(seed, epoch)``, with random access and nothing kept.
    """
    _check("seed", seed, 0, (1 << 63) - 1)
    _check("epoch", epoch, 0, _LARGEST)
    _check("size", size, 1, _LARGEST)
    words = np.array(positions, np.uint64)
    flat = words.reshape(-1)
    if flat.size and int(flat.max()) >= size:
        raise ConfigError(f"position {int(flat.max())} is not below the {size} samples of the data")
    # half as many bits as the smallest power of four >= size; at least one, since nothing shifts by 64
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    # cycle-walking: what falls outside 0 .. size - 1 goes through the network again until it falls inside
    limit = np.uint64(size)
    if flat.size * 4 >= 1 << 2 * half:
        # so many positions that the whole domain as a table costs less than the long tail of the walk
        table = _network(np.arange(1 << 2 * half, dtype=np.uint64), half, keys)
        flat[:] = table[flat]
        while (walking := np.flatnonzero(flat >= limit)).size:
            flat[walking] = table[flat[walking]]
    else:
        walking, left = np.arange(flat.size), flat
        while walking.size:
            left = _network(left, half, keys)
            inside = left < limit
            flat[walking[inside]] = left[inside]
            walking, left = walking[~inside], left[~inside]
    return words.astype(np.int64)


def _network(words: Words, half: int, keys: tuple[int, ...]) -> Words:
    """Return each word, of ``2 * half`` bits, after one pass through the Feistel network."""
    width, keep = np.uint64(half), np.uint64(64 - half)
    left, right = words >> width, words & np.uint64((1 << half) - 1)
    for key in keys:
        # mix64 less its last step, which does not reach the upper ``half <= 31`` bits that are kept
        mixed = right + np.uint64(key)
        mixed ^= mixed >> np.uint64(30)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(27)
        mixed *= np.uint64(0x94D049BB133111EB)
        mixed >>= keep
        mixed ^= left
        left, right = right, mixed
    return left << width | right


@lru_cache(maxsize=_WINDOWS_KEPT)
def _window(seed: int, epoch: int, size: int, number: int) -> Samples:
    window = permute(seed, epoch, size, np.arange(number * _WINDOW, min((number + 1) * _WINDOW, size), dtype=np.uint64))
    window.flags.writeable = False
    return window


def permute_range(seed: int, epoch: int, size: int, start: int, stop: int) -> Samples:
    """Return the samples at positions ``start`` to ``stop - 1``; a read-only view where it lies in one window."""
    first, last = start // _WINDOW, (stop - 1) // _WINDOW
    if first == last:
        return _window(seed, epoch, size, first)[start - first * _WINDOW : stop - first * _WINDOW]
    if stop - start > _WINDOW * _WINDOWS_KEPT // 4:
        # would only push every kept window out
        return permute(seed, epoch, size, np.arange(start, stop, dtype=np.uint64))
    windows = [_window(seed, epoch, size, number) for number in range(first, last + 1)]
    joined = np.concatenate(windows) if windows else np.empty(0, np.int64)
    return joined[start - first * _WINDOW : stop - first * _WINDOW]


@dataclass(frozen=True)
class Sampler:
    """The samples of every step of a run, as a pure function of the step number (N18: derived, never counted).

    Steps count from 0: step ``s`` is computed on the weights after ``s`` updates. The last step of an epoch is
    short where ``batch_size`` does not divide ``size``; a step never spans two epochs.
    """

    seed: int
    #: samples of the training split
    size: int
    #: samples of a full step, over all microbatches
    batch_size: int
    microbatches: int

    def __post_init__(self) -> None:
        _check("seed", self.seed, 0, (1 << 63) - 1)
        _check("size", self.size, 1, _LARGEST)
        _check("batch_size", self.batch_size, 1, _LARGEST)
        _check("microbatches", self.microbatches, 1, 1 << 32)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.size // self.batch_size)

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def batch_count(self, step: int) -> int:
        """Samples of that step."""
        return min(self.batch_size, self.size - step % self.steps_per_epoch * self.batch_size)

    def samples_before(self, step: int) -> int:
        """Samples of steps 0 to ``step - 1`` together."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch * self.size + within * self.batch_size

    def count(self, step: int, index: int) -> int:
        """Samples of one microbatch; 0 where it is empty."""
        start, stop = self._bounds(step, index)
        return stop - start

    def microbatch(self, step: int, index: int) -> Samples:
        """Return the sample ids of one microbatch, read-only, in their order."""
        start, stop = self._bounds(step, index)
        epoch, within = divmod(step, self.steps_per_epoch)
        offset = within * self.batch_size
        return permute_range(self.seed, epoch, self.size, offset + start, offset + stop)

    def empty(self, step: int) -> frozenset[int]:
        """Return the microbatches of that step that hold no sample: they are no leaves of the tree."""
        return _empty(self.batch_count(step), self.microbatches)

    def generator(self, step: int, index: int) -> np.random.Generator:
        """Return the randomness of one microbatch: Philox4x64 with key (seed, step) and counter (0, 0, 0, index)."""
        bits = np.random.Philox(key=0)
        bits.state = self.generator_state(step, index)
        return np.random.Generator(bits)

    def generator_state(self, step: int, index: int) -> Any:
        """Return the state of ``generator`` before its first number, for a Philox that is used again."""
        return {
            "bit_generator": "Philox",
            "state": {"counter": np.array((0, 0, 0, index), np.uint64), "key": np.array((self.seed, step), np.uint64)},
            "buffer": _NO_WORDS,
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }

    def _bounds(self, step: int, index: int) -> tuple[int, int]:
        if step < 0 or not 0 <= index < self.microbatches:
            raise ConfigError(f"there is no microbatch {index} of {self.microbatches} in step {step}")
        batch = self.batch_count(step)
        return index * batch // self.microbatches, (index + 1) * batch // self.microbatches


@lru_cache(maxsize=64)
def _empty(batch: int, microbatches: int) -> frozenset[int]:
    if batch >= microbatches:
        return frozenset()
    return frozenset(k for k in range(microbatches) if k * batch // microbatches == (k + 1) * batch // microbatches)


def evaluation_slice(size: int, total: int, index: int) -> Samples:
    """Return the ``index``-th of ``total`` even slices of samples 0 to ``size - 1``, in order; it may be empty."""
    _check("size", size, 0, _LARGEST)
    _check("total", total, 1, 1 << 32)
    _check("index", index, 0, total - 1)
    return np.arange(index * size // total, (index + 1) * size // total, dtype=np.int64)


def _check(name: str, value: object, lowest: int, highest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise ConfigError(f"{name} is {value!r}; give a whole number from {lowest} to {highest}")
