"""Starts a process from one that has threads: gRPC's, which are not in the copy that a fork makes.

uvloop runs Python in that copy before the new program takes its place. Were garbage collected there, a queue of gRPC
that lies in it, from an earlier run of a notebook, say, would wait for its thread for ever; and so would all that wait
for the new process.
"""

from __future__ import annotations

import asyncio
import gc
from typing import Any

__all__ = ["start_process"]


async def start_process(*words: str, **options: Any) -> asyncio.subprocess.Process:
    """Do as ``asyncio.create_subprocess_exec``, and collect nothing until the program runs. Raises OSError."""
    collects = gc.isenabled()
    gc.disable()
    try:
        # The fork comes before the first suspension: whoever starts another meanwhile does not need this one's word.
        return await asyncio.create_subprocess_exec(*words, **options)
    finally:
        if collects:
            gc.enable()
