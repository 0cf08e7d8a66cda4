"""Shared memory: what a segment is, that it goes with its last user, and that nothing else passes for one."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import mmap
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import spheres.segments
from spheres.errors import SegmentError
from spheres.segments import HEADER_BYTES, Attached, Memory, Segment, key_of, node_memory
from spheres.v1 import work_pb2 as pb

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="shared memory needs Linux")

NAME = "memfd:armillary"


def open_files() -> list[int]:
    """The inodes of segments that are open here."""
    found: list[int] = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if NAME in os.readlink(entry):  # noqa: PTH115 - it is no path
                found.append(entry.stat().st_ino)
        except FileNotFoundError:
            continue
    return found


def lines() -> list[list[str]]:
    """Segments that are mapped here: addresses, rights, offset, device, inode, name."""
    return [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if NAME in line]


def mappings() -> list[int]:
    return [int(line[4]) for line in lines()]


@pytest.fixture(scope="module", autouse=True)
def _collections_are_quick() -> None:
    """What the tests before have left in memory is not looked through again by each collection here."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    gc.collect()
    before = {*open_files(), *mappings()}
    yield
    gc.collect()
    assert {*open_files(), *mappings()} <= before, "a segment outlives its users"


def test_a_segment_is_zeros_behind_a_page_with_its_nonce_and_generation() -> None:
    segment = Segment(100)
    assert segment.array.dtype == np.float32
    assert segment.array.shape == (100,)
    assert not segment.array.any()
    assert segment.address % 64 == 0
    segment.generation = 0x1122334455667788
    segment.array[:] = np.arange(100)
    raw = Path(f"/proc/self/fd/{segment.fd}").read_bytes()
    assert raw[:16] == segment.name.nonce
    assert int.from_bytes(raw[16:24], "little") == 0x1122334455667788
    assert not any(raw[24:4096])
    assert raw[HEADER_BYTES:] == np.arange(100, dtype="<f4").tobytes()
    assert HEADER_BYTES == 4096


def test_a_reader_sees_what_the_owner_writes_at_once() -> None:
    segment = Segment(1000)
    reader = Attached(segment.name)
    segment.array[7] = 3.5
    segment.generation = 12
    assert reader.array[7] == 3.5
    assert reader.generation == 12
    assert reader.array.size == 1000
    assert key_of(reader.name) == key_of(segment.name)


def test_a_segment_goes_with_the_last_view_of_it() -> None:
    segment = Segment(3000)
    inode = os.fstat(segment.fd).st_ino
    view, reader = segment.array[10:20], Attached(segment.name)
    view[0], part = 7.0, reader.array[10:12]
    assert open_files().count(inode) == 3, "mmap keeps a file open of its own"
    assert mappings().count(inode) == 2
    name = segment.name
    del segment
    gc.collect()
    assert Attached(name).array[10] == 7.0, "a view keeps the file that others find it by"
    del view
    gc.collect()
    assert open_files().count(inode) == 1
    assert mappings().count(inode) == 1
    with pytest.raises(SegmentError, match="cannot open"):
        Attached(name)
    del reader
    gc.collect()
    assert part[0] == 7.0, "who has mapped it has it still"
    assert mappings().count(inode) == 1
    del part
    gc.collect()
    assert inode not in (*mappings(), *open_files())


OWNER = """
    import sys
    from spheres.segments import Segment
    segment = Segment(1 << 20)
    segment.array[:] = 4.0
    print(segment.name.SerializeToString().hex(), flush=True)
    sys.stdin.read()
"""


def test_a_reader_keeps_its_bytes_when_the_owner_is_killed() -> None:
    """SIGKILL: nobody tidies up, and the kernel needs nobody."""
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(OWNER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        name = pb.Segment.FromString(bytes.fromhex(owner.stdout.readline()))
        assert name.pid == owner.pid
        reader = Attached(name)
        owner.send_signal(signal.SIGKILL)
        assert owner.wait(20) == -signal.SIGKILL
    assert (reader.array == 4.0).all()
    with pytest.raises(SegmentError):
        Attached(name)


def test_a_reader_cannot_write() -> None:
    segment = Segment(100)
    reader = Attached(segment.name)
    with pytest.raises(ValueError, match="read-only"):
        reader.array[0] = 1.0
    with pytest.raises(ValueError, match="WRITEABLE"):
        reader.array.flags.writeable = True
    inode = os.fstat(segment.fd).st_ino
    assert sorted(line[1] for line in lines() if int(line[4]) == inode) == ["r--s", "rw-s"]
    # nor by the address, in a process of its own: the kernel ends it
    script = f"""
        import ctypes
        from spheres.segments import Attached
        from spheres.v1 import work_pb2 as pb
        reader = Attached(pb.Segment.FromString(bytes.fromhex("{segment.name.SerializeToString().hex()}")))
        ctypes.memset(reader.array.ctypes.data, 1, 4)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, timeout=20)
    assert ended.returncode == -signal.SIGSEGV
    assert not segment.array.any()
    assert ctypes.string_at(reader.array.ctypes.data, 4) == bytes(4)


def test_a_segment_can_neither_shrink_nor_grow() -> None:
    """A file that shrinks under a reader kills it with SIGBUS."""
    segment = Segment(5000)
    for size in (0, HEADER_BYTES, HEADER_BYTES + 4 * 4999, HEADER_BYTES + 4 * 5001):
        with pytest.raises(PermissionError):
            os.ftruncate(segment.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(segment.fd, 1033, 0x0008)  # F_ADD_SEALS: not even another seal


def named(fd: int, nonce: bytes = bytes(16), pid: int = 0) -> pb.Segment:
    return pb.Segment(pid=pid or os.getpid(), fd=fd, nonce=nonce)


@pytest.mark.parametrize("nonce", [bytes(16), b"", bytes(15), bytes(17), bytes(4096)])
def test_another_nonce_is_refused(nonce: bytes) -> None:
    segment = Segment(10)
    with pytest.raises(SegmentError, match="another nonce"):
        Attached(named(segment.fd, nonce))
    half = segment.name.nonce[:8]
    with pytest.raises(SegmentError, match="another nonce"):
        Attached(named(segment.fd, half))


def test_a_number_that_has_passed_to_another_segment_is_refused() -> None:
    first = Segment(10)
    name, fd = first.name, first.fd
    del first
    gc.collect()
    second = Segment(10)
    assert second.fd == fd
    with pytest.raises(SegmentError, match="another nonce"):
        Attached(name)


@pytest.mark.parametrize("pid", [0, -1, 1 << 22, 2**31 - 1])
def test_processes_that_are_none_are_refused(pid: int) -> None:
    with pytest.raises(SegmentError, match="cannot open"):
        Attached(pb.Segment(pid=pid, fd=3, nonce=bytes(16)))


@pytest.mark.parametrize("fd", [-1, 100_000, 2**31 - 1])
def test_a_file_that_is_not_open_is_refused(fd: int) -> None:
    with pytest.raises(SegmentError, match="cannot open"):
        Attached(named(fd))


def unsealed(size: int = 8192) -> int:
    fd = os.memfd_create("other", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    return fd


def half_sealed() -> int:
    fd = unsealed()
    fcntl.fcntl(fd, 1033, 0x0001 | 0x0004)  # it may still shrink
    return fd


def regular(path: Path) -> int:
    path.write_bytes(bytes(8192))
    return os.open(path, os.O_RDWR)


@pytest.mark.parametrize(
    "other", ["/dev/zero", "/dev/null", "regular", "directory", "unsealed", "half sealed", "pipe", "fifo", "socket"]
)
def test_other_files_are_refused(other: str, tmp_path: Path) -> None:
    """They must not be mapped, waited for, or read from: only a segment can have all seals."""
    more: list[int] = []
    if other == "regular":
        fd = regular(tmp_path / "file")
    elif other == "directory":
        fd = os.open(tmp_path, os.O_RDONLY)
    elif other == "unsealed":
        fd = unsealed()
    elif other == "half sealed":
        fd = half_sealed()
    elif other == "pipe":
        fd, end = os.pipe()
        os.write(end, b"kept")
        more.append(end)
    elif other == "fifo":
        os.mkfifo(tmp_path / "fifo")
        fd = os.open(tmp_path / "fifo", os.O_RDWR)
    elif other == "socket":
        first, second = socket.socketpair()
        fd, end = first.detach(), second.detach()
        more.append(end)
    else:
        fd = os.open(other, os.O_RDWR)
    try:
        files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        with pytest.raises(SegmentError):
            Attached(named(fd))
        assert len(os.listdir("/proc/self/fd")) == files, "the refused file is still open"  # noqa: PTH208
        if other == "pipe":
            assert os.read(fd, 10) == b"kept"
    finally:
        for number in (fd, *more):
            os.close(number)


@pytest.mark.parametrize("size", [0, 1, 15, 4095])
def test_a_sealed_file_without_a_whole_header_is_refused(size: int) -> None:
    fd = unsealed(size)
    fcntl.fcntl(fd, 1033, 0x0007)
    try:
        with pytest.raises(SegmentError):
            Attached(named(fd))
    finally:
        os.close(fd)


def test_a_child_that_was_forked_closes_nothing_of_its_parents() -> None:
    """The number may be another file's there."""
    segment = Segment(10)
    child = os.fork()
    if child == 0:
        with_another_file = segment.fd
        del segment
        gc.collect()
        try:
            os.fstat(with_another_file)
        except OSError:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- Memory


def test_memory_proves_itself_by_its_probe() -> None:
    memory = Memory()
    assert memory.shares(memory.probe)
    assert Memory().shares(memory.probe)
    assert not memory.shares(pb.Segment())
    assert not memory.shares(named(memory.probe.fd))


def test_memory_knows_the_segment_of_an_array_by_where_it_lies() -> None:
    memory = Memory()
    array, other = memory.allocate(50), memory.allocate(50)
    segment = memory.segment_of(array)
    assert segment is not None
    assert segment.address == array.ctypes.data
    assert memory.segment_of(other) is not segment
    assert memory.segment_of(array[1:]) is None
    assert memory.segment_of(np.zeros(50, np.float32)) is None
    assert Memory().segment_of(array) is None
    assert segment.array.nbytes == 200


def test_an_allocated_array_lives_as_long_as_it_is_held() -> None:
    memory = Memory()
    gc.collect()
    before = set(open_files())
    array = memory.allocate(50)
    [inode] = set(open_files()) - before
    array[:] = 2.0
    del array
    gc.collect()
    assert inode not in open_files()


def test_the_runs_wire_decides_whether_a_node_has_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert node_memory("inline") is None
    assert isinstance(node_memory("auto"), Memory)
    assert isinstance(node_memory("shm"), Memory)
    monkeypatch.setattr(spheres.segments.sys, "platform", "darwin")
    assert node_memory("auto") is None
    with pytest.raises(SegmentError, match="needs Linux"):
        node_memory("shm")


@pytest.mark.parametrize("why", ["memfd", "seal", "map"])
def test_where_the_system_gives_no_memory_auto_goes_inline_and_shm_says_so(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    if why == "memfd":
        monkeypatch.setattr(os, "memfd_create", refused)
    elif why == "seal":
        monkeypatch.setattr(fcntl, "fcntl", refused)
    else:
        monkeypatch.setattr(mmap, "mmap", refused)
    assert node_memory("auto") is None
    with pytest.raises(SegmentError, match=r"no shared memory.*No space left"):
        node_memory("shm")
    monkeypatch.undo()
