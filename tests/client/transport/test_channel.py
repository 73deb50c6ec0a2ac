"""The channel's options, and what gRPC retries by itself."""

import asyncio
import json
import time

import grpc
import pytest

from gramophone.recipe import Violation
from gramophone_client import AsyncGramophoneClient, errors
from gramophone_client.transport.call_options import MAX_RETRIES
from gramophone_client.transport.channel import channel_options
from gramophone_server import errors as server_errors
from tests.support.fake_service import HANG, NOWHERE, PAINTING, PHOTO, accepted, encoded, refused, rpc_status
from tests.support.updates import collected


@pytest.mark.parametrize("how", ["unary", "stream"])
async def test_a_job_that_was_not_accepted_is_sent_again(client, service, how):
    # Larger than gRPC's own retry buffer of 256 KiB, above which it would not be sent twice.
    photo = encoded() + bytes(300_000)
    service.scripts = [
        [rpc_status(grpc.StatusCode.UNAVAILABLE)],
        [refused(server_errors.QueueFull(4, 4, 0.05))],
        service.scripts[0],
    ]
    if how == "unary":
        await client.stylize(photo, PAINTING)
    else:
        await collected(client.stream(photo, PAINTING))
    assert [len(spec.content.data) for spec in service.specs] == [len(photo)] * 3


async def test_retries_wait_as_long_as_the_server_requests(client, service):
    service.scripts = [[refused(server_errors.QueueFull(4, 4, 0.4))], service.scripts[0]]
    started = time.monotonic()
    await client.stylize(PHOTO, PAINTING)
    assert time.monotonic() - started >= 0.4


async def test_without_patience_nothing_is_sent_again_after_the_first_message(client, service):
    service.scripts = [[accepted(), rpc_status(grpc.StatusCode.UNAVAILABLE, "going down")], service.scripts[0]]
    with pytest.raises(errors.ConnectionFailedError, match="going down"):
        await collected(client.stream(PHOTO, PAINTING, patience=0))
    assert len(service.specs) == 1


async def test_a_bad_request_is_not_sent_again(client, service):
    service.scripts = [
        [refused(server_errors.InvalidRequest([Violation("spec.seed", "must be y")]))],
        service.scripts[0],
    ]
    with pytest.raises(errors.InvalidRequestError):
        await client.stylize(PHOTO, PAINTING)
    assert len(service.specs) == 1


def test_the_channel_suits_images():
    options = dict(channel_options(1000))
    assert options["grpc.max_send_message_length"] == options["grpc.max_receive_message_length"] == 1000
    assert options["grpc.http2.bdp_probe"] == 0
    assert json.loads(options["grpc.service_config"])["retryThrottling"]


@pytest.mark.parametrize("max_retries", range(MAX_RETRIES + 1))
async def test_max_retries_is_what_grpc_does(service, max_retries):
    service.scripts = [[refused(server_errors.QueueFull(4, 4, 0.001))]]
    async with AsyncGramophoneClient(service.target, max_retries=max_retries) as client:
        with pytest.raises(errors.QueueFullError):
            await client.stylize(PHOTO, PAINTING)
    assert len(service.specs) == 1 + max_retries


@pytest.mark.parametrize("max_retries", [-1, MAX_RETRIES + 1, 1.0, True, "3", None])
async def test_max_retries_has_a_range(max_retries):
    with pytest.raises(errors.InvalidRequestError, match="max_retries: must be 0 to 4, because gRPC") as raised:
        AsyncGramophoneClient(NOWHERE, max_retries=max_retries)
    assert [violation.field for violation in raised.value.violations] == ["max_retries"]


# --- event loops


CALLS = ["server_info", "stylize", "stream", "watch", "control", "upload", "wait_until_ready", "close"]


async def call(client, how):
    if how in ("stylize", "stream", "control"):
        made = getattr(client, how)(PHOTO, PAINTING)
    elif how in ("watch", "upload"):
        made = getattr(client, how)("j1" if how == "watch" else PHOTO)
    else:
        made = getattr(client, how)()
    if how == "control":
        await made.__aenter__()
    else:
        await (anext(made) if how in ("stream", "watch") else made)


@pytest.mark.parametrize("how", CALLS)
def test_a_client_of_a_closed_loop_is_refused(service, how):
    async def make():
        client = AsyncGramophoneClient(service.target)
        await client.server_info()
        return client

    client = asyncio.run(make())
    with pytest.raises(errors.ClientUsageError, match=r"event loop has been closed.*make a client in each event loop"):
        asyncio.run(call(client, how))


@pytest.mark.parametrize("how", CALLS)
async def test_a_client_in_another_loop_is_refused(client, how):
    def elsewhere():
        with pytest.raises(errors.ClientUsageError, match=r"used in another event loop than the one where it was made"):
            asyncio.run(call(client, how))

    await asyncio.to_thread(elsewhere)
    await client.server_info()  # it still works where it was made


@pytest.mark.parametrize("how", CALLS)
async def test_a_client_without_a_loop_is_refused(client, how):
    def elsewhere():
        with pytest.raises(errors.ClientUsageError, match=r"used without an event loop.*or use GramophoneClient"):
            call(client, how).send(None)

    await asyncio.to_thread(elsewhere)


async def test_streams_in_another_loop_are_refused(client, service):
    service.scripts = [[accepted(), HANG]]

    async def use(stream, how):
        await (anext(stream) if how == "next" else stream.close() if how == "close" else stream.pause())

    def elsewhere(stream, how):
        with pytest.raises(errors.ClientUsageError, match="another event loop"):
            asyncio.run(use(stream, how))

    async with client.stream(PHOTO, PAINTING) as updates, client.control_job("j1") as job:
        for stream, how in ((updates, "next"), (updates, "close"), (job, "next"), (job, "close"), (job, "pause")):
            await asyncio.to_thread(elsewhere, stream, how)
        assert (await anext(updates)).job_id == (await anext(job)).job_id == "j1"
