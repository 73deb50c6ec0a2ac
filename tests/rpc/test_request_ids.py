"""Requests that are sent again with the same id."""

import asyncio
import threading
import uuid

import grpc
import pytest

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server import errors
from gramophone_server.images import codec
from tests.support.clock import WITHIN_S, until
from tests.support.engines import FakeEngine
from tests.support.pictures import png
from tests.support.serving import (
    events_of,
    refused,
    serving,
    start_detachable,
    watch,
)
from tests.support.specs import detachable_spec


async def state(s, job_id):
    return pb.JobState.Name((await s.stub.GetJob(pb.GetJobRequest(job_id=job_id))).job.state)[len("JOB_STATE_") :]


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
    """Blocks decoding, on its thread, until it is set; `.started` is set when decoding starts."""
    go, decode = threading.Event(), codec.decode
    go.started = threading.Event()

    def waiting(*about):
        go.started.set()
        assert go.wait(WITHIN_S), "the test never set it"
        return decode(*about)

    monkeypatch.setattr(codec, "decode", waiting)
    yield go
    go.set()


async def test_the_same_request_finds_its_job_while_its_images_are_decoded(held):
    engine, request_id = FakeEngine(), str(uuid.uuid4())
    async with serving(engine) as s:
        first = s.stub.Stylize(pb.StylizeRequest(spec=detachable_spec(5), request_id=request_id))
        await until(held.started.is_set)
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


async def test_the_same_request_starts_a_new_job_if_the_first_is_refused_while_it_waits(held):
    engine, request_id = FakeEngine(), str(uuid.uuid4())
    broken = detachable_spec(5)
    broken.content.data = png()[:50]
    async with serving(engine) as s:
        first = s.stub.Stylize(pb.StylizeRequest(spec=broken, request_id=request_id))
        await until(held.started.is_set)
        others = [s.stub.Stylize(pb.StylizeRequest(spec=detachable_spec(5), request_id=request_id)) for _ in range(2)]
        await until(lambda: len(s.servicer.calls) == 3)
        held.set()
        assert (await refused(first)).code is grpc.StatusCode.INVALID_ARGUMENT
        one, two = await asyncio.gather(*others)
    assert one.accepted.job_id == two.accepted.job_id and len(engine.jobs) == 1


async def test_the_same_request_starts_a_new_job_if_the_first_failed():
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
