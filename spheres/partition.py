"""Who gets what: the blocks that a node owes, parted among itself and its children (N5, N9, N12, N22). Pure.

What somebody holds or computes stays with that one; the rest is cut over those who can be given more. ``cut`` knows
capacities only; here it is known whose they are, who is idle or late, and in which environments. What follows for an
attempt is the ledger's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import KW_ONLY, dataclass, field

from spheres.blocks import Block, BlockSet
from spheres.cut import cut
from spheres.edge import SELF, Edge
from spheres.environments import Environments

__all__ = ["Partition"]


@dataclass(slots=True)
class Partition:
    """One partition in the making: first ``keep``, then ``share_out``. It changes nothing of what it is given.

    Two steps, since at the root it is decided between them what the rest is meant for.
    """

    #: microbatches of the step
    total: int
    #: blocks that are to be parted, every microbatch of them once (I2)
    owed: Sequence[Block]
    edges: Mapping[str, Edge]
    _: KW_ONLY
    #: this node itself: whether it computes, in which environment, what it holds and what it is computing
    computes: bool
    environment: str
    held: Set[Block]
    computing: Block | None
    #: whose blocks in compute are open to others (N12)
    late: frozenset[str]
    #: what this node keeps of its own, block by block; what it has to compute
    own: list[Block] = field(default_factory=list)
    queue: list[Block] = field(default_factory=list)
    _shares: dict[str, BlockSet] = field(init=False)

    def __post_init__(self) -> None:
        self._shares = {child: BlockSet(self.total) for child in self.edges}

    def keep(self, environments: Environments) -> list[Block]:
        """Give each what it holds or computes, as a whole or not at all (N9); return what is left.

        ``environments``: which of them the microbatches are meant for, as far as that is known.
        """
        rest = BlockSet(self.total, self.owed)
        for block, owner in self._offers(environments):
            if rest.covers(block) and any(top.contains(block) for top in self.owed):
                rest.discard(block)
                if owner == SELF:
                    self.own.append(block)
                else:
                    self._shares[owner].add(block)
        return rest.within(self.owed)

    def share_out(self, parts: Sequence[tuple[str | None, list[Block]]]) -> tuple[str | None, list[Block]] | None:
        """Cut each part over those who can be given more of its environment; return one that nobody can be given.

        Then nothing is given out at all: a partition with a hole would only be torn down again.
        """
        takers = [self._workers(environment) for environment, _ in parts]
        for part, workers in zip(parts, takers, strict=True):
            if not workers:
                return part
        for (_, blocks), workers in zip(parts, takers, strict=True):
            for owner, pieces in cut(blocks, workers):
                if owner == SELF:
                    self.queue += pieces
                else:
                    for piece in pieces:
                        self._shares[owner].add(piece)
        return None

    def shares(self) -> Iterator[tuple[str, tuple[Block, ...]]]:
        """Yield each child, and the blocks that it owes: what it holds and what is new, merged."""
        for child, share in self._shares.items():
            yield child, tuple(share.within(self.owed)) if len(share) else ()

    def _offers(self, environments: Environments) -> list[tuple[Block, str]]:
        """Blocks that are held or in compute: the largest first, then held ones, own before those of children (N9)."""
        if not self.held and self.computing is None and not any(e.held or e.computing for e in self.edges.values()):
            return []  # as at the start of a step
        offers = [(block, False, SELF) for block in self.held]
        # What a late node computes is its own only where nobody is idle who may compute it.
        idle = self._idle() if self.late else set()

        def kept(block: Block, child: str) -> list[Block]:
            taken = self.edges[child].aside | (idle if child in self.late else set())
            return environments.without(block, taken) if taken else [block]

        # one unit: kept or taken as a whole
        if self.computing is not None and not (SELF in self.late and environments.open_to(self.computing, idle)):
            offers.append((self.computing, True, SELF))
        for child, edge in self.edges.items():
            if edge.ready:
                offers += [(block, False, child) for block in edge.held]
                offers += [(part, True, child) for block in edge.computing for part in kept(block, child)]
        offers.sort(key=lambda offer: (-offer[0].width, offer[1], offer[2] != SELF, offer))
        return [(block, owner) for block, _, owner in offers]

    def _workers(self, environment: str | None) -> list[tuple[str, float]]:
        """Who can be given more of an environment (None: of any), idle ones where there are any."""
        able = self._able(environment)
        idle = [(owner, capacity) for owner, capacity, free in able if free]
        # A late one may have somebody idle below, and would give it what is late already to its own late one again.
        in_time = [(owner, capacity) for owner, capacity in idle if owner not in self.late]
        return in_time or idle or [(owner, capacity) for owner, capacity, _ in able]

    def _able(self, environment: str | None) -> list[tuple[str, float, bool]]:
        """Who can be given something of an environment: owner, capacity, whether it is idle."""
        able = []
        if self.computes and environment in (None, self.environment):
            able.append((SELF, 1.0, self.computing is None))
        for child, edge in self.edges.items():
            capacity = edge.capacity_in(environment)
            if edge.ready and capacity > 0:
                able.append((child, capacity, edge.idle_in(environment)))
        return able

    def _idle(self) -> set[str]:
        """The environments in which somebody could compute more at once."""
        names = {self.environment}.union(*(edge.capacities for edge in self.edges.values()))
        return {name for name in names if any(free for _, _, free in self._able(name))}
