from __future__ import annotations

import asyncio
from typing import Any

import pytest

from control.requests import Requests
from spheres.errors import ArmillaryError, CheckpointError, RunStateError

LONG = 1e6


@pytest.fixture
def asked() -> Requests:
    return Requests()


def test_of_several_reasons_to_end_the_first_stays(asked: Requests) -> None:
    asked.stop("max_time is over")
    asked.stop("SIGINT")
    first = ArmillaryError("the first")
    asked.fail(first)
    asked.fail(ArmillaryError("what came of it"))
    assert asked.stop_reason == "max_time is over"
    assert asked.failure is first


def test_so_many_steps_then_a_pause_until_it_is_told_to_go_on(asked: Requests) -> None:
    asked.pause_now()
    asked.go_on(until=3)
    assert [asked.pauses_at(step) for step in (1, 2, 3)] == [False, False, True]
    assert asked.pauses_at(2)  # a restore goes back; the pause stays
    asked.go_on()
    assert not asked.pauses_at(3)


@pytest.mark.parametrize("what", ["stop", "fail", "pause", "pause at", "work"])
def test_nothing_passes_while_something_is_asked(run: Any, what: str) -> None:
    """What passes may send weights before their step is committed."""

    async def main() -> None:
        asked = Requests()
        assert asked.lets_pass(3)
        {
            "stop": lambda: asked.stop("SIGINT"),
            "fail": lambda: asked.fail(ArmillaryError("why")),
            "pause": asked.pause_now,
            "pause at": lambda: asked.go_on(until=3),
            "work": lambda: asked.between_steps(asyncio.Event().wait),
        }[what]()
        assert asked.lets_pass(2) == (what == "pause at")
        assert not asked.lets_pass(3)

    run(main())


def test_work_is_done_in_order_and_answered_and_passed_over_for_who_has_gone(run: Any) -> None:
    async def main() -> None:
        asked, done = Requests(), []

        async def work(name: str) -> str:
            done.append(name)
            if name == "b":
                raise CheckpointError("no such checkpoint")
            return name

        a, gone, b, c = (asked.between_steps(lambda name=name: work(name)) for name in ("a", "gone", "b", "c"))
        gone.cancel()
        while asked.work_waits:
            await asked.do_one()
        assert done == ["a", "b", "c"]
        assert (await a, await c) == ("a", "c")
        with pytest.raises(CheckpointError, match="no such checkpoint"):
            await b

    run(main())


def test_who_asked_is_answered_however_the_work_ends(run: Any) -> None:
    """What is no error of ours ends the step loop too: the work may have left anything behind."""

    async def broken() -> None:
        raise MemoryError("7.45 GiB")

    async def main() -> None:
        asked = Requests()
        answer, gone = asked.between_steps(broken), asked.between_steps(broken)
        with pytest.raises(MemoryError):
            await asked.do_one()
        with pytest.raises(ArmillaryError, match=r"MemoryError: 7\.45 GiB \(not expected\)"):
            await answer
        gone.cancel()
        await asked.do_one()
        cut_off = asked.between_steps(asyncio.Event().wait)
        loop = asyncio.create_task(asked.do_one())
        await asyncio.sleep(0)  # it is at work by now
        loop.cancel()
        with pytest.raises(RunStateError, match="the run has ended"):
            await cut_off
        assert loop.cancelled()

    run(main())


def test_who_waits_for_work_when_the_run_ends_learns_of_it(run: Any) -> None:
    async def main() -> None:
        asked = Requests()
        gone, waits = (asked.between_steps(asyncio.Event().wait) for _ in range(2))
        gone.cancel()
        asked.close()
        assert not asked.work_waits
        with pytest.raises(RunStateError, match="the run has ended"):
            await waits

    run(main())


def test_whatever_is_asked_wakes_the_loop_between_two_steps_and_in_one(run: Any) -> None:
    """The timeout of the test is what fails where it does not."""

    async def main() -> None:
        asked = Requests()
        for ask in (
            lambda: asked.stop("SIGINT"),
            lambda: asked.fail(ArmillaryError("why")),
            asked.pause_now,
            asked.go_on,
            lambda: asked.between_steps(asyncio.Event().wait),
            asked.look_now,
        ):
            for waiting in (asked.asked(), asked.stirred(LONG)):
                task = asyncio.create_task(waiting)
                await asyncio.sleep(0)  # it waits by now
                ask()
                await task

    run(main())


def test_who_waits_in_a_step_looks_at_the_clock_too(run: Any) -> None:
    run(Requests().stirred(0.001))
