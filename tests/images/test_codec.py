import io
import json

import pytest
import torch
from PIL import Image

from gramophone_server.config import Limits
from gramophone_server.images import codec
from gramophone_server.images.codec import Format


@pytest.mark.parametrize("format", list(Format))
def test_encode_keeps_the_picture_and_its_metadata(format):
    picture = torch.full((40, 60, 3), 120, dtype=torch.uint8)
    picture[:, :30, 0] = 250
    made = json.dumps({"seed": 2**64 - 1, "recipe": {"beta": 3.0}})
    got = codec.encode(picture, format, 95, metadata=made)
    assert (got.format, got.width, got.height) == (format, 60, 40)
    with Image.open(io.BytesIO(got.data)) as image:
        assert image.format == format and image.size == (60, 40)
        text = image.info["gramophone"] if format is Format.PNG else image.getexif()[0x010E]
        assert json.loads(text)["seed"] == 2**64 - 1
        if format is not Format.PNG:
            assert image.getexif()[0x0131] == "gramophone"
    back = codec.decode(got.data, Limits(), 64)
    assert (back.permute(1, 2, 0).float() - picture.float()).abs().mean() <= (0 if format is Format.PNG else 2)


def test_encode_reduces_to_the_longest_side():
    got = codec.encode(torch.zeros(100, 200, 3, dtype=torch.uint8), Format.JPEG, 85, max_side=50)
    assert (got.width, got.height) == (50, 25)
    got = codec.encode(torch.zeros(100, 200, 3, dtype=torch.uint8), Format.JPEG, 85, max_side=500)
    assert (got.width, got.height) == (200, 100)


def test_lower_quality_is_smaller():
    picture = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8)
    for format in (Format.JPEG, Format.WEBP):
        assert len(codec.encode(picture, format, 30).data) < len(codec.encode(picture, format, 90).data)
