"""What a run starts from: the first weights, and the configuration that every node gets."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from control.config import RunConfig
from spheres.config import NodeConfig
from spheres.errors import ConfigError, TaskError
from spheres.task import Task, data_fingerprint, described, split_size, task_fingerprint
from spheres.tensors import Manifest

__all__ = ["initial_weights", "node_config"]


def initial_weights(task: Task, config: RunConfig) -> tuple[Manifest, npt.NDArray[np.float32]]:
    """Return the layout and the flat weights: the task's own for this seed, or those of ``config.init_from``.

    Raises TaskError where the task gives no float32 arrays or values that are not finite, ConfigError where the file
    does not fit the task.
    """
    try:
        arrays = task.init_weights(np.random.Generator(np.random.Philox(key=config.seed)))
    except Exception as error:
        raise TaskError(f"init_weights() raised {described(error)}") from error
    manifest = Manifest.of(arrays)
    if config.init_from is not None:
        from control.weights_file import read_safetensors

        loaded = read_safetensors(config.init_from)
        wanted = {s.name: s.shape for s in manifest.tensors}
        if {name: tuple(array.shape) for name, array in loaded.items()} != wanted:
            raise ConfigError(f"--init-from {config.init_from}: its tensors are not those of task {config.task!r}")
        arrays = {name: loaded[name] for name in wanted}
    flat = manifest.pack(arrays)
    if not np.isfinite(flat).all():
        raise TaskError("the first weights are not finite")
    return manifest, flat


def node_config(task: Task, config: RunConfig, manifest: Manifest, *, run_id: str) -> NodeConfig:
    """Return what every node of the run must know. Raises TaskError where there is nothing to train on."""
    train_size = split_size(task, "train")
    if train_size < 1:
        raise TaskError(f"task {config.task!r} has no samples in its train split")
    return NodeConfig(
        run_id=run_id,
        manifest=manifest,
        task=config.task,
        task_options=config.task_options,
        seed=config.seed,
        batch_size=config.batch_size,
        microbatches=config.microbatches,
        evaluation_microbatches=config.eval_microbatches,
        train_size=train_size,
        test_size=split_size(task, "test"),
        chunk_bytes=config.chunk_bytes,
        window=config.window,
        task_fingerprint=task_fingerprint(task, config.task, config.task_options),
        data_fingerprint=data_fingerprint(task),
        # several fit into one patience: a lost one is no sign of death
        heartbeat_seconds=min(1.0, config.patience / 4),
        patience_seconds=config.patience,
        fan_out=config.fan_out,
        skips_nonfinite=config.on_nonfinite != "halt",
        wire=config.wire,
        gradient_dtype=config.wire_dtype,
        weights_dtype=config.weights_wire_dtype,
        trace=config.trace,
    )
