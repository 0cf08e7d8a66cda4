"""Who takes part, by command: ``spawn``, ``drain``, ``terminate``, ``rebalance``, ``logs``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from control.cli.output import JsonFlag, VerboseFlag, put_json
from control.cli.remote import AddressFlag, RunDirFlag, ask
from spheres.errors import ArmillaryError, ConfigError, RefusedError, UnreachableError

if TYPE_CHECKING:
    from control.client import Client

__all__ = ["drain", "logs", "rebalance", "spawn", "terminate"]

SpheresArgument = Annotated[list[str], typer.Argument(metavar="SPHERE...", help="Ids, as `spheres` shows them.")]
ReasonFlag = Annotated[str, typer.Option(help="For the log.")]


def spawn(
    count: Annotated[int, typer.Argument(metavar="N", min=1, help="How many.")] = 1,
    address: AddressFlag = None,
    run_dir: RunDirFlag = None,
    json: JsonFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Start more spheres, where control's launcher does: by default as processes on its machine."""
    started = ask(address, run_dir, lambda client: client.spawn(count))
    local = bool(started) and isinstance(started[0], int)
    if json:
        put_json({"pids": started if local else [], "names": [] if local else started})
    else:
        typer.echo(f"started: {'process ' if local else ''}{', '.join(map(str, started))}")


def drain(
    spheres: SpheresArgument,
    reason: ReasonFlag = "control-cli drain",
    address: AddressFlag = None,
    run_dir: RunDirFlag = None,
    json: JsonFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Let spheres finish their step and leave."""
    _tell(spheres, lambda client, sphere: client.drain(sphere, reason), address, run_dir, json=json)


def terminate(
    spheres: SpheresArgument,
    reason: ReasonFlag = "control-cli terminate",
    address: AddressFlag = None,
    run_dir: RunDirFlag = None,
    json: JsonFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """End spheres at once; what they were computing is computed by others."""
    _tell(spheres, lambda client, sphere: client.terminate(sphere, reason), address, run_dir, json=json)


def rebalance(
    address: AddressFlag = None, run_dir: RunDirFlag = None, json: JsonFlag = False, verbose: VerboseFlag = 0
) -> None:
    """Place all spheres anew, between two steps."""
    moved, late = ask(address, run_dir, lambda client: client.rebalance())
    if json:
        put_json({"moved": moved, "late": late})
        return
    typer.echo(f"moved: {', '.join(moved)}" if moved else "everyone stands where it should")
    if late:
        typer.echo(f"not arrived in time, they look for a place by themselves: {', '.join(late)}")


def logs(
    sphere: Annotated[str, typer.Argument(metavar="SPHERE", help="Id, as `spheres` shows it; or local-N.")],
    lines: Annotated[int, typer.Option("-n", "--lines", metavar="N", min=1, max=1000, help="Most lines.")] = 100,
    address: AddressFlag = None,
    run_dir: RunDirFlag = None,
    json: JsonFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Print the end of a sphere's log, wherever it runs; of a local one that is gone, what its file has."""
    from control.run_dir import LATEST, log_lines, meant

    address, run_dir = meant(address, run_dir)

    async def question(client: Client) -> list[str]:
        try:
            return await client.logs(sphere, lines)
        except (ConfigError, UnreachableError) as error:
            found = log_lines(Path((await client.status()).run_dir), sphere, lines)
            if not found:
                raise error from None
            return found

    try:
        found = ask(address, run_dir, question)
    except (UnreachableError, RefusedError):
        # the run is over, perhaps: its files are there still
        found = [] if address else log_lines(run_dir or LATEST, sphere, lines)
        if not found:
            raise
    if json:
        put_json({"sphere": sphere, "lines": found})
    else:
        typer.echo("\n".join(found))


def _tell(
    spheres: list[str],
    tell: Callable[[Client, str], Awaitable[None]],
    address: str | None,
    run_dir: Path | None,
    *,
    json: bool,
) -> None:
    """Tell each of them, also after an error; what went wrong is raised at the end."""

    async def all_of_them(client: Client) -> tuple[list[str], list[ArmillaryError]]:
        told: list[str] = []
        errors: list[ArmillaryError] = []
        for sphere in dict.fromkeys(spheres):
            try:
                await tell(client, sphere)
            except ConfigError as error:
                errors.append(error)
            else:
                told.append(sphere)
        return told, errors

    told, errors = ask(address, run_dir, all_of_them)
    if json and told:
        put_json({"told": told})
    for sphere in told if not json else ():
        typer.echo(f"{sphere} is told")
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ConfigError("; ".join(map(str, errors)))
