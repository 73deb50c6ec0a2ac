import asyncio

import pytest

from gramophone_client import Style, errors
from gramophone_client.streams.job_uploads import MAX_ROUNDS
from gramophone_server import errors as server_errors
from tests.support.fake_service import PAINTING, PHOTO, refused
from tests.support.updates import collected


async def test_jobs_name_an_uploaded_image_by_digest(client, service, tmp_path):
    (tmp_path / "painting.png").write_bytes(PAINTING)
    style = await client.upload(tmp_path / "painting.png")
    assert (style.width, style.height, service.images) == (24, 18, {style.digest: PAINTING})
    photo = await client.upload(PHOTO + bytes(600_000))  # several pieces
    assert service.images[photo.digest] == PHOTO + bytes(600_000)
    await client.stylize(photo, style)
    await collected(client.stream(PHOTO, [Style(style, 2), PAINTING]))
    first, second = service.specs
    assert (first.content.digest, first.styles[0].image.digest) == (photo.digest, style.digest)
    assert (second.styles[0].image.digest, second.styles[0].weight) == (style.digest, 2)
    assert second.styles[1].image.data == PAINTING
    assert service.uploads == 2


@pytest.mark.parametrize("how", ["unary", "stream", "control"])
async def test_an_image_that_the_server_has_lost_is_uploaded_again(client, service, how):
    async def ask():
        if how == "unary":
            await client.stylize(PHOTO, style)
        elif how == "stream":
            await collected(client.stream(PHOTO, style))
        else:
            async with client.control(PHOTO, style) as job:
                await job.result()

    style = await client.upload(PAINTING)
    service.images.clear()
    await ask()
    assert (service.uploads, len(service.specs), service.images) == (2, 2, {style.digest: PAINTING})
    if how != "control":
        assert len(set(service.request_ids)) == 1

    # Not for ever: the server may have no room for it.
    service.scripts = [[refused(server_errors.ImageNotFound(style.digest))]]
    with pytest.raises(errors.ImageNotFoundError, match=r"uploaded before each of 3 attempts: .*_MAX_UPLOADS_BYTES"):
        await ask()
    # More in each round, so that a proxy that sends each call to another server brings some to the one of the job.
    assert service.uploads == 2 + sum(range(MAX_ROUNDS + 1))


async def test_jobs_that_run_at_the_same_time_upload_a_file_once(client, service):
    style = await client.upload(PAINTING)
    service.images.clear()
    await asyncio.gather(*(client.stylize(PHOTO, style) for _ in range(4)))
    assert service.uploads == 2


async def test_a_job_takes_over_the_upload_of_one_that_is_cancelled(client, service):
    style = await client.upload(PAINTING)
    service.images.clear()
    service.go.clear()
    first = asyncio.create_task(client.stylize(PHOTO, style))
    await asyncio.to_thread(service.uploading.wait, 5)
    second = asyncio.create_task(client.stylize(PHOTO, style))
    while len(service.specs) < 2:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    service.go.set()
    await second
    assert service.images == {style.digest: PAINTING}


async def test_waiting_for_the_upload_of_another_job_ends_with_the_jobs_own_time(client, service):
    style = await client.upload(PAINTING)
    service.images.clear()
    service.go.clear()
    first = asyncio.create_task(client.stylize(PHOTO, style))
    await asyncio.to_thread(service.uploading.wait, 5)
    with pytest.raises(errors.DeadlineExceededError, match=r"not done within 0\.3 s"):
        await client.stylize(PHOTO, style, timeout=0.3)
    service.go.set()
    await first
