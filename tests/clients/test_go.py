"""The example client in Go: built, and every command of it run against a real control with real spheres."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from control.client import state_name
from control.sync_client import SyncClient

ROOT = Path(__file__).parents[2]
HOME = ROOT / "examples" / "clients" / "go"
NEEDS = ("go", "protoc", "protoc-gen-go")
#: seconds for one command
PATIENCE = 120

pytestmark = [pytest.mark.clients, pytest.mark.processes, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def program() -> Path:
    missing = [tool for tool in NEEDS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; see examples/clients/go/README.md")
    made = subprocess.run(["make", "-C", str(HOME)], capture_output=True, text=True, timeout=800, check=False)
    assert made.returncode == 0, made.stderr
    return HOME / "build" / "armillary-client"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that goes on until somebody stops it."""
    folder = tmp_path_factory.mktemp("go")
    command = [sys.executable, "-m", "control", "start", "--json", "--spheres", "2", "--steps", "10000000"]
    control = subprocess.Popen(
        [*command, "--run-dir", str(folder / "run"), "--checkpoint-every", "none"],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert control.stdout is not None
    lines = iter(control.stdout)
    drain = threading.Thread(target=lambda: list(lines))  # nobody reads them, and its pipe must not fill up
    try:
        assert any(json.loads(line)["event"] == "step" for line in lines)
        drain.start()
        yield folder / "run"
    finally:
        control.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            control.wait(PATIENCE)
        control.kill()
        control.wait()
        drain.join(PATIENCE)
        control.stdout.close()


@pytest.fixture
def address(run_dir: Path) -> str:
    return (run_dir / "address").read_text().split()[0]


def environment(**more: str) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("ARMILLARY_")} | more


def ask(program: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *words],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def told(program: Path, *words: str, **variables: str) -> str:
    done = ask(program, *words, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_its_own_checks_pass(program: Path) -> None:
    done = subprocess.run(["make", "-C", str(HOME), "check"], capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_vector_and_a_spoilt_one(program: Path, tmp_path: Path) -> None:
    files = sorted(path.name for path in (ROOT / "protos" / "testdata").iterdir())
    lines = told(program, "vectors", str(ROOT / "protos" / "testdata")).splitlines()
    assert [line.partition(": ")[0] for line in lines] == files
    assert all(line.endswith(" checks passed") for line in lines)
    spoilt = Path(shutil.copytree(ROOT / "protos" / "testdata", tmp_path / "data")) / "digests.json"
    spoilt.write_text(spoilt.read_text().replace("e3069283", "e3069284"))
    done = ask(program, "vectors", str(tmp_path / "data"))
    assert (done.returncode, done.stderr) == (1, f"error: 1 of {len(files)} files are wrong\n")
    assert "digests.json: WRONG: CRC-32C of 123456789: e3069283, not e3069284\n" in done.stdout


def test_status_by_flag_and_by_environment(program: Path, address: str) -> None:
    shown = json.loads(told(program, "-control", address, "status", "-json"))
    assert (shown["state"], shown["living_spheres_count"], shown["total_steps"]) == ("RUN_STATE_RUNNING", 2, "10000000")
    text = told(program, "status", ARMILLARY_CONTROL=address)
    assert text.startswith(f"{shown['run_id']}: running, step ")
    assert "\nspheres 2/2\n" in text


def test_spheres(program: Path, address: str) -> None:
    lines = told(program, "-control", address, "spheres").splitlines()
    assert [line.split(" below ")[0] for line in lines] == ["s-1 active", "s-2 active"]
    shown = [json.loads(line) for line in told(program, "-control", address, "spheres", "-json").splitlines()]
    assert [sphere["sphere_id"] for sphere in shown] == ["s-1", "s-2"]


def test_pause_weights_checkpoint_and_resume(program: Path, address: str, run_dir: Path, tmp_path: Path) -> None:
    with SyncClient(address) as client:
        told(program, "-control", address, "pause")  # says how the run is: the step in hand may not be done
        while state_name(client.status()) != "paused":
            pass
        wanted = client.weights()
        file = tmp_path / "w.safetensors"
        said = told(program, "-control", address, "weights", "-o", str(file))
        assert said == f"{file}: weights of version {wanted.version}, sha256 {wanted.sha256}\n"
        found = load_file(file)
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            assert found[name].shape == array.shape
            assert found[name].tobytes() == array.tobytes()
        assert [path.name for path in tmp_path.iterdir()] == [file.name]

        path = Path(told(program, "-control", address, "checkpoint").strip())
        assert path.is_dir()
        (saved,) = client.checkpoints()
        assert (saved.path, saved.weights_sha256) == (str(path), wanted.sha256)

        told(program, "-control", address, "resume")
        assert next(event for event in client.watch() if event.name == "step").record["step"] >= wanted.version


def test_a_file_that_cannot_be_written(program: Path, address: str, tmp_path: Path) -> None:
    done = ask(program, "-control", address, "weights", "-o", str(tmp_path / "nowhere" / "w.safetensors"))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: cannot write {tmp_path}/nowhere/w.safetensors: ")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["-control", "127.0.0.1:1", "status"], 5, "control at 127.0.0.1:1 does not answer; is it running"),
        (["-control", "127.0.0.1:1", "watch"], 5, "control at 127.0.0.1:1 does not answer; is it running"),
        (["-control", "127.0.0.1:1", "weights", "-o", "w"], 5, "control at 127.0.0.1:1 does not answer"),
        (["-control", "localhost", "status"], 2, '"localhost" is no address HOST:PORT'),
        (["status"], 2, "no address: give -control HOST:PORT, or set ARMILLARY_CONTROL"),
        (["-control", "127.0.0.1:1", "weights"], 2, "weights needs -o FILE.safetensors"),
        (["-control", "127.0.0.1:1", "pause", "now"], 2, "pause takes 0 arguments, not 1"),
        (["dance"], 2, 'no command "dance"; try armillary-client -help'),
        (["status", "--yaml"], 2, "flag provided but not defined: -yaml"),
        ([], 2, "no command"),
        (["vectors", "/nowhere"], 2, "cannot read /nowhere; give protos/testdata"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    program: Path, words: list[str], code: int, message: str, tmp_path: Path
) -> None:
    done = ask(program, *words)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def test_help(program: Path) -> None:
    assert told(program, "-help") == told(program, "watch", "-help")
    assert "weights -o FILE" in told(program, "-help")


# ---- docs/clients.md


def commands() -> list[str]:
    page = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    return re.findall(r"^(?:buf|grpcurl|printf) .*127\.0\.0\.1:7070.*$", page, re.MULTILINE)


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.split()[0])
def test_the_commands_of_the_docs_are_answered(address: str, command: str) -> None:
    """Those of them that are installed: buf is a tool of development, grpcurl and curl are the reader's."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    used = [tool for tool in ("buf", "grpcurl", "curl", "xxd") if re.search(rf"(?:^|\| ){tool} ", command)]
    missing = [tool for tool in used if shutil.which(tool, path=path) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command.replace("127.0.0.1:7070", address)],
        env=environment(PATH=path),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    # JSON, or for curl the frame: 0, a length, field 1 of the answer
    assert re.search(r'"run"|"pids"|^00000000: 0000 00.. ..0a', done.stdout), done.stdout


def test_the_docs_show_three_ways() -> None:
    assert [command.split()[0] for command in commands()] == ["buf", "grpcurl", "printf"]


# ---- watch


class CuttableLink:
    """Passes connections on to ``target``, until ``cut`` ends all that are open."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.accepted = 0
        self._begin(self._accept)

    def _begin(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._server.accept()
                try:
                    far = socket.create_connection(self._target)
                except OSError:
                    near.close()
                    raise
                self.accepted += 1
                self._open += [near, far]
                self._begin(self._pump, near, far)
                self._begin(self._pump, far, near)

    def _pump(self, one: socket.socket, other: socket.socket) -> None:
        with one:
            with suppress(OSError):
                while data := one.recv(65536):
                    other.sendall(data)
            shut(one, other)

    def cut(self) -> None:
        shut(*self._open)

    def close(self) -> None:
        shut(self._server)
        self._server.close()
        self._threads[0].join(PATIENCE)
        self.cut()
        for thread in self._threads:
            thread.join(PATIENCE)


def shut(*ends: socket.socket) -> None:
    for end in ends:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def watching(program: Path, address: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(program), "-control", address, "watch", *words],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdout, process.stderr):
        assert pipe is not None
        pipe.close()


def test_ctrl_c_ends_a_watch_without_a_word(program: Path, address: str) -> None:
    watch = watching(program, address)
    try:
        assert watch.stdout is not None
        number, event, record = watch.stdout.readline().split(" ", 2)
        assert int(number) > 0
        assert json.loads(record)["event"] == event
        watch.send_signal(signal.SIGINT)
        _, errors = watch.communicate(timeout=PATIENCE)
    finally:
        end(watch)
    assert (watch.returncode, errors) == (130, "")


# the last of the module: it ends the run
def test_a_watch_goes_on_after_a_cut_link_and_ends_with_the_run(program: Path, address: str) -> None:
    link = CuttableLink(address)
    watch = watching(program, link.address, "-json")
    events: list[dict[str, Any]] = []
    try:
        assert watch.stdout is not None
        cuts, newest = 0, 0
        with SyncClient(address) as client:
            for line in watch.stdout:
                events.append(json.loads(line))
                if len(events) < 5 or events[-1]["event_id"] <= newest:
                    continue
                if cuts < 2:
                    link.cut()
                    cuts += 1
                    newest = next(client.watch()).id  # what is newer can only come over another link
                elif cuts == 2:
                    client.stop("seen enough")
                    cuts += 1
        _, errors = watch.communicate(timeout=PATIENCE)
    finally:
        end(watch)
        link.close()
    assert (watch.returncode, errors) == (0, "")
    numbers = [event["event_id"] for event in events]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))  # nothing lost, nothing twice
    assert link.accepted >= 3
    assert events[-1]["record"]["state"] == "stopped"
