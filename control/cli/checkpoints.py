"""``checkpoint create|list|restore`` of a running control, ``checkpoint inspect|verify`` of a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from control.cli.output import Command, JsonFlag, VerboseFlag, console, group, plain, put_json, rows
from control.cli.remote import AddressFlag, RunDirFlag, ask, put_run
from spheres.errors import CheckpointError

__all__ = ["app"]

app = group("Save, list, restore, inspect and verify checkpoints.")

PathArgument = Annotated[Path, typer.Argument(metavar="PATH", help="Checkpoint directory, such as .../step-000000123.")]


@app.command(cls=Command)
def create(
    address: AddressFlag = None, run_dir: RunDirFlag = None, json: JsonFlag = False, verbose: VerboseFlag = 0
) -> None:
    """Save a checkpoint after the step in hand."""
    saved = ask(address, run_dir, lambda client: client.create_checkpoint())
    if json:
        put_json(plain(saved))
    else:
        typer.echo(saved.path)


@app.command("list", cls=Command)
def list_(
    address: AddressFlag = None, run_dir: RunDirFlag = None, json: JsonFlag = False, verbose: VerboseFlag = 0
) -> None:
    """List the checkpoints of the run, newest first."""
    found = ask(address, run_dir, lambda client: client.list_checkpoints())
    if json:
        put_json([plain(checkpoint) for checkpoint in found])
        return
    from rich.table import Table

    from control.callbacks.progress import format_value

    table = Table("name", "step", "saved", "MB", "metrics", "", box=None, pad_edge=False, header_style="bold")
    for c in found:
        saved = c.create_time.ToDatetime().strftime("%Y-%m-%d %H:%M:%S UTC")
        metrics = ", ".join(f"{name} {format_value(name, value)}" for name, value in sorted(c.metrics.items()))
        table.add_row(c.name, f"{c.step:,}", saved, f"{c.size_bytes / 1e6:.1f}", metrics, "best" if c.best else "")
    console().print(table)


@app.command(cls=Command)
def restore(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `list` shows it; none: the newest.")] = "",
    address: AddressFlag = None,
    run_dir: RunDirFlag = None,
    json: JsonFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Take the running run back (or forward) to a checkpoint; it goes on from there."""
    put_run(ask(address, run_dir, lambda client: client.restore_checkpoint(name)), json=json, short=True)


@app.command(cls=Command)
def inspect(path: PathArgument, json: JsonFlag = False, verbose: VerboseFlag = 0) -> None:
    """Say what is in a checkpoint. Needs no control."""
    from control.checkpoint import inspect as read

    values = read(path)
    if json:
        put_json(values)
        return
    tensors = values.pop("tensors", [])
    rows((key, ", ".join(f"{k} {v}" for k, v in value.items()) if key == "metrics" else value)
         for key, value in values.items() if isinstance(value, str | int | float) or key == "metrics")  # fmt: skip
    typer.echo("tensors")
    for tensor in tensors:
        typer.echo(f"  {tensor['name']} {tensor['dtype']}{tensor['shape']} norm {tensor['norm']:.6g}")


@app.command(cls=Command)
def verify(path: PathArgument, json: JsonFlag = False, verbose: VerboseFlag = 0) -> None:
    """Check every byte of a checkpoint. Needs no control; exit code 4 where it does not verify."""
    from control.checkpoint import verify as check

    problems = [str(problem) for problem in check(path)]
    if json:
        put_json({"path": str(path), "ok": not problems, "problems": problems})
    if problems:
        raise CheckpointError(f"{path} does not verify: {'; '.join(problems)}")
    if not json:
        typer.echo(f"{path}: every byte verifies")
