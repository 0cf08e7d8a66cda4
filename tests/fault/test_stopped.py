"""A sphere that hangs (SIGSTOP): its lease runs out, the run goes on without it, and when it wakes it comes back (N10).

Real processes and real signals; the weights are the undisturbed run's, bit for bit.
"""

import json
import os
import signal

import pytest

from control.config import RunConfig
from control.reference import reference
from control.starting import start_process
from control.training import Training
from spheres.task import load_task


def config(**changes):
    settings = {"task": "digits", "steps": 12, "batch_size": 48, "microbatches": 12, "spheres": 5, "fan_out": 2}
    small = {"chunk_bytes": 4096, "window_chunks": 2, "eval_every": None, "checkpoint_every": None, "patience": 1.0}
    return RunConfig(**{**settings, **small, **changes})


def is_inner(tree, name):
    return name in {tree.parent_of(other) for other in tree.names()}


@pytest.mark.processes
@pytest.mark.timeout(120)
@pytest.mark.parametrize("inner", [False, True], ids=["leaf", "inner"])
def test_a_stopped_sphere_is_passed_over_and_comes_back(inner, run, tmp_path):
    async def main():
        training = Training(config(run_dir=tmp_path / "run"))
        async with training:
            tree = training.controller.tree
            await training.step(3)
            name = next(n for n in tree.names() if is_inner(tree, n) is inner)
            incarnation, session = tree.spheres[name].link
            pid = tree.spheres[name].pid
            os.kill(pid, signal.SIGSTOP)
            try:
                await training.step(3)  # it had to give something in each of them, and its children to go elsewhere
                assert tree.state_of(name) == "lost"
                # those below it may still be on their way to another parent
                await tree.until(lambda: all(tree.state_of(n) == "active" for n in tree.names() if n != name))
                assert tree.state_of(name) == "lost"
            finally:
                os.kill(pid, signal.SIGCONT)
            await tree.until(lambda: tree.state_of(name) == "active")
            assert tree.spheres[name].link[0] == incarnation, "it was not dead: the same life"
            assert tree.spheres[name].link[1] > session
            await training.step(3)
            await training.run()
        return name, training.summary

    name, summary = run(main(), timeout=90)
    assert summary.error is None
    assert summary.weights_sha256 == reference(load_task("digits"), config()).weights_sha256
    records = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    who = [{part[2] for part in record["contributions"]} for record in records]
    assert name in who[2]
    assert not any(name in of for of in who[3:6])
    assert name in who[11]


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(120)
def test_a_control_that_was_stopped_takes_its_spheres_back(run, tmp_path):
    """Both sides find their links over: control has dropped its sessions, the spheres have given their parent up."""

    async def main():
        training = Training(config(run_dir=tmp_path / "run"))
        async with training:
            tree = training.controller.tree
            await training.step(3)
            sessions = {name: tree.spheres[name].link for name in tree.names()}
            # SIGSTOP of this very process, for longer than the lease, by one that is outside of it
            stop = f"kill -STOP {os.getpid()}; sleep 2.5; kill -CONT {os.getpid()}"
            # in a session of its own: what ends this one's processes does not keep it from the second signal
            outside = await start_process("sh", "-c", stop, start_new_session=True)
            await training.step(3)
            assert await outside.wait() == 0
            await training.step(3)
            # one is enough for a step; the others come when they have noticed
            await tree.until(lambda: all(tree.state_of(name) == "active" for name in tree.names()))
            direct = [name for name in tree.names() if tree.parent_of(name) == "control"]
            assert direct
            assert all(tree.spheres[name].link > sessions[name] for name in direct)
            await training.run()
        return training.summary

    summary = run(main(), timeout=90)
    assert summary.error is None
    assert summary.weights_sha256 == reference(load_task("digits"), config()).weights_sha256
