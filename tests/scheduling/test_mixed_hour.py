import math

import pytest

from tests.support.mixed_hour import Device, Hour, Verdict, Visit, run

# The goal is 1 % over an hour (`python -m tests.support.mixed_hour`). In a sample of this size, one job is 0.35 %.
MOST_WRONG = 0.015


def test_of_a_mixed_hour_almost_all_deadlines_are_judged_rightly():
    verdict = Verdict()
    slow = Device(slow_from_s=240.0, slow_until_s=340.0)
    for seed, device in ((1, slow), (2, Device()), (3, Device())):
        verdict.add(Hour(seconds=600.0, device=device), seed)
    assert verdict.possible > 250 and verdict.accepted > 350
    assert verdict.wrongly_refused <= MOST_WRONG * verdict.possible, verdict
    assert verdict.late <= MOST_WRONG * verdict.accepted, verdict


# Deadlines of one client beside ten others ----------------------------------------------------------------------------


def visit(client, at, iterations, deadline_s=math.inf):
    """A job of as many seconds as iterations."""
    return Visit(at, 64, iterations, False, 0.0, math.inf, math.inf, client, deadline_s=deadline_s)


def beside_ten_others(*visits):
    """Runs these visits, and ten other clients that come after the first of them, and stay."""
    others = [visit(f"other {number}", 5.0, 1500) for number in range(10)]
    first = visit("first", 0.0, 5)  # measures an iteration
    for one in visits:
        one.at += 5.0
    run(Hour(device=Device(fixed_s=1.0, pixel_s=0.0, noise=0.0)), [first, *visits, *others], seed=1)
    return visits


@pytest.mark.parametrize("needs_s", [30, 240])
def test_a_deadline_of_minutes_is_kept_beside_ten_others_that_come_later(needs_s):
    (hurried,) = beside_ten_others(visit("hurried", 0.0, needs_s, needs_s / 0.75))
    assert hurried.in_time


def test_a_job_of_hours_with_a_deadline_has_no_more_of_the_device_than_ten_others_that_come_later():
    """It had four fifths of it."""
    (greedy,) = beside_ten_others(visit("greedy", 0.0, 600, 600 / 0.75))
    assert greedy.outcome == "done" and 600 / greedy.took_s < 0.1
