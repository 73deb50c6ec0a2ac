"""Sizes from the first bytes, compared with Pillow's."""

import io
import random

import pytest
from PIL import Image

from gramophone_server.images import dimensions
from gramophone_server.images.containers import UnusableImage


def encoded(format, mode="RGB", size=(37, 21), **options):
    out = io.BytesIO()
    Image.new(mode, size).save(out, format, **options)
    return out.getvalue()


def size_or_none(data):
    try:
        return dimensions.size(data)
    except UnusableImage as error:
        assert str(error).startswith(("is truncated or damaged; ", "has more than 1024 segments before its pixels; "))
        return None


@pytest.mark.parametrize(
    "data",
    [
        encoded("PNG"),
        encoded("PNG", "P"),
        encoded("JPEG"),
        encoded("JPEG", progressive=True),
        encoded("JPEG", exif=b"Exif\0\0" + bytes(60_000)),
        encoded("JPEG", icc_profile=bytes(500_000)),
        encoded("WEBP"),
        encoded("WEBP", lossless=True),
        encoded("WEBP", "RGBA", quality=50),
        encoded("WEBP", exif=b"Exif\0\0"),
        encoded("WEBP", icc_profile=bytes(500_000)),
    ],
)
def test_the_size_is_pillows(data):
    assert dimensions.size(data) == (37, 21)
    assert size_or_none(data[: len(data) // 8]) in (None, (37, 21))  # None if its size is cut off


@pytest.mark.parametrize("size", [(1, 1), (16383, 2), (3, 16383)])
@pytest.mark.parametrize("options", [{"format": "WEBP"}, {"format": "WEBP", "lossless": True}, {"format": "JPEG"}])
def test_the_longest_possible_sides(size, options):
    assert dimensions.size(encoded(size=size, **options)) == size
    assert dimensions.size(encoded("WEBP", "RGBA", size=size)) == size


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GIF89a" + bytes(100),
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8" + b"\xff\xe1\x00\x00" * 100_000,  # very many segments
        b"\xff\xd8" + b"\xff\xe1\xff\xff" + bytes(70_000),
        b"RIFF\0\0\0\0WEBPJUNK" + bytes(100),
        b"\xff\xd8\xff\xda\0\2" + encoded("JPEG")[2:],  # its size is behind its pixels
    ],
)
def test_a_header_without_a_size_is_none(data):
    assert size_or_none(data) is None


def test_any_bytes_have_a_size_or_none():
    chance = random.Random(0)
    starts = [
        encoded("PNG")[:8],
        encoded("JPEG")[:2],
        *(b"RIFF\0\0\0\0WEBP" + kind for kind in (b"VP8X", b"VP8 ", b"VP8L")),
    ]
    for start in starts:
        for length in range(60):
            size = size_or_none(start + chance.randbytes(length))
            assert size is None or min(size) >= 0
