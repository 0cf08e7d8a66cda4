"""The program that a run is started from, and how spheres, in processes of their own, import a task out of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from spheres.errors import TaskLoadError

__all__ = ["script_folder", "task_spec"]


def task_spec(task: object) -> str:
    """Return ``module:attribute`` of a task's class, as spheres can import it. Raises TaskLoadError where none can."""
    made = task if isinstance(task, type) else type(task)
    module = made.__module__
    if module == "__main__":
        file = getattr(sys.modules["__main__"], "__file__", None)
        if file is None:
            raise TaskLoadError("spheres cannot import a task that was typed in; put it into a module")
        module = Path(file).stem
    return f"{module}:{made.__qualname__}"


def script_folder() -> list[str]:
    """Return where this program's own modules are, so that spheres find a task that stands beside the script."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    folder = str(Path(file).resolve().parent) if file else ""
    return [folder] if folder and folder in sys.path and folder != os.getcwd() else []
