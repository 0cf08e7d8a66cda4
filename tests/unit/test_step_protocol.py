"""The step protocol without a loop, a clock or a socket: whole trees of shipped hubs, driven event by event.

A seed decides the tree, every delay, the faults, and so the order of everything. Replaced are the compute thread and
the links; the messages are the real bytes. A seed decides the wire of each edge, too, and whether sums are done beside
the loop. Rules N1 to N21 and invariants I1 to I13 are those of docs/protocol.md.
By hand: ``python tests/unit/test_step_protocol.py --seeds 5000``.
"""

from __future__ import annotations

import argparse
import heapq
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

import spheres.batches
from spheres.blocks import Block
from spheres.carrier import Carrier, Inline, Shared
from spheres.config import PROTOCOL_VERSION, NodeConfig
from spheres.errors import LinkClosedError, ProtocolError, SegmentError
from spheres.frames import blocks_to, decode_with_chunk
from spheres.hub import EVALUATE, TRAIN, Child, Hub, Outgoing, Work
from spheres.narrow import round_in_place
from spheres.outbox import Outbox
from spheres.reducer import Held
from spheres.sampling import evaluation_slice
from spheres.segments import Memory
from spheres.task import Sums
from spheres.tensors import Manifest, aligned_zeros
from spheres.v1 import work_pb2 as pb
from spheres.weights import Weights
from spheres.worker import Failure, Pool, Unit
from tests.invariants import HubWatch

#: elements per row; a chunk is whole rows
ROW = 16
UP, DOWN = 0, 1
#: far more than any seed needs
MOST_EVENTS = 300_000
CONTROL = "control"


def offer_through(weights: Weights, end: int) -> None:
    """Control's next chunks are final."""
    weights.prepare(weights.arrived, end)
    weights.offer(end)


def canonical(total: int, leaf: Callable[[int], Any], add: Callable[[Any, Any], Any], lo: int = 0) -> Any:
    """The plain canonical sum over ``total`` leaves, written down anew: left half the largest power of two below."""
    if total == 1:
        return leaf(lo)
    half = 1
    while half * 2 < total:
        half *= 2
    left, right = canonical(half, leaf, add, lo), canonical(total - half, leaf, add, lo + half)
    return right if left is None else left if right is None else add(left, right)


def add_plain(left: Sums, right: Sums) -> Sums:
    metrics = {name: left.metrics[name] + right.metrics[name] for name in left.metrics}
    return Sums(left.loss + right.loss, left.count + right.count, metrics)


class InlineWorker:
    """The compute thread: takes its time, reads half of the weights when it starts and half when it ends.

    A gradient that it gets back is spoilt at once: who reads it still, and says what it read, shows.
    """

    def __init__(self, node: Node) -> None:
        self.node, self.sim = node, node.sim
        allocate = aligned_zeros if node.memory is None else node.memory.allocate
        self.pool = Pool(node.sim.weights_size, allocate)
        self.free_at = 0.0
        self.given: dict[int, Held] = {}

    def submit(
        self, unit: Unit, weights: Mapping[str, Any], done: Callable[[Unit, Held | Failure | None], None]
    ) -> None:
        sim = self.sim
        start = max(sim.now, self.free_at)
        self.free_at = start + sim.rng.uniform(0.3, 2.0) * sim.compute * self.node.slowness * unit.block.width
        seen: list[Any] = []
        sim.at(start, self.node, lambda: seen.append(weights["w"][: weights["w"].size // 2].copy()))
        sim.at(self.free_at, self.node, lambda: self.finish(unit, weights, seen[0], done))

    def finish(self, unit: Unit, weights: Mapping[str, Any], first: Any, done: Callable[..., None]) -> None:
        sim = self.sim
        if unit.cancelled and sim.rng.random() < 0.5:
            done(unit, None)
            return
        block, size = unit.block, first.size
        if sim.extra.random() < sim.failing * self.node.failing:
            sim.stats["task failures"] += 1
            sim.changes += 1
            done(unit, Failure(block.lo, "a test", "", (), invalid=False))
            sim.check(self.node)
            return
        now = np.concatenate([first, weights["w"][size:]])
        sums = canonical(block.width, lambda m: sim.sums(unit.step, m, train=unit.train), add_plain, block.lo)
        array = None
        if unit.train:
            sim.computed.update((unit.step, m) for m in range(*block))
            environment = self.node.environment
            array = canonical(block.width, lambda m: sim.gradient(now, unit.step, m, environment), sim.add, block.lo)
        if array is not None:
            out = self.pool.take()
            out[:] = array
            array = out
        held = Held(array, sums)
        if array is not None:
            self.given[id(array)] = held
        done(unit, held)
        sim.check(self.node)

    def release(self, held: Held) -> None:
        if held.array is not None:
            assert self.given.pop(id(held.array)) is held, "released twice"
            before = len(self.pool)
            self.pool.give_back(held.array)
            if len(self.pool) > before:
                held.array.fill(np.nan)

    def retire(self) -> None:
        self.pool.retire()

    def close(self) -> None: ...


class Node:
    def __init__(self, sim: Simulation, name: str, incarnation: int = 1, *, relay: bool = False) -> None:
        self.sim, self.id, self.incarnation = sim, name, incarnation
        self.alive = True
        self.slowness = sim.rng.choice([1, 1, 1, 1, 8, 60])
        self.host = sim.wires.choice(sim.hosts)
        self.memory = Memory() if self.host else None
        self.worker = None if relay or name == CONTROL else InlineWorker(self)
        #: of its numbers; a later life of the name may have another
        life = f" {incarnation}" if sim.changing else ""
        self.environment = random.Random(f"{sim.seed} {name}{life}").choice(sim.environments)
        self.failing = sim.extra.choice([0, 0, 1, 5])
        self.hub = Hub(
            sim.config,
            name,
            incarnation=incarnation,
            worker=self.worker,  # type: ignore[arg-type]
            memory=self.memory,
            environment=self.environment,
        )
        #: how long its sums take beside the loop
        self.beside = sim.beside * sim.wires.choice([0.1, 1.0, 1.0, 10.0])
        if sim.beside:
            self.hub.hooks.run = self.sum_beside
        self.held_to = HubWatch(self.hub, None if self.worker is None else self.worker.given)
        self.hub.address = name
        self.hub.up.wake_up = lambda: self.link.wake(UP) if self.link else None
        self.hub.hooks.stuck = lambda: self.link.cut() if self.link else None
        self.hub.hooks.clock = lambda: sim.now
        self.hub.hooks.call_later = lambda seconds, call: sim.at(
            sim.now + seconds, self, lambda: (call(), sim.check(self))
        )
        self.link: Link | None = None
        self.session = 0
        self.ancestors: list[Any] = []
        #: a partition: until then it reaches nobody above it, and nobody reaches it
        self.alone_until = self.hidden_until = 0.0
        self.leaving = False
        #: highest (incarnation, session) taken of each child (N1)
        self.orders: dict[str, tuple[int, int]] = {}

    def sum_beside(self, works: Any, done: Callable[[BaseException | None], None]) -> None:
        """Each work when it likes; then the loop is told."""
        sim = self.sim
        left = len(works)

        def finish(work: Callable[[], None]) -> None:
            nonlocal left
            work()
            left -= 1
            if not left:
                sim.later(0.3 * self.beside, self, told)

        def told() -> None:
            sim.stats["sums beside the loop"] += 1
            done(None)
            sim.check(self)

        for work in works:
            sim.later(self.beside, self, lambda work=work: finish(work))

    # ---- the child's end, as spheres.parent has it

    def dial(self, back: int = 0) -> None:
        """Dial the ancestor ``back`` generations from the nearest, or the next one that lives."""
        if self.link is not None:
            return
        where = self.ancestors[-1 - back % len(self.ancestors)]
        target = self.sim.nodes[where.id]
        if not target.alive or max(self.alone_until, target.hidden_until) > self.sim.now:
            self.sim.later(1.0, self, lambda: self.dial(back + 1))
            return
        self.session += 1
        self.link = Link(self.sim, self, target, back)
        hub = self.hub
        hello = pb.Hello(
            protocol_version=PROTOCOL_VERSION,
            sphere_id=self.id,
            incarnation=self.incarnation,
            parent_id=where.id,
            parent_incarnation=where.incarnation,
            holds_weights=hub.weights.held,
            weights_version=max(0, hub.weights.version),
            weights_digest=hub.weights.digest,
            held=blocks_to(hub.ledger.holdings),
            capacity=hub.ledger.capacity,
            capacities=hub.mixed_capacities,
            environment_fingerprint=self.environment,
            address=hub.address,
            weights_chunks_held=hub.weights.resumable,
            weights_term=hub.weights.term,
            leaving=bool(hub.up.leaving),
        )
        if self.memory is not None:
            hello.segment.CopyFrom(self.memory.probe)
        message = pb.WorkRequest(tag=hub.tag, session=self.session, hello=hello)
        self.link.put(UP, message.SerializeToString())

    def from_parent(self, link: Link, data: bytes) -> None:
        message, payload = decode_with_chunk(pb.WorkResponse, data)
        if message.HasField("welcome"):
            if any(node.id == self.id for node in message.welcome.path):
                link.cut()  # a circle (N11)
                return
            self.ancestors = list(message.welcome.path)
            if link.welcomed:
                self.hub.renewed(self.ancestors)
            else:
                link.welcomed = True
                carrier: Carrier = Inline(self.sim.config)
                if message.welcome.HasField("segment"):
                    assert self.memory is not None
                    assert self.memory.shares(message.welcome.segment)
                    carrier = Shared(self.sim.config, self.memory)
                self.hub.relinked(self.session, self.ancestors, carrier)
                link.wake(UP)
            return
        if message.HasField("begin"):  # I6
            number = (message.tag.term, message.tag.step, message.tag.kind, message.begin.attempt)
            assert number > link.begun, f"begin {number} after {link.begun}"
            link.begun = number
        try:
            self.hub.on_response(message, payload, data)
        except (LinkClosedError, SegmentError) as error:
            # its weights were overwritten since its hello; or its parent has put them elsewhere since
            self.sim.stats[type(error).__name__] += 1
            link.cut(child_knows=True)

    # ---- the parent's end, as spheres.children has it

    def from_child(self, link: Link, data: bytes) -> None:
        message, payload = decode_with_chunk(pb.WorkRequest, data)
        if link.child_record is None:
            self.accept(link, message)
            return
        record = link.child_record
        if self.hub.children.get(record.id) is record:
            try:
                self.hub.on_request(record, message, payload)
            except SegmentError:
                # it has gone, and its memory with it: the end of its link is on the way
                assert not link.open
                self.sim.stats["memory that has gone"] += 1
            return
        self.sim.stats["of an older session"] += 1
        before = self.picture()
        self.hub.on_request(record, message, payload)
        assert self.picture() == before, "a frame of an older session changed something (I6)"

    def picture(self) -> Any:
        ledger = self.hub.ledger
        edges = [(name, e.attempt, e.ready, e.held, e.idle, e.capacity, e.credit) for name, e in ledger.edges.items()]
        return edges, ledger.waiting, dict(ledger.slots), dict(ledger.obligations), self.hub.gradients.reducer.pending

    def accept(self, link: Link, message: pb.WorkRequest) -> None:
        hello, hub = message.hello, self.hub
        order = (hello.incarnation, message.session)
        if (
            order <= self.orders.get(hello.sphere_id, (0, 0))
            or (hello.parent_id, hello.parent_incarnation) != (self.id, self.incarnation)
            or any(node.id == hello.sphere_id for node in hub.path)
        ):
            self.sim.stats["refused"] += 1
            link.cut()
            return
        self.orders[hello.sphere_id] = order
        older = hub.children.get(hello.sphere_id)
        if older is not None:
            self.sim.changes += 1
            hub.dismiss(older, "a newer session took its place")
            older.close(ProtocolError("a newer session took this one's place"))
        shares = self.memory is not None and hello.HasField("segment") and link.ends[1].host == self.host
        assert not shares or self.memory.shares(hello.segment)  # type: ignore[union-attr]
        carrier = Shared(self.sim.config, self.memory) if shares else Inline(self.sim.config)  # type: ignore[arg-type]
        self.sim.stats["shared edges" if shares else "inline edges"] += 1
        outbox = Outbox(hub.weights, carrier)
        outbox.wake = Wake(lambda: link.wake(DOWN))  # type: ignore[assignment]
        link.child_record = Child(
            id=hello.sphere_id,
            incarnation=hello.incarnation,
            session=message.session,
            address=hello.address,
            outbox=outbox,
            close=lambda _: link.cut(),
            environment=hello.environment_fingerprint,
        )
        self.sim.changes += 1
        hub.admit(link.child_record, hello, message.tag)


class Wake:
    """Stands for the event that the writer of an outbox waits for."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self.set = wake


class Link:
    """One Work stream: bytes in order, each way; each end learns of its end in its own time."""

    def __init__(self, sim: Simulation, child: Node, parent: Node, back: int) -> None:
        self.sim, self.ends, self.back = sim, (parent, child), back
        self.open = True
        self.child_record: Child | None = None
        self.welcomed = False
        self.begun: tuple[int, ...] = (0, 0, 0, 0)
        self.delay = sim.rng.choice([0.1, 0.1, 0.1, 1.0, 4.0, 20.0]) * sim.delay
        #: per direction: ends that have learnt, messages on the way, what the writer has in hand, whether it is woken
        self.over = [False, False]
        self.on_the_way = [0, 0]
        self.hand: list[Any] = [None, None]
        self.woken = [False, False]
        self.last = [0.0, 0.0]

    def receiver(self, way: int) -> Node:
        return self.ends[way]

    def sender(self, way: int) -> Node:
        return self.ends[1 - way]

    def put(self, way: int, data: bytes) -> None:
        if not self.open:
            return
        sim = self.sim
        self.on_the_way[way] += 1
        self.last[way] = max(self.last[way], sim.now + sim.rng.expovariate(1.0) * self.delay)
        sim.at(self.last[way], self.receiver(way), lambda: self.deliver(way, data))

    def deliver(self, way: int, data: bytes) -> None:
        self.on_the_way[way] -= 1
        if self.over[way]:
            return
        self.sim.stats["messages"] += 1
        if way == UP:
            self.ends[0].from_child(self, data)
        else:
            self.ends[1].from_parent(self, data)
        self.sim.check(self.receiver(way))
        if self.hand[way] is not None:
            self.send(way)

    def wake(self, way: int) -> None:
        """A writer's event is set: it has its turn soon."""
        if not self.woken[way]:
            self.woken[way] = True
            self.sim.at(self.sim.now, self.sender(way), lambda: self.turn(way))

    def turn(self, way: int) -> None:
        self.woken[way] = False
        if self.over[1 - way] or self.hand[way] is not None:
            return
        if way == UP:
            if not self.welcomed:
                return
            item: Any = self.ends[1].hub.next_up()
            self.sim.check(self.ends[1])
        else:
            if self.child_record is None:
                return
            item = self.child_record.outbox.next()
        if item is not None:
            self.hand[way] = item
            self.send(way)

    def send(self, way: int) -> None:
        """The writer waits for room, then for the transport to take the message."""
        if self.on_the_way[way] < self.sim.room and not isinstance(self.hand[way], _Leaving):
            self.hand[way] = _Leaving(self.hand[way])
            self.sim.later(0.3 * self.delay, self.sender(way), lambda: self.sent(way))

    def sent(self, way: int) -> None:
        if self.over[1 - way]:
            return
        item = self.hand[way].item
        self.hand[way] = None
        if isinstance(item, Outgoing):
            self.put(way, item.data)
            self.ends[1].hub.went_up(item, 0.0)
        else:
            self.put(way, item)
        self.wake(way)

    def cut(self, *, child_knows: bool = False) -> None:
        """It ends; ``child_knows`` where it was the child that ended it, and the parent may learn it late."""
        if not self.open:
            return
        self.open = False
        self.sim.later(0.0 if child_knows else 3.0, self.ends[1], self.lost_below)
        self.sim.later(20.0 if child_knows else 3.0, self.ends[0], self.lost_above)

    def lost_above(self) -> None:
        self.over[0] = True
        if self.child_record is not None:
            self.sim.changes += 1
            self.ends[0].hub.dismiss(self.child_record, "the link has ended")
            self.sim.check(self.ends[0])

    def lost_below(self) -> None:
        self.over[1] = True
        child = self.ends[1]
        if child.link is self:
            child.link = None
            back = 0 if self.welcomed else self.back + 1
            self.sim.later(self.sim.rng.choice([0.1, 2.0]), child, lambda: child.dial(back))


class _Leaving:
    def __init__(self, item: Any) -> None:
        self.item = item


class Simulation:
    """A tree, its control, and the event heap."""

    def __init__(self, seed: int, **fixed: Any) -> None:
        self.seed = seed
        rng = self.rng = random.Random(seed)
        self.now = 0.0
        self.heap: list[tuple[float, int, Node, Callable[[], None]]] = []
        self.count = 0
        self.stats: Counter[str] = Counter()

        #: of its own, so that a seed stays what it was on the inline wire
        wires = self.wires = random.Random(f"wires {seed}")

        def choose(name: str, *values: Any, of: random.Random = rng) -> Any:
            value = of.choice(values)
            return fixed.get(name, value)

        big = choose("big", *[False] * 19, True)
        self.total = choose("total", 1, 3, 4, 7, 8, 12, 12, 16)
        rows = choose("rows", 50, 64) if big else choose("rows", 1, 2, 3, 5, 8, 8, 16)
        self.window = choose("window", 1, 2, 2, 4)
        per_chunk = choose("per_chunk", 1, 1, 2) if not big else 1
        self.steps = choose("steps", 2, 2, 3)
        spheres = choose("spheres", *range(1, 9), 12, 19) if not big else choose("spheres", 5, 8)
        self.fan = choose("fan", 1, 2, 2, 3, 12)
        self.delay = choose("delay", 0.1, 1.0, 3.0)
        self.compute = choose("compute", 0.0, 0.3, 3.0)
        self.room = choose("room", 1, 2, 8)
        self.fault_count = choose("faults", 0, 1, 1, 2, 3, 5, 10)
        self.disturbed = self.fault_count > 0
        #: between two steps, at most
        self.pause = choose("pause", 0.0, 2.0, 40.0)
        kinds = ("leaf", "inner", "join", "restart", "flap", "stray", "partition", "leave")
        self.mix = {kind: rng.choice([0.0, 1.0, 1.0, 5.0]) for kind in kinds}
        self.mix["join"] += 0.5
        self.relays = choose("relays", 0.0, 0.1, 0.5)
        self.weights_size = rows * ROW
        #: "" shares nothing with anybody
        self.hosts = choose("hosts", [""], ["a"], ["a"], ["a", "b"], ["", "a", "a", "b"], of=wires)
        extra = self.extra = random.Random(f"extra {seed}")
        #: numeric environments, out of which each node has one; whether a later life may have another
        self.environments = choose("environments", "a", "a", "ab", "aaab", "abc", "abcdef", of=extra)
        self.changing = choose("changing", False, True, of=extra)
        #: how often a task fails, and how often somebody finds that a step is late
        self.failing = choose("failing", 0.0, 0.0, 0.02, 0.1, of=extra)
        self.hurries = choose("hurries", 0, 0, 2, 8, of=extra)
        #: how long a sum beside the loop takes; 0: it is done on the loop
        self.beside = choose("beside", 0.0, 0.3, 3.0, of=wires)
        #: whether children get the next version while it is made
        self.streams = choose("streams", False, True, of=wires)
        dtypes = choose("dtypes", *[("float32", "float32")] * 3, ("bfloat16", "float32"), ("bfloat16",) * 2, of=wires)
        self.narrow = dtypes[0] == "bfloat16"
        batch = choose("batch", self.total * 2 + 1, self.total * 3, max(1, self.total // 2))
        self.config = NodeConfig(
            run_id="run",
            manifest=Manifest.of({"w": np.zeros(self.weights_size, np.float32)}),
            batch_size=batch,
            microbatches=self.total,
            evaluation_microbatches=choose("evaluation", 1, 5, 8),
            train_size=batch * 3 + choose("tail", 0, 1, batch // 2),
            test_size=choose("test_size", 3, 40),
            chunk_bytes=ROW * 4 * per_chunk,
            window=self.window,
            gradient_dtype=dtypes[0],
            weights_dtype=dtypes[1],
        )
        # so that windows are smaller than the model: a cached property
        vars(self.config)["shared_window"] = min(self.window * wires.choice([1, 1, 2]), max(self.window, rows))
        self.step = -1
        #: whether what only some environment may compute is given up at once where that is late
        self.hopeless = extra.random() < 0.2
        self.changes = 0
        self.changes_before = 0
        self.finished = False
        self.computed: Counter[tuple[int, int]] = Counter()
        self.bases: dict[tuple[int, int], Any] = {}
        self.root = Node(self, CONTROL)
        self.root.hub.renewed([])
        self.root.hub.hooks.sealed = self.sealed
        self.root.hub.hooks.stuck = lambda: None
        self.root.hub.hooks.failed = lambda _: None
        self.nodes = {CONTROL: self.root}
        self.gradient_sum = np.zeros(self.weights_size, np.float32)
        weights = self.root.hub.weights
        weights.flat[:] = np.random.default_rng(seed).standard_normal(self.weights_size)
        weights.publish(term=1, version=0)
        self.names = 0
        for _ in range(spheres):
            self.join()
        self.faults: list[float] = []
        #: called after every event; a test's own
        self.watch: Callable[[], None] = lambda: None

    # ---- the event heap

    def at(self, when: float, node: Node, act: Callable[[], None]) -> None:
        self.count += 1
        heapq.heappush(self.heap, (when, self.count, node, act))

    def later(self, scale: float, node: Node, act: Callable[[], None]) -> None:
        self.at(self.now + self.rng.random() * scale, node, act)

    def run(self) -> None:
        with patch.object(spheres.batches, "_INLINE_ELEMENTS", 0):
            self.run_all()
        for node in self.nodes.values():
            self.stats["torn"] += node.hub.counts.refused["torn"]

    def run_all(self) -> None:
        self.later(20.0, self.root, self.next_step)
        # Counted in events, about as many as an undisturbed run of this size has; some close to each other.
        edges, chunks = len(self.nodes) - 1, self.config.chunk_count
        span = self.rng.choice([0.1, 0.5, 1.0]) * self.steps * edges * (12 + 8 * chunks)
        self.faults = sorted(self.rng.random() * span for _ in range(self.fault_count))
        hurries = sorted(self.extra.random() * span for _ in range(self.hurries))
        self.disturbed = self.disturbed or bool(self.hurries or self.failing)
        while not self.finished:
            if not self.heap:
                # I5: nothing is under way, and the step is not sealed.
                assert not self.living(), f"deadlock in step {self.step}: {self.describe()}"
                self.join()  # nobody is left: control waits for whoever comes
                continue
            while self.faults and self.faults[0] <= self.stats["events"]:
                del self.faults[0]
                self.fault()
            while hurries and hurries[0] <= self.stats["events"]:
                del hurries[0]
                self.hurry()
            self.now, _, node, act = heapq.heappop(self.heap)
            if node.alive:
                self.stats["events"] += 1
                assert self.stats["events"] < MOST_EVENTS, f"livelock in step {self.step}: {self.describe()}"
                act()
                self.watch()

    def living(self) -> list[Node]:
        """Who can compute; control waits for somebody where there is nobody."""
        return [n for n in self.nodes.values() if n.alive and n.worker is not None and not n.leaving]

    def describe(self) -> str:
        return "; ".join(
            f"{n.id}{'' if n.alive else ' dead'} {n.hub.ledger.waiting} slots {n.hub.ledger.slots} "
            f"f {n.hub.ledger.frontier} stuck {n.hub.ledger.stuck}"
            for n in self.nodes.values()
        )

    # ---- faults

    def fault(self) -> None:
        rng = self.rng
        kind = rng.choices(list(self.mix), list(self.mix.values()))[0]
        below = [n for n in self.nodes.values() if n.alive and n is not self.root]
        inner = [n for n in below if n.hub.children]
        dead = [n for n in self.nodes.values() if not n.alive]
        self.stats[kind] += 1
        if kind == "join" or not below:
            self.join()
        elif kind == "restart":
            if dead:
                old = rng.choice(dead)
                self.join(old.id, old.incarnation + 1)
        elif kind == "flap":
            self.cut(rng.choice(rng.choice([below, inner or below])), child_knows=True)
        elif kind == "stray":  # it dials somebody else, as after a move or with fallbacks that are out of date
            node = rng.choice(below)
            behind = [n for n in below if n.hub.work < node.hub.work]
            node.ancestors = list(rng.choice(behind or [self.root, *below]).hub.path) or node.ancestors
            self.cut(node, child_knows=True)
        elif kind == "partition":
            node = rng.choice(inner or below)
            node.alone_until = self.now + rng.choice([5.0, 40.0, 200.0]) * rng.random()
            node.hidden_until = rng.choice([0.0, node.alone_until])
            for other in self.nodes.values():
                if other.link is not None and node in other.link.ends:
                    other.link.cut()
        elif kind == "leave":
            node = rng.choice(below)
            node.leaving = True
            node.hub.up.leave("a drain")
            self.later(30.0, node, lambda: self.kill(node))
        elif kind == "inner":
            self.kill(rng.choice(inner or below))
        else:
            self.kill(rng.choice([n for n in below if n not in inner] or below))

    def hurry(self) -> None:
        """Some node's watchdog fires (N12); control's gives up what only those may compute that stand still (N22)."""
        nodes = [n for n in self.nodes.values() if n.alive and n.hub.ledger.active]
        self.extra.shuffle(nodes)
        for node in nodes:
            ledger, has = node.hub.ledger, node.hub.gradients.reducer.has
            late = ledger.laggards(has)
            barred = ledger.barred(has) if self.hopeless and not late else frozenset()
            if late or barred:
                self.stats["hurries"] += 1
                self.changes += 1
                node.hub._do(ledger.hurry(late) if late else ledger.set_aside(barred))
                node.hub._tell_capacity()
                self.check(node)
                return

    def cut(self, node: Node, *, child_knows: bool) -> None:
        if node.link is not None:
            node.link.cut(child_knows=child_knows)

    def kill(self, node: Node) -> None:
        node.alive = False
        for other in self.nodes.values():
            if other.link is not None and node in (other, *other.link.ends):
                other.link.cut()
        # its own links as a parent, those included that wait for an answer
        self.changes += 1

    def join(self, name: str = "", incarnation: int = 1) -> None:
        self.names += 1
        name = name or f"s{self.names}"
        places = [
            n
            for n in self.nodes.values()
            if n.alive and (n is self.root or n.hub.path) and len(n.hub.children) < self.fan and n.id != name
        ] or [self.root]
        # close to the root first, as the placement does it, but not always
        parent = places[0] if self.rng.random() < 0.5 else self.rng.choice(places)
        node = Node(self, name, incarnation, relay=self.rng.random() < self.relays)
        node.ancestors = list(parent.hub.path)
        self.nodes[name] = node
        if self.step < 0:
            self.settle(node)
        else:
            node.dial()

    def settle(self, node: Node) -> None:
        """Before the first step: link at once, so that the next one can stand below."""
        node.dial()
        while self.heap:
            self.now, _, who, act = heapq.heappop(self.heap)
            if who.alive:
                act()

    # ---- control

    def next_step(self) -> None:
        hub = self.root.hub
        if self.step + 1 == self.steps:
            self.finished = True
            return
        self.step += 1
        self.changes_before = self.changes
        if self.step and self.config.test_size and self.rng.random() < 0.3:
            hub.start(Work(1, self.step, EVALUATE), None)
            self.check(self.root)
        else:
            self.train()

    def train(self) -> None:
        self.gradient_sum.fill(np.nan)
        self.root.hub.start(Work(1, self.step, TRAIN), self.gradient_sum)
        self.check(self.root)

    def sealed(self) -> None:
        self.later(2.0, self.root, self.collect)

    def collect(self) -> None:
        """The sum against the plain one, then the seal (N15)."""
        hub, step = self.root.hub, self.step
        train = hub.work.kind == TRAIN
        computed_in = self.contributions(hub)
        total = self.total if train else self.config.evaluation_microbatches
        expected = canonical(total, lambda m: self.sums(step, m, train=train), add_plain)
        assert hub.sums is not None
        assert sums_bits(hub.sums) == sums_bits(expected), f"sums of step {step}"
        if not train:
            self.later(2.0, self.root, self.train)
            return
        plain = canonical(total, lambda m: self.gradient(hub.weights.served, step, m, computed_in[m]), self.add)
        counts = self.gradient_sum.reshape(-1, ROW)[:, -1]
        mask = float(sum(1 << m for m in range(total) if self.config.sampler.count(step, m)))
        if not self.narrow:
            assert (counts == mask).all(), f"step {step}: microbatches lost or counted twice: {set(counts)} not {mask}"
        if not hub.ledger.moved:  # else some chunks may be of another environment
            assert (self.gradient_sum.view(np.uint32) == plain.view(np.uint32)).all(), f"step {step}: wrong order"
        if not self.disturbed and not self.relays:
            assert hub.ledger.attempts == 0, "N5: attempt 0 needs neither Begin nor Ready"
            assert not hub.ledger.moved, "N22"
            assert set(self.computed.values()) == {1}, "computed twice"
        hub.seal()
        self.later(2.0, self.root, self.update)

    def update(self) -> None:
        """The optimizer's thread: it writes the weights while the loop goes on, and publishes them at the end."""
        weights, half = self.root.hub.weights, self.weights_size // 2
        new = np.float32(0.5) * weights.flat + np.float32(0.001) * self.gradient_sum
        if self.streams:
            self.stream(new)
            return
        weights.flat[:half] = new[:half]

        def finish() -> None:
            weights.flat[half:] = new[half:]
            weights.publish(term=1, version=self.step + 1)
            self.later(self.pause, self.root, self.next_step)

        self.later(1.0, self.root, finish)

    def stream(self, new: Any) -> None:
        """As the controller does it: announce the next version, publish it chunk by chunk, seal it."""
        hub, size, step = self.root.hub, self.config.chunk_elements, self.step
        weights = hub.weights
        weights.announce(term=1, version=step + 1)
        if step + 1 < self.steps:
            hub.announce(Work(1, step + 1, EVALUATE))

        def go_on(index: int) -> None:
            if index == self.config.chunk_count:
                weights.seal()
                hub.stream()
                self.later(self.pause, self.root, self.next_step)
                return
            weights.flat[index * size : (index + 1) * size] = new[index * size : (index + 1) * size]
            offer_through(weights, index + 1)
            hub.stream()
            self.check(self.root)
            self.later(1.0, self.root, lambda: go_on(index + 1))

        self.later(1.0, self.root, lambda: go_on(0))

    def contributions(self, hub: Hub) -> list[str]:
        """The environment in which each microbatch was computed: that for which it was meant (N22)."""
        parts = hub.gradients.contributions(Block(0, hub.ledger.total))
        assert [i for part in parts for i in range(*part.block)] == list(range(hub.ledger.total)), parts
        ledger = hub.ledger
        meant = [name for lo, hi, name in ledger.environments for _ in range(lo, hi)]
        assert len(meant) == ledger.total
        found = [self.nodes[part.sphere].environment for part in parts for _ in range(*part.block)]
        self.stats["mixed steps"] += len(set(meant)) > 1
        self.stats["mixed recomputes"] += len(ledger.moved)
        wrong = {i for i, (a, b) in enumerate(zip(meant, found, strict=True)) if a != b}
        assert wrong <= ledger.moved, "N22"  # it may have been held by one that has come back
        return found

    # ---- the task

    def gradient(self, weights: Any, step: int, index: int, environment: str) -> Any:
        """A pure function of weights, step, index, environment: -0.0 first in each row, 2 ** index last."""
        if not self.config.sampler.count(step, index):
            return None
        base = self.bases.get((step, index))
        if base is None:
            q = np.random.default_rng((self.seed, step, index))
            shape = (self.weights_size // ROW, ROW)
            base = (q.standard_normal(shape) * 10.0 ** q.integers(-3, 4, shape)).astype(np.float32)
            base = self.bases[step, index] = base.reshape(-1)
        out = base + weights * np.float32(1 + index % 3) + np.float32("abcdef".index(environment))
        out[::ROW] = -0.0
        out[ROW - 1 :: ROW] = float(1 << index)
        round_in_place(out, self.config.gradient_dtype)
        return out

    def add(self, left: Any, right: Any) -> Any:
        """A node of the canonical sum."""
        total = left + right
        round_in_place(total, self.config.gradient_dtype)
        return total

    def sums(self, step: int, index: int, *, train: bool) -> Sums | None:
        if train:
            count = self.config.sampler.count(step, index)
        else:
            count = evaluation_slice(self.config.test_size, self.config.evaluation_microbatches, index).size
        if not count:
            return None
        loss = random.Random(f"{self.seed} {step} {index} {train}").uniform(-1e3, 1e3)
        return Sums(loss, int(count), {"accuracy": loss * 1e-7, "other": 1e9 + index})

    # ---- invariants

    def check(self, node: Node) -> None:
        """What must hold whenever a node's hub was called."""
        hub, ledger = node.hub, node.hub.ledger
        assert hub.weights.version <= max(0, self.step + 1), "I8"
        if hub.work.step == self.step:
            # one that is set aside and computes again later changes twice, here and above
            most = self.changes - self.changes_before + 1 + 4 * self.stats["task failures"]
            assert ledger.attempts <= most, "I12"
        node.held_to.check()


def sums_bits(sums: Sums) -> Any:
    return struct.pack("<d", sums.loss), sums.count, {k: struct.pack("<d", v) for k, v in sums.metrics.items()}


def attempt(seed: int, **fixed: Any) -> Counter[str]:
    """One seed; what goes wrong names it."""
    simulation = Simulation(seed, **fixed)
    try:
        simulation.run()
    except Exception as error:
        raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    return simulation.stats


@pytest.mark.parametrize("first", range(0, 180, 30))
def test_any_tree_with_any_faults_gives_the_bits_of_the_plain_sum(first: int) -> None:
    for seed in range(first, first + 30):
        attempt(seed)


def small_tree(seed: int, parents: Mapping[str, str], **fixed: Any) -> Simulation:
    """A tree of this shape, where nothing happens but what the test does."""
    quiet = {"environments": "a", "failing": 0.0, "hurries": 0}
    fixed = {"rows": 8, "window": 2, "steps": 1, **quiet, **fixed}
    simulation = Simulation(seed, spheres=0, faults=0, relays=0.0, total=12, per_chunk=1, big=False, **fixed)
    simulation.disturbed = True
    for name, parent in parents.items():
        node = simulation.nodes[name] = Node(simulation, name)
        node.ancestors = list(simulation.nodes[parent].hub.path)
        node.slowness = 1
        simulation.settle(node)
    return simulation


def expand(blocks: Iterable[Block]) -> set[int]:
    return {i for block in blocks for i in range(*block)}


@pytest.mark.parametrize("seed", range(8))
def test_a_leaf_that_dies_costs_its_own_microbatches(seed: int) -> None:
    """N4, I11: what others computed is not computed again."""
    simulation = small_tree(seed, {"s1": CONTROL, "s2": CONTROL, "s3": CONTROL})
    leaf, ledger = simulation.nodes["s2"], simulation.root.hub.ledger
    lost: set[int] = set()

    def watch() -> None:
        if leaf.alive and leaf.hub.ledger.held and ledger.frontier >= seed % 4:
            lost.update(expand(leaf.hub.ledger.held))
            simulation.kill(leaf)

    simulation.watch = watch
    simulation.run()
    assert lost
    assert {index for (_, index), times in simulation.computed.items() if times > 1} <= lost


@pytest.mark.parametrize("seed", range(8))
def test_an_inner_sphere_that_dies_leaves_what_its_child_computed(seed: int) -> None:
    """N4, N7: an orphan offers its blocks; only the dead sphere's own are computed again."""
    simulation = small_tree(seed, {"s1": CONTROL, "s2": "s1"})
    inner, orphan = simulation.nodes["s1"], simulation.nodes["s2"]
    lost: set[int] = set()

    def watch() -> None:
        if inner.alive and inner.hub.ledger.held and orphan.hub.ledger.held and not orphan.hub.ledger.queue:
            lost.update(expand(inner.hub.ledger.held))
            simulation.kill(inner)

    simulation.watch = watch
    simulation.run()
    assert lost
    assert {index for (_, index), times in simulation.computed.items() if times > 1} == lost


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("catch_up", [2, 3])
def test_a_child_that_is_ahead_waits_until_its_parent_has_caught_up(seed: int, catch_up: int) -> None:
    """N14: a header of the past ends no link. When the parent comes to the same step, the child goes on with it."""
    simulation = small_tree(seed, {"s1": CONTROL, "s2": CONTROL, "s3": CONTROL}, steps=6, test_size=0, delay=0.1)
    behind, ahead, other = (simulation.nodes[name] for name in ("s1", "s2", "s3"))
    session, parked = 0, False

    def watch() -> None:
        nonlocal session, parked
        if simulation.step == 1 and not behind.alone_until:
            behind.alone_until = 1e9
            simulation.cut(behind, child_knows=True)
        elif simulation.step == 2 and ahead.hub.work.kind == TRAIN and ahead.hub.work.step == 2 and not session:
            other.slowness = 500 if catch_up == 2 else 1  # the step is still open when they come back together
            if ahead.hub.ledger.held:
                ahead.ancestors = list(behind.hub.path)
                simulation.cut(ahead, child_knows=True)
                session = ahead.session + 1
        elif simulation.step >= catch_up and ahead.id in behind.hub.children:
            parked = parked or behind.hub.work < ahead.hub.work
            behind.alone_until = 1.0

    simulation.watch = watch
    simulation.run()
    assert parked
    assert ahead.session == session, "its link ended"


@pytest.mark.parametrize("seed", range(8))
def test_a_parent_that_gives_out_a_step_which_its_child_has_begun_already(seed: int) -> None:
    """N14, N5: the first assignment rides on the header; the child keeps what it holds."""
    simulation = small_tree(seed, {"s1": CONTROL, "s2": CONTROL}, steps=3, test_size=0, compute=0.3)
    late, early = simulation.nodes["s1"], simulation.nodes["s2"]
    moved = False

    def watch() -> None:
        nonlocal moved
        if simulation.step == 1 and early.hub.ledger.held and early.hub.work.step == 1 and not moved:
            assert late.link is not None
            assert (late.hub.work.step, late.hub.work.kind) < (1, TRAIN)  # its weights may be on their way
            moved = True
            early.ancestors = list(late.hub.path)
            simulation.cut(early, child_knows=True)
        if simulation.step == 0 and late.hub.ledger.finished and late.link is not None:
            late.link.delay = 500.0  # the next header will be long on its way

    simulation.watch = watch
    simulation.run()
    assert moved


@pytest.mark.parametrize("seed", range(8))
def test_a_computation_of_the_step_before_ends_into_nothing(seed: int) -> None:
    """N14: the same block is owed again, and computed again on the new weights."""
    simulation = small_tree(seed, {"s1": CONTROL, "s2": CONTROL}, steps=3, test_size=0, compute=1.0)
    slow, other = simulation.nodes["s1"], simulation.nodes["s2"]
    slow.slowness, other.slowness = 200, 1

    def watch() -> None:
        if simulation.step == 0 and slow.hub.ledger.computing is not None and not slow.alone_until:
            slow.alone_until = 1e9
            simulation.cut(slow, child_knows=True)
        elif simulation.step == 1:
            slow.alone_until = 1.0

    simulation.watch = watch
    simulation.run()


@pytest.mark.parametrize("seed", range(8))
def test_frames_of_an_older_session_change_nothing(seed: int) -> None:
    """I6: they arrive after the next session's hello."""
    names = {"s1": CONTROL, "s2": CONTROL, "s3": CONTROL}
    simulation = small_tree(seed, names, delay=0.1, compute=0.3, room=8, window=4, test_size=0)
    leaf, victim = simulation.nodes["s1"], simulation.nodes["s2"]
    first, leaf.slowness = leaf.session, 500

    def watch() -> None:
        link = leaf.link
        if link is None:
            return
        if leaf.session != first:
            link.delay = 20.0  # the new session's own Ready comes late
        elif victim.alive and leaf.hub.ledger.computing is not None:
            link.delay = 5.0
            simulation.kill(victim)
        elif leaf.hub.ledger.attempt == 1 and link.on_the_way[UP] and link.hand[UP] is None:
            simulation.cut(leaf, child_knows=True)  # its Ready is on the way, and the next session has an attempt 1 too

    simulation.watch = watch
    simulation.run()
    assert leaf.session > first


@pytest.mark.parametrize("seed", range(24))
def test_a_sum_that_is_under_way_while_children_begin_anew_reads_what_they_sent(seed: int) -> None:
    """N4, N19: it counts as sent and is not recalled; what children have sent lies where it lay."""
    names = {"p": CONTROL, "c": "p", "l": "c", "x": "p", "y": CONTROL}
    fixed: dict[str, Any] = {"delay": 0.1, "compute": 0.3, "room": 8, "test_size": 0, "window": 4, "rows": 4}
    simulation = small_tree(seed, names, hosts=["a"], beside=0.01, dtypes=("float32", "float32"), **fixed)
    parent, child, victim = (simulation.nodes[name] for name in ("p", "c", "x"))
    parent.beside, child.beside = 200.0, 0.01
    victim.slowness = 500  # something is always open where it is lost

    def watch() -> None:
        if victim.alive and parent.hub.batches.batch is not None and len(parent.hub.ledger.obligations) > 1:
            simulation.stats["in time"] += 1
            simulation.kill(victim)

    simulation.watch = watch
    simulation.run()


def hung(environments: Mapping[str, str], parents: Mapping[str, str], who: str) -> Simulation:
    """The task of one sphere never returns, while its links live; a watchdog fires whenever all is quiet."""
    simulation = small_tree(1, {}, test_size=0, hosts=[""])
    for name, parent in parents.items():
        simulation.environments = environments[name]
        node = simulation.nodes[name] = Node(simulation, name)
        node.ancestors = list(simulation.nodes[parent].hub.path)
        node.slowness = 1
        simulation.settle(node)
    simulation.nodes[who].worker.submit = lambda *_: None  # type: ignore[union-attr,method-assign]
    fired = 0

    def watch() -> None:
        nonlocal fired
        if not simulation.heap and simulation.step == 0 and fired < 20:
            fired += 1
            simulation.hopeless = fired > 5
            simulation.hurry()
            simulation.at(simulation.now + 1, simulation.root, lambda: None)

    simulation.watch = watch
    simulation.run()
    return simulation


@pytest.mark.parametrize("below", ["a", "b"])
def test_what_a_hung_inner_sphere_was_to_compute_is_done_by_equal_ones(below: str) -> None:
    """N12, N22: also where its child, whose part it hands on with its own, is of another environment."""
    parents = {"x": CONTROL, "y": CONTROL, "p": CONTROL, "q": "p"}
    simulation = hung({"x": "a", "y": "a", "p": "a", "q": below}, parents, "p")
    assert simulation.stats["hurries"]
    assert not simulation.stats["mixed recomputes"]


def test_the_only_sphere_of_an_environment_that_hangs_is_not_waited_for_for_ever() -> None:
    """N22."""
    simulation = hung({"x": "a", "y": "a", "p": "b"}, dict.fromkeys("xyp", CONTROL), "p")
    assert simulation.stats["mixed recomputes"] == 4


@pytest.mark.parametrize("seed", range(12))
def test_a_joiner_that_comes_as_a_step_ends_gets_no_mixture_of_versions(seed: int) -> None:
    """N15, N17: what waits for it, or is half on its way, ends with the seal."""
    simulation = small_tree(seed, {"s1": CONTROL}, steps=3, delay=0.1, compute=0.3, test_size=0, pause=40.0)
    after = seed % 4

    def watch() -> None:
        if "s2" not in simulation.nodes and simulation.root.hub.ledger.frontier > after:
            joiner = simulation.nodes["s2"] = Node(simulation, "s2")
            joiner.ancestors = list(simulation.root.hub.path)
            joiner.dial()
            assert joiner.link is not None
            joiner.link.delay = 4.0 * (1 + seed)

    simulation.watch = watch
    simulation.run()
    assert simulation.nodes["s2"].session == 1, "its link ended"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--most", type=int, default=10)
    arguments = parser.parse_args()
    bad: list[str] = []
    stats: Counter[str] = Counter()
    for number in range(arguments.start, arguments.start + arguments.seeds):
        try:
            stats += attempt(number)
        except AssertionError as failure:
            bad.append(str(failure)[:300])
            if len(bad) >= arguments.most:
                break
    print(  # noqa: T201
        f"{number - arguments.start + 1} seeds, {len(bad)} bad", dict(stats), *bad, sep="\n"
    )
