"""The compute thread with the places of jobs: who gives one up, and what becomes of it."""

import functools
import time

import pytest
import torch

from gramophone_server.domain.commands import Finish, Pause
from gramophone_server.domain.events import Finished, StopReason, Waiting
from gramophone_server.errors import EngineFailed
from gramophone_server.jobs.job import JobPhase
from gramophone_server.scheduling import memory_turns, task
from gramophone_server.scheduling.scheduler import Scheduler
from tests.support import schedulers
from tests.support.clock import until
from tests.support.engines import FakeBatch, FakeEngine
from tests.support.schedulers import kinds, scheduling, submit
from tests.support.specs import job_state


@pytest.fixture(autouse=True)
def no_job_is_short(monkeypatch):
    """So that jobs of a second give their places up."""
    monkeypatch.setattr(task, "SHORT_S", 0.0)


async def test_no_job_waits_for_places_that_another_owner_keeps():
    engine = FakeEngine(iteration_s=0.02)
    async with scheduling(engine, max_running=2) as scheduler:
        long = [submit(scheduler, job_state(400), owner="one") for _ in range(2)]
        await until(lambda: all(job.state.done for job in long))
        short = submit(scheduler, job_state(5), owner="other")
        events = [event async for _, event in short.events()]
        assert events[0].position == 0 and isinstance(events[-1], Finished)
        assert max(job.state.done for job in long) < 400
        engine.iteration_s = 0.0
        displaced = [[event async for _, event in job.events()] for job in long]
    # The one that gave its place up was told, and both end with the pictures of jobs that were never interrupted.
    assert sorted(sum(isinstance(event, Waiting) for event in events) for events in displaced) == [0, 1]
    assert [events[-1].iterations for events in displaced] == [400, 400]
    assert torch.equal(*(events[-1].picture.wait() for events in displaced))


async def test_a_job_keeps_its_place_if_the_host_has_no_room_for_its_state():
    engine = FakeEngine(iteration_s=0.002)
    async with scheduling(engine, max_running=2, max_parked_bytes=0) as scheduler:
        long = [submit(scheduler, job_state(50), owner="one") for _ in range(2)]
        await until(lambda: all(job.state.done for job in long))
        short = submit(scheduler, job_state(5), owner="other")
        for job in long:
            assert "Waiting" not in await kinds(job) and job.state.done == 50
        assert (await kinds(short))[-1] == "Finished"


async def two_long_jobs(scheduler, **recipe):
    """Of one owner, who so has both places."""
    jobs = [submit(scheduler, job_state(100_000, **recipe), owner="one") for _ in range(2)]
    await until(lambda: all(job.state.done for job in jobs))
    return jobs


async def test_a_job_that_cannot_leave_its_place_fails_alone(monkeypatch, caplog):
    engine, leave = FakeEngine(iteration_s=0.002), FakeBatch.leave

    def fail(batch, slot, *, to_host=False):
        if to_host:
            raise RuntimeError("the allocator is broken")
        return leave(batch, slot)

    async with scheduling(engine, max_running=2) as scheduler:
        jobs = await two_long_jobs(scheduler)
        monkeypatch.setattr(FakeBatch, "leave", fail)
        for _ in range(50):  # one that is in no batch at the moment leaves nothing
            if not any(job.observer.ended for job in jobs):
                assert (await kinds(submit(scheduler, owner="other")))[-1] == "Finished"
        failed = [job for job in jobs if job.observer.ended]
        assert len(failed) == 1
        with pytest.raises(EngineFailed):
            await kinds(failed[0])
        for job in jobs:
            job.cancel()
    assert "the allocator is broken" in caplog.text


async def test_a_job_that_is_cancelled_when_it_leaves_its_place_does_not_wait_again():
    engine = FakeEngine(iteration_s=0.002)
    async with scheduling(engine, max_running=2) as scheduler:
        jobs = await two_long_jobs(scheduler)
        engine.go.clear()
        engine.under_way.clear()
        await until(engine.under_way.is_set)  # the exchange comes before the step that ends cancelled jobs
        other = submit(scheduler, owner="other")
        for job in jobs:
            job.cancel()
        engine.go.set()
        assert (await kinds(other))[-1] == "Finished"
        await until(lambda: not scheduler.running)
        assert scheduler.queued == 0


async def test_a_time_budget_ends_a_job_that_has_given_its_place_up(monkeypatch):
    engine, passed_s = FakeEngine(iteration_s=0.002), [0.0]
    clocked = functools.partial(Scheduler, clock=lambda: time.monotonic() + passed_s[0])
    monkeypatch.setattr(schedulers, "Scheduler", clocked)
    async with scheduling(engine, max_running=2) as scheduler:
        jobs = await two_long_jobs(scheduler, time_budget=60.0)
        engine.go.clear()
        engine.under_way.clear()
        await until(engine.under_way.is_set)
        # The deadline puts the third owner's job before that which leaves: it gets the place of the one that ends.
        others = [
            submit(scheduler, job_state(100_000), owner=owner, deadline_at=time.monotonic() + 60)
            for owner in ("other", "third")
        ]
        engine.go.set()
        await until(lambda: any(job.observer.phase is JobPhase.QUEUED for job in jobs))
        passed_s[0] = 60.0
        events = [[event async for _, event in job.events()] for job in jobs]
        assert any(isinstance(event, Waiting) for event in (*events[0], *events[1]))
        assert [each[-1].reason for each in events] == [StopReason.TIME_BUDGET] * 2
        for job in others:
            job.cancel()


async def test_a_job_that_has_given_its_place_up_can_be_paused():
    engine = FakeEngine(iteration_s=0.002)
    room = 1.5 * engine.state_bytes(job_state())  # a quarter of it is left free by pauses
    async with scheduling(engine, max_running=2, max_parked_bytes=int(room)) as scheduler:
        jobs = await two_long_jobs(scheduler)
        other = submit(scheduler, job_state(100_000), owner="other")
        await until(lambda: any(job.observer.phase is JobPhase.QUEUED for job in jobs))
        (away,) = (job for job in jobs if job.observer.phase is JobPhase.QUEUED)
        await scheduler.command(away.observer, Pause())
        assert away.observer.phase is JobPhase.PAUSED
        for job in (*jobs, other):
            job.cancel()


async def test_of_two_jobs_that_one_leaves_for_whose_state_the_host_has_room():
    engine = FakeEngine(iteration_s=0.002)
    small, large = job_state(100_000, size=32), job_state(100_000, size=128)
    async with scheduling(engine, max_running=2, max_parked_bytes=2 * engine.state_bytes(small)) as scheduler:
        jobs = [submit(scheduler, state, owner="one") for state in (large, small)]
        await until(lambda: all(job.state.done for job in jobs))
        assert (await kinds(submit(scheduler, owner="other")))[-1] == "Finished"
        for job in jobs:
            await scheduler.command(job.observer, Finish())
        assert ["Waiting" in await kinds(job) for job in jobs] == [False, True]


async def test_a_newcomer_gets_a_place_and_memory_though_others_have_all_of_both(monkeypatch):
    monkeypatch.setattr(memory_turns, "MEMORY_TURN_S", 0.05)
    engine = FakeEngine(iteration_s=0.002, memory_bytes=2000 * 64 * 32)  # of two jobs
    async with scheduling(engine, max_running=2) as scheduler:
        jobs = await two_long_jobs(scheduler)
        assert (await kinds(submit(scheduler, owner="other")))[-1] == "Finished"
        for job in jobs:
            job.cancel()
