"""Bugs to plant, one at a time: those that RECOVERY's model caught. Each is the shipped code with one rule broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from spheres.blocks import Block, BlockSet, halves
from spheres.carrier import Shared
from spheres.downward import Downward
from spheres.hub import Hub
from spheres.ledger import Ledger, SendCredit
from spheres.reducer import Reducer
from spheres.testing.compute import VirtualWorker
from spheres.weights import Weights

Patches = list[tuple[Any, str, Any]]


def from_chunk_lost() -> Patches:
    """N4: a new attempt begins at chunk 0, not where the parent says."""
    begin, assign = Ledger.begin, Ledger.assign

    def lost_begin(self: Ledger, attempt: int, from_chunk: int) -> Any:
        return begin(self, attempt, 0)

    def lost_assign(self: Ledger, attempt: int, from_chunk: int, blocks: Any, environments: Any) -> Any:
        return assign(self, attempt, 0, blocks, environments)

    return [(Ledger, "begin", lost_begin), (Ledger, "assign", lost_assign)]


def credit_on_complete() -> Patches:
    """N6: credit follows the lowest chunk that is not complete, whether or not it was sent up."""
    on_step = Hub._on_step

    def generous(self: Hub, child: Any, message: Any, payload: Any) -> None:
        on_step(self, child, message, payload)
        ledger = self.ledger
        if not ledger.assigned or ledger.waiting is not None or ledger.finished:
            return
        has = self.gradients.reducer.has

        def complete(block: Block, index: int) -> int:
            while index < ledger.chunks and has(block, index):
                index += 1
            return index

        lowest = min(complete(block, index) for block, index in ledger.obligations.items())
        through = lowest + ledger.window - 1
        for name, edge in ledger.edges.items():
            if edge.assigned and through > edge.credit:
                edge.credit = through
                self._carry_out([SendCredit(name, edge.attempt, through)])

    return [(Hub, "_on_step", generous)]


def siblings_merged_at_the_sender() -> Patches:
    """N3: a parent names two halves, as it may; the child sends their sum instead."""
    within, take = BlockSet.within, Ledger._take

    def in_halves(self: BlockSet, tops: Any) -> list[Block]:
        found = within(self, tops)
        return [part for block in found for part in (halves(block) if block.width > 1 else (block,))]

    def merged(self: Ledger, blocks: Any, environments: Any) -> Any:
        return take(self, list(BlockSet(self.total, blocks)), environments)

    return [(BlockSet, "within", in_halves), (Ledger, "_take", merged)]


def completion_by_counting() -> Patches:
    """N8: a chunk is complete when as many have come as there are slots, whosever they are."""
    has = Reducer.has

    def counted(self: Reducer, block: Block, index: int) -> bool:
        if block in self.slots:
            return has(self, block, index)
        inside = [slot for slot in self.slots if block.contains(slot)]
        came = sum(len(a.chunks) if not a.absent else 1 for a in self.arrived.values())
        return bool(inside) and came + sum(1 for slot in inside if slot in self.cache) >= len(inside)

    return [(Reducer, "has", counted)]


def attempt_not_raised() -> Patches:
    """N5b: with a new parent, children go on with the attempt of the old one."""

    def relinked(self: Ledger) -> None:
        self._void()
        self.attempt, self.ready_sent, self.waiting, self.missing = 0, True, None, 0.0

    return [(Ledger, "relinked", relinked)]


def block_major_sending() -> Patches:
    """N6: a block is sent to its end before the next one begins."""

    def sendable(self: Ledger, available: Callable[[Block, int], bool]) -> Any:
        if self.waiting is not None:
            return None
        due = sorted((block, index) for block, index in self.obligations.items() if index < self.chunks)
        for block, index in due[:1]:
            if (self.root or index <= self.allowed) and available(block, index):
                return block, index
        return None

    return [(Ledger, "sendable", sendable)]


def weights_overwritten_early() -> Patches:
    """N15: control writes the next weights chunk by chunk as the gradient comes, before all of it is there."""
    summed = Hub._summed

    def eager(self: Hub, batch: Any) -> None:
        ledger, gradients, flat = self.ledger, self.gradients, self.weights.flat
        kept = self.__dict__.setdefault("kept", {})
        if not ledger.assigned or ledger.frontier == 0:
            kept.clear()
        summed(self, batch)
        if not self.root or not gradients._train or gradients._out is None or not ledger.assigned:
            return
        size = self.config.chunk_elements
        for index in range(ledger.frontier):
            if index not in kept:
                early = slice(index * size, (index + 1) * size)
                kept[index] = flat[early].copy()
                flat[early] += gradients._out[early]
        if ledger.finished:  # here the shipped update takes over, from what the weights were
            for index, chunk in kept.items():
                flat[index * size : index * size + chunk.size] = chunk
            kept.clear()

    return [(Hub, "_summed", eager)]


def torn_published() -> Patches:
    """N19: whoever has read weights in another's memory does not look whether they were overwritten meanwhile."""
    return [(Weights, "intact", property(lambda _: True))]


def rings_rewritten() -> Patches:
    """N19: a new attempt writes its sums where those of the one before lie."""
    return [(Shared, "begin", lambda self, *, attempt: self._areas.clear())]


def buffers_rewritten() -> Patches:
    """N19: gradients that a former parent may still read are written again."""
    return [(VirtualWorker, "retire", lambda _: None)]


def end_told_once() -> Patches:
    """Who comes to a parent after the end of the run is not told of it."""
    direct = Downward.direct

    def forgotten(self: Downward, directive: Any) -> None:
        direct(self, directive)
        self._farewell = None

    return [(Downward, "direct", forgotten)]


PLANTS: dict[str, Callable[[], Patches]] = {
    "from-chunk-lost": from_chunk_lost,
    "credit-on-complete": credit_on_complete,
    "siblings-merged": siblings_merged_at_the_sender,
    "completion-by-counting": completion_by_counting,
    "attempt-not-raised": attempt_not_raised,
    "block-major": block_major_sending,
    "weights-overwritten": weights_overwritten_early,
    "torn-published": torn_published,
    "rings-rewritten": rings_rewritten,
    "buffers-rewritten": buffers_rewritten,
    "end-told-once": end_told_once,
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Run with a bug; "" for none."""
    with ExitStack() as stack:
        for owner, attribute, changed in PLANTS[name]() if name else []:
            stack.enter_context(patch.object(owner, attribute, changed))
        yield
