import pytest

from spheres.errors import LinkClosedError
from spheres.lease import Lease


def test_a_node_that_was_away_may_handle_nothing_until_it_has_ticked() -> None:
    """N10: what comes in after a SIGSTOP is of sessions that are over."""
    lease = Lease(4.0)
    lease.check(100.0)  # not begun
    assert lease.tick(100.0) is None
    lease.check(104.0)
    with pytest.raises(LinkClosedError, match=r"stopped for 4\.5 s"):
        lease.check(104.5)
    assert "4.5 s" in str(lease.tick(104.5))
    lease.check(104.6)
    assert lease.tick(104.75) is None


def test_only_an_attentive_node_judges_others() -> None:
    lease = Lease(4.0)
    assert not lease.judges(0.0)
    lease.tick(0.0)
    assert lease.judges(0.75)
    assert not lease.judges(0.76)


def test_silence_is_longer_than_the_lease() -> None:
    assert Lease(4.0).silent("s-1", 1.0, 5.0) is None
    assert "s-1 gave no sign of life for 4.1 s" in str(Lease(4.0).silent("s-1", 1.0, 5.1))
