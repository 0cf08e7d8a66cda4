"""A slice of the seeds; ``make simulate SEEDS=10000`` runs more. What fails names the command to see it again."""

import asyncio
import inspect
import os
import subprocess
import sys

import pytest

from spheres.testing.clock import Process, StalledError, VirtualLoop
from tests.simulation.plan import make_plan
from tests.simulation.plants import PLANTS, planted
from tests.simulation.scale import scale
from tests.simulation.story import SeedError
from tests.simulation.world import World


@pytest.mark.parametrize("first", range(0, 100, 20))
def test_any_tree_with_any_faults_gives_the_weights_of_the_plain_loop(first: int) -> None:
    for seed in range(first, first + 20):
        World(make_plan(seed)).run()


def test_a_seed_is_the_same_run_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(17)
    first = World(plan).run()
    monkeypatch.setattr(os, "getpid", lambda: 1 << 21)
    assert World(plan).run() == first


def test_a_seed_is_the_same_run_in_every_process() -> None:
    command = [sys.executable, "-m", "tests.simulation", "--seed", "22"]
    runs = {
        subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True, timeout=30
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1


#: bug -> seeds that find it fast; a change of the plans may need others: ``python -m tests.simulation --plant BUG``
FOUND = {
    "credit-on-complete": (1, 20002),
    "completion-by-counting": (4, 20000),
    "from-chunk-lost": (20013, 23),
    "weights-overwritten": (68, 83),
    "torn-published": (5081, 5088),
    "end-told-once": (7, 22),
}


@pytest.mark.parametrize("bug", FOUND)
def test_a_planted_bug_is_found(bug: str) -> None:
    found = []
    with planted(bug):
        for seed in FOUND[bug]:
            try:
                World(make_plan(seed)).run()
            except SeedError as error:
                found.append(str(error))
    assert found
    assert not any("TypeError" in error for error in found), "the plant does not fit what it wraps: it found itself"


@pytest.mark.parametrize("bug", PLANTS)
def test_a_planted_bug_is_called_like_what_it_replaces(bug: str) -> None:
    """Else it is found at once, by the TypeError, and nothing is known of the rule."""
    for owner, name, changed in PLANTS[bug]():
        shipped = getattr(owner, name)
        if inspect.isfunction(shipped):
            kinds = [[p.kind for p in inspect.signature(f).parameters.values()] for f in (shipped, changed)]
            assert kinds[0] == kinds[1], f"{owner.__name__}.{name}"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_control_sends_and_does_follows_the_fan_out_and_not_the_number_of_spheres() -> None:
    for spheres in (30, 240):
        figures = scale(spheres, fan_out=6)
        # header and assignment down; at most 2 log2(256) blocks up, in one frame each; each may bring credit
        assert figures["messages"] <= 6 * (2 + 2 * 16)
        assert figures["turns"] <= 12 * figures["messages"]


# ---- the clock and its processes


def on_virtual_time(main, **bounds):
    loop = VirtualLoop(**{"most_seconds": 1e6, "most_events": 10_000, **bounds})
    try:
        return loop.run_until_complete(main())
    finally:
        loop.close()


def test_time_jumps_to_the_next_timer() -> None:
    async def main():
        await asyncio.sleep(86_400)
        return asyncio.get_running_loop().time()

    assert on_virtual_time(main) == 86_400


def test_a_loop_in_which_nothing_can_happen_any_more_says_so() -> None:
    async def main():
        await asyncio.get_running_loop().create_future()

    with pytest.raises(StalledError, match="nothing is left"):
        on_virtual_time(main)


def test_a_stopped_process_runs_late_and_a_killed_one_never() -> None:
    notes = []

    async def tick(name):
        try:
            for _ in range(3):
                await asyncio.sleep(1.0)
                notes.append((name, asyncio.get_running_loop().time()))
        finally:
            notes.append((name, "finally"))

    async def main():
        stopped, killed = Process("stopped"), Process("killed")
        for process in (stopped, killed):
            process.start(tick(process.name))
        await asyncio.sleep(1.5)
        stopped.stop()
        killed.kill()
        await asyncio.sleep(10)
        stopped.go_on()
        await stopped.main

    on_virtual_time(main)
    assert [note for note in notes if note[0] == "killed"] == [("killed", 1.0)]
    assert [when for name, when in notes if name == "stopped"] == [1.0, 11.5, 12.5, "finally"]
