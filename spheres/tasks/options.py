"""Options of a task, which arrive as text from ``--task-option key=value`` or as values from Python.

Each function returns the value, or raises ConfigError with the option's name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from spheres.errors import ConfigError

__all__ = ["number", "whole", "widths"]


def whole(name: str, value: object, *, lowest: int = 0) -> int:
    """Return a whole number, ``lowest`` or more."""
    try:
        found = int(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    if isinstance(found, bool) or not isinstance(found, int) or found < lowest:
        raise ConfigError(f"task option {name}={value!r}: give a whole number, {lowest} or more")
    return found


def number(name: str, value: object, *, lowest: float = 0.0) -> float:
    """Return a finite number, ``lowest`` or more."""
    try:
        found = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except ValueError:
        found = math.nan
    if not lowest <= found < math.inf:
        raise ConfigError(f"task option {name}={value!r}: give a number, {lowest:g} or more")
    return found


def widths(name: str, value: object) -> tuple[int, ...]:
    """Return layer widths from ``64``, ``"256,128"`` or ``(256, 128)``; none for an empty text or tuple."""
    if isinstance(value, str):
        parts: Iterable[object] = [part for part in value.strip("()[] ").split(",") if part.strip()]
    elif isinstance(value, list | tuple):
        parts = value
    else:
        parts = [value]
    try:
        return tuple(whole(name, part, lowest=1) for part in parts)
    except ConfigError as error:
        raise ConfigError(f"task option {name}={value!r}: give layer widths such as 64 or 256,128") from error
