"""What must hold of a world: after each callback of a node, at each seal and each message, and once all is over.

What a hub must hold by itself is in ``tests.invariants``; here is what takes more than one node, or the plain loop.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from control.reference import ReferenceResult, reference
from control.run_state import RunState
from control.testing import ControlNode
from spheres.blocks import Block, halves
from spheres.config import NodeConfig
from spheres.narrow import round_in_place
from spheres.numerics import add_sums
from spheres.task import Sums
from spheres.testing.clock import StalledError
from spheres.testing.memory import Pipe
from spheres.testing.network import TAMPERS
from spheres.v1 import work_pb2 as pb
from spheres.worker import Computer
from tests.invariants import HubWatch
from tests.simulation.faults import MOST_SLOW
from tests.simulation.story import decode_or_none
from tests.simulation.task import ROW, share

if TYPE_CHECKING:
    from tests.simulation.world import Node, World

#: a tree in which nothing but heartbeats moves for so long will not move again: longer than any pause or patience
STILL_SECONDS = 45.0
#: seconds of the bound on a run, for each fault
FAULT_SECONDS = 40.0
#: what a correct node never gives a correct neighbour cause to raise
BREACHES = ("ProtocolError", "CreditError", "ChecksumError", "DecodeError", "MessageTooLargeError")


class Checks:
    """Mutable state: what happened that must fit together in the end."""

    def __init__(self, world: World) -> None:
        self.world, self.plan = world, world.plan
        #: step -> the evaluation before it
        self.evaluations: dict[int, dict[str, Any]] = {}
        #: (term, step, microbatch) -> times computed
        self._computed: Counter[tuple[int, int, int]] = Counter()
        self._last_move = 0.0
        #: network.changes when the root's present work was given out, and that work
        self._changes_before: tuple[Any, int] = (None, 0)
        #: version, block and chunk -> checksum of the present step's frames, and who sent it first
        self._checksums: dict[tuple[int, ...], tuple[int, str]] = {}
        self._checksums_of: tuple[int, ...] = ()
        #: spheres with a link when control told all that the run is over, and who was above each; and when that was
        self._to_be_told: dict[str, list[str]] = {}
        self._told_at = 0.0

    # ---- meanwhile

    def computed(self, step: int, index: int) -> None:
        """A sphere has computed a microbatch."""
        self.moved()
        self._computed[self.world.term, step, index] += 1

    def moved(self) -> None:
        self._last_move = self.world.loop.time()

    def look_at(self, node: Node) -> None:
        """A callback of this sphere has run."""
        hub = getattr(node.sphere, "hub", None)
        if hub is None:
            return
        if node.watch is None:
            node.watch = HubWatch(hub, None if node.worker is None else node.worker.given)
        try:
            node.watch.check()
            self._check_step(hub)
        except AssertionError as error:
            raise AssertionError(f"{node.called}: {error}") from None

    def _check_step(self, hub: Any) -> None:
        control, network = self.world.control, self.world.network
        if control is None:
            return
        if hub.weights.term == control.tree.term:
            # while an update is streamed the next version is on its way, but nobody computes with it
            ahead = int(bool(self.plan.streams))
            assert hub.weights.version <= control.controller.step + ahead, "I8: weights of a step that is not committed"
            unit = hub.own.unit
            assert unit is None or unit.cancelled or unit.step <= control.controller.step, "I8: work of such a step"
        work, changes = self._changes_before
        if hub.work == work:
            most = network.changes - changes + 1
            if hub.ledger.attempts > most:  # so do a hurry of any node, a task that fails, a header that comes twice
                nodes = self.world.nodes.values()
                hubs = (control.tree.hub, *(getattr(node.sphere, "hub", None) for node in nodes))
                most += sum(found.watchdog.firings + found.own.failures for found in hubs if found is not None)
                # a link ends, and another begins, where weights were overwritten between a hello and its header
                most += sum(2 * found.counts.refused["torn"] for found in hubs if found is not None)
                most += self.world.counts["duplicate"]
            assert hub.ledger.attempts <= most, f"I12: {hub.ledger.attempts} attempts after {most - 1} changes"

    def of_control(self, control: ControlNode) -> Callable[[], None]:
        """Return what is to be called after each callback of this control."""
        hub = control.tree.hub
        watch = HubWatch(hub)

        def check() -> None:
            if hub.work != self._changes_before[0]:
                self._changes_before = (hub.work, self.world.network.changes)
            watch.check()

        return check

    def sealed(self, control: ControlNode) -> None:
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

    def heard(self, pipe: Pipe, message: bytes) -> None:
        """Two frames with one key must have one checksum, whoever sent them."""
        connection = pipe.connection
        if pipe.up and (frame := decode_or_none(pb.WorkRequest, message)) and frame.HasField("gradient_chunk"):
            tag, chunk = frame.tag, frame.gradient_chunk
            if (tag.term, tag.step, tag.kind) != self._checksums_of:
                self._checksums_of = (tag.term, tag.step, tag.kind)
                self._checksums.clear()
            key = (tag.weights_version, chunk.block.lo, chunk.block.hi, chunk.index)
            checksum, sender = self._checksums.setdefault(key, (chunk.crc32c, connection.dialler))
            assert checksum == chunk.crc32c, f"{sender} and {connection.dialler} sent other bytes as chunk {key}"

    def goes_on(self) -> None:
        """I5: nothing moves, and the step is not sealed; or it takes too long."""
        world, now = self.world, self.world.loop.time()
        busy = (n.worker.busy_until for n in world.living() if n.worker is not None and not n.process.stopped)
        self._last_move = max(self._last_move, world.network.last_arrival, min(now, max(busy, default=0.0)))
        still = now - self._last_move
        if still > STILL_SECONDS and any(n.computes and not n.process.stopped for n in world.nodes.values()):
            raise StalledError(f"I5: nothing has moved for {still:.0f} s")
        if now > self.bound:
            raise StalledError(f"not over after {now:.0f} s")

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

    def farewell(self) -> None:
        """Control is about to tell all spheres that the run is over."""
        self._told_at = self.world.loop.time()
        self._to_be_told = {node.name: self.world.faults.way_of(node) for node in self.world.living() if node.placed}

    # ---- afterwards

    def may_halt(self, reason: str) -> bool:
        """Whether a run is to end so: a gradient is not finite, or a task raised twice on one microbatch."""
        if "not finite" in reason:
            return self.world.counts["nan"] > 0
        return self.world.counts["raise"] > 0 and "and before that on" in reason

    def nothing_left(self) -> None:
        """All have ended, in time, and left neither task nor stream nor listener; nobody spoke who must not (N10)."""
        world = self.world
        left = [f"{node.called} has not ended" for node in world.living()]
        for process in (*world.old_processes, *(node.process for node in world.nodes.values())):
            if process.dead:
                continue
            left += [f"{process.name} has left {task!r}" for task in process.left()]
        left += [f"{connection} is open" for connection in world.network.connections]
        left += [f"{listener.owner} still listens" for listener in world.network.listeners.values()]
        left += [f"I13, N10: {text}" for text in world.network.published_after_fence]
        left += [f"reported to the loop: {report}" for report in world.loop.reports]
        assert not left, "; ".join(left[:10])

    def end(self) -> None:
        """The run is over, by its end or because it was to halt."""
        self._check_refusals()
        self._check_farewell()
        if not self.world.halted:
            self._check_journal(reference(self.world.task, self.world.config))

    def _check_farewell(self) -> None:
        """Whoever had a link and could be reached has heard that the run is over, and has not looked for control."""
        for name, way in self._to_be_told.items():
            if self.world.faults.out_of_reach(way, self._told_at):
                continue
            node = self.world.nodes[name]
            assert "no way to control" not in str(node.error), f"{node.called} was not told of the end: {node.error}"
            self.world.counts["told"] += 1

    def _check_refusals(self) -> None:
        """Where nothing changed bytes, nobody may have broken the protocol; what is stale is another matter."""
        world = self.world
        if any(world.counts[kind] for kind in TAMPERS):
            return
        hubs = [(node.called, node.sphere.hub) for node in world.nodes.values() if node.sphere is not None]
        hubs += [("control", control.tree.hub) for control in world.controls]
        for name, hub in hubs:
            broken = {} if hub is None else {k: n for k, n in hub.counts.refused.items() if k in BREACHES}
            assert not broken, f"{name} refused {broken}"

    def _check_journal(self, plain: ReferenceResult) -> None:
        world, control, plan = self.world, self.world.control, self.plan
        assert control is not None
        node, controller = control.controller.node, control.controller
        assert controller.state is RunState.COMPLETED, str(controller.state)
        assert node.manifest.sha256(control.tree.hub.weights.flat) == plain.weights_sha256, "other weights"
        digests: dict[int, str] = {}
        in_term: dict[int, int] = {}
        for line in (world.directory / "journal.jsonl").read_bytes().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                assert world.counts["control"] or world.counts["disk"], f"a broken line in the journal: {line[:80]!r}"
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
        self._count()
        if not plan.faults and not plan.relays and plan.min_spheres == plan.spheres:
            assert world.counts["recomputed"] == 0, "I11: computed twice without a fault"

    def _count(self) -> None:
        world = self.world
        world.counts["recomputed"] = sum(times - 1 for times in self._computed.values())
        world.counts["computed"] = len(self._computed)
        world.counts["messages"] = sum(world.network.messages.values()) // 2
        world.counts["events"] = world.loop.events

    def _evaluated(self, node: NodeConfig, plain: ReferenceResult) -> Sums:
        """Return the sums over the test split on the last weights, in canonical order."""
        computer = Computer(node, self.world.make_task())
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
