import pytest

from gramophone_server.errors import OutOfDeviceMemory
from gramophone_server.scheduling.batch_pool import BatchPool, Seat, widths
from gramophone_server.scheduling.throughput import ThroughputModel
from tests.support.engines import FakeEngine
from tests.support.specs import job_state


@pytest.mark.parametrize(
    ("jobs", "widest", "made"),
    [
        (0, 8, []),
        (1, 8, [1]),
        (3, 8, [4]),
        (5, 8, [4, 1]),
        (6, 8, [8]),
        (9, 8, [8, 1]),
        (16, 8, [8, 8]),
        (16, 1, [1] * 16),
        (11, 4, [4, 4, 4]),
        (13, 4, [4, 4, 4, 1]),
    ],
)
def test_at_most_a_quarter_of_a_lane_stands_empty(jobs, widest, made):
    assert widths(jobs, widest) == made


@pytest.mark.parametrize("jobs", range(1, 70))
@pytest.mark.parametrize("widest", [1, 2, 4, 16])
def test_widths_are_powers_of_two_that_hold_everybody(jobs, widest):
    made = widths(jobs, widest)
    assert all(width & (width - 1) == 0 and width <= widest for width in made)
    assert sum(made[:-1]) < jobs <= sum(made)
    assert 4 * (sum(made) - jobs) <= made[-1]


def arranged(lanes, seats, rounds=1):
    """As the worker does: arrange, then one iteration of every lane."""
    for _ in range(rounds):
        assert lanes.arrange(seats) == {}
        for lane in list(lanes):
            lanes.advance(lane, 1)
    return [(lane.slots, len(lane.seats)) for lane in lanes]


def seats(jobs, **recipe):
    return [Seat(job_state(iterations=1000, **recipe)) for _ in range(jobs)]


def note(pace, shape, slots, seconds):
    for _ in range(3):
        pace.note(shape, slots, 1, seconds)


def test_a_batch_grows_while_it_pays():
    """An iteration takes 1 ms whatever its width, so a batch of eight is eight times faster."""
    lanes = BatchPool(FakeEngine(iteration_s=0.001), ThroughputModel())
    assert arranged(lanes, seats(8), rounds=24) == [(8, 8)]


def test_a_batch_does_not_grow_where_it_does_not_pay():
    engine, pace = FakeEngine(), ThroughputModel()
    lanes, eight = BatchPool(engine, pace), seats(8)
    shape = eight[0].work.shape
    note(pace, shape, 1, 0.01)
    note(pace, shape, 2, 0.02)
    assert lanes.arrange(eight) == {}
    assert [lane.slots for lane in lanes] == [1] * 8


def test_a_width_that_pays_no_more_is_given_up():
    engine, pace = FakeEngine(), ThroughputModel()
    lanes, two = BatchPool(engine, pace), seats(2)
    shape = two[0].work.shape
    note(pace, shape, 1, 0.01)
    lanes.arrange(two)
    assert [lane.slots for lane in lanes] == [2]  # to see what it is worth
    note(pace, shape, 2, 0.03)
    lanes.arrange(two)
    assert [lane.slots for lane in lanes] == [1, 1]


def test_iterations_that_are_long_already_are_not_shared():
    engine, pace = FakeEngine(), ThroughputModel()
    lanes, two = BatchPool(engine, pace), seats(2)
    note(pace, two[0].work.shape, 1, 0.2)
    lanes.arrange(two)
    assert [lane.slots for lane in lanes] == [1, 1]


def test_jobs_of_other_shapes_have_other_lanes_and_move_when_their_scale_ends():
    lanes = BatchPool(FakeEngine(), ThroughputModel())
    (small,) = seats(1)
    larger = Seat(job_state(iterations=3, smallest_size=45, coarse_iterations=2))
    both = [small, larger]
    lanes.arrange(both)
    assert small.lane is not larger.lane
    lanes.advance(larger.lane, 5)
    assert larger.work.done == 2 and not larger.work.iterations_left
    lanes.leave(larger)
    lanes.arrange(both)
    assert larger.lane.shape == small.lane.shape and larger.work.at == 1


def test_a_lane_that_is_half_empty_is_laid_anew():
    lanes, eight = BatchPool(FakeEngine(iteration_s=0.001), ThroughputModel()), seats(8)
    arranged(lanes, eight, rounds=24)
    for seat in eight[:3]:
        lanes.drop(seat)
    left = eight[3:]
    assert arranged(lanes, left) == [(4, 4), (1, 1)]
    assert len({seat.work.done for seat in left}) == 1  # nobody has lost or missed an iteration


def test_out_of_memory_halves_the_batch_and_loses_nobody():
    engine = FakeEngine(iteration_s=0.001, most_pixels=64 * 32 * 3)
    lanes, eight = BatchPool(engine, ThroughputModel()), seats(8)
    assert arranged(lanes, eight, rounds=12) == [(2, 2)] * 4
    assert all(seat.work.done == 12 for seat in eight)


def test_out_of_memory_in_the_middle_halves_the_batch_and_loses_nobody():
    engine = FakeEngine(iteration_s=0.001)
    lanes, four = BatchPool(engine, ThroughputModel()), seats(4)
    assert arranged(lanes, four, rounds=16) == [(4, 4)]
    engine.error, engine.fails_at = OutOfDeviceMemory(64, 32), four[0].work.done + 1
    (lane,) = lanes
    assert lanes.advance(lane, 1) == {}
    engine.error = None
    assert arranged(lanes, four, rounds=2) == [(2, 2), (2, 2)]
    assert all(seat.work.done == 18 for seat in four)


def test_who_finds_no_memory_waits_until_somebody_has_gone():
    engine = FakeEngine(memory_bytes=1000 * 64 * 32 * 2)
    lanes, three = BatchPool(engine, ThroughputModel()), seats(3)
    assert lanes.arrange(three) == {}
    assert [seat.lane is None for seat in three] == [False, False, True]
    lanes.drop(three[0])
    lanes.arrange(three[1:])
    assert three[2].lane is not None


def test_a_job_that_does_not_fit_alone_is_refused_and_nobody_else():
    engine = FakeEngine(most_pixels=64 * 32 - 1)
    lanes = BatchPool(engine, ThroughputModel())
    (seat,) = seats(1)
    assert [type(error) for error in lanes.arrange([seat]).values()] == [OutOfDeviceMemory]


def test_the_device_s_time_is_charged_to_those_who_shared_it():
    lanes, two = BatchPool(FakeEngine(iteration_s=0.01), ThroughputModel()), seats(2)
    arranged(lanes, two, rounds=4)
    assert two[0].used_s == pytest.approx(two[1].used_s, rel=0.5)
    assert sum(seat.used_s for seat in two) >= 4 * 0.01


def test_a_lane_is_no_wider_than_the_device_holds_even_alone():
    engine, pace = FakeEngine(memory_bytes=64 * 32 * 1000), ThroughputModel()
    lanes, two = BatchPool(engine, pace), seats(2)
    note(pace, two[0].work.shape, 1, 0.001)  # so that wider ones are to be tried
    lanes.arrange(two)
    assert [lane.slots for lane in lanes] == [1] and lanes.short


def test_what_jobs_hold_that_stand_still_is_reckoned_with():
    engine = FakeEngine(memory_bytes=2 * 64 * 32 * 1000)
    lanes, (one,), (other,) = BatchPool(engine, ThroughputModel()), seats(1), seats(1, size=60)
    assert lanes.arrange([one, other], beside_bytes=64 * 32 * 1000) == {}
    assert one.lane is not None and other.lane is None and lanes.short
    assert lanes.bytes == 2 * 64 * 32 * 1000
    assert lanes.arrange([one, other]) == {}
    assert other.lane is not None and not lanes.short


def test_seats_are_given_until_a_time_and_one_at_least():
    lanes, five = BatchPool(FakeEngine(join_s=0.02), ThroughputModel()), seats(5)
    for n in range(1, 6):
        assert lanes.arrange(five, until=0.0) == {}
        assert [seat.lane is not None for seat in five] == [True] * n + [False] * (5 - n)
        assert all(seat.apart is (seat.lane is None) for seat in five)
    assert not lanes.short
