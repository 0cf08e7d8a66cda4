"""The golden messages of protos/testdata/control.json, and the bytes of docs/clients.md.

They are encoded by a second implementation of the wire format, in plain Python, from field numbers and values; the
generated code is held to them, and so is what ``Client`` sends and understands. ``python
tests/unit/test_control_vectors.py`` writes them anew.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
import re
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.unknown_fields import UnknownFieldSet
from grpc import aio, method_handlers_generic_handler, unary_stream_rpc_method_handler, unary_unary_rpc_method_handler

from control.client import Client
from spheres.config import manifest_from_proto
from spheres.numerics import crc32c

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "protos" / "testdata" / "control.json"


# ---- a second implementation of the wire format


class Fixed32(int):
    """A number in four bytes."""


class Packed(list[int]):
    """Repeated numbers in one field."""


def varint(value: int) -> bytes:
    out = bytearray()
    value %= 1 << 64
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    return bytes([*out, value])


def field(number: int, value: Any) -> bytes:
    match value:
        case Fixed32():
            return varint(number * 8 + 5) + struct.pack("<I", value)
        case int():
            return varint(number * 8) + varint(value)
        case float():
            return varint(number * 8 + 1) + struct.pack("<d", value)
        case Packed():
            return field(number, b"".join(map(varint, value)))
        case list():
            return b"".join(field(number, item) for item in value)
        case str():
            return field(number, value.encode())
        case dict():
            return field(number, message(value))
        case bytes():
            return varint(number * 8 + 2) + varint(len(value)) + value
    raise AssertionError(value)


def message(fields: dict[int, Any]) -> bytes:
    return b"".join(field(number, value) for number, value in sorted(fields.items()))


def plain_crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


# ---- the messages


W = struct.pack("<3f", 1.0, -2.0, 0.5)
B = struct.pack("<2f", 0.25, 3.0)
#: each tensor begins at a multiple of 64 bytes
FLAT = W.ljust(64, b"\0") + B.ljust(64, b"\0")
SHA256 = hashlib.sha256(W + B).hexdigest()
TIME = {1: 1_764_000_000, 2: 500_000_000}
REPORT = {1: "s-1", 2: 1_000_000_001, 3: "control", 4: "leaf", 5: "lab-1", 6: 4242, 8: 3, 10: 6, 11: 12}


def manifest(*tensors: tuple[str, int]) -> dict[int, Any]:
    rows, text, offset = [], [], 0
    for name, size in tensors:
        rows.append({1: name, 2: Packed([size]), 4: "float32", **({3: offset} if offset else {})})
        text.append(f'["{name}",[{size}],{offset},"float32"]')
        offset += -(-size // 16) * 16
    return {1: rows, 2: hashlib.sha256(f"[{','.join(text)}]".encode()).digest()[:16]}


RUN = {
    1: "r-1",
    2: 1,
    3: 3,
    5: 345,
    6: 690,
    7: 15,
    8: 23,
    9: 21_555,
    10: [{1: "accuracy", 2: 0.96875}],
    11: 345,
    12: bytes(range(16)),
    13: 6,
    14: 6,
    17: TIME,
    20: "/runs/a",
    22: 2_410,
    23: 0.96875,
}
CONFIGURATION = {
    1: "r-1",
    2: "digits",
    4: 42,
    5: 4,
    6: 2,
    7: 2,
    8: 4,
    9: 4,
    10: manifest(("w", 3)),
    11: 4096,
    12: 2,
    13: "6c1f0a7be2d94538",
    14: "0b9d1e5f8a7c2346",
    15: {2: 500_000_000},
    16: {1: 4},
    17: 12,
    19: 1,
    20: 1,
    21: 1,
}
CHECKPOINT = {1: "step-000000345", 2: 345, 3: 115_832, 4: TIME, 5: SHA256, 6: "/runs/a/c", 7: [{1: "loss", 2: 0.25}]}

MESSAGES: dict[str, tuple[str, dict[int, Any]]] = {
    "get_run_request": ("GetRunRequest", {}),
    "get_run_response": ("GetRunResponse", {1: RUN}),
    "watch_run_request": ("WatchRunRequest", {1: 1_000_000_041}),
    "watch_run_response": (
        "WatchRunResponse",
        {1: 1_000_000_042, 2: "step", 3: TIME, 4: '{"event": "step", "step": 345}'},
    ),
    "list_spheres_request": ("ListSpheresRequest", {2: "2"}),
    "list_spheres_response": (
        "ListSpheresResponse",
        {1: [{1: "s-1", 2: REPORT, 3: "active", 4: "control", 5: {2: 250_000_000}}], 2: "3"},
    ),
    "spawn_sphere_request": ("SpawnSphereRequest", {1: 2, 2: "grow-1"}),
    "spawn_sphere_response": ("SpawnSphereResponse", {1: Packed([4243, 4244]), 2: ["local-7", "local-8"]}),
    "create_checkpoint_request": ("CreateCheckpointRequest", {1: "save-1"}),
    "create_checkpoint_response": ("CreateCheckpointResponse", {1: CHECKPOINT}),
    "download_weights_request": ("DownloadWeightsRequest", {}),
    "download_weights_header": ("DownloadWeightsResponse", {1: manifest(("w", 3), ("b", 2)), 2: 345}),
    "download_weights_chunk_0": (
        "DownloadWeightsResponse",
        {5: Fixed32(plain_crc32c(FLAT[:64])), 15: FLAT[:64]},
    ),
    "download_weights_chunk_1": (
        "DownloadWeightsResponse",
        {4: 64, 5: Fixed32(plain_crc32c(FLAT[64:])), 15: FLAT[64:]},
    ),
    "download_weights_footer": ("DownloadWeightsResponse", {3: SHA256}),
    "enroll_sphere_request": ("EnrollSphereRequest", {1: 1, 2: "join-1", 4: "lab-1", 8: 4242, 9: "node 20"}),
    "enroll_sphere_response": (
        "EnrollSphereResponse",
        {1: "s-1", 2: 1_000_000_001, 3: CONFIGURATION, 4: ["control"], 5: ["127.0.0.1:7070"], 6: Packed([1]), 7: 1},
    ),
    "heartbeat_request": (
        "HeartbeatRequest",
        {1: "r-1", 2: "s-1", 3: 1_000_000_001, 4: 1, 5: [REPORT], 6: 7_000_000},
    ),
    "heartbeat_response": ("HeartbeatResponse", {1: 7_000_000, 3: 9_500_000}),
}


def generated(name: str) -> Any:
    """The class that protoc has made of a message."""
    module = "work_pb2" if name.startswith("Heartbeat") else "control_pb2"
    return getattr(importlib.import_module(f"spheres.v1.{module}"), name)


def control() -> dict[str, Any]:
    frames = []
    for name, (kind, fields) in MESSAGES.items():
        data = message(fields)
        value = MessageToDict(generated(kind).FromString(data), preserving_proto_field_name=True)
        frames.append({"name": name, "message": f"spheres.v1.{kind}", "bytes": data.hex(), "value": value})
    return {
        "about": "docs/clients.md; whole messages as hexadecimal, and what is in them as JSON, as protobuf writes it",
        "frames": frames,
    }


def golden() -> dict[str, dict[str, Any]]:
    return {frame["name"]: frame for frame in json.loads(GOLDEN.read_text(encoding="utf-8"))["frames"]}


def bytes_of(name: str) -> bytes:
    return bytes.fromhex(golden()[name]["bytes"])


def test_golden_messages_are_those_of_the_wire_format() -> None:
    assert json.loads(GOLDEN.read_text(encoding="utf-8")) == control()


@pytest.mark.parametrize("name", MESSAGES)
def test_the_generated_code_reads_and_writes_them(name: str) -> None:
    frame = golden()[name]
    read = generated(frame["message"].removeprefix("spheres.v1.")).FromString(bytes.fromhex(frame["bytes"]))
    assert read.SerializeToString(deterministic=True).hex() == frame["bytes"]
    assert not UnknownFieldSet(read)
    assert MessageToDict(read, preserving_proto_field_name=True) == frame["value"]


def test_digests_and_checksums_inside_them_are_those_of_the_code() -> None:
    header = generated("DownloadWeightsResponse").FromString(bytes_of("download_weights_header"))
    found = manifest_from_proto(header.manifest)  # raises where the digest is not that of the tensors
    assert (found.size, [(t.name, t.shape, t.offset) for t in found.tensors]) == (32, [("w", (3,), 0), ("b", (2,), 16)])
    for index in range(2):
        chunk = generated("DownloadWeightsResponse").FromString(bytes_of(f"download_weights_chunk_{index}"))
        assert crc32c(chunk.data) == chunk.crc32c
    enrolled = generated("EnrollSphereResponse").FromString(bytes_of("enroll_sphere_response"))
    assert manifest_from_proto(enrolled.configuration.manifest).digest.hex() == "f1424a6cdf58b03875cddd9547e853ad"


# ---- they are what a client sends and understands


class Recorded:
    """A control that knows bytes only: it answers with golden ones, and keeps those that it was sent."""

    def __init__(self) -> None:
        self.heard: dict[str, bytes] = {}

    def handlers(self) -> Any:
        def unary(method: str, answer: str) -> Any:
            async def call(request: bytes, context: Any) -> bytes:
                self.heard[method] = request
                return bytes_of(answer)

            return unary_unary_rpc_method_handler(call)

        def stream(method: str, answers: list[str]) -> Any:
            async def call(request: bytes, context: Any) -> AsyncIterator[bytes]:
                self.heard[method] = request
                for answer in answers:
                    yield bytes_of(answer)

            return unary_stream_rpc_method_handler(call)

        async def pages(request: bytes, context: Any) -> bytes:
            self.heard["ListSpheres"] = request
            # the token of the golden request is asked for after a first page, and the last page is the empty one
            return bytes.fromhex("120132") if not request else b""

        parts = [name for name in MESSAGES if name.startswith("download_weights_") and not name.endswith("request")]
        return method_handlers_generic_handler(
            "spheres.v1.ControlService",
            {
                "GetRun": unary("GetRun", "get_run_response"),
                "WatchRun": stream("WatchRun", ["watch_run_response"]),
                "ListSpheres": unary_unary_rpc_method_handler(pages),
                "SpawnSphere": unary("SpawnSphere", "spawn_sphere_response"),
                "CreateCheckpoint": unary("CreateCheckpoint", "create_checkpoint_response"),
                "DownloadWeights": stream("DownloadWeights", parts),
            },
        )


def test_a_client_sends_the_golden_requests_and_understands_the_golden_answers(run: Any) -> None:
    recorded = Recorded()

    async def calls() -> None:
        server = aio.server()
        server.add_generic_rpc_handlers((recorded.handlers(),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with asyncio.timeout(20), Client(f"127.0.0.1:{port}") as client:
                assert (await client.status()).samples_count == 21_555
                events = [event async for event in client.watch(1_000_000_041)]
                assert [(e.id, e.name, e.record["step"], e.time.timestamp()) for e in events] == [
                    (1_000_000_042, "step", 345, 1_764_000_000.5)
                ]
                await client.spheres()
                await client.spawn(2, "grow-1")
                assert (await client.checkpoint("save-1")).name == "step-000000345"
                weights = await client.weights()
                assert (weights.version, weights.sha256) == (345, SHA256)
                assert {name: array.tolist() for name, array in weights.items()} == {
                    "w": [1.0, -2.0, 0.5],
                    "b": [0.25, 3.0],
                }
        finally:
            await server.stop(None)

    run(calls())
    requests = {name: bytes_of(name) for name in MESSAGES if name.endswith("_request")}
    sent = {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", rpc).lower() + "_request": data for rpc, data in recorded.heard.items()}
    assert sent == {name: data for name, data in requests.items() if name in sent}
    assert len(sent) == 6


# ---- docs/clients.md


def shown() -> Iterator[tuple[str, bytes]]:
    """Annotated bytes, line by line: hexadecimal, then a comment."""
    page = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    for name, block in re.findall(r"^```hex (\w+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        yield name, bytes.fromhex("".join(line.partition("#")[0] for line in block.splitlines()))


def test_bytes_in_the_docs_are_the_golden_ones() -> None:
    frames = json.loads((ROOT / "protos" / "testdata" / "frames.json").read_text(encoding="utf-8"))["frames"]
    known = {frame["name"]: bytes.fromhex(frame["bytes"]) for frame in [*frames, *golden().values()]}
    found = dict(shown())
    for name, data in found.items():
        if name.startswith("grpc_"):  # as gRPC frames it: not compressed, the length, the message
            inner = known[name.removeprefix("grpc_")]
            assert data == b"\0" + struct.pack(">I", len(inner)) + inner, name
        else:
            assert data == known[name], name
    assert golden().keys() - {name.removeprefix("grpc_") for name in found} == {
        "list_spheres_response",
        "spawn_sphere_response",
        "download_weights_request",
    }
    assert found.keys() >= {"hello", "welcome", "weights", "gradient"}


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(control(), indent=1) + "\n")
