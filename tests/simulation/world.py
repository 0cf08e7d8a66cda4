"""One seed's run, from its start to its end: control, spheres and a network as processes on one virtual clock.

The shipped controller, tree, journal, hubs and spheres run here; links, compute, store, launcher and loop are replaced.
What is done to them is in ``faults``, what must hold of them in ``checks``, what is told of them in ``story``.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import control.reference
import control.tree
import spheres.sphere
from control.config import RunConfig
from control.run_state import RunState
from control.store_memory import MemoryStore
from control.testing import HOST, ControlNode, control_node
from spheres.environment import environment_fingerprint
from spheres.errors import ArmillaryError, CheckpointError, GradientError
from spheres.sphere import Sphere, SphereOptions
from spheres.testing.clock import Process, VirtualLoop, abandon, virtual_time
from spheres.testing.compute import VirtualWorker
from spheres.testing.memory import MemoryTransport, Pipe
from spheres.testing.network import FaultyNetwork
from spheres.worker import Unit, limit_threads
from tests.invariants import HubWatch
from tests.simulation.checks import Checks
from tests.simulation.disk import Disk, DiskFile
from tests.simulation.faults import Faults
from tests.simulation.memory import Machines, machines
from tests.simulation.plan import Plan
from tests.simulation.story import SeedError, Story
from tests.simulation.task import RowTask

ADDRESS = "127.0.0.1:40000"
#: seconds that all have to end once the run is over, besides an orphan's patience
FAREWELL_SECONDS = 40.0
MOST_EVENTS = 300_000
#: where journals lie
_SHM = Path("/dev/shm")
ROOT = str(_SHM) if _SHM.is_dir() and os.access(_SHM, os.W_OK) else None


@dataclass
class Node:
    """One life of one sphere's process."""

    process: Process
    sphere: Sphere
    relay: bool
    slow: float
    trouble: str = ""
    worker: VirtualWorker | None = None
    watch: HubWatch | None = None
    leaving: bool = False
    #: whether the launcher starts another one when it has ended
    again: bool = True
    #: what it ended with, where that was not in order
    error: BaseException | None = None

    @property
    def name(self) -> str:
        return self.process.name

    @property
    def id(self) -> str:
        """What control has given it; "" before that."""
        hub = getattr(self.sphere, "hub", None)
        return "" if hub is None else hub.id

    @property
    def called(self) -> str:
        return f"{self.name} ({self.id})" if self.id else self.name

    @property
    def alive(self) -> bool:
        return not self.process.dead and self.process.main is not None and not self.process.main.done()

    @property
    def placed(self) -> bool:
        """Whether it has had a link since it enrolled."""
        parent = getattr(self.sphere, "parent", None)
        return parent is not None and parent.placed.is_set()

    @property
    def computes(self) -> bool:
        return self.alive and not self.relay and not self.leaving


@dataclass
class Outcome:
    """How a seed ended: figures, to be added up over seeds."""

    fingerprint: int
    seconds: float
    counts: Counter[str] = field(default_factory=Counter)


class World:
    """Mutable state: the processes and what they stand on. One instance for one run of one seed."""

    def __init__(
        self,
        plan: Plan,
        *,
        log: Callable[[str], None] | None = None,
        messages: bool = False,
        most_events: int = MOST_EVENTS,
    ) -> None:
        self.plan = plan
        self.rng = random.Random(f"world {plan.seed}")
        self.node_rng = random.Random(f"nodes {plan.seed}")
        self.ids = random.Random(f"ids {plan.seed}")
        self.loop = VirtualLoop(most_seconds=1e9, most_events=most_events, pause=self._pause)
        self.story = Story(plan, self.loop.time, log)
        self.say = self.story.say
        self._messages = messages
        self.config = self._config()
        self.task = self.make_task()
        self.machines = Machines()
        self.directory = Path(tempfile.mkdtemp(prefix="simulation-", dir=ROOT))
        self.disk = Disk()
        # what is published outlives control
        self.store = MemoryStore(lambda _: self.disk.check())
        self.nodes: dict[str, Node] = {}
        self.control: ControlNode | None = None
        self.controls: list[ControlNode] = []
        self.control_process: Process | None = None
        self.old_processes: list[Process] = []
        self.term = 0
        self.started = 0
        self.finished: asyncio.Future[None]
        self.network: FaultyNetwork
        self.over = False
        self.halted = False
        #: for each commit: when, and control's messages and turns of the loop so far
        self.steps: list[tuple[float, int, int]] = []
        self.control_turns = 0
        #: sphere -> parent at the first commit
        self.first_shape: dict[str, str] | None = None
        self.counts: Counter[str] = Counter()
        self.faults, self.checks = Faults(self), Checks(self)

    def _pause(self) -> float:
        return self.plan.pause * self.rng.random()

    def make_task(self) -> RowTask:
        plan = self.plan
        return RowTask(plan.elements, plan.batch * 3 + plan.tail, plan.test_size, plan.microbatches)

    def _config(self) -> RunConfig:
        plan = self.plan
        return RunConfig(
            task="simulated",
            seed=plan.seed,
            steps=plan.steps,
            batch_size=plan.batch,
            microbatches=plan.microbatches,
            learning_rate=0.01,
            optimizer=plan.optimizer,
            clip_norm=plan.clip_norm,
            eval_every=f"{plan.eval_every}steps" if plan.eval_every else None,
            eval_microbatches=plan.eval_microbatches,
            checkpoint_every=f"{plan.checkpoint_every}steps" if plan.checkpoint_every else None,
            spheres=plan.spheres,
            min_spheres=plan.min_spheres,
            fan_out=plan.fan_out,
            chunk_bytes=4096,
            window_chunks=plan.window,
            patience=plan.patience,
            orphan_timeout=plan.orphan_timeout,
            wire=plan.wire,
            wire_dtype=plan.dtypes[0],
            weights_wire_dtype=plan.dtypes[1],
        )

    # ---- control

    def start_control(self) -> None:
        self.term += 1
        process = self.control_process = Process(f"control.{self.term}")
        self.machines.places[process.name] = "a"
        self.say(f"{process.name} starts")
        main = process.start(self._control(process))
        main.add_done_callback(lambda _: self._control_ended(process))

    async def _control(self, process: Process) -> None:
        transport = MemoryTransport(self.network, process.name)
        control = self.control = control_node(
            self.config,
            self.task,
            transport,
            directory=self.directory,
            term=self.term,
            store=self.store,
            raise_term=self._raise_term,
        )
        for file in (control.journal, control.events):
            self._on_disk(file)
        self.controls.append(control)
        controller, tree = control.controller, control.tree
        tree.hub.watchdog.enabled = self.plan.speculate
        tree.failures.most_lost = 1_000_000  # killers here do not care whom they hit how often
        process.after = self._counting(self.checks.of_control(control))
        with contextlib.suppress(CheckpointError):
            controller.load(controller.checkpoints.load(None))
        controller.publish = self._published
        sealed = tree.hub.hooks.sealed
        tree.hub.hooks.sealed = lambda: (self.checks.sealed(control), sealed())
        await tree.listen(ADDRESS)
        if len(self.controls) > 1:
            tree.came_back()
        await controller.run()
        # what control.training does when its context is left
        await tree.states(2.0)
        self.checks.farewell()
        tree.stop_spheres("the run is over")
        await tree.all_gone(5.0)
        await tree.aclose()
        control.close()
        if controller.error is not None:
            raise controller.error

    def _counting(self, check: Callable[[], None]) -> Callable[[], None]:
        def turn() -> None:
            self.control_turns += 1
            check()

        return turn

    def _raise_term(self) -> int:
        self.term += 1
        return self.term

    def _on_disk(self, file: Any) -> None:
        name = "_file"
        path = getattr(file, "path", None) or file._path
        getattr(file, name).close()
        opened = DiskFile(path, "a+")
        opened.disk = self.disk
        setattr(file, name, opened)

    def _control_ended(self, process: Process) -> None:
        assert process.main is not None
        if process.dead:
            return
        error = process.main.exception()
        self.say(f"{process.name} ends: {error or 'completed'}")
        self.old_processes.append(process)
        if error is None:
            self.over = True
            if not self.finished.done():
                self.finished.set_result(None)
        elif isinstance(error, GradientError) and self.checks.may_halt(str(error)):
            self.over = self.halted = True
            self.counts["halted"] += 1
            if not self.finished.done():
                self.finished.set_result(None)
        elif isinstance(error, ArmillaryError) and self.counts["disk"]:
            self.loop.call_later(1.0, self.control_again)
        elif not self.finished.done():
            self.finished.set_exception(error)

    def control_again(self) -> None:
        if self.disk.full:
            self.loop.call_later(1.0, self.control_again)
        else:
            self.start_control()

    def _published(self, record: Any) -> None:
        if record["event"] == "step":
            now = self.loop.time()
            if self.first_shape is None and self.control is not None:
                self.first_shape = self.control.tree.shape()
            self.steps.append((now, self.network.messages[self.control_name], self.control_turns))
            self.say(f"step {record['step']} committed{' again' if record['replayed'] else ''}")
            self.checks.moved()
            self.faults.committed()
        elif record["event"] == "evaluation":
            self.checks.evaluations[record["step"]] = dict(record)

    @property
    def control_name(self) -> str:
        return "" if self.control_process is None else self.control_process.name

    @property
    def step(self) -> int:
        return self.control.controller.step if self.control is not None else 0

    # ---- spheres

    def start_sphere(self, *, relay: bool = False) -> Node:
        plan, rng = self.plan, self.node_rng
        self.started += 1
        process = Process(f"p{self.started}")
        self.machines.places[process.name] = plan.places[self.started % len(plan.places)]
        options = SphereOptions(
            control=ADDRESS,
            listen=f"{process.name}:0",  # no loopback: those would have no children of other hosts
            host=rng.choice((HOST, "host-a", "host-b")) if plan.hosts > 1 else HOST,
            relay=relay,
            orphan_timeout=plan.orphan_timeout,
            speculate=plan.speculate,
        )
        task = self.make_task()
        slow = rng.choice(plan.speeds)
        speed = random.Random(f"speed {plan.seed} {self.started}")

        def seconds(unit: Unit) -> float:
            return plan.compute * node.slow * unit.block.width * (0.5 + speed.random()) * (1.0 if unit.train else 0.3)

        def make_worker(config: Any, task: Any, allocate: Any) -> VirtualWorker:
            computed = self.checks.computed
            node.worker = VirtualWorker(config, task, seconds=seconds, computed=computed, allocate=allocate)
            return node.worker

        async def life() -> None:
            node.sphere = Sphere(
                options, MemoryTransport(self.network, process.name), task=task, make_worker=make_worker
            )
            await node.sphere.run()

        node = Node(process, None, relay, slow)  # type: ignore[arg-type]
        task.trouble = lambda: self.faults.trouble(node)
        self.nodes[process.name] = node
        process.after = lambda: self.checks.look_at(node)
        self.say(f"{process.name} starts{' as a relay' if relay else ''}")
        process.start(life()).add_done_callback(lambda _: self._sphere_ended(node))
        return node

    def _sphere_ended(self, node: Node) -> None:
        assert node.process.main is not None
        if node.process.dead:
            return
        error = node.error = node.process.main.exception()
        self.say(f"{node.called} ends: {error or 'in order'}")
        if error is not None and not isinstance(error, ArmillaryError):
            self._fail(error)
        self.launch(node, 0.5)

    def launch(self, node: Node, after: float) -> None:
        """As the launcher does: another one in the place of one that has ended, after a while."""
        if not self.over and (node.again or not any(n.computes for n in self.nodes.values())):
            self.loop.call_later(after, lambda: self.over or self.start_sphere(relay=node.relay and node.again))

    def living(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.alive]

    def end(self, node: Node, *, silent: bool = False) -> None:
        """Kill a sphere's process; ``silent``: nobody is told."""
        node.process.kill()
        self.network.lost(node.name, silent=silent)

    def _fail(self, error: BaseException) -> None:
        if not self.finished.done():
            self.finished.set_exception(error)

    # ---- the run

    def run(self) -> Outcome:
        loop = self.loop
        gc.disable()
        try:
            shared = machines(
                self.machines,
                window=self.plan.shared_window,
                sums=self.plan.sums,
                streams=self.plan.streams,
                rng=random.Random(f"threads {self.plan.seed}"),
            )
            with virtual_time(loop), _made_equal(self.ids), shared, self.story.tells_logs():
                main = loop.create_task(self._main())
                try:
                    loop.run_until_complete(main)
                except Exception as error:
                    raise self._failure(error) from error
                finally:
                    self._abandon_all(main)
                try:
                    self.checks.end()
                except AssertionError as error:
                    raise self._failure(error) from None
            return Outcome(self.network.fingerprint, loop.time(), self.counts)
        finally:
            with contextlib.suppress(Exception):
                loop.close()
            shutil.rmtree(self.directory, ignore_errors=True)
            gc.enable()

    def _failure(self, error: Exception) -> SeedError:
        return self.story.of(error, self.control and self.control.tree.hub, self.living())

    async def _main(self) -> None:
        plan = self.plan
        self.finished = self.loop.create_future()
        self.network = FaultyNetwork(
            random.Random(f"network {plan.seed}"),
            latencies=plan.latencies,
            bytes_per_second=plan.rate,
            keepalive=plan.keepalive,
        )
        self.network.heard = self._heard
        self.start_control()
        jobs = [self.loop.create_task(job) for job in (self._start(), self.faults.run(), self._look())]
        try:
            await asyncio.wait({self.finished, *jobs[2:]}, return_when=asyncio.FIRST_COMPLETED)
            for job in jobs:
                if job.done():
                    job.result()
            self.finished.result()
        finally:
            for job in jobs:
                job.cancel()
        for node in self.nodes.values():
            if node.process.stopped:
                node.process.go_on()
        await self._all_ended()

    def _heard(self, pipe: Pipe, message: bytes) -> None:
        self.checks.heard(pipe, message)
        if self._messages:
            self.story.say_message(pipe, message)

    async def _start(self) -> None:
        for number in range(self.plan.spheres):
            self.start_sphere(relay=number < min(self.plan.relays, self.plan.spheres - 1))
            await asyncio.sleep(self.rng.choice((0.0, 0.0, 0.001, 0.02)))

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(5.0)
            if self.control is not None and self.control.controller.state is RunState.INITIALIZING:
                # control counts them before it begins, and a launcher sees to it that they come
                for _ in range(self.plan.min_spheres - sum(not node.process.stopped for node in self.living())):
                    self.start_sphere()
            self.checks.goes_on()

    async def _all_ended(self) -> None:
        # orphans end level by level: whoever has a parent does not know that it is an orphan too
        until = self.loop.time() + FAREWELL_SECONDS + self.plan.orphan_timeout * len(self.living())
        while self.loop.time() < until:
            mains = [node.process.main for node in self.living()]
            if not mains:
                break
            await asyncio.wait(mains, timeout=until - self.loop.time())
        for _ in range(5):  # news of ends that are on their way, and a callback's turn
            await asyncio.sleep(max(self.plan.latencies) * 2)
        self.checks.nothing_left()

    def _abandon_all(self, main: asyncio.Task[None]) -> None:
        if self.control is not None:
            self.control.close()
        everyone = [*self.old_processes, *(node.process for node in self.nodes.values())]
        if self.control_process is not None:
            everyone.append(self.control_process)
        for process in everyone:
            process.kill()
            process.context().run(abandon, process.left())
        abandon([*self.loop.tasks, main])


@contextlib.contextmanager
def _made_equal(ids: random.Random) -> Iterator[None]:
    """Replace what differs from process to process, or costs much each time."""
    fingerprint = _once(environment_fingerprint)
    _once(limit_threads)
    places: list[tuple[Any, str, Any]] = [
        (uuid, "uuid4", lambda: uuid.UUID(int=ids.getrandbits(128))),
        (os, "getpid", lambda: 4_711),  # it is in messages, which are the longer the larger it is
        (spheres.sphere, "resident_bytes", lambda: (1, 1)),
        (spheres.sphere, "environment_fingerprint", lambda: fingerprint),
        (control.tree, "environment_fingerprint", lambda: fingerprint),
        (control.reference, "limit_threads", lambda: 0),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in places]
    try:
        for module, name, fake in places:
            setattr(module, name, fake)
        yield
    finally:
        for module, name, real in before:
            setattr(module, name, real)


_ONCE: dict[Any, Any] = {}


def _once(function: Callable[[], Any]) -> Any:
    if function not in _ONCE:
        _ONCE[function] = function()
    return _ONCE[function]
