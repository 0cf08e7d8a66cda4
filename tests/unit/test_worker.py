"""Blocks as the compute thread makes them: what is left out is absent, wherever it lies, and is told of."""

from __future__ import annotations

import asyncio
import os
import sys
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.config import RunConfig
from control.gradients import Outcome, outcome
from control.initial import initial_weights, node_config
from control.reference import CanonicalSum
from spheres.blocks import Block, decompose, halves
from spheres.errors import GradientError
from spheres.narrow import add_rounded
from spheres.numerics import crc32c
from spheres.reducer import Held
from spheres.task import Sums
from spheres.tensors import aligned_zeros
from spheres.v1 import work_pb2 as pb
from spheres.worker import Computer, Failure, Pool, Unit, Worker
from tests.sums import canonical

Array = npt.NDArray[np.float32]


class Signed:
    """Two parameters; the gradient of a sample is minus zero and a value of its own. Some samples give NaN."""

    def __init__(self, bad: set[int], samples: int) -> None:
        self.bad, self.samples = bad, samples

    def init_weights(self, rng: Any) -> dict[str, Array]:
        return {"zero": np.zeros(3, np.float32), "value": np.ones(2, np.float32)}

    def size(self, split: str) -> int:
        return self.samples if split == "train" else 0

    def gradient(self, weights: Any, samples: Any, rng: Any, out: Any) -> Sums:
        out["zero"][...] = -0.0
        out["value"][...] = value(int(samples[0]))
        if int(samples[0]) in self.bad:
            out["zero"][1] = np.nan
        return Sums(float(samples[0]), samples.size)

    def evaluate(self, weights: Any, samples: Any) -> Sums:
        raise NotImplementedError


def value(sample: int) -> Array:
    q = np.random.default_rng(sample)
    return (q.standard_normal(2) * 10.0 ** q.integers(-6, 7, 2)).astype(np.float32)


def made(
    total: int, bad_microbatches: set[int], *, skips: bool = True, dtype: Any = "float32"
) -> tuple[Any, Any, dict[int, int]]:
    """Return node and task for one sample per microbatch, and the sample of each."""
    config = RunConfig(task="digits", steps=1, batch_size=total, microbatches=total, wire_dtype=dtype)
    task = Signed(set(), total)
    node = node_config(task, config, initial_weights(task, config)[0], run_id="")
    node = replace(node, skips_nonfinite=skips)
    sample = {index: int(node.sampler.microbatch(0, index)[0]) for index in range(total)}
    task.bad = {sample[index] for index in bad_microbatches}
    return node, task, sample


def as_is(array: Array) -> Array:
    return array


def bfloat16(array: Array) -> Array:
    """Round to nearest even, by integers; of numbers alone."""
    words = array.view(np.uint32).astype(np.uint64)
    return ((words + 0x7FFF + (words >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


@given(st.integers(1, 24), st.sampled_from(["float32", "bfloat16"]), st.data())
def test_what_is_left_out_is_absent_in_every_position(total: int, dtype: str, data: st.DataObject) -> None:
    """The worker's sum and the reference's, of the whole and of any block, against one written down once more."""
    bad = data.draw(st.sets(st.integers(0, total - 1)))
    node, task, sample = made(total, bad, dtype=dtype)
    narrow = as_is if dtype == "float32" else bfloat16
    views = node.manifest.views(np.zeros(node.manifest.size, np.float32))
    leaves: dict[int, Array | None] = {}
    for index in range(total):
        flat = np.zeros(node.manifest.size, np.float32)
        of_leaf = node.manifest.views(flat)
        of_leaf["zero"][...], of_leaf["value"][...] = -0.0, value(sample[index])
        leaves[index] = None if index in bad else narrow(flat)
    indices = set(data.draw(st.sets(st.integers(0, total - 1), min_size=1)))
    blocks = decompose(indices, Block(0, total))
    worker, reference = Worker(node, task), CanonicalSum(node, task, views)
    try:
        for block in {*blocks, Block(0, total)}:
            expected = canonical(block, leaves, narrow)
            for held in (worker._compute(Unit(block, 0, True), views), reference(0, block)):
                assert isinstance(held, Held)
                assert (held.array is None) == (held.sums is None) == (expected is None)
                assert held.array is None or held.array.tobytes() == expected.tobytes()  # type: ignore[union-attr]
                assert [verdict.microbatch for verdict in held.skipped] == sorted(bad & set(range(*block)))
                left = [sample[i] for i in range(*block) if i not in bad]
                assert held.sums is None or (held.sums.count, held.sums.loss) == (len(left), float(sum(left)))
            checked = worker._compute(Unit(block, 0, True), views)
            assert isinstance(checked, Held)
            assert checked.crc32c == (0 if expected is None else crc32c(expected))
    finally:
        worker.close()


def test_a_verdict_names_tensors_and_samples_and_a_failure_does_where_nothing_is_left_out() -> None:
    node, task, sample = made(8, {5})
    views = node.manifest.views(np.zeros(node.manifest.size, np.float32))
    worker = Worker(node, task)
    held = worker._compute(Unit(Block(4, 8), 0, True), views)
    worker.close()
    assert isinstance(held, Held)
    (verdict,) = held.skipped
    assert (verdict.microbatch, verdict.tensors, verdict.sample_ids) == (5, ("zero",), (sample[5],))

    node, task, _ = made(8, {5}, skips=False)
    worker = Worker(node, task)
    failure = worker._compute(Unit(Block(4, 8), 0, True), views)
    worker.close()
    assert isinstance(failure, Failure)
    assert (failure.microbatch, failure.error, failure.invalid) == (5, "the gradient of zero is not finite", True)
    assert failure.sample_ids == (sample[5],)


def test_buffers_of_what_is_left_out_are_used_again() -> None:
    node, task, _ = made(16, set(range(0, 16, 2)))
    views = node.manifest.views(np.zeros(node.manifest.size, np.float32))
    worker = Worker(node, task)
    for _ in range(3):
        held = worker._compute(Unit(Block(0, 16), 0, True), views)
        assert isinstance(held, Held)
        worker.release(held)
    worker.close()
    assert len(worker._pool) <= 5  # log2(16) + 1


@pytest.mark.parametrize(
    ("policy", "skipped", "count", "finite", "expected"),
    [
        ("halt", 0, 9, True, Outcome.APPLIED),
        ("halt", 0, 9, False, None),
        ("skip-microbatch", 0, 9, True, Outcome.APPLIED),
        ("skip-microbatch", 2, 9, True, Outcome.SKIPPED_MICROBATCHES),
        ("skip-microbatch", 2, 9, False, Outcome.SKIPPED_STEP),
        ("skip-microbatch", 0, 9, False, Outcome.SKIPPED_STEP),
        ("skip-microbatch", 9, 0, False, Outcome.SKIPPED_STEP),
        ("skip-step", 0, 9, True, Outcome.APPLIED),
        ("skip-step", 1, 9, True, Outcome.SKIPPED_STEP),
        ("skip-step", 0, 9, False, Outcome.SKIPPED_STEP),
    ],
)
def test_one_decision_for_all(policy: Any, skipped: int, count: int, finite: bool, expected: Outcome | None) -> None:
    assert outcome(policy, skipped=skipped, count=count, finite=finite) == expected


# ---- types on the wire


@given(st.integers(2, 24), st.data())
def test_rounded_sums_do_not_depend_on_who_computes_which_block(total: int, data: st.DataObject) -> None:
    """Two workers with any cut between them, their blocks added above, as a parent does; and one alone."""
    node, task, _ = made(total, set(), dtype="bfloat16")
    views = node.manifest.views(np.zeros(node.manifest.size, np.float32))
    top, owned = Block(0, total), data.draw(st.sets(st.integers(0, total - 1)))
    workers = [Worker(node, task), Worker(node, task)]
    blocks = {
        block: worker
        for worker, indices in zip(workers, (owned, set(range(total)) - owned), strict=True)
        for block in decompose(indices, top)
    }

    def total_of(block: Block) -> Array:
        if block in blocks:
            held = blocks[block]._compute(Unit(block, 0, True), views)
            assert isinstance(held, Held)
            assert held.array is not None
            return held.array
        left, right = (total_of(half) for half in halves(block))
        out = aligned_zeros(left.size)
        add_rounded(left, right, out, "bfloat16")
        return out

    try:
        found = total_of(top).tobytes()
        alone = workers[0]._compute(Unit(top, 0, True), views)
    finally:
        for worker in workers:
            worker.close()
    assert isinstance(alone, Held)
    assert alone.array is not None
    assert alone.array.tobytes() == found


class Steep(Signed):
    """Finite in float32, and not in bfloat16."""

    def gradient(self, weights: Any, samples: Any, rng: Any, out: Any) -> Sums:
        sums = super().gradient(weights, samples, rng, out)
        out["value"][1] = np.finfo(np.float32).max
        return sums


def test_what_rounds_to_infinity_is_not_finite() -> None:
    for dtype, found in (("float32", ()), ("bfloat16", ("value",))):
        node, task, _ = made(4, set(), dtype=dtype)
        task = Steep(set(), 4)
        held = Computer(node, task).microbatch({}, 0, 1, aligned_zeros(node.manifest.size))
        assert tuple(name for verdict in held.skipped for name in verdict.tensors) == found


# ---- buffers


class Overwrites(Signed):
    overwrites_out = True


class Lies(Signed):
    """Says that it writes everything, and leaves one element."""

    overwrites_out = True

    def gradient(self, weights: Any, samples: Any, rng: Any, out: Any) -> Sums:
        out["zero"][:2] = 1
        out["value"][...] = 1
        return Sums(0.0, samples.size)


def test_a_task_that_writes_everything_is_given_its_buffer_as_it_is() -> None:
    node, _, _ = made(4, set())
    stale, clean = aligned_zeros(node.manifest.size), aligned_zeros(node.manifest.size)
    for view in node.manifest.views(stale).values():
        view.fill(7)
    Computer(node, Overwrites(set(), 4)).gradient({}, 0, 2, stale)
    Computer(node, Signed(set(), 4)).gradient({}, 0, 2, clean)
    assert stale.tobytes() == clean.tobytes()
    stale.fill(7)
    Computer(node, Lies(set(), 4)).gradient({}, 0, 2, stale)
    assert node.manifest.views(stale)["zero"].tolist() == [1, 1, 7]


def test_buffers_are_the_allocators_and_none_of_before_a_retirement_is_used_again() -> None:
    node, task, _ = made(8, set())
    views = node.manifest.views(np.zeros(node.manifest.size, np.float32))
    allocated: list[Array] = []

    def allocate(size: int) -> Array:
        allocated.append(aligned_zeros(size))
        return allocated[-1]

    def computed(worker: Worker, block: Block) -> Held:
        held = worker._compute(Unit(block, 0, True), views)
        assert isinstance(held, Held)
        assert any(held.array is array for array in allocated)
        return held

    worker = Worker(node, task, allocate)
    given_out, back = computed(worker, Block(0, 1)), computed(worker, Block(0, 8))
    worker.release(back)
    before = len(allocated)
    assert before == 5
    bits = given_out.array.tobytes()  # type: ignore[union-attr]
    worker.retire()
    assert len(worker._pool) == 0
    worker.release(given_out)
    assert len(worker._pool) == 0
    for _ in range(3):
        held = computed(worker, Block(0, 8))
        assert not any(held.array is array for array in allocated[:before])
        worker.release(held)
    assert len(allocated) == before + 4
    assert given_out.array.tobytes() == bits  # type: ignore[union-attr]
    worker.close()


def test_a_buffer_that_is_retired_while_it_is_made_is_not_given_out() -> None:
    made: list[Array] = []

    def allocate(size: int) -> Array:
        made.append(aligned_zeros(size))
        if len(made) == 1:
            pool.retire()
        return made[-1]

    pool = Pool(16, allocate)
    assert pool.take() is made[1]


def test_nobody_keeps_a_buffer_that_was_retired() -> None:
    node, task, _ = made(8, set())
    views = node.manifest.views(np.zeros(node.manifest.size, np.float32))
    gone: list[weakref.ref[Array]] = []

    def allocate(size: int) -> Array:
        flat = aligned_zeros(size)
        gone.append(weakref.ref(flat.base))  # the memory, whichever view of it is kept
        return flat

    worker = Worker(node, task, allocate)
    held = worker._compute(Unit(Block(0, 8), 0, True), views)
    worker.retire()
    assert isinstance(held, Held)
    worker.release(held)
    del held
    assert [ref() for ref in gone] == [None] * 4
    worker.close()


class NoWordsError(Exception):
    """Of a kind that is seen: a format of its own, and fewer arguments than that needs."""

    def __str__(self) -> str:
        return str(self.args[1])


class EndingError(Exception):
    def __str__(self) -> str:  # noqa: PLE0307
        sys.exit(1)


class Raises(Signed):
    """Its first gradient raises."""

    error: BaseException | None = None

    def gradient(self, weights: Any, samples: Any, rng: Any, out: Any) -> Sums:
        error, self.error = self.error, None
        if error is not None:
            raise error
        return super().gradient(weights, samples, rng, out)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("x" * 2_000_000), "ValueError: xxx"),
        (ValueError("ü" * 2_000_000), "ValueError: üüü"),
        (ValueError("expected\n  one line"), "ValueError: expected one line"),
        (FileNotFoundError(os.fsdecode(b"/data/caf\xe9.npz")), "FileNotFoundError: /data/caf\\udce9.npz"),
        (NoWordsError("one"), "NoWordsError"),
        (GradientError(os.fsdecode(b"caf\xe9 ") + "x" * 2_000_000), "caf\\udce9 xxx"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (EndingError(), "SystemExit"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_whatever_a_task_raises_is_told_and_the_thread_goes_on(error: BaseException, said: str, run: Any) -> None:
    node, _, _ = made(4, set())
    task = Raises(set(), 4)
    task.error = error
    worker = Worker(node, task)
    views = node.manifest.views(aligned_zeros(node.manifest.size), writeable=False)

    async def computed() -> Any:
        result = asyncio.get_running_loop().create_future()
        worker.submit(Unit(Block(0, 2), 0, True), views, lambda _, held: result.set_result(held))
        return await result

    async def main() -> tuple[Any, Any]:
        async with asyncio.timeout(20):
            return await computed(), await computed()

    failure, held = run(main())
    worker.close()
    assert isinstance(failure, Failure)
    assert failure.error.startswith(said)
    assert "\n" not in failure.error
    message = pb.TaskFailure(error=failure.error, traceback=failure.traceback, sample_ids=failure.sample_ids)
    assert message.ByteSize() < 71_000
    if said.startswith("ValueError: exp"):
        assert failure.traceback.endswith("ValueError: expected\n  one line\n")
    assert isinstance(held, Held)


class Says(Signed):
    """Returns what it is told to."""

    sums: Any = None

    def size(self, split: str) -> int:
        return self.samples

    def gradient(self, weights: Any, samples: Any, rng: Any, out: Any) -> Any:
        return self.sums(int(samples[0])) if callable(self.sums) else self.sums

    def evaluate(self, weights: Any, samples: Any) -> Any:
        return self.sums


@pytest.mark.parametrize(
    ("sums", "said"),
    [
        (Sums(1.0, 1, {3: 1.0}), "a metric named 3: name each metric with a str"),  # type: ignore[dict-item]
        (Sums(1.0, 1, {"\udce9": 1.0}), r"a metric named '\\udce9', which is no UTF-8: name it otherwise"),
        (Sums(1.0, 1, {f"metric {i}": 1.0 for i in range(40_000)}), "40,000 metrics, .* has room for 32,768: give f"),
        (Sums(1.0, 1, {"x" * 2_000_000: 1.0}), "1 metrics, 2,000,016 bytes of names and values"),
        (Sums(1.0, 1, {"x": np.zeros(3)}), r"x = array\(\[0., 0., 0.\]\), of type ndarray: give a number"),  # type: ignore[dict-item]
        (Sums(1.0, 1, {"x": "1"}), "x = '1', of type str: give a number"),  # type: ignore[dict-item]
        (Sums(1.0, 1, ["x"]), "list as metrics: give a dict, name -> sum"),  # type: ignore[arg-type]
        (Sums(1j, 1), "loss 1j, of type complex: give a number"),  # type: ignore[arg-type]
    ],
)
def test_sums_that_cannot_be_sent_are_refused_in_training_and_evaluation_alike(sums: Sums, said: str) -> None:
    node, _, _ = made(2, set())
    node, task = replace(node, test_size=2, evaluation_microbatches=2), Says(set(), 2)
    task.sums = sums
    views = node.manifest.views(aligned_zeros(node.manifest.size), writeable=False)
    computer = Computer(node, task)
    with pytest.raises(GradientError, match=f"gradient.. returned {said}"):
        computer.gradient(views, 0, 0, aligned_zeros(node.manifest.size))
    with pytest.raises(GradientError, match=f"evaluate.. returned {said}"):
        computer.evaluate(views, 0)


def test_metrics_that_differ_from_microbatch_to_microbatch_must_fit_together() -> None:
    """In the tree as in the reference loop."""
    node, _, _ = made(8, set())
    task = Says(set(), 8)
    task.sums = lambda sample: Sums(1.0, 1, {f"metric {i} of sample {sample}": 1.0 for i in range(400)})
    views = node.manifest.views(aligned_zeros(node.manifest.size), writeable=False)
    worker = Worker(node, task)
    assert isinstance(worker._compute(Unit(Block(0, 2), 0, True), views), Held)
    failure = worker._compute(Unit(Block(0, 4), 0, True), views)
    worker.close()
    assert isinstance(failure, Failure)
    assert failure.invalid
    assert "the same ones for every microbatch" in failure.error
    with pytest.raises(GradientError, match="the same ones for every microbatch"):
        CanonicalSum(node, task, views)(0, Block(0, 4))


def test_sums_are_added_in_double_whatever_a_task_returns() -> None:
    """Else a block that one node computes has other figures than its halves from two, which were sent as doubles."""
    node, _, _ = made(2, set())
    task = Says(set(), 2)
    task.sums = lambda sample: Sums(np.float32(1 + sample * 2**-23), 1, {"x": np.float32(2**24 + sample)})  # type: ignore[arg-type]
    views = node.manifest.views(aligned_zeros(node.manifest.size), writeable=False)
    worker = Worker(node, task)
    held = worker._compute(Unit(Block(0, 2), 0, True), views)
    worker.close()
    assert isinstance(held, Held)
    assert held.sums == Sums(2 + 2**-23, 2, {"x": 2**25 + 0.0})
    assert {type(held.sums.loss), type(held.sums.metrics["x"])} == {float}  # type: ignore[union-attr]
