"""Crowds, floods of HTTP/2 frames, and clients without a window: others are answered, and nothing is left."""

import asyncio
import contextlib
import functools
import struct

import pytest

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.config import SMALL_READS, Limits
from gramophone_server.rpc.byte_budget import ByteBudget
from tests.support.clock import until
from tests.support.engines import FakeEngine
from tests.support.pictures import png
from tests.support.raw_http2 import StreamOver, connection, prefixed
from tests.support.serving import serving
from tests.support.specs import spec

PATH = "/gramophone.v1.StyleTransferService/"
MIB = 2**20


def frame(kind, payload=b"", flags=0, stream=0):
    """A frame of HTTP/2."""
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


FRAMES = {
    "PRIORITY": frame(2, bytes(5), stream=1),
    "SETTINGS": frame(4, struct.pack(">HI", 4, 65_535)),
    "acknowledged SETTINGS": frame(4, flags=1),
    "PING": frame(6, b"12345678"),
    "acknowledged PING": frame(6, b"12345678", flags=1),
    "GOAWAY": frame(7, bytes(8)),
    "WINDOW_UPDATE": frame(8, struct.pack(">I", 1)),
    "a frame of no known kind": frame(200, bytes(20)),
}


@contextlib.asynccontextmanager
async def answered_meanwhile(s, least=3):
    """Asks for the server's information again and again during the block, and at least so often. Each call must be
    answered."""
    over = asyncio.Event()

    async def ask():
        asked = 0
        while asked < least or not over.is_set():
            await s.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=10)
            asked += 1

    asking = asyncio.create_task(ask())
    try:
        yield
    finally:
        over.set()
        await asking


@pytest.mark.parametrize("kind", FRAMES)
async def test_a_flood_of_frames_delays_only_its_sender(kind):
    async with serving(FakeEngine()) as s, connection(s.address) as raw:
        async with answered_meanwhile(s):
            for _ in range(20):
                if raw.is_closed:
                    break
                raw.send_bytes(FRAMES[kind] * 500)
                await raw.drain()
                await asyncio.sleep(0)
        with contextlib.suppress(StreamOver):  # gRPC closes the connection after too many PINGs
            stream = raw.open_stream(PATH + "GetServerInfo")
            await stream.send(prefixed(b""), end=True)
            assert (await stream.answer(within_s=10)).code in ("OK", "CLOSED", "RESET")
        await until(lambda: not len(s.servicer.calls) and not s.servicer.calls.places.taken)


async def test_streams_that_are_opened_and_reset_delay_others_and_end_none_of_their_calls():
    """gRPC itself ends calls with CANCELLED, without a reason, if too many wait for a handler. So one connection may
    have only so many."""
    async with serving(FakeEngine()) as s, contextlib.AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(connection(s.address)) for _ in range(4)]
        async with answered_meanwhile(s):
            for _ in range(10):
                for raw in connections:
                    for _ in range(50):
                        stream = raw.open_stream(PATH + "Stylize")
                        stream.cancel()
                        del raw.streams[stream.number]
                await asyncio.sleep(0)
        await until(lambda: not len(s.servicer.calls) and not s.servicer.calls.places.taken)


@pytest.mark.parametrize("method", ["GetServerInfo", "UploadImage"])
async def test_a_crowd_that_does_not_send_its_messages_shuts_no_caller_out(method):
    """Its connections have more such calls than there is room for messages."""
    limits = Limits(max_receiving_bytes=SMALL_READS * 8 * MIB, max_checkpoint_bytes=65_536)
    async with serving(FakeEngine(), limits) as s, contextlib.AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(connection(s.address)) for _ in range(50)]
        async with answered_meanwhile(s):
            for raw in connections:
                for _ in range(4):
                    await raw.open_stream(PATH + method).send(b"\0\0\0\0\x05ab")
        for raw in connections:
            raw.abort()
        async with answered_meanwhile(s):
            await until(lambda: len(s.servicer.calls) <= 1)
        await until(lambda: not s.servicer.calls.places.taken)
        receiver = s.servicer.receiver
        assert [room.budget.used for room in (receiver.small, receiver.requests)] == [0, 0]


async def test_one_connection_leaves_room_for_the_requests_of_others(monkeypatch):
    """However many it has, and whatever it does with them: here they never arrive, and none is replaced."""
    patient = functools.partial(ByteBudget, replaceable_after_s=60.0)
    monkeypatch.setattr("gramophone_server.rpc.receiving.ByteBudget", patient)
    limits = Limits(max_receiving_bytes=64 * MIB, max_checkpoint_bytes=65_536)
    async with serving(FakeEngine(), limits) as s, connection(s.address) as greedy, connection(s.address) as raw:
        for _ in range(20):
            await greedy.open_stream(PATH + "Stylize").send(prefixed(b"abc", length=8 * MIB))
        budget = s.servicer.receiver.requests.budget
        await until(lambda: budget.used == 48 * MIB and budget.waiting == 14)
        stream = raw.open_stream(PATH + "UploadImage")
        await stream.send(prefixed(b""))
        await until(lambda: budget.used == 56 * MIB)  # the next message is awaited, the first one is read
        assert budget.waiting == 14


def requests(job_id):
    """A valid message of each method."""
    return {
        "Stylize": pb.StylizeRequest(spec=spec()),
        "StylizeStream": pb.StylizeStreamRequest(spec=spec()),
        "StylizeInteractive": pb.StylizeInteractiveRequest(start=pb.StartCommand(spec=spec())),
        "WatchJob": pb.WatchJobRequest(job_id=job_id),
        "GetJob": pb.GetJobRequest(job_id=job_id),
        "ListJobs": pb.ListJobsRequest(),
        "CancelJob": pb.CancelJobRequest(job_id=job_id),
        "UploadImage": pb.UploadImageRequest(chunk=png()),
        "GetServerInfo": pb.GetServerInfoRequest(),
    }


@pytest.mark.parametrize("method", requests(""))
async def test_a_client_without_a_window_is_dropped_and_keeps_only_a_place(method):
    limits = Limits(max_blocked_s=1)
    async with serving(FakeEngine(), limits, list_jobs=True) as s, connection(s.address) as other:
        done = other.open_stream(PATH + "Stylize")
        await done.send(prefixed(requests("")["Stylize"].SerializeToString()), end=True)
        assert (await done.answer(within_s=10)).code == "OK"
        job_id = next(iter(s.servicer.jobs.newest_first(None))).id
        async with connection(s.address, window=0) as raw:
            stream = raw.open_stream(PATH + method)
            await stream.send(prefixed(requests(job_id)[method].SerializeToString()), end=True)
            await until(lambda: s.servicer.calls.unread)
            await until(lambda: not len(s.servicer.calls))
            assert s.servicer.calls.places.taken == 1
        await until(lambda: not s.servicer.calls.unread and not s.servicer.calls.places.taken)
        assert s.servicer.sending.used == s.servicer.receiver.requests.budget.used == 0
