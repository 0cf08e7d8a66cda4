"""``Client``: the run seen from outside, over ``ControlService``. The commands use it, and so may you.

Its twin for code without ``await`` is ``control.sync_client``.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import grpc
from grpc import aio

from control.run_dir import find
from control.run_state import RunState
from spheres.errors import ChecksumError, LinkClosedError, RunStateError, UnreachableError
from spheres.status import from_rpc_error
from spheres.v1 import control_pb2 as pb
from spheres.v1.control_pb2_grpc import ControlServiceStub
from spheres.words import encodable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Client", "DownloadedWeights", "RunEvent", "state_name"]

T = TypeVar("T")

#: seconds; what saves or reads a checkpoint has longer
DEADLINE = 10.0
CHECKPOINT_DEADLINE = 600.0
#: seconds for what waits for the end of a step, or for many processes
MEMBERS_DEADLINE = 120.0
#: seconds for which a cut watch tries to come back, and between two tries
WATCH_PATIENCE = 30.0
WATCH_RETRY = 0.25
#: A watch of a paused run hears nothing for as long as that is: pings tell it from a control that has gone silent.
#: gRPC's keepalive alone would wait a minute for a ping (docs/assumptions.md).
_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
]
#: else gRPC itself dials ever more rarely, and a watch would find only out then that control is back
_REDIAL = [
    ("grpc.initial_reconnect_backoff_ms", int(WATCH_RETRY * 1000)),
    ("grpc.max_reconnect_backoff_ms", int(WATCH_RETRY * 1000)),
]


@dataclass(frozen=True)
class RunEvent:
    """Something that happened in the run: a committed step, an evaluation, a sphere that came or went, ..."""

    #: counts the events of one control process, no other has the same; ``watch`` goes on after it
    id: int
    #: step, evaluation, checkpoint, sphere_joined, sphere_lost, state, error, ...
    name: str
    #: when, by control's clock
    time: datetime
    #: what is known of it; of a step it is the journal's record
    record: Mapping[str, Any]


class DownloadedWeights(Mapping[str, "npt.NDArray[np.float32]"]):
    """The weights between two steps, checked: name -> array, read-only, in the order of the manifest."""

    def __init__(self, version: int, sha256: str, tensors: Mapping[str, npt.NDArray[np.float32]]) -> None:
        #: number of updates that they have had
        self.version = version
        #: over all tensors without padding, as in ``summary.json`` and checkpoints
        self.sha256 = sha256
        self._tensors = tensors

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        parameters = sum(tensor.size for tensor in self._tensors.values())
        return f"<DownloadedWeights version={self.version} tensors={len(self)} parameters={parameters:,}>"


def state_name(run: pb.Run) -> str:
    """Return the state as everywhere else: ``running``, ``completed``, ..."""
    return pb.RunState.Name(run.state).removeprefix("RUN_STATE_").lower()


class Client:
    """One channel to one control. An async context manager; ``aclose`` ends what is still under way.

    Without ``address`` it is that of the run in ``run_dir``, else ARMILLARY_CONTROL, else that of the run in
    ARMILLARY_RUN_DIR, else of the latest run below ``runs/``. Raises ConfigError or UnreachableError where none is
    found.

    Every call raises the error that control meant, or UnreachableError where nobody answers within ``deadline`` seconds
    (what waits for the end of a step, or for a checkpoint, has longer).
    """

    def __init__(
        self, address: str | None = None, *, run_dir: str | Path | None = None, deadline: float = DEADLINE
    ) -> None:
        self.address = find(address, None if run_dir is None else Path(run_dir))
        self._deadline = deadline
        self._closed = False
        # a proxy of the environment is for the web, not for a control that is named by its address
        options = [("grpc.enable_http_proxy", 0), *_KEEPALIVE, *_REDIAL]
        self._channel = aio.insecure_channel(self.address, options=options)
        self._calls = ControlServiceStub(self._channel)

    def __repr__(self) -> str:
        return f"<Client {self.address}{' closed' if self._closed else ''}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """May be called again. A watch or download that is under way ends with LinkClosedError."""
        self._closed = True
        await self._channel.close()

    # --- the run

    async def status(self) -> pb.Run:
        """Return the run as it is now; ``state_name`` names its state."""
        return (await self._call(self._stub.GetRun(pb.GetRunRequest(), timeout=self._deadline))).run

    async def pause(self) -> pb.Run:
        """Finish the step, then wait. Raises RunStateError where the run is over."""
        return (await self._call(self._stub.PauseRun(pb.PauseRunRequest(), timeout=self._deadline))).run

    async def resume(self) -> pb.Run:
        """Go on. Raises RunStateError where the run is over."""
        return (await self._call(self._stub.ResumeRun(pb.ResumeRunRequest(), timeout=self._deadline))).run

    async def stop(self, reason: str = "asked to stop") -> pb.Run:
        """Finish the step, checkpoint, end. Returns when it is asked for, not when it is done: see ``watch``."""
        request = pb.StopRunRequest(reason=encodable(reason))
        return (await self._call(self._stub.StopRun(request, timeout=self._deadline))).run

    async def watch(self, after_event_id: int = 0, *, patience: float = WATCH_PATIENCE) -> AsyncIterator[RunEvent]:
        """Yield events until the run is over. A cut stream is taken up again after the last event seen.

        Raises UnreachableError after ``patience`` seconds of no answer, at once where there never was one;
        RunStateError where the events in between are no longer kept, as by a control that was started again.
        """
        await self.status()  # an address where nobody is fails here, not after ``patience``
        loop = asyncio.get_running_loop()
        last, over, lost_at = after_event_id, False, None
        while True:
            call = self._stub.WatchRun(pb.WatchRunRequest(after_event_id=last))
            try:
                await self._unless_closed(call.initial_metadata())
                if not call.done():
                    lost_at = None  # it stands, however long the next event may take
                while isinstance(response := await self._unless_closed(call.read()), pb.WatchRunResponse):
                    event = _event(response)
                    last, over = event.id, over or _is_end(event)
                    yield event
                return
            except aio.AioRpcError as error:
                if over:
                    return  # it ended before it could say so
                if error.code() == grpc.StatusCode.OUT_OF_RANGE:
                    raise RunStateError(
                        f"control no longer keeps the events after {last}: read journal.jsonl, then watch from now on"
                    ) from error
                lost_at = lost_at or loop.time()
                late = loop.time() - lost_at > patience
                if error.code() != grpc.StatusCode.UNAVAILABLE or late:
                    raise self._meant(error) from error
            finally:
                call.cancel()
            await asyncio.sleep(WATCH_RETRY)

    # --- the tree

    async def spheres(self) -> list[pb.Sphere]:
        """Return all spheres, in order of their ids."""
        pages = await self._pages(lambda: self._stub.ListSpheres, pb.ListSpheresRequest())
        return [sphere for page in pages for sphere in page.spheres]

    async def spawn(self, count: int = 1, request_id: str = "") -> list[int] | list[str]:
        """Let control's launcher start so many more spheres. They join when they are ready.

        Returns their process ids where they are on control's machine, else what the launcher calls them.
        """
        request = pb.SpawnSphereRequest(count=count, request_id=request_id or uuid.uuid4().hex)
        answer = await self._call(self._stub.SpawnSphere(request, timeout=MEMBERS_DEADLINE))
        return list(answer.pids) or list(answer.names)

    async def drain(self, sphere: str, reason: str = "") -> None:
        """Let a sphere finish its step and leave. Returns when it is told. Raises ConfigError where there is none."""
        request = pb.DrainSphereRequest(sphere_id=encodable(sphere), reason=encodable(reason))
        await self._call(self._stub.DrainSphere(request, timeout=self._deadline))

    async def terminate(self, sphere: str, reason: str = "") -> None:
        """End a sphere at once. Returns when it is told. Raises ConfigError where there is none."""
        request = pb.TerminateSphereRequest(sphere_id=encodable(sphere), reason=encodable(reason))
        await self._call(self._stub.TerminateSphere(request, timeout=self._deadline))

    async def rebalance(self) -> tuple[list[str], list[str]]:
        """Place all spheres anew, between two steps. Returns who has moved, and who has not arrived in time."""
        answer = await self._call(self._stub.RebalanceTree(pb.RebalanceTreeRequest(), timeout=MEMBERS_DEADLINE))
        return list(answer.moved_sphere_ids), list(answer.late_sphere_ids)

    async def logs(self, sphere: str, lines: int = 100) -> list[str]:
        """Return the last lines of a sphere's log. Raises ConfigError where no such sphere can be asked."""
        request = pb.GetSphereLogRequest(sphere_id=encodable(sphere), lines=lines)
        return list((await self._call(self._stub.GetSphereLog(request, timeout=self._deadline))).lines)

    # --- checkpoints and weights

    async def checkpoint(self, request_id: str = "") -> pb.Checkpoint:
        """Save after the step in hand, and return when it is on disk."""
        request = pb.CreateCheckpointRequest(request_id=request_id or uuid.uuid4().hex)
        return (await self._call(self._stub.CreateCheckpoint(request, timeout=CHECKPOINT_DEADLINE))).checkpoint

    async def checkpoints(self) -> list[pb.Checkpoint]:
        """Return all checkpoints of the run directory, newest first."""
        pages = await self._pages(lambda: self._stub.ListCheckpoints, pb.ListCheckpointsRequest())
        return [checkpoint for page in pages for checkpoint in page.checkpoints]

    async def restore(self, name: str = "", request_id: str = "") -> pb.Run:
        """Go to a checkpoint of this run (the newest where no name is given); the run goes on from there."""
        request = pb.RestoreCheckpointRequest(name=name, request_id=request_id or uuid.uuid4().hex)
        return (await self._call(self._stub.RestoreCheckpoint(request, timeout=CHECKPOINT_DEADLINE))).run

    async def weights(self) -> DownloadedWeights:
        """Return the weights between two steps. Raises ChecksumError where they are not what was sent, whole."""
        # here: most commands need no numpy
        from spheres.config import manifest_from_proto
        from spheres.numerics import crc32c
        from spheres.tensors import aligned_zeros

        call = self._stub.DownloadWeights(pb.DownloadWeightsRequest(), timeout=CHECKPOINT_DEADLINE)
        try:
            header = await self._unless_closed(call.read())
            if not isinstance(header, pb.DownloadWeightsResponse):
                raise LinkClosedError(f"control at {self.address} ended the download before it began")
            manifest = manifest_from_proto(header.manifest)
            flat = aligned_zeros(manifest.size)
            data = flat.data.cast("B")
            sha256, received = "", 0
            message: object = header
            while isinstance(message, pb.DownloadWeightsResponse):
                if message.data:
                    end = message.offset_bytes + len(message.data)
                    if message.offset_bytes != received or end > len(data) or crc32c(message.data) != message.crc32c:
                        raise ChecksumError(f"the download of the weights is corrupt at byte {message.offset_bytes}")
                    data[message.offset_bytes : end] = message.data
                    received = end
                sha256 = message.weights_sha256 or sha256
                message = await self._unless_closed(call.read())
        except aio.AioRpcError as error:
            raise self._meant(error) from error
        finally:
            call.cancel()
        if received != len(data) or manifest.sha256(flat) != sha256:
            raise ChecksumError("the weights that arrived are not those that were sent; download them again")
        return DownloadedWeights(header.weights_version, sha256, manifest.views(flat, writeable=False))

    # --- errors

    @property
    def _stub(self) -> ControlServiceStub:
        if self._closed:
            raise self._ended()
        return self._calls

    async def _pages(self, method: Callable[[], Any], request: Any) -> list[Any]:
        """Return all pages of a list; ``method`` is looked up for each, since the client may be closed meanwhile."""
        pages: list[Any] = []
        while not pages or pages[-1].next_page_token:
            pages.append(await self._call(method()(request, timeout=self._deadline)))
            request.page_token = pages[-1].next_page_token
        return pages

    async def _call(self, call: Awaitable[T]) -> T:
        try:
            return await self._unless_closed(call)
        except aio.AioRpcError as error:
            raise self._meant(error) from error

    async def _unless_closed(self, call: Awaitable[T]) -> T:
        """Await a call; one that ``aclose`` has cut off looks to gRPC as if the caller were cancelled."""
        try:
            return await call
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._closed or (task is not None and task.cancelling()):
                raise
            raise self._ended() from None

    def _ended(self) -> LinkClosedError:
        return LinkClosedError(f"this client of {self.address} is closed: make another one")

    def _meant(self, error: aio.AioRpcError) -> Exception:
        if error.code() == grpc.StatusCode.UNIMPLEMENTED:
            return UnreachableError(f"{self.address} is no control, or one of another version")
        return from_rpc_error(error, f"control at {self.address}")


def _event(response: pb.WatchRunResponse) -> RunEvent:
    when = datetime.fromtimestamp(response.time.ToNanoseconds() / 1e9, UTC)
    return RunEvent(response.event_id, response.event, when, json.loads(response.record_json or "{}"))


def _is_end(event: RunEvent) -> bool:
    if event.name != "state":
        return False
    try:
        return RunState(event.record["state"]).ended
    except (ValueError, KeyError):
        return False
