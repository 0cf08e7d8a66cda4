"""Which numeric environment each microbatch of a step is meant for (N22). Pure.

Gradients have equal bits among equal environments only. So in a tree of several, who computes a microbatch is free, in
which environment it is computed is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import NamedTuple, Self

from spheres.blocks import Block, BlockSet
from spheres.cut import cut
from spheres.errors import ProtocolError

__all__ = ["ANY", "Environments", "Range", "next_shares"]


class Range(NamedTuple):
    """The microbatches ``lo`` to ``hi - 1``, and the fingerprint of the environment that they are meant for."""

    lo: int
    hi: int
    environment: str


class Environments(tuple[Range, ...]):
    """Ranges in ascending order, without overlap. Microbatches in none of them are for any environment."""

    __slots__ = ()

    @classmethod
    def shared_out(cls, total: int, capacities: Mapping[str, float]) -> Self:
        """Share ``total`` microbatches out by what the tree computes at once in each environment.

        It depends on nothing else: not on the shape of the tree, nor on who came first.
        """
        if capacities.keys() <= {""}:
            return cls()  # nobody has a name for what it computes with; a hello without one is refused
        shares = cut([Block(0, total)], sorted(capacities.items()))
        return cls(sorted(Range(blocks[0].lo, blocks[-1].hi, name) for name, blocks in shares))

    @classmethod
    def checked(cls, ranges: Iterable[Range], total: int) -> Self:
        """Return what a parent named. Raises ProtocolError where ranges are out of order, or of no microbatch."""
        found = cls(ranges)
        end = 0
        for lo, hi, _ in found:
            if not end <= lo < hi <= total:
                raise ProtocolError(f"environments of microbatches [{lo},{hi}) of {total}, after those below {end}")
            end = hi
        return found

    def split(self, blocks: Sequence[Block]) -> list[tuple[str | None, list[Block]]]:
        """Cut ``blocks`` where the environment changes; None stands for any."""
        if not blocks:
            return []
        if not self:
            return [(None, list(blocks))]
        first = self[0]  # nearly always the only one
        if first.lo <= min(block.lo for block in blocks) and max(block.hi for block in blocks) <= first.hi:
            return [(first.environment, list(blocks))]
        parts: list[tuple[str | None, list[Block]]] = []
        left = BlockSet(max(block.hi for block in blocks), blocks)
        for lo, hi, environment in self:
            inside = BlockSet(hi, (part for block in blocks if (part := _both(block, lo, hi)).width > 0))
            pieces = inside.within(blocks)
            for piece in pieces:
                left.discard(piece)
            if pieces:
                parts.append((environment, pieces))
        if len(left):
            parts.append((None, left.within(blocks)))
        return parts

    def of(self, blocks: Iterable[Block]) -> Environments:
        """The ranges that ``blocks`` reach into."""
        return Environments(r for r in self if any(_both(block, r.lo, r.hi).width > 0 for block in blocks))

    def open_to(self, block: Block, environments: Set[str]) -> bool:
        """Whether some of a block may be computed in these."""
        return any(environments if name is None else name in environments for name, _ in self.split([block]))

    def without(self, block: Block, environments: Set[str]) -> list[Block]:
        """The parts of a block that may be computed in none of these."""
        return [
            piece
            for name, part in self.split([block])
            if not (environments if name is None else name in environments)
            for piece in part
        ]

    def changed(self, blocks: Iterable[Block], environment: str) -> Environments:
        """The same, but for ``blocks``, which are meant for another one now."""
        names = _names(self)
        names |= {k: environment for block in blocks for k in range(*block)}
        ranges: list[Range] = []
        for k, name in sorted(names.items()):
            if ranges and ranges[-1].hi == k and ranges[-1].environment == name:
                ranges[-1] = Range(ranges[-1].lo, k + 1, name)
            else:
                ranges.append(Range(k, k + 1, name))
        return Environments(ranges)

    def handed_on(self, blocks: Sequence[Block], capacities: Mapping[str, float]) -> tuple[Environments, set[int]]:
        """The same, but for what of ``blocks`` is meant for an environment that is no more; and which microbatches.

        That goes to the one that has most. ``capacities`` (not empty) is what the tree computes at once in each.
        """
        lost = [
            block for name, part in self.split(blocks) if name is not None and name not in capacities for block in part
        ]
        if not lost:
            return self, set()
        most = max(sorted(capacities), key=lambda name: capacities[name])
        return self.changed(lost, most), {k for block in lost for k in range(*block)}

    def unlike(self, other: Iterable[Range]) -> int:
        """How many microbatches are meant for another environment by ``other``."""
        here, there = _names(self), _names(other)
        return sum(here.get(k) != there.get(k) for k in here.keys() | there.keys())


def next_shares(
    shares: Mapping[str, float], gone: Set[str], capacities: Mapping[str, float]
) -> tuple[Mapping[str, float], frozenset[str]]:
    """Return by what the next step is shared out, and which environments of that are gone.

    ``shares`` and ``gone`` are those of the step before, ``capacities`` what the tree computes at once in each
    environment now. That counts anew when one appeared or was lost altogether. Who else comes and goes changes nothing:
    an undisturbed run would have the same.
    """
    missing = frozenset(shares.keys() - capacities.keys())
    # One that is gone keeps its part for a step: it may come back, and what others compute of it is counted.
    if not shares or capacities.keys() - shares.keys() or (missing and missing <= gone):
        return capacities, frozenset()
    return shares, missing


def _names(ranges: Iterable[Range]) -> dict[int, str]:
    return {k: name for lo, hi, name in ranges for k in range(lo, hi)}


def _both(block: Block, lo: int, hi: int) -> Block:
    return Block(max(block.lo, lo), min(block.hi, hi))


#: all microbatches are for any environment
ANY = Environments()
