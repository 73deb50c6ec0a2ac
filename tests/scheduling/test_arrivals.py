import pytest

from gramophone_server.scheduling.arrivals import ARRIVALS_S, Arrivals
from gramophone_server.scheduling.forecast import MAX_URGENT_SHARE, TURN_S
from gramophone_server.scheduling.task import Task
from tests.support.specs import job_state


def task(came_at=0.0, device_s=0.0):
    return Task(state=job_state(), observer=None, came_at=came_at, device_s=device_s)


def after_an_hour(every_s, device_s, ended=True):
    """Jobs come every so often, and each takes so much of the device; those that have not ended, and the time."""
    arrivals, present, now = Arrivals(), [], 0.0
    while now < 3600.0:
        now += every_s
        arrivals.came(now)
        job = task(now, device_s)
        arrivals.ended(job, now) if ended else present.append(job)
    return arrivals, present, now


def interruptions_s(arrivals, run_s, present=(), now=0.0, credit_s=0.0):
    return arrivals.interruptions_s(run_s, credit_s, present, now)


def test_where_no_jobs_come_none_are_expected():
    assert interruptions_s(Arrivals(), 1000.0) == 0.0
    arrivals, _, now = after_an_hour(1.0, 1.0)
    assert interruptions_s(arrivals, 1000.0, now=now + 20 * ARRIVALS_S) < 0.001


@pytest.mark.parametrize("ended", [True, False])
def test_as_much_is_expected_as_jobs_have_taken_lately(ended):
    """A job of 5 ms every second: 0.5 s in 100 s, and half of that for their joins."""
    arrivals, present, now = after_an_hour(1.0, 0.005, ended)
    expected_s = 100 * 0.005 + 100 / 2 * 0.005
    assert interruptions_s(arrivals, 100.0, present, now) == pytest.approx(expected_s, rel=0.05)


def test_jobs_that_want_all_of_the_device_get_what_urgent_ones_leave():
    arrivals, _, now = after_an_hour(1.0, 1.0)
    expected_s = 100 * (1 / MAX_URGENT_SHARE - 1) + 100 / 2 * TURN_S
    assert interruptions_s(arrivals, 100.0, now=now) == pytest.approx(expected_s, rel=0.05)
    assert interruptions_s(arrivals, 100.0, now=now, credit_s=100.0) == pytest.approx(100 / 2 * TURN_S, rel=0.05)


def test_a_job_is_not_expected_during_a_run_that_is_shorter_than_the_time_between_two():
    arrivals, _, now = after_an_hour(10.0, 10.0)
    assert interruptions_s(arrivals, 6.0, now=now) < TURN_S
    assert interruptions_s(arrivals, 20.0, now=now) > 1.0


def test_jobs_that_took_nothing_count_nothing():
    """However much they asked for, and however many they were: they were cancelled."""
    arrivals, _, now = after_an_hour(0.02, 0.0)
    assert interruptions_s(arrivals, 1000.0, now=now) == 0.0


def test_the_end_of_a_job_of_an_hour_is_no_arrival_of_this_minute():
    arrivals, _, now = after_an_hour(1.0, 0.005)
    before_s = interruptions_s(arrivals, 100.0, now=now)
    arrivals.ended(task(now - 3600.0, 3600.0), now)
    assert interruptions_s(arrivals, 100.0, now=now) == pytest.approx(before_s)
