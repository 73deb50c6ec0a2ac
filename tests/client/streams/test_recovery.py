"""Jobs that are lost with their server and sent again."""

import asyncio
import logging
import re
import socket
import time

import grpc
import pytest

from gramophone.recipe import Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client import Accepted, AsyncGramophoneClient, Checkpoint, CheckpointOptions, errors
from gramophone_client.streams import job_uploads, recovery, recovery_states
from gramophone_client.transport.call_options import DEFAULT_MAX_RETRIES
from gramophone_client.transport.connection import Connection
from gramophone_server import errors as server_errors
from tests.support.fake_service import (
    HANG,
    LOST,
    NO_RETRIES,
    NOWHERE,
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
    serving,
)
from tests.support.updates import collected, kinds
from tests.support.wire import Wire

pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.fixture
def other_service():
    with serving() as fake:
        yield fake


def partial_result(raised):
    error = raised.value
    return error.frame and error.frame.iteration, error.checkpoint and error.checkpoint.iteration


# --- a lost server


async def test_a_job_continues_from_its_last_checkpoint(client, service):
    service.scripts = [
        [*numbered(accepted(), progress(30), checkpoint(30), progress(38), checkpoint(38), frame(40)), LOST],
        numbered(accepted(job_id="j2", resumed_at=38), progress(39), result()),
    ]
    options = {"beta": 5.0, "seed": 3, "start_image": PAINTING, "result_format": "jpeg"}
    updates = await collected(client.stream(PHOTO, PAINTING, **options))
    assert kinds(updates)[-4:] == ["Frame", "Accepted", "Progress", "Result"]
    assert (updates[-3].job_id, updates[-3].resumed_at, updates[-2].iteration) == ("j2", 38, 39)
    first, again = service.specs
    assert first.recipe.beta == 5 and first.seed == 3 and first.start_image.data == PAINTING
    assert again.resume == b"state after 38"
    assert not again.HasField("recipe") and not again.HasField("seed") and not again.HasField("start_image")
    assert (again.content, again.styles, again.frames) == (first.content, first.styles, first.frames)
    assert (again.result_format, again.checkpoints) == (pb.IMAGE_FORMAT_JPEG, first.checkpoints)
    assert len(set(service.request_ids)) == 2


async def test_a_job_without_a_checkpoint_restarts_with_its_seed(client, service):
    service.scripts = [[accepted(), progress(1), LOST], [accepted(), result()]]
    updates = await collected(client.stream(PHOTO, PAINTING, beta=5.0, checkpoints=None))
    assert kinds(updates) == ["Accepted", "Progress", "Accepted", "Result"]
    first, again = service.specs
    assert not first.HasField("checkpoints") and not first.HasField("seed")
    assert (again.seed, again.recipe.beta, again.resume) == (7, 5, b"")


async def test_a_resumed_job_without_a_newer_checkpoint_is_resumed_again(client, service):
    service.scripts = [[accepted(resumed_at=5), LOST], [accepted(resumed_at=5), result()]]
    await collected(client.stream(PHOTO, PAINTING, resume=b"state after 5"))
    assert [spec.resume for spec in service.specs] == [b"state after 5"] * 2
    assert not any(spec.HasField("recipe") or spec.HasField("seed") for spec in service.specs)


async def test_checkpoints_are_light_and_regular_by_default(client, service):
    await collected(client.stream(PHOTO, PAINTING))
    await collected(client.stream(PHOTO, PAINTING, checkpoints=CheckpointOptions(every_s=1.5, light=False)))
    small, full = (spec.checkpoints for spec in service.specs)
    assert (small.min_interval.ToMilliseconds(), small.light) == (5000, True)
    assert (full.min_interval.ToMilliseconds(), full.light) == (1500, False)


@pytest.mark.parametrize("scheme", ["ipv4:{0},{1}", "ipv4:{1},{0}"], ids=["first lost", "second lost"])
async def test_a_killed_servers_job_goes_to_the_next_address(service, other_service, scheme):
    target = scheme.format(service.target, other_service.target)
    holder, next_one = (service, other_service) if scheme.endswith("{1}") else (other_service, service)
    holder.scripts = [[accepted(), progress(20), checkpoint(20), HANG]]
    next_one.scripts = [[accepted(job_id="j2", resumed_at=20), progress(21), result()]]
    updates = []
    async with AsyncGramophoneClient(target, timeout=20) as client:
        async for update in client.stream(PHOTO, PAINTING):
            updates.append(update)
            if isinstance(update, Checkpoint):
                killed = time.monotonic()
                await asyncio.to_thread(holder.stop)
    assert kinds(updates) == ["Accepted", "Progress", "Checkpoint", "Accepted", "Progress", "Result"]
    assert time.monotonic() - killed < 15  # of the 20 s of the call
    assert [spec.resume for spec in next_one.specs] == [b"state after 20"]


async def test_a_cut_connection_is_a_lost_server(service):
    service.scripts = [[accepted(), checkpoint(4), HANG], [accepted(resumed_at=4), result()]]
    updates = []
    async with Wire(service.target) as wire, AsyncGramophoneClient(wire.address, timeout=20) as client:
        async for update in client.stream(PHOTO, PAINTING):
            updates.append(update)
            if isinstance(update, Checkpoint):
                wire.cut()
    assert kinds(updates) == ["Accepted", "Checkpoint", "Accepted", "Result"]


async def test_with_a_grace_the_job_is_looked_for_first(client, service):
    service.scripts = [
        [*numbered(accepted(), checkpoint(4)), LOST],
        [rpc_status(grpc.StatusCode.UNAVAILABLE, "still gone", NO_RETRIES)],
        [refused(server_errors.JobNotFound("j1"))],
        numbered(accepted(job_id="j2", resumed_at=4), result()),
    ]
    updates = await collected(client.stream(PHOTO, PAINTING, detach_grace=5))
    assert kinds(updates) == ["Accepted", "Checkpoint", "Accepted", "Result"]
    assert [(watch.job_id, watch.after_sequence, watch.checkpoints.light) for watch in service.watches] == [
        ("j1", 2, True)
    ] * 2
    assert [spec.resume for spec in service.specs] == [b"", b"state after 4"]


async def test_a_job_of_a_server_that_shuts_down_is_sent_again(client, service):
    down = refused(server_errors.ShuttingDown(retry_after_s=0.05))
    down.trailing_metadata += NO_RETRIES
    service.scripts = [[accepted(), checkpoint(4), down], [down], [down], [accepted(), result()]]
    await collected(client.stream(PHOTO, PAINTING, detach_grace=5))
    assert service.watches == []
    assert [spec.resume for spec in service.specs] == [b""] + [b"state after 4"] * 3
    assert len(set(service.request_ids)) == 2  # each attempt of the second sending is the same request


async def test_a_server_that_is_full_is_waited_for(client, service):
    full = refused(server_errors.QueueFull(4, 4, 0.05))
    full.trailing_metadata = (
        *(pair for pair in full.trailing_metadata if not pair[0].startswith("grpc-retry")),
        *NO_RETRIES,
    )
    service.scripts = [[accepted(), LOST], [full], [full], [accepted(), result()]]
    assert kinds(await collected(client.stream(PHOTO, PAINTING)))[-1] == "Result"


@pytest.mark.parametrize(
    "limits", [{"timeout": 60, "patience": 20}, {"timeout": 20}], ids=["patience", "the call's timeout"]
)
async def test_resends_end_with_patience_or_the_calls_time_and_the_loss_is_raised(client, service, clock_ahead, limits):
    service.scripts = [
        [accepted(), frame(3), checkpoint(4), LOST],
        [rpc_status(grpc.StatusCode.UNAVAILABLE, "another word", NO_RETRIES)],
    ]
    clock_ahead(20, lambda: len(service.specs) == 6)
    with pytest.raises(errors.ConnectionFailedError, match="gone") as raised:
        await collected(client.stream(PHOTO, PAINTING, **limits))
    assert partial_result(raised) == (3, 4)
    assert len(service.specs) == 6


@pytest.mark.parametrize("grace", [0.0, 5.0], ids=["sent again", "looked for"])
async def test_a_timeout_during_an_attempt_raises_the_loss_before(client, service, grace):
    service.scripts = [
        [accepted(), frame(3), LOST],
        [rpc_status(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")],
    ]
    with pytest.raises(errors.ConnectionFailedError, match="gone") as raised:
        await collected(client.stream(PHOTO, PAINTING, detach_grace=grace))
    assert isinstance(raised.value.__cause__, errors.DeadlineExceededError)
    assert partial_result(raised) == (3, None)
    assert len(service.specs) + len(service.watches) == 2


async def test_a_timeout_while_images_are_uploaded_again_raises_the_loss_before(client, service, monkeypatch):
    async def too_late(*_, **__):
        raise errors.DeadlineExceededError("not done in time")

    style = await client.upload(PAINTING)
    service.scripts = [[accepted(), LOST], [refused(server_errors.ImageNotFound(style.digest))]]
    monkeypatch.setattr(job_uploads, "upload_once", too_late)
    with pytest.raises(errors.ConnectionFailedError, match="gone") as raised:
        await collected(client.stream(PHOTO, style))
    assert isinstance(raised.value.__cause__, errors.DeadlineExceededError)


async def test_a_stream_says_what_it_recovers_from(client, service, monkeypatch):
    monkeypatch.setattr(recovery_states, "RETRY_PAUSE_S", (0.2, 0.2))
    service.scripts = [[accepted(), LOST], [accepted(), result()]]
    async with client.stream(PHOTO, PAINTING) as stream:
        assert stream.loss is None
        following = asyncio.create_task(collected(stream))
        while stream.loss is None:
            await asyncio.sleep(0.001)
        assert isinstance(stream.loss, errors.ConnectionFailedError)
        await following
        assert stream.loss is None


async def test_without_patience_a_loss_is_an_error(client, service):
    service.scripts = [[accepted(), checkpoint(4), LOST]]
    with pytest.raises(errors.ConnectionFailedError, match="gone") as raised:
        await collected(client.stream(PHOTO, PAINTING, patience=0))
    assert partial_result(raised) == (None, 4)
    assert len(service.specs) == 1


@pytest.mark.parametrize(
    "error",
    [
        server_errors.InvalidRequest([Violation("spec.resume", "is of another network")]),
        server_errors.Diverged(9),
        server_errors.Cancelled(),
        server_errors.OutOfDeviceMemory(9, 9),
        server_errors.EngineFailed(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_an_error_of_the_next_server_is_final(client, service, error):
    service.scripts = [[accepted(), checkpoint(4), LOST], [refused(error)]]
    with pytest.raises(errors.GramophoneError) as raised:
        await collected(client.stream(PHOTO, PAINTING))
    assert str(raised.value) == str(error)
    assert partial_result(raised) == (None, 4)
    assert len(service.specs) == 2


async def test_a_slow_readers_job_is_not_sent_again(client, service):
    service.scripts = [[accepted(), refused(server_errors.SlowReader(30))]]
    with pytest.raises(errors.SlowReaderError):
        await collected(client.stream(PHOTO, PAINTING))
    service.scripts = [[accepted(), refused(server_errors.SlowReader(30))], [refused(server_errors.JobNotFound("j1"))]]
    with pytest.raises(errors.JobNotFoundError):
        await collected(client.stream(PHOTO, PAINTING, detach_grace=5))
    assert len(service.specs) == 2


ADVICE = (
    "the job was lost 4 times without 10 s of running in between, perhaps because of the job itself, and is not sent "
    "again; to go on by hand, send it again"
)


@pytest.mark.parametrize("how", ["stream", "control"])
async def test_a_job_that_crashes_its_servers_is_given_up(client, service, how):
    service.scripts = [[accepted(), progress(1), LOST]]
    with pytest.raises(errors.ConnectionFailedError) as raised:
        await run_job(client, how)
    assert str(raised.value) == f"{ADVICE}; the last loss: {raised.value.__cause__}"
    assert raised.value.code is grpc.StatusCode.UNAVAILABLE and "gone" in str(raised.value.__cause__)
    assert len(service.specs) == 1 + DEFAULT_MAX_RETRIES


@pytest.mark.parametrize("how", ["stream", "control"])
async def test_a_job_that_crashes_its_servers_a_checkpoint_later_each_time_is_given_up(client, service, how):
    service.scripts = [[accepted(), progress(i), frame(i), checkpoint(i), LOST] for i in range(1, 9)]
    with pytest.raises(errors.ConnectionFailedError) as raised:
        await run_job(client, how)
    assert str(raised.value).startswith(
        f"{ADVICE} with `resume` and the error's `checkpoint`, of iteration 4; the last"
    )
    assert partial_result(raised) == (4, 4)
    assert [spec.resume for spec in service.specs] == [b"", *(b"state after %d" % i for i in range(1, 4))]


async def test_a_job_that_has_run_for_ten_seconds_may_be_lost_again(client, service, monkeypatch):
    monkeypatch.setattr("gramophone_client.streams.recovery_states.SETTLED_S", 0.0)
    service.scripts = [[accepted(), progress(i), checkpoint(i), LOST] for i in range(1, 7)] + [[accepted(), result()]]
    await collected(client.stream(PHOTO, PAINTING))
    assert len(service.specs) == 7


async def test_a_caller_that_reads_slowly_makes_no_job_look_like_a_running_one(client, service, monkeypatch):
    """Events count from their arrival."""
    monkeypatch.setattr("gramophone_client.streams.recovery_states.SETTLED_S", 0.5)
    service.scripts = [[accepted(), progress(i), checkpoint(i), LOST] for i in range(1, 9)]
    with pytest.raises(errors.ConnectionFailedError, match="lost 4 times"):
        async for update in client.stream(PHOTO, PAINTING, timeout=60):
            if not isinstance(update, Accepted):
                await asyncio.sleep(0.6)  # longer than a job must run


async def test_a_job_that_is_gone_after_each_search_is_given_up(client, service):
    service.scripts = [
        step
        for i in range(1, 9)
        for step in ([accepted(), checkpoint(i), LOST], [refused(server_errors.JobNotFound("j1"))])
    ]
    with pytest.raises(errors.JobNotFoundError, match=r"lost 4 times .* of iteration 4;"):
        await collected(client.stream(PHOTO, PAINTING, detach_grace=5))


async def test_a_job_that_fails_by_itself_after_losses_is_no_loss(client, service):
    service.scripts = [[accepted(), LOST]] * 3 + [[accepted(), refused(server_errors.EngineFailed())]]
    with pytest.raises(errors.ServerFailedError) as raised:
        await collected(client.stream(PHOTO, PAINTING))
    assert "lost" not in str(raised.value)


async def test_a_watched_job_cannot_be_sent_again(client, service):
    service.scripts = [[accepted(), LOST]]
    with pytest.raises(errors.ConnectionFailedError):
        await collected(client.watch("j1", checkpoints=CheckpointOptions()))
    assert (service.specs, service.watches[0].checkpoints.light) == ([], True)


async def test_the_images_of_a_resent_job_are_uploaded_to_its_new_server(service, other_service):
    service.scripts = [[accepted(), checkpoint(2), HANG]]
    other_service.scripts = [[accepted(resumed_at=2), result()]]
    async with AsyncGramophoneClient(f"ipv4:{service.target},{other_service.target}", timeout=20) as client:
        style = await client.upload(PAINTING)
        async for update in client.stream(PHOTO, style):
            if isinstance(update, Checkpoint):
                await asyncio.to_thread(service.stop)
    assert other_service.images == {style.digest: PAINTING}


# --- a job that was not accepted yet


KINDS = ("unary", "stream", "control")


async def run_job(client, how, **options):
    if how == "unary":
        await client.stylize(PHOTO, PAINTING, **options)
    elif how == "stream":
        await collected(client.stream(PHOTO, PAINTING, **options))
    else:
        async with client.control(PHOTO, PAINTING, **options) as job:
            await job.result()


def request_ids(service):
    return [*service.request_ids, *(message.start.request_id for message in service.messages)]


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("reason", [server_errors.ShuttingDown, server_errors.NotReady, None])
async def test_a_server_that_takes_no_jobs_or_is_lost_is_asked_again(client, service, how, reason):
    refusal = LOST if reason is None else refused(reason(retry_after_s=0.01))
    refusal = rpc_status(refusal.code, refusal.details, (*refusal.trailing_metadata, *NO_RETRIES))
    service.scripts = [[refusal], [refusal], [accepted(), result()]]
    await run_job(client, how)
    assert len(request_ids(service)) == 3 and len(set(request_ids(service))) == 1
    assert service.specs[0] == service.specs[2]


@pytest.mark.parametrize("how", KINDS)
async def test_a_server_that_takes_no_jobs_is_asked_for_as_long_as_patience_lasts(client, service, clock_ahead, how):
    down = refused(server_errors.ShuttingDown(0.01))
    down.trailing_metadata += NO_RETRIES
    service.scripts = [[down]]
    clock_ahead(20, lambda: len(service.specs) == 6)
    with pytest.raises(errors.ShuttingDownError):
        await run_job(client, how, timeout=60, patience=20)
    assert len(service.specs) == 6


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("status", [LOST, refused(server_errors.ShuttingDown(0.01))], ids=["lost", "down"])
async def test_without_retries_a_job_is_sent_once(service, how, status):
    service.scripts = [[status]]
    async with AsyncGramophoneClient(service.target, timeout=60, max_retries=0) as client:
        with pytest.raises(errors.ConnectionFailedError):
            await run_job(client, how)
    assert len(service.specs) == 1


@pytest.mark.parametrize("how", KINDS)
async def test_a_job_that_crashes_its_servers_before_it_is_accepted_is_given_up(client, service, how):
    service.scripts = [[rpc_status(grpc.StatusCode.UNAVAILABLE, "gone", NO_RETRIES)]]
    with pytest.raises(errors.ConnectionFailedError, match=r"the job was lost 4 times, .* send it again; .*gone"):
        await run_job(client, how)
    assert len(service.specs) == 1 + DEFAULT_MAX_RETRIES


async def test_missing_servers_are_waited_for_between_losses(client, service, monkeypatch):
    # A failed call can only have crashed a server if it had a connection.
    connected = iter([True, *[False] * 9])
    monkeypatch.setattr(Connection, "is_connected", property(lambda _: next(connected)))
    service.scripts = [*[[rpc_status(grpc.StatusCode.UNAVAILABLE, "gone", NO_RETRIES)]] * 8, [accepted(), result()]]
    await run_job(client, "stream")
    assert len(service.specs) == 9


@pytest.mark.parametrize("how", KINDS)
async def test_a_missing_server_is_not_waited_for(how):
    started = time.monotonic()
    async with AsyncGramophoneClient(NOWHERE, timeout=60) as client:
        with pytest.raises(errors.ConnectionFailedError, match="is it running there"):
            await run_job(client, how)
    assert time.monotonic() - started < recovery.PATIENCE_S / 2


async def test_endless_connecting_does_not_use_up_the_callers_time():
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections, and sends nothing
        host, port = silent.getsockname()
        started = time.monotonic()
        async with AsyncGramophoneClient(f"{host}:{port}", timeout=0.5) as client:
            with pytest.raises(errors.DeadlineExceededError):
                await client.stylize(PHOTO, PAINTING)
        assert time.monotonic() - started < 10


# --- the log


async def test_what_recovery_does_is_in_the_log_without_the_jobs_secrets(client, service, caplog):
    caplog.set_level(logging.INFO, "gramophone_client")
    job_id = "0123456789abcdef"
    missing = refused(server_errors.JobNotFound(job_id))
    service.scripts = [
        [refused(server_errors.ShuttingDown(0.01))],
        [accepted(job_id=job_id), checkpoint(6), LOST],
        [missing],
        [accepted(job_id="fedcba9876543210", resumed_at=6), result()],
    ]
    style = await client.upload(PAINTING)
    service.images.clear()
    await collected(client.stream(PHOTO, style, detach_grace=5))
    lines = [re.sub(r"\d+\.\d s$", "T s", record.getMessage()) for record in caplog.records]
    assert lines == [
        "a job without an id yet: uploads 1 files (0.0 MiB) that its server does not have",
        "job 01234567: ConnectionFailedError; asks for it again in T s",
        "job 01234567: JobNotFoundError; sends it again from iteration 6 in T s",
    ]
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING", "WARNING"]


async def test_a_refusal_that_may_pass_is_in_the_log(client, service, caplog):
    caplog.set_level(logging.INFO, "gramophone_client")
    down = refused(server_errors.ShuttingDown(0.01))
    service.scripts = [
        [rpc_status(down.code, down.details, (*down.trailing_metadata, *NO_RETRIES))],
        service.scripts[0],
    ]
    await client.stylize(PHOTO, PAINTING)
    (record,) = caplog.records
    assert record.getMessage().startswith("a job without an id yet: ShuttingDownError; sends it again")
