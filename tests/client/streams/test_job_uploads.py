"""Jobs whose images and checkpoint are too large for one request."""

import asyncio
import hashlib

import pytest

from gramophone.options import INLINE_BYTES
from gramophone.recipe import Violation
from gramophone_client import UploadProgress, errors
from gramophone_server import errors as server_errors
from tests.support.fake_service import LOST, PAINTING, PHOTO, accepted, checkpoint, refused, result
from tests.support.updates import collected, kinds

pytestmark = pytest.mark.usefixtures("short_pauses")

LARGE = PHOTO + bytes(INLINE_BYTES)
LARGER = PHOTO + bytes(INLINE_BYTES + 1)
KINDS = ("unary", "stream", "control")


def digest(data):
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


async def run_job(client, how, *images, **options):
    if how == "unary":
        await client.stylize(*images, **options)
    elif how == "stream":
        await collected(client.stream(*images, **options))
    else:
        async with client.control(*images, **options) as job:
            await job.result()


@pytest.mark.parametrize("how", KINDS)
async def test_a_large_image_is_uploaded_when_the_server_asks_for_it(client, service, how):
    await run_job(client, how, LARGE, [PAINTING, LARGE], start_image=LARGER)
    first, second = service.specs
    assert first == second and second.content.digest == second.styles[1].image.digest == digest(LARGE)
    assert second.styles[0].image.data == PAINTING and second.start_image.digest == digest(LARGER)
    assert service.images == {digest(LARGE): LARGE, digest(LARGER): LARGER}
    assert service.uploads == 2
    ids = {*service.request_ids, *(message.start.request_id for message in service.messages)}
    assert len(ids) == 1 and "" not in ids
    await run_job(client, how, LARGE, PAINTING)  # the server has it
    assert (service.uploads, len(service.specs)) == (2, 3)


@pytest.mark.parametrize("how", KINDS)
async def test_only_what_is_missing_is_uploaded(client, service, how):
    service.images[digest(LARGE)] = LARGE
    await run_job(client, how, LARGE, LARGER)
    assert service.uploads == 1


@pytest.mark.parametrize("how", KINDS)
async def test_a_large_checkpoint_is_uploaded(client, service, how):
    state = b"GRAMCKP" + bytes(INLINE_BYTES)
    await run_job(client, how, PHOTO, PAINTING, resume=state)
    spec = service.specs[-1]
    assert (spec.resume_digest, spec.HasField("resume")) == (digest(state), False)
    assert spec.content.data == PHOTO and service.images == {digest(state): state}


async def test_nothing_is_uploaded_for_a_job_that_is_refused(client, service):
    style = PAINTING + bytes(INLINE_BYTES)
    service.images[digest(style)] = style  # so that the fake service does not look for it
    for error in (server_errors.InvalidRequest([Violation("spec.recipe.size", "is odd")]), server_errors.Diverged(2)):
        service.scripts = [[refused(error)]]
        with pytest.raises(errors.GramophoneError, match=str(error)):
            await client.stylize(PHOTO, style)
    assert service.uploads == 0


async def test_a_job_continues_on_another_server_from_a_large_checkpoint(client, service):
    state = checkpoint(30)
    state.checkpoint.data = bytes(INLINE_BYTES + 1)
    newer = checkpoint(40)
    newer.checkpoint.data = b"small"
    service.scripts = [
        [refused(server_errors.ImageNotFound(digest(LARGE)))],
        [accepted(), state, LOST],
        [accepted(resumed_at=30), newer, LOST],
        [accepted(resumed_at=40), result()],
    ]
    service.images[digest(LARGE)] = LARGE  # of the first server
    updates = await collected(client.stream(LARGE, PAINTING))
    assert kinds(updates)[-3:] == ["Checkpoint", "Accepted", "Result"]
    _, first, _, second, third = service.specs
    assert first.content.digest == second.content.digest == third.content.digest == digest(LARGE)
    assert second.resume_digest == digest(state.checkpoint.data) and not second.HasField("recipe")
    assert third.resume == b"small" and not third.resume_digest
    assert service.images.keys() == {digest(LARGE), digest(state.checkpoint.data)}
    # Each request of the job from another state is another one; the same after an upload is not.
    assert [service.request_ids.index(one) for one in service.request_ids] == [0, 0, 2, 2, 4]


@pytest.mark.parametrize("how", KINDS)
async def test_the_refusal_of_an_upload_names_the_field_of_the_job(client, service, how):
    service.max_upload_bytes = INLINE_BYTES
    with pytest.raises(errors.InvalidRequestError) as raised:
        await run_job(client, how, PHOTO, LARGER)
    (violation,) = raised.value.violations
    assert violation.field == "spec.styles[0].image.data"
    assert violation.description.endswith("(uploaded, because images and checkpoints of more than 4 MiB are)")
    assert str(raised.value) == f"{violation.field}: {violation.description}"


@pytest.mark.parametrize("how", KINDS)
async def test_a_request_that_takes_too_long_to_send_is_sent_in_pieces(client, service, how):
    slow = refused(server_errors.SlowSender(20))
    service.scripts = [[slow], [accepted(), result()]]
    await run_job(client, how, PHOTO, PAINTING)
    first, *_, last = service.specs
    assert (first.content.data, last.content.digest) == (PHOTO, digest(PHOTO))
    assert service.images == {digest(PHOTO): PHOTO, digest(PAINTING): PAINTING}
    service.scripts = [[slow]]  # there is nothing more to upload
    with pytest.raises(errors.SlowSenderError):
        await run_job(client, how, PHOTO, PAINTING)


@pytest.mark.parametrize("how", KINDS)
async def test_the_time_of_a_job_includes_its_uploads(client, service, how):
    service.go.clear()
    with pytest.raises(errors.DeadlineExceededError, match=r"not done within 0\.4 s"):
        await run_job(client, how, LARGE, PAINTING, timeout=0.4)
    service.go.set()


async def test_the_progress_of_an_upload_can_be_read(client, service):
    seen = []
    service.go.clear()
    stream = client.stream(LARGE, PAINTING)
    assert stream.upload_progress is None
    entering = asyncio.create_task(stream.__aenter__())
    while (progress := stream.upload_progress) is None or progress.sent_bytes < progress.total_bytes:
        await asyncio.sleep(0.001)
        seen.append(progress)
    assert progress == UploadProgress(len(LARGE), len(LARGE))
    service.go.set()
    await entering
    assert stream.upload_progress is None
    await stream.close()
