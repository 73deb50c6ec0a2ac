"""The client library on connections that are cut."""

import asyncio
import contextlib

import pytest

from gramophone_client import ConnectionFailed, GramophoneClient
from tests.support.clock import until
from tests.support.engines import FakeEngine
from tests.support.pictures import png
from tests.support.serving import (
    serving,
)


class Proxy:
    """Forwards bytes in both directions, over connections that the test can cut."""

    def __init__(self, address):
        self.host, self.port = address.split(":")
        self.writers = []
        self.connections = 0
        self.tasks = set()

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.accept, "127.0.0.1", 0)
        self.address = "{}:{}".format(*self.server.sockets[0].getsockname())
        return self

    async def __aexit__(self, *error):
        self.cut()
        self.server.close()
        await asyncio.gather(*self.tasks)

    async def accept(self, reader, writer):
        self.connections += 1
        server_reader, server_writer = await asyncio.open_connection(self.host, self.port)
        self.writers += [writer, server_writer]
        for source, target in ((reader, server_writer), (server_reader, writer)):
            task = asyncio.create_task(self.carry(source, target))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def carry(self, source, target):
        with contextlib.suppress(ConnectionError):
            while data := await source.read(2**16):
                target.write(data)
                await target.drain()
        target.close()

    def cut(self):
        while self.writers:
            self.writers.pop().transport.abort()


@pytest.mark.parametrize("grace_s", [30.0, 0.0])
async def test_a_client_with_a_cut_connection_returns_to_its_job_if_that_has_a_grace(grace_s):
    engine = FakeEngine(iteration_s=0.005)
    async with (
        serving(engine) as s,
        Proxy(s.address) as proxy,
        GramophoneClient(proxy.address, timeout_s=20) as client,
    ):
        updates = []

        async def follow():
            wanted = {"size": 64, "smallest_size": 0, "iterations": 300, "detach_grace": grace_s}
            async for update in client.stream(
                png(), png(32, 32), patience_s=0, **wanted
            ):  # without patience for a new job
                updates.append(update)
                if len(updates) in (10, 30):
                    proxy.cut()

        if grace_s:
            await follow()
            names = [type(update).__name__ for update in updates]
            assert (names[0], names[-1]) == ("Accepted", "Result")
            assert names.count("Accepted") == names.count("Result") == 1 and {"Progress", "Frame"} <= set(names)
            assert proxy.connections >= 3
        else:
            with pytest.raises(ConnectionFailed):
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
        Proxy(s.address) as proxy,
        GramophoneClient(proxy.address, timeout_s=20) as client,
    ):
        wanted = {"size": 64, "smallest_size": 0, "iterations": 200, "detach_grace": grace_s}
        call = asyncio.create_task(client.stylize(png(), png(32, 32), **wanted))
        await until(engine.under_way.is_set)
        proxy.cut()
        stylized = await call
        assert stylized.iterations == 200
        assert len(engine.jobs) == jobs
        assert (await client.get_job(stylized.job_id)).state == "SUCCEEDED"
