"""Where a run begins or goes on: its directory, its checkpoints, the one to go on from, and whether it may.

It changes nothing of the run yet. What a directory holds is in ``control.run_dir``.
"""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from control.checkpoint import Checkpoints, read_snapshot
from control.config import RunConfig, compare_identity, identity
from control.journal import Journal
from control.run_dir import RunDirectory
from control.schedules import follows_total
from control.snapshot import Snapshot
from control.store_fsspec import is_url, store_at
from spheres.errors import ConfigError

__all__ = ["Beginning"]

log = logging.getLogger(__name__)


@dataclass
class Beginning:
    """The beginning of one run. Mutable: what ``find`` finds.

    ``resume``: None for a new run, "" for the newest checkpoint of the run directory, else a checkpoint's path or URL.
    """

    config: RunConfig
    resume: str | None
    #: locked for this process; whoever has opened this closes it
    directory: RunDirectory
    checkpoints: Checkpoints = field(init=False)
    #: the checkpoint to go on from; None: from the initial weights
    snapshot: Snapshot | None = None
    #: of a run that goes on, its configuration so far
    before: RunConfig | None = None
    #: why newer checkpoints than that are not taken
    passed_over: list[str] = field(default_factory=list)

    @classmethod
    async def open(cls, config: RunConfig, resume: str | None) -> Self:
        """Make the run's directory, or open it. Raises ConfigError, and CheckpointError of one behind a URL."""
        if resume is None:
            return cls(config, resume, RunDirectory.create(config.run_dir, config.task))
        if is_url(resume) and not (config.run_dir and (config.run_dir / "run.json").exists()):
            # The machine that had the run's directory may be gone: the checkpoint is enough to go on in a new one.
            snapshot = await asyncio.to_thread(read_snapshot, resume)
            directory = RunDirectory.create(config.run_dir, config.task)
            directory.info |= {"run_id": snapshot.run.run_id, "term": snapshot.run.term}
            return cls(config, resume, directory, snapshot)
        return cls(config, resume, RunDirectory.open(config.run_dir or _run_of(resume)))

    async def find(self) -> None:
        """Find the checkpoint to go on from, if any. Raises ConfigError and CheckpointError where it may not go on."""
        config, resume, directory = self.config, self.resume, self.directory
        # a run's own place below the URL: retention of one must not remove what is another's
        url = config.checkpoint_url and f"{config.checkpoint_url.rstrip('/')}/{directory.run_id}"
        store = store_at(url or directory.path / "checkpoints")
        self.checkpoints = Checkpoints(store, keep=config.keep, keep_every=config.keep_every)
        if resume is None:
            if url:
                await asyncio.to_thread(self.checkpoints.list)  # a URL that cannot be reached is found now
            return
        if resume == "" and await asyncio.to_thread(self.checkpoints.none_saved):
            # killed before its first checkpoint: the initial weights are the one of step 0
            log.warning("%s has no checkpoint yet: the run begins again from its initial weights", directory.path)
            self._go_on_as(json.dumps(directory.info["config"]))
            return
        snapshot = self.snapshot
        if snapshot is None:
            where = resume if is_url(resume) else Path(resume) if resume else None
            snapshot = self.snapshot = await asyncio.to_thread(self.checkpoints.load, where, self.passed_over.append)
        elif url:  # terms that were counted after the one that it was saved in (N1)
            found = await asyncio.to_thread(self.checkpoints.list)
            directory.info["term"] = max([snapshot.run.term, *(info.term for info in found)])
        self._go_on_as(snapshot.run.config_json)
        if snapshot.run.run_id != directory.run_id:
            raise ConfigError(
                f"checkpoint {resume or 'found'} is of run {snapshot.run.run_id}, {directory.path} holds run "
                f"{directory.run_id}; name the run's own directory with --run-dir, or start a new run with --init-from"
            )

    def _go_on_as(self, config_json: str) -> None:
        """Take this for the configuration so far. Raises ConfigError where the run would be another one now."""
        self.before = RunConfig.from_json(config_json)
        compare_identity(identity(self.before), identity(self.config))

    def allow_another_total(self, journal: Journal, steps_per_epoch: int, step: int) -> None:
        """A schedule that ends with the run has other rates where the total is another: its replay differs, rightly.

        ``step``: where the run goes on.
        """
        if self.before is None:
            return
        totals = [c.total_steps(steps_per_epoch) for c in (self.before, self.config)]
        if follows_total(self.config.schedule) and totals[0] != totals[1]:
            log.warning(
                "the total was %d steps and is %d: the %s schedule goes on on the curve of the new one; "
                "give --decay-steps for one that does not move",
                totals[0],
                totals[1],
                self.config.schedule.kind,
            )
            journal.forget(step)


def _run_of(checkpoint: str) -> Path | None:
    """Return the run directory that holds a checkpoint; None for the latest run."""
    return Path(checkpoint).absolute().parent.parent if checkpoint else None
