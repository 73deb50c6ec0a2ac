"""Which slow readers are dropped, and which are not. All times are those of a server that drops after 1 s, not 30.

They are times of a clock that moves only while the server waits for the reader. Otherwise a pause of the machine would
be one of the reader, which the server rightly drops.
"""

import asyncio
import contextlib

import pytest

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.config import Limits
from gramophone_server.jobs import mailbox
from gramophone_server.rpc import send_timeout
from gramophone_server.rpc.send_timeout import LINK_BYTES_PER_S, SendTimeout
from gramophone_server.scheduling import worker
from tests.support.clock import ManualClock, until
from tests.support.engines import FakeEngine, NoisyEngine
from tests.support.raw_http2 import connection, prefixed
from tests.support.serving import serving, start_detachable, watch
from tests.support.specs import detachable_spec

WATCH = "/gramophone.v1.StyleTransferService/WatchJob"
ONE_SECOND = Limits(max_blocked_s=1)
CHECK_S = 0.1  # the server looks for slow readers once in this time, that of the machine


@pytest.fixture
def clock(monkeypatch):
    """The clock by which the server knows slow readers."""
    clock = ManualClock()
    monkeypatch.setattr(send_timeout, "time", clock)
    return clock


@pytest.fixture
def many_events(monkeypatch):
    """Jobs send progress and a frame after each slice, so there is always more than a reader has taken."""
    monkeypatch.setattr(worker, "PROGRESS_INTERVAL_S", 0.0)
    monkeypatch.setattr(mailbox, "MIN_FRAME_INTERVAL_S", 0.0)


class Reader:
    """A watcher of a job that takes as many bytes as the test lets it."""

    def __init__(self, job, raw, stream, clock):
        self.job, self.raw, self.stream, self.clock = job, raw, stream, clock

    @property
    def is_dropped(self):
        return not self.job.watchers

    @property
    def keeps_server_waiting(self):
        """It has got all that it lets the server send."""
        return self.raw.h2.remote_flow_control_window(self.stream.number) == 0

    async def wait(self, seconds):
        """Does not read for so long."""
        await until(lambda: self.keeps_server_waiting or self.is_dropped)
        self.clock.advance(seconds)
        await asyncio.sleep(CHECK_S)  # the server's timer is older than this one, so it looks once

    async def read_for(self, seconds, *, size, every_s):
        """Reads so many bytes at a time, until the time is over or it is dropped."""
        ends_at = self.clock.now + seconds
        while self.clock.now < ends_at and not self.is_dropped:
            await self.wait(every_s)
            self.stream.release(size)


@contextlib.asynccontextmanager
async def reader(s, engine, clock, *, window, **frames):
    """A job, and a reader that is its only watcher."""
    call, job_id = await start_detachable(s, engine, detachable_spec(5000))
    async with connection(s.address, window=window) as raw:
        stream = raw.open_stream(WATCH, hold=True)
        request = pb.WatchJobRequest(job_id=job_id, frames=pb.FrameOptions(**frames))
        await stream.send(prefixed(request.SerializeToString()), end=True)
        engine.go.set()
        job = s.servicer.jobs.find(job_id)
        await until(lambda: job.watchers == 2)
        call.cancel()
        await until(lambda: job.watchers == 1)
        yield Reader(job, raw, stream, clock)
        assert not job.ended
        stream.cancel()


async def test_a_reader_that_takes_a_message_in_a_while_is_dropped(clock, many_events):
    """It takes each message in 0.9 s at most, but events wait for longer, because several kinds take turns."""
    engine = FakeEngine(iteration_s=0.02)
    async with serving(engine, ONE_SECOND) as s, reader(s, engine, clock, window=400) as slow:
        await slow.read_for(8, size=300, every_s=0.3)
        assert slow.is_dropped


@pytest.mark.parametrize("every_s", [0.15, 0.25])
async def test_a_reader_of_fewer_frames_than_the_job_makes_is_not_dropped(every_s, clock, many_events):
    """A message is 200 to 800 bytes."""
    engine = FakeEngine(iteration_s=0.02)
    async with serving(engine, ONE_SECOND) as s, reader(s, engine, clock, window=800) as slow:
        await slow.read_for(4, size=800, every_s=every_s)
        assert not slow.is_dropped
        (call,) = [call for call in s.servicer.calls if call.frames]
        assert call.frames >= 3 and call.dropped_frames >= 3


async def test_a_link_that_needs_most_of_the_limit_for_each_frame_is_no_slow_reader(clock):
    engine = NoisyEngine(256, iteration_s=0.02)  # frames of 200 KB
    async with (
        serving(engine, ONE_SECOND) as s,
        reader(s, engine, clock, window=65_535, format=pb.IMAGE_FORMAT_PNG) as link,
    ):
        await link.read_for(4, size=45_000, every_s=0.15)  # 300 KB/s
        assert not link.is_dropped
        assert max(call.frames for call in s.servicer.calls) >= 3
        await link.wait(1)
        await until(lambda: link.is_dropped)


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


async def test_a_lag_ends_a_call_only_while_its_client_does_not_read(clock):
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
    engine = NoisyEngine(256, iteration_s=0.02)
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
