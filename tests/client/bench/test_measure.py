"""Arrival times, histograms, and the measurement of a step."""

import math
from itertools import islice, pairwise

import pytest

from gramophone.recipe import Recipe
from gramophone_client.bench.arrivals import ClosedLoop, OpenLoop, poisson
from gramophone_client.bench.histogram import Histogram
from gramophone_client.bench.measure import OK, Recorder, Sample, megapixel_iterations
from tests.support.bench_reports import make_sample


def test_arrivals_are_poisson_and_the_same_for_the_same_seed():
    assert list(islice(poisson(2.0, 7), 50)) == list(islice(poisson(2.0, 7), 50))
    assert next(poisson(2.0, 7)) != next(poisson(2.0, 8))
    moments = [0.0, *islice(poisson(2.0, 7), 20_000)]
    gaps = [later - earlier for earlier, later in pairwise(moments)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.5, rel=0.03)
    # Exponential gaps: a share of exp(-k) of them is longer than k times the mean.
    for times in (1, 2):
        assert sum(gap > times * mean for gap in gaps) / len(gaps) == pytest.approx(math.exp(-times), abs=0.02)


def test_a_quantile_is_exact_to_one_bucket():
    histogram = Histogram()
    durations = [0.000_03 * 1.01**i for i in range(1500)]  # 30 us to 90 s
    for seconds in durations:
        histogram.record(seconds)
    for share in (0.01, 0.5, 0.95, 0.99, 1.0):
        true = durations[math.ceil(share * len(durations)) - 1]
        assert histogram.quantile(share) == pytest.approx(true, rel=0.01, abs=2e-6)
    assert histogram.quantile(1.0) == histogram.max_s == durations[-1]
    assert histogram.total_s == pytest.approx(sum(durations))


def test_histograms_merge_and_survive_json():
    first, second, both = Histogram(), Histogram(), Histogram()
    for i in range(100):
        for histogram in (first if i % 3 else second, both):
            histogram.record(i / 7)
    first.merge(second)
    assert first.as_json()["buckets"] == both.as_json()["buckets"]
    assert Histogram.from_json(first.as_json()).as_json() == first.as_json()
    assert Histogram().quantile(0.5) is None
    assert Histogram.from_json(Histogram().as_json()).count == 0


def test_a_negative_duration_counts_as_0():
    histogram = Histogram()
    histogram.record(-1.0)
    assert (histogram.count, histogram.quantile(1.0)) == (1, 0.0)


def record(recorder: Recorder, *samples: Sample) -> None:
    for i, sample in enumerate(samples):
        recorder.record_start(i, sample.due_s, sample.due_s)
        recorder.record_end(i, sample)


def test_latency_counts_from_the_time_a_job_was_due():
    recorder = Recorder(OpenLoop(1.0), warm_up_s=0, window_s=10)
    recorder.record_start(1, due_s=1.0, sent_s=4.0)
    recorder.record_end(1, Sample("fast", 1.0, ended_s=5.0))
    assert recorder.measured(5.0).result_s.quantile(0.5) == pytest.approx(4.0, rel=0.01)
    assert recorder.late_s == 3.0


def test_three_windows_that_agree_are_the_measurement():
    recorder = Recorder(ClosedLoop(1), warm_up_s=4, window_s=3)
    record(recorder, *(make_sample(second + 1.0, 9.0) for second in range(4)))  # the warm-up: 0 to 4 s
    assert recorder.is_warm and not recorder.windows
    record(recorder, *(make_sample(5.0 + second, 2.0) for second in range(3)))  # 4 to 7 s, with twice the latency
    record(recorder, *(make_sample(8.0 + second, 1.0) for second in range(6)))  # 7 to 13 s
    assert len(recorder.windows) == 3 and not recorder.is_stable
    assert recorder.measured(13.0).ok == 9  # all jobs since the warm-up
    record(recorder, *(make_sample(14.0 + second, 1.05) for second in range(3)))
    assert recorder.is_stable
    measured = recorder.measured(20.0)
    assert (measured.ok, measured.seconds, measured.jobs_per_s) == (9, 9.0, 1.0)
    assert measured.result_s.max_s == pytest.approx(1.05)


def test_windows_with_different_numbers_of_jobs_do_not_agree():
    recorder = Recorder(ClosedLoop(1), warm_up_s=0, window_s=3)
    record(recorder, *(make_sample(second) for second in (1, 2, 3, 4, 5, 6, 6.5, 7, 7.5, 8, 8.5, 9)))
    assert [window.ok for window in recorder.windows] == [3, 3, 6]
    assert not recorder.is_stable


def test_an_open_loop_is_not_stable_while_jobs_accumulate():
    def recorded(arriving: int) -> Recorder:
        recorder = Recorder(OpenLoop(10.0), warm_up_s=0, window_s=1)
        for i in range(60):
            for extra in range(arriving):
                recorder.record_start(100 * i + extra, i / 10, i / 10)
            recorder.record_end(100 * i, make_sample(i / 10))
        return recorder

    assert recorded(arriving=1).is_stable
    assert not recorded(arriving=2).is_stable


def test_only_successful_jobs_end_a_window():
    recorder = Recorder(ClosedLoop(2), warm_up_s=1, window_s=1)
    record(recorder, make_sample(2.0), *(make_sample(3.0 + i, status="QUEUE_FULL") for i in range(9)))
    assert not recorder.is_warm
    record(recorder, make_sample(20.0))  # now at least as many jobs have ended as there are callers
    assert recorder.is_warm and not recorder.windows
    record(recorder, *(make_sample(21.0 + i, status="QUEUE_FULL") for i in range(9)))
    assert not recorder.windows and recorder.current.statuses == {"QUEUE_FULL": 9}
    assert [dict(second) for second in recorder.timeline[2:5]] == [{OK: 1}, {"QUEUE_FULL": 1}, {"QUEUE_FULL": 1}]


def test_a_step_that_ends_during_its_warm_up_reports_the_warm_up():
    recorder = Recorder(ClosedLoop(1), warm_up_s=100, window_s=1)
    record(recorder, make_sample(1.0), make_sample(2.0))
    assert not recorder.is_warm
    assert recorder.measured(4.0).jobs_per_s == 0.5


def test_megapixel_iterations_are_counted_scale_by_scale():
    recipe = Recipe(size=64, smallest_size=32, iterations=5, coarse_iterations=3)  # 32, 45 and 64 pixels
    small, middle, full = (64 * 48 * (size / 64) ** 2 / 1e6 for size in (32, 45, 64))
    whole = megapixel_iterations(recipe, 64, 48, planned=11, done=11)
    assert whole == pytest.approx(3 * small + 3 * middle + 5 * full)
    assert megapixel_iterations(recipe, 64, 48, planned=11, done=4) == pytest.approx(3 * small + middle)
    # A thin picture has fewer scales: the server skips the coarsest.
    assert megapixel_iterations(recipe, 64, 48, planned=8, done=4) == pytest.approx(3 * middle + full)
