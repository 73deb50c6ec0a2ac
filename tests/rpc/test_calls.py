"""Clients that leave, and clients that do not read."""

import asyncio
import contextlib
import gc
import logging
import time
import types

import grpc
import pytest

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.v1 import style_transfer_pb2_grpc as pb_grpc
from gramophone_server.config import Limits
from gramophone_server.errors import ServerBusy
from gramophone_server.jobs.mailbox import Mailbox
from gramophone_server.rpc import calls as active
from gramophone_server.rpc.calls import ActiveCalls
from gramophone_server.rpc.receiving import Receiver
from gramophone_server.telemetry.access_log import AccessLog
from gramophone_server.telemetry.metrics import Metrics
from tests.support.clock import until
from tests.support.engines import FakeEngine, NoisyEngine
from tests.support.serving import (
    SMALL_WINDOW,
    events_of,
    remaining_events,
    serving,
    start_stream,
    stops_within_an_iteration,
    watch,
)
from tests.support.specs import detachable_spec, spec


@pytest.mark.parametrize("how", ["cancel", "deadline", "disconnect"])
async def test_a_client_that_leaves_stops_its_job_within_an_iteration(how, caplog):
    caplog.set_level(logging.INFO, "gramophone_server")
    engine = FakeEngine()
    async with serving(engine) as s:
        call = await start_stream(s, engine, timeout=3 if how == "deadline" else None)
        if how == "cancel":
            call.cancel()
        elif how == "disconnect":
            await s.channel.close()
        async with asyncio.timeout(60):
            await s.servicer.idle()  # the end of the call is noticed during the iteration
        await stops_within_an_iteration(s, engine)
    wanted = "DEADLINE_EXCEEDED" if how == "deadline" else "CANCELLED"
    assert f"code={wanted}" in caplog.text
    assert "failed" not in caplog.text


def context_of(notices, left_s=None, peer="ipv4:127.0.0.1:1"):
    """A context like those of gRPC, with a list of the callbacks for its end."""
    return types.SimpleNamespace(
        add_done_callback=notices.append,
        time_remaining=lambda: left_s,
        invocation_metadata=tuple,
        peer=lambda: peer,
    )


def active_calls(limits=None):
    limits = limits or Limits()
    return ActiveCalls(Metrics(), AccessLog(""), limits, Receiver(limits))


def unread_call(calls, port):
    """A call that was ended because its client does not read, and that gRPC still keeps."""
    call = calls.rpc("StylizeStream", context_of([], peer=f"ipv4:127.0.0.1:{port}"))
    calls.unread[call] = None
    return call


async def test_a_client_that_leaves_while_its_images_are_decoded_starts_no_job():
    """gRPC may report the end between the last image and the queue, while the handler awaits nothing to cancel."""
    notices, left = [], []
    context = context_of(notices)
    call = active_calls().rpc("Stylize", context)
    for notice in notices:
        notice(context)
    mailbox = Mailbox(asyncio.get_running_loop())
    call.attach(types.SimpleNamespace(id="j1", leave=left.append), mailbox)
    assert left == [mailbox]


async def test_setting_the_wall_clock_makes_no_call_late(caplog):
    """gRPC computes the time until a deadline from the wall clock."""
    caplog.set_level("INFO", "gramophone_server")
    notices = []
    context = context_of(notices, left_s=60.0)
    call = active_calls().rpc("Stylize", context)
    until_end = call.deadline_at - time.monotonic()
    context.time_remaining = lambda: 0.0  # the clock is hours ahead now
    for notice in notices:
        notice(context)
    assert 59 < until_end <= 60
    assert "code=CANCELLED" in caplog.text


async def test_a_client_that_leaves_while_its_job_is_queued_frees_its_place():
    engine = FakeEngine()
    async with serving(engine, Limits(max_running=1, max_queued=1)) as s:
        running = await start_stream(s, engine)
        waiting = s.stub.StylizeStream(pb.StylizeStreamRequest(spec=spec()))
        assert (await waiting.read()).event.accepted.queue_position == 1
        waiting.cancel()
        await until(lambda: s.scheduler.queued == 0)
        running.cancel()


@contextlib.asynccontextmanager
async def unread_stream(s, iterations):
    """A stream whose first message was read, on a channel that buffers at most 64 KiB of unread messages."""
    wanted = spec(iterations=iterations)
    wanted.frames.format = pb.IMAGE_FORMAT_PNG  # 800 KB each
    async with grpc.aio.insecure_channel(s.address, options=SMALL_WINDOW) as channel:
        call = pb_grpc.StyleTransferServiceStub(channel).StylizeStream(pb.StylizeStreamRequest(spec=wanted))
        assert (await call.read()).event.HasField("accepted")
        yield call


async def test_a_slow_reader_gets_the_newest_events_and_delays_no_job():
    engine = NoisyEngine(512, iteration_s=0.001)
    async with serving(engine) as s, unread_stream(s, iterations=500) as call:
        await until(lambda: s.scheduler.running + s.scheduler.queued == 0)
        assert engine.iterations == 500
        events = [event async for event in remaining_events(call)]
    frames = [event.frame for event in events if event.HasField("frame")]
    assert len(frames) <= 2 and sum(frame.dropped for frame in frames) >= 1
    assert [e.progress.iteration for e in events if e.HasField("progress")][-1] == 500
    assert events[-1].HasField("result")


async def test_readers_that_stop_do_not_delay_others_on_their_connection():
    engine = NoisyEngine(512, iteration_s=0.005)
    request = pb.StylizeStreamRequest(spec=spec(iterations=5000))
    request.spec.frames.format = pb.IMAGE_FORMAT_PNG  # 800 KB each
    options = SMALL_WINDOW
    async with serving(engine) as s, grpc.aio.insecure_channel(s.address, options=options) as channel:
        stub = pb_grpc.StyleTransferServiceStub(channel)
        stuck = [stub.StylizeStream(request) for _ in range(4)]
        for call in stuck:
            assert (await call.read()).event.HasField("accepted")
        reading, frames = stub.StylizeStream(request), 0
        while frames < 8:
            async with asyncio.timeout(15):  # what blocks until a reader is dropped takes 30 s
                frames += (await reading.read()).event.HasField("frame")
                await stub.GetServerInfo(pb.GetServerInfoRequest())
        sent = sorted(call.frames for call in s.servicer.calls)
        assert sent[-2] <= 2 and sent[-1] >= 8
        for call in (*stuck, reading):
            call.cancel()


async def test_a_client_that_leaves_while_a_frame_is_written_stops_its_job():
    """gRPC does not cancel the handler then."""
    engine = NoisyEngine(512, iteration_s=0.005)
    async with serving(engine) as s, unread_stream(s, iterations=5000) as call:
        await until(lambda: any(call.frames for call in s.servicer.calls))
        call.cancel()
        await until(lambda: s.scheduler.running == 0)
        assert engine.iterations < 5000
        await s.servicer.idle()
        gc.collect()


async def test_a_call_that_is_not_read_is_ended_and_its_job_continues():
    engine = NoisyEngine(512, iteration_s=0.05)
    wanted = detachable_spec(400, format=pb.IMAGE_FORMAT_PNG)  # 800 KB each
    async with (
        serving(engine, Limits(max_blocked_s=1)) as s,
        grpc.aio.insecure_channel(s.address, options=SMALL_WINDOW) as channel,
    ):
        slow = pb_grpc.StyleTransferServiceStub(channel).StylizeStream(pb.StylizeStreamRequest(spec=wanted))
        job_id = (await slow.read()).event.accepted.job_id
        job = s.servicer.jobs.find(job_id)
        await until(lambda: not job.watchers)  # the client reads nothing
        assert not job.ended and engine.iterations < 400
        engine.iteration_s = 0.0
        await s.servicer.idle()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await events_of(slow)
        assert caught.value.code() is grpc.StatusCode.ABORTED
        assert caught.value.details().startswith(
            "the client has kept a message waiting for 1 s, so its call was ended;"
        )
        (*_, last) = await events_of(watch(s, job_id))
        assert last.result.iterations == 400


async def test_without_a_grace_the_job_of_an_unread_call_is_cancelled():
    engine = NoisyEngine(512, iteration_s=0.005)
    async with serving(engine, Limits(max_blocked_s=1)) as s, unread_stream(s, iterations=5000):
        await until(lambda: s.scheduler.running + s.scheduler.queued == 0)
        assert engine.iterations < 5000
        await s.servicer.idle()


async def test_the_connections_of_one_turn_are_closed_together(monkeypatch, caplog):
    """To find one takes as long as to find all: some milliseconds of the event loop among hundreds."""
    closed = []
    monkeypatch.setattr(active, "close_connections", lambda names: closed.append(set(names)) or set(names))
    calls = active_calls()
    unread = [unread_call(calls, port) for port in range(1, 301)]
    for call in unread:
        calls.close_connection_of(call)
    calls.forget_unread(unread[0])  # its client has read after all
    await asyncio.sleep(0)
    assert closed == [{call.connection for call in unread[1:]}]
    assert len(caplog.records) == 299
    calls.close_connection_of(unread[1])
    await asyncio.sleep(0)
    assert closed[1:] == [{unread[1].connection}]


async def test_the_oldest_unread_call_makes_place_until_its_connection_is_closed(monkeypatch):
    """That fails while the process has no descriptor left."""
    closed, can_close = [], False
    monkeypatch.setattr(
        active, "close_connections", lambda names: closed.append(set(names)) or (set(names) if can_close else set())
    )
    calls = active_calls(Limits(max_calls=2))
    first, second = (unread_call(calls, port) for port in (1, 2))
    calls.places.take("a")
    calls.places.take("a")

    async def ask():
        with pytest.raises(ServerBusy):
            calls.places.take("a")
        await asyncio.sleep(0)

    await ask()
    can_close = True
    await ask()
    await ask()  # the call of the first is leaving
    assert closed == [{first.connection}, {first.connection}]
    calls.forget_unread(first)
    await ask()
    assert closed[2:] == [{second.connection}]
    calls.forget_unread(second)
    again = unread_call(calls, 2)  # a new client has the same port
    await ask()
    assert closed[3:] == [{again.connection}]
