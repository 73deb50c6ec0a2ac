import math
import random

import pytest

from gramophone_server.scheduling.cost_model import EVIDENCE_EXPIRES_S, CostModel
from tests.support.clock import ManualClock

KIND = "an iteration"


class Device:
    """Measures work with a fixed cost and a cost for each pixel, on a clock of its own."""

    def __init__(self, fixed_s=0.0, pixel_s=1e-6, noise=0.0):
        self.clock = ManualClock()
        self.model = CostModel(self.clock)
        self.fixed_s, self.pixel_s, self.noise = fixed_s, pixel_s, noise
        self.slowness = 1.0
        self._chance = random.Random(1)

    def true_s(self, pixels):
        return self.slowness * (self.fixed_s + self.pixel_s * pixels)

    def run(self, pixels, times=20, kind=KIND, width=1, aspect=1.0):
        for _ in range(times):
            seconds = self.true_s(pixels) * math.exp(self._chance.gauss(0, self.noise))
            self.clock.advance(seconds)
            self.model.record(kind, pixels, seconds, width=width, aspect=aspect)

    def error(self, pixels, kind=KIND):
        """Estimate / truth - 1."""
        return self.model.estimate(kind, pixels).seconds / self.true_s(pixels) - 1


def test_a_measured_size_is_known_within_its_noise():
    device = Device(noise=0.2)
    device.run(10_000, 400)
    estimate = device.model.estimate(KIND, 10_000)
    assert abs(device.error(10_000)) < 2 * estimate.spread < 0.1 and estimate.nearest_pixels == 10_000


def test_sizes_in_between_follow_the_fixed_cost_and_the_slope():
    device = Device(fixed_s=0.005, pixel_s=1e-6)
    for pixels in (1000, 4000, 16_000):
        device.run(pixels)
    assert all(abs(device.error(pixels)) < 0.03 for pixels in (1500, 2000, 3000, 8000, 20_000))


def test_batches_of_small_pictures_are_as_large_pictures():
    device = Device(fixed_s=0.005)
    device.run(1000)
    device.run(4000, width=4)
    assert device.model.estimate(KIND, 2000, width=2).seconds == pytest.approx(device.true_s(2000), rel=0.03)


def test_pictures_of_another_aspect_tell_less_the_more_it_differs():
    """And allow at least the factor of 1.4 that was measured between 16 x 1024 and 1024 x 16 px."""
    device = Device()
    device.run(16_384, 50, aspect=64.0)
    same, near, far = (device.model.estimate(KIND, 16_384, aspect=aspect) for aspect in (64.0, 16.0, 1 / 64))
    assert same.spread < near.spread < far.spread
    assert same.low_s == pytest.approx(same.seconds, rel=0.01) and far.low_s < far.seconds / 1.4
    assert far.seconds == pytest.approx(same.seconds)


def test_work_without_a_drift_shows_nothing_of_the_device():
    model = CostModel(ManualClock(), has_drift=False)
    for pixels, seconds, times in ((1000, 1.0, 50), (10**6, 1.0, 50), (10**6, 9.0, 50)):
        for _ in range(times):
            model.record(KIND, pixels, seconds)
    assert model.estimate(KIND, 1000).seconds == pytest.approx(1.0)
    assert model.estimate(KIND, 10**6).seconds == pytest.approx(9.0, rel=0.05)


@pytest.mark.parametrize("pixels", [250, 400, 2500, 10_000, 10**6])
def test_nothing_is_known_of_sizes_far_from_all_measured_ones(pixels):
    """However large the device's noise was, a thumbnail says nothing of a poster, nor a poster of a thumbnail."""
    device = Device()
    device.run(1000)
    assert device.model.estimate(KIND, pixels) is None


def test_nothing_is_known_of_other_kinds_or_from_one_measurement():
    device = Device()
    assert device.model.estimate(KIND, 1000) is None
    device.run(1000, times=1)
    assert device.model.estimate(KIND, 1000) is None  # it has one-time costs
    device.run(1000, times=1)
    assert device.model.estimate(KIND, 1000) is not None
    assert device.model.estimate("another", 1000) is None


@pytest.mark.parametrize(("fixed_s", "pixel_s"), [(0.01, 0.0), (0.0, 1e-6)], ids=["fixed", "by pixel"])
@pytest.mark.parametrize("pixels", [500, 700, 1400, 2000])
def test_one_size_allows_both_a_fixed_cost_and_a_cost_by_pixel_for_others(fixed_s, pixel_s, pixels):
    device = Device(fixed_s, pixel_s)
    device.run(1000)
    assert device.model.estimate(KIND, pixels).low_s <= device.true_s(pixels)


def test_an_estimate_is_less_sure_far_away_and_after_a_while():
    device = Device(fixed_s=0.001)
    for pixels in (1000, 4000):
        device.run(pixels)
    near, far = (device.model.estimate(KIND, pixels).spread for pixels in (4200, 7900))
    assert far > 2 * near
    device.clock.advance(200)
    assert device.model.estimate(KIND, 4200).spread > 2 * near


def test_evidence_expires():
    device = Device()
    device.run(1000)
    device.clock.advance(EVIDENCE_EXPIRES_S - 1)
    assert device.model.estimate(KIND, 1000) is not None
    device.clock.advance(2)
    assert device.model.estimate(KIND, 1000) is None


def test_a_change_of_the_device_that_one_size_shows_holds_for_all():
    device = Device(fixed_s=0.002, noise=0.1)
    for _ in range(20):
        for pixels in (1000, 4000, 16_000, 64_000):
            device.run(pixels, 5)
    device.slowness = 2.0
    device.run(4000, 400)
    assert all(abs(device.error(pixels)) < 0.15 for pixels in (1000, 4000, 16_000, 64_000))
    device.slowness = 1.0
    device.run(64_000, 40)
    assert all(abs(device.error(pixels)) < 0.15 for pixels in (1000, 4000, 16_000, 64_000))


def test_one_slow_iteration_changes_little():
    device = Device()
    device.run(100_000, 50)
    device.slowness = 20.0
    device.run(100_000, 1)
    device.slowness = 1.0
    assert abs(device.error(100_000)) < 0.3
    device.run(100_000, 10)
    assert abs(device.error(100_000)) < 0.05


def test_what_first_iterations_take_more_is_expected_of_new_sizes_only():
    device = Device()
    for pixels in (1000, 2000, 4000):
        first = device.true_s(pixels) + 0.5
        device.clock.advance(first)
        device.model.record(KIND, pixels, first)
        device.run(pixels, 5)
    assert device.model.estimate(KIND, 3000).first_s == pytest.approx(0.5)
    assert device.model.estimate(KIND, 2000).first_s == 0.0


def test_a_rough_estimate_is_there_from_the_first_measurement_on_and_at_any_distance():
    device = Device(fixed_s=0.004, pixel_s=1e-6)
    assert device.model.rough_s(KIND, 1000) is None
    device.run(1000, times=1)
    assert device.model.rough_s(KIND, 1000) == pytest.approx(device.true_s(1000))
    device.run(1_000_000, times=1)
    for _ in range(50):  # many small ones do not outweigh it
        device.run(1000, times=1)
    device.clock.advance(2 * EVIDENCE_EXPIRES_S)
    for pixels in (10, 10_000, 10_000_000):
        assert device.model.rough_s(KIND, pixels) == pytest.approx(device.true_s(pixels), rel=0.01)


def test_what_is_kept_is_bounded():
    model = CostModel(ManualClock())
    for number in range(1000):
        for _ in range(2):
            model.record("one", 1000 + number, 0.1)
            model.record(f"kind {number}", 1000, 0.1)
    assert len(model) <= 64 + 64
    assert model.estimate("one", 1999) is not None  # the newest


@pytest.mark.parametrize("other", [lambda n: (f"kind {n}", 1000), lambda n: (KIND, 10**6 + n)], ids=["kinds", "sizes"])
def test_short_jobs_unlike_each_other_do_not_make_the_model_forget_what_it_measured_for_long(other):
    device = Device(pixel_s=1e-5)
    device.run(1000, times=100)  # one second
    for number in range(500):
        kind, pixels = other(number)
        for _ in range(2):
            device.clock.advance(0.02)
            device.model.record(kind, pixels, 0.02)
    assert device.model.estimate(KIND, 1000) is not None and len(device.model) <= 64 + 1
