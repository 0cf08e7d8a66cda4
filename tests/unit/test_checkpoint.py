from __future__ import annotations

import json
import logging
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from control.checkpoint import CheckpointInfo, Checkpoints, export, inspect, read_snapshot, verify
from control.checkpoint_diff import diff
from control.config import RunConfig
from control.records import RecordWriter
from control.snapshot import NewerFormatError, Snapshot
from control.weights_file import read_safetensors
from spheres.config import manifest_to_proto
from spheres.errors import CheckpointError, ConfigError
from spheres.numerics import crc32c
from spheres.tensors import Manifest
from spheres.v1.checkpoint_pb2 import (
    BufferHeader,
    CheckpointManifest,
    CheckpointRecord,
    RunRecord,
    SphereRecord,
)
from spheres.v1.common_pb2 import SphereReport

Array = npt.NDArray[np.float32]

SMALL = Manifest.of({"w": np.zeros((3, 5), np.float32), "none": np.zeros((0, 4), np.float32), "b": np.ones(7, "f4")})


def noise(size: int, *seed: int) -> Array:
    """Return every kind of bits that there is: NaNs of all payloads, infinities, denormals, -0.0."""
    return np.random.default_rng(seed).integers(0, 1 << 32, size, np.uint32).view(np.float32)


def snapshot(
    step: int,
    *,
    seed: int = 0,
    term: int = 1,
    run_id: str = "r-1",
    layout: Manifest = SMALL,
    buffers: Mapping[str, Array] | None = None,
    finite: bool = True,
    best: bool = False,
) -> Snapshot:
    record = RunRecord(
        run_id=run_id,
        term=term,
        step=step,
        weights_version=step,
        weights_digest=b"\x07" * 16,
        manifest=manifest_to_proto(layout),
        config_json='{"seed": 3}',
        optimizer_count=step,
        epoch=step // 4,
        samples_count=step * 64,
        seed=3,
        metrics={"loss": 0.25, "accuracy": 0.1 + 0.2},
        best_value=0.875,
        best_step=step - 1,
        wall_seconds=1.5,
        callback_states={"EarlyStopping": '{"waited": 2}', "mine <&>": "[1.5, null]"},
    )
    report = SphereReport(sphere_id="s-1", host="h", role="leaf", phase_seconds={"compute": 0.5}, samples_count=9)
    return Snapshot(
        run=record,
        buffers=buffers
        or {
            "weights": noise(layout.size, seed, step, 0),
            "optimizer/m": noise(layout.size, seed, step, 1),
            "optimizer/v": noise(layout.size, seed, step, 2),
        },
        spheres=[SphereRecord(report=report, task_state=b'{"seen": 4}'), SphereRecord(task_state=b"\x00\xff")],
        tree={"s-1": "control", "s-2": "s-1"},
        finite=finite,
        best=best,
    )


def bits(buffers: Mapping[str, Array]) -> dict[str, bytes]:
    return {name: flat.tobytes() for name, flat in buffers.items()}


def assert_same(got: Snapshot, put: Snapshot) -> None:
    expected = RunRecord()
    expected.CopyFrom(put.run)
    expected.weights_sha256 = got.run.weights_sha256
    assert got.run == expected
    assert bits(got.buffers) == bits(put.buffers)
    assert list(got.buffers) == list(put.buffers)
    assert list(got.spheres) == list(put.spheres)
    assert (got.tree, got.finite, got.best) == (put.tree, put.finite, put.best)


def saved(root: Path, *snapshots: Snapshot, keep: int = 9, keep_every: int | None = None) -> Checkpoints:
    checkpoints = Checkpoints(root, keep=keep, keep_every=keep_every)
    for each in snapshots:
        checkpoints.save(each)
    return checkpoints


def steps(checkpoints: Checkpoints) -> list[int]:
    return [info.step for info in checkpoints.list()]


def damage(root: Path, step: int, file: str = "control.pb") -> None:
    path = root / f"step-{step:09d}" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


# --- round trips


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    put = snapshot(12, best=True, finite=False)
    checkpoints = saved(tmp_path, put)
    for got in (
        checkpoints.load("step-000000012"),
        checkpoints.load(tmp_path / "step-000000012"),
        read_snapshot(tmp_path / "step-000000012"),
    ):
        assert_same(got, put)
        assert got.run.weights_sha256 == SMALL.sha256(put.buffers["weights"])
        assert all(flat.flags.writeable and flat.ctypes.data % 64 == 0 for flat in got.buffers.values())
    assert verify(tmp_path / "step-000000012") == []
    assert put.run.weights_sha256 == ""  # what was handed in stays as it was


@pytest.mark.parametrize("elements", [0, 1, 16, (1 << 18) - 1, 1 << 18, (1 << 18) + 1, (1 << 19) + 16])
def test_buffers_of_every_length(tmp_path: Path, elements: int) -> None:
    layout = Manifest.of({"w": np.zeros(elements, np.float32), "none": np.zeros((2, 0), np.float32)})
    put = snapshot(1, layout=layout, buffers={"weights": noise(layout.size, 1), "optimizer/m": noise(elements, 2)})
    assert_same(saved(tmp_path, put).load(), put)
    pieces = sum(-(-4 * flat.size // (1 << 20)) for flat in put.buffers.values())
    records = read_records((tmp_path / "step-000000001" / "control.pb").read_bytes())
    assert len(records) == 1 + len(put.buffers) + pieces


def test_a_strided_view_is_saved_as_what_it_shows(tmp_path: Path) -> None:
    every_second = noise(2 * SMALL.size, 5)[::2]
    put = snapshot(1, buffers={"weights": every_second})
    got = saved(tmp_path, put).load()
    assert got.buffers["weights"].tobytes() == np.ascontiguousarray(every_second).tobytes()


def test_a_save_says_what_a_listing_says(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "a" / "b", keep=3)
    assert checkpoints.list() == []
    info = checkpoints.save(snapshot(1000000000, best=True))
    assert checkpoints.list() == [info]
    assert (info.name, info.step, info.term, info.best, info.finite) == ("step-1000000000", 10**9, 1, True, True)
    assert info.metrics == {"loss": 0.25, "accuracy": 0.1 + 0.2}
    assert info.size_bytes == sum(file.stat().st_size for file in Path(info.path).iterdir())


def test_a_step_saved_again_takes_the_place_of_the_older_one(tmp_path: Path) -> None:
    again = snapshot(4, seed=1)
    checkpoints = saved(tmp_path, snapshot(4), again)
    assert_same(checkpoints.load(), again)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000000004"]


def test_a_snapshot_without_weights_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a snapshot without weights; it has \['optimizer/m'\]"):
        Checkpoints(tmp_path, keep=1).save(snapshot(1, buffers={"optimizer/m": noise(4)}))
    assert list(tmp_path.iterdir()) == []


# --- the format, with nothing but protobuf


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at


def read_records(data: bytes) -> list[CheckpointRecord]:
    records, at = [], 0
    while at < len(data):
        length, at = read_varint(data, at)
        records.append(CheckpointRecord.FromString(data[at : at + length]))
        at += length
    return records


def slow_crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_the_files_can_be_read_with_protobuf_alone(tmp_path: Path) -> None:
    put = snapshot(7)
    saved(tmp_path, put)
    home = tmp_path / "step-000000007"
    assert slow_crc32c(b"123456789") == 0xE3069283  # CRC-32C, as its catalogue has it

    raw = (home / "manifest.pb").read_bytes()
    assert int.from_bytes(raw[-4:], "little") == slow_crc32c(raw[:-4])
    manifest = CheckpointManifest.FromString(raw[:-4])
    assert manifest.format_version == 1
    assert (manifest.run_id, manifest.step, manifest.weights_version) == ("r-1", 7, 7)
    assert dict(manifest.tree) == put.tree
    assert [file.name for file in manifest.files] == ["control.pb", "spheres.pb"]
    for file in manifest.files:
        data = (home / file.name).read_bytes()
        assert (len(data), slow_crc32c(data)) == (file.size_bytes, file.crc32c)
        records = read_records(data)
        assert len(records) == file.records_count
        for record in records:
            payloads = [p for p in (record.run, record.buffer_header, record.sphere, record.buffer_chunk) if p]
            assert [slow_crc32c(payload) for payload in payloads] == [record.crc32c]

    run, *rest = read_records((home / "control.pb").read_bytes())
    record = RunRecord.FromString(run.run)
    assert record.callback_states == put.run.callback_states
    assert record.weights_sha256 == manifest.weights_sha256
    buffers: dict[str, bytes] = {}
    while rest:
        header = BufferHeader.FromString(rest.pop(0).buffer_header)
        chunks = []
        while sum(map(len, chunks)) < header.size_bytes:
            chunks.append(rest.pop(0).buffer_chunk)
        buffers[header.name] = b"".join(chunks)
        assert header.crc32c == slow_crc32c(b"".join(struct.pack("<I", slow_crc32c(chunk)) for chunk in chunks))
    assert buffers == bits(put.buffers)
    spheres = [SphereRecord.FromString(r.sphere) for r in read_records((home / "spheres.pb").read_bytes())]
    assert spheres == put.spheres


# --- retention


@pytest.mark.parametrize(
    ("keep", "keep_every", "best", "stay"),
    [
        (1, None, None, [60]),
        (3, None, None, [60, 50, 40]),
        (9, None, None, [60, 50, 40, 30, 20, 10]),
        (1, 20, None, [60, 40, 20]),
        (2, 30, 10, [60, 50, 30, 10]),
        (1, None, 60, [60]),
    ],
)
def test_the_last_every_kth_and_the_best_stay(
    tmp_path: Path, keep: int, keep_every: int | None, best: int | None, stay: list[int]
) -> None:
    every = [snapshot(step, best=step == best) for step in range(10, 70, 10)]
    checkpoints = saved(tmp_path, *every, keep=keep, keep_every=keep_every)
    assert steps(checkpoints) == stay
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(f"step-{step:09d}" for step in stay)


def test_of_several_that_were_the_best_the_last_is(tmp_path: Path) -> None:
    bests = [snapshot(10, best=True), snapshot(20, best=True), snapshot(30, best=True, finite=False)]
    assert steps(saved(tmp_path, *bests, snapshot(40), keep=1)) == [40, 20]


def test_the_last_good_one_is_never_removed(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, snapshot(10), snapshot(20), keep=2)
    for step in (30, 40, 50):  # none of them can be restored to
        checkpoints.save(snapshot(step, finite=False))
    assert steps(checkpoints) == [50, 40, 20]
    assert checkpoints.load().run.step == 20
    checkpoints.save(snapshot(60))
    assert steps(checkpoints) == [60, 50]


def test_one_that_no_longer_verifies_does_not_count_as_good(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, snapshot(10), snapshot(20), keep=2)
    damage(tmp_path, 20)
    checkpoints.save(snapshot(30, finite=False))
    assert steps(checkpoints) == [30, 20, 10]
    assert checkpoints.load().run.step == 10
    checkpoints.save(snapshot(40))
    assert steps(checkpoints) == [40, 30]


def test_after_a_restore_to_an_earlier_step_what_was_saved_since_is_the_newest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = saved(tmp_path, *(snapshot(step) for step in (10, 20, 30)), keep=3)
    since = [snapshot(15, term=2, seed=9), snapshot(20, term=2, seed=9)]
    checkpoints.save(since[0])
    assert steps(checkpoints) == [15, 30, 20]
    # the schedule may follow another total now: 30 belongs to a course that was left
    assert_same(checkpoints.load(), since[0])
    checkpoints.save(since[1])
    assert steps(checkpoints) == [20, 15, 30]
    assert_same(checkpoints.load(), since[1])
    checkpoints.save(snapshot(25, term=2))
    assert steps(checkpoints) == [25, 20, 15]
    assert caplog.records == []


# --- what can be wrong


def rewritten_manifest(home: Path, **changes: Any) -> None:
    raw = (home / "manifest.pb").read_bytes()
    manifest = CheckpointManifest.FromString(raw[:-4])
    for key, value in changes.items():
        setattr(manifest, key, value)
    data = manifest.SerializeToString()
    (home / "manifest.pb").write_bytes(data + struct.pack("<I", crc32c(data)))


def test_a_newer_format_is_said_and_not_passed_over(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, snapshot(10), snapshot(20))
    rewritten_manifest(tmp_path / "step-000000020", format_version=2)
    says = "has format version 2, this release reads 1; use the release that saved it, or a newer one"
    for name in (None, "step-000000020", tmp_path / "step-000000020"):
        with pytest.raises(NewerFormatError, match=f"step-000000020: manifest.pb {says}"):
            checkpoints.load(name)
    assert [str(problem) for problem in verify(tmp_path / "step-000000020")] == [
        "manifest.pb has format version 2, this release reads 1"
    ]
    assert steps(checkpoints) == [10]
    checkpoints.save(snapshot(30))  # nor is it removed
    assert (tmp_path / "step-000000020").is_dir()
    assert checkpoints.load().run.step == 30  # and behind a newer one of today it is in nobody's way


def test_a_manifest_without_a_version_or_a_file_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, snapshot(10))
    home = tmp_path / "step-000000010"
    rewritten_manifest(home, format_version=0)
    with pytest.raises(CheckpointError, match=r"manifest.pb has no format version"):
        read_snapshot(home)
    data = CheckpointManifest(format_version=1).SerializeToString()
    (home / "manifest.pb").write_bytes(data + struct.pack("<I", crc32c(data)))
    with pytest.raises(CheckpointError, match=r"manifest.pb does not list control.pb"):
        read_snapshot(home)
    data = b"\x08"
    (home / "manifest.pb").write_bytes(data + struct.pack("<I", crc32c(data)))
    with pytest.raises(CheckpointError, match=r"manifest.pb cannot be understood"):
        read_snapshot(home)


def test_load_falls_back_to_the_newest_good_one_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = snapshot(10)
    checkpoints = saved(tmp_path, good, snapshot(20), snapshot(30, finite=False), snapshot(40), snapshot(50))
    damage(tmp_path, 20)
    damage(tmp_path, 40, "spheres.pb")
    (tmp_path / "step-000000050" / "manifest.pb").unlink()
    (tmp_path / "step-7").mkdir()  # no name of a checkpoint
    (tmp_path / "step-000000099").write_text("a file")
    with caplog.at_level(logging.WARNING):
        assert_same(checkpoints.load(), good)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 4
    for line, says in zip(
        told,
        (
            "step-000000050: manifest.pb is missing: no checkpoint is here, or its save was cut off",
            "step-000000040: spheres.pb record",
            "checkpoint step-000000030 holds weights that are not finite",
            "step-000000020: control.pb record",
        ),
        strict=True,
    ):
        assert line.startswith("passed over: ")
        assert says in line


def test_where_none_is_good_the_error_says_what_there_is(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "missing", keep=1)
    with pytest.raises(CheckpointError, match=r"no good checkpoint in .*missing.*; start without --resume, or name"):
        checkpoints.load()
    checkpoints = saved(tmp_path, snapshot(10), snapshot(20))
    damage(tmp_path, 10)
    damage(tmp_path, 20)
    with pytest.raises(CheckpointError, match=r"no good checkpoint in .*; there are step-000000020, step-000000010"):
        checkpoints.load()
    with pytest.raises(CheckpointError, match=r"no checkpoint 'step-3' in .*; there are step-000000020, step-0000"):
        checkpoints.load("step-3")
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CheckpointError, match=r"manifest.pb is missing: .*; name a step-... directory"):
            read_snapshot(path)


def test_a_checkpoint_directory_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints"
    path.write_text("mine")
    checkpoints = Checkpoints(path, keep=1)
    with pytest.raises(CheckpointError, match=r"cannot list checkpoints in .*/checkpoints.*: Not a directory"):
        checkpoints.list()
    with pytest.raises(CheckpointError, match=r"cannot list checkpoints in .*: Not a directory"):
        checkpoints.load()
    with pytest.raises(CheckpointError, match=r"cannot save checkpoint .*: File exists; older ones stand"):
        checkpoints.save(snapshot(1))
    with pytest.raises(CheckpointError, match=r"manifest.pb cannot be read: Not a directory"):
        read_snapshot(path)
    assert path.read_text() == "mine"


def test_another_runs_checkpoint_is_read_and_says_whose_it_is(tmp_path: Path) -> None:
    saved(tmp_path / "theirs", snapshot(5, run_id="r-2"))
    mine = saved(tmp_path / "mine", snapshot(3))
    # what may be done with it is for those to decide who know their own run
    assert mine.load(tmp_path / "theirs" / "step-000000005").run.run_id == "r-2"
    with pytest.raises(CheckpointError, match="no checkpoint 'step-000000005'"):
        mine.load("step-000000005")


def test_weights_that_change_while_they_are_saved_are_found(tmp_path: Path) -> None:
    put = snapshot(1)

    def trains_on(point: str) -> None:
        if point == "save.file.control.pb.opened":
            put.buffers["weights"][2] = 0.5

    Checkpoints(tmp_path, keep=1, fault=trains_on).save(put)
    with pytest.raises(CheckpointError, match="do not fit their SHA-256; they changed while they were saved"):
        read_snapshot(tmp_path / "step-000000001")


def forged(home: Path, records: Sequence[tuple[Any, bytes]], *, listed: bool = True) -> Path:
    """Replace control.pb by one whose checksums are all right, those in the manifest too where it is ``listed``."""
    with (home / "control.pb").open("wb") as stream:
        writer = RecordWriter(stream)
        for field, data in records:
            writer.write(field, data)
    if not listed:
        return home
    raw = (home / "manifest.pb").read_bytes()
    manifest = CheckpointManifest.FromString(raw[:-4])
    entry = manifest.files[0]
    entry.size_bytes, entry.crc32c, entry.records_count = writer.size, writer.checksum, writer.count
    data = manifest.SerializeToString()
    (home / "manifest.pb").write_bytes(data + struct.pack("<I", crc32c(data)))
    return home


def records_in(home: Path) -> list[tuple[Any, bytes]]:
    fields = ("run", "buffer_header", "buffer_chunk")
    return [
        next((field, getattr(record, field)) for field in fields if getattr(record, field))
        for record in read_records((home / "control.pb").read_bytes())
    ]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: [], "control.pb ends before the run"),
        (lambda r: r[1:], "control.pb record 0 checksum of its run differs"),
        (lambda r: r[:1], "control.pb holds no weights"),
        (lambda r: r[:2], "control.pb ends before the rest of 'weights'"),
        (lambda r: [*r, *r[1:3]], "control.pb record 7 holds buffer 'weights' a second time"),
        (lambda r: [*r[:3], *r[2:]], "control.pb record 3 checksum of its buffer_header differs"),
        (lambda r: [r[0], r[1], (r[2][0], r[2][1] + b"\0\0\0\0"), *r[3:]], "record 2 holds 132 bytes of 'weights'"),
        (lambda r: [r[0], r[1], (r[2][0], bytes(128)), *r[3:]], "control.pb holds buffer 'weights', which does not"),
        (lambda r: [r[0], ("buffer_header", BufferHeader(name="weights", size_bytes=8).SerializeToString())],
         "control.pb record 1 announces 8 bytes of 'weights', which do not fit"),
        (lambda r: [*r, ("buffer_header", BufferHeader(name="x", size_bytes=7).SerializeToString())],
         "control.pb record 7 announces 7 bytes of 'x', which do not fit"),
        (lambda r: [("run", b"\x0a\xff"), *r[1:]], "control.pb cannot be understood"),
        (lambda r: [("run", RunRecord(run_id="r").SerializeToString()), *r[1:]], "does not fit its digest"),
    ],
)  # fmt: skip
def test_records_that_make_no_sense_are_refused_though_their_checksums_fit(
    tmp_path: Path, change: Any, says: str
) -> None:
    saved(tmp_path, snapshot(1))
    home = tmp_path / "step-000000001"
    good = records_in(home)
    assert verify(forged(home, good)) == []
    forged(home, change(good))
    with pytest.raises(CheckpointError) as caught:
        read_snapshot(home)
    assert says in str(caught.value)
    assert [says in str(problem) for problem in verify(home)] == [True]


def test_a_buffer_more_than_the_manifest_knows_of_is_found(tmp_path: Path) -> None:
    saved(tmp_path, snapshot(1))
    home = tmp_path / "step-000000001"
    size = (home / "control.pb").stat().st_size
    forged(home, [*records_in(home), ("buffer_header", BufferHeader(name="x").SerializeToString())], listed=False)
    assert [str(problem) for problem in verify(home)] == [f"control.pb has {size + 11} bytes, the manifest says {size}"]


# --- looking inside


def test_inspect_says_what_is_inside_in_plain_json(tmp_path: Path) -> None:
    layout = Manifest.of({"w": np.zeros((2, 3), np.float32)})
    weights = layout.pack({"w": np.array([[1, -2, 3], [0, 0, 1]], np.float32)})
    put = snapshot(8, layout=layout, buffers={"weights": weights, "optimizer/m": np.full(4, np.inf, np.float32)})
    put.run.metrics["worst"] = -math.inf
    saved(tmp_path, put)
    found = json.loads(json.dumps(inspect(tmp_path / "step-000000008"), allow_nan=False))
    assert (found["format_version"], found["run_id"], found["term"], found["step"]) == (1, "r-1", 1, 8)
    assert found["metrics"] == {"accuracy": 0.1 + 0.2, "loss": 0.25, "worst": "-Infinity"}
    assert found["tensors"] == [
        {"name": "w", "shape": [2, 3], "dtype": "float32", "norm": math.sqrt(15), "minimum": -2.0, "maximum": 3.0}
    ]
    assert found["optimizer"] == {"count": 8, "buffers": {"m": {"elements": 4, "norm": None}}}
    assert found["spheres"][0] == {"sphere_id": "s-1", "host": "h", "role": "leaf"}
    assert found["tree"] == {"s-1": "control", "s-2": "s-1"}
    assert found["callbacks"] == ["EarlyStopping", "mine <&>"]
    assert found["config"] == {"seed": 3}
    assert found["size_bytes"] == sum(f.stat().st_size for f in (tmp_path / "step-000000008").iterdir())
    damage(tmp_path, 8)
    with pytest.raises(CheckpointError, match=r"control.pb"):
        inspect(tmp_path / "step-000000008")


def test_arguments_that_make_no_sense(tmp_path: Path) -> None:
    for keep, keep_every in ((0, None), (1, 0)):
        with pytest.raises(ValueError, match="both count from 1"):
            Checkpoints(tmp_path, keep=keep, keep_every=keep_every)
    assert "keep=2" in repr(Checkpoints(tmp_path, keep=2))
    assert isinstance(saved(tmp_path, snapshot(1)).list()[0], CheckpointInfo)


# --- comparing and exporting


def numbers(root: Path, weights: Array, momentum: Array, **config: Any) -> Path:
    put = snapshot(4, buffers={"weights": weights, "optimizer/momentum": momentum})
    put.run.config_json = RunConfig(**{"steps": 99, **config}).to_json()
    saved(root, put)
    return root / "step-000000004"


def test_equal_checkpoints_of_other_trees_are_equal(tmp_path: Path) -> None:
    flat, momentum = np.ones(SMALL.size, np.float32), np.zeros(SMALL.size, np.float32)
    a, b = (
        numbers(tmp_path / "a", flat, momentum, spheres=1),
        numbers(tmp_path / "b", flat, momentum, spheres=5, steps=200),
    )
    found = diff(a, b)
    assert found["equal"] is True
    assert found["config"] == {"steps": [99, 200], "spheres": [1, 5]}
    assert (found["tensors"], found["values"], found["only_in_a"], found["only_in_b"]) == ([], {}, [], [])


def test_a_diff_says_which_tensors_differ_and_by_how_much(tmp_path: Path) -> None:
    flat, momentum = np.ones(SMALL.size, np.float32), np.zeros(SMALL.size, np.float32)
    other, moved = flat.copy(), momentum.copy()
    weight, bias = SMALL.tensors[0], SMALL.tensors[2]
    other[weight.offset + 2] = np.nextafter(np.float32(1), np.float32(2))
    other[weight.offset + 7] = 3.0
    moved[bias.offset] = -0.0
    moved[bias.offset + 1] = np.nan
    other[weight.offset + weight.size] = 9.0  # padding belongs to no tensor
    found = diff(numbers(tmp_path / "a", flat, momentum), numbers(tmp_path / "b", other, moved))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["equal"] is False
    assert found["tensors"] == [
        {
            "name": "w", "shape": [3, 5], "elements": 15, "differing": 2, "max_abs": 2.0,
            "relative_norm": math.sqrt((4 + 2.0**-46) / 15), "max_ulp": 3 * 2**22,
        },
        {
            "name": "optimizer/momentum/b", "shape": [7], "elements": 7, "differing": 2, "max_abs": "NaN",
            "relative_norm": "NaN", "max_ulp": 0x7FC00000,
        },
    ]  # fmt: skip


def test_what_counts_for_the_bits_makes_two_checkpoints_differ(tmp_path: Path) -> None:
    flat, momentum = np.ones(SMALL.size, np.float32), np.zeros(SMALL.size, np.float32)
    a = numbers(tmp_path / "a", flat, momentum)
    assert diff(a, numbers(tmp_path / "rate", flat, momentum, learning_rate=0.5))["equal"] is False
    cosine = [numbers(tmp_path / f"{n}", flat, momentum, schedule={"kind": "cosine"}, steps=n) for n in (9, 10)]
    assert diff(*cosine)["equal"] is False
    saved(tmp_path / "later", snapshot(5, buffers={"weights": flat}))
    found = diff(a, tmp_path / "later" / "step-000000005")
    assert (found["equal"], found["values"]["step"], found["values"]["optimizer_count"]) == (False, [4, 5], [4, 5])
    assert found["only_in_a"] == ["optimizer/momentum/w", "optimizer/momentum/none", "optimizer/momentum/b"]
    layout = Manifest.of({"w": np.zeros((5, 3), np.float32)})
    saved(tmp_path / "shape", snapshot(4, layout=layout, buffers={"weights": np.ones(layout.size, np.float32)}))
    found = diff(a, tmp_path / "shape" / "step-000000004")
    assert found["tensors"] == [{"name": "w", "shapes": [[3, 5], [5, 3]]}]
    damage(tmp_path / "a", 4)
    with pytest.raises(CheckpointError, match=r"control\.pb record"):
        diff(a, a)


def test_weights_are_exported_whole_or_not_at_all(tmp_path: Path) -> None:
    flat = noise(SMALL.size, 3)
    home = numbers(tmp_path, flat, np.zeros(SMALL.size, np.float32))
    file = tmp_path / "out.safetensors"
    written = export(home, file)
    assert (written["step"], written["parameters"]) == (4, 22)
    arrays = read_safetensors(file)
    assert {name: array.tobytes() for name, array in arrays.items()} == {
        name: view.tobytes() for name, view in SMALL.views(flat).items()
    }
    before = file.read_bytes()
    with pytest.raises(ConfigError, match=r"out\.safetensors exists already; give --force to overwrite it"):
        export(home, file)
    damage(tmp_path, 4)
    with pytest.raises(CheckpointError, match=r"control\.pb record"):
        export(home, file, force=True)
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "step-000000004"]
    with pytest.raises(ConfigError, match="cannot write"):
        export(numbers(tmp_path / "b", flat, flat), tmp_path / "missing" / "x")
