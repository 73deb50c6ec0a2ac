import asyncio

import grpc
import pytest

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.config import Limits
from gramophone_server.errors import Diverged
from gramophone_server.telemetry.metrics import METHODS, Metrics, size_class
from tests.support.clock import until
from tests.support.engines import FakeEngine
from tests.support.serving import refused, serving, start_stream
from tests.support.specs import spec

SERVICE = "gramophone.v1.StyleTransferService"
KINDS = {"Stylize": "unary", "StylizeStream": "server_stream", "UploadImage": "client_stream"}
KINDS |= {"StylizeInteractive": "bidi_stream"}


def rpcs(metrics, name, method, **labels):
    """The value of a grpc_server_* metric, None without such a series."""
    labels |= {"grpc_type": KINDS[method], "grpc_service": SERVICE, "grpc_method": method}
    return metrics.registry.get_sample_value(f"grpc_server_{name}", labels)


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(f"gramophone_{name}", labels)


def test_every_method_is_counted_from_the_start():
    assert set(METHODS) == {method.name for method in pb.DESCRIPTOR.services_by_name["StyleTransferService"].methods}
    metrics = Metrics()
    for method in KINDS:
        for name in ("started_total", "msg_received_total", "msg_sent_total", "handling_seconds_count"):
            assert rpcs(metrics, name, method) == 0
        for code in ("OK", "Canceled", "DeadlineExceeded", "Internal"):
            assert rpcs(metrics, "handled_total", method, grpc_code=code) == 0


def test_every_reason_and_outcome_is_counted_from_the_start():
    metrics = Metrics()
    for reason in ("QUEUE_FULL", "OUT_OF_MEMORY", "INVALID_REQUEST"):
        assert value(metrics, "admission_rejected_total", reason=reason) == 0
    for outcome in ("ITERATIONS_DONE", "TIME_BUDGET", "FINISHED", "CANCELLED", "DIVERGED", "INTERNAL"):
        assert value(metrics, "jobs_finished_total", outcome=outcome) == 0
    for unset in ("UNSPECIFIED", ""):
        assert value(metrics, "jobs_finished_total", outcome=unset) is None


@pytest.mark.parametrize(
    ("longest", "expected"),
    [(16, "64"), (64, "64"), (65, "128"), (256, "256"), (257, "512"), (2048, "2048"), (4096, "4096"), (4097, "larger")],
)
def test_sizes_have_classes(longest, expected):
    assert size_class(longest) == expected


async def test_a_call_is_counted_with_its_messages_and_its_job():
    metrics = Metrics()
    async with serving(FakeEngine(), metrics=metrics) as s:
        await s.stub.Stylize(pb.StylizeRequest(spec=spec(iterations=5)))
        await until(lambda: rpcs(metrics, "handled_total", "Stylize", grpc_code="OK") == 1)
        assert rpcs(metrics, "started_total", "Stylize") == 1
        assert rpcs(metrics, "msg_received_total", "Stylize") == rpcs(metrics, "msg_sent_total", "Stylize") == 1
        assert rpcs(metrics, "handling_seconds_count", "Stylize") == 1
        assert value(metrics, "jobs_finished_total", outcome="ITERATIONS_DONE") == 1
        assert value(metrics, "job_seconds_count") == value(metrics, "queue_wait_seconds_count") == 1
        assert value(metrics, "time_to_first_frame_seconds_count") == 0  # the call wants no frames
        assert value(metrics, "iterations_total", size="64") == 5
        slices = value(metrics, "iteration_seconds_count", size="64")
        assert 1 <= slices <= 5
        assert value(metrics, "batch_width_sum", size="64") == slices  # each of one slot


async def test_frames_and_messages_of_a_stream_are_counted_as_they_are_sent():
    metrics, engine = Metrics(), FakeEngine()
    async with serving(engine, metrics=metrics) as s:
        wanted = spec(iterations=3)
        wanted.frames.SetInParent()
        events = [r.event async for r in s.stub.StylizeStream(pb.StylizeStreamRequest(spec=wanted))]
        await until(lambda: rpcs(metrics, "handled_total", "StylizeStream", grpc_code="OK") == 1)
        frames = [event.frame for event in events if event.HasField("frame")]
        assert rpcs(metrics, "msg_sent_total", "StylizeStream") == len(events)
        assert value(metrics, "frames_sent_total") == len(frames) >= 1
        assert value(metrics, "frames_dropped_total") == sum(frame.dropped for frame in frames)
        assert value(metrics, "time_to_first_frame_seconds_count") == 1


async def test_every_message_of_a_client_is_counted():
    metrics = Metrics()
    async with serving(FakeEngine(), metrics=metrics) as s:
        image = spec().content.data
        pieces = [image[:10], image[10:20], image[20:]]
        await s.stub.UploadImage(iter([pb.UploadImageRequest(chunk=piece) for piece in pieces]))
        controlled = s.stub.StylizeInteractive()
        await controlled.write(pb.StylizeInteractiveRequest(start=pb.StartCommand(spec=spec(iterations=2))))
        await controlled.write(pb.StylizeInteractiveRequest(ack=pb.AckCommand(sequence=1)))
        await controlled.done_writing()
        async for _ in controlled:
            pass
        await until(lambda: rpcs(metrics, "msg_received_total", "StylizeInteractive") == 2)
        assert rpcs(metrics, "msg_received_total", "UploadImage") == 3
        assert rpcs(metrics, "msg_sent_total", "UploadImage") == 1


@pytest.mark.parametrize(
    ("deadline_s", "cancels", "code"),
    [
        (None, True, "Canceled"),
        (60, True, "Canceled"),
        (3, False, "DeadlineExceeded"),
        (5, False, "DeadlineExceeded"),
    ],
)
async def test_a_stream_that_its_client_ends_is_counted_by_the_reason(deadline_s, cancels, code):
    metrics, engine = Metrics(), FakeEngine()
    async with serving(engine, metrics=metrics) as s:
        call = await start_stream(s, engine, timeout=deadline_s)
        if cancels:
            call.cancel()
        await until(lambda: rpcs(metrics, "handled_total", "StylizeStream", grpc_code=code) == 1)
        engine.go.set()
        await until(lambda: value(metrics, "jobs_finished_total", outcome="CANCELLED") == 1)


async def test_a_job_that_fails_is_counted_by_its_reason():
    metrics = Metrics()
    async with serving(FakeEngine(fails_at=2, error=Diverged(2)), metrics=metrics) as s:
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=spec())))
        assert got.code is grpc.StatusCode.FAILED_PRECONDITION
        await until(lambda: value(metrics, "jobs_finished_total", outcome="DIVERGED") == 1)
        await until(lambda: rpcs(metrics, "handled_total", "Stylize", grpc_code="FailedPrecondition") == 1)
        assert value(metrics, "admission_rejected_total", reason="DIVERGED") == 0


async def test_rejected_jobs_are_counted_by_reason_and_not_as_ended_jobs():
    metrics, engine = Metrics(), FakeEngine()
    async with serving(engine, Limits(max_running=1, max_queued=0), metrics=metrics) as s:
        await refused(s.stub.Stylize(pb.StylizeRequest(spec=pb.JobSpec())))
        await until(lambda: value(metrics, "admission_rejected_total", reason="INVALID_REQUEST") == 1)
        running = await start_stream(s, engine)
        await refused(s.stub.Stylize(pb.StylizeRequest(spec=spec())))
        assert value(metrics, "admission_rejected_total", reason="QUEUE_FULL") == 1
        assert value(metrics, "job_seconds_count") == 0
        running.cancel()


async def test_each_invalid_request_is_counted_once():
    metrics, engine = Metrics(), FakeEngine()
    async with serving(engine, metrics=metrics) as s:
        streamed = spec()
        streamed.frames.max_in_flight = 2
        bytes_as = s.channel.unary_unary(f"/{SERVICE}/Stylize", request_serializer=bytes)
        for call in (
            s.stub.Stylize(pb.StylizeRequest(spec=pb.JobSpec())),
            s.stub.Stylize(pb.StylizeRequest(spec=spec(), request_id="no UUID")),
            s.stub.StylizeStream(pb.StylizeStreamRequest(spec=streamed)),
            s.stub.StylizeInteractive(iter([pb.StylizeInteractiveRequest(finish=pb.FinishCommand())])),
            bytes_as(b"\xff\xff"),
        ):
            assert (await refused(call)).code is grpc.StatusCode.INVALID_ARGUMENT
        await refused(s.stub.WatchJob(pb.WatchJobRequest(job_id="none")))
        attach = pb.StylizeInteractiveRequest(attach=pb.AttachCommand(job_id="none"))
        await refused(s.stub.StylizeInteractive(iter([attach])))
        await until(lambda: value(metrics, "admission_rejected_total", reason="INVALID_REQUEST") == 5)
        # WatchJob and attach do not create a job.
        assert value(metrics, "admission_rejected_total", reason="JOB_NOT_FOUND") == 0


async def test_the_number_of_series_does_not_depend_on_what_callers_choose():
    metrics = Metrics()
    async with serving(FakeEngine(), Limits(max_queued=100), metrics=metrics) as s:

        async def job(size):
            await s.stub.Stylize(pb.StylizeRequest(spec=spec(iterations=1, size=size)))

        def series():
            return {(s.name, *s.labels.items()) for family in metrics.registry.collect() for s in family.samples}

        await asyncio.gather(*map(job, (33, 64)))
        await until(lambda: value(metrics, "job_seconds_count") == 2)
        before = series()
        await asyncio.gather(*map(job, range(34, 64)))
        await until(lambda: value(metrics, "job_seconds_count") == 32)
        assert series() == before


async def test_a_queued_jobs_wait_is_measured_from_its_request():
    metrics, engine = Metrics(), FakeEngine()
    async with serving(engine, Limits(max_running=1), metrics=metrics) as s:
        running = await start_stream(s, engine)
        waiting = asyncio.ensure_future(s.stub.Stylize(pb.StylizeRequest(spec=spec(iterations=1))))
        await until(lambda: s.scheduler.queued == 1)
        await asyncio.sleep(0.2)
        running.cancel()
        engine.go.set()
        await waiting
        await until(lambda: value(metrics, "job_seconds_count") == 2)
        assert value(metrics, "queue_wait_seconds_sum") >= 0.2
