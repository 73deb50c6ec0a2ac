import io
import os

import numpy as np
import pytest
from PIL import Image

from gramophone_client import Frame, Losses, Result, StopReason
from gramophone_client.types import picture
from gramophone_client.types.picture import Picture, write_atomically
from tests.support.fake_service import PAINTING, PHOTO, accepted, encoded, result


async def test_saving_as_another_format_keeps_the_metadata(client, service, tmp_path):
    service.scripts = [[accepted(), result(encoded(note='{"seed": 7}'))]]
    stylized = await client.stylize(PHOTO, PAINTING)
    for name, format in (("out.jpg", "JPEG"), ("out.webp", "WEBP")):
        stylized.save(tmp_path / name)
        with Image.open(tmp_path / name) as image:
            assert image.format == format
            assert image.getexif()[0x010E] == '{"seed": 7}'
    with pytest.raises(ValueError, match=r"out\.gif: the name must end in .*got '\.gif'"):
        stylized.save(tmp_path / "out.gif")


def test_files_are_written_atomically(folder, monkeypatch):
    path = folder / "out.png"
    write_atomically(path, b"old")
    assert path.stat().st_mode == (folder / "photo.png").stat().st_mode

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(picture.Path, "replace", full)
    with pytest.raises(OSError, match="No space") as raised:
        write_atomically(path, b"new")
    assert raised.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert sorted(os.listdir(folder)) == ["out.png", "painting.png", "photo.png"]


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_a_notebook_shows_pictures_frames_and_results(format):
    shown = Picture(format=format, width=24, height=18, data=encoded("green", format))
    losses = Losses(1, 1, 0, 0, {}, {})
    values = [
        shown,
        Frame(iteration=1, picture=shown, dropped=0),
        Result(picture=shown, losses=losses, iterations=1, stop_reason=StopReason.FINISHED, elapsed_s=1),
    ]
    for value in values:
        png, jpeg = value._repr_png_(), value._repr_jpeg_()
        assert (png is None, jpeg is None) == ((True, False) if format == "jpeg" else (False, True))
        with Image.open(io.BytesIO(png or jpeg)) as image:
            assert image.format == ("JPEG" if format == "jpeg" else "PNG")
            assert np.allclose(np.asarray(image.convert("RGB")), np.asarray(shown.image().convert("RGB")))
        if format != "webp":
            assert (png or jpeg) is shown.data  # not encoded again
