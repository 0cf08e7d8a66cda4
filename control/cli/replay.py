"""``replay``: steps of a run computed again on this machine, and compared with the journal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from control.cli.output import JsonFlag, VerboseFlag, log_to_stderr, put_json

if TYPE_CHECKING:
    from control.replay import Replay, ReplayedStep

__all__ = ["replay"]


def replay(
    step: Annotated[int, typer.Option("--step", metavar="K", min=0, help="Step to compute again, from 0.")],
    until: Annotated[
        int | None, typer.Option(metavar="L", min=0, help="Last step to compute again; none: K alone.")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", envvar="ARMILLARY_RUN_DIR", help="Run directory; none: the latest.")
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Replay even if task or data are not those of the run.")
    ] = False,
    json: JsonFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Compute steps of a run again, without a network, and compare them with its journal.

    It starts from the nearest checkpoint at or before step K, in one process, with the task and configuration of the
    run directory. Exit code 0: every digest is the recorded one; 1: one is not, and where it went wrong is said.
    """
    from control.replay import Replay
    from control.run_dir import LATEST

    log_to_stderr(verbose)
    made = Replay(run_dir or LATEST, step, until, anyway=anyway)
    shown: list[ReplayedStep] = []
    if not json:
        for note in made.notes:
            typer.echo(f"warning: {note}", err=True)
        typer.echo(f"from {_start(made)}, {made.last - made.start + 1} steps to compute")
    for done in _with_progress(made, hidden=json):
        if done.step >= made.first or not done.equal:
            shown.append(done)
            if not json:
                _put(done)
    equal = all(done.equal for done in shown)
    if json:
        begun = {"step": made.start, "checkpoint": None if made.checkpoint is None else made.checkpoint.path}
        where = {"run_dir": str(made.run_dir), "run_id": made.run_id, "from": begun, "notes": made.notes}
        put_json({**where, "equal": equal, "steps": [_plain(done) for done in shown]})
    if not equal:
        raise typer.Exit(1)


def _start(made: Replay) -> str:
    return "the initial weights" if made.checkpoint is None else f"checkpoint {made.checkpoint.path}"


def _with_progress(made: Replay, *, hidden: bool) -> Iterator[ReplayedStep]:
    """Yield the steps, with a bar on standard error where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    # lines go above the bar where both are on the terminal, and stay out of it where they go elsewhere
    above, off = sys.stdout.isatty(), hidden or not console.is_terminal
    with Progress(console=console, transient=True, disable=off, redirect_stdout=above) as bar:
        task = bar.add_task("computing", total=made.last - made.start + 1)
        for done in made.steps():
            yield done
            bar.advance(task)


def _put(done: ReplayedStep) -> None:
    if done.equal:
        decision = "" if done.decision == "applied" else f" ({done.decision})"
        typer.echo(f"step {done.step}: as recorded in term {done.term}{decision}, weights {done.computed}")
        return
    typer.echo(f"step {done.step}: not as recorded{f' in term {done.term}' if done.term is not None else ''}")
    for line in done.differences:
        typer.echo(f"  {line}")


def _plain(done: ReplayedStep) -> dict[str, Any]:
    blocks = [
        {
            "block": list(d.block),
            "sphere": d.sphere,
            "recorded_crc32c": d.recorded_crc32c,
            "computed_crc32c": d.computed_crc32c,
        }
        for d in done.blocks
    ]
    return {
        "step": done.step,
        "term": done.term,
        "equal": done.equal,
        "decision": done.decision,
        "recorded": done.recorded,
        "computed": done.computed,
        "differences": list(done.differences),
        "blocks": blocks,
    }
