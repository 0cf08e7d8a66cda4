"""The conformance command: the Python sphere passes all of it, and each planted fault fails the case it belongs to."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from control.cli import app
from control.cli.conformance import _SMALL
from control.config_sources import load_config
from control.conformance import CASES, play_case
from spheres.task import load_task
from spheres.worker import limit_threads
from tests.service.faulty_sphere import FAULTS

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

FAULTY = Path(__file__).with_name("faulty_sphere.py")


@pytest.fixture(scope="module")
def played():
    """What is played, and the task."""
    limit_threads()
    config, _ = load_config(dict(_SMALL), {})
    return load_task(config.task), config


def sphere(fault="none"):
    return [sys.executable, str(FAULTY), fault]


#: what `make test` runs; the rest is left to `make test-slow`
FEW = {"enroll", "gradient", "next-step", "substitution", "cut", "drain"}
FEW_FAULTS = {"other_samples", "beyond_credit", "says_nothing_held", "forgets_with_the_link", "dies_of_garbage"}


def mostly_slow(names, few):
    return [name if name in few else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", mostly_slow(CASES, FEW))
def test_the_python_sphere_passes(name, run, tmp_path, played):
    result = run(play_case(CASES[name], *played, sphere(), seconds=50, log=tmp_path / "log"), timeout=60)
    assert result.state == "passed", (result, (tmp_path / "log").read_text())


#: fault -> the case that fails of it, and what its rule or what came says
FAILS = {
    "another_request_id": ("enroll", "the same request_id"),
    "tries_what_is_final": ("enroll-refused", "nothing more came"),
    "exits_with_1": ("enroll-refused", "exit code 1"),
    "another_data": ("hello", "data_fingerprint"),
    "one_session": ("fault", "a session above 1"),
    "keeps_its_id": ("enroll-again", "a new request_id"),
    "ends_at_any_refusal": ("refused-for-now", "exit code 5"),
    "takes_every_refusal_for_final": ("parent-unavailable", "next fallback, control; the worker's process"),
    "enrolls_again_for_a_parent": ("parent-stale", "no other EnrollSphere"),
    "no_heartbeats": ("heartbeat", "4 heartbeats"),
    "a_flood_of_heartbeats": ("heartbeat", "in no less than"),
    "closes_circles": ("circle", "N11"),
    "keeps_the_first_path": ("fallbacks", "p-2"),
    "believes_every_address": ("address", "also after a welcome that names that one"),
    "dials_the_silent_first": ("silent", "control, the parent's parent, first"),
    "waits_for_the_silent": ("silent", "N10"),
    "computes_before_the_footer": ("weights", "no frame before the footer"),
    "checks_no_checksum": ("checksum", "chunk 1 does not fit its CRC-32C"),
    "checks_no_order": ("order", "chunk 2 came after chunk 0"),
    "checks_no_digest": ("digest", "digest is not that of the chunks"),
    "takes_any_held_digest": ("held-digest", "held_digest is not that of its weights"),
    "takes_any_layout": ("layout", "manifest_digest is not its own"),
    "says_no_chunks_held": ("resume", "weights_chunks_held 2"),
    "begins_weights_anew": ("go-on", "the worker ended it"),
    "takes_any_run": ("another-run", "a header of run 'another-run'"),
    "ignores_what_is_newer": ("lost", "a chunk of step 1 came before its header"),
    "dies_of_garbage": ("garbage", "exit code 1"),
    "ends_at_what_is_late": ("late", "the worker ended it"),
    "takes_any_assignment": ("older-attempt", "no frame for an assignment of attempt 1"),
    "other_samples": ("gradient", "[0,4) of step 0 on version 0"),
    "a_mean": ("gradient", "of its norm"),
    "a_mean_loss": ("gradient", "a sum over its samples, not a mean"),
    "close_but_not_equal": ("substitution", "the same bits of [0,4) again"),
    "says_nothing_held": ("substitution", "N5 (ready)"),
    "forgets_with_the_link": ("cut", "held with [0,4)"),
    "keeps_blocks_of_the_past": ("substitution", "N14"),
    "beyond_credit": ("credit", "chunks through 0"),
    "no_credit": ("credit", "chunk 1 of every block"),
    "a_wrong_checksum": ("gradient", "CRC-32C"),
    "a_wrong_block": ("gradient", "N3"),
    "another_digest": ("gradient", "weights_digest"),
    "absent_as_zeros": ("absent", "the footer of [0,1) once, with its last chunk"),
    "nobody_contributed": ("gradient", "contributions that make up"),
    "an_older_tag": ("gradient", "N1"),
    "all_chunks_again": ("from-chunk", "chunk 3 of"),
    "spares_compute": ("spare", "no frame of a spare"),
    "old_work_first": ("next-step", "N14"),
    "rounds_only_on_the_wire": ("bfloat16-gradients", "of its norm"),
    "rounds_nothing": ("bfloat16", "the worker ended"),
    "no_stop": ("stop", "exit code 0"),
    "no_move": ("move", "a hello at p-1"),
    "no_log": ("reports", "log_report"),
    "stops_for_another": ("stop", "the worker"),  # it has ended its link, or its process: which is seen first is chance
    "another_request": ("reports", "request_id 17"),
    "goes_without_a_word": ("drain", "leaving"),
    "drops_what_it_owes": ("drain", "the worker"),
    "never_goes": ("drain-idle", "exit code 0"),
}


def test_every_fault_is_tried():
    assert set(FAILS) | {"none", "refuses_to_round"} == set(FAULTS)


@pytest.mark.parametrize("fault", mostly_slow(FAILS, FEW_FAULTS))
def test_a_planted_fault_fails_its_case(fault, run, tmp_path, played):
    name, words = FAILS[fault]
    case = CASES[name]
    short = 4.0 + (case.patience if case.patience < 10 else 2.0)
    # what fails by silence takes all of its time, so that is short; a busy machine may need more to come to the fault
    for seconds in (short, 25.0, 50.0):
        result = run(play_case(case, *played, sphere(fault), seconds=seconds, log=tmp_path / "log"), timeout=70)
        said = f"{result.rule}; {result.expected}; {result.came}"
        if words in said or "nothing more came" not in said:
            break
    assert result.state == "failed", result
    assert words in said


def test_a_worker_may_refuse_a_run_that_rounds(run, tmp_path, played):
    result = run(
        play_case(CASES["bfloat16"], *played, sphere("refuses_to_round"), seconds=20, log=tmp_path / "log"), timeout=60
    )
    assert result.state == "skipped"
    assert result.note == "the worker refuses (exit code 2): error: this worker knows float32 only"


# ---- the command

COMMAND = [sys.executable, "-m", "control", "conformance"]


def called(*words, timeout=60):
    return subprocess.run(
        [*COMMAND, *words], capture_output=True, text=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL
    )


def test_cases_are_listed_and_nothing_is_started():
    listed = CliRunner().invoke(app, ["conformance", "--list"])
    assert listed.exit_code == 0
    lines = listed.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(CASES)
    assert all(case.rules in line and case.title in line for line, case in zip(lines, CASES.values(), strict=True))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--case", "gradeint"], "no case 'gradeint': did you mean gradient?; --list names them"),
        (["--timeout", "soon"], "--timeout: a duration is a number of seconds"),
        (["--listen", "0.0.0.0:0"], "an address beyond loopback needs insecure"),
        (["--chunk-bytes", "5"], "chunk_bytes"),
        (["--", "no-such-worker"], "'no-such-worker' is no program: give the worker's command after --"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_flags_are_said_in_a_line(words, said):
    done = called(*words)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_what_passed_and_what_failed_is_printed_with_the_rule(tmp_path):
    cases = ["--case", "garbage", "--case", "hello", "--log-dir", str(tmp_path / "logs"), "--timeout", "20s"]
    done = called(*cases, "--", *sphere("dies_of_garbage"))
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("FAILED  garbage")
    # what the play was waiting for when the process ended is chance: the end of the link, another hello, a gradient
    assert re.fullmatch(r" {8}rule {6}\w.*\(docs/protocol\.md\)", lines[1])
    assert re.fullmatch(r" {8}expected {2}\w.*", lines[2])
    assert lines[3] == "        came      the worker's process ended with exit code 1"
    assert lines[-2].startswith("passed  hello")
    assert lines[-1] == f"1 passed, 1 failed; logs in {tmp_path / 'logs'}"
    names = {path.name for path in (tmp_path / "logs").iterdir()}
    assert names == {"garbage.log", "garbage.exchange", "hello.log", "hello.exchange"}
    assert "s-1 joins control" in (tmp_path / "logs" / "hello.log").read_text()
    assert "-> 40 bytes" in (tmp_path / "logs" / "garbage.exchange").read_text()


def test_as_json_each_case_is_an_object():
    done = called("--case", "hello", "--case", "credit", "--chunk-bytes", "64KiB", "--json", "--", *sphere())
    assert done.returncode == 0, done.stderr
    hello, credit = map(json.loads, done.stdout.splitlines())
    assert (hello["case"], hello["state"]) == ("hello", "passed")
    assert (credit["state"], credit["note"]) == (
        "skipped", "the model has 1 chunks, this needs 3: give a smaller --chunk-bytes",
    )  # fmt: skip


def until_ended(pid):
    """Wait for a process that was killed: it is at its end, but who killed it may be faster."""
    deadline = time.monotonic() + 20
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X"):
            assert time.monotonic() < deadline, pid
            time.sleep(0.01)


@pytest.mark.slow
def test_a_worker_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    """A worker that never enrolls, and has a child; then Ctrl+C in the middle of a case."""
    pids, pipe = tmp_path / "pids", tmp_path / "pipe"
    os.mkfifo(pipe)
    script = tmp_path / "hangs.sh"
    script.write_text('sleep 1000 & echo hanging here; echo $$ $! > "$1"; wait\n')
    for seconds in (1, 5, 25):  # it is ended at that, and a busy machine may not have come to its second line
        done = called("--case", "hello", "--timeout", f"{seconds}s", "--", "bash", str(script), str(pids))
        assert done.returncode == 1
        assert f"came      nothing more came within {seconds} s (--timeout)" in done.stdout
        if pids.exists() and pids.read_text():
            break
    assert "| hanging here" in done.stdout
    command = [*COMMAND, "--case", "hello", "--timeout", "50s", "--", "bash", str(script), str(pipe)]
    with subprocess.Popen(command) as process:
        later = pipe.read_text()  # waits until it is there
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
    started = [int(pid) for pid in (pids.read_text() + later).split()]
    assert len(started) == 4
    for pid in started:
        until_ended(pid)
