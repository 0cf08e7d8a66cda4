"""The gradients of one step on one node: frames of children come in, are added, and go out as this node's blocks.

It checks, adds and encodes. Who owes what is the ledger's to say; when to send is the hub's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spheres.blocks import Block
from spheres.carrier import Carrier, Inline, Piece
from spheres.config import MAX_MESSAGE_BYTES, NodeConfig
from spheres.errors import ChecksumError, ProtocolError
from spheres.frames import block_from
from spheres.ledger import SELF, Action, Ledger
from spheres.narrow import wire_itemsize
from spheres.numerics import crc32c
from spheres.phases import PhaseTimes
from spheres.reducer import NonFinite, Reducer
from spheres.summing import Expression, add_up
from spheres.task import Sums
from spheres.v1 import work_pb2 as pb
from spheres.weights import Weights

__all__ = ["Batch", "Contribution", "Gradients", "Outgoing"]

Array = npt.NDArray[np.float32]

#: verdicts of one header that say more than which microbatch it is
_MOST_DETAILED = 32
#: bytes around a chunk's payload, at most
_CHUNK_FRAME_BYTES = 64
#: chunks that control adds at once
_ROOT_CHUNKS = 16


class Contribution(NamedTuple):
    """Who computed a block, and the checksum of its gradient, 0 where that is not known."""

    block: Block
    sphere: str
    crc32c: int


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A gradient message on its way up."""

    data: bytes
    payload_bytes: int


@dataclass(slots=True)
class Batch:
    """Chunks that are to be summed, here and now or beside the loop; they count as sent.

    Were they to count only when they have left, children that a new attempt asks in the meantime would send them again,
    for nobody to take. What their going allows, credit, is given when their sum is done: until then they are read (N6).
    """

    #: each can be called by another thread; all of them before ``messages`` are there
    works: list[Callable[[], None]]
    #: elements that are read
    elements: int
    #: on their way up, in order
    messages: list[Outgoing]
    actions: list[Action]
    started: float = field(default_factory=perf_counter)
    #: its attempt, step or session is over
    recalled: bool = False


class Gradients:
    """Mutable state: the reducer, who computed what, where the time went; at the root the sum itself."""

    def __init__(self, config: NodeConfig, node_id: str, ledger: Ledger, weights: Weights) -> None:
        self._config, self._id, self._ledger, self._weights = config, node_id, ledger, weights
        self.reducer = Reducer(config.chunk_elements)
        self.phases = PhaseTimes()
        #: block of a child -> who computed which part of it, as its footer said
        self._contributions: dict[Block, list[Contribution]] = {}
        #: block of a child -> its last chunk that came in this attempt
        self._last: dict[Block, int] = {}
        self._train, self._step = False, -1
        # of this step, in what children sent
        self._metrics: set[str] = set()
        self._started = 0.0
        #: the root's: where the sum of the gradients goes, and what came with it
        self._out: Array | None = None
        self.sums: Sums | None = None
        #: the root's: the step's microbatches that were left out, as far as their verdicts were told in full
        self.skipped: tuple[NonFinite, ...] = ()
        #: payload bytes that children have sent
        self.received_bytes = 0
        #: how payload goes up
        self.carrier: Carrier = Inline(config)

    def start(self, *, step: int, train: bool, out: Array | None) -> None:
        """A new step; ``out`` takes the root's sum of a training step."""
        self._step, self._train, self._out, self.sums, self.skipped = step, train, out, None, ()
        self._started = perf_counter()
        self._metrics.clear()
        self.phases.clear()

    @property
    def elapsed(self) -> float:
        """Seconds since the step began here."""
        return perf_counter() - self._started

    def settle(self) -> None:
        """Where the slots changed, what children sent for the old ones is dropped (N4, N7)."""
        if self.reducer.slots is not self._ledger.slots:
            self.reducer.forget(self._ledger.slots)
            self._contributions.clear()
            self._last.clear()

    # ---- from children

    def take_in(self, child: str, message: pb.WorkRequest, carrier: Carrier, payload: memoryview | None = None) -> None:
        """Handle what a frame says of gradients. ``payload`` is the chunk's data where they are not in the message.

        Raises StaleError for another attempt, ProtocolError and its kinds, GradientError where the metrics of all
        children are too many for a message.
        """
        attempt = message.attempt
        if message.HasField("gradient_header"):
            self._header(child, attempt, message.gradient_header)
        if message.HasField("gradient_chunk"):
            self._chunk(child, attempt, message.gradient_chunk, payload)
        if message.HasField("gradient_reference"):
            self._reference(child, attempt, message.gradient_reference, carrier)
        if message.HasField("gradient_footer"):
            footer = message.gradient_footer
            block = block_from(footer.block)
            self._ledger.accepts(child, attempt, block, -1)
            self.phases.merge(child, footer.phases)
            self._contributions[block] = [
                Contribution(block_from(c.block), c.sphere_id, c.crc32c) for c in footer.contributions
            ]

    def _header(self, child: str, attempt: int, header: pb.GradientHeader) -> None:
        block = block_from(header.block)
        self._ledger.accepts(child, attempt, block, -1)
        if header.weights_digest != self._weights.digest:
            raise ProtocolError(
                f"{child} computed {block} on weights {header.weights_digest.hex()}, "
                f"v{self._weights.version} is {self._weights.digest.hex()}"
            )
        sums = None
        if not header.absent:
            # a sum of finite values may overflow, and that is control's to judge
            for what, value in (("loss", header.loss_sum), *((f"metric {m.name!r}", m.value) for m in header.metrics)):
                if math.isnan(value) or (block.width == 1 and math.isinf(value)):
                    raise ProtocolError(f"{child}: {block} has {what} {value}; give finite sums over its samples")
            sums = Sums(header.loss_sum, header.samples_count, {m.name: m.value for m in header.metrics})
            self._note_metrics(sums)
        skipped: tuple[NonFinite, ...] = ()
        if header.skipped:
            skipped = tuple(
                NonFinite(v.microbatch, tuple(v.tensors), tuple(v.sample_ids), v.sphere_id) for v in header.skipped
            )
            self._check_skipped(child, block, [verdict.microbatch for verdict in skipped])
        self._check_count(child, block, header, [verdict.microbatch for verdict in skipped])
        self.reducer.header(block, sums, absent=header.absent, skipped=skipped)

    def _note_metrics(self, sums: Sums) -> None:
        """Raise GradientError where the metrics of a step are too many together, though each child's may fit."""
        if not sums.metrics.keys() <= self._metrics:
            self._metrics.update(sums.metrics)
            self._config.check_metrics(self._metrics, "the microbatches of a step have")

    def _check_count(self, child: str, block: Block, header: pb.GradientHeader, skipped: list[int]) -> None:
        """Which samples a block has follows from the run and the step alone: a wrong count is of other samples."""
        config = self._config
        size, parts = config.test_size, config.evaluation_microbatches
        if self._train:
            size, parts = config.sampler.batch_count(self._step), config.microbatches
        expected = _samples(size, parts, block) - sum(_samples(size, parts, Block(i, i + 1)) for i in skipped)
        if header.absent != (expected == 0) or header.samples_count != expected:
            came = "is absent" if header.absent else f"has {header.samples_count} samples"
            raise ProtocolError(f"{child}: {block} {came}; expected {expected} samples in step {self._step}")

    def _check_skipped(self, child: str, block: Block, indices: list[int]) -> None:
        if indices and not (self._config.skips_nonfinite and self._train):
            raise ProtocolError(f"{child}: microbatches of {block} were left out; this work leaves none out")
        if any(not block.contains(Block(i, i + 1)) for i in indices) or any(a >= b for a, b in pairwise(indices)):
            raise ProtocolError(f"{child}: microbatches {indices[:8]} of {block} are outside of it or not in order")

    def _chunk(self, child: str, attempt: int, chunk: pb.Chunk, payload: memoryview | None) -> None:
        block, index, data = block_from(chunk.block), chunk.index, chunk.data if payload is None else payload
        news = self._ledger.accepts(child, attempt, block, index)
        start = index * self._config.chunk_elements
        size = self._config.elements(index, index) if self._train else 0
        length = size * wire_itemsize(self._config.gradient_dtype)
        if index < 0 or chunk.offset_bytes != start * 4 or len(data) != length:
            raise ProtocolError(
                f"{child}: chunk {index} of {block} at byte {chunk.offset_bytes}, {len(data)} bytes; "
                f"expected byte {start * 4}, {length} bytes ({self._config.gradient_dtype})"
            )
        self._check_header(child, block, index)
        if (checksum := crc32c(data)) != chunk.crc32c:
            raise ChecksumError(
                f"{child}: chunk {index} of {block} does not fit its checksum {chunk.crc32c:08x}; "
                f"the CRC-32C of its data is {checksum:08x}"
            )
        self._check_order(child, block, index)
        self._last[block] = index
        self.received_bytes += len(data)
        if news:
            elements = np.frombuffer(data, np.uint16 if self._config.gradient_dtype == "bfloat16" else np.float32)
            self.reducer.chunk(block, index, elements)

    def _reference(self, child: str, attempt: int, reference: pb.GradientReference, carrier: Carrier) -> None:
        block, first, last = block_from(reference.block), reference.from_chunk, reference.through_chunk
        self._ledger.accepts(child, attempt, block, last)
        if not 0 <= first <= last or not self._train:
            raise ProtocolError(f"{child}: chunks {first} to {last} of {block} by reference")
        self._check_header(child, block, first)
        self._check_order(child, block, first)
        found, elements = carrier.gradient(reference), self._config.chunk_elements
        self._last[block] = last
        self.received_bytes += found.nbytes
        due = self._ledger.obligations[self._ledger.cover(block)]
        for index in range(max(first, due), last + 1):
            start = (index - first) * elements
            self.reducer.chunk(block, index, found[start : start + elements])

    def _check_header(self, child: str, block: Block, first: int) -> None:
        if not self.reducer.has_header(block):
            raise ProtocolError(f"{child}: chunk {first} of {block} came before its header")

    def _check_order(self, child: str, block: Block, first: int) -> None:
        expected = self._last.get(block, self._ledger.edges[child].first - 1) + 1
        if first != expected:
            raise ProtocolError(f"{child}: chunk {first} of {block} came; expected chunk {expected}")

    def in_compute(self, child: str) -> Block | None:
        """Return the block that a child computes now, as far as can be told here: the first that it has not begun."""
        slots = [slot for slot, owner in self._ledger.slots.items() if owner == child]
        return min((slot for slot in slots if not self.reducer.has_header(slot)), default=None)

    # ---- to the parent; at the root, into the sum

    def claim(self) -> Batch | None:
        """At the root: take what can go into the sum now; None where nothing can."""
        found = self._sendable(lambda _: _ROOT_CHUNKS)
        if found is None:
            return None
        block, first, last = found
        if first == 0:
            self.sums, self.skipped = self.reducer.sums(block), self.reducer.skipped(block, self._id)
        if self.reducer.absent(block):
            return Batch([], 0, [], self._ledger.sent(block, first, last=True))
        works: list[Callable[[], None]] = []
        elements, total, out, dtype = self._config.chunk_elements, 0, self._out, self._config.gradient_dtype
        expressions = [self.reducer.collect(block, index) for index in range(first, last + 1)]
        if out is not None:
            sums = [
                (expression, out[index * elements : (index + 1) * elements])
                for index, expression in enumerate(expressions, first)
                if expression is not None
            ]
            middle = (len(sums) + 1) // 2
            works = [_summing(part, dtype) for part in (sums[:middle], sums[middle:]) if part]
            total = sum(_leaves(expression) * target.size for expression, target in sums)
        return Batch(works, total, [], self._ledger.sent(block, last))

    def claim_up(self, tag: pb.Tag, session: int) -> Batch | None:
        """Take what can go to the parent now, and its messages once it is summed; None where nothing can."""
        ledger, reducer, carrier = self._ledger, self.reducer, self.carrier
        # While they arrive again, on a new link, there is no digest to send along; what was computed stays good.
        found = self._sendable(carrier.most) if self._weights.complete else None
        if found is None:
            return None
        block, first, last = found
        if reducer.absent(block) or not self._train:
            return self._alone(tag, session, block, first)
        own = reducer.own(block)
        works: list[Callable[[], None]] = []
        messages: list[Outgoing | None] = []
        elements = 0
        ranges = [(first, last)] if carrier.together() else [(index, index) for index in range(first, last + 1)]
        for low, high in ranges:
            message = pb.WorkRequest(tag=tag, session=session, attempt=ledger.attempt)
            if low == ledger.from_chunk:
                self._write_header(message.gradient_header, block, absent=False)
            if high == ledger.chunks - 1:
                self._write_footer(message.gradient_footer, block)
            _fit(message, MAX_MESSAGE_BYTES - self._config.chunk_bytes - _CHUNK_FRAME_BYTES)
            expressions = [e for i in range(low, high + 1) if (e := reducer.collect(block, i)) is not None]
            piece = Piece(message, block, low, expressions, own)
            carrier.reserve(piece)
            if own is None:
                elements += sum(map(_leaves, expressions)) * self._config.chunk_elements
            works.append(_encoding(carrier, piece, messages, len(messages)))
            messages.append(None)
        return Batch(works, elements, messages, ledger.sent(block, last))  # type: ignore[arg-type]

    def _alone(self, tag: pb.Tag, session: int, block: Block, index: int) -> Batch:
        """A block without payload: absent, or of an evaluation."""
        message = pb.WorkRequest(tag=tag, session=session, attempt=self._ledger.attempt)
        absent = self.reducer.absent(block)
        self._write_header(message.gradient_header, block, absent=absent)
        self._write_footer(message.gradient_footer, block)
        if not absent:
            self.reducer.collect(block, index)
            message.gradient_chunk.block.lo, message.gradient_chunk.block.hi = block
        _fit(message, MAX_MESSAGE_BYTES - _CHUNK_FRAME_BYTES)
        sent = Outgoing(message.SerializeToString(), 0)
        return Batch([], 0, [sent], self._ledger.sent(block, index, last=True))

    def _sendable(self, most: Callable[[int], int]) -> tuple[Block, int, int] | None:
        """Return the block, the first and the last chunk that can go at once."""
        ledger, has = self._ledger, self.reducer.has
        item = ledger.sendable(has)
        if item is None:
            return None
        block, first = item
        end = min(ledger.chunks, first + most(first))
        if not ledger.root:
            end = min(end, ledger.allowed + 1)
        last = first
        if not self.reducer.absent(block):
            while last + 1 < end and has(block, last + 1):
                last += 1
        return block, first, last

    def _write_header(self, header: pb.GradientHeader, block: Block, *, absent: bool) -> None:
        header.block.lo, header.block.hi = block
        header.weights_digest = self._weights.digest
        header.absent = absent
        sums = self.reducer.sums(block)
        if sums is not None:
            header.samples_count, header.loss_sum = sums.count, sums.loss
            for name in sorted(sums.metrics):
                header.metrics.add(name=name, value=sums.metrics[name])
        for number, verdict in enumerate(self.reducer.skipped(block, self._id)):
            said = header.skipped.add(microbatch=verdict.microbatch)
            if number < _MOST_DETAILED:
                said.sphere_id = verdict.sphere
                said.tensors[:], said.sample_ids[:] = verdict.tensors, verdict.sample_ids

    def _write_footer(self, footer: pb.GradientFooter, block: Block) -> None:
        footer.block.lo, footer.block.hi = block
        for part, sphere, checksum in self.contributions(block):
            footer.contributions.add(block=pb.Block(lo=part.lo, hi=part.hi), sphere_id=sphere, crc32c=checksum)
        # Times are the subtree's, not the block's: they go with the last block, so that they are counted once.
        if sum(1 for index in self._ledger.obligations.values() if index < self._ledger.chunks) == 1:
            self.phases.close(self.elapsed, computes=self._ledger.computes)
            self.phases.write(footer.phases, self._id)

    def contributions(self, within: Block) -> list[Contribution]:
        """Return who computed which part of a block, in order, as far as footers have come."""
        parts: list[Contribution] = []
        for slot, owner in self._ledger.slots.items():
            if not within.contains(slot):
                continue
            held = self.reducer.cache.get(slot)
            if owner == SELF or held is not None:
                parts.append(Contribution(slot, self._id, 0 if held is None else held.crc32c))
            else:
                parts += self._contributions.get(slot, [])
        return sorted(parts)


def _samples(size: int, parts: int, block: Block) -> int:
    """Return how many of ``size`` samples, cut into so many parts, lie in the parts of a block."""
    return block.hi * size // parts - block.lo * size // parts


def _leaves(expression: Expression) -> int:
    return _leaves(expression[0]) + _leaves(expression[1]) if isinstance(expression, tuple) else 1


def _summing(sums: Sequence[tuple[Expression, Array]], dtype: str) -> Callable[[], None]:
    def work() -> None:
        for expression, out in sums:
            add_up(expression, out, dtype)

    return work


def _encoding(carrier: Carrier, piece: Piece, into: list[Outgoing | None], place: int) -> Callable[[], None]:
    def work() -> None:
        into[place] = Outgoing(*carrier.encode(piece))

    return work


def _fit(message: pb.WorkRequest, room: int) -> None:
    """Leave out what can be done without, where a step of very many parts would make a message too large.

    First what verdicts say beyond which microbatch it is, then the checksums of contributions. What is left of 4,096
    microbatches fits beside the largest chunk: 20 kB of verdicts and 78 kB of contributions.
    """
    skipped, contributions = message.gradient_header.skipped, message.gradient_footer.contributions
    if len(skipped) + len(contributions) <= _MOST_DETAILED or message.ByteSize() <= room:
        return
    for verdict in skipped[:_MOST_DETAILED]:
        for detail in ("sphere_id", "tensors", "sample_ids"):
            verdict.ClearField(detail)
    if message.ByteSize() > room:
        for contribution in contributions:
            contribution.ClearField("crc32c")
