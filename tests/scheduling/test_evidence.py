from dataclasses import dataclass, field

import pytest

from gramophone_server.scheduling.evidence import HALF_LIFE_S, Evidence, forget_least


@dataclass
class Thing:
    evidence: Evidence = field(default_factory=Evidence)


def measure(known, key, seconds, now, most=8):
    if key not in known:
        forget_least(known, most, now)
        known[key] = Thing()
    known[key].evidence.add(seconds, now)


def test_older_seconds_count_less():
    evidence = Evidence()
    assert evidence.weight(100.0) == 0.0
    evidence.add(8.0, 100.0)
    evidence.add(1.0, 100.0 + HALF_LIFE_S)
    assert evidence.weight(100.0 + HALF_LIFE_S) == pytest.approx(5.0)
    assert evidence.weight(100.0 + 2 * HALF_LIFE_S) == pytest.approx(2.5)


def test_nothing_that_was_measured_for_long_is_forgotten_because_of_many_short_measurements():
    known = {}
    for key in range(5):
        measure(known, key, 1.0, now=key)
    for number in range(1000):
        measure(known, f"short {number}", 0.04, now=10 + number / 10)
    assert set(range(5)) < set(known) and len(known) == 8


def test_newcomers_that_take_turns_are_not_forgotten_for_each_other():
    """However much the others were measured: otherwise neither would ever be measured twice."""
    known = {}
    for key in range(8):
        measure(known, key, 1000.0, now=key)
    for turn in range(10):
        for newcomer in ("one", "another"):
            measure(known, newcomer, 0.1, now=10 + turn)
    assert known["one"].evidence.seconds == pytest.approx(1.0, rel=0.1)
    assert known["another"].evidence.seconds == pytest.approx(1.0, rel=0.1)


def test_what_was_measured_long_ago_makes_room():
    known = {}
    measure(known, "old", 5.0, now=0.0)
    for key in range(8):
        measure(known, key, 1.0, now=10 * HALF_LIFE_S + key)
    assert "old" not in known and len(known) == 8
