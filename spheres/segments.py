"""Shared memory of one host: segments that one process makes and writes, and others map and read.

A segment is an anonymous file of the kernel's (memfd) under ``/proc/PID/fd/N``: it has no name that could be left
behind, and is gone with the last process that has it open or mapped, however that one ends. Linux only; elsewhere, and
between containers, nothing is found there and payload goes inline.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import secrets
import sys
import weakref
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spheres.errors import SegmentError
from spheres.v1 import work_pb2 as pb

__all__ = ["Attached", "Key", "Mark", "Memory", "Segment", "key_of", "node_memory"]

log = logging.getLogger(__name__)

Array = npt.NDArray[np.float32]

#: bytes before the payload: the nonce, then the generation as int64; a page, so that the payload is aligned
HEADER_BYTES = 4096
_NONCE_BYTES = 16
#: a file that shrinks under a reader would kill it with SIGBUS: only segments that cannot are mapped
_SEALS = 0x0001 | 0x0002 | 0x0004  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034


class Segment:
    """One segment of this process. Its payload is ``array``, zeros at first, each page touched.

    It lives for as long as it or a view of ``array`` does.
    """

    def __init__(self, elements: int) -> None:
        size = HEADER_BYTES + max(4 * elements, 1)
        try:
            self.fd = os.memfd_create("armillary", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except (AttributeError, OSError) as error:
            raise SegmentError(f"no shared memory: {error}") from None
        weakref.finalize(self, _close, self.fd, os.getpid())
        try:
            os.ftruncate(self.fd, size)
            fcntl.fcntl(self.fd, _F_ADD_SEALS, _SEALS)
            self._map = mmap.mmap(self.fd, size)
        except OSError as error:
            raise SegmentError(f"no shared memory of {size:,} bytes: {error}") from None
        nonce = secrets.token_bytes(_NONCE_BYTES)
        self._map[:_NONCE_BYTES] = nonce
        #: how others find it
        self.name = pb.Segment(pid=os.getpid(), fd=self.fd, nonce=nonce)
        self._words = np.frombuffer(self._map, np.int64, 1, _NONCE_BYTES)
        payload = np.frombuffer(self._map, np.float32, elements, HEADER_BYTES)
        payload.fill(0)
        self.__array_interface__ = payload.__array_interface__
        #: address of the payload
        self.address = int(payload.ctypes.data)

    @property
    def array(self) -> Array:
        """The payload, as a view that keeps the segment alive."""
        return np.asarray(self)

    @property
    def generation(self) -> int:
        """What its readers compare: even while a version is whole in it, odd while it is being written."""
        return int(self._words[0])

    @generation.setter
    def generation(self, value: int) -> None:
        self._words[0] = value


def _close(fd: int, pid: int) -> None:
    if os.getpid() == pid:  # not in a child that was forked with it
        with contextlib.suppress(OSError):
            os.close(fd)


class Attached:
    """A segment of another process, mapped for reading. Raises SegmentError where there is none of that name.

    ``keep``: keep it open, so that others can find it here when its maker is gone; ``name`` then says so.
    """

    def __init__(self, name: pb.Segment, *, keep: bool = False) -> None:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        try:
            fd = os.open(f"/proc/{name.pid}/fd/{name.fd}", flags)
        except OSError as error:
            raise SegmentError(f"cannot open memory of process {name.pid}: {error.strerror}") from None
        try:
            if fcntl.fcntl(fd, _F_GET_SEALS) & _SEALS != _SEALS:
                raise SegmentError(f"file {name.fd} of process {name.pid} is no segment")
            self._map = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise SegmentError(f"cannot map memory of process {name.pid}: {error}") from None
        finally:
            if keep:
                weakref.finalize(self, _close, fd, os.getpid())
            else:
                os.close(fd)
        if len(self._map) < HEADER_BYTES or len(name.nonce) != _NONCE_BYTES or self._map[:_NONCE_BYTES] != name.nonce:
            raise SegmentError(f"memory of process {name.pid} is not what was named: another nonce")
        self.name = pb.Segment(pid=os.getpid(), fd=fd, nonce=name.nonce) if keep else name
        self._words = np.frombuffer(self._map, np.int64, 1, _NONCE_BYTES)
        elements = (len(self._map) - HEADER_BYTES) // 4
        #: read-only
        self.array: Array = np.frombuffer(self._map, np.float32, elements, HEADER_BYTES)

    @property
    def generation(self) -> int:
        return int(self._words[0])


class Mark(NamedTuple):
    """A version in memory that another may overwrite, or in this node's own (None)."""

    attached: Attached | None = None
    generation: int = 0

    @property
    def intact(self) -> bool:
        """Whether nobody has begun to overwrite what has arrived of it.

        To be asked after reading, before anything that follows from it is published (N19).
        """
        # one below: its owner is still writing this very version, of which these chunks are final
        return self.attached is None or 0 <= self.generation - self.attached.generation <= 1


#: what tells one segment from another
Key = tuple[int, int, bytes]


def key_of(name: pb.Segment) -> Key:
    return name.pid, name.fd, name.nonce


class Memory:
    """One node's segments. Raises SegmentError where this system has none.

    Mutable state: which arrays lie in segments of its own.
    """

    def __init__(self) -> None:
        if not sys.platform.startswith("linux"):
            raise SegmentError(f"shared memory needs Linux, this is {sys.platform}")
        # proves to others that they see this process's memory; holds nothing
        self._probe = Segment(0)
        self._own: weakref.WeakValueDictionary[int, Segment] = weakref.WeakValueDictionary()
        Attached(self._probe.name)  # /proc may be hidden from this very process

    @property
    def probe(self) -> pb.Segment:
        return self._probe.name

    def make(self, elements: int) -> Segment:
        segment = Segment(elements)
        self._own[segment.address] = segment
        return segment

    def allocate(self, elements: int) -> Array:
        """Return float32 zeros in a segment of their own, each page touched; gone with the last view."""
        return self.make(elements).array

    def segment_of(self, array: Array) -> Segment | None:
        """Return the segment that ``array`` is the payload of."""
        return self._own.get(array.__array_interface__["data"][0])

    def shares(self, name: pb.Segment) -> bool:
        """Whether this process sees the segment of that name."""
        try:
            Attached(name)
        except SegmentError:
            return False
        return True


def node_memory(wire: str) -> Memory | None:
    """Return a node's memory for the run's wire, None where all is to go inline.

    Raises SegmentError where the run insists on shared memory and this system has none.
    """
    if wire == "inline":
        return None
    try:
        return Memory()
    except SegmentError as error:
        if wire == "shm":
            raise
        log.info("payload goes inline: %s", error)
        return None
