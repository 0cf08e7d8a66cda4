import pytest

from control.restarts import Restarts


def pauses(lives: list[float]) -> list[float]:
    restarts, now, found = Restarts(), 0.0, []
    for lived in lives:
        now += lived
        found.append(restarts.ended(now, lived=lived))
        now += found[-1]
    return found


def test_at_once_then_twice_as_long_each_time_up_to_a_minute() -> None:
    assert pauses([0.0] * 13) == pytest.approx([0.1 * 2**n for n in range(10)] + [60.0] * 3)


def test_a_minute_of_life_makes_up_for_all_failures() -> None:
    assert pauses([0.0] * 8 + [60.0])[-1] == pytest.approx(0.1)


def test_ten_seconds_of_life_make_up_for_one() -> None:
    assert pauses([0.0, 0.0, 0.0, 10.0]) == pytest.approx([0.1, 0.2, 0.4, 0.4])
    # killed every twelve seconds: it is never set aside
    assert set(pauses([12.0] * 100)) == {0.1}
    # and one that dies every two is, but never for ever
    assert max(pauses([2.0] * 500)) == 60.0


def test_who_keeps_failing_is_set_aside_and_says_why() -> None:
    restarts = Restarts()
    for n in range(5):
        assert not restarts.aside
        restarts.ended(4.0 * (n + 1), lived=4.0 if not n else 0.0)
    assert restarts.aside
    assert restarts.due == pytest.approx(21.6)
    assert restarts.reason(20.1) == "ended 5 times in 20.1 s, next start in 1.5 s"
    restarts.started()
    assert restarts.due is None
    restarts.ended(100.0, lived=70.0)
    assert not restarts.aside
    assert restarts.reason(100.0) == "ended once in 70 s, next start in 0.1 s"
