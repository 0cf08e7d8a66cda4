"""What the benchmarks share: a run of the shipped library with local spheres, figures of its journal, the machine."""

import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

# read once, when numpy is first imported
for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import uvloop

from control.config_sources import load_config
from control.training import Summary, run

PACKAGES = ("armillary", "grpcio", "protobuf", "numpy", "uvloop")


def machine() -> dict[str, str]:
    """Return what the figures depend on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {name: version(name) for name in PACKAGES}
    return {
        "cpu": cpu,
        "cores": str(cores),
        "system": platform.platform(),
        "python": platform.python_version(),
    } | versions


def train(**settings: Any) -> tuple[Summary, list[dict[str, Any]]]:
    """Run a training with real local processes; return its summary and the journal's records."""
    with tempfile.TemporaryDirectory() as directory:
        where = Path(directory) / "run"
        config = load_config({"run_dir": where, "checkpoint_every": "none", "eval_every": "none", **settings}, {})[0]
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            summary = runner.run(run(config))
        if summary.error is not None:
            raise summary.error
        journal = [json.loads(line) for line in (where / "journal.jsonl").read_text().splitlines()]
        return summary, journal


def median(values: Iterable[float]) -> float:
    return statistics.median(list(values))


def report(name: str, figures: dict[str, Any], show: Callable[[], None]) -> None:
    """Print for people, or with ``--json`` for scripts."""
    if "--json" in sys.argv[1:]:
        print(json.dumps({"benchmark": name, **figures, "machine": machine()}))
        return
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    show()
