"""Which slow readers are dropped, and which are not. All times are those of a server that drops after 1 s, not 30."""

import asyncio
import contextlib
import time

import pytest

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.config import Limits
from gramophone_server.rpc.send_timeout import LINK_BYTES_PER_S, SendTimeout
from tests.support.clock import until
from tests.support.engines import FakeEngine, NoisyEngine
from tests.support.raw_http2 import connection, prefixed
from tests.support.serving import serving, start_detachable, watch
from tests.support.specs import detachable_spec

WATCH = "/gramophone.v1.StyleTransferService/WatchJob"


@contextlib.asynccontextmanager
async def watched(s, engine, wanted, window, **frames):
    """A job, and a watcher of it that takes as many bytes as the test lets it; yields the job and the stream."""
    _, job_id = await start_detachable(s, engine, wanted)
    async with connection(s.address, window=window) as raw:
        stream = raw.open_stream(WATCH, hold=True)
        request = pb.WatchJobRequest(job_id=job_id, frames=pb.FrameOptions(**frames))
        await stream.send(prefixed(request.SerializeToString()), end=True)
        engine.go.set()
        job = s.servicer.jobs.find(job_id)
        await until(lambda: job.watchers == 2)
        yield job, stream
        stream.cancel()


async def read_for(stream, seconds, *, size, every_s):
    """Reads so many bytes at a time, at most, until the stream or the time is over."""
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at and not stream.is_over:
        stream.release(size)
        await asyncio.sleep(every_s)


async def test_a_reader_that_takes_a_message_in_a_while_is_dropped():
    """It takes each message in less than a second, but events wait for longer, because several kinds take turns."""
    engine = FakeEngine(iteration_s=0.002)
    async with (
        serving(engine, Limits(max_blocked_s=1)) as s,
        watched(s, engine, detachable_spec(5000), window=400) as (job, stream),
    ):
        await read_for(stream, 8, size=300, every_s=0.6)
        await until(lambda: job.watchers == 1)
        assert not job.ended


@pytest.mark.parametrize("every_s", [0.15, 0.25])
async def test_a_reader_of_fewer_frames_than_the_job_makes_is_not_dropped(every_s):
    """A message is 200 to 800 bytes."""
    engine = FakeEngine(iteration_s=0.002)
    async with (
        serving(engine, Limits(max_blocked_s=1)) as s,
        watched(s, engine, detachable_spec(5000), window=800) as (job, stream),
    ):
        await read_for(stream, 4, size=800, every_s=every_s)
        assert job.watchers == 2
        (call,) = [call for call in s.servicer.calls if call.frames]
        assert call.frames >= 3 and call.dropped_frames >= 3


async def test_a_link_that_needs_most_of_the_limit_for_each_frame_is_no_slow_reader():
    engine = NoisyEngine(256, iteration_s=0.002)  # frames of 200 KB
    async with serving(engine, Limits(max_blocked_s=1)) as s:
        png = pb.IMAGE_FORMAT_PNG
        async with watched(s, engine, detachable_spec(5000), window=65_535, format=png) as (job, stream):
            await read_for(stream, 4, size=15_000, every_s=0.05)  # 300 KB/s
            assert job.watchers == 2
            assert max(call.frames for call in s.servicer.calls) >= 3
            await until(lambda: job.watchers == 1)  # now it reads nothing


async def test_only_the_time_beyond_that_of_the_bytes_counts_as_lag():
    expired = []
    timeout = SendTimeout(100.0, lambda: expired.append(1))
    timeout.begin(0)
    await asyncio.sleep(0.03)
    assert timeout.blocked_s() >= 0.03
    timeout.end()
    blocked_s = timeout.blocked_s()
    timeout.begin(10 * LINK_BYTES_PER_S)
    await asyncio.sleep(0.03)
    assert timeout.blocked_s() == blocked_s
    timeout.end()
    await asyncio.sleep(0.03)
    assert timeout.blocked_s() == blocked_s  # the server does not wait for the client
    timeout.close()
    assert not expired


async def test_a_lag_ends_a_call_only_while_its_client_does_not_read():
    expired = []
    timeout = SendTimeout(0.05, lambda: expired.append(1))
    timeout.begin(0)
    timeout.lag_s = lambda: 10.0
    timeout.end()  # and now the server encodes a picture
    await asyncio.sleep(0.03)
    assert not expired
    timeout.begin(0)
    await until(lambda: expired)
    timeout.close()


async def test_watchers_that_come_and_go_leave_nothing():
    engine = NoisyEngine(256, iteration_s=0.002)
    async with serving(engine) as s:
        call, job_id = await start_detachable(s, engine, detachable_spec(5000))
        engine.go.set()
        job = s.servicer.jobs.find(job_id)
        for _ in range(30):
            crowd = [watch(s, job_id, format=pb.IMAGE_FORMAT_PNG) for _ in range(15)]
            await until(lambda: job.watchers > 8)
            for one in crowd:
                one.cancel()
            await until(lambda: job.watchers == 1)
        call.cancel()
        await until(lambda: job.watchers == 0)
        await s.servicer.idle()
        await until(lambda: s.servicer.sending.used == 0)
        assert job.unread == 0 and not s.servicer.calls.unread
