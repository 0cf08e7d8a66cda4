"""The record of a step on its way into the journal: compared with what was recorded of that step before, then on disk.

Where that stands in the commit of a step (N18) is the controller's; the file is in ``control.journal``.
"""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import Any

from control.config import RunConfig
from control.journal import Journal, weights_of
from control.metrics import origin
from control.telling import Teller
from spheres.config import NodeConfig
from spheres.environments import Environments, Range
from spheres.errors import CheckpointError

__all__ = ["Journalling"]


class Journalling:
    """Belongs to one loop. Mutable state: the journal, and what its last record took."""

    def __init__(self, journal: Journal, teller: Teller, config: RunConfig, node: NodeConfig) -> None:
        self.journal = journal
        self._teller, self._config, self._node = teller, config, node
        #: what the last record took to reach the disk; the next one says it
        self.seconds = 0.0

    async def write(self, record: dict[str, Any]) -> None:
        """Compare a step that is done again with its record, and append the new one. Returns when it is on disk.

        Raises CheckpointError where the step has other weights than before, and what the journal does.
        """
        recorded = self.journal.recorded_digest(record["step"])
        if recorded is not None:
            record["replayed"] = True
            if recorded != weights_of(record) and not await self._redone_elsewhere(record):
                raise CheckpointError(
                    f"step {record['step']} done again gave weights {weights_of(record)}, the journal has "
                    f"{recorded}: the task is not deterministic, or this machine computes other bits; see control-cli "
                    "doctor and control-cli replay"
                )
        self._teller.mixed(record["step"], record["mixed_recompute"])
        if self.journal.term != record["term"]:
            # what a replay needs to know of this process, once
            record["origin"] = await asyncio.to_thread(origin, self._config, self._node)
        # Off the loop: on a slow disk heartbeats must not wait for it. A record that cannot be written is not tried
        # again: the disk is full or gone, and the last checkpoint is where it is safe to go on from.
        began = perf_counter()
        await asyncio.to_thread(self.journal.append, record)
        self.seconds = perf_counter() - began
        self._teller.span("journal", self.seconds, record["step"])

    async def _redone_elsewhere(self, record: dict[str, Any]) -> bool:
        """Whether a step done again has other bits since others computed it: counted, and what follows is new too."""
        before = self.journal.made_in(record["step"])
        if before is None:
            return False
        parts, moved = before
        others = Environments(Range(*part) for part in parts).unlike(Range(*part) for part in record["environments"])
        if not (others or moved or record["mixed_recompute"]):
            return False
        record["mixed_recompute"] = max(others, record["mixed_recompute"], 1)
        await asyncio.to_thread(self.journal.forget, record["step"])
        return True
