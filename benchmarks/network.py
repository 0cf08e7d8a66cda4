"""Hosts with a network between them: a round over a chain of hosts, a flat star and gloo; and hosts that are cut off.

    python -m benchmarks.network [sync] [--megabytes 40] [--rounds 3] [--systems chain-bf16,star,gloo] [--json]
    python -m benchmarks.network cuts [--cuts 10]

`sync`: 12 spheres on 3 hosts x 4, control on the first, each host's cable 200 Mbit/s both ways and 20 ms from host to
host; hosts are the network namespaces of tests/fault/lab.py (Linux, root). Systems take turns, each repetition in fresh
processes; of each the median round counts. chain: `--hosts-per-host 1`; star: fan-out 12 and every sphere claims
control's host, so all twelve hang on control; gloo: all_reduce over 12 processes on the same hosts. IN: all of a step
(benchmarks/round.py says what), the optimizer too, some ms of seconds. That the bytes went over the cables is checked.
The frames are of 9,000 bytes, so that the switch, one Python process, carries three full cables with time to spare;
`line` in the output is what plain TCP gets through it, and the switch's share of a core is printed.

`cuts`: seconds until training goes on, and until a host that was cut off contributes again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from benchmarks.common import (
    PEER_PYTHON,
    Record,
    bars,
    common_flags,
    has_peer,
    listed,
    median,
    phase_ms,
    report,
    skip,
    step_seconds,
)
from tests.fault.lab import Lab, missing
from tests.fault.test_network import Run, contributors, first

HOSTS, PER_HOST, PORT = 3, 4, 7070
MBIT, MS, MTU = 200, 20, 9_000
WARM_UP = 1
TASK = "spheres.testing.synthetic:Standing"
NARROW = ["--wire-dtype", "bfloat16", "--weights-wire-dtype", "bfloat16"]
#: name -> whether all spheres claim control's host, and flags
SYSTEMS: dict[str, tuple[bool, list[str]]] = {
    "chain-bf16": (False, ["--hosts-per-host", "1", *NARROW]),
    "chain": (False, ["--hosts-per-host", "1"]),
    "tree": (False, []),
    "star": (True, []),
    "star-bf16": (True, NARROW),
}


class Cables:
    """The lab with its cables set. Mutable state: the port that the next gloo meets at."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self._port = lab, 29_500
        os.setpriority(os.PRIO_PROCESS, lab.switch_pid, -15)  # a switch does not wait for the hosts' cores
        for number, host in enumerate(lab.hosts, 1):
            subprocess.run(["ip", "-n", host, "link", "set", "eth0", "mtu", str(MTU)], check=True)
            lab.tell(f"slow {number} {MS / 2:g} {MBIT} 0")  # two cables lie between two hosts

    def switch_seconds(self) -> float:
        fields = Path(f"/proc/{self.lab.switch_pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def counts(self) -> list[int]:
        """Return bytes that came from each host, and those that went to it."""
        return [int(word) for n in range(1, HOSTS + 1) for word in self.lab.tell(f"count {n}").split()]

    def line(self, megabytes: int = 20) -> float:
        """Return the Mbit/s of plain TCP from host 2 to host 1, start included."""
        receive = (
            "import socket,sys,time\ns=socket.create_server(('0.0.0.0',5001));print('up',flush=True);c,_=s.accept()\n"
            "n=0;t=time.time()\nwhile d:=c.recv(1<<20):n+=len(d)\nprint(8*n/(time.time()-t)/1e6)"
        )
        send = f"import socket\nsocket.create_connection(('10.77.0.1',5001)).sendall(bytes({megabytes * 10**6}))"
        receiver = self.lab.start(1, [sys.executable, "-c", receive], stdout=subprocess.PIPE)
        assert receiver.stdout is not None
        receiver.stdout.readline()
        self.lab.start(2, [sys.executable, "-c", send])
        return float(receiver.stdout.readline())

    def ours(self, name: str, megabytes: float, rounds: int, directory: Path) -> Record:
        """Run so many rounds of a real run of ours on the hosts; return its seconds, shape and parts."""
        alike, flags = SYSTEMS[name]
        n = HOSTS * PER_HOST
        words = ["start", "--run-dir", "run", "--spheres", "0", "--min-spheres", str(n), "--insecure", "--json"]
        words += ["--listen", f"10.77.0.1:{PORT}", "--steps", str(rounds + WARM_UP), "--fan-out", "12"]
        words += ["--task", TASK, "--task-option", f"parameters={int(megabytes * 250_000)}"]
        words += ["--task-option", f"samples={16 * n}", "--batch-size", str(n), "--microbatches", str(n)]
        words += ["--momentum", "0", "--learning-rate", "0.001", "--eval-every", "none", "--checkpoint-every", "none"]
        before = self.counts()
        with (directory / "control.log").open("w") as log:
            control = self.lab.start(
                1, [sys.executable, "-m", "control", *words, *flags], cwd=directory, stdout=subprocess.PIPE, stderr=log
            )
        spheres = []
        for number in range(n):
            host = 1 + number // PER_HOST
            here = socket.gethostname() if alike or host == 1 else f"host-{host}"
            sphere = ["start", "--control", f"10.77.0.1:{PORT}", "--listen", "0.0.0.0:0", "--insecure", "--host", here]
            with (directory / f"sphere-{number}.log").open("w") as log:
                spheres.append(
                    self.lab.start(host, [sys.executable, "-m", "spheres", *sphere], cwd=directory, stderr=log)
                )
        try:
            printed, _ = control.communicate(timeout=120 + 120 * (rounds + WARM_UP))
        except subprocess.TimeoutExpired:
            raise SystemExit(f"{name}: {(directory / 'control.log').read_text()[-4000:]}") from None
        finally:
            for process in (control, *spheres):
                process.kill()
                process.wait()
        summary = json.loads(printed.splitlines()[-1])
        if summary.get("state") != "completed":
            raise SystemExit(f"{name}: {summary}\n{(directory / 'control.log').read_text()[-4000:]}")
        journal = [json.loads(line) for line in (directory / "run" / "journal.jsonl").read_text().splitlines()]
        kept = journal[WARM_UP - 1 :]
        return {
            "seconds": step_seconds(kept),
            "tree": summary["tree"],
            "weights_sha256": summary["weights_sha256"],
            "spheres_ms": phase_ms(kept[1:]),
            "cable_bytes": [(b - a) / len(journal) for a, b in zip(before, self.counts(), strict=True)],
        }

    def gloo(self, megabytes: float, rounds: int) -> Record:
        n = HOSTS * PER_HOST
        script = Path(__file__).parent / "peers" / "gloo_round.py"
        self._port += 1
        members = []
        for rank in range(n):
            words = [str(PEER_PYTHON), str(script), str(n), str(megabytes), str(rounds), str(rank), "10.77.0.1"]
            env = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
            out = subprocess.PIPE if rank == 0 else None
            members.append(self.lab.start(1 + rank // PER_HOST, [*words, str(self._port)], env=env, stdout=out))
        try:
            printed, _ = members[0].communicate(timeout=60 + 60 * (rounds + 1))
        finally:
            for process in members:
                process.kill()
                process.wait()
        return {"seconds": json.loads(printed.splitlines()[-1])}


def sync(options: argparse.Namespace) -> None:
    if why := missing():
        skip("network", why)
        return
    found: dict[str, list[Record]] = {name: [] for name in options.systems}
    versions = {}
    if "gloo" in found:
        versions["torch"] = has_peer("torch")
        if not versions["torch"]:
            del found["gloo"]
    with Lab(HOSTS) as lab:
        cables = Cables(lab)
        line = cables.line()
        began, busy = time.monotonic(), cables.switch_seconds()
        for _ in range(options.repetitions):
            for name, runs in found.items():
                if name == "gloo":
                    runs.append(cables.gloo(options.megabytes, options.rounds))
                else:
                    with tempfile.TemporaryDirectory() as directory:
                        runs.append(cables.ours(name, options.megabytes, options.rounds, Path(directory)))
                    check_cables(name, runs[-1], options.megabytes)
                print(f"{name}: {median(runs[-1]['seconds']):.2f} s", file=sys.stderr, flush=True)
        share = (cables.switch_seconds() - busy) / (time.monotonic() - began)
    bits = {name: {run["weights_sha256"] for run in runs} for name, runs in found.items() if name != "gloo"}
    for kind in (True, False):
        if len(set().union(*(sums for name, sums in bits.items() if name.endswith("bf16") is kind))) > 1:
            raise SystemExit(f"weights differ: {bits}")
    each = {name: [median(run["seconds"]) for run in runs] for name, runs in found.items()}
    ratios = {
        f"{a} / {b}": median(x / y for x, y in zip(each[a], each[b], strict=True))
        for a in each
        for b in each
        if a != b and (b == "gloo" or b.startswith("star"))
    }
    seconds = {name: median(all_) for name, all_ in each.items()}
    figures = {
        "megabytes": options.megabytes, "mbit": MBIT, "ms_one_way": MS, "line_mbit": line, "switch_share": share,
        "seconds": seconds, "ratios": ratios, "runs": found, "versions": versions,
    }  # fmt: skip

    def show() -> None:
        print(
            f"\n{HOSTS} hosts x {PER_HOST} spheres, {options.megabytes:g} MB, {MBIT} Mbit/s, {MS} ms one way; plain ",
            end="",
        )
        print(f"TCP gets {line:.0f} Mbit/s; the switch uses {share:.0%} of a core; {versions}")
        for name, value in seconds.items():
            print(f"  {name:<12} {value:7.2f} s a round ({min(each[name]):.2f} to {max(each[name]):.2f})")
        for name, value in ratios.items():
            print(f"  {name:<24} {value:.2f}")

    chart = bars("12 spheres on 3 hosts: seconds a round", seconds, unit="s")
    report("network", figures, show, out=options.out, charts=[chart])


def check_cables(name: str, run: Record, megabytes: float) -> None:
    """Fail where bytes went another way than by the cables, or more of them than one sum and one copy per host edge."""
    model = megabytes * 1e6 * (0.5 if name.endswith("bf16") else 1.0)
    away, home, *_ = run["cable_bytes"]
    if away < 0.9 * model:
        raise SystemExit(f"{name}: {away / 1e6:.1f} MB a round left control's host: not by the cable")
    if name.startswith("chain") and max(away, home) > 1.25 * model:
        raise SystemExit(f"{name}: {away / 1e6:.1f} MB a round left control's host and {home / 1e6:.1f} MB came to it")


# ---- hosts that are cut off


def cuts(host: int, way: str, count: int) -> None:
    """Cut a host off for 5 to 11 s and heal it, so often in one run; check its bits, and print a line."""
    times = []
    with Lab(3) as lab, tempfile.TemporaryDirectory() as directory:
        run = Run(lab, Path(directory), steps=1_000_000)
        try:
            run.until_step(10, spheres=6, seconds=30)
            for _ in range(count):
                lab.tell(f"cut {host} {way}")
                cut = time.time()
                run.go_on(random.uniform(5, 11))
                lab.tell(f"heal {host}")
                times.append((cut, time.time()))
                run.until_step(run.until_step(0, spheres=6, seconds=30) + 10, seconds=20)
            run.stop()
            run.check(run.ended())
            journal, lost = run.journal(), run.on_host(3) | (run.on_host(2) if host == 1 else set())
        finally:
            run.close()
    back = [
        max(first(journal, lambda r, t=t, n=n: r["time"] > t[1] and n in contributors(r)) - t[1] for n in lost)
        for t in times
    ]
    usual = median(after["time"] - before["time"] for before, after in pairwise(journal))
    what = "control" if host == 1 else f"host {host}"
    print(f"{what} cut {way or 'both ways'}, {count} times; a step takes {usual:.3f} s")
    if host != 1:  # without control there is no step
        paused = [first(journal, lambda r, t=t: r["time"] > t[0] and not contributors(r) & lost) - t[0] for t in times]
        print(f"  seconds to the next step: {median(paused):.2f} (worst {max(paused):.2f})")
    print(f"  from healing to the last of its spheres' next contribution: {median(back):.2f} (worst {max(back):.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="sync", choices=("sync", "cuts"))
    parser.add_argument("--megabytes", type=float, default=40.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--systems", type=listed(str), default=["chain-bf16", "chain", "gloo", "star"])
    parser.add_argument("--cuts", type=int, default=10)
    common_flags(parser)
    options = parser.parse_args()
    if unknown := [name for name in options.systems if name not in (*SYSTEMS, "gloo")]:
        parser.error(f"unknown systems {', '.join(unknown)}: choose from {', '.join((*SYSTEMS, 'gloo'))}")
    if options.what == "sync":
        sync(options)
        return
    for host, way in ((3, ""), (3, "from"), (3, "to"), (1, "")):
        cuts(host, way, options.cuts)


if __name__ == "__main__":
    main()
