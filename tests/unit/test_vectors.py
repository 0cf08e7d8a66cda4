"""The golden vectors of protos/testdata, and the bytes of docs/protocol.md.

The vectors are made by second implementations of the recipes, in plain Python; the project's own code is held to them.
``python tests/unit/test_vectors.py`` writes them anew. Those of the shuffle are in test_sampling.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spheres.blocks import Block, decompose, halves
from spheres.carrier import Inline, Piece
from spheres.config import NodeConfig
from spheres.frames import blocks_to, decode
from spheres.hub import TRAIN, Child, Hub, Work
from spheres.narrow import add_rounded, from_wire, round_in_place, to_wire, wire_itemsize
from spheres.numerics import crc32c, mean, version_digest
from spheres.outbox import Outbox
from spheres.reducer import Held
from spheres.sampling import Sampler
from spheres.task import Sums
from spheres.tensors import Manifest, TensorSpec
from spheres.v1 import common_pb2
from spheres.v1 import work_pb2 as pb
from spheres.weights import Weights
from spheres.worker import Failure, Unit

ROOT = Path(__file__).parents[2]
TESTDATA = ROOT / "protos" / "testdata"

# ---- digests


MANIFESTS: list[dict[str, tuple[int, ...]]] = [
    {"w": (3,)},
    {"layer0.weight": (4, 5), "layer0.bias": (5,), "scale": ()},
    {"größe": (17,), "empty": (0,), "after": (1,)},
]


def plain_manifest(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    tensors, offset = [], 0
    for name, shape in shapes.items():
        tensors.append({"name": name, "shape": list(shape), "offset": offset, "dtype": "float32"})
        size = 1
        for axis in shape:
            size *= axis
        offset += (size + 15) // 16 * 16
    rows = ",".join(
        f'["{name_text(t["name"])}",[{",".join(map(str, t["shape"]))}],{t["offset"]},"float32"]' for t in tensors
    )
    text = f"[{rows}]"
    digest = hashlib.sha256(text.encode("ascii")).digest()[:16]
    return {"tensors": tensors, "elements": offset, "text": text, "digest": digest.hex()}


def name_text(name: str) -> str:
    """A name as JSON in ASCII; enough for names without quotes, backslashes and controls."""
    return "".join(c if c < "\x7f" else f"\\u{ord(c):04x}" for c in name)


def plain_crc32c(data: bytes) -> int:
    """CRC-32C bit by bit: the reflected polynomial 0x82F63B78, all ones before and after."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def plain_version(shapes: Mapping[str, tuple[int, ...]], chunk_bytes: int) -> dict[str, Any]:
    manifest = plain_manifest(shapes)
    values = [struct.pack("<f", 0.25 * (i % 11) - 1) for i in range(manifest["elements"])]
    inside = {
        i
        for tensor, shape in zip(manifest["tensors"], shapes.values(), strict=True)
        for i in range(tensor["offset"], tensor["offset"] + int(np.prod(shape)))
    }
    flat = b"".join(value if i in inside else bytes(4) for i, value in enumerate(values))
    checksums = [plain_crc32c(flat[at : at + chunk_bytes]) for at in range(0, len(flat), chunk_bytes)]
    digest = hashlib.sha256(bytes.fromhex(manifest["digest"]) + struct.pack(f"<{len(checksums)}I", *checksums))
    without_padding = b"".join(values[i] for i in sorted(inside))
    return {
        "manifest_digest": manifest["digest"],
        "chunk_bytes": chunk_bytes,
        "flat": flat.hex(),
        "checksums": [f"{checksum:08x}" for checksum in checksums],
        "digest": digest.digest()[:16].hex(),
        "sha256_without_padding": hashlib.sha256(without_padding).hexdigest(),
    }


def digests() -> dict[str, Any]:
    return {
        "about": "docs/protocol.md, Digests; bytes as hexadecimal, checksums as 32-bit words",
        "crc32c": [{"text": t, "crc32c": f"{plain_crc32c(t.encode()):08x}"} for t in ("", "123456789", "armillary")],
        "manifests": [plain_manifest(shapes) for shapes in MANIFESTS],
        "versions": [plain_version(shapes, size) for shapes, size in zip(MANIFESTS, (64, 64, 128), strict=True)],
    }


def test_digests_of_the_code() -> None:
    vectors = golden("digests")
    for case in vectors["crc32c"]:
        assert crc32c(case["text"].encode()) == int(case["crc32c"], 16)
    by_digest = {}
    for case in vectors["manifests"]:
        arrays = {t["name"]: np.zeros(t["shape"], np.float32) for t in case["tensors"]}
        manifest = Manifest.of(arrays)
        assert manifest.size == case["elements"]
        assert manifest.tensors == tuple(TensorSpec(t["name"], tuple(t["shape"]), t["offset"]) for t in case["tensors"])
        assert manifest.digest.hex() == case["digest"]
        by_digest[case["digest"]] = manifest
    for case in vectors["versions"]:
        manifest = by_digest[case["manifest_digest"]]
        config = NodeConfig(run_id="r", manifest=manifest, chunk_bytes=case["chunk_bytes"])
        weights = Weights(config)
        weights.flat[:] = np.frombuffer(bytes.fromhex(case["flat"]), "<f4")
        weights.publish(term=1, version=0)
        checksums = [weights.chunk(i)[0].crc32c for i in range(config.chunk_count)]
        assert [f"{checksum:08x}" for checksum in checksums] == case["checksums"]
        assert weights.digest.hex() == version_digest(manifest.digest, checksums).hex() == case["digest"]
        assert manifest.sha256(weights.flat) == case["sha256_without_padding"]


# ---- blocks, sums, means


def plain_halves(lo: int, hi: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The left half is the largest power of two below the width."""
    half = 1
    while half * 2 < hi - lo:
        half *= 2
    return (lo, lo + half), (lo + half, hi)


def plain_decompose(lo: int, hi: int, block: tuple[int, int]) -> list[tuple[int, int]]:
    """The largest nodes of the tree below ``block`` that lie in ``[lo, hi)``."""
    if hi <= block[0] or block[1] <= lo:
        return []
    if lo <= block[0] and block[1] <= hi:
        return [block]
    left, right = plain_halves(*block)
    return plain_decompose(lo, hi, left) + plain_decompose(lo, hi, right)


def f32(value: float) -> float:
    """Round to float32: of a sum or product of two float32 in float64 that gives the bits of float32 arithmetic."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def plain_sum(leaves: list[float | None], lo: int, hi: int) -> float | None:
    if hi - lo == 1:
        return leaves[lo]
    left, right = (plain_sum(leaves, *half) for half in plain_halves(lo, hi))
    return right if left is None else left if right is None else f32(left + right)


def bits(value: float | None) -> str | None:
    return None if value is None else struct.pack("<f", value).hex()


def from_bits(text: str | None) -> np.float32 | None:
    return None if text is None else np.float32(np.frombuffer(bytes.fromhex(text), "<f4")[0])


def folded(leaves: list[float | None], split: Callable[[int, int], int], lo: int, hi: int) -> float | None:
    """The sum in another order: ``split`` says where a range of more than one leaf is cut."""
    if hi - lo == 1:
        return leaves[lo]
    cut = split(lo, hi)
    left, right = folded(leaves, split, lo, cut), folded(leaves, split, cut, hi)
    return right if left is None else left if right is None else f32(left + right)


#: orders that somebody may take for the canonical one
OTHER_ORDERS: dict[str, Callable[[int, int], int]] = {
    "one_after_the_other": lambda lo, hi: hi - 1,
    "from_the_end": lambda lo, hi: lo + 1,
    "even_halves": lambda lo, hi: (lo + hi) // 2,
}


def sums() -> dict[str, Any]:
    ranges = [(8, 2, 7), (8, 0, 8), (12, 0, 12), (12, 3, 12), (12, 8, 12), (5, 1, 5), (16, 5, 6), (100, 37, 91)]
    # of mixed magnitude, with bits down to the last
    mixed = [f32(((k + 1) * 0x9E3779B9 % 2**32 - 2**31) / 2.0 ** (20 + k * 5 % 7)) for k in range(12)]
    holes: list[float | None] = [None if k in (1, 4, 5, 6, 7, 11) else value for k, value in enumerate(mixed)]
    cases: list[list[float | None]] = [[*mixed], [*mixed[:7]], [*mixed[2:7]], holes, [-0.0, None, None], [1.0]]
    means = [(mixed[k], n) for k, n in ((0, 3), (1, 64), (2, 1437), (3, 41), (4, 60), (5, 49))]
    return {
        "about": "docs/protocol.md, Canonical sums; numbers are float32, little-endian, as hexadecimal; null: absent",
        "decompositions": [
            {"microbatches": m, "range": [lo, hi], "blocks": [list(b) for b in plain_decompose(lo, hi, (0, m))]}
            for m, lo, hi in ranges
        ],
        "sums": [
            {
                "leaves": [bits(leaf) for leaf in leaves],
                "sum": bits(plain_sum(leaves, 0, len(leaves))),
                "wrong": {n: bits(folded(leaves, split, 0, len(leaves))) for n, split in OTHER_ORDERS.items()},
            }
            for leaves in cases
        ],
        "means": [
            {"sum": bits(total), "count": n, "mean": bits(f32(total * f32(1 / n))), "divided": bits(f32(total / n))}
            for total, n in means
        ],
    }


def test_sums_of_the_code() -> None:
    vectors = golden("sums")
    for case in vectors["decompositions"]:
        lo, hi = case["range"]
        found = decompose(set(range(lo, hi)), Block(0, case["microbatches"]))
        assert [list(block) for block in found] == case["blocks"]

    def total(leaves: list[np.float32 | None], block: Block) -> np.float32 | None:
        if block.width == 1:
            return leaves[block.lo]
        left, right = (total(leaves, half) for half in halves(block))
        return right if left is None else left if right is None else np.add(left, right)

    for case in vectors["sums"]:
        leaves = [from_bits(leaf) for leaf in case["leaves"]]
        found = total(leaves, Block(0, len(leaves)))
        assert bits(None if found is None else float(found)) == case["sum"]
    for case in vectors["means"]:
        value = np.array([from_bits(case["sum"])], np.float32)
        mean(value, case["count"])
        assert value.tobytes().hex() == case["mean"]


def test_the_vectors_tell_the_right_order_from_others() -> None:
    vectors = golden("sums")
    for order in OTHER_ORDERS:
        assert any(case["sum"] != case["wrong"][order] for case in vectors["sums"]), order
    assert any(case["mean"] != case["divided"] for case in vectors["means"])


# ---- bfloat16


def plain_bfloat16(value: float) -> float:
    """Round a float32, held as a float64: its last 16 bits go, and what they held against half of one decides."""
    (word,) = struct.unpack("<I", struct.pack("<f", value))
    kept, rest = divmod(word, 1 << 16)
    if value != value:
        kept |= 0x40  # a NaN whose bits were all below must not become infinity
    elif rest > 0x8000 or (rest == 0x8000 and kept % 2):
        kept += 1
    return float(struct.unpack("<f", struct.pack("<I", kept << 16))[0])


def plain_rounded_sum(leaves: list[float | None], lo: int, hi: int) -> float | None:
    """The canonical sum, rounded to bfloat16 at each leaf and each node; each sum was a float32 before."""
    if hi - lo == 1:
        leaf = leaves[lo]
        return None if leaf is None else plain_bfloat16(leaf)
    left, right = (plain_rounded_sum(leaves, *half) for half in plain_halves(lo, hi))
    return right if left is None else left if right is None else plain_bfloat16(f32(left + right))


def rounding() -> dict[str, Any]:
    words = [
        0x00000000, 0x80000000, 0x3F800000, 0x3F807FFF, 0x3F808000, 0x3F808001, 0x3F818000, 0xBF818000, 0x3FFFFFFF,
        0x00000001, 0x00008000, 0x00008001, 0x00018000, 0x007FFFFF, 0x80008000, 0x7F7F0000, 0x7F7F7FFF, 0x7F7F8000,
        0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x40490FDB, 0xC2F6E979,
    ]  # fmt: skip
    values = [float(struct.unpack("<f", struct.pack("<I", word))[0]) for word in words]
    mixed = [f32(((k + 1) * 0x9E3779B9 % 2**32 - 2**31) / 2.0 ** (20 + k * 5 % 7)) for k in range(12)]
    holes: list[float | None] = [None if k in (1, 4, 5) else value for k, value in enumerate(mixed)]
    cases: list[list[float | None]] = [[*mixed], [*mixed[:7]], holes]
    pairs = [(bits(value), str(bits(plain_bfloat16(value)))) for value in values]
    dtypes = ("float32", "bfloat16")
    return {
        "about": "docs/protocol.md, Types on the wire; float32, little-endian, as hexadecimal; null: absent",
        "bfloat16": [{"value": value, "rounded": found, "wire": found[4:]} for value, found in pairs],
        "sums": [
            {
                "leaves": [bits(leaf) for leaf in leaves],
                "sum": bits(plain_rounded_sum(leaves, 0, len(leaves))),
                "wrong": {"rounded_once": bits(plain_bfloat16(plain_sum(leaves, 0, len(leaves)) or 0.0))},
            }
            for leaves in cases
        ],
        "chunks": [plain_chunks(gradient, weights) for weights in dtypes for gradient in dtypes],
    }


def plain_chunks(gradient_dtype: str, weights_dtype: str) -> dict[str, Any]:
    """How a buffer is cut where these types travel, and the digest of the version that it is; 64 bytes to a chunk."""
    itemsizes = {"float32": 4, "bfloat16": 2}
    shapes = {"w": (70,)}
    manifest = plain_manifest(shapes)
    values = [f32(1 / (i + 3)) if i < 70 else 0.0 for i in range(manifest["elements"])]
    sent = [value if weights_dtype == "float32" else plain_bfloat16(value) for value in values]
    wire = b"".join(struct.pack("<f", value)[4 - itemsizes[weights_dtype] :] for value in sent)
    size, elements = itemsizes[weights_dtype], 64 // max(itemsizes[gradient_dtype], itemsizes[weights_dtype])
    chunks = []
    for first in range(0, manifest["elements"], elements):
        count = min(elements, manifest["elements"] - first)
        data = wire[first * size : (first + count) * size]
        chunks.append(
            {
                "first_element": first,
                "offset_bytes": first * 4,
                "gradient_bytes": count * itemsizes[gradient_dtype],
                "weights": data.hex(),
                "crc32c": f"{plain_crc32c(data):08x}",
            }
        )
    checksums = b"".join(struct.pack("<I", int(chunk["crc32c"], 16)) for chunk in chunks)
    return {
        "gradient_dtype": gradient_dtype,
        "weights_dtype": weights_dtype,
        "chunk_bytes": 64,
        "manifest": manifest,
        "flat": b"".join(struct.pack("<f", value) for value in values).hex(),
        "chunks": chunks,
        "digest": hashlib.sha256(bytes.fromhex(manifest["digest"]) + checksums).digest()[:16].hex(),
    }


def narrow_config(case: Mapping[str, Any]) -> NodeConfig:
    shapes = {tensor["name"]: np.zeros(tensor["shape"], np.float32) for tensor in case["manifest"]["tensors"]}
    return NodeConfig(
        run_id="r",
        manifest=Manifest.of(shapes),
        microbatches=1,
        batch_size=1,
        train_size=1,
        chunk_bytes=case["chunk_bytes"],
        gradient_dtype=case["gradient_dtype"],
        weights_dtype=case["weights_dtype"],
    )


@pytest.mark.parametrize("number", range(4))
def test_chunks_of_each_pair_of_types(number: int) -> None:
    """As control sends weights, and takes them back as a gradient."""
    case = golden("rounding")["chunks"][number]
    config, expected = narrow_config(case), case["chunks"]
    root = Hub(config, "control")
    root.weights.flat[:] = np.frombuffer(bytes.fromhex(case["flat"]), "<f4")
    root.weights.publish(term=1, version=0)
    assert root.weights.digest.hex() == case["digest"]
    received, carrier, gradient = Weights(config), Inline(config), np.zeros(config.manifest.size, np.float32)
    received.begin(term=1, version=0, previous_digest=b"", from_chunk=0)
    assert config.chunk_count == len(expected)
    for index, chunk in enumerate(expected):
        head, data = root.weights.chunk(index)
        assert (head.offset_bytes, bytes(data).hex()) == (chunk["offset_bytes"], chunk["weights"])
        assert head.crc32c == int(chunk["crc32c"], 16)
        received.put(head, data)
        part = gradient[chunk["first_element"] :][: config.elements(index, index)]
        message, size = carrier.encode(Piece(pb.WorkRequest(), Block(0, 1), index, [part], None))
        sent = decode(pb.WorkRequest, message).gradient_chunk
        assert (sent.offset_bytes, len(sent.data), size) == (
            chunk["offset_bytes"],
            chunk["gradient_bytes"],
            chunk["gradient_bytes"],
        )
    received.finish(bytes.fromhex(case["digest"]))


def test_the_page_has_how_many_elements_a_chunk_holds() -> None:
    page = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| (\w+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", page, re.MULTILINE)
    assert [row[:2] for row in rows] == [
        (case["gradient_dtype"], case["weights_dtype"]) for case in golden("rounding")["chunks"]
    ]
    for gradient, weights, *numbers in rows:
        config = NodeConfig(
            run_id="r",
            manifest=Manifest.of({"w": np.zeros(1 << 14, np.float32)}),
            chunk_bytes=4096,
            gradient_dtype=gradient,
            weights_dtype=weights,
        )
        held = config.chunk_elements
        sizes = held * wire_itemsize(gradient), held * wire_itemsize(weights)
        offset = Weights(config, root=True).chunk(3)[0].offset_bytes
        assert [int(number.replace(",", "")) for number in numbers] == [held, offset, *sizes]


def test_rounding_of_the_code() -> None:
    vectors = golden("rounding")
    for case in vectors["bfloat16"]:
        value = np.array([from_bits(case["value"])], np.float32)
        assert bytes(to_wire(value, "bfloat16")).hex() == case["wire"]
        assert from_wire(bytes.fromhex(case["wire"]), "bfloat16").tobytes().hex() == case["rounded"]
        round_in_place(value, "bfloat16")
        assert value.tobytes().hex() == case["rounded"]

    def total(leaves: list[str | None], block: Block) -> np.ndarray | None:
        if block.width == 1:
            if leaves[block.lo] is None:
                return None
            leaf = np.array([from_bits(leaves[block.lo])], np.float32)
            round_in_place(leaf, "bfloat16")
            return leaf
        left, right = (total(leaves, half) for half in halves(block))
        if left is None or right is None:
            return left if right is None else right
        add_rounded(left, right, left, "bfloat16")
        return left

    for case in vectors["sums"]:
        found = total(case["leaves"], Block(0, len(case["leaves"])))
        assert found is not None
        assert found.tobytes().hex() == case["sum"]
    assert any(case["sum"] != case["wrong"]["rounded_once"] for case in vectors["sums"])


# ---- randomness


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 (Salmon and others, "Parallel random numbers: as easy as 1, 2, 3", 2011)."""
    mask = (1 << 64) - 1
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = second >> 64 ^ b ^ k0, second & mask, first >> 64 ^ d ^ k1, first & mask
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return [a, b, c, d]


def randomness() -> dict[str, Any]:
    cases = [(0, 0, 0), (42, 7, 3), (2**63 - 1, 10**6, 4095)]
    return {
        "about": "docs/protocol-shuffle.md, Randomness inside a microbatch; words are hexadecimal",
        "first_words": [
            {
                "seed": str(seed),
                "step": step,
                "index": index,
                "words": [f"{w:016x}" for n in (1, 2) for w in plain_philox([n, 0, 0, index], [seed, step])],
            }
            for seed, step, index in cases
        ],
    }


def test_randomness_of_the_code() -> None:
    for case in golden("randomness")["first_words"]:
        sampler = Sampler(int(case["seed"]), size=1 << 40, batch_size=1 << 20, microbatches=4096)
        generator = sampler.generator(case["step"], case["index"])
        words = generator.integers(0, 2**64, 8, dtype=np.uint64, endpoint=False)
        assert [f"{int(word):016x}" for word in words] == case["words"]


# ---- frames, as two hubs exchange them


class InlineWorker:
    """Stands for the compute thread: gives the gradient of the example at once."""

    def submit(
        self, unit: Unit, weights: Mapping[str, Any], done: Callable[[Unit, Held | Failure | None], None]
    ) -> None:
        gradient = np.zeros(16, np.float32)
        gradient[:3] = 6.0, -8.0, 1.0
        done(unit, Held(gradient, Sums(2.0, 4, {"accuracy": 3.0})))

    def release(self, held: Held) -> None: ...
    def close(self) -> None: ...


def exchanged() -> dict[str, bytes]:
    """The first messages of an edge, made by the shipped hubs: three weights, two microbatches, step 3."""
    manifest = Manifest.of({"w": np.zeros(3, np.float32)})
    config = NodeConfig(run_id="r-1", manifest=manifest, batch_size=4, microbatches=2, train_size=4, chunk_bytes=4096)
    root = Hub(config, "control", incarnation=1)
    root.address = "127.0.0.1:7070"
    root.weights.publish(term=1, version=2)
    root.weights.flat[:3] = 1.0, -2.0, 0.5
    root.weights.publish(term=1, version=3)
    root.renewed([])
    child = Hub(config, "s-1", incarnation=1_000_000_001, worker=InlineWorker())  # type: ignore[arg-type]
    hello = pb.Hello(
        protocol_version=1,
        sphere_id=child.id,
        incarnation=child.incarnation,
        parent_id="control",
        parent_incarnation=1,
        task_fingerprint="6c1f0a7be2d94538",
        data_fingerprint="0b9d1e5f8a7c2346",
        environment_fingerprint="f3a8c05d1b7e9264",
        held=blocks_to(child.ledger.holdings),
        capacity=child.ledger.capacity,
        address="127.0.0.1:5001",
        member=common_pb2.Member(host="lab-1", pid=4242),
    )
    said = pb.WorkRequest(tag=child.tag, session=1, hello=hello)
    outbox = Outbox(root.weights)
    record = Child(
        id=child.id,
        incarnation=child.incarnation,
        session=1,
        address=hello.address,
        outbox=outbox,
        close=lambda _: None,
    )
    root.admit(record, hello, said.tag)
    welcome = outbox.next()
    assert welcome is not None
    child.relinked(1, decode(pb.WorkResponse, welcome).welcome.path)
    total = np.zeros(16, np.float32)
    root.start(Work(1, 3, TRAIN), total)
    weights = outbox.next()
    assert weights is not None
    child.on_response(decode(pb.WorkResponse, weights))
    gradient = child.next_up()
    assert gradient is not None
    assert not isinstance(gradient, bytes)
    root.on_request(record, decode(pb.WorkRequest, gradient.data))
    assert total.tolist()[:3] == [6.0, -8.0, 1.0]
    sent = decode(pb.WorkRequest, gradient.data)
    sent.gradient_footer.ClearField("phases")  # times are never the same
    return {
        "hello": said.SerializeToString(),
        "welcome": welcome,
        "weights": weights,
        "gradient": sent.SerializeToString(),
        **referred(decode(pb.WorkResponse, weights), sent),
    }


def referred(weights: pb.WorkResponse, gradient: pb.WorkRequest) -> dict[str, bytes]:
    """The same by reference, with a process, a file and a nonce that are always the same."""
    nonce = bytes(range(0x10, 0x20))
    reference = weights.weights_reference
    reference.segment.CopyFrom(pb.Segment(pid=4242, fd=9, nonce=nonce))
    reference.generation = 8
    reference.crc32c.append(weights.weights_chunk.crc32c)
    weights.ClearField("weights_chunk")
    place = gradient.gradient_reference
    place.block.CopyFrom(gradient.gradient_chunk.block)
    place.segment.CopyFrom(pb.Segment(pid=4243, fd=11, nonce=nonce))
    gradient.ClearField("gradient_chunk")
    return {"weights_reference": weights.SerializeToString(), "gradient_reference": gradient.SerializeToString()}


KINDS: dict[str, Any] = {
    "hello": pb.WorkRequest,
    "welcome": pb.WorkResponse,
    "weights": pb.WorkResponse,
    "gradient": pb.WorkRequest,
    "weights_reference": pb.WorkResponse,
    "gradient_reference": pb.WorkRequest,
}


def frames() -> dict[str, Any]:
    return {
        "about": "docs/protocol.md, Bytes; one exchange over an edge, whole messages as hexadecimal",
        "frames": [
            {"name": name, "message": f"spheres.v1.{KINDS[name].DESCRIPTOR.name}", "bytes": data.hex()}
            for name, data in exchanged().items()
        ],
    }


def test_frames_in_the_docs_are_those_of_the_code() -> None:
    """Annotated bytes, line by line: hexadecimal, then a comment."""
    page = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    shown = {}
    for name, block in re.findall(r"^```hex (\w+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        shown[name] = bytes.fromhex("".join(line.partition("#")[0] for line in block.splitlines()))
        assert KINDS[name].FromString(shown[name]).SerializeToString() == shown[name]
    assert shown == exchanged()


# ---- all vectors


VECTORS: dict[str, Callable[[], dict[str, Any]]] = {
    "digests": digests,
    "sums": sums,
    "rounding": rounding,
    "randomness": randomness,
    "frames": frames,
}


def golden(name: str) -> Any:
    return json.loads((TESTDATA / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", VECTORS)
def test_golden_vectors_are_those_of_the_recipes(name: str) -> None:
    assert golden(name) == VECTORS[name]()


if __name__ == "__main__":
    for vector, make in VECTORS.items():
        (TESTDATA / f"{vector}.json").write_text(json.dumps(make(), indent=1) + "\n")
