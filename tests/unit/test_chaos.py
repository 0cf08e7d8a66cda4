import statistics
from itertools import pairwise

import pytest

from control.chaos import Fault, Outcome, Target, choose, parse_rate, schedule, table


@pytest.mark.parametrize(("text", "rate"), [("0.2/s", 0.2), ("6/m", 0.1), (" 36 / h ", 0.01), ("0", 0.0)])
def test_rates(text: str, rate: float) -> None:
    assert parse_rate(text) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["0.2", "fast", "-1/s", "1/d", "", "1/s/s", "nan/s"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no rate; give one such as 0\.2/s"):
        parse_rate(text)


def test_a_schedule_follows_from_its_seed_and_kinds_do_not_disturb_each_other() -> None:
    both = schedule({"kill": 0.5, "stop": 0.2}, duration=60.0, seed=7)
    assert both == schedule({"kill": 0.5, "stop": 0.2}, duration=60.0, seed=7)
    assert both != schedule({"kill": 0.5, "stop": 0.2}, duration=60.0, seed=8)
    assert [f for f in both if f.kind == "kill"] == schedule({"kill": 0.5, "stop": 0.0}, duration=60.0, seed=7)
    assert both == sorted(both, key=lambda fault: fault.at)
    assert all(0 <= fault.at < 60 and 0 <= fault.draw < 1 for fault in both)


def test_faults_come_as_often_as_was_asked_for() -> None:
    faults = schedule({"kill": 0.5, "stop": 0.0}, duration=10_000.0, seed=1, control_kills=3)
    kills = [fault.at for fault in faults if fault.kind == "kill"]
    assert len(kills) == pytest.approx(5_000, rel=0.05)
    gaps = [after - before for before, after in pairwise(kills)]
    assert statistics.pstdev(gaps) == pytest.approx(2.0, rel=0.1)  # as long as their mean: Poisson
    assert sum(1 for fault in faults if fault.kind == "control") == 3


def test_who_is_hit_is_one_of_those_that_are_there() -> None:
    targets = [Target(f"s-{n}", n, "leaf") for n in range(3)]
    assert [choose(Fault(0.0, "kill", draw), targets) for draw in (0.0, 0.34, 0.999)] == targets
    assert choose(Fault(0.0, "kill", 0.5), []) is None


def test_the_table_has_a_row_per_kind_and_role() -> None:
    def outcome(kind: str, role: str, seconds: float | None) -> Outcome:
        return Outcome(1.0, kind, "s-1", role, 7, 3, seconds)

    rows = table(
        [
            *(outcome("kill", "leaf", seconds) for seconds in (0.1, 0.3, 0.2)),
            outcome("stop", "inner", None),
            outcome("kill", "inner", 1.0),
        ]
    )
    assert [list(row.values()) for row in rows] == [
        ["kill", "inner", 1, 0, 1.0, 1.0],
        ["kill", "leaf", 3, 0, 0.2, 0.3],
        ["stop", "inner", 1, 1, None, None],
    ]
