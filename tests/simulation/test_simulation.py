"""A slice of the seeds; ``make simulate SEEDS=10000`` runs more. What fails names the command to see it again."""

import pytest

from tests.simulation.plan import make_plan
from tests.simulation.world import World


@pytest.mark.parametrize("first", range(0, 150, 15))
def test_any_tree_with_any_faults_gives_the_weights_of_the_plain_loop(first: int) -> None:
    for seed in range(first, first + 15):
        World(make_plan(seed)).run()


def test_a_seed_is_the_same_run_each_time() -> None:
    plan = make_plan(17)
    assert World(plan).run() == World(plan).run()
