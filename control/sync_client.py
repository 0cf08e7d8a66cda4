"""``SyncClient``: ``control.client.Client`` for code without ``await``: scripts, notebooks, a Python prompt."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from contextvars import Context
from pathlib import Path
from typing import Any, Self, TypeVar, TypeVarTuple, Unpack

from control.client import DEADLINE, WATCH_PATIENCE, Client, DownloadedWeights, RunEvent
from spheres.errors import LinkClosedError
from spheres.v1 import control_pb2 as pb

__all__ = ["SyncClient"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class SyncClient:
    """The same calls as those of ``Client``, each of which returns when it is done; ``watch`` is a plain iterator.

    A context manager; ``close`` ends what is still under way. One that nobody closes ends with its last reference, or
    with Python. It has an event loop in a thread of its own, so it works where another loop is running, as in a
    notebook, and may be called from several threads.
    """

    def __init__(
        self, address: str | None = None, *, run_dir: str | Path | None = None, deadline: float = DEADLINE
    ) -> None:
        background = _Background()
        # without a reference to this object, which could never go otherwise
        self.close = weakref.finalize(self, background.close)
        self._wait = background.wait

        async def made() -> Client:
            background.client = Client(address, run_dir=run_dir, deadline=deadline)
            return background.client

        try:
            self._client = self._wait(made())
        except BaseException:
            self.close()
            raise
        self.address = self._client.address

    def __repr__(self) -> str:
        return f"<SyncClient {self.address}{'' if self.close.alive else ' closed'}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # --- the run

    def status(self) -> pb.Run:
        return self._wait(self._client.status())

    def pause(self) -> pb.Run:
        return self._wait(self._client.pause())

    def resume(self) -> pb.Run:
        return self._wait(self._client.resume())

    def stop(self, reason: str = "asked to stop") -> pb.Run:
        return self._wait(self._client.stop(reason))

    def watch(self, after_event_id: int = 0, *, patience: float = WATCH_PATIENCE) -> Iterator[RunEvent]:
        events = self._client.watch(after_event_id, patience=patience)

        async def following() -> RunEvent | None:
            return await anext(events, None)

        # whoever stops iterating drops ``events``, and the loop closes what it began
        while (event := self._wait(following())) is not None:
            yield event

    # --- the tree

    def spheres(self) -> list[pb.Sphere]:
        return self._wait(self._client.spheres())

    def spawn(self, count: int = 1, request_id: str = "") -> list[int] | list[str]:
        return self._wait(self._client.spawn(count, request_id))

    def drain(self, sphere: str, reason: str = "") -> None:
        self._wait(self._client.drain(sphere, reason))

    def terminate(self, sphere: str, reason: str = "") -> None:
        self._wait(self._client.terminate(sphere, reason))

    def rebalance(self) -> tuple[list[str], list[str]]:
        return self._wait(self._client.rebalance())

    def logs(self, sphere: str, lines: int = 100) -> list[str]:
        return self._wait(self._client.logs(sphere, lines))

    # --- checkpoints and weights

    def checkpoint(self, request_id: str = "") -> pb.Checkpoint:
        return self._wait(self._client.checkpoint(request_id))

    def checkpoints(self) -> list[pb.Checkpoint]:
        return self._wait(self._client.checkpoints())

    def restore(self, name: str = "", request_id: str = "") -> pb.Run:
        return self._wait(self._client.restore(name, request_id))

    def weights(self) -> DownloadedWeights:
        return self._wait(self._client.weights())


# what a method does is said once
for _name, _method in vars(SyncClient).items():
    if inspect.isfunction(_method) and not _name.startswith("_"):
        _method.__doc__ = getattr(Client, _name).__doc__


class _Background:
    """An event loop in a thread, and the client that lives there. Mutable state: these, and whether they have ended."""

    def __init__(self) -> None:
        self.client: Client | None = None
        self._closed = False
        #: held while something is given to the loop: nothing comes to it after its end, to wait there for ever
        self._lock = threading.Lock()
        self._loop = _Loop()
        # a daemon: Python ends although it runs, and closes it then
        self._thread = threading.Thread(target=self._serve, name="armillary-client", daemon=True)
        self._thread.start()

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what ``work`` gives in the loop. Ctrl+C, or another exception of a signal, cancels it."""
        with self._lock:
            if self._closed:
                work.close()
                raise self._ended()
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise self._ended() from None
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """End what is under way, the loop and the thread."""
        with self._lock:
            self._closed = True
            self._loop.call_soon_threadsafe(self._loop.create_task, self._end())
        if threading.current_thread() is not self._thread:  # else the garbage collector happens to run there
            self._thread.join()

    async def _end(self) -> None:
        try:
            if self.client is not None:
                await self.client.aclose()
        finally:
            self._loop.stop()

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:  # at its end it cancels what is left
            runner.get_loop().run_forever()

    def _ended(self) -> LinkClosedError:
        where = f" of {self.client.address}" if self.client is not None else ""
        return LinkClosedError(f"this client{where} is closed: make another one")


class _Loop(asyncio.SelectorEventLoop):
    """What was cut off ends in gRPC's own thread, and its news may come late: nobody waits for them any more.

    Without this they make noise in another loop of the process, which has to pass them on.
    """

    def call_soon_threadsafe(
        self, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        if self.is_closed():
            return asyncio.Handle(callback, args, self)
        return super().call_soon_threadsafe(callback, *args, context=context)
