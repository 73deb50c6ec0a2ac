import pytest

from gramophone.recipe import Recipe
from gramophone_server.domain.job_state import JobState, Shape
from gramophone_server.scheduling.throughput import ThroughputModel, forecast
from tests.support.specs import job_state

SMALL, LARGE = (Shape.of(Recipe(), side, side) for side in (64, 128))


def test_without_measurements_there_are_no_estimates():
    model = ThroughputModel()
    assert (
        model.batch_seconds_per_iteration(SMALL, 1)
        is model.gain(SMALL, 1)
        is model.seconds_per_iteration(SMALL)
        is None
    )
    assert model.remaining_seconds(JobState(job_state().job)) is None


def test_a_job_costs_its_share_of_the_widest_batch_and_an_unknown_size_its_pixels():
    model = ThroughputModel()
    model.record(SMALL, 1, 10, 1.0)
    model.record(SMALL, 4, 10, 2.0)
    assert model.batch_seconds_per_iteration(SMALL, 1) == pytest.approx(0.1)
    assert model.seconds_per_iteration(SMALL) == pytest.approx(0.05)
    assert model.seconds_per_iteration(LARGE) == pytest.approx(0.2)


def test_the_newest_measurement_has_a_weight():
    model = ThroughputModel()
    for seconds, mean in ((9.0, 9.0), (1.0, 1.0), (2.0, 1.3), (2.0, 1.51)):  # the first one includes one-time costs
        model.record(SMALL, 1, 1, seconds)
        assert model.batch_seconds_per_iteration(SMALL, 1) == pytest.approx(mean)


def test_the_gain_of_twice_the_width():
    model = ThroughputModel()
    for seconds in (1.2, 1.0, 9.0):
        model.record(SMALL, 2, 1, seconds)
    for seconds in (1.6, 2.0):
        model.record(SMALL, 4, 1, seconds)
        assert model.gain(SMALL, 1) is model.gain(SMALL, 2) is None  # not enough yet
    model.record(SMALL, 4, 1, 7.0)
    assert model.gain(SMALL, 2) == pytest.approx(1.25)


def test_the_width_grows_while_it_pays_and_shrinks_when_it_does_not():
    model = ThroughputModel()

    def measured(slots, seconds):
        for _ in range(3):
            model.record(SMALL, slots, 1, seconds)

    assert model.best_width(SMALL, 64) == 1  # nothing was measured
    measured(1, 0.010)
    assert model.best_width(SMALL, 1) == 1 and model.best_width(SMALL, 64) == 2
    measured(2, 0.012)
    assert model.best_width(SMALL, 64) == 4
    measured(4, 0.026)  # 26 ms for four, 2 x 12 for twice two
    assert model.best_width(SMALL, 64) == 2
    assert model.best_width(SMALL, 64) == 2
    measured(2, 0.030)  # the shortest times count, so other processes change nothing
    assert model.best_width(SMALL, 64) == 2


def test_long_iterations_are_not_shared():
    model = ThroughputModel()
    for _ in range(3):
        model.record(LARGE, 1, 1, 0.026)
    assert model.best_width(LARGE, 64) == 1


def test_the_number_of_kept_shapes_is_bounded():
    model = ThroughputModel()
    shapes = [Shape.of(Recipe(), 16, width) for width in range(16, 3016)]
    for shape in shapes:
        model.record(shape, 1, 1, 0.001)
        model.best_width(shape, 8)
    assert (
        model.batch_seconds_per_iteration(shapes[-1], 1) is not None
        and model.batch_seconds_per_iteration(shapes[0], 1) is None
    )
    assert sum(model.batch_seconds_per_iteration(shape, 1) is not None for shape in shapes) == 256
    assert len(model) <= 256


def test_the_remaining_time_is_summed_over_the_scales():
    model, job = ThroughputModel(), job_state(iterations=4, smallest_size=45, coarse_iterations=2)
    at_64, at_45 = (Shape.of(job.recipe, height, width) for width, height in ((64, 32), (45, 22)))
    model.record(at_64, 1, 1, 0.3)
    model.record(at_45, 1, 1, 0.1)
    assert model.remaining_seconds(job) == pytest.approx(2 * 0.1 + 4 * 0.3)
    job.count_iterations(3)
    assert model.remaining_seconds(job) == pytest.approx(3 * 0.3)


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
    seen = forecast(running, waiting, own, max_running)
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
