"""Jobs that do not fit in the device's memory beside each other, simulated: no time passes."""

import pytest

from gramophone_server.domain.job_state import JobState
from gramophone_server.errors import InvalidRequest, OutOfDeviceMemory
from gramophone_server.scheduling.memory_turns import JOIN_PART, MEMORY_TURN_S
from tests.support.simulation import Device

SMALL = 1000 * 64 * 32  # bytes of the smallest jobs
LARGE = {"size": 256}  # takes 16 times as much


def device(memory=24, **engine):
    """A device with memory for so many of the smallest jobs."""
    return Device(memory_bytes=int(memory * SMALL), pixel_s=0.02 / (64 * 32 * 16), style_pixel_s=0.0, **engine)


def add(device, *tasks):
    for task in tasks:
        device.add(iter([(task, 0.0)]))


@pytest.mark.parametrize("large", [2, 3, 9, 20])
def test_small_jobs_run_beside_large_ones_that_wait_for_memory(large):
    """However many wait, and also if they would take all places of running jobs."""
    one = device(max_running=8)
    add(one, *(one.task("large", 100_000, **LARGE) for _ in range(large)))
    one.run(lambda: False, 30)
    for wait_s in (0, 10, 40):
        one.run(lambda: False, wait_s)
        assert one.seconds(one.task("small", 5), 20) < 2


@pytest.mark.parametrize("owners", [["one", "one"], ["one", "other"]])
def test_two_jobs_that_do_not_fit_beside_each_other_take_turns(owners):
    one = device()
    first, second = (one.task(owner, 100_000, **LARGE) for owner in owners)
    add(one, first, second)
    one.run(lambda: False, 200)
    assert first.used_s == pytest.approx(second.used_s, abs=2 * MEMORY_TURN_S)
    assert min(first.state.done, second.state.done) > 4000
    assert len(one.engine.batches) < 200 / MEMORY_TURN_S + 2


def test_a_turn_is_longer_if_it_takes_long_to_join():
    one = device(join_s=2.0)
    first, second = (one.task("owner", 100_000, **LARGE) for _ in range(2))
    add(one, first, second)
    one.run(lambda: False, 400)
    assert len(one.engine.batches) < 400 / (JOIN_PART * 2.0) + 2
    assert min(first.used_s, second.used_s) > 150


def test_a_large_job_is_not_starved_by_streams_of_medium_ones():
    """There is always a medium job that would take the memory that becomes free."""
    one = device(16.9)

    def medium(n):
        while True:
            yield one.task(f"medium {n}", 10, size=128), 0.0

    for n in range(4):
        one.add(medium(n))
    one.run(lambda: False, 20)
    large = one.task("large", 50, **LARGE)
    add(one, large)
    one.run(lambda: large.ended, 120)
    assert large.observer.end is not None


def test_the_states_of_jobs_that_left_are_bounded():
    """Half of the memory, in the host's; a job that would need more of it waits until another one has ended."""
    one = device(34)
    tasks = [one.task("owner", 2000, **LARGE) for _ in range(6)]
    add(one, *tasks)
    parked = 0
    while not all(task.ended for task in tasks):
        one.run(lambda: False, 1)
        parked = max(parked, sum(task.state.bytes for task in tasks if task.parked))
    assert 0 < parked <= one.engine.memory_bytes // 2
    assert all(task.observer.end.iterations == 2000 for task in tasks)


def test_on_a_device_without_memory_of_its_own_the_states_of_jobs_that_left_take_of_it():
    one = device(16.2, shares_host_memory=True)  # no room for a state beside a large job
    first, second = (one.task("owner", 1000, **LARGE) for _ in range(2))
    add(one, first, second)
    one.run(lambda: first.ended)
    assert not second.state.done and not second.parked and not first.parked
    one.run(lambda: second.ended)
    assert second.observer.end is not None


def test_a_cancelled_job_that_left_frees_its_memory():
    one = device()
    first, second = (one.task("owner", 100_000, **LARGE) for _ in range(2))
    add(one, first, second)
    one.run(lambda: first.parked)
    first.observer.cancelled = True
    one.run(lambda: first.ended, 10)
    one.run(lambda: False, 30)
    assert first.ended and second.batch is not None and len(one.engine.batches) <= 3


def test_a_pause_that_would_keep_too_much_memory_is_refused_and_changes_nothing():
    one = device()
    task = one.task("owner", 100_000, **LARGE)
    add(one, task)
    one.run(lambda: task.state.done)
    with pytest.raises(InvalidRequest) as caught:
        one.worker.pause(task, one.engine.memory_bytes // 2 - 1000)
    needed = one.engine.state_bytes(task.state)
    assert str(caught.value) == (
        f"the job's state takes {needed} bytes, and the server keeps 1000 more beside the device (server setting "
        "GRAMOPHONE_MAX_PARKED_BYTES); take a checkpoint and end this one, or resume or end another paused job"
    )
    assert task.batch is not None
    one.worker.pause(task, 0)
    assert task.batch is None


def test_a_pause_between_two_scales_takes_the_state_off_the_device(monkeypatch):
    moved = []
    monkeypatch.setattr(JobState, "move_to_host", lambda state: moved.append(state))
    one = device()
    task = one.task("owner", 100_000, smallest_size=45, coarse_iterations=3)
    add(one, task)
    one.run(lambda: task.batch is None and task.state.done == 3)
    with pytest.raises(
        InvalidRequest, match=f"the job's state takes {task.state.bytes} bytes, and the server keeps 9 "
    ):
        one.worker.pause(task, one.worker.max_parked_bytes - 9)
    assert task.state.bytes and not moved
    one.worker.pause(task, 0)
    assert moved == [task.state]


def test_memory_that_runs_out_although_the_estimate_allows_it_lets_jobs_take_turns():
    one = device(1000, max_pixels=256 * 128)
    original, engine = one.engine.batch, one.engine

    def batch(shape, slots):
        """One batch at a time fits."""
        if sum(not batch.closed for batch in engine.batches):
            raise OutOfDeviceMemory(shape.width, shape.height)
        return original(shape, slots)

    engine.batch = batch
    first, second = one.task("one", 100_000, **LARGE), one.task("other", 100_000, size=250)
    add(one, first, second)
    one.run(lambda: False, 100)
    assert min(first.used_s, second.used_s) > 30


def test_a_task_without_memory_takes_no_place():
    one = device()
    first, second = (one.task("owner", 100_000, **LARGE) for _ in range(2))
    assert one.worker.memory.startable([first, second], 2, []) == [first]
    assert second.memory_short and not first.memory_short
