"""Spheres as actors of a real Ray cluster of three nodes on this machine: `make test-ray`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from control.config import RunConfig
from control.reference import reference
from control.training import Training
from spheres.task import load_task

pytestmark = [
    pytest.mark.ray,
    pytest.mark.processes,
    pytest.mark.timeout(120),
    # Ray's own: files and sockets that it leaves to the garbage collector, and what it will change
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without places for spheres, and two nodes with two places each."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    made.nodes = [made.add_node(num_cpus=3), made.add_node(num_cpus=3)]
    yield made
    made.shutdown()


def config(cluster: Any, tmp_path: Path, **changes: Any) -> RunConfig:
    settings = {"task": "digits", "launcher": "ray", "ray_address": cluster.address, "run_dir": tmp_path / "run"}
    return RunConfig(**{**settings, "steps": 60, "spheres": 4, "fan_out": 2, **changes})


def wanted(steps: int) -> str:
    return reference(load_task("digits"), RunConfig(task="digits", steps=steps)).weights_sha256


def test_a_node_that_is_removed_takes_its_spheres_along_and_they_come_back_elsewhere(run, cluster, tmp_path):
    async def main() -> Any:
        async with Training(config(cluster, tmp_path)) as training:
            await training.step(5)
            tree = training._tree
            before = {sphere.pid: name for name, sphere in tree.spheres.items() if sphere.active}
            assert len(before) == 4
            await asyncio.to_thread(cluster.remove_node, cluster.nodes[1], allow_graceful=False)
            await training.step(5)
            # Ray makes them again on the node that is left, three places as it has
            async with asyncio.timeout(60):
                await tree.until(lambda: any(s.active and s.pid not in before for s in tree.spheres.values()))
            return await training.run()

    summary = run(main(), timeout=110)
    assert (summary.state, summary.weights_sha256) == ("completed", wanted(60))
