import contextlib
import io
import os
import struct
import time
import zlib

import pytest
from PIL import Image

from gramophone_server.config import Limits
from gramophone_server.images import codec, containers, metadata_stripping
from gramophone_server.images.containers import MAX_SCANS, PNG_START, UnusableImage
from tests.support import bad_pictures as pictures
from tests.support.bad_pictures import LARGE, chunk, encoded, exif_bomb, in_jpeg, in_png, in_webp, segment

RED = Image.new("RGB", pictures.SIZE, "red")
WIDTH, HEIGHT = pictures.SIZE


def tiff(*entries, order=">"):
    head = {">": b"MM\0*", "<": b"II*\0"}[order] + struct.pack(f"{order}IH", 8, len(entries))
    return head + b"".join(
        struct.pack(f"{order}HHIHH", tag, kind, count, value, 0) for tag, kind, count, value in entries
    )


def decoded(data):
    return codec.decode(data, Limits(), 64)


@pytest.mark.parametrize("format", pictures.FORMATS)
def test_an_ordinary_file_loses_nothing_that_a_decoder_needs(format):
    data = encoded(RED, format, icc_profile=b"profile" * 30)
    picture = metadata_stripping.strip(data)
    assert (picture.orientation, picture.frames) == (1, 1)
    assert b"profileprofile" in picture.data or format == "PNG"  # PNG compresses it
    with Image.open(io.BytesIO(data)) as before, Image.open(io.BytesIO(picture.data)) as after:
        assert after.info["icc_profile"] == before.info["icc_profile"]
        assert after.tobytes() == before.tobytes()


def test_chunks_of_odd_sizes_are_kept_with_their_padding():
    for length in (90, 91, 92, 93):
        data = encoded(RED.convert("RGBA"), "WEBP", icc_profile=b"p" * length, exif=Image.Exif())
        assert decoded(data).shape == (3, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    "data",
    [
        in_png(chunk(b"tEXt", b"Comment\0secret"), chunk(b"eXIf", b"secret"), chunk(b"prVt", b"secret")),
        in_jpeg(segment(0xE1, b"Exif\0\0secret"), segment(0xFE, b"secret"), segment(0xED, b"Photoshop 3.0\0secret")),
        in_webp((b"EXIF", b"secret"), (b"XMP ", b"secret"), (b"ABCD", b"secret")),
        encoded(RED, "JPEG") + b"secret",
        encoded(RED, "PNG") + b"secret",
        encoded(RED, "WEBP") + b"secret",
    ],
    ids=["PNG", "JPEG", "WEBP", "after a JPEG", "after a PNG", "after a WebP"],
)
def test_everything_but_the_picture_is_removed(data):
    assert b"secret" in data and b"secret" not in metadata_stripping.strip(data).data
    assert decoded(data).shape == (3, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    "bomb",
    [
        in_png(exif := chunk(b"eXIf", exif_bomb())),
        in_webp((b"EXIF", exif_bomb())),
        in_png(*[chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**20), 9))] * 9000),
        in_png(*[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**20), 9))] * 9000),
        in_jpeg(*[segment(0xE1, b"Exif\0\0" + tiff(*[(0x8000 + i, 7, 1, 0) for i in range(5000)]))] * 160),
        in_jpeg(b"\xff" * LARGE),
    ],
    ids=["PNG exif", "WebP exif", "PNG profiles", "PNG texts", "JPEG exif", "JPEG padding"],
)
def test_a_metadata_bomb_is_reduced_to_its_picture(bomb):
    """With Pillow alone: 4 GB twice, 21 s, refused, 3 s, 3 s."""
    assert len(bomb) < Limits().max_image_bytes
    began = time.thread_time()
    assert decoded(bomb).shape == (3, HEIGHT, WIDTH)
    assert time.thread_time() - began < 1


@pytest.mark.parametrize(
    ("bomb", "words"),
    [
        (in_png(chunk(b"tEXt") * (LARGE // 12)), "has more than 16384 chunks"),
        (in_png(chunk(b"IDAT") * (LARGE // 12)), "has more than 16384 chunks"),
        (in_jpeg(segment(0xFE) * (LARGE // 4)), "has more than 1024 segments before its pixels"),
        (in_webp(*[(b"ABCD", b"")] * 20_000), "has more than 16384 chunks"),
    ],
    ids=["PNG texts", "PNG pixels", "JPEG", "WebP"],
)
def test_too_many_parts_are_refused(bomb, words):
    with pytest.raises(UnusableImage) as caught:
        decoded(bomb)
    assert str(caught.value) == f"{words}; save it with an ordinary encoder"


def test_too_many_scans_are_refused():
    """Each of 14 bytes took 11 ms at 32 megapixels; 300 in a file of 0.4 MB took 3.5 s."""
    data = encoded(RED, "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    scans = data.count(b"\xff\xda")
    assert decoded(data[:-2] + last * (MAX_SCANS - scans) + data[-2:]).shape == (3, HEIGHT, WIDTH)
    with pytest.raises(UnusableImage, match="has more than 32 scans; save it with an ordinary encoder"):
        decoded(data[:-2] + last * (MAX_SCANS - scans + 1) + data[-2:])


def test_the_orientation_behind_the_pixels_does_not_count():
    """So a survey needs no scan, and a decoder ignores it, too."""
    data = encoded(RED, "JPEG")
    exif = segment(0xE1, b"Exif\0\0" + tiff((0x0112, 3, 1, 6)))
    late = data[:-2] + exif + data[-2:]
    assert metadata_stripping.strip(late).orientation == metadata_stripping.survey(late).orientation == 1
    assert decoded(late).shape == (3, HEIGHT, WIDTH)


def test_a_survey_does_not_look_at_scans(monkeypatch):
    monkeypatch.setattr(containers, "SCAN_END", None)
    assert metadata_stripping.survey(encoded(RED, "JPEG")) == (1, 1)


def test_a_survey_counts_pictures_and_finds_damage():
    for format in ("PNG", "WEBP"):
        data = encoded(RED, format, save_all=True, append_images=[Image.new("RGB", pictures.SIZE)])
        assert metadata_stripping.survey(data).frames == 2
        assert metadata_stripping.survey(encoded(RED, format)) == (1, 1)
    with pytest.raises(UnusableImage, match="is truncated or damaged"):
        metadata_stripping.survey(encoded(RED, "PNG")[:40])
    with pytest.raises(UnusableImage, match="must be a JPEG, PNG or WebP image"):
        metadata_stripping.survey(b"GIF89a")


def test_scans_of_a_preview_do_not_count():
    preview = segment(0xE1, b"Exif\0\0" + b"\xff\xda" * 40)
    assert decoded(in_jpeg(preview)).shape == (3, HEIGHT, WIDTH)


@pytest.mark.parametrize("order", "<>")
def test_orientation_is_read_from_its_directory(order):
    exif = tiff((0x010F, 2, 4, 0), (0x0112, 3, 1, 6), order=order)
    for data in (in_jpeg(segment(0xE1, b"Exif\0\0" + exif)), in_png(chunk(b"eXIf", exif)), in_webp((b"EXIF", exif))):
        assert metadata_stripping.strip(data).orientation == metadata_stripping.survey(data).orientation == 6
        assert decoded(data).shape == (3, WIDTH, HEIGHT)


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"MM\0*",
        b"II*\0\xff\xff\xff\x7f",
        tiff((0x0112, 3, 1, 9)),
        tiff((0x0112, 4, 1, 6)),
        tiff((0x0112, 3, 2, 6)),
    ],
)
def test_a_damaged_directory_has_no_orientation(exif):
    assert metadata_stripping.strip(in_png(chunk(b"eXIf", exif))).orientation == 1


@pytest.mark.parametrize("format", pictures.FORMATS)
def test_every_truncation_is_a_picture_or_refused(format):
    data = encoded(RED, format, exif=Image.Exif())
    for kept in range(len(data)):
        try:
            metadata_stripping.strip(data[:kept])
        except UnusableImage as error:
            assert str(error).startswith(("is truncated or damaged", "must be a JPEG, PNG or WebP"))


def test_noise_is_refused():
    for start in (b"", PNG_START, b"\xff\xd8\xff", b"RIFF....WEBP"):
        for _ in range(200):
            with contextlib.suppress(UnusableImage):
                metadata_stripping.strip(start + os.urandom(100))
