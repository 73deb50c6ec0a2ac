"""Jobs that are lost with their server and sent again, and images that a server has lost."""

import asyncio
import socket
import time

import grpc
import pytest

from gramophone.recipe import Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client import Checkpoint, CheckpointOptions, GramophoneClient, Style, SyncGramophoneClient, errors
from gramophone_client.streams import recovery, recovery_states
from gramophone_client.transport.connection import Connection
from gramophone_client.transport.job_spec import job_spec
from gramophone_server import errors as server_errors
from tests.support.fake_service import (
    HANG,
    accepted,
    bare,
    checkpoint,
    encoded,
    frame,
    numbered,
    progress,
    refused,
    result,
    serving,
)
from tests.support.wire import Wire

PHOTO, PAINTING = encoded("red"), encoded("yellow")
LOST = bare(grpc.StatusCode.UNAVAILABLE, "gone")
NEVER = (("grpc-retry-pushback-ms", "-1"),)  # no retries by gRPC itself, for the sake of time


@pytest.fixture
def other():
    with serving() as fake:
        yield fake


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(recovery_states, "RETRY_PAUSE_S", (0.01, 0.05))


async def collected(updates):
    return [update async for update in updates]


def kinds(told):
    return [type(update).__name__ for update in told]


def told_of(raised):
    error = raised.value
    return error.frame and error.frame.iteration, error.checkpoint and error.checkpoint.iteration


# --- a lost server


async def test_a_job_goes_on_from_its_last_checkpoint(client, service):
    service.scripts = [
        [*numbered(accepted(), progress(30), checkpoint(30), progress(38), checkpoint(38), frame(40)), LOST],
        numbered(accepted(job_id="j2", resumed_at=38), progress(39), result()),
    ]
    options = {"beta": 5.0, "seed": 3, "start_image": PAINTING, "result_format": "jpeg"}
    told = await collected(client.stream(PHOTO, PAINTING, **options))
    assert kinds(told)[-4:] == ["Frame", "Accepted", "Progress", "Result"]
    assert (told[-3].job_id, told[-3].resumed_at, told[-2].iteration) == ("j2", 38, 39)
    first, again = service.specs
    assert first.recipe.beta == 5 and first.seed == 3 and first.start_image.data == PAINTING
    assert again.resume == b"state after 38"
    assert not again.HasField("recipe") and not again.HasField("seed") and not again.HasField("start_image")
    assert (again.content, again.styles, again.frames) == (first.content, first.styles, first.frames)
    assert (again.result_format, again.checkpoints) == (pb.IMAGE_FORMAT_JPEG, first.checkpoints)
    assert len(set(service.request_ids)) == 2


async def test_a_job_without_a_checkpoint_begins_anew_with_its_seed(client, service):
    service.scripts = [[accepted(), progress(1), LOST], [accepted(), result()]]
    told = await collected(client.stream(PHOTO, PAINTING, beta=5.0, checkpoints=None))
    assert kinds(told) == ["Accepted", "Progress", "Accepted", "Result"]
    first, again = service.specs
    assert not first.HasField("checkpoints") and not first.HasField("seed")
    assert (again.seed, again.recipe.beta, again.resume) == (7, 5, b"")


async def test_a_resumed_job_without_a_newer_checkpoint_is_resumed_again(client, service):
    service.scripts = [[accepted(resumed_at=5), LOST], [accepted(resumed_at=5), result()]]
    await collected(client.stream(PHOTO, PAINTING, resume=b"state after 5"))
    assert [spec.resume for spec in service.specs] == [b"state after 5"] * 2
    assert not any(spec.HasField("recipe") or spec.HasField("seed") for spec in service.specs)


async def test_checkpoints_are_small_and_regular_unless_told(client, service):
    await collected(client.stream(PHOTO, PAINTING))
    await collected(client.stream(PHOTO, PAINTING, checkpoints=CheckpointOptions(every_s=1.5, light=False)))
    small, full = (spec.checkpoints for spec in service.specs)
    assert (small.min_interval.ToMilliseconds(), small.light) == (5000, True)
    assert (full.min_interval.ToMilliseconds(), full.light) == (1500, False)


@pytest.mark.parametrize("scheme", ["ipv4:{0},{1}", "ipv4:{1},{0}"], ids=["first lost", "second lost"])
async def test_a_killed_servers_job_goes_to_the_next_address(service, other, scheme):
    target = scheme.format(service.target, other.target)
    holder, next_one = (service, other) if scheme.endswith("{1}") else (other, service)
    holder.scripts = [[accepted(), progress(20), checkpoint(20), HANG]]
    next_one.scripts = [[accepted(job_id="j2", resumed_at=20), progress(21), result()]]
    told = []
    async with GramophoneClient(target, timeout_s=20) as client:
        async for update in client.stream(PHOTO, PAINTING):
            told.append(update)
            if isinstance(update, Checkpoint):
                killed = time.monotonic()
                await asyncio.to_thread(holder.stop)
    assert kinds(told) == ["Accepted", "Progress", "Checkpoint", "Accepted", "Progress", "Result"]
    assert time.monotonic() - killed < 3
    assert [spec.resume for spec in next_one.specs] == [b"state after 20"]


async def test_a_cut_connection_is_a_lost_server(service):
    service.scripts = [[accepted(), checkpoint(4), HANG], [accepted(resumed_at=4), result()]]
    told = []
    async with Wire(service.target) as wire, GramophoneClient(wire.address, timeout_s=20) as client:
        async for update in client.stream(PHOTO, PAINTING):
            told.append(update)
            if isinstance(update, Checkpoint):
                wire.cut()
    assert kinds(told) == ["Accepted", "Checkpoint", "Accepted", "Result"]


async def test_with_a_grace_the_job_is_looked_for_first(client, service):
    service.scripts = [
        [*numbered(accepted(), checkpoint(4)), LOST],
        [bare(grpc.StatusCode.UNAVAILABLE, "still gone", NEVER)],
        [refused(server_errors.JobNotFound("j1"))],
        numbered(accepted(job_id="j2", resumed_at=4), result()),
    ]
    told = await collected(client.stream(PHOTO, PAINTING, detach_grace=5))
    assert kinds(told) == ["Accepted", "Checkpoint", "Accepted", "Result"]
    assert [(watch.job_id, watch.after_sequence, watch.checkpoints.light) for watch in service.watches] == [
        ("j1", 2, True)
    ] * 2
    assert [spec.resume for spec in service.specs] == [b"", b"state after 4"]


async def test_a_server_that_shuts_down_passes_its_job_on(client, service):
    down = refused(server_errors.ShuttingDown(retry_after_s=0.05))
    down.trailing_metadata += NEVER
    service.scripts = [[accepted(), checkpoint(4), down], [down], [down], [accepted(), result()]]
    await collected(client.stream(PHOTO, PAINTING, detach_grace=5))
    assert service.watches == []
    assert [spec.resume for spec in service.specs] == [b""] + [b"state after 4"] * 3
    assert len(set(service.request_ids)) == 2  # each attempt of the second sending is the same request


async def test_a_server_that_is_full_is_waited_for(client, service):
    full = refused(server_errors.QueueFull(4, 4, 0.05))
    full.trailing_metadata = (
        *(pair for pair in full.trailing_metadata if not pair[0].startswith("grpc-retry")),
        *NEVER,
    )
    service.scripts = [[accepted(), LOST], [full], [full], [accepted(), result()]]
    assert kinds(await collected(client.stream(PHOTO, PAINTING)))[-1] == "Result"


async def test_patience_is_bounded_and_the_loss_is_what_is_raised(client, service):
    service.scripts = [
        [accepted(), frame(3), checkpoint(4), LOST],
        [bare(grpc.StatusCode.UNAVAILABLE, "another word", NEVER)],
    ]
    started = time.monotonic()
    with pytest.raises(errors.ConnectionFailed, match="gone") as raised:
        await collected(client.stream(PHOTO, PAINTING, patience_s=0.4))
    assert 0.4 <= time.monotonic() - started < 3
    assert told_of(raised) == (3, 4)
    assert len(service.specs) > 3


async def test_the_calls_timeout_bounds_the_search_too(client, service):
    service.scripts = [[accepted(), LOST], [bare(grpc.StatusCode.UNAVAILABLE, "gone", NEVER)]]
    started = time.monotonic()
    with pytest.raises(errors.ConnectionFailed, match="gone"):
        await collected(client.stream(PHOTO, PAINTING, timeout_s=1.5))
    assert time.monotonic() - started < 5  # of the 30 s of patience


@pytest.mark.parametrize("grace", [0.0, 5.0], ids=["sent again", "looked for"])
async def test_a_timeout_in_the_middle_of_an_attempt_is_told_as_the_loss_before(client, service, grace):
    service.scripts = [[accepted(), frame(3), LOST], [bare(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")]]
    with pytest.raises(errors.ConnectionFailed, match="gone") as raised:
        await collected(client.stream(PHOTO, PAINTING, detach_grace=grace))
    assert isinstance(raised.value.__cause__, errors.DeadlineExceeded)
    assert told_of(raised) == (3, None)
    assert len(service.specs) + len(service.watches) == 2


async def test_a_timeout_while_images_are_uploaded_again_is_told_as_the_loss_before(client, service, monkeypatch):
    async def too_late(*_):
        raise errors.DeadlineExceeded("not done in time")

    style = await client.upload(PAINTING)
    service.scripts = [[accepted(), LOST], [refused(server_errors.ImageNotFound(style.digest))]]
    monkeypatch.setattr(recovery, "upload", too_late)
    with pytest.raises(errors.ConnectionFailed, match="gone") as raised:
        await collected(client.stream(PHOTO, style))
    assert isinstance(raised.value.__cause__, errors.DeadlineExceeded)


async def test_without_patience_a_loss_is_an_error(client, service):
    service.scripts = [[accepted(), checkpoint(4), LOST]]
    with pytest.raises(errors.ConnectionFailed, match="gone") as raised:
        await collected(client.stream(PHOTO, PAINTING, patience_s=0))
    assert told_of(raised) == (None, 4)
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
async def test_what_the_next_server_says_of_the_job_is_final(client, service, error):
    service.scripts = [[accepted(), checkpoint(4), LOST], [refused(error)]]
    with pytest.raises(errors.GramophoneError) as raised:
        await collected(client.stream(PHOTO, PAINTING))
    assert str(raised.value) == str(error)
    assert told_of(raised) == (None, 4)
    assert len(service.specs) == 2


async def test_a_slow_readers_job_is_not_sent_again(client, service):
    service.scripts = [[accepted(), refused(server_errors.SlowReader(30))]]
    with pytest.raises(errors.SlowReader):
        await collected(client.stream(PHOTO, PAINTING))
    service.scripts = [[accepted(), refused(server_errors.SlowReader(30))], [refused(server_errors.JobNotFound("j1"))]]
    with pytest.raises(errors.JobNotFound):
        await collected(client.stream(PHOTO, PAINTING, detach_grace=5))
    assert len(service.specs) == 2


async def test_a_job_that_takes_its_servers_down_does_not_go_round(client, service):
    service.scripts = [[accepted(), progress(1), LOST]]
    with pytest.raises(errors.ConnectionFailed, match="gone"):
        await collected(client.stream(PHOTO, PAINTING))
    assert len(service.specs) == 1 + recovery_states.MAX_RESENDS
    service.specs.clear()
    service.scripts = [[accepted(), checkpoint(5), LOST]]  # dies there again and again
    with pytest.raises(errors.ConnectionFailed, match="gone"):
        await collected(client.stream(PHOTO, PAINTING))
    assert len(service.specs) == 1 + recovery_states.MAX_RESENDS
    service.specs.clear()
    service.scripts = [[accepted(), checkpoint(i), LOST] for i in range(6)] + [[accepted(), result()]]
    await collected(client.stream(PHOTO, PAINTING))  # each of them got on
    assert len(service.specs) == 7


async def test_a_watched_job_cannot_be_sent_again(client, service):
    service.scripts = [[accepted(), LOST]]
    with pytest.raises(errors.ConnectionFailed):
        await collected(client.watch("j1", checkpoints=CheckpointOptions()))
    assert (service.specs, service.watches[0].checkpoints.light) == ([], True)


# --- a job that was not accepted yet

KINDS = ("unary", "stream", "control")


async def asked(client, how, **options):
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
    refusal = bare(refusal.code, refusal.details, (*refusal.trailing_metadata, *NEVER))
    service.scripts = [[refusal], [refusal], [accepted(), result()]]
    await asked(client, how)
    assert len(request_ids(service)) == 3 and len(set(request_ids(service))) == 1
    assert service.specs[0] == service.specs[2]


@pytest.mark.parametrize("how", KINDS)
async def test_a_server_that_takes_no_jobs_is_asked_for_as_long_as_patience_lasts(client, service, how, monkeypatch):
    monkeypatch.setattr("gramophone_client.client.PATIENCE_S", 0.3)  # of `stylize`
    service.scripts = [[refused(server_errors.ShuttingDown(0.01))]]
    with pytest.raises(errors.ShuttingDown):
        await asked(client, how, **({} if how == "unary" else {"patience_s": 0.3}))
    assert len(service.specs) > 6  # gRPC itself sends it four times


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("status", [LOST, refused(server_errors.ShuttingDown(0.01))], ids=["lost", "down"])
async def test_without_retries_a_job_is_sent_once(service, how, status):
    service.scripts = [[status]]
    async with GramophoneClient(service.target, timeout_s=10, retries=False) as client:
        with pytest.raises(errors.ConnectionFailed):
            await asked(client, how)
    assert len(service.specs) == 1


@pytest.mark.parametrize("how", KINDS)
async def test_a_job_that_takes_its_servers_down_before_it_is_accepted_does_not_go_round(client, service, how):
    service.scripts = [[bare(grpc.StatusCode.UNAVAILABLE, "gone", NEVER)]]
    with pytest.raises(errors.ConnectionFailed, match="gone"):
        await asked(client, how)
    assert len(service.specs) == 1 + recovery_states.MAX_RESENDS


async def test_servers_that_are_not_there_are_waited_for_between_losses(client, service, monkeypatch):
    # Of the calls that fail, only those that had a connection may have taken a server down.
    connected = iter([True, *[False] * 9])
    monkeypatch.setattr(Connection, "is_connected", property(lambda _: next(connected)))
    service.scripts = [*[[bare(grpc.StatusCode.UNAVAILABLE, "gone", NEVER)]] * 8, [accepted(), result()]]
    await asked(client, "stream")
    assert len(service.specs) == 9


@pytest.mark.parametrize("how", KINDS)
async def test_where_nobody_is_nobody_is_waited_for(how):
    started = time.monotonic()
    async with GramophoneClient("127.0.0.1:1", timeout_s=60) as client:
        with pytest.raises(errors.ConnectionFailed, match="is it running there"):
            await asked(client, how)
    assert time.monotonic() - started < recovery.PATIENCE_S / 2


async def test_connecting_without_an_end_does_not_use_up_the_callers_time():
    with socket.create_server(("127.0.0.1", 0)) as silent:  # which takes connections and never says a word
        host, port = silent.getsockname()
        started = time.monotonic()
        async with GramophoneClient(f"{host}:{port}", timeout_s=0.5) as client:
            with pytest.raises(errors.DeadlineExceeded):
                await client.stylize(PHOTO, PAINTING)
        assert time.monotonic() - started < 10


# --- going on from a checkpoint by hand


@pytest.mark.parametrize("kind", ["bytes", "path", "checkpoint"])
async def test_a_checkpoint_is_bytes_a_file_or_an_update(client, service, tmp_path, kind):
    state = Checkpoint(4, True, b"state after 4")
    state.save(tmp_path / "job.checkpoint")
    given = {"bytes": state.data, "path": tmp_path / "job.checkpoint", "checkpoint": state}[kind]
    service.scripts = [[accepted(resumed_at=4), result()]]
    stylized = await client.stylize(PHOTO, PAINTING, resume=given, result_format="webp")
    assert stylized.job_id == "j1"
    assert (service.specs[0].resume, service.specs[0].HasField("recipe")) == (b"state after 4", False)


@pytest.mark.parametrize(
    "given", [{"beta": 2.0}, {"seed": 0}, {"start_image": PHOTO}, {"preset": "fast"}, {"alpha": 0.0, "step": 1.0}]
)
def test_a_checkpoint_brings_the_recipe(given):
    with pytest.raises(errors.InvalidRequest, match="cannot be given with resume: the job continues with") as raised:
        job_spec(PHOTO, PAINTING, resume=b"state", **given)
    assert [violation.field for violation in raised.value.violations] == list(given)


def test_an_empty_checkpoint_is_refused(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(errors.InvalidRequest, match="empty is empty, and not a checkpoint"):
        job_spec(PHOTO, PAINTING, resume=tmp_path / "empty")


# --- images that were uploaded


async def test_an_uploaded_image_is_only_named(client, service, tmp_path):
    (tmp_path / "painting.png").write_bytes(PAINTING)
    style = await client.upload(tmp_path / "painting.png")
    assert (style.width, style.height, service.images) == (24, 18, {style.digest: PAINTING})
    photo = await client.upload(PHOTO + bytes(600_000))  # several pieces
    assert service.images[photo.digest] == PHOTO + bytes(600_000)
    await client.stylize(photo, style)
    await collected(client.stream(PHOTO, [Style(style, 2), PAINTING]))
    first, second = service.specs
    assert (first.content.digest, first.styles[0].image.digest) == (photo.digest, style.digest)
    assert (second.styles[0].image.digest, second.styles[0].weight) == (style.digest, 2)
    assert second.styles[1].image.data == PAINTING
    assert service.uploads == 2


@pytest.mark.parametrize("how", ["unary", "stream", "control"])
async def test_an_image_that_the_server_has_lost_is_uploaded_again(client, service, how):
    async def ask():
        if how == "unary":
            await client.stylize(PHOTO, style)
        elif how == "stream":
            await collected(client.stream(PHOTO, style))
        else:
            async with client.control(PHOTO, style) as job:
                await job.result()

    style = await client.upload(PAINTING)
    service.images.clear()
    await ask()
    assert (service.uploads, len(service.specs), service.images) == (2, 2, {style.digest: PAINTING})
    if how != "control":
        assert len(set(service.request_ids)) == 1

    # Once only: a server that has no room for it would be asked for ever.
    service.scripts = [[refused(server_errors.ImageNotFound(style.digest))]]
    with pytest.raises(errors.ImageNotFound, match="upload it with UploadImage"):
        await ask()
    assert service.uploads == 3


async def test_a_job_that_moves_takes_its_images_along(service, other):
    service.scripts = [[accepted(), checkpoint(2), HANG]]
    other.scripts = [[accepted(resumed_at=2), result()]]
    async with GramophoneClient(f"ipv4:{service.target},{other.target}", timeout_s=20) as client:
        style = await client.upload(PAINTING)
        async for update in client.stream(PHOTO, style):
            if isinstance(update, Checkpoint):
                await asyncio.to_thread(service.stop)
    assert other.images == {style.digest: PAINTING}


def test_the_synchronous_face_uploads_and_moves(service):
    service.scripts = [[accepted(), checkpoint(2), LOST], [accepted(resumed_at=2), result()]]
    with SyncGramophoneClient(service.target) as client:
        style = client.upload(PAINTING)
        assert kinds(client.stream(PHOTO, style))[2] == "Accepted"
