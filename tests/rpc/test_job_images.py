"""Decoded images: counted before they are decoded, and given back however their job ends."""

import asyncio
import contextlib
import gc
import io
import logging
import os
import threading
import uuid
import weakref

import grpc
import pytest
import torch
from google.protobuf import duration_pb2
from PIL import Image

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.v1 import style_transfer_pb2_grpc as pb_grpc
from gramophone_server import errors
from gramophone_server.config import Limits
from gramophone_server.engine.engine import VggEngine
from gramophone_server.images import codec
from gramophone_server.network.precision import MODES
from gramophone_server.rpc.byte_budget import ByteBudget
from gramophone_server.rpc.job_images import DecodedShare
from tests.support.bad_pictures import png as png_of
from tests.support.clock import WITHIN_S, until
from tests.support.engines import FakeEngine
from tests.support.pictures import png
from tests.support.serving import refused, serving, start_detachable
from tests.support.specs import detachable_spec, spec

PICTURES = 3 * (64 * 32 + 32 * 32)  # bytes of the two images of `spec`


class Painter(VggEngine):
    """The real engine, with the events of the fake one that the helpers use."""

    def __init__(self, vgg):
        super().__init__(vgg, torch.device("cpu"), MODES["fp32"])
        self.go, self.under_way = threading.Event(), threading.Event()


@pytest.fixture
def kept(monkeypatch):
    """Weak references to the tensors of all jobs."""
    references, keep = [], DecodedShare.keep_until_freed

    def noted(self, job, size):
        references.extend(weakref.ref(image) for image in (job.content, *job.styles))
        keep(self, job, size)

    monkeypatch.setattr(DecodedShare, "keep_until_freed", noted)
    return references


async def freed(s, kept):
    """Waits until no image is alive, and no byte is counted."""
    # The room is given back by a callback of the job's weak reference, a moment before its images are gone.
    await until(lambda: s.servicer.admission.decoded.used == 0 and all(image() is None for image in kept))


# The budget -----------------------------------------------------------------------------------------------------------


async def test_the_images_of_a_job_are_counted_while_it_runs(kept, tiny_vgg):
    async with serving(Painter(tiny_vgg)) as s:
        call = s.stub.StylizeStream(pb.StylizeStreamRequest(spec=spec(iterations=5000)))
        await call.read()
        assert s.servicer.admission.decoded.used == PICTURES and len(kept) == 2
        call.cancel()
        await freed(s, kept)


@contextlib.asynccontextmanager
async def another_connection(address):
    """A stub with a connection of its own."""
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield pb_grpc.StyleTransferServiceStub(channel)


async def test_a_job_whose_pieces_come_one_after_another_has_the_whole_budget():
    budget = ByteBudget(1000, of_one=0.75)
    with DecodedShare(budget, "one", lambda: 1.0) as share:
        share.take(400)
        share.take(600)
        assert budget.used == 1000
        with (
            DecodedShare(budget, "two", lambda: 1.0) as other,
            pytest.raises(errors.ServerBusy, match="of its jobs take 1000"),
        ):
            other.take(1)
    assert budget.used == 0


async def test_a_job_without_room_is_refused_with_a_retry_before_it_is_decoded(monkeypatch):
    engine = FakeEngine()
    async with serving(engine, Limits(max_decoded_bytes=2**20)) as s:
        large = spec(size=256, iterations=1000)
        large.content.data = large.styles[0].image.data = png(400, 400)  # 960,000 bytes
        engine.go.clear()
        call = s.stub.StylizeStream(pb.StylizeStreamRequest(spec=large))
        await call.read()
        with monkeypatch.context() as patch:
            patch.setattr(codec, "decode", lambda *_: pytest.fail("it was decoded"))
            got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=large)))
        assert (got.code, got.ErrorInfo.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SERVER_BUSY")
        assert got.RetryInfo.retry_delay.ToSeconds() >= 1
        assert got.message.startswith(
            "the server is busy: the decoded images of its jobs take 960000 of 1048576 bytes (server setting "
            "GRAMOPHONE_MAX_DECODED_BYTES), and this job needs 960000; retry after about "
        )
        assert s.servicer.admission.decoded.used == 960_000 and s.scheduler.queued == 0
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=spec())))
        assert got.message.startswith(
            "the server is busy: the decoded images of this connection's jobs take 960000 of 1048576 bytes (server "
            "setting GRAMOPHONE_MAX_DECODED_BYTES), the rest is for others, and this job needs 9216; retry after about "
        )
        async with another_connection(s.address) as stub:  # there is room for this one
            small = stub.StylizeStream(pb.StylizeStreamRequest(spec=spec()))
            await small.read()
        call.cancel()
        engine.go.set()


async def test_a_job_that_never_fits_is_refused_for_good():
    async with serving(FakeEngine(), Limits(max_decoded_bytes=2**20)) as s:
        wanted = spec(size=1024)
        wanted.content.data = png(1024, 1024)
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=wanted)))
        assert got.code is grpc.StatusCode.INVALID_ARGUMENT
        assert got.message == (
            "spec: has images that take 3148800 bytes once they are decoded; at most 1048576 are allowed (server "
            "setting GRAMOPHONE_MAX_DECODED_BYTES); send fewer or smaller images, or ask for a smaller size"
        )
        assert s.servicer.admission.decoded.used == 0
        wanted.recipe.size = 256  # the image is reduced by 4
        await s.stub.Stylize(pb.StylizeRequest(spec=wanted))


async def test_a_thin_picture_takes_no_more_room_than_a_square_one():
    """16 x 2,000,000 pixels in 130 KB took 96 MB from the request to the end of the job."""
    async with serving(engine := FakeEngine()) as s:
        wanted = spec()
        wanted.styles[0].image.data = png_of(16, 2_000_000, 8, 2, bytes(49 * 2_000_000))
        await s.stub.Stylize(pb.StylizeRequest(spec=wanted))
    assert engine.jobs[0].styles[0].shape == (3, 64, 16)


@pytest.mark.parametrize(
    ("data", "size", "or_larger"),
    [
        (png(1000, 20), "64x1", ", or ask for a size of 800 or more"),
        (png_of(16, 2_000_000, 8, 2, bytes(49 * 2_000_000)), "1x64", ""),  # no server allows a size of 2,000,000
    ],
)
async def test_a_thin_content_image_is_refused_before_it_is_decoded(monkeypatch, data, size, or_larger):
    monkeypatch.setattr(codec, "decode", lambda *_: pytest.fail("it was decoded"))
    async with serving(FakeEngine()) as s:
        wanted = spec()
        wanted.content.data = data
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=wanted)))
    assert got.message == (
        f"spec.recipe.size: makes a {size} picture of this content image; its shorter side must have at least 16 "
        f"pixels, so crop or pad the image until its longer side is at most 4 times the shorter one{or_larger}"
    )


async def test_the_advice_for_a_thin_content_image_helps():
    async with serving(engine := FakeEngine(iteration_s=0.0)) as s:
        wanted = spec()
        wanted.content.data = png(80, 20)
        await s.stub.Stylize(pb.StylizeRequest(spec=wanted))
    assert engine.jobs[0].result_size == (64, 16)


# Every end of a job ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grace_s", [0, 60])
async def test_a_job_that_ends_by_itself_frees_its_images(kept, tiny_vgg, grace_s):
    async with serving(Painter(tiny_vgg)) as s:
        wanted = spec()
        wanted.detach_grace.CopyFrom(duration_pb2.Duration(seconds=grace_s))
        await s.stub.Stylize(pb.StylizeRequest(spec=wanted, request_id=str(uuid.uuid4())))
        assert len(s.servicer.jobs) == 1  # it is kept, without its images
        await freed(s, kept)


async def test_a_checkpoint_that_nobody_reads_does_not_keep_the_images(kept, tiny_vgg):
    async with serving(Painter(tiny_vgg)) as s:
        wanted = spec(iterations=5000)
        wanted.checkpoints.min_interval.FromMilliseconds(10)
        call = s.stub.StylizeStream(pb.StylizeStreamRequest(spec=wanted))
        job_id = (await call.read()).event.accepted.job_id  # and nothing more
        job = s.servicer.jobs.find(job_id)
        await until(lambda: job.progress is not None and job.progress.report.iteration > 20)
        await s.stub.CancelJob(pb.CancelJobRequest(job_id=job_id))
        await freed(s, kept)


@pytest.mark.parametrize("error", [errors.Diverged(3), ZeroDivisionError(), torch.OutOfMemoryError(), MemoryError()])
async def test_a_job_that_fails_frees_its_images(kept, tiny_vgg, monkeypatch, error):
    # pytest keeps what is logged, and so the frames of its traceback.
    monkeypatch.setattr(logging.getLogger("gramophone_server.scheduling.worker"), "disabled", True)
    engine = Painter(tiny_vgg)
    async with serving(engine) as s:
        opened = engine.batch

        def failing(shape, slots):
            batch = opened(shape, slots)

            def advance(iterations):
                raise error

            monkeypatch.setattr(batch, "advance", advance)
            return batch

        monkeypatch.setattr(engine, "batch", failing)
        call = s.stub.StylizeStream(pb.StylizeStreamRequest(spec=detachable_spec()))
        await refused(call)
        error.__traceback__ = error.__context__ = None  # the test keeps it
        await freed(s, kept)


@pytest.mark.parametrize("phase", ["running", "waiting", "paused"])
async def test_a_cancelled_job_frees_its_images(kept, phase):
    engine = FakeEngine()
    async with serving(engine, Limits(max_running=1)) as s:
        first, job_id = await start_detachable(s, engine)
        if phase == "waiting":
            second = s.stub.StylizeStream(pb.StylizeStreamRequest(spec=detachable_spec()))
            job_id = (await second.read()).event.accepted.job_id
        if phase == "paused":
            control = s.stub.StylizeInteractive()
            await control.write(pb.StylizeInteractiveRequest(attach=pb.AttachCommand(job_id=job_id)))
            await control.write(pb.StylizeInteractiveRequest(pause=pb.PauseCommand()))
            await until(lambda: s.scheduler.pending_commands == 1)
            engine.go.set()
            await until(lambda: s.scheduler.paused == 1)
        held = s.servicer.admission.decoded.used
        await s.stub.CancelJob(pb.CancelJobRequest(job_id=job_id))
        engine.jobs.clear(), engine.joined.clear()
        if phase == "waiting":  # at once, although the other job is in an iteration
            await until(lambda: s.servicer.admission.decoded.used == held - PICTURES)
            first.cancel()
        engine.go.set()
        engine.batches.clear()
        if phase != "waiting":
            await freed(s, kept)


async def test_a_job_whose_time_ends_in_a_pause_frees_its_images(kept, tiny_vgg):
    """The compute thread, which then waits, must not keep it in a variable."""
    async with serving(Painter(tiny_vgg)) as s:
        control = s.stub.StylizeInteractive()
        start = pb.StartCommand(spec=spec(iterations=5000, time_budget=0.5))
        await control.write(pb.StylizeInteractiveRequest(start=start))
        while not (await control.read()).event.HasField("progress"):
            pass
        await control.write(pb.StylizeInteractiveRequest(pause=pb.PauseCommand()))
        await freed(s, kept)
        control.cancel()


async def test_a_server_that_stops_frees_all_images(kept, tiny_vgg):
    async with serving(Painter(tiny_vgg), Limits(max_running=1)) as s:
        calls = [s.stub.StylizeStream(pb.StylizeStreamRequest(spec=spec(iterations=5000))) for _ in range(3)]
        for call in calls:
            await call.read()
        assert s.servicer.admission.decoded.used == 3 * PICTURES
        s.scheduler.stop()
        await freed(s, kept)


@pytest.mark.parametrize("kind", ["damaged", "no memory", "no descriptors", "defect"])
async def test_a_job_whose_images_cannot_be_decoded_takes_no_room(kept, monkeypatch, kind):
    def decode(*_):
        raise {"no memory": MemoryError(), "no descriptors": OSError(24, ""), "defect": ZeroDivisionError()}[kind]

    wanted = spec()
    if kind == "damaged":
        wanted.content.data = png()[:-30]
    else:
        monkeypatch.setattr(codec, "decode", decode)
    async with serving(FakeEngine()) as s:
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=wanted)))
        await freed(s, kept)
    assert got.ErrorInfo.reason == {
        "damaged": "INVALID_REQUEST", "no memory": "OUT_OF_MEMORY", "no descriptors": "SERVER_BUSY",
        "defect": "INTERNAL",
    }[kind]  # fmt: skip
    assert hasattr(got, "RetryInfo") == (kind in ("no memory", "no descriptors"))


# Callers that leave ---------------------------------------------------------------------------------------------------


def slow_spec(**fields):
    """A request whose one image takes seconds to decode."""
    noise = Image.frombytes("L", (512, 512), os.urandom(2**18)).resize((5600, 5600))
    out = io.BytesIO()
    noise.convert("RGB").save(out, "WEBP", quality=30, method=0)
    wanted = spec(**fields)
    wanted.content.data = out.getvalue()
    return wanted


async def test_a_client_that_leaves_gives_back_its_place_and_its_room_at_once():
    async with serving(FakeEngine(), Limits(max_running=2, max_queued=2)) as s:
        wanted = slow_spec()
        calls = [s.stub.Stylize(pb.StylizeRequest(spec=wanted)) for _ in range(4)]
        await until(lambda: s.servicer.admission.decoded.used > 50_000)
        assert (await refused(s.stub.Stylize(pb.StylizeRequest(spec=spec())))).ErrorInfo.reason == "QUEUE_FULL"
        for call in calls:
            call.cancel()
        await until(lambda: s.scheduler.queued == 0)
        await until(lambda: s.servicer.admission.decoded.used == s.servicer.preparing == 0)
        await s.stub.Stylize(pb.StylizeRequest(spec=spec()))


async def test_the_images_of_a_job_with_a_grace_are_decoded_without_its_client():
    engine = FakeEngine()
    async with serving(engine) as s:
        wanted = slow_spec()
        wanted.detach_grace.CopyFrom(duration_pb2.Duration(seconds=60))
        call = s.stub.Stylize(pb.StylizeRequest(spec=wanted))
        await until(lambda: s.servicer.preparing == 1)
        call.cancel()
        await until(lambda: engine.iterations == 5)


async def test_nothing_is_hashed_or_decoded_for_a_caller_that_has_left(monkeypatch):
    """Its job ends while the header of its image is read, on a thread."""
    started, go = threading.Event(), threading.Event()

    def read_header(*about):
        started.set()
        assert go.wait(WITHIN_S), "the test never set it"
        return reading(*about)

    from gramophone_server.rpc import job_images

    reading = job_images.read_header
    monkeypatch.setattr(job_images, "read_header", read_header)
    monkeypatch.setattr(codec, "decode", lambda *_: pytest.fail("it was decoded"))
    monkeypatch.setattr("gramophone_server.rpc.admission.spec_digest", lambda _: pytest.fail("it was hashed"))
    async with serving(FakeEngine()) as s:
        call = s.stub.Stylize(pb.StylizeRequest(spec=spec(), request_id=str(uuid.uuid4())))
        await until(started.is_set)
        call.cancel()
        await until(lambda: s.scheduler.queued == 0)
        go.set()
        await until(lambda: s.servicer.preparing == 0)
        await asyncio.sleep(0.05)
        gc.collect()
