import contextlib
import io
import itertools
import os
import random
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib

import pytest
import torch
from PIL import Image, ImageCms, ImageDraw

from gramophone_server.config import Limits
from gramophone_server.domain.picture_size import style_size
from gramophone_server.images import codec, decoding
from gramophone_server.images.containers import UnusableImage
from gramophone_server.images.metadata_stripping import MAX_PROFILE_BYTES
from tests.support.bad_pictures import many_codes, program_profile

LIMITS = Limits()
RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image, format="PNG", **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def decoded(data, needed=64, limits=LIMITS):
    return codec.decode(data, limits, needed)


def pixel(picture, x=0, y=0):
    return tuple(picture[:, y, x].tolist())


def refused(data, limits=LIMITS):
    with pytest.raises(UnusableImage) as caught:
        decoded(data, limits=limits)
    description = str(caught.value)
    assert "PIL" not in description and "object at" not in description
    return description


def png(depth, colour_type, pixel_bytes, *chunks, side=16):
    """A PNG of `side` squared equal pixels, written by hand: Pillow cannot write most of these kinds."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    row = b"\0" + (pixel_bytes * side if depth >= 8 else pixel_bytes * (side * depth // 8))
    header = struct.pack(">IIBBBBB", side, side, depth, colour_type, 0, 0, 0)
    body = [chunk(b"IHDR", header), *(chunk(*c) for c in chunks), chunk(b"IDAT", zlib.compress(row * side))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_a_lossless_picture_keeps_its_pixels(format):
    pixels = torch.randint(0, 256, (3, 20, 33), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.frombytes("RGB", (33, 20), bytes(pixels.permute(1, 2, 0).flatten().tolist()))
    picture = decoded(encoded(image, format, lossless=True))
    assert picture.dtype == torch.uint8 and picture.is_contiguous()
    assert torch.equal(picture, pixels)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(16, 0, b"\x80\x40"), (0x80,) * 3),  # scaled, not clipped
        (png(16, 0, b"\x80\x40", (b"tRNS", b"\x80\x40")), WHITE),
        (png(16, 2, b"\x80\x00\xff\xff\x10\x00"), (0x80, 0xFF, 0x10)),
        (png(16, 2, b"\x80\x00\xff\xff\x10\x00", (b"tRNS", b"\x80\x00\xff\xff\x10\x00")), WHITE),
        (png(16, 6, b"\xff\xff\x00\x00\x00\x00\x80\x00"), (255, 127, 127)),
        (png(16, 4, b"\x00\x00\x80\x00"), (127,) * 3),
        (png(8, 0, b"\x37"), (0x37,) * 3),
        (png(8, 2, b"\x80\xff\x10", (b"tRNS", b"\x00\x80\x00\xff\x00\x10")), WHITE),
        (png(8, 3, b"\x01", (b"PLTE", b"\x10\x20\x30\x40\x50\x60")), (0x40, 0x50, 0x60)),
        (png(8, 3, b"\x00", (b"PLTE", b"\x10\x20\x30\x40\x50\x60"), (b"tRNS", b"\x00")), WHITE),
        (png(1, 0, b"\xff"), WHITE),
        (png(2, 0, b"\x55"), (85,) * 3),
    ],
    ids=["L16", "L16+key", "RGB16", "RGB16+key", "RGBA16", "LA16", "L", "RGB+key", "P", "P+alpha", "1", "L2"],
)
def test_every_kind_of_png_becomes_8_bit_rgb(data, expected):
    got = pixel(decoded(data))
    assert all(abs(a - b) <= 1 for a, b in zip(got, expected, strict=True)), got


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_becomes_white(mode):
    clear, half = Image.new(mode, (16, 16), 0), Image.new("RGBA", (16, 16), (0, 0, 0, 128)).convert(mode)
    assert pixel(decoded(encoded(clear))) == WHITE
    assert pixel(decoded(encoded(half))) == (127,) * 3


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_every_kind_of_jpeg_becomes_rgb(mode):
    picture = decoded(encoded(Image.new("RGB", (32, 32), (200, 200, 200)).convert(mode), "JPEG", quality=95))
    assert picture.shape == (3, 32, 32)
    assert all(abs(value - 200) <= 3 for value in pixel(picture))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(orientation, format):
    upright = Image.new("RGB", (64, 32), "white")
    ImageDraw.Draw(upright).rectangle((0, 0, 15, 15), fill="red")  # top left
    inverse = {6: 8, 8: 6}.get(orientation, orientation)  # the others are their own inverse
    stored = upright if orientation == 1 else upright.transpose(decoding.TRANSPOSITIONS[inverse])
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = decoded(encoded(stored, format, exif=exif))
    assert picture.shape == (3, 32, 64)
    assert picture[0, 4, 4] > 200 and picture[1, 4, 4] < 60 and min(pixel(picture, 60, 28)) > 200


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_is_ignored():
    assert decoded(encoded(Image.new("RGB", (32, 16), RED), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")).shape == (
        3,
        16,
        32,
    )


def swapped_profile():
    """sRGB's profile with the red and green primaries exchanged, by the tags rXYZ and gXYZ."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")


def large_profile(size):
    """The same with noise behind its tags."""
    profile = swapped_profile()
    return struct.pack(">I", size) + profile[4:] + random.Random(1).randbytes(size - len(profile))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_an_embedded_profile_is_converted_to_srgb(mode):
    image = Image.new("RGB", (16, 16), RED).convert(mode)
    got = pixel(decoded(encoded(image, icc_profile=swapped_profile())))
    assert got[0] < 10 and got[1] > 245 and got[2] < 10


@pytest.mark.parametrize("profile", [b"junk" * 50, swapped_profile()], ids=["junk", "of another colour space"])
def test_an_unusable_profile_is_ignored(profile):
    assert pixel(decoded(encoded(Image.new("L", (16, 16), 77), icc_profile=profile))) == (77,) * 3


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [100_000, 1_400_000, MAX_PROFILE_BYTES - 1])
def test_a_large_profile_is_converted_too(format, size):
    """A printer's profile has 500 KB, one with fine tables 2 MB."""
    data = encoded(Image.new("RGB", (16, 16), RED), format, icc_profile=large_profile(size))
    got = pixel(decoded(data))
    assert got[0] < 10 and got[1] > 245 and got[2] < 10
    assert decoding.upright_size(data, decoding.read_header(data, LIMITS)) == (16, 16)


MEASURING = """
import io, pathlib, sys
from PIL import Image
from gramophone_server.config import Limits
from gramophone_server.images import decoding

def bytes_of(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

def decode(data):
    return decoding.decode(data, Limits(), 1024)

data = sys.stdin.buffer.read()
small = io.BytesIO()
Image.new("RGB", (16, 16)).save(small, sys.argv[1])
decode(small.getvalue())  # loads what all images need
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = bytes_of("VmRSS")
decode(data)
print(bytes_of("VmHWM") - before, decoding.read_header(data, Limits()).decoding_bytes)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of memory cannot be measured")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("side", [32, 1000])
def test_a_large_profile_takes_no_more_memory_than_is_counted(format, side):
    data = encoded(Image.new("RGB", (side, side), RED), format, icc_profile=large_profile(MAX_PROFILE_BYTES - 1))
    command = [sys.executable, "-c", MEASURING, format]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(command, input=data, capture_output=True, check=True, env=environment)
    peak, bound = map(int, run.stdout.split())
    assert 2 * MAX_PROFILE_BYTES < peak <= bound


def test_a_profile_that_inflates_beyond_the_limit_is_refused_by_name():
    bomb = png(8, 2, bytes(3), (b"iCCP", b"a\0\0" + zlib.compress(bytes(2**28), 9)))
    tracemalloc.start()
    try:
        assert refused(bomb) == (
            "has a colour profile of 4194304 bytes or more; convert the image to sRGB, or remove the profile"
        )
        assert tracemalloc.get_traced_memory()[1] < 3 * MAX_PROFILE_BYTES
    finally:
        tracemalloc.stop()


def test_a_program_in_a_profile_is_not_run():
    """A program of 80 KB took 15 s for 256 pixels."""
    data = encoded(Image.new("RGB", (16, 16), RED), icc_profile=program_profile(10_000))
    began = time.thread_time()
    assert pixel(decoded(data)) == RED
    assert time.thread_time() - began < 1


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_picture_much_larger_than_needed_is_reduced_but_not_below(format):
    image = Image.new("RGB", (1000, 500), RED)
    for needed, longest in ((1000, {1000}), (501, {1000}), (500, {500}), (100, {100, 125})):
        picture = decoded(encoded(image, format), needed=needed)
        assert max(picture.shape) in longest
        assert picture[0].float().mean() > 250


THIN = [("PNG", 20, 1600), ("PNG", 1600, 20), ("JPEG", 80, 4000), ("JPEG", 1048, 24), ("WEBP", 16, 3000)]


@pytest.mark.parametrize(("format", "width", "height"), THIN)
def test_a_thin_picture_is_reduced_to_the_size_at_which_a_style_is_used(format, width, height):
    """By a whole factor, it would be 64 x 1 pixels, and without one it would take as much memory as a large image."""
    image = Image.new("RGB", (width, height), RED)
    picture = decoded(encoded(image, format), needed=64)
    assert picture.shape == ((3, 16, 64) if width > height else (3, 64, 16))
    assert picture[0].float().mean() > 250
    for longest in (64, 23, 16):
        reduced = style_size(picture.shape[2], picture.shape[1], longest, 1.0)
        assert reduced == style_size(width, height, longest, 1.0)


SIZES = [(64, 64), (1000, 500), (333, 1001), (16, 5000), (2049, 31), (130, 127)]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("needed", [16, 64, 100, 127, 1000])
def test_the_decoded_bytes_are_known_from_the_header(format, size, needed):
    data = encoded(Image.new("RGB", size, RED), format)
    header = decoding.read_header(data, LIMITS)
    assert (header.format, header.width, header.height, header.pixels) == (format, *size, size[0] * size[1])
    assert header.decoded_bytes(needed) == decoded(data, needed=needed).numel() <= 12 * needed**2


def test_a_lossless_webp_counts_for_the_tables_that_it_may_bring():
    """With a code for every block, a megapixel takes as long as a PNG of 32."""
    dear, largest = decoding.read_header(many_codes(), LIMITS), 32 * 10**6
    assert dear.pixels == 2**20 and largest < dear.work < 2 * largest
    photo = dear._replace(file_bytes=LIMITS.max_image_bytes)  # a file has fewer codes than it has bytes
    assert photo.work < photo.pixels + photo.file_bytes + 1.1 * largest


@pytest.mark.parametrize(
    ("mode", "lossless", "expected"), [("RGB", False, 1), ("RGB", True, 129), ("RGBA", False, 129)]
)
def test_a_webp_that_may_be_lossless_counts_its_bytes_as_codes(mode, lossless, expected):
    """Also one with transparency, which is lossless in a lossy file, too."""
    picture = Image.new(mode, (64, 64), (255, 0, 0, 99)[: len(mode)])
    header = decoding.read_header(encoded(picture, "WEBP", lossless=lossless), LIMITS)
    assert header.work == header.pixels + expected * header.file_bytes


def test_the_size_is_found_behind_any_metadata():
    photo = encoded(Image.new("RGB", (48, 32), RED), "JPEG")
    segment = b"\xff\xe1\xff\xff" + bytes(65_533)
    for segments in (1, 2, 100):
        late = photo[:2] + segment * segments + photo[2:]
        assert decoding.read_header(late, LIMITS)[1:4] == (48, 32, len(late))
        assert decoded(late).shape == (3, 32, 48)


def test_of_two_sizes_the_one_that_was_checked_holds():
    """The first of a JPEG's sizes is the one that `read_header` compares to the limits."""
    photo = encoded(Image.new("RGB", (48, 32), RED), "JPEG")
    at = photo.index(b"\xff\xc0")
    frame = photo[at : at + 2 + struct.unpack_from(">H", photo, at + 2)[0]]
    small = frame[:5] + struct.pack(">HH", 16, 16) + frame[9:]
    assert "truncated or damaged" in refused(photo[:at] + small + photo[at:])
    hidden = png(8, 2, bytes(3))
    assert "truncated or damaged" in refused(hidden[:8] + struct.pack(">I4sII5x4x", 13, b"xxxx", 16, 17) + hidden[8:])


def test_the_size_of_an_upload_is_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    for options, size in (({"exif": exif}, (32, 64)), ({}, (64, 32))):
        for format in ("JPEG", "PNG", "WEBP"):
            data = encoded(Image.new("RGB", (64, 32)), format, **options)
            assert decoding.upright_size(data, decoding.read_header(data, LIMITS)) == size


def test_other_formats_are_refused_by_name():
    picture = Image.new("RGB", (16, 16))
    assert refused(encoded(picture, "GIF")).startswith(
        "must be a JPEG, PNG or WebP image, got what looks like a GIF file"
    )
    assert "a TIFF file" in refused(encoded(picture, "TIFF"))
    assert "a BMP file" in refused(encoded(picture, "BMP"))
    assert "HEIC, AVIF" in refused(b"\0\0\0\x18ftypheic" + b"\0" * 100)
    assert refused(b"hello").endswith("got 5 bytes of something else; convert it first")
    assert "got 0 bytes of something else" in refused(b"")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_truncated_picture_is_refused(format, kept):
    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    data = encoded(noise, format)
    assert "truncated or damaged" in refused(data[: int(len(data) * kept)])


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about metadata
def test_every_flipped_byte_is_decoded_or_refused():
    """Any damage results in a violation or in a picture, never in another exception."""
    for format in ("JPEG", "PNG", "WEBP"):
        data = encoded(Image.effect_noise((16, 16), 80), format)
        for at in range(0, len(data), 3):
            damaged = bytearray(data)
            damaged[at] ^= 0x5A
            with contextlib.suppress(UnusableImage):
                decoded(bytes(damaged))


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_animations_are_refused(format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    assert refused(data) == "is an animation of 3 pictures; send a single picture"


def test_of_a_phone_photo_with_several_pictures_the_first_is_decoded():
    frames = [Image.new("RGB", (32, 16), colour) for colour in ("red", "green")]
    assert pixel(decoded(encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])))[0] > 250


def test_size_is_checked_before_pixels_are_decoded(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
    bomb = png(1, 0, b"\0", side=20_000)  # 49 KB that would be 1.2 GB as RGB
    assert refused(bomb) == (
        "is 20000x20000, 400000000 pixels; at most 32000000 are allowed (server setting GRAMOPHONE_MAX_IMAGE_PIXELS); "
        "send a smaller image"
    )
    assert refused(png(8, 0, b"\0", side=15)) == "is 15x15; each side must have at least 16 pixels; enlarge or pad it"


def test_a_webp_with_a_huge_canvas_is_refused_before_it_is_allocated(monkeypatch):
    data = bytearray(
        encoded(Image.new("RGB", (32, 32)), "WEBP", save_all=True, append_images=[Image.new("RGB", (32, 32), "red")])
    )
    at = data.index(b"VP8X") + 12
    data[at : at + 6] = b"\xff\x3f\0" * 2
    monkeypatch.setattr(decoding.Image, "open", None)
    assert refused(bytes(data)).startswith("is 16384x16384, 268435456 pixels; at most 32000000 are allowed")


def test_a_png_with_chunks_in_any_order_is_decoded_or_refused():
    """Pillow opens a picture without its palette, and fails later."""
    data = encoded(Image.new("RGB", (24, 24)).quantize(16), "PNG", transparency=3)
    bounds = [0, 8]
    while bounds[-1] < len(data):
        bounds.append(bounds[-1] + 12 + struct.unpack_from(">I", data, bounds[-1])[0])
    chunks = [data[start:end] for start, end in itertools.pairwise(bounds)]
    outcomes = set()
    for order in itertools.permutations(chunks[2:]):
        with contextlib.suppress(UnusableImage):
            outcomes.add(decoded(b"".join((*chunks[:2], *order))).shape)
    assert outcomes == {(3, 24, 24)}


def test_the_number_of_bytes_is_checked_first():
    assert refused(b"x" * 2000, Limits(max_image_bytes=1024)) == (
        "has 2000 bytes; at most 1024 are allowed (server setting GRAMOPHONE_MAX_IMAGE_BYTES); "
        "send a smaller or more compressed image"
    )
