"""``start`` and ``config show``: their flags are the keys of the configuration."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json as json_module
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from control.cli.output import Command, JsonFlag, VerboseFlag, console, log_to_stderr, put_json, rows, shows_json
from control.config import RunConfig, flat_paths, flatten
from control.config_sources import allowed, default_text, help_text, load_config
from spheres import set_environment
from spheres.errors import ConfigError
from spheres.logs import VARIABLE

if TYPE_CHECKING:
    from control.events import Event, RunHandle
    from control.training import Summary

__all__ = ["ConfigFlag", "WithResume", "panels", "show_config", "start", "with_flags"]

#: first key of each part of --help
_PANELS = {
    "task": "What is trained",
    "epochs": "How long",
    "batch_size": "The arithmetic of a step",
    "eval_every": "Evaluation",
    "spheres": "The tree",
    "run_dir": "What is kept and said",
}

_METAVARS = {
    "a whole number": "N", "a number": "X", "a duration": "TIME", "a size": "SIZE", "an interval": "INTERVAL",
    "a path": "PATH", "a text": "TEXT", "tables": "JSON", "name=value": "KEY=VALUE",
}  # fmt: skip


def panels() -> dict[str, list[str]]:
    """Return the parts of --help, each with its keys."""
    found: dict[str, list[str]] = {}
    panel = ""
    for key in flat_paths():
        panel = _PANELS.get(key, panel)
        found.setdefault(panel, []).append(key)
    return found


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one flag for each key; those that are not given stay None, so that other sources count."""
    signature = inspect.signature(command, eval_str=True)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    for panel, key in ((panel, key) for panel, keys in panels().items() for key in keys):
        name, words, default = f"--{key.replace('_', '-')}", allowed(key), default_text(key)
        text = help_text(key) + (f" (default {default})" if default else "")
        kind: Any = str | None
        metavar = next((m for start, m in _METAVARS.items() if words.startswith(start)), None)
        if metavar is None:
            metavar = "|".join(re.split(r", | or ", words.removesuffix(", or none")))
        if words.startswith("true"):
            kind, name, metavar = bool | None, f"{name}/--no-{name[2:]}", None
        elif key == "task_options":
            kind, name = list[str] | None, "--task-option"
        option = typer.Option(name, help=text, metavar=metavar, rich_help_panel=panel, show_default=False)
        parameters.append(
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])
        )
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return command


class WithResume(Command):
    """``--resume`` alone means the latest run; ``--resume PATH`` that one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        pairs = itertools.zip_longest(args, args[1:], fillvalue="-")
        args = ["--resume=" if word == "--resume" and after.startswith("-") else word for word, after in pairs]
        return super().parse_args(ctx, args)


ConfigFlag = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", envvar="ARMILLARY_CONFIG", help="Read keys from a TOML file.")
]
LogFormatFlag = Annotated[
    str | None,
    typer.Option(metavar="text|json", help="Log lines for people, or one JSON object a line (ARMILLARY_LOG_FORMAT)."),
]
ResumeFlag = Annotated[
    str | None,
    typer.Option(
        metavar="[PATH]",
        envvar="ARMILLARY_RESUME",
        help="Go on from a checkpoint: the latest, or that of a run directory or checkpoint directory. "
        "auto: go on if the run directory holds a run, else begin one.",
    ),
]
HoldFlag = Annotated[
    bool,
    typer.Option(
        "--hold",
        envvar="ARMILLARY_HOLD",
        help="When the run is over, go on to answer until SIGTERM or Ctrl+C, so that nobody starts it again.",
    ),
]


@with_flags
def start(
    *,
    config: ConfigFlag = None,
    resume: ResumeFlag = None,
    hold: HoldFlag = False,
    log_format: LogFormatFlag = None,
    json: JsonFlag = False,
    verbose: VerboseFlag = 0,
    **flags: Any,
) -> None:
    """Train: start control and its local spheres, and end with a summary.

    Each flag is also a key of the file and, as ARMILLARY_<KEY>, of the environment.
    A flag goes before the environment, the environment before the file.
    """
    # Until the run looks for signals itself: the first process of a container gets none that it has no handler for.
    with contextlib.suppress(ValueError):  # not the main thread: the caller's signals are the caller's
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
    set_environment()
    from control.run_dir import LATEST, wait_until_free

    if log_format is not None:
        os.environ[VARIABLE] = log_format  # for local spheres too
    naming = _Naming()
    log_to_stderr(verbose, naming.names.copy)
    saved = None
    if resume == "auto":
        where = _given_run_dir(flags["run_dir"], config) or LATEST
        wait_until_free(where)  # whoever starts control with these words starts it again elsewhere, too, and at once
        resume = "" if (where / "run.json").exists() else None
    if resume is not None:
        saved, resume, flags["run_dir"] = _resumed("" if resume == "latest" else resume, flags["run_dir"], config)
    run_config, _ = load_config(flags, os.environ, config, saved)
    summary = _train(run_config, resume, naming, hold=hold, json=json, verbose=verbose > 0)
    if summary.error is not None:
        raise summary.error
    if summary.reason in signal.Signals.__members__:
        # stopped in order, but not done: what comes after it in a script is not to run
        raise typer.Exit(128 + signal.Signals[summary.reason])


class _Naming:
    """A callback that learns the run's id, for log lines."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def on_train_start(self, event: Event, run: RunHandle) -> None:
        self.names["run_id"] = run.run_id


def _train(config: RunConfig, resume: str | None, naming: _Naming, *, hold: bool, json: bool, verbose: bool) -> Summary:
    """Train, and show the summary when the run is over."""
    import asyncio

    import uvloop

    from control.callbacks import Progress
    from control.training import run

    progress = Progress(json_lines=True if json else None)
    # what a task prints here must not get in between JSON lines
    as_json, stdout, shown = shows_json(json), sys.stdout, False

    def show(summary: Summary) -> None:
        nonlocal shown
        shown = True
        with contextlib.redirect_stdout(stdout):
            if as_json:
                put_json({"event": "summary", **summary.to_dict()})
            else:
                _print_summary(summary.to_dict())
            stdout.flush()

    aside = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    with aside, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        training = run(
            config, resume=resume, callbacks=[progress, naming], verbose=verbose, hold=show if hold else None
        )
        summary = runner.run(training)
    if not shown:
        show(summary)
    return summary


def _given_run_dir(run_dir: str | None, file: Path | None) -> Path | None:
    variable = {name: value for name, value in os.environ.items() if name == "ARMILLARY_RUN_DIR"}
    return load_config({"run_dir": run_dir}, variable, file)[0].run_dir


def _resumed(resume: str, run_dir: str | None, file: Path | None) -> tuple[dict[str, Any], str, str | None]:
    """Return the keys of the run that goes on, the checkpoint ("": its newest) and the run directory.

    Of the keys, all that are not given now stay as they were.
    """
    from control.checkpoint import read_snapshot
    from control.run_dir import LATEST, saved_config
    from control.store_fsspec import is_url

    given = _given_run_dir(run_dir, file)
    if is_url(resume):
        return flatten(RunConfig.from_json(read_snapshot(resume).run.config_json)), resume, run_dir
    path = Path(resume) if resume else given or LATEST
    if (path / "run.json").exists():
        if given is not None and given.resolve() != path.resolve():
            raise ConfigError(
                f"--resume {path}: a run goes on where it is, not in {given}; name one of its checkpoints"
            )
        config = RunConfig.from_json(json_module.dumps(saved_config(path)))
        return flatten(config), "", str(path.resolve())
    if not resume:
        raise ConfigError(f"no run to resume at {path}; give --run-dir DIR or --resume PATH")
    config = RunConfig.from_json(read_snapshot(path).run.config_json)
    home = path.resolve().parent.parent  # a copy may lie anywhere, and has none
    return flatten(config), resume, str(given or (home if (home / "run.json").exists() else "")) or None


def _print_summary(summary: dict[str, Any]) -> None:
    from control.callbacks.progress import format_seconds, format_value

    metrics = {"loss": summary.get("loss"), **(summary.get("metrics") or {})}
    sync, rate, spheres = (summary.get(key) for key in ("sync_fraction", "samples_per_second", "spheres"))
    rows(
        [
            ("state", summary.get("state")),
            ("steps", f"{summary['steps']:,}"),
            ("epochs", summary.get("epochs")),
            ("samples", f"{summary['samples']:,}"),
            *((name, format_value(name, value)) for name, value in metrics.items() if value is not None),
            ("time", format_seconds(summary.get("wall_seconds") or 0)),
            ("rate", f"{rate:,.0f} samples/s" if rate else None),
            ("in synchronisation", f"{sync:.1%}" if sync is not None else None),
            ("spheres", len(spheres) if isinstance(spheres, list) else spheres),
            ("weights_sha256", summary.get("weights_sha256")),
            ("mixed recompute", _mixed(summary.get("mixed_recompute"))),
            ("run directory", summary.get("run_dir")),
            ("report", summary.get("report")),
            (
                "go on with",
                f"control-cli start --resume {summary['run_dir']}" if summary["state"] != "completed" else None,
            ),
        ]
    )


def _mixed(count: int | None) -> str | None:
    if not count:
        return None
    return (
        f"{count:,} microbatches were lost and computed in another numeric environment, as none of their own was left: "
        "another run may give other bits"
    )


@with_flags
def show_config(*, config: ConfigFlag = None, json: JsonFlag = False, verbose: VerboseFlag = 0, **flags: Any) -> None:
    """Say what a run would be started with, and where each value comes from. Takes the flags of `start`."""
    run_config, origins = load_config(flags, os.environ, config)
    values = flatten(run_config)
    if json:
        put_json(
            {
                key: {"value": value, "origin": str(origins[key]), "source": origins[key].source}
                for key, value in values.items()
            }
        )
        return
    from rich.table import Table

    table = Table("key", "value", "from", box=None, pad_edge=False, header_style="bold")
    for key, value in values.items():
        origin = origins[key]
        style = "dim" if origin.source == "default" else ""
        table.add_row(key, "none" if value is None else str(value), str(origin), style=style)
    console().print(table)
