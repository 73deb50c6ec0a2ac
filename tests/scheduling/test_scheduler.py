import asyncio
import contextlib
import itertools
import re
import threading
import time

import pytest
import torch

from gramophone_server.config import Limits
from gramophone_server.domain.commands import Pause, TakeCheckpoint, TakePicture
from gramophone_server.domain.events import Accepted, Finished, Frame, Progress, StopReason, Waiting
from gramophone_server.errors import (
    DeadlineUnattainable,
    Diverged,
    EngineFailed,
    InvalidRequest,
    NotReady,
    OutOfDeviceMemory,
    QueueFull,
    ShuttingDown,
    StartupError,
)
from gramophone_server.jobs.mailbox import FrameRule
from gramophone_server.scheduling import memory_turns
from gramophone_server.scheduling.scheduler import Scheduler
from gramophone_server.scheduling.throughput import ThroughputModel
from gramophone_server.scheduling.waiting_queue import WaitingQueue
from tests.support.clock import WITHIN_S, ManualClock, until
from tests.support.engines import FakeBatch, FakeEngine
from tests.support.schedulers import kinds, scheduling, submit
from tests.support.specs import job_state


async def test_a_job_is_accepted_reported_and_finished():
    async with scheduling(FakeEngine()) as scheduler:
        job = submit(scheduler, job_state(iterations=4, smallest_size=45, coarse_iterations=2))
        events = [event async for event in job.events()]
    numbers = [number for number, _ in events]
    assert numbers == sorted(set(numbers))
    assert events[0][1] == Accepted(position=0, wait_s=0.0)
    finished = events[-1][1]
    assert isinstance(finished, Finished)
    assert (finished.iterations, finished.picture.wait().shape) == (6, (32, 64, 3))
    assert finished.losses.total == pytest.approx(1 / 6 + 3 / 6 + 0.5)
    assert finished.elapsed_s > 0
    assert all(isinstance(event, Progress) for _, event in events[1:-1])


async def test_the_engine_loads_and_runs_on_the_compute_thread():
    engine, loaded_on = FakeEngine(), []

    def load():
        loaded_on.append(threading.current_thread().name)
        return engine

    scheduler = Scheduler(load, Limits())
    with pytest.raises(NotReady, match="still loading"):
        scheduler.reserve()
    scheduler.start()
    assert await scheduler.ready() is engine
    await kinds(submit(scheduler))
    assert loaded_on == [engine.thread] == ["compute"]
    scheduler.stop()


async def test_a_failed_start_is_raised_by_ready():
    def load():
        raise StartupError("the weights file is damaged")

    scheduler = Scheduler(load, Limits())
    scheduler.start()
    with pytest.raises(StartupError, match="damaged"):
        await scheduler.ready()
    with pytest.raises(NotReady):
        scheduler.reserve()


async def test_speed_and_time_left_are_measured():
    async with scheduling(FakeEngine(iteration_s=0.01)) as scheduler:
        progress = [e async for _, e in submit(scheduler, job_state(10)).events() if isinstance(e, Progress)]
    last = progress[-1]
    assert 1 < last.iterations_per_second <= 100
    assert last.time_left_s == 0
    middle = progress[len(progress) // 2]
    left = middle.report.iterations - middle.report.iteration
    assert middle.time_left_s == pytest.approx(left / middle.iterations_per_second)


async def test_jobs_wait_in_order_and_the_queue_is_bounded():
    engine = FakeEngine()
    engine.go.clear()
    async with scheduling(engine, max_queued=2) as scheduler:
        jobs = [submit(scheduler)]
        await until(engine.under_way.is_set)
        jobs += [submit(scheduler) for _ in range(2)]
        assert (scheduler.running, scheduler.queued) == (1, 2)
        with pytest.raises(QueueFull, match="queue is full: 2 waiting, limit 2; retry after about 5 s"):
            scheduler.reserve()
        engine.go.set()
        positions = [[e.position async for _, e in job.events() if isinstance(e, Accepted)] for job in jobs]
        assert positions == [[0], [1], [2]]
        await until(lambda: scheduler.queued == scheduler.running == 0)
        assert engine.joined == [job.state for job in jobs]


async def test_waiting_jobs_receive_their_positions_when_these_change():
    engine = FakeEngine(iteration_s=0.05)  # so that jobs take longer than the time between two reports
    engine.go.clear()
    async with scheduling(engine) as scheduler:
        first = submit(scheduler)
        await until(engine.under_way.is_set)
        second, third, fourth = (submit(scheduler) for _ in range(3))
        second.cancel()
        assert [job.observer.position for job in (third, fourth)] == [1, 2]
        events = fourth.events()
        assert [(await anext(events))[1] for _ in range(2)] == [Accepted(3, None), Waiting(2, None)]
        engine.go.set()
        assert (await kinds(first))[-1] == (await kinds(third))[-1] == "Finished"
        (_, moved_up), *rest = [item async for item in events]
        assert moved_up.position == 1
        # At its start it has no position in the queue.
        assert not [event for _, event in rest if isinstance(event, Waiting)]


async def test_an_unused_place_is_given_back():
    async with scheduling(FakeEngine(), max_queued=0) as scheduler:
        reservation = scheduler.reserve()
        with pytest.raises(QueueFull):
            scheduler.reserve()
        scheduler.release(reservation)
        scheduler.release(reservation)  # has no effect
        await kinds(submit(scheduler))


async def test_a_used_place_is_not_given_back_before_its_job_has_ended():
    engine = FakeEngine()
    engine.go.clear()
    async with scheduling(engine, max_queued=0) as scheduler:
        reservation = scheduler.reserve()
        submit(scheduler, reservation=reservation)
        scheduler.release(reservation)
        assert scheduler.running + scheduler.queued == 1
        with pytest.raises(QueueFull):
            scheduler.reserve()


async def test_the_retry_estimate_is_the_time_that_the_running_job_still_needs():
    engine = FakeEngine(iteration_s=0.02)
    async with scheduling(engine, max_queued=0) as scheduler:
        job = submit(scheduler, job_state(iterations=1000))
        async for _, event in job.events():
            if isinstance(event, Progress) and event.report.iteration >= 3:
                break
        with pytest.raises(QueueFull) as caught:
            scheduler.reserve()
        assert caught.value.retry_after_s > 900 * 0.02  # a busy machine needs longer for its 997 iterations
        job.cancel()


async def test_measurements_go_to_the_model_that_was_given_even_if_it_is_empty():
    throughput = ThroughputModel()
    async with scheduling(FakeEngine(), throughput=throughput) as scheduler:
        assert "Finished" in await kinds(submit(scheduler))
        assert len(throughput) == 1


async def test_forecasts_include_jobs_whose_images_are_being_decoded():
    engine = FakeEngine()
    engine.go.clear()
    job = job_state(iterations=10)
    throughput = ThroughputModel()
    for _ in range(2):
        throughput.record(job.shape, 1, 1, 1.0)  # an iteration takes 1 s
    async with scheduling(engine, throughput=throughput) as scheduler:
        first, second = scheduler.reserve(), scheduler.reserve()
        scheduler.require_time(first, job, 15)
        with pytest.raises(DeadlineUnattainable) as caught:
            scheduler.require_time(second, job, 15)
        assert re.match(
            r"the job would need at least 19\.\d s: 9\.\d+ s until its turn, 9\.\d+ s for", str(caught.value)
        )
        scheduler.require_time(second, job, 25)
        assert scheduler.estimated_wait_s() == pytest.approx(20)
        submit(scheduler, job, reservation=first)
        assert scheduler.estimated_wait_s() == pytest.approx(20)  # each is counted once
        scheduler.release(second)
        assert scheduler.estimated_wait_s() == pytest.approx(10)


def require_time(scheduler, *asked):
    """For a job that is not submitted."""
    reservation = scheduler.reserve()
    try:
        scheduler.require_time(reservation, *asked)
    finally:
        scheduler.release(reservation)


async def test_a_deadline_that_cannot_be_met_is_refused_with_the_times():
    engine = FakeEngine(iteration_s=0.01)
    async with scheduling(engine) as scheduler:
        require_time(scheduler, job_state(10**5), 0.1)  # nothing was measured, so it is accepted
        await kinds(submit(scheduler, job_state(50)))
        require_time(scheduler, job_state(1000), 10**6)
        with pytest.raises(DeadlineUnattainable) as alone:
            require_time(scheduler, job_state(1000), 5)
        told = re.search(r"(\d+\.\d) s for its iterations, .* call ends in 5\.00 s", str(alone.value))
        assert told and float(told[1]) > 9  # 10 s, less the uncertainty; a busy machine needs more
        assert alone.value.retry_after_s is None  # it takes 10 s by itself
        require_time(scheduler, job_state(1000, time_budget=3.0), 5)  # its time budget ends it before

        long = submit(scheduler, job_state(100_000))
        await until(lambda: long.state.done)
        with pytest.raises(DeadlineUnattainable) as caught:  # however short it is
            require_time(scheduler, job_state(1, time_budget=0.5), 60)
        assert caught.value.retry_after_s > 500
        long.cancel()


async def test_a_job_that_does_not_fit_alone_is_refused_and_takes_no_place():
    engine = FakeEngine(memory_bytes=1000 * 64 * 32)
    async with scheduling(engine) as scheduler:
        scheduler.require_memory(job_state().shape)
        with pytest.raises(OutOfDeviceMemory, match="too little memory for a 128x64 picture"):
            scheduler.require_memory(job_state(size=128).shape)
        assert scheduler.queued == 0


async def test_a_job_with_an_earlier_deadline_starts_before_jobs_that_came_earlier():
    engine = FakeEngine()
    async with scheduling(engine, max_running=1) as scheduler:
        await kinds(submit(scheduler))  # so that a speed is measured
        engine.go.clear()
        engine.under_way.clear()
        running = submit(scheduler)
        await until(engine.under_way.is_set)
        now = time.monotonic()
        patient, late, early = (submit(scheduler, deadline_at=at) for at in (None, now + 60, now + 30))
        engine.go.set()
        for job in (running, patient, late, early):
            assert (await kinds(job))[-1] == "Finished"
    assert engine.joined[1:] == [job.state for job in (running, early, late, patient)]


async def test_cancel_stops_a_running_job_within_an_iteration():
    engine = FakeEngine()
    engine.go.clear()
    async with scheduling(engine) as scheduler:
        job = submit(scheduler, job_state(iterations=1000))
        await until(engine.under_way.is_set)
        job.cancel()
        engine.go.set()
        await until(lambda: scheduler.running == 0)
        assert engine.iterations == 1
        assert (await kinds(submit(scheduler)))[-1] == "Finished"


async def test_cancel_takes_a_waiting_job_out_of_the_queue():
    engine = FakeEngine()
    engine.go.clear()
    async with scheduling(engine, max_queued=1) as scheduler:
        running = submit(scheduler)
        await until(engine.under_way.is_set)
        waiting = submit(scheduler)
        waiting.cancel()
        waiting.cancel()  # has no effect
        third = submit(scheduler)  # takes its place
        engine.go.set()
        assert (await kinds(running))[-1] == (await kinds(third))[-1] == "Finished"
        assert engine.joined == [running.state, third.state]
        running.cancel()  # after its end: nothing
        assert scheduler.queued == 0


async def test_a_slow_reader_gets_the_newest_and_never_slows_the_engine():
    engine = FakeEngine()
    async with scheduling(engine) as scheduler:
        job = submit(scheduler, job_state(iterations=500), FrameRule())
        await until(lambda: scheduler.running == 0 and engine.iterations == 500)  # without a single read
        events = [event async for _, event in job.events()]
    assert [type(e) for e in events] == [Accepted, Frame, Progress, Finished]
    assert events[2].report.iteration == 500
    assert len(engine.taken_at) == 2  # one frame and the result: no frame was taken without room for it


async def test_frames_come_at_their_iterations_and_not_more_often_than_their_interval():
    engine = FakeEngine(iteration_s=0.002)
    async with scheduling(engine) as scheduler:
        job = submit(scheduler, job_state(iterations=200), FrameRule(every_iterations=7, min_interval_s=0.0))
        frames = [event async for _, event in job.events() if isinstance(event, Frame)]
    assert len(frames) >= 2
    assert all(frame.iteration % 7 == 0 for frame in frames)
    assert all(int(frame.picture.wait()[0, 0, 0]) == min(255, frame.iteration) for frame in frames)
    *taken_at, _result = engine.taken_at
    # The interval is 100 ms, but a thread can lose its core for a while.
    assert all(b - a > 0.05 for a, b in itertools.pairwise(taken_at))


async def test_no_frames_unless_asked_for():
    engine = FakeEngine()
    async with scheduling(engine) as scheduler:
        assert "Frame" not in await kinds(submit(scheduler, job_state(iterations=50)))
    assert len(engine.taken_at) == 1


async def test_a_diverged_job_sends_its_last_good_picture_first():
    engine = FakeEngine(fails_at=3, error=Diverged(iteration=3))
    async with scheduling(engine) as scheduler:
        job, events = submit(scheduler), []
        with pytest.raises(Diverged, match="became NaN or infinite at iteration 3"):
            async for _, event in job.events():
                events.append(event)
        assert isinstance(events[-1], Frame)
        assert events[-1].iteration == 2 == int(events[-1].picture.wait()[0, 0, 0])


@pytest.mark.parametrize(
    ("raised", "expected", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfDeviceMemory, "too little memory for a 64x32 picture"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), OutOfDeviceMemory, "64x32"),
        (MemoryError(), OutOfDeviceMemory, "64x32"),
        (OutOfDeviceMemory(9, 9), OutOfDeviceMemory, "9x9"),
        (ZeroDivisionError("secret"), EngineFailed, "the server failed while working on this job"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_a_failure_ends_its_job_only(raised, expected, words):
    engine = FakeEngine(fails_at=2, error=raised)
    async with scheduling(engine) as scheduler:
        with pytest.raises(expected, match=words) as caught:
            await kinds(submit(scheduler))
        assert caught.value.__cause__ is None and caught.value.__context__ is None
        assert "secret" not in str(caught.value)
        engine.error = None
        assert (await kinds(submit(scheduler)))[-1] == "Finished"


async def test_a_failed_job_frees_what_its_batch_held():
    """An unread error must not keep the batch alive through its traceback."""
    freed = threading.Event()

    class Held(FakeEngine):
        def batch(self, shape, slots):
            batch = super().batch(shape, slots)
            self.batches.clear()
            batch.held = type("Memory", (), {"__del__": lambda self: freed.set()})()
            return batch

    engine = Held(fails_at=2, error=Diverged(iteration=2))
    async with scheduling(engine) as scheduler:
        job = submit(scheduler)
        await until(freed.is_set)
        with pytest.raises(Diverged):
            await kinds(job)


async def test_drain_lets_running_and_queued_jobs_end_and_refuses_new_ones():
    engine = FakeEngine()
    engine.go.clear()
    async with scheduling(engine) as scheduler:
        jobs = [submit(scheduler), submit(scheduler)]
        reserved = scheduler.reserve()  # its images are still being decoded
        drain = asyncio.create_task(scheduler.drain(within_s=5))
        await asyncio.sleep(0)
        with pytest.raises(ShuttingDown, match="takes no new jobs"):
            scheduler.reserve()
        jobs.append(submit(scheduler, reservation=reserved))
        engine.go.set()
        await drain
        for job in jobs:
            assert (await kinds(job))[-1] == "Finished"


async def test_after_the_drain_time_jobs_end_within_an_iteration():
    engine = FakeEngine()
    engine.go.clear()
    async with scheduling(engine) as scheduler:
        running, queued = submit(scheduler, job_state(iterations=10_000)), submit(scheduler)
        await until(engine.under_way.is_set)
        reserved = scheduler.reserve()
        await scheduler.drain(within_s=0.01)
        scheduler.stop()
        engine.go.set()
        for job in (running, queued):
            with pytest.raises(ShuttingDown):
                await kinds(job)
        with pytest.raises(ShuttingDown):
            submit(scheduler, reservation=reserved)
        assert engine.iterations == 1


async def test_a_drain_does_not_wait_for_a_paused_job():
    async with scheduling(FakeEngine(iteration_s=0.005)) as scheduler:
        job = submit(scheduler, job_state(iterations=100_000))
        await until(lambda: job.state.done)
        draining = asyncio.create_task(scheduler.drain(60))
        await asyncio.sleep(0)  # the drain has started
        await scheduler.command(job.observer, Pause())
        await asyncio.wait_for(draining, 5)


async def test_a_pause_does_not_outlast_a_time_budget():
    async with scheduling(FakeEngine(iteration_s=0.005), max_running=2) as scheduler:
        job = submit(scheduler, job_state(iterations=100_000, time_budget=2.0))
        await until(lambda: job.state.done)
        await scheduler.command(job.observer, Pause())
        done, started_at = job.state.done, time.monotonic()
        finished = [event async for _, event in job.events()][-1]
        assert time.monotonic() - started_at < 20  # a pause may last 600 s
        assert (finished.reason, finished.iterations) == (StopReason.TIME_BUDGET, done)
        await until(lambda: scheduler.paused == scheduler.running == scheduler.queued == 0)


async def test_a_defect_on_the_compute_thread_ends_every_job_and_is_logged(monkeypatch, caplog):
    async with scheduling(FakeEngine(iteration_s=0.005)) as scheduler:
        running, queued = submit(scheduler, job_state(iterations=100_000)), submit(scheduler)
        await until(lambda: running.state.done)
        monkeypatch.setattr(WaitingQueue, "report_positions", None)
        await asyncio.wait_for(scheduler.ended(), 5)
        for job in (running, queued):
            with pytest.raises(ShuttingDown):
                await kinds(job)
        with pytest.raises(ShuttingDown):
            scheduler.reserve()
    assert "the compute thread has ended by a defect" in caplog.text


async def test_a_lost_device_ends_all_jobs_and_new_ones_are_refused(caplog):
    engine = FakeEngine(fails_at=5, error=RuntimeError("an illegal memory access was encountered"), iteration_s=0.001)
    async with scheduling(engine, max_running=2) as scheduler:
        other = submit(scheduler, job_state(iterations=4, size=60))
        await kinds(other)
        engine.device_error = engine.error
        broken, waiting = (
            submit(scheduler, job_state(iterations=10)),
            submit(scheduler, job_state(iterations=4, size=62)),
        )
        with pytest.raises(EngineFailed):
            await kinds(broken)
        with contextlib.suppress(ShuttingDown):  # it may have finished before
            await kinds(waiting)
        await asyncio.wait_for(scheduler.ended(), 5)
        with pytest.raises(ShuttingDown):
            scheduler.reserve()
    assert "the device fails at an addition" in caplog.text


async def test_the_commands_of_one_owner_alternate_with_the_turns_of_the_others(monkeypatch):
    """Each copies a state for longer than a slice."""
    clock, slices = ManualClock(), []
    engine = FakeEngine(iteration_s=0.005, clock=clock)
    original_copy = FakeBatch.copy

    def copy(batch, slot):
        slices.append(len(engine.slices))
        clock.sleep(0.03)
        return original_copy(batch, slot)

    monkeypatch.setattr(FakeBatch, "copy", copy)
    async with scheduling(engine, max_running=2, clock=clock) as scheduler:
        job, other = (submit(scheduler, job_state(100_000, size=size)) for size in (64, 60))
        await until(lambda: job.state.done and other.state.done)
        engine.go.clear()
        commands = [scheduler.command(job.observer, TakeCheckpoint(light=False)) for _ in range(10)]
        engine.go.set()
        await asyncio.gather(*commands)
        job.cancel()
        other.cancel()
    assert len(slices) == 10 and all(after > before for before, after in itertools.pairwise(slices))


async def test_commands_without_end_leave_other_owners_their_part_of_the_device(monkeypatch):
    """Each takes 25 ms, as a state of 64 MiB to be copied. Five owners have a fifth of the device each."""
    clock = ManualClock()
    original_snapshot = FakeBatch.snapshot

    def snapshot(batch, slot):
        clock.sleep(0.025)
        return original_snapshot(batch, slot)

    monkeypatch.setattr(FakeBatch, "snapshot", snapshot)
    engine = FakeEngine(iteration_s=0.002, clock=clock)
    async with scheduling(engine, max_running=8, clock=clock) as scheduler:
        flooded = submit(scheduler, job_state(100_000), owner="flooding")
        others = [submit(scheduler, job_state(100_000, size=32 + 2 * n), owner=f"owner {n}") for n in range(4)]
        await until(lambda: all(job.state.done for job in (flooded, *others)))
        engine.go.clear()
        engine.under_way.clear()
        await until(engine.under_way.is_set)
        started_at, before = clock.now, [job.state.done for job in others]
        commands = [scheduler.command(flooded.observer, TakePicture()) for _ in range(100)]
        engine.go.set()
        await asyncio.gather(*commands)
        done = [job.state.done - count for job, count in zip(others, before, strict=True)]
        device_s = clock.now - started_at
        for job in (flooded, *others):
            job.cancel()
    assert sum(done) * engine.iteration_s > 0.9 * 4 / 5 * device_s


async def test_a_command_is_executed_for_nobody_who_has_left():
    engine = FakeEngine(iteration_s=0.002)
    async with scheduling(engine) as scheduler:
        job = submit(scheduler, job_state(100_000))
        await until(lambda: job.state.done)
        engine.go.clear()
        engine.under_way.clear()
        await until(engine.under_way.is_set)
        for _ in range(1000):
            scheduler.command(job.observer, TakePicture()).cancel()
        kept = scheduler.command(job.observer, TakeCheckpoint(light=False))
        await asyncio.sleep(0)  # what was cancelled is told
        assert scheduler.pending_commands == 1
        engine.go.set()
        await kept
        assert engine.taken_at == []
        job.cancel()


async def test_a_command_of_a_job_that_has_ended_is_refused():
    async with scheduling(FakeEngine()) as scheduler:
        job = submit(scheduler)
        await kinds(job)
        await until(lambda: not scheduler.running)
        with pytest.raises(InvalidRequest, match="the job has ended"):
            await scheduler.command(job.observer, Pause())
        assert scheduler.pending_commands == 0


async def test_a_job_that_waits_for_memory_has_a_position_though_places_are_free():
    engine = FakeEngine(iteration_s=0.002, memory_bytes=1500 * 64 * 32)
    engine.go.clear()
    async with scheduling(engine, max_running=4) as scheduler:
        first = submit(scheduler, job_state(100_000))
        await until(engine.under_way.is_set)
        second, small = submit(scheduler, job_state(10, size=60)), submit(scheduler, job_state(10, size=16))
        accepted = [(await anext(one.events()))[1].position for one in (first, second, small)]
        assert accepted == [0, 1, 0]
        engine.go.set()
        assert (await kinds(small))[-1] == "Finished"
        assert not second.state.done
        first.cancel()
        assert (await kinds(second))[-1] == "Finished"


async def test_jobs_that_wait_for_memory_are_told_their_place_among_them_and_no_time():
    engine = FakeEngine(iteration_s=0.002, memory_bytes=1500 * 64 * 32)
    async with scheduling(engine, max_running=8) as scheduler:
        first = submit(scheduler, job_state(100_000))
        await until(lambda: scheduler.estimated_wait_s() is not None)
        engine.go.clear()
        await until(engine.under_way.is_set)
        large = [submit(scheduler, job_state(10, size=60)) for _ in range(3)]
        small = submit(scheduler, job_state(10, size=16))
        accepted = [(await anext(one.events()))[1] for one in (*large, small)]
        assert [(event.position, event.wait_s) for event in accepted] == [(1, None), (2, None), (3, None), (0, 0.0)]
        engine.go.set()
        first.cancel()
        for one in large:
            assert (await kinds(one))[-1] == "Finished"


async def test_states_that_have_left_the_device_leave_less_room_for_paused_ones(monkeypatch):
    monkeypatch.setattr(memory_turns, "MEMORY_TURN_S", 0.05)
    engine = FakeEngine(iteration_s=0.002, memory_bytes=1500 * 64 * 32)
    one_state = engine.state_bytes(job_state())
    async with scheduling(engine, max_running=2, max_parked_bytes=2 * one_state) as scheduler:
        jobs = [submit(scheduler, job_state(100_000)) for _ in range(2)]
        await until(lambda: scheduler.parked_bytes and all(job.state.done for job in jobs))
        monkeypatch.setattr(memory_turns, "MEMORY_TURN_S", 100.0)
        await until(lambda: scheduler.parked_bytes == one_state)
        (running,) = (job for job in jobs if job.state.tensors is None)
        (parked,) = (job for job in jobs if job is not running)
        with pytest.raises(InvalidRequest, match=f"keeps {one_state // 2} more beside the device"):
            await scheduler.command(running.observer, Pause())
        parked.cancel()
        await until(lambda: not scheduler.parked_bytes)
        await scheduler.command(running.observer, Pause())
        running.cancel()


async def test_one_owner_leaves_others_a_part_of_the_queue():
    engine = FakeEngine()
    async with scheduling(engine, max_running=4, max_queued=36) as scheduler:
        taken = [scheduler.reserve("one") for _ in range(35)]
        with pytest.raises(QueueFull, match="this connection has 35 jobs, and the rest of the queue is for others: 35"):
            scheduler.reserve("one")
        taken += [scheduler.reserve("two") for _ in range(5)]
        with pytest.raises(QueueFull, match="queue is full: 40 waiting, limit 36"):
            scheduler.reserve("three")
        scheduler.release(taken.pop())
        with pytest.raises(QueueFull, match="this connection has 35 jobs"):
            scheduler.reserve("one")
        scheduler.reserve("three")


async def test_the_last_places_are_left_by_each_owner_in_turn():
    async with scheduling(FakeEngine(), max_running=16, max_queued=64) as scheduler:
        numbers = []
        for owner in range(8):
            with contextlib.suppress(QueueFull):
                for number in itertools.count(1):
                    scheduler.reserve(f"owner {owner}")
                    numbers[owner:] = [number]
        assert numbers == [70, 9, 1]


async def test_drain_of_an_idle_scheduler_is_immediate():
    async with scheduling(FakeEngine()) as scheduler, asyncio.timeout(1):
        await scheduler.drain(within_s=30)


async def test_a_defect_of_ours_ends_the_running_jobs_and_no_later_one(caplog):
    """`begin` never raises. An error where none is expected must not end the compute thread."""
    engine = FakeEngine()
    engine.begin = broken = lambda state: 1 // 0
    async with scheduling(engine, max_running=2) as scheduler:
        for job in [submit(scheduler), submit(scheduler)]:
            with pytest.raises(EngineFailed):
                await kinds(job)
        assert engine.begin is broken and "ZeroDivisionError" in caplog.text
        del engine.begin
        assert (await kinds(submit(scheduler)))[-1] == "Finished"
        await until(lambda: scheduler.running == scheduler.queued == 0)


async def test_a_job_that_is_cancelled_while_it_is_being_paused_frees_its_place(monkeypatch):
    """Its tensors take a while to copy. It must not stay paused for ten minutes, since no client can resume it."""
    engine, loop = FakeEngine(iteration_s=0.001), asyncio.get_running_loop()
    async with scheduling(engine) as scheduler:
        job = submit(scheduler, job_state(iterations=100_000))
        cancelled = threading.Event()
        original_leave = FakeBatch.leave

        def cancel():
            job.cancel()
            cancelled.set()

        def leave(batch, slot, **options):
            loop.call_soon_threadsafe(cancel)
            assert cancelled.wait(WITHIN_S)
            return original_leave(batch, slot, **options)

        monkeypatch.setattr(FakeBatch, "leave", leave)
        await until(engine.under_way.is_set)
        await scheduler.command(job.observer, Pause())
        await until(lambda: scheduler.running + scheduler.paused + scheduler.queued == 0)
