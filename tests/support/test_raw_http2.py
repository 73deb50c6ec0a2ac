"""The raw client makes ordinary calls as any client does, and stops where it is told to."""

import asyncio
import gzip

import pytest

from gramophone.v1 import style_transfer_pb2 as pb
from tests.support.clock import until
from tests.support.engines import FakeEngine
from tests.support.raw_http2 import StreamOver, connect, connection, prefixed
from tests.support.serving import serving
from tests.support.specs import spec

PATH = "/gramophone.v1.StyleTransferService/"


async def test_a_call_is_answered_with_its_message():
    async with serving(FakeEngine()) as server, connection(server.address) as raw:
        stream = raw.open_stream(PATH + "Stylize")
        await stream.send(prefixed(pb.StylizeRequest(spec=spec()).SerializeToString()), end=True)
        answer = await stream.answer(within_s=60)
        assert answer.code == "OK"
        assert [pb.StylizeResponse.FromString(message).result.image.data[:4] for message in answer.messages]


async def test_a_refusal_has_its_reason():
    async with serving(FakeEngine()) as server, connection(server.address) as raw:
        stream = raw.open_stream(PATH + "GetJob")
        await stream.send(prefixed(pb.GetJobRequest(job_id="9").SerializeToString()), end=True)
        answer = await stream.answer(within_s=60)
        assert (answer.code, answer.reason, answer.messages) == ("NOT_FOUND", "JOB_NOT_FOUND", ())
        assert "there is no job '9'" in answer.message
        with pytest.raises(StreamOver):
            await stream.send(b"x")


async def test_compressed_messages_and_any_header_can_be_sent():
    async with serving(FakeEngine()) as server, connection(server.address) as raw:
        stream = raw.open_stream(PATH + "GetServerInfo", [("grpc-encoding", "gzip")])
        await stream.send(prefixed(gzip.compress(b""), compressed=True), end=True)
        assert (await stream.answer(within_s=60)).code == "OK"


async def test_an_unfinished_call_waits_until_it_is_cancelled():
    async with serving(FakeEngine()) as server, connection(server.address) as raw:
        message = pb.GetJobRequest(job_id="9").SerializeToString()
        stream = raw.open_stream(PATH + "GetJob")
        await stream.send(prefixed(message)[:-1])
        with pytest.raises(TimeoutError):
            await stream.answer(within_s=0.2)
        stream.cancel()
        other = raw.open_stream(PATH + "GetServerInfo")
        await other.send(prefixed(b""), end=True)
        assert (await other.answer(within_s=60)).code == "OK"


async def test_a_reader_that_holds_its_window_gets_no_more_than_that():
    """And all of it when the window is released."""
    async with serving(FakeEngine()) as server, connection(server.address, window=100) as raw:
        stream = raw.open_stream(PATH + "GetServerInfo", hold=True)
        await stream.send(prefixed(b""), end=True)
        await stream.wait_for_data(100, within_s=60)
        assert len(stream.data) == 100 and not stream.is_over
        while not stream.is_over:
            stream.release()
            await asyncio.sleep(0.001)
        answer = await stream.answer(within_s=60)
        assert answer.code == "OK" and pb.GetServerInfoResponse.FromString(answer.messages[0]).version


async def test_one_loop_serves_many_connections_and_notices_their_ends():
    async with serving(FakeEngine()) as server:
        every = await asyncio.gather(*(connect(server.address) for _ in range(100)))
        streams = [raw.open_stream(PATH + "GetServerInfo") for raw in every]
        for stream in streams:
            await stream.send(prefixed(b""), end=True)
        assert {(await stream.answer(within_s=60)).code for stream in streams} == {"OK"}
        for raw in every:
            raw.abort()
        await until(lambda: all(raw.is_closed for raw in every))
        with pytest.raises(StreamOver):
            every[0].open_stream(PATH + "GetServerInfo")
