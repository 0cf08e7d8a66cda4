"""What all commands share: help, ``--json`` and ``-v``, the one handler of errors, log lines, plain values."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from typer.core import TyperCommand, TyperGroup

from spheres.errors import ArmillaryError
from spheres.logs import VARIABLE, formatter

if TYPE_CHECKING:
    from google.protobuf.message import Message

__all__ = [
    "Command",
    "JsonFlag",
    "VerboseFlag",
    "console",
    "group",
    "log_to_stderr",
    "plain",
    "put_json",
    "rows",
    "run",
    "shows_json",
]

EXIT_CODES = (
    "Exit codes: 0 done, 1 any other error, 2 usage or configuration, 3 the task, 4 a checkpoint, "
    "5 nobody answers or a refusal, 6 the run's state does not allow it, 128 + N stopped by signal N (130 Ctrl+C). "
    "See docs/cli.md."
)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON, errors too.")]
VerboseFlag = Annotated[
    int,
    typer.Option("-v", "--verbose", count=True, help="Say more, with tracebacks; twice: debug.", show_default=False),
]


class Command(TyperCommand):
    """A command whose help has its flags in parts and ends with the exit codes."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        parts: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                default = "Arguments" if parameter.param_type_name == "argument" else "Options"
                parts.setdefault(getattr(parameter, "rich_help_panel", None) or default, []).append(record)
        for title, records in parts.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _write_exit_codes(formatter)


class _Group(TyperGroup):
    """Commands under one name; without one of them it shows its help, which is not what was asked for."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args:
            typer.echo(ctx.get_help(), err=True)
            raise typer.Exit(2)
        return super().parse_args(ctx, args)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _write_exit_codes(formatter)


def _write_exit_codes(formatter: Any) -> None:
    formatter.write_paragraph()
    formatter.write_text(EXIT_CODES)


def group(help: str) -> typer.Typer:
    """Return a group of commands. Plain help: what draws boxes costs a tenth of a second and half of the width."""
    return typer.Typer(
        cls=_Group,
        help=help,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def run(app: typer.Typer, words: Sequence[str]) -> int:
    """Run a command line and return its exit code. Every error ends here: one line on standard error, or JSON."""
    try:
        code = app(list(words), prog_name="control-cli", standalone_mode=False)
    except Exception as error:  # noqa: BLE001 - whatever it is, whoever typed the command wants one line
        # looked for in the words themselves: an error in the flags comes before these are read
        verbose = any(word == "--verbose" or (word[:2] == "-v" and set(word[1:]) == {"v"}) for word in words)
        as_json = "--json" in words or os.environ.get(VARIABLE) == "json"
        return _report(error, as_json=as_json, verbose=verbose)
    return code if isinstance(code, int) else 0


def _report(error: Exception, *, as_json: bool, verbose: bool) -> int:
    """Print the error on standard error; return the exit code."""
    details = getattr(error, "details", "") or ""  # a sphere's traceback
    code = int(getattr(error, "exit_code", 1))
    if hasattr(error, "format_message"):  # of a flag or argument
        path = getattr(getattr(error, "ctx", None), "command_path", "control-cli")
        message = error.format_message().rstrip(". ")
        text = f"{message}{'' if message.endswith('?') else ';'} see `{path} --help`"
    elif isinstance(error, ArmillaryError):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error} (not expected{'' if verbose else '; with -v there is a traceback'})"
    trace = "".join(traceback.format_exception(error)) if verbose else ""
    text = " ".join(text.split())
    if as_json:
        record = {"error": text, "type": type(error).__name__, "exit_code": code}
        record |= {key: value for key, value in (("details", details), ("traceback", trace)) if value}
        typer.echo(json.dumps(record), err=True)
    else:
        typer.echo(f"error: {text}", err=True)
        for more in (details, trace):
            if more:
                typer.echo(more.rstrip(), err=True)
    return code


def shows_json(json: bool) -> bool:
    """Whether what happens over time is printed as JSON lines: where asked for, and where nobody looks at it."""
    return json or not sys.stdout.isatty()


def put_json(value: object) -> None:
    typer.echo(json.dumps(value))


def console() -> Any:
    """Return a console on standard output; as wide as needed where that is no terminal."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 1000)


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


def log_to_stderr(verbose: int, names: Callable[[], Mapping[str, str]] = dict) -> None:
    """Send log lines to standard error: warnings, with -v all that happens, with -vv more than that.

    Their form is that of ARMILLARY_LOG_FORMAT; JSON lines have ``names()`` in them. Raises ConfigError.
    """
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    handler = _CurrentStderr()
    handler.setFormatter(formatter(os.environ.get(VARIABLE, ""), "%(levelname)s %(name)s: %(message)s", names))
    logging.basicConfig(level=level, handlers=[handler])
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
