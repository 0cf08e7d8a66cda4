from __future__ import annotations

import json
import logging
import os
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

import control.journal
from control.journal import EventLog, Journal, read_records
from spheres.errors import ArmillaryError, ConfigError


def record(step: int, digest: str, term: int = 1) -> dict[str, Any]:
    return {"event": "step", "step": step, "term": term, "weights_digest": digest, "loss": 0.5}


def written(path: Path, *records: dict[str, Any]) -> Path:
    journal = Journal(path)
    for each in records:
        journal.append(each)
    journal.close()
    return path


def digests(path: Path, steps: range = range(6)) -> list[str | None]:
    journal = Journal(path)
    found = [journal.recorded_digest(step) for step in steps]
    journal.close()
    return found


def write_through(log: Journal | EventLog, path: Path, kind: type[FileIO]) -> None:
    log._file.close()
    log._file = kind(path, "a+")


def lines(path: Path) -> list[Any]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for each in found:
        each.pop("crc32c", None)
    return found


def test_a_record_is_on_disk_when_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "journal.jsonl", []
    real = os.fdatasync

    def fdatasync(descriptor: int) -> None:
        synced.append(path.read_text())
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    journal = Journal(path)
    journal.append(record(0, "aa"))
    journal.append(record(1, "bb"))
    # N18: each line was whole before it was synced, and nobody has closed the file
    assert [text.count("\n") for text in synced] == [1, 2]
    assert lines(path) == [record(0, "aa"), record(1, "bb")]
    assert journal.recorded_digest(1) == "bb"
    assert journal.recorded_digest(2) is None
    journal.close()
    assert digests(path) == ["aa", "bb", None, None, None, None]


def test_the_entry_of_a_new_journal_is_durable_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(control.journal, "fsync_directory", synced.append)
    Journal(tmp_path / "journal.jsonl").close()
    assert synced == [tmp_path]


def test_a_last_line_cut_at_any_byte_is_dropped_and_its_step_recorded_again(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole", record(0, "aa"), record(1, "bb"), record(2, "cc")).read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for length in range(start, len(whole)):
        path = tmp_path / "cut"
        path.write_bytes(whole[:length])
        assert digests(path) == ["aa", "bb", None, None, None, None], length
        written(path, record(2, "cc"))
        assert path.read_bytes() == whole


def test_the_end_of_the_last_whole_line_is_found_in_a_long_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "journal.jsonl", *(record(step, "aa") for step in range(5)))
    whole = path.read_bytes()
    for block in (1, 7, 64, len(whole), 2 * len(whole)):
        monkeypatch.setattr(control.journal, "_TAIL_BYTES", block)
        for rest in (b"", b"{", b'{"step":5,' + b" " * 200):
            path.write_bytes(whole + rest)
            Journal(path).close()
            assert path.read_bytes() == whole
    path.write_bytes(b"no end of a line in all of it")
    Journal(path).close()
    assert path.read_bytes() == b""


def test_of_a_step_recorded_twice_the_latest_term_wins(tmp_path: Path) -> None:
    path = written(
        tmp_path / "journal.jsonl",
        record(0, "aa"), record(1, "b1"), record(2, "c1"),
        record(1, "b2", term=2), record(1, "b2", term=2),
        record(2, "late", term=0),
    )  # fmt: skip
    # N18: by term, not by place
    assert digests(path) == ["aa", "b2", "c1", None, None, None]


@pytest.mark.parametrize(
    "broken",
    [b"\x00\xff\x13", b"", b"[]", b"3", b'{"event":"step","step":1}', b'{"step":"x","weights_digest":"b"}', b"{"],
)
def test_a_broken_line_in_the_middle_costs_its_step_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: bytes
) -> None:
    path = written(tmp_path / "journal.jsonl", record(0, "aa"), record(1, "bb"), record(2, "cc"))
    before = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([before[0], broken + b"\n", before[2]]))
    with caplog.at_level(logging.WARNING):
        assert digests(path) == ["aa", None, "cc", None, None, None]
    (told,) = caplog.records
    assert "journal.jsonl: 1 broken lines are passed over, the first is line 2" in told.getMessage()
    # what is there stays, for whoever looks into it
    assert path.read_bytes().splitlines()[1] == broken


def test_forgotten_steps_are_compared_with_nothing_also_in_later_processes(tmp_path: Path) -> None:
    path = written(tmp_path / "journal.jsonl", *(record(step, f"old{step}") for step in range(6)))
    journal = Journal(path)
    journal.forget(2)
    assert [journal.recorded_digest(step) for step in (1, 2, 5)] == ["old1", None, None]
    journal.append(record(2, "new2", term=2))
    journal.close()
    # killed here: the next start must not compare step 3 with a step of the other schedule
    assert digests(path) == ["old0", "old1", "new2", None, None, None]


def test_a_disk_that_is_full_is_one_clear_error_and_leaves_no_half_line(tmp_path: Path) -> None:
    class FullAfter(FileIO):
        room = 20

        def write(self, data: Any) -> int:
            if self.room == 0:
                raise OSError(28, "No space left on device")
            taken = super().write(bytes(data[: self.room]))
            self.room -= taken
            return taken

    path = written(tmp_path / "journal.jsonl", record(0, "aa"))
    before = path.read_bytes()
    journal = Journal(path)
    write_through(journal, path, FullAfter)
    with pytest.raises(ArmillaryError, match=r"journal.jsonl: No space left on device; make room, then .* --resume"):
        journal.append(record(1, "bb"))
    assert path.read_bytes() == before
    assert journal.recorded_digest(1) is None
    FullAfter.room = 10**6
    write_through(journal, path, FullAfter)
    journal.append(record(1, "bb"))
    journal.close()
    assert lines(path) == [record(0, "aa"), record(1, "bb")]


def test_a_line_that_the_system_takes_in_pieces_is_written_whole(tmp_path: Path) -> None:
    class Dribbles(FileIO):
        def write(self, data: Any) -> int:
            return super().write(bytes(data[:7]))

    journal = Journal(tmp_path / "journal.jsonl")
    write_through(journal, journal.path, Dribbles)
    journal.append(record(0, "aa"))
    journal.close()
    assert lines(journal.path) == [record(0, "aa")]


def test_a_journal_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"cannot write .*journal.jsonl: Is a directory"):
        Journal(tmp_path / "journal.jsonl")
    with pytest.raises(ConfigError, match="cannot write"):
        EventLog(tmp_path / "missing" / "events.jsonl")


def test_the_event_log_is_there_at_once_survives_a_cut_and_never_stops_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.append({"event": "sphere_joined", "sphere": "s-1"})
    assert lines(path) == [{"event": "sphere_joined", "sphere": "s-1"}]
    log.close()
    path.write_bytes(path.read_bytes() + b'{"event":"sphe')
    log = EventLog(path)
    log.append({"event": "sphere_lost", "sphere": "s-1"})
    assert [event["event"] for event in lines(path)] == ["sphere_joined", "sphere_lost"]

    class Full(FileIO):
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

    write_through(log, path, Full)
    log.append({"event": "sphere_lost", "sphere": "s-2"})
    log.close()
    assert "cannot write" in caplog.text
    assert len(lines(path)) == 2


# ---- checksums, and reading the records of some steps


def test_every_line_ends_with_the_checksum_of_what_comes_before_it(tmp_path: Path) -> None:
    from spheres.numerics import crc32c

    path = written(tmp_path / "journal.jsonl", record(0, "aa"), {"event": "forget", "from_step": 0}, record(0, "bb"))
    for line in path.read_bytes().splitlines():
        body, _, end = line.rpartition(b',"crc32c":')
        assert json.loads(b"{" + b'"crc32c":' + end)["crc32c"] == f"{crc32c(body):08x}"
        assert json.loads(body + b"}").keys() == json.loads(line).keys() - {"crc32c"}


def test_no_flipped_bit_changes_what_is_read(tmp_path: Path) -> None:
    """Each costs the step of its line and is named, or lies in the checksum's own name and costs nothing."""
    path = written(tmp_path / "journal.jsonl", record(0, "aa"), record(1, "bb"), record(2, "cc"))
    whole = path.read_bytes()
    starts = [0, *(at + 1 for at, byte in enumerate(whole) if byte == ord("\n"))]
    expected = {step: record(step, digest) for step, digest in enumerate(("aa", "bb", "cc"))}
    unnoticed = 0
    for at in range(len(whole) - 1):  # without the last line's end nothing says that it was ever whole
        for bit in (0, 3, 7):
            flipped = bytearray(whole)
            flipped[at] ^= 1 << bit
            path.write_bytes(flipped)
            found = read_records(path, range(3))
            line = sum(1 for start in starts if start <= at)
            if not found.broken:
                unnoticed += 1
                # only the name of the checksum is another
                same = {step: {k: each[k] for k in expected[step]} for step, each in found.steps.items()}
                assert same == expected
                continue
            assert found.broken[0].line == line, at
            assert all(each == expected[step] for step, each in found.steps.items())
            assert len(found.steps) >= 1
    assert unnoticed <= 3 * 3 * len("crc32c")


def test_a_line_without_a_checksum_counts(tmp_path: Path) -> None:
    """Journals of earlier releases have none."""
    path = tmp_path / "journal.jsonl"
    path.write_text("".join(json.dumps(record(step, "aa")) + "\n" for step in range(2)))
    assert digests(path)[:3] == ["aa", "aa", None]
    assert read_records(path, range(2)).broken == []


def test_a_changed_line_is_compared_with_nothing_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path / "journal.jsonl", record(0, "aa"), record(1, "bb"))
    path.write_bytes(path.read_bytes().replace(b'"bb"', b'"bc"'))
    with caplog.at_level(logging.WARNING):
        assert digests(path)[:2] == ["aa", None]
    assert "1 broken lines are passed over, the first is line 2" in caplog.text


def test_records_of_some_steps_are_those_of_their_latest_term(tmp_path: Path) -> None:
    first = {**record(0, "aa"), "origin": {"config": {"steps": 3}}}
    path = written(
        tmp_path / "journal.jsonl",
        first, record(1, "b1"), record(2, "c1"), record(3, "d1"),
        {"event": "forget", "from_step": 2},
        {**record(1, "b2", term=2), "origin": {"config": {"steps": 9}}}, record(2, "c2", term=2), record(1, "late"),
    )  # fmt: skip
    found = read_records(path, range(1, 9))
    assert {step: each["weights_digest"] for step, each in found.steps.items()} == {1: "b2", 2: "c2"}
    assert (found.first, found.last) == (0, 2)
    assert found.origins == {1: {"config": {"steps": 3}}, 2: {"config": {"steps": 9}}}
    path.write_bytes(path.read_bytes() + b'{"event":"st')  # being written just now
    assert read_records(path, range(1, 9)) == found
    assert read_records(tmp_path / "journal.jsonl", range(0)).steps == {}


def test_the_journal_knows_its_highest_term(tmp_path: Path) -> None:
    path = written(tmp_path / "journal.jsonl", record(0, "aa"), record(1, "bb", term=4), record(2, "cc", term=3))
    journal = Journal(path)
    assert journal.term == 4
    journal.append(record(2, "cc", term=5))
    assert journal.term == 5
    journal.close()


def test_where_spheres_see_rounded_weights_a_step_is_compared_by_the_masters_digest(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append({"step": 0, "term": 1, "weights_digest": "aa", "master_digest": "bb"})
    journal.append({"step": 1, "term": 1, "weights_digest": "cc"})
    assert [journal.recorded_digest(step) for step in (0, 1, 2)] == ["bb", "cc", None]
    journal.close()
