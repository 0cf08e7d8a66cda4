"""``conformance``: plays control and the parent against a worker, and prints what passed."""

from __future__ import annotations

import shutil
import socket
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from control.cli.output import JsonFlag, VerboseFlag, log_to_stderr, put_json
from spheres import set_environment
from spheres.errors import ConfigError

if TYPE_CHECKING:
    from control.conformance import Case, Result

__all__ = ["conformance"]

#: of the exchange, and of what the worker printed, with a case that failed
_LINES = 16
_WIDTH = 18
#: what a run is where a flag does not say otherwise: small, of several chunks, with microbatches of unequal size
_SMALL = {
    "microbatches": "8",
    "batch_size": "50",
    "chunk_bytes": "4096",
    "window_chunks": "2",
    "eval_microbatches": "4",
}


def conformance(
    command: Annotated[
        list[str] | None, typer.Argument(metavar="[-- COMMAND...]", help="What starts the worker; none: wait for one.")
    ] = None,
    case: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Run this case; may be repeated.")] = None,
    show: Annotated[bool, typer.Option("--list", help="List the cases, and start nothing.")] = False,
    timeout: Annotated[str, typer.Option(metavar="TIME", help="Time that each case has.")] = "30s",
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the worker finds control.")] = "127.0.0.1:0",
    log_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep here what each worker prints, and what was said.")
    ] = None,
    task: Annotated[str | None, typer.Option(metavar="TEXT", help="Task: a built-in name or module:attribute.")] = None,
    task_option: Annotated[
        list[str] | None, typer.Option("--task-option", metavar="KEY=VALUE", help="Options given to the task.")
    ] = None,
    seed: Annotated[str | None, typer.Option(metavar="N", help="Seed of weights and samples.")] = None,
    batch_size: Annotated[str | None, typer.Option(metavar="N", help="Samples of a step (50).")] = None,
    microbatches: Annotated[str | None, typer.Option(metavar="N", help="Microbatches of a step (8).")] = None,
    eval_microbatches: Annotated[str | None, typer.Option(metavar="N", help="Slices of the test split (4).")] = None,
    chunk_bytes: Annotated[str | None, typer.Option(metavar="SIZE", help="Bytes of a chunk (4096).")] = None,
    window_chunks: Annotated[str | None, typer.Option(metavar="N", help="Window in chunks (2).")] = None,
    json: JsonFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Play control and the parent against a worker in any language, frame by frame, and print what passed.

    COMMAND is started anew for each case, with ARMILLARY_CONTROL set to the address where control is played. Exit
    code 0: all cases passed; 1: one has failed, and what was expected and what came is said.
    """
    from control.config_sources import load_config
    from control.conformance import CASES
    from spheres.units import parse_duration

    set_environment()
    log_to_stderr(max(0, verbose - 1))
    chosen = _chosen(CASES, case or [])
    if show:
        _list(chosen, json=json)
        return
    flags: dict[str, Any] = {
        **_SMALL,
        **{key: value for key, value in {
            "task": task, "task_options": task_option, "seed": seed, "batch_size": batch_size,
            "microbatches": microbatches, "eval_microbatches": eval_microbatches, "chunk_bytes": chunk_bytes,
            "window_chunks": window_chunks, "listen": listen,
        }.items() if value},
    }  # fmt: skip
    config, _ = load_config(flags, {})
    if not command:
        config = config.model_copy(update={"listen": _fixed(config.listen)})
    try:
        seconds = parse_duration(timeout)
    except ValueError as error:
        raise ConfigError(f"--timeout: {error}") from None
    if command and shutil.which(command[0]) is None:
        raise ConfigError(f"{command[0]!r} is no program: give the worker's command after --")
    folder = Path(tempfile.mkdtemp(prefix="conformance-")) if log_dir is None else log_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}") from None
    results: list[Result] = []
    try:
        _play(chosen, config, command, seconds, folder, results, json=json, verbose=verbose)
    finally:
        failed = any(result.state == "failed" for result in results)
        if log_dir is None and not failed:
            shutil.rmtree(folder, ignore_errors=True)
        if not json and results:
            counts = Counter(result.state for result in results)
            said = [f"{counts[state]} {state}" for state in ("passed", "failed", "skipped") if counts[state]]
            typer.echo(", ".join(said) + (f"; logs in {folder}" if failed or log_dir is not None else ""))
    if any(result.state == "failed" for result in results):
        raise typer.Exit(1)


def _fixed(address: str) -> str:
    """Return the address with a port that stays the same from case to case, for workers that are started by others."""
    host, _, port = address.rpartition(":")
    if port != "0":
        return address
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host.strip("[]"), 0))
        return f"{host}:{probe.getsockname()[1]}"


def _chosen(cases: dict[str, Case], names: list[str]) -> list[Case]:
    from difflib import get_close_matches

    for name in names:
        if name not in cases:
            close = get_close_matches(name, cases, 1)
            raise ConfigError(f"no case {name!r}{f': did you mean {close[0]}?' if close else ''}; --list names them")
    return [cases[name] for name in names] if names else list(cases.values())


def _list(cases: list[Case], *, json: bool) -> None:
    for case in cases:
        if json:
            put_json({"case": case.name, "rules": case.rules, "title": case.title})
        else:
            typer.echo(f"{case.name:<{_WIDTH}} {case.title} ({case.rules})")


def _play(
    cases: list[Case],
    config: Any,
    command: list[str] | None,
    seconds: float,
    folder: Path,
    results: list[Result],
    *,
    json: bool,
    verbose: int,
) -> None:
    import asyncio

    from control.conformance import play_case
    from spheres.task import load_task
    from spheres.worker import limit_threads

    limit_threads()
    task = load_task(config.task, config.task_options)

    def say(line: str) -> None:
        typer.echo(line, err=True)

    async def run() -> None:
        for case in cases:
            log = folder / f"{case.name}.log"
            log.unlink(missing_ok=True)
            result = await play_case(
                case,
                task,
                config,
                command or None,
                seconds=seconds,
                log=log,
                say=say,
            )
            if result.exchange:
                (folder / f"{case.name}.exchange").write_text("\n".join(result.exchange) + "\n")
            results.append(result)
            put_json(_plain(result)) if json else _print(result, log, verbose=verbose)

    # asyncio's own loop: a signal that comes while a process is being started must not be lost
    asyncio.run(run())


def _print(result: Result, log: Path, *, verbose: int) -> None:
    state = "FAILED" if result.state == "failed" else result.state
    typer.echo(f"{state:<8}{result.case.name:<{_WIDTH}} {result.seconds:5.1f} s  {result.note or result.case.title}")
    if result.state == "failed":
        typer.echo(f"        rule      {result.rule} (docs/protocol.md)")
        typer.echo(f"        expected  {result.expected}")
        typer.echo(f"        came      {' '.join(result.came.split())}")
    if result.state == "failed" or verbose:
        for line in result.exchange if verbose else result.exchange[-_LINES:]:
            typer.echo(f"        {line}")
    if verbose and log.exists():
        for line in log.read_text(errors="replace").splitlines():
            typer.echo(f"        | {line}")
    elif result.state == "failed":
        for line in result.output:
            typer.echo(f"        | {line}")


def _plain(result: Result) -> dict[str, Any]:
    plain: dict[str, Any] = {"case": result.case.name, "state": result.state, "seconds": round(result.seconds, 3)}
    for key in ("note", "rule", "expected", "came"):
        if getattr(result, key):
            plain[key] = getattr(result, key)
    if result.state == "failed":
        plain |= {"exchange": list(result.exchange[-_LINES:]), "output": list(result.output)}
    return plain
