"""Shared memory, threads that sum and the thread of the optimizer, all on virtual time.

Memory is real, and shared: who reads what is being written reads what is being written. What is virtual is which
process can find it, and where the numbers in its name come from.
"""

from __future__ import annotations

import asyncio
import random
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np

import control.renewal
import control.tree
import spheres.batches
import spheres.carrier
import spheres.sphere
import spheres.weights
from spheres.config import NodeConfig
from spheres.errors import SegmentError
from spheres.segments import Attached, Memory, Segment
from spheres.tensors import aligned_zeros
from spheres.testing.clock import Process, current_process
from spheres.v1 import work_pb2 as pb


class Machines:
    """Which process is on which machine, and the segments of all. Mutable state: the numbers given so far."""

    def __init__(self) -> None:
        self.places: dict[str, str] = {}
        self.processes: list[Process] = []
        self.segments: weakref.WeakValueDictionary[tuple[int, int], VirtualSegment] = weakref.WeakValueDictionary()
        self.count = 0

    def pid(self, process: Process) -> int:
        if process not in self.processes:
            self.processes.append(process)
        return 1000 + self.processes.index(process)

    def place(self, pid: int) -> str:
        return self.places[self.processes[pid - 1000].name]

    def dead(self, name: pb.Segment) -> bool:
        return self.processes[name.pid - 1000].dead

    def find(self, name: pb.Segment) -> VirtualSegment:
        here = current_process()
        assert here is not None
        found = self.segments.get((name.pid, name.fd))
        if found is None or self.dead(name):
            raise SegmentError(f"cannot open memory of process {name.pid}")
        assert found.name.nonce == name.nonce
        # what a container hides from this process, though that one may see this one's
        if self.place(name.pid).removesuffix("*") != self.places[here.name].rstrip("*!") or (
            self.places[here.name].endswith("!") and here is not self.processes[name.pid - 1000]
        ):
            raise SegmentError(f"no process {name.pid} is seen from here")
        return found


class VirtualSegment(Segment):
    """One process's segment."""

    def __init__(self, elements: int, machines: Machines) -> None:  # no memfd
        process = current_process()
        assert process is not None
        machines.count += 1
        self.name = pb.Segment(
            pid=machines.pid(process), fd=1000 + machines.count, nonce=machines.count.to_bytes(16, "little")
        )
        machines.segments[self.name.pid, self.name.fd] = self
        self._words = np.zeros(1, np.int64)
        self._payload = aligned_zeros(max(elements, 1))[:elements]
        self.__array_interface__ = self._payload.__array_interface__
        self.address = int(self._payload.ctypes.data)


class VirtualAttached(Attached):
    """A segment as another process sees it."""

    def __init__(self, name: pb.Segment, machines: Machines, *, keep: bool = False) -> None:
        self._segment = machines.find(name)
        self.name = name
        if keep:
            here = current_process()
            assert here is not None
            machines.count += 1
            self.name = pb.Segment(pid=machines.pid(here), fd=1000 + machines.count, nonce=name.nonce)
            key = (self.name.pid, self.name.fd)
            machines.segments[key] = self._segment
            weakref.finalize(self, machines.segments.pop, key, None)
        self._words = self._segment._words
        self.array = self._segment.array
        self.array.flags.writeable = False


class VirtualMemory(Memory):
    """One node's segments."""

    def __init__(self, machines: Machines) -> None:
        self._machines = machines
        self._probe = VirtualSegment(0, machines)
        self._own = weakref.WeakValueDictionary()

    def make(self, elements: int) -> Segment:
        segment = VirtualSegment(elements, self._machines)
        self._own[segment.address] = segment
        return segment

    def shares(self, name: pb.Segment) -> bool:
        try:
            self._machines.find(name)
        except SegmentError:
            return False
        return True


class VirtualSummer:
    """Sums take a while: each reads and writes somewhere in it, then the loop is told."""

    def __init__(self, rng: random.Random, seconds: float) -> None:
        self._rng, self._seconds = rng, seconds

    def run(self, works: Sequence[Callable[[], None]], done: Callable[[BaseException | None], None]) -> None:
        loop, left = asyncio.get_running_loop(), len(works)

        def finish(work: Callable[[], None]) -> None:
            nonlocal left
            work()
            left -= 1
            if not left:
                loop.call_later(self._rng.random() * self._seconds * 0.3, done, None)

        for work in works:
            loop.call_later(self._rng.random() * self._seconds, finish, work)

    def wait(self, works: Sequence[Callable[[], None]]) -> None:
        for work in works:
            work()

    def close(self) -> None: ...


class _AbandonedError(BaseException):
    """Ends a thread whose process has been killed."""


class Steps:
    """``asyncio`` for the renewal of weights, whose thread of the optimizer rests wherever it tells of its progress.

    It is a thread, one at a time runs, and between two of its steps virtual time passes.
    """

    def __init__(self, rng: random.Random, seconds: float) -> None:
        self._rng, self._seconds = rng, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def to_thread(self, function: Callable[..., Any], *calls: Any) -> Any:
        if function.__name__ != "apply" or len(calls) < 2:
            return await asyncio.to_thread(function, *calls)
        there, here = threading.Semaphore(0), threading.Semaphore(0)
        told: list[Callable[[], None]] = []
        result: list[Any] = []
        ended = abandoned = False

        def rest(call: Callable[[], None]) -> Callable[[], None]:
            def resting() -> None:
                told.append(call)
                here.release()
                there.acquire()
                if abandoned:
                    raise _AbandonedError

            return resting

        def work() -> None:
            nonlocal ended
            there.acquire()
            try:
                result.append(function(calls[0], *map(rest, calls[1:])))
            except BaseException as error:  # noqa: BLE001 - handed over below
                result.append(error)
            ended = True
            here.release()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while True:
                there.release()
                here.acquire()
                if ended:
                    break
                told.pop()()
                await asyncio.sleep(self._rng.random() * self._seconds)
        finally:
            if not ended:
                abandoned = True
                there.release()
            thread.join(10.0)
        if isinstance(result[0], BaseException):
            raise result[0]
        return result[0]


@contextmanager
def machines(found: Machines, *, window: int, sums: float, streams: float, rng: random.Random) -> Iterator[None]:
    """Replace memory; where they take any time, sums beside the loop and the optimizer's thread too.

    ``window`` is that of an edge that shares memory: with a model as small as these it would be all of it.
    """

    def node_memory(wire: str) -> VirtualMemory | None:
        process = current_process()
        assert process is not None
        if wire == "inline" or not found.places[process.name]:
            return None
        return VirtualMemory(found)

    def attached(name: pb.Segment, *, keep: bool = False) -> VirtualAttached:
        return VirtualAttached(name, found, keep=keep)

    places: list[tuple[Any, str, Any]] = [
        (spheres.sphere, "node_memory", node_memory),
        (control.tree, "node_memory", node_memory),
        (spheres.weights, "Attached", attached),
        (spheres.carrier, "Attached", attached),
        (NodeConfig, "shared_window", window),
    ]
    # never a thread of the shipped ones: it would know no virtual time
    places += [(spheres.batches, "_INLINE_ELEMENTS", 0 if sums else 1 << 62)]
    if sums:
        places += [(module, "Summer", lambda: VirtualSummer(rng, sums)) for module in (spheres.sphere, control.tree)]
    if streams:
        places += [(control.renewal, "_INLINE_ELEMENTS", 0), (control.renewal, "asyncio", Steps(rng, streams))]
    with ExitStack() as stack:
        for module, name, fake in places:
            stack.enter_context(patch.object(module, name, fake))
        yield
