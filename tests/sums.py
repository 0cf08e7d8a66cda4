"""The canonical sum of leaves, written down once more: what reducers and workers are held to."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from spheres.blocks import Block, halves

Array = npt.NDArray[np.float32]


def canonical(
    block: Block, leaves: dict[int, Array | None], narrow: Callable[[Array], Array] = lambda total: total
) -> Array | None:
    """Return the sum of leaves, which are rounded already; ``narrow`` rounds each sum of two."""
    if block.width == 1:
        return leaves[block.lo]
    left, right = (canonical(half, leaves, narrow) for half in halves(block))
    if left is None or right is None:
        return left if right is None else right
    return narrow(left + right)
