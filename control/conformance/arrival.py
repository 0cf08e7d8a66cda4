"""A gradient, or the sums of an evaluation, as it comes in frame by frame: each frame is held to the protocol. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from control.conformance.script import BreachError, Deviation, Script, breach_unless, deviation, fields, named
from spheres.blocks import Block
from spheres.frames import block_from
from spheres.narrow import from_wire, wire_itemsize
from spheres.numerics import crc32c
from spheres.task import Sums
from spheres.v1 import common_pb2
from spheres.v1 import work_pb2 as pb

__all__ = ["Arrival", "order", "said_of"]

Array = npt.NDArray[np.float32]

#: chunks of one block that may go together before a lower one of another: Python spheres take four
_TOGETHER = 4
#: relative deviation of a loss or metric
_SUMS_TOLERANCE = 1e-5


def order(tag: pb.Tag) -> tuple[int, int, int]:
    """Return what work is ordered by."""
    return tag.term, tag.step, tag.kind


class _Part:
    """What has come of one block."""

    def __init__(self, size: int, first: int) -> None:
        self.header: pb.GradientHeader | None = None
        self.footer: pb.GradientFooter | None = None
        self.flat = np.zeros(size, np.float32)
        self.next = first
        self.started = False


class Arrival:
    """What a worker owes in one attempt. Mutable state: what has come of it, and the credit that was given."""

    def __init__(
        self,
        script: Script,
        tag: pb.Tag,
        blocks: Sequence[Block],
        *,
        session: int,
        sphere: str,
        attempt: int = 0,
        from_chunk: int = 0,
    ) -> None:
        self.script, self.tag, self.blocks = script, tag, sorted(blocks)
        self.session, self.sphere, self.attempt, self.from_chunk = session, sphere, attempt, from_chunk
        self.train = tag.kind == common_pb2.WORK_KIND_TRAIN
        self.chunks = script.chunks if self.train else 1
        self.credit = from_chunk + script.node.window - 1
        self.parts = {block: _Part(script.node.manifest.size, from_chunk) for block in self.blocks}

    @property
    def frontier(self) -> int:
        """The lowest chunk that has not come of every block."""
        return min((part.next for part in self.parts.values()), default=self.chunks)

    @property
    def done(self) -> bool:
        return all(part.next >= self.chunks and part.footer is not None for part in self.parts.values())

    def take(self, message: pb.WorkRequest) -> None:
        """Hold a frame to the protocol, and keep what it brings. Raises BreachError."""
        tag = message.tag
        breach_unless(
            tag.run_id == self.tag.run_id, "N1 (tags)", f"frames of run {self.tag.run_id!r}", f"one of {tag.run_id!r}"
        )
        if self._is_late(message):
            return  # it crossed what was sent to the worker
        breach_unless(
            (order(tag), tag.weights_version) == (order(self.tag), self.tag.weights_version),
            "N1 (every frame names run, term, step, kind and version)",
            said_of(self.tag, self.attempt),
            f"a frame of {said_of(tag, message.attempt)}",
        )
        breach_unless(
            (message.session, message.attempt) == (self.session, self.attempt),
            "N1 (a gradient frame names session and attempt)",
            f"session {self.session} and attempt {self.attempt}",
            f"session {message.session} and attempt {message.attempt}",
        )
        breach_unless(
            not message.HasField("gradient_reference"), "Wires", "chunks in messages: no segment was named in the "
            "welcome", "a gradient_reference",
        )  # fmt: skip
        breach_unless(
            fields(message) & {"gradient_header", "gradient_chunk", "gradient_footer"},
            "A step (sending)", "a gradient_header, a gradient_chunk, a gradient_footer or several of them",
            f"a frame with {sorted(fields(message))}",
        )  # fmt: skip
        if message.HasField("gradient_header"):
            self._header(message.gradient_header)
        if message.HasField("gradient_chunk"):
            self._chunk(message.gradient_chunk)
        if message.HasField("gradient_footer"):
            self._footer(message.gradient_footer)

    def _is_late(self, message: pb.WorkRequest) -> bool:
        ours = (order(self.tag), self.attempt)
        return message.session < self.session or (order(message.tag), message.attempt) < ours

    def _part(self, message: pb.Block, what: str) -> tuple[Block, _Part]:
        block = block_from(message)
        part = self.parts.get(block)
        if part is None:
            raise BreachError("N3 (exact blocks)", f"only {named(self.blocks)}", f"a {what} of {block}")
        return block, part

    def _header(self, header: pb.GradientHeader) -> None:
        block, part = self._part(header.block, "header")
        breach_unless(part.header is None, "A step (sending)", f"one header of {block}", "another one")
        digest = self.script.version(self.tag.weights_version).digest
        breach_unless(
            header.weights_digest == digest,
            "A step (sending)", f"weights_digest {digest.hex()}, the footer's", header.weights_digest.hex() or "none",
        )  # fmt: skip
        names = [metric.name for metric in header.metrics]
        breach_unless(
            names == sorted(set(names)), "GradientHeader.metrics", "metrics by name in ascending order", names
        )
        breach_unless(not header.skipped, "Leaving out", "no skipped microbatches: this run leaves none out", header)
        part.header = header
        if header.absent:
            part.next = self.chunks

    def _chunk(self, chunk: pb.Chunk) -> None:
        block, part = self._part(chunk.block, "chunk")
        node, index = self.script.node, chunk.index
        what = f"chunk {index} of {block}"
        breach_unless(part.header is not None, "A step (sending)", f"the header of {block} first", what)
        breach_unless(
            part.header is None or not part.header.absent, "N16", f"no chunk of {block}, which is absent", what
        )
        breach_unless(
            index <= self.credit or not self.train, "N6 (credit)", f"chunks through {self.credit}", f"{what} came"
        )
        breach_unless(
            index == part.next and index < self.chunks,
            "N6 (chunk by chunk)", f"chunk {part.next} of {block}", f"{what} came",
        )  # fmt: skip
        for other, behind in self.parts.items():
            breach_unless(
                not behind.started or index - behind.next < _TOGETHER,
                "A step (sending)",
                f"of what is computed the lowest chunk index first: chunk {behind.next} of {other}",
                f"{what} came",
            )
        size = node.elements(index, index) if self.train else 0
        length = size * wire_itemsize(node.gradient_dtype)
        breach_unless(
            (chunk.offset_bytes, len(chunk.data)) == (4 * index * node.chunk_elements, length),
            "N2 (chunks)",
            f"{what} at byte {4 * index * node.chunk_elements} with {length} bytes ({node.gradient_dtype})",
            f"one at byte {chunk.offset_bytes} with {len(chunk.data)} bytes",
        )
        checksum = crc32c(chunk.data)
        breach_unless(
            checksum == chunk.crc32c,
            "Digests (CRC-32C)",
            f"{checksum:08x} for the data of {what}",
            f"{chunk.crc32c:08x}",
        )
        start = index * node.chunk_elements
        if size:
            from_wire(chunk.data, node.gradient_dtype, out=part.flat[start : start + size])
        part.next, part.started = index + 1, True

    def _footer(self, footer: pb.GradientFooter) -> None:
        block, part = self._part(footer.block, "footer")
        breach_unless(
            part.header is not None and part.next >= self.chunks and part.footer is None,
            "A step (sending)", f"the footer of {block} once, with its last chunk", f"one after chunk {part.next - 1}",
        )  # fmt: skip
        covered = sorted(block_from(c.block) for c in footer.contributions)
        at = block.lo
        for piece in covered:
            breach_unless(
                piece.lo == at, "Contribution", f"contributions that make up {block}", f"they are {named(covered)}"
            )
            at = piece.hi
        breach_unless(at == block.hi, "Contribution", f"contributions that make up {block}", named(covered))
        for contribution in footer.contributions:
            breach_unless(
                contribution.sphere_id == self.sphere,
                "Contribution", f"sphere_id {self.sphere!r}: who computed it", repr(contribution.sphere_id),
            )  # fmt: skip
        part.footer = footer

    # ---- what it amounts to

    def values(self, block: Block) -> Array:
        return self.parts[block].flat

    def compare(self, block: Block, expected: tuple[Array, Sums | None]) -> Deviation:
        """Compare a block with the Python one. Raises BreachError where it is too far off."""
        part, (gradient, sums) = self.parts[block], expected
        header = part.header
        assert header is not None
        step, version = self.tag.step, self.tag.weights_version
        where = f"{block} of step {step} on version {version}"
        breach_unless(
            header.absent == (sums is None),
            "N16 (a block without samples is absent)",
            f"absent = {sums is None} for {where}",
            f"absent = {header.absent}",
        )
        if sums is None:
            return Deviation(0.0, 0.0)
        breach_unless(
            header.samples_count == sums.count,
            "Which samples", f"samples_count {sums.count} for {where}", header.samples_count,
        )  # fmt: skip
        found = {metric.name: metric.value for metric in header.metrics}
        breach_unless(
            found.keys() == sums.metrics.keys(), "GradientHeader.metrics", str(sorted(sums.metrics)), sorted(found)
        )
        for name, theirs, ours in (
            ("loss_sum", header.loss_sum, sums.loss),
            *((f"metric {name!r}", found[name], value) for name, value in sums.metrics.items()),
        ):
            breach_unless(
                abs(theirs - ours) <= _SUMS_TOLERANCE * max(1.0, abs(ours)),
                "A step (computing)", f"{name} {ours!r} for {where}: a sum over its samples, not a mean", theirs,
            )  # fmt: skip
        if not self.train:
            return Deviation(0.0, 0.0)
        return self._compare_gradient(block, gradient, where)

    def _compare_gradient(self, block: Block, gradient: Array, where: str) -> Deviation:
        first = self.from_chunk * self.script.node.chunk_elements
        flat = self.values(block)
        for gap in self.script.padding():
            breach_unless(
                not flat[gap].any(),
                "Digests (the flat buffer)",
                "zeros between tensors",
                f"others, from {gap.start} on",
            )
        off, allowed = self.script.deviation(flat[first:], gradient[first:]), self.script.tolerances
        breach_unless(
            off.norm <= allowed.norm and off.element <= allowed.element,
            "A step (computing)",
            f"the gradient of {where} to {allowed.norm:.1e} of its norm and {allowed.element:.1e} of each element",
            f"it is off by {off.norm:.2e} and {off.element:.2e} ({self._worst(flat, gradient)})",
        )
        footer = self.parts[block].footer
        assert footer is not None
        known = [c for c in footer.contributions if c.crc32c]
        if not first and len(footer.contributions) == 1 and known:
            checksum = crc32c(np.ascontiguousarray(flat))
            breach_unless(
                known[0].crc32c == checksum,
                "Contribution.crc32c", f"{checksum:08x}, of the whole flat buffer as float32, or 0",
                f"{known[0].crc32c:08x}",
            )  # fmt: skip
        return off

    def _worst(self, flat: Array, gradient: Array) -> str:
        """Which tensor is off the most, in words."""
        views = self.script.node.manifest.views
        found, expected = views(flat), views(gradient)
        name = max(expected, key=lambda tensor: deviation(found[tensor].ravel(), expected[tensor].ravel()).norm)
        ours, theirs = expected[name].ravel(), found[name].ravel()
        index = int(np.argmax(np.abs(theirs.astype(np.float64) - ours)))
        return f"tensor {name}, element {index}: {theirs[index]!r} for {ours[index]!r}"


def said_of(tag: pb.Tag, attempt: int) -> str:
    """Return what a frame belongs to, in words."""
    kind = "train" if tag.kind == common_pb2.WORK_KIND_TRAIN else "evaluate" if tag.kind else "no kind"
    return f"term {tag.term}, step {tag.step}, {kind}, version {tag.weights_version}, attempt {attempt}"
