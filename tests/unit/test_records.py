from __future__ import annotations

import io
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import control.records
from control.records import CHUNK_BYTES, Field, RecordError, RecordReader, RecordWriter, body
from spheres.numerics import crc32c
from spheres.v1.checkpoint_pb2 import CheckpointRecord

FIELDS: tuple[Field, ...] = ("run", "buffer_header", "sphere", "buffer_chunk")
RECORDS = st.lists(st.tuples(st.sampled_from(FIELDS), st.binary(max_size=300)), max_size=6)


def written(records: list[tuple[Field, bytes]]) -> tuple[bytes, RecordWriter]:
    stream = io.BytesIO()
    writer = RecordWriter(stream)
    for field, data in records:
        writer.write(field, data)
    return stream.getvalue(), writer


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


@given(RECORDS)
def test_what_is_written_is_what_protobuf_writes_with_lengths_before_it(records: list[tuple[Field, bytes]]) -> None:
    data, writer = written(records)
    by_protobuf = b""
    for field, payload in records:
        record = CheckpointRecord(crc32c=crc32c(payload))
        setattr(record, field, payload)
        # a checksum of 0 (of no bytes) is spelt out here, and may be: protobuf reads it the same
        encoded = record.SerializeToString() if record.crc32c else b"\x0d\0\0\0\0" + record.SerializeToString()
        if not payload:
            encoded += {"run": b"\x12\0", "buffer_header": b"\x1a\0", "sphere": b"\x22\0", "buffer_chunk": b"\x7a\0"}[
                field
            ]
        by_protobuf += varint(len(encoded)) + encoded
    assert data == by_protobuf
    assert (writer.size, writer.checksum, writer.count) == (len(data), crc32c(data), len(records))


@given(RECORDS)
def test_records_are_read_back(records: list[tuple[Field, bytes]]) -> None:
    data, _ = written(records)
    reader = RecordReader(io.BytesIO(data))
    assert [body(r, records[i][0], i) for i, r in enumerate(reader)] == [payload for _, payload in records]
    assert (reader.size, reader.checksum, reader.count) == (len(data), crc32c(data), len(records))


def test_a_record_as_large_as_a_chunk_and_a_view_of_one() -> None:
    chunk = bytes(range(256)) * (CHUNK_BYTES // 256)
    stream = io.BytesIO()
    RecordWriter(stream).write("buffer_chunk", memoryview(chunk), crc32c(chunk))
    assert stream.getvalue() == written([("buffer_chunk", chunk)])[0]
    stream.seek(0)
    (record,) = RecordReader(stream)
    assert body(record, "buffer_chunk", 0) == chunk


def read_all(data: bytes) -> list[Any]:
    return [(r.crc32c, r.run, r.sphere, r.buffer_chunk) for r in RecordReader(io.BytesIO(data))]


@given(st.binary(max_size=200))
def test_any_bytes_give_records_or_a_clean_error(data: bytes) -> None:
    with suppress(RecordError):
        read_all(data)


@given(RECORDS.filter(bool), st.data())
def test_a_file_cut_within_a_record_says_which(records: list[tuple[Field, bytes]], data: Any) -> None:
    whole, _ = written(records)
    ends = [len(written(records[:n])[0]) for n in range(len(records) + 1)]
    length = data.draw(st.integers(0, len(whole) - 1))
    if length in ends:
        assert len(read_all(whole[:length])) == ends.index(length)
        return
    with pytest.raises(RecordError, match="is cut off") as caught:
        read_all(whole[:length])
    assert caught.value.record == sum(end <= length for end in ends) - 1


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\xff\xff\xff\xff\xff\x01", "has a length that is no length"),
        (b"\xff\xff\xff\xff\x7f", "claims 34359738367 bytes, more than any record has"),
        (b"\x03\xff\xff\xff", "is no CheckpointRecord"),
        (b"\x05\x0d\0\0\0", "is cut off"),
    ],
)
def test_what_is_no_record_is_said(data: bytes, what: str) -> None:
    good, _ = written([("run", b"abc")])
    with pytest.raises(RecordError) as caught:
        read_all(good + data)
    assert str(caught.value) == f"record 1: {what}"


def test_no_record_is_written_that_could_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control.records, "_LARGEST_RECORD", 1000)
    data, _ = written([("run", bytes(936))])
    assert len(read_all(data)) == 1
    with pytest.raises(RecordError, match="would hold 937 bytes; at most 1000 can be read back"):
        written([("run", bytes(937))])


@given(st.sampled_from(FIELDS), st.binary(min_size=1, max_size=40), st.data())
def test_a_flipped_bit_is_found_in_its_record(field: Field, payload: bytes, data: Any) -> None:
    encoded = bytearray(written([(field, payload)])[0])
    bit = data.draw(st.integers(8, len(encoded) * 8 - 1))  # all but the length before it
    encoded[bit // 8] ^= 1 << bit % 8
    try:
        (record,) = RecordReader(io.BytesIO(bytes(encoded)))
        got = body(record, field, 0)
    except RecordError as error:
        found: object = error.record
    else:
        found = got
    # a flipped tag can hide all of a record, and nothing fits the checksum of nothing: that the file's checksum finds
    assert found in (0, b"")
