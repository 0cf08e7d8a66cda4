"""``python -m tests.simulation --seeds 1000``: many seeds, over all processors; what fails says how to see it again."""

from __future__ import annotations

import os

for _name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from functools import partial
from typing import Any

from tests.simulation.plan import KINDS, make_plan
from tests.simulation.plants import PLANTS, planted
from tests.simulation.scale import scale, table
from tests.simulation.story import SeedError
from tests.simulation.world import World


def one(seed: int, kinds: tuple[str, ...], drop: tuple[int, ...] = (), plant: str = "") -> tuple[int, str, Any]:
    """Run a seed; return it, what went wrong, and its counts."""
    try:
        with planted(plant):
            outcome = World(make_plan(seed, kinds, drop=drop)).run()
    except SeedError as error:
        return seed, str(error), None
    return seed, "", (outcome.fingerprint, outcome.seconds, outcome.counts)


def shrink(seed: int, kinds: tuple[str, ...], drop: list[int], plant: str) -> list[int]:
    """Leave out faults, one at a time, while the seed still fails."""
    count = len(make_plan(seed, kinds).faults)
    for number in range(count):
        if number not in drop and one(seed, kinds, (*drop, number), plant)[1]:
            drop.append(number)
    return drop


def command(seed: int, arguments: argparse.Namespace, drop: list[int]) -> str:
    text = f"python -m tests.simulation --seed {seed} --trace"
    if arguments.kinds != ",".join(KINDS):
        text += f" --kinds {arguments.kinds}"
    if drop:
        text += f" --drop {','.join(map(str, sorted(drop)))}"
    if arguments.plant:
        text += f" --plant {arguments.plant}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--start", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument(
        "--kinds", default=",".join(KINDS), help=f"faults, of {', '.join(KINDS)}; -KIND,... leaves some out"
    )
    parser.add_argument("--drop", default="", help="numbers of faults to leave out")
    parser.add_argument("--trace", action="store_true", help="print what happens, with virtual times")
    parser.add_argument("--messages", action="store_true", help="print every message too")
    parser.add_argument("--shrink", action="store_true", help="leave out faults while the seed still fails")
    parser.add_argument("--plant", default="", choices=PLANTS, metavar="BUG", help=f"break a rule: {', '.join(PLANTS)}")
    parser.add_argument("--spheres", default="", help="instead: large trees of so many, such as 100,1000")
    parser.add_argument("--most", type=int, default=5, help="failures after which to stop")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    if arguments.kinds.startswith("-"):
        arguments.kinds = ",".join(kind for kind in KINDS if kind not in arguments.kinds[1:].split(","))
    kinds = tuple(arguments.kinds.split(","))
    unknown = set(kinds) - set(KINDS)
    if unknown:
        parser.error(f"no faults are called {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    drop = [int(number) for number in arguments.drop.split(",") if number]
    if arguments.spheres:
        print(table([scale(int(count)) for count in arguments.spheres.split(",")]))
        return 0
    if arguments.seed is not None:
        return single(arguments, kinds, drop)
    return many(arguments, kinds)


def single(arguments: argparse.Namespace, kinds: tuple[str, ...], drop: list[int]) -> int:
    if arguments.shrink:
        drop = shrink(arguments.seed, kinds, drop, arguments.plant)
        print(command(arguments.seed, arguments, drop))
    log = print if arguments.trace or arguments.messages else None
    world = World(make_plan(arguments.seed, kinds, drop=drop), log=log, messages=arguments.messages)
    try:
        with planted(arguments.plant):
            outcome = world.run()
    except SeedError as error:
        print(error)
        return 1
    print(f"seed {arguments.seed}: well after {outcome.seconds:.3f} virtual s, fingerprint {outcome.fingerprint:016x}")
    print(dict(outcome.counts))
    return 0


def many(arguments: argparse.Namespace, kinds: tuple[str, ...]) -> int:
    began, bad, done = time.perf_counter(), 0, 0
    counts: Counter[str] = Counter()
    seconds = 0.0
    seeds = range(arguments.start, arguments.start + arguments.seeds)
    with multiprocessing.get_context("fork").Pool(arguments.jobs) as pool:
        for seed, failure, found in pool.imap(partial(one, kinds=kinds, plant=arguments.plant), seeds, chunksize=8):
            done += 1
            if failure:
                bad += 1
                print(f"{failure}\n  again: {command(seed, arguments, [])}\n", flush=True)
                if bad >= arguments.most:
                    break
            else:
                counts += found[2]
                seconds += found[1]
    took = time.perf_counter() - began
    print(f"{done} seeds, {bad} failed, {took:.1f} s, {seconds:.0f} virtual s", dict(sorted(counts.items())))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
