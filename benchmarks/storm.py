"""Does a run survive a storm? Real processes, a SIGKILL every second at random over leaf and inner spheres, control
killed twice and started again with --resume: the run must end with the bits of the undisturbed one, every sample once.

    python benchmarks/storm.py [--steps 200] [--spheres 12] [--kill 1/s] [--stop 0/s] [--control-kill 2] [--json]
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import report

from control.chaos import parse_rate
from control.config_sources import load_config
from control.initial import initial_weights
from control.processes import spheres_of
from control.reference import reference
from control.run_dir import process_of
from spheres.testing.synthetic import Synthetic

#: seconds that one microbatch takes; twelve of them on twelve spheres make steps of about 50 ms
COMPUTE_SECONDS = 0.025
PARAMETERS = 5_000


def settings(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "task": "spheres.testing.synthetic:Synthetic",
        "task_options": {"parameters": str(PARAMETERS), "samples": "997", "compute_seconds": str(COMPUTE_SECONDS)},
        "steps": options.steps,
        "batch_size": 48,
        "microbatches": 12,
        "spheres": options.spheres,
        "fan_out": 3,
        "chunk_bytes": 4096,
        "window_chunks": 4,
        "checkpoint_every": "20steps",
        "eval_every": "50steps",
        "log_every": "50steps",
    }


def flags(values: dict[str, Any]) -> list[str]:
    words: list[str] = []
    for key, value in values.items():
        name = "--" + key.replace("_", "-")
        if key == "task_options":
            words += [word for item in value.items() for word in ("--task-option", "=".join(item))]
        else:
            words += [name, str(value)]
    return words


def expected(values: dict[str, Any]) -> str:
    """Return the weights of the same training in one loop, without spheres, processes or faults."""
    config = load_config(values, {})[0]
    task = Synthetic(PARAMETERS, 997)  # without the waiting
    initial_weights(task, config)
    return reference(task, config).weights_sha256


def check(records: list[dict[str, Any]], steps: int) -> dict[str, int]:
    """Assert that each step's microbatches are there once; return how many steps were done again."""
    seen: Counter[int] = Counter()
    digests: dict[int, str] = {}
    for record in records:
        seen[record["step"]] += 1
        assert digests.setdefault(record["step"], record["weights_digest"]) == record["weights_digest"], record["step"]
        parts = sorted(tuple(part[:2]) for part in record["contributions"])
        assert (parts[0][0], parts[-1][1]) == (0, 12), parts
        assert all(before[1] == after[0] for before, after in pairwise(parts)), parts
    assert sorted(seen) == list(range(steps))
    return {
        "steps": len(seen),
        "replayed": sum(seen.values()) - len(seen),
        "attempts": sum(r["attempts"] for r in records),
    }


def end_what_is_left(control: subprocess.Popen[bytes], run: Path) -> None:
    """Kill what has not come to its end: control in whichever life, and its spheres, which may be stopped."""
    address = run / "address"
    living = {process_of(run), *(spheres_of(address.read_text().split()[0]) if address.exists() else [])} - {None}
    for pid in living:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    control.kill()
    control.wait()


def wanted(options: argparse.Namespace) -> set[str]:
    """What a storm does at least once, control's death for one, or it was none."""
    rates = {"kill": parse_rate(options.kill), "stop": parse_rate(options.stop)}
    return {kind for kind, rate in {**rates, "control": options.control_kill}.items() if rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--spheres", type=int, default=12)
    parser.add_argument("--kill", default="1/s")
    parser.add_argument("--stop", default="0/s")
    parser.add_argument("--control-kill", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    values = settings(options)
    cli = [sys.executable, "-m", "control"]
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as left:
        run = Path(directory) / "run"
        began = time.monotonic()
        with (Path(directory) / "control.log").open("wb") as log:
            control = subprocess.Popen([*cli, "start", *flags(values), "--run-dir", str(run)], stdout=log, stderr=log)
        left.callback(end_what_is_left, control, run)
        while not (run / "journal.jsonl").exists() or not (run / "journal.jsonl").stat().st_size:
            if control.poll() is not None or time.monotonic() - began > 60:
                sys.exit((Path(directory) / "control.log").read_text())
            time.sleep(0.05)
        told = {
            "--run-dir": run,
            "--kill": options.kill,
            "--stop": options.stop,
            "--control-kill": options.control_kill,
            "--duration": f"{options.steps * 0.08:g}s",
            "--seed": options.seed,
            "--report": Path(directory) / "storm.json",
        }
        command = [*cli, "chaos", *(str(word) for pair in told.items() for word in pair), "--json"]
        storm = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        until = time.monotonic() + 180
        # its last life, a child of the storm's, writes its results and goes
        while (not (run / "summary.json").exists() or process_of(run)) and time.monotonic() < until:
            time.sleep(0.2)
        summary = json.loads((run / "summary.json").read_text())
        records = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
        figures = check([r for r in records if r["event"] == "step"], options.steps)
        sys.stderr.write(storm.stderr)  # it says so where the run was over before all its faults
        if not (Path(directory) / "storm.json").exists():
            sys.exit(storm.returncode or 1)
        faults = json.loads((Path(directory) / "storm.json").read_text())
    assert summary["state"] == "completed", summary
    assert summary["weights_sha256"] == expected(values), "other bits than the undisturbed run's"
    done = {fault["kind"] for fault in faults["faults"]}
    assert done == wanted(options), f"no storm: {done} is all that was done to it; give it more --steps"
    result = {
        **figures,
        "seconds": time.monotonic() - began,
        "weights_sha256": summary["weights_sha256"],
        "storm": faults,
    }

    def show() -> None:
        print(f"{figures['steps']} steps, {figures['replayed']} done again after control was killed, "
              f"{figures['attempts']} attempts at the root, {result['seconds']:.0f} s")  # fmt: skip
        print(json.dumps(faults["table"], indent=1)[:2000])
        print(f"weights {summary['weights_sha256']}: the undisturbed run's, bit for bit; every sample once")

    report("storm", result, show)


if __name__ == "__main__":
    main()
