"""Commands to a running control: ``status``, ``watch``, ``spheres``, ``pause``, ``resume``, ``stop``."""

from __future__ import annotations

import json as json_module
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from control.cli.output import JsonFlag, VerboseFlag, console, plain, put_json, rows, shows_json
from spheres.errors import RunStateError

if TYPE_CHECKING:
    from control.client import Client
    from spheres.v1 import control_pb2 as pb

__all__ = ["AddressFlag", "RunDirFlag", "ask", "pause", "resume", "spheres", "status", "stop", "watch"]

T = TypeVar("T")

#: seconds between two steps that are printed, as with ``start``; the journal has them all
STEP_SECONDS = 0.1
#: seconds from which on the age of a report is worth a word
OLD_SECONDS = 5.0

# the environment is read by ``control.run_dir.meant``: what a flag says must win over both variables
AddressFlag = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Address of control. [env var: ARMILLARY_CONTROL]")
]
RunDirFlag = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Run directory that has it; none: the latest. [env var: ARMILLARY_RUN_DIR]"),
]


def ask(address: str | None, run_dir: Path | None, question: Callable[[Client], Awaitable[T]]) -> T:
    """Return the answer of the control that the flags mean."""
    import asyncio

    from control.client import Client

    async def answer() -> T:
        async with Client(address, run_dir=run_dir) as client:
            return await question(client)

    return asyncio.run(answer())


def status(
    address: AddressFlag = None, run_dir: RunDirFlag = None, json: JsonFlag = False, verbose: VerboseFlag = 0
) -> None:
    """Say how the run is: step, loss, rates, where the time goes, spheres."""
    put_run(ask(address, run_dir, lambda client: client.status()), json=json)


def pause(
    address: AddressFlag = None, run_dir: RunDirFlag = None, json: JsonFlag = False, verbose: VerboseFlag = 0
) -> None:
    """Finish the step in hand, then wait."""
    put_run(ask(address, run_dir, lambda client: client.pause()), json=json, short=True)


def resume(
    address: AddressFlag = None, run_dir: RunDirFlag = None, json: JsonFlag = False, verbose: VerboseFlag = 0
) -> None:
    """Go on after a pause."""
    put_run(ask(address, run_dir, lambda client: client.resume()), json=json, short=True)


def stop(
    address: AddressFlag = None,
    run_dir: RunDirFlag = None,
    reason: Annotated[str, typer.Option(help="For the log.")] = "control-cli stop",
    json: JsonFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Finish the step in hand, checkpoint, end."""
    put_run(ask(address, run_dir, lambda client: client.stop(reason)), json=json, short=True)


def watch(
    address: AddressFlag = None,
    run_dir: RunDirFlag = None,
    after: Annotated[
        int, typer.Option(metavar="N", min=0, help="Number of the last event seen; 0: from now on.", show_default=False)
    ] = 0,
    every: Annotated[bool, typer.Option("--all", help="Print every step, not ten a second.")] = False,
    json: JsonFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Print what happens until the run is over. JSON lines with --json or where the output is no terminal."""
    lines = shows_json(json)

    async def follow(client: Client, last: int) -> None:
        seen, shown_at = False, -math.inf
        try:
            async for event in client.watch(last):
                seen = True
                if event.name == "step" and not every:
                    if time.monotonic() - shown_at < STEP_SECONDS:
                        continue
                    shown_at = time.monotonic()
                if lines:
                    put_json({"event_id": event.id, "event": event.name, **event.record})
                else:
                    typer.echo(_event_line(event.name, event.record))
        except RunStateError as error:
            if not seen:
                raise
            typer.echo(f"control was started again: {error}; this goes on from now", err=True)
            await follow(client, 0)

    ask(address, run_dir, lambda client: follow(client, after))


def spheres(
    every: Annotated[bool, typer.Option("--all", help="Those that are lost too; with --json they always are.")] = False,
    address: AddressFlag = None,
    run_dir: RunDirFlag = None,
    json: JsonFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Show the tree of spheres and what each has done."""
    found = ask(address, run_dir, lambda client: client.spheres())
    if json:
        put_json([plain(sphere) for sphere in found])
        return
    from rich.tree import Tree

    top = Tree("control")
    lost = sum(1 for sphere in found if sphere.state == "lost")
    if not every:
        found = [sphere for sphere in found if sphere.state != "lost"]
    below: dict[str, list[pb.Sphere]] = {}
    names = {sphere.sphere_id for sphere in found}
    for sphere in found:  # who has no parent that is known hangs below control
        below.setdefault(sphere.parent_id if sphere.parent_id in names else "", []).append(sphere)
    waiting = [(top, sphere) for sphere in reversed(below.pop("", []))]
    while waiting or below:
        if not waiting:  # a circle of old news
            waiting = [(top, sphere) for sphere in below.pop(next(iter(below)))]
        branch, sphere = waiting.pop()
        new = branch.add(_sphere_line(sphere))
        waiting += [(new, child) for child in reversed(below.pop(sphere.sphere_id, []))]
    console().print(top, markup=False)
    if lost and not every:
        typer.echo(f"{lost} lost; --all shows them")


def put_run(run: pb.Run, *, json: bool, short: bool = False) -> None:
    from control.callbacks.progress import format_rate, format_value
    from control.client import state_name

    if json:
        values = plain(run)
        values["config"] = json_module.loads(values.pop("config_json") or "{}")
        put_json(values)
        return
    state = state_name(run) + (f" ({run.reason})" if run.reason else "")
    part = f", {run.step / run.total_steps:.0%}" if run.total_steps else ""
    pairs: list[tuple[str, object]] = [
        ("run", run.run_id),
        ("state", state),
        ("step", f"{run.step:,}/{run.total_steps:,} (epoch {run.epoch}{part})"),
    ]
    if not short:
        rates = dict(run.rates)
        texts = [
            f"{rates.pop(f'{name}_per_second'):,.1f} {name}/s"
            for name in ("steps", "samples")
            if f"{name}_per_second" in rates
        ]
        texts += [
            f"{format_rate(rates[f'{way}_bytes_per_second'])} {way}"
            for way in ("up", "down")
            if f"{way}_bytes_per_second" in rates
        ]
        pairs += [
            *((name, format_value(name, value)) for name, value in sorted(run.metrics.items())),
            ("rates", ", ".join(texts)),
            ("time", _shares(run.phase_seconds)),
            ("bottleneck", run.bottleneck),
            ("mixed recompute", f"{run.mixed_recomputes_count:,} microbatches" if run.mixed_recomputes_count else ""),
            ("spheres", f"{run.living_spheres_count}/{run.known_spheres_count}"),
            ("parameters", f"{run.parameters_count:,}"),
            ("checkpoint", run.latest_checkpoint),
            ("run directory", run.run_dir),
        ]
    rows([*pairs, ("error", run.error)])


def _shares(seconds: Mapping[str, float]) -> str:
    total = sum(seconds.values())
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return (
        ", ".join(f"{name} {value / total:.0%}" for name, value in ordered if value >= 0.005 * total) if total else ""
    )


def _sphere_line(sphere: pb.Sphere) -> str:
    report = sphere.report
    age = sphere.report_age.ToNanoseconds() / 1e9
    texts = [
        f"{sphere.sphere_id} {sphere.state}" + (f" ({sphere.reason})" if sphere.reason else ""),
        f"{report.role} on {report.host}:{report.pid}{f', {report.wire}' if report.wire else ''}".lstrip()
        if report.host
        else "",
        # most are in Python, and a line is long enough
        "" if sphere.agent.startswith("python ") else sphere.agent,
        f"weights {report.weights_version}",
        f"{report.samples_count:,} samples",
        f"{report.resident_bytes / 2**20:.0f} MiB" if report.resident_bytes else "",
        _shares(report.phase_seconds),
        report.activity if sphere.state in ("active", "draining") else "",
        f"said {age:.0f} s ago" if age >= OLD_SECONDS else "",
    ]
    if sphere.state == "aside":
        texts = texts[:1]
    return "  ".join(text for text in texts if text)


def _event_line(event: str, record: Mapping[str, Any]) -> str:
    from control.callbacks.progress import format_value

    where = f"step {record['step']}: " if "step" in record else ""
    if event in ("step", "evaluation"):
        values = {"loss": record.get("loss"), **record.get("metrics", {})}
        texts = [f"{name} {format_value(name, value)}" for name, value in values.items() if value is not None]
        return where + ("evaluation " if event == "evaluation" else "") + ", ".join(texts)
    rest = [f"{key} {value}" for key, value in record.items() if key not in ("event", "step", "time") and value != ""]
    return f"{where}{event} {', '.join(rest)}".rstrip()
