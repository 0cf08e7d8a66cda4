"""Chunks on their way to the parent: claimed, a batch at a time, then summed, then messages that wait for the writer.

What a batch holds, and which chunks may go, is not decided here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from spheres.gradients import Batch, Outgoing
from spheres.numerics import in_turn
from spheres.work import Hooks

__all__ = ["Batches"]

#: elements that are summed on the loop: for so few a thread would cost more than it takes off it
_INLINE_ELEMENTS = 1 << 16


class Batches:
    """Mutable state: the batch that is being summed, one at a time, and the messages of those that were.

    At the root there are no messages: its sums stay.
    """

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks
        #: what is being summed beside the loop
        self.batch: Batch | None = None
        #: gradient messages that are ready to go up
        self.ready: deque[Outgoing] = deque()

    def add_up(self, batch: Batch, done: Callable[[Batch], None]) -> bool:
        """Have a batch summed: a small one here, a large one beside the loop. Whether its sum is there.

        Where it is not yet, ``done`` is called on the loop when it is; where it failed, the hook ``broken``.
        """
        self.batch = batch
        if batch.elements <= _INLINE_ELEMENTS or self._hooks.run is None:
            try:
                in_turn(batch.works)
            except Exception as error:  # noqa: BLE001 - for want of memory, for one: as beside the loop
                self._break(error)
                return False
            return True

        def ended(error: BaseException | None) -> None:
            if error is not None and not batch.recalled:
                self._break(error)
            else:
                done(batch)

        self._hooks.run(batch.works, ended)
        return False

    def _break(self, error: BaseException) -> None:
        self.batch = None
        self._hooks.broken(error)

    def end(self, batch: Batch) -> bool:
        """A batch's sum is there: its messages may go. False where its attempt is over: then it is dropped."""
        self.batch = None
        if batch.recalled:
            return False
        self.ready.extend(batch.messages)
        return True

    def recall(self) -> None:
        """What was claimed for the parent is of the past."""
        self.ready.clear()
        if self.batch is not None:
            self.batch.recalled = True
