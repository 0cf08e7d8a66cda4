"""What a seed decides: the model, the tree, the speeds, and the faults with their times."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

#: what can happen
KINDS = (
    "kill", "restart", "leave", "join", "cut", "slow", "delay", "duplicate", "reorder", "corrupt", "half", "partition",
    "stop", "power", "control", "disk", "raise", "nan",
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """At a step that has begun, after a part of a step's usual time."""

    step: int
    part: float
    kind: str
    #: 0 to 1 each: whom it hits, how strong it is, which variant
    who: float
    strength: float
    variant: float

    def __str__(self) -> str:
        return f"{self.kind} in step {self.step} after {self.part:.2f} of a step"


@dataclass(frozen=True)
class Plan:
    seed: int
    spheres: int
    relays: int
    fan_out: int
    steps: int
    microbatches: int
    batch: int
    tail: int
    test_size: int
    chunks: int
    last_chunk: int
    window: int
    optimizer: dict[str, Any]
    clip_norm: float | None
    eval_every: int | None
    eval_microbatches: int
    checkpoint_every: int | None
    min_spheres: int
    hosts: int
    compute: float
    latencies: tuple[float, ...]
    rate: float
    keepalive: float | None
    orphan_timeout: float
    patience: float
    pause: float
    #: speculation and the watchdog: off in most seeds, they hide deadlocks
    speculate: bool
    faults: tuple[Fault, ...] = field(default=())
    wire: str = "inline"
    #: one for each process in turn: who shares memory with whom. "" with nobody; "a*" is seen and sees, "a!" is seen
    #: by the others of a, and sees none of them
    places: tuple[str, ...] = ("",)
    #: of an edge that shares memory
    shared_window: int = 1
    #: seconds that a sum beside the loop takes; 0: it is done on the loop
    sums: float = 0.0
    #: seconds between two pieces of an update that is streamed; 0: it is made at once
    streams: float = 0.0
    #: types of gradients and weights on the wire
    dtypes: tuple[str, str] = ("float32", "float32")
    #: how many times as slow as the others a sphere may be
    speeds: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 3.0, 20.0)

    @property
    def elements(self) -> int:
        return (self.chunks - 1) * 1024 + self.last_chunk


def make_plan(seed: int, kinds: Sequence[str] = KINDS, *, drop: Sequence[int] = (), **fixed: Any) -> Plan:
    """Return a seed's plan. ``drop``: numbers of faults to leave out; ``fixed``: fields that are given."""
    rng = random.Random(f"plan {seed}")
    size = rng.choices(("small", "middle", "large"), (75, 22, 3))[0]
    spheres = {"small": rng.randint(3, 8), "middle": rng.randint(8, 14), "large": rng.randint(20, 60)}[size]
    microbatches = rng.choice((1, 3, 4, 7, 8, 12, 12, 16, 16))
    steps = rng.choice((2, 2, 3, 3, 4, 6)) if size != "large" else 2
    chunks = rng.choices((1, 2, 3, 5, 8, 12, 20, 64), (20, 15, 15, 15, 15, 10, 7, 3))[0]
    while chunks > 1 and chunks * steps * spheres > 500:
        chunks //= 2
    batch = rng.choice((microbatches * 2 + 1, microbatches * 3, max(1, microbatches // 2)))
    optimizer = rng.choice(({"name": "sgd", "momentum": 0.9}, {"name": "sgd", "momentum": 0.0}, {"name": "adamw"}))
    count = rng.choices((0, 1, 2, 3, 5, 8, 12), (10, 25, 20, 15, 15, 10, 5))[0]
    values: dict[str, Any] = {
        "spheres": spheres,
        "relays": rng.choice((0, 0, 0, 1, spheres // 3)),
        "fan_out": rng.choice((1, 2, 2, 2, 3, 3, 12)) if size != "large" else rng.choice((2, 3, 4, 12)),
        "steps": steps,
        "microbatches": microbatches,
        "batch": batch,
        "tail": rng.choice((0, 1, batch // 2)),
        "test_size": rng.choice((0, 3, 40)),
        "chunks": chunks,
        "last_chunk": rng.choice((16, 256, 1024)),
        "window": rng.choice((1, 2, 2, 4)),
        "optimizer": optimizer,
        "clip_norm": rng.choice((None, None, 1.0)),
        "eval_every": rng.choice((None, 1, 2)),
        "eval_microbatches": rng.choice((1, 5, 8)),
        "checkpoint_every": rng.choice((None, 1, 1, 2)),
        "min_spheres": rng.choice((1, max(1, spheres // 2), spheres)),
        "hosts": rng.choice((1, 1, 1, 3)),
        "compute": rng.choice((0.001, 0.01, 0.01, 0.05)),
        "latencies": rng.choice(((0.0002,), (0.001,), (0.0005, 0.01), (0.0002, 0.001, 0.05, 0.2))),
        "rate": rng.choice((1e9, 1e8, 1e6)),
        "keepalive": rng.choice((None, 6.0)),
        "orphan_timeout": rng.choice((3.0, 5.0, 10.0)),
        "patience": rng.choice((4.0, 4.0, 2.0, 8.0)),
        "pause": rng.choice((0.0, 0.001, 0.05)),
        "speculate": rng.random() < 0.1,
    }
    # of its own, so that a seed is the same run otherwise
    wires = random.Random(f"wires {seed}")
    values |= {
        "wire": wires.choice(("inline", "auto", "auto", "auto")),
        "places": wires.choice((("a",), ("a",), ("a", "b"), ("a", "a", "b", "b", ""), ("a", "a!", "b"))),
        "shared_window": values["window"] * wires.choice((1, 1, 2, 100)),
        "sums": wires.choice((0.0, 0.001, 0.02, 0.3)),
        "streams": wires.choice((0.0, 0.001, 0.05)),
        "dtypes": wires.choice((("float32",) * 2,) * 4 + (("bfloat16", "float32"), ("bfloat16",) * 2)),
    }
    faults = make_faults(rng, kinds, count, steps)
    faults = [fault for number, fault in enumerate(faults) if number not in drop]
    return Plan(seed=seed, **{**values, "faults": tuple(faults), **fixed})


def make_faults(rng: random.Random, kinds: Sequence[str], count: int, steps: int) -> list[Fault]:
    weight = {kind: rng.choice((0.0, 1.0, 1.0, 5.0)) for kind in kinds}
    if not any(weight.values()):
        weight = dict.fromkeys(kinds, 1.0)
    faults: list[Fault] = []
    for _ in range(count):
        kind = rng.choices(list(weight), list(weight.values()))[0]
        step, part = rng.randrange(steps), rng.random() * 1.2
        if faults and rng.random() < 0.35:  # with the one before, or within a round trip of it
            step, part = faults[-1].step, faults[-1].part + rng.choice((0.0, 0.0, rng.random() * 0.1))
        faults.append(Fault(step, part, kind, rng.random(), rng.random(), rng.random()))
    return sorted(faults, key=lambda fault: (fault.step, fault.part))
