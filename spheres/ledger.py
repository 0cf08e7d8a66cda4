"""Who owes which block on one node's edges: the event table of a step. Pure: no I/O, no clock, no payload.

Every method is an event; it returns the actions to carry out, in order. Rules N1 to N14 are those of docs/protocol.md.
Who gets which block, where work is given out, is the ``partition``'s to say; how that is told and counted is here.

| event           | what changes                                              | actions                              |
|-----------------|-----------------------------------------------------------|--------------------------------------|
| start           | a new step: everything of the old one is dropped (N14)    | Assign per child                     |
| resume          | the same step again, from a parent that came later (N14)  | Begin per child                      |
| begin           | a new attempt from above: obligations unknown again (N4)  | Begin per child, or Ready at once    |
| assign          | obligations known                                         | Assign per child                     |
| relinked        | a new parent or session: obligations void (N5b)           | -                                    |
| child_joined    | one more edge; it takes part in what is being gathered    | Begin to it, or per child (N13)      |
| child_lost      | one edge less; what it owed is open. Where the lost one   | Begin per child where it still owed  |
|                 | had children, an attempt waits for them a moment (N13)    |                                      |
| settled         | that moment is over                                       | as with the last child_ready         |
| child_ready     | one answer less to wait for; with the last one:           | Ready, or Assign per child           |
| child_changed   | capacity; leaving                                         | Begin where work was unassigned      |
| hurry           | blocks in compute at late nodes are open to others (N12)  | Begin per child                      |
| set_aside       | children that stand still with what only they may        | Begin per child                      |
|                 | compute count for it no longer (N22)                      |                                      |
| unable          | this node computes nothing more for now                   | Begin per child where it owed any    |
| next_unit       | a block of the queue is being computed                    | -                                    |
| computed        | that block is held until the seal                         | -                                    |
| sent            | the frontier may rise                                     | Credit per child                     |
| credit          | more may be sent up (N6)                                  | -                                    |

Wherever work is given out and nobody can take it: Stuck, or Begin where someone joined after the attempt had begun.

Each microbatch is meant for one numeric environment (N22). "Nobody" is nobody of that environment; at the root, nobody
at all: there what no environment of its own is left for goes to another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from spheres.actions import Action, SendAssign, SendBegin, SendCredit, SendReady, Stuck
from spheres.blocks import Block, BlockSet
from spheres.edge import SELF, Edge
from spheres.environments import ANY, Environments, next_shares
from spheres.errors import CreditError, ProtocolError, StaleError
from spheres.partition import Partition

__all__ = [
    "SELF",
    "Action",
    "Ledger",
    "SendAssign",
    "SendBegin",
    "SendCredit",
    "SendReady",
    "Stuck",
]


@dataclass(slots=True)
class Ledger:
    """Mutable state of one node's step; owned by its hub."""

    #: W of the edge upward, in chunks, and of those downward that have none of their own
    window: int
    #: whether this node computes itself: false for control and relays
    computes: bool
    #: control: it has no parent, its obligation is everything
    root: bool = False
    #: fingerprint of this node's own numeric environment
    environment: str = ""
    edges: dict[str, Edge] = field(default_factory=dict)

    #: M of the step's kind
    total: int = 0
    #: units per block that travel up: the chunks, or one message for an evaluation
    chunks: int = 0
    active: bool = False
    #: the parent's number of this attempt
    attempt: int = 0
    #: block -> next chunk to send up; meaningful once ``assigned``
    obligations: dict[Block, int] = field(default_factory=dict)
    assigned: bool = False
    from_chunk: int = 0
    #: the last chunk that may be sent up
    allowed: int = -1
    #: an exact partition of the unfinished obligations: block -> child or SELF (I2)
    slots: dict[Block, str] = field(default_factory=dict)
    #: children whose Ready is missing; not None while an attempt is being gathered
    waiting: set[str] | None = None
    #: what the children of a lost child can compute: for so much of it an attempt waits, until ``settled`` (N13)
    missing: float = 0.0
    #: which environment each microbatch is meant for: as the parent says; at the root, as far as it has been decided
    environments: Environments = ANY
    #: at the root: what the tree computed at once in each environment when it was last decided how they share a step
    shares: Mapping[str, float] = field(default_factory=dict)
    #: at the root: environments of these that had no sphere when a step was given out last
    gone: frozenset[str] = frozenset()
    #: at the root: microbatches of this step that were given to another environment, since the tree had none of theirs
    moved: set[int] = field(default_factory=set)
    #: whose blocks in compute are open to others in this attempt (N12)
    late: frozenset[str] = frozenset()
    ready_sent: bool = True
    stuck: bool = False
    #: blocks computed here, kept until the seal (N7); the one being computed; those to compute next
    held: set[Block] = field(default_factory=set)
    computing: Block | None = None
    queue: list[Block] = field(default_factory=list)
    #: blocks that children were given in this step: they may hold them still
    below: set[Block] = field(default_factory=set)
    #: local attempts begun in this step (I12)
    attempts: int = 0

    # ---- from above

    def start(
        self, total: int, chunks: int, blocks: Sequence[Block] | None, environments: Environments = ANY
    ) -> list[Action]:
        """A step begins; ``blocks`` is attempt 0's assignment, None for a spare. Nobody holds anything yet (N5)."""
        self.total, self.chunks, self.active = total, max(1, chunks), True
        self.attempt, self.attempts, self.from_chunk = 0, 0, 0
        self.waiting, self.ready_sent, self.missing, self.late = None, True, 0.0, frozenset()
        self.held.clear()
        self.below.clear()
        self.computing = None
        for edge in self.edges.values():
            edge.reset(0, ready=True)
        self._void()
        self.moved.clear()
        return [] if blocks is None else self._take(blocks, environments)

    def resume(self, blocks: Sequence[Block], environments: Environments = ANY) -> list[Action]:
        """Attempt 0 of a step that is running here already, from a parent that came to it later: caches are kept."""
        self._void()
        self.attempt, self.from_chunk, self.ready_sent = 0, 0, True
        return self._gather(0) + self._take(blocks, environments)

    def begin(self, attempt: int, from_chunk: int) -> list[Action]:
        """The parent begins a new attempt (N4). Raises StaleError for an older number, ProtocolError out of range."""
        if attempt <= self.attempt:
            raise StaleError(f"begin of attempt {attempt}; attempt {self.attempt} is running")
        if not 0 <= from_chunk <= self.chunks:
            raise ProtocolError(f"begin from chunk {from_chunk} of {self.chunks}")
        self.attempt, self.from_chunk = attempt, from_chunk
        self._void()
        self.ready_sent = False
        return self._gather(from_chunk)

    def assign(
        self, attempt: int, from_chunk: int, blocks: Sequence[Block], environments: Environments = ANY
    ) -> list[Action]:
        """The parent's answer to Ready. Raises StaleError where it belongs to another attempt."""
        if attempt != self.attempt or self.assigned or attempt == 0:
            raise StaleError(f"assignment of attempt {attempt}; attempt {self.attempt} is running")
        if not self.from_chunk <= from_chunk <= self.chunks:
            raise ProtocolError(f"assignment from chunk {from_chunk}; the attempt began at {self.from_chunk}")
        self.from_chunk = from_chunk
        return self._take(blocks, environments)

    def credit(self, attempt: int, through: int) -> None:
        """The parent takes more. Raises StaleError where it belongs to another attempt."""
        if attempt != self.attempt or not self.assigned:
            raise StaleError(f"credit of attempt {attempt}; attempt {self.attempt} is running")
        self.allowed = max(self.allowed, through)

    def relinked(self) -> None:
        """A new session with a parent: what was owed is void; children must not go on with it (N5b)."""
        self._void()
        self.attempt, self.ready_sent, self.waiting, self.missing = 0, True, None, 0.0
        for edge in self.edges.values():
            edge.reset(edge.attempt + 1, ready=False)

    # ---- from below

    def child_joined(
        self,
        child: str,
        capacities: Mapping[str, float],
        *,
        holds: bool,
        leaving: bool = False,
        window: int = 0,
    ) -> list[Action]:
        """A link to a child opened. An attempt only where it brings blocks, or work lies unassigned (N13).

        ``capacities``: what it computes at once, by environment.
        """
        edge = self.edges[child] = Edge(capacities, window or self.window, leaving=leaving)
        if not self.active:
            return []
        if self.waiting is not None:
            # Orphans of one dead parent come one after the other: one attempt takes them all in.
            self.missing = max(0.0, self.missing - edge.capacity)
            return [self._ask(child, self.frontier)]
        if self.stuck or (holds and not self.finished):
            return self._gather(self.frontier)
        return []

    def child_lost(self, child: str) -> list[Action]:
        """A link to a child ended."""
        edge = self.edges.pop(child, None)
        if edge is None or not self.active:
            return []
        if self.waiting is not None:
            self.waiting.discard(child)
            self.missing += self._may_return(edge)
            return self._gathered()
        if any(owner == child and self._open(slot) for slot, owner in self.slots.items()):
            self.missing = self._may_return(edge)
            return self._gather(self.frontier)
        return []

    def _may_return(self, lost: Edge) -> float:
        """What an attempt waits for a moment: the lost one's children, and itself where it was the last of its kind."""
        environments = self.capacities
        last = any(
            capacity > 0 and environment not in environments for environment, capacity in lost.capacities.items()
        )
        return lost.capacity if last and environments else max(0.0, lost.capacity - 1)

    def settled(self) -> list[Action]:
        """Children of a lost child have had the time to come here."""
        self.missing = 0.0
        return self._gathered()

    def hurry(self, late: Iterable[str]) -> list[Action]:
        """These owners (SELF among them) are late: idle ones may compute what those have in compute (N12)."""
        self.late = frozenset(late)
        return self._gather(self.frontier, keep_late=True)

    def child_ready(
        self,
        child: str,
        attempt: int,
        held: Iterable[Block],
        computing: Iterable[Block] = (),
        *,
        idle: bool,
        idle_environments: Iterable[str] = (),
    ) -> list[Action]:
        """A child's answer to Begin. Raises StaleError where it belongs to another attempt."""
        edge = self.edges[child]
        if self.waiting is None or child not in self.waiting or attempt != edge.attempt:
            raise StaleError(f"ready of attempt {attempt}; attempt {edge.attempt} is running")
        edge.held, edge.computing, edge.idle, edge.ready = tuple(held), tuple(computing), idle, True
        edge.idle_environments = tuple(idle_environments)
        self.waiting.discard(child)
        return self._gathered()

    def child_changed(
        self, child: str, *, capacities: Mapping[str, float] | None = None, leaving: bool = False
    ) -> list[Action]:
        """A child's subtree grew or shrank, or the child wants to go."""
        edge = self.edges[child]
        edge.leaving = edge.leaving or leaving
        if capacities is not None:
            edge.capacities, edge.aside = capacities, set()
        if self.active and self.stuck and edge.able:
            return self._gather(self.frontier)
        return []

    def accepts(self, child: str, attempt: int, block: Block, index: int) -> bool:
        """Whether a chunk (or header, ``index`` -1) is news.

        False for what was sent up before. Raises StaleError for another attempt, ProtocolError for a block that the
        child does not owe or a chunk beyond credit (N6).
        """
        edge = self.edges[child]
        if attempt != edge.attempt or self.waiting is not None:
            raise StaleError(f"a chunk of attempt {attempt}; attempt {edge.attempt} is running")
        if block not in edge.assigned:
            owed = " ".join(map(str, edge.assigned)) or "nothing"
            raise ProtocolError(f"{child} sent block {block}, which it does not owe; it owes {owed}")
        if index > edge.credit or index >= self.chunks:
            raise CreditError(f"{child} sent chunk {index} of {block} beyond its credit {edge.credit}")
        return index < 0 or index >= self.obligations[self.cover(block)]

    # ---- own work

    def next_unit(self) -> Block | None:
        """Take the next block to compute, None where one is being computed or none is left."""
        if self.computing is not None or not self.queue:
            return None
        self.computing = self.queue.pop(0)
        return self.computing

    def computed(self, block: Block) -> None:
        """The block is in the cache."""
        assert block == self.computing
        self.held.add(block)
        self.computing = None

    def spoilt(self, block: Block) -> None:
        """The block was computed on weights that were being overwritten: where it is owed, it is computed anew."""
        assert block == self.computing
        self.computing = None
        if self.slots.get(block) == SELF:
            self.queue.insert(0, block)

    def laggards(self, available: Callable[[Block, int], bool]) -> frozenset[str]:
        """Return who has not given its part of the frontier's chunk, where somebody else has nothing to do (N12)."""
        behind, idle = self._behind(available)
        # others may compute only what is meant for their own environment (N22)
        return frozenset(owner for slot, owner in behind if self.environments.open_to(slot, idle))

    def barred(self, available: Callable[[Block, int], bool]) -> frozenset[str]:
        """Return who is late where somebody has nothing to do, but in other environments only."""
        behind, idle = self._behind(available)
        return frozenset(owner for _, owner in behind) if idle else frozenset()

    def set_aside(self, late: Iterable[str]) -> list[Action]:
        """Count no longer on these children for what they stand still with: nobody else here may compute that (N22)."""
        for child in set(late) - {SELF}:
            slots = [slot for slot, owner in self.slots.items() if owner == child and self._open(slot)]
            edge = self.edges[child]
            edge.aside |= {name for name, _ in self.environments.split(slots) if name is not None}
            edge.capacities = {name: value for name, value in edge.capacities.items() if name not in edge.aside}
        return self.hurry(late)

    def _behind(self, available: Callable[[Block, int], bool]) -> tuple[list[tuple[Block, str]], set[str]]:
        """Return slots and owners that lack the frontier's chunk, and in which environments others do nothing."""
        if not self.assigned or self.waiting is not None or self.stuck or self.finished:
            return [], set()
        chunk = self.frontier
        behind = [(s, owner) for s, owner in self.slots.items() if self._open(s) and not available(s, chunk)]
        late = {owner for _, owner in behind}
        idle = {self.environment} if self.computes and self.computing is None and not self.queue else set()
        for child, edge in self.edges.items():
            if edge.able and child not in late:
                idle.update(edge.capacities)
        return behind, idle

    def unable(self) -> list[Action]:
        """This node computes nothing more for now: what it owes is for others."""
        self.computes, self.computing, self.queue = False, None, []
        if self.waiting is None and any(o == SELF and s not in self.held for s, o in self.slots.items()):
            return self._gather(self.frontier)
        return []

    def able(self) -> list[Action]:
        """This node computes again."""
        self.computes = True
        return self._gather(self.frontier) if self.active and self.stuck else []

    # ---- upward

    def cover(self, block: Block) -> Block:
        """Return the obligation that ``block`` is part of."""
        for obligation in self.obligations:
            if obligation.contains(block):
                return obligation
        raise ProtocolError(f"block {block} is part of no obligation")

    def sendable(self, available: Callable[[Block, int], bool]) -> tuple[Block, int] | None:
        """Return what to send next: chunk by chunk across all blocks (N6), or None."""
        if self.waiting is not None:
            return None
        due = [(index, block) for block, index in self.obligations.items() if index < self.chunks]
        if len(due) > 1:
            due.sort()
        for index, block in due:
            if (self.root or index <= self.allowed) and available(block, index):
                return block, index
        return None

    def sent(self, block: Block, index: int, *, last: bool = False) -> list[Action]:
        """Chunks through ``index`` went up; ``last`` where nothing follows (an absent block)."""
        before = self.frontier
        self.obligations[block] = self.chunks if last else index + 1
        after = self.frontier
        if after == before or self.waiting is not None:
            return []
        actions: list[Action] = []
        for child, edge in self.edges.items():
            through = after + edge.window - 1
            # Half a window at a time: a message for each chunk costs more than it brings. A child that has sent all
            # that it may gets some, since then the frontier is a whole window further.
            enough = through >= min(edge.credit + max(1, edge.window // 2), self.chunks - 1)
            if edge.assigned and through > edge.credit and edge.credit < self.chunks - 1 and enough:
                edge.credit = through
                actions.append(SendCredit(child, edge.attempt, through))
        return actions

    @property
    def frontier(self) -> int:
        """The lowest chunk not yet sent up."""
        if not self.assigned:
            return self.from_chunk
        return min(self.obligations.values(), default=self.chunks)

    @property
    def finished(self) -> bool:
        """Everything owed was sent up."""
        return self.assigned and self.frontier >= self.chunks

    @property
    def capacity(self) -> float:
        """What this subtree computes at once, in plain spheres."""
        return float(self.computes) + sum(edge.capacity for edge in self.edges.values() if not edge.leaving)

    @property
    def capacities(self) -> dict[str, float]:
        """The same by environment, without those that have none."""
        found = {self.environment: 1.0} if self.computes else {}
        for edge in self.edges.values():
            if not edge.leaving:
                for environment, capacity in edge.capacities.items():
                    if capacity > 0:
                        found[environment] = found.get(environment, 0.0) + capacity
        return found

    @property
    def holdings(self) -> BlockSet:
        """What this subtree may hold or compute of the step, as far as it is known here (N5)."""
        blocks = BlockSet(self.total, self.held | self.below)
        if self.computing is not None:
            blocks.add(self.computing)
        return blocks

    # ---- inside

    def _void(self) -> None:
        self.obligations, self.assigned, self.allowed, self.stuck = {}, False, -1, False
        self.slots, self.queue, self.environments = {}, [], ANY

    def _open(self, slot: Block) -> bool:
        """Whether chunks of a slot are still to be sent up."""
        return self.obligations[self.cover(slot)] < self.chunks

    def _ask(self, child: str, from_chunk: int) -> SendBegin:
        assert self.waiting is not None
        edge = self.edges[child]
        edge.reset(edge.attempt + 1, ready=False)
        self.waiting.add(child)
        return SendBegin(child, edge.attempt, from_chunk)

    def _gather(self, from_chunk: int, *, keep_late: bool = False) -> list[Action]:
        """Begin a new attempt on every child edge (N4)."""
        self.attempts += 1
        if not keep_late:
            self.late = frozenset()
        self.slots, self.queue, self.stuck = {}, [], False
        self.waiting = set()
        actions: list[Action] = [self._ask(child, from_chunk) for child in self.edges]
        return actions + self._gathered()

    def _gathered(self) -> list[Action]:
        """With the last Ready: give out what is owed, or say upward what there is."""
        if self.waiting is None or self.waiting or self.missing > 0:
            return []
        self.waiting = None
        if self.assigned:
            return self._give()
        if self.ready_sent:
            return []
        self.ready_sent = True
        held, computing = BlockSet(self.total, self.held), BlockSet(self.total)
        idle = {self.environment} if self.computes and self.computing is None else set()
        for edge in self.edges.values():
            if edge.ready:
                for block in edge.held:
                    held.add(block)
                for block in edge.computing:
                    computing.add(block)
                if edge.idle and edge.able:
                    idle.update(name for name in edge.capacities if edge.idle_in(name))
        if self.computing is not None:
            computing.add(self.computing)
        some = () if idle >= self.capacities.keys() else tuple(sorted(idle))
        return [SendReady(self.attempt, tuple(held), tuple(computing), bool(idle), some)]

    def _take(self, blocks: Sequence[Block], environments: Environments) -> list[Action]:
        self.obligations = dict.fromkeys(blocks, self.from_chunk)
        self.environments = environments
        self.assigned = True
        self.allowed = self.from_chunk + self.window - 1
        return [] if self.waiting is not None else self._give()

    def _give(self) -> list[Action]:
        """Partition what is owed: held blocks to their holders, the rest over idle nodes (N5, N9)."""
        first = self.frontier
        owed = [block for block, index in self.obligations.items() if index < self.chunks]
        partition = Partition(
            self.total,
            owed,
            self.edges,
            computes=self.computes,
            environment=self.environment,
            held=self.held,
            computing=self.computing,
            late=self.late,
        )
        rest = partition.keep(self.environments)
        if self.root and rest:
            self._decide(rest)
        nobody = partition.share_out(self.environments.split(rest))
        if nobody is not None:
            environment, part = nobody
            if any(edge.capacity_in(environment) > 0 and not edge.ready for edge in self.edges.values()):
                return self._gather(self.frontier)  # somebody joined after the attempt had begun
            self.slots, self.queue, self.stuck = {}, [], True
            return [Stuck(tuple(part))]
        self.stuck = False
        self.queue = partition.queue
        self.slots = dict.fromkeys([*partition.own, *self.queue], SELF)
        actions: list[Action] = []
        for child, blocks in partition.shares():
            edge = self.edges[child]
            edge.assigned = blocks
            if blocks:
                self.slots.update(dict.fromkeys(blocks, child))
                self.below.update(blocks)
                edge.first, edge.credit = first, first + edge.window - 1
                meant = self.environments.of(blocks)
                actions.append(SendAssign(child, edge.attempt, first, blocks, meant))
        return actions

    def _decide(self, blocks: Sequence[Block]) -> None:
        """At the root: for which environment each of these is meant (N22)."""
        if not any(edge.able and edge.ready for edge in self.edges.values()):
            return  # nobody can be given anything
        capacities = self.capacities
        if not self.environments:
            self.shares, self.gone = next_shares(self.shares, self.gone, capacities)
            self.environments = Environments.shared_out(self.total, self.shares)
        self.environments, moved = self.environments.handed_on(blocks, capacities)
        self.moved |= moved
