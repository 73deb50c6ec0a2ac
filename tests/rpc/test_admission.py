"""From a request to a job: refusals before decoding, the digest of a job, and when its images are freed."""

import gc
import hashlib
import math
import uuid
import weakref

import grpc
import pytest
from google.protobuf import duration_pb2

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.domain.job_state import Shape
from gramophone_server.errors import DeadlineUnattainable, InvalidRequest, OutOfDeviceMemory
from gramophone_server.rpc.admission import spec_digest
from gramophone_server.scheduling.reservation import Reservation
from gramophone_server.scheduling.scheduler import Scheduler
from tests.support.clock import until
from tests.support.engines import FakeEngine
from tests.support.pictures import png
from tests.support.serving import refused, serving
from tests.support.specs import spec

RESERVATION = Reservation(1)
LATER = 10.0**9  # s on the monotonic clock


async def test_memory_and_time_are_checked_before_decoding(admission):
    wanted = spec(size=64, smallest_size=40, iterations=5, coarse_iterations=3, time_budget=2.5)
    state = await admission.prepare(wanted, RESERVATION, LATER, "an owner")
    memory, (_, _, asked, left_s, image_pixels, result_kind, owner) = admission.asked
    assert memory == ("memory", Shape.of(state.recipe, 32, 64), state.shape)  # of the last scale, and of the first
    assert asked.scales == state.scales and asked.recipe == state.recipe
    assert asked.pixel_iterations_left == 5 * 64 * 32 + 3 * 45 * 22
    assert left_s == pytest.approx(LATER, rel=0.1)
    assert (image_pixels, result_kind, owner) == (64 * 32, "PNG", "an owner")  # of the largest image
    assert len(admission.were_decoded) == 2
    assert [pixels for pixels, _ in admission.recorded_decodings] == [64 * 32, 32 * 32]
    await admission.prepare(wanted, RESERVATION)
    assert admission.asked[3][3] == math.inf  # without a deadline


@pytest.mark.parametrize(
    ("kind", "error"), [("memory", OutOfDeviceMemory(64, 32)), ("time", DeadlineUnattainable(1, 2, 1.5))]
)
async def test_a_refused_job_is_not_decoded(admission, kind, error):
    admission.raises[kind] = error
    with pytest.raises(type(error)):
        await admission.prepare(spec(), RESERVATION, LATER)
    assert admission.were_decoded == []
    admission.asked.clear()
    wrong = spec(beta=-1.0)
    wrong.content.data = b"GIF89a"
    with pytest.raises(InvalidRequest) as caught:  # violations are reported first, with those of the images' headers
        await admission.prepare(wrong, RESERVATION, LATER)
    assert [field for field, _ in caught.value.violations] == ["spec.recipe.beta", "spec.content.data"]
    assert admission.were_decoded == admission.asked == []


@pytest.mark.parametrize("content", [png(64, 15), png(6000, 6000), png()[:20], b"GIF89a", png(1000, 16)])
async def test_an_image_without_a_valid_size_in_its_header_is_refused_first(admission, content):
    wanted = spec()
    wanted.content.data = content
    with pytest.raises(InvalidRequest):
        await admission.prepare(wanted, RESERVATION, LATER)
    assert admission.asked == admission.were_decoded == []


@pytest.mark.parametrize(("grace_s", "asked_for"), [(0, True), (60, False)])
async def test_a_job_that_outlives_its_call_has_no_deadline(monkeypatch, grace_s, asked_for):
    async with serving(FakeEngine()) as s:
        left = []

        def require_time(scheduler, reservation, state, left_s, *_):
            left.append(left_s)
            if left_s < math.inf:
                raise DeadlineUnattainable(100, 10, left_s)

        monkeypatch.setattr(Scheduler, "require_time", require_time)
        wanted = spec()
        wanted.detach_grace.CopyFrom(duration_pb2.Duration(seconds=grace_s))
        call = s.stub.Stylize(pb.StylizeRequest(spec=wanted), timeout=50)
        if asked_for:
            got = await refused(call)
            assert (got.code, got.ErrorInfo.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DEADLINE_UNATTAINABLE")
            assert 30 <= got.RetryInfo.retry_delay.ToSeconds() <= 38  # at most, also after an estimate of 100 s
            assert s.scheduler.queued == 0
            assert left == [pytest.approx(50, abs=5)]
        else:
            assert (await call).result.iterations == 5
            assert left == [math.inf]


async def test_a_job_larger_than_the_device_is_refused_over_the_wire():
    engine = FakeEngine(memory_bytes=1000 * 64 * 32 - 1)
    async with serving(engine) as s:
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=spec())))
        assert (got.code, got.ErrorInfo.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY")
        assert got.message == "the device has too little memory for a 64x32 picture; ask for a smaller size"
        assert got.trailers["grpc-retry-pushback-ms"] == "-1"
        assert s.scheduler.queued == 0 and engine.jobs == []
        await s.stub.Stylize(pb.StylizeRequest(spec=spec(size=62)))


@pytest.mark.parametrize("refusal", [OutOfDeviceMemory(64, 32), DeadlineUnattainable(1, 2, 1.5)])
async def test_a_refused_job_is_not_hashed(monkeypatch, refusal):
    """The hash is for the request_id, which the client always sends. Two images of 4.8 MB take 5 ms."""

    def refuse(*_):
        raise refusal

    async with serving(FakeEngine()) as s:
        monkeypatch.setattr(s.scheduler, "require_memory", refuse)
        monkeypatch.setattr("gramophone_server.rpc.admission.spec_digest", lambda _: pytest.fail("it was hashed"))
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=spec(), request_id=str(uuid.uuid4()))))
        assert got.code is grpc.StatusCode.RESOURCE_EXHAUSTED


def sha256(data):
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def test_the_digest_covers_everything_that_determines_the_job():
    def changed(**fields):
        other = pb.JobSpec()
        other.CopyFrom(wanted)
        other.MergeFrom(pb.JobSpec(**fields))
        return spec_digest(other)

    wanted = spec()
    image = pb.ImageSource(data=png(48, 32))
    others = [
        changed(content=image), changed(start_image=image), changed(styles=[pb.StyleSource(image=image)]),
        changed(content=pb.ImageSource(digest="x")), changed(resume=b""), changed(resume=b"a"), changed(resume=b"b"),
        changed(recipe=pb.Recipe(beta=2)), changed(seed=1), changed(result_quality=80), changed(),
    ]  # fmt: skip
    assert len(set(others)) == len(others)
    by_digest = pb.ImageSource(digest=sha256(png(48, 32)))
    assert changed(content=image) == changed(content=by_digest)
    assert changed(styles=[pb.StyleSource(image=image)]) == changed(styles=[pb.StyleSource(image=by_digest)])
    assert changed(resume=b"a") == changed(resume_digest=sha256(b"a"))
    watched = changed(frames=pb.FrameOptions(quality=50), checkpoints=pb.CheckpointOptions(light=True))
    assert watched == changed() == spec_digest(pb.JobSpec.FromString(wanted.SerializeToString()))
    assert wanted == spec()  # unchanged


async def test_the_images_of_a_job_are_freed_when_it_ends():
    engine = FakeEngine()
    async with serving(engine) as s:
        await s.stub.Stylize(pb.StylizeRequest(spec=spec()))
        (job,) = engine.jobs
        pictures = [weakref.ref(picture) for picture in (job.content, *job.styles)]
        del job
        for noted in (engine.jobs, engine.joined, engine.batches):
            noted.clear()
        gc.collect()
        await until(lambda: not any(picture() is not None for picture in pictures))
