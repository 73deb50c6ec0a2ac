"""The RPCs: results and streams, server information, refusals, and lists of jobs."""

import asyncio
import io
import json
import logging
import uuid

import grpc
import pytest
from google.protobuf import duration_pb2
from PIL import Image

from gramophone.recipe import PRESETS, LayerWeight, preset
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.wire import recipe_to_message
from gramophone_server import errors
from gramophone_server.config import Limits
from gramophone_server.domain.engine_api import KernelReport
from gramophone_server.images.codec import Format, encode
from gramophone_server.rpc.admission import Admission
from tests.support.clock import WITHIN_S, until
from tests.support.engines import FakeEngine, NoisyEngine
from tests.support.pictures import png
from tests.support.serving import (
    refused,
    remaining_events,
    serving,
    start_detachable,
    start_stream,
    watch,
)
from tests.support.specs import detachable_spec, spec

LAYERS = ("content_layers", "style_layers")


async def test_the_result_contains_the_recipe_that_reproduces_it():
    engine = FakeEngine()
    async with serving(engine) as s:
        response = await s.stub.Stylize(pb.StylizeRequest(spec=spec(beta=2.5)))
    accepted, result = response.accepted, response.result
    assert (accepted.width, accepted.height, accepted.iterations, accepted.queue_position) == (64, 32, 5, 0)
    assert accepted.recipe == recipe_to_message(engine.jobs[0].recipe)
    assert uuid.UUID(accepted.job_id).version == 4
    assert (result.iterations, result.stop_reason) == (5, pb.STOP_REASON_ITERATIONS_DONE)
    assert result.losses.total == pytest.approx(0.2 + 0.5 + 0.5)
    assert [(l.layer, l.value) for l in result.losses.style_layers] == [("relu1_1", pytest.approx(0.5))]
    assert (result.image.format, result.image.width, result.image.height) == (pb.IMAGE_FORMAT_PNG, 64, 32)
    with Image.open(io.BytesIO(result.image.data)) as image:
        assert image.getpixel((0, 0)) == (5, 5, 5)
        metadata = json.loads(image.info["gramophone"])
    layers = {name: tuple(LayerWeight(*layer) for layer in metadata["recipe"][name]) for name in LAYERS}
    assert preset("fast", **metadata["recipe"] | layers) == engine.jobs[0].recipe
    assert metadata["seed"] == accepted.seed == engine.jobs[0].seed
    assert (metadata["style_weights"], metadata["weights"]) == ([1.0], "none, sha256 0")
    assert (metadata["iterations"], metadata["changed_at"]) == (5, 0)


async def test_a_stream_starts_with_accepted_and_ends_with_the_result():
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


async def test_images_above_the_4_mib_default_of_grpc_are_received_and_sent():
    engine = NoisyEngine(1300)
    wanted = spec(size=1300)
    wanted.content.data = encode(engine.noise, Format.PNG, 0).data
    assert len(wanted.content.data) > 4 * 2**20
    async with serving(engine) as s:
        response = await s.stub.Stylize(pb.StylizeRequest(spec=wanted))
    assert response.result.image.data != wanted.content.data
    assert len(response.result.image.data) > 4 * 2**20


async def test_server_info_describes_the_server():
    async with serving(FakeEngine(), Limits(max_size=1000)) as s:
        info = await s.stub.GetServerInfo(pb.GetServerInfoRequest())
    assert (info.device, info.precision, info.backbone, info.weights) == ("fake", "fp32", "vgg19", "none, sha256 0")
    assert info.layers == list(FakeEngine.layers)
    assert (info.limits.max_size, info.limits.max_image_bytes) == (1000, 10 * 2**20)
    assert [p.name for p in info.presets] == list(PRESETS)
    assert info.presets[0].recipe == recipe_to_message(PRESETS["fast"])
    assert (info.running_jobs, info.queued_jobs, info.paused_jobs) == (0, 0, 0)
    assert info.style_cache == pb.CacheStats(hits=3, misses=2, bytes=1000, max_bytes=5000)
    assert info.uploads == pb.CacheStats(max_bytes=128 * 2**20)
    assert info.HasField("estimated_wait") and not info.estimated_wait.ToNanoseconds()  # no jobs
    assert info.version


@pytest.mark.parametrize(
    ("report", "ops", "milliseconds"),
    [
        (None, [], 20),
        (
            KernelReport({"gram": "error 0.1", "tv_": "requested"}, 0.05),
            [("gram", "error 0.1"), ("tv_", "requested")],
            50,
        ),
    ],
)
async def test_server_info_names_the_ops_without_a_right_kernel(report, ops, milliseconds):
    engine = FakeEngine()
    engine.kernels = report or engine.kernels
    async with serving(engine) as s:
        info = await s.stub.GetServerInfo(pb.GetServerInfoRequest())
    assert [(op.name, op.reason) for op in info.library_ops] == ops
    assert info.self_test_time.ToMilliseconds() == milliseconds


async def test_server_info_counts_jobs_anew_in_each_answer():
    engine = FakeEngine()
    async with serving(engine) as s:
        assert (await s.stub.GetServerInfo(pb.GetServerInfoRequest())).running_jobs == 0
        call = await start_stream(s, engine)
        assert (await s.stub.GetServerInfo(pb.GetServerInfoRequest())).running_jobs == 1
        call.cancel()


async def test_one_line_is_logged_for_each_rpc(caplog):
    caplog.set_level(logging.INFO, "gramophone_server")
    async with serving(FakeEngine()) as s:
        response = await s.stub.Stylize(pb.StylizeRequest(spec=spec()))
        await refused(s.stub.Stylize(pb.StylizeRequest()))
        await s.servicer.idle()
    first, second = [r.getMessage() for r in caplog.records if r.name.endswith("calls")]
    assert first.startswith(f"Stylize job={response.accepted.job_id} code=OK ms=")
    assert "code=INVALID_ARGUMENT" in second


async def test_a_full_queue_has_a_retry_delay_and_decodes_nothing():
    engine = FakeEngine()
    engine.go.clear()
    async with serving(engine, Limits(max_running=1, max_queued=1)) as s:
        calls = [s.stub.Stylize(pb.StylizeRequest(spec=spec())) for _ in range(2)]
        await until(lambda: engine.under_way.is_set() and s.scheduler.waiting == 1)  # its images are decoded
        junk = spec()
        junk.content.data = b"not an image"
        got = await refused(s.stub.StylizeStream(pb.StylizeStreamRequest(spec=junk)))
        assert got.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert got.ErrorInfo.reason == "QUEUE_FULL"
        assert got.message == "queue is full: 1 waiting, limit 1; retry after about 5 s"
        pushback_ms = int(got.trailers["grpc-retry-pushback-ms"])
        assert got.RetryInfo.retry_delay.ToMilliseconds() == pushback_ms
        assert 5000 <= pushback_ms <= 6250
        info = await s.stub.GetServerInfo(pb.GetServerInfoRequest())  # not limited by jobs
        assert (info.running_jobs, info.queued_jobs) == (1, 1)
        engine.go.set()
        responses = await asyncio.gather(*calls)
        assert sorted(r.accepted.queue_position for r in responses) == [0, 1]


async def test_a_server_that_is_loading_is_not_ready():
    engine = FakeEngine()

    def load():
        assert engine.go.wait(WITHIN_S)
        return engine

    engine.go.clear()
    async with serving(engine, load=load) as s:
        for call in (s.stub.Stylize(pb.StylizeRequest(spec=spec())), s.stub.GetServerInfo(pb.GetServerInfoRequest())):
            got = await refused(call)
            assert (got.code, got.ErrorInfo.reason) == (grpc.StatusCode.UNAVAILABLE, "NOT_READY")
            assert 2000 <= got.RetryInfo.retry_delay.ToMilliseconds() <= 2500
        engine.go.set()
        await s.scheduler.ready()
        await s.stub.GetServerInfo(pb.GetServerInfoRequest())


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


async def test_a_time_budget_ends_with_the_present_picture_and_a_deadline_with_none():
    async with serving(FakeEngine(iteration_s=0.002)) as s:
        within = await s.stub.Stylize(pb.StylizeRequest(spec=spec(5000, time_budget=0.2)), timeout=60)
        assert within.result.stop_reason == pb.STOP_REASON_TIME_BUDGET
        assert 1 <= within.result.iterations <= 100 and within.result.image.data
        job = (await s.stub.GetJob(pb.GetJobRequest(job_id=within.accepted.job_id))).job
        assert (job.state, job.stop_reason) == (pb.JOB_STATE_SUCCEEDED, pb.STOP_REASON_TIME_BUDGET)
        # With a grace, the server neither refuses the deadline in advance nor ends the job with it.
        late = await refused(s.stub.Stylize(pb.StylizeRequest(spec=detachable_spec(5000)), timeout=3))
        assert (late.code, late.trailers) == (grpc.StatusCode.DEADLINE_EXCEEDED, {})
        (lost,) = [job for job in s.servicer.jobs.newest_first() if not job.ended]
        assert lost.result is None
        lost.cancel()


async def test_a_drain_lets_jobs_end_with_their_results():
    engine = FakeEngine()
    async with serving(engine) as s:
        call = await start_stream(s, engine)
        drain = asyncio.create_task(s.scheduler.drain(within_s=5))
        await asyncio.sleep(0)
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=spec())))
        assert (got.code, got.ErrorInfo.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        assert 5 <= got.RetryInfo.retry_delay.ToSeconds() <= 6
        engine.go.set()
        await drain
        assert [event.WhichOneof("event") async for event in remaining_events(call)][-1] == "result"
        await s.servicer.idle()


ONE = Limits(max_running=1)


async def test_an_invalid_id_grace_or_page_is_reported():
    wanted = detachable_spec(grace=duration_pb2.Duration(seconds=601))
    async with serving(FakeEngine(), list_jobs=True) as s:
        for call, field in (
            (s.stub.Stylize(pb.StylizeRequest(spec=spec(), request_id="my job")), "request_id"),
            (s.stub.Stylize(pb.StylizeRequest(spec=wanted)), "spec.detach_grace"),
            (watch(s, "x", every_iterations=-1), "frames.every_iterations"),
            (s.stub.ListJobs(pb.ListJobsRequest(page_size=-1)), "page_size"),
            (s.stub.ListJobs(pb.ListJobsRequest(page_token="../")), "page_token"),
        ):
            got = await refused(call)
            assert got.code is grpc.StatusCode.INVALID_ARGUMENT
            assert [violation.field for violation in got.BadRequest.field_violations] == [field]
        assert (s.scheduler.queued, len(s.servicer.jobs)) == (0, 0)


async def test_get_job_returns_the_present_state():
    engine = FakeEngine()
    async with serving(engine, ONE) as s:
        _first, running_id = await start_detachable(s, engine)
        _second, queued_id = await start_detachable(s, engine)

        async def get(job_id):
            return (await s.stub.GetJob(pb.GetJobRequest(job_id=job_id))).job

        queued, running = await get(queued_id), await get(running_id)
        assert (queued.state, queued.queue_position, queued.iteration) == (pb.JOB_STATE_QUEUED, 1, 0)
        assert queued.HasField("create_time") and not queued.HasField("start_time")
        assert not queued.HasField("expire_time") and not queued.HasField("losses")
        assert (running.state, running.queue_position) == (pb.JOB_STATE_RUNNING, 0)
        assert (running.width, running.height, running.iterations) == (64, 32, 1000)
        assert running.HasField("start_time") and not running.HasField("end_time")
        await s.stub.CancelJob(pb.CancelJobRequest(job_id=queued_id))
        engine.go.set()
        await until(lambda: s.scheduler.running == 0)
        done, cancelled = await get(running_id), await get(queued_id)
        assert (done.state, done.stop_reason) == (pb.JOB_STATE_SUCCEEDED, pb.STOP_REASON_ITERATIONS_DONE)
        assert (done.iteration, done.losses.tv) == (1000, 0.5)
        kept_s = done.expire_time.ToMilliseconds() - done.end_time.ToMilliseconds()
        assert kept_s == pytest.approx(600_000, abs=2000)
        assert cancelled.state == pb.JOB_STATE_CANCELLED and not cancelled.HasField("start_time")


async def test_an_unknown_job_is_not_found():
    async with serving(FakeEngine()) as s:
        for call in (
            s.stub.GetJob(pb.GetJobRequest(job_id="nope")),
            s.stub.CancelJob(pb.CancelJobRequest(job_id="nope")),
            watch(s, "nope"),
        ):
            got = await refused(call)
            assert (got.code, got.ErrorInfo.reason) == (grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND")
            assert got.message == "there is no job 'nope'; it never existed, or it has ended and is no longer kept"
        long = await refused(s.stub.GetJob(pb.GetJobRequest(job_id="\u00e9" * 10_000)))
        assert long.code is grpc.StatusCode.NOT_FOUND and len(long.message) < 400


async def test_jobs_are_listed_only_if_allowed():
    async with serving(FakeEngine()) as s:
        got = await refused(s.stub.ListJobs(pb.ListJobsRequest()))
    assert (got.code, got.ErrorInfo.reason) == (grpc.StatusCode.PERMISSION_DENIED, "LISTING_DISABLED")
    assert "--list-jobs" in got.message


async def test_a_list_has_pages_newest_first():
    async with serving(FakeEngine(), list_jobs=True) as s:
        ids = [(await s.stub.Stylize(pb.StylizeRequest(spec=spec(1)))).accepted.job_id for _ in range(5)]
        pages, token = [], ""
        while not pages or token:
            response = await s.stub.ListJobs(pb.ListJobsRequest(page_size=2, page_token=token))
            token = response.next_page_token
            pages.append([job.job_id for job in response.jobs])
            if len(pages) == 1:  # a newer job does not shift the pages
                await s.stub.Stylize(pb.StylizeRequest(spec=spec(1)))
        assert pages == [[ids[4], ids[3]], [ids[2], ids[1]], [ids[0]]]
        everything = await s.stub.ListJobs(pb.ListJobsRequest())
        assert len(everything.jobs) == 6 and not everything.next_page_token


async def test_an_invalid_grace_does_not_break_the_list_of_jobs(monkeypatch):
    """The job is listed until its request has been checked."""
    entered = asyncio.Event()

    async def prepare(self, spec, *_):
        entered.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(Admission, "prepare", prepare)
    async with serving(FakeEngine(), list_jobs=True) as server:
        wanted = spec()
        wanted.detach_grace.seconds = 2**62
        stream = server.stub.StylizeStream(pb.StylizeStreamRequest(spec=wanted))
        reading = asyncio.ensure_future(stream.read())
        await asyncio.wait_for(entered.wait(), 5)
        stream.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        (job,) = server.servicer.jobs.newest_first(None)
        await until(lambda: job.expires_at is not None)
        (listed,) = (await server.stub.ListJobs(pb.ListJobsRequest())).jobs
        assert listed.expire_time.seconds - listed.create_time.seconds <= Limits().max_detach_s + 5
        job.cancel()
