"""The client library on connections that are cut."""

import asyncio

import pytest

from gramophone_client import AsyncGramophoneClient, ConnectionFailedError
from tests.support.clock import until
from tests.support.engines import FakeEngine
from tests.support.pictures import png
from tests.support.serving import serving
from tests.support.wire import Wire


@pytest.mark.parametrize("grace_s", [30.0, 0.0])
async def test_a_client_with_a_cut_connection_returns_to_its_job_if_that_has_a_grace(grace_s):
    engine = FakeEngine(iteration_s=0.005)
    async with (
        serving(engine) as s,
        Wire(s.address) as wire,
        AsyncGramophoneClient(wire.address, timeout=20) as client,
    ):
        updates = []

        async def follow():
            options = {"size": 64, "smallest_size": 0, "iterations": 300, "detach_grace": grace_s}
            async for update in client.stream(png(), png(32, 32), patience=0, **options):  # no retry as a new job
                updates.append(update)
                if len(updates) in (10, 30):
                    wire.cut()

        if grace_s:
            await follow()
            names = [type(update).__name__ for update in updates]
            assert (names[0], names[-1]) == ("Accepted", "Result")
            assert names.count("Accepted") == names.count("Result") == 1 and {"Progress", "Frame"} <= set(names)
            assert wire.connections >= 3
        else:
            with pytest.raises(ConnectionFailedError):
                await follow()
            await until(lambda: s.scheduler.running == 0)
            assert engine.iterations < 300
        numbers = [update.sequence for update in updates]
        assert numbers == sorted(set(numbers))
        assert len(engine.jobs) == 1


@pytest.mark.parametrize(("grace_s", "jobs"), [(30.0, 1), (0.0, 2)])
async def test_a_unary_call_on_a_cut_connection_is_retried_and_finds_its_job_if_that_continues(grace_s, jobs):
    engine = FakeEngine(iteration_s=0.005)
    async with (
        serving(engine) as s,
        Wire(s.address) as wire,
        AsyncGramophoneClient(wire.address, timeout=20) as client,
    ):
        wanted = {"size": 64, "smallest_size": 0, "iterations": 200, "detach_grace": grace_s}
        call = asyncio.create_task(client.stylize(png(), png(32, 32), **wanted))
        await until(engine.under_way.is_set)
        wire.cut()
        stylized = await call
        assert stylized.iterations == 200
        assert len(engine.jobs) == jobs
        assert (await client.get_job(stylized.job_id)).state == "SUCCEEDED"
