"""``control-cli``: what is said on the command line, to a run and about it.

Commands import what they need when they run: ``--help`` and a mistyped flag must not wait for numpy and grpc.
"""

from __future__ import annotations

import typer

from control.cli import checkpoints, remote, start
from control.cli.output import EXIT_CODES, Commands

__all__ = ["app", "main"]

app = typer.Typer(
    cls=Commands,
    help="Train on a tree of spheres, and look after a run.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=start.WithResume)(start.start)
configuration = typer.Typer(help="The configuration of a run.", no_args_is_help=True)
configuration.command("show")(start.show_config)
app.add_typer(configuration, name="config")
for command in (remote.status, remote.watch, remote.spheres, remote.pause, remote.resume, remote.stop):
    app.command()(command)
app.add_typer(checkpoints.app, name="checkpoint")


def main() -> None:
    """Run the command that the arguments name."""
    app(prog_name="control-cli")
