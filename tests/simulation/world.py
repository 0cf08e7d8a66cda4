"""One seed's run: control, spheres and a network as processes on one virtual clock, faults on schedule, and what must
hold meanwhile and afterwards.

The shipped controller, tree, journal, hubs and spheres run here; links, compute, store, launcher and loop are replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import random
import shutil
import tempfile
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import control.reference
import control.tree
import spheres.sphere
from control.config import RunConfig
from control.reference import ReferenceResult, reference
from control.run_state import RunState
from control.store_memory import MemoryStore
from control.testing import HOST, ControlNode, control_node
from spheres.blocks import Block, halves
from spheres.config import NodeConfig
from spheres.environment import environment_fingerprint
from spheres.errors import ArmillaryError, CheckpointError, GradientError
from spheres.frames import decode
from spheres.narrow import round_in_place
from spheres.numerics import add_sums
from spheres.sphere import Sphere, SphereOptions
from spheres.task import Sums
from spheres.testing.clock import Process, StalledError, VirtualLoop, abandon, virtual_time
from spheres.testing.compute import VirtualWorker
from spheres.testing.memory import Connection, MemoryTransport, Pipe
from spheres.testing.network import TAMPERS, FaultyNetwork
from spheres.transport import Rpc
from spheres.v1 import work_pb2 as pb
from spheres.worker import Computer, Unit, limit_threads
from tests.invariants import HubWatch
from tests.simulation.disk import Disk, DiskFile
from tests.simulation.memory import Machines, machines
from tests.simulation.plan import Fault, Plan
from tests.simulation.task import ROW, RowTask, share

ADDRESS = "127.0.0.1:40000"
#: a tree in which nothing but heartbeats moves for so long will not move again: longer than any pause or patience
STILL_SECONDS = 45.0
#: seconds that all have to end once the run is over, besides an orphan's patience
FAREWELL_SECONDS = 40.0
#: seconds of the bound on a run, for each fault
FAULT_SECONDS = 40.0
MOST_EVENTS = 300_000
#: factor on a sphere's compute time
MOST_SLOW = 60.0
#: what a correct node never gives a correct neighbour cause to raise
BREACHES = ("ProtocolError", "CreditError", "ChecksumError", "DecodeError", "MessageTooLargeError")
#: where journals lie
_SHM = Path("/dev/shm")
ROOT = str(_SHM) if _SHM.is_dir() and os.access(_SHM, os.W_OK) else None


class SeedError(AssertionError):
    """What went wrong, with what had happened before."""


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

    @property
    def name(self) -> str:
        return self.process.name

    @property
    def alive(self) -> bool:
        return not self.process.dead and self.process.main is not None and not self.process.main.done()

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
    """Mutable state: all of it. One instance for one run of one seed."""

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
        self.config = self._config()
        self.task = self._task()
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
        #: (term, step, microbatch) -> times computed
        self.computed: Counter[tuple[int, int, int]] = Counter()
        self.step_began = 0.0
        self.step_seconds = plan.compute * plan.microbatches / max(1, plan.spheres - plan.relays) + 0.02
        self.step_reached = asyncio.Event()
        #: network.changes when the root's present work was given out, and that work
        self.changes_before: tuple[Any, int] = (None, 0)
        self.evaluations: dict[int, dict[str, Any]] = {}
        self.events: deque[str] = deque(maxlen=150)
        self._log, self._messages = log, messages
        self.last_move = 0.0
        #: version, block and chunk -> checksum of the present step's frames, and who sent it first
        self.checksums: dict[tuple[int, ...], tuple[int, str]] = {}
        self.checksums_of: tuple[int, ...] = ()

    # ---- small things

    def say(self, text: str) -> None:
        line = f"{self.loop.time():11.6f}  {text}"
        self.events.append(line)
        if self._log is not None:
            self._log(line)

    def _pause(self) -> float:
        return self.plan.pause * self.rng.random()

    def _task(self) -> RowTask:
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

    @property
    def bound(self) -> float:
        """Virtual seconds in which the run must be over: every step by the slowest sphere alone, and so on."""
        plan = self.plan
        slowest = MOST_SLOW if any(fault.kind == "slow" for fault in plan.faults) else 20.0
        depth = plan.spheres if plan.fan_out == 1 else 8
        step = plan.compute * 1.5 * plan.microbatches * slowest
        step += (depth + plan.chunks) * 4 * (max(plan.latencies) * 3 + 4096 / plan.rate * plan.microbatches)
        crashes = sum(fault.kind in ("control", "disk") for fault in plan.faults)
        crashes_cost = crashes * plan.orphan_timeout * 3  # without adoption all spheres have to give up first
        return 20.0 + crashes_cost + plan.steps * (2 * step + 1.0) * (1 + crashes) + FAULT_SECONDS * len(plan.faults)

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
        process.after = self._watch_control(control)
        with contextlib.suppress(CheckpointError):
            controller.load(controller.checkpoints.load(None))
        controller.publish = self._published
        sealed = tree.hub.hooks.sealed
        tree.hub.hooks.sealed = lambda: (self._check_sum(control), sealed())
        await tree.listen(ADDRESS)
        await controller.run()
        # what control.training does when its context is left
        await tree.states(2.0)
        tree.stop_spheres("the run is over")
        await tree.all_gone(5.0)
        await tree.aclose()
        control.close()
        if controller.error is not None:
            raise controller.error

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
        elif isinstance(error, GradientError) and self._may_halt(str(error)):
            self.over = self.halted = True
            self.counts["halted"] += 1
            if not self.finished.done():
                self.finished.set_result(None)
        elif isinstance(error, ArmillaryError) and self.counts["disk"]:
            self.loop.call_later(1.0, self._control_again)
        elif not self.finished.done():
            self.finished.set_exception(error)

    def _may_halt(self, reason: str) -> bool:
        """Whether a run is to end so: a gradient is not finite, or a task raised twice on one microbatch."""
        if "not finite" in reason:
            return self.counts["nan"] > 0
        return self.counts["raise"] > 0 and "and before that on" in reason

    def _control_again(self) -> None:
        if self.disk.full:
            self.loop.call_later(1.0, self._control_again)
        else:
            self.start_control()

    def _published(self, record: Any) -> None:
        if record["event"] == "step":
            now = self.loop.time()
            if self.first_shape is None and self.control is not None:
                self.first_shape = self.control.tree.shape()
            self.steps.append((now, self.network.messages[self.control_name], self.control_turns))
            self.say(f"step {record['step']} committed{' again' if record['replayed'] else ''}")
            self.step_seconds = max(0.001, now - self.step_began)
            self.step_began = self.last_move = now
            self.step_reached.set()
        elif record["event"] == "evaluation":
            self.evaluations[record["step"]] = dict(record)

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
            host=rng.choice((HOST, "host-a", "host-b")) if plan.hosts > 1 else HOST,
            relay=relay,
            orphan_timeout=plan.orphan_timeout,
            speculate=plan.speculate,
        )
        task = self._task()
        slow = rng.choice(plan.speeds)
        speed = random.Random(f"speed {plan.seed} {self.started}")

        def seconds(unit: Unit) -> float:
            return plan.compute * node.slow * unit.block.width * (0.5 + speed.random()) * (1.0 if unit.train else 0.3)

        def computed(step: int, index: int) -> None:
            self.last_move = self.loop.time()
            self.computed[self.term, step, index] += 1

        def make_worker(config: Any, task: Any, allocate: Any) -> VirtualWorker:
            node.worker = VirtualWorker(config, task, seconds=seconds, computed=computed, allocate=allocate)
            return node.worker

        async def life() -> None:
            node.sphere = Sphere(
                options, MemoryTransport(self.network, process.name), task=task, make_worker=make_worker
            )
            await node.sphere.run()

        node = Node(process, None, relay, slow)  # type: ignore[arg-type]
        task.trouble = lambda: self._trouble(node)
        self.nodes[process.name] = node
        process.after = lambda: self._check(node)
        self.say(f"{process.name} starts{' as a relay' if relay else ''}")
        process.start(life()).add_done_callback(lambda _: self._sphere_ended(node))
        return node

    def _trouble(self, node: Node) -> str:
        trouble, _, always = node.trouble.partition(" ")
        if not always:
            node.trouble = ""
        if trouble:
            self.network.changes += 2  # once more elsewhere, and here again after a rest
        return trouble

    def _sphere_ended(self, node: Node) -> None:
        assert node.process.main is not None
        if node.process.dead:
            return
        error = node.process.main.exception()
        self.say(f"{self.called(node)} ends: {error or 'in order'}")
        if error is not None and not isinstance(error, ArmillaryError):
            self._fail(error)
        self._launch(node, 0.5)

    def _launch(self, node: Node, after: float) -> None:
        """As the launcher does: another one in the place of one that has ended, after a while."""
        if not self.over and (node.again or not any(n.computes for n in self.nodes.values())):
            self.loop.call_later(after, lambda: self.over or self.start_sphere(relay=node.relay and node.again))

    def called(self, node: Node) -> str:
        hub = getattr(node.sphere, "hub", None)
        return node.name if hub is None else f"{node.name} ({hub.id})"

    def living(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.alive]

    def _fail(self, error: BaseException) -> None:
        if not self.finished.done():
            self.finished.set_exception(error)

    # ---- what must hold meanwhile

    def _check(self, node: Node) -> None:
        hub = getattr(node.sphere, "hub", None)
        if hub is None:
            return
        if node.watch is None:
            node.watch = HubWatch(hub, None if node.worker is None else node.worker.given)
        try:
            node.watch.check()
            self._check_step(hub)
        except AssertionError as error:
            raise AssertionError(f"{self.called(node)}: {error}") from None

    def _check_step(self, hub: Any) -> None:
        control = self.control
        if control is None:
            return
        if hub.weights.term == control.tree.term:
            # while an update is streamed the next version is on its way, but nobody computes with it
            ahead = int(bool(self.plan.streams))
            assert hub.weights.version <= control.controller.step + ahead, "I8: weights of a step that is not committed"
            unit = hub._unit
            assert unit is None or unit.cancelled or unit.step <= control.controller.step, "I8: work of such a step"
        work, changes = self.changes_before
        if hub.work == work:
            most = self.network.changes - changes + 1
            if hub.ledger.attempts > most:  # so do a hurry of any node, a task that fails, a header that comes twice
                hubs = (control.tree.hub, *(getattr(node.sphere, "hub", None) for node in self.nodes.values()))
                most += sum(found.watchdog.firings + found.failures for found in hubs if found is not None)
                # a link ends, and another begins, where weights were overwritten between a hello and its header
                most += sum(2 * found.counts.refused["torn"] for found in hubs if found is not None)
                most += self.counts["duplicate"]
            assert hub.ledger.attempts <= most, f"I12: {hub.ledger.attempts} attempts after {most - 1} changes"

    def _watch_control(self, control: ControlNode) -> Callable[[], None]:
        hub = control.tree.hub
        watch = HubWatch(hub)

        def check() -> None:
            if hub.work != self.changes_before[0]:
                self.changes_before = (hub.work, self.network.changes)
            self.control_turns += 1
            watch.check()

        return check

    def _check_sum(self, control: ControlNode) -> None:
        """I1: each microbatch once, in every row."""
        hub, sampler = control.tree.hub, control.controller.node.sampler
        out = hub.gradients._out
        contributions = hub.gradients.contributions(Block(0, hub.ledger.total))
        parts = [i for part in contributions for i in range(*part.block)]
        assert parts == list(range(hub.ledger.total)), f"contributions of {hub.work}: {contributions}"
        if out is None or self.plan.dtypes[0] != "float32":
            return  # a rounded sum has no room for a bit of each
        used = out[: self.plan.elements]
        total = self.plan.microbatches
        mask = sum(share(m, total) for m in range(total) if sampler.count(hub.work.step, m))
        assert (used[ROW - 1 :: ROW] == mask).all(), f"I1: microbatches lost or counted twice in {hub.work}"

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
            quiet = _quiet(None if self._log is None else self.say)
            with virtual_time(loop), _made_equal(self.ids), shared, quiet:
                main = loop.create_task(self._main())
                try:
                    loop.run_until_complete(main)
                except Exception as error:
                    raise SeedError(self._story(error)) from error
                finally:
                    self._abandon_all(main)
                self._check_end()
            return Outcome(self.network.fingerprint, loop.time(), self.counts)
        finally:
            with contextlib.suppress(Exception):
                loop.close()
            shutil.rmtree(self.directory, ignore_errors=True)
            gc.enable()

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
        jobs = [self.loop.create_task(job) for job in (self._start(), self._faults(), self._look())]
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

    async def _start(self) -> None:
        for number in range(self.plan.spheres):
            self.start_sphere(relay=number < min(self.plan.relays, self.plan.spheres - 1))
            await asyncio.sleep(self.rng.choice((0.0, 0.0, 0.001, 0.02)))

    async def _look(self) -> None:
        """I5: nothing moves, and the step is not sealed; or it takes too long."""
        while True:
            await asyncio.sleep(5.0)
            now = self.loop.time()
            if self.control is not None and self.control.controller.state is RunState.INITIALIZING:
                # control counts them before it begins, and a launcher sees to it that they come
                for _ in range(self.plan.min_spheres - sum(not node.process.stopped for node in self.living())):
                    self.start_sphere()
            busy = (n.worker.busy_until for n in self.living() if n.worker is not None and not n.process.stopped)
            self.last_move = max(self.last_move, self.network.last_arrival, min(now, max(busy, default=0.0)))
            still = now - self.last_move
            if still > STILL_SECONDS and any(n.computes and not n.process.stopped for n in self.nodes.values()):
                raise StalledError(f"I5: nothing has moved for {still:.0f} s")
            if now > self.bound:
                raise StalledError(f"not over after {now:.0f} s")

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
        left = [f"{self.called(node)} has not ended" for node in self.living()]
        for process in (*self.old_processes, *(node.process for node in self.nodes.values())):
            if process.dead:
                continue
            left += [f"{process.name} has left {task!r}" for task in process.left()]
        left += [f"{connection} is open" for connection in self.network.connections]
        left += [f"{listener.owner} still listens" for listener in self.network.listeners.values()]
        left += [f"I13, N10: {text}" for text in self.network.published_after_fence]
        left += [f"reported to the loop: {report}" for report in self.loop.reports]
        assert not left, "; ".join(left[:10])

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

    # ---- what must hold afterwards

    def _check_end(self) -> None:
        try:
            self._check_refusals()
            if self.halted:
                return
            self._check_journal(reference(self.task, self.config))
        except AssertionError as error:
            raise SeedError(self._story(error)) from None

    def _check_journal(self, plain: ReferenceResult) -> None:
        control, plan = self.control, self.plan
        assert control is not None
        node, controller = control.controller.node, control.controller
        assert controller.state is RunState.COMPLETED, str(controller.state)
        assert node.manifest.sha256(control.tree.hub.weights.flat) == plain.weights_sha256, "other weights"
        digests: dict[int, str] = {}
        in_term: dict[int, int] = {}
        for line in (self.directory / "journal.jsonl").read_bytes().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                assert self.counts["control"] or self.counts["disk"], f"a broken line in the journal: {line[:80]!r}"
                continue
            step, term = record["step"], record["term"]
            assert in_term.get(term, -1) < step, f"I10: step {step} twice in term {term}"
            in_term[term] = step
            assert digests.setdefault(step, record["weights_digest"]) == record["weights_digest"], f"I10: step {step}"
            parts = [i for lo, hi, _ in record["contributions"] for i in range(lo, hi)]
            assert parts == list(range(plan.microbatches)), f"contributions of step {step}"
            assert record["loss"] == plain.losses[step], f"loss of step {step}"
            ids = [int(i) for m in range(plan.microbatches) for i in node.sampler.microbatch(step, m)]
            assert record["batch_samples"] == len(ids)
            assert round(record["metrics"]["sample_sum"] * len(ids)) == sum(ids), f"samples of step {step}"
        assert sorted(digests) == list(range(plan.steps)), f"steps {sorted(digests)}"
        last = self.evaluations.get(plan.steps)
        if last is not None:
            sums = self._evaluated(node, plain)
            assert last["loss"] == sums.loss / sums.count, "evaluation"
        self.counts["recomputed"] = sum(times - 1 for times in self.computed.values())
        self.counts["computed"] = len(self.computed)
        self.counts["messages"] = sum(self.network.messages.values()) // 2
        self.counts["events"] = self.loop.events
        if not plan.faults and not plan.relays and plan.min_spheres == plan.spheres:
            assert self.counts["recomputed"] == 0, "I11: computed twice without a fault"

    def _evaluated(self, node: NodeConfig, plain: ReferenceResult) -> Sums:
        """Return the sums over the test split on the last weights, in canonical order."""
        computer = Computer(node, self._task())
        weights = {name: view.copy() for name, view in plain.weights.items()}
        for view in weights.values():
            round_in_place(view.reshape(-1), node.weights_dtype)

        def total(block: Block) -> Sums | None:
            if block.width == 1:
                return computer.evaluate(weights, block.lo)
            left, right = (total(half) for half in halves(block))
            return left or right if left is None or right is None else add_sums(left, right)

        found = total(Block(0, node.evaluation_microbatches))
        assert found is not None
        return found

    def _check_refusals(self) -> None:
        """Where nothing changed bytes, nobody may have broken the protocol; what is stale is another matter."""
        if any(self.counts[kind] for kind in TAMPERS):
            return
        hubs = [(self.called(node), node.sphere.hub) for node in self.nodes.values() if node.sphere is not None]
        hubs += [("control", control.tree.hub) for control in self.controls]
        for name, hub in hubs:
            broken = {} if hub is None else {k: n for k, n in hub.counts.refused.items() if k in BREACHES}
            assert not broken, f"{name} refused {broken}"

    # ---- faults

    async def _faults(self) -> None:
        for fault in self.plan.faults:
            while self.step < fault.step:
                self.step_reached.clear()
                await self.step_reached.wait()
            # by the clock: a step that hangs is hit all the same
            at = self.step_began + fault.part * self.step_seconds
            if at > self.loop.time():
                await asyncio.sleep(at - self.loop.time())
            if self.over or self.finished.done():
                return
            self.counts[fault.kind] += 1
            self._strike(fault)

    def _strike(self, fault: Fault) -> None:
        getattr(self, "_crash" if fault.kind == "control" else f"_{fault.kind}")(fault)

    def _one(self, fault: Fault, *, inner: bool | None = None) -> Node | None:
        found = self.living()
        if inner is not None:
            found = [n for n in found if bool(n.sphere and n.sphere.hub and n.sphere.hub.children) is inner] or found
        return found[int(fault.who * len(found))] if found else None

    def _stream(self, fault: Fault, rpc: Rpc | None = Rpc.WORK) -> Connection | None:
        found = [c for c in self.network.connections if rpc is None or c.rpc is rpc]
        return found[int(fault.who * len(found))] if found else None

    def _kill(self, fault: Fault, *, silent: bool = False) -> None:
        node = self._one(fault, inner=fault.variant < 0.5)
        if node is None:
            return
        node.again = fault.strength > 0.3
        self.say(f"FAULT kill of {self.called(node)}")
        self.end(node, silent=silent)
        self._launch(node, 0.2 + fault.strength * 2)

    def end(self, node: Node, *, silent: bool = False) -> None:
        node.process.kill()
        self.network.lost(node.name, silent=silent)

    def _power(self, fault: Fault) -> None:
        self._kill(fault, silent=True)

    def _restart(self, fault: Fault) -> None:
        node = self._one(fault)
        if node is not None:
            self.say(f"FAULT restart of {self.called(node)}")
            self.end(node)
            self._launch(node, fault.strength * 0.1)

    def _leave(self, fault: Fault) -> None:
        node = self._one(fault)
        if node is not None and node.sphere is not None:
            drains, sphere = fault.variant < 0.5, node.sphere
            self.say(f"FAULT {self.called(node)} {'drains' if drains else 'leaves at once'}")
            node.leaving, node.again = True, False
            node.process.context().run((lambda: sphere.drain("a fault")) if drains else sphere.stop)

    def _join(self, fault: Fault) -> None:
        self.say("FAULT join")
        self.start_sphere(relay=fault.variant < 0.1)

    def _cut(self, fault: Fault) -> None:
        stream = self._stream(fault, Rpc.WORK if fault.variant < 0.8 else None)
        if stream is not None:
            late = fault.strength * 2
            first, second = (0.0, late) if fault.variant * 100 % 2 < 1 else (late, 0.0)
            self.say(f"FAULT cut of {stream}: known after {first:.3f} and {second:.3f} s")
            self.network.break_off(stream, first, second)

    def _half(self, fault: Fault) -> None:
        stream = self._stream(fault)
        if stream is not None:
            known = fault.strength
            ends = (None, known) if fault.variant < 0.5 else (known, None)
            self.say(f"FAULT {stream} is half open: known after {ends} s")
            self.network.break_off(stream, *ends)

    def _slow(self, fault: Fault) -> None:
        node = self._one(fault)
        if node is not None:
            factor = 2.0 + 30 * fault.strength
            self.say(f"FAULT {self.called(node)} is {factor:.1f} times as slow")
            before, node.slow = node.slow, min(node.slow * factor, MOST_SLOW)
            if fault.variant < 0.7:
                self.loop.call_later(5 * fault.strength, lambda: setattr(node, "slow", before))

    def _delay(self, fault: Fault) -> None:
        stream = self._stream(fault)
        if stream is not None:
            seconds = 3 * fault.strength**2
            self.say(f"FAULT delay of {seconds:.3f} s on {stream}")
            ends = (stream.dialler, stream.listener)
            for source, target in (ends, ends[::-1]) if fault.variant < 0.5 else (ends,):
                self.network.slow_down(source, target, seconds, lasting=fault.variant * 2)

    def _tamper(self, fault: Fault) -> None:
        stream = self._stream(fault)
        if stream is not None:
            self.say(f"FAULT {fault.kind} on {stream}, {'up' if fault.variant < 0.5 else 'down'}")
            self.network.tamper(stream.up if fault.variant < 0.5 else stream.down, fault.kind)

    _duplicate = _reorder = _corrupt = _tamper

    def _partition(self, fault: Fault) -> None:
        nodes = self.living()
        if nodes:
            count = max(1, int(len(nodes) * 0.4 * fault.variant))
            start = int(fault.who * len(nodes))
            names = [nodes[(start + i) % len(nodes)].name for i in range(count)]
            seconds = 10 * fault.strength
            both = fault.variant * 10 % 1 < 0.6
            self.say(f"FAULT partition of {' '.join(names)} for {seconds:.3f} s{'' if both else ', outward only'}")
            self.network.cut_off(names, seconds, both=both)

    def _stop(self, fault: Fault) -> None:
        node = self._one(fault, inner=fault.variant < 0.3)
        if node is None or node.process.stopped:
            return
        process, seconds = node.process, 12 * fault.strength
        if fault.variant > 0.85 and self.plan.keepalive is None:
            seconds = 200.0  # far longer than a run should need without it
        self.say(f"FAULT stop of {self.called(node)} for {seconds:.3f} s")
        process.stop()
        self.network.silence(process.name, seconds)
        before = self.network.streams_from(process.name)
        self.loop.call_later(seconds, lambda: process.stopped and self._go_on(process, seconds, before))

    def _go_on(self, process: Process, seconds: float, before: list[Pipe]) -> None:
        self.say(f"{process.name} goes on")
        if seconds > self.plan.patience * 1.1:  # it has looked at the clock at most a tick before
            self.network.fence(before)
        process.go_on()

    def _crash(self, fault: Fault) -> None:
        process, control = self.control_process, self.control
        if process is None or process.dead or process.main is None or process.main.done():
            return
        self.say("FAULT control is killed")
        process.kill()
        self.network.lost(process.name)
        if control is not None:
            control.close()
            if fault.variant < 0.2:
                with (self.directory / "journal.jsonl").open("ab") as file:
                    file.write(b'{"event":"step","step":1,"te')
        self.old_processes.append(process)
        self.loop.call_later(0.05 + 4 * fault.strength**2, self._control_again)

    def _disk(self, fault: Fault) -> None:
        seconds = 3 * fault.strength
        self.say(f"FAULT the disk is full for {seconds:.3f} s")
        self.disk.full = True
        self.loop.call_later(seconds, lambda: setattr(self.disk, "full", False))

    def _raise(self, fault: Fault) -> None:
        node = self._one(fault)
        if node is not None:
            kind = "raise" if fault.kind == "raise" else "nan"
            node.trouble = f"{kind} always" if fault.variant < 0.2 else kind
            self.say(f"FAULT the task of {self.called(node)}: {node.trouble}")

    _nan = _raise

    # ---- the story of a failure

    def _heard(self, pipe: Pipe, message: bytes) -> None:
        """Two frames with one key must have one checksum, whoever sent them."""
        connection = pipe.connection
        if pipe.up and (frame := decode_or_none(pb.WorkRequest, message)) and frame.HasField("gradient_chunk"):
            tag, chunk = frame.tag, frame.gradient_chunk
            if (tag.term, tag.step, tag.kind) != self.checksums_of:
                self.checksums_of = (tag.term, tag.step, tag.kind)
                self.checksums.clear()
            key = (tag.weights_version, chunk.block.lo, chunk.block.hi, chunk.index)
            checksum, sender = self.checksums.setdefault(key, (chunk.crc32c, connection.dialler))
            assert checksum == chunk.crc32c, f"{sender} and {connection.dialler} sent other bytes as chunk {key}"
        if self._messages:
            self._tell(pipe, message)

    def _tell(self, pipe: Pipe, message: bytes) -> None:
        connection = pipe.connection
        if pipe.up:
            text = f"{connection.dialler} -> {connection.listener}: {brief(decode_or_none(pb.WorkRequest, message))}"
        else:
            text = f"{connection.listener} -> {connection.dialler}: {brief(decode_or_none(pb.WorkResponse, message))}"
        self.say(f"    {text}")

    def _story(self, error: BaseException) -> str:
        what = f"{type(error).__name__}: {error}" if not isinstance(error, AssertionError) else str(error)
        lines = [f"seed {self.plan.seed}: {what}", f"  {self.plan}"]
        lines += [f"  fault {number}: {fault}" for number, fault in enumerate(self.plan.faults)]
        lines += ["  what happened:", *(f"    {line}" for line in self.events)]
        if self.control is not None:
            lines += ["  how they stand:", f"    {self.stand('control', self.control.tree.hub)}"]
        lines += [
            f"    {self.stand(self.called(node), node.sphere.hub)}{' STOPPED' if node.process.stopped else ''}"
            for node in self.living()
            if node.sphere is not None and node.sphere.hub is not None
        ]
        return "\n".join(lines)

    @staticmethod
    def stand(name: str, hub: Any) -> str:
        ledger = hub.ledger
        slots = {f"{b.lo}-{b.hi}": owner or "self" for b, owner in ledger.slots.items()}
        edges = {n: f"a{e.attempt} c{e.capacity:g}{'' if e.ready else ' not ready'}" for n, e in ledger.edges.items()}
        return (
            f"{name}: {hub.work} session {hub.session} attempt {ledger.attempt} f {ledger.frontier} "
            f"allowed {ledger.allowed} assigned {ledger.assigned} waiting {ledger.waiting} stuck {ledger.stuck} "
            f"slots {slots} computing {ledger.computing} queue {ledger.queue} held {sorted(ledger.held)} edges {edges} "
            f"{hub.weights!r}"
        )


def decode_or_none(kind: Any, data: bytes) -> Any:
    try:
        return decode(kind, data)
    except ArmillaryError:
        return None


def brief(message: Any) -> str:
    """Return a message in one line, without payload."""
    if message is None:
        return "garbage"
    parts = []
    for descriptor, value in message.ListFields():
        if descriptor.name == "tag":
            parts.append(f"{value.term}/{value.step}/{value.kind}")
        elif descriptor.name in ("gradient_chunk", "weights_chunk"):
            parts.append(f"chunk {value.index} of {value.block.lo}-{value.block.hi}")
        elif descriptor.name == "welcome":
            parts.append(f"welcome {'/'.join(node.id for node in value.path)}")
        elif descriptor.name in ("gradient_footer", "state_report"):
            parts.append(descriptor.name)
        else:
            text = " ".join(str(value).split()) if descriptor.message_type else str(value)
            parts.append(f"{descriptor.name} {text}"[:160])
    return ", ".join(parts)


@contextlib.contextmanager
def _made_equal(ids: random.Random) -> Iterator[None]:
    """Replace what differs from process to process, or costs much each time."""
    fingerprint = _once(environment_fingerprint)
    _once(limit_threads)
    places: list[tuple[Any, str, Any]] = [
        (uuid, "uuid4", lambda: uuid.UUID(int=ids.getrandbits(128))),
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


class _Told(logging.Handler):
    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.DEBUG)
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        self.say(f"  log {record.levelname}: {record.getMessage()}")


@contextlib.contextmanager
def _quiet(say: Callable[[str], None] | None) -> Iterator[None]:
    """Log lines go to the trace, or nowhere."""
    loggers = [logging.getLogger(name) for name in ("spheres", "control")]
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    handler = _Told(say) if say is not None else logging.NullHandler()
    try:
        for logger in loggers:
            logger.addHandler(handler)
            logger.propagate = False
            logger.setLevel(logging.DEBUG if say is not None else logging.CRITICAL + 1)
        yield
    finally:
        for logger, level, propagate in before:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
