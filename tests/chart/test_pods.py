"""The chart's Pods for real, in podman: control and three spheres train, two are killed, the bits stay the same.

podman runs the Pod templates as they are rendered: commands, variables, users, read-only roots, dropped capabilities,
seccomp, memory limits, volumes, restarts. What it has not is done here, or left out:

- StatefulSet and Deployment: ``pods`` makes their Pods, and the claim becomes a volume;
- Services: control's Pod has the name of its Service;
- the downward API for node, address and labels, and ``$(NAME)``: filled in;
- ports: podman would publish them on this machine;
- probes by gRPC: asked with ``sphere health`` in the container;
- ServiceAccounts, PodDisruptionBudget, autoscaler, NetworkPolicy: nothing reads them.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shutil
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from tests.chart.conftest import ROOT, Documents

pytestmark = [pytest.mark.containers, pytest.mark.timeout(600)]

STEPS = 3000
SPHERES = 3
REFERENCE = f"""
from control.config import RunConfig
from control.reference import reference
from spheres.task import load_task
print(reference(load_task("digits"), RunConfig(task="digits", steps={STEPS})).weights_sha256)
"""


def podman(
    *words: str, stdin: str | None = None, check: bool = True, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["podman", *words], input=stdin, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0 or not check, f"podman {' '.join(words)}: {done.stderr}"
    return done


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    """The image in TEST_IMAGE, else one that is built from docker/Dockerfile."""
    if shutil.which("podman") is None or os.geteuid() != 0:
        pytest.skip("no podman, or not root: the chart's Pods are NOT run (make test-containers)")
    if given := os.environ.get("TEST_IMAGE"):
        yield given
        return
    name = "localhost/armillary:chart"
    done = subprocess.run(
        [str(ROOT / "docker" / "build.sh"), name], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    yield name
    podman("image", "rm", "--force", name, check=False)


@dataclass
class Installed:
    """A release: its network, volume and Pods."""

    name: str
    pods: list[dict[str, Any]]
    addresses: dict[str, str]

    @property
    def control(self) -> str:
        return container(self.pods[0])

    def play(self, pod: dict[str, Any]) -> None:
        address = self.addresses[pod["metadata"]["name"]]
        podman("play", "kube", "--network", self.name, "--ip", address, "-", stdin=yaml.safe_dump(pod))

    def renamed(self, pod: dict[str, Any]) -> dict[str, Any]:
        """Return another Pod of the same template, at the same address."""
        other = deepcopy(pod)
        other["metadata"]["name"] += "-next"
        self.addresses[other["metadata"]["name"]] = self.addresses[pod["metadata"]["name"]]
        self.pods.append(other)
        return other

    def remove(self, pod: dict[str, Any]) -> None:
        words = ("pod", "rm", "--force", "--ignore", "--time", "0", pod["metadata"]["name"])
        # A container that ends meanwhile makes the first attempt fail ("could not be stopped: ... state improper").
        if podman(*words, check=False).returncode != 0:
            podman(*words)


def container(pod: dict[str, Any]) -> str:
    """Return the name that podman gives to a Pod's container."""
    return f"{pod['metadata']['name']}-{pod['spec']['containers'][0]['name']}"


def pods(documents: Documents, claim: str, addresses: Iterator[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the Pods that StatefulSets and Deployments make, control first, as podman can run them; and addresses."""
    for document in sorted(documents, key=lambda document: document["kind"], reverse=True):
        spec = document.get("spec", {})
        if document["kind"] not in ("StatefulSet", "Deployment"):
            continue
        is_control = document["kind"] == "StatefulSet"
        for number in range(spec["replicas"]):
            name = document["metadata"]["name"] + ("" if is_control else f"-{number}")
            template, address = deepcopy(spec["template"]), next(addresses)
            pod = {"apiVersion": "v1", "kind": "Pod", **template}
            pod["metadata"]["name"] = name
            volumes = pod["spec"].setdefault("volumes", [])
            volumes += [
                {"name": made["metadata"]["name"], "persistentVolumeClaim": {"claimName": claim}}
                for made in spec.get("volumeClaimTemplates", ())
            ]
            (one,) = pod["spec"]["containers"]
            # podman shares an emptyDir among all Pods that have one of that name
            for entry in (*volumes, *one["volumeMounts"]):
                entry["name"] = f"{name}-{entry['name']}"
            del one["ports"]
            fill_in(one, {"status.podIP": address, "spec.nodeName": f"node-{number % 2}"})
            yield pod, address


def fill_in(one: dict[str, Any], fields: dict[str, str]) -> None:
    known: dict[str, str] = {}

    def expand(text: str) -> str:
        return re.sub(r"\$\((\w+)\)", lambda match: known[match[1]], text)

    for entry in one["env"]:
        source = entry.pop("valueFrom", None)
        known[entry["name"]] = fields.get(source["fieldRef"]["fieldPath"], "") if source else expand(entry["value"])
    one["env"] = [{"name": name, "value": value} for name, value in known.items()]
    one["args"] = [expand(word) for word in one["args"]]


@pytest.fixture
def installed(image: str, render: Callable[..., Documents]) -> Iterator[Installed]:
    name = f"chart-{uuid.uuid4().hex[:8]}"
    repository, _, tag = image.rpartition(":")
    documents = render(
        "default",
        f"image.repository={repository},image.tag={tag},image.pullPolicy=Never",
        f"fullnameOverride={name}",
        f"spheres.replicas={SPHERES}",
        f"config.steps={STEPS},config.min_spheres={SPHERES},config.checkpoint_every=100steps",
    )
    podman("network", "create", "--internal", name)
    release = Installed(name, [], {})
    try:
        (network,) = json.loads(podman("network", "inspect", name).stdout)
        hosts = ipaddress.ip_network(network["subnets"][0]["subnet"]).hosts()
        addresses = (str(host) for number, host in enumerate(hosts) if number > 9)
        for pod, address in pods(documents, name, addresses):
            release.pods.append(pod)
            release.addresses[pod["metadata"]["name"]] = address
        yield release
    finally:
        for pod in release.pods:
            release.remove(pod)
        volumes = {volume["name"] for pod in release.pods for volume in pod["spec"]["volumes"]}
        podman("volume", "rm", "--force", name, *volumes, check=False)
        podman("network", "rm", "--force", name)


def send(sign: signal.Signals, name: str) -> None:
    """Send a signal to a container's process; one that podman itself has killed it would not start again."""
    (inspected,) = json.loads(podman("inspect", name).stdout)
    assert inspected["State"]["Pid"] > 1  # 0 where it has ended: that would signal these tests
    os.kill(inspected["State"]["Pid"], sign)


def until(name: str, wanted: Callable[[dict[str, Any]], bool], *, count: int = 1) -> dict[str, Any]:
    """Return the record of a container's log that is wanted, or the last of ``count`` such; over all of its starts."""
    while True:
        found = 0
        command = ["podman", "logs", "--follow", name]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as logs:
            assert logs.stdout is not None
            try:
                for line in logs.stdout:
                    record = json.loads(line) if line.startswith("{") else {}
                    found += wanted(record)
                    if found == count:
                        return record
            finally:
                logs.kill()
        # the log ends with the process; the next one writes on in it
        podman("wait", "--condition", "running", name, timeout=60)


def event(name: str, **least: int) -> Callable[[dict[str, Any]], bool]:
    return lambda record: record.get("event") == name and all(record[key] >= value for key, value in least.items())


def test_pods_of_the_chart_train_are_killed_and_end_in_the_same_bits(image: str, installed: Installed) -> None:
    for pod in installed.pods:
        installed.play(pod)
    control, spheres = installed.control, installed.pods[1:]
    assert len(spheres) == SPHERES

    # as Kubernetes would ask; what they may do
    until(control, event("step", step=50))
    podman("exec", control, "control-cli", "pause")  # or the run may be over before it has been asked all that
    for pod, port in [(installed.pods[0], 7070), *((sphere, 7071) for sphere in spheres)]:
        for service in ("", "ready"):
            podman("exec", container(pod), "sphere", "health", f"127.0.0.1:{port}", "--service", service)
        assert podman("exec", container(pod), "id", "--user").stdout.strip() == "10001"
        assert "Read-only" in podman("exec", container(pod), "touch", "/app/x", check=False).stderr
        status = podman("exec", container(pod), "cat", "/proc/1/status").stdout
        assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
        assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)

    podman("exec", control, "control-cli", "resume")

    # a sphere that dies is started again in its Pod; a Pod that is gone is replaced by another, as a Deployment does
    send(signal.SIGKILL, container(spheres[0]))
    installed.remove(spheres[1])
    installed.play(installed.renamed(spheres[1]))
    # control comes back by itself, with the same words, and goes on
    until(control, event("step", step=300))
    send(signal.SIGKILL, control)
    begun = until(control, event("train_start"), count=2)
    assert begun["step"] >= 200
    summary = until(control, event("summary"))
    wanted = podman("run", "--rm", "--network", "none", image, "python3", "-c", REFERENCE).stdout.strip()
    assert (summary["state"], summary["steps"], summary["weights_sha256"]) == ("completed", STEPS, wanted)

    # over, and held: it answers, and what it wrote is on the volume
    assert "completed" in podman("exec", control, "control-cli", "status").stdout
    podman("exec", control, "sphere", "health", "127.0.0.1:7070", "--service", "ready")
    podman("exec", control, "control-cli", "checkpoint", "verify", f"/runs/run/checkpoints/step-{STEPS:09d}")
    (inspected,) = json.loads(podman("inspect", control).stdout)
    (volume,) = [mount["Name"] for mount in inspected["Mounts"] if mount["Destination"] == "/runs"]
    assert volume == installed.name
    send(signal.SIGTERM, control)
    again = until(control, event("summary"), count=2)  # podman starts it once more, as a StatefulSet would
    assert again == summary

    # the next Pod on that volume finds nothing left to do, and needs no sphere for it
    for pod in installed.pods:
        installed.remove(pod)
    installed.play(installed.pods[0])
    assert until(control, event("summary")) == summary
