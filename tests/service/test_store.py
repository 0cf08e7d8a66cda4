"""Every store is held to the same words: local directory, memory, and fsspec over files and a real S3 server."""

import contextlib
import errno
import importlib.util
import json
import os
import queue
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import numpy as np
import pytest

from control.checkpoint import Checkpoints, read_snapshot, verify
from control.snapshot import Snapshot
from control.store import Fault, LocalStore, Store
from control.store_fsspec import FsspecStore, store_at
from control.store_memory import MemoryStore
from spheres.config import manifest_to_proto
from spheres.errors import CheckpointError, ConfigError
from spheres.tensors import Manifest
from spheres.v1.checkpoint_pb2 import RunRecord, SphereRecord

LAYOUT = Manifest.of({"w": np.zeros((3, 5), np.float32), "b": np.ones(7, "f4")})
SECONDS = 60.0
#: each request of S3 is a call of another process
pytestmark = pytest.mark.timeout(180)


@dataclass
class Make:
    """Makes a store of the same contents again, as another process would have it."""

    make: Callable[[Fault | None], Store]
    #: every so many of the points; all of them on S3 would take minutes
    every: int = 1

    def __call__(self, fault: Fault | None = None) -> Store:
        return self.make(fault)


@pytest.fixture(scope="module")
def s3(request: pytest.FixtureRequest) -> Iterator[str]:
    """Start an S3 server on a port of loopback; return the URL of a bucket in it."""
    if any(importlib.util.find_spec(name) is None for name in ("moto", "flask", "flask_cors", "s3fs")):
        pytest.skip("NO S3: moto[s3], flask, flask-cors or s3fs is not installed (make setup)")
    command = [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            endpoint = _endpoint(server)
            urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket", method="PUT"), timeout=SECONDS).close()
            environment = {
                "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_DEFAULT_REGION": "us-east-1",
            }  # fmt: skip
            with pytest.MonkeyPatch.context() as patch:
                for name, value in environment.items():
                    patch.setenv(name, value)
                yield "s3://bucket"
        finally:
            server.kill()


def _endpoint(server: subprocess.Popen[str]) -> str:
    """Wait for the server's address, and go on reading what it prints."""
    found: queue.Queue[str] = queue.Queue()

    def read() -> None:
        assert server.stdout is not None
        for line in server.stdout:
            if match := re.search(r"http://127\.0\.0\.1:\d+", line):
                found.put(match[0])

    threading.Thread(target=read, daemon=True).start()
    return found.get(timeout=SECONDS)


@pytest.fixture(params=["local", "memory", "fsspec-file", pytest.param("fsspec-s3", marks=pytest.mark.slow)])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    kind = request.param
    if kind == "local":
        return Make(lambda fault: LocalStore(tmp_path / "store", fault))
    if kind == "memory":
        files: dict[str, dict[str, bytes]] = {}
        return Make(lambda fault: MemoryStore(fault, files))
    if kind == "fsspec-file":
        return Make(lambda fault: FsspecStore(f"file://{tmp_path}/store", fault))
    url = f"{request.getfixturevalue('s3')}/{uuid4().hex}"
    return Make(lambda fault: FsspecStore(url, fault), every=4)


def put(store: Store, name: str, **files: bytes) -> None:
    draft = store.begin(name)
    for file, data in files.items():
        with draft.create(file) as stream:
            stream.write(data)
    draft.publish()


def read(store: Store, name: str, file: str) -> bytes:
    with store.open(name, file) as stream:
        return stream.read()


def test_what_is_published_is_read_and_nothing_else(make: Make) -> None:
    store = make()
    assert store.names() == []
    draft = store.begin("one")
    with draft.create("a") as stream:
        stream.write(b"12")
        stream.write(memoryview(b"345"))
    with draft.create("empty"):
        pass
    assert store.names() == make().names() == []
    with pytest.raises(FileNotFoundError), store.open("one", "a"):
        pass
    draft.publish()
    for again in (store, make()):
        assert again.names() == ["one"]
        assert read(again, "one", "a") == b"12345"
        assert read(again, "one", "empty") == b""
        with again.open("one", "a") as stream:
            assert [stream.read(1), stream.read(3), stream.read(9), stream.read(1)] == [b"1", b"234", b"5", b""]
        for name, file in (("one", "b"), ("two", "a")):
            with pytest.raises(FileNotFoundError), again.open(name, file):
                pass
    assert store.location("one").endswith("one")
    assert "Store" in repr(store)
    assert "Draft" in repr(draft)


def test_many_pieces_and_large_files(make: Make) -> None:
    store = make()
    data = np.random.default_rng(1).bytes((17 << 20) + 3)  # more than two parts of an upload
    draft = store.begin("big")
    with draft.create("a") as stream:
        for at in range(0, len(data), 1 << 20):
            stream.write(memoryview(data)[at : at + (1 << 20)])
    draft.publish()
    assert read(make(), "big", "a") == data


def test_one_of_the_same_name_takes_the_place_of_the_older_whole(make: Make) -> None:
    store = make()
    put(store, "one", a=b"old", b=b"only in the old")
    put(store, "two", a=b"other")
    draft = store.begin("one")
    with draft.create("a") as stream:
        stream.write(b"new")
    assert read(make(), "one", "a") == b"old"
    draft.publish()
    assert sorted(make().names()) == ["one", "two"]
    assert read(make(), "one", "a") == b"new"
    with pytest.raises(FileNotFoundError), make().open("one", "b"):
        pass


def test_what_is_discarded_was_never_there(make: Make) -> None:
    store = make()
    put(store, "one", a=b"old")
    for name in ("one", "two"):
        draft = store.begin(name)
        with draft.create("a") as stream:
            stream.write(b"new")
        draft.discard()
        draft.discard()
    with contextlib.suppress(KeyError):
        draft = store.begin("one")
        with draft.create("a") as stream:
            stream.write(b"half")
            raise KeyError("what goes wrong in the middle comes out as it is")
    draft.discard()
    assert make().names() == ["one"]
    assert read(make(), "one", "a") == b"old"


def test_a_file_is_made_once(make: Make) -> None:
    draft = make().begin("one")
    with draft.create("a"):
        pass
    with pytest.raises(FileExistsError), draft.create("a"):
        pass
    draft.discard()


def test_what_is_deleted_is_gone(make: Make) -> None:
    store = make()
    put(store, "one", a=b"1")
    put(store, "two", a=b"2")
    store.delete("one")
    assert make().names() == ["two"]
    with pytest.raises(FileNotFoundError), store.open("one", "a"):
        pass
    with pytest.raises(FileNotFoundError):
        store.delete("one")
    put(store, "one", a=b"3")
    assert read(make(), "one", "a") == b"3"


# --- checkpoints on every store


def snapshot(step: int, seed: int = 0, *, finite: bool = True) -> Snapshot:
    rng = np.random.default_rng([step, seed])
    run = RunRecord(run_id="r-1", term=1, step=step, manifest=manifest_to_proto(LAYOUT), optimizer_count=step)
    buffers = {name: rng.random(LAYOUT.size, np.float32) for name in ("weights", "optimizer/m")}
    return Snapshot(run, buffers, [SphereRecord(task_state=b"{}")], {"s-1": "control"}, finite=finite)


def bits(snapshot: Snapshot) -> dict[str, bytes]:
    return {name: flat.tobytes() for name, flat in snapshot.buffers.items()}


def contents(store: Store) -> dict[int, dict[str, bytes]]:
    """Return step -> bits of all that is listed, all of which must be whole; the first is what load takes."""
    checkpoints = Checkpoints(store, keep=2)
    found = {info.step: bits(checkpoints.load(info.name)) for info in checkpoints.list()}
    assert bits(checkpoints.load()) == next(iter(found.values()))
    return found


def points_of(make: Make, step: int, seed: int) -> list[str]:
    passed: list[str] = []
    Checkpoints(make(passed.append), keep=2, fault=passed.append).save(snapshot(step, seed))
    return passed


#: of every store, in order; what else one passes lies between
POINTS = [
    "save.begin", "save.draft.created",
    "save.file.control.pb.opened", "save.file.control.pb.piece", "save.file.control.pb.written",
    "save.file.spheres.pb.opened", "save.file.spheres.pb.piece", "save.file.spheres.pb.written",
    "save.manifest.before", "save.file.manifest.pb.opened", "save.file.manifest.pb.written",
    "save.rename.before", "save.rename.after", "save.published",
    "retention.before", "retention.renamed", "retention.removed", "retention.done",
]  # fmt: skip


def test_a_save_passes_the_same_points_on_every_store(make: Make) -> None:
    for step in (10, 20):
        Checkpoints(make(), keep=2).save(snapshot(step))
    passed = points_of(make, 30, 0)
    assert list(dict.fromkeys(passed)) == POINTS


def test_an_error_at_any_point_leaves_the_checkpoints_before(make: Make) -> None:
    for old in (10, 20):
        Checkpoints(make(), keep=2).save(snapshot(old))
    before = {20: bits(snapshot(20)), 10: bits(snapshot(10))}
    for step in (30, 20):
        for seed, point in enumerate(POINTS[1 : 14 : make.every], 1):

            def fault(passing: str, point: str = point) -> None:
                if passing == point:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            with pytest.raises(CheckpointError, match=r"cannot save .*No space left on device; older ones stand"):
                Checkpoints(make(fault), keep=2, fault=fault).save(snapshot(step, seed))
            assert contents(make()) == before, point
    Checkpoints(make(), keep=2).save(snapshot(20, 9))
    assert contents(make()) == {**before, 20: bits(snapshot(20, 9))}


class Killed(BaseException):
    """As if the process were gone: nothing after it is done."""


class GoneWriter:
    """A store whose writer dies at a point: it tidies nothing up."""

    def __init__(self, make: Make, point: str) -> None:
        self._point = point
        self._store = make(self.fault)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def fault(self, passing: str) -> None:
        if passing == self._point:
            raise Killed

    def begin(self, name: str) -> Any:
        draft = self._store.begin(name)
        return SimpleNamespace(create=draft.create, publish=draft.publish, discard=lambda: None)


def test_a_writer_that_is_gone_leaves_the_old_or_the_new_whole(make: Make) -> None:
    for step in (10, 20):
        Checkpoints(make(), keep=2).save(snapshot(step))
    there = {20: bits(snapshot(20)), 10: bits(snapshot(10))}
    step = 20
    for seed, point in enumerate(POINTS[:: make.every]):
        for replaces in (False, True):
            if replaces and point.startswith("retention"):
                continue
            step = next(iter(there)) if replaces else step + 10
            writer = GoneWriter(make, point)
            with pytest.raises(Killed):
                Checkpoints(writer, keep=2, fault=writer.fault).save(snapshot(step, seed))
            after = dict(sorted({**there, step: bits(snapshot(step, seed))}.items(), reverse=True))
            left = contents(make())
            if POINTS.index(point) < POINTS.index("save.rename.after"):
                assert left == there, point
            elif point.startswith("retention"):  # which was about to remove what is older than the newest two
                assert left == dict(list(after.items())[: len(left)]), point
                gone = {"retention.before": 0, "retention.done": len(after) - 2}.get(point, 1)
                assert len(after) - len(left) == gone, point
            else:
                assert left == after, point
            there = left
    # what all of them left behind does not grow: the next save removes it
    Checkpoints(make(), keep=2).save(snapshot(step + 10))
    assert list(contents(make())) == [step + 10, *there][:2]


def test_retention_and_fallback(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(make(), keep=2)
    for step in (10, 20, 30):
        checkpoints.save(snapshot(step))
    for step in (40, 50):
        checkpoints.save(snapshot(step, finite=False))
    assert [info.step for info in checkpoints.list()] == [50, 40, 30]
    passed: list[str] = []
    assert bits(Checkpoints(make(), keep=2).load(None, passed.append)) == bits(snapshot(30))
    assert len(passed) == len(caplog.records) == 2


# --- what is fsspec's alone


def test_what_is_read_at_a_url_and_what_is_damaged(s3: str) -> None:
    import fsspec

    url = f"{s3}/{uuid4().hex}"
    checkpoints = Checkpoints(store_at(url), keep=3)
    for step in (10, 20):
        checkpoints.save(snapshot(step))
    at = f"{url}/step-000000020"
    assert verify(at) == []
    assert bits(read_snapshot(at)) == bits(read_snapshot(url)) == bits(snapshot(20))
    fs = fsspec.filesystem("s3")
    (path,) = (found for found in fs.find(at) if found.endswith("control.pb"))
    data = bytearray(fs.cat_file(path))
    data[len(data) // 2] ^= 1
    fs.pipe_file(path, bytes(data))
    (problem,) = verify(at)
    assert (problem.file, problem.record is not None) == ("control.pb", True)
    assert bits(read_snapshot(url)) == bits(snapshot(10))
    fs.rm_file(path)
    assert [str(problem) for problem in verify(at)] == ["control.pb is missing"]


def test_what_killed_writers_left_is_removed_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    store = FsspecStore(f"file://{tmp_path}/store")
    put(store, "one", a=b"1")
    home = tmp_path / "store" / "one"
    (home / "000002-00000000").mkdir()
    (home / "000002-00000000" / "a").write_bytes(b"half")
    (home / "notes.txt").write_text("mine")
    (tmp_path / "store" / "two" / "000001-00000000").mkdir(parents=True)
    assert store.names() == ["one"]
    put(store, "three", a=b"3")
    assert sorted(path.name for path in home.iterdir() if path.name.startswith("00000")) == sorted(
        f"{generation}{end}" for generation in store._published("one") for end in ("", ".published")
    )
    assert (home / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "store" / "two" / "000001-00000000").exists()
    assert read(store, "one", "a") == b"1"


def test_a_server_that_is_not_there_is_an_error_of_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        options = {
            "key": "k", "secret": "s", "endpoint_url": endpoint, "skip_instance_cache": True,
            "config_kwargs": {"retries": {"max_attempts": 0}},
        }  # fmt: skip
        store = FsspecStore("s3://bucket/x", options=options)
        with pytest.raises(CheckpointError, match=r"cannot list checkpoints in s3://bucket/x.*[Cc]onnect"):
            Checkpoints(store, keep=1).list()


def test_urls_that_cannot_be_used_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"cannot use moon://x: .*moon"):
        store_at("moon://x")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ConfigError, match=r"s3://b/x needs the extra fsspec: pip install 'armillary\[fsspec\]'"):
        store_at("s3://b/x")


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(420)
def test_a_run_goes_on_from_s3_where_its_machine_is_gone(s3: str, tmp_path: Path) -> None:
    """The commands of a user: train, lose the run directory, resume from the URL, to the bits of an undisturbed run."""

    def start(*words: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "control", "start", "--spheres", "2", "--json", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    url = f"{s3}/{uuid4().hex}"
    training = ("--task", "digits", "--batch-size", "100", "--microbatches", "8")
    undisturbed = start(*training, "--steps", "14", "--run-dir", "whole")
    first = start(*training, "--steps", "6", "--checkpoint-url", url, "--checkpoint-every", "3steps",
                  "--run-dir", "first")  # fmt: skip
    assert not (tmp_path / "first" / "checkpoints").exists()
    second = start("--resume", "first", "--steps", "10")
    third = start("--resume", f"{url}/{first['run_id']}", "--steps", "14", "--run-dir", "elsewhere")
    assert (second["steps"], third["steps"], third["run_id"]) == (10, 14, first["run_id"])
    assert third["weights_sha256"] == undisturbed["weights_sha256"]
    terms = [json.loads((tmp_path / name / "run.json").read_text())["term"] for name in ("first", "elsewhere")]
    assert terms == [2, 3]
