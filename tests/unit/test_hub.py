"""A hub by itself: what it keeps for the next parent, and what a neighbour's fault does not do to the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import spheres.partition
import spheres.upward
from control.membership import Membership
from spheres.blocks import Block, checked
from spheres.config import MAX_MESSAGE_BYTES, NodeConfig
from spheres.errors import ProtocolError
from spheres.frames import decode
from spheres.gradients import Contribution
from spheres.hub import TRAIN, Child, Hub, Outgoing, Work
from spheres.numerics import crc32c
from spheres.outbox import Outbox
from spheres.phases import PhaseTimes
from spheres.reducer import Held, NonFinite
from spheres.segments import node_memory
from spheres.task import Sums
from spheres.tensors import Manifest
from spheres.upward import Upward
from spheres.v1 import common_pb2
from spheres.v1 import work_pb2 as pb
from spheres.work import Hooks
from spheres.worker import Failure, Unit

CONTROL = [pb.Ancestor(id="control")]


class Patient:
    """A worker that computes when the test says so."""

    unit: Unit
    done: Callable[[Unit, Held | Failure | None], None]

    def submit(self, unit: Unit, _: Any, done: Callable[[Unit, Held | Failure | None], None]) -> None:
        self.unit, self.done = unit, done

    def release(self, held: Held) -> None: ...


def config(chunks: int = 3, *, window: int = 2) -> NodeConfig:
    manifest = Manifest.of({"w": np.zeros(16 * chunks, np.float32)})
    return NodeConfig(run_id="run", manifest=manifest, microbatches=4, chunk_bytes=64, window=window, train_size=99)


def join(hub: Hub, name: str, *, capacity: float = 1.0) -> tuple[Child, list[Exception]]:
    """A child with an open link, and with what its link was ended."""
    ended: list[Exception] = []
    child = Child(id=name, incarnation=1, session=1, address="", outbox=Outbox(hub.weights), close=ended.append)
    hub.admit(child, pb.Hello(capacity=capacity), pb.Tag())
    return child, ended


def waiting(hub: Hub) -> list[pb.WorkRequest]:
    """What the hub has to say to its parent now."""
    messages: list[pb.WorkRequest] = []
    while (item := hub.next_up()) is not None:
        messages.append(decode(pb.WorkRequest, item.data if isinstance(item, Outgoing) else item))
    return messages


def step(hub: Hub, number: int, *blocks: Block) -> pb.WorkResponse:
    """The header of a step whose weights the hub holds."""
    tag = pb.Tag(run_id="run", term=1, step=number, kind=TRAIN)
    header = pb.WeightsHeader(manifest_digest=hub.config.manifest.digest, held_digest=hub.weights.digest)
    message = pb.WorkResponse(tag=tag, weights_header=header)
    if blocks:
        message.assign.blocks.extend(pb.Block(lo=b.lo, hi=b.hi) for b in blocks)
    return message


def test_a_capacity_that_changes_between_hello_and_welcome_is_told() -> None:
    relay = Hub(config(), "relay")
    join(relay, "leaf")
    relay.relinked(2, CONTROL)
    assert [m.capacity.capacity for m in waiting(relay) if m.HasField("capacity")] == [1.0]


def test_only_the_latest_capacity_waits() -> None:
    relay = Hub(config(), "relay")
    for number in range(50):
        child, _ = join(relay, "leaf", capacity=number + 1.0)
        relay.dismiss(child, "it went")
    join(relay, "leaf", capacity=7.0)
    assert [m.capacity.capacity for m in waiting(relay) if m.HasField("capacity")] == [7.0]


def test_a_failure_is_told_again_to_a_new_parent() -> None:
    """The link may have died with it: nothing else would ever end the step."""
    worker = Patient()
    leaf = Hub(config(), "leaf", worker=worker)  # type: ignore[arg-type]
    leaf.weights.publish(term=1, version=0)
    leaf.relinked(1, CONTROL)
    leaf.on_response(step(leaf, 0, Block(0, 4)))
    worker.done(worker.unit, Failure(2, "it broke", "", (), invalid=False))
    sent = waiting(leaf)
    assert [m.task_failure.microbatch for m in sent if m.HasField("task_failure")] == [2]
    assert [m.capacity.capacity for m in sent if m.HasField("capacity")] == [0]
    leaf.relinked(2, CONTROL)
    assert [m.task_failure.error for m in waiting(leaf)] == ["it broke"]
    leaf.on_response(step(leaf, 1))
    leaf.relinked(3, CONTROL)
    assert not waiting(leaf)  # its step is over


@pytest.mark.parametrize(("before", "seconds"), [(0, 2.0), (4, 32.0), (5, 64.0), (1024, 64.0), (1_000_000, 64.0)])
def test_the_rest_after_a_failure_doubles_up_to_the_longest(before: int, seconds: float) -> None:
    worker, rests = Patient(), list[float]()
    leaf = Hub(config(), "leaf", worker=worker)  # type: ignore[arg-type]
    leaf.hooks.call_later = lambda after, _: rests.append(after)
    leaf.weights.publish(term=1, version=0)
    leaf.relinked(1, CONTROL)
    leaf.own.failures = before
    leaf.on_response(step(leaf, 0, Block(0, 4)))
    worker.done(worker.unit, Failure(2, "it broke", "", (), invalid=False))
    assert rests == [seconds]
    assert not leaf.ledger.computes


def test_a_child_that_reads_nothing_loses_its_link_and_the_others_do_not_notice() -> None:
    hub = Hub(config(), "control")
    deaf, ended = join(hub, "deaf")
    other, others = join(hub, "other")
    heard = 0
    for _ in range(2000):
        hub.direct(pb.Directive(kind=pb.DIRECTIVE_KIND_REPORT_STATE))
        while other.outbox.next() is not None:
            heard += 1
    assert heard >= 2000
    assert ended
    assert not others
    hub.dismiss(deaf, str(ended[0]))
    assert list(hub.children) == ["other"]


def test_a_message_of_a_dismissed_child_is_dropped() -> None:
    """I6: its reader may still have one in hand."""
    hub = Hub(config(), "control")
    child, _ = join(hub, "leaf")
    hub.dismiss(child, "it went")
    hub.on_request(child, pb.WorkRequest(session=1, capacity=pb.Capacity(capacity=9.0)))
    assert hub.counts.refused["stale"] == 1
    newer, _ = join(hub, "leaf")
    hub.on_request(child, pb.WorkRequest(session=1, leaving=pb.Leaving()))
    assert hub.ledger.capacity == 1.0
    assert hub.children["leaf"] is newer


def test_a_header_of_the_past_is_dropped_with_what_follows_it() -> None:
    """N14: a parent that is behind is waited for; its link does not end, and its weights are not taken."""
    leaf = Hub(config(), "leaf")
    leaf.weights.publish(term=1, version=0)
    leaf.relinked(1, CONTROL)
    leaf.on_response(step(leaf, 2, Block(0, 4)))
    past = step(leaf, 1, Block(0, 2))
    past.weights_header.held_digest = b""
    leaf.on_response(past)
    leaf.on_response(pb.WorkResponse(tag=past.tag, weights_chunk=pb.Chunk()))
    leaf.on_response(pb.WorkResponse(tag=past.tag, begin=pb.Begin(attempt=7)))
    assert leaf.counts.refused["stale"] == 3
    assert leaf.weights.complete
    assert leaf.ledger.obligations == {Block(0, 4): 0}


def test_a_late_step_on_weights_that_were_overwritten_ends_the_link() -> None:
    """N20: the parent takes them for held; it can learn that they are not by a hello only."""
    now, memory = 100.0, node_memory("shm")
    control = Hub(config(), "control", memory=memory)
    leaf = Hub(config(), "leaf", worker=Patient(), memory=memory)  # type: ignore[arg-type]
    told: list[float] = []
    leaf.hooks.clock, leaf.hooks.stuck = lambda: now, lambda: told.append(now)
    leaf.relinked(1, CONTROL)
    control.weights.publish(term=1, version=0)
    reference = control.weights.reference(0, 2)
    assert reference is not None
    leaf.weights.begin(term=1, version=0, previous_digest=b"", from_chunk=0)
    leaf.weights.refer(reference)
    leaf.weights.finish(control.weights.digest)
    control.weights.publish(term=1, version=0)
    patience = leaf.config.patience_seconds
    leaf.on_response(step(leaf, 0))
    now += 1.1 * patience
    leaf.watch(now)
    assert not told, "a spare: it owes nothing"
    leaf.on_response(step(leaf, 1, Block(0, 4)))
    leaf.watch(now)
    assert not told, "not late yet"
    now += 1.1 * patience
    leaf.watch(now)
    assert told == [now]


def test_a_bad_assignment_leaves_the_weights_as_they_were() -> None:
    leaf = Hub(config(), "leaf")
    leaf.weights.publish(term=1, version=0)
    leaf.relinked(1, CONTROL)
    message = step(leaf, 1, Block(1, 3))
    message.weights_header.held_digest = b""
    with pytest.raises(ProtocolError, match="no canonical block"):
        leaf.on_response(message)
    assert leaf.weights.complete
    assert leaf.work.step == -1


def test_many_chunks_that_become_complete_at_once_are_summed_without_recursion() -> None:
    """A wide window, and a last block that turns out to be absent."""
    chunks = 3000
    hub = Hub(replace(config(chunks, window=chunks), skips_nonfinite=True), "control")
    hub.weights.publish(term=1, version=0)
    sealed: list[bool] = []
    hub.hooks.sealed = lambda: sealed.append(True)
    giver, _ = join(hub, "giver")
    silent, _ = join(hub, "silent")
    total = np.zeros(hub.config.manifest.size, np.float32)
    hub.start(Work(1, 0, TRAIN), total)
    digest = hub.weights.digest
    given, other = (pb.Block(lo=lo, hi=lo + 2) for lo in (0, 2))
    header = pb.GradientHeader(block=given, weights_digest=digest, samples_count=32)
    hub.on_request(giver, pb.WorkRequest(tag=hub.tag, session=1, gradient_header=header))
    values = np.arange(hub.config.manifest.size, dtype=np.float32)
    for index in range(chunks):
        data = values[16 * index : 16 * index + 16].tobytes()
        chunk = pb.Chunk(block=given, index=index, offset_bytes=64 * index, crc32c=crc32c(data), data=data)
        hub.on_request(giver, pb.WorkRequest(tag=hub.tag, session=1, gradient_chunk=chunk))
    assert not sealed
    left_out = [pb.NonFinite(microbatch=index) for index in (2, 3)]
    absent = pb.GradientHeader(block=other, weights_digest=digest, absent=True, skipped=left_out)
    hub.on_request(silent, pb.WorkRequest(tag=hub.tag, session=1, gradient_header=absent))
    assert sealed == [True]
    assert total.tobytes() == values.tobytes()
    assert hub.sums == Sums(0.0, 32, {})


@pytest.mark.parametrize(
    ("blocks", "why"),
    [
        ([Block(0, 2), Block(0, 1)], r"given blocks \[0,1\) and \[0,2\) overlap"),
        ([Block(1, 3)], r"\[1,3\) is no canonical block of 4"),
        ([Block(2, 2)], "no canonical block"),
        ([Block(0, 8)], "no canonical block"),
    ],
)
def test_blocks_of_a_neighbour_are_checked(blocks: list[Block], why: str) -> None:
    """N3."""
    with pytest.raises(ProtocolError, match=why):
        checked(blocks, 4, what="given")
    assert checked([Block(2, 4), Block(0, 1)], 4, what="given") == [Block(0, 1), Block(2, 4)]


def test_times_that_a_child_says_again_replace_the_first() -> None:
    """A new attempt sends footers again: nothing is counted twice."""
    times = PhaseTimes()
    times.merge("a", [common_pb2.PhaseTime(phase="compute", sum_seconds=3, max_seconds=2, slowest_sphere_id="a1")])
    times.merge("a", [])  # the footer of another block says nothing
    times.merge("b", [common_pb2.PhaseTime(phase="compute", sum_seconds=1, max_seconds=1, slowest_sphere_id="b")])
    assert times.below["compute"] == (4, 2, "a1")
    times.merge("a", [common_pb2.PhaseTime(phase="compute", sum_seconds=4, max_seconds=3, slowest_sphere_id="a2")])
    assert times.below["compute"] == (5, 3, "a2")


def test_waiting_is_what_is_left_of_the_step_however_often_it_is_closed() -> None:
    times = PhaseTimes()
    times.add("compute", 1.0)
    times.close(3.0, computes=True)
    times.add("sum", 0.5)
    times.close(5.0, computes=True)
    assert times.own == {"compute": 1.0, "wait": 3.5, "sum": 0.5}
    assert times.incarnation["wait"] == 3.5
    times.clear()
    times.add("compute", 1.0)
    times.close(2.0, computes=True)
    assert times.incarnation["wait"] == 4.5


def test_a_relay_does_not_wait_and_says_its_times_once() -> None:
    times = PhaseTimes()
    times.add("sum", 1.0)
    times.close(9.0, computes=False)
    footer = pb.GradientFooter()
    times.write(footer.phases, "r")
    times.write(again := pb.GradientFooter().phases, "r")
    assert [(p.phase, p.sum_seconds, p.slowest_sphere_id) for p in footer.phases] == [("sum", 1.0, "r")]
    assert list(again) == list(footer.phases)


# ---- microbatches that are left out (N16), and how much is said of them


def root_and_leaf(config: NodeConfig) -> tuple[Hub, Hub, Child, Patient]:
    """Control and one sphere that owes it the whole step."""
    control, worker = Hub(config, "control"), Patient()
    leaf = Hub(config, "s-1", worker=worker)  # type: ignore[arg-type]
    control.weights.publish(term=1, version=0)
    leaf.weights.publish(term=1, version=0)
    child, _ = join(control, "s-1")
    control.start(Work(1, 0, TRAIN), np.zeros(config.manifest.size, np.float32))
    leaf.relinked(1, CONTROL)
    leaf.on_response(step(leaf, 0, Block(0, config.microbatches)))
    leaf.on_response(
        pb.WorkResponse(tag=leaf.tag, credit=pb.Credit(attempt=leaf.ledger.attempt, through_chunk=config.chunk_count))
    )
    return control, leaf, child, worker


def nonfinite(config: NodeConfig, indices: list[int], *, long: bool) -> tuple[NonFinite, ...]:
    names = tuple(f"encoder.layer{n}.{'very' * 60}.weight" for n in range(16)) if long else ("w",)
    return tuple(NonFinite(index, names, tuple(range(1 << 40, (1 << 40) + 64))) for index in indices)


@pytest.mark.parametrize("absent", [True, False])
@pytest.mark.parametrize("long", [True, False])
def test_4096_microbatches_left_out_fit_into_a_message_and_each_is_told(
    absent: bool, long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the cut of so many takes minutes, and with one child there is but one
    monkeypatch.setattr(spheres.partition, "cut", lambda blocks, workers: [(workers[0][0], list(blocks))])
    chunk = 1 << 20
    manifest = Manifest.of({"w": np.zeros(chunk // 4, np.float32)})
    total = 4096
    node = NodeConfig(
        run_id="run", manifest=manifest, microbatches=total, batch_size=total, chunk_bytes=chunk, train_size=2 * total,
        skips_nonfinite=True,
    )  # fmt: skip
    control, leaf, child, worker = root_and_leaf(node)
    indices = list(range(total)) if absent else [index for index in range(total) if index != 77]
    skipped = nonfinite(node, indices, long=long)
    array = None if absent else np.ones(chunk // 4, np.float32)
    held = Held(array, None if absent else Sums(1.0, 1), skipped, 5)
    # what a tree of as many spheres says of who computed what
    parts = [Contribution(Block(n, n + 1), f"s-{n:05}", 1 << 31) for n in range(total)]
    leaf.gradients.contributions = lambda within: parts  # type: ignore[method-assign, assignment]
    worker.done(worker.unit, held)
    items = []
    while (item := leaf.next_up()) is not None:
        items.append(item.data if isinstance(item, Outgoing) else item)
    assert all(len(data) <= MAX_MESSAGE_BYTES for data in items)
    for data in items:
        control.on_request(child, decode(pb.WorkRequest, data))
    assert control.ledger.finished
    assert [verdict.microbatch for verdict in control.gradients.skipped] == indices
    assert (control.sums is None) == absent
    told = [verdict for verdict in control.gradients.skipped if verdict.sphere]
    assert len(told) in ((0, 32) if long or not absent else (32,))
    for verdict, said in zip(told, skipped, strict=False):
        assert verdict == replace(said, sphere="s-1")
    assert len(control.gradients._contributions[Block(0, total)]) == total


def test_a_few_verdicts_are_told_in_full() -> None:
    node = replace(config(), skips_nonfinite=True)
    control, leaf, child, worker = root_and_leaf(node)
    skipped = nonfinite(node, [1, 2], long=False)
    worker.done(worker.unit, Held(np.ones(48, np.float32), Sums(1.0, 32), skipped, 99))
    for message in waiting(leaf):
        control.on_request(child, message)
    assert control.gradients.skipped == tuple(replace(verdict, sphere="s-1") for verdict in skipped)
    assert control.gradients.contributions(Block(0, 4)) == [(Block(0, 4), "s-1", 99)]


@pytest.mark.parametrize("count", [0, 31, 33, 64, -32])
def test_a_count_of_samples_is_that_of_the_block_without_what_was_left_out(count: int) -> None:
    """Which samples a block has is known to everyone: 16 in each of four microbatches here."""
    node = replace(config(), skips_nonfinite=True)
    control, leaf, child, worker = root_and_leaf(node)
    worker.done(worker.unit, Held(np.ones(48, np.float32), Sums(1.0, count), nonfinite(node, [0, 3], long=False)))
    (first, *_) = [message for message in waiting(leaf) if message.HasField("gradient_header")]
    with pytest.raises(ProtocolError, match=rf"\[0,4\) has {count} samples; expected 32 samples in step 0"):
        control.on_request(child, first)


def test_a_child_that_does_not_answer_begin_is_given_up_those_further_down_first() -> None:
    """Its heartbeats may come on; everyone else would wait for it. Control waits longer than those below it."""
    now = 0.0
    control, inner = Hub(config(), "control"), Hub(config(), "inner")
    control.renewed([])
    inner.relinked(1, CONTROL)
    ends = []
    for hub in (control, inner):
        hub.hooks.clock = lambda: now
        hub.weights.publish(term=1, version=0)
        child, ended = join(hub, "mute")
        if hub is control:
            hub.start(Work(1, 0, TRAIN), np.zeros(hub.config.manifest.size, np.float32))
        else:
            hub.on_response(step(hub, 0, Block(0, 4)))
        hub._do(hub.ledger.hurry([]))
        assert hub.ledger.waiting == {"mute"}
        hub.watch(now)
        assert not ended
        ends.append((hub, child, ended))
    patience = control.config.patience_seconds
    now = 4.6 * patience
    for hub, _, _ in ends:
        hub.watch(now)
    assert [len(ended) for _, _, ended in ends] == [0, 1]
    assert "mute did not answer begin in" in str(ends[1][2][0])
    assert not inner.children
    now = 6.1 * patience
    control.watch(now)
    assert len(ends[0][2]) == 1


@pytest.mark.parametrize(
    ("skips", "indices", "said"),
    [
        (False, [1], r"microbatches of \[0,4\) were left out; this work leaves none out"),
        (True, [4], r"microbatches \[4\] of \[0,4\) are outside of it or not in order"),
        (True, [-1], "are outside of it"),
        (True, [2, 1], "not in order"),
        (True, [1, 1], "not in order"),
    ],
)
def test_a_child_that_leaves_out_what_it_may_not_is_refused(skips: bool, indices: list[int], said: str) -> None:
    node = replace(config(), skips_nonfinite=skips)
    control, leaf, child, worker = root_and_leaf(node)
    worker.done(worker.unit, Held(np.ones(48, np.float32), Sums(1.0, 2), nonfinite(node, indices, long=False)))
    (first, *_) = [message for message in waiting(leaf) if message.HasField("gradient_header")]
    with pytest.raises(ProtocolError, match=said):
        control.on_request(child, first)
    assert not control.gradients.reducer.arrived


def test_a_loss_that_overflows_in_a_sum_is_passed_on_and_one_of_a_microbatch_is_refused() -> None:
    for block, refused in ((Block(0, 4), False), (Block(0, 1), True)):
        control, leaf, child, worker = root_and_leaf(replace(config(), microbatches=block.width))
        worker.done(worker.unit, Held(np.ones(48, np.float32), Sums(float("inf"), 64)))
        try:
            for message in waiting(leaf):
                control.on_request(child, message)
        except ProtocolError:
            assert refused
        else:
            assert not refused
            assert control.sums == Sums(float("inf"), 64)


def test_a_message_of_a_step_that_has_not_begun_here_ends_the_link() -> None:
    """Its header was lost or overtaken: ignoring it would leave the parent waiting for an answer for ever."""
    leaf = Hub(config(), "leaf", worker=Patient())  # type: ignore[arg-type]
    leaf.weights.publish(term=1, version=0)
    leaf.relinked(1, CONTROL)
    leaf.on_response(step(leaf, 0, Block(0, 4)))
    tag = pb.Tag(run_id="run", term=1, step=1, kind=TRAIN)
    with pytest.raises(ProtocolError, match="step 1 came before its header"):
        leaf.on_response(pb.WorkResponse(tag=tag, begin=pb.Begin(attempt=1)))


def test_changes_below_are_told_again_on_a_new_link() -> None:
    """The last ones may have gone down with the old one; control knows old news by its session."""
    inner = Hub(config(), "inner")
    inner.relinked(1, CONTROL)
    first, _ = join(inner, "a")
    join(inner, "b")
    inner.dismiss(first, "it went")
    said = [(m.sphere_change.sphere_id, m.sphere_change.lost) for m in waiting(inner) if m.HasField("sphere_change")]
    assert said == [("a", False), ("b", False), ("a", True)]
    inner.relinked(2, CONTROL)
    again = [m.sphere_change for m in waiting(inner) if m.HasField("sphere_change")]
    assert [(c.sphere_id, c.lost) for c in again] == said
    assert not again[0].HasField("computing")


def test_a_new_link_is_told_of_every_sphere_below_however_many() -> None:
    """A rack goes down while this node has no parent: control must not take the first of its spheres for alive."""
    members = Membership("control-host", 4, hosts_per_host=None, forgotten=lambda _: None)
    inner = Hub(config(), "inner")
    inner.relinked(1, CONTROL)
    children = [join(inner, f"s-{number}")[0] for number in range(400)]
    for message in waiting(inner):
        if message.HasField("sphere_change"):
            members.change(message.sphere_change)
    for child in children:
        inner.dismiss(child, "it went")
    inner.relinked(2, CONTROL)
    for message in waiting(inner):
        if message.HasField("sphere_change"):
            members.change(message.sphere_change)
    assert not [name for name, sphere in members.spheres.items() if sphere.linked]


def test_what_is_kept_for_the_next_link_is_the_newest_of_each_sphere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spheres.upward, "_MOST_KNOWN", 3)

    def change(name: str, session: int, *, lost: bool = False) -> pb.SphereChange:
        return pb.SphereChange(sphere_id=name, incarnation=1, session=session, lost=lost)

    up = Upward(Hooks(), root=False)
    for said in (
        *(change("a", session, lost=lost) for session in range(1, 500) for lost in (False, True)),
        change("b", 7),
        change("b", 6, lost=True),
        change("b", 5),  # late, from another child
        change("a", 499),  # and once more
    ):
        up.change(said)
    kept = [("a", 499, True), ("b", 7, False), ("b", 6, True), ("a", 499, False)]
    assert [(c.sphere_id, c.session, c.lost) for c in up.relinked(2)] == kept
    for number in range(50):
        up.change(change(f"s-{number}", 1))
    assert [c.sphere_id for c in up.relinked(3)] == [f"s-{number}" for number in range(44, 50)]


def test_a_control_that_came_back_is_told_of_all_links_and_of_no_old_news() -> None:
    inner = Hub(config(), "inner")
    inner.relinked(1, [pb.Ancestor(id="control", incarnation=1)])
    first, _ = join(inner, "a")
    join(inner, "b")
    inner.dismiss(first, "it went")
    waiting(inner)
    inner.relinked(2, [pb.Ancestor(id="control", incarnation=2)])
    said = [m.sphere_change for m in waiting(inner) if m.HasField("sphere_change")]
    assert [(c.sphere_id, c.parent_id, c.lost) for c in said] == [("b", "inner", False)]
    assert said[0].HasField("member")
    # and where only the way to it is new, on a link that lives
    inner.renewed([pb.Ancestor(id="control", incarnation=3), pb.Ancestor(id="x", incarnation=9)])
    assert [m.sphere_change.sphere_id for m in waiting(inner)] == ["b"]


def test_what_a_lost_leaf_was_computing_is_told() -> None:
    root = Hub(config(), "control")
    told: list[pb.SphereChange] = []
    root.hooks.changed = told.append
    root.weights.publish(term=1, version=0)
    child, _ = join(root, "a")
    join(root, "b")
    root.start(Work(1, 5, TRAIN), np.zeros(48, np.float32))
    root.dismiss(child, "it went")
    assert (told[-1].lost, told[-1].step, told[-1].computing) == (True, 5, pb.Block(lo=0, hi=2))


def test_an_interrupted_version_goes_on_where_it_broke_off() -> None:
    """N17: over another link, to a child that says how many chunks it holds."""
    above, below = Hub(config(5), "control"), Hub(config(5), "leaf", worker=Patient())  # type: ignore[arg-type]
    above.weights.publish(term=1, version=0)
    below.relinked(1, CONTROL)
    child, _ = join(above, "leaf")
    above.start(Work(1, 0, TRAIN), np.zeros(80, np.float32))
    while below.weights.arrived < 2:
        message = child.outbox.next()
        assert message is not None
        answer = decode(pb.WorkResponse, message)
        if not answer.HasField("welcome"):
            below.on_response(answer)
    above.dismiss(child, "it broke off")
    hello = pb.Hello(capacity=1.0, weights_version=0, weights_term=1, weights_chunks_held=2)
    again = Child(id="leaf", incarnation=1, session=2, address="", outbox=Outbox(above.weights), close=lambda _: None)
    above.admit(again, hello, below.tag)
    below.relinked(2, CONTROL)
    sent = above.sent_down_bytes
    while (message := again.outbox.next()) is not None:
        answer = decode(pb.WorkResponse, message)
        if not answer.HasField("welcome"):
            below.on_response(answer)
    assert below.weights.complete
    assert below.weights.digest == above.weights.digest
    assert above.sent_down_bytes - sent == 3 * 64


def test_a_node_may_leave_when_nobody_needs_what_it_holds() -> None:
    worker = Patient()
    leaf = Hub(config(), "leaf", worker=worker)  # type: ignore[arg-type]
    leaf.weights.publish(term=1, version=0)
    leaf.relinked(1, CONTROL)
    assert leaf.may_leave
    leaf.on_response(step(leaf, 0, Block(0, 4)))
    leaf.up.leave("a test")
    assert not leaf.may_leave
    worker.done(worker.unit, Held(np.zeros(48, np.float32), Sums(0.0, 8)))
    waiting(leaf)
    assert not leaf.may_leave, "until the seal somebody may die who has it"
    leaf.on_response(step(leaf, 1))
    assert leaf.may_leave
    assert leaf.up.leaving == "a test"


def test_a_task_that_fails_rests_longer_each_time() -> None:
    now, timers = 100.0, []
    worker = Patient()
    leaf = Hub(config(), "leaf", worker=worker)  # type: ignore[arg-type]
    leaf.hooks.clock = lambda: now
    leaf.hooks.call_later = lambda seconds, call: timers.append((now + seconds, call))
    leaf.weights.publish(term=1, version=0)
    leaf.relinked(1, CONTROL)
    for number, seconds in enumerate((2.0, 4.0, 8.0)):
        leaf.on_response(step(leaf, number, Block(0, 4)))
        worker.done(worker.unit, Failure(0, "no luck", "", (), invalid=False))
        assert leaf.ledger.capacity == 0
        assert "set aside" in leaf.activity
        when, call = timers.pop()
        assert when == now + seconds
        leaf.on_response(step(leaf, number + 100))
        assert leaf.ledger.capacity == 0, "the next step is not its turn yet"
        now = when
        call()
        assert leaf.ledger.capacity == 1
        leaf.work = Work(1, number, TRAIN)  # let the next number follow


def test_a_directive_goes_the_way_to_its_sphere_and_to_all_where_that_is_not_known() -> None:
    hub = Hub(config(), "control")
    left, _ = join(hub, "left")
    right, _ = join(hub, "right")

    def told(target: str) -> list[str]:
        hub.direct(pb.Directive(target_sphere_id=target, kind=pb.DIRECTIVE_KIND_DRAIN))
        found = []
        for child in (left, right):
            while (message := child.outbox.next()) is not None:
                if decode(pb.WorkResponse, message).HasField("directive"):
                    found.append(child.id)
        return found

    def change(child: Child, *, lost: bool = False) -> None:
        news = pb.SphereChange(sphere_id="deep", incarnation=1, session=1, parent_id=child.id, lost=lost)
        hub.on_request(child, pb.WorkRequest(sphere_change=news))

    assert told("left") == ["left"]
    assert told("") == ["left", "right"]
    assert told("deep") == ["left", "right"]
    change(right)
    assert told("deep") == ["right"]
    change(left)  # it has moved; the news of the old link comes late
    change(right, lost=True)
    assert told("deep") == ["left"]
    hub.dismiss(left, "it went")
    assert told("deep") == ["right"], "who knows where it is by now"


def test_the_reason_that_is_told_of_a_lost_child_fits_into_a_message() -> None:
    """Errors quote what a peer sent, which can be as long as a message; this would be told on every new link."""
    hub = Hub(config(), "s-1")
    child, _ = join(hub, "leaf")
    waiting(hub)
    hub.dismiss(child, "a message of run " + "caf\udce9" * 400_000)
    (told,) = [message for message in waiting(hub) if message.HasField("sphere_change")]
    assert told.sphere_change.lost
    assert told.sphere_change.reason.startswith("a message of run caf\\udce9")
    assert told.ByteSize() < 1_200
