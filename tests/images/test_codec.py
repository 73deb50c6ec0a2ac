import io
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from PIL import Image

from gramophone_server.config import Limits
from gramophone_server.images import codec
from gramophone_server.images.codec import Format
from gramophone_server.images.shortages import Shortage


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


# In a program of its own, because the tests import everything.
WITHOUT_IMPORTS = """
    import sys
    import torch
    from gramophone_server.config import Limits
    from gramophone_server.images import codec
    from gramophone_server.images.codec import Format
    from tests.support.bad_pictures import png, valid_pictures

    files = valid_pictures()
    loaded = set(sys.modules)

    class NoImports:
        def find_spec(self, name, path=None, target=None):
            raise AssertionError(f"{name} is imported during a request")

    sys.meta_path.insert(0, NoImports())
    decoded = 0
    for data in files:
        try:
            codec.decode(data, Limits(), 16)
            decoded += 1
        except ValueError as error:
            assert "animation" in str(error) or "GIF" in str(error), error
    for format in Format:
        codec.encode(torch.zeros(32, 48, 3, dtype=torch.uint8), format, 90, max_side=40, metadata="{}")
    assert decoded > 10 and set(sys.modules) == loaded, set(sys.modules) - loaded
"""


def test_no_request_imports_a_module():
    """An import during a request takes file descriptors and time, and fails if there are none."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    program = [sys.executable, "-c", textwrap.dedent(WITHOUT_IMPORTS)]
    ran = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("format", list(Format))
def test_an_encoder_without_memory_is_a_shortage(format, monkeypatch):
    def save(*_, **__):
        raise OSError("encoder error -2 when writing image file")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError, match="encoder error"):
        codec.encode(torch.zeros(32, 48, 3, dtype=torch.uint8), format, 90)
    monkeypatch.setattr(codec, "ENCODING_BYTES_PER_PIXEL", 2**50)  # more than there is
    with pytest.raises(Shortage, match="memory"):
        codec.encode(torch.zeros(32, 48, 3, dtype=torch.uint8), format, 90)
