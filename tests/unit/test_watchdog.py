from spheres.watchdog import Watchdog


def test_before_anything_is_measured_it_waits_for_patience() -> None:
    dog = Watchdog(4.0)
    dog.start(10.0)
    assert not dog.due(14.0)
    assert dog.due(14.1)


def test_it_waits_three_times_the_longest_of_the_latest_steps() -> None:
    dog = Watchdog(4.0)
    for number, seconds in enumerate((1.0, 2.0, 1.0)):
        dog.start(number * 10.0)
        dog.finish(number * 10.0 + seconds)
    assert dog.deadline == 6.0
    dog.start(50.0)
    dog.progress(53.0)
    assert not dog.due(59.0)
    assert dog.due(59.1)


def test_long_steps_are_forgotten_and_short_ones_have_a_floor() -> None:
    dog = Watchdog(4.0)
    for _ in range(9):
        dog.start(0.0)
        dog.finish(100.0)
    for _ in range(8):
        dog.start(0.0)
        dog.finish(0.01)
    assert dog.deadline == 0.5


def test_each_firing_doubles_it_until_the_step_is_over() -> None:
    """N13: else it would livelock where the deadline is below what a step needs."""
    dog = Watchdog(4.0)
    dog.start(0.0)
    dog.fire(5.0)
    assert dog.deadline == 8.0
    assert not dog.due(12.0)
    dog.fire(14.0)
    assert dog.deadline == 16.0
    dog.start(20.0)
    assert dog.deadline == 4.0


def test_it_can_be_switched_off() -> None:
    dog = Watchdog(4.0, enabled=False)
    dog.start(0.0)
    assert not dog.due(1e9)


def test_who_is_closest_to_those_that_stand_still_gives_them_up_first() -> None:
    """N22: control after four firings, whoever is two levels below it after two."""

    def firings(level: int) -> int:
        dog = Watchdog(4.0)
        while not dog.hopeless(level):
            dog.fire(0.0)
        return dog.firings

    assert [firings(level) for level in (1, 2, 3, 4)] == [4, 3, 2, 2]


def test_children_further_down_are_given_less_time_to_answer() -> None:
    """N13: three patiences and more; whoever waits for a node that waits itself waits longer."""
    dog = Watchdog(4.0)
    assert [dog.answer_seconds(level) for level in (1, 2, 4)] == [24.0, 18.0, 15.0]
    assert dog.answer_seconds(0) == 24.0, "before it has a place"
