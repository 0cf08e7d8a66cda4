"""The played end of each edge, over real gRPC: nodes that listen, and links that a case reads and writes.

What is said on them is the cases' to decide. Heartbeats are answered here, or not where a case plays dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from time import monotonic_ns
from typing import Any

from google.protobuf.message import Message

from control.conformance.arrival import Arrival, order, said_of
from control.conformance.script import BreachError, Script, breach_unless, fields, named
from spheres.blocks import Block
from spheres.config import PROTOCOL_VERSION
from spheres.errors import ArmillaryError, LinkClosedError, ProtocolError, WrongRunError
from spheres.frames import blocks_to, decode
from spheres.grpc_link import GrpcTransport
from spheres.transport import Handlers, Link, Listener, first_end
from spheres.v1 import common_pb2, control_pb2
from spheres.v1 import work_pb2 as pb

__all__ = ["Edge", "Node", "check_hello"]

#: frames that wait for a case to read them
_MOST_WAITING = 4096
#: seconds that a worker which is told to end, and is no process of ours, has for that
_STOP_SECONDS = 2.0
#: heartbeats in which a worker shows that it has run while nothing came of it
_QUIET_BEATS = 2
#: frames that belong to no step
_STEPLESS = {"capacity", "state_report", "log_report", "task_failure", "leaving", "sphere_change"}

_KINDS: dict[int, str] = {common_pb2.WORK_KIND_TRAIN: "train", common_pb2.WORK_KIND_EVALUATE: "evaluate"}

Say = Callable[[str], None]


class Edge:
    """One Work stream of the worker. A case reads it with ``frame``; what belongs to no step is kept in ``said``."""

    def __init__(self, link: Link, script: Script, node: Node, say: Say) -> None:
        self._link, self.script, self.node, self._say = link, script, node, say
        self._frames: asyncio.Queue[pb.WorkRequest | None] = asyncio.Queue(_MOST_WAITING)
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended = asyncio.Event()
        self.message = pb.WorkRequest()
        #: the newest frame of a step, and what it belongs to
        self._newest = (((0, -1, 0), 0), self.message)
        #: what came that belongs to no step
        self.said: list[pb.WorkRequest] = []

    @property
    def hello(self) -> pb.Hello:
        return self.message.hello

    @property
    def session(self) -> int:
        return self.message.session

    @property
    def held(self) -> list[Block]:
        return [Block(block.lo, block.hi) for block in self.hello.held]

    async def serve(self) -> None:
        """Read until either side ends the link; what it raises is the status that the worker sees."""

        async def read() -> None:
            while (data := await self._link.receive()) is not None:
                message = decode(pb.WorkRequest, data)
                self._say(f"<- {_words(message)}")
                await self._frames.put(message)

        try:
            await first_end(self._over, read())
        except ProtocolError as error:
            if not self._over.done():
                self._over.set_exception(error)
                self._over.exception()
            raise
        finally:
            self.ended.set()
            self._say(f"the link of session {self.session} to {self.node.id} has ended")
            try:
                self._frames.put_nowait(None)
            except asyncio.QueueFull:
                self._frames.get_nowait()
                self._frames.put_nowait(None)

    async def first(self) -> pb.WorkRequest | None:
        data = await self._link.receive()
        if data is not None:
            self.message = decode(pb.WorkRequest, data)
            self._say(f"<- to {self.node.id}: {_words(self.message)}")
        return None if data is None else self.message

    def end(self, error: ArmillaryError | None = None) -> None:
        """End the link, with a status or in order."""
        if not self._over.done():
            self._say(f"-> the link ends: {'in order' if error is None else f'{type(error).__name__}: {error}'}")
            self._over.set_result(None) if error is None else self._over.set_exception(error)

    async def send(self, *messages: pb.WorkResponse | bytes) -> None:
        for message in messages:
            raw = message if isinstance(message, bytes) else message.SerializeToString()
            self._say(f"-> {f'{len(raw)} bytes' if isinstance(message, bytes) else _words(message)}")
            try:
                await self._link.send(raw)
            except LinkClosedError:
                raise BreachError("The two services", "a link that lives", "the worker ended it") from None

    async def next(self) -> pb.WorkRequest | None:
        """Return the next message, whatever it is; None where the link has ended. A task failure ends the case."""
        message = await self._frames.get()
        if message is None:
            self._frames.put_nowait(None)
            if self._over.done() and not self._over.cancelled() and isinstance(self._over.exception(), ProtocolError):
                raise BreachError("A step (sending)", "a WorkRequest", str(self._over.exception()))
            return None
        if message.HasField("task_failure"):
            failure = message.task_failure
            raise BreachError(
                "Failing", "gradients", f"task_failure of microbatch {failure.microbatch}: {failure.error}"
            )
        if message.HasField("sphere_change"):
            raise BreachError("The tree", "no sphere_change of a worker without children", str(message.sphere_change))
        return message

    async def frame(self) -> pb.WorkRequest:
        """Return the next message that belongs to a step. Raises BreachError where the worker ends the link."""
        while True:
            message = await self.next()
            if message is None:
                raise BreachError("When the link ends", "a link that lives on", "the worker ended it")
            if not fields(message) & _STEPLESS:
                self._in_order(message)
                return message
            self.said.append(message)

    def _in_order(self, message: pb.WorkRequest) -> None:
        """Hold frames to N14 and N4: what is older crosses what is newer on its way, and does not follow it."""
        place = (order(message.tag), message.attempt)
        breach_unless(
            place >= self._newest[0],
            "N14, N4 (older work and attempts are dropped)",
            f"no older frame after one of {said_of(self._newest[1].tag, self._newest[1].attempt)}",
            f"one of {said_of(message.tag, message.attempt)}",
        )
        self._newest = (place, message)

    async def saying(self, field: str) -> pb.WorkRequest:
        """Return the first message with this field, of those that belong to no step."""
        while True:
            for known in self.said:
                if field in fields(known):
                    self.said.remove(known)
                    return known
            message = await self.next()
            if message is None:
                raise BreachError("When the link ends", f"a message with {field}", "the worker ended the link")
            self.said.append(message)

    async def quiet(self, seconds: float, rule: str, expected: str) -> None:
        """Nothing of a step comes for so long: a negative has no event that could be waited for.

        A worker that is slow has its time too: it has to give signs of life meanwhile.
        """

        async def waits() -> None:
            count = len(self.node.beats) + _QUIET_BEATS
            await asyncio.sleep(seconds)
            await self.node.beats_after(count)

        async def comes() -> None:
            raise BreachError(rule, expected, _words(await self.frame()))

        await first_end(comes(), waits())

    async def gone(self, rule: str, expected: str) -> None:
        """Wait for the worker to end the link. Raises BreachError where it goes on with a step instead."""
        while (message := await self.next()) is not None:
            if not fields(message) & _STEPLESS:
                raise BreachError(rule, expected, _words(message))

    # ---- what a parent says

    async def welcome(self, path: Sequence[pb.Ancestor] | None = None) -> None:
        await self.send(pb.WorkResponse(welcome=pb.Welcome(path=self.node.path if path is None else path)))

    async def direct(self, kind: pb.DirectiveKind.ValueType, **fields: Any) -> None:
        """Send a directive, to this worker unless said otherwise."""
        directive = pb.Directive(kind=kind, **{"target_sphere_id": self.hello.sphere_id, **fields})
        await self.send(pb.WorkResponse(directive=directive))

    def header(
        self, tag: pb.Tag, *, blocks: Sequence[Block] | None = None, from_chunk: int = 0, held: bytes = b""
    ) -> pb.WorkResponse:
        header = pb.WeightsHeader(
            manifest_digest=self.script.node.manifest.digest, from_chunk=from_chunk, held_digest=held
        )
        message = pb.WorkResponse(tag=tag, weights_header=header)
        if blocks is not None:
            message.assign.CopyFrom(pb.Assign(blocks=blocks_to(blocks)))
        return message

    def chunk(self, tag: pb.Tag, index: int, *, footer: bool = True) -> pb.WorkResponse:
        """Return a message with a chunk of the tag's version, and the footer with the last one."""
        version, node = self.script.version(tag.weights_version), self.script.node
        message = pb.WorkResponse(tag=tag)
        message.weights_chunk.CopyFrom(
            pb.Chunk(
                index=index,
                offset_bytes=4 * index * node.chunk_elements,
                crc32c=version.checksums[index],
                data=version.chunks[index],
            )
        )
        if footer and index == len(version.chunks) - 1:
            message.weights_footer.digest = version.digest
        return message

    async def weights(
        self, tag: pb.Tag, *, blocks: Sequence[Block] | None = None, from_chunk: int = 0, through: int | None = None
    ) -> None:
        """Send a version as a parent does: header, chunks up to ``through``, the footer with the last."""
        last = self.script.chunks - 1 if through is None else through
        header = self.header(tag, blocks=blocks, from_chunk=from_chunk)
        messages = [self.chunk(tag, index) for index in range(from_chunk, last + 1)]
        if self.script.chunks == 1 and messages:  # all of a small model is one message
            header.MergeFrom(messages.pop())
        await self.send(header, *messages)

    async def have(self, tag: pb.Tag, blocks: Sequence[Block] | None = None) -> None:
        """Send the header of a version that the worker holds already."""
        await self.send(self.header(tag, blocks=blocks, held=self.script.version(tag.weights_version).digest))

    async def collect(self, arrival: Arrival, *, until: Callable[[], bool] | None = None, credit: bool = True) -> None:
        """Take frames in until all of it has come, or ``until`` holds, and give credit as a parent does."""
        window = self.script.node.window
        while not (arrival.done if until is None else until()):
            arrival.take(await self.frame())
            through = arrival.frontier + window - 1
            if credit and arrival.train and through > arrival.credit and arrival.credit < arrival.chunks - 1:
                arrival.credit = through
                await self.send(
                    pb.WorkResponse(tag=arrival.tag, credit=pb.Credit(attempt=arrival.attempt, through_chunk=through))
                )

    def arrival(self, tag: pb.Tag, blocks: Sequence[Block], *, attempt: int = 0, from_chunk: int = 0) -> Arrival:
        return Arrival(
            self.script,
            tag,
            blocks,
            session=self.session,
            sphere=self.hello.sphere_id,
            attempt=attempt,
            from_chunk=from_chunk,
        )


class Node:
    """A node that is played, on a port of its own. Mutable state: who has dialled it, and how it answers."""

    def __init__(
        self, name: str, script: Script, say: Say, *, dialled: Callable[[], None], incarnation: int = 1
    ) -> None:
        self._dialled = dialled
        self.id, self.incarnation, self._script, self._say = name, incarnation, script, say
        self.address = ""
        #: where it believes that it listens, where that is of no use to others
        self.believed = ""
        #: the nodes from control to this one
        self.path: list[pb.Ancestor] = []
        #: links that no case has looked at
        self.links: asyncio.Queue[Edge] = asyncio.Queue(_MOST_WAITING)
        #: with the loop's time at which each came
        self.beats: list[tuple[float, pb.HeartbeatRequest]] = []
        self.beating = asyncio.Event()
        #: neither heartbeats nor anything else is answered
        self.mute = False
        #: what enrols workers; control's
        self.enroll: Callable[[control_pb2.EnrollSphereRequest], control_pb2.EnrollSphereResponse] | None = None
        self.breach: BreachError | None = None
        #: a worker of another run is sent away: where workers come from elsewhere, the last case's may still be there
        self.turns_others_away = False
        self._edges: set[Edge] = set()
        self._listener: Listener | None = None

    async def open(self, address: str = "127.0.0.1:0") -> None:
        handlers = Handlers(self._work, self._heartbeat, self._enroll if self.enroll is not None else None)
        self._listener = await GrpcTransport().listen(address, handlers)
        self.address = self._listener.address

    async def left(self) -> None:
        """Wait until every link has ended."""
        for edge in list(self._edges):
            await edge.ended.wait()

    async def stop_workers(self) -> None:
        """Tell the workers that have a link here to end."""
        for edge in list(self._edges):
            with contextlib.suppress(BreachError, TimeoutError):
                await edge.direct(pb.DIRECTIVE_KIND_STOP, reason="the case is over")
                async with asyncio.timeout(_STOP_SECONDS):
                    await edge.ended.wait()

    async def aclose(self) -> None:
        if self._listener is not None:
            await self._listener.aclose()
            self._listener = None

    @property
    def ancestor(self) -> pb.Ancestor:
        return pb.Ancestor(id=self.id, incarnation=self.incarnation, address=self.believed or self.address)

    async def link(self) -> Edge:
        """Return the next link that has said hello."""
        edge = await self.links.get()
        if self.breach is not None:
            raise self.breach
        return edge

    async def _enroll(self, data: bytes) -> bytes:
        assert self.enroll is not None
        request = control_pb2.EnrollSphereRequest.FromString(data)
        self._say(f"<- EnrollSphere {_shortened(request)}")
        try:
            answer = self.enroll(request)
        except ArmillaryError as error:
            self._say(f"-> {type(error).__name__}: {error}")
            raise
        self._say(f"-> enrolled as {answer.sphere_id}, below {answer.path_ids[-1]}")
        return answer.SerializeToString()

    async def _work(self, link: Link) -> None:
        edge = Edge(link, self._script, self, self._say)
        message = await edge.first()
        if message is None:
            return
        ours = self._script.node.run_id
        if self.turns_others_away and message.HasField("hello") and message.tag.run_id != ours:
            raise WrongRunError(f"run {message.tag.run_id!r} is over; this is run {ours!r}")
        if not message.HasField("hello"):
            self.breach = BreachError("Joining (dial)", "hello in the first message of a Work stream", _words(message))
        await self.links.put(edge)
        self._dialled()
        self._edges.add(edge)
        try:
            await edge.serve()
        finally:
            self._edges.discard(edge)

    async def _heartbeat(self, link: Link) -> None:
        now = asyncio.get_running_loop().time
        while (data := await link.receive()) is not None:
            received = monotonic_ns()
            beat = decode(pb.HeartbeatRequest, data)
            self.beats.append((now(), beat))
            self.beating.set()
            if self.mute:
                await asyncio.Event().wait()
            answer = pb.HeartbeatResponse(sent_nanos=beat.sent_nanos, received_nanos=received)
            await link.send(answer.SerializeToString())

    async def beats_after(self, count: int) -> None:
        """Wait until so many heartbeats have come in all."""
        while len(self.beats) < count:
            self.beating.clear()
            await self.beating.wait()


def check_hello(edge: Edge, *, incarnation: int, sphere: str) -> None:
    """Hold a hello to what every hello has. Raises BreachError."""
    hello, node, config = edge.hello, edge.node, edge.script.node
    rule = "Joining (dial)"
    for what, found, expected in (
        ("protocol_version", hello.protocol_version, PROTOCOL_VERSION),
        ("tag.run_id", edge.message.tag.run_id, config.run_id),
        ("sphere_id", hello.sphere_id, sphere),
        ("incarnation", hello.incarnation, incarnation),
        ("parent_id", hello.parent_id, node.id),
        ("task_fingerprint", hello.task_fingerprint, config.task_fingerprint),
        ("data_fingerprint", hello.data_fingerprint, config.data_fingerprint),
    ):
        breach_unless(found == expected, rule, f"{what} {expected!r}", f"{found!r}")
    breach_unless(
        hello.parent_incarnation in (0, node.incarnation),
        rule, f"parent_incarnation {node.incarnation}, or 0 where it is not known", hello.parent_incarnation,
    )  # fmt: skip
    breach_unless(hello.environment_fingerprint, rule, "some environment_fingerprint", "none")
    breach_unless(0 < hello.capacity <= 1, rule, "capacity 1 of a worker without children", hello.capacity)
    breach_unless(hello.member.host, "Member.host", "the host's name", "none")
    if hello.capacities:
        total = sum(hello.capacities.values())
        breach_unless(total == hello.capacity, "Hello.capacities", f"{hello.capacity} in all", total)


def _words(message: pb.WorkRequest | pb.WorkResponse) -> str:
    """Return a message in a line: its work, and its parts with what matters of them."""
    tag, said = message.tag, []
    for field, value in message.ListFields():
        if field.name in ("tag", "session", "attempt"):
            continue
        said.append(f"{field.name} {_part(value)}".strip())
    work = f"[term {tag.term} step {tag.step} {_KINDS.get(tag.kind, '-')} v{tag.weights_version}]"
    own = f" session {message.session} attempt {message.attempt}" if isinstance(message, pb.WorkRequest) else ""
    return f"{work}{own} {', '.join(said) or 'nothing'}"


def _part(value: object) -> str:
    if isinstance(value, pb.Chunk):
        block = f" of {_blocks([value.block])}" if value.HasField("block") else ""
        return f"{value.index}{block} ({len(value.data)} bytes)"
    if isinstance(value, pb.Assign):
        return f"{_blocks(value.blocks)} attempt {value.attempt} from chunk {value.from_chunk}"
    if isinstance(value, pb.Ready):
        return f"held {_blocks(value.held)}, computing {_blocks(value.computing)}, idle {value.idle}"
    if isinstance(value, pb.GradientHeader):
        return f"{_blocks([value.block])} of {value.samples_count} samples"
    if isinstance(value, pb.GradientFooter):
        return _blocks([value.block])
    return _shortened(value)


def _blocks(blocks: Sequence[pb.Block]) -> str:
    return named([Block(block.lo, block.hi) for block in blocks])


def _shortened(message: object) -> str:
    text = _text(message).removeprefix("{").removesuffix("}")
    return f"{{{text[:200]}{' ...' if len(text) > 200 else ''}}}"


def _text(value: object) -> str:
    """Return a field in words: bytes are digests, checksums and nonces, in hexadecimal as docs and logs have them."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_text(key)}: {_text(item)}' for key, item in value.items())}}}"
    if isinstance(value, Sequence):
        return f"[{', '.join(map(_text, value))}]"
    if not isinstance(value, Message):
        return str(value)
    said = []
    for field, item in value.ListFields():
        kind = field.enum_type.values_by_number.get(item) if field.enum_type and isinstance(item, int) else None
        said.append(f"{field.name}: {kind.name if kind else _text(item)}")
    return f"{{{' '.join(said)}}}"
