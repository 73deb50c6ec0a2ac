import pytest

from gramophone.recipe import Recipe
from gramophone_server.domain.job_state import Shape
from gramophone_server.scheduling.cost_model import EVIDENCE_EXPIRES_S
from gramophone_server.scheduling.throughput import ThroughputModel
from tests.support.clock import ManualClock

SMALL, LARGE = (Shape.of(Recipe(), side, side) for side in (64, 128))


def test_without_measurements_there_are_no_estimates():
    model = ThroughputModel()
    assert model.batch_seconds_per_iteration(SMALL, 1) is model.gain(SMALL, 1) is model.iteration(SMALL, 1) is None
    assert model.beginning(SMALL) is model.decoding(10) is model.delivery("PNG", 10) is None


def test_each_kind_of_work_has_its_costs():
    model = ThroughputModel()
    for _ in range(2):
        model.record(SMALL, 2, 10, 1.0)
        model.record_beginning(SMALL, 2.0)
        model.record_decoding(1000, 3.0)
        model.record_delivery("PNG", 4096, 4.0)
    assert model.iteration(SMALL, 2).seconds == pytest.approx(0.1)
    assert model.beginning(SMALL).seconds == pytest.approx(2.0)
    assert model.decoding(1000).seconds == pytest.approx(3.0)
    assert model.delivery("PNG", 4096).seconds == pytest.approx(4.0)
    assert model.delivery("JPEG", 4096) is None


def test_a_forecast_counts_on_no_more_width_than_was_used_and_its_jobs_fill():
    model = ThroughputModel()
    assert model.known_best_width(SMALL, 64) == 1
    for slots, seconds in ((1, 0.010), (2, 0.012), (4, 0.014)):
        for _ in range(3):
            model.record(SMALL, slots, 1, seconds)
        model.best_width(SMALL, 64)
    assert [model.known_best_width(SMALL, jobs) for jobs in (1, 2, 3, 4, 64)] == [1, 2, 2, 4, 8]
    assert model.best_width(SMALL, 64) == 8  # unchanged


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


def test_many_shapes_with_an_iteration_each_leave_the_best_width_of_another():
    model = ThroughputModel()
    for slots, seconds in ((1, 0.010), (2, 0.012), (4, 0.014)):
        for _ in range(3):
            model.record(SMALL, slots, 1, seconds)
        model.best_width(SMALL, 64)
    for width in range(16, 1016):
        model.record(Shape.of(Recipe(), 16, width), 1, 1, 0.001)
    assert model.known_best_width(SMALL, 64) == 8


def test_the_decay_of_a_running_average_is_no_part_of_the_kind_of_an_iteration():
    model = ThroughputModel()
    with_average, other, without = (Shape.of(Recipe(average=average), 64, 64) for average in (0.9, 0.5, 0.0))
    for _ in range(2):
        model.record(with_average, 1, 10, 1.0)
    assert model.iteration(other, 1) is not None and model.iteration(without, 1) is None


@pytest.mark.parametrize(("primed_s", "then_s"), [(0.147, 0.106), (0.106, 0.147)], ids=["faster", "slower"])
def test_pictures_of_another_aspect_do_not_look_like_a_faster_or_slower_device(primed_s, then_s):
    """One client's pictures of 1024 x 16 and 16 x 1024 px, which take 147 and 106 ms, beside another's."""
    clock = ManualClock()
    model = ThroughputModel(clock)
    honest, primed, then = (Shape.of(Recipe(), *size) for size in ((256, 256), (1024, 16), (16, 1024)))
    for shape, seconds, times in ((honest, 0.067, 600), (primed, primed_s, 40), (then, then_s, 600)):
        for _ in range(times):
            clock.advance(seconds)
            model.record(shape, 1, 1, seconds)
        assert model.iteration(honest, 1).seconds == pytest.approx(0.067, rel=0.01)
    assert model.iteration(primed, 1).seconds == pytest.approx(primed_s, rel=0.05)


OTHERS = {
    "beginning": lambda model, size, s: model.record_beginning(Shape.of(Recipe(), size, size), s),
    "decoding": lambda model, size, s: model.record_decoding(size * size, s),
    "delivery": lambda model, size, s: model.record_delivery("PNG", size * size, s),
}


@pytest.mark.parametrize("work", OTHERS)
def test_dear_images_of_one_client_say_nothing_of_the_device_nor_of_other_sizes(work):
    """Its cheap ones had as many pixels: what they cost depends on more than that."""
    clock = ManualClock()
    model = ThroughputModel(clock)
    for size, seconds, times in ((512, 0.2, 40), (64, 0.02, 40), (64, 2.0, 20)):
        for _ in range(times):
            clock.advance(seconds)
            OTHERS[work](model, size, seconds)
    known = {
        "beginning": lambda: model.beginning(Shape.of(Recipe(), 512, 512)).seconds,
        "decoding": lambda: model.decoding(512**2).seconds,
        "delivery": lambda: model.delivery("PNG", 512**2).seconds,
    }
    assert known[work]() == pytest.approx(0.2, rel=0.05)


def test_a_shape_was_measured_if_its_own_iterations_were_lately():
    clock = ManualClock()
    model = ThroughputModel(clock)
    model.record(SMALL, 2, 1, 1.0)
    assert not model.was_measured(SMALL)  # the first one has one-time costs
    model.record(SMALL, 2, 1, 1.0)
    assert model.was_measured(SMALL) and not model.was_measured(LARGE)
    assert not model.was_measured(SMALL._replace(height=32, width=128))
    clock.advance(EVIDENCE_EXPIRES_S + 1)
    assert not model.was_measured(SMALL)
