"""What a user writes: the Task protocol, its sums, and how a task is found and fingerprinted.

It does not compute anything and does not know about nodes.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from spheres.errors import ArmillaryError, ConfigError, TaskError, TaskLoadError
from spheres.words import encodable, raised

__all__ = ["Sums", "Task", "data_fingerprint", "described", "load_task", "split_size", "task_fingerprint"]

Array = npt.NDArray[np.float32]
Samples = npt.NDArray[np.int64]

#: set in the environment of a process that is a sphere: a script that is imported for its task must not start a run
IN_SPHERE = "SPHERE_PROCESS"

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

    Optional are ``data_fingerprint()``, ``state_dict()``, and ``overwrites_out = True``: by that ``gradient``
    promises to write every element of ``out`` itself, so that nobody need zero it before (docs/tasks.md).
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

        ``weights`` are read-only views, ``out`` zeroed float32 views of the same shapes; not zeroed, and to be written
        over, where the task says ``overwrites_out``.
        """
        ...

    def evaluate(self, weights: Mapping[str, Array], samples: Samples) -> Sums:
        """Return loss and metric sums over ``samples`` of the test split."""
        ...


def load_task(spec: str, options: Mapping[str, Any] | None = None) -> Task:
    """Return the task named by ``spec``: a built-in name or ``module:attribute``.

    The attribute is a class or function called with ``options``, or a ready object. The working directory is
    importable, as it is for ``python -m``. Raises TaskLoadError, ConfigError for options that the task does not take,
    or the task's own ArmillaryError.
    """
    module_name, _, attribute = BUILTIN_TASKS.get(spec, spec).partition(":")
    if not module_name or not attribute:
        close = get_close_matches(spec, BUILTIN_TASKS, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise TaskLoadError(
            f"unknown task {spec!r}: {hint}give one of {', '.join(sorted(BUILTIN_TASKS))}, or module:attribute"
        )
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found = _attribute(spec, _module(spec, module_name), attribute)
    if isinstance(found, type) or not isinstance(found, Task):
        if not callable(found):
            raise TaskLoadError(f"task {spec!r} is no task: {_lacks(found)}")
        found = _made(spec, found, dict(options or {}))
    elif options:
        raise ConfigError(f"task {spec!r} is a ready object and takes no options: leave out {', '.join(options)}")
    if not isinstance(found, Task):
        raise TaskLoadError(f"task {spec!r} is no task: {_lacks(found)}")
    return found


def _module(spec: str, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ArmillaryError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            hint = "run from the folder that holds it, or install it"
        else:
            hint = "the task needs it: install it"
        raise TaskLoadError(f"task {spec!r}: no module named {error.name!r}; {hint}") from error
    except (Exception, SystemExit) as error:
        raise TaskLoadError(f"task {spec!r} cannot be imported: {described(error)}") from error


def _attribute(spec: str, module: Any, path: str) -> Any:
    found, where = module, f"module {module.__name__}"
    for part in path.split("."):
        if not hasattr(found, part):
            close = get_close_matches(part, [name for name in dir(found) if not name.startswith("_")], 1)
            hint = f"did you mean {close[0]}?" if close else "name a class, function or object that is in it"
            raise TaskLoadError(f"task {spec!r}: {where} has no {part!r}; {hint}")
        found, where = getattr(found, part), part
    return found


def _made(spec: str, maker: Any, options: dict[str, Any]) -> Any:
    try:
        signature: inspect.Signature | None = inspect.signature(maker)
    except (TypeError, ValueError):  # made in C
        signature = None
    if signature is not None:
        try:
            signature.bind(**options)
        except TypeError as error:
            names = [
                p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            ]
            takes = f"it takes {', '.join(names)}" if names else "it takes none"
            raise ConfigError(f"options of task {spec!r}: {error}; {takes} (--task-option NAME=VALUE)") from error
    try:
        return maker(**options)
    except ArmillaryError:
        raise
    except (Exception, SystemExit) as error:
        raise TaskLoadError(f"task {spec!r} cannot be made: {described(error)}") from error


def _lacks(found: object) -> str:
    missing = [name for name in ("init_weights", "size", "gradient", "evaluate") if not hasattr(found, name)]
    return f"{type(found).__name__} lacks {', '.join(missing)}"


def described(error: BaseException) -> str:
    """Return an exception of somebody else's code in one line, with the place where it was raised."""
    text = raised(error)
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) or not frames or frames[-1].filename.startswith("<"):
        return text  # it names file and line itself, or there is none
    return f"{text} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"


def split_size(task: Task, split: str) -> int:
    """Return the number of samples of a split. Raises TaskError where ``size`` raises or gives no such number."""
    try:
        size = task.size(split)
    except ArmillaryError:
        raise
    except Exception as error:
        raise TaskError(f"size() raised {described(error)}") from error
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise TaskError(f"size({split!r}) is {size!r}: give a whole number, 0 where there is no such split")
    return size


def task_fingerprint(task: Task, spec: str, options: Mapping[str, Any] | None = None) -> str:
    """Return 16 hex digits over the name, the options and the source files that define the task.

    Those are the files of its class, of the classes that it inherits from (NumPy's and Python's own aside) and of the
    module that ``spec`` names. What these import is not read: a changed helper module, another release of a library
    or other code for the same name in memory goes unnoticed here. It shows as other bits, not as a refusal.
    """
    digest = hashlib.sha256(f"{spec}\0{sorted((options or {}).items())}\0".encode())
    names = [cls.__module__ for cls in type(task).__mro__] + [BUILTIN_TASKS.get(spec, spec).partition(":")[0]]
    own = [name for name in names if name.partition(".")[0] not in sys.stdlib_module_names | {"numpy"}]
    # by content: here the module may be __main__ and there it has a name, and it lies elsewhere on each machine
    files = [getattr(sys.modules.get(name), "__file__", None) for name in own]
    contents = [Path(file).read_bytes() for file in files if file and Path(file).is_file()]
    for content in dict.fromkeys(contents):
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]


def data_fingerprint(task: Task) -> str:
    """Return 16 hex digits over the data: the task's own ``data_fingerprint()``, else the sizes of its splits.

    Raises TaskError where that raises.
    """
    own = getattr(task, "data_fingerprint", None)
    try:
        text = str(own()) if callable(own) else f"{split_size(task, 'train')},{split_size(task, 'test')}"
    except ArmillaryError:
        raise
    except Exception as error:
        raise TaskError(f"data_fingerprint() raised {described(error)}") from error
    return hashlib.sha256(encodable(text).encode()).hexdigest()[:16]
