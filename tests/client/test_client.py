import asyncio
import contextlib
import gc
import inspect
import io
import json
import re
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import pairwise

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckResponse
from PIL import Image

import gramophone_client
from gramophone.recipe import InvalidRecipe, LayerWeight, Recipe, Start, Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client import Frame, FrameOptions, GramophoneClient, Losses, Style, SyncGramophoneClient, errors
from gramophone_client.streams import job_stream, recovery_states
from gramophone_client.transport.connection import channel_options
from gramophone_client.transport.job_spec import job_spec
from gramophone_client.types.options import JobOptions
from gramophone_server import errors as server_errors
from gramophone_server.rpc.status import CODES as SERVER_CODES
from tests.support.fake_service import (
    HANG,
    accepted,
    bare,
    checkpoint,
    encoded,
    frame,
    job,
    numbered,
    progress,
    refused,
    result,
    waiting,
)

PHOTO, PAINTING = encoded("red"), encoded("yellow")
NOWHERE = "127.0.0.1:1"  # a port that nobody listens on

UNAVAILABLE, EXHAUSTED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED


async def collected(updates):
    return [update async for update in updates]


# --- what comes back


async def test_updates_come_typed_and_in_order(client):
    told = await collected(client.stream(PHOTO, PAINTING))
    names = [type(update).__name__ for update in told]
    assert names == ["Accepted", "Progress", "Frame", "Progress", "Frame", "Result"]
    start, first, picture, *_, end = told
    assert (start.job_id, start.recipe, start.seed, start.width, start.height) == ("j1", Recipe(), 7, 24, 18)
    losses = Losses(3, 1, 2, 0, content_layers={}, style_layers={"relu1_1": 2})
    assert (first.iteration, first.iterations, first.losses, first.time_left_s) == (10, 300, losses, 90.5)
    assert (picture.iteration, picture.picture.format, picture.dropped) == (10, "jpeg", 2)
    assert picture.picture.image().size == (12, 9)
    assert (end.stop_reason, end.elapsed_s, end.iterations) == ("ITERATIONS_DONE", 2.25, 300)
    assert end.image().getpixel((0, 0)) == (0, 128, 0)


async def test_stylize_returns_the_picture_and_what_made_it(client, tmp_path):
    stylized = await client.stylize(PHOTO, PAINTING)
    assert (stylized.recipe, stylized.seed, stylized.job_id) == (Recipe(), 7, "j1")
    assert (stylized.picture.format, stylized.picture.width, stylized.picture.height) == ("png", 24, 18)
    stylized.save(tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes() == stylized.picture.data


async def test_saving_as_another_format_keeps_the_note(client, service, tmp_path):
    service.scripts = [[accepted(), result(encoded(note='{"seed": 7}'))]]
    stylized = await client.stylize(PHOTO, PAINTING)
    for name, format in (("out.jpg", "JPEG"), ("out.webp", "WEBP")):
        stylized.save(tmp_path / name)
        with Image.open(tmp_path / name) as image:
            assert image.format == format
            assert image.getexif()[0x010E] == '{"seed": 7}'
    with pytest.raises(ValueError, match=r"out\.gif: the name must end in .*got '\.gif'"):
        stylized.save(tmp_path / "out.gif")


async def test_an_event_of_a_later_version_is_skipped(client, service):
    service.scripts = [[accepted(), pb.JobEvent(sequence=2), result()]]
    assert len(await collected(client.stream(PHOTO, PAINTING))) == 2


async def test_server_info(client):
    info = await client.server_info()
    assert (info.version, info.layers, info.limits.max_size) == ("1.2.3", ("relu1_1", "relu4_2"), 2048)
    assert info.presets == {"fast": Recipe()}


# --- what goes out


@pytest.mark.parametrize("kind", ["bytes", "str", "path", "pil"])
async def test_images_are_paths_bytes_or_pil(client, service, tmp_path, kind):
    path = tmp_path / "photo.png"
    path.write_bytes(PHOTO)
    given = {"bytes": PHOTO, "str": str(path), "path": path, "pil": Image.open(io.BytesIO(PHOTO))}[kind]
    await client.stylize(given, given)
    spec = service.specs[0]
    for data in (spec.content.data, spec.styles[0].image.data):
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.size, image.convert("RGB").getpixel((0, 0))) == ("PNG", (24, 18), (255, 0, 0))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "F", "HSV", "I;16"])
def test_pil_images_of_every_mode_can_be_sent(mode):
    data = job_spec(Image.new(mode, (20, 16)), PAINTING).content.data
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (20, 16)


def test_pil_images_are_sent_upright():
    turned = Image.new("RGB", (20, 16))
    turned.getexif()[0x0112] = 6  # Orientation: a quarter turn
    with Image.open(io.BytesIO(job_spec(turned, PAINTING).content.data)) as image:
        assert image.size == (16, 20)


@pytest.mark.parametrize(
    ("styles", "weights"),
    [
        (PAINTING, [1]),
        (Style(PAINTING, 2), [2]),
        ([PAINTING], [1]),
        ([PAINTING, Style(PAINTING, 0.5)], [1, 0.5]),
        ((PAINTING, PAINTING), [1, 1]),
    ],
)
def test_styles_are_one_or_several(styles, weights):
    sent = job_spec(PHOTO, styles).styles
    assert [style.weight for style in sent] == weights
    assert all(style.image.data == PAINTING for style in sent)


def test_options_reach_the_request():
    spec = job_spec(
        PHOTO,
        PAINTING,
        frames=FrameOptions(every_iterations=5, min_interval_s=0.25, max_side=64, format="webp", quality=50),
        preset="textbook",
        seed=0,
        start_image=PAINTING,
        result_format="jpeg",
        result_quality=80,
        beta=5.0,
        style_layers=(LayerWeight("relu1_1", 2),),
    )
    assert spec.recipe == pb.Recipe(
        preset="PRESET_TEXTBOOK",
        beta=5,
        style_layers=pb.LayerWeights(layers=[pb.LayerWeight(layer="relu1_1", weight=2)]),
        start="START_IMAGE",  # because an image to start from was given
    )
    assert spec.HasField("seed") and spec.seed == 0
    assert (spec.start_image.data, spec.result_format, spec.result_quality) == (PAINTING, pb.IMAGE_FORMAT_JPEG, 80)
    assert (spec.frames.every_iterations, spec.frames.min_interval.ToMilliseconds()) == (5, 250)
    assert (spec.frames.max_side, spec.frames.format, spec.frames.quality) == (64, pb.IMAGE_FORMAT_WEBP, 50)


def test_what_is_not_said_is_left_to_the_server():
    spec = job_spec(PHOTO, PAINTING)
    assert not spec.HasField("seed") and not spec.HasField("frames") and not spec.HasField("start_image")
    assert spec.recipe == pb.Recipe(preset="PRESET_FAST")
    assert job_spec(PHOTO, PAINTING, start_image=PHOTO, start=Start.NOISE).recipe.start == pb.START_NOISE


def test_the_options_of_a_job_are_the_keywords_of_its_spec():
    keywords = {name for name, p in inspect.signature(job_spec).parameters.items() if p.kind is p.KEYWORD_ONLY}
    fields = {field for field in JobOptions.__annotations__ if field not in Recipe.__annotations__}
    assert fields == keywords - {"frames", "checkpoints"}


# --- errors

DOMAIN_ERRORS = {
    server_errors.InvalidRequest: [Violation("spec.recipe.beta", "must be x"), Violation("spec.seed", "must be y")],
    server_errors.QueueFull: (4, 4, 12.5),
    server_errors.Diverged: (17,),
    server_errors.OutOfDeviceMemory: (4096, 4096),
    server_errors.JobNotFound: ("j1",),
    server_errors.RequestIdTaken: ("r1",),
    server_errors.ImageNotFound: ("sha256:0",),
    server_errors.JobControlled: ("j1",),
    server_errors.TooManyWatchers: (8,),
    server_errors.DeadlineUnattainable: (3.0, 5.0, 6.0),
    server_errors.SlowReader: (60.0,),
}
CLIENT_NAMES = {"EngineFailed": "ServerFailed", "OutOfHostMemory": "OutOfDeviceMemory"}


def domain_error(kind):
    given = DOMAIN_ERRORS.get(kind, ())
    return kind(given) if isinstance(given, list) else kind(*given)


@pytest.mark.parametrize("kind", SERVER_CODES, ids=lambda kind: kind.__name__)
async def test_every_error_of_the_server_is_rebuilt(service, kind):
    error = domain_error(kind)
    service.scripts = [[refused(error)]]
    async with GramophoneClient(service.target, timeout_s=10, retries=False) as client:
        for call in (client.stylize(PHOTO, PAINTING), collected(client.stream(PHOTO, PAINTING))):
            with pytest.raises(errors.GramophoneError) as raised:
                await call
            assert type(raised.value).__name__ == CLIENT_NAMES.get(kind.__name__, kind.__name__)
            assert str(raised.value) == str(error)
            assert raised.value.code is SERVER_CODES[kind].code
            assert raised.value.violations == getattr(error, "violations", ())
            told_s = getattr(error, "retry_after_s", None)
            assert raised.value.retry_after_s == (told_s if told_s is None else pytest.approx(told_s, rel=0.26))


def test_every_reason_of_the_proto_has_its_exception():
    reasons = {name.removeprefix("ERROR_REASON_") for name in pb.ErrorReason.keys()}  # noqa: SIM118
    assert errors.REASONS.keys() == reasons - {"UNSPECIFIED"}


@pytest.mark.parametrize(
    ("code", "message", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "no", errors.InvalidRequest),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "quota", errors.Exhausted),
        (grpc.StatusCode.UNAVAILABLE, "gone", errors.ConnectionFailed),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "late", errors.DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, "stopped", errors.Cancelled),
        (grpc.StatusCode.UNIMPLEMENTED, "what?", errors.ServerFailed),
        (grpc.StatusCode.UNKNOWN, "", errors.ServerFailed),
        (grpc.StatusCode.PERMISSION_DENIED, "no", errors.ServerFailed),
    ],
    ids=lambda value: getattr(value, "name", None),
)
async def test_errors_without_a_reason_fall_back_on_the_code(service, code, message, kind):
    service.scripts = [[bare(code, message)]]
    async with GramophoneClient(service.target, retries=False) as client:
        with pytest.raises(errors.GramophoneError) as raised:
            await client.stylize(PHOTO, PAINTING)
    assert type(raised.value) is kind
    assert str(raised.value)


def test_the_tree_in_the_docstring_is_the_tree():
    drawn = [line for line in errors.__doc__.splitlines() if "──" in line]
    kinds = [line.split("── ")[1].split()[0] for line in drawn]
    assert sorted([*kinds, "GramophoneError", "from_rpc"]) == errors.__all__
    for line, name in zip(drawn, kinds, strict=True):
        depth = line.index("──") // 4 + 1
        assert len(getattr(errors, name).__mro__) == depth + len(errors.GramophoneError.__mro__)


async def test_a_diverged_stream_has_its_last_good_picture(client, service):
    service.scripts = [[accepted(), frame(10, "red"), frame(12, "blue"), refused(server_errors.Diverged(13))]]
    with pytest.raises(errors.Diverged, match="iteration 13") as raised:
        await collected(client.stream(PHOTO, PAINTING))
    assert raised.value.frame.iteration == 12
    assert raised.value.frame.picture.image().size == (12, 9)


async def test_a_stream_without_a_result_is_an_error(client, service):
    service.scripts = [[accepted()]]
    with pytest.raises(errors.ServerFailed, match="without a result"):
        await collected(client.stream(PHOTO, PAINTING))


async def test_unknown_fields_and_presets_never_leave(client, service):
    with pytest.raises(errors.InvalidRequest, match="gamma") as raised:
        await client.stylize(PHOTO, PAINTING, gamma=1)
    assert raised.value.violations == (Violation("gamma", "is not a field of a recipe"),)
    assert isinstance(raised.value.__cause__, InvalidRecipe)
    with pytest.raises(errors.InvalidRequest, match="must be one of fast"):
        await client.stylize(PHOTO, PAINTING, preset="best")
    for values in ({"seed": -1}, {"size": 10**12}, {"result_format": "gif"}):
        with pytest.raises(errors.InvalidRequest, match="does not fit into the request"):
            await client.stylize(PHOTO, PAINTING, **values)
    with pytest.raises(FileNotFoundError):
        await client.stylize("/no/such/photo.jpg", PAINTING)
    assert service.specs == []


async def test_a_dead_server_is_told_by_its_address():
    async with GramophoneClient(NOWHERE) as client:
        with pytest.raises(errors.ConnectionFailed, match=rf"at {NOWHERE} \(Connection refused\); is it") as raised:
            await client.server_info()
        assert raised.value.code is UNAVAILABLE


async def test_the_deadline_ends_the_call_on_both_sides(client, service):
    service.scripts = [[accepted(), frame(1), HANG]]
    with pytest.raises(errors.DeadlineExceeded, match=r"0\.3 s") as raised:
        await collected(client.stream(PHOTO, PAINTING, timeout_s=0.3))
    assert raised.value.frame.iteration == 1
    assert await asyncio.to_thread(service.over.wait, 5)
    with pytest.raises(errors.DeadlineExceeded):
        await client.stylize(PHOTO, PAINTING, timeout_s=0.1)


async def test_a_message_above_the_limit_is_not_taken_for_a_full_server(service):
    async with GramophoneClient(service.target, max_message_bytes=2000) as client:
        with pytest.raises(errors.MessageTooLarge, match="smaller picture"):
            await client.stylize(encoded() + bytes(3000), PAINTING)
        service.scripts = [[accepted(), result(bytes(3000))]]
        with pytest.raises(errors.MessageTooLarge):
            await client.stylize(PHOTO, PAINTING)


# --- retries


@pytest.mark.parametrize("how", ["unary", "stream"])
async def test_a_job_that_was_not_accepted_is_sent_again(client, service, how):
    # Larger than gRPC's own retry buffer of 256 KiB, above which it would not be sent twice.
    photo = encoded() + bytes(300_000)
    service.scripts = [[bare(UNAVAILABLE)], [refused(server_errors.QueueFull(4, 4, 0.05))], service.scripts[0]]
    if how == "unary":
        await client.stylize(photo, PAINTING)
    else:
        await collected(client.stream(photo, PAINTING))
    assert [len(spec.content.data) for spec in service.specs] == [len(photo)] * 3


async def test_retries_wait_as_long_as_the_server_says(client, service):
    service.scripts = [[refused(server_errors.QueueFull(4, 4, 0.4))], service.scripts[0]]
    started = time.monotonic()
    await client.stylize(PHOTO, PAINTING)
    assert time.monotonic() - started >= 0.4


async def test_without_patience_nothing_is_sent_again_after_the_first_message(client, service):
    service.scripts = [[accepted(), bare(UNAVAILABLE, "going down")], service.scripts[0]]
    with pytest.raises(errors.ConnectionFailed, match="going down"):
        await collected(client.stream(PHOTO, PAINTING, patience_s=0))
    assert len(service.specs) == 1


async def test_a_bad_request_is_not_sent_again(client, service):
    service.scripts = [[refused(domain_error(server_errors.InvalidRequest))], service.scripts[0]]
    with pytest.raises(errors.InvalidRequest):
        await client.stylize(PHOTO, PAINTING)
    assert len(service.specs) == 1


def test_the_channel_is_made_for_images():
    options = dict(channel_options(1000))
    assert options["grpc.max_send_message_length"] == options["grpc.max_receive_message_length"] == 1000
    assert options["grpc.http2.bdp_probe"] == 0
    assert json.loads(options["grpc.service_config"])["retryThrottling"]


# --- jobs that outlive their call


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(recovery_states, "RETRY_PAUSE_S", (0.01, 0.05))


@pytest.mark.parametrize("how", ["unary", "stream"])
async def test_every_job_has_an_id_of_its_own_and_every_attempt_the_same(client, service, how):
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


async def test_the_grace_reaches_the_request(client, service):
    await client.stylize(PHOTO, PAINTING, detach_grace=1.5)
    await collected(client.stream(PHOTO, PAINTING, detach_grace=0))
    await client.stylize(PHOTO, PAINTING)
    graces = [spec.detach_grace.ToMilliseconds() if spec.HasField("detach_grace") else None for spec in service.specs]
    assert graces == [1500, 0, None]
    with pytest.raises(errors.InvalidRequest, match="does not fit into the request"):
        await client.stylize(PHOTO, PAINTING, detach_grace=float("nan"))


async def test_watching_tells_the_same_as_streaming(client, service):
    service.scripts = [numbered(accepted(attached=True), waiting(2), progress(1), frame(1), result())]
    told = await collected(client.watch("j1", frames=FrameOptions(max_side=64)))
    names = [type(update).__name__ for update in told]
    assert names == ["Accepted", "Waiting", "Progress", "Frame", "Result"]
    assert [update.sequence for update in told] == [1, 2, 3, 4, 5]
    assert (told[0].attached, told[1].queue_position) == (True, 2)
    assert (service.watches[0].job_id, service.watches[0].frames.max_side) == ("j1", 64)
    told = await collected(client.watch("j1", 3, frames=None))
    assert [update.sequence for update in told] == [4, 5]
    assert service.watches[1] == pb.WatchJobRequest(job_id="j1", after_sequence=3)
    with pytest.raises(errors.InvalidRequest, match="does not fit into the request"):
        await collected(client.watch("j1", -1))


@pytest.mark.parametrize("status", [bare(UNAVAILABLE, "gone"), bare(grpc.StatusCode.INTERNAL, "RST_STREAM")], ids=repr)
async def test_a_lost_stream_goes_on_where_it_was(client, service, hasty, status):
    whole = numbered(accepted(), progress(1), frame(1), progress(2), frame(2), result())
    service.scripts = [
        [*whole[:3], status],
        [bare(UNAVAILABLE, "still gone", (("grpc-retry-pushback-ms", "-1"),))],
        [*whole[2:4], refused(server_errors.SlowReader(60))],  # the third one once more
        whole[4:],
    ]
    options = FrameOptions(max_side=64)
    told = await collected(client.stream(PHOTO, PAINTING, frames=options, detach_grace=5))
    assert [update.sequence for update in told] == [1, 2, 3, 4, 5, 6]
    assert [(watch.job_id, watch.after_sequence) for watch in service.watches] == [("j1", 3), ("j1", 3), ("j1", 4)]
    assert all(watch.frames.max_side == 64 for watch in service.watches)
    assert len(service.specs) == 1


async def test_a_connection_lost_after_the_result_loses_nothing(client, service):
    service.scripts = [[*numbered(accepted(), result()), bare(UNAVAILABLE, "gone")]]
    assert len(await collected(client.stream(PHOTO, PAINTING))) == 2
    assert service.watches == []


async def test_of_what_a_slow_reader_has_not_taken_only_the_newest_waits():
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
    told = [response.event async for response in job_stream.newest_responses(call)]
    assert [event.WhichOneof("event") for event in told] == [
        "accepted", "waiting", "progress", "checkpoint", "frame", "result",
    ]  # fmt: skip
    assert (told[2].progress.iteration, told[4].frame.iteration) == (4, 5)
    assert told[4].frame.dropped == 3 * 2 + 2  # what the server has left out, and the two that made room here
    assert [event.sequence for event in told] == sorted(event.sequence for event in told)
    call.fails, told = True, []
    with pytest.raises(ValueError, match="lost"):
        async for response in job_stream.newest_responses(call):
            told.append(response)
    assert len(told) == 6 and call.cancelled  # nothing is lost before the error


async def test_a_lost_stream_is_given_up_when_the_grace_is_over(client, service, hasty):
    never = (("grpc-retry-pushback-ms", "-1"),)
    service.scripts = [[*numbered(accepted(), frame(1)), bare(UNAVAILABLE, "gone")], [bare(UNAVAILABLE, "", never)]]
    started = time.monotonic()
    with pytest.raises(errors.ConnectionFailed, match="gone") as raised:
        await collected(client.stream(PHOTO, PAINTING, detach_grace=0.3, patience_s=0))
    assert 0.3 <= time.monotonic() - started < 3
    assert raised.value.frame.iteration == 1
    assert len(service.watches) > 2


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
async def test_what_the_service_itself_says_is_final(client, service, error):
    service.scripts = [[accepted(), refused(error)]]
    with pytest.raises(errors.GramophoneError, match=re.escape(str(error))):
        await collected(client.stream(PHOTO, PAINTING, detach_grace=5))
    assert (service.watches, len(service.specs)) == ([], 1)


async def test_a_job_that_was_forgotten_meanwhile_is_told(client, service, hasty):
    lost = [accepted(), bare(UNAVAILABLE, "gone")]
    service.scripts = [lost, [refused(server_errors.JobNotFound("j1"))]]
    with pytest.raises(errors.JobNotFound, match="j1"):
        await collected(client.watch("j1", detach_grace=5))


async def test_closing_the_client_ends_a_search_for_a_lost_job(client, service):
    service.scripts = [[accepted(), bare(UNAVAILABLE, "gone")]]
    updates = client.stream(PHOTO, PAINTING, detach_grace=5)
    await anext(updates)
    task = asyncio.create_task(anext(updates))
    await asyncio.sleep(0.1)
    await client.close()
    with pytest.raises(errors.Cancelled):
        await task


async def test_jobs_are_told_cancelled_and_listed(client, service):
    service.jobs = [
        job(job_id="j2", state=pb.JOB_STATE_QUEUED, queue_position=1, iteration=0),
        job(losses=pb.Losses(total=3), start_time={"seconds": 1_750_000_001}),
    ]
    told = await client.get_job("j1")
    assert (told.state, told.iteration, told.losses.total, told.stop_reason) == ("RUNNING", 10, 3, "")
    assert told.create_time == datetime.fromtimestamp(1_750_000_000, UTC)
    assert told.start_time == datetime.fromtimestamp(1_750_000_001, UTC)
    assert (told.end_time, told.expire_time) == (None, None)
    assert [(one.job_id, one.queue_position) for one in await client.list_jobs()] == [("j2", 1), ("j1", 0)]
    stopped = await client.cancel_job("j1")
    assert (stopped.state, stopped.end_time) == ("CANCELLED", datetime.fromtimestamp(1_750_000_060, UTC))
    for ask in (client.get_job, client.cancel_job):
        with pytest.raises(errors.JobNotFound, match="j3"):
            await ask("j3")


def test_the_synchronous_face_knows_jobs(service):
    with SyncGramophoneClient(service.target) as client:
        assert [type(update).__name__ for update in client.watch("j1")][-1] == "Result"
        assert client.get_job("j1") == client.list_jobs()[0]
        assert client.cancel_job("j1").state == "CANCELLED"


# --- leaving early


async def test_leaving_the_iteration_cancels_the_call(client, service):
    service.scripts = [[accepted(), frame(1), HANG]]
    async with contextlib.aclosing(client.stream(PHOTO, PAINTING)) as updates:
        async for _ in updates:
            break
    assert await asyncio.to_thread(service.over.wait, 5)
    assert service.cancelled


async def test_dropping_the_iteration_cancels_the_call(client, service):
    service.scripts = [[accepted(), frame(1), HANG]]
    async for _ in client.stream(PHOTO, PAINTING):
        break
    gc.collect()
    assert await asyncio.to_thread(service.over.wait, 5)


@pytest.mark.parametrize("how", ["unary", "stream"])
async def test_cancelling_the_task_cancels_the_call(client, service, how):
    service.scripts = [[accepted(), HANG]]
    call = client.stylize(PHOTO, PAINTING) if how == "unary" else collected(client.stream(PHOTO, PAINTING))
    task = asyncio.create_task(call)
    assert await asyncio.to_thread(service.hanging.wait, 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(service.over.wait, 5)
    assert service.cancelled


@pytest.mark.parametrize("how", ["unary", "stream"])
async def test_closing_the_client_ends_its_calls_with_an_error(client, service, how):
    service.scripts = [[accepted(), HANG]]
    call = client.stylize(PHOTO, PAINTING) if how == "unary" else collected(client.stream(PHOTO, PAINTING))
    task = asyncio.create_task(call)
    assert await asyncio.to_thread(service.hanging.wait, 5)
    await client.close()
    with pytest.raises(errors.Cancelled):
        await task
    assert await asyncio.to_thread(service.over.wait, 5)


async def test_a_finished_job_is_not_cancelled(client, service):
    await collected(client.stream(PHOTO, PAINTING))
    assert await asyncio.to_thread(service.over.wait, 5)
    assert not service.cancelled


def test_a_client_needs_a_running_loop():
    with pytest.raises(RuntimeError, match="no running event loop"):
        GramophoneClient(NOWHERE)


# --- readiness


async def test_waiting_ends_when_the_health_says_serving(client, service):
    service.set_health(HealthCheckResponse.NOT_SERVING)
    waiting = asyncio.create_task(client.wait_until_ready(5))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(waiting), 0.05)
    service.set_health(HealthCheckResponse.SERVING)
    await waiting


async def test_waiting_says_what_it_waited_for(client, service):
    service.set_health(HealthCheckResponse.NOT_SERVING)
    with pytest.raises(errors.NotReady, match=r"after 0\.1 s: its health status is NOT_SERVING"):
        await client.wait_until_ready(0.1)
    async with GramophoneClient(NOWHERE) as lonely:
        with pytest.raises(errors.NotReady, match="no connection"):
            await lonely.wait_until_ready(0.1)


# --- without asyncio


def test_the_synchronous_face_does_the_same(service, tmp_path):
    with SyncGramophoneClient(service.target) as client:
        service.set_health(HealthCheckResponse.SERVING)
        client.wait_until_ready(5)
        assert client.server_info().version == "1.2.3"
        client.stylize(PHOTO, PAINTING, beta=2.0).save(tmp_path / "out.png")
        told = list(client.stream(PHOTO, PAINTING, seed=3))
    names = [type(update).__name__ for update in told]
    # How many of the others there are depends on how fast this thread takes them; the newest of each kind is there.
    assert (names[0], names[-1]) == ("Accepted", "Result") and set(names[1:-1]) == {"Progress", "Frame"}
    assert [update.iteration for update in told if isinstance(update, Frame)][-1] == 20
    assert (service.specs[0].recipe.beta, service.specs[1].seed) == (2, 3)
    assert "gramophone-client" not in [thread.name for thread in threading.enumerate()]


def test_the_synchronous_face_has_every_method():
    public = [name for name in vars(GramophoneClient) if not name.startswith("_")]
    for name in public:
        theirs, ours = (inspect.signature(getattr(kind, name)) for kind in (GramophoneClient, SyncGramophoneClient))
        assert theirs.parameters == ours.parameters


def test_synchronous_errors_are_the_same(service):
    service.scripts = [[accepted(), frame(3), refused(server_errors.Diverged(4))]]
    with SyncGramophoneClient(service.target) as client:
        with pytest.raises(errors.Diverged) as raised:
            list(client.stream(PHOTO, PAINTING))
        assert raised.value.frame.iteration == 3


def test_leaving_a_synchronous_loop_cancels_the_call(service):
    service.scripts = [[accepted(), frame(1), HANG]]
    with SyncGramophoneClient(service.target) as client:
        for _ in client.stream(PHOTO, PAINTING):
            break
        gc.collect()
        assert service.over.wait(5)
        assert service.cancelled


def test_an_interrupt_cancels_a_synchronous_call(service, monkeypatch):
    service.scripts = [[accepted(), HANG]]
    with SyncGramophoneClient(service.target) as client:
        updates = client.stream(PHOTO, PAINTING)
        next(updates)

        def interrupted(*_):
            raise KeyboardInterrupt

        # As if Ctrl-C came while the caller waits for the next update.
        monkeypatch.setattr("concurrent.futures.Future.result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(updates)
        monkeypatch.undo()
        assert service.over.wait(5)


def in_a_loop(client):
    yield from client.stream(PHOTO, PAINTING)


def in_a_block(client):
    with client.control(PHOTO, PAINTING) as job:
        yield from job


def in_its_own_client(client):
    with client:
        yield from client.stream(PHOTO, PAINTING)


@pytest.mark.parametrize("left", [in_a_loop, in_a_block, in_its_own_client])
def test_what_is_left_to_the_collector_is_left_in_whatever_thread_it_runs(service, monkeypatch, left):
    def collecting(_):
        gc.collect()
        return threading.current_thread().name

    service.scripts = [[accepted(), HANG]]
    client = SyncGramophoneClient(service.target)  # outside of a block, which would hang at its end as well
    gc.disable()
    try:
        updates = left(client)
        next(updates)
        cycle = [updates]
        cycle.append(cycle)
        del updates, cycle
        # The answer is read in the client's own thread.
        monkeypatch.setattr("gramophone_client.transport.parsing.server_info", collecting)
        told = []

        def ask():
            told.append(client.server_info())

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(1)
        assert told == ["gramophone-client"]
        assert service.over.wait(1)
    finally:
        gc.enable()
    client.close()
    assert service.cancelled


def test_a_call_in_the_clients_own_thread_is_refused(service, monkeypatch):
    told = []

    def asking_again(_):
        try:
            client.get_job("j1")
        except RuntimeError as error:
            told.append(str(error))

    client = SyncGramophoneClient(service.target)
    monkeypatch.setattr("gramophone_client.transport.parsing.server_info", asking_again)
    asking = threading.Thread(target=client.server_info, daemon=True)
    asking.start()
    asking.join(1)
    assert ["wait for itself" in error for error in told] == [True]
    client.close()


def test_closing_ends_the_calls_of_other_threads_with_an_error(service):
    # Between two calls, where no connection ends the wait.
    service.scripts = [[accepted(), refused(server_errors.ShuttingDown(retry_after_s=9))]]
    with ThreadPoolExecutor(1) as threads, SyncGramophoneClient(service.target) as client:
        told = threads.submit(list, client.stream(PHOTO, PAINTING))
        assert service.over.wait(5)
        time.sleep(0.1)
        client.close()
        with pytest.raises(errors.Cancelled):
            told.result(1)


@pytest.mark.parametrize("how", ["unary", "stream", "control"])
def test_a_call_after_the_end_is_an_error(service, how):
    client = SyncGramophoneClient(service.target)
    client.close()
    client.close()
    with pytest.raises(errors.Cancelled, match="its client was closed"):
        if how == "unary":
            client.server_info()
        elif how == "stream":
            next(client.stream(PHOTO, PAINTING))
        else:
            with client.control(PHOTO, PAINTING):
                pass
    gc.collect()  # a coroutine that was never awaited would complain


def test_a_stream_that_outlives_its_client_is_closed_with_it(service):
    service.scripts = [[accepted(), HANG]]
    with SyncGramophoneClient(service.target) as client:
        updates = client.stream(PHOTO, PAINTING)
        next(updates)
    assert service.over.wait(5)
    updates.close()


# --- the public face


def test_the_public_names_are_sorted_and_there():
    names = gramophone_client.__all__
    assert all(one < next_one for one, next_one in pairwise(names))
    assert all(hasattr(gramophone_client, name) for name in names)


async def test_progress_of_a_slow_start_has_no_time_left(client, service):
    event = progress(1)
    event.progress.ClearField("time_left")
    service.scripts = [[accepted(), event, result()]]
    _, told, _ = await collected(client.stream(PHOTO, PAINTING))
    assert told.time_left_s is None
