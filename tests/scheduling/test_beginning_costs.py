import pytest

from gramophone_server.scheduling.beginning_costs import MEMORY_S, BeginningCosts


def test_nothing_is_known_at_first():
    assert BeginningCosts().seconds(100) is None


def test_many_small_measurements_do_not_outweigh_a_large_one():
    """Most of their time is not for their pixels."""
    costs = BeginningCosts()
    costs.record(1_000_000, 1.0)
    for _ in range(50):
        costs.record(256, 0.005)
    assert costs.seconds(1_000_000) == pytest.approx(1.25, rel=0.05)


def test_a_device_that_becomes_slower_is_noticed():
    costs = BeginningCosts()
    for _ in range(20):
        costs.record(1000, 1.0)
    for _ in range(int(3 * MEMORY_S / 4)):
        costs.record(1000, 4.0)
    assert costs.seconds(1000) == pytest.approx(4.0, rel=0.2)
