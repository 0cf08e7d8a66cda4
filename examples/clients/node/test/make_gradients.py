"""Writes gradients.json: what the Python task makes of weights that any language can make (see `fill`)."""

import json
import math
from pathlib import Path

import numpy as np

from spheres.sampling import Sampler, evaluation_slice
from spheres.task import load_task
from spheres.tensors import Manifest, aligned_zeros

SEED, BATCH, MICROBATCHES = 42, 64, 12
PICKED = 12


def fill(view: np.ndarray) -> None:
    """Element i is ((7919 i) mod 2003 / 2003 - 1/2) * 4 / sqrt(rows), in float64, then float32."""
    i = np.arange(view.size)
    view[...] = (((7919 * i) % 2003 / 2003 - 0.5) * 4 / math.sqrt(view.shape[0])).reshape(view.shape)


def case(hidden: str, step: int, index: int) -> dict[str, object]:
    task = load_task("digits", {"hidden": hidden})
    manifest = Manifest.of(task.init_weights(np.random.default_rng(0)))
    weights, out = (manifest.views(aligned_zeros(manifest.size)) for _ in range(2))
    for view in weights.values():
        fill(view)
    sampler = Sampler(seed=SEED, size=task.size("train"), batch_size=BATCH, microbatches=MICROBATCHES)
    sums = task.gradient(weights, sampler.microbatch(step, index), np.random.default_rng(0), out)
    tested = task.evaluate(weights, evaluation_slice(task.size("test"), MICROBATCHES, index))
    tensors = []
    for spec in manifest.tensors:
        flat = out[spec.name].reshape(-1).astype(np.float64)
        places = [int(i) for i in np.linspace(0, flat.size - 1, PICKED)]
        tensors.append(
            {
                "name": spec.name,
                "shape": spec.shape,
                "offset": spec.offset,
                "dtype": spec.dtype,
                "norm": float(np.linalg.norm(flat)),
                "elements": {i: float(flat[i]) for i in places},
            }
        )
    return {
        "hidden": hidden,
        "step": step,
        "microbatch": index,
        "tensors": tensors,
        "sums": [sums.loss, sums.count, sums.metrics["accuracy"]],
        "evaluation": [tested.loss, tested.count, tested.metrics["accuracy"]],
    }


if __name__ == "__main__":
    cases = [case("64", 0, 0), case("5", 25, 3), case("32,16", 7, 11), case("", 22, 1)]
    made = {"seed": SEED, "batch_size": BATCH, "microbatches": MICROBATCHES, "cases": cases}
    Path(__file__).with_name("gradients.json").write_text(json.dumps(made, indent=1) + "\n")
