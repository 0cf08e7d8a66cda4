"""What a node knows of one child: what its subtree can compute, and what it holds, owes and may send now. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from spheres.blocks import Block

__all__ = ["SELF", "Edge"]

#: stands for the node itself where its children stand by name
SELF = ""


@dataclass(slots=True)
class Edge:
    """One child. All that is known of it; gone with its link."""

    #: what its subtree computes at once, by environment
    capacities: Mapping[str, float]
    #: W, in chunks (N6)
    window: int = 0
    #: within this child's session and this step (N5b)
    attempt: int = 0
    #: its answer in this attempt: held blocks, those in compute, and whether it is idle
    held: tuple[Block, ...] = ()
    computing: tuple[Block, ...] = ()
    idle: bool = True
    #: in which environments it is idle; empty: in all that it has
    idle_environments: tuple[str, ...] = ()
    #: took part in this attempt from its start, so that it may be given work
    ready: bool = False
    assigned: tuple[Block, ...] = ()
    #: the first chunk of each of them in this attempt
    first: int = 0
    #: chunks through this one may come (N6)
    credit: int = -1
    leaving: bool = False
    #: environments in which it stands still: no longer in ``capacities``, until it joins anew or tells its capacity
    aside: set[str] = field(default_factory=set)

    @property
    def capacity(self) -> float:
        return sum(self.capacities.values())

    @property
    def able(self) -> bool:
        """Whether it can be given something to compute."""
        return self.capacity > 0 and not self.leaving

    def capacity_in(self, environment: str | None) -> float:
        """What it can be given of this environment; None: of any."""
        if self.leaving:
            return 0.0
        return self.capacity if environment is None else self.capacities.get(environment, 0.0)

    def idle_in(self, environment: str | None) -> bool:
        return self.idle and (
            environment is None or not self.idle_environments or environment in self.idle_environments
        )

    def reset(self, attempt: int, *, ready: bool) -> None:
        self.attempt, self.ready = attempt, ready
        self.held, self.computing, self.idle, self.assigned, self.credit = (), (), True, (), -1
        self.idle_environments = ()
