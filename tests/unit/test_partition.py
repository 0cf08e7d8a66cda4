"""Who gets which block: exact, held blocks as a whole, each in its environment. Rules N5, N9, N12, N22."""

from __future__ import annotations

import copy
import random

import pytest

from spheres.blocks import Block
from spheres.edge import SELF, Edge
from spheres.environments import ANY, Environments, Range
from spheres.partition import Partition

TOTAL = 8
ALL = Block(0, TOTAL)


def child(
    *held: Block,
    computing: tuple[Block, ...] = (),
    idle: bool = True,
    ready: bool = True,
    aside: tuple[str, ...] = (),
    **capacities: float,
) -> Edge:
    """A child that has answered; of environment a, where no other is named."""
    edge = Edge(capacities or {"a": 1.0}, held=held, computing=computing, idle=idle, ready=ready)
    edge.aside.update(aside)
    return edge


def partition(
    *owed: Block,
    held: tuple[Block, ...] = (),
    computing: Block | None = None,
    computes: bool = True,
    late: tuple[str, ...] = (),
    **edges: Edge,
) -> Partition:
    """A node of environment a."""
    return Partition(
        TOTAL,
        owed or (ALL,),
        edges,
        computes=computes,
        environment="a",
        held=set(held),
        computing=computing,
        late=frozenset(late),
    )


def owners(made: Partition) -> str:
    """A letter for each microbatch: the child's name, "." for the node itself, "-" for nobody."""
    slots = [(block, ".") for block in [*made.own, *made.queue]]
    slots += [(block, name) for name, blocks in made.shares() for block in blocks]
    found = ["-"] * TOTAL
    for block, name in slots:
        for index in range(*block):
            assert found[index] == "-", f"{block} is of {found[index]} and {name} (I2)"
            found[index] = name
    return "".join(found)


def parted(made: Partition, environments: Environments = ANY) -> str:
    assert made.share_out(environments.split(made.keep(environments))) is None
    return owners(made)


def test_a_held_block_stays_with_its_holder_and_the_rest_is_cut_over_the_idle() -> None:
    made = partition(held=(Block(0, 2),), x=child(Block(2, 4), idle=False), y=child())
    assert made.keep(ANY) == [Block(4, 8)]
    assert owners(made) == "..xx----"
    assert made.share_out([(None, [Block(4, 8)])]) is None
    assert owners(made) == "..xx..yy"
    assert (made.own, made.queue) == ([Block(0, 2)], [Block(4, 6)]), "what is there is not computed again"
    assert dict(made.shares()) == {"x": (Block(2, 4),), "y": (Block(6, 8),)}


def test_what_a_child_holds_and_what_it_is_given_besides_are_named_as_one_block() -> None:
    """N3: the fewest blocks go up; never across two that are owed apart."""
    made = partition(computes=False, x=child(Block(0, 4)))
    assert (parted(made), dict(made.shares())) == ("xxxxxxxx", {"x": (ALL,)})
    apart = partition(Block(0, 4), Block(4, 8), computes=False, x=child(Block(0, 4)))
    parted(apart)
    assert dict(apart.shares()) == {"x": (Block(0, 4), Block(4, 8))}


def test_of_a_held_block_that_is_owed_in_part_nothing_is_used() -> None:
    """N9."""
    assert parted(partition(Block(0, 2), computes=False, x=child(ALL, idle=False), y=child())) == "yy------"
    apart = partition(Block(0, 4), Block(4, 8), computes=False, x=child(ALL, idle=False), y=child())
    assert parted(apart) == "yyyyyyyy", "all of it is owed, but as two"


def test_of_held_blocks_that_overlap_the_largest_is_used() -> None:
    """N9."""
    assert parted(partition(held=(Block(0, 2),), x=child(Block(0, 4), idle=False))) == "xxxx...."


def test_held_goes_before_in_compute_and_own_before_that_of_children() -> None:
    assert parted(partition(computing=ALL, x=child(ALL))) == "xxxxxxxx"
    assert parted(partition(held=(ALL,), x=child(ALL))) == "........"


def test_only_who_answered_this_attempt_counts() -> None:
    assert parted(partition(computes=False, x=child(ALL, ready=False), y=child())) == "yyyyyyyy"


def test_where_a_part_can_be_given_to_nobody_nothing_is_given_out() -> None:
    plan = Environments([Range(0, 4, "a"), Range(4, 8, "b")])
    made = partition(x=child(b=1.0, ready=False))
    assert made.share_out(plan.split(made.keep(plan))) == ("b", [Block(4, 8)])
    assert owners(made) == "--------"


def test_a_busy_one_of_the_environment_goes_before_an_idle_one_of_another() -> None:
    """N22."""
    plan = Environments([Range(0, 4, "a"), Range(4, 8, "b")])
    assert parted(partition(x=child(b=1.0, idle=False)), plan) == "....xxxx"


def test_what_a_late_one_computes_is_for_the_idle_of_its_environment_and_else_its_own() -> None:
    """N12, N22."""
    late = child(computing=(ALL,), idle=False)
    assert parted(partition(computes=False, late=("x",), x=late, y=child())) == "yyyyyyyy"
    assert parted(partition(computes=False, late=("y",), x=late, y=child())) == "xxxxxxxx", "it is not late"
    plan = Environments([Range(0, 8, "a")])
    assert parted(partition(computes=False, late=("x",), x=late, y=child(b=1.0)), plan) == "xxxxxxxx"
    assert parted(partition(computing=ALL, late=(SELF,), y=child())) == "yyyyyyyy", "this node itself"


def test_a_late_one_with_somebody_idle_below_is_given_more_only_where_nobody_in_time_is_idle() -> None:
    assert parted(partition(computes=False, late=("x",), x=child(a=8.0), y=child())) == "yyyyyyyy"
    assert parted(partition(computes=False, late=("x",), x=child(), y=child(idle=False))) == "xxxxxxxx"
    assert parted(partition(computes=False, late=("x",), x=child())) == "xxxxxxxx", "there is nobody else"


def test_what_a_child_computes_of_an_environment_in_which_it_stands_still_is_not_counted_on() -> None:
    plan = Environments([Range(0, 4, "a"), Range(4, 8, "b")])
    stuck = child(computing=(ALL,), idle=False, aside=("b",))
    assert parted(partition(computes=False, x=stuck, y=child(b=1.0)), plan) == "xxxxyyyy"


@pytest.mark.parametrize("seed", range(40))
def test_any_partition_is_exact_and_leaves_what_it_was_given_as_it_was(seed: int) -> None:
    """I2."""
    chance = random.Random(seed)
    canonical = [Block(lo, lo + width) for width in (1, 2, 4, 8) for lo in range(0, TOTAL, width)]

    def some(most: int) -> tuple[Block, ...]:
        return tuple(chance.sample(canonical, chance.randint(0, most)))

    edges = {
        name: Edge(
            {chance.choice("ab"): float(chance.randint(1, 3))},
            held=some(3),
            computing=some(1),
            idle=chance.random() < 0.5,
            ready=chance.random() < 0.8,
        )
        for name in "xyz"
    }
    edges["x"].ready = True
    edges["x"].capacities = {"a": 1.0, "b": 1.0}  # so that there is somebody for each
    owed = chance.choice([(ALL,), (Block(0, 4),), (Block(0, 2), Block(6, 8))])
    plan = chance.choice([ANY, Environments([Range(0, 3, "a"), Range(3, 8, "b")])])
    before = copy.deepcopy(edges)
    held = some(2)
    late = tuple(chance.sample(["", *"xyz"], 2))
    made = Partition(
        TOTAL,
        owed,
        edges,
        computes=True,
        environment="a",
        held=set(held),
        computing=chance.choice([None, ALL]),
        late=frozenset(late),
    )
    found = parted(made, plan)
    assert [i for i, name in enumerate(found) if name != "-"] == [i for block in owed for i in range(*block)]
    assert edges == before
    assert set(made.own) <= {*held, ALL}
