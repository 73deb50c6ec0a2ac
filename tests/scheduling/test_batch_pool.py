import pytest

from gramophone_server.errors import OutOfDeviceMemory
from gramophone_server.scheduling.batch_pool import BatchPool, widths
from gramophone_server.scheduling.task import Task
from gramophone_server.scheduling.throughput import ThroughputModel
from tests.support.clock import ManualClock
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
def test_at_most_a_quarter_of_a_batch_is_empty(jobs, widest, made):
    assert widths(jobs, widest) == made


@pytest.mark.parametrize("jobs", range(1, 70))
@pytest.mark.parametrize("widest", [1, 2, 4, 16])
def test_widths_are_powers_of_two_with_slots_for_all_jobs(jobs, widest):
    made = widths(jobs, widest)
    assert all(width & (width - 1) == 0 and width <= widest for width in made)
    assert sum(made[:-1]) < jobs <= sum(made)
    assert 4 * (sum(made) - jobs) <= made[-1]


def make_pool(engine, throughput=None):
    """A pool on a clock that only the engine moves."""
    engine.clock = clock = ManualClock(reading_s=1e-6)

    def charge(task, seconds):
        task.used_s += seconds

    return BatchPool(engine, ThroughputModel() if throughput is None else throughput, charge, clock=clock)


def assign(pool, tasks, paused_bytes=0):
    """Every job that has the memory joins a batch, in many turns of a worker. Returns the errors of lost ones."""
    failed = plan(pool, tasks, paused_bytes)
    for task in tasks:
        while task not in failed and task.batch is None and pool.fits(pool.needs(task)):
            try:
                pool.begin(task)
            except Exception as error:  # noqa: BLE001 - the test says which it expects
                failed[task] = error
            plan(pool, tasks, paused_bytes)
    return failed


def plan(pool, tasks, paused_bytes=0):
    return pool.plan([task for task in tasks if task.batch is None], paused_bytes)


def run_rounds(pool, tasks, rounds=1):
    """As the worker does: assigns the tasks, then runs one iteration of every batch. Returns (width, tasks) of each."""
    for _ in range(rounds):
        assert assign(pool, tasks) == {}
        for batch in list(pool):
            pool.advance(batch, 1)
    return [(batch.slots, len(batch.tasks)) for batch in pool]


def tasks(jobs, **recipe):
    return [Task(observer=None, state=job_state(iterations=1000, **recipe)) for _ in range(jobs)]


def record(throughput, shape, slots, seconds):
    for _ in range(3):
        throughput.record(shape, slots, 1, seconds)


def test_a_batch_grows_while_it_pays():
    """An iteration takes 1 ms whatever its width, so a batch of eight is eight times faster."""
    pool = make_pool(FakeEngine(iteration_s=0.001))
    assert run_rounds(pool, tasks(8), rounds=24) == [(8, 8)]


def test_a_batch_does_not_grow_where_it_does_not_pay():
    engine, throughput = FakeEngine(), ThroughputModel()
    pool, eight = make_pool(engine, throughput), tasks(8)
    shape = eight[0].state.shape
    record(throughput, shape, 1, 0.01)
    record(throughput, shape, 2, 0.02)
    assert assign(pool, eight) == {}
    assert [batch.slots for batch in pool] == [1] * 8


def test_a_width_that_is_slower_is_given_up():
    engine, throughput = FakeEngine(), ThroughputModel()
    pool, two = make_pool(engine, throughput), tasks(2)
    shape = two[0].state.shape
    record(throughput, shape, 1, 0.01)
    assign(pool, two)
    assert [batch.slots for batch in pool] == [2]  # to measure it
    record(throughput, shape, 2, 0.03)
    assign(pool, two)
    assert [batch.slots for batch in pool] == [1, 1]


def test_long_iterations_are_not_shared():
    engine, throughput = FakeEngine(), ThroughputModel()
    pool, two = make_pool(engine, throughput), tasks(2)
    record(throughput, two[0].state.shape, 1, 0.2)
    assign(pool, two)
    assert [batch.slots for batch in pool] == [1, 1]


def test_jobs_of_different_shapes_have_different_batches_and_move_when_their_scale_ends():
    pool = make_pool(FakeEngine())
    (small,) = tasks(1)
    larger = Task(observer=None, state=job_state(iterations=3, smallest_size=45, coarse_iterations=2))
    both = [small, larger]
    assign(pool, both)
    assert small.batch is not larger.batch
    pool.advance(larger.batch, 5)
    assert larger.state.done == 2 and not larger.state.iterations_left
    pool.detach(larger)
    assign(pool, both)
    assert larger.batch.shape == small.batch.shape and larger.state.scale_index == 1


def test_a_batch_that_is_half_empty_is_rebuilt():
    pool, eight = make_pool(FakeEngine(iteration_s=0.001)), tasks(8)
    run_rounds(pool, eight, rounds=24)
    for task in eight[:3]:
        pool.discard(task)
    left = eight[3:]
    assert run_rounds(pool, left) == [(4, 4), (1, 1)]
    assert len({task.state.done for task in left}) == 1  # no job has lost or missed an iteration


def test_out_of_memory_halves_the_batch_and_loses_no_job():
    engine = FakeEngine(iteration_s=0.001, max_pixels=64 * 32 * 3)
    pool, eight = make_pool(engine), tasks(8)
    assert run_rounds(pool, eight, rounds=12) == [(2, 2)] * 4
    assert all(task.state.done == 12 for task in eight)


def test_out_of_memory_in_a_slice_halves_the_batch_and_loses_no_job():
    engine = FakeEngine(iteration_s=0.001)
    pool, four = make_pool(engine), tasks(4)
    assert run_rounds(pool, four, rounds=16) == [(4, 4)]
    engine.error, engine.fails_at = OutOfDeviceMemory(64, 32), four[0].state.done + 1
    (batch,) = pool
    assert pool.advance(batch, 1) == ({}, {})
    engine.error = None
    assert run_rounds(pool, four, rounds=2) == [(2, 2), (2, 2)]
    assert all(task.state.done == 18 for task in four)


def test_a_job_without_memory_waits_until_another_has_ended():
    engine = FakeEngine(memory_bytes=1100 * 64 * 32 * 2)
    pool, three = make_pool(engine), tasks(3)
    assert assign(pool, three) == {}
    assert [task.batch is None for task in three] == [False, False, True]
    pool.discard(three[0])
    assign(pool, three[1:])
    assert three[2].batch is not None


def test_a_job_that_does_not_fit_alone_fails_alone():
    engine = FakeEngine(max_pixels=64 * 32 - 1)
    pool = make_pool(engine)
    (task,) = tasks(1)
    assert [type(error) for error in assign(pool, [task]).values()] == [OutOfDeviceMemory]


def test_device_time_is_charged_to_the_jobs_that_shared_it():
    pool, two = make_pool(FakeEngine(iteration_s=0.01)), tasks(2)
    run_rounds(pool, two, rounds=4)
    assert two[0].used_s == pytest.approx(two[1].used_s, rel=0.5)
    assert sum(task.used_s for task in two) >= 4 * 0.01


def test_a_batch_is_no_wider_than_the_device_s_memory():
    engine, throughput = FakeEngine(memory_bytes=64 * 32 * 1000), ThroughputModel()
    pool, two = make_pool(engine, throughput), tasks(2)
    record(throughput, two[0].state.shape, 1, 0.001)  # so that a wider one is tried
    assign(pool, two)
    assert [batch.slots for batch in pool] == [1] and two[1].batch is None


@pytest.mark.parametrize("shared", [True, False])
def test_the_memory_of_paused_jobs_counts_where_the_device_has_no_memory_of_its_own(shared):
    engine = FakeEngine(memory_bytes=2200 * 64 * 32, shares_host_memory=shared)
    pool, (one,), (other,) = make_pool(engine), tasks(1), tasks(1, size=60)
    assert assign(pool, [one, other], 64 * 32 * 1000) == {}
    assert one.batch is not None and (other.batch is None) is shared
    assert pool.host_bytes == 64 * 32 * 1000
    assert assign(pool, [one, other]) == {}
    assert other.batch is not None and pool.host_bytes == 0
