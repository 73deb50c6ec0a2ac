import asyncio
import gc
import uuid
from datetime import UTC, datetime

import grpc
import pytest

import gramophone_client
from gramophone.recipe import Recipe, Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client import AsyncGramophoneClient, FrameOptions, Losses, errors
from gramophone_server import errors as server_errors
from tests.support.clock import until
from tests.support.fake_service import (
    HANG,
    LOST,
    NOWHERE,
    PAINTING,
    PHOTO,
    accepted,
    encoded,
    frame,
    job,
    numbered,
    progress,
    refused,
    result,
    waiting,
)
from tests.support.updates import collected, kinds


async def test_updates_are_typed_and_in_order(client):
    updates = await collected(client.stream(PHOTO, PAINTING))
    assert kinds(updates) == ["Accepted", "Progress", "Frame", "Progress", "Frame", "Result"]
    start, first, picture, *_, end = updates
    assert (start.job_id, start.recipe, start.seed, start.width, start.height) == ("j1", Recipe(), 7, 24, 18)
    losses = Losses(3, 1, 2, 0, content_layers={}, style_layers={"relu1_1": 2})
    assert (first.iteration, first.iterations, first.losses, first.time_left_s) == (10, 300, losses, 90.5)
    assert (first.width, first.height, first.scale, first.scales) == (12, 9, 1, 2)
    assert (picture.iteration, picture.picture.format, picture.dropped) == (10, "jpeg", 2)
    assert picture.picture.image().size == (12, 9)
    assert (end.stop_reason, end.elapsed_s, end.iterations) == ("ITERATIONS_DONE", 2.25, 300)
    assert end.image().getpixel((0, 0)) == (0, 128, 0)


async def test_stylize_returns_the_picture_and_its_recipe(client, tmp_path):
    stylized = await client.stylize(PHOTO, PAINTING)
    assert (stylized.recipe, stylized.seed, stylized.job_id) == (Recipe(), 7, "j1")
    assert (stylized.picture.format, stylized.picture.width, stylized.picture.height) == ("png", 24, 18)
    stylized.save(tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes() == stylized.picture.data


async def test_server_info(client):
    info = await client.server_info()
    assert (info.version, info.layers, info.limits.max_size) == ("1.2.3", ("relu1_1", "relu4_2"), 2048)
    assert info.presets == {"fast": Recipe()}


def test_the_public_names_exist():
    names = gramophone_client.__all__
    assert len(set(names)) == len(names)  # their order is checked with that of all modules
    assert all(hasattr(gramophone_client, name) for name in names)


# --- errors


async def test_unknown_fields_and_presets_are_not_sent(client, service):
    with pytest.raises(errors.InvalidRequestError, match="gamma") as raised:
        await client.stylize(PHOTO, PAINTING, gamma=1)
    assert raised.value.violations == (Violation("gamma", "is not an option of a job"),)
    with pytest.raises(errors.InvalidRequestError, match="must be one of fast"):
        await client.stylize(PHOTO, PAINTING, preset="best")
    with pytest.raises(FileNotFoundError):
        await client.stylize("/no/such/photo.jpg", PAINTING)
    assert service.specs == []


async def test_the_error_without_a_server_names_the_address():
    async with AsyncGramophoneClient(NOWHERE) as client:
        with pytest.raises(
            errors.ConnectionFailedError, match=rf"at {NOWHERE} \(Connection refused\); is it"
        ) as raised:
            await client.server_info()
        assert raised.value.code is grpc.StatusCode.UNAVAILABLE


async def test_the_deadline_ends_the_call_on_both_sides(client, service):
    service.scripts = [[accepted(), frame(1), HANG]]
    with pytest.raises(errors.DeadlineExceededError, match=r"\b3 s") as raised:
        await collected(client.stream(PHOTO, PAINTING, timeout=3.0))
    assert raised.value.frame.iteration == 1
    assert await asyncio.to_thread(service.call_ended.wait, 5)
    with pytest.raises(errors.DeadlineExceededError):
        await client.stylize(PHOTO, PAINTING, timeout=0.1)


async def test_a_message_above_the_limit_is_not_taken_for_a_full_server(service):
    async with AsyncGramophoneClient(service.target, max_message_bytes=2000) as client:
        with pytest.raises(errors.MessageTooLargeError, match="smaller picture"):
            await client.stylize(encoded() + bytes(3000), PAINTING)
        service.scripts = [[accepted(), result(bytes(3000))]]
        with pytest.raises(errors.MessageTooLargeError):
            await client.stylize(PHOTO, PAINTING)


# --- jobs that outlive their call


@pytest.mark.parametrize("how", ["unary", "stream"])
async def test_each_job_has_its_own_request_id_and_all_attempts_share_it(client, service, how):
    async def ask(**options):
        if how == "unary":
            await client.stylize(PHOTO, PAINTING, **options)
        else:
            await collected(client.stream(PHOTO, PAINTING, **options))

    service.scripts = [[refused(server_errors.QueueFull(4, 4, 0.01))], service.scripts[0]]
    await ask()
    await ask()
    given = str(uuid.uuid4())
    await ask(request_id=given)
    first, retried, other, last = service.request_ids
    assert first == retried == str(uuid.UUID(first))
    assert len({first, other, last}) == 3
    assert last == given


async def test_values_of_the_wrong_kind_are_named(client, service):
    with pytest.raises(errors.InvalidRequestError, match=r"request_id: must be the text of a UUID, got an uuid\.UUID"):
        await client.stylize(PHOTO, PAINTING, request_id=uuid.uuid4())
    for watch in (client.watch, client.control_job):
        with pytest.raises(errors.InvalidRequestError, match="detach_grace: must be a number of seconds, at least 0"):
            watch("j1", detach_grace="long")
    assert service.specs == []


async def test_the_grace_reaches_the_request(client, service):
    await client.stylize(PHOTO, PAINTING, detach_grace=1.5)
    await collected(client.stream(PHOTO, PAINTING, detach_grace=0))
    await client.stylize(PHOTO, PAINTING)
    graces = [spec.detach_grace.ToMilliseconds() if spec.HasField("detach_grace") else None for spec in service.specs]
    assert graces == [1500, 0, None]


async def test_watching_yields_the_same_updates_as_streaming(client, service):
    service.scripts = [numbered(accepted(attached=True), waiting(2), progress(1), frame(1), result())]
    updates = await collected(client.watch("j1", frames=FrameOptions(max_side=64)))
    assert kinds(updates) == ["Accepted", "Waiting", "Progress", "Frame", "Result"]
    assert [update.sequence for update in updates] == [1, 2, 3, 4, 5]
    assert (updates[0].attached, updates[1].queue_position) == (True, 2)
    assert (service.watches[0].job_id, service.watches[0].frames.max_side) == ("j1", 64)
    updates = await collected(client.watch("j1", 3, frames=None))
    assert [update.sequence for update in updates] == [4, 5]
    assert service.watches[1] == pb.WatchJobRequest(job_id="j1", after_sequence=3)
    with pytest.raises(errors.InvalidRequestError, match="after_sequence: must be a whole number from 0 to"):
        await collected(client.watch("j1", -1))


async def test_jobs_can_be_looked_up_cancelled_and_listed(client, service):
    service.jobs = [
        job(job_id="j2", state=pb.JOB_STATE_QUEUED, queue_position=1, iteration=0),
        job(losses=pb.Losses(total=3), start_time={"seconds": 1_750_000_001}),
    ]
    status = await client.get_job("j1")
    assert (status.state, status.iteration, status.losses.total, status.stop_reason) == ("RUNNING", 10, 3, None)
    assert status.create_time == datetime.fromtimestamp(1_750_000_000, UTC)
    assert status.start_time == datetime.fromtimestamp(1_750_000_001, UTC)
    assert (status.end_time, status.expire_time) == (None, None)
    assert [(one.job_id, one.queue_position) for one in await client.list_jobs()] == [("j2", 1), ("j1", 0)]
    stopped = await client.cancel_job("j1")
    assert (stopped.state, stopped.end_time) == ("CANCELLED", datetime.fromtimestamp(1_750_000_060, UTC))
    for ask in (client.get_job, client.cancel_job):
        with pytest.raises(errors.JobNotFoundError, match="j3"):
            await ask("j3")


# --- leaving early


async def test_leaving_the_iteration_cancels_the_call(client, service):
    service.scripts = [[accepted(), frame(1), HANG]]
    async with client.stream(PHOTO, PAINTING) as updates:
        async for _ in updates:
            break
    assert await asyncio.to_thread(service.call_ended.wait, 5)
    assert service.cancelled


async def test_dropping_the_iteration_cancels_the_call(client, service):
    service.scripts = [[accepted(), frame(1), HANG]]
    async for _ in client.stream(PHOTO, PAINTING):
        break
    gc.collect()
    assert await asyncio.to_thread(service.call_ended.wait, 5)


@pytest.mark.parametrize("how", ["unary", "stream"])
async def test_cancelling_the_task_cancels_the_call(client, service, how):
    service.scripts = [[accepted(), HANG]]
    call = client.stylize(PHOTO, PAINTING) if how == "unary" else collected(client.stream(PHOTO, PAINTING))
    task = asyncio.create_task(call)
    assert await asyncio.to_thread(service.hanging.wait, 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(service.call_ended.wait, 5)
    assert service.cancelled


@pytest.mark.parametrize("how", ["unary", "stream"])
async def test_closing_the_client_ends_its_calls_with_an_error(client, service, how):
    service.scripts = [[accepted(), HANG]]
    call = client.stylize(PHOTO, PAINTING) if how == "unary" else collected(client.stream(PHOTO, PAINTING))
    task = asyncio.create_task(call)
    assert await asyncio.to_thread(service.hanging.wait, 5)
    await client.close()
    with pytest.raises(errors.CallCancelledError):
        await task
    assert await asyncio.to_thread(service.call_ended.wait, 5)


async def test_closing_the_client_ends_a_search_for_a_lost_job(client, service):
    service.scripts = [[accepted(), LOST], [LOST]]
    updates = client.stream(PHOTO, PAINTING, detach_grace=5)
    await anext(updates)
    task = asyncio.create_task(anext(updates))
    await until(lambda: service.watches)
    await client.close()
    with pytest.raises(errors.CallCancelledError):
        await task


async def test_a_finished_job_is_not_cancelled(client, service):
    await collected(client.stream(PHOTO, PAINTING))
    assert await asyncio.to_thread(service.call_ended.wait, 5)
    assert not service.cancelled


def test_a_client_needs_a_running_loop():
    with pytest.raises(errors.ClientUsageError, match=r"as with asyncio\.run\(main\(\)\); GramophoneClient needs none"):
        AsyncGramophoneClient(NOWHERE)
