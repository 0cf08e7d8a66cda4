"""What waits for one child: in which order it goes, and the one cursor into the weights (N5, N14, N17)."""

from __future__ import annotations

import numpy as np
import pytest

from spheres.carrier import Inline, Shared
from spheres.config import NodeConfig
from spheres.errors import LinkClosedError
from spheres.frames import decode
from spheres.outbox import Outbox
from spheres.segments import Memory
from spheres.tensors import Manifest
from spheres.v1 import common_pb2
from spheres.v1 import work_pb2 as pb
from spheres.weights import Weights

MEMORY = Memory()


def config(chunks: int) -> NodeConfig:
    return NodeConfig(
        run_id="run", manifest=Manifest.of({"w": np.zeros(16 * chunks, np.float32)}), chunk_bytes=64, window=2
    )


def whole(chunks: int = 4, *, version: int = 1) -> Weights:
    weights = Weights(config(chunks))
    weights.flat[:] = np.arange(weights.flat.size)
    weights.publish(term=1, version=version)
    return weights


def tag(step: int = 1, kind: common_pb2.WorkKind.ValueType = common_pb2.WORK_KIND_TRAIN) -> pb.Tag:
    return pb.Tag(run_id="run", term=1, step=step, kind=kind, weights_version=step)


def begin(attempt: int) -> pb.WorkResponse:
    return pb.WorkResponse(tag=tag(), begin=pb.Begin(attempt=attempt))


def assign(attempt: int) -> pb.WorkResponse:
    return pb.WorkResponse(tag=tag(), assign=pb.Assign(attempt=attempt, blocks=[pb.Block(lo=0, hi=2)]))


def credit(through: int) -> pb.WorkResponse:
    return pb.WorkResponse(tag=tag(), credit=pb.Credit(through_chunk=through))


def notice(reason: str) -> pb.WorkResponse:
    return pb.WorkResponse(directive=pb.Directive(reason=reason))


def following(outbox: Outbox) -> list[pb.WorkResponse]:
    """All that can be sent now."""
    messages: list[pb.WorkResponse] = []
    while (data := outbox.next()) is not None:
        messages.append(decode(pb.WorkResponse, data))
    return messages


def fields(message: pb.WorkResponse) -> list[str]:
    return [descriptor.name for descriptor, _ in message.ListFields() if descriptor.name != "tag"]


def chunks(messages: list[pb.WorkResponse]) -> list[int]:
    return [m.weights_chunk.index for m in messages if m.HasField("weights_chunk")]


def test_a_version_is_header_chunks_footer_in_order() -> None:
    weights = whole(4)
    outbox = Outbox(weights)
    outbox.header(tag())
    messages = following(outbox)
    assert [fields(m) for m in messages] == [
        ["weights_header"],
        ["weights_chunk"],
        ["weights_chunk"],
        ["weights_chunk"],
        ["weights_footer", "weights_chunk"],
    ]
    assert chunks(messages) == [0, 1, 2, 3]
    assert b"".join(m.weights_chunk.data for m in messages) == weights.flat.tobytes()
    assert messages[-1].weights_footer.digest == weights.digest
    assert all(m.tag == tag() for m in messages)
    assert outbox.sent_bytes == weights.flat.nbytes


def test_of_a_small_model_all_is_one_message() -> None:
    """N5: header, first assignment, chunk and footer."""
    weights = whole(1)
    outbox = Outbox(weights)
    outbox.header(tag())
    outbox.step(assign(0))
    [message] = following(outbox)
    assert fields(message) == ["weights_header", "assign", "weights_footer", "weights_chunk"]
    assert message.weights_chunk.data == weights.flat.tobytes()


def test_of_a_small_model_that_has_not_come_yet_the_header_goes_ahead() -> None:
    origin, weights = whole(1), Weights(config(1))
    weights.begin(term=1, version=1, previous_digest=b"", from_chunk=0)
    outbox = Outbox(weights)
    outbox.header(tag())
    assert [fields(m) for m in following(outbox)] == [["weights_header"]]
    head, data = origin.chunk(0)
    head.data = bytes(data)
    weights.put(head)
    weights.finish(origin.digest)
    assert [fields(m) for m in following(outbox)] == [["weights_footer", "weights_chunk"]]


def test_chunks_are_passed_on_as_they_arrive() -> None:
    """Cut-through: no queue, and nothing beyond what is here and checked."""
    origin, weights = whole(3), Weights(config(3))
    weights.begin(term=1, version=1, previous_digest=b"", from_chunk=0)
    fast, slow = Outbox(weights), Outbox(weights)
    for outbox in (fast, slow):
        outbox.header(tag())
    assert chunks(following(fast)) == []
    for index in range(3):
        head, data = origin.chunk(index)
        head.data = bytes(data)
        weights.put(head)
        assert chunks(following(fast)) == [index]
    # chunk 2 went before the digest was known: the footer follows alone
    weights.finish(origin.digest)
    assert [fields(m) for m in following(fast)] == [["weights_footer"]]
    assert chunks(following(slow)) == [0, 1, 2]
    assert fast.holds == slow.holds == (1, 1, origin.digest)


def test_a_child_that_holds_the_version_gets_a_header_and_no_chunk() -> None:
    weights = whole(4)
    outbox = Outbox(weights)
    outbox.holds = (1, 1, weights.digest)
    outbox.header(tag())
    outbox.step(assign(0))
    [message] = following(outbox)
    assert fields(message) == ["weights_header", "assign"]
    assert message.weights_header.held_digest == weights.digest
    assert outbox.sent_bytes == 0


@pytest.mark.parametrize("holds", [(1, 1, b"another digest"), (1, 2, None), (2, 1, None)])
def test_a_child_that_holds_something_else_gets_all_chunks(holds: tuple[int, int, bytes | None]) -> None:
    weights = whole(2)
    outbox = Outbox(weights)
    outbox.holds = (holds[0], holds[1], holds[2] or weights.digest)
    outbox.header(tag())
    messages = following(outbox)
    assert not messages[0].weights_header.held_digest
    assert chunks(messages) == [0, 1]


def test_the_next_step_on_the_same_version_sends_nothing_again() -> None:
    outbox = Outbox(whole(4))
    outbox.header(tag(1, common_pb2.WORK_KIND_EVALUATE))
    following(outbox)
    outbox.header(tag(1))
    assert [fields(m) for m in following(outbox)] == [["weights_header"]]


def test_the_next_step_on_the_same_version_goes_on_in_the_middle_of_it() -> None:
    """N17: a joiner that got half of it during an evaluation."""
    outbox = Outbox(whole(4))
    outbox.header(tag(1, common_pb2.WORK_KIND_EVALUATE))
    assert [outbox.next() is not None for _ in range(3)] == [True] * 3  # header, 0, 1
    outbox.header(tag(1))
    messages = following(outbox)
    assert messages[0].weights_header.from_chunk == 2
    assert chunks(messages) == [2, 3]


def test_a_new_version_begins_from_the_first_chunk() -> None:
    """N17: one who was still on the old version starts again with the new one."""
    weights = whole(4)
    outbox = Outbox(weights)
    outbox.header(tag(1))
    following_two = [outbox.next() for _ in range(3)]
    assert None not in following_two
    outbox.abort()
    assert outbox.next() is None
    weights.publish(term=1, version=2)
    assert outbox.next() is None  # nobody said yet what step it is for
    outbox.header(tag(2))
    messages = following(outbox)
    assert messages[0].weights_header.from_chunk == 0
    assert chunks(messages) == [0, 1, 2, 3]
    assert {m.tag.weights_version for m in messages} == {2}


def test_the_seal_drops_what_waits_of_the_step() -> None:
    """N15: a header that waited would announce the next version's chunks as the last one's."""
    weights = whole(4)
    outbox = Outbox(weights)
    outbox.notice(notice("kept"))
    outbox.header(tag(1))
    outbox.step(begin(1))
    outbox.credit(credit(3))
    outbox.abort()
    weights.withdraw()
    weights.publish(term=1, version=2)
    assert [fields(m) for m in following(outbox)] == [["directive"]]


def test_a_header_drops_what_waits_of_the_step_before() -> None:
    """N14; what belongs to no step stays, and goes first."""
    outbox = Outbox(whole(1))
    outbox.header(tag(1))
    outbox.step(begin(1))
    outbox.step(assign(1))
    outbox.credit(credit(3))
    outbox.notice(notice("first"))
    outbox.header(tag(2))
    messages = following(outbox)
    assert [fields(m) for m in messages] == [["directive"], ["weights_header", "weights_footer", "weights_chunk"]]
    assert messages[1].tag.step == 2


def test_a_child_that_is_ahead_gets_no_header_until_its_parent_is_there_too() -> None:
    """N14: of a version that it would pass over, it must not be counted as having half."""
    weights = whole(4)
    outbox = Outbox(weights)
    outbox.reached = (1, 1, common_pb2.WORK_KIND_TRAIN)
    outbox.header(tag(0))
    outbox.header(tag(1, common_pb2.WORK_KIND_EVALUATE))
    assert following(outbox) == []
    outbox.header(tag(1))
    messages = following(outbox)
    assert messages[0].weights_header.from_chunk == 0
    assert chunks(messages) == [0, 1, 2, 3]


def test_a_child_that_is_sent_a_version_again_holds_none_until_its_footer() -> None:
    """It said that it held it, and was sent it nevertheless, since its parent did not have it whole yet."""
    origin, weights = whole(2), Weights(config(2))
    weights.begin(term=1, version=1, previous_digest=b"", from_chunk=0)
    outbox = Outbox(weights)
    outbox.holds = (1, 1, origin.digest)
    outbox.header(tag(1, common_pb2.WORK_KIND_EVALUATE))
    assert [fields(m) for m in following(outbox)] == [["weights_header"]]
    for index in range(2):
        head, data = origin.chunk(index)
        head.data = bytes(data)
        weights.put(head)
    weights.finish(origin.digest)
    outbox.header(tag(1))
    messages = following(outbox)
    assert not messages[0].weights_header.held_digest
    assert chunks(messages) == [0, 1]


def test_messages_of_the_step_go_before_credit_and_credit_before_chunks() -> None:
    outbox = Outbox(whole(2))
    outbox.header(tag())
    outbox.step(begin(1))
    outbox.step(assign(1))
    outbox.credit(credit(5))
    assert [fields(m)[-1] for m in following(outbox)] == [
        "weights_header",
        "begin",
        "assign",
        "credit",
        "weights_chunk",
        "weights_chunk",
    ]


def test_only_the_first_assignment_rides_on_the_header() -> None:
    """An assignment that answers a Ready must not overtake its Begin."""
    outbox = Outbox(whole(2))
    outbox.holds = (1, 1, whole(2).digest)
    outbox.header(tag())
    outbox.step(assign(0))
    outbox.step(begin(1))
    outbox.step(assign(1))
    messages = following(outbox)
    assert [fields(m) for m in messages] == [["weights_header", "assign"], ["begin"], ["assign"]]
    assert [m.assign.attempt for m in messages] == [0, 0, 1]


def test_an_assignment_of_a_later_attempt_does_not_ride_on_a_header_that_comes_again() -> None:
    """The child would take it for attempt 0's, and its parent all that it sends for stale."""
    outbox = Outbox(whole(2))
    outbox.holds = (1, 1, whole(2).digest)
    outbox.header(tag())
    outbox.step(begin(1))
    following(outbox)
    outbox.header(tag())
    outbox.step(assign(1))
    assert [fields(m) for m in following(outbox)] == [["weights_header"], ["assign"]]


def test_a_begin_ends_what_waits_of_the_attempt_before() -> None:
    outbox = Outbox(whole(1))
    outbox.step(begin(1))
    outbox.step(assign(1))
    outbox.credit(credit(3))
    outbox.step(begin(2))
    messages = following(outbox)
    assert [m.begin.attempt for m in messages] == [2]


def test_only_the_latest_credit_counts() -> None:
    outbox = Outbox(whole(1))
    for through in range(2, 9):
        outbox.credit(credit(through))
    assert [m.credit.through_chunk for m in following(outbox)] == [8]


def test_whatever_is_added_wakes_the_writer() -> None:
    outbox = Outbox(whole(1))
    for add in (
        lambda: outbox.notice(notice("")),
        lambda: outbox.header(tag()),
        lambda: outbox.step(begin(1)),
        lambda: outbox.credit(credit(1)),
    ):
        outbox.wake.clear()
        add()
        assert outbox.wake.is_set()


def test_a_child_that_reads_nothing_is_given_up() -> None:
    outbox = Outbox(whole(1))
    for number in range(1024):
        outbox.notice(notice(str(number)))
    with pytest.raises(LinkClosedError, match="reads none"):
        outbox.notice(notice("one too many"))
    # what belongs to the step never piles up
    for attempt in range(5000):
        outbox.step(begin(attempt))
        outbox.step(assign(attempt))


# ---- of weights that lie with another


def shared(chunks: int = 4) -> tuple[Weights, Weights]:
    """Control and a sphere that reads its weights where they lie."""
    origin = Weights(config(chunks), memory=MEMORY, root=True)
    origin.flat[:] = np.arange(origin.flat.size)
    origin.publish(term=1, version=1)
    weights = Weights(config(chunks), memory=MEMORY)
    arrive(weights, origin, chunks)
    return origin, weights


def arrive(weights: Weights, origin: Weights, chunks: int) -> None:
    weights.begin(term=1, version=origin.version, previous_digest=b"", from_chunk=0)
    weights.refer(origin.reference(0, chunks - 1))  # type: ignore[arg-type]
    if origin.complete:
        weights.finish(origin.digest)


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("wire", ["inline", "shm"])
def test_they_are_passed_on_by_either_wire(wire: str, chunks: int) -> None:
    _, weights = shared(chunks)
    outbox = Outbox(weights, Shared(weights.config, MEMORY) if wire == "shm" else Inline(weights.config))
    outbox.header(tag())
    messages = following(outbox)
    assert messages[-1].weights_footer.digest == weights.digest
    if wire == "shm":
        assert [fields(m) for m in messages] == [["weights_header", "weights_footer", "weights_reference"]]
    else:
        assert b"".join(m.weights_chunk.data for m in messages) == weights.served.tobytes()


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("wire", ["inline", "shm"])
def test_of_weights_that_are_overwritten_neither_chunk_nor_footer_goes(wire: str, chunks: int) -> None:
    """Their step is sealed (N15). The header goes: what follows it of the step must not come before it."""
    origin, weights = shared(chunks)
    outbox = Outbox(weights, Shared(weights.config, MEMORY) if wire == "shm" else Inline(weights.config))
    outbox.header(tag())
    outbox.step(assign(0))
    origin.withdraw()
    outbox.credit(credit(3))
    messages = following(outbox)
    assert [fields(m) for m in messages[:1]] == [["weights_header", "assign"]]
    assert all(set(fields(m)) <= {"weights_header", "assign", "credit"} for m in messages)
    assert outbox.holds is None


def test_of_weights_that_are_overwritten_nobody_is_told_that_it_holds_them() -> None:
    origin, weights = shared()
    outbox = Outbox(weights)
    outbox.holds = (1, 1, weights.digest)
    origin.withdraw()
    outbox.header(tag())
    [message] = following(outbox)
    assert not message.weights_header.held_digest


@pytest.mark.parametrize("wire", ["inline", "shm"])
def test_of_weights_that_are_still_being_written_chunks_go_and_references_wait(wire: str) -> None:
    origin, weights = shared()
    outbox = Outbox(weights, Shared(weights.config, MEMORY) if wire == "shm" else Inline(weights.config))
    origin.announce(term=1, version=2)
    origin.prepare(0, 3)
    origin.offer(3)
    arrive(weights, origin, 3)
    outbox.header(tag(2))
    messages = following(outbox)
    assert messages[0].HasField("weights_header")
    assert chunks(messages) == ([0, 1, 2] if wire == "inline" else [])
    origin.prepare(3, 4)
    origin.offer(4)
    origin.seal()
    weights.refer(origin.reference(3, 3))  # type: ignore[arg-type]
    weights.finish(origin.digest)
    last = following(outbox)[-1]
    assert last.weights_footer.digest == origin.digest
    if wire == "shm":
        assert (last.weights_reference.from_chunk, last.weights_reference.through_chunk) == (0, 3)
