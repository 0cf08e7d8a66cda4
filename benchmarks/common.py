"""What the benchmarks share: a run of the shipped library with local spheres, figures of its journal, the machine.

Peers (gloo, DDP, MPI, Flower) run in processes and an environment of their own, `.venv-bench`, which `make bench`
makes; one that is not there is skipped, and said so.
"""

import asyncio
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

# read once, when numpy is first imported
for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import uvloop

from control.charts import COLORS, STYLE, legend, short, ticks
from control.config_sources import load_config
from control.training import Summary, run

PACKAGES = ("armillary", "grpcio", "protobuf", "numpy", "uvloop")
HERE = Path(__file__).parent
#: the environment of peers: torch and its gloo never come into the project's own
PEER_PYTHON = HERE.parent / ".venv-bench" / "bin" / "python"
#: seconds after which a repetition of anything has hung
TIMEOUT = 600

Record = dict[str, Any]
_said: set[str] = set()


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
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()),
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


def train_apart(**settings: Any) -> tuple[Record, list[Record]]:
    """Do the same with control in a fresh process too: no repetition inherits memory of the one before."""
    words = [sys.executable, __file__, json.dumps(settings)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, timeout=TIMEOUT, cwd=HERE.parent)
    found = json.loads(done.stdout.splitlines()[-1])
    return found["summary"], found["journal"]


def step_seconds(journal: Sequence[Record]) -> list[float]:
    """Return the seconds between the commits of neighbouring steps: whole steps, with everything that is in them."""
    return [after["time"] - before["time"] for before, after in pairwise(journal)]


def phase_ms(journal: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Return the medians of the spheres' phases: the mean over spheres, and the slowest of them."""
    names = dict.fromkeys(name for r in journal for name in r["phases"])
    return {
        name: {
            "mean": 1e3 * median(r["phases"][name]["sum"] / r["spheres"] for r in journal if name in r["phases"]),
            "slowest": 1e3 * median(r["phases"][name]["max"] for r in journal if name in r["phases"]),
        }
        for name in names
    }


def skip(name: str, why: str) -> None:
    """Say, once and loudly, that something is not measured."""
    if name not in _said:
        _said.add(name)
        print(f"SKIPPED {name}: {why}", file=sys.stderr, flush=True)


def has_peer(package: str) -> str:
    """Return the version of a package in the peers' environment; nothing, said loudly, where it is not there."""
    words = ["-c", f"from importlib.metadata import version; print(version({package!r}))"]
    if PEER_PYTHON.exists():
        done = subprocess.run([PEER_PYTHON, *words], capture_output=True, text=True, timeout=60, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    skip(package, f"not in {PEER_PYTHON.parents[1].name}; make bench installs what it can")
    return ""


def peer(script: str, *arguments: str, env: Mapping[str, str] | None = None) -> Any:
    """Run a peer's script in its own environment; return what it prints as JSON in its last line."""
    words = [str(PEER_PYTHON), str(HERE / "peers" / script), *arguments]
    alone = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **(env or {})}
    return output_of(words, env={**os.environ, **alone})


def output_of(words: Sequence[str], **options: Any) -> Any:
    done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT, check=False, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def mpi_program(directory: Path) -> tuple[Path | None, str]:
    """Compile the program that measures Open MPI; return where it is, and the version of the library."""
    if shutil.which("mpicc") is None or shutil.which("mpirun") is None:
        skip("Open MPI", "no mpicc or mpirun; Debian: openmpi-bin libopenmpi-dev")
        return None, ""
    program = directory / "mpi_round"
    subprocess.run(["mpicc", "-O2", "-o", program, HERE / "peers" / "mpi_round.c"], check=True, timeout=60)
    said = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    return program, said.splitlines()[0]


def median(values: Iterable[float]) -> float:
    return statistics.median(list(values))


def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Return how a flag's text becomes a list: words between commas, each made a ``kind``."""
    return lambda text: [kind(word) for word in text.split(",")]


def common_flags(parser: Any) -> None:
    parser.add_argument("--json", action="store_true", help="print figures, machine and versions as JSON")
    parser.add_argument("--out", type=Path, help="write NAME.json and NAME.html into this folder")


def report(
    name: str, figures: Record, show: Callable[[], None], *, out: Path | None = None, charts: Sequence[str] = ()
) -> None:
    """Print for people, or with ``--json`` for scripts; and write both, with a picture, into ``out``."""
    where = machine()
    text = json.dumps({"benchmark": name, **figures, "machine": where})
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(text + "\n")
        if charts:
            (out / f"{name}.html").write_text(page(name, where, charts))
    if "--json" in sys.argv[1:]:
        print(text)
        return
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    show()


# ---- pictures


def page(name: str, where: Mapping[str, str], charts: Sequence[str]) -> str:
    """Return a page of charts, with the machine that they are of."""
    head = f"<!doctype html><meta charset=utf-8><title>{name}</title>"
    style = f"<style>body{{font-family:sans-serif;max-width:760px;margin:2em auto}}{STYLE}</style>"
    said = escape(", ".join(f"{key} {value}" for key, value in where.items()))
    return f"{head}{style}<h1>{name}</h1>{''.join(charts)}<p class=key>{said}</p>\n"


def bars(title: str, values: Mapping[str, float], *, unit: str, limits: Mapping[str, float] | None = None) -> str:
    """Return bars side by side from 0, each with its figure; ``limits`` are drawn as a line across theirs."""
    limits = limits or {}
    high = max([*values.values(), *limits.values(), 1e-9]) * 1.08
    wide, tall, left, top, floor = 620.0, 300.0, 60.0, 30.0, 250.0
    gap = (wide - left) / max(1, len(values))

    def down(y: float) -> float:
        return floor - (floor - top) * y / high

    parts = [f'<svg viewBox="0 0 {wide:.0f} {tall:.0f}" role="img" aria-label="{escape(title)}">']
    for y in ticks(0.0, high):
        parts.append(f'<line class="grid" x1="{left}" x2="{wide}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{down(y) + 4:.1f}" text-anchor="end">{short(y)}</text>')
    for n, (name, value) in enumerate(values.items()):
        x, middle = left + n * gap + 0.15 * gap, left + (n + 0.5) * gap
        parts.append(
            f'<rect x="{x:.1f}" y="{down(value):.1f}" width="{0.7 * gap:.1f}" height="{floor - down(value):.1f}" '
            f'fill="{COLORS[n % len(COLORS)]}"/><text class="label" x="{middle:.1f}" y="{down(value) - 4:.1f}" '
            f'text-anchor="middle">{short(value)}</text><text class="tick" x="{middle:.1f}" '
            f'y="{floor + 15 + 13 * (n % 2):.0f}" text-anchor="middle">{escape(name)}</text>'
        )
        if name in limits:
            y = down(limits[name])
            parts.append(
                f'<line x1="{x - 4:.1f}" x2="{x + 0.7 * gap + 4:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="#c00" '
                f'stroke-width="2"><title>must: {limits[name]:g}</title></line>'
            )
    parts.append(f'<text class="label" x="6" y="14">{escape(unit)}</text></svg>')
    return f"<h2>{escape(title)}</h2>{''.join(parts)}"


def curves(title: str, lines: Mapping[str, Sequence[tuple[float, float]]], *, x_label: str, y_label: str) -> str:
    """Return lines over ``x``, on logarithmic axes: sizes and times over three powers of ten."""
    points = [point for line in lines.values() for point in line]
    if not points or min(min(point) for point in points) <= 0:
        return ""
    wide, tall, left, right, top, floor = 620.0, 330.0, 66.0, 14.0, 30.0, 270.0
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    low_y, high_y = min(y for _, y in points) / 1.2, max(y for _, y in points) * 1.2

    def part(value: float, low: float, high: float) -> float:
        return math.log(value / low) / math.log(high / low) if high > low else 0.5

    def at(x: float, y: float) -> tuple[float, float]:
        across = part(x, low_x, high_x) * (wide - left - right)
        return left + across, floor - part(y, low_y, high_y) * (floor - top)

    parts = [f'<svg viewBox="0 0 {wide:.0f} {tall:.0f}" role="img" aria-label="{escape(title)}">']
    for power in range(-4, 7):
        for digit in (1, 2, 5):
            y = digit * 10.0**power
            if low_y <= y <= high_y:
                _, place = at(low_x, y)
                parts.append(f'<line class="grid" x1="{left}" x2="{wide - right}" y1="{place:.1f}" y2="{place:.1f}"/>')
                parts.append(
                    f'<text class="tick" x="{left - 6}" y="{place + 4:.1f}" text-anchor="end">{short(y)}</text>'
                )
    for x in sorted({x for x, _ in points}):
        place, _ = at(x, low_y)
        parts.append(f'<text class="tick" x="{place:.1f}" y="{floor + 16}" text-anchor="middle">{short(x)}</text>')
    colors = {name: COLORS[n % len(COLORS)] for n, name in enumerate(lines)}
    for name, line in lines.items():
        drawn = [at(x, y) for x, y in sorted(line)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colors[name]}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colors[name]}"/>' for x, y in drawn]
    parts.append(f'<text class="label" x="{wide / 2}" y="{floor + 36}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text class="label" x="6" y="14">{escape(y_label)}</text></svg>')
    return f"<h2>{escape(title)}</h2>{legend(colors)}{''.join(parts)}"


if __name__ == "__main__":
    found, lines = train(**json.loads(sys.argv[1]))
    print(json.dumps({"summary": found.to_dict(), "journal": lines}))
