"""``control-cli``: what is said on the command line, to a run and about it.

Commands import what they need when they run: ``--help`` and a mistyped flag must not wait for numpy and grpc.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from control.cli import chaos, checkpoints, membership, remote, start
from control.cli.conformance import conformance as conformance_command
from control.cli.doctor import doctor as doctor_command
from control.cli.output import Command, group, run
from control.cli.replay import replay as replay_command

__all__ = ["app", "main"]

app = group("Train on a tree of spheres, and look after a run.")


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"control-cli {version('armillary')}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = (
        False
    ),
) -> None:
    """Train on a tree of spheres, and look after a run."""


app.command(cls=start.WithResume)(start.start)
app.command(cls=Command)(doctor_command)
app.command(cls=Command)(replay_command)
app.command("conformance", cls=Command)(conformance_command)
configuration = group("The configuration of a run.")
configuration.command("show", cls=Command)(start.show_config)
app.add_typer(configuration, name="config")
for command in (remote.status, remote.watch, remote.spheres, remote.pause, remote.resume, remote.stop):
    app.command(cls=Command)(command)
for change in (membership.spawn, membership.drain, membership.terminate, membership.rebalance, membership.logs):
    app.command(cls=Command)(change)
app.command(cls=Command)(chaos.chaos)
app.add_typer(checkpoints.app, name="checkpoint")


def main() -> None:
    """Run the command that the arguments name."""
    sys.exit(run(app, sys.argv[1:]))
