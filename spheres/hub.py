"""The noun that control and spheres share: a range in, canonical blocks out, in chunk order.

One hub is one actor: every method runs to its end on the event loop, none awaits, so no state is ever half changed. It
carries out what the ledger decides. It does not dial, serve or encode links: ``children`` and ``parent`` do.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter

import numpy as np
import numpy.typing as npt

from spheres.blocks import Block, is_canonical
from spheres.config import NodeConfig
from spheres.errors import ChecksumError, ProtocolError, StaleError, WrongRunError
from spheres.frames import block_from, blocks_from, blocks_to, encode_with_chunk
from spheres.ledger import SELF, Action, Ledger, SendAssign, SendBegin, SendCredit, SendReady, Stuck
from spheres.numerics import crc32c
from spheres.outbox import Outbox
from spheres.phases import PhaseTimes
from spheres.reducer import Held, Reducer
from spheres.task import Sums
from spheres.v1 import common_pb2
from spheres.v1 import work_pb2 as pb
from spheres.weights import Weights
from spheres.worker import Failure, Unit, Worker

__all__ = ["Child", "Hub", "Outgoing", "Work"]

log = logging.getLogger(__name__)
Array = npt.NDArray[np.float32]

TRAIN, EVALUATE = common_pb2.WORK_KIND_TRAIN, common_pb2.WORK_KIND_EVALUATE


@dataclass(frozen=True, order=True, slots=True)
class Work:
    """Which step's messages: ordered as steps follow each other (N1)."""

    term: int
    step: int
    kind: common_pb2.WorkKind.ValueType


@dataclass
class Child:
    """A child with an open link."""

    id: str
    incarnation: int
    session: int
    address: str
    outbox: Outbox
    #: ends its link, with the reason
    close: Callable[[Exception], None]
    environment: str = ""

    @property
    def order(self) -> tuple[int, int]:
        return self.incarnation, self.session


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A gradient message on its way up, and what to note once it has left."""

    data: bytes
    work: Work
    attempt: int
    block: Block
    index: int
    last: bool


@dataclass
class Hooks:
    """What a node does with what its hub finds; each is set once by its owner."""

    #: the root has everything of a step
    sealed: Callable[[], None] = lambda: None
    #: blocks are owed that nobody below can compute
    stuck: Callable[[], None] = lambda: None
    failed: Callable[[pb.TaskFailure], None] = lambda _: None
    reported: Callable[[pb.StateReport], None] = lambda _: None
    directed: Callable[[pb.Directive], None] = lambda _: None
    joined: Callable[[Child], None] = lambda _: None
    lost: Callable[[Child, str], None] = lambda _child, _reason: None
    #: the subtree's capacity is another
    resized: Callable[[], None] = lambda: None


@dataclass
class Counts:
    """What this node has done in its incarnation."""

    microbatches: int = 0
    samples: int = 0
    up_bytes: int = 0
    refused: Counter[str] = field(default_factory=Counter)


class Hub:
    """Mutable state: the present work, the ledger, the reducer, the weights, the children, what waits to go up."""

    def __init__(self, config: NodeConfig, node_id: str, *, incarnation: int = 1, worker: Worker | None = None) -> None:
        self.config, self.id, self.incarnation = config, node_id, incarnation
        self.root = node_id == "control"
        self.hooks = Hooks()
        self.counts = Counts()
        self.weights = Weights(config)
        self.ledger = Ledger(config.window, computes=worker is not None, root=self.root)
        self.children: dict[str, Child] = {}
        #: nodes from control to this one; children's fallbacks come from it (N11)
        self.path: list[pb.Ancestor] = []
        self.work = Work(0, -1, common_pb2.WORK_KIND_UNSPECIFIED)
        self.version = -1
        self.phases = PhaseTimes()
        #: the root's sums: one gradient, and what came with it
        self.gradient: Array | None = None
        self.sums: Sums | None = None
        self.contributions: dict[Block, list[tuple[Block, str]]] = {}
        #: called when something may go up
        self.wake_up: Callable[[], None] = lambda: None
        self.session = 0
        self._worker = worker
        self._unit: Unit | None = None
        self._reducer = Reducer(config.chunk_elements)
        self._up: list[pb.WorkRequest] = []
        self._capacity = self.ledger.capacity
        self._started = 0.0
        self._down_bytes = 0
        #: payload bytes of gradients that children have sent
        self.received_bytes = 0

    def __repr__(self) -> str:
        return f"Hub({self.id}, {self.work}, frontier {self.ledger.frontier}, {len(self.children)} children)"

    @property
    def tag(self) -> pb.Tag:
        work = self.work
        return pb.Tag(
            run_id=self.config.run_id, term=work.term, step=work.step, kind=work.kind, weights_version=self.version
        )

    @property
    def sent_down_bytes(self) -> int:
        """Payload bytes sent to children, those of links that have ended included."""
        return self._down_bytes + sum(child.outbox.sent_bytes for child in self.children.values())

    @property
    def activity(self) -> str:
        """What this node is doing, in words."""
        if self._unit is not None:
            return f"computing {self._unit.block} of step {self.work.step}"
        if not self.weights.complete:
            return "receiving weights"
        if self.ledger.waiting:
            return f"gathering {len(self.ledger.waiting)} children"
        return "done" if self.ledger.finished else f"at chunk {self.ledger.frontier} of step {self.work.step}"

    @property
    def elapsed(self) -> float:
        """Seconds since this node began the present work."""
        return perf_counter() - self._started

    # ---- root: control's side

    def start(self, work: Work, gradient: Array | None) -> None:
        """Begin a step on the published weights. ``gradient`` takes the sum of a training step."""
        self.gradient = gradient
        self._begin(work, self.weights.version, [Block(0, self._total(work.kind))])

    def seal(self) -> None:
        """The weights are about to be written: no transfer may read them any more (N15)."""
        for child in self.children.values():
            child.outbox.abort()
        self.weights.withdraw()

    def direct(self, directive: pb.Directive) -> None:
        """Send a directive down, hop by hop."""
        for child in self.children.values():
            child.outbox.notice(pb.WorkResponse(directive=directive))

    # ---- parent edge: what came down

    def on_response(self, message: pb.WorkResponse) -> None:
        """Handle a message of the parent. Raises ProtocolError and its kinds: then the link must end."""
        if message.HasField("directive"):
            self._on_directive(message.directive)
            return
        tag = message.tag
        if tag.run_id != self.config.run_id:
            raise WrongRunError(f"a message of run {tag.run_id!r}; this is run {self.config.run_id!r}")
        work = Work(tag.term, tag.step, tag.kind)
        if message.HasField("weights_header"):
            if work < self.work:
                raise StaleError(f"weights of {work}; {self.work} is known")
            self._on_header(work, tag.weights_version, message)
        elif work != self.work:
            self.counts.refused["stale"] += 1
            return
        if message.HasField("begin"):
            self._do(self.ledger.begin(message.begin.attempt, message.begin.from_chunk))
        if message.HasField("assign") and not message.HasField("weights_header"):
            assign = message.assign
            self._try(
                lambda: self._do(self.ledger.assign(assign.attempt, assign.from_chunk, self._owed(assign, tag.kind)))
            )
        if message.HasField("weights_chunk"):
            self.weights.put(message.weights_chunk)
            self._wake_children()
        if message.HasField("weights_footer"):
            self.weights.finish(message.weights_footer.digest)
            self.phases.add("send_down", perf_counter() - self._started)
            self._wake_children()
            self._compute()
        if message.HasField("credit"):
            self._try(lambda: self.ledger.credit(message.credit.attempt, message.credit.through_chunk))
            self.wake_up()

    def _try(self, change: Callable[[], None]) -> None:
        """Messages of an older attempt are no fault: they crossed a newer one. They are counted and dropped (I6)."""
        try:
            change()
        except StaleError:
            self.counts.refused["stale"] += 1

    def relinked(self, session: int, path: Iterable[pb.Ancestor]) -> None:
        """A parent took this node in: the obligations of the session before are void (N5b)."""
        self.session = session
        self._up = [m for m in self._up if m.HasField("task_failure") or m.HasField("state_report")]
        self.ledger.relinked()
        self._settle()
        self._capacity = self.ledger.capacity
        self.renewed(path)

    def renewed(self, path: Iterable[pb.Ancestor]) -> None:
        """The nodes above are these now; children learn their fallbacks from it (N11)."""
        self.path = [*path, pb.Ancestor(id=self.id, incarnation=self.incarnation, address=self.address)]
        for child in self.children.values():
            child.outbox.notice(self.welcome())

    #: where children dial this node; empty where it takes none
    address = ""

    def welcome(self) -> pb.WorkResponse:
        return pb.WorkResponse(tag=self.tag, welcome=pb.Welcome(path=self.path))

    def held(self) -> list[Block]:
        """Blocks of the present step that are held or being computed here."""
        blocks = set(self.ledger.held)
        if self.ledger.computing is not None:
            blocks.add(self.ledger.computing)
        return sorted(blocks)

    def _on_header(self, work: Work, version: int, message: pb.WorkResponse) -> None:
        header, weights = message.weights_header, self.weights
        if header.manifest_digest != self.config.manifest.digest:
            raise ProtocolError("weights of another layout")
        if header.held_digest:
            if not weights.complete or (version, header.held_digest) != (weights.version, weights.digest):
                raise ProtocolError(f"the parent takes weights v{version} as held; held: {weights!r}")
            weights.term = work.term
        else:
            for child in self.children.values():
                child.outbox.abort()
            weights.begin(
                term=work.term,
                version=version,
                previous_digest=header.previous_digest,
                from_chunk=header.from_chunk,
            )
        blocks = self._owed(message.assign, work.kind) if message.HasField("assign") else None
        if work > self.work:
            self._begin(work, version, blocks)
            return
        self.version = version
        for child in self.children.values():
            child.outbox.header(self.tag)
        if blocks is not None:
            self._do(self.ledger.resume(blocks))

    def _begin(self, work: Work, version: int, blocks: list[Block] | None) -> None:
        """A new step: drop all of the old one (N14), then give out the new one."""
        self.work, self.version = work, version
        self._started = perf_counter()
        if self._unit is not None:
            self._unit.cancelled = True
            self._unit = None
        for held in self._reducer.cache.values():
            if self._worker is not None:
                self._worker.release(held)
        self._reducer.cache.clear()
        self._up = [m for m in self._up if not m.HasField("ready")]
        self.phases.clear()
        self.sums = None
        tag = self.tag
        for child in self.children.values():
            child.outbox.header(tag)
        chunks = self.config.chunk_count if work.kind == TRAIN else 0
        self._do(self.ledger.start(self._total(work.kind), chunks, blocks))

    def _total(self, kind: common_pb2.WorkKind.ValueType) -> int:
        return self.config.microbatches if kind == TRAIN else self.config.evaluation_microbatches

    def _owed(self, assign: pb.Assign, kind: common_pb2.WorkKind.ValueType) -> list[Block]:
        """Check what the parent asks for: canonical blocks that do not overlap (N3)."""
        blocks = sorted(self._canonical(assign.blocks, kind))
        for before, after in pairwise(blocks):
            if before.hi > after.lo:
                raise ProtocolError(f"assigned blocks {before} and {after} overlap")
        return blocks

    def _canonical(self, messages: Iterable[pb.Block], kind: common_pb2.WorkKind.ValueType) -> list[Block]:
        blocks, total = blocks_from(messages), self._total(kind)
        for block in blocks:
            if not is_canonical(block, total):
                raise ProtocolError(f"{block} is no canonical block of {total} microbatches")
        return blocks

    def _on_directive(self, directive: pb.Directive) -> None:
        if directive.target_sphere_id != self.id:
            self.direct(directive)
        if directive.target_sphere_id in ("", self.id):
            self.hooks.directed(directive)

    # ---- child edges: what came up

    def admit(self, child: Child, hello: pb.Hello, tag: pb.Tag) -> None:
        """A child's hello was accepted: its link is open."""
        self.children[child.id] = child
        if hello.holds_weights:
            child.outbox.holds = (self.weights.term, hello.weights_version, hello.weights_digest)
        child.outbox.notice(self.welcome())
        if self.work.step >= 0:
            child.outbox.header(self.tag)
        holds = bool(hello.held) and Work(tag.term, tag.step, tag.kind) == self.work
        self.hooks.joined(child)
        self._do(self.ledger.child_joined(child.id, hello.capacity, holds=holds))
        self._tell_capacity()

    def dismiss(self, child: Child, reason: str) -> None:
        """A child's link has ended."""
        if self.children.get(child.id) is not child:
            return
        del self.children[child.id]
        self._down_bytes += child.outbox.sent_bytes
        self.hooks.lost(child, reason)
        self._do(self.ledger.child_lost(child.id))
        self._tell_capacity()

    def on_request(self, child: Child, message: pb.WorkRequest) -> None:
        """Handle a message of a child. Raises ProtocolError and its kinds: then its link must end."""
        if message.HasField("task_failure"):
            self.fail(message.task_failure)
            return
        if message.HasField("state_report"):
            self.report(message.state_report)
            return
        if message.HasField("capacity"):
            self._do(self.ledger.child_changed(child.id, capacity=message.capacity.capacity))
            self._tell_capacity()
            return
        if message.HasField("leaving"):
            self._do(self.ledger.child_changed(child.id, leaving=True))
            self._tell_capacity()
            return
        tag = message.tag
        if tag.run_id != self.config.run_id:
            raise WrongRunError(f"a message of run {tag.run_id!r}; this is run {self.config.run_id!r}")
        if message.session != child.session or Work(tag.term, tag.step, tag.kind) != self.work:
            self.counts.refused["stale"] += 1
            return
        self._try(lambda: self._on_step(child, message))

    def _on_step(self, child: Child, message: pb.WorkRequest) -> None:
        if message.HasField("ready"):
            ready = message.ready
            held = self._canonical(ready.held, self.work.kind)
            self._do(self.ledger.child_ready(child.id, message.attempt, held, idle=ready.idle))
        if message.HasField("gradient_header"):
            header = message.gradient_header
            block = block_from(header.block)
            self.ledger.accepts(child.id, message.attempt, block, -1)
            if header.weights_digest != self.weights.digest:
                raise ProtocolError(
                    f"{child.id} computed {block} on weights {header.weights_digest.hex()}, "
                    f"v{self.version} is {self.weights.digest.hex()}"
                )
            sums = None
            if not header.absent:
                metrics = {m.name: m.value for m in header.metrics}
                sums = Sums(header.loss_sum, header.samples_count, metrics)
            self._reducer.header(block, sums, absent=header.absent)
        if message.HasField("gradient_chunk"):
            self._on_chunk(child, message.attempt, message.gradient_chunk)
        if message.HasField("gradient_footer"):
            footer = message.gradient_footer
            block = block_from(footer.block)
            self.ledger.accepts(child.id, message.attempt, block, -1)
            self.phases.merge(footer.phases)
            self.contributions[block] = [(block_from(c.block), c.sphere_id) for c in footer.contributions]
        self._flow()

    def _on_chunk(self, child: Child, attempt: int, chunk: pb.Chunk) -> None:
        block, index, data = block_from(chunk.block), chunk.index, chunk.data
        news = self.ledger.accepts(child.id, attempt, block, index)
        elements = self.config.chunk_elements
        start = index * elements
        train = self.work.kind == TRAIN
        size = min(elements, self.config.manifest.size - start) if train else 0
        if index < 0 or chunk.offset_bytes != start * 4 or len(data) != size * 4:
            raise ProtocolError(f"{child.id}: chunk {index} of {block} at byte {chunk.offset_bytes}, {len(data)} bytes")
        if not self._reducer.has_header(block):
            raise ProtocolError(f"{child.id}: chunk {index} of {block} came before its header")
        if crc32c(data) != chunk.crc32c:
            raise ChecksumError(f"{child.id}: chunk {index} of {block} does not fit its checksum")
        self.received_bytes += len(data)
        if news:
            self._reducer.chunk(block, index, np.frombuffer(data, np.float32))

    # ---- both

    def fail(self, failure: pb.TaskFailure) -> None:
        """A task failed here or below: it goes to control, which halts the run."""
        if self.root:
            self.hooks.failed(failure)
        else:
            self._send_up(pb.WorkRequest(task_failure=failure))

    def report(self, report: pb.StateReport) -> None:
        """A sphere's state, on its way to control."""
        if self.root:
            self.hooks.reported(report)
        else:
            self._send_up(pb.WorkRequest(state_report=report))

    def leave(self, reason: str) -> None:
        """Tell the parent that this node goes."""
        self._send_up(pb.WorkRequest(leaving=pb.Leaving(reason=reason)))

    def _send_up(self, message: pb.WorkRequest) -> None:
        message.tag.CopyFrom(self.tag)
        message.session = self.session
        self._up.append(message)
        self.wake_up()

    def _tell_capacity(self) -> None:
        capacity = self.ledger.capacity
        if capacity == self._capacity:
            return
        self._capacity = capacity
        self.hooks.resized()
        if not self.root:
            self._send_up(pb.WorkRequest(capacity=pb.Capacity(capacity=capacity)))

    def _do(self, actions: list[Action]) -> None:
        """Carry out what the ledger decided, in its order."""
        self._settle()
        for action in actions:
            match action:
                case SendBegin(child, attempt, from_chunk):
                    begin = pb.Begin(attempt=attempt, from_chunk=from_chunk)
                    self.children[child].outbox.step(pb.WorkResponse(tag=self.tag, begin=begin))
                case SendAssign(child, attempt, from_chunk, blocks):
                    assign = pb.Assign(attempt=attempt, from_chunk=from_chunk, blocks=blocks_to(blocks))
                    self.children[child].outbox.step(pb.WorkResponse(tag=self.tag, assign=assign))
                case SendCredit(child, attempt, through):
                    credit = pb.Credit(attempt=attempt, through_chunk=through)
                    self.children[child].outbox.credit(pb.WorkResponse(tag=self.tag, credit=credit))
                case SendReady(attempt, held, idle):
                    ready = pb.Ready(held=blocks_to(held), idle=idle)
                    self._send_up(pb.WorkRequest(attempt=attempt, ready=ready))
                case Stuck():
                    self.hooks.stuck()
        self._compute()
        self._flow()

    def _settle(self) -> None:
        """Where the slots changed, what children sent for the old ones is dropped."""
        if self._reducer.slots is not self.ledger.slots:
            self._reducer.forget(self.ledger.slots)
            self.contributions.clear()

    def _flow(self) -> None:
        """Let go upward what can go: into the gradient at the root, else by waking the writer."""
        if not self.root:
            self.wake_up()
            return
        ledger, reducer = self.ledger, self._reducer
        while (item := ledger.sendable(reducer.has)) is not None:
            block, index = item
            if index == 0:
                self.sums = reducer.sums(block)
            started = perf_counter()
            last = reducer.absent(block)
            if not last and self.gradient is not None and self.work.kind == TRAIN:
                array = reducer.take(block, index)
                start = index * self.config.chunk_elements
                self.gradient[start : start + self.config.chunk_elements] = array
            self.phases.add("sum", perf_counter() - started)
            actions = ledger.sent(block, index, last=last)
            if actions:
                self._do(actions)
        if ledger.active and ledger.finished:
            ledger.active = False
            self.hooks.sealed()

    def _wake_children(self) -> None:
        for child in self.children.values():
            child.outbox.wake.set()

    def _compute(self) -> None:
        """Give the compute thread its next block, once the weights are whole (N17)."""
        if self._worker is None or self._unit is not None or not self.weights.complete:
            return
        if self.weights.version != self.version:
            return
        block = self.ledger.next_unit()
        if block is None:
            return
        self._unit = Unit(block, self.work.step, self.work.kind == TRAIN)
        self._worker.submit(self._unit, self.weights.views, self._computed)

    def _computed(self, unit: Unit, result: Held | Failure | None) -> None:
        assert self._worker is not None
        if unit is not self._unit:
            if isinstance(result, Held):
                self._worker.release(result)
            return
        self._unit = None
        self.phases.add("compute", unit.seconds)
        self.counts.microbatches += unit.microbatches
        self.counts.samples += unit.samples
        if isinstance(result, Failure):
            self.fail(
                pb.TaskFailure(
                    sphere_id=self.id,
                    microbatch=result.microbatch,
                    error=result.error,
                    traceback=result.traceback,
                    sample_ids=result.sample_ids,
                    invalid_gradient=result.invalid,
                )
            )
            return
        assert result is not None  # only a cancelled unit gives nothing, and that is not self._unit
        self._reducer.cache[unit.block] = result
        self.ledger.computed(unit.block)
        self._compute()
        self._flow()

    # ---- parent edge: what goes up

    def next_up(self) -> bytes | Outgoing | None:
        """Return the next message for the parent, or None where nothing can be sent now."""
        if self._up:
            return self._up.pop(0).SerializeToString()
        ledger, reducer = self.ledger, self._reducer
        item = ledger.sendable(reducer.has)
        if item is None:
            return None
        block, index = item
        message = pb.WorkRequest(tag=self.tag, session=self.session, attempt=ledger.attempt)
        absent = reducer.absent(block)
        last = absent or index == ledger.chunks - 1
        if absent or index == ledger.from_chunk:
            self._write_header(message.gradient_header, block, absent=absent)
        if last:
            self._write_footer(message.gradient_footer, block)
        if absent:
            data = message.SerializeToString()
        else:
            started = perf_counter()
            array = reducer.take(block, index) if self.work.kind == TRAIN else None
            self.phases.add("sum", perf_counter() - started)
            payload: memoryview | bytes = b"" if array is None else array.data.cast("B")
            chunk = pb.Chunk(
                block=pb.Block(lo=block.lo, hi=block.hi),
                index=index,
                offset_bytes=index * self.config.chunk_bytes,
                crc32c=crc32c(payload),
            )
            data = encode_with_chunk(message, chunk, payload)
            self.counts.up_bytes += len(payload)
        return Outgoing(data, self.work, ledger.attempt, block, index, last)

    def went_up(self, item: Outgoing, seconds: float) -> None:
        """A gradient message has left. Where a newer attempt came meanwhile, it counts for nothing."""
        self.phases.add("send_up", seconds)
        ledger = self.ledger
        if item.work == self.work and item.attempt == ledger.attempt and ledger.assigned:
            actions = ledger.sent(item.block, item.index, last=item.last)
            if actions:
                self._do(actions)

    def _write_header(self, header: pb.GradientHeader, block: Block, *, absent: bool) -> None:
        header.block.lo, header.block.hi = block
        header.weights_digest = self.weights.digest
        header.absent = absent
        sums = self._reducer.sums(block)
        if sums is not None:
            header.samples_count, header.loss_sum = sums.count, sums.loss
            for name in sorted(sums.metrics):
                header.metrics.add(name=name, value=sums.metrics[name])

    def _write_footer(self, footer: pb.GradientFooter, block: Block) -> None:
        footer.block.lo, footer.block.hi = block
        for part, sphere in self.contributors(block):
            footer.contributions.add(block=pb.Block(lo=part.lo, hi=part.hi), sphere_id=sphere)
        # Times are the subtree's, not the block's: they go with the last block, so that they are counted once.
        if sum(1 for index in self.ledger.obligations.values() if index < self.ledger.chunks) == 1:
            self.phases.close(self.elapsed, computes=self._worker is not None)
            self.phases.write(footer.phases, self.id)

    def contributors_of_all(self) -> list[tuple[Block, str]]:
        """Return who computed which part of the step."""
        return self.contributors(Block(0, self.ledger.total))

    def contributors(self, within: Block) -> list[tuple[Block, str]]:
        """Return who computed which part of a block, as far as footers have come."""
        parts: list[tuple[Block, str]] = []
        for slot, owner in self.ledger.slots.items():
            if within.contains(slot):
                parts += [(slot, self.id)] if owner == SELF else self.contributions.get(slot, [])
        return sorted(parts)
