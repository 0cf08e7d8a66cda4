"""``doctor``: runs the checks of ``control.doctor`` and those that need a socket or a process, and prints them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

import typer

from control.cli.output import JsonFlag, VerboseFlag, log_to_stderr, put_json
from control.cli.start import ConfigFlag, with_flags
from control.config import RunConfig
from control.config_sources import load_config
from spheres import set_environment
from spheres.errors import ConfigError, GradientError

if TYPE_CHECKING:
    from control.doctor import Result, Trial

__all__ = ["doctor"]

#: seconds that a fresh process has for one gradient
_CHILD_SECONDS = 300.0
_WIDTH = 16


@with_flags
def doctor(*, config: ConfigFlag = None, json: JsonFlag = False, verbose: VerboseFlag = 0, **flags: Any) -> None:
    """Check a task and a configuration before a run. Takes the flags of `start`; starts nothing, leaves nothing.

    Computes a gradient several times and compares the bits: randomness that a task hides breaks the promise that a run
    gives the same weights on any tree.
    """
    set_environment()
    log_to_stderr(verbose)
    run_config, _ = load_config(flags, os.environ, config)
    from control.doctor import check_directory, check_memory, check_other, check_shared_memory, check_task, check_wire
    from spheres.environment import machine_bytes

    results: list[Result] = []

    def found(more: Iterable[Result]) -> None:
        results.extend(more)
        if not json:
            for result in more:
                _print(result, verbose=bool(verbose))

    found([_port(run_config.listen)])
    with redirect_stdout(sys.stderr):  # what the task prints is none of our lines
        examined, trial = check_task(run_config)
    found(examined)
    if trial is not None:
        found([check_other(trial, _fresh_process(run_config), check="new process", when="in a new process")])
        found([check_memory(run_config, trial, machine_bytes()), check_wire(run_config, trial.manifest)])
    found([check_shared_memory(run_config)])
    found(check_directory(run_config, trial))
    failed = [result for result in results if result.state == "failed"]
    code = max((result.exit_code for result in failed), default=0)
    if json:
        checks = [
            {"check": r.check, "state": r.state, "message": r.message} | ({"details": r.details} if r.details else {})
            for r in results
        ]
        put_json({"ok": not failed, "exit_code": code, "checks": checks})
    else:
        counts = Counter(result.state for result in results)
        typer.echo(", ".join(f"{counts[state]} {state}" for state in ("ok", "warning", "failed") if counts[state]))
    if failed:
        if not json:
            names = ", ".join(dict.fromkeys(result.check for result in failed))
            more = "" if verbose else "; -v shows tracebacks"
            typer.echo(f"error: not fit for a run: {names}{more}", err=True)
        raise typer.Exit(code)


def _print(result: Result, *, verbose: bool) -> None:
    typer.echo(f"{result.state:<8}{result.check:<{_WIDTH}} {result.message}")
    if verbose and result.details:
        typer.echo("\n".join(f"        {line}" for line in result.details.rstrip().splitlines()))


def _port(address: str) -> Result:
    """Try to bind the address of control, and let it go again."""
    from control.doctor import Result

    host, _, port = address.rpartition(":")
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as bound:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(target)
            bound.listen()
    except OSError as error:
        text = f"cannot listen on {address}: {error.strerror}; give another --listen"
        return Result("port", "failed", text, ConfigError.exit_code)
    return Result("port", "ok", f"{address} can be listened on")


def _fresh_process(config: RunConfig) -> Trial | Exception:
    """Return the trial of a new process, as a sphere is one."""
    from control.doctor import read_answer

    command = [sys.executable, "-c", "from control.doctor import answer; answer()"]
    try:
        done = subprocess.run(
            command, input=config.to_json().encode(), capture_output=True, timeout=_CHILD_SECONDS, check=False
        )
        return read_answer(done.stdout)
    except subprocess.TimeoutExpired:
        return GradientError(f"no gradient within {_CHILD_SECONDS:g} s")
    except ValueError:
        last = done.stderr.decode(errors="replace").strip()
        return GradientError(f"it ended with code {done.returncode} and no gradient", last[-65_536:])
