"""What all commands share: ``--json`` and ``-v``, the one handler of errors, log lines, messages as plain values."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from spheres.errors import ArmillaryError

if TYPE_CHECKING:
    from google.protobuf.message import Message

__all__ = ["EXIT_CODES", "Commands", "JsonFlag", "VerboseFlag", "console", "log_to_stderr", "plain", "put_json", "rows"]

EXIT_CODES = (
    "Exit codes: 0 done, 1 any other error, 2 usage or configuration, 3 the task, 4 a checkpoint, "
    "5 nobody answers or a refusal, 6 the run's state does not allow it, 130 Ctrl+C. See docs/cli.md."
)


def _remember(context: typer.Context, parameter: typer.CallbackParam, value: Any) -> Any:
    context.meta[f"armillary.{parameter.name}"] = value  # for the handler of errors, in whatever command
    return value


JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.", callback=_remember)]
VerboseFlag = Annotated[
    int, typer.Option("-v", "--verbose", count=True, help="Say more; tracebacks too. Twice: debug.", callback=_remember)
]


class Commands(TyperGroup):
    """The group of all commands: turns an error into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            message = getattr(error, "format_message", None)  # the error of a flag or argument
            if message is not None and not message():
                raise typer.Exit(2) from error  # a group without a command has shown its help
            as_json, verbose = (ctx.meta.get(f"armillary.{name}") for name in ("json", "verbose"))
            raise typer.Exit(_report(error, as_json=bool(as_json), verbose=bool(verbose))) from error


def _report(error: Exception, *, as_json: bool, verbose: bool) -> int:
    """Print the error on standard error; return the exit code."""
    details = getattr(error, "details", "") or ""  # a sphere's traceback
    code = int(getattr(error, "exit_code", 1))
    if hasattr(error, "format_message"):
        path = getattr(getattr(error, "ctx", None), "command_path", "control-cli")
        text = f"{error.format_message()} See `{path} --help`."
    elif isinstance(error, ArmillaryError):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error} (not expected; with -v there is a traceback)"
    if as_json:
        record = {"error": text, "type": type(error).__name__, "exit_code": code}
        typer.echo(json.dumps(record | ({"details": details} if details else {})), err=True)
    else:
        typer.echo("error: " + " ".join(text.split()), err=True)
        if details:
            typer.echo(details.rstrip(), err=True)
    if verbose:
        typer.echo("".join(traceback.format_exception(error)).rstrip(), err=True)
    return code


def put_json(value: object) -> None:
    typer.echo(json.dumps(value))


def console() -> Any:
    """Return a console on standard output; as wide as needed where that is no terminal."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def rows(pairs: Iterable[tuple[str, object]]) -> None:
    """Print names and values in two columns; what is empty or None is left out."""
    shown = [(name, str(value)) for name, value in pairs if value not in (None, "")]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        typer.echo(f"{name:<{width}}  {value}")


class _CurrentStderr(logging.StreamHandler[TextIO]):
    """Writes to what standard error is at that moment: a live display takes its place to keep lines whole."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def log_to_stderr(verbose: int) -> None:
    """Send log lines to standard error: warnings, with -v all that happens, with -vv more than that."""
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    handler = _CurrentStderr()
    logging.basicConfig(level=level, handlers=[handler], format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("asyncio").setLevel(max(level, logging.WARNING))


def plain(message: Message) -> dict[str, Any]:
    """Return a message as JSON values under the names of the proto; whole numbers stay numbers."""
    return {field.name: _plain(getattr(message, field.name), field) for field in message.DESCRIPTOR.fields}


def _plain(value: Any, field: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if field.enum_type is not None:
        prefix = "".join("_" + c if c.isupper() else c.upper() for c in field.enum_type.name).lstrip("_")
        return field.enum_type.values_by_number[value].name.removeprefix(prefix + "_").lower()
    if isinstance(value, Mapping) or hasattr(value, "items"):
        return dict(sorted(value.items()))
    if isinstance(value, str | int | float):
        return value
    if hasattr(value, "ToJsonString"):
        return value.ToJsonString() if hasattr(value, "ToDatetime") else value.ToNanoseconds() / 1e9
    if hasattr(value, "DESCRIPTOR"):
        return plain(value)
    return [plain(item) if hasattr(item, "DESCRIPTOR") else item for item in value]
