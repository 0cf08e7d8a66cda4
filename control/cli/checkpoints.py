"""``checkpoint create|list|restore`` of a running control; ``inspect|verify|diff|export`` of a directory or URL."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from control.cli.output import Command, JsonFlag, VerboseFlag, console, group, plain, put_json, rows
from control.cli.remote import AddressFlag, RunDirFlag, ask, put_run
from spheres.errors import CheckpointError

__all__ = ["app"]

app = group("Save, list, restore, inspect, verify, compare and export checkpoints.")

PathArgument = Annotated[
    str, typer.Argument(metavar="PATH", help="Checkpoint directory or URL, such as .../step-000000123.")
]


@app.command(cls=Command)
def create(
    address: AddressFlag = None, run_dir: RunDirFlag = None, json: JsonFlag = False, verbose: VerboseFlag = 0
) -> None:
    """Save a checkpoint after the step in hand."""
    saved = ask(address, run_dir, lambda client: client.checkpoint())
    if json:
        put_json(plain(saved))
    else:
        typer.echo(saved.path)


@app.command("list", cls=Command)
def list_(
    address: AddressFlag = None, run_dir: RunDirFlag = None, json: JsonFlag = False, verbose: VerboseFlag = 0
) -> None:
    """List the checkpoints of the run, newest first."""
    found = ask(address, run_dir, lambda client: client.checkpoints())
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
    put_run(ask(address, run_dir, lambda client: client.restore(name)), json=json, short=True)


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


@app.command(cls=Command)
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Checkpoint directory or URL.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    json: JsonFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Say how two checkpoints differ. Exit code 1 where training would not go on from both to the same bits."""
    from control.checkpoint_diff import diff as compare

    found = compare(a, b)
    if json:
        put_json(found)
    else:
        _put_difference(found)
    if not found["equal"]:
        raise typer.Exit(1)


def _put_difference(found: dict[str, Any]) -> None:
    for key, (one, other) in {**found["values"], **found["config"]}.items():
        typer.echo(f"{key}: {one} -> {other}")
    for side in ("a", "b"):
        for name in found[f"only_in_{side}"]:
            typer.echo(f"{name}: only in {found[side]}")
    for tensor in found["tensors"]:
        if "shapes" in tensor:
            typer.echo(f"{tensor['name']}: shape {tensor['shapes'][0]} -> {tensor['shapes'][1]}")
            continue
        numbers = {key: float(tensor[key]) for key in ("max_abs", "relative_norm")}  # "NaN" too
        typer.echo(
            f"{tensor['name']}: {tensor['differing']:,} of {tensor['elements']:,} elements differ, "
            f"by at most {numbers['max_abs']:.3g} or {tensor['max_ulp']:,} ulp; "
            f"relative norm {numbers['relative_norm']:.3g}"
        )
    if found["equal"]:
        typer.echo("equal: training goes on from both to the same bits")


@app.command(cls=Command)
def export(
    path: PathArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to write, such as weights.safetensors.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file where it exists.")] = False,
    json: JsonFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Write the weights of a checkpoint as a safetensors file, every byte checked first. Needs no control."""
    from control.checkpoint import export as write

    written = write(path, file, force=force)
    if json:
        put_json(written)
    else:
        typer.echo(written["path"])
