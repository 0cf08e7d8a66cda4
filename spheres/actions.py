"""What the ledger has its hub do: an event returns some of these, and they are carried out in order. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from spheres.blocks import Block
from spheres.environments import ANY, Environments

__all__ = ["Action", "SendAssign", "SendBegin", "SendCredit", "SendReady", "Stuck"]


@dataclass(frozen=True, slots=True)
class SendBegin:
    """To a child: a new attempt from ``from_chunk``."""

    child: str
    attempt: int
    from_chunk: int


@dataclass(frozen=True, slots=True)
class SendAssign:
    """To a child: the blocks that it owes."""

    child: str
    attempt: int
    from_chunk: int
    blocks: tuple[Block, ...]
    #: which environments they are meant for
    environments: Environments = ANY


@dataclass(frozen=True, slots=True)
class SendCredit:
    """To a child: it may send through this chunk."""

    child: str
    attempt: int
    through: int


@dataclass(frozen=True, slots=True)
class SendReady:
    """To the parent: what this subtree holds and computes, and whether any of it is idle."""

    attempt: int
    held: tuple[Block, ...]
    computing: tuple[Block, ...]
    idle: bool
    #: in which environments it is idle; empty: in all that it has
    idle_environments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Stuck:
    """Blocks are owed and nobody below can compute them: control waits, any other node gives its parent notice."""

    blocks: tuple[Block, ...]


Action = SendBegin | SendAssign | SendCredit | SendReady | Stuck
