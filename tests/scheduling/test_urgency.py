import math

import pytest

from gramophone_server.scheduling.forecast import LONGEST_TURN_S, MAX_URGENT_SHARE, Work
from gramophone_server.scheduling.task import PooledBatch, Task
from gramophone_server.scheduling.urgency import Urgency
from tests.support.specs import job_state

TURN_S = 0.02


def task(deadline_at=math.inf, needs_s=None, batch=None):
    """A job in a batch of its own."""
    batch = batch or PooledBatch(engine_batch=None, idle_since=0.0)
    remaining = None if needs_s is None else Work(needs_s, needs_s, needs_s, needs_s, 0.0, 0.0, 1)
    return Task(state=job_state(), observer=None, deadline_at=deadline_at, remaining=remaining, batch=batch)


@pytest.fixture
def urgency():
    return Urgency()


def first(urgency, ready, in_turn, now=0.0):
    return urgency.first(ready, in_turn, now, TURN_S)


def test_a_job_with_time_enough_waits_for_its_turn(urgency):
    other, patient = task(), task(10.0, 2.0)
    assert first(urgency, [other, patient], other) is other


def test_a_job_that_would_be_late_goes_first(urgency):
    other, hurried = task(), task(2.2, 2.0)
    assert first(urgency, [other, hurried], other) is hurried


def test_no_deadline_keeps_a_job_from_joining_a_batch(urgency):
    joining, hurried = task(), task(2.2, 2.0)
    joining.batch = None
    assert first(urgency, [joining, hurried], joining) is joining


def test_without_an_estimate_or_with_a_deadline_that_is_lost_a_job_is_not_urgent(urgency):
    other = task(needs_s=1.0)
    for hopeless in (task(2.2), task(2.0, 5.0), task(-1.0, 0.0)):
        assert first(urgency, [other, hopeless], other) is other


def test_the_earliest_deadline_is_first_as_soon_as_a_later_one_needs_it(urgency):
    other, early, late = task(), task(5.0, 2.0), task(6.0, 3.5)
    assert first(urgency, [other, early], other) is other
    assert first(urgency, [other, late, early], other) is early


def test_a_job_is_kept_by_its_time_budget_if_that_ends_a_turn_before_its_deadline(urgency):
    """A turn may be under way when it ends. Without a picture it is kept by nothing."""
    other = task()
    for budget_ends_at, has_picture, is_urgent in ((2.1, True, False), (2.19, True, True), (2.1, False, True)):
        hurried = task(2.2, 2.0)
        hurried.budget_ends_at, hurried.last_report = budget_ends_at, "a report" if has_picture else None
        assert (first(urgency, [other, hurried], other) is hurried) == is_urgent


def test_jobs_of_one_batch_advance_together(urgency):
    batch = PooledBatch(engine_batch=None, idle_since=0.0)
    other, one, two = task(), task(5.0, 2.0, batch), task(5.1, 2.0, batch)
    assert first(urgency, [other, one, two], other) is other
    assert first(urgency, [other, one, task(5.1, 2.0)], other) is one  # 4 s in two batches


def test_turns_out_of_turn_take_no_more_than_their_share_of_the_device(urgency):
    """A job that needs every turn, and one that never has a deadline."""
    other, now = task(), 0.0
    times = {True: 0.0, False: 0.0}
    while now < 20.0:
        hurried = task(now + 10.0, 9.9)
        chosen = first(urgency, [other, hurried], other, now)
        now += TURN_S
        urgency.charge(TURN_S)
        times[chosen is hurried] += TURN_S
    assert times[True] / now == pytest.approx(MAX_URGENT_SHARE, abs=0.02)


@pytest.mark.parametrize("other_s", [0.02, 2.0])
def test_another_job_stands_still_no_longer_than_a_short_time_or_in_proportion_to_its_own_turns(urgency, other_s):
    other, now, waited, longest = task(), 0.0, 0.0, 0.0
    while now < 60.0:
        hurried = task(now + 10.0, 9.9)
        chosen = first(urgency, [other, hurried], other, now)
        seconds = TURN_S if chosen is hurried else other_s
        waited = waited + seconds if chosen is hurried else 0.0
        longest = max(longest, waited)
        now += seconds
        urgency.charge(seconds)
    assert longest <= max(LONGEST_TURN_S, other_s * MAX_URGENT_SHARE / (1 - MAX_URGENT_SHARE)) + 2 * TURN_S
