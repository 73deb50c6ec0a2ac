import random

import pytest
import torch

from gramophone.recipe import Recipe
from gramophone_server.domain.job import StyleJob
from gramophone_server.domain.job_state import JobState, Shape
from gramophone_server.scheduling.fair_share import BURST_S
from gramophone_server.scheduling.forecast import (
    LONGEST_TURN_S,
    MAX_URGENT_SHARE,
    PROMISE_RESERVE,
    Forecaster,
    Promise,
    broken_promise,
    even_sharing,
    sharing_by_owners,
)
from gramophone_server.scheduling.throughput import ThroughputModel
from tests.support.specs import job_state

# Work -----------------------------------------------------------------------------------------------------------------


def at(job, index):
    width, height, _ = job.scales[index]
    return Shape.of(job.recipe, height, width)


def measured(throughput, shape, seconds, slots=1):
    for _ in range(3):
        throughput.record(shape, slots, 1, seconds)


def test_the_work_of_a_job_is_summed_over_its_scales():
    throughput, job = ThroughputModel(), job_state(iterations=4, smallest_size=45, coarse_iterations=2)
    measured(throughput, at(job, 0), 0.1)
    measured(throughput, at(job, 1), 0.3)
    for index, seconds in ((0, 1.0), (1, 2.0)):
        for _ in range(2):
            throughput.record_beginning(at(job, index), seconds)
    forecaster = Forecaster(throughput)
    work = forecaster.work(job)
    assert work.share_s == work.alone_s == pytest.approx(1.0 + 2 * 0.1 + 2.0 + 4 * 0.3, rel=0.05)
    assert 0 < work.low_alone_s < work.alone_s and work.measured == 64 * 32
    job.count_iterations(3)
    job.joined, job.scale_index = True, 1  # its last beginning is over
    assert forecaster.work(job).share_s == pytest.approx(3 * 0.3, rel=0.05)


def test_a_scale_that_was_not_measured_near_by_counts_nothing_at_least():
    throughput, job = ThroughputModel(), job_state(iterations=4, smallest_size=16, coarse_iterations=2)
    forecaster = Forecaster(throughput)
    assert forecaster.work(job) is None and forecaster.least(job) == (0, 0, 0, 0, 0, 0, 0)
    measured(throughput, at(job, -1), 0.3)
    assert forecaster.work(job) is None
    assert forecaster.least(job).low_alone_s == pytest.approx(4 * 0.3, rel=0.1)


def test_jobs_that_share_batches_need_less_of_the_device_each():
    throughput, job = ThroughputModel(), job_state(iterations=10)
    measured(throughput, job.shape, 0.010)
    throughput.best_width(job.shape, 2)
    measured(throughput, job.shape, 0.012, slots=2)
    throughput.best_width(job.shape, 2)
    forecaster = Forecaster(throughput)
    alone, together = forecaster.work(job), forecaster.work(job, jobs=2)
    assert alone.share_s == alone.alone_s == pytest.approx(0.10, rel=0.05)
    assert together.share_s == pytest.approx(0.06, rel=0.05) and together.alone_s == pytest.approx(0.12, rel=0.05)
    with_an_empty_slot = forecaster.work(job, jobs=1, slots=2)
    assert with_an_empty_slot.share_s == with_an_empty_slot.alone_s == pytest.approx(0.12, rel=0.05)


@pytest.mark.parametrize(
    ("content", "styles", "style_scale", "counted"),
    [((64, 64), 4, 4.0, 64 / 3 - 2), ((16, 256), 1, 1.0, 16 / 3 - 2), ((64, 64), 6, 1.0, 0)],
    ids=["large styles", "a thin picture", "ordinary"],
)
def test_dear_style_images_count_though_no_job_had_such_before(content, styles, style_scale, counted):
    """In iterations, besides the ordinary ones, which are measured."""
    throughput, job = ThroughputModel(), styled(content, styles, style_scale)
    measured(throughput, job.shape, 0.1)
    for _ in range(3):
        throughput.record_beginning(job.shape, 0.001)  # others'
    work = Forecaster(throughput).work(job)
    assert work.share_s == work.alone_s == pytest.approx(0.1 * (10 + counted), rel=0.01)
    assert work.low_alone_s < 0.1 * 11  # no evidence to refuse it: they may be cached
    job.joined = True
    assert Forecaster(throughput).work(job).share_s == pytest.approx(0.1 * 10, rel=0.01)


def styled(content, styles, style_scale):
    """A job of 10 iterations with square style images."""
    recipe = Recipe(size=max(content), smallest_size=0, iterations=10, style_scale=style_scale)
    picture, style = (torch.zeros((3, *size), dtype=torch.uint8) for size in (content, (64, 64)))
    weights = (1.0,) * styles
    return JobState(
        StyleJob(recipe=recipe, content=picture, styles=(style,) * styles, style_weights=weights, start=None, seed=1)
    )


# Even sharing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("running", "waiting", "own", "max_running", "starts", "end"),
    [
        ([], [], 5, 1, [0], 5),
        ([3], [], 5, 1, [3], 8),
        ([3], [2, 4], 5, 1, [3, 5, 9], 14),
        ([3], [], 5, 2, [0], 8),  # shares the device for 6 s, then has it alone for 2 s
        ([3, 1], [4], 5, 2, [2, 6], 13),
        ([10, 10, 10], [], 1, 4, [0], 4),
    ],
)
def test_a_forecast_is_that_of_even_sharing(running, waiting, own, max_running, starts, end):
    seen = even_sharing(running, waiting, own, max_running)
    assert list(seen.starts) == pytest.approx(starts)
    assert seen.end == pytest.approx(end)
    slow_starts, slow_end = simulated(running, waiting, own, max_running)
    assert slow_starts == pytest.approx(seen.starts, abs=0.02) and slow_end == pytest.approx(seen.end, abs=0.02)


def simulated(running, waiting, own, max_running, step=0.001):
    """The slow way: all running jobs get equal parts of each millisecond."""
    left, waiting, starts, now = dict(enumerate(running)), [*waiting, own], [], 0.0
    last = None
    while waiting or last in left:
        while waiting and len(left) < max_running:
            last = f"waited {len(starts)}"
            left[last] = waiting.pop(0)
            starts.append(now)
            if waiting:
                last = None
        for name in left:
            left[name] -= step / len(left)
        left = {name: seconds for name, seconds in left.items() if seconds > 0}
        now += step
    return starts, now


def test_owners_share_evenly_and_a_short_job_goes_first():
    many = [("one", 100.0)] * 10
    assert sharing_by_owners(many, BURST_S, "another") == BURST_S
    assert sharing_by_owners(many, BURST_S + 7, "another") == BURST_S + 7 + 7
    assert sharing_by_owners(many, BURST_S + 7, "one") == BURST_S + 7 + 10 * 7
    assert sharing_by_owners([("one", 2.0), ("two", 100.0)], BURST_S + 7, "another") == BURST_S + 7 + 2 + 7


# Promises -------------------------------------------------------------------------------------------------------------


def promise(left_s, work_s, alone_s=None, group=None):
    return Promise(left_s, work_s, work_s if alone_s is None else alone_s, group or object())


def broken(promises, other_s, new, credit_s=LONGEST_TURN_S):
    return broken_promise(promises, other_s, new, credit_s)


def test_a_promise_is_broken_by_work_with_an_earlier_deadline_only():
    kept = promise(10.0, 6.0)
    assert broken([kept], 100.0, promise(20.0, 5.0)) is None
    assert broken([kept], 100.0, promise(5.0, 1.5)) is None
    late_s = 9 + (9 - LONGEST_TURN_S) * (1 / MAX_URGENT_SHARE - 1) - 10
    assert broken([kept], 100.0, promise(5.0, 3.0)) == pytest.approx(late_s + 10 * PROMISE_RESERVE)


def test_a_new_promise_waits_for_those_with_earlier_deadlines():
    early = promise(5.0, 4.0)
    assert broken([early], 100.0, promise(10.0, 4.0)) is None
    late_s = 8 + (8 - LONGEST_TURN_S) * (1 / MAX_URGENT_SHARE - 1) - 9
    assert broken([early], 100.0, promise(9.0, 4.0)) == pytest.approx(late_s)


def test_what_others_leave_of_the_device_is_free():
    assert broken([], 0.0, promise(10.0, 9.9)) is None
    assert broken([], 100.0, promise(10.0, 9.9)) is not None
    assert broken([], 100.0, promise(2.0, 1.9)) is None  # at once
    assert broken([], 100.0, promise(2.0, 1.9), credit_s=0.0) is not None


def test_a_promise_that_is_lost_anyway_or_needs_more_than_its_share_of_the_device_refuses_nobody():
    assert broken([promise(5.0, 6.0)], 100.0, promise(4.0, 1.0)) is None
    for other_s in (0.0, 100.0):
        assert broken([promise(60.0, 57.0)], other_s, promise(40.0, 10.0)) is None
        assert broken([promise(60.0, 48.0)], other_s, promise(40.0, 10.0)) is not None


def test_jobs_that_share_batches_need_the_time_of_the_longest_or_of_all_shares():
    one, two = promise(10.0, 2.0, 4.0, "shape"), promise(11.0, 2.0, 4.0, "shape")
    assert broken([one], 0.0, promise(5.0, 2.0, 4.0, "shape")) is None
    assert broken([one], 0.0, promise(3.9, 2.0, 4.0, "shape")) is not None
    assert broken([one, two], 0.0, promise(6.0, 2.0, 4.0, "shape")) is None  # 6 s for all three
    assert broken([one], 0.0, promise(6.0, 2.0, 6.1, "shape")) is not None
    assert broken([one], 0.0, promise(6.0, 2.0, 6.0, "another")) is not None  # 4 s and 6 s of 10 s


def test_promises_are_those_of_a_device_that_runs_the_earliest_deadline_first():
    """Against the slow way: after the longest turn, a fifth of each millisecond goes to jobs without a deadline."""
    chance = random.Random(1)
    outcomes = set()
    for _ in range(300):
        promises = [promise(chance.uniform(1, 10), chance.uniform(0.1, 2)) for _ in range(4)]
        new, other_s = promise(chance.uniform(1, 10), chance.uniform(0.1, 2)), chance.choice([0.0, 0.5, 100.0])
        before, after = late(promises, other_s), late([*promises, new], other_s)
        if any(seconds > 0 for seconds in before.values()) or any(-0.6 < seconds < 0.1 for seconds in after.values()):
            continue  # one is lost already, or within the reserve
        is_broken = broken(promises, other_s, new) is not None
        assert is_broken == any(seconds > 0 for seconds in after.values())
        outcomes.add(is_broken)
    assert outcomes == {True, False}


def late(promises, other_s, step=0.002):
    """By how many seconds each promise is late; less than 0 if it is kept."""
    left = {promise: promise.work_s for promise in promises}
    ends, now = {}, 0.0
    while left:
        share = MAX_URGENT_SHARE if other_s > 0 and now > LONGEST_TURN_S else 1.0
        other_s -= (1 - share) * step
        first = min(left, key=lambda promise: promise.left_s)
        left[first] -= share * step
        now += step
        if left[first] <= 0:
            del left[first]
            ends[first] = now
    return {promise: end - promise.left_s for promise, end in ends.items()}
