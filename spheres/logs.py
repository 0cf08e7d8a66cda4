"""How log lines look: text for people, or one JSON object a line for what collects the logs of containers.

Where they go, and from which level on, is the commands' affair.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

from spheres.errors import ConfigError

__all__ = ["VARIABLE", "JsonFormatter", "formatter", "is_json", "json_asked", "said_error"]

#: of the environment; local spheres and a control that is started again inherit it
VARIABLE = "ARMILLARY_LOG_FORMAT"


class JsonFormatter(logging.Formatter):
    """``time`` (RFC 3339, UTC), ``level``, ``logger``, ``message``, ``names()``; ``exception`` and ``stack`` if any.

    ``names`` gives what is known of this process by now, such as ``run_id`` and ``sphere_id``.
    """

    def __init__(self, names: Callable[[], Mapping[str, str]] = dict) -> None:
        super().__init__()
        self._names = names

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds")[:-6] + "Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self._names(),
        }
        if record.exc_info and record.exc_info[0]:  # three times None: there was none to be told of
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        return json.dumps(line)


def formatter(kind: str, text: str, names: Callable[[], Mapping[str, str]] = dict) -> logging.Formatter:
    """Return what makes log lines of this kind; ``text`` is the pattern of the text form. Raises ConfigError."""
    if not is_json(kind):
        return logging.Formatter(text)
    logging.captureWarnings(True)  # they would be lines of another kind
    return JsonFormatter(names)


def is_json(kind: str) -> bool:
    """Whether a log format, "" for the default, is JSON. Raises ConfigError where it is none."""
    if kind not in ("", "text", "json"):
        raise ConfigError(f"log format {kind!r} (--log-format or {VARIABLE}): allowed: text or json")
    return kind == "json"


def json_asked(words: Sequence[str]) -> bool:
    """Whether flags that may be wrong, or else the environment, ask for JSON: of what is wrong one is told so, too."""
    kind = os.environ.get(VARIABLE, "")
    for word, following in zip(words, [*words, ""][1:], strict=True):
        flag, _, value = word.partition("=")
        if flag == "--log-format":
            kind = value or following
    return kind == "json"


def said_error(line: str) -> str:
    """Return the error with which a command ended, from the last line of its log in either form; "" for none."""
    if line.startswith("error: "):
        return line.removeprefix("error: ")
    try:
        said = json.loads(line)
        return str(said["message"]) if said["level"] == "ERROR" else ""
    except (ValueError, KeyError, TypeError):
        return ""
