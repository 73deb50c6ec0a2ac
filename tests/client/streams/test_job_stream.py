import asyncio
import re

import grpc
import pytest

from gramophone.recipe import Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client import FrameOptions, errors
from gramophone_client.streams.job_stream import newest_responses
from gramophone_server import errors as server_errors
from tests.support.clock import WITHIN_S
from tests.support.fake_service import (
    HANG,
    LOST,
    NO_RETRIES,
    PAINTING,
    PHOTO,
    accepted,
    checkpoint,
    frame,
    numbered,
    progress,
    refused,
    result,
    rpc_status,
    waiting,
)
from tests.support.updates import collected, kinds

pytestmark = pytest.mark.usefixtures("short_pauses")


async def test_a_diverged_stream_has_its_last_good_picture(client, service):
    service.scripts = [[accepted(), frame(10, "red"), frame(12, "blue"), refused(server_errors.Diverged(13))]]
    with pytest.raises(errors.DivergedError, match="iteration 13") as raised:
        await collected(client.stream(PHOTO, PAINTING))
    assert raised.value.frame.iteration == 12
    assert raised.value.frame.picture.image().size == (12, 9)


async def test_a_stream_without_a_result_is_an_error(client, service):
    service.scripts = [[accepted()]]
    with pytest.raises(errors.ServerFailedError, match="without a result"):
        await collected(client.stream(PHOTO, PAINTING))


async def test_a_slow_reader_gets_only_the_newest_of_each_kind():
    class Call:
        cancelled = False

        async def __aiter__(self):
            for event in numbered(
                accepted(), frame(1), progress(2), waiting(1), frame(3), progress(4), checkpoint(4), frame(5), result()
            ):
                yield pb.StylizeStreamResponse(event=event)
            if self.fails:
                raise ValueError("lost")

        def cancel(self):
            self.cancelled = True

    call = Call()
    call.fails = False
    events = [response.event async for response, _ in newest_responses(call)]
    assert [event.WhichOneof("event") for event in events] == [
        "accepted", "waiting", "progress", "checkpoint", "frame", "result",
    ]  # fmt: skip
    assert (events[2].progress.iteration, events[4].frame.iteration) == (4, 5)
    assert events[4].frame.dropped == 3 * 2 + 2  # two per frame by the server, and the two that were replaced here
    assert [event.sequence for event in events] == sorted(event.sequence for event in events)
    call.fails, responses = True, []
    with pytest.raises(ValueError, match="lost"):
        async for response, _ in newest_responses(call):
            responses.append(response)
    assert len(responses) == 6 and call.cancelled  # nothing is lost before the error


# --- lost connections


@pytest.mark.parametrize("status", [LOST, rpc_status(grpc.StatusCode.INTERNAL, "RST_STREAM")], ids=repr)
async def test_a_lost_stream_continues_where_it_was(client, service, status):
    whole = numbered(accepted(), progress(1), frame(1), progress(2), frame(2), result())
    service.scripts = [
        [*whole[:3], status],
        [rpc_status(grpc.StatusCode.UNAVAILABLE, "still gone", NO_RETRIES)],
        [*whole[2:4], refused(server_errors.SlowReader(60))],  # the third event once more
        whole[4:],
    ]
    options = FrameOptions(max_side=64)
    updates = await collected(client.stream(PHOTO, PAINTING, frames=options, detach_grace=5))
    assert [update.sequence for update in updates] == [1, 2, 3, 4, 5, 6]
    assert [(watch.job_id, watch.after_sequence) for watch in service.watches] == [("j1", 3), ("j1", 3), ("j1", 4)]
    assert all(watch.frames.max_side == 64 for watch in service.watches)
    assert len(service.specs) == 1


async def test_a_connection_lost_after_the_result_loses_nothing(client, service):
    service.scripts = [[*numbered(accepted(), result()), LOST]]
    assert len(await collected(client.stream(PHOTO, PAINTING))) == 2
    assert service.watches == []


async def test_a_lost_stream_is_given_up_when_the_grace_is_over(client, service, clock_ahead):
    service.scripts = [
        [*numbered(accepted(), frame(1)), LOST],
        [rpc_status(grpc.StatusCode.UNAVAILABLE, "", NO_RETRIES)],
    ]
    clock_ahead(20, lambda: len(service.watches) == 4)
    with pytest.raises(errors.ConnectionFailedError, match="gone") as raised:
        await collected(client.stream(PHOTO, PAINTING, timeout=60, detach_grace=20, patience=0))
    assert raised.value.frame.iteration == 1
    assert len(service.watches) == 4


@pytest.mark.parametrize(
    "error",
    [
        server_errors.EngineFailed(),
        server_errors.Cancelled(),
        server_errors.Diverged(3),
        server_errors.OutOfDeviceMemory(9, 9),
        server_errors.InvalidRequest([Violation("spec.seed", "must be y")]),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_errors_of_the_service_itself_are_final(client, service, error):
    service.scripts = [[accepted(), refused(error)]]
    with pytest.raises(errors.GramophoneError, match=re.escape(str(error))):
        await collected(client.stream(PHOTO, PAINTING, detach_grace=5))
    assert (service.watches, len(service.specs)) == ([], 1)


async def test_a_job_that_expired_during_the_search_is_an_error(client, service):
    lost = [accepted(), LOST]
    service.scripts = [lost, [refused(server_errors.JobNotFound("j1"))]]
    with pytest.raises(errors.JobNotFoundError, match="j1"):
        await collected(client.watch("j1", detach_grace=5))


# --- the stream as an object


async def test_entering_sends_the_job_and_the_first_update_is_still_accepted(client, service):
    service.scripts = [[accepted(job_id="j7"), progress(1), result()]]
    updates = client.stream(PHOTO, PAINTING)
    assert (updates.job_id, updates.accepted, service.specs) == (None, None, [])
    async with updates as entered:
        assert entered is updates and len(service.specs) == 1
        assert (updates.job_id, updates.accepted.job_id) == ("j7", "j7")
        assert kinds(await collected(updates)) == ["Accepted", "Progress", "Result"]


async def test_entering_raises_the_refusal(client, service):
    service.scripts = [[refused(server_errors.InvalidRequest([Violation("spec.seed", "must be y")]))]]
    with pytest.raises(errors.InvalidRequestError, match="must be y"):
        async with client.stream(PHOTO, PAINTING):
            pytest.fail("the job was refused")
    service.scripts = [[refused(server_errors.JobNotFound("j9"))]]
    with pytest.raises(errors.JobNotFoundError):
        async with client.watch("j9"):
            pytest.fail("there is no such job")


async def test_entering_does_not_wait_for_an_update_of_a_job_that_is_watched_from_its_middle(client, service):
    service.scripts = [[HANG]]
    async with asyncio.timeout(WITHIN_S), client.watch("j1", 5) as updates:
        assert (updates.job_id, updates.accepted) == ("j1", None)


async def test_a_job_that_is_sent_again_has_another_id(client, service):
    service.scripts = [[accepted(), checkpoint(2), LOST], [accepted(job_id="j2", resumed_at=2), result()]]
    async with client.stream(PHOTO, PAINTING) as updates:
        assert updates.job_id == "j1"
        await collected(updates)
        assert (updates.job_id, updates.accepted.resumed_at) == ("j2", 2)


async def test_the_end_of_a_stream_stays_its_end(client, service):
    updates = client.stream(PHOTO, PAINTING)
    await collected(updates)
    for _ in range(2):
        with pytest.raises(StopAsyncIteration):
            await anext(updates)
    await updates.close()
    await updates.close()
    with pytest.raises(StopAsyncIteration):
        await anext(updates)
    await client.close()
    assert await collected(updates) == []
    assert not service.cancelled


async def test_an_error_is_raised_again(client, service):
    service.scripts = [[accepted(), refused(server_errors.Diverged(13))]]
    updates, missing = client.stream(PHOTO, PAINTING), client.stream("/no/such/photo.jpg", PAINTING)
    for _ in range(3):
        with pytest.raises(errors.DivergedError):
            await collected(updates)
        with pytest.raises(FileNotFoundError):
            await collected(missing)


@pytest.mark.parametrize("how", ["block", "close", "before it was entered"])
async def test_a_closed_stream_says_so(client, service, how):
    service.scripts = [[accepted(), HANG]]
    updates = client.stream(PHOTO, PAINTING)
    if how == "block":
        async with updates:
            pass
    else:
        if how == "close":
            await anext(updates)
        await updates.close()
    with pytest.raises(errors.ClientUsageError, match="was closed before its end; make another one, or `watch`"):
        await anext(updates)
    await updates.close()
    if how == "before it was entered":
        assert service.specs == []
    else:
        assert await asyncio.to_thread(service.call_ended.wait, WITHIN_S)


async def test_closing_ends_the_wait_for_an_update(client, service):
    service.scripts = [[accepted(), HANG]]
    updates = client.stream(PHOTO, PAINTING)
    await anext(updates)
    waits = asyncio.create_task(anext(updates))
    assert await asyncio.to_thread(service.hanging.wait, WITHIN_S)
    await updates.close()
    with pytest.raises(errors.CallCancelledError, match="was closed while its next update was awaited"):
        await waits
    assert not waits.cancelled()
    assert await asyncio.to_thread(service.call_ended.wait, WITHIN_S)


async def test_a_stream_whose_reader_was_cancelled_is_closed(client, service):
    service.scripts = [[accepted(), HANG]]
    async with client.stream(PHOTO, PAINTING) as updates:
        await anext(updates)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await anext(updates)
        with pytest.raises(errors.ClientUsageError, match="was closed before its end"):
            await anext(updates)
    assert await asyncio.to_thread(service.call_ended.wait, WITHIN_S)


async def test_two_readers_share_the_updates(client, service):
    one, other = await asyncio.gather(*[collected(updates := client.stream(PHOTO, PAINTING)), collected(updates)])
    assert sorted(kinds([*one, *other])) == sorted(kinds(await collected(client.stream(PHOTO, PAINTING))))
