"""What is played: a run's configuration, versions of its weights, and what a worker has to make of them. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from google.protobuf.message import Message

from control.config import RunConfig
from control.initial import initial_weights, node_config
from control.reference import CanonicalSum
from spheres.blocks import Block
from spheres.narrow import round_in_place, to_wire
from spheres.numerics import add_sums, crc32c, version_digest
from spheres.task import Sums, Task
from spheres.v1 import common_pb2
from spheres.v1 import work_pb2 as pb
from spheres.worker import Computer

__all__ = [
    "BreachError",
    "Deviation",
    "Script",
    "SkippedError",
    "Version",
    "breach_unless",
    "deviation",
    "fields",
    "named",
]

Array = npt.NDArray[np.float32]

#: seconds between two heartbeats: many in one case, and still no load
_HEARTBEAT_SECONDS = 0.25
#: relative deviation of a gradient that is allowed: other libraries add in another order
FLOAT32_TOLERANCE = 1e-5
#: the same where each node of the sum is rounded to bfloat16
BFLOAT16_NORM_TOLERANCE, BFLOAT16_ELEMENT_TOLERANCE = 2.0**-11, 2.0**-6
#: there an element that lies between two numbers goes either way, and a large one alone is more than the norm may be
#: off: of so many elements one is left out of it
BFLOAT16_ASIDE = 256


class BreachError(Exception):
    """A worker did something else than the protocol says. ``rule`` is where docs/protocol.md says it."""

    def __init__(self, rule: str, expected: str, came: str) -> None:
        super().__init__(f"{rule}: expected {expected}; {came}")
        self.rule, self.expected, self.came = rule, expected, came


class SkippedError(Exception):
    """The case does not apply; why."""


def breach_unless(holds: object, rule: str, expected: str, came: object) -> None:
    """Raise BreachError unless it holds."""
    if not holds:
        raise BreachError(rule, expected, str(came))


@dataclass(frozen=True)
class Version:
    """One version of the weights, as it goes over the wire."""

    #: what the task sees: rounded where the run rounds weights
    flat: Array
    chunks: tuple[bytes, ...]
    checksums: tuple[int, ...]
    digest: bytes


@dataclass(frozen=True)
class Deviation:
    """How far a gradient is from the Python one, relative."""

    #: norm of the difference by the norm
    norm: float
    #: largest difference of an element by its size, or by the mean size of all where that is larger
    element: float

    def largest(self, other: Deviation) -> Deviation:
        return Deviation(max(self.norm, other.norm), max(self.element, other.element))


class Script:
    """One run to be played. ``patience`` and ``changes`` are the case's own."""

    def __init__(self, task: Task, config: RunConfig, *, run_id: str, patience: float, term: int = 1) -> None:
        manifest, self._first = initial_weights(task, config)
        node = node_config(task, config, manifest, run_id=run_id)
        self.node = replace(node, patience_seconds=patience, heartbeat_seconds=_HEARTBEAT_SECONDS)
        self.task, self.term = task, term
        self._versions: dict[int, Version] = {}

    @property
    def chunks(self) -> int:
        return self.node.chunk_count

    @property
    def all(self) -> Block:
        """Every microbatch of a training step."""
        return Block(0, self.node.microbatches)

    def total(self, kind: int) -> int:
        return self.node.microbatches if kind == common_pb2.WORK_KIND_TRAIN else self.node.evaluation_microbatches

    def tag(
        self,
        step: int,
        version: int,
        *,
        kind: common_pb2.WorkKind.ValueType = common_pb2.WORK_KIND_TRAIN,
        term: int | None = None,
    ) -> pb.Tag:
        return pb.Tag(
            run_id=self.node.run_id,
            term=self.term if term is None else term,
            step=step,
            kind=kind,
            weights_version=version,
        )

    def version(self, number: int) -> Version:
        """Return a version: the task's first weights, and noise that is another one for each number."""
        if number not in self._versions:
            self._versions[number] = self._make(number)
        return self._versions[number]

    def _make(self, number: int) -> Version:
        node = self.node
        flat = self._first.copy()
        if number:
            noise = np.random.Generator(np.random.Philox(key=number))
            for view in node.manifest.views(flat).values():
                view += np.float32(0.05) * noise.standard_normal(view.shape, np.float32)
        round_in_place(flat, node.weights_dtype)
        size = node.chunk_elements
        parts = [flat[index * size : (index + 1) * size] for index in range(node.chunk_count)]
        chunks = tuple(bytes(to_wire(part, node.weights_dtype)) for part in parts)
        checksums = tuple(crc32c(chunk) for chunk in chunks)
        return Version(flat, chunks, checksums, version_digest(node.manifest.digest, checksums))

    def gradient(self, version: int, step: int, block: Block) -> tuple[Array, Sums | None]:
        """Return the Python gradient of a block, zeros where it is absent, and its sums."""
        node = self.node
        views = node.manifest.views(self.version(version).flat, writeable=False)
        held = CanonicalSum(node, self.task, views)(step, block)
        array = np.zeros(node.manifest.size, np.float32) if held.array is None else held.array
        return array, held.sums

    def evaluation(self, version: int, block: Block) -> Sums | None:
        """Return loss and metrics of slices of the test split."""
        node = self.node
        views = node.manifest.views(self.version(version).flat, writeable=False)
        computer, total = Computer(node, self.task), None
        for index in range(*block):
            part = computer.evaluate(views, index)
            total = part if total is None or part is None else add_sums(total, part)
        return total

    def padding(self) -> list[slice]:
        """Return the gaps between tensors, which are zeros on the wire too."""
        gaps, end = [], 0
        for spec in self.node.manifest.tensors:
            gaps.append(slice(end, spec.offset))
            end = spec.offset + spec.size
        gaps.append(slice(end, self.node.manifest.size))
        return [gap for gap in gaps if gap.stop > gap.start]

    @property
    def tolerances(self) -> Deviation:
        if self.node.gradient_dtype == "bfloat16":
            return Deviation(BFLOAT16_NORM_TOLERANCE, BFLOAT16_ELEMENT_TOLERANCE)
        return Deviation(FLOAT32_TOLERANCE, FLOAT32_TOLERANCE)

    def deviation(self, found: Array, expected: Array) -> Deviation:
        """Return how far a gradient of this run is off, as ``tolerances`` are meant."""
        rounded = self.node.gradient_dtype == "bfloat16"
        return deviation(found, expected, aside=1 + expected.size // BFLOAT16_ASIDE if rounded else 0)


def deviation(found: Array, expected: Array, *, aside: int = 0) -> Deviation:
    """Return how far ``found`` is off; infinite where an element is not finite.

    ``aside``: so many of the largest differences are left out of the norm.
    """
    wide, target = found.astype(np.float64), expected.astype(np.float64)
    difference = np.abs(wide - target)
    if not np.isfinite(difference).all():
        return Deviation(float("inf"), float("inf"))
    norm = float(np.sqrt(np.square(target).sum()))
    if norm == 0.0:
        worst = float(difference.max(initial=0.0))
        return Deviation(worst, worst)
    floor = norm / math.sqrt(max(1, int(np.count_nonzero(target))))
    element = float((difference / np.maximum(np.abs(target), floor)).max())
    counted = np.sort(difference)[: max(0, difference.size - aside)] if aside else difference
    return Deviation(float(np.sqrt(np.square(counted).sum())) / norm, element)


def fields(message: Message) -> set[str]:
    """Return the names of the fields that are set."""
    return {field.name for field, _ in message.ListFields()}


def named(blocks: Sequence[Block]) -> str:
    """Return blocks in words."""
    return " ".join(map(str, blocks)) or "no block"
