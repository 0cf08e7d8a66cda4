"""Checkpoints under faults: SIGKILL and OSError at every named point of a save, flipped bits, cut files.

Run as a script it is the process that is killed: it imports once and then forks for each order on standard input.
"""

from __future__ import annotations

import asyncio
import bisect
import collections
import errno
import itertools
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control.checkpoint import Checkpoints, verify
from control.saver import Saver
from control.snapshot import BrokenError, Snapshot
from spheres.config import manifest_to_proto
from spheres.errors import CheckpointError
from spheres.tensors import Manifest
from spheres.v1.checkpoint_pb2 import RunRecord, SphereRecord
from spheres.v1.common_pb2 import SphereReport

LAYOUT = Manifest.of({"w": np.zeros((3, 5), np.float32), "b": np.ones(7, "f4")})
KEEP = 2
#: points that a save passes, in order; `between` only where a checkpoint of the step exists
POINTS = [
    "save.begin",
    "save.draft.created",
    "save.file.control.pb.opened",
    *["save.file.control.pb.piece"] * 3,
    "save.file.control.pb.written",
    "save.file.spheres.pb.opened",
    *["save.file.spheres.pb.piece"] * 2,
    "save.file.spheres.pb.written",
    "save.manifest.before",
    "save.file.manifest.pb.opened",
    "save.file.manifest.pb.written",
    "save.rename.before",
    "save.rename.between",
    "save.rename.after",
    "save.published",
    "retention.before",
    "retention.renamed",
    "retention.removed",
    "retention.done",
]


def snapshot(step: int, seed: int = 0) -> Snapshot:
    rng = np.random.default_rng([step, seed])
    run = RunRecord(run_id="r-1", term=1, step=step, manifest=manifest_to_proto(LAYOUT), optimizer_count=step)
    buffers = {name: rng.random(LAYOUT.size, np.float32) for name in ("weights", "optimizer/m", "optimizer/v")}
    spheres = [SphereRecord(report=SphereReport(sphere_id=f"s-{n}", role="leaf")) for n in (1, 2)]
    return Snapshot(run, buffers, spheres, {"s-1": "control", "s-2": "s-1"})


# --- the process that is killed


def _serve() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            _save(**order)
        _, status = os.waitpid(child, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)  # noqa: T201


def _save(
    root: str,
    step: int,
    seed: int,
    kill_at: int | None = None,
    file_bytes: int | None = None,
    background: bool = False,
) -> NoReturn:
    passed = 0

    def fault(point: str) -> None:
        nonlocal passed
        if passed == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        passed += 1

    code = 0
    try:
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        checkpoints = Checkpoints(Path(root), keep=KEEP, fault=fault)
        if background:
            asyncio.run(_train_on(checkpoints, snapshot(step, seed)))
        else:
            checkpoints.save(snapshot(step, seed))
    except CheckpointError as error:
        print(json.dumps(str(error)), flush=True)  # noqa: T201
        code = error.exit_code
    finally:
        os._exit(code)


async def _train_on(checkpoints: Checkpoints, taken: Snapshot) -> None:
    """Save beside steps that change every buffer. Raises CheckpointError."""
    saver = Saver(checkpoints, lambda step, record: None)
    spheres = list(taken.spheres)
    answer = saver.ask()

    async def records() -> list[SphereRecord]:
        return spheres

    await saver.begin(lambda: taken, records())
    while saver.busy:
        for flat in taken.buffers.values():
            flat += 1.0
        await asyncio.sleep(0)
    await answer


Order = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def order() -> Iterator[Order]:
    """Have a process save, and return what it printed and its exit code; negative: the signal that ended it."""
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def order(**arguments: Any) -> list[Any]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(arguments) + "\n")
            process.stdin.flush()
            printed = [json.loads(process.stdout.readline())]
            while not isinstance(printed[-1], int):
                printed.append(json.loads(process.stdout.readline()))
            return printed

        yield order


# --- what is compared


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with steps 10 and 20."""
    root = tmp_path_factory.mktemp("old") / "checkpoints"
    for step in (10, 20):
        Checkpoints(root, keep=KEEP).save(snapshot(step))
    return root


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def directories(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir())


def contents(root: Path) -> dict[int, dict[str, bytes]]:
    """Return step -> bits of what is listed, all of which must be whole."""
    checkpoints = Checkpoints(root, keep=KEEP)
    infos = checkpoints.list()
    assert [verify(root / info.name) for info in infos] == [[] for _ in infos]
    found = {info.step: bits(checkpoints.load(info.name)) for info in infos}
    assert bits(checkpoints.load()) == next(iter(found.values()))  # the newest
    return found


def bits(snapshot: Snapshot) -> dict[str, bytes]:
    return {name: flat.tobytes() for name, flat in snapshot.buffers.items()}


def points_of(root: Path, step: int, seed: int) -> list[str]:
    passed: list[str] = []
    Checkpoints(root, keep=KEEP, fault=passed.append).save(snapshot(step, seed))
    return passed


OLD = {20: bits(snapshot(20)), 10: bits(snapshot(10))}
#: step, seed -> what is listed before the new one is visible, after it is, and in the end
SAVES = {
    (30, 0): (OLD, {30: bits(snapshot(30)), **OLD}, {30: bits(snapshot(30)), 20: OLD[20]}),
    (20, 1): (OLD, {20: bits(snapshot(20, 1)), 10: OLD[10]}, {20: bits(snapshot(20, 1)), 10: OLD[10]}),
}


def test_the_points_are_those_that_are_named(tmp_path: Path, old: Path) -> None:
    shutil.copytree(old, tmp_path / "new")
    assert points_of(tmp_path / "new", 30, 0) == [point for point in POINTS if point != "save.rename.between"]
    shutil.copytree(old, tmp_path / "again")
    removed = ("retention.before", "retention.renamed", "retention.removed")
    assert points_of(tmp_path / "again", 20, 1) == [point for point in POINTS if point not in removed]


@pytest.mark.parametrize(
    "background", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["waited for", "beside steps"]
)
@pytest.mark.parametrize(("step", "seed"), SAVES)
def test_a_save_that_is_killed_at_any_point_leaves_the_old_or_the_new_whole(
    tmp_path: Path, old: Path, order: Order, step: int, seed: int, background: bool
) -> None:
    before, visible, after = SAVES[step, seed]
    shutil.copytree(old, tmp_path / "probe")
    points = points_of(tmp_path / "probe", step, seed)
    for number, point in enumerate(points):
        root = tmp_path / f"{number}"
        shutil.copytree(old, root)
        killed = order(root=str(root), step=step, seed=seed, kill_at=number, background=background)
        assert killed == [-signal.SIGKILL], point
        if number < points.index("save.rename.after"):
            expected = before
        elif "retention.renamed" in points and number >= points.index("retention.renamed"):
            expected = after
        else:
            expected = visible
        left = files(root)
        assert contents(root) == expected, point
        assert files(root) == left, f"{point}: reading has changed something"
        # the next save of anybody removes what the killed one left
        Checkpoints(root, keep=3).save(snapshot(40))
        assert contents(root) == dict([(40, bits(snapshot(40))), *expected.items()][:3]), point
        assert directories(root) == sorted(f"step-{n:09d}" for n in contents(root)), point


def test_all_is_on_disk_before_it_is_visible_and_the_manifest_is_the_last_file(
    tmp_path: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "new"
    shutil.copytree(old, root)
    log: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        log.append("fsync " + Path(f"/proc/self/fd/{descriptor}").readlink().name)

    monkeypatch.setattr(os, "fsync", fsync)
    Checkpoints(root, keep=KEEP, fault=log.append).save(snapshot(30))
    told = [entry for entry in log if entry.startswith(("fsync", "save.rename")) or entry.endswith("opened")]
    assert told == [
        "save.file.control.pb.opened",
        "fsync control.pb",
        "save.file.spheres.pb.opened",
        "fsync spheres.pb",
        "save.file.manifest.pb.opened",
        "fsync manifest.pb",
        "fsync .draft-step-000000030",
        "save.rename.before",
        "save.rename.after",
        "fsync new",
    ]
    assert log.index("fsync new") < log.index("save.published") < log.index("retention.before")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize(("step", "seed"), SAVES)
def test_an_error_of_the_disk_at_any_point_changes_nothing(
    tmp_path: Path, old: Path, caplog: pytest.LogCaptureFixture, step: int, seed: int, code: int
) -> None:
    before, _, after = SAVES[step, seed]
    shutil.copytree(old, tmp_path / "probe")
    for number, point in enumerate(points_of(tmp_path / "probe", step, seed)):
        root = tmp_path / f"{number}"
        shutil.copytree(old, root)
        passed: list[str] = []

        def fault(point: str, number: int = number, passed: list[str] = passed) -> None:
            passed.append(point)
            if len(passed) > number:
                raise OSError(code, os.strerror(code))

        checkpoints = Checkpoints(root, keep=KEEP, fault=fault)
        caplog.clear()
        if point.startswith("save."):
            with pytest.raises(CheckpointError) as caught:
                checkpoints.save(snapshot(step, seed))
            says = f"cannot save checkpoint {root}/step-{step:09d}: {os.strerror(code)}; older ones stand"
            assert str(caught.value) == says
            assert files(root) == files(old), point
            assert directories(root) == directories(old), point
            assert contents(root) == before
        else:  # it is saved; an older one that cannot be removed is no failure of it
            assert checkpoints.save(snapshot(step, seed)).step == step
            (told,) = caplog.records
            assert "cannot remove an old checkpoint" in told.getMessage()
            assert os.strerror(code) in told.getMessage()
            assert next(iter(contents(root))) == step
        # the disk is well again
        Checkpoints(root, keep=KEEP).save(snapshot(step, seed))
        assert contents(root) == after, point
        assert directories(root) == sorted(f"step-{n:09d}" for n in after)


@pytest.mark.parametrize("file_bytes", [0, 1, 100, 500])
def test_a_disk_that_takes_no_more_in_the_midst_of_a_file(
    tmp_path: Path, old: Path, order: Order, file_bytes: int
) -> None:
    root = tmp_path / "new"
    shutil.copytree(old, root)
    says = f"cannot save checkpoint {root}/step-000000030: File too large; older ones stand"
    assert order(root=str(root), step=30, seed=0, file_bytes=file_bytes) == [says, CheckpointError.exit_code]
    assert files(root) == files(old)
    assert directories(root) == directories(old)
    assert order(root=str(root), step=30, seed=0, file_bytes=1 << 20) == [0]
    assert list(contents(root)) == [30, 20]


# --- damage


FILES = ("control.pb", "spheres.pb", "manifest.pb")


@pytest.fixture(scope="module")
def damaged(old: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy whose files tests may damage, if they put them back."""
    root = tmp_path_factory.mktemp("damaged") / "checkpoints"
    shutil.copytree(old, root)
    return root


def records_of(data: bytes) -> list[range]:
    """Return the bytes of each record, its length before it included."""
    spans, at = [], 0
    while at < len(data):
        start, value, shift = at, 0, 0
        while True:
            byte = data[at]
            value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
            if byte < 128:
                break
        at += value
        spans.append(range(start, at))
    return spans


def problem_of(home: Path, file: str, data: bytes, *, fallback: bool = False) -> int | None:
    """Return the record that verify names for a file with other bytes; load must find the same, and the older one."""
    path = home / file
    whole = path.read_bytes()
    path.write_bytes(data)
    try:
        (problem,) = verify(home)
        assert problem.file == file
        assert "\n" not in str(problem)
        checkpoints = Checkpoints(home.parent, keep=KEEP)
        with pytest.raises(BrokenError) as caught:
            checkpoints.load(home.name)
        assert caught.value.problem == problem
        assert str(caught.value).startswith(f"checkpoint {home}: {problem}; ")
        if fallback:
            assert checkpoints.load().run.step == 10
        return problem.record
    finally:
        path.write_bytes(whole)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@given(file=st.sampled_from(FILES), where=st.integers(0, (1 << 32) - 1))
@settings(max_examples=150)
def test_any_flipped_bit_is_found_and_named(damaged: Path, file: str, where: int) -> None:
    home = damaged / "step-000000020"
    data = (home / file).read_bytes()
    bit = where % (8 * len(data))
    record = problem_of(home, file, flipped(data, bit), fallback=True)
    if file == "manifest.pb":
        assert record is None
        return
    index, span = next((n, span) for n, span in enumerate(records_of(data)) if bit // 8 in span)
    head = 2 if len(span) > 129 else 1
    if bit // 8 - span.start > head:  # behind the length and the first tag, which decide where a record begins
        assert record == index
    else:
        assert record in (index, index + 1, None)


def test_a_flipped_bit_in_each_byte_is_found_and_every_one_where_records_begin(damaged: Path) -> None:
    home = damaged / "step-000000020"
    by_file_alone = 0
    for file in FILES:
        data = (home / file).read_bytes()
        flips = {8 * at + at % 8 for at in range(len(data))}
        if file != "manifest.pb":
            # lengths and tags: some flips there leave records that are all well, but not those that were written
            flips |= {8 * at + bit for span in records_of(data) for at in span[:3] for bit in range(8)}
        for flip in flips:
            by_file_alone += problem_of(home, file, flipped(data, flip)) is None and file != "manifest.pb"
    assert by_file_alone > 0


def test_a_file_cut_at_any_length_or_with_more_behind_it_is_found(damaged: Path) -> None:
    home = damaged / "step-000000020"
    for file in FILES:
        data = (home / file).read_bytes()
        spans = records_of(data) if file != "manifest.pb" else []
        for length in range(len(data)):
            record = problem_of(home, file, data[:length])
            within = next((n for n, span in enumerate(spans) if span.start < length < span.stop), None)
            if within is not None:
                assert record == within
        for more in (b"\0", b"\x05\x0d\0\0\0\0", data, bytes(5000)):
            problem_of(home, file, data + more)


@pytest.mark.timeout(180)
def test_2000_random_flips_and_cuts_over_all_files_are_found(damaged: Path) -> None:
    """Each is found by verify, and neither load takes it; on a failure the seed says which it was."""
    home = damaged / "step-000000020"
    whole = {file: (home / file).read_bytes() for file in FILES}
    # every kind of record is there: the run, headers and chunks of three buffers, two spheres
    assert [len(records_of(whole[file])) for file in FILES[:2]] == [7, 2]
    ends = list(itertools.accumulate(len(data) for data in whole.values()))
    found: collections.Counter[str] = collections.Counter()
    for seed in range(2000):
        rng = random.Random(seed)
        at = rng.randrange(ends[-1])  # over all bytes alike
        file = FILES[bisect.bisect_right(ends, at)]
        at -= ends[FILES.index(file)] - len(whole[file])
        data = bytearray(whole[file])
        if rng.random() < 0.5:
            data[at] ^= rng.randrange(1, 256)
            kind = "flip"
        else:
            del data[at:]
            kind = "cut"
        try:
            problem_of(home, file, bytes(data), fallback=seed % 10 == 0)
        except BaseException as error:
            error.add_note(f"seed {seed}: {kind} of {file} at byte {at}")
            raise
        found[f"{kind} {file}"] += 1
    assert found.total() == 2000
    assert min(found[f"{kind} {file}"] for kind in ("flip", "cut") for file in FILES) > 10
    assert verify(home) == []


def test_files_of_another_checkpoint_or_missing_are_found(damaged: Path) -> None:
    home = damaged / "step-000000020"
    for file in FILES[:2]:
        other = (damaged / "step-000000010" / file).read_bytes()
        if other != (home / file).read_bytes():
            problem_of(home, file, other)
        (home / file).rename(home / "aside")
        assert [str(problem) for problem in verify(home)] == [f"{file} is missing"]
        (home / file).mkdir()
        assert [str(problem) for problem in verify(home)] == [f"{file} cannot be read: Is a directory"]
        (home / file).rmdir()
        (home / "aside").rename(home / file)
    assert verify(home) == []


def test_each_damaged_file_is_named_by_verify(damaged: Path) -> None:
    home = damaged / "step-000000020"
    whole = {file: (home / file).read_bytes() for file in FILES}
    for file in FILES[:2]:
        (home / file).write_bytes(flipped(whole[file], 8 * (len(whole[file]) - 1)))
    assert [problem.file for problem in verify(home)] == ["control.pb", "spheres.pb"]
    for file, data in whole.items():
        (home / file).write_bytes(data)


def test_a_fallback_is_told(damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    home = damaged / "step-000000020"
    data = (home / "control.pb").read_bytes()
    with caplog.at_level(logging.WARNING):
        problem_of(home, "control.pb", flipped(data, 8 * len(data) - 1), fallback=True)
    (told,) = caplog.records
    assert f"passed over: checkpoint {home}: control.pb record" in told.getMessage()


if __name__ == "__main__":
    _serve()
