"""Values that carry a unit: durations, sizes and "every so many steps, epochs or seconds".

Parsing and printing only; no clock.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, Self

__all__ = ["Every", "format_duration", "format_size", "parse_duration", "parse_size"]

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_NUMBER_AND_UNIT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)


def parse_duration(value: object) -> float:
    """Return seconds from a number of seconds or a text such as ``500ms``, ``60s``, ``5m``, ``1h``, ``1d``."""
    expected = "a duration is a number of seconds or a text such as 500ms, 60s, 5m, 1h"
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value) or value < 0:
            raise ValueError(expected)
        return float(value)
    match = _NUMBER_AND_UNIT.fullmatch(value) if isinstance(value, str) else None
    unit = match[2].lower() or "s" if match else ""
    if match is None or unit not in _SECONDS:
        raise ValueError(expected)
    return float(match[1]) * _SECONDS[unit]


def format_duration(seconds: float) -> str:
    """Return the text that ``parse_duration`` reads back to the same number."""
    for unit in ("h", "m"):
        if seconds and seconds % _SECONDS[unit] == 0:
            return f"{int(seconds / _SECONDS[unit])}{unit}"
    return f"{int(seconds)}s" if seconds == int(seconds) else f"{seconds!r}s"


def parse_size(value: object) -> int:
    """Return bytes from a whole number or a text such as ``64KiB`` or ``1MiB``."""
    expected = "a size is a whole number of bytes or a text such as 64KiB, 1MiB"
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _NUMBER_AND_UNIT.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2].lower() not in _BYTES:
        raise ValueError(expected)
    size = float(match[1]) * _BYTES[match[2].lower()]
    if size != int(size):
        raise ValueError(expected)
    return int(size)


def format_size(size: int) -> str:
    """Return the text that ``parse_size`` reads back to the same number."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size and size % factor == 0:
            return f"{size // factor}{unit}"
    return str(size)


@dataclass(frozen=True, slots=True)
class Every:
    """Something that happens again and again: ``100steps``, ``1epochs``, ``5m``."""

    count: float  # whole for steps and epochs
    unit: Literal["steps", "epochs", "seconds"]

    @classmethod
    def parse(cls, value: object) -> Self:
        """Read a text, or a whole number, which counts steps."""
        expected = "give a number above 0 with its unit, such as 100steps, 1epochs, 5m, 30s"
        if isinstance(value, cls):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        match = _NUMBER_AND_UNIT.fullmatch(value) if isinstance(value, str) else None
        if match is None or float(match[1]) <= 0:
            raise ValueError(expected)
        count, unit = float(match[1]), match[2].lower()
        if unit in _SECONDS:
            return cls(count * _SECONDS[unit], "seconds")
        if unit not in ("", "step", "steps", "epoch", "epochs") or count != int(count):
            raise ValueError(expected)
        return cls(int(count), "epochs" if unit.startswith("epoch") else "steps")

    def due(self, *, step: int, steps_per_epoch: int, seconds: float) -> bool:
        """Whether it happens after update number ``step`` (from 1), ``seconds`` after the last time.

        Steps and epochs are derived from the step number alone, so a resumed run does the same at the same steps.
        """
        if self.unit == "seconds":
            return seconds >= self.count
        return step % (int(self.count) * (steps_per_epoch if self.unit == "epochs" else 1)) == 0

    def __str__(self) -> str:
        return format_duration(self.count) if self.unit == "seconds" else f"{int(self.count)}{self.unit}"
