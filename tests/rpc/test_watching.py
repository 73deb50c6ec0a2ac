"""WatchJob and CancelJob: what watchers of a job receive, and jobs that outlive their watchers."""

import asyncio
import threading

import grpc
import pytest

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.config import Limits
from gramophone_server.images.codec import Format, encode
from gramophone_server.rpc.encoders import Encoders
from gramophone_server.scheduling import worker
from tests.support.clock import WITHIN_S, until
from tests.support.engines import FakeEngine
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

SLICE_S = 0.02  # an iteration of this duration is a slice of its own, so each one is reported


ONE = Limits(max_running=1)


async def state(s, job_id):
    return pb.JobState.Name((await s.stub.GetJob(pb.GetJobRequest(job_id=job_id))).job.state)[len("JOB_STATE_") :]


async def test_a_watcher_gets_past_and_new_events_with_the_same_numbers(monkeypatch):
    monkeypatch.setattr(worker, "PROGRESS_INTERVAL_S", 0.0)
    engine = FakeEngine(iteration_s=SLICE_S)
    async with serving(engine) as s:
        first, job_id = await start_detachable(s, engine, detachable_spec(200))
        engine.go.set()
        received = {}
        async for event in remaining_events(first):
            received[event.sequence] = event
            if len(received) == 20:
                break
        engine.iteration_s = 0.001
        second = watch(s, job_id)
        watched, rest_of_first = await asyncio.gather(events_of(second), events_of(first))
    received |= {event.sequence: event for event in rest_of_first}
    numbers = [event.sequence for event in watched]
    assert numbers == sorted(set(numbers))
    assert numbers[:20] == list(range(1, 21))  # all events of the log, also those that the other reader may have missed
    assert [event.WhichOneof("event") for event in (watched[0], watched[-1])] == ["accepted", "result"]
    assert watched[0].accepted.job_id == job_id and not watched[0].accepted.attached
    same = [event for event in watched if event.sequence in received]
    assert len(same) >= 10 and all(received[event.sequence] == event for event in same)


async def test_after_sequence_skips_events_that_the_watcher_has(monkeypatch):
    monkeypatch.setattr(worker, "PROGRESS_INTERVAL_S", 0.0)
    async with serving(FakeEngine(iteration_s=SLICE_S)) as s:
        response = await s.stub.Stylize(pb.StylizeRequest(spec=detachable_spec(20)))
        job_id = response.accepted.job_id
        everything = await events_of(watch(s, job_id))
        assert len(everything) == 22
        for after in (1, 10, 21):
            assert await events_of(watch(s, job_id, after)) == everything[after:]
        assert await events_of(watch(s, job_id, 22)) == []
    assert everything[-1].result == response.result


async def test_watchers_with_the_same_options_share_one_encoding(monkeypatch):
    """An encoding is shared by those that want it at the same time. So the one of the frame waits for both."""
    encodings, wanted, both_wait = [], [], threading.Event()
    share = Encoders.sharing

    def recorded(picture, *encoding):
        encodings.append(encoding[0])
        assert encoding[0] is not Format.JPEG or both_wait.wait(WITHIN_S)
        return encode(picture, *encoding)

    def sharing(self, users, encoding, *work, **options):
        wanted.append(encoding.format)
        if wanted.count(Format.JPEG) == 2:
            both_wait.set()
        return share(self, users, encoding, *work, **options)

    monkeypatch.setattr("gramophone_server.images.codec.encode", recorded)
    monkeypatch.setattr(Encoders, "sharing", sharing)
    engine = FakeEngine()
    async with serving(engine) as s:
        first, job_id = await start_detachable(s, engine, detachable_spec(9, every_iterations=5))
        second = watch(s, job_id, every_iterations=5)
        third = watch(s, job_id, every_iterations=5, format=pb.IMAGE_FORMAT_WEBP)
        await until(lambda: s.servicer.jobs.find(job_id).watchers == 3)
        engine.go.set()
        received = await asyncio.gather(*map(events_of, (first, second, third)))
    frames = [[event for event in events if event.HasField("frame")] for events in received]
    assert [len(of_one) for of_one in frames] == [1, 1, 1]
    assert frames[0] == frames[1] != frames[2]
    assert sorted(encodings) == [Format.JPEG, Format.PNG, Format.WEBP]  # of a frame and a result
    assert len(engine.taken_at) == 2  # the same
    assert received[0][-1] == received[1][-1] == received[2][-1]


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
        for watcher in (call, other, watch(s, job_id)):  # the engine is blocked, and no watcher waits for it
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


async def test_a_later_watcher_of_a_cancelled_job_gets_the_reason():
    engine = FakeEngine()
    async with serving(engine) as s:
        call, job_id = await start_detachable(s, engine)
        call.cancel()
        await s.stub.CancelJob(pb.CancelJobRequest(job_id=job_id))
        got = await refused(watch(s, job_id))
        assert (got.code, got.ErrorInfo.reason) == (grpc.StatusCode.ABORTED, "CANCELLED")


async def test_a_job_with_a_grace_continues_without_its_client():
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


async def test_a_job_is_cancelled_after_its_grace():
    engine = FakeEngine()
    async with serving(engine) as s:
        call, job_id = await start_detachable(s, engine, detachable_spec(grace=SHORT_GRACE))
        call.cancel()
        await until(lambda: s.servicer.jobs.find(job_id).cancelled)
        await stops_within_an_iteration(s, engine)
        assert await state(s, job_id) == "CANCELLED"


async def test_without_a_grace_a_second_watcher_keeps_the_job_running():
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


async def test_a_queued_job_gets_its_position():
    engine = FakeEngine(iteration_s=0.05)  # so that a job lasts longer than the time between two position updates
    async with serving(engine, ONE) as s:
        running, _ = await start_detachable(s, engine, detachable_spec(3))
        second, second_id = await start_detachable(s, engine, detachable_spec(3))
        third, _ = await start_detachable(s, engine, detachable_spec(3))
        await s.stub.CancelJob(pb.CancelJobRequest(job_id=second_id))
        assert (await third.read()).event.waiting.queue_position == 1
        fourth, fourth_id = await start_detachable(s, engine, detachable_spec(3))
        assert (await s.stub.GetJob(pb.GetJobRequest(job_id=fourth_id))).job.queue_position == 2
        engine.go.set()
        events = await events_of(fourth)
        assert [e.waiting.queue_position for e in events if e.HasField("waiting")][-1:] in ([], [1])
        replayed = await events_of(watch(s, fourth_id))
        assert replayed[0].accepted.queue_position == 2
        assert [e.waiting.queue_position for e in replayed if e.HasField("waiting")] == [1]
        await asyncio.gather(events_of(running), events_of(third))
        with pytest.raises(grpc.aio.AioRpcError):
            await events_of(second)
