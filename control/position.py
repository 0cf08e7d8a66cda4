"""Where a run stands between two steps, and its snapshot: what a checkpoint holds, taken and put back.

How snapshots become files is in ``control.snapshot``; when one is taken, the controller decides.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from control.config import RunConfig
from control.events import CallbackRegistry
from control.optimizers import Optimizer
from control.snapshot import Snapshot
from control.tree import Tree
from spheres.config import NodeConfig, manifest_to_proto
from spheres.errors import CheckpointError
from spheres.tensors import aligned_zeros
from spheres.v1 import checkpoint_pb2
from spheres.weights import Weights

__all__ = ["Copies", "Position", "Standing", "put_back"]

Array = npt.NDArray[np.float32]


@dataclass(slots=True)
class Position:
    """Mutable: what changes from step to step, besides weights and optimizer."""

    #: steps committed
    step: int = 0
    #: latest values: loss, accuracy, ...
    metrics: dict[str, float] = field(default_factory=dict)
    best_value: float | None = None
    best_step: int = 0
    #: seconds of training before this process, or before the restore
    earlier_seconds: float = 0.0
    #: microbatches computed in another numeric environment than they were meant for (N22)
    mixed_recomputes: int = 0

    def note_best(self, values: Mapping[str, float], config: RunConfig) -> bool:
        """Compare an evaluation of this step with the best so far; whether it is better."""
        value = values.get(config.best_metric)
        sign = 1.0 if config.best_direction == "max" else -1.0
        if (
            value is None
            or not math.isfinite(value)
            or (self.best_value is not None and not sign * value > sign * self.best_value)
        ):
            return False
        self.best_value, self.best_step = value, self.step
        return True


class Standing:
    """Where a run stands: all that its checkpoints hold, taken and put back between two steps. Belongs to one loop.

    Mutable state: the position, and since when it trains. Weights, optimizer, the shares of environments and the states
    of callbacks have owners of their own; here they are read, and written when a snapshot is put back.
    """

    def __init__(
        self, config: RunConfig, node: NodeConfig, tree: Tree, optimizer: Optimizer, callbacks: CallbackRegistry
    ) -> None:
        self.position = Position()
        self._config, self._node, self._tree = config, node, tree
        self._optimizer, self._callbacks = optimizer, callbacks
        self._began = time.monotonic()

    def __repr__(self) -> str:
        return f"<Standing {self.position}>"

    def begin(self) -> None:
        """Training begins, or goes on from what was put back, now."""
        self._began = time.monotonic()

    @property
    def latest_seconds(self) -> float:
        """Seconds since it began in this process, or went on after a restore."""
        return time.monotonic() - self._began

    @property
    def train_seconds(self) -> float:
        """Seconds since training began, those of earlier terms included."""
        return self.position.earlier_seconds + self.latest_seconds

    def start_from(self, flat: Array) -> None:
        """Take these first weights, float32[manifest.size]."""
        np.copyto(self._tree.hub.weights.flat, flat)

    def take(self) -> Snapshot:
        """Return the snapshot, without what takes time: the SHA-256, spheres' records. Its buffers are references."""
        position, node, hub, sampler = self.position, self._node, self._tree.hub, self._node.sampler
        run = checkpoint_pb2.RunRecord(
            run_id=node.run_id,
            term=self._tree.term,
            step=position.step,
            weights_version=hub.weights.version,
            weights_digest=hub.weights.digest,
            manifest=manifest_to_proto(node.manifest),
            config_json=self._config.to_json(),
            optimizer_count=self._optimizer.count,
            epoch=sampler.epoch_of(position.step),
            samples_count=sampler.samples_before(position.step),
            seed=self._config.seed,
            metrics={k: v for k, v in position.metrics.items() if math.isfinite(v)},
            best_value=position.best_value,
            best_step=position.best_step,
            task_fingerprint=node.task_fingerprint,
            data_fingerprint=node.data_fingerprint,
            wall_seconds=self.train_seconds,
            mixed_recomputes_count=position.mixed_recomputes,
            environment_shares=hub.ledger.shares,
            callback_states={name: json.dumps(state) for name, state in self._callbacks.states().items()},
        )
        return Snapshot(
            run=run,
            buffers=_buffers(hub.weights.flat, self._optimizer),
            tree=self._tree.shape(),
            best=position.best_value is not None and position.best_step == position.step,
        )

    def put_back(self, snapshot: Snapshot) -> None:
        """Take over a snapshot's state; the weights are not yet published.

        Raises CheckpointError, with nothing changed, where it is of another model or optimizer.
        """
        hub = self._tree.hub
        hub.seal()
        self.position = put_back(snapshot, node=self._node, weights=hub.weights, optimizer=self._optimizer)
        hub.ledger.shares = dict(snapshot.run.environment_shares)
        self._callbacks.restore({name: json.loads(text) for name, text in snapshot.run.callback_states.items()})


def _buffers(weights: Array, optimizer: Optimizer) -> dict[str, Array]:
    return {"weights": weights, **{f"optimizer/{name}": buffer for name, buffer in optimizer.state().items()}}


class Copies:
    """Buffers that snapshots are copied into, one after another: the memory of weights and optimizer once more.

    Mutable state: the buffers, each made when first needed.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}

    def __repr__(self) -> str:
        return f"<Copies { ({name: flat.nbytes for name, flat in self._buffers.items()}) }>"

    def of(self, snapshot: Snapshot) -> Snapshot:
        """Return the snapshot with its buffers copied, which stay as they are until the next call. For a thread.

        Raises CheckpointError where there is no memory for them.
        """
        for name, flat in snapshot.buffers.items():
            np.copyto(self._buffer(name, flat.size), flat)
        return replace(snapshot, buffers={name: self._buffers[name] for name in snapshot.buffers})

    def reserve(self, weights: Array, optimizer: Optimizer) -> None:
        """Make them now, each page touched, so that the first copy waits for no memory. Raises CheckpointError."""
        for name, flat in _buffers(weights, optimizer).items():
            self._buffer(name, flat.size)

    def _buffer(self, name: str, size: int) -> Array:
        own = self._buffers.get(name)
        if own is None or own.size != size:
            try:
                own = self._buffers[name] = aligned_zeros(size)
            except MemoryError:
                raise CheckpointError(f"no memory to copy the {4 * size} bytes of {name}; older ones stand") from None
        return own


def put_back(snapshot: Snapshot, *, node: NodeConfig, weights: Weights, optimizer: Optimizer) -> Position:
    """Copy a snapshot's weights and optimizer in, and return its position; the weights are not yet published.

    Raises CheckpointError, with nothing changed, where it is of another model or optimizer.
    """
    run = snapshot.run
    if run.run_id != node.run_id:
        raise CheckpointError(
            f"the checkpoint is of run {run.run_id}, this is run {node.run_id}; for its weights alone use --init-from"
        )
    if run.manifest.digest != node.manifest.digest:
        raise CheckpointError("the checkpoint is of a model with another layout; is it the same task?")
    prefix = "optimizer/"
    optimizer.restore(
        run.optimizer_count,
        {name.removeprefix(prefix): flat for name, flat in snapshot.buffers.items() if name.startswith(prefix)},
    )
    weights.withdraw()
    np.copyto(weights.flat, snapshot.buffers["weights"])
    return Position(
        step=run.step,
        metrics=dict(run.metrics),
        best_value=run.best_value if run.HasField("best_value") else None,
        best_step=run.best_step,
        earlier_seconds=run.wall_seconds,
        mixed_recomputes=run.mixed_recomputes_count,
    )
