"""The image, built for real: what is in it, a tree of containers that loses one and gets one, signals, and compose."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tests.containers.engine import SECONDS, Container, Engine, podman

ROOT = Path(__file__).parents[2]
BASE_IMAGE = os.environ.get("BASE_IMAGE", "localhost/base-python:3.13")
IMAGE = "localhost/armillary:test"
#: on all that is built here, so that it can be removed
LABEL = "armillary.test=1"
EPOCHS, STEPS = 60, 1380
#: seconds for a build, which fetches all that pip installs, and for a whole run by compose
LONG_SECONDS = 300.0
#: of control and of spheres, as docker/README.md has them
CONTROL = {"ARMILLARY_LISTEN": "0.0.0.0:7070", "ARMILLARY_INSECURE": "true", "ARMILLARY_LOG_FORMAT": "json"}
SPHERE = {**CONTROL, "ARMILLARY_LISTEN": "0.0.0.0:7071", "ARMILLARY_CONTROL": "control:7070"}
TOOLS = "gcc g++ cc c++ cpp ld as ar make cmake pip pip3 git curl wget protoc buf uv hatch ensurepip"


def _missing() -> str:
    if os.geteuid() != 0:
        return "containers need root here"
    if shutil.which("podman") is None:
        return "no podman: docker/without-engine.sh installs it (make test-containers)"
    if BASE_IMAGE.startswith("localhost/") and podman("image", "exists", BASE_IMAGE, check=False).returncode != 0:
        return f"no image {BASE_IMAGE}: docker/without-engine.sh makes it (make test-containers)"
    return ""


pytestmark = [pytest.mark.containers, pytest.mark.processes, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """The image, built now, and a network for its containers."""
    if reason := _missing():
        pytest.skip(f"NO CONTAINERS: {reason}")
    command = [str(ROOT / "docker" / "build.sh"), IMAGE, "--label", LABEL]
    done = subprocess.run(
        command,
        env={**os.environ, "BASE_IMAGE": BASE_IMAGE},
        capture_output=True,
        text=True,
        timeout=LONG_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    with Engine(f"armillary-test-{uuid.uuid4().hex[:8]}", IMAGE) as made:
        yield made
    podman("image", "rm", "--force", IMAGE, check=False)
    podman("image", "prune", "--force", "--filter", f"label={LABEL}", check=False)


@pytest.fixture(scope="module")
def expected(engine: Engine) -> str:
    """The weights of one control and one sphere in one container, without a network: the same image, the same CPU."""
    done = engine.once("control-cli", "start", "--spheres", "1", "--epochs", str(EPOCHS), "--run-dir", "/tmp/run")
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["state"], summary["steps"]) == ("completed", STEPS)
    return str(summary["weights_sha256"])


LOOK = f"""
import importlib.util, json, os, pathlib, shutil
def writable(path):
    try:
        pathlib.Path(path, "written").touch()
    except OSError as error:
        return error.strerror
    return "yes"
print(json.dumps({{
    "uid": os.getuid(), "gid": os.getgid(), "groups": os.getgroups(),
    "tools": [name for name in {TOOLS!r}.split() if shutil.which(name)],
    "modules": [name for name in ("pip", "setuptools", "hatchling", "mypy") if importlib.util.find_spec(name)],
    "caches": [str(path) for path in pathlib.Path("/").glob("root/.cache/*")],
    "writable": {{path: writable(path) for path in ("/", "/app", "/opt/armillary", "/runs", "/tmp", "/usr")}},
    "status": pathlib.Path("/proc/self/status").read_text(),
}}))
"""


def test_the_image_has_no_build_tools_and_runs_read_only_as_somebody_without_rights(engine, capsys):
    seen = json.loads(engine.once("python3", "-c", LOOK, volume=engine.volume("look")).stdout)
    assert (seen["uid"], seen["gid"], seen["groups"]) == (10001, 10001, [10001])
    assert (seen["tools"], seen["modules"], seen["caches"]) == ([], [], [])
    writable = seen["writable"]
    assert {path for path, answer in writable.items() if answer == "yes"} == {"/runs", "/tmp"}
    assert writable["/app"] == "Read-only file system"
    assert "CapEff:\t0000000000000000" in seen["status"]
    assert "NoNewPrivs:\t1" in seen["status"]
    (image,) = json.loads(podman("image", "inspect", IMAGE).stdout)
    assert image["Config"]["User"] == "10001:10001"
    assert image["Config"]["StopSignal"] == "SIGTERM"
    assert "sphere health" in " ".join(image["Healthcheck"]["Test"])
    (base,) = json.loads(podman("image", "inspect", BASE_IMAGE).stdout)
    with capsys.disabled():
        print(f"\n{IMAGE}: {image['Size'] / 1e6:.0f} MB, of which the base {base['Size'] / 1e6:.0f} MB")
    assert image["Size"] - base["Size"] < 150e6


@contextlib.contextmanager
def _paused(control: Container) -> Iterator[None]:
    """The run waits meanwhile, so that it cannot be over before what a test does to it."""
    control.ask("control-cli", "pause", "--address", "127.0.0.1:7070")
    yield
    control.ask("control-cli", "resume", "--address", "127.0.0.1:7070")
    control.until_step(control.step + 30)


def _check_health(container: Container) -> None:
    """Run the image's own check; once more where a busy machine did not even start Python in the 5 s that it has."""
    deadline = time.monotonic() + SECONDS
    while (done := podman("healthcheck", "run", container.name, check=False)).returncode != 0:
        assert time.monotonic() < deadline, done.stdout + done.stderr


def _spheres(control: Container) -> dict[str, dict]:
    listed = json.loads(control.ask("control-cli", "spheres", "--json", "--address", "127.0.0.1:7070"))
    return {sphere["sphere_id"]: sphere for sphere in listed}


def _events(control: Container, name: str, **fields: object) -> list[dict]:
    found = [line for line in list(control.lines) if line.get("event") == name]
    return [line for line in found if all(line.get(key) == value for key, value in fields.items())]


def test_four_containers_lose_one_in_mid_run_get_one_and_drain_one_with_the_same_bits(engine, expected):
    volume = engine.volume("runs")
    settings = {"ARMILLARY_SPHERES": "0", "ARMILLARY_MIN_SPHERES": "4", "ARMILLARY_FAN_OUT": "2", **CONTROL}
    # spheres first: they wait until there is a control, and even a name of one
    spheres = {name: engine.start(name, "sphere", "start", **SPHERE) for name in ("a", "b", "c", "d")}
    spheres["a"].until(lambda line: "looking for control" in line.get("message", ""))
    assert podman("exec", spheres["a"].name, "sphere", "health", "127.0.0.1:7071").stdout.endswith(": SERVING\n")
    unready = podman("exec", spheres["a"].name, "sphere", "health", "--service", "ready", check=False)
    assert (unready.returncode, unready.stdout) == (1, "127.0.0.1:7071 ready: NOT_SERVING\n")
    start = (
        "control-cli",
        "start",
        "--epochs",
        str(EPOCHS),
        "--checkpoint-every",
        "200steps",
        "--log-every",
        "10steps",
    )
    control = engine.start("control", *start, volume=volume, **settings)
    control.until_step(30)

    with _paused(control):
        tree = _spheres(control)
        hosts = {
            podman("inspect", "--format", "{{.Config.Hostname}}", c.name).stdout.strip(): c for c in spheres.values()
        }
        by_id = {name: hosts[sphere["report"]["host"]] for name, sphere in tree.items()}
        assert len({sphere["report"]["address"].rpartition(":")[0] for sphere in tree.values()}) == 4
        parents = {name: sphere["parent_id"] for name, sphere in tree.items()}
        assert sorted(parent == "control" for parent in parents.values()) == [False, False, True, True]  # two levels
        assert {sphere["report"]["wire"] for sphere in tree.values()} == {"inline"}
        for container in (control, *spheres.values()):
            _check_health(container)
            assert "ready: SERVING" in container.ask("sphere", "health", "--service", "ready")

    inner = next(parent for parent in parents.values() if parent != "control")
    podman("kill", "--signal", "KILL", by_id[inner].name)
    assert by_id[inner].wait() == 137
    lost = control.until(lambda line: line.get("event") == "sphere_lost" and line["sphere"] == inner)
    control.until_step(control.step + 30)  # training goes on with three

    with _paused(control):
        new = engine.start("e", "sphere", "start", **SPHERE)
        joined = control.until(lambda line: line.get("event") == "sphere_joined" and line["sphere"] not in tree)[
            "sphere"
        ]
        new.until(lambda line: f"{joined} joins" in line.get("message", ""))
    # and whoever was below the killed one has found another parent
    control.until(lambda line: line.get("event") == "step" and line["step"] > lost["step"] and line["spheres"] == 4)

    drained = next(name for name in parents if name != inner)
    before = by_id[drained]
    podman("stop", "--time", "30", before.name)
    assert before.wait() == 0
    assert any("leaves: a signal" in line.get("message", "") for line in before.lines)

    assert control.wait() == 0
    summary = control.lines[-1]
    assert (summary["event"], summary["state"], summary["steps"]) == ("summary", "completed", STEPS)
    assert summary["weights_sha256"] == expected
    work = {sphere["id"]: sphere.get("samples", 0) for sphere in summary["spheres"]}
    assert work[joined] > 0
    for name, container in by_id.items():
        if name not in (inner, drained):
            assert container.wait() == 0, _last(container)
    assert new.wait() == 0, _last(new)
    _check_logs(control, *spheres.values(), new)
    journal = engine.once("cat", "/runs/latest/journal.jsonl", volume=volume).stdout.splitlines()
    records = [json.loads(line) for line in journal]
    assert [record["step"] for record in records] == list(range(STEPS))
    # It left after its step, and nobody had to do anything again. (Whoever is moved between two steps is lost, too.)
    left = _events(control, "sphere_lost", sphere=drained)[-1]["step"]
    assert left < STEPS
    assert [record["attempts"] for record in records[left : left + 2]] == [0, 0]
    assert "every byte verifies" in engine.once(
        "control-cli", "checkpoint", "verify", f"runs/latest/checkpoints/step-{STEPS:09d}", volume=volume
    ).stdout  # fmt: skip


def _last(container: Container) -> str:
    """What a container has said last, a line each."""
    return "\n".join(json.dumps(line)[:300] for line in container.lines[-12:])


def _check_logs(*containers: Container) -> None:
    """All that containers say is JSON; log lines have time, level and message, and of who is known by then."""
    for container in containers:
        assert container.noise == []
        logs = [line for line in container.lines if "event" not in line]
        for line in logs:
            assert datetime.fromisoformat(line["time"]).utcoffset() == timedelta(0)
            assert line["level"] in ("DEBUG", "INFO", "WARNING", "ERROR")
            assert line["message"]
        warned = [line for line in logs if "with --insecure: nothing is encrypted" in line["message"]]
        assert len(warned) == 1
        assert warned[0]["level"] == "WARNING"
    assert all(line["run_id"] for line in containers[1].lines if "the run is over" in line["message"])


ZOMBIES = """
import pathlib
stats = [path.joinpath("stat").read_text() for path in pathlib.Path("/proc").glob("[0-9]*")]
print([stat for stat in stats if stat.rpartition(")")[2].split()[0] == "Z"])
"""


def test_control_as_the_first_process_reaps_its_spheres_and_stops_in_order(engine, expected):
    """SIGTERM to PID 1: a step, a checkpoint, exit code 143, and another container goes on from there."""
    volume = engine.volume("alone")
    start = ("control-cli", "start", "--spheres", "2", "--epochs", str(EPOCHS), "--log-every", "10steps")
    control = engine.start(
        "alone", *start, volume=volume, ARMILLARY_LISTEN="127.0.0.1:7070", ARMILLARY_LOG_FORMAT="json"
    )
    control.until_step(30)
    with _paused(control):
        pid = next(iter(_spheres(control).values()))["report"]["pid"]
        assert pid != 1
        control.ask("python3", "-c", f"import os; os.kill({pid}, 9)")
        lost = control.until(lambda line: line.get("event") == "sphere_lost")["sphere"]
        control.until(lambda line: line.get("event") == "sphere_joined" and line["sphere"] not in ("s-1", "s-2"))
        assert control.ask("python3", "-c", ZOMBIES) == "[]\n"
    podman("stop", "--time", "30", control.name)
    assert control.wait() == 143
    summary = control.lines[-1]
    assert (summary["event"], summary["state"], summary["reason"]) == ("summary", "stopped", "SIGTERM")
    assert lost in ("s-1", "s-2")
    assert 30 <= summary["steps"] < STEPS
    assert _events(control, "checkpoint", step=summary["steps"], ok=True)
    done = engine.once("control-cli", "start", "--resume", "--spheres", "1", volume=volume)
    assert json.loads(done.stdout.splitlines()[-1])["weights_sha256"] == expected


@contextlib.contextmanager
def _compose(project: str, **environment: str) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Yield what runs podman-compose on the compose file; all that it made is removed."""
    variables = {**os.environ, "IMAGE": IMAGE, "BASE_IMAGE": BASE_IMAGE, **environment}
    compose = [sys.executable, "-m", "podman_compose", "--in-pod", "false", "-p", project]
    compose += ["--podman-build-args", f"--isolation chroot --network host --format docker --label {LABEL}"]
    compose += ["-f", str(ROOT / "docker" / "compose.yaml")]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*compose, *words], env=variables, capture_output=True, text=True, timeout=LONG_SECONDS, check=False
        )

    try:
        yield run
    finally:  # by hand: without systemd, `podman-compose down` stops at the timers of health checks
        podman("rm", "--force", "--depend", "--time", "0", *_names(project), check=False)
        podman("volume", "rm", "--force", f"{project}_runs", check=False)
        podman("network", "rm", "--force", f"{project}_tree", check=False)


def _names(project: str) -> list[str]:
    label = f"label=io.podman.compose.project={project}"
    return podman("ps", "--all", "--filter", label, "--format", "{{.Names}}").stdout.split()


def test_compose_trains_leaves_a_checkpoint_and_ends(engine, expected):
    project = f"{engine.prefix}-compose"
    volume = f"{project}_runs"

    def said() -> dict:
        return json.loads(engine.once("cat", "/runs/run/summary.json", volume=volume).stdout)

    # all five: the run could be over before the last has come
    with _compose(project, EPOCHS=str(EPOCHS), MIN_SPHERES="5") as run:
        built = run("build", "control")
        assert built.returncode == 0, built.stderr[-2000:]
        up = ("up", "--no-build", "--scale", "sphere=5", "--exit-code-from", "control")
        done = run(*up)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        names = _names(project)
        assert len(names) == 6
        shown = podman("inspect", "--format", "{{.HostConfig.ReadonlyRootfs}} {{.State.ExitCode}}", *names)
        assert shown.stdout.splitlines() == ["true 0"] * 6
        summary = said()
        assert (summary["state"], summary["steps"], summary["weights_sha256"]) == ("completed", STEPS, expected)
        assert len(summary["spheres"]) == 5
        above = set(summary["tree"].values())
        assert "control" in above
        assert len(above) > 1  # two levels: somebody is below a sphere
        verified = engine.once(
            "control-cli", "checkpoint", "verify", f"runs/run/checkpoints/step-{STEPS:09d}", volume=volume
        )
        assert "every byte verifies" in verified.stdout
        # once more: nothing is left to do, and nothing is done
        again = run(*up)
        assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
        assert said() == summary


def test_compose_after_a_kill_of_control_the_run_goes_on(engine):
    project = f"{engine.prefix}-killed"
    with _compose(project, EPOCHS=str(EPOCHS), MIN_SPHERES="2") as run:
        done = run("up", "--no-build", "--detach", "--scale", "sphere=2")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        (name,) = [name for name in _names(project) if "control" in name]
        with contextlib.closing(Container(name)) as first:
            pid = int(podman("inspect", "--format", "{{.State.Pid}}", name).stdout)
            assert pid > 1  # 0 where it has ended: that would kill these tests
            first.until_step(50)
            os.kill(pid, signal.SIGKILL)
            first.until_end()
            assert not _events(first, "summary")  # the run was not over
            started = run("start", "control")
            assert started.returncode == 0, started.stderr[-2000:]
            second = Container(name)
            assert second.until(lambda line: line.get("event") == "summary")["steps"] == STEPS
            spheres = [other for other in _names(project) if other != name]
            codes = podman("wait", *spheres).stdout.split()
            assert (second.wait(), codes) == (0, ["0", "0"])
            second.close()
