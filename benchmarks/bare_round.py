"""The least that a round over gRPC can be, to hold ours against: no versions, order, credit, checks or failures.

Control and N processes; the weights go down in chunks of 1 MiB over one bidi stream each, each process answers at once
with as many bytes, and control adds them as they arrive. `benchmarks/step.py` runs it; it prints its rounds as JSON.

    python benchmarks/bare_round.py N BYTES ROUNDS
"""

import asyncio
import contextlib
import json
import sys
import time
from typing import Any

import grpc
import numpy as np
import uvloop

CHUNK = 1 << 20
METHOD = "/bare/Round"
OPTIONS = [("grpc.max_send_message_length", 2 * CHUNK), ("grpc.max_receive_message_length", 2 * CHUNK)]
#: a message is the offset of its bytes, then the bytes
OFFSET = 8


def frames(flat: np.ndarray) -> list[bytes]:
    data = memoryview(flat).cast("B")
    starts = range(0, len(data), CHUNK)
    return [b"".join((start.to_bytes(OFFSET, "little"), data[start : start + CHUNK])) for start in starts]


def place(message: bytes, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the elements of a message, and those of ``flat`` that they belong to."""
    start = int.from_bytes(message[:OFFSET], "little") // 4
    values = np.frombuffer(message, np.float32, offset=OFFSET)
    return values, flat[start : start + values.size]


async def child(address: str, size: int) -> None:
    gradient, weights = np.ones(size, np.float32), np.zeros(size, np.float32)
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        stream = channel.stream_stream(METHOD)()
        await stream.write(b"here")
        got = 0
        while (message := await stream.read()) is not grpc.aio.EOF:
            values, target = place(message, weights)
            np.copyto(target, values)
            got += values.size
            if got == size:  # the whole version is there: the gradient on it is known at once
                got = 0
                for frame in frames(gradient):
                    await stream.write(frame)


class Control:
    def __init__(self, n: int, size: int) -> None:
        self.n, self.size = n, size
        self.streams: list[Any] = []
        self.sum, self.weights = np.zeros(size, np.float32), np.zeros(size, np.float32)
        self.left = 0
        self.all_here, self.all_summed = asyncio.Event(), asyncio.Event()

    async def serve(self, _requests: Any, context: Any) -> None:
        assert await context.read() == b"here"
        self.streams.append(context)
        if len(self.streams) == self.n:
            self.all_here.set()
        while (message := await context.read()) is not grpc.aio.EOF:
            values, target = place(message, self.sum)
            np.add(target, values, out=target)
            self.left -= values.size
            if not self.left:
                self.all_summed.set()

    async def round(self) -> float:
        began = time.perf_counter()
        self.sum.fill(0)
        self.left = self.n * self.size
        self.all_summed.clear()
        sent = frames(self.weights)
        await asyncio.gather(*(self.send(stream, sent) for stream in self.streams))
        await self.all_summed.wait()
        seconds = time.perf_counter() - began
        assert self.sum[0] == self.sum[-1] == self.n
        return seconds

    async def send(self, stream: Any, sent: list[bytes]) -> None:
        for frame in sent:
            await stream.write(frame)


async def control(n: int, size: int, rounds: int) -> list[float]:
    node, server = Control(n, size), grpc.aio.server(options=OPTIONS)
    handler = grpc.stream_stream_rpc_method_handler(node.serve)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", {"Round": handler}),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    words = [sys.executable, __file__, "child", address, str(size)]
    children = [await asyncio.create_subprocess_exec(*words) for _ in range(n)]
    try:
        await node.all_here.wait()
        return [await node.round() for _ in range(rounds)]
    finally:
        await server.stop(0)
        for process in children:
            with contextlib.suppress(ProcessLookupError):  # it saw the server go, and ended
                process.kill()
            await process.wait()


def main() -> None:
    from spheres.environment import tune_malloc

    tune_malloc()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if sys.argv[1] == "child":
            runner.run(child(sys.argv[2], int(sys.argv[3])))
        else:
            n, size, rounds = map(int, sys.argv[1:])
            print(json.dumps(runner.run(control(n, size // 4, rounds))))


if __name__ == "__main__":
    main()
