"""One case being played: control and perhaps more nodes, a worker, and what both have said."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from control.conformance.arrival import Arrival, order
from control.conformance.parent import Edge, Node, check_hello
from control.conformance.script import BreachError, Deviation, Script, breach_unless, named
from control.conformance.worker import WorkerProcess
from spheres.blocks import Block, BlockSet
from spheres.errors import ArmillaryError
from spheres.frames import blocks_from, blocks_to
from spheres.task import Sums
from spheres.v1 import control_pb2
from spheres.v1 import work_pb2 as pb

__all__ = ["Play"]

Array = npt.NDArray[np.float32]

#: lines of the exchange that are kept
_LINES = 1000
#: first incarnation that is given out
_INCARNATION = 1_000_000


class Play:
    """Mutable state: the enrolments, the sessions seen, the deviations found; ``waiting`` says for what, at a timeout.

    ``command`` is None where the worker comes from elsewhere: then nothing can be signalled, and its end not be seen.
    """

    def __init__(self, script: Script, command: Sequence[str] | None, *, address: str, log: Path) -> None:
        self.script = script
        self._address = address
        self.lines: deque[str] = deque(maxlen=_LINES)
        #: somebody has dialled a node
        self.dialling = asyncio.Event()
        self.control = Node("control", script, self.say, dialled=self.dialling.set)
        self.control.enroll = self._enroll
        self.control.turns_others_away = command is None
        self.nodes = [self.control]
        #: the nodes from control to the parent that is given to the worker
        self.place = [self.control]
        self.worker = WorkerProcess(command, log) if command is not None else None
        self.enrolments: list[control_pb2.EnrollSphereRequest] = []
        self._enrolled = asyncio.Event()
        #: how the next enrolments are refused
        self.refusals: list[ArmillaryError] = []
        #: request id -> sphere id: enrolling again is idempotent
        self._granted: dict[str, tuple[str, int]] = {}
        self._sessions: dict[tuple[str, int], int] = {}
        #: rule and expectation of what the case waits for
        self.waiting = ("Joining (enroll)", "EnrollSphere")
        self.started = asyncio.Event()
        #: the worker's end is what the case waits for
        self.may_end = False
        self.worst = Deviation(0.0, 0.0)
        self.compared = 0
        self.note = ""
        #: what a case has begun to take in, where another function goes on
        self.arrival: Arrival | None = None

    def say(self, line: str) -> None:
        self.lines.append(f"{asyncio.get_running_loop().time() % 1000:8.3f}  {line}")

    async def __aenter__(self) -> Self:
        await self.control.open(self._address)
        self.control.path = [self.control.ancestor]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in self.nodes:
            if self.worker is None:
                await node.stop_workers()
        if self.worker is not None:
            await self.worker.aclose()
        for node in self.nodes:
            await node.aclose()

    async def add_node(self, name: str, above: Node) -> Node:
        """Play another node, below ``above``."""
        node = Node(name, self.script, self.say, dialled=self.dialling.set, incarnation=len(self.nodes) + 1)
        await node.open()
        node.path = [*above.path, node.ancestor]
        self.nodes.append(node)
        return node

    def expect(self, rule: str, expected: str) -> None:
        """Say for what the case waits from now on."""
        self.waiting = (rule, expected)

    # ---- joining

    def _enroll(self, request: control_pb2.EnrollSphereRequest) -> control_pb2.EnrollSphereResponse:
        self.enrolments.append(request)
        self._enrolled.set()
        if self.refusals:
            raise self.refusals.pop(0)
        number = len(self._granted) + 1
        name, incarnation = self._granted.setdefault(request.request_id, (f"s-{number}", _INCARNATION + number))
        return control_pb2.EnrollSphereResponse(
            sphere_id=name,
            incarnation=incarnation,
            configuration=self.script.node.to_proto(),
            path_ids=[node.id for node in self.place],
            path_addresses=[node.ancestor.address for node in self.place],
            path_incarnations=[node.incarnation for node in self.place],
            term=self.script.term,
        )

    async def enrolled(self, count: int = 1) -> None:
        """Wait until EnrollSphere was called so many times."""
        while len(self.enrolments) < count:
            self._enrolled.clear()
            await self._enrolled.wait()

    async def start(self) -> None:
        """Start the worker; from now on everything is its turn."""
        self.expect("Joining (enroll)", f"EnrollSphere at {self.control.address} (ARMILLARY_CONTROL)")
        if self.worker is not None:
            await self.worker.start(self.control.address)
        self.started.set()

    async def dialled(self, node: Node | None = None, *, what: str = "a Work stream with hello") -> Edge:
        """Return the worker's next link to a node, its hello checked. It has not been welcomed."""
        node = node or self.control
        if self.enrolments:
            self.expect("Joining (dial)", f"{what} at {node.id}")
        edge = await node.link()
        name, incarnation = list(self._granted.values())[-1]
        check_hello(edge, incarnation=incarnation, sphere=name)
        last = self._sessions.get((name, incarnation), 0)
        breach_unless(
            edge.session > last, "N1 (sessions)", f"a session above {last}: each dial has the next", edge.session
        )
        self._sessions[name, incarnation] = edge.session
        return edge

    async def join(self) -> Edge:
        """Start the worker and take it in."""
        await self.start()
        return await self.linked(self.place[-1])

    async def linked(self, node: Node | None = None, *, what: str = "a Work stream with hello") -> Edge:
        """Return the worker's next link to a node, welcomed."""
        edge = await self.dialled(node, what=what)
        await edge.welcome()
        self.expect("A step", "frames of the step")
        return edge

    async def found(self, *nodes: Node) -> Node:
        """Return the node that the worker dials first, of these; its link waits there."""
        while True:
            for node in nodes:
                if not node.links.empty():
                    return node
            self.dialling.clear()
            await self.dialling.wait()

    async def ends_link(self, edge: Edge, rule: str, why: str) -> None:
        """Wait for the worker to end a link, and not its process."""
        expected = f"the worker to end the link: {why}"
        self.expect(rule, expected)
        await edge.gone(rule, expected)

    # ---- steps

    async def collect(self, edge: Edge, arrival: Arrival) -> None:
        """Take all of it in, and compare it with the Python gradient."""
        self.expect("A step (sending)", f"all that is owed of step {arrival.tag.step}")
        await edge.collect(arrival)
        await self.compare(arrival)

    async def compare(self, arrival: Arrival) -> None:
        for block in arrival.blocks:
            off = arrival.compare(block, await self.expected(arrival, block))
            if arrival.train:
                self.worst = self.worst.largest(off)
                self.compared += 1

    @property
    def closeness(self) -> str:
        """How close gradients came to the Python ones, in words."""
        if not self.compared:
            return ""
        blocks = f"{self.compared} block{'s' if self.compared > 1 else ''}"
        if not self.worst.element:
            return f"{blocks} with the same bits as Python's"
        return f"{blocks}, off by {self.worst.norm:.1e} at most, an element by {self.worst.element:.1e}"

    async def expected(self, arrival: Arrival, block: Block) -> tuple[Array, Sums | None]:
        """Compute the Python result, beside the loop: heartbeats are to be answered meanwhile."""
        tag, script = arrival.tag, self.script
        if arrival.train:
            return await asyncio.to_thread(script.gradient, tag.weights_version, tag.step, block)
        return np.zeros(0, np.float32), await asyncio.to_thread(script.evaluation, tag.weights_version, block)

    async def train(self, edge: Edge, tag: pb.Tag, blocks: Sequence[Block]) -> Arrival:
        """Play a whole step: weights, blocks, and what comes of them."""
        await edge.weights(tag, blocks=blocks)
        arrival = edge.arrival(tag, blocks)
        await self.collect(edge, arrival)
        return arrival

    async def begin(self, edge: Edge, tag: pb.Tag, attempt: int, *, from_chunk: int = 0) -> pb.Ready:
        """Begin a new attempt, and return what the worker has to say to it."""
        rule, total = "N5 (ready)", self.script.total(tag.kind)
        await edge.send(pb.WorkResponse(tag=tag, begin=pb.Begin(attempt=attempt, from_chunk=from_chunk)))
        self.expect(rule, f"ready of attempt {attempt}")
        while not (message := await edge.frame()).HasField("ready"):
            older = order(message.tag) < order(tag) or message.attempt < attempt
            breach_unless(older, rule, f"ready of attempt {attempt} before its frames", f"attempt {message.attempt}")
        breach_unless(
            (message.tag, message.session, message.attempt) == (tag, edge.session, attempt),
            rule, f"ready with the tag of the begin, session {edge.session}, attempt {attempt}", message,
        )  # fmt: skip
        for what, blocks in (("held", message.ready.held), ("computing", message.ready.computing)):
            given = blocks_from(blocks)
            merged = list(BlockSet(total, given))
            breach_unless(given == merged, rule, f"{what} merged to maximal canonical blocks", named(given))
        return message.ready

    async def assign(
        self, edge: Edge, tag: pb.Tag, attempt: int, blocks: Sequence[Block], *, from_chunk: int = 0
    ) -> Arrival:
        """Answer ready, and take in what is owed."""
        assign = pb.Assign(attempt=attempt, from_chunk=from_chunk, blocks=blocks_to(blocks))
        await edge.send(pb.WorkResponse(tag=tag, assign=assign))
        arrival = edge.arrival(tag, blocks, attempt=attempt, from_chunk=from_chunk)
        await self.collect(edge, arrival)
        return arrival

    # ---- the end

    async def ends(self, code: int, rule: str) -> None:
        """Wait for the worker's end."""
        self.may_end = True
        self.expect(rule, f"the worker's end, with exit code {code}")
        if self.worker is None:  # its links are all that can be seen of it
            for node in self.nodes:
                await node.left()
            return
        found = await self.worker.exit_code()
        if found != code:
            raise BreachError(rule, f"exit code {code}", f"exit code {found}")
