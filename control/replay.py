"""Steps of a run computed again from its run directory: one process, no network, compared with the journal.

It says where the first difference is, and whose; it writes nothing, so the run may be going on meanwhile.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from control.checkpoint import CheckpointInfo, Checkpoints
from control.config import RunConfig
from control.gradients import Outcome
from control.initial import initial_weights, node_config
from control.journal import Broken, Records, read_records, weights_of
from control.position import put_back
from control.reference import CanonicalSum, SeenWeights
from control.schedules import learning_rate
from control.snapshot import Snapshot
from control.update import Updater, master_digest
from spheres.blocks import Block
from spheres.config import manifest_from_proto
from spheres.environment import describe, environment_fingerprint
from spheres.errors import CheckpointError, ConfigError, FingerprintError, GradientError
from spheres.numerics import crc32c
from spheres.reducer import Held
from spheres.task import Task, load_task
from spheres.weights import Weights
from spheres.worker import limit_threads

__all__ = ["BlockDifference", "Replay", "ReplayedStep"]


@dataclass(frozen=True, slots=True)
class BlockDifference:
    """A block whose gradient is another than the one that its sphere sent."""

    block: Block
    sphere: str
    recorded_crc32c: int
    computed_crc32c: int


@dataclass(frozen=True, slots=True)
class ReplayedStep:
    """A step that was computed again. Digests are those of control's weights after it, in hexadecimal."""

    step: int
    #: in which it was recorded; None where the journal has no record of it that can be read
    term: int | None
    recorded: str | None
    #: None where no update is possible with what came out
    computed: str | None
    decision: str
    #: what is not as recorded, a line each; none: all that was recorded is the same
    differences: tuple[str, ...]
    blocks: tuple[BlockDifference, ...]

    @property
    def equal(self) -> bool:
        return not self.differences


class Replay:
    """Steps ``first`` to ``last`` of the run in ``run_dir``, from the nearest checkpoint at or before ``first``.

    The initial weights count as a checkpoint of step 0. ``task`` None: the one that the run names. ``anyway``: a task
    or data other than the run's are no error. ``notes`` has what a reader should know besides, a line each.

    Raises ConfigError where there is no such run or step, CheckpointError where there is nothing to start from,
    FingerprintError, and TaskError where the task cannot be loaded.
    """

    def __init__(
        self, run_dir: Path, first: int, last: int | None = None, *, task: Task | None = None, anyway: bool = False
    ) -> None:
        self.run_dir, self.first, self.last = run_dir, first, first if last is None else last
        self.notes: list[str] = []
        if not 0 <= self.first <= self.last:
            raise ConfigError(f"there are no steps {self.first} to {self.last}: they count from 0, the first one first")
        info = _run_info(run_dir)
        self.run_id = str(info["run_id"])
        self._config = RunConfig.from_json(json.dumps(info["config"]))
        #: that it begins from; None: the initial weights
        self.checkpoint: CheckpointInfo | None = None
        self._records, snapshot = self._find_start()
        #: the step to begin with
        self.start = 0 if snapshot is None else snapshot.run.step
        self._open(snapshot, task, anyway=anyway)

    def __repr__(self) -> str:
        return f"<Replay {self.run_dir} steps {self.first} to {self.last} from {self.start}>"

    def steps(self) -> Iterator[ReplayedStep]:
        """Compute from ``start`` to ``last``, and end with the first step that differs.

        Raises what the task raises.
        """
        limit_threads()
        for step in range(self.start, self.last + 1):
            done = self._step(step)
            yield done
            if not done.equal:
                return

    # ---- where to start

    def _find_start(self) -> tuple[Records, Snapshot | None]:
        """Return the records from the start on, and the snapshot there; None for the initial weights."""
        checkpoints = Checkpoints(self.run_dir / "checkpoints", keep=1)
        earlier = [info for info in checkpoints.list() if info.step <= self.first and info.finite]
        earlier.sort(key=lambda info: -info.step)
        for info in earlier:
            records = self._read(max(0, info.step - 1))
            try:
                snapshot = checkpoints.load(info.name)
                self._check_lineage(info, snapshot, records)
            except CheckpointError as error:
                self.notes.append(f"passed over: {error}")
                continue
            self.checkpoint = info
            return records, snapshot
        return self._read(0), None

    def _check_lineage(self, info: CheckpointInfo, snapshot: Snapshot, records: Records) -> None:
        """A checkpoint of steps that were done again otherwise since (a restore, another total) is not on the way."""
        before = records.steps.get(info.step - 1)
        if snapshot.run.run_id != self.run_id:
            raise CheckpointError(f"{info.name} is of run {snapshot.run.run_id}")
        if before is None:
            return
        own = snapshot.run.weights_digest.hex()
        if before.get("master_digest"):
            manifest = manifest_from_proto(snapshot.run.manifest)
            own = str(master_digest(self._config, manifest, snapshot.buffers["weights"]))
        if own != weights_of(before):
            raise CheckpointError(f"{info.name} has other weights than the journal after step {info.step - 1}")

    def _read(self, start: int) -> Records:
        path = self.run_dir / "journal.jsonl"
        try:
            records = read_records(path, range(min(start, self.first), self.last + 1))
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        if records.last is None or records.first is None:
            raise ConfigError(f"{path} has no step{_in_words(records.broken)}")
        for step in (self.first, self.last):
            if not records.first <= step <= records.last:
                raise ConfigError(f"no step {step} in {path}: it has steps {records.first} to {records.last}")
        missing = [step for step in range(self.first, self.last + 1) if step not in records.steps]
        if missing:
            raise ConfigError(f"no record of step {missing[0]} in {path}{_in_words(records.broken)}")
        return records

    def _open(self, snapshot: Snapshot | None, task: Task | None, *, anyway: bool) -> None:
        """Make the task, the weights and the optimizer as they were before step ``start``."""
        config = self._config
        if snapshot is not None:
            config = config.model_copy(update={"init_from": None})  # read at the very start alone
        elif self._records.origins:
            begun = self._records.origins[min(self._records.origins)]["config"]
            config = config.model_copy(update={"init_from": begun["init_from"] and Path(begun["init_from"])})
        if task is None:
            task = load_task(config.task, config.task_options)
        try:
            manifest, flat = initial_weights(task, config)
        except ConfigError as error:
            raise CheckpointError(
                f"no checkpoint at or before step {self.first}, and the initial weights cannot be made again: {error}"
            ) from error
        node = node_config(task, config, manifest, run_id=self.run_id)
        self._compare_origin(node.task_fingerprint, node.data_fingerprint, snapshot, anyway=anyway)
        self._steps_per_epoch = node.sampler.steps_per_epoch
        self._updater = Updater(config, manifest, config.total_steps(self._steps_per_epoch))
        #: term -> its configuration
        self._configs = {
            term: RunConfig.from_json(json.dumps(origin["config"])) for term, origin in self._records.origins.items()
        }
        self._weights = Weights(node)
        if snapshot is None:
            self._weights.flat[:] = flat
        else:
            put_back(snapshot, node=node, weights=self._weights, optimizer=self._updater.optimizer)
        self._weights.publish(term=1, version=self.start)
        self._seen = SeenWeights(manifest, self._weights.flat, node.weights_dtype)
        self._top = Block(0, config.microbatches)
        self._environment = environment_fingerprint()
        # whatever the run does about them, here they are found and compared
        self._sum = CanonicalSum(replace(node, skips_nonfinite=True), task, self._seen.views)

    def _compare_origin(self, task: str, data: str, snapshot: Snapshot | None, *, anyway: bool) -> None:
        first = self._records.steps.get(self.start, {})
        recorded: Mapping[str, Any] = self._records.origins.get(int(first.get("term", 0)), {})
        if snapshot is not None and not recorded:
            run = snapshot.run
            recorded = {"task_fingerprint": run.task_fingerprint, "data_fingerprint": run.data_fingerprint}
        for what, now in (("task", task), ("data", data)):
            then = recorded.get(f"{what}_fingerprint", now)
            if then == now:
                continue
            said = f"the {what} {'is' if what == 'task' else 'are'} not the run's: fingerprint {now}, recorded {then}"
            if not anyway:
                raise FingerprintError(f"{said}; put back what the run had, or replay with these by --anyway")
            self.notes.append(said)
        environment, here = recorded.get("environment", {}), describe()
        unlike = [f"{key} {here.get(key)}, was {then}" for key, then in environment.items() if here.get(key) != then]
        if unlike:
            self.notes.append(f"this machine is not the run's, and may compute other bits: {'; '.join(unlike)}")

    # ---- a step

    def _step(self, step: int) -> ReplayedStep:
        record = self._records.steps.get(step) or {}
        parts = _parts(record)
        checksums: dict[Block, int] = {}

        def see(block: Block, held: Held) -> None:
            if block in parts:
                checksums[block] = 0 if held.array is None else crc32c(held.array)

        summed = self._sum(step, self._top, see)
        blocks = tuple(
            BlockDifference(block, sphere, checksum, checksums[block])
            for block, (sphere, checksum) in parts.items()
            if checksum and checksums.get(block, checksum) != checksum
        )
        verdicts = self._compare_verdicts(record, [verdict.microbatch for verdict in summed.skipped])
        differences = verdicts + [
            f"block {d.block} of {d.sphere}: its gradient has checksum {d.recorded_crc32c:08x} in the journal, "
            f"{d.computed_crc32c:08x} here"
            for d in blocks
        ]
        elsewhere = sum(
            hi - lo for lo, hi, name in record.get("environments", ()) if name and name != self._environment
        )
        if differences and elsewhere:
            differences.append(
                f"{elsewhere} of its microbatches were computed in another numeric environment than this one "
                f"({self._environment}): their bits can only be found again there"
            )
        if len(blocks) > 1 and len(blocks) == sum(1 for _, checksum in parts.values() if checksum):
            differences.append("every block differs: another task or data, other weights to start from, or a machine "
                               "that computes other bits")  # fmt: skip
        decision, computed = str(record.get("decision", Outcome.APPLIED)), None
        if not verdicts:  # else another decision, or none
            try:
                decision, computed = self._apply(step, summed, record, differences)
            except GradientError as error:
                differences.append(str(error))
        self._sum.release(summed)
        recorded = None if not record else weights_of(record)
        term = None if not record else int(record.get("term", 0))
        return ReplayedStep(step, term, recorded, computed, decision, tuple(differences), blocks)

    def _apply(self, step: int, summed: Held, record: Mapping[str, Any], differences: list[str]) -> tuple[str, str]:
        """Do the update as it was recorded, and say what of it differs."""
        gradient = np.zeros(0, np.float32) if summed.array is None else summed.array
        rate = self._rate(step, record, differences)
        update = self._updater.apply(
            self._weights, gradient, summed.sums, step=step, term=1, skipped=len(summed.skipped), rate=rate
        )
        self._seen.refresh()
        decision, digest = str(update.outcome), update.master_digest or self._weights.digest.hex()
        if not record:
            return decision, digest
        then = record.get("decision", str(Outcome.APPLIED))
        if decision != then:
            differences.append(f"the decision was {then}, and is {decision} here")
        loss = None if summed.sums is None else summed.sums.loss / summed.sums.count
        loss = None if loss is None or not math.isfinite(loss) else loss
        if loss != record.get("loss"):
            differences.append(f"the loss was {record.get('loss')}, and is {loss} here")
        served = self._weights.digest.hex()
        if digest == weights_of(record) and served == record["weights_digest"]:
            return decision, digest
        if digest == weights_of(record):
            differences.append(f"the digest of what spheres saw was {record['weights_digest']}, and is {served} here")
        else:
            differences.append(f"the weights' digest was {weights_of(record)}, and is {digest} here")
        known = record.get("gradient_crc32c")
        if known and not any(line.startswith(("block", "learning")) for line in differences):
            differences.append(
                "the summed gradient is the recorded one: the update at control went wrong, or the record was changed"
                if known == update.gradient_crc32c
                else "every block is as its sphere computed it, their sum is not: it went wrong between these spheres "
                "and control"
            )
        return decision, digest

    def _rate(self, step: int, record: Mapping[str, Any], differences: list[str]) -> float | None:
        """Return the rate as recorded: that of a schedule follows the total, which may have grown since."""
        rate = record.get("learning_rate")
        then = self._configs.get(int(record.get("term", 0)))
        if rate is not None and then is not None:
            total = then.total_steps(self._steps_per_epoch)
            expected = learning_rate(then.schedule, then.learning_rate, step, total)
            if rate != expected:
                differences.append(f"learning rate {rate} was recorded, the run's configuration gives {expected}")
        return rate

    def _compare_verdicts(self, record: Mapping[str, Any], found: list[int]) -> list[str]:
        if not record:
            return []
        recorded = {int(v["microbatch"]): str(v["sphere"]) for v in record.get("nonfinite", ())}
        lines = [
            f"microbatch {index} of {sphere} was not finite, and is here"
            for index, sphere in recorded.items()
            if index not in found
        ]
        for index in found:
            if index not in recorded:
                spheres = [sphere for block, (sphere, _) in _parts(record).items() if block.lo <= index < block.hi]
                lines.append(f"microbatch {index} of {', '.join(spheres) or 'a sphere'} was finite, and is not here")
        return lines


def _run_info(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "run.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{run_dir} holds no run; name one with --run-dir") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(info, dict) or "run_id" not in info or not isinstance(info.get("config"), dict):
        raise ConfigError(f"{path} is broken: put back a copy")
    return info


def _parts(record: Mapping[str, Any]) -> dict[Block, tuple[str, int]]:
    """Return block -> who computed it, and the checksum of its gradient, 0 where there is none."""
    contributions = record.get("contributions", [])
    checksums = record.get("contributions_crc32c") or [0] * len(contributions)
    return {
        Block(lo, hi): (str(sphere), int(checksum))
        for (lo, hi, sphere), checksum in zip(contributions, checksums, strict=False)
    }


def _in_words(broken: list[Broken]) -> str:
    return "".join(f"; line {each.line} {each.what}" for each in broken[:3])
