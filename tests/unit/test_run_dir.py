from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import control.run_dir
from control.run_dir import RunDirectory, find, meant, wait_until_free
from spheres.errors import ConfigError, UnreachableError

#: a control that has a directory, and a sphere that outlives it: it ends when the test closes its end of the pipe
HOLDER = """
import subprocess, sys
from pathlib import Path
from control.run_dir import RunDirectory
run = RunDirectory.create(Path(sys.argv[1]), "digits")
run.raise_term({"seed": 1})
wait = "import select; p = select.poll(); p.register(0, select.POLLHUP); p.poll()"
sphere = subprocess.Popen([sys.executable, "-c", wait], stdout=subprocess.DEVNULL, close_fds=False)
if sys.argv[2]:
    run.write_address(sys.argv[2])
print(sphere.pid, flush=True)
if sys.stdin.readline().strip() == "close":
    run.close()
"""


@contextmanager
def holder(path: Path, address: str = "127.0.0.1:4567") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Yield the process and the id of its sphere's."""
    command = [sys.executable, "-c", HOLDER, str(path), address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def create(path: Path) -> RunDirectory:
    run = RunDirectory.create(path, "digits")
    run.raise_term({"seed": 1})
    return run


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


# --- the lock


def test_a_second_start_is_refused_while_the_first_lives_and_is_free_at_once_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with holder(path) as (first, sphere):
        for start in (lambda: RunDirectory.open(path), lambda: RunDirectory.create(path, "digits")):
            with pytest.raises(ConfigError, match=f"run is in use by process {first.pid}; stop it, or give") as caught:
                start()
            assert caught.value.exit_code == 2
        assert find(None, path) == "127.0.0.1:4567"
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert names(path) == {"run.json", "address"}
        again = RunDirectory.open(path)
        os.kill(sphere, 0)  # it still lives: the lock is not inherited
        assert again.last_address == "127.0.0.1:4567"
        assert again.info["term"] == 1
        again.close()
        assert names(path) == {"run.json"}


def test_a_control_that_only_starts_is_named_too(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with holder(path, address="") as (first, _):
        with pytest.raises(ConfigError, match=f"in use by process {first.pid}"):
            RunDirectory.open(path)
        with pytest.raises(UnreachableError, match=rf"only starting \(process {first.pid}\); try again"):
            find(None, path)


def test_a_directory_that_is_in_use_is_waited_for_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wait_until_free(tmp_path / "not-there")
    with holder(tmp_path / "run") as (first, _):
        monkeypatch.setattr(control.run_dir, "_FREE_SECONDS", 0.0)
        wait_until_free(tmp_path / "run")  # no longer than that
        assert caplog.messages == []
        monkeypatch.setattr(control.run_dir, "_FREE_SECONDS", 60.0)
        looks: list[float] = []

        def look_again(seconds: float) -> None:
            looks.append(seconds)
            if len(looks) == 3:
                first.kill()
                first.wait()

        monkeypatch.setattr(control.run_dir.time, "sleep", look_again)
        wait_until_free(tmp_path / "run")
    assert len(looks) == 3
    assert caplog.messages == [
        f"{tmp_path / 'run'} is in use by process {first.pid}: waiting for it, up to 60 s",
    ]
    RunDirectory.open(tmp_path / "run").close()


def test_an_orderly_end_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with holder(path) as (first, _):
        first.communicate("close\n", timeout=20)
    assert names(path) == {"run.json"}
    run = RunDirectory.open(path)
    assert run.last_address == ""
    run.close()
    run.close()


def test_the_lock_is_held_within_one_process_too_and_two_looks_do_not_keep_a_start_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = create(tmp_path / "run")
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
        RunDirectory.open(run.path)
    run.close()
    look = os.open(run.path, os.O_RDONLY)
    fcntl.flock(look, fcntl.LOCK_SH)  # as ``find`` does
    monkeypatch.setattr(control.run_dir.time, "sleep", lambda seconds: os.close(look) if look else None)
    RunDirectory.open(run.path).close()


def test_a_refused_start_changes_nothing(tmp_path: Path) -> None:
    run = create(tmp_path / "run")
    run.write_address("127.0.0.1:1")
    before = {name: (run.path / name).read_bytes() for name in names(run.path)}
    with pytest.raises(ConfigError):
        RunDirectory.create(run.path, "digits")
    run.close()
    with pytest.raises(ConfigError, match="holds a run already; go on with --resume, or give another --run-dir"):
        RunDirectory.create(run.path, "digits")
    del before["address"]
    assert {name: (run.path / name).read_bytes() for name in names(run.path)} == before
    RunDirectory.open(run.path).close()  # the refusal has left no lock


def test_where_a_file_system_has_no_locks_the_run_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")  # NFS

    monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING):
        run = create(tmp_path / "run")
    assert "take care that no second run uses it" in caplog.text
    run.write_address("127.0.0.1:1")
    assert find(None, run.path) == "127.0.0.1:1"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (run.path / "address").write_text(f"127.0.0.1:1\n{gone.pid}\n")
    with pytest.raises(UnreachableError, match=f"was killed: its process {gone.pid} is gone"):
        find(None, run.path)
    run.close()


# --- making and opening


def test_a_new_directory_below_the_base_and_the_link_to_the_latest(tmp_path: Path) -> None:
    base = tmp_path / "runs"
    runs = [RunDirectory.create(None, "my_task:Task/../x", base=base) for _ in range(3)]
    paths = [run.path for run in runs]
    for run in runs:
        run.raise_term({})
    assert len(set(paths)) == 3
    assert all(path.parent == base for path in paths)
    assert re.fullmatch(r"\d{8}-\d{6}-my-task-Task----x(-\d)?", paths[0].name)
    assert names(base) == {"latest", *(path.name for path in paths)}
    assert (base / "latest").resolve() == paths[2].resolve()
    assert not (base / "latest").readlink().is_absolute()  # the whole may be moved
    assert len({run.run_id for run in runs}) == 3
    for run in runs:
        run.close()


def test_the_latest_run_is_opened_and_found_where_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"runs/latest holds no run to resume; start without --resume"):
        RunDirectory.open(None)
    with pytest.raises(ConfigError, match=r"no run directory at runs/latest; give --address HOST:PORT or --run-dir"):
        find(None, None)
    run = RunDirectory.create(None, "digits")
    run.raise_term({})
    run.write_address("127.0.0.1:9")
    assert find(None, None) == "127.0.0.1:9"
    run.close()
    again = RunDirectory.open(None)
    assert again.path == run.path.resolve()
    assert again.run_id == run.run_id
    again.close()


def test_the_term_grows_with_each_start_and_is_durable(tmp_path: Path) -> None:
    run = create(tmp_path / "run")
    assert run.raise_term({"seed": 2}) == 2
    run.close()
    again = RunDirectory.open(run.path)
    assert again.raise_term({"seed": 2}) == 3
    again.close()
    kept = json.loads((run.path / "run.json").read_text())
    assert (kept["run_id"], kept["term"], kept["config"]) == (run.run_id, 3, {"seed": 2})


def test_what_a_killed_process_was_writing_is_removed_by_the_next_start(tmp_path: Path) -> None:
    run = create(tmp_path / "run")
    run.close()
    (run.path / ".summary.json.tmp").write_text("{")
    (run.path / ".weights.safetensors.tmp").write_text("")
    RunDirectory.open(run.path).close()
    assert names(run.path) == {"run.json"}


def test_a_path_that_cannot_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, says in (
        (tmp_path / "file", "file: File exists"),
        (tmp_path / "file" / "run", "Not a directory"),
    ):
        with pytest.raises(ConfigError, match=f"cannot make the run directory: .*{says}"):
            RunDirectory.create(path, "digits")
        with pytest.raises(ConfigError, match="holds no run to resume"):
            RunDirectory.open(path)
        with pytest.raises(ConfigError, match="no run directory at"):
            find(None, path)
    with pytest.raises(ConfigError, match=r"cannot make the run directory: .*file.*: (Not a directory|File exists)"):
        RunDirectory.create(None, "digits", base=tmp_path / "file")
    assert (tmp_path / "file").read_text() == ""
    (tmp_path / "base" / "latest").mkdir(parents=True)
    run = RunDirectory.create(None, "digits", base=tmp_path / "base")
    with pytest.raises(ConfigError, match="base/latest: Is a directory"):
        run.raise_term({})
    run.close()
    assert "latest" in names(tmp_path / "base")


def test_a_start_that_fails_leaves_nothing_and_takes_nothing_away(tmp_path: Path) -> None:
    base = tmp_path / "runs"
    RunDirectory.create(None, "digits", base=base).close()
    assert names(tmp_path) == set()
    good = RunDirectory.create(None, "digits", base=base)
    good.raise_term({})
    good.close()
    before = names(base)
    RunDirectory.create(None, "digits", base=base).close()
    assert names(base) == before
    assert (base / "latest").resolve() == good.path.resolve()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes").write_text("mine")
    RunDirectory.create(tmp_path / "own", "digits").close()
    assert names(tmp_path / "own") == {"notes"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_that_is_not_writable(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match=r"cannot make the run directory: .*: Permission denied"):
        RunDirectory.create(tmp_path / "run", "digits")


@pytest.mark.parametrize("failing", ["mkdir", "replace", "open"])
def test_a_directory_that_is_read_only(tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, failing, read_only)
        with pytest.raises(ConfigError, match="Read-only file system"):
            create(tmp_path / "run").close()
    if failing == "replace":
        create(tmp_path / "run").close()  # the failure has left no lock


@pytest.mark.parametrize("text", ["{", "[]", '{"run_id": "r-1"}', '{"run_id": 3, "term": 1}', '{"term": 1}'])
def test_a_broken_run_json_is_a_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ConfigError, match=r"run.json is broken: put back a copy, or start anew in another --run-dir"):
        RunDirectory.open(tmp_path)
    assert names(tmp_path) == {"run.json"}


# --- finding


def test_an_address_that_is_given_is_taken(tmp_path: Path) -> None:
    assert find("host:1", tmp_path / "nowhere") == "host:1"


def test_what_is_given_wins_over_the_environment_and_an_address_over_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert meant(None, None) == (None, None)
    monkeypatch.setenv("ARMILLARY_RUN_DIR", "there")
    assert meant(None, None) == (None, Path("there"))
    monkeypatch.setenv("ARMILLARY_CONTROL", "host:2")
    assert meant(None, None)[0] == find(None, None) == "host:2"
    assert meant(None, tmp_path) == (None, tmp_path)
    assert meant("host:1", None) == ("host:1", None)


def test_a_run_that_is_over_or_never_was_says_so(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match="is not running; nothing listens there"):
        find(None, tmp_path)
    (tmp_path / "summary.json").write_text('{"state": "completed"}')
    with pytest.raises(UnreachableError, match="is completed; nothing listens there"):
        find(None, tmp_path)


def test_a_run_that_was_killed_says_so_and_how_to_go_on(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with holder(path) as (first, _):
        first.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # dead, but a zombie until the fixture waits for it
        with pytest.raises(
            UnreachableError,
            match=f"was killed: its process {first.pid} is gone; go on with: control-cli start --resume {path}",
        ):
            find(None, path)


@pytest.mark.parametrize("text", [b"", b"\n", b"\xff\xfe", b"\n\n", b"\n99999999999999999999\n"])
def test_an_address_that_is_half_written_or_broken_is_no_traceback(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "address").write_bytes(text)
    with pytest.raises(UnreachableError):
        find(None, tmp_path)
    RunDirectory.create(tmp_path, "digits").close()


def test_an_address_without_a_process_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "address").write_text("127.0.0.1:5\n")
    assert find(None, tmp_path) == "127.0.0.1:5"
