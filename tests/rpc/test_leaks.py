"""Large numbers of finished, abandoned, cancelled and forgotten jobs leave nothing."""

import asyncio
import gc
import os
import random
import threading
from collections import Counter

import grpc
import pytest

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.config import Limits
from gramophone_server.domain.job_state import JobState
from gramophone_server.jobs.job import Job
from gramophone_server.jobs.mailbox import Mailbox
from gramophone_server.rpc.calls import RpcCall
from gramophone_server.scheduling.worker import Task
from tests.support.clock import until
from tests.support.engines import FakeEngine
from tests.support.serving import own_tasks, remaining_events, serving
from tests.support.specs import SHORT_GRACE, detachable_spec, spec

MIB = 2**20


@pytest.fixture
def earlier_objects_ignored():
    """Ignores objects of earlier tests: `gc.get_objects` does not list frozen objects."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def alive():
    """The numbers of objects of a job, by class."""
    gc.collect()
    kinds = (Job, Mailbox, Task, JobState, RpcCall)
    # `isinstance` would load lazy modules.
    return Counter(type(thing).__name__ for thing in gc.get_objects() if type(thing) in kinds)


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def one(s, number, chance):
    """Runs a job. Odd numbers run to their end. Of the even ones, multiples of 3 are cancelled and the others are left,
    at a random time: multiples of 4 before their end on any machine, the rest before or after it."""
    leaves, cancels = number % 2 == 0, number % 6 == 0
    iterations = 5000 if number % 4 == 0 else 10
    wanted = detachable_spec(iterations, grace=SHORT_GRACE) if number % 3 else spec(iterations)
    call = s.stub.StylizeStream(pb.StylizeStreamRequest(spec=wanted))
    try:
        async with asyncio.timeout(chance.uniform(0, 1) if leaves and not cancels else None):
            job_id = (await call.read()).event.accepted.job_id
            if cancels:
                await asyncio.sleep(chance.uniform(0, 0.25))
                await s.stub.CancelJob(pb.CancelJobRequest(job_id=job_id))
            return [event async for event in remaining_events(call)][-1].HasField("result")
    except TimeoutError:
        return "left"
    except grpc.aio.AioRpcError as error:
        return error.code().name
    finally:
        call.cancel()


async def test_1000_jobs_half_of_them_cancelled_leave_nothing(earlier_objects_ignored):
    chance = random.Random(1)
    engine = FakeEngine(iteration_s=0.002)
    limits = Limits(max_queued=200, max_kept=20)
    before = alive()  # a failed test, or an error among another test's parameters, keeps objects in its traceback
    async with serving(engine, limits) as s:
        jobs, tasks = s.servicer.jobs, own_tasks()
        seen = []
        for wave in range(5):
            async with asyncio.timeout(30):
                ends = await asyncio.gather(*(one(s, number, chance) for number in range(200)))
            assert set(ends[1::2]) == {True}, wave
            assert set(ends[::12]) == {"ABORTED"} and set(ends[4::12] + ends[8::12]) == {"left"}
            assert set(ends[2::4]) <= {True, "left", "ABORTED", "NOT_FOUND"}
            await until(lambda: s.scheduler.running + s.scheduler.queued + s.scheduler.paused == 0)
            await s.servicer.idle()
            await until(lambda: len(jobs) <= 20 and all(job.ended for job in jobs.newest_first()))
            await until(lambda: own_tasks() <= tasks)
            assert not any(job.watchers for job in jobs.newest_first())
            assert not s.servicer.preparing and not s.servicer.calls
            assert engine.closed == len(engine.batches)
            assert s.scheduler.queued + s.scheduler.running + s.scheduler.paused == s.scheduler.pending_commands == 0
            engine.jobs.clear(), engine.joined.clear(), engine.batches.clear(), engine.slices.clear()
            engine.taken_at.clear()
            engine.closed = 0
            seen.append((threading.active_count(), descriptors(), resident_bytes()))
        jobs.close()
        assert len(jobs) == 0 and jobs.request_ids == jobs.ended == 0
        # gRPC's server keeps the contexts of the first and the last call.
        await until(lambda: (alive() - before) in ({}, {"RpcCall": 1}, {"RpcCall": 2}))
    threads, files, resident = zip(*seen, strict=True)
    assert threads[-1] <= max(threads[:-1]) and files[-1] <= files[0]
    # The first wave fills the allocators. After that, 800 jobs, whose images take 12 MiB, may leave some fragmentation.
    assert resident[-1] - resident[0] < 8 * MIB, [size / MIB for size in resident]
