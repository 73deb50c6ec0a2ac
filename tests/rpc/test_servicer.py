"""What the RPCs answer: results, streams, and jobs that outlive their call."""

import asyncio
import contextlib
import io
import json
import logging
import threading
import uuid

import grpc
import pytest
from google.protobuf import duration_pb2
from PIL import Image

from gramophone.recipe import PRESETS, LayerWeight, preset
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.wire import recipe_to_message
from gramophone_client import ConnectionFailed, GramophoneClient
from gramophone_server import errors
from gramophone_server.config import Limits
from gramophone_server.images import codec
from gramophone_server.images.codec import Format, encode
from gramophone_server.rpc.admission import Admission
from gramophone_server.scheduling import worker
from tests.support.clock import until
from tests.support.engines import FakeEngine, NoisyEngine
from tests.support.pictures import png
from tests.support.serving import (
    events_of,
    refused,
    remaining_events,
    serving,
    start_detachable,
    start_stream,
    stops_within_an_iteration,
    watch,
)
from tests.support.specs import SHORT_GRACE, detachable_spec, spec

LAYERS = ("content_layers", "style_layers")


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
    assert result.losses.total == pytest.approx(0.2 + 0.5 + 0.5)
    assert [(l.layer, l.value) for l in result.losses.style_layers] == [("relu1_1", pytest.approx(0.5))]
    assert (result.image.format, result.image.width, result.image.height) == (pb.IMAGE_FORMAT_PNG, 64, 32)
    with Image.open(io.BytesIO(result.image.data)) as image:
        assert image.getpixel((0, 0)) == (5, 5, 5)
        made = json.loads(image.info["gramophone"])
    again = preset("fast", **made["recipe"] | {k: tuple(LayerWeight(*l) for l in made["recipe"][k]) for k in LAYERS})
    assert again == engine.jobs[0].recipe
    assert made["seed"] == accepted.seed == engine.jobs[0].seed
    assert (made["style_weights"], made["weights"]) == ([1.0], "none, sha256 0")
    assert (made["iterations"], made["changed_at"]) == (5, 0)


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
    assert (info.running_jobs, info.queued_jobs, info.paused_jobs) == (0, 0, 0)
    assert info.style_cache == pb.CacheStats(hits=3, misses=2, bytes=1000, max_bytes=5000)
    assert info.uploads == pb.CacheStats(max_bytes=128 * 2**20)
    assert info.HasField("estimated_wait") and not info.estimated_wait.ToNanoseconds()  # nobody is there
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


async def test_a_full_queue_says_when_to_come_back_and_decodes_nothing():
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
            assert 2000 <= got.RetryInfo.retry_delay.ToMilliseconds() <= 2500
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


async def test_a_time_budget_ends_in_the_picture_so_far_where_a_deadline_ends_in_nothing():
    async with serving(FakeEngine(iteration_s=0.002)) as s:
        within = await s.stub.Stylize(pb.StylizeRequest(spec=spec(5000, time_budget=0.2)), timeout=10)
        assert within.result.stop_reason == pb.STOP_REASON_TIME_BUDGET
        assert 1 <= within.result.iterations <= 100 and within.result.image.data
        job = (await s.stub.GetJob(pb.GetJobRequest(job_id=within.accepted.job_id))).job
        assert (job.state, job.stop_reason) == (pb.JOB_STATE_SUCCEEDED, pb.STOP_REASON_TIME_BUDGET)
        # With a grace the server refuses no deadline beforehand; nor does it then end the job with it.
        late = await refused(s.stub.Stylize(pb.StylizeRequest(spec=detachable_spec(5000)), timeout=0.5))
        assert (late.code, late.trailers) == (grpc.StatusCode.DEADLINE_EXCEEDED, {})
        (lost,) = [job for job in s.servicer.jobs.newest_first() if not job.ended]
        assert lost.result is None
        lost.cancel()


async def test_drain_lets_a_job_end_and_its_client_has_the_picture():
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


# Jobs that outlive their call -----------------------------------------------------------------------------------------

SLOW_S = 0.02  # of an iteration that takes a slice of its own, so that each is told
ONE = Limits(max_running=1)


async def state(s, job_id):
    return pb.JobState.Name((await s.stub.GetJob(pb.GetJobRequest(job_id=job_id))).job.state)[len("JOB_STATE_") :]


async def test_watch_job_replays_and_follows_with_the_same_numbers(monkeypatch):
    monkeypatch.setattr(worker, "PROGRESS_EVERY_S", 0.0)
    engine = FakeEngine(iteration_s=SLOW_S)
    async with serving(engine) as s:
        first, job_id = await start_detachable(s, engine, detachable_spec(40))
        engine.go.set()
        heard = {}
        async for event in remaining_events(first):
            heard[event.sequence] = event
            if event.progress.iteration >= 15:
                break
        second = watch(s, job_id)
        watched, rest_of_first = await asyncio.gather(events_of(second), events_of(first))
    heard |= {event.sequence: event for event in rest_of_first}
    numbers = [event.sequence for event in watched]
    assert numbers == sorted(set(numbers))
    assert numbers[:20] == list(range(1, 21))  # all that the log has, also what a reader may have missed
    assert [event.WhichOneof("event") for event in (watched[0], watched[-1])] == ["accepted", "result"]
    assert watched[0].accepted.job_id == job_id and not watched[0].accepted.attached
    same = [event for event in watched if event.sequence in heard]
    assert len(same) >= 10 and all(heard[event.sequence] == event for event in same)


async def test_after_sequence_leaves_out_what_the_watcher_has(monkeypatch):
    monkeypatch.setattr(worker, "PROGRESS_EVERY_S", 0.0)
    async with serving(FakeEngine(iteration_s=SLOW_S)) as s:
        response = await s.stub.Stylize(pb.StylizeRequest(spec=detachable_spec(20)))
        job_id = response.accepted.job_id
        everything = await events_of(watch(s, job_id))
        assert len(everything) == 22
        for after in (1, 10, 21):
            assert await events_of(watch(s, job_id, after)) == everything[after:]
        assert await events_of(watch(s, job_id, 22)) == []
    assert everything[-1].result == response.result


async def test_two_watchers_who_want_the_same_get_one_encoding(monkeypatch):
    encodings = []

    def noted(picture, *encoding):
        encodings.append(encoding[0])
        return encode(picture, *encoding)

    monkeypatch.setattr("gramophone_server.images.codec.encode", noted)
    engine = FakeEngine(iteration_s=0.01)
    async with serving(engine) as s:
        first, job_id = await start_detachable(s, engine, detachable_spec(60, every_iterations=5))
        second = watch(s, job_id, every_iterations=5)
        third = watch(s, job_id, every_iterations=5, format=pb.IMAGE_FORMAT_WEBP)
        await until(lambda: s.servicer.jobs.find(job_id).watchers == 3)
        engine.go.set()
        heard = await asyncio.gather(*map(events_of, (first, second, third)))
    frames = [{event.sequence: event.frame.image for event in events if event.HasField("frame")} for events in heard]
    shared = frames[0].keys() & frames[1].keys()
    assert shared and all(frames[0][number] == frames[1][number] for number in shared)
    assert encodings.count(Format.JPEG) == len(frames[0].keys() | frames[1].keys())
    assert encodings.count(Format.WEBP) == len(frames[2])
    assert encodings.count(Format.PNG) == 1  # one result for three
    assert len(engine.taken_at) == len(set().union(*frames)) + 1
    assert heard[0][-1] == heard[1][-1] == heard[2][-1]


async def test_the_same_request_attaches_to_its_job():
    engine = FakeEngine()
    request_id = str(uuid.uuid4())
    async with serving(engine) as s:
        first, job_id = await start_detachable(s, engine, request_id=request_id)
        again = pb.StylizeStreamRequest(spec=detachable_spec(every_iterations=3), request_id=request_id.upper())
        second = s.stub.StylizeStream(again)
        accepted = (await second.read()).event.accepted
        assert (accepted.job_id, accepted.attached) == (job_id, True)
        third = s.stub.Stylize(pb.StylizeRequest(spec=detachable_spec(), request_id=request_id))
        other = await refused(s.stub.Stylize(pb.StylizeRequest(spec=detachable_spec(999), request_id=request_id)))
        assert (other.code, other.ErrorInfo.reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_TAKEN")
        assert request_id in other.message and "another spec" in other.message
        assert job_id not in other.message
        assert (s.scheduler.running, s.scheduler.queued) == (1, 0)
        engine.go.set()
        (*_, one), (*_, two), three = await asyncio.gather(events_of(first), events_of(second), third)
        assert one == two and one.result == three.result
        late = await s.stub.Stylize(pb.StylizeRequest(spec=detachable_spec(), request_id=request_id))
        assert late.accepted.attached and late.result == three.result
    assert len(engine.jobs) == 1


@pytest.fixture
def held(monkeypatch):
    """Decoding waits, on its thread, until this is set; `.begun` says that it has come to it."""
    go, decode = threading.Event(), codec.decode
    go.begun = threading.Event()

    def waiting(*about):
        go.begun.set()
        assert go.wait(10), "the test never let it decode"
        return decode(*about)

    monkeypatch.setattr(codec, "decode", waiting)
    yield go
    go.set()


async def test_the_same_request_finds_its_job_while_that_is_being_decoded(held):
    engine, request_id = FakeEngine(), str(uuid.uuid4())
    async with serving(engine) as s:
        first = s.stub.Stylize(pb.StylizeRequest(spec=detachable_spec(5), request_id=request_id))
        await until(held.begun.is_set)
        second, third = (
            s.stub.Stylize(pb.StylizeRequest(spec=detachable_spec(iterations), request_id=request_id))
            for iterations in (5, 6)
        )
        await until(lambda: len(s.servicer.calls) == 3)
        held.set()
        assert (await refused(third)).code is grpc.StatusCode.ALREADY_EXISTS
        one, two = await asyncio.gather(first, second)
    assert one.result == two.result and (one.accepted.attached, two.accepted.attached) == (False, True)
    assert len(engine.jobs) == 1


async def test_the_same_request_begins_anew_when_the_first_is_refused_while_it_waits(held):
    engine, request_id = FakeEngine(), str(uuid.uuid4())
    broken = detachable_spec(5)
    broken.content.data = b"not an image"
    async with serving(engine) as s:
        first = s.stub.Stylize(pb.StylizeRequest(spec=broken, request_id=request_id))
        await until(held.begun.is_set)
        others = [s.stub.Stylize(pb.StylizeRequest(spec=detachable_spec(5), request_id=request_id)) for _ in range(2)]
        await until(lambda: len(s.servicer.calls) == 3)
        held.set()
        assert (await refused(first)).code is grpc.StatusCode.INVALID_ARGUMENT
        one, two = await asyncio.gather(*others)
    assert one.accepted.job_id == two.accepted.job_id and len(engine.jobs) == 1


async def test_a_request_whose_job_failed_begins_anew():
    engine = FakeEngine(fails_at=2, error=errors.EngineFailed())
    request = pb.StylizeRequest(spec=detachable_spec(5), request_id=str(uuid.uuid4()))
    async with serving(engine) as s:
        await refused(s.stub.Stylize(request))
        engine.error = None
        response = await s.stub.Stylize(request)
        assert not response.accepted.attached and len(engine.jobs) == 2
        (failed,) = [job for job in s.servicer.jobs.newest_first() if job.id != response.accepted.job_id]
        assert await state(s, failed.id) == "FAILED"
        got = await refused(watch(s, failed.id))
        assert got.code is grpc.StatusCode.INTERNAL


async def test_what_is_wrong_with_an_id_a_grace_or_a_page_is_said():
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


@pytest.mark.parametrize("waits", [False, True], ids=["running", "queued"])
async def test_cancel_job_ends_every_watcher_and_is_idempotent(waits):
    engine = FakeEngine()
    async with serving(engine, ONE) as s:
        ahead_id = (await start_detachable(s, engine))[1] if waits else ""
        call, job_id = await start_detachable(s, engine)
        other = watch(s, job_id)
        await until(lambda: s.servicer.jobs.find(job_id).watchers == 2)
        cancel = pb.CancelJobRequest(job_id=job_id)
        response = await s.stub.CancelJob(cancel)
        assert response.job.state == pb.JOB_STATE_CANCELLED
        for watcher in (call, other, watch(s, job_id)):  # the engine stands still, and nobody waits for it
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await events_of(watcher)
            assert caught.value.code() is grpc.StatusCode.ABORTED
            assert "was cancelled" in caught.value.details()
        again = await s.stub.CancelJob(cancel)
        assert (again.job.state, again.job.end_time) == (pb.JOB_STATE_CANCELLED, response.job.end_time)
        assert s.scheduler.queued == 0
        if waits:
            await s.stub.CancelJob(pb.CancelJobRequest(job_id=ahead_id))
        engine.go.set()
        await until(lambda: s.scheduler.running == 0)
        assert engine.iterations == 1 and len(engine.batches) == 1


async def test_cancelling_a_finished_job_leaves_its_result():
    async with serving(FakeEngine()) as s:
        job_id = (await s.stub.Stylize(pb.StylizeRequest(spec=spec()))).accepted.job_id
        response = await s.stub.CancelJob(pb.CancelJobRequest(job_id=job_id))
        assert response.job.state == pb.JOB_STATE_SUCCEEDED
        assert (await events_of(watch(s, job_id)))[-1].HasField("result")


async def test_a_watcher_of_a_cancelled_job_gets_the_reason():
    engine = FakeEngine()
    async with serving(engine) as s:
        call, job_id = await start_detachable(s, engine)
        call.cancel()
        await s.stub.CancelJob(pb.CancelJobRequest(job_id=job_id))
        got = await refused(watch(s, job_id))
        assert (got.code, got.ErrorInfo.reason) == (grpc.StatusCode.ABORTED, "CANCELLED")


async def test_get_job_says_how_a_job_stands():
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


async def test_a_job_that_is_not_there_is_not_found():
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


async def test_jobs_are_listed_only_where_that_is_allowed():
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
            if len(pages) == 1:  # a newer job moves nothing to another page
                await s.stub.Stylize(pb.StylizeRequest(spec=spec(1)))
        assert pages == [[ids[4], ids[3]], [ids[2], ids[1]], [ids[0]]]
        everything = await s.stub.ListJobs(pb.ListJobsRequest())
        assert len(everything.jobs) == 6 and not everything.next_page_token


async def test_a_job_with_a_grace_goes_on_without_its_client():
    engine = FakeEngine()
    async with serving(engine) as s:
        call, job_id = await start_detachable(s, engine)
        call.cancel()
        await until(lambda: not s.servicer.jobs.find(job_id).watchers)
        response = await s.stub.GetJob(pb.GetJobRequest(job_id=job_id))
        assert response.job.state == pb.JOB_STATE_RUNNING and response.job.HasField("expire_time")
        watcher = watch(s, job_id)
        assert (await watcher.read()).event.HasField("accepted")
        response = await s.stub.GetJob(pb.GetJobRequest(job_id=job_id))
        assert not response.job.HasField("expire_time")
        watcher.cancel()
        await until(lambda: not s.servicer.jobs.find(job_id).watchers)
        engine.go.set()
        await until(lambda: s.scheduler.running == 0)
        (*_, last) = await events_of(watch(s, job_id))
        assert last.result.iterations == 1000


class Proxy:
    """Bytes there and back over connections that the test can cut."""

    def __init__(self, address):
        self.host, self.port = address.split(":")
        self.writers = []
        self.connections = 0
        self.tasks = set()

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.accept, "127.0.0.1", 0)
        self.address = "{}:{}".format(*self.server.sockets[0].getsockname())
        return self

    async def __aexit__(self, *error):
        self.cut()
        self.server.close()
        await asyncio.gather(*self.tasks)

    async def accept(self, reader, writer):
        self.connections += 1
        there_reader, there = await asyncio.open_connection(self.host, self.port)
        self.writers += [writer, there]
        for source, target in ((reader, there), (there_reader, writer)):
            task = asyncio.create_task(self.carry(source, target))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def carry(self, source, target):
        with contextlib.suppress(ConnectionError):
            while data := await source.read(2**16):
                target.write(data)
                await target.drain()
        target.close()

    def cut(self):
        while self.writers:
            self.writers.pop().transport.abort()


@pytest.mark.parametrize("grace_s", [30.0, 0.0])
async def test_a_client_whose_connection_is_cut_comes_back_to_its_job_if_it_has_a_grace(grace_s):
    engine = FakeEngine(iteration_s=0.005)
    async with (
        serving(engine) as s,
        Proxy(s.address) as proxy,
        GramophoneClient(proxy.address, timeout_s=20) as client,
    ):
        told = []

        async def follow():
            wanted = {"size": 64, "smallest_size": 0, "iterations": 300, "detach_grace": grace_s}
            async for update in client.stream(png(), png(32, 32), patience_s=0, **wanted):  # the job, or none
                told.append(update)
                if len(told) in (10, 30):
                    proxy.cut()

        if grace_s:
            await follow()
            names = [type(update).__name__ for update in told]
            assert (names[0], names[-1]) == ("Accepted", "Result")
            assert names.count("Accepted") == names.count("Result") == 1 and {"Progress", "Frame"} <= set(names)
            assert proxy.connections >= 3
        else:
            with pytest.raises(ConnectionFailed):
                await follow()
            await until(lambda: s.scheduler.running == 0)
            assert engine.iterations < 300
        numbers = [update.sequence for update in told]
        assert numbers == sorted(set(numbers))
        assert len(engine.jobs) == 1


@pytest.mark.parametrize(("grace_s", "jobs"), [(30.0, 1), (0.0, 2)])
async def test_a_unary_call_whose_connection_is_cut_is_sent_again_and_finds_its_job_if_that_goes_on(grace_s, jobs):
    engine = FakeEngine(iteration_s=0.005)
    async with (
        serving(engine) as s,
        Proxy(s.address) as proxy,
        GramophoneClient(proxy.address, timeout_s=20) as client,
    ):
        wanted = {"size": 64, "smallest_size": 0, "iterations": 200, "detach_grace": grace_s}
        call = asyncio.create_task(client.stylize(png(), png(32, 32), **wanted))
        await until(engine.under_way.is_set)
        proxy.cut()
        stylized = await call
        assert stylized.iterations == 200
        assert len(engine.jobs) == jobs
        assert (await client.get_job(stylized.job_id)).state == "SUCCEEDED"


async def test_a_job_whose_grace_is_over_is_stopped():
    engine = FakeEngine()
    async with serving(engine) as s:
        call, job_id = await start_detachable(s, engine, detachable_spec(grace=SHORT_GRACE))
        call.cancel()
        await until(lambda: s.servicer.jobs.find(job_id).cancelled)
        await stops_within_an_iteration(s, engine)
        assert await state(s, job_id) == "CANCELLED"


async def test_without_a_grace_a_second_watcher_keeps_the_job():
    engine = FakeEngine()
    async with serving(engine) as s:
        first = await start_stream(s, engine)
        (job,) = s.servicer.jobs.newest_first()
        second = watch(s, job.id)
        assert (await second.read()).event.HasField("accepted")
        first.cancel()
        await until(lambda: job.watchers == 1)
        assert await state(s, job.id) == "RUNNING"
        second.cancel()
        await until(lambda: job.cancelled)
        await stops_within_an_iteration(s, engine)


async def test_a_job_that_waits_hears_its_position():
    engine = FakeEngine(iteration_s=0.05)  # so that jobs take longer than the time between two tellings
    async with serving(engine, ONE) as s:
        running, _ = await start_detachable(s, engine, detachable_spec(3))
        second, second_id = await start_detachable(s, engine, detachable_spec(3))
        third, _ = await start_detachable(s, engine, detachable_spec(3))
        await s.stub.CancelJob(pb.CancelJobRequest(job_id=second_id))
        assert (await third.read()).event.waiting.queue_position == 1
        fourth, fourth_id = await start_detachable(s, engine, detachable_spec(3))
        assert (await s.stub.GetJob(pb.GetJobRequest(job_id=fourth_id))).job.queue_position == 2
        engine.go.set()
        told = await events_of(fourth)
        assert [e.waiting.queue_position for e in told if e.HasField("waiting")][-1:] in ([], [1])
        replayed = await events_of(watch(s, fourth_id))
        assert replayed[0].accepted.queue_position == 2
        assert [e.waiting.queue_position for e in replayed if e.HasField("waiting")] == [1]
        await asyncio.gather(events_of(running), events_of(third))
        with pytest.raises(grpc.aio.AioRpcError):
            await events_of(second)


async def test_a_grace_that_is_refused_does_not_break_the_list_of_jobs(monkeypatch):
    """Until its images are decoded, too, such a job must be one that can be told of."""
    entered = asyncio.Event()

    async def work(self, spec, *_):
        entered.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(Admission, "prepare", work)
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
