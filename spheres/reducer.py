"""The chunk sums of one node: what children sent and what was computed here, added in canonical order.

It holds payload and says what is to be added; which block is owed by whom is the ledger's, sending is the hub's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from spheres.blocks import Block, halves
from spheres.numerics import add_sums
from spheres.summing import Expression
from spheres.task import Sums

__all__ = ["Held", "NonFinite", "Reducer"]

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class NonFinite:
    """The verdict on a microbatch that was left out, since its gradient or its sums are not finite (N16)."""

    microbatch: int
    #: names of the tensors, and ``(loss)`` or ``(metric NAME)``; a few of them
    tensors: tuple[str, ...] = ()
    #: the first of the microbatch
    sample_ids: tuple[int, ...] = ()
    #: who computed it; empty where that was not told
    sphere: str = ""


@dataclass(frozen=True, slots=True)
class Held:
    """A block computed here: its gradient and its sums, both None where no microbatch of it has one.

    Absent + x = x (N16): adding a zero instead would change -0.0.
    """

    array: Array | None
    sums: Sums | None
    #: the microbatches of it that were left out, in order
    skipped: tuple[NonFinite, ...] = ()
    #: of the whole array; 0 where there is none
    crc32c: int = 0


@dataclass(slots=True)
class _Arrived:
    """What a child has sent of one block in this attempt."""

    sums: Sums | None
    absent: bool
    skipped: tuple[NonFinite, ...]
    #: float32, or the bits of bfloat16
    chunks: dict[int, npt.NDArray[Any]] = field(default_factory=dict)


class Reducer:
    """Mutable state: ``cache`` (own blocks, until the seal), ``arrived`` (children's blocks, this attempt only)."""

    def __init__(self, chunk_elements: int) -> None:
        self._chunk = chunk_elements
        self.cache: dict[Block, Held] = {}
        self.arrived: dict[Block, _Arrived] = {}
        #: block -> who owes it: the ledger's own mapping
        self.slots: Mapping[Block, str] = {}

    @property
    def pending(self) -> int:
        """Chunks of children that wait for others (I4)."""
        return sum(len(a.chunks) for a in self.arrived.values())

    def forget(self, slots: Mapping[Block, str]) -> None:
        """A new attempt: children's chunks are dropped, own blocks are kept (N4, N7)."""
        self.arrived.clear()
        self.slots = slots

    def header(self, block: Block, sums: Sums | None, *, absent: bool, skipped: tuple[NonFinite, ...] = ()) -> None:
        """A child starts a block."""
        if block not in self.arrived:
            self.arrived[block] = _Arrived(sums, absent, skipped)

    def chunk(self, block: Block, index: int, array: npt.NDArray[Any]) -> None:
        """A child sent a chunk of a block whose header came before."""
        self.arrived[block].chunks[index] = array

    def has_header(self, block: Block) -> bool:
        return block in self.arrived

    def has(self, block: Block, index: int) -> bool:
        """Whether chunk ``index`` of ``block`` can be summed now: every slot below it has it (N8)."""
        if block in self.slots:
            if block in self.cache:
                return True
            arrived = self.arrived.get(block)
            return arrived is not None and (arrived.absent or index in arrived.chunks)
        if block.width == 1:
            return False
        left, right = halves(block)
        return self.has(left, index) and self.has(right, index)

    def absent(self, block: Block) -> bool:
        """Whether ``block``, of which some chunk can be summed, has no gradient: no sample, or none that is finite."""
        if block in self.slots:
            held = self.cache.get(block)
            return held.sums is None if held is not None else self.arrived[block].absent
        left, right = halves(block)
        return self.absent(left) and self.absent(right)

    def sums(self, block: Block) -> Sums | None:
        """Sums over the block, left + right; None where it is absent."""
        if block in self.slots:
            held = self.cache.get(block)
            return held.sums if held is not None else self.arrived[block].sums
        left, right = (self.sums(half) for half in halves(block))
        if left is None or right is None:
            return left if right is None else right
        return add_sums(left, right)

    def skipped(self, block: Block, own_id: str) -> tuple[NonFinite, ...]:
        """Microbatches of ``block``, of which some chunk can be summed, that were left out, in order.

        What was computed here is said of ``own_id``.
        """
        if block in self.slots:
            held = self.cache.get(block)
            if held is None:
                return self.arrived[block].skipped
            return tuple(replace(verdict, sphere=own_id) for verdict in held.skipped)
        left, right = (self.skipped(half, own_id) for half in halves(block))
        return left + right

    def collect(self, block: Block, index: int) -> Expression | None:
        """Return what chunk ``index`` of ``block`` is the sum of, left + right at every node; None where it is absent.

        Chunks of children that go into it are let go.
        """
        if block in self.slots:
            held = self.cache.get(block)
            if held is not None:
                # A child's too, where what was given to it has been finished here after all (N12).
                if block in self.arrived:
                    self.arrived[block].chunks.pop(index, None)
                part = slice(index * self._chunk, (index + 1) * self._chunk)
                return None if held.array is None else held.array[part]
            arrived = self.arrived[block]
            return None if arrived.absent else arrived.chunks.pop(index)
        left, right = (self.collect(half, index) for half in halves(block))
        if left is None or right is None:
            return left if right is None else right
        return left, right

    def own(self, block: Block) -> Array | None:
        """Return the gradient of ``block`` where it was computed here, whole."""
        held = self.cache.get(block) if block in self.slots else None
        return None if held is None else held.array
