"""``chaos``: kills and stops processes of a running tree, and says how long each time until training goes on."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from control.cli.output import JsonFlag, VerboseFlag, console, put_json, shows_json
from control.cli.remote import AddressFlag, RunDirFlag
from spheres.errors import ConfigError

__all__ = ["chaos"]


def chaos(
    kill: Annotated[str, typer.Option(metavar="RATE", help="SIGKILLs of spheres, such as 0.2/s or 6/m.")] = "0",
    stop: Annotated[str, typer.Option(metavar="RATE", help="SIGSTOPs of spheres, the same way.")] = "0",
    stop_for: Annotated[str, typer.Option(metavar="TIME", help="From SIGSTOP to SIGCONT.")] = "3s",
    control_kill: Annotated[
        int, typer.Option(metavar="N", min=0, help="SIGKILLs of control, which is started again with --resume.")
    ] = 0,
    targets: Annotated[
        Literal["leaf", "inner", "any"], typer.Option(help="Which spheres: by what they are at that moment.")
    ] = "any",
    duration: Annotated[str, typer.Option(metavar="TIME", help="How long.")] = "60s",
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of times and victims.")] = 0,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all of it to a file, as JSON.")] = None,
    address: AddressFlag = None,
    run_dir: RunDirFlag = None,
    json: JsonFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Kill and stop spheres of this machine at random; say how long each time until the next step is committed."""
    import asyncio

    from control.chaos import parse_rate, schedule
    from control.storm import Storm
    from spheres.units import parse_duration

    try:
        rates = {"kill": parse_rate(kill), "stop": parse_rate(stop)}
        seconds, pause = parse_duration(duration), parse_duration(stop_for)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    faults = schedule(rates, duration=seconds, seed=seed, control_kills=control_kill)
    if not faults:
        raise ConfigError("no fault in all that time: give --kill, --stop or --control-kill, or a longer --duration")
    lines = shows_json(json)

    def say(record: dict[str, Any]) -> None:
        put_json(record) if lines else typer.echo(_words(record))

    storm = Storm(address, run_dir, say=say, targets=targets, stop_seconds=pause)
    code = 0
    try:
        asyncio.run(storm.run(faults, seconds))
    except (KeyboardInterrupt, asyncio.CancelledError) as end:  # what has been done by then is to be said all the same
        code = 130 if isinstance(end, KeyboardInterrupt) else 143
    result = {"seed": seed, **storm.result()}
    if report is not None:
        try:
            report.write_text(json_module.dumps(result, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {report}: {error.strerror}") from error
    if lines:
        put_json({"event": "chaos", **result})
    else:
        _put_table(result)
    if storm.error is not None:
        raise storm.error
    if code:
        raise typer.Exit(code)


def _words(record: dict[str, Any]) -> str:
    match record["event"]:
        case "fault":
            what = {"kill": "SIGKILL", "stop": "SIGSTOP", "control": "SIGKILL"}[record["kind"]]
            return f"{record['at']:7.2f} s  {what} {record['sphere']} ({record['role']}), step {record['step']}"
        case "went_on":
            return f"           next step {record['seconds'] * 1000:.0f} ms after {record['kind']} {record['sphere']}"
        case "refused":
            return f"           {record['sphere']} is left alone: {record['why']}"
        case "continued":
            return f"           SIGCONT {record['pid']}"
        case "control_started":
            return f"           control is started again (process {record['pid']})"
    return f"           {record['event']}: {record.get('why', '')}"


def _put_table(result: dict[str, Any]) -> None:
    from rich.table import Table

    shown = Table("kind", "role", "faults", "no step after", "median", "worst", box=None, pad_edge=False)
    for row in result["table"]:
        times = (f"{row[key]:.3f} s" if row[key] is not None else "-" for key in ("median_seconds", "worst_seconds"))
        shown.add_row(row["kind"], row["role"], str(row["faults"]), str(row["without_commit"]), *times)
    console().print(shown)
    typer.echo(f"{result['steps']} steps in that time")
