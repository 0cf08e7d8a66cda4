"""The commands as a stranger uses them: real processes, with a timeout each, in a folder of their own.

Starting Python and importing is most of what a command takes. So most of them are forks of two processes that have
imported already; what is said of starting fast is measured on fresh ones.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import queue
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import control.cli
import control.cli.output
import spheres.cli
from control.client import Client, state_name
from control.run_dir import find

SECONDS = 100.0

#: of a fixture of the whole module too: it starts some forty commands
pytestmark = [pytest.mark.processes, pytest.mark.timeout(SECONDS + 60)]

#: in the environment of every process that is started here, so that none is overlooked
MARK = f"MARK_{uuid.uuid4().hex}"

TASKS = {
    "raises_on_import.py": "def prepare():\n    raise ValueError('no prepared data')\nprepare()\n",
    "good.py": """
import numpy as np
from spheres.task import Sums
class Task:
    def __init__(self, bias=0):
        self.bias = int(bias)
    def init_weights(self, rng): return {"w": rng.standard_normal(4, dtype=np.float32)}
    def size(self, split): return {"train": 40, "test": 8}[split]
    def gradient(self, weights, samples, rng, out):
        out["w"] += weights["w"] * np.float32(len(samples)) + np.float32(self.bias)
        return Sums(1.0, len(samples), {"accuracy": 0.0})
    def evaluate(self, weights, samples): return Sums(1.0, len(samples), {"accuracy": 0.0})
""",
    "by_process.py": """
import os, sys
import numpy as np
import good
class Task(good.Task):
    def gradient(self, weights, samples, rng, out):
        print("what a task prints is in nobody's way")
        out["w"][2] += np.float32(os.getpid())
        return super().gradient(weights, samples, rng, out)
class Dies(good.Task):
    def gradient(self, weights, samples, rng, out):
        if sys.argv[0] == "-c":
            os._exit(9)
        return super().gradient(weights, samples, rng, out)
""",
    "raises.py": """
import good
class Gradient(good.Task):
    def gradient(self, weights, samples, rng, out):
        raise ZeroDivisionError("no such luck")
class Init(good.Task):
    def init_weights(self, rng):
        raise ZeroDivisionError("no such weights")
class Size(good.Task):
    def size(self, split):
        raise ZeroDivisionError("no such split")
""",
}


@dataclass
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str
    #: what is in its folder that was not there before
    left: list[str] = field(default_factory=list)

    @property
    def error(self) -> str:
        """The one line that it said on standard error."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), self.err
        return lines[0].removeprefix("error: ")


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ARMILLARY_", "GRPC_"))}
    return {**kept, "MARK": MARK, "COLUMNS": "80", "PYTHONDONTWRITEBYTECODE": "1", **more}


def command(*words: str) -> list[str]:
    module = {"control-cli": "control", "sphere": "spheres"}.get(words[0])
    return [sys.executable, "-m", module, *words[1:]] if module else [sys.executable, "-m", "control", *words]


def fresh(folder: Path, *words: str, **more: str) -> Done:
    """Run a command from nothing."""
    done = subprocess.run(
        command(*words),
        cwd=folder,
        env=environment(**more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


FORKS = """
import gc, json, os, sys
import numpy
import control.cli, spheres.cli, control.client, control.training, control.doctor, spheres.sphere
from control.config_sources import load_config
load_config({}, {})
gc.freeze()
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.chdir(order["folder"])
        os.environ.clear()
        os.environ.update(order["environment"])
        files = [os.devnull, order["out"], order["err"]]
        for number, path in enumerate(files):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = order["words"]
        try:
            (spheres.cli if sys.argv[0] == "sphere" else control.cli).main()
        except SystemExit as end:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code)  # what else Python does at its end takes longer than the command
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forks:
    """Processes that have imported what commands need, and fork for each command."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.free: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()
        self.pids: set[int] = set()
        for _ in range(2):
            process = subprocess.Popen(
                [sys.executable, "-c", FORKS],
                cwd=folder,
                env=environment(GRPC_VERBOSITY="NONE"),  # too late for the commands: it has been imported
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self.pids.add(process.pid)
            self.free.put(process)

    def ask(self, folder: Path, *words: str, **more: str) -> Done:
        """Run a command of control-cli (or of sphere, by its name) in a folder."""
        process = self.free.get(timeout=SECONDS)
        before = {path.name for path in folder.iterdir()}
        out, err = (self.folder / f"{process.pid}.{name}" for name in ("out", "err"))
        order = {"folder": str(folder), "environment": environment(**more), "out": str(out), "err": str(err)}
        order["words"] = list(words if words[0] in ("control-cli", "sphere") else ("control-cli", *words))
        limit = threading.Timer(SECONDS, process.kill)
        limit.start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            code = process.stdout.readline().strip()
            assert code, f"{words} did not end within {SECONDS} s: {err.read_text()}"
            left = sorted({path.name for path in folder.iterdir()} - before)
            return Done(int(code), out.read_text(), err.read_text(), left)
        finally:
            limit.cancel()
            self.free.put(process)

    def close(self) -> None:
        for _ in self.pids:
            process = self.free.get(timeout=SECONDS)
            process.communicate(timeout=SECONDS)


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


Ask = Callable[..., Done]


@pytest.fixture
def ask(forks: Forks, folder: Path) -> Ask:
    return functools.partial(forks.ask, folder)


def processes(forks: Forks) -> list[str]:
    """Return the command lines of the processes that were started here and live, but for the forks' origins."""
    found = []
    for entry in Path("/proc").glob("*"):  # where there is none, none is found
        if entry.name.isdecimal() and int(entry.name) not in {os.getpid(), *forks.pids}:
            try:
                if f"MARK={MARK}".encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli")
    for name, source in TASKS.items():
        (path / name).write_text(source)
    (path / "unknown.toml").write_text("batchsize = 3\n")
    (path / "bad.toml").write_text("batch_size = \n")
    (path / "good.toml").write_text("batch_size = 8\nseed = 3\nkeep = 4\n")
    (path / "file").write_text("")
    for name, text in {"torn": '{"run_id": "r-1", "te', "keyless": '{"run_id": "r-1", "term": 1}'}.items():
        (path / name).mkdir()
        (path / name / "run.json").write_text(text)
    return path


@pytest.fixture(scope="module")
def run_dir(folder: Path) -> Path:
    """A run that has ended."""
    done = fresh(folder, "start", "--task", "good:Task", "--spheres", "1", "--steps", "4", "--batch-size", "8",
               "--run-dir", "ended", "--checkpoint-every", "2steps")  # fmt: skip
    assert done.code == 0, done.err
    cut = folder / "cut" / "checkpoints" / "step-000000004"
    shutil.copytree(folder / "ended" / "checkpoints" / "step-000000004", cut)
    weights = next(path for path in cut.iterdir() if path.name.startswith("control"))
    weights.write_bytes(weights.read_bytes()[:-7])
    assert [json.loads(line)["event"] for line in done.out.splitlines()][-1] == "summary"  # nobody looks: JSON lines
    return folder / "ended"


@pytest.fixture(scope="module")
def taken() -> Iterator[str]:
    """An address that somebody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


# --- what ends at once ------------------------------------------------------------------------------------------------

#: name -> words, exit code, what the one line on standard error says
WRONG: dict[str, tuple[str, int, str]] = {
    "flag": ("start --batchsize 3", 2, r"No such option: --batchsize \(Possible .*: --batch-size.*`control-cli start"),
    "command": ("stauts", 2, r"No such command 'stauts'\. Did you mean 'status'"),
    "top flag": ("--bogus", 2, "No such option: --bogus; see `control-cli --help`"),
    "no value": ("start --seed", 2, "Option '--seed' requires an argument"),
    "variable": ("start", 2, r"unknown key batchsize \(ARMILLARY_BATCHSIZE\): did you mean batch_size\?"),
    "file key": ("start --config unknown.toml", 2, r"unknown key batchsize \(unknown\.toml\): did you mean batch"),
    "file": ("start --config bad.toml", 2, r"configuration file bad\.toml: no valid TOML: "),
    "no file": ("start --config none.toml", 2, r"configuration file none\.toml: No such file"),
    "range": ("start --microbatches 0", 2, r"microbatches = 0 \(--microbatches\): allowed: a whole number from 1 to"),
    "two totals": ("start --epochs 1 --steps 2", 2, r"steps = 2 \(--steps\): give either steps or epochs, not both"),
    "beyond loopback": ("start --listen 0.0.0.0:0", 2, r"beyond loopback needs insecure \(--insecure\)"),
    "task": ("start --task digit", 3, r"unknown task 'digit': did you mean digits\?"),
    "module": ("start --task no_such_thing:T", 3, "no module named 'no_such_thing'; run from the folder"),
    "attribute": ("start --task good:Tsk", 3, r"module good has no 'Tsk'; did you mean Task\?"),
    "option": ("start --task good:Task --task-option bais=1", 2, "unexpected keyword argument 'bais'; it takes bias"),
    "import": ("start --task raises_on_import:T", 3, r"ValueError: no prepared data \(raises_on_import\.py, line 2\)"),
    "data": ("start --task fashion-mnist", 3, "no train-images.* in nowhere; install Debian's package dataset-fashion"),
    "init": ("start --task raises:Init", 3, r"init_weights\(\) raised ZeroDivisionError: no such weights"),
    "size": ("start --task raises:Size", 3, r"size\(\) raised ZeroDivisionError: no such split"),
    "port": ("start --task good:Task --listen {taken} --run-dir port", 2, "cannot listen on {taken}: the port"),
    "directory": ("start --task good:Task --run-dir file/run", 2, "cannot make the run directory"),
    "other run": ("start --task good:Task --run-dir ended", 2, "ended holds a run already; go on with --resume"),
    "no run": ("status", 2, "no run.* at runs/latest; give --address HOST:PORT or --run-dir DIR"),
    "ended": ("status --run-dir ended", 5, "the run in ended is completed; nothing listens there"),
    "dead": ("status --address 127.0.0.1:1", 5, "control at 127.0.0.1:1 does not answer; is it running, and is the"),
    "dead watch": ("watch --after 5 --address 127.0.0.1:1", 5, "control at 127.0.0.1:1 does not answer"),
    "resume nothing": ("start --resume", 2, "no run to resume at runs/latest; give --run-dir DIR or --resume PATH"),
    "resume seed": ("start --resume --run-dir ended --seed 3", 2, "cannot resume: seed is 3 now and was 0"),
    "resume batch": ("start --resume ended --batch-size 9", 2, "cannot resume: batch_size is 9 now and was 8"),
    "resume path": ("start --resume nowhere/step-000000001", 4, r"manifest\.pb is missing"),
    "resume cut": ("start --resume torn", 2, r"torn/run\.json is broken: put back a copy, or start anew in another"),
    "resume keys": ("start --resume auto --run-dir keyless", 2, r"keyless/run\.json is broken: put back a copy"),
    "inspect": ("checkpoint inspect nowhere", 4, r"nowhere: manifest\.pb is missing: no checkpoint is here"),
    "inspect cut": ("checkpoint inspect cut/checkpoints/step-000000004", 4, "step-000000004: control.pb"),
    "verify": ("checkpoint verify cut/checkpoints/step-000000004", 4, "does not verify: control.pb"),
    "sphere flag": ("sphere start --control 127.0.0.1:1 --bogus", 2, "unrecognized arguments: --bogus; see `sphere"),
    "sphere nothing": ("sphere start", 2, "the following arguments are required: --control; see `sphere start --help`"),
    "sphere address": ("sphere start --control nonsense", 2, "'nonsense' is no address; give HOST:PORT"),
}  # fmt: skip
#: leave nothing behind but what is allowed
VARIABLES = {"variable": {"ARMILLARY_BATCHSIZE": "3"}, "data": {"ARMILLARY_DATA": "nowhere"}}
#: run with --json and with -v too
AGAIN = ("flag", "import", "dead")


@pytest.fixture(scope="module")
def answers(forks: Forks, folder: Path, run_dir: Path, taken: str) -> dict[str, Done]:
    ask = functools.partial(forks.ask, folder)

    def answer(case: tuple[str, str]) -> tuple[str, Done]:
        name, words = case
        return name, ask(*words.format(taken=taken).split(), **VARIABLES.get(name, {}))

    cases = [(name, words) for name, (words, _, _) in WRONG.items()]
    cases += [(f"{name} {more}", f"{WRONG[name][0]} {more}") for name in AGAIN for more in ("--json", "-v")]
    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(answer, cases))


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_one_line_and_an_exit_code(answers: dict[str, Done], taken: str, name: str) -> None:
    done, (_, code, message) = answers[name], WRONG[name]
    message = message.replace("{taken}", taken.replace(".", r"\."))
    assert (done.code, bool(re.search(message, done.error))) == (code, True), done
    assert "Traceback" not in done.err
    assert done.out == ""


def test_bad_input_leaves_nothing_behind(answers: dict[str, Done], forks: Forks, folder: Path) -> None:
    # two commands run at a time: one may see what the other has made and then removed
    left = {name: [word for word in done.left if (folder / word).exists()] for name, done in answers.items()}
    assert {name: words for name, words in left.items() if words} == {}
    assert processes(forks) == []


@pytest.mark.parametrize("name", AGAIN)
def test_errors_are_json_where_that_was_asked_for(answers: dict[str, Done], name: str) -> None:
    done = answers[f"{name} --json"]
    record = json.loads(done.err)
    assert record["error"] == answers[name].error
    assert (record["exit_code"], done.code) == (WRONG[name][1], WRONG[name][1])
    assert record["type"].endswith(("Error", "Option"))


@pytest.mark.parametrize("name", AGAIN)
def test_with_v_there_is_a_traceback(answers: dict[str, Done], name: str) -> None:
    done = answers[f"{name} -v"]
    assert done.code == WRONG[name][1]
    assert f"error: {answers[name].error}" in done.err
    assert "Traceback (most recent call last)" in done.err
    assert name != "import" or "in prepare\n" in done.err


def test_a_port_in_use_is_one_line_of_our_own_and_leaves_nothing(folder: Path, taken: str) -> None:
    before = set(folder.iterdir())
    done = fresh(folder, "start", "--task", "good:Task", "--listen", taken)
    assert done.code == 2
    assert done.error.startswith(f"cannot listen on {taken}: the port is in use")
    assert set(folder.iterdir()) == before


def test_a_group_without_a_command_shows_its_help(ask: Ask) -> None:
    done = ask("checkpoint")
    assert (done.code, done.out) == (2, "")
    assert "Commands:" in done.err


# --- a sphere alone ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:1", "control at {} does not answer; is it running"),
        ("no-such-host.invalid:7000", "no way to {}: "),
    ],
)
def test_a_sphere_that_finds_no_control_says_where_it_looked(ask: Ask, address: str, said: str) -> None:
    done = ask("sphere", "start", "--control", address, "--orphan-timeout", "300ms")
    assert f"looking for control at {address}, for up to 0.3 s" in done.out
    assert len(done.out.splitlines()) == 1
    assert done.error.startswith(said.format(address))
    assert done.error.endswith("(tried for 0.3 s)")
    assert done.code == 5


def test_a_sphere_whose_port_is_in_use(ask: Ask, taken: str) -> None:
    done = ask("sphere", "start", "--control", "127.0.0.1:1", "--listen", taken)
    assert done.code == 2
    assert done.error.startswith(f"cannot listen on {taken}: the port is in use")
    assert len(done.out.splitlines()) == 1


def test_a_sphere_that_is_told_to_go_while_it_looks_for_control_has_done_nothing_wrong(folder: Path) -> None:
    with subprocess.Popen(
        command("sphere", "start", "--control", "127.0.0.1:1"),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as sphere:
        assert sphere.stdout is not None
        assert "looking for control" in sphere.stdout.readline()
        sphere.terminate()
        assert sphere.wait(SECONDS) == 0
        (said,) = sphere.stdout.read().splitlines()
        assert said.endswith("a signal before this sphere takes part: it ends")


def test_a_sphere_reads_its_environment_and_refuses_to_be_seen(ask: Ask) -> None:
    done = ask("sphere", "start", ARMILLARY_LISTEN="0.0.0.0:0", ARMILLARY_CONTROL="127.0.0.1:1")
    assert done.code == 2
    assert done.error == "--listen 0.0.0.0:0 is beyond loopback: nothing is encrypted; add --insecure"


def test_a_sphere_that_is_allowed_to_be_seen_says_so_once(ask: Ask) -> None:
    everything = {
        "ARMILLARY_CONTROL": "127.0.0.1:1", "ARMILLARY_LISTEN": "0.0.0.0:0", "ARMILLARY_INSECURE": "true",
        "ARMILLARY_ORPHAN_TIMEOUT": "300ms", "ARMILLARY_LOG_FORMAT": "json",
    }  # fmt: skip
    done = ask("sphere", "start", **everything)
    assert (done.code, done.err) == (5, "")
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [line["level"] for line in lines] == ["WARNING", "INFO", "ERROR"]
    assert "listening on 0.0.0.0:0 with --insecure: nothing is encrypted" in lines[0]["message"]
    assert "does not answer; is it running" in lines[-1]["message"]
    for line in lines:
        assert datetime.fromisoformat(line["time"]).tzinfo == UTC
        assert line.keys() == {"time", "level", "logger", "message"}


@pytest.mark.parametrize("words", [("start",), ("sphere", "start", "--control", "127.0.0.1:1")])
def test_a_log_format_that_does_not_exist(ask: Ask, words: tuple[str, ...]) -> None:
    done = ask(*words, "--log-format", "xml")
    assert done.code == 2
    assert done.error == "log format 'xml' (--log-format or ARMILLARY_LOG_FORMAT): allowed: text or json"


@pytest.mark.parametrize(
    ("words", "more", "said"),
    [
        (("start",), {"ARMILLARY_LOG_FORMAT": "json"}, "the following arguments are required: --control"),
        (("start", "--control", "h:1", "--orphan-timeout", "x", "--log-format", "json"), {}, "a duration is a number"),
        (
            ("start", "--control", "h:1", "--orphan-timeout", "nan", "--log-format", "json"),
            {},
            "a duration is a number",
        ),
        (("start", "--log-format=json"), {"ARMILLARY_CONTROL": "nonsense"}, "'nonsense' is no address"),
    ],
)
def test_wrong_flags_of_a_sphere_are_a_line_of_its_log_where_that_is_json(
    ask: Ask, words: tuple[str, ...], more: dict[str, str], said: str
) -> None:
    done = ask("sphere", *words, **more)
    (line,) = [json.loads(line) for line in done.out.splitlines()]
    assert (line["level"], done.code, done.err) == ("ERROR", 2, "")
    assert said in line["message"]
    assert line["message"].endswith("see `sphere start --help`")


def test_errors_of_control_are_json_where_its_log_is(ask: Ask) -> None:
    done = ask("start", "--spheres", "-1", ARMILLARY_LOG_FORMAT="json")
    assert (json.loads(done.err)["type"], done.code) == ("ConfigError", 2)


def test_health_of_nobody(ask: Ask) -> None:
    for words, more in ((("127.0.0.1:1",), {}), ((), {"ARMILLARY_LISTEN": "0.0.0.0:1"})):
        done = ask("sphere", "health", *words, "--timeout", "2s", **more)
        assert (done.code, done.err) == (1, "")
        assert done.out.startswith("127.0.0.1:1: nobody answers (")
        assert len(done.out.splitlines()) == 1
    assert ask("sphere", "health").code == 2


# --- help and versions ------------------------------------------------------------------------------------------------

COMMANDS = (
    "", "start", "doctor", "replay", "status", "watch", "spheres", "pause", "resume", "stop", "config", "config show",
    "spawn", "drain", "terminate", "rebalance", "logs", "chaos", "conformance",
    "checkpoint", "checkpoint create", "checkpoint list", "checkpoint restore", "checkpoint inspect",
    "checkpoint verify", "checkpoint diff", "checkpoint export", "sphere", "sphere start",
)  # fmt: skip

#: prints after the help what was imported for it
HELP = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    heavy = {"numpy", "grpc", "google.protobuf", "uvloop", "rich", "asyncio"} & sys.modules.keys()
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(used.ru_utime + used.ru_stime, *sorted(heavy), file=sys.stderr)
"""


def started_help(folder: Path, words: str) -> tuple[float, set[str]]:
    """Return the CPU seconds of --help in a fresh process, and which heavy modules were imported for it."""
    _, _, module, *rest = command(*words.split())
    done = subprocess.run(
        [sys.executable, "-c", HELP, module, *rest, "--help"],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    seconds, *heavy = done.stderr.split()
    return float(seconds), set(heavy)


@pytest.mark.parametrize(
    "words", ["control-cli", "control-cli start", "control-cli checkpoint restore", "sphere start"]
)
def test_help_waits_for_no_library(folder: Path, words: str) -> None:
    seconds, heavy = started_help(folder, words)
    assert heavy <= ({"asyncio"} if words.startswith("sphere") else set())
    for _ in range(3):  # other people's work on this machine costs us time too
        if seconds >= 0.6:
            seconds = min(seconds, started_help(folder, words)[0])
    assert seconds < 0.6


def help_of(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    if words.startswith("sphere") and words != "spheres":
        with pytest.raises(SystemExit, match=r"^0$"):
            spheres.cli.main([*words.split()[1:], "--help"])
    else:
        assert control.cli.output.run(control.cli.app, [*words.split(), "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


@pytest.mark.parametrize("words", COMMANDS)
def test_help_fits_and_says_what_the_exit_codes_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = help_of(words, capsys)
    assert max(map(len, out.splitlines())) <= 80
    assert "usage:" in out.lower()
    assert "exit codes: 0" in out.lower()


@pytest.mark.parametrize("group", ["", "config", "checkpoint"])
def test_every_command_is_in_the_list_above(capsys: pytest.CaptureFixture[str], group: str) -> None:
    listed = re.findall(r"^  ([a-z]+) {2,}", help_of(group, capsys).partition("Commands:")[2], re.MULTILINE)
    assert listed
    assert {f"{group} {name}".strip() for name in listed} <= set(COMMANDS)


def test_versions(folder: Path) -> None:
    for name in ("control-cli", "sphere"):
        done = fresh(folder, name, "--version")
        assert (done.code, done.err) == (0, "")
        assert re.fullmatch(rf"{name} \d+\.\d+\.\d+\S*\n", done.out)


# --- configuration and doctor -----------------------------------------------------------------------------------------


def test_a_flag_goes_before_the_environment_before_the_file_before_the_default(ask: Ask) -> None:
    words = ["config", "show", "--config", "good.toml", "--batch-size", "16"]
    variables = {"ARMILLARY_BATCH_SIZE": "32", "ARMILLARY_SEED": "5", "ARMILLARY_DATA": "is the tasks' own"}
    found = json.loads(ask(*words, "--json", **variables).out)
    assert {key: (found[key]["value"], found[key]["source"]) for key in ("batch_size", "seed", "keep", "fan_out")} == {
        "batch_size": (16, "flag"), "seed": (5, "environment"), "keep": (4, "file"), "fan_out": (12, "default"),
    }  # fmt: skip
    shown = [line.split() for line in ask(*words, **variables).out.splitlines()]
    assert ["batch_size", "16", "--batch-size"] in shown
    assert ["seed", "5", "ARMILLARY_SEED"] in shown
    assert ["keep", "4", "good.toml"] in shown


def test_doctor_of_a_task_in_the_current_folder(folder: Path) -> None:
    done = fresh(folder, "doctor", "--task", "good:Task", "--spheres", "2", "--batch-size", "8")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert {line.split()[0] for line in lines[:-1]} == {"ok"}
    text = " ".join(done.out.split())
    for expected in (
        "ok port 127.0.0.1:0 can be listened on", "ok gradient repeats the second time the same bits",
        "ok new task object from a new task object the same bits", "ok new process in a new process the same bits",
        "ok memory control ", "ok wire a step sends", "runs can be written", "ok disk up to 5 checkpoints",
    ):  # fmt: skip
        assert expected in text
    assert lines[-1] == "17 ok"


def test_doctor_finds_what_differs_from_process_to_process(ask: Ask) -> None:
    done = ask("doctor", "--task", "by_process:Task", "--json")
    assert done.code == 3
    found = json.loads(done.out)
    assert (found["ok"], found["exit_code"]) == (False, 3)
    (failed,) = [check for check in found["checks"] if check["state"] == "failed"]
    assert failed["check"] == "new process"
    assert "in a new process the gradient has other bits ('w' differs in 1 of 4 elements, by up to" in failed["message"]


def test_doctor_survives_a_process_that_does_not(ask: Ask) -> None:
    done = ask("doctor", "--task", "by_process:Dies")
    assert done.code == 3
    assert "in a new process it failed: it ended with code 9 and no gradient" in done.out
    assert done.error == "not fit for a run: new process; -v shows tracebacks"


def test_doctor_says_what_is_wrong_and_goes_on(ask: Ask, taken: str) -> None:
    done = ask("doctor", "--task", "raises_on_import:T", "--listen", taken, "--run-dir", "file/run", "-v")
    assert (done.code, done.left) == (3, [])
    for check, message in (
        ("port", f"cannot listen on {taken}: Address already in use; give another --listen"),
        ("task", "task 'raises_on_import:T' cannot be imported: ValueError: no prepared data"),
        ("run directory", "cannot be written"),
    ):
        assert re.search(rf"^failed +{check} +.*{re.escape(message)}", done.out, re.MULTILINE)
    assert "in prepare\n" in done.out
    assert done.error == "not fit for a run: port, task, run directory"
    assert ask("doctor", "--listen", taken).code == 2


# --- a run ------------------------------------------------------------------------------------------------------------


class Live:
    """A run that goes on until it is told to stop."""

    def __init__(self, forks: Forks, folder: Path, *words: str) -> None:
        self.forks, self.folder = forks, folder
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            command("start", *words), cwd=folder, env=environment(), text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.lines: list[str] = []
        for line in self.process.stdout:  # ends where the process does
            self.lines.append(line)
            if '"train_start"' in line:
                break

    def ask(self, *words: str) -> Done:
        return self.forks.ask(self.folder, *words, "--run-dir", "live")

    def json(self, *words: str) -> Any:
        done = self.ask(*words, "--json")
        assert done.code == 0, done.err
        return json.loads(done.out)

    def finish(self) -> tuple[int, list[dict[str, Any]], str]:
        out, err = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, [json.loads(line) for line in [*self.lines, *out.splitlines()]], err


@pytest.fixture(scope="module")
def live(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("live")
    live = Live(
        forks, folder, "--spheres", "2", "--epochs", "100000", "--run-dir", "live", "--checkpoint-every", "none"
    )
    try:
        yield live
    finally:
        if live.process.poll() is None:
            live.process.send_signal(signal.SIGTERM)
            live.process.communicate(timeout=SECONDS)
    assert processes(forks) == []


def wait_for(run: Any, live: Live, reached: Callable[[Any], bool]) -> Any:
    """Return the run once it is so, a step later at most."""

    async def ask() -> Any:
        async with Client(find(None, live.folder / "live")) as client:
            while not reached(found := await client.status()):
                pass
            return found

    return run(ask(), timeout=SECONDS)


def test_questions_to_a_run(live: Live) -> None:
    with ThreadPoolExecutor(2) as pool:
        texts = [pool.submit(live.ask, name) for name in ("status", "spheres")]
        values = [pool.submit(live.json, name) for name in ("status", "spheres")]
    status, tree = (done.result().out for done in texts)
    record, spheres = (done.result() for done in values)
    assert re.search(r"^state +running$", status, re.MULTILINE)
    assert re.search(r"^spheres +2/2$", status, re.MULTILINE)
    assert record["state"] == "running"
    assert (record["config"]["spheres"], record["total_steps"], record["living_spheres_count"]) == (2, 2_300_000, 2)
    assert record["run_dir"] == str(live.folder / "live")
    assert tree.splitlines()[0].split() == ["control"]
    assert [line.split()[1] for line in tree.splitlines()[1:]] == ["s-1", "s-2"]
    assert [sphere["sphere_id"] for sphere in spheres] == ["s-1", "s-2"]
    assert {sphere["state"] for sphere in spheres} == {"active"}


def test_a_watch_is_taken_up_where_it_was_left(live: Live) -> None:
    def first(count: int, *words: str) -> list[dict[str, Any]]:
        with subprocess.Popen(
            command("watch", "--all", "--run-dir", "live", *words),
            cwd=live.folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as watch:
            assert watch.stdout is not None
            lines = [line for _, line in zip(range(count), watch.stdout, strict=False)]
            watch.terminate()
            _, err = watch.communicate(timeout=SECONDS)
        assert len(lines) == count, err
        return [json.loads(line) for line in lines]

    seen = first(3)
    numbers = [event["event_id"] for event in seen]
    assert numbers == list(range(numbers[0], numbers[0] + 3))
    assert numbers[0] // 1_000_000_000 == live.json("status")["term"]
    assert "step" in {event["event"] for event in seen}
    assert first(2, "--json", "--after", str(numbers[0])) == seen[1:]


@pytest.fixture
def watch(live: Live) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command("watch", "--run-dir", "live"), cwd=live.folder, env=environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.terminate()


def test_pause_save_restore_resume_stop(live: Live, watch: subprocess.Popen[str], run: Any) -> None:
    assert watch.stdout is not None
    began, first = time.monotonic(), watch.stdout.readline()

    assert live.json("pause")["run_id"]
    paused = wait_for(run, live, lambda found: state_name(found) == "paused").step
    assert re.search(r"^state +paused$", live.ask("pause").out, re.MULTILINE)  # once more is no error

    saved = live.json("checkpoint", "create")
    assert (saved["name"], saved["step"]) == (f"step-{paused:09d}", paused)
    with ThreadPoolExecutor(2) as pool:
        created = pool.submit(live.ask, "checkpoint", "create").result()
        values, table = pool.submit(live.json, "checkpoint", "list"), pool.submit(live.ask, "checkpoint", "list")
        missing = pool.submit(live.ask, "checkpoint", "restore", "step-000000000")
    assert created.out.strip().endswith(f"checkpoints/step-{paused:09d}")
    assert [entry["name"] for entry in values.result()] == [saved["name"]]
    assert table.result().out.splitlines()[1].split()[:2] == [saved["name"], f"{paused:,}"]
    assert (missing.result().code, missing.result().error.partition(";")[2]) == (4, f" there are {saved['name']}")

    restored = live.json("checkpoint", "restore", saved["name"])
    assert (restored["step"], restored["state"], restored["term"]) == (paused, "paused", 2)
    assert re.search(rf"^step +{paused:,}/", live.ask("checkpoint", "restore").out, re.MULTILINE)
    assert live.json("status")["step"] == paused  # no step while paused

    live.ask("resume")
    wait_for(run, live, lambda found: found.step > paused)
    assert live.json("resume")["state"] == "running"

    stopping = live.ask("stop", "--reason", "seen enough")
    assert stopping.code == 0
    events, _ = watch.communicate(timeout=SECONDS)
    lines = [json.loads(line) for line in [first, *events.splitlines()]]
    assert watch.returncode == 0
    states = [line["state"] for line in lines if line["event"] == "state"]
    between = ("checkpointing", "restoring")
    assert [state for state, _ in itertools.groupby(state for state in states if state not in between)] == [
        "paused", "running", "stopped",
    ]  # fmt: skip
    steps = [line["step"] for line in lines if line["event"] == "step"]
    assert len(steps) <= 10 * (time.monotonic() - began) + 2
    assert any(after - before > 1 for before, after in itertools.pairwise(steps))  # left out, not too slow for more

    code, lines, err = live.finish()
    assert code == 0
    assert "Traceback" not in err
    shown = [line["step"] for line in lines if line["event"] == "step"]
    assert len(shown) <= 10 * (time.monotonic() - live.began) + 2
    assert any(after - before > 1 for before, after in itertools.pairwise(shown))
    summary = lines[-1]
    assert (summary["event"], summary["state"], summary["reason"]) == ("summary", "stopped", "seen enough")
    assert (summary["steps"], summary["error"]) == (shown[-1], None)
    assert (
        json.loads((live.folder / "live" / "summary.json").read_text())["weights_sha256"] == summary["weights_sha256"]
    )
    assert live.ask("status").error == "the run in live is stopped; nothing listens there"
    path = str(live.folder / "live" / "checkpoints" / f"step-{shown[-1]:09d}")
    assert live.forks.ask(live.folder, "checkpoint", "verify", path).code == 0


def test_what_a_task_raises_in_a_step_is_told_with_its_traceback(ask: Ask, forks: Forks) -> None:
    done = ask("start", "--task", "raises:Gradient", "--spheres", "2", "--batch-size", "8", "--run-dir", "failed")
    assert done.code == 3
    first = next(line for line in done.err.splitlines() if line.startswith("error"))
    assert re.match(
        r"error: task failed on s-\d (and before that on s-\d )?in step 0, microbatch \d+ \(samples .*\): ZeroDivision",
        first,
    )
    assert 'raise ZeroDivisionError("no such luck")' in done.err.partition(first)[2]
    assert json.loads(done.out.splitlines()[-1])["state"] == "error"
    assert processes(forks) == []


def test_checkpoints_are_compared_and_exported(ask: Ask, folder: Path) -> None:
    path = "ended/checkpoints/step-000000004"
    assert ask("checkpoint", "diff", path, path).out == "equal: training goes on from both to the same bits\n"
    words = ("checkpoint", "diff", "ended/checkpoints/step-000000002", path)
    differ = ask(*words)
    assert differ.code == 1
    assert "\nw: 4 of 4 elements differ, by at most " in differ.out
    found = json.loads(ask(*words, "--json").out)
    assert (found["equal"], found["tensors"][0]["name"]) == (False, "w")
    assert ask("checkpoint", "export", path, "out.safetensors").out == "out.safetensors\n"
    again = ask("checkpoint", "export", path, "out.safetensors")
    assert (again.code, "--force" in again.err) == (2, True)
    assert json.loads(ask("checkpoint", "export", path, "out.safetensors", "--force", "--json").out)["step"] == 4
    (folder / "out.safetensors").unlink()


def test_checkpoints_are_looked_at_without_a_run(ask: Ask, run_dir: Path) -> None:
    path = str(run_dir / "checkpoints" / "step-000000004")
    text, values, verified, verdict = (
        ask("checkpoint", *words)
        for words in (("inspect", path), ("inspect", path, "--json"), ("verify", path), ("verify", path, "--json"))
    )
    assert re.search(r"^step +4$", text.out, re.MULTILINE)
    assert "  w float32[4] norm " in text.out
    assert json.loads(values.out)["step"] == 4
    assert verified.out == f"{path}: every byte verifies\n"
    assert json.loads(verdict.out) == {"path": path, "ok": True, "problems": []}


def test_a_new_process_does_not_begin_with_the_peak_of_its_parent() -> None:
    block = np.ones(200 << 20, np.uint8)
    script = "from spheres.environment import resident_bytes; print(resident_bytes()[1])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=SECONDS, check=True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > block.size
    assert int(done.stdout) < 150 << 20
