"""What must hold on a node whenever its hub was called: invariants I2, I3, I4, I6, I7 and I9 of docs/protocol.md."""

from __future__ import annotations

from typing import Any

from spheres.hub import Hub
from spheres.ledger import SELF

__all__ = ["HubWatch"]


class HubWatch:
    """One hub under watch. ``given``: the gradients that its worker has given and not got back, where it has one."""

    def __init__(self, hub: Hub, given: Any = None) -> None:
        self.hub, self.given = hub, given
        self.slots: Any = {}
        self.below = 0
        self.room = 0
        self.path: Any = None
        self.order: tuple[Any, ...] = ()
        #: child -> its link, work and attempt
        self.edges: dict[str, tuple[Any, ...]] = {}
        self.mark: Any = None

    def check(self) -> None:
        hub, ledger, reducer = self.hub, self.hub.ledger, self.hub.gradients.reducer
        assert ledger.held <= reducer.cache.keys(), "I9"
        if self.given is not None:
            cached = sum(1 for held in reducer.cache.values() if held.array is not None)
            assert len(self.given) == cached, "a gradient buffer was lost"
        if hub.path is not self.path:
            self.path = hub.path
            names = [node.id for node in hub.path]
            assert len(set(names)) == len(names), f"I7: {names}"
        self._check_attempts()
        if not ledger.assigned or ledger.waiting is not None or ledger.stuck:
            assert not ledger.slots
            return
        if ledger.slots is not self.slots:  # given out anew
            self.slots = ledger.slots
            self.below = sum(1 for owner in ledger.slots.values() if owner != SELF)
            self.room = sum(ledger.edges[owner].window for owner in ledger.slots.values() if owner != SELF)
            open_ones = [block for block, index in ledger.obligations.items() if index < ledger.chunks]
            indices = sorted(i for slot in ledger.slots for i in range(*slot))
            assert indices == sorted(i for block in open_ones for i in range(*block)), "I2"
            assert all(any(block.contains(slot) for block in open_ones) for slot in ledger.slots), "I2"
        if ledger.edges:
            pending = reducer.pending
            assert pending <= self.room, f"I4: {pending} chunks, {self.below} slots"
            assert all(e.credit <= ledger.frontier + e.window - 1 for e in ledger.edges.values()), "I3"

    def _check_attempts(self) -> None:
        """I6: (session, attempt) grows, upward and per child."""
        hub, ledger = self.hub, self.hub.ledger
        if hub.up.session:
            order = (hub.up.session, hub.work, ledger.attempt)
            assert order >= self.order, f"I6: {order} after {self.order}"
            self.order = order
        mark = (hub.up.session, hub.work, ledger.attempts, ledger.attempt, [c.order for c in hub.children.values()])
        if mark == self.mark:
            return
        self.mark = mark
        for name, edge in ledger.edges.items():
            child = hub.children.get(name)
            if child is not None:
                found = (child.order, hub.work, edge.attempt)
                known = self.edges.get(name)
                if known != found:
                    assert known is None or found > known, f"I6: {name} {found} after {known}"
                    self.edges[name] = found
