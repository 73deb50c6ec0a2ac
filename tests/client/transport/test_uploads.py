import pytest

from gramophone_client import Style, errors
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

    # Once only: a server that has no room for it would be asked for ever.
    service.scripts = [[refused(server_errors.ImageNotFound(style.digest))]]
    with pytest.raises(errors.ImageNotFoundError, match="upload it with UploadImage"):
        await ask()
    assert service.uploads == 3
