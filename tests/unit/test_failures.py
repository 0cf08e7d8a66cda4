import pytest

from control.failures import Failures
from spheres.v1 import work_pb2 as pb


def failure(
    sphere: str, *, microbatch: int = 3, step: int = 7, invalid: bool = False, count: int = 1
) -> pb.TaskFailure:
    return pb.TaskFailure(
        sphere_id=sphere, microbatch=microbatch, step=step, error="no luck", traceback="the whole of it",
        sample_ids=range(20), failures_count=count, invalid_gradient=invalid,
    )  # fmt: skip


def lost(sphere: str, incarnation: int = 1, *, lo: int = 4, step: int = 7) -> pb.SphereChange:
    return pb.SphereChange(
        sphere_id=sphere, incarnation=incarnation, lost=True, step=step, computing=pb.Block(lo=lo, hi=lo + 2)
    )


@pytest.fixture
def failures() -> Failures:
    made = Failures()
    made.start(7)
    return made


def test_an_exception_is_tried_once_more_elsewhere(failures: Failures) -> None:
    assert failures.raised(failure("s-1")) is None
    assert failures.raised(failure("s-1")) is None, "said twice, over two links"
    error = failures.raised(failure("s-2"))
    assert str(error) == (
        "task failed on s-2 and before that on s-1 in step 7, microbatch 3 "
        "(samples 0, 1, 2, 3, 4, 5, 6, 7, ...): no luck"
    )
    assert error is not None
    assert error.details == "the whole of it"


def test_two_spheres_that_fail_on_two_microbatches_are_no_reason_to_halt(failures: Failures) -> None:
    assert failures.raised(failure("s-1")) is None
    assert failures.raised(failure("s-2", microbatch=4)) is None


def test_what_a_step_before_failed_on_does_not_count(failures: Failures) -> None:
    assert failures.raised(failure("s-1", step=6)) is None
    failures.raised(failure("s-1"))
    failures.start(8)
    assert failures.raised(failure("s-2", step=8)) is None


def test_an_invalid_gradient_halts_at_once(failures: Failures) -> None:
    assert "task failed on s-1 in step 7" in str(failures.raised(failure("s-1", invalid=True)))


def test_the_same_sphere_may_try_once_more_where_nobody_else_came(failures: Failures) -> None:
    assert failures.raised(failure("s-1", count=4)) is None
    assert failures.raised(failure("s-1", count=4)) is None, "told again over another link"
    error = failures.raised(failure("s-1", count=5))
    assert "task failed on s-1 and before that on s-1 in step 7" in str(error)


def test_three_deaths_on_one_microbatch_halt(failures: Failures) -> None:
    failures.lost(lost("s-1"))
    failures.lost(lost("s-2", lo=8))
    failures.lost(lost("s-2", step=6))
    failures.lost(pb.SphereChange(sphere_id="s-9", lost=True, step=7))
    failures.lost(lost("s-3"))
    assert failures.dead() is None
    failures.lost(lost("s-2"))
    assert "(s-1, s-2, s-3) were lost while they computed microbatch 4 of step 7" in str(failures.dead())
    failures.start(8)
    assert failures.dead() is None


def test_a_life_that_comes_back_did_not_die(failures: Failures) -> None:
    for name in ("s-1", "s-2", "s-3"):
        failures.lost(lost(name))
    failures.back(pb.SphereChange(sphere_id="s-1", incarnation=1))
    failures.back(pb.SphereChange(sphere_id="s-2", incarnation=2))  # another life of it
    assert failures.dead() is None
    failures.lost(lost("s-4"))
    assert failures.dead() is not None
