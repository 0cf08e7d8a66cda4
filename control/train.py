"""A whole run, from configuration to summary: what ``control-cli start`` does, for Python.

from control.train import train
train(MyTask(), epochs=3, spheres=2)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from control.callbacks import configured
from control.checkpoint import Checkpoints
from control.config import RunConfig, compare_identity, identity
from control.controller import Controller
from control.events import Callback, CallbackRegistry
from control.initial import initial_weights, node_config
from control.journal import EventLog, Journal
from control.launcher import LocalSpheres
from control.report import write_report
from control.run_dir import RunDirectory
from control.server import add_services
from control.servicers import ControlServicer
from control.snapshot import Snapshot
from control.tree import Tree
from control.weights_file import write_safetensors
from spheres.environment import tune_malloc
from spheres.errors import ArmillaryError, ConfigError
from spheres.grpc_link import GrpcTransport
from spheres.task import Task, load_task

__all__ = ["Summary", "run", "train"]

log = logging.getLogger(__name__)


@dataclass
class Summary:
    """How a run ended; ``summary.json`` is the same."""

    state: str
    steps: int = 0
    epochs: int = 0
    samples: int = 0
    loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    weights_sha256: str = ""
    wall_seconds: float = 0.0
    samples_per_second: float = 0.0
    steps_per_second: float = 0.0
    sync_fraction: float = 0.0
    phase_seconds: dict[str, float] = field(default_factory=dict)
    spheres: list[dict[str, Any]] = field(default_factory=list)
    tree: dict[str, str] = field(default_factory=dict)
    run_id: str = ""
    run_dir: str = ""
    reason: str = ""
    report: str = ""
    error: ArmillaryError | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "error": None if self.error is None else str(self.error)}


def train(
    task: Task | str, config: RunConfig | None = None, *, callbacks: Sequence[Callback] = (), **settings: Any
) -> Summary:
    """Train and return the summary. Raises the error that the run ended with.

    ``task`` is a name, ``module:attribute``, or an object of a class that spheres can import and call without
    arguments. ``settings`` are keys of RunConfig.
    """
    import uvloop

    name = task if isinstance(task, str) else f"{type(task).__module__}:{type(task).__qualname__}"
    chosen = config or RunConfig(**{"task": name, **settings})
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        summary = runner.run(run(chosen, callbacks=callbacks, task=None if isinstance(task, str) else task))
    if summary.error is not None:
        raise summary.error
    return summary


async def run(
    config: RunConfig,
    *,
    origins: Mapping[str, Any] | None = None,
    resume: str | None = None,
    callbacks: Sequence[Callback] = (),
    task: Task | None = None,
    verbose: bool = False,
) -> Summary:
    """Run a training and return its summary, also of one that failed. Raises what stands in the way of a start.

    ``resume``: None for a new run, "" for the latest checkpoint of the run directory, else a checkpoint's path.
    """
    tune_malloc()
    if task is None:
        task = await asyncio.to_thread(load_task, config.task, config.task_options)
    snapshot: Snapshot | None = None
    if resume is None:
        directory = RunDirectory.create(config.run_dir, config.task)
    else:
        path = config.run_dir or _run_of(resume)
        directory = RunDirectory.open(path)
    try:
        checkpoints = Checkpoints(directory.path / "checkpoints", keep=config.keep, keep_every=config.keep_every)
        if resume is not None:
            snapshot = await asyncio.to_thread(checkpoints.load, Path(resume) if resume else None)
            compare_identity(identity(RunConfig.from_json(snapshot.run.config_json)), identity(config))
            if snapshot.run.run_id != directory.run_id:
                raise ConfigError(f"checkpoint {resume} is of another run than {directory.path}")
        return await _run(config, task, directory, checkpoints, snapshot, callbacks, verbose=verbose)
    finally:
        directory.close()


async def _run(
    config: RunConfig,
    task: Task,
    directory: RunDirectory,
    checkpoints: Checkpoints,
    snapshot: Snapshot | None,
    callbacks: Sequence[Callback],
    *,
    verbose: bool,
) -> Summary:
    began = time.monotonic()
    manifest, flat = await asyncio.to_thread(initial_weights, task, config)
    node = node_config(task, config, manifest, run_id=directory.run_id)
    settings = config.model_dump(mode="json")
    term = directory.raise_term(settings)
    registry = CallbackRegistry(on_error=config.on_callback_error)
    for callback in [*configured(config), *callbacks]:
        registry.register(callback)
    servicer = ControlServicer()

    transport = GrpcTransport(lambda server: add_services(server, servicer))
    tree = Tree(node, transport, host=socket.gethostname(), incarnation=term)
    journal, events = Journal(directory.path / "journal.jsonl"), EventLog(directory.path / "events.jsonl")
    controller = Controller(
        config,
        node,
        flat,
        tree,
        run_dir=directory.path,
        term=term,
        journal=journal,
        events=events,
        checkpoints=checkpoints,
        callbacks=registry,
    )
    controller.raise_term = lambda: directory.raise_term(settings)
    tree.changed = controller.sphere_changed
    del flat
    if snapshot is not None:
        controller.load(snapshot)
    await tree.listen(config.listen)
    directory.write_address(tree.address)
    servicer.attach(controller)
    tree.restart(term)
    local = LocalSpheres(tree.address, directory.path / "logs", orphan_timeout=config.orphan_timeout, verbose=verbose)
    with _signals(controller):
        try:
            await local.start(config.spheres)
            await _until_over(controller, local)
            summary = _summary(controller, began)
            tree.stop_spheres("the run is over")
            await tree.all_gone(5.0)
        finally:
            servicer.close()
            await tree.aclose()
            await local.aclose()
            journal.close()
            events.close()
    summary.run_dir = str(directory.path)
    if controller.step:
        write_safetensors(
            directory.path / "weights.safetensors",
            manifest,
            tree.hub.weights.flat,
            {"step": str(controller.step), "weights_sha256": summary.weights_sha256, "run_id": directory.run_id},
        )
    summary.report = str(directory.path / "report.html")
    directory.write_json("summary.json", summary.to_dict())
    write_report(directory.path)
    return summary


async def _until_over(controller: Controller, local: LocalSpheres) -> None:
    """Run to the end; where every local sphere ends before the first step, that is the error."""
    training = asyncio.create_task(controller.run())
    watching = asyncio.create_task(local.watch()) if local.processes else None
    waiting = {training} | ({watching} if watching else set())
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    if watching is not None and watching.done() and not training.done() and controller.living_spheres == 0:
        log.error("every local sphere has ended (exit code %d); their logs are in the run directory", watching.result())
        controller.request_stop(f"every local sphere has ended with exit code {watching.result()}")
    await training
    if watching is not None:
        watching.cancel()


def _summary(controller: Controller, began: float) -> Summary:
    totals, tree = controller.totals, controller.tree
    seconds = totals["seconds"]
    spheres = []
    for name in sorted(tree.spheres, key=lambda n: (len(n), n)):
        found = tree.report_of(name)
        sphere: dict[str, Any] = {"id": name, "parent": tree.parents.get(name, ""), "state": tree.state_of(name)}
        if found is not None:
            report = found[1]
            sphere |= {
                "parent": report.parent_id,
                "host": report.host,
                "role": report.role,
                "microbatches": report.microbatches_count,
                "samples": report.samples_count,
                "phase_seconds": dict(report.phase_seconds),
                "sent_up_bytes": report.sent_up_bytes,
                "sent_down_bytes": report.sent_down_bytes,
                "peak_resident_bytes": report.peak_resident_bytes,
            }
        spheres.append(sphere)
    return Summary(
        state=str(controller.state),
        steps=controller.step,
        epochs=controller.step // controller.node.sampler.steps_per_epoch,
        samples=controller.samples,
        loss=controller.metrics.get("loss"),
        metrics=dict(controller.metrics),
        weights_sha256=controller.weights_sha256,
        wall_seconds=time.monotonic() - began,
        samples_per_second=totals["samples"] / seconds if seconds else 0.0,
        steps_per_second=totals["steps"] / seconds if seconds else 0.0,
        sync_fraction=1 - totals["compute"] / seconds if seconds else 0.0,
        phase_seconds=dict(controller.phase_seconds),
        spheres=spheres,
        tree={s["id"]: s["parent"] for s in spheres},
        run_id=controller.run_id,
        reason=controller.reason,
        error=controller.error,
    )


@contextlib.contextmanager
def _signals(controller: Controller) -> Any:
    """First signal: finish the step, checkpoint, end. Second: end at once; spheres end by themselves."""
    loop = asyncio.get_running_loop()
    count = 0

    def stop(sign: signal.Signals) -> None:
        nonlocal count
        count += 1
        if count > 1:
            os._exit(128 + sign)
        log.warning("%s: finishing the step, then a checkpoint; once more to end at once", sign.name)
        controller.request_stop(sign.name)

    signs: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)
    try:
        for sign in signs:
            loop.add_signal_handler(sign, stop, sign)
    except (ValueError, RuntimeError):  # not the main thread: the caller's signals are the caller's
        signs = ()
    try:
        yield
    finally:
        for sign in signs:
            loop.remove_signal_handler(sign)


def _run_of(checkpoint: str) -> Path | None:
    """Return the run directory that holds a checkpoint; None for the latest run."""
    return Path(checkpoint).absolute().parent.parent if checkpoint else None
