"""The next version of the weights: made on the loop or beside it, and on its way to children while it is made.

What is done to gradient and weights is in ``control.update``; that the step then counts (N18) is the controller's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from control.tree import Tree
from control.update import Update, Updater
from spheres.hub import EVALUATE, Work
from spheres.numerics import Run, in_turn
from spheres.tensors import aligned_zeros

__all__ = ["Renewal"]

#: models up to this many elements are updated on the loop: a thread would cost more than the update
_INLINE_ELEMENTS = 1 << 18


def _nothing() -> None:
    """Nobody is to hear of it."""


class Renewal:
    """Renews the tree's weights, step after step. Belongs to one loop.

    Mutable state: the gradient, and the optimizer by way of the updater.
    """

    def __init__(self, tree: Tree, updater: Updater) -> None:
        self.updater = updater
        #: what a step's gradients are summed into: float32[manifest.size]
        self.gradient = aligned_zeros(tree.config.manifest.size)
        self._tree = tree

    async def make(self, step: int, *, early: Callable[[], bool]) -> Update:
        """Seal the step and make version ``step + 1`` of its gradient (N15). Raises GradientError as the updater does.

        ``early``, asked once no more of the step is to come: whether children are to get the new version meanwhile.
        """
        hub, term = self._tree.hub, self._tree.term
        sums, skipped = hub.sums, len(hub.gradients.skipped)
        hub.seal()

        def apply(run: Run, announce: Callable[[], None] = _nothing, progress: Callable[[], None] = _nothing) -> Update:
            return self.updater.apply(
                hub.weights,
                self.gradient,
                sums,
                step=step,
                term=term,
                skipped=skipped,
                announce=announce,
                progress=progress,
                run=run,
            )

        if self._tree.config.manifest.size <= _INLINE_ELEMENTS:
            return apply(in_turn)
        side_by_side = self._tree.side_by_side
        if not early():
            return await asyncio.to_thread(apply, side_by_side)
        # Children get the new version while it is being made; what they owe, which makes the step visible, after its
        # record is on disk (N18).
        loop = asyncio.get_running_loop()
        coming = Work(term, step + 1, EVALUATE)

        def announce() -> None:
            loop.call_soon_threadsafe(hub.announce, coming)

        def progress() -> None:
            loop.call_soon_threadsafe(hub.stream)

        return await asyncio.to_thread(apply, side_by_side, announce, progress)
