"""A whole run in one process, for tests and benchmarks: control and its spheres on one loop, over any transport.

The shipped controller, tree, spheres and hubs; only processes, signals and the run directory's life are left out.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic_ns

from control.checkpoint import Checkpoints
from control.config import RunConfig
from control.controller import Controller
from control.events import Callback, CallbackRegistry
from control.initial import initial_weights, node_config
from control.journal import EventLog, Journal
from control.snapshot import Snapshot
from control.store import Store
from control.trace import traced
from control.tree import Tree
from spheres.sphere import Sphere, SphereOptions
from spheres.task import Task
from spheres.transport import Transport

__all__ = ["ControlNode", "LocalTree", "control_node", "local_tree"]

HOST = "localhost"


@dataclass
class ControlNode:
    """One life of control: what ``control.training`` makes, without the run directory's life and the servicers."""

    controller: Controller
    tree: Tree
    journal: Journal
    events: EventLog

    def close(self) -> None:
        self.journal.close()
        self.events.close()


def control_node(
    config: RunConfig,
    task: Task,
    transport: Transport,
    *,
    directory: Path,
    term: int = 1,
    store: Store | None = None,
    callbacks: Sequence[Callback] = (),
    raise_term: Callable[[], int] | None = None,
) -> ControlNode:
    """Make control, with the first weights and nobody listening yet. Its files are in ``directory``."""
    manifest, flat = initial_weights(task, config)
    node = node_config(task, config, manifest, run_id="r-test")
    registry = CallbackRegistry(on_error=config.on_callback_error)
    for callback in callbacks:
        registry.register(callback)
    tree = Tree(node, transport, host=HOST, term=term, hosts_per_host=config.hosts_per_host)
    journal, events = Journal(directory / "journal.jsonl"), EventLog(directory / "events.jsonl")
    checkpoints = Checkpoints(store or directory / "checkpoints", keep=config.keep, keep_every=config.keep_every)
    controller = Controller(
        config,
        node,
        tree,
        run_dir=directory,
        journal=journal,
        events=events,
        checkpoints=checkpoints,
        callbacks=registry,
        raise_term=raise_term or (lambda: tree.term + 1),
    )
    controller.start_from(flat)
    tree.changed = controller.sphere_changed
    return ControlNode(controller, tree, journal, events)


@dataclass
class LocalTree:
    """Control and its spheres, by id; ``kill`` ends one as a lost process would."""

    controller: Controller
    tree: Tree
    spheres: dict[str, Sphere] = field(default_factory=dict)
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    async def kill(self, name: str) -> None:
        """End a sphere without a word: its links break."""
        task = self.tasks.pop(name)
        self.spheres.pop(name)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def run(self) -> str:
        """Train to the end; return the weights' SHA-256. Raises the error that the run ended with."""
        await self.controller.run()
        if self.controller.error is not None:
            raise self.controller.error
        return self.sha256

    @property
    def sha256(self) -> str:
        return self.controller.node.manifest.sha256(self.tree.hub.weights.flat)


@contextlib.asynccontextmanager
async def local_tree(
    config: RunConfig,
    task: Task,
    transport: Callable[[str], Transport],
    *,
    directory: Path,
    callbacks: Sequence[Callback] = (),
    snapshot: Snapshot | None = None,
    relays: int = 0,
    sphere_task: Callable[[str], Task] | None = None,
    sphere_clock: Callable[[str], Callable[[], int]] = lambda _: monotonic_ns,
    environment: Callable[[str], str] = lambda _: "",
) -> AsyncIterator[LocalTree]:
    """Make control and ``config.spheres`` spheres, which join one after another: s-1, s-2, ...

    ``transport`` is called with each node's name. The first ``relays`` of them compute nothing. ``sphere_task`` gives
    a sphere another task object than control's, ``sphere_clock`` another clock to trace by, ``environment`` another
    fingerprint of its numeric environment than this process has.
    """
    control = control_node(config, task, transport("control"), directory=directory, callbacks=callbacks)
    controller, tree = control.controller, control.tree
    if snapshot is not None:
        controller.load(snapshot)
    await tree.listen("127.0.0.1:0")
    local = LocalTree(controller, tree)
    async with traced(tree.recorder, directory, run_id=controller.run_id, term=tree.term):
        try:
            for number in range(1, config.spheres + 1):
                name = f"s-{number}"
                options = SphereOptions(
                    control=tree.address,
                    host=HOST,
                    relay=number <= relays,
                    orphan_timeout=5.0,
                    clock=sphere_clock(name),
                    environment=environment(name),
                )
                sphere = Sphere(options, transport(name), task=sphere_task(name) if sphere_task else task)
                local.spheres[name] = sphere
                local.tasks[name] = asyncio.create_task(sphere.run())
                await _ready(sphere, local.tasks[name])  # so that ids and places follow from the order
            yield local
        finally:
            for name in list(local.tasks):
                await local.kill(name)
            await tree.aclose()
            control.close()


async def _ready(sphere: Sphere, task: asyncio.Task[None]) -> None:
    """Wait until a sphere has its place. Raises what it ended with instead."""
    ready = asyncio.ensure_future(sphere.ready.wait())
    await asyncio.wait({ready, task}, return_when=asyncio.FIRST_COMPLETED)
    ready.cancel()
    if task.done():
        task.result()
