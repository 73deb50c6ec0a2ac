"""The requests of a call: all of them arrive, and the status of a call that ends before them is kept."""

import asyncio
import gc

import grpc
import pytest

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.v1 import style_transfer_pb2_grpc as pb_grpc
from gramophone_client import AsyncGramophoneClient, errors
from gramophone_client.transport.request_writer import send
from tests.support.fake_service import HANG, NOWHERE, accepted


@pytest.fixture
async def stub(service):
    async with grpc.aio.insecure_channel(service.target) as channel:
        yield pb_grpc.StyleTransferServiceStub(channel)


async def chunks(*sizes):
    for size in sizes:
        yield pb.UploadImageRequest(chunk=bytes(size))


async def test_all_requests_arrive_and_the_side_is_closed(stub, service):
    call = stub.UploadImage(timeout=60)
    send(call, chunks(10, 0, 1000, 2**20))
    answer = await call
    assert len(service.images[answer.digest]) == 10 + 1000 + 2**20


async def test_an_upload_that_is_refused_half_way_raises_the_refusal(client, service):
    # With gRPC's own way to send, one in three to eight of these lost its status.
    service.max_upload_bytes = 2**20
    for _ in range(30):
        with pytest.raises(errors.InvalidRequestError, match=r"chunk: is \d+ bytes") as raised:
            await client.upload(bytes(8 * 2**20))
        assert (raised.value.code, raised.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
        assert [violation.field for violation in raised.value.violations] == ["chunk"]


async def test_uploads_without_a_server_or_in_too_little_time_raise_their_errors(client, service):
    async with AsyncGramophoneClient(NOWHERE, max_retries=0) as lost:
        with pytest.raises(errors.ConnectionFailedError, match="no connection to a gramophone server at 127"):
            await lost.upload(bytes(2**20))
    with pytest.raises(errors.DeadlineExceededError):
        await client.upload(bytes(64 * 2**20), timeout=0.001)


async def test_cancelling_an_upload_ends_it_at_the_server(stub, service):
    async def endless():
        try:
            while True:
                yield pb.UploadImageRequest(chunk=b"-")
                await asyncio.sleep(0.01)
        finally:
            left.set()

    left = asyncio.Event()
    call = stub.UploadImage(timeout=60)
    send(call, endless())
    answer = asyncio.ensure_future(call)
    assert await asyncio.to_thread(service.uploading.wait, 5)
    answer.cancel()
    assert await asyncio.to_thread(service.call_ended.wait, 5)
    async with asyncio.timeout(60):
        await left.wait()


async def test_an_error_in_making_requests_ends_the_call_and_is_logged(stub, service):
    async def broken():
        yield pb.UploadImageRequest(chunk=b"-")
        assert await asyncio.to_thread(service.uploading.wait, 5)
        raise ZeroDivisionError

    failures = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context["exception"]))
    call = stub.UploadImage(timeout=60)
    send(call, broken())
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await asyncio.to_thread(service.call_ended.wait, 5)
    gc.collect()  # asyncio reports a failed task when it is destroyed
    assert [type(error) for error in failures] == [ZeroDivisionError]


async def test_waiting_for_requests_ends_with_the_call(stub, service):
    async def silent():
        yield pb.StylizeInteractiveRequest(start=pb.StartCommand(spec=pb.JobSpec()))
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    left = asyncio.Event()
    service.scripts = [[accepted(), HANG]]
    call = stub.StylizeInteractive(timeout=60)
    send(call, silent())
    await call.read()
    call.cancel()
    async with asyncio.timeout(60):
        await left.wait()
