import asyncio
import contextlib
import gc
import inspect
import io
import json
import logging
import types
import uuid

import grpc
import pytest
import torch
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2
from PIL import Image

from gramophone.recipe import PRESETS, LayerWeight, Violation, preset
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.v1 import style_transfer_pb2_grpc as pb_grpc
from gramophone.wire import overrides_to_message, recipe_to_message
from gramophone_server import errors, main, status
from gramophone_server.calls import Call
from gramophone_server.checks import check_spec
from gramophone_server.config import Limits
from gramophone_server.images import Format, encode
from gramophone_server.scheduler import Scheduler
from gramophone_server.servicer import Servicer
from tests.fakes import FakeEngine

NAN = float("nan")
LAYERS = ("content_layers", "style_layers")
LARGE = [("grpc.max_receive_message_length", 2**26), ("grpc.max_send_message_length", 2**26)]


def png(width=64, height=32):
    out = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(out, "PNG")
    return out.getvalue()


def spec(iterations=5, **recipe):
    recipe = {"size": 64, "smallest_size": 0, "iterations": iterations, **recipe}
    return pb.JobSpec(
        content=pb.ImageSource(data=png()),
        styles=[pb.StyleSource(image=pb.ImageSource(data=png(32, 32)))],
        recipe=overrides_to_message(recipe),
    )


@contextlib.asynccontextmanager
async def serving(engine, limits=None, load=None):
    limits = limits or Limits()
    server = grpc.aio.server(options=main.server_options(limits))
    scheduler = Scheduler(load or (lambda: engine), max_queued=limits.max_queued)
    servicer = Servicer(scheduler, limits)
    pb_grpc.add_StyleTransferServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    scheduler.start()
    if load is None:
        await scheduler.ready()
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=LARGE)
    try:
        yield types.SimpleNamespace(
            address=f"127.0.0.1:{port}",
            stub=pb_grpc.StyleTransferServiceStub(channel),
            channel=channel,
            scheduler=scheduler,
            servicer=servicer,
        )
    finally:
        await channel.close()
        scheduler.stop()
        engine.go.set()
        await server.stop(0)
        servicer.close()
        assert await asyncio.to_thread(scheduler.join, 5)


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def refused(call):
    """The code, message, details by kind, and trailers of a call that fails; within 5 s."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(5):
            if hasattr(call, "__aiter__"):
                async for _ in call:
                    pass
            else:
                await call
    error = caught.value
    trailers = dict(error.trailing_metadata() or ())
    details = types.SimpleNamespace(code=error.code(), message=error.details(), trailers=trailers)
    said = status_pb2.Status.FromString(trailers.get("grpc-status-details-bin", b""))
    for detail in said.details:
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo, error_details_pb2.BadRequest):
            if detail.Is(kind.DESCRIPTOR):
                message = kind()
                detail.Unpack(message)
                setattr(details, kind.__name__, message)
    return details


class NoisyEngine(FakeEngine):
    """Its pictures do not compress."""

    def __init__(self, side, **options):
        super().__init__(**options)
        self.noise = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8)

    def start(self, jobs):
        run = super().start(jobs)
        run.picture = lambda index: self.noise
        return run


# What a job answers ---------------------------------------------------------------------------------------------------


async def test_stylize_returns_a_picture_that_says_how_to_make_it_again():
    engine = FakeEngine()
    async with serving(engine) as s:
        response = await s.stub.Stylize(pb.StylizeRequest(spec=spec(beta=2.5)))
    accepted, result = response.accepted, response.result
    assert (accepted.width, accepted.height, accepted.iterations, accepted.queue_position) == (64, 32, 5, 0)
    assert accepted.recipe == recipe_to_message(engine.jobs[0].recipe)
    assert uuid.UUID(accepted.job_id).version == 4
    assert (result.iterations, result.stop_reason) == (5, pb.STOP_REASON_ITERATIONS_DONE)
    assert result.losses.total == pytest.approx(0.2 + 0.4 + 0.5)
    assert [(l.layer, l.value) for l in result.losses.style_layers] == [("relu1_1", pytest.approx(0.4))]
    assert (result.image.format, result.image.width, result.image.height) == (pb.IMAGE_FORMAT_PNG, 64, 32)
    with Image.open(io.BytesIO(result.image.data)) as image:
        assert image.getpixel((0, 0)) == (5, 5, 5)
        made = json.loads(image.info["gramophone"])
    again = preset("fast", **made["recipe"] | {k: tuple(LayerWeight(*l) for l in made["recipe"][k]) for k in LAYERS})
    assert again == engine.jobs[0].recipe
    assert made["seed"] == accepted.seed == engine.jobs[0].seed
    assert (made["style_weights"], made["weights"]) == ([1.0], "none, sha256 0")


async def test_a_stream_has_one_accepted_first_and_one_result_last():
    async with serving(FakeEngine(iteration_s=0.005)) as s:
        wanted = spec(iterations=40)
        wanted.frames.CopyFrom(pb.FrameOptions(every_iterations=2, max_side=32, format=pb.IMAGE_FORMAT_WEBP))
        wanted.result_format = pb.IMAGE_FORMAT_JPEG
        wanted.seed = 2**64 - 1
        events = [r.event async for r in s.stub.StylizeStream(pb.StylizeStreamRequest(spec=wanted))]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "accepted" and kinds[-1] == "result"
    assert set(kinds[1:-1]) == {"progress", "frame"}
    assert events[0].accepted.seed == 2**64 - 1
    numbers = [event.sequence for event in events]
    assert numbers == sorted(set(numbers))
    frames = [event.frame for event in events if event.HasField("frame")]
    assert all(frame.iteration % 2 == 0 for frame in frames)
    assert (frames[0].image.width, frames[0].image.height) == (32, 16)
    assert Image.open(io.BytesIO(frames[0].image.data)).format == "WEBP"
    assert events[-1].result.image.data[:2] == b"\xff\xd8"
    progress = next(event.progress for event in events if event.HasField("progress"))
    assert progress.iterations == 40 and 0 < progress.iterations_per_second <= 200
    assert progress.time_left.ToMilliseconds() > 0


async def test_a_start_image_and_style_weights_reach_the_engine():
    engine = FakeEngine()
    wanted = spec()
    wanted.recipe.start = pb.START_IMAGE
    wanted.start_image.data = png(20, 40)
    wanted.styles.add(image=pb.ImageSource(data=png()), weight=3.0)
    async with serving(engine) as s:
        await s.stub.Stylize(pb.StylizeRequest(spec=wanted))
    assert engine.jobs[0].start.shape == (3, 40, 20)
    assert engine.jobs[0].style_weights == (1.0, 3.0)


async def test_images_above_grpcs_own_4_mib_go_both_ways():
    engine = NoisyEngine(1300)
    wanted = spec(size=1300)
    wanted.content.data = encode(engine.noise, Format.PNG, 0).data
    assert len(wanted.content.data) > 4 * 2**20
    async with serving(engine) as s:
        response = await s.stub.Stylize(pb.StylizeRequest(spec=wanted))
    assert response.result.image.data != wanted.content.data
    assert len(response.result.image.data) > 4 * 2**20


async def test_server_info_says_what_the_server_is():
    async with serving(FakeEngine(), Limits(max_size=1000)) as s:
        info = await s.stub.GetServerInfo(pb.GetServerInfoRequest())
    assert (info.device, info.precision, info.backbone, info.weights) == ("fake", "fp32", "vgg19", "none, sha256 0")
    assert info.layers == list(FakeEngine.layers)
    assert (info.limits.max_size, info.limits.max_image_bytes) == (1000, 10 * 2**20)
    assert [p.name for p in info.presets] == list(PRESETS)
    assert info.presets[0].recipe == recipe_to_message(PRESETS["fast"])
    assert (info.running_jobs, info.queued_jobs) == (0, 0)
    assert info.version


async def test_one_line_is_logged_for_each_rpc(caplog):
    caplog.set_level(logging.INFO, "gramophone_server")
    async with serving(FakeEngine()) as s:
        response = await s.stub.Stylize(pb.StylizeRequest(spec=spec()))
        await refused(s.stub.Stylize(pb.StylizeRequest()))
        await s.servicer.idle()
    first, second = [r.getMessage() for r in caplog.records if r.name.endswith("calls")]
    assert first.startswith(f"Stylize job={response.accepted.job_id} code=OK ms=")
    assert "code=INVALID_ARGUMENT" in second


# What is refused ------------------------------------------------------------------------------------------------------


def violations(change, limits=None):
    wanted = spec()
    change(wanted)
    return list(check_spec(wanted, limits or Limits(max_size=1024, max_iterations=500), FakeEngine.layers))


def set_recipe(**values):
    return lambda s: s.recipe.MergeFrom(overrides_to_message(values))


def set_layers(*layers, which="style_layers"):
    return lambda s: getattr(s.recipe, which).layers.extend(pb.LayerWeight(layer=l, weight=w) for l, w in layers)


CASES = {
    "no content": (lambda s: s.ClearField("content"), "spec.content", "is missing"),
    "no styles": (
        lambda s: s.ClearField("styles"),
        "spec.styles",
        "must have 1 to 4 images (server setting GRAMOPHONE_MAX",
    ),
    "five styles": (lambda s: s.styles.extend([s.styles[0]] * 4), "spec.styles", "must have 1 to 4 images (server"),
    "empty style": (lambda s: s.styles.add(), "spec.styles[1].image", "is missing"),
    "no weight": (
        lambda s: setattr(s.styles[0], "weight", 0),
        "spec.styles[0].weight",
        "above 0 and at most 1000, got 0;",
    ),
    "NaN weight": (lambda s: setattr(s.styles[0], "weight", NAN), "spec.styles[0].weight", "got nan"),
    "large weight": (lambda s: setattr(s.styles[0], "weight", 1001), "spec.styles[0].weight", "got 1001"),
    "negative beta": (set_recipe(beta=-1.0), "spec.recipe.beta", "must be between 0 and 1e+15, got -1"),
    "NaN alpha": (set_recipe(alpha=NAN), "spec.recipe.alpha", "must be between 0 and 1e+15, got nan"),
    "nothing to do": (set_recipe(alpha=0.0, beta=0.0), "spec.recipe.beta", "there is nothing to optimise"),
    "no iterations": (set_recipe(iterations=0), "spec.recipe.iterations", "must be between 1 and 100000, got 0"),
    "unknown preset": (lambda s: setattr(s.recipe, "preset", 99), "spec.recipe.preset", "is an unknown value 99"),
    "unknown start": (lambda s: setattr(s.recipe, "start", 99), "spec.recipe.start", "is an unknown value 99"),
    "unknown layer": (
        set_layers(("relu4_1", 1), ("relu41", 1)),
        "spec.recipe.style_layers[1].layer",
        "'relu41' is not a layer of this network; did you mean 'relu4_1'? GetServerInfo (`gramophone info`) lists",
    ),
    "layer weight": (
        set_layers(("relu4_2", -1), which="content_layers"),
        "spec.recipe.content_layers[0].weight",
        "must be between 0 and 1e+06, got -1",
    ),
    "size": (
        set_recipe(size=1025),
        "spec.recipe.size",
        "at most 1024 pixels (server setting GRAMOPHONE_MAX_SIZE), got 1025",
    ),
    "style size": (
        set_recipe(size=600, style_scale=2.0),
        "spec.recipe.style_scale",
        "makes style images of 1200 pixels",
    ),
    "too long": (
        set_recipe(size=512, iterations=400, coarse_iterations=50, smallest_size=128),
        "spec.recipe.iterations",
        "and coarse_iterations make 600 over 5 scales; at most 500 are allowed (server setting GRAMOPHONE_MAX_ITERATIONS)",
    ),
    "no start image": (
        lambda s: setattr(s.recipe, "start", pb.START_IMAGE),
        "spec.start_image",
        "START_IMAGE needs one",
    ),
    "a start image": (lambda s: setattr(s.start_image, "data", b"x"), "spec.start_image", "is only for START_IMAGE"),
    "every -1": (
        lambda s: setattr(s.frames, "every_iterations", -1),
        "spec.frames.every_iterations",
        "0 or more, got -1",
    ),
    "interval": (
        lambda s: s.frames.min_interval.CopyFrom(duration_pb2.Duration(seconds=3601)),
        "spec.frames.min_interval",
        "must be 0 to 3600 seconds, got 3601",
    ),
    "frame side": (lambda s: setattr(s.frames, "max_side", 8), "spec.frames.max_side", "must be 16 to 16384, got 8"),
    "frame format": (lambda s: setattr(s.frames, "format", 9), "spec.frames.format", "is an unknown value 9"),
    "frame quality": (
        lambda s: setattr(s.frames, "quality", 101),
        "spec.frames.quality",
        "must be 1 to 100, or 0 for the default, got 101",
    ),
    "result format": (lambda s: setattr(s, "result_format", 9), "spec.result_format", "is an unknown value 9"),
    "result quality": (
        lambda s: setattr(s, "result_quality", -1),
        "spec.result_quality",
        "must be 1 to 100, or 0 for the default, got -1",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_field_is_named(case):
    change, field, words = CASES[case]
    (violation,) = violations(change)
    assert violation.field == field
    assert words in violation.description


def test_a_right_request_has_no_violations():
    assert violations(lambda s: None) == []
    assert violations(set_recipe(alpha=0.0, size=1024, style_scale=1.0)) == []
    assert violations(set_layers(("relu5_1", 0.5))) == []


async def test_every_violation_is_told_at_once_those_of_the_images_included():
    wanted = spec(beta=-1.0)
    wanted.content.data = b"GIF89a"
    wanted.styles[0].image.data = png()[:50]
    wanted.styles.add(image=pb.ImageSource(data=png(15, 15)), weight=NAN)
    engine = FakeEngine()
    async with serving(engine) as s:
        got = await refused(s.stub.StylizeStream(pb.StylizeStreamRequest(spec=wanted)))
    assert got.code is grpc.StatusCode.INVALID_ARGUMENT
    assert (got.ErrorInfo.reason, got.ErrorInfo.domain) == ("INVALID_REQUEST", "gramophone")
    told = {v.field: v.description for v in got.BadRequest.field_violations}
    assert list(told) == [
        "spec.styles[1].weight",
        "spec.recipe.beta",
        "spec.content.data",
        "spec.styles[0].image.data",
        "spec.styles[1].image.data",
    ]
    assert "a GIF file" in told["spec.content.data"]
    assert "truncated" in told["spec.styles[0].image.data"]
    assert got.message.startswith("spec.styles[1].weight: must be above 0")
    assert engine.jobs == []


def test_a_field_that_breaks_a_rule_of_recipes_does_not_hide_what_the_server_refuses():
    def change(s):
        set_recipe(beta=-1.0, size=4096, start="image")(s)
        set_layers(("relu9_1", 1.0))(s)

    fields = [violation.field for violation in violations(change)]
    assert fields == ["spec.recipe.beta", "spec.recipe.style_layers[0].layer", "spec.recipe.size", "spec.start_image"]


async def test_a_result_that_would_be_too_thin_is_refused_with_the_size_that_is_not():
    wanted = spec(size=64)
    wanted.content.data = png(640, 80)
    async with serving(FakeEngine()) as s:
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=wanted)))
        (violation,) = got.BadRequest.field_violations
        assert violation.field == "spec.recipe.size"
        assert "makes a 64x8 picture" in violation.description and "size of 128 or more" in violation.description
        wanted.recipe.size = 128
        response = await s.stub.Stylize(pb.StylizeRequest(spec=wanted))
        assert response.result.image.height == 16


async def test_more_violations_than_fit_are_cut_and_counted():
    wanted = spec()
    set_layers(*((f"{'x' * 5000}{i}", 1) for i in range(16)))(wanted)
    set_layers(*((f"\N{WHITE SMILING FACE}{i}", 1) for i in range(16)), which="content_layers")(wanted)
    async with serving(FakeEngine()) as s:
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=wanted)))
    assert got.code is grpc.StatusCode.INVALID_ARGUMENT
    told = got.BadRequest.field_violations
    assert 10 <= len(told) <= 20
    assert told[-1].description == f"has {32 - len(told) + 1} more violations, which did not fit here"
    assert len(got.trailers["grpc-status-details-bin"]) <= 4096


@pytest.mark.parametrize("count", [1, 20, 21, 1000])
@pytest.mark.parametrize("length", [1, 1000])
def test_details_stay_within_4_kib(count, length):
    error = errors.InvalidRequest(Violation(f"spec.f[{i}]", "\N{SNOWMAN}" * length) for i in range(count))
    got = status.refusal(error)
    assert len(dict(got.trailers)["grpc-status-details-bin"]) <= 4096
    assert len(got.message) <= 400


EXAMPLES = {
    "InvalidRequest": errors.InvalidRequest([Violation("spec.content", "is odd")]),
    "NotReady": errors.NotReady(),
    "QueueFull": errors.QueueFull(16, 16, 12.3),
    "ShuttingDown": errors.ShuttingDown(),
    "JobNotFound": errors.JobNotFound("j1"),
    "RequestIdTaken": errors.RequestIdTaken("r1"),
    "ListingDisabled": errors.ListingDisabled(),
    "Cancelled": errors.Cancelled(),
    "SlowReader": errors.SlowReader(30),
    "Diverged": errors.Diverged(2),
    "OutOfDeviceMemory": errors.OutOfDeviceMemory(64, 32),
    "EngineFailed": errors.EngineFailed(),
}
RAISED = {
    name: kind
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.GramophoneError) and name not in ("GramophoneError", "StartupError")
}


@pytest.mark.parametrize("name", RAISED)
async def test_every_exception_has_its_code_reason_and_details(name):
    error = EXAMPLES[name]
    code, reason = status.CODES[RAISED[name]]
    async with serving(FakeEngine(fails_at=2, error=error)) as s:
        for call in (
            s.stub.Stylize(pb.StylizeRequest(spec=spec())),
            s.stub.StylizeStream(pb.StylizeStreamRequest(spec=spec())),
        ):
            got = await refused(call)
            assert got.code is code
            assert got.message == str(error)
            assert f"ERROR_REASON_{got.ErrorInfo.reason}" == pb.ErrorReason.Name(reason)
            assert hasattr(got, "RetryInfo") == hasattr(error, "retry_after_s")
            assert hasattr(got, "BadRequest") == (name == "InvalidRequest")


@pytest.mark.parametrize(
    ("name", "pushback"),
    # A full queue says when, too little memory says never, and the rest leaves it to the client's policy.
    [(name, {"QueueFull": "12300", "OutOfDeviceMemory": "-1"}.get(name)) for name in RAISED],
)
def test_a_retry_policy_is_told_when_or_never(name, pushback):
    assert dict(status.refusal(EXAMPLES[name]).trailers).get("grpc-retry-pushback-ms") == pushback


def test_every_reason_is_used_once():
    reasons = [reason for _, reason in status.CODES.values()]
    assert sorted(reasons) == sorted(set(pb.ErrorReason.values()) - {pb.ERROR_REASON_UNSPECIFIED})


async def test_an_unforeseen_exception_tells_nothing_but_that(caplog):
    async with serving(FakeEngine(fails_at=1, error=ZeroDivisionError("secret"))) as s:
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=spec())))
    assert got.code is grpc.StatusCode.INTERNAL
    assert got.message == "the server failed while working on this job; its log has the details"
    assert not any("secret" in str(value) for value in got.trailers.values())
    assert "secret" in caplog.text  # the log has it


async def test_a_cancellation_from_inside_never_hangs_a_client(monkeypatch, caplog):
    async def cancelled(self, spec):
        raise asyncio.CancelledError

    monkeypatch.setattr(Servicer, "_work", cancelled)
    async with serving(FakeEngine()) as s:
        for call in (
            s.stub.Stylize(pb.StylizeRequest(spec=spec())),
            s.stub.StylizeStream(pb.StylizeStreamRequest(spec=spec())),
        ):
            assert (await refused(call)).code is grpc.StatusCode.INTERNAL
        assert s.scheduler.queued == 0


async def test_a_full_queue_says_when_to_come_back_and_decodes_nothing():
    engine = FakeEngine()
    engine.go.clear()
    async with serving(engine, Limits(max_queued=1)) as s:
        calls = [s.stub.Stylize(pb.StylizeRequest(spec=spec())) for _ in range(2)]
        await until(lambda: s.scheduler.queued == 1 and engine.under_way.is_set())
        junk = spec()
        junk.content.data = b"not an image"
        got = await refused(s.stub.StylizeStream(pb.StylizeStreamRequest(spec=junk)))
        assert got.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert got.ErrorInfo.reason == "QUEUE_FULL"
        assert got.message == "queue is full: 1 waiting, limit 1; retry after about 5 s"
        assert got.RetryInfo.retry_delay.ToSeconds() == 5
        assert got.trailers["grpc-retry-pushback-ms"] == "5000"
        info = await s.stub.GetServerInfo(pb.GetServerInfoRequest())  # is not limited by jobs
        assert (info.running_jobs, info.queued_jobs) == (1, 1)
        engine.go.set()
        responses = await asyncio.gather(*calls)
        assert sorted(r.accepted.queue_position for r in responses) == [0, 1]


async def test_a_server_that_is_still_loading_says_so():
    engine = FakeEngine()

    def load():
        assert engine.go.wait(5)
        return engine

    engine.go.clear()
    async with serving(engine, load=load) as s:
        for call in (s.stub.Stylize(pb.StylizeRequest(spec=spec())), s.stub.GetServerInfo(pb.GetServerInfoRequest())):
            got = await refused(call)
            assert (got.code, got.ErrorInfo.reason) == (grpc.StatusCode.UNAVAILABLE, "NOT_READY")
            assert got.RetryInfo.retry_delay.ToSeconds() == 2
        engine.go.set()
        await s.scheduler.ready()
        await s.stub.GetServerInfo(pb.GetServerInfoRequest())


# How a job ends early -------------------------------------------------------------------------------------------------


async def test_a_diverged_stream_sends_its_last_good_picture_before_the_error():
    engine = FakeEngine(fails_at=4, error=errors.Diverged(4))
    async with serving(engine) as s:
        call = s.stub.StylizeStream(pb.StylizeStreamRequest(spec=spec()))
        kinds, frame = [], None
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for response in call:
                kinds.append(response.event.WhichOneof("event"))
                frame = response.event.frame
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert kinds[-1] == "frame" and frame.iteration == 3


async def begun(s, engine, timeout=None):
    """A stream whose job is in its first iteration, which does not end before the test lets it."""
    engine.go.clear()
    call = s.stub.StylizeStream(pb.StylizeStreamRequest(spec=spec(iterations=1000)), timeout=timeout)
    assert (await call.read()).event.HasField("accepted")
    await until(engine.under_way.is_set)
    return call


async def stopped(s, engine):
    engine.go.set()
    await until(lambda: s.scheduler.running == 0)
    await s.servicer.idle()
    assert engine.iterations == 1
    engine.under_way.clear()


@pytest.mark.parametrize("how", ["cancel", "deadline", "disconnect"])
async def test_a_client_that_leaves_stops_its_job_within_an_iteration(how, caplog):
    caplog.set_level(logging.INFO, "gramophone_server")
    engine = FakeEngine()
    async with serving(engine) as s:
        call = await begun(s, engine, timeout=0.2 if how == "deadline" else None)
        gone = asyncio.Event()
        (on_server,) = s.servicer._calls
        on_server._context.add_done_callback(lambda _: gone.set())
        if how == "cancel":
            call.cancel()
        elif how == "disconnect":
            await s.channel.close()
        async with asyncio.timeout(5):
            await gone.wait()
        await stopped(s, engine)
    wanted = "DEADLINE_EXCEEDED" if how == "deadline" else "CANCELLED"
    assert f"code={wanted}" in caplog.text
    assert "failed" not in caplog.text


async def test_a_client_that_leaves_while_its_images_are_decoded_starts_no_job():
    """gRPC's notice can come between the last image and the queue, where nothing is awaited that it could cancel."""
    notices, left = [], []
    context = types.SimpleNamespace(add_done_callback=notices.append, time_remaining=lambda: None)
    call = Call("Stylize", context, over=lambda call: None, max_blocked_s=30)
    for notice in notices:
        notice(context)
    call.watches(types.SimpleNamespace(leave=left.append), "a mailbox")
    assert left == ["a mailbox"]


async def test_a_client_that_leaves_while_it_waits_gives_its_place_back():
    engine = FakeEngine()
    async with serving(engine, Limits(max_queued=1)) as s:
        running = await begun(s, engine)
        waiting = s.stub.StylizeStream(pb.StylizeStreamRequest(spec=spec()))
        assert (await waiting.read()).event.accepted.queue_position == 1
        waiting.cancel()
        await until(lambda: s.scheduler.queued == 0)
        running.cancel()


async def rest(call):
    """The events that a call has still; grpc does not let `read` and iteration be mixed."""
    while (response := await call.read()) is not grpc.aio.EOF:
        yield response.event


@contextlib.asynccontextmanager
async def unread_stream(s, iterations):
    """A stream of which only the first message was read, on a channel that takes no more than 64 KiB unread."""
    wanted = spec(iterations=iterations)
    wanted.frames.format = pb.IMAGE_FORMAT_PNG  # 800 KB each
    async with grpc.aio.insecure_channel(s.address, options=[*LARGE, ("grpc.http2.bdp_probe", 0)]) as channel:
        call = pb_grpc.StyleTransferServiceStub(channel).StylizeStream(pb.StylizeStreamRequest(spec=wanted))
        assert (await call.read()).event.HasField("accepted")
        yield call


async def test_a_slow_reader_gets_the_newest_and_slows_nobody():
    engine = NoisyEngine(512, iteration_s=0.001)
    async with serving(engine) as s, unread_stream(s, iterations=500) as call:
        await until(lambda: s.scheduler.running == 0)
        assert engine.iterations == 500
        events = [event async for event in rest(call)]
    frames = [event.frame for event in events if event.HasField("frame")]
    assert len(frames) <= 2 and sum(frame.dropped for frame in frames) >= 1
    assert [e.progress.iteration for e in events if e.HasField("progress")][-1] == 500
    assert events[-1].HasField("result")


async def test_a_client_that_leaves_while_a_frame_is_written_stops_its_job():
    """In this state the handler gets no CancelledError: it stays where it is."""
    engine = NoisyEngine(512, iteration_s=0.001)
    async with serving(engine) as s, unread_stream(s, iterations=5000) as call:
        await until(lambda: engine.iterations > 200)
        call.cancel()
        await until(lambda: s.scheduler.running == 0)
        assert engine.iterations < 5000
        await s.servicer.idle()
        gc.collect()


async def test_drain_lets_a_job_end_and_its_client_has_the_picture():
    engine = FakeEngine()
    async with serving(engine) as s:
        call = await begun(s, engine)
        drain = asyncio.create_task(s.scheduler.drain(within_s=5))
        await asyncio.sleep(0)
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=spec())))
        assert (got.code, got.ErrorInfo.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        assert got.RetryInfo.retry_delay.ToSeconds() == 5
        engine.go.set()
        await drain
        assert [event.WhichOneof("event") async for event in rest(call)][-1] == "result"
        await s.servicer.idle()
