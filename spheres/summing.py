"""Sums of chunks in canonical order, block by block over all sources, and the threads that do them beside the loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from spheres.narrow import add_rounded, from_wire
from spheres.numerics import BLOCK_ELEMENTS
from spheres.tensors import aligned_zeros

__all__ = ["Expression", "Summer", "add_up", "chunk_scratch"]

Array = npt.NDArray[np.float32]

#: What is to be summed: elements, or left + right. Elements are float32, or the upper halves of such (uint16), as
#: bfloat16 has them on the wire.
Expression: TypeAlias = "npt.NDArray[Any] | tuple[Expression, Expression]"

_THREADS = 2

_local = threading.local()


def add_up(expression: Expression, out: Array, dtype: str = "float32") -> None:
    """Write the sum into ``out``: left + right at every node, each sum rounded to ``dtype`` (N21).

    Block by block: a block and what is summed into it stay in the cache (256 KiB). A sum that overflows is control's to
    judge, not a warning's.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        for low in range(0, out.size, BLOCK_ELEMENTS):
            part = slice(low, min(low + BLOCK_ELEMENTS, out.size))
            target = out[part]
            value = _value(expression, part, target, 0, dtype)
            if value is not target:
                target[:] = value


def _value(expression: Expression, part: slice, out: Array, depth: int, dtype: str) -> Array:
    """Return a part of the sum: of float32 elements a view, else in ``out``."""
    if not isinstance(expression, tuple):
        elements = expression[part]
        if elements.dtype == np.float32:
            return elements
        from_wire(elements.data.cast("B"), "bfloat16", out)
        return out
    left = _value(expression[0], part, out, depth, dtype)
    right = _value(expression[1], part, _scratch(depth)[: out.size], depth + 1, dtype)
    add_rounded(left, right, out, dtype)
    return out


def chunk_scratch(size: int) -> Array:
    """Return this thread's buffer for one chunk, as large as the largest asked for; for the next call another's."""
    chunk: Array | None = getattr(_local, "chunk", None)
    if chunk is None or chunk.size < size:
        chunk = _local.chunk = aligned_zeros(size)
    return chunk[:size]


def _scratch(depth: int) -> Array:
    """Return this thread's scratch block for the right side of a sum so deep."""
    blocks: list[Array] | None = getattr(_local, "blocks", None)
    if blocks is None:
        blocks = _local.blocks = []
    while len(blocks) <= depth:
        blocks.append(aligned_zeros(BLOCK_ELEMENTS))
    return blocks[depth]


class Summer:
    """Two threads of one node. ``run`` has work done side by side on them, then a call on the loop."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="sum")

    def run(self, works: Sequence[Callable[[], None]], done: Callable[[BaseException | None], None]) -> None:
        """``done`` gets the first error of ``works``, or None. It is not called once the loop has ended."""
        loop = asyncio.get_running_loop()
        left = len(works)
        lock = threading.Lock()
        errors: list[BaseException] = []

        def finished(future: Future[None]) -> None:
            nonlocal left
            error = asyncio.CancelledError() if future.cancelled() else future.exception()
            with lock:
                left -= 1
                if error is not None:
                    errors.append(error)
                if left:
                    return
            try:
                loop.call_soon_threadsafe(done, errors[0] if errors else None)
            except RuntimeError:  # the loop has ended
                return

        for work in works:
            self._pool.submit(work).add_done_callback(finished)

    def wait(self, works: Sequence[Callable[[], None]]) -> None:
        """Have work done side by side, and return when all is done; for a thread that is none of these."""
        futures = [self._pool.submit(work) for work in works]
        wait(futures)
        for future in futures:
            future.result()

    def close(self) -> None:
        """Wait for nobody: what is being summed is nobody's any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
