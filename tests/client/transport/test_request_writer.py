"""The client's side of a stream: all of it arrives, and a call that ends under it tells how."""

import asyncio
import gc

import grpc
import pytest

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.v1 import style_transfer_pb2_grpc as pb_grpc
from gramophone_client import GramophoneClient, errors
from gramophone_client.transport.request_writer import send
from tests.support.fake_service import HANG, accepted

NOWHERE = "127.0.0.1:1"  # a port that nobody listens on


@pytest.fixture
async def stub(service):
    async with grpc.aio.insecure_channel(service.target) as channel:
        yield pb_grpc.StyleTransferServiceStub(channel)


async def pieces(*sizes):
    for size in sizes:
        yield pb.UploadImageRequest(chunk=bytes(size))


async def test_all_requests_arrive_and_the_side_is_closed(stub, service):
    call = stub.UploadImage(timeout=10)
    send(call, pieces(10, 0, 1000, 2**20))
    answer = await call
    assert len(service.images[answer.digest]) == 10 + 1000 + 2**20


async def test_an_upload_that_is_refused_half_way_says_why(client, service):
    # gRPC's own way to send loses the status of one in three to eight of these.
    service.most_bytes = 2**20
    for _ in range(30):
        with pytest.raises(errors.InvalidRequest, match=r"chunk: is \d+ bytes") as raised:
            await client.upload(bytes(8 * 2**20))
        assert (raised.value.code, raised.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
        assert [violation.field for violation in raised.value.violations] == ["chunk"]


async def test_an_upload_to_nowhere_and_one_that_takes_too_long_say_so(client, service):
    async with GramophoneClient(NOWHERE, retries=False) as lost:
        with pytest.raises(errors.ConnectionFailed, match="no connection to a gramophone server at 127"):
            await lost.upload(bytes(2**20))
    with pytest.raises(errors.DeadlineExceeded):
        await client.upload(bytes(64 * 2**20), timeout_s=0.001)


async def test_who_leaves_an_upload_ends_it_at_the_server(stub, service):
    async def endless():
        try:
            while True:
                yield pb.UploadImageRequest(chunk=b"-")
                await asyncio.sleep(0.01)
        finally:
            left.set()

    left = asyncio.Event()
    call = stub.UploadImage(timeout=10)
    send(call, endless())
    answer = asyncio.ensure_future(call)
    assert await asyncio.to_thread(service.uploading.wait, 5)
    answer.cancel()
    assert await asyncio.to_thread(service.over.wait, 5)
    async with asyncio.timeout(5):
        await left.wait()


async def test_requests_that_cannot_be_made_end_the_call_and_are_told(stub, service):
    async def broken():
        yield pb.UploadImageRequest(chunk=b"-")
        assert await asyncio.to_thread(service.uploading.wait, 5)
        raise ZeroDivisionError

    told = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
    call = stub.UploadImage(timeout=10)
    send(call, broken())
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await asyncio.to_thread(service.over.wait, 5)
    gc.collect()  # a task that failed is told of when it is dropped
    assert [type(error) for error in told] == [ZeroDivisionError]


async def test_requests_wait_for_no_longer_than_the_call(stub, service):
    async def silent():
        yield pb.StylizeInteractiveRequest(start=pb.StartCommand(spec=pb.JobSpec()))
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    left = asyncio.Event()
    service.scripts = [[accepted(), HANG]]
    call = stub.StylizeInteractive(timeout=10)
    send(call, silent())
    await call.read()
    call.cancel()
    async with asyncio.timeout(5):
        await left.wait()
