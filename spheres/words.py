"""Text of users and of the system, made so that it can travel: messages and JSON hold UTF-8, in bounded pieces."""

from __future__ import annotations

__all__ = ["MOST_ERROR", "MOST_REASON", "MOST_TRACEBACK", "RUN_OVER", "cut", "encodable", "is_encodable", "raised"]

#: bytes of why a link has ended, or why a sphere is told to leave
MOST_REASON = 1_000
#: bytes of what is said of a failure: in one line, and the end of the traceback
MOST_ERROR, MOST_TRACEBACK = 4_096, 65_536
#: with which control refuses whoever comes when nothing is left to do, and no fault is the sphere's own
RUN_OVER = "the run is over"


def encodable(text: str) -> str:
    r"""Return text that UTF-8 can hold: a lone surrogate, as in a file name that is no UTF-8, becomes ``\udcXX``."""
    return text.encode("utf-8", "backslashreplace").decode()


def is_encodable(text: str) -> bool:
    """Whether UTF-8 can hold it as it is."""
    return encodable(text) == text


def cut(text: str, most: int, *, end: bool = False) -> str:
    """Return text that UTF-8 can hold, of at most ``most`` bytes: its beginning, or with ``end`` its end."""
    part = text[-most:] if end else text[:most]  # a character is a byte at least: no more need be encoded
    data = part.encode("utf-8", "backslashreplace")
    if len(part) == len(text) and len(data) <= most:
        return data.decode()
    return (data[-most:] if end else data[: most - 4] + b" ...").decode("utf-8", "ignore")


def raised(error: BaseException) -> str:
    """Return the type and the words of an exception of anybody's code; the type alone where it cannot say more."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - a __str__ of its own can raise too
        return type(error).__name__
