"""Spheres as actors of a real Ray cluster of three nodes on this machine: `make test-ray`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from control import restarts
from control.config import RunConfig
from control.reference import reference
from control.starting import start_process
from control.training import run as run_training
from spheres.errors import TaskError, UnreachableError
from spheres.testing.synthetic import Synthetic
from tests.launching import STEPS, NotingTraining, cli, eventually, run_with, wanted

pytestmark = [
    pytest.mark.ray,
    pytest.mark.processes,
    pytest.mark.timeout(300),  # of the cluster's start too; on a loaded machine an actor's takes its time
    # Ray's own: files and sockets that it leaves to the garbage collector, and what it will change
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head and two more nodes, with two places for spheres each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
        made.others = [made.add_node(num_cpus=2), made.add_node(num_cpus=2)]
        yield made
        made.shutdown()


def config(cluster: Any, tmp_path: Path, **changes: Any) -> RunConfig:
    settings = {"task": "digits", "launcher": "ray", "ray_address": cluster.address, "run_dir": tmp_path / "run"}
    return RunConfig(**{**settings, "steps": STEPS, "spheres": 3, "fan_out": 2, **changes})


@contextlib.contextmanager
def started(*words: str) -> Iterator[subprocess.Popen[str]]:
    """A run whose standard output is read line by line, and standard error at its end."""
    command = [sys.executable, "-m", "control", "start", "--json", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def until(process: subprocess.Popen[str], event: str) -> dict[str, Any]:
    assert process.stdout is not None
    for line in process.stdout:
        record = json.loads(line)
        if record["event"] == event:
            return dict(record)
    pytest.fail(f"no {event}: {process.stderr.read() if process.stderr else ''}")


def test_actors_do_what_every_launcher_does(run, cluster, tmp_path):
    import ray

    run(run_with(config(cluster, tmp_path), name="ray-"), timeout=240)
    assert not ray.is_initialized()  # the connection was the run's own
    assert not (tmp_path / "run" / "logs").exists()


def test_the_command_trains_on_a_cluster_that_is_there(run, cluster, tmp_path):
    async def main() -> None:
        where = ["--ray-address", cluster.address, "--run-dir", str(tmp_path / "run")]
        code, out, err = await cli(
            "start",
            "--launcher",
            "ray",
            *where,
            "--spheres",
            "2",
            "--steps",
            "20",
            "--json",
            "--listen",
            "0.0.0.0:0",
            "--insecure",
        )
        assert code == 0, err
        assert json.loads(out.splitlines()[-1])["weights_sha256"] == wanted(20)

    run(main(), timeout=240)


ONCE = """
    import os
    from pathlib import Path
    from spheres.tasks.digits import Digits

    class Stubborn(Digits):
        '''It can be made in control's process only.'''
        def __init__(self, control="0"):
            if os.getpid() != int(control):
                raise RuntimeError("not on this node")
            super().__init__()
"""


def test_a_sphere_that_ends_by_itself_ends_the_run_with_its_own_words(run, cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(restarts, "_FIRST_PAUSE", 0.001)
    (tmp_path / "stubborn.py").write_text(textwrap.dedent(ONCE))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("control.training.script_folder", lambda: [str(tmp_path)])
    options = {"control": str(os.getpid())}
    asked = config(cluster, tmp_path, task="stubborn:Stubborn", task_options=options, spheres=1)
    summary = run(run_training(asked), timeout=240)
    assert isinstance(summary.error, TaskError)
    assert "ray sphere 1 has ended (exit code 3): " in str(summary.error)
    assert "not on this node" in str(summary.error)
    assert "; its log is with Ray: ray logs actor --id " in str(summary.error)


CRASHING = """
    import os, signal
    from pathlib import Path
    from spheres.tasks.digits import Digits

    class Crashing(Digits):
        # it can be made in control's process only; any other dies of it
        def __init__(self, control="0"):
            super().__init__()
            if os.getpid() != int(control):
                os.kill(os.getpid(), signal.SIGKILL)
"""


def test_an_actor_whose_process_dies_again_and_again_is_named(run, cluster, tmp_path, monkeypatch, caplog):
    """Ray starts it again for ever, and says so nowhere that anybody looks."""
    monkeypatch.setattr(restarts, "_ASIDE", 2)
    (tmp_path / "crashing.py").write_text(textwrap.dedent(CRASHING))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("control.training.script_folder", lambda: [str(tmp_path)])

    async def main() -> None:
        options = {"control": str(os.getpid())}
        async with NotingTraining(
            config(cluster, tmp_path, task="crashing:Crashing", task_options=options, spheres=1)
        ) as training:
            # before that, it may wait for its place
            await eventually(lambda: any("has died" in why for _, why in training._launcher.aside()), seconds=200)
            ((name, why),) = training._launcher.aside()
            assert name == "ray-1"
            assert re.fullmatch(r"its process has died \d+ times in [\d.]+ s; Ray starts it again each time", why)
            assert not training._launcher.all_aside  # it may be luckier
            assert "ended" not in training.__dict__

    run(main(), timeout=240)
    (said,) = [text for text in caplog.messages if "its process has died 2 times" in text]
    assert said.startswith("ray sphere 1: its process has died 2 times in ")
    assert "; its log is with Ray: ray logs actor --id " in said


def test_a_cluster_that_is_gone_takes_its_actors_along_and_nothing_else(run, cluster, tmp_path):
    """Other spheres train on; it is said, once; nobody is started; SIGTERM leaves a checkpoint and ends it soon."""
    from ray.cluster_utils import Cluster

    other = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    where = ["--ray-address", other.address, "--run-dir", str(tmp_path / "run"), "--checkpoint-every", "none"]
    asked = ["--task", "digits", "--launcher", "ray", "--spheres", "1", "--steps", "10000000", "--log-every", "1s"]
    with started(*asked, *where) as process, contextlib.ExitStack() as stack:
        until(process, "step")
        address = (tmp_path / "run" / "address").read_text().split()[0]
        own = [sys.executable, "-m", "spheres", "start", "--control", address]
        sphere = stack.enter_context(subprocess.Popen(own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        stack.callback(sphere.kill)
        until(process, "sphere_joined")
        other.head_node.kill_all_processes(check_alive=False)
        until(process, "sphere_lost")
        gone = f"the head of the Ray cluster at {other.address} is gone"
        assert process.stderr is not None
        heard = []
        for line in process.stderr:
            heard.append(line)
            if gone in line:
                break
        until(process, "step")

        async def spawn() -> tuple[int, str, str]:
            return await cli("spawn", "1", "--run-dir", str(tmp_path / "run"))

        code, _, err = run(spawn())
        assert code == UnreachableError.exit_code
        assert f"{gone}: no sphere can be started" in err
        process.terminate()
        summary = until(process, "summary")
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert [saved.name for saved in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{summary['steps']:09d}"]
    assert sum(gone in line for line in (*heard, *err.splitlines())) == 1


def parent(pid: int) -> int:
    """Return the process that has started this one: of an actor, its node's."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_node_that_is_removed_takes_its_spheres_along_and_they_come_back_elsewhere(run, cluster, tmp_path):
    """Also: a killed process comes back, by Ray, and who is told to leave then is found where it is by now."""

    async def main() -> Any:
        # as between machines: on addresses that others could reach
        beyond = {"listen": "0.0.0.0:0", "insecure": True, "spheres": 4, "steps": 200}
        slow = {"task": "spheres.testing.synthetic:Synthetic", "task_options": {"compute_seconds": "0.01"}}
        async with NotingTraining(config(cluster, tmp_path, **beyond, **slow)) as training:
            tree, launcher = training._tree, training._launcher
            await training.step(5)

            def active() -> dict[int, str]:
                return {sphere.pid: name for name, sphere in tree.spheres.items() if sphere.active}

            first = active()
            assert len(first) == 4
            assert not any(s.member.address.startswith("127.0.0.1:") for s in tree.spheres.values())
            os.kill(next(iter(first)), signal.SIGKILL)
            await eventually(lambda: len(active()) == 4 and active().keys() != first.keys(), seconds=120)
            second = active()

            (node, here), *_ = [
                (node, gone)
                for node in cluster.others
                if (gone := {p for p in second if parent(p) == node.all_processes["raylet"][0].process.pid})
            ]
            place = next(s.member.address for s in tree.spheres.values() if s.active)
            process = await start_process(
                sys.executable,
                "-m",
                "spheres",
                "health",
                place,
                "--service",
                "ready",
                stdout=asyncio.subprocess.DEVNULL,
            )
            assert await process.wait() == 0
            step = training.controller.step
            training.resume()  # in mid-run: steps turn while the node goes
            await eventually(lambda: training.controller.step > step)
            await asyncio.to_thread(cluster.remove_node, node, allow_graceful=False)
            cluster.others.remove(node)
            await eventually(lambda: not active().keys() & here)
            training.pause()
            assert training.controller.step < 190
            await eventually(lambda: len(active()) == 4, seconds=120)  # the nodes that are left have places for all
            await training.step(5)
            back = next(iter(active().keys() - second.keys()))
            await eventually(lambda: any(life.where and life.where[1] == back for life in launcher._latest.values()))
            training.terminate(active()[back])
            await eventually(lambda: launcher.living == 3 and len(active()) == 3)
            assert launcher.aside() == []
            assert "ended" not in training.__dict__  # all of that was Ray's work
            return await training.run()

    summary = run(main(), timeout=240)
    undisturbed = reference(
        Synthetic(), RunConfig(steps=200)
    ).weights_sha256  # as slow as its spheres, it learns the same
    assert (summary.state, summary.weights_sha256) == ("completed", undisturbed)


def test_sigterm_leaves_the_step_in_hand_and_a_checkpoint_their_time(cluster, tmp_path):
    """Ray's core has a handler of its own, which aborts a process after 3 s."""
    slow = ["--task", "spheres.testing.synthetic:Synthetic", "--task-option", "compute_seconds=2.5"]
    step = ["--microbatches", "2", "--batch-size", "32", "--steps", "100", "--eval-every", "none"]
    where = ["--launcher", "ray", "--ray-address", cluster.address, "--run-dir", str(tmp_path / "run")]
    with started(*slow, *step, *where, "--spheres", "1", "--checkpoint-every", "none") as process:
        until(process, "step")
        process.terminate()
        summary = until(process, "summary")
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert (summary["reason"], summary["steps"]) == ("SIGTERM", 2)
    assert [saved.name for saved in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000000002"]
    assert "*** SIGTERM" not in err


def test_where_no_cluster_is_the_command_says_so_at_once(run, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    async def main() -> None:
        started = ("start", "--launcher", "ray", "--run-dir", str(tmp_path / "run"))
        code, _, err = await cli(*started, "--ray-address", "127.0.0.1:1")
        assert code == UnreachableError.exit_code
        assert err.endswith(
            "error: no Ray cluster answers at 127.0.0.1:1 (--ray-address): [Errno 111] Connection refused\n"
        )
        assert not (tmp_path / "run").exists()

    run(main(), timeout=60)


def test_without_an_address_the_cluster_of_this_machine_is_looked_for(monkeypatch):
    from control.launcher_ray import _RECONNECT, ray_launcher

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", nobody)
    with pytest.raises(
        UnreachableError, match=r"there is no Ray cluster on this machine: start one with `ray start --head`"
    ):
        ray_launcher(RunConfig(launcher="ray"))
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    # by default Ray's core ends this process a minute after the head of its cluster
    assert int(os.environ[_RECONNECT]) > 24 * 3600


def nobody(**_: Any) -> None:
    raise ConnectionError("Could not find any running Ray instance.")
