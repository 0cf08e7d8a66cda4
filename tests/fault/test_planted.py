"""Two of the bugs that the simulation plants, in real processes: a run with them does not end with the right bits.

The same run without a bug does, so that it is the bug that is seen.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from control.config import RunConfig
from control.reference import reference
from spheres.testing.synthetic import Synthetic

ROOT = Path(__file__).parents[2]
#: imported by control and by every sphere: the bug is everywhere, as it would be
TASK = """
    import os
    from spheres.testing.synthetic import Synthetic
    from tests.simulation.plants import PLANTS

    for owner, attribute, changed in PLANTS[os.environ["PLANT"]]() if os.environ.get("PLANT") else []:
        setattr(owner, attribute, changed)

    class Planted(Synthetic):
        pass
"""
SETTINGS = {"steps": 12, "batch_size": 48, "microbatches": 12, "spheres": 6, "fan_out": 2, "chunk_bytes": 4096}
PARAMETERS = 53_000


def outcome(folder: Path, plant: str) -> str:
    """Return how the run ended: its weights, an error, or that it did not."""
    (folder / "planted_task.py").write_text(textwrap.dedent(TASK))
    flags = [word for key, value in SETTINGS.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    flags += ["--task", "planted_task:Planted", "--task-option", f"parameters={PARAMETERS}", "--task-option"]
    # by reference all chunks of this model go at once, and the order of sending is no matter
    flags += [
        "samples=200",
        "--wire",
        "inline",
        "--window-chunks",
        "2",
        "--eval-every",
        "none",
        "--checkpoint-every",
        "none",
    ]
    environment = {**os.environ, "PLANT": plant, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    most = 15 if plant else 60  # with a bug it may never end
    command = [sys.executable, "-m", "control", "start", *flags, "--run-dir", "run", "--max-time", f"{most}s"]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        process.wait(most + 15)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # waits for the step, which does not end
        try:
            process.wait(1)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # ends at once, with all spheres
            process.wait(30)
        return "did not end"
    finally:
        process.kill()
        process.wait()
    summary = json.loads((folder / "run" / "summary.json").read_text())
    return summary["error"] or (summary["weights_sha256"] if summary["steps"] == 12 else f"{summary['steps']} steps")


@pytest.fixture(scope="module")
def expected() -> str:
    config = RunConfig(task="synthetic", **SETTINGS)
    return reference(Synthetic(parameters=PARAMETERS, samples=200), config).weights_sha256


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(120)
@pytest.mark.parametrize("plant", ["", "block-major", "siblings-merged"])
def test_a_planted_bug_is_seen_in_real_processes(plant: str, tmp_path: Path, expected: str) -> None:
    assert (outcome(tmp_path, plant) == expected) is not bool(plant)
