"""What a user writes: the Task protocol, its sums, and how a task is found and fingerprinted.

It does not compute anything and does not know about nodes.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from spheres.errors import ArmillaryError, TaskLoadError

__all__ = ["Sums", "Task", "data_fingerprint", "load_task", "task_fingerprint"]

Array = npt.NDArray[np.float32]
Samples = npt.NDArray[np.int64]

#: short names of the tasks that come with the project
BUILTIN_TASKS = {
    "digits": "spheres.tasks.digits:Digits",
    "fashion-mnist": "spheres.tasks.fashion_mnist:FashionMnist",
}


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums (never means) over some samples. Float64, added in canonical order like gradients.

    ``metrics`` are sums too: ``accuracy`` is the number of correct answers, reported divided by ``count``.
    """

    loss: float
    count: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Task(Protocol):
    """A model and its data. Nothing to inherit; every method must be deterministic.

    A gradient is a pure function of ``(weights, samples, rng)``: that is what the promise of equal bits rests on.
    """

    def init_weights(self, rng: np.random.Generator) -> dict[str, Array]:
        """Return name -> float32 array; the order is the order of the manifest."""
        ...

    def size(self, split: str) -> int:
        """Return the number of samples of ``"train"`` or ``"test"``; 0 where there is no such split."""
        ...

    def gradient(
        self, weights: Mapping[str, Array], samples: Samples, rng: np.random.Generator, out: Mapping[str, Array]
    ) -> Sums:
        """Add the gradient of the loss, summed over ``samples`` (int64 ids), into ``out``.

        ``weights`` are read-only views, ``out`` zeroed float32 views of the same shapes.
        """
        ...

    def evaluate(self, weights: Mapping[str, Array], samples: Samples) -> Sums:
        """Return loss and metric sums over ``samples`` of the test split."""
        ...


def load_task(spec: str, options: Mapping[str, Any] | None = None) -> Task:
    """Return the task named by ``spec``: a built-in name or ``module:attribute``.

    The attribute is a class or function called with ``options``, or a ready object. The working directory is
    importable, as it is for ``python -m``. Raises TaskLoadError, or the task's own ArmillaryError.
    """
    target = BUILTIN_TASKS.get(spec, spec)
    module_name, _, attribute = target.partition(":")
    if not attribute:
        raise TaskLoadError(
            f"unknown task {spec!r}: give one of {', '.join(sorted(BUILTIN_TASKS))}, or module:attribute"
        )
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
        if isinstance(found, type) or not isinstance(found, Task):
            if not callable(found):
                raise TaskLoadError(f"task {spec!r} is neither a task nor something that makes one")
            found = found(**dict(options or {}))
        elif options:
            raise TaskLoadError(f"task {spec!r} is a ready object and takes no options: {sorted(options)}")
    except ArmillaryError:
        raise
    except ModuleNotFoundError as error:
        raise TaskLoadError(f"task {spec!r}: no module named {error.name!r} on this machine") from error
    except Exception as error:
        raise TaskLoadError(f"task {spec!r} cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(found, Task):
        missing = [n for n in ("init_weights", "size", "gradient", "evaluate") if not hasattr(found, n)]
        raise TaskLoadError(f"task {spec!r} lacks {', '.join(missing)}")
    return found


def task_fingerprint(task: Task, spec: str, options: Mapping[str, Any] | None = None) -> str:
    """Return 16 hex digits over the name, the options and the source text of the task's module."""
    digest = hashlib.sha256(f"{spec}\0{sorted((options or {}).items())}\0".encode())
    module = inspect.getmodule(type(task))
    path = getattr(module, "__file__", None)
    if path and Path(path).is_file():
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:16]


def data_fingerprint(task: Task) -> str:
    """Return 16 hex digits over the data: the task's own ``data_fingerprint()``, else the sizes of its splits."""
    own = getattr(task, "data_fingerprint", None)
    text = str(own()) if callable(own) else f"{task.size('train')},{task.size('test')}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]
