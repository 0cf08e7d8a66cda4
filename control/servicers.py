"""ControlService over gRPC: decode, hand to the controller, encode."""

from __future__ import annotations

import asyncio
import json
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from typing import Any

import grpc
import grpc.aio

from control.bottleneck import bottleneck
from control.checkpoint import CheckpointInfo
from control.controller import Controller
from control.lives import Started
from control.tree import Tree
from spheres.config import NodeConfig, manifest_to_proto
from spheres.errors import ArmillaryError, ConfigError, RefusedError, RunStateError
from spheres.hub import Array
from spheres.numerics import crc32c
from spheres.status import code_of
from spheres.tensors import Manifest
from spheres.v1 import control_pb2 as pb
from spheres.v1 import control_pb2_grpc
from spheres.words import encodable

__all__ = ["ControlServicer"]

#: events that a watch can go back to
_KEPT = 10_000
#: events begin behind the term times this: a number of another process of control is none of this one's
_NUMBERS_PER_TERM = 10**9
#: answers that a retry can have again
_ANSWERS = 100
#: versions of the weights that are kept for downloads at once
_MOST_COPIES = 4
#: seconds in which a client must have taken a piece of a download
_PIECE_SECONDS = 60.0
#: lines of a sphere's log in one answer
_MOST_LINES = 1_000


class _Copy:
    """The weights between two steps, for as long as somebody downloads them."""

    def __init__(self, version: int, flat: Array) -> None:
        self.version, self.flat = version, flat
        self._sha256 = ""
        self._hashing = asyncio.Lock()

    async def sha256(self, manifest: Manifest) -> str:
        async with self._hashing:
            self._sha256 = self._sha256 or await asyncio.to_thread(manifest.sha256, self.flat)
        return self._sha256


class ControlServicer(control_pb2_grpc.ControlServiceServicer):
    """Mutable state: the latest events, the answers of calls that may be retried, and the copies for downloads."""

    def __init__(self) -> None:
        self._controller: Controller | None = None
        self._events: deque[tuple[int, float, Mapping[str, Any]]] = deque(maxlen=_KEPT)
        self._last = 0
        self._news = asyncio.Event()
        #: by method and request_id: the request, and what comes of it
        self._answers: dict[tuple[str, str], tuple[Any, asyncio.Task[Any]]] = {}
        #: by term and version; each lives as long as the downloads that send it
        self._copies: weakref.WeakValueDictionary[tuple[int, int], _Copy] = weakref.WeakValueDictionary()
        #: who finds none waits for the one that is being made
        self._copying = asyncio.Lock()
        self._over = False

    def attach(
        self,
        controller: Controller,
        *,
        spawn: Callable[[int], Coroutine[Any, Any, list[Started]]],
        aside: Callable[[], list[tuple[str, str]]],
    ) -> None:
        """Serve this run. ``spawn`` starts more spheres; ``aside`` names those that keep failing, and says why."""
        self._controller, self._spawn, self._aside = controller, spawn, aside
        self._last = controller.tree.term * _NUMBERS_PER_TERM
        controller.publish = self.add

    def add(self, record: Mapping[str, Any]) -> None:
        """Note an event for the watchers."""
        self._last += 1
        self._events.append((self._last, time.time(), record))
        self._news.set()

    def close(self) -> None:
        """End the watches once they have had every event."""
        self._over = True
        self._news.set()

    async def EnrollSphere(self, request: pb.EnrollSphereRequest, context: Any) -> pb.EnrollSphereResponse:
        # the tree's own listener answers it, over every transport; this one is what reflection shows
        controller = await self._ready(context)
        try:
            return controller.tree.grant(request)
        except ArmillaryError as error:
            await context.abort(*code_of(error))
            raise

    async def GetRun(self, request: pb.GetRunRequest, context: Any) -> pb.GetRunResponse:
        return pb.GetRunResponse(run=self._run(await self._ready(context)))

    async def WatchRun(self, request: pb.WatchRunRequest, context: Any) -> AsyncIterator[pb.WatchRunResponse]:
        await self._ready(context)
        seen = request.after_event_id or self._last
        await context.send_initial_metadata((("watch", "stands"),))  # at once: the first event may take long
        while True:
            self._news.clear()
            while seen < self._last:
                # looked up by number each time: while a slow watcher was sent one event, others may have left
                index = len(self._events) - (self._last - seen)
                if index < 0:
                    break
                number, when, record = self._events[index]
                response = pb.WatchRunResponse(
                    event_id=number, event=str(record["event"]), record_json=json.dumps(record)
                )
                response.time.FromNanoseconds(int(when * 1e9))
                yield response
                seen = number
            if seen != self._last:  # gone by, or the number of another process of control
                await context.abort(
                    grpc.StatusCode.OUT_OF_RANGE,
                    f"event {seen + 1} is not kept here: read journal.jsonl and events.jsonl, then watch from now on",
                )
            if self._over:
                return
            await self._news.wait()

    async def PauseRun(self, request: pb.PauseRunRequest, context: Any) -> pb.PauseRunResponse:
        controller = await self._alive(context)
        controller.pause()
        return pb.PauseRunResponse(run=self._run(controller))

    async def ResumeRun(self, request: pb.ResumeRunRequest, context: Any) -> pb.ResumeRunResponse:
        controller = await self._alive(context)
        controller.resume()
        return pb.ResumeRunResponse(run=self._run(controller))

    async def StopRun(self, request: pb.StopRunRequest, context: Any) -> pb.StopRunResponse:
        controller = await self._ready(context)
        controller.request_stop(request.reason or "stopped by request")
        return pb.StopRunResponse(run=self._run(controller))

    async def ListSpheres(self, request: pb.ListSpheresRequest, context: Any) -> pb.ListSpheresResponse:
        tree, aside = (await self._ready(context)).tree, self._aside()
        names = tree.names()
        start, stop, token = await _page(request, len(names) + len(aside), context)
        spheres = [_sphere(tree, name) for name in names[start:stop]]
        for name, reason in aside[max(0, start - len(names)) : max(0, stop - len(names))]:
            spheres.append(pb.Sphere(sphere_id=name, state="aside", reason=reason))
        return pb.ListSpheresResponse(spheres=spheres, next_page_token=token)

    async def SpawnSphere(self, request: pb.SpawnSphereRequest, context: Any) -> pb.SpawnSphereResponse:
        await self._alive(context)
        started = await self._once(request, lambda: self._spawn(request.count), context)
        return pb.SpawnSphereResponse(
            pids=[sphere.pid for sphere in started if sphere.pid is not None],
            names=[sphere.name for sphere in started],
        )

    async def DrainSphere(self, request: pb.DrainSphereRequest, context: Any) -> pb.DrainSphereResponse:
        tree = (await self._alive(context)).tree
        await _found(lambda: tree.drain(request.sphere_id, request.reason), context)
        return pb.DrainSphereResponse()

    async def TerminateSphere(self, request: pb.TerminateSphereRequest, context: Any) -> pb.TerminateSphereResponse:
        tree = (await self._alive(context)).tree
        await _found(lambda: tree.terminate(request.sphere_id, request.reason), context)
        return pb.TerminateSphereResponse()

    async def RebalanceTree(self, request: pb.RebalanceTreeRequest, context: Any) -> pb.RebalanceTreeResponse:
        controller = await self._alive(context)
        moved, late = await _or_abort(controller.between_steps(controller.tree.rebalance), context)
        return pb.RebalanceTreeResponse(moved_sphere_ids=moved, late_sphere_ids=late)

    async def GetSphereLog(self, request: pb.GetSphereLogRequest, context: Any) -> pb.GetSphereLogResponse:
        tree = (await self._ready(context)).tree
        question = tree.log_of(request.sphere_id, min(max(request.lines, 0) or 100, _MOST_LINES))
        try:
            return pb.GetSphereLogResponse(lines=await question)
        except ConfigError as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, code_of(error)[1])
            raise
        except ArmillaryError as error:
            await context.abort(*code_of(error))
            raise

    async def CreateCheckpoint(self, request: pb.CreateCheckpointRequest, context: Any) -> pb.CreateCheckpointResponse:
        controller = await self._alive(context)
        info = await self._once(request, controller.save, context)
        return pb.CreateCheckpointResponse(checkpoint=_checkpoint(info))

    async def ListCheckpoints(self, request: pb.ListCheckpointsRequest, context: Any) -> pb.ListCheckpointsResponse:
        infos = await asyncio.to_thread((await self._ready(context)).checkpoints.list)
        start, stop, token = await _page(request, len(infos), context)
        return pb.ListCheckpointsResponse(
            checkpoints=[_checkpoint(info) for info in infos[start:stop]], next_page_token=token
        )

    async def RestoreCheckpoint(
        self, request: pb.RestoreCheckpointRequest, context: Any
    ) -> pb.RestoreCheckpointResponse:
        controller = await self._alive(context)
        await self._once(request, lambda: controller.restore(request.name or None), context)
        return pb.RestoreCheckpointResponse(run=self._run(controller))

    async def DownloadWeights(  # type: ignore[override]  # it writes, and so may give up
        self, request: pb.DownloadWeightsRequest, context: Any
    ) -> None:
        controller = await self._ready(context)
        copy = await _or_abort(self._copy(controller), context)
        if copy is None:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{RefusedError.__name__}: {_MOST_COPIES} other versions of the weights are being downloaded; call "
                "again when one of these downloads is through",
            )
        stuck = not await _send(copy, controller.node, context)
        del copy  # the abort may have to wait for the client too
        if stuck:
            await context.abort(
                grpc.StatusCode.DEADLINE_EXCEEDED, f"a piece of the weights was not taken within {_PIECE_SECONDS:g} s"
            )

    async def _copy(self, controller: Controller) -> _Copy | None:
        """Return a copy of the weights between two steps; None: there are enough of other versions.

        Where others are being sent this version, it is the same one.
        """

        async def held() -> _Copy | None:
            return self._copies.get((controller.tree.term, controller.step))

        async with self._copying:
            found, term = None, controller.tree.term
            if self._copies:
                found = await (held() if controller.state.ended else controller.between_steps(held))
            if found is None and len(self._copies) < _MOST_COPIES:
                version, flat = await controller.copy_weights()
                found = self._copies[term, version] = _Copy(version, flat)
            return found

    async def _once(self, request: Any, work: Callable[[], Coroutine[Any, Any, Any]], context: Any) -> Any:
        """Do ``work`` and return its answer; a retry of the same request gets it too, unless it was an error."""
        key = type(request).__name__, request.request_id
        before, task = self._answers.get(key, (request, None))
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.create_task(work())
            if request.request_id:
                self._answers[key] = request, task
                if len(self._answers) > _ANSWERS:
                    del self._answers[next(iter(self._answers))]
        elif before != request:
            reason = f"request_id {request.request_id!r} was that of another request: a new wish needs a new one"
            await context.abort(*code_of(ConfigError(reason)))
        # shielded: a caller that goes away does not undo what was begun
        return await _or_abort(asyncio.shield(task), context)

    async def _ready(self, context: Any) -> Controller:
        if self._controller is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "control is starting; try again")
            raise AssertionError("abort raises")
        return self._controller

    async def _alive(self, context: Any) -> Controller:
        controller = await self._ready(context)
        if controller.state.ended:
            await context.abort(*code_of(RunStateError(f"the run is {controller.state}")))
        return controller

    def _aside_in_words(self) -> str:
        found = [f"{name} is set aside: {reason}" for name, reason in self._aside()]
        return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")

    def _run(self, c: Controller) -> pb.Run:
        run = pb.Run(
            run_id=c.run_id,
            term=c.tree.term,
            state=pb.RunState.Value(f"RUN_STATE_{c.state.value.upper()}"),
            reason=c.reason or self._aside_in_words(),
            step=c.step,
            total_steps=c.total_steps,
            epoch=c.epoch,
            steps_per_epoch=c.node.sampler.steps_per_epoch,
            samples_count=c.samples,
            metrics=c.metrics,
            weights_version=max(0, c.tree.hub.weights.version),
            weights_digest=c.tree.hub.weights.digest,
            living_spheres_count=c.living_spheres,
            known_spheres_count=len(c.tree.spheres),
            rates=c.totals.rates(),
            phase_seconds=c.totals.phase_seconds,
            config_json=c.config.to_json(),
            latest_checkpoint=encodable(c.latest_checkpoint.path) if c.latest_checkpoint else "",
            run_dir=encodable(str(c.run_dir.resolve())),
            error=encodable(str(c.error or "")),
            parameters_count=c.node.manifest.parameters,
            best_value=c.best_value,
            bottleneck=bottleneck(c.totals.recent, c.tree.shape()),
            mixed_recomputes_count=c.mixed_recomputes,
        )
        run.start_time.FromNanoseconds(int(c.start_time * 1e9))
        return run


async def _send(copy: _Copy, node: NodeConfig, context: Any) -> bool:
    """Send header, chunks and footer of the weights; False where the client does not read on."""
    sha256 = await copy.sha256(node.manifest)
    whole = copy.flat.data.cast("B")

    def pieces() -> Iterator[pb.DownloadWeightsResponse]:
        yield pb.DownloadWeightsResponse(manifest=manifest_to_proto(node.manifest), weights_version=copy.version)
        for start in range(0, len(whole), node.chunk_bytes):
            payload = bytes(whole[start : start + node.chunk_bytes])
            yield pb.DownloadWeightsResponse(offset_bytes=start, crc32c=crc32c(payload), data=payload)
        yield pb.DownloadWeightsResponse(weights_sha256=sha256)

    try:
        # at once: headers that leave with a first message that is given up would undo the status
        await context.send_initial_metadata(())
        for piece in pieces():
            async with asyncio.timeout(_PIECE_SECONDS):
                await context.write(piece)
    except TimeoutError:
        return False
    except grpc.aio.BaseError:
        pass  # the client has gone
    return True


async def _found(work: Callable[[], None], context: Any) -> None:
    """Do what is asked of a sphere; one that cannot be reached is NOT_FOUND."""
    try:
        work()
    except ConfigError as error:
        await context.abort(grpc.StatusCode.NOT_FOUND, code_of(error)[1])


def _sphere(tree: Tree, name: str) -> pb.Sphere:
    known = tree.spheres[name]
    sphere = pb.Sphere(
        sphere_id=name,
        state=tree.state_of(name),
        parent_id=tree.parent_of(name),
        zone=known.member.zone,
        reason=tree.members.reason_of(name),
        agent=known.agent,
        environment_fingerprint=known.environment,
    )
    # what it said when it enrolled, while its first report is under way; and where a report leaves something out
    sphere.report.CopyFrom(known.enrolled_report())
    if (found := tree.report_of(name)) is not None:
        sphere.report.MergeFrom(found[1])
        sphere.report_age.FromNanoseconds(int(found[0] * 1e9))
    return sphere


async def _or_abort(work: Awaitable[Any], context: Any) -> Any:
    try:
        return await work
    except ArmillaryError as error:
        await context.abort(*code_of(error))


async def _page(request: Any, count: int, context: Any) -> tuple[int, int, str]:
    """Return where a page starts and stops, and the next token."""
    if request.page_token and not request.page_token.isdecimal():
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "page_token is not one of an answer before")
    start = int(request.page_token or 0)
    stop = start + (request.page_size or 1000)
    return start, stop, str(stop) if stop < count else ""


def _checkpoint(info: CheckpointInfo) -> pb.Checkpoint:
    message = pb.Checkpoint(
        name=info.name,
        step=info.step,
        size_bytes=info.size_bytes,
        weights_sha256=info.weights_sha256,
        path=encodable(info.path),
        metrics=dict(info.metrics),
        best=info.best,
    )
    message.create_time.FromDatetime(info.create_time)
    return message
