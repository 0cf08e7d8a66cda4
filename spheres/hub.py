"""The noun that control and spheres share: a range in, canonical blocks out, in chunk order.

One hub is one actor: every method runs to its end on the event loop, none awaits, so no state is ever half changed. It
carries out what the ledger decides, with parts of which each owns some of the state and none knows the hub: ``upward``,
``downward``, ``computing``, ``batches``. It does not dial, serve or encode links: ``children`` and ``parent`` do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import perf_counter

from spheres.batches import Batches
from spheres.blocks import Block, checked
from spheres.carrier import Carrier, Inline
from spheres.computing import Computing, Outcome, told
from spheres.config import NodeConfig
from spheres.downward import Downward
from spheres.environments import ANY, Environments, Range
from spheres.errors import GradientError, LinkClosedError, ProtocolError, StaleError, WrongRunError
from spheres.frames import blocks_from, capacities_from
from spheres.gradients import Array, Batch, Gradients, Outgoing
from spheres.ledger import Action, Ledger, SendAssign, SendBegin, SendCredit, SendReady, Stuck
from spheres.phases import PhaseTimes
from spheres.reducer import Held
from spheres.segments import Memory
from spheres.task import Sums
from spheres.upward import Upward
from spheres.v1 import common_pb2
from spheres.v1 import work_pb2 as pb
from spheres.watchdog import Watchdog
from spheres.weights import Weights
from spheres.work import EVALUATE, TRAIN, Child, Counts, Hooks, Work
from spheres.worker import Failure, Unit, Worker, sample_ids

__all__ = ["EVALUATE", "TRAIN", "Array", "Child", "Hub", "Outgoing", "Work"]

#: seconds that an attempt waits for the children of a lost child: about the round trips that they need (N13)
_SETTLE_SECONDS = 0.25


class Hub:
    """Mutable state: the present work, the nodes above, that of its parts, the ledger, gradients and weights."""

    def __init__(
        self,
        config: NodeConfig,
        node_id: str,
        *,
        incarnation: int = 1,
        worker: Worker | None = None,
        memory: Memory | None = None,
        environment: str = "",
    ) -> None:
        self.config, self.id, self.incarnation = config, node_id, incarnation
        self.root = node_id == "control"
        self.hooks = Hooks()
        self.counts = Counts()
        #: shared with other processes of this host; None where all payload goes inline
        self.memory = memory
        self.weights = Weights(config, memory=memory, root=self.root)
        self.ledger = Ledger(config.window, computes=worker is not None, root=self.root, environment=environment)
        self.gradients = Gradients(config, node_id, self.ledger, self.weights)
        # what is said to the parent and to the children, what is computed here, what is being summed
        self.up = Upward(self.hooks, root=self.root)
        self.down = Downward()
        self.own = Computing(
            node_id, worker, ledger=self.ledger, weights=self.weights, gradients=self.gradients, counts=self.counts
        )
        self.batches = Batches(self.hooks)
        #: nodes from control to this one; children's fallbacks come from it (N11)
        self.path: list[pb.Ancestor] = []
        #: where children dial this node; empty where it takes none
        self.address = ""
        self.watchdog = Watchdog(config.patience_seconds)
        self._capacities = self.ledger.capacities
        # when the present version of the weights began to come
        self._arriving_since = 0.0
        self._turn_to(Work(0, -1, common_pb2.WORK_KIND_UNSPECIFIED), -1)

    def __repr__(self) -> str:
        return f"Hub({self.id}, {self.work}, frontier {self.ledger.frontier}, {len(self.children)} children)"

    def _turn_to(self, work: Work, version: int) -> None:
        """From now on what is said is of this work, on this version of the weights."""
        self.work, self.version = work, version
        #: of the present work's messages; never changed, only replaced
        self.tag = self.up.tag = self.down.tag = pb.Tag(
            run_id=self.config.run_id, term=work.term, step=work.step, kind=work.kind, weights_version=version
        )

    @property
    def children(self) -> dict[str, Child]:
        """Those with an open link, by their ids."""
        return self.down.children

    @property
    def sent_down_bytes(self) -> int:
        """Payload bytes sent to children, those of links that have ended included."""
        return self.down.sent_bytes

    @property
    def activity(self) -> str:
        """What this node is doing, in words."""
        if own := self.own.activity(self.hooks.clock()):
            return own
        if not self.weights.complete:
            return "receiving weights"
        if self.ledger.waiting:
            return f"gathering {len(self.ledger.waiting)} children"
        return "done" if self.ledger.finished else f"at chunk {self.ledger.frontier} of step {self.work.step}"

    @property
    def phases(self) -> PhaseTimes:
        """Where the time of the present step went."""
        return self.gradients.phases

    @property
    def sums(self) -> Sums | None:
        """At the root: loss, count and metrics of the step, from its first chunk on."""
        return self.gradients.sums

    @property
    def received_bytes(self) -> int:
        """Payload bytes of gradients that children have sent."""
        return self.gradients.received_bytes

    # ---- root: control's side

    def start(self, work: Work, gradient: Array | None) -> None:
        """Begin a step on the published weights. ``gradient`` takes the sum of a training step."""
        self._begin(work, self.weights.version, [Block(0, self._total(work.kind))], out=gradient)

    def announce(self, work: Work) -> None:
        """The weights of ``work`` are coming: children get each chunk as it is there, and are told later what they owe.

        The work is the evaluation before the step, of which nobody is given a part: the step's own header, with what is
        owed, follows, and so would that of an evaluation after all. A transfer goes on from one to the other (N17).
        """
        self._begin(work, self.weights.version, None)

    def stream(self) -> None:
        """More of the weights is there."""
        self._wake_children()

    def seal(self) -> None:
        """The weights are about to be written: no transfer may read them any more (N15)."""
        self.down.abort()
        self.weights.withdraw()
        self.ledger.active = False

    def direct(self, directive: pb.Directive) -> None:
        """Send a directive down, hop by hop: to the child that leads to its sphere, to all where that is not known."""
        self.down.direct(directive)

    # ---- parent edge: what came down

    def on_response(self, message: pb.WorkResponse, payload: memoryview | None = None, raw: bytes = b"") -> None:
        """Handle a message of the parent. Raises ProtocolError and its kinds: then the link must end.

        ``payload``: the chunk's data where they are not in the message. ``raw``: the message's bytes, to be passed on.
        """
        if message.HasField("directive"):
            self._on_directive(message.directive)
            return
        tag = message.tag
        if tag.run_id != self.config.run_id:
            raise WrongRunError(f"a message of run {tag.run_id!r}; this is run {self.config.run_id!r}")
        work = Work(tag.term, tag.step, tag.kind)
        header = message.HasField("weights_header")
        if work < self.work:
            # Also what a parent sends that is behind: this node is parked until it has caught up (N14).
            self.counts.refused["stale"] += 1
            return
        if work > self.work and not header:
            raise ProtocolError(f"a message of step {work.step} came before its header")
        if header:
            if work.kind not in (TRAIN, EVALUATE):
                raise ProtocolError(f"work of kind {work.kind} is not known here")
            self._on_header(work, tag.weights_version, message)
        if message.HasField("begin"):
            self.watchdog.progress(self.hooks.clock())
            actions = self.ledger.begin(message.begin.attempt, message.begin.from_chunk)
            self._recall()
            self._do(actions)
        if message.HasField("assign") and not message.HasField("weights_header"):
            assign = message.assign
            blocks, environments = self._owed(assign, work.kind)
            self._try(lambda: self._do(self.ledger.assign(assign.attempt, assign.from_chunk, blocks, environments)))
        if message.HasField("weights_chunk"):
            self.weights.put(message.weights_chunk, payload)
            self._wake_children()
        if message.HasField("weights_reference"):
            self.weights.refer(message.weights_reference)
            self._wake_children()
        if message.HasField("weights_footer"):
            self.weights.finish(message.weights_footer.digest)
            self.phases.add("send_down", perf_counter() - self._arriving_since)
            self._wake_children()
            self._compute()
            self._flow()
        if raw and self.down.children and message.HasField("weights_chunk"):
            self._keep_frame(message, raw)
        if message.HasField("credit"):
            self._try(lambda: self.ledger.credit(message.credit.attempt, message.credit.through_chunk))
            self.up.wake_up()

    def _try(self, change: Callable[[], None]) -> None:
        """Messages of an older attempt are no fault: they crossed a newer one. They are counted and dropped (I6)."""
        try:
            change()
        except StaleError:
            self.counts.refused["stale"] += 1

    def _keep_frame(self, message: pb.WorkResponse, raw: bytes) -> None:
        """Pass a chunk on in the bytes in which it came, where there is nothing else for this node in them."""
        names = {field.name for field, _ in message.ListFields()}
        index = message.weights_chunk.index
        if (
            names <= {"tag", "weights_chunk", "weights_footer"}
            and message.tag == self.tag
            and ("weights_footer" in names or index < self.config.chunk_count - 1)
        ):
            self.weights.keep_frame(self.tag.SerializeToString(), index, raw)

    def relinked(self, session: int, path: Iterable[pb.Ancestor], carrier: Carrier | None = None) -> None:
        """A parent took this node in: the obligations of the session before are void (N5b)."""
        self._recall()
        if self.up.session and self.memory is not None:
            # The parent before may still be reading what was sent to it, for as long as it likes: nothing of that is
            # ever written again (N19).
            self.own.retire()
        self.gradients.carrier = carrier or Inline(self.config)
        self.ledger.window = self.gradients.carrier.window
        said = self.up.relinked(session)
        if self.own.failure is not None:
            self.up.fail(self.own.failure)  # the link before may have died with it, and nothing else would end the step
        self.ledger.relinked()
        self.gradients.settle()
        if not self.renewed(path):
            for change in said:
                self.up.change(change)

    def renewed(self, path: Iterable[pb.Ancestor]) -> bool:
        """The nodes above are these now; children learn their fallbacks from it (N11). Whether control is a new one.

        A control that came back knows nobody: it is told of each link here, and those below tell of theirs.
        """
        known = self.path[0] if self.path else None
        self.path = [*path, pb.Ancestor(id=self.id, incarnation=self.incarnation, address=self.address)]
        self.down.notice(self.welcome())
        if known is None or known.incarnation == self.path[0].incarnation:
            return False
        for child in self.children.values():
            self.up.change(child.joined(self.id))
        return True

    def welcome(self) -> pb.WorkResponse:
        return pb.WorkResponse(tag=self.tag, welcome=pb.Welcome(path=self.path))

    @property
    def mixed_capacities(self) -> dict[str, float]:
        """What this subtree computes at once by environment; empty where all of it is of this node's own."""
        capacities = self.ledger.capacities
        return {} if capacities.keys() <= {self.ledger.environment} else capacities

    def _on_header(self, work: Work, version: int, message: pb.WorkResponse) -> None:
        header, weights = message.weights_header, self.weights
        if header.manifest_digest != self.config.manifest.digest:
            raise ProtocolError("weights of another layout")
        blocks, environments = self._owed(message.assign, work.kind) if message.HasField("assign") else (None, ANY)
        if header.held_digest:
            # Where they are being overwritten by now, the step is sealed (N15): no fault, and nothing to compute.
            if not weights.complete or (version, header.held_digest) != (weights.version, weights.digest):
                raise ProtocolError(f"the parent takes weights v{version} as held; held: {weights!r}")
            weights.term = work.term
        else:
            if not header.from_chunk:
                self._arriving_since = perf_counter()
                self.down.abort()
            weights.begin(
                term=work.term,
                version=version,
                previous_digest=header.previous_digest,
                from_chunk=header.from_chunk,
            )
        if work > self.work:
            self._begin(work, version, blocks, environments)
            return
        self._turn_to(work, version)
        self.down.header()
        if blocks is not None:
            self._recall()
            self._do(self.ledger.resume(blocks, environments))

    def _begin(
        self,
        work: Work,
        version: int,
        blocks: list[Block] | None,
        environments: Environments = ANY,
        *,
        out: Array | None = None,
    ) -> None:
        """A new step: drop all of the old one (N14), then give out the new one."""
        self._turn_to(work, version)
        self._recall(attempt=False)
        self.own.drop()
        self.watchdog.start(self.hooks.clock())
        self.ledger.computes = self.own.able(self.hooks.clock())
        self.up.begin()
        self.gradients.start(step=work.step, train=work.kind == TRAIN, out=out)
        self.down.header()
        chunks = self.config.chunk_count if work.kind == TRAIN else 0
        self._do(self.ledger.start(self._total(work.kind), chunks, blocks, environments))
        self._tell_capacity()

    def _total(self, kind: common_pb2.WorkKind.ValueType) -> int:
        return self.config.microbatches if kind == TRAIN else self.config.evaluation_microbatches

    def _owed(self, assign: pb.Assign, kind: common_pb2.WorkKind.ValueType) -> tuple[list[Block], Environments]:
        total = self._total(kind)
        ranges = (Range(r.lo, r.hi, r.environment_fingerprint) for r in assign.environments)
        return checked(blocks_from(assign.blocks), total, what="assigned"), Environments.checked(ranges, total)

    def _on_directive(self, directive: pb.Directive) -> None:
        if directive.target_sphere_id != self.id:
            self.down.direct(directive)
        if directive.target_sphere_id in ("", self.id):
            self.hooks.directed(directive)

    # ---- child edges: what came up

    def admit(self, child: Child, hello: pb.Hello, tag: pb.Tag) -> None:
        """A child's hello was accepted: its link is open."""
        self.down.add(child, hello, tag, term=self.weights.term)
        welcome = self.welcome()
        if self.memory is not None and child.outbox.carrier.together():
            welcome.welcome.segment.CopyFrom(self.memory.probe)
        child.outbox.notice(welcome)
        # At the root between two steps the weights are no longer, or not yet, those of its work: the next step's header
        # will bring them.
        if self.ledger.active:
            child.outbox.header(self.tag)
        holds = bool(hello.held) and Work(tag.term, tag.step, tag.kind) == self.work
        window = child.outbox.carrier.window
        joined = self.ledger.child_joined(
            child.id,
            capacities_from(hello.capacity, hello.capacities, child.environment),
            holds=holds,
            leaving=hello.leaving,
            window=window,
        )
        self._do(joined)
        self._tell_capacity()
        self.up.change(child.joined(self.id))
        self.down.part(child)

    def dismiss(self, child: Child, reason: str) -> None:
        """A child's link has ended."""
        if self.children.get(child.id) is not child:
            return
        self.down.remove(child)
        computing = self.gradients.in_compute(child.id)
        self._do(self.ledger.child_lost(child.id))
        if self.ledger.missing:
            self.hooks.call_later(_SETTLE_SECONDS, lambda: self._do(self.ledger.settled()))
        self._tell_capacity()
        self.up.change(child.lost(self.id, reason, step=self.work.step, computing=computing))

    def on_request(self, child: Child, message: pb.WorkRequest, payload: memoryview | None = None) -> None:
        """Handle a message of a child. Raises ProtocolError and its kinds: then its link must end.

        ``payload``: the chunk's data where they are not in the message.
        """
        if self.down.children.get(child.id) is not child:
            # Its link is over; a newer session may have its edge by now, and must not answer for it (I6).
            self.counts.refused["stale"] += 1
            return
        if self.up.passes_on(message):
            return
        if message.HasField("sphere_change"):
            self.down.note_way(message.sphere_change, child)
            self.up.change(message.sphere_change)
            return
        if message.HasField("capacity"):
            said = message.capacity
            capacities = capacities_from(said.capacity, said.capacities, child.environment)
            self._do(self.ledger.child_changed(child.id, capacities=capacities))
            self._tell_capacity()
            return
        if message.HasField("leaving"):
            self._do(self.ledger.child_changed(child.id, leaving=True))
            self._tell_capacity()
            self.down.release(child)
            return
        tag = message.tag
        if tag.run_id != self.config.run_id:
            hint = "" if tag.run_id else "; every message has a tag"
            raise WrongRunError(f"a message of run {tag.run_id!r}; this is run {self.config.run_id!r}{hint}")
        if message.session != child.session or Work(tag.term, tag.step, tag.kind) != self.work:
            self.counts.refused["stale"] += 1
            return
        self._try(lambda: self._on_step(child, message, payload))

    def _on_step(self, child: Child, message: pb.WorkRequest, payload: memoryview | None) -> None:
        if message.HasField("ready"):
            ready = message.ready
            held = checked(blocks_from(ready.held), self.ledger.total, what="held")
            computing = checked(blocks_from(ready.computing), self.ledger.total, what="in compute")
            self._do(
                self.ledger.child_ready(
                    child.id,
                    message.attempt,
                    held,
                    computing,
                    idle=ready.idle,
                    idle_environments=ready.idle_environments,
                )
            )
        try:
            self.gradients.take_in(child.id, message, child.outbox.carrier, payload)
        except GradientError as error:  # of no microbatch alone: what they have together could not be sent
            index, step = message.gradient_header.block.lo, self.work.step
            ids = sample_ids(self.config, step, index) if self.work.kind == TRAIN else ()
            self.up.fail(told(Failure(index, str(error), "", ids, invalid=True), sphere=child.id, step=step))
        self.watchdog.progress(self.hooks.clock())
        self._flow()

    # ---- both

    @property
    def may_leave(self) -> bool:
        """Whether nobody needs this node: it owes nothing of the present step, and holds nothing of it (N7)."""
        return not self.ledger.obligations and not self.ledger.held and self.own.unit is None

    def watch(self, now: float) -> None:
        """Look for a late step: where somebody is idle, it may compute what late ones have in compute (N12)."""
        self._give_up(now)
        if not self.ledger.active or not self.watchdog.due(now):
            return
        if self._spoilt:
            self.hooks.stuck()
            return
        late = self.ledger.laggards(self.gradients.reducer.has)
        barred = self.ledger.barred(self.gradients.reducer.has) if not late else frozenset()
        if late or barred:
            self.watchdog.fire(now)
        if late:
            self._do(self.ledger.hurry(late))
        elif barred and self.watchdog.hopeless(len(self.path)):
            # They live, and do not go on: what only they may compute is not waited for for ever. Whoever is closest to
            # them loses patience first.
            self._do(self.ledger.set_aside(barred))
            self._tell_capacity()

    @property
    def _spoilt(self) -> bool:
        """Whether this node owes what it can never compute: its weights count as whole, and were overwritten.

        After the seal nothing is owed (N15), so its parent takes for held what is not; only a hello can tell it.
        """
        owes = self.ledger.obligations and not self.ledger.finished
        return bool(owes) and self.weights.complete and not self.weights.intact

    def _give_up(self, now: float) -> None:
        """End the links of children that live and do not answer begin: all others wait for them.

        Those further down are given up before those above, which wait for them.
        """
        limit = self.watchdog.answer_seconds(len(self.path))
        for name in sorted(self.ledger.waiting or ()):
            child, asked = self.children.get(name), self.down.asked.get(name, now)
            if child is not None and now - asked > limit:
                error = LinkClosedError(f"{name} did not answer begin in {now - asked:.1f} s; answer each with ready")
                child.close(error)
                self.dismiss(child, str(error))

    def _tell_capacity(self) -> None:
        capacities = self.ledger.capacities
        if capacities == self._capacities:
            return
        self._capacities = capacities
        self.up.resize(self.ledger.capacity, self.mixed_capacities)

    def _do(self, actions: list[Action]) -> None:
        """Carry out what the ledger decided, then go on with what that allows."""
        self.gradients.settle()
        self._carry_out(actions)
        self._compute()
        self._flow()

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case SendBegin():
                    self.down.begin(action, self.hooks.clock())
                case SendAssign():
                    self.down.assign(action)
                case SendCredit(child, attempt):
                    edge = self.ledger.edges.get(child)
                    if edge is not None and edge.attempt == attempt:
                        self.down.credit(action)  # else it waited for a sum, and the child has gone on, or gone
                case SendReady():
                    self.up.answer(action)
                case Stuck():
                    self.hooks.stuck()

    def _flow(self) -> None:
        """Let go upward what can go: into the sum at the root, else by waking the writer, where it has something."""
        batches = self.batches
        if not self.root:
            free = batches.batch is None and self.weights.complete
            if self.up.waiting or batches.ready or (free and self.ledger.sendable(self.gradients.reducer.has)):
                self.up.wake_up()
            return
        while batches.batch is None and (batch := self.gradients.claim()) is not None:
            self._sum(batch)
        if batches.batch is None and self.ledger.active and self.ledger.finished:
            self.ledger.active = False
            self._finished()
            self.hooks.sealed()

    def _sum(self, batch: Batch) -> None:
        """Have a batch summed, here and now or beside the loop."""
        if self.batches.add_up(batch, self._summed_beside):
            self._summed(batch)

    def _summed_beside(self, batch: Batch) -> None:
        self._summed(batch)
        self._flow()

    def _summed(self, batch: Batch) -> None:
        """A batch's sum is there; it is dropped where its attempt is over."""
        if not self.batches.end(batch):
            return
        if batch.elements:
            self.phases.add("sum", perf_counter() - batch.started)
        self._carry_out(batch.actions)
        if not self.root and self.ledger.finished:
            self._finished()

    def _recall(self, *, attempt: bool = True) -> None:
        """What was claimed for the parent is of the past: another attempt or session, or a new step."""
        self.batches.recall()
        self.gradients.carrier.begin(attempt=attempt)

    def _finished(self) -> None:
        if not self.ledger.attempts:
            self.watchdog.finish(self.hooks.clock())

    def _wake_children(self) -> None:
        for child in self.down.children.values():
            child.outbox.wake.set()

    def _compute(self) -> None:
        """Give the compute thread its next block, where it is free and there is one."""
        self.own.go_on(self.work, self._computed)

    def _computed(self, unit: Unit, result: Held | Failure | None) -> None:
        match self.own.take(unit, result):
            case Outcome.COMPUTED:
                self._compute()
                self._flow()
            case Outcome.TORN:
                self._compute()
            case Outcome.FAILED:
                self._set_aside()

    def _set_aside(self) -> None:
        """An exception is no death: what this node owes is computed once more elsewhere, and it rests for a while."""
        assert self.own.failure is not None
        self.up.fail(self.own.failure)
        seconds = self.own.set_aside(self.hooks.clock())
        self._do(self.ledger.unable())
        self._tell_capacity()
        self.hooks.call_later(seconds, self._rested)

    def _rested(self) -> None:
        if self.own.rested(self.hooks.clock()):
            self._do(self.ledger.able())
            self._tell_capacity()

    # ---- parent edge: what goes up

    def next_up(self) -> bytes | Outgoing | None:
        """Return the next message for the parent, or None where nothing can be sent now."""
        if self.up.waiting:
            return self.up.next()
        ready = self.batches.ready
        if not ready and self.batches.batch is None:
            batch = self.gradients.claim_up(self.tag, self.up.session)
            if batch is not None:
                self._sum(batch)
        return ready.popleft() if ready else None

    def went_up(self, item: Outgoing, seconds: float) -> None:
        """Note that a gradient message has left."""
        self.phases.add("send_up", seconds, f"{item.payload_bytes} bytes")
        self.counts.up_bytes += item.payload_bytes
