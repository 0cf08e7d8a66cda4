"""Launchers: which one a run has, what all of them promise, and what the one for Kubernetes says to its API server."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from control import launcher_kubernetes
from control.cli import app
from control.cli.output import run as run_words
from control.config import RunConfig
from control.config_sources import load_config
from control.launcher import launcher_for
from control.launcher_kubernetes import ApiServer, KubernetesSpheres, kubernetes_launcher
from control.launcher_local import LocalSpheres
from control.launcher_ray import _refuse_loopback
from control.training import Training
from spheres.errors import ArmillaryError, ConfigError, UnreachableError
from tests.cluster import COST, DEPLOYMENT, PODS, SCALE, Cluster
from tests.launching import STEPS, eventually, run_with

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

KUBERNETES = {"launcher": "kubernetes", "kubernetes_deployment": DEPLOYMENT, "listen": "0.0.0.0:0", "insecure": True}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    made = Cluster(tmp_path, replicas=1)
    made.set_environment(monkeypatch)
    yield made
    made.close()


# --- what all of them promise (tests/ray has the third) ---------------------------------------------------------------


def test_local_spheres_do_what_every_launcher_does(run, tmp_path):
    config = RunConfig(task="digits", steps=STEPS, spheres=3, fan_out=2, run_dir=tmp_path / "run")
    run(run_with(config, name="local"), timeout=90)


def test_a_deployment_of_spheres_does_what_every_launcher_does(run, tmp_path, cluster, monkeypatch):
    opened = Training._listen

    async def listen(training: Training, last_address: str) -> None:
        await opened(training, last_address)
        port = training._tree.address.rpartition(":")[2]
        with cluster.lock:
            cluster.control = f"127.0.0.1:{port}"

    monkeypatch.setattr(Training, "_listen", listen)
    config = RunConfig(task="digits", steps=STEPS, spheres=3, fan_out=2, run_dir=tmp_path / "run", **KUBERNETES)
    run(run_with(config, name=f"{DEPLOYMENT} replica "), timeout=90)
    assert cluster.replicas == len(cluster.pods) == 4  # they are the Deployment's, and stay


# --- the choice -------------------------------------------------------------------------------------------------------


def test_processes_of_this_machine_are_the_default():
    assert launcher_for(RunConfig()) is LocalSpheres


def test_ray_that_is_not_installed_is_said_in_one_line_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.chdir(tmp_path)
    assert run_words(app, ["start", "--launcher", "ray", "--steps", "1"]) == 2
    said = capsys.readouterr().err
    assert "error: the launcher ray needs the extra ray: pip install 'armillary[ray]'" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("address", ["local", "ray://127.0.0.1:10001", "127.0.0.1", ":6379", "127.0.0.1:70000"])
def test_no_cluster_is_started_by_the_way(address):
    with pytest.raises(ConfigError, match=r"none is started here: that is `ray start --head`"):
        load_config({"launcher": "ray", "ray_address": address}, {})


def node(host: str, *, alive: bool = True) -> dict[str, Any]:
    return {"NodeManagerHostname": host, "Alive": alive}


def test_a_cluster_of_several_machines_needs_a_control_that_they_reach(monkeypatch):
    monkeypatch.setattr("control.launcher_ray.socket.gethostname", lambda: "here")
    _refuse_loopback("127.0.0.1:0", [node("here"), node("gone", alive=False)])
    _refuse_loopback("0.0.0.0:7070", [node("here"), node("there")])
    with pytest.raises(ConfigError, match=r"spheres on there cannot reach: give --listen .* and --insecure"):
        _refuse_loopback("127.0.0.1:0", [node("here"), node("there")])


# --- kubernetes -------------------------------------------------------------------------------------------------------


def spheres(cluster: Cluster) -> KubernetesSpheres:
    return KubernetesSpheres(ApiServer(cluster.account), DEPLOYMENT)


def test_a_deployment_is_never_shrunk_at_the_start_of_a_run(run, cluster):
    async def main() -> None:
        launcher = spheres(cluster)
        await launcher.begin(3, came_back=False)
        assert cluster.replicas == launcher.living == 3
        await launcher.begin(2, came_back=True)
        assert cluster.replicas == launcher.living == 3
        assert [started.name for started in await launcher.start(2)] == [
            f"{DEPLOYMENT} replica 4",
            f"{DEPLOYMENT} replica 5",
        ]

    run(main())
    assert cluster.asked == [f"GET {SCALE}", f"PATCH {SCALE}", f"GET {SCALE}", f"GET {SCALE}", f"PATCH {SCALE}"]


def test_a_pod_that_is_told_to_leave_is_the_one_that_goes_and_goes_once(run, cluster):
    async def main() -> None:
        launcher = spheres(cluster)
        await launcher.begin(3, came_back=False)
        first, second, third = cluster.pods
        for _ in range(2):
            assert launcher.dismiss(second, 7, at_once=False)
        assert not launcher.dismiss("armillary-control-0", 7, at_once=True)
        await eventually(lambda: cluster.replicas == 2)
        assert list(cluster.pods) == [first, third]
        assert launcher.dismiss(first, 7, at_once=True)
        await launcher.aclose()  # what is under way is finished
        assert list(cluster.pods) == [third]
        assert not launcher.dismiss(third, 7, at_once=True)  # the run is over: it is the Deployment's

    run(main())


def test_a_pod_of_another_deployment_is_not_its_own(run, cluster):
    async def main() -> None:
        launcher = spheres(cluster)
        assert not launcher.dismiss(f"{DEPLOYMENT}-gpu-6c9d8f7b5-x2x7k", 7, at_once=False)
        await launcher.aclose()

    run(main())
    assert cluster.asked == []


LONG = "r" * 40 + "-sphere"


@pytest.mark.parametrize(
    ("deployment", "pod", "is_its_own"),
    [
        ("a-sphere", "a-sphere-6c9d8f7b5-x2x7k", True),
        ("a-sphere", "a-sphere-7-x2x7k", True),
        ("a-sphere", "a-sphere-gpu-6c9d8f7b5-x2x7k", False),
        ("a-sphere", "a-sphere-x2x7k", False),  # of a DaemonSet, or of a Job
        ("a-sphere", "a-sphere-agent-x2x7k", False),  # likewise: a hash has no vowels
        ("a-sphere", "a-sphere-6c9d8f7b5-0", False),  # of a StatefulSet
        ("a-sphere", "a-sphere-6c9d8f7b5x2x7k", False),
        ("a-sphere", "a-sphere-6c9d8f7b5-x2x7k\n", False),
        ("a.sphere", "a-sphere-6c9d8f7b5-x2x7k", False),
        # Kubernetes cuts what stands before the last five characters to 58
        (LONG, f"{LONG}-6c9d8f7b5-x2x7k", True),
        (LONG, f"{LONG}-6c9d8f7b54x2x7k", True),
        (LONG, f"{LONG}-6c9d8f7b5x2x7k", False),
        ("s" * 55, "s" * 55 + "-6cx2x7k", True),
        ("s" * 60, "s" * 58 + "x2x7k", True),
        ("s" * 60, "s" * 57 + "x2x7k", False),
    ],
)
def test_whose_a_pod_is_follows_from_its_name(deployment: str, pod: str, is_its_own: bool) -> None:
    assert bool(launcher_kubernetes._pods_of(deployment).fullmatch(pod)) is is_its_own


def test_a_change_by_somebody_else_is_taken_into_account(run, cluster):
    """An autoscaler at the same time: 1 at first, two that it adds in between, two that are spawned."""

    async def main() -> None:
        cluster.meddlers = 2
        await spheres(cluster).start(2)
        assert cluster.replicas == 5
        cluster.meddlers = 100
        with pytest.raises(ArmillaryError, match="was changed meanwhile"):
            await spheres(cluster).start(2)
        cluster.meddlers = 0

    run(main())


@pytest.mark.parametrize("verb", ["GET", "PATCH"])
def test_a_role_that_is_missing_is_named(run, cluster, verb):
    cluster.forbidden = {f"{verb} deployments/scale"}
    words = (
        rf"this Pod's service account may not {verb.lower()} deployments/scale in namespace train: its Role needs "
        r"get and patch on deployments/scale .*cannot"
    )
    with pytest.raises(ConfigError, match=words):
        run(spheres(cluster).begin(3, came_back=False))


def test_a_role_without_pods_is_said_in_the_log(run, cluster, caplog):
    async def main() -> None:
        launcher = spheres(cluster)
        await launcher.begin(3, came_back=False)
        cluster.forbidden = {"PATCH pods"}
        pod = next(iter(cluster.pods))
        assert launcher.dismiss(pod, 7, at_once=False)
        await eventually(lambda: bool(caplog.records))
        cluster.forbidden = set()
        assert launcher.dismiss(pod, 7, at_once=False)  # said again, it is tried again
        await eventually(lambda: pod not in cluster.pods)
        await launcher.aclose()

    with caplog.at_level(logging.ERROR):
        run(main())
    (record,) = caplog.records
    assert "Kubernetes will start it again: this Pod's service account may not patch pods" in record.getMessage()


def test_a_deployment_that_is_not_there_is_named(run, cluster):
    launcher = KubernetesSpheres(ApiServer(cluster.account), "another")
    with pytest.raises(ConfigError, match=r"there is no deployments/scale 'another' in namespace train"):
        run(launcher.start(1))


def test_a_token_that_is_refused_and_one_that_is_renewed(run, cluster):
    launcher = spheres(cluster)
    (cluster.account / "token").write_text("stale")
    with pytest.raises(ConfigError, match="does not know this Pod's service account"):
        run(launcher.start(1))
    (cluster.account / "token").write_text("a-token")
    launcher = KubernetesSpheres(launcher._api, DEPLOYMENT)
    run(launcher.start(1))
    (cluster.account / "token").unlink()
    with pytest.raises(ConfigError, match="token cannot be read: No such file"):
        run(launcher.start(1))


def test_a_server_that_is_not_the_clusters_own_is_not_spoken_to(run, cluster, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    stranger = Cluster(other)
    try:
        (cluster.account / "ca.crt").write_bytes((stranger.account / "ca.crt").read_bytes())
        with pytest.raises(UnreachableError, match=r"cannot be asked: .*CERTIFICATE_VERIFY_FAILED"):
            run(spheres(cluster).start(1))
        assert cluster.asked == []
    finally:
        stranger.close()


def test_a_server_that_is_not_there(run, cluster, monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
    with pytest.raises(UnreachableError, match=r"the API server at https://127.0.0.1:1 cannot be asked: .*refused"):
        run(spheres(cluster).start(1))


def test_outside_of_a_pod_nothing_is_begun(tmp_path, monkeypatch, cluster):
    config = RunConfig(**KUBERNETES)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    with pytest.raises(ConfigError, match="KUBERNETES_SERVICE_HOST and _PORT are not set"):
        kubernetes_launcher(config)
    monkeypatch.setattr(launcher_kubernetes, "_ACCOUNT", tmp_path / "none")
    with pytest.raises(ConfigError, match=r"works in a Pod that has a service account's token .*No such file"):
        kubernetes_launcher(config)
    with pytest.raises(ConfigError, match=r"which no other Pod can reach: give --listen 0.0.0.0:7070 and --insecure"):
        kubernetes_launcher(RunConfig(launcher="kubernetes", kubernetes_deployment="spheres"))
    with pytest.raises(ConfigError, match="needs the name of a Deployment"):
        load_config({"launcher": "kubernetes"}, {})


def test_the_name_of_a_deployment_comes_from_the_environment_too():
    environ = {"ARMILLARY_LAUNCHER": "kubernetes", "ARMILLARY_KUBERNETES_DEPLOYMENT": "a-sphere"}
    assert load_config({}, environ)[0].kubernetes_deployment == "a-sphere"


def test_the_paths_are_those_of_the_api():
    assert (SCALE, PODS, COST) == (
        "/apis/apps/v1/namespaces/train/deployments/armillary-sphere/scale",
        "/api/v1/namespaces/train/pods/",
        launcher_kubernetes._COST,
    )
