"""UploadImage: which images are kept, and which are refused."""

import asyncio
import hashlib
import io
import threading

import grpc
import pytest
from PIL import ExifTags, Image

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.v1 import style_transfer_pb2_grpc as pb_grpc
from gramophone_server.config import Limits
from gramophone_server.domain.checkpoint import CHECKPOINT_START
from gramophone_server.images import codec
from gramophone_server.rpc import job_images
from tests.support.clock import WITHIN_S, until
from tests.support.engines import FakeEngine
from tests.support.pictures import png
from tests.support.serving import refused, serving
from tests.support.specs import spec


def digest(data):
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def chunks(data, size=1000):
    return [pb.UploadImageRequest(chunk=data[at : at + size]) for at in range(0, len(data), size)]


async def uploaded(s, data, size=1000):
    return await s.stub.UploadImage(iter(chunks(data, size)))


def noise(side=64):
    out = io.BytesIO()
    Image.effect_noise((side, side), 100).convert("RGB").save(out, "PNG")
    return out.getvalue()


async def test_an_image_is_uploaded_once_and_used_in_many_jobs():
    engine = FakeEngine()
    content, style = png(), noise()
    async with serving(engine) as s:
        for _ in range(2):  # the second upload changes nothing
            response = await uploaded(s, content)
            assert response == pb.UploadImageResponse(digest=digest(content), width=64, height=32)
        await uploaded(s, style)
        inline = spec()
        inline.styles[0].image.data = style
        by_digest = spec()
        by_digest.content.digest, by_digest.styles[0].image.digest = digest(content), digest(style)
        for wanted in (inline, by_digest, by_digest):
            await s.stub.Stylize(pb.StylizeRequest(spec=wanted))
        info = await s.stub.GetServerInfo(pb.GetServerInfoRequest())
    first, *others = engine.jobs
    for job in others:
        assert (job.content_digest, job.style_digests) == (first.content_digest, first.style_digests)
    kept = len(content) + len(style)
    assert info.uploads == pb.CacheStats(hits=4, misses=0, bytes=kept, max_bytes=128 * 2**20)


async def test_a_small_request_does_not_read_large_uploads(monkeypatch):
    """474 bytes that named an upload of 10 MB six times held the interpreter for 0.5 s, also when they were refused."""
    content, style = png(), noise()
    wanted, engine = spec(iterations=1), FakeEngine()
    wanted.content.digest, wanted.styles[0].image.digest = digest(content), digest(style)
    async with serving(engine) as s:
        await uploaded(s, content)
        await uploaded(s, style)
        monkeypatch.setattr(job_images, "read_header", lambda *_: pytest.fail("an upload was read again"))
        await s.stub.Stylize(pb.StylizeRequest(spec=wanted))
        wanted.result_quality = 101
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=wanted)))
    assert [violation.field for violation in got.BadRequest.field_violations] == ["spec.result_quality"]
    assert engine.jobs[0].content.shape == (3, 32, 64)


async def test_a_checkpoint_named_as_an_image_is_refused():
    state = CHECKPOINT_START + b"\1"
    wanted = spec()
    wanted.content.digest = digest(state)
    async with serving(FakeEngine()) as s:
        s.servicer.uploads.keep(digest(state), state, "somebody")
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=wanted)))
    (violation,) = got.BadRequest.field_violations
    assert violation.field == "spec.content.digest" and "must be a JPEG, PNG or WebP image" in violation.description


async def test_the_size_is_that_after_exif_orientation():
    out, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (64, 32)).save(out, "JPEG", exif=exif)
    async with serving(FakeEngine()) as s:
        response = await uploaded(s, out.getvalue())
    assert (response.width, response.height) == (32, 64)


async def test_a_start_image_can_be_uploaded_too():
    engine = FakeEngine()
    wanted = spec()
    wanted.recipe.start = pb.START_IMAGE
    wanted.start_image.digest = digest(png(20, 40))
    async with serving(engine) as s:
        await uploaded(s, png(20, 40))
        await s.stub.Stylize(pb.StylizeRequest(spec=wanted))
    assert engine.jobs[0].start.shape == (3, 40, 20)


async def test_a_missing_image_is_not_found_unless_there_are_violations():
    engine = FakeEngine()
    wanted = spec()
    wanted.content.digest = digest(b"never")
    async with serving(engine) as s:
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=wanted)))
        assert (got.code, got.ErrorInfo.reason) == (grpc.StatusCode.NOT_FOUND, "IMAGE_NOT_FOUND")
        assert got.message == (
            f"this server keeps no image '{digest(b'never')}'; upload it with UploadImage, and send the job again"
        )
        wanted.recipe.beta = -1.0
        wanted.styles[0].image.data = b"GIF89a"
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=wanted)))
        fields = [violation.field for violation in got.BadRequest.field_violations]
        assert fields == ["spec.recipe.beta", "spec.styles[0].image.data"]
        assert s.scheduler.queued == 0 and engine.jobs == []


async def test_an_evicted_image_is_not_found():
    first, second = noise(), noise()
    async with serving(FakeEngine(), Limits(max_uploads_bytes=len(first) + 2000)) as s:
        await uploaded(s, first)
        await uploaded(s, second)
        wanted = spec()
        wanted.content.digest = digest(first)
        assert (await refused(s.stub.Stylize(pb.StylizeRequest(spec=wanted)))).ErrorInfo.reason == "IMAGE_NOT_FOUND"
        wanted.content.digest = digest(second)
        await s.stub.Stylize(pb.StylizeRequest(spec=wanted))


async def test_a_client_that_uploads_a_lot_evicts_its_own_images():
    first = noise()
    limits = Limits(max_uploads_bytes=5 * len(first))
    async with serving(FakeEngine(), limits) as s, grpc.aio.insecure_channel(s.address) as channel:
        await uploaded(s, first)
        other = pb_grpc.StyleTransferServiceStub(channel)
        for number in range(12):
            await other.UploadImage(iter(chunks(noise() + bytes(number))))
        wanted = spec()
        wanted.content.digest = digest(first)
        await s.stub.Stylize(pb.StylizeRequest(spec=wanted))


async def test_an_image_stays_while_a_job_that_names_it_is_admitted(monkeypatch):
    """The server's bytes of uploads bound those that jobs use, too."""
    go, started, decode = threading.Event(), threading.Event(), codec.decode

    def waiting(data, *about):
        if data == first:
            started.set()
            assert go.wait(WITHIN_S), "the test never set it"
        return decode(data, *about)

    monkeypatch.setattr(codec, "decode", waiting)
    first, second = noise(), noise()
    async with serving(FakeEngine(), Limits(max_uploads_bytes=len(first) + 2000)) as s:
        wanted = spec()
        wanted.content.digest = (await uploaded(s, first)).digest
        job = s.stub.Stylize(pb.StylizeRequest(spec=wanted))
        try:
            await until(started.is_set)
            got = await refused(uploaded(s, second))
            assert (got.code, got.ErrorInfo.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SERVER_BUSY")
            assert got.RetryInfo.retry_delay.ToSeconds() >= 1
        finally:
            go.set()
        await job
        await uploaded(s, second)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "must be a JPEG, PNG or WebP image, got 0 bytes of something else"),
        (b"GIF89a" + bytes(5000), "what looks like a GIF file"),
        (png()[:40], "truncated or damaged"),
        (
            png(400, 200),
            "is 400x200, 80000 pixels; at most 70000 are allowed (server setting GRAMOPHONE_MAX_IMAGE_PIXELS)",
        ),
        (png(64, 15), "each side must have at least 16 pixels"),
    ],
)
async def test_data_that_is_no_image_is_refused_when_it_is_uploaded(data, words):
    async with serving(FakeEngine(), Limits(max_image_pixels=70_000)) as s:
        got = await refused(s.stub.UploadImage(iter(chunks(data))))
        info = await s.stub.GetServerInfo(pb.GetServerInfoRequest())
    assert (got.code, got.ErrorInfo.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    (violation,) = got.BadRequest.field_violations
    assert violation.field == "chunk" and words in violation.description
    assert info.uploads.bytes == 0


async def test_a_damaged_uploaded_image_is_reported_by_its_digest():
    data = noise()
    data = data[: len(data) // 2]  # its header is valid
    wanted = spec()
    wanted.content.digest = digest(data)
    async with serving(FakeEngine()) as s:
        await uploaded(s, data)
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=wanted)))
    (violation,) = got.BadRequest.field_violations
    assert violation.field == "spec.content.digest" and "truncated" in violation.description


async def test_an_endless_upload_is_refused_at_the_limit():
    async def endless():
        for _ in range(11):
            yield pb.UploadImageRequest(chunk=bytes(1000))
        # No more, and no end: a write at the moment of the refusal would hide its status (grpc#36066).
        await asyncio.Event().wait()

    async with serving(FakeEngine(), Limits(max_image_bytes=10_000)) as s:
        got = await refused(s.stub.UploadImage(endless()))
        assert got.code is grpc.StatusCode.INVALID_ARGUMENT
        assert "makes an image of 11000 bytes or more; at most 10000 are allowed" in got.message
        await s.servicer.idle()


async def test_a_client_that_leaves_during_an_upload_leaves_nothing():
    async with serving(FakeEngine()) as s:
        call = s.stub.UploadImage()
        await call.write(pb.UploadImageRequest(chunk=png()[:30]))
        call.cancel()
        await s.servicer.idle()
        info = await s.stub.GetServerInfo(pb.GetServerInfoRequest())
        assert info.uploads.bytes == 0
