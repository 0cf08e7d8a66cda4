"""Large trees: what grows with the number of spheres. ``python -m tests.simulation --spheres 1000``."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median

from control.placement import levels
from tests.simulation.plan import Fault, make_plan
from tests.simulation.world import World

STEPS = 6


def scale(spheres: int, *, seed: int = 0, fan_out: int = 12, faults: bool = True) -> dict[str, float]:
    """Train tiny weights on so many spheres, with a kill in most steps.

    Return per step: control's messages on its Work streams, both ways, and its turns of the event loop, least and most;
    virtual seconds, at the median.
    """
    # of the first to come, so near the root: inner ones and leaves in turn
    struck = [Fault(step, 0.03, "kill", 0.01 + 0.03 * step, 0.5, step % 2) for step in range(1, STEPS - 1)]
    plan = replace(
        make_plan(seed),
        spheres=spheres,
        relays=0,
        fan_out=fan_out,
        steps=STEPS,
        microbatches=256,
        batch=512,
        tail=0,
        test_size=0,
        chunks=1,
        last_chunk=16,
        window=2,
        clip_norm=None,
        eval_every=None,
        checkpoint_every=None,
        min_spheres=spheres,
        hosts=1,
        compute=0.2,
        speeds=(1.0,),
        latencies=(0.001,),
        rate=1e9,
        keepalive=None,
        orphan_timeout=30.0,
        pause=0.001,
        faults=tuple(struck) if faults else (),
    )
    began = time.perf_counter()
    world = World(plan, most_events=spheres * 10_000 + 1_000_000)
    world.run()
    took = time.perf_counter() - began
    steps = [(b[0] - a[0], b[1] - a[1], b[2] - a[2]) for a, b in zip(world.steps, world.steps[1:], strict=False)]
    assert world.first_shape is not None
    return {
        "spheres": spheres,
        "depth": max(levels(world.first_shape).values()),
        "messages": min(step[1] for step in steps),
        "with a kill": max(step[1] for step in steps),
        "turns": min(step[2] for step in steps),
        "with a kill ": max(step[2] for step in steps),
        "virtual s": median(step[0] for step in steps),
        "recomputed": world.counts["recomputed"],
        "kills": world.counts["kill"],
        "real s": took,
    }


def table(rows: list[dict[str, float]]) -> str:
    heads = list(rows[0])
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    lines += [
        f"| {' | '.join(f'{row[head]:.3g}' if row[head] < 100 else f'{row[head]:.0f}' for head in heads)} |"
        for row in rows
    ]
    return "\n".join(lines)
