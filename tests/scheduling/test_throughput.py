import pytest

from gramophone.recipe import Recipe
from gramophone_server.domain.job_state import JobState, Shape
from gramophone_server.scheduling.throughput import ThroughputModel, forecast
from tests.support.specs import job_state

SMALL, LARGE = (Shape.of(Recipe(), side, side) for side in (64, 128))


def test_nothing_is_guessed_before_anything_was_measured():
    pace = ThroughputModel()
    assert pace.iteration_s(SMALL, 1) is pace.gain(SMALL, 1) is pace.job_s(SMALL) is None
    assert pace.left_s(JobState(job_state().job)) is None


def test_a_job_costs_its_part_of_the_widest_batch_and_unknown_sizes_cost_their_pixels():
    pace = ThroughputModel()
    pace.note(SMALL, 1, 10, 1.0)
    pace.note(SMALL, 4, 10, 2.0)
    assert pace.iteration_s(SMALL, 1) == pytest.approx(0.1)
    assert pace.job_s(SMALL) == pytest.approx(0.05)
    assert pace.job_s(LARGE) == pytest.approx(0.2)


def test_the_newest_measurement_counts_for_a_part():
    pace = ThroughputModel()
    for seconds, mean in ((9.0, 9.0), (1.0, 1.0), (2.0, 1.3), (2.0, 1.51)):  # the first one is not like the others
        pace.note(SMALL, 1, 1, seconds)
        assert pace.iteration_s(SMALL, 1) == pytest.approx(mean)


def test_the_gain_of_twice_the_width():
    pace = ThroughputModel()
    for seconds in (1.2, 1.0, 9.0):
        pace.note(SMALL, 2, 1, seconds)
    for seconds in (1.6, 2.0):
        pace.note(SMALL, 4, 1, seconds)
        assert pace.gain(SMALL, 1) is pace.gain(SMALL, 2) is None  # not enough yet
    pace.note(SMALL, 4, 1, 7.0)
    assert pace.gain(SMALL, 2) == pytest.approx(1.25)


def test_a_width_is_taken_while_it_pays_and_given_up_when_it_does_not():
    pace = ThroughputModel()

    def measured(slots, seconds):
        for _ in range(3):
            pace.note(SMALL, slots, 1, seconds)

    assert pace.width(SMALL, 64) == 1  # nothing is known
    measured(1, 0.010)
    assert pace.width(SMALL, 1) == 1 and pace.width(SMALL, 64) == 2
    measured(2, 0.012)
    assert pace.width(SMALL, 64) == 4
    measured(4, 0.026)  # 26 ms for four, 2 x 12 for twice two
    assert pace.width(SMALL, 64) == 2
    assert pace.width(SMALL, 64) == 2
    measured(2, 0.030)  # the shortest times count, so neighbours change nothing
    assert pace.width(SMALL, 64) == 2


def test_what_takes_long_is_not_shared():
    pace = ThroughputModel()
    for _ in range(3):
        pace.note(LARGE, 1, 1, 0.026)
    assert pace.width(LARGE, 64) == 1


def test_sizes_without_end_take_no_memory_without_end():
    pace = ThroughputModel()
    shapes = [Shape.of(Recipe(), 16, width) for width in range(16, 3016)]
    for shape in shapes:
        pace.note(shape, 1, 1, 0.001)
        pace.width(shape, 8)
    assert pace.iteration_s(shapes[-1], 1) is not None and pace.iteration_s(shapes[0], 1) is None
    assert sum(pace.iteration_s(shape, 1) is not None for shape in shapes) == 256
    assert len(pace._width) <= 256


def test_what_is_left_is_summed_over_the_scales():
    pace, job = ThroughputModel(), job_state(iterations=4, smallest_size=45, coarse_iterations=2)
    at_64, at_45 = (Shape.of(job.recipe, height, width) for width, height in ((64, 32), (45, 22)))
    pace.note(at_64, 1, 1, 0.3)
    pace.note(at_45, 1, 1, 0.1)
    assert pace.left_s(job) == pytest.approx(2 * 0.1 + 4 * 0.3)
    job.advanced(3)
    assert pace.left_s(job) == pytest.approx(3 * 0.3)


@pytest.mark.parametrize(
    ("running", "ahead", "own", "most", "begins", "end"),
    [
        ([], [], 5, 1, [0], 5),
        ([3], [], 5, 1, [3], 8),
        ([3], [2, 4], 5, 1, [3, 5, 9], 14),
        ([3], [], 5, 2, [0], 8),  # shares with it for 6 s, then has 2 s alone
        ([3, 1], [4], 5, 2, [2, 6], 13),
        ([10, 10, 10], [], 1, 4, [0], 4),
    ],
)
def test_a_forecast_is_what_even_sharing_comes_to(running, ahead, own, most, begins, end):
    seen = forecast(running, ahead, own, most)
    assert list(seen.begins) == pytest.approx(begins)
    assert seen.end == pytest.approx(end)
    slow_begins, slow_end = simulated(running, ahead, own, most)
    assert slow_begins == pytest.approx(seen.begins, abs=0.02) and slow_end == pytest.approx(seen.end, abs=0.02)


def simulated(running, ahead, own, most, step=0.001):
    """The slow way: everybody gets an equal part of every millisecond."""
    left, waiting, begins, now = dict(enumerate(running)), [*ahead, own], [], 0.0
    last = None
    while waiting or last in left:
        while waiting and len(left) < most:
            last = f"waited {len(begins)}"
            left[last] = waiting.pop(0)
            begins.append(now)
            if waiting:
                last = None
        for name in left:
            left[name] -= step / len(left)
        left = {name: seconds for name, seconds in left.items() if seconds > 0}
        now += step
    return begins, now
