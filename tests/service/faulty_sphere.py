"""A sphere with a planted fault: `python faulty_sphere.py FAULT`. Each is what another worker may do wrong.

They are planted where the sphere is right, a line or two each; `none` plants nothing.
"""

import asyncio
import os
import sys
import uuid

import numpy as np

from spheres import carrier, cli, gradients, hub, narrow, parent, worker
from spheres.blocks import Block
from spheres.config import NodeConfig
from spheres.errors import (
    ConfigError,
    DecodeError,
    RefusedError,
    StaleError,
    UnreachableError,
)
from spheres.grpc_link import GrpcTransport
from spheres.hub import Hub
from spheres.ledger import Ledger
from spheres.numerics import crc32c, version_digest
from spheres.parent import Fingerprints, Parent
from spheres.reducer import Reducer
from spheres.sampling import Sampler
from spheres.sphere import Sphere
from spheres.upward import Upward
from spheres.v1 import control_pb2
from spheres.v1 import work_pb2 as pb
from spheres.weights import Weights
from spheres.worker import Computer

FAULTS = {}


def fault(plant):
    FAULTS[plant.__name__] = plant
    return plant


def around(owner, name, make):
    """Replace a method by what ``make`` makes of it."""
    setattr(owner, name, make(getattr(owner, name)))


# ---- joining


@fault
def another_request_id():
    def make(enroll):
        async def changed(self, address, request, timeout):
            message = control_pb2.EnrollSphereRequest.FromString(request)
            message.request_id = uuid.uuid4().hex
            return await enroll(self, address, message.SerializeToString(), timeout)

        return changed

    around(GrpcTransport, "enroll", make)


@fault
def tries_what_is_final():
    def make(enroll):
        async def changed(self, *args):
            try:
                return await enroll(self, *args)
            except RefusedError as error:
                raise UnreachableError(str(error)) from None

        return changed

    around(GrpcTransport, "enroll", make)


@fault
def exits_with_1():
    RefusedError.exit_code = 1


@fault
def another_data():
    def make(prepare):
        def changed(self, config):
            found = prepare(self, config)
            return Fingerprints(found.task, "0000", found.environment)

        return changed

    around(Sphere, "_prepare", make)


@fault
def one_session():
    def make(hello):
        async def changed(self, *args):
            self._session = 0
            await hello(self, *args)

        return changed

    around(Parent, "_hello", make)


@fault
def keeps_its_id():
    """Dials on where control has given its id to another."""
    parent._FINAL = (*(cls for cls in parent._FINAL if cls is not StaleError),)


@fault
def ends_at_any_refusal():
    parent._FINAL = (*parent._FINAL, RefusedError)


@fault
def takes_every_refusal_for_final():
    async def serve(self, ancestor, link):
        await self._serve(link, ancestor)
        return True

    Parent._link = serve


@fault
def enrolls_again_for_a_parent():
    def make(link):
        async def changed(self, *args):
            found = await link(self, *args)
            if isinstance(self._last_error, StaleError):
                raise self._last_error
            return found

        return changed

    around(Parent, "_link", make)


@fault
def no_heartbeats():
    async def beat(self, ancestor):
        await asyncio.Event().wait()

    Parent._beat = beat


@fault
def a_flood_of_heartbeats():
    async def rest(self):
        await asyncio.sleep(0)

    Parent._rest = rest


@fault
def closes_circles():
    Parent._path = lambda self, welcome, ancestor: list(welcome.path)


@fault
def keeps_the_first_path():
    def make(path):
        def changed(self, welcome, ancestor):
            return list(self._ancestors) if self.linked else path(self, welcome, ancestor)

        return changed

    around(Parent, "_path", make)


@fault
def believes_every_address():
    Parent._addresses = property(lambda self: {})


@fault
def dials_the_silent_first():
    Parent._in_order = lambda self: self._ancestors[::-1]


@fault
def waits_for_the_silent():
    Parent.look = lambda self, now: None


# ---- weights


@fault
def computes_before_the_footer():
    def make(put):
        def changed(self, chunk, data=None):
            put(self, chunk, data)
            if self.arrived == self.config.chunk_count:
                self.digest, self.complete = version_digest(self.config.manifest.digest, self._checksums), True

        return changed

    around(Weights, "put", make)

    def wake(self):
        self._compute()
        self._flow()

    Hub._wake_children = wake


@fault
def checks_no_checksum():
    def make(put):
        def changed(self, chunk, data=None):
            chunk.crc32c = crc32c(chunk.data if data is None else data)
            put(self, chunk, data)

        return changed

    around(Weights, "put", make)


@fault
def checks_no_order():
    def make(put):
        def changed(self, chunk, data=None):
            chunk.index = self.arrived
            chunk.offset_bytes = 4 * self.arrived * self.config.chunk_elements
            put(self, chunk, data)

        return changed

    around(Weights, "put", make)


@fault
def checks_no_digest():
    def make(finish):
        def changed(self, digest):
            finish(self, version_digest(self.config.manifest.digest, self._checksums))

        return changed

    around(Weights, "finish", make)


@fault
def takes_any_held_digest():
    def make(on_header):
        def changed(self, work, version, message):
            if message.weights_header.held_digest:
                message.weights_header.held_digest = self.weights.digest
            on_header(self, work, version, message)

        return changed

    around(Hub, "_on_header", make)


@fault
def takes_any_layout():
    def make(on_header):
        def changed(self, work, version, message):
            message.weights_header.manifest_digest = self.config.manifest.digest
            on_header(self, work, version, message)

        return changed

    around(Hub, "_on_header", make)


@fault
def says_no_chunks_held():
    Weights.resumable = property(lambda self: 0)


@fault
def begins_weights_anew():
    """Takes a header with from_chunk for one from the start."""

    def make(begin):
        def changed(self, *, from_chunk, **more):
            begin(self, from_chunk=0, **more)

        return changed

    around(Weights, "begin", make)


@fault
def takes_any_run():
    def make(on_response):
        def changed(self, message, payload=None, raw=b""):
            if not message.HasField("directive"):
                message.tag.run_id = self.config.run_id
            on_response(self, message, payload, raw)

        return changed

    around(Hub, "on_response", make)


@fault
def ignores_what_is_newer():
    def make(on_response):
        def changed(self, message, payload=None, raw=b""):
            tag = message.tag
            newer = hub.Work(tag.term, tag.step, tag.kind) > self.work and not message.HasField("directive")
            if not newer or message.HasField("weights_header"):
                on_response(self, message, payload, raw)

        return changed

    around(Hub, "on_response", make)


@fault
def dies_of_garbage():
    def changed(kind, data):
        try:
            return decode(kind, data)
        except DecodeError:
            os._exit(1)

    decode = parent.decode_with_chunk
    parent.decode_with_chunk = changed


@fault
def ends_at_what_is_late():
    def make(on_response):
        def changed(self, message, payload=None, raw=b""):
            tag = message.tag
            if not message.HasField("directive") and hub.Work(tag.term, tag.step, tag.kind) < self.work:
                raise DecodeError("too late")
            on_response(self, message, payload, raw)

        return changed

    around(Hub, "on_response", make)


@fault
def takes_any_assignment():
    def make(assign):
        def changed(self, attempt, from_chunk, blocks, environments):
            self.assigned = False
            if not self.attempt:
                return self.resume(blocks, environments)
            return assign(self, self.attempt, self.from_chunk, blocks, environments)

        return changed

    around(Ledger, "assign", make)


# ---- gradients


@fault
def other_samples():
    def make(microbatch):
        return lambda self, step, index: microbatch(self, step + 1, index)

    around(Sampler, "microbatch", make)


@fault
def a_mean():
    def make(microbatch):
        def changed(self, weights, step, index, out, **more):
            held = microbatch(self, weights, step, index, out, **more)
            array = held.array
            if array is not None:
                array /= held.sums.count
            return held

        return changed

    around(Computer, "microbatch", make)


@fault
def a_mean_loss():
    def make(sums):
        def changed(self, block):
            found = sums(self, block)
            return found and type(found)(found.loss / found.count, found.count, found.metrics)

        return changed

    around(Reducer, "sums", make)


@fault
def close_but_not_equal():
    """Bits that are others each time they are sent, within what is allowed."""
    to_wire, contributions = carrier.to_wire, gradients.Gradients.contributions

    def changed(array, *args):
        return to_wire(array * np.float32(1 + 1e-6 * np.random.default_rng().random()), *args)

    carrier.to_wire = changed
    gradients.Gradients.contributions = lambda self, within: [
        part._replace(crc32c=0) for part in contributions(self, within)
    ]


@fault
def says_nothing_held():
    def make(begin):
        def changed(self, *args):
            self.held.clear()
            return begin(self, *args)

        return changed

    around(Ledger, "begin", make)


@fault
def forgets_with_the_link():
    def make(relinked):
        def changed(self, *args):
            self.ledger.held.clear()
            relinked(self, *args)

        return changed

    around(Hub, "relinked", make)
    Hub.held = lambda self: []


@fault
def keeps_blocks_of_the_past():
    def make(start):
        def changed(self, *args):
            held = set(self.held)
            actions = start(self, *args)
            self.held |= held
            return actions

        return changed

    around(Ledger, "start", make)


@fault
def beyond_credit():
    def make(sendable):
        def changed(self, available):
            self.allowed = self.chunks
            return sendable(self, available)

        return changed

    around(Ledger, "sendable", make)


@fault
def no_credit():
    Ledger.credit = lambda self, attempt, through: None


@fault
def a_wrong_checksum():
    carrier.crc32c = lambda data: crc32c(data) ^ 1


@fault
def a_wrong_block():
    def make(write):
        def changed(self, header, block, *, absent):
            write(self, header, block, absent=absent)
            header.block.hi -= 1 if block.width > 1 else 0

        return changed

    around(gradients.Gradients, "_write_header", make)


@fault
def another_digest():
    def make(write):
        def changed(self, header, block, *, absent):
            write(self, header, block, absent=absent)
            header.weights_digest = bytes(16)

        return changed

    around(gradients.Gradients, "_write_header", make)


@fault
def absent_as_zeros():
    def make(write):
        def changed(self, header, block, *, absent):
            write(self, header, block, absent=False)

        return changed

    around(gradients.Gradients, "_write_header", make)


@fault
def nobody_contributed():
    gradients.Gradients.contributions = lambda self, within: []


@fault
def an_older_tag():
    def make(claim):
        def changed(self, tag, session):
            return claim(self, pb.Tag(run_id=tag.run_id, term=tag.term, step=tag.step, kind=tag.kind), session)

        return changed

    around(gradients.Gradients, "claim_up", make)


@fault
def all_chunks_again():
    for name in ("begin", "assign"):

        def make(method):
            def changed(self, attempt, from_chunk, *rest):
                return method(self, attempt, 0, *rest)

            return changed

        around(Ledger, name, make)


@fault
def spares_compute():
    def make(start):
        def changed(self, total, chunks, blocks, environments):
            return start(self, total, chunks, blocks or [Block(0, total)], environments)

        return changed

    around(Ledger, "start", make)


@fault
def old_work_first():
    """Finishes the step before when a new header comes."""

    def make(recall):
        def changed(self, *, attempt=True):
            recall(self, attempt=True)
            if not attempt and self.ledger.assigned and self.up.session:
                tag = pb.Tag(run_id=self.config.run_id, term=self.work.term, step=self.work.step - 1, kind=2)
                waiting = pb.WorkRequest(tag=tag, session=self.up.session, gradient_header=pb.GradientHeader())
                self.hooks.call_later(0.1, lambda: (self.up.waiting.append(waiting), self.up.wake_up()))

        return changed

    around(Hub, "_recall", make)


@fault
def rounds_only_on_the_wire():
    for module in (worker, narrow):
        add, check = module.add_rounded, narrow.round_and_check
        module.add_rounded = lambda left, right, out, dtype, _add=add, **more: _add(left, right, out, "float32", **more)
    worker.round_and_check = lambda array, dtype, **more: check(array, "float32", **more)


@fault
def refuses_to_round():
    def make(prepare):
        def changed(self, config):
            if config.gradient_dtype != "float32":
                raise ConfigError("this worker knows float32 only")
            return prepare(self, config)

        return changed

    around(Sphere, "_prepare", make)


@fault
def rounds_nothing():
    def make(from_proto):
        def changed(message):
            message.gradient_dtype = message.weights_dtype = control_pb2.WIRE_DTYPE_FLOAT32
            return from_proto(message)

        return staticmethod(changed)

    around(NodeConfig, "from_proto", make)


# ---- directives


def ignoring(kind):
    def make(directed):
        def changed(self, directive):
            if directive.kind != kind:
                directed(self, directive)

        return changed

    around(Sphere, "_directed", make)


@fault
def no_stop():
    ignoring(pb.DIRECTIVE_KIND_STOP)


@fault
def no_move():
    ignoring(pb.DIRECTIVE_KIND_MOVE)


@fault
def no_log():
    ignoring(pb.DIRECTIVE_KIND_REPORT_LOG)


@fault
def stops_for_another():
    def make(on_directive):
        def changed(self, directive):
            directive.target_sphere_id = self.id
            on_directive(self, directive)

        return changed

    around(Hub, "_on_directive", make)


@fault
def another_request():
    def make(report):
        def changed(self, said):
            said.request_id = 0
            report(self, said)

        return changed

    around(Upward, "report", make)


@fault
def goes_without_a_word():
    Upward.leave = lambda self, reason: None


@fault
def drops_what_it_owes():
    Sphere.drain = lambda self, reason: self.stop()


@fault
def never_goes():
    Hub.may_leave = property(lambda self: False)
    Sphere.drain = lambda self, reason: self.hub.up.leave(reason)


@fault
def none():
    pass


if __name__ == "__main__":
    FAULTS[sys.argv[1]]()
    cli.main(["start"])
