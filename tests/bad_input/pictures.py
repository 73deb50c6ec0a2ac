"""Encoded pictures, good and bad. Everything is a function of the generator that is passed in."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache

from PIL import ExifTags, Image, ImageCms

__all__ = ["bombs", "damaged", "good", "jpeg_of_scans"]

SIDE = 24  # pixels: above the smallest that is taken
LIMIT = 4_000_000  # pixels that the server under test takes; bombs are near it
MAGIC = (
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"RIFF\x00\x00\x00\x00WEBP",
    b"GIF89a",
    b"BM",
    b"II*\0",
    b"%PDF-1.7",
    b"MZ",
)
TRAILERS = (b"PK\x03\x04zip", b"<html><script>", b"%PDF-1.7", b"\x7fELF")
EXTREMES = (b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", b"\0\0\0\1", b"\xff\xff\0\0", b"\0\1\0\0")


@cache
def good() -> dict[str, bytes]:
    """One small picture of each kind that cameras and programs write, by name; a few of them are none that we take."""
    noise = random.Random(0)
    rgb = Image.frombytes("RGB", (SIDE, SIDE), noise.randbytes(3 * SIDE * SIDE))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.ImageDescription] = "a picture " * 20
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    alpha = rgb.copy()
    alpha.putalpha(rgb.getchannel("R"))
    frames = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
    made = {
        "jpeg": (rgb, "JPEG", {}),
        "jpeg, progressive": (rgb, "JPEG", {"progressive": True}),
        "jpeg, grey": (rgb.convert("L"), "JPEG", {}),
        "jpeg, cmyk": (rgb.convert("CMYK"), "JPEG", {}),
        "jpeg, exif and profile": (rgb, "JPEG", {"exif": exif, "icc_profile": profile}),
        "mpo": (rgb, "MPO", frames),
        "png": (rgb, "PNG", {}),
        "png, alpha": (alpha, "PNG", {"exif": exif}),
        "png, palette": (rgb.quantize(16), "PNG", {"transparency": 3}),
        "png, 16 bits": (rgb.convert("I;16"), "PNG", {}),
        "png, 1 bit": (rgb.convert("1"), "PNG", {}),
        "png, profile": (rgb, "PNG", {"icc_profile": profile}),
        "apng": (rgb, "PNG", frames),
        "webp": (rgb, "WEBP", {}),
        "webp, lossless": (alpha, "WEBP", {"lossless": True, "exif": exif}),
        "webp, animated": (rgb, "WEBP", frames),
        "gif": (rgb, "GIF", {}),
        "bmp": (rgb, "BMP", {}),
        "tiff": (rgb, "TIFF", {}),
    }
    return {name: _saved(*how) for name, how in made.items()}


def _saved(image: Image.Image, kind: str, options: dict[str, object]) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


# Damage ---------------------------------------------------------------------------------------------------------------


def damaged(chance: random.Random) -> tuple[str, bytes]:
    """A picture and what was done to it, once or a few times."""
    name, data = chance.choice(list(good().items()))
    done = []
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        damage = chance.choice(DAMAGES)
        data = damage(chance, data)
        done.append(damage.__name__.strip("_"))
    return f"{name}: {', '.join(done)}", data


def _flipped(chance: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 3, 30)) if changed else 0):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _flipped_in_the_header(chance: random.Random, data: bytes) -> bytes:
    head = min(len(data), 64)
    return _flipped(chance, data[:head]) + data[head:]


def _cut(chance: random.Random, data: bytes) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def _less_a_piece(chance: random.Random, data: bytes) -> bytes:
    start = chance.randrange(len(data) + 1)
    return data[:start] + data[start + chance.randrange(40) :]


def _with_a_piece_again(chance: random.Random, data: bytes) -> bytes:
    start = chance.randrange(len(data) + 1)
    piece = data[start : start + chance.randrange(1, 200)]
    return data[:start] + piece * chance.choice((2, 3, 50)) + data[start:]


def _with_noise(chance: random.Random, data: bytes) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + chance.randbytes(chance.randrange(1, 64)) + data[at:]


def _with_an_extreme(chance: random.Random, data: bytes) -> bytes:
    """Sizes, lengths and offsets are big-endian in PNG and JPEG, little-endian in WebP and TIFF."""
    at, value = chance.randrange(max(1, min(len(data), 200))), chance.choice(EXTREMES)
    value = value[:: chance.choice((1, -1))][: chance.choice((2, 4))]
    return data[:at] + value + data[at + len(value) :]


def _spliced(chance: random.Random, data: bytes) -> bytes:
    other = chance.choice(list(good().values()))
    return data[: chance.randrange(len(data) + 1)] + other[chance.randrange(len(other)) :]


def _disguised(chance: random.Random, data: bytes) -> bytes:
    magic = chance.choice(MAGIC)
    return magic + data[chance.choice((0, len(magic))) :]


def _with_a_trailer(chance: random.Random, data: bytes) -> bytes:
    return data + chance.choice(TRAILERS) + chance.randbytes(20)


def _chunks_shuffled(chance: random.Random, data: bytes) -> bytes:
    """Of a PNG whose chunks are in order; others stay as they are."""
    if not data.startswith(MAGIC[0]):
        return data
    chunks, at = [], 8
    while at + 12 <= len(data) and len(chunks) < 1000:
        end = at + 12 + struct.unpack_from(">I", data, at)[0]
        chunks.append(data[at:end])
        at = end
    chance.shuffle(chunks)
    return MAGIC[0] + b"".join(chunks)


def _nothing_but_magic(chance: random.Random, data: bytes) -> bytes:
    return chance.choice(MAGIC)[: chance.randrange(1, 12)]


def _noise(chance: random.Random, data: bytes) -> bytes:
    return chance.randbytes(chance.randrange(200))


DAMAGES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    *(_flipped, _flipped_in_the_header, _cut, _less_a_piece, _with_a_piece_again, _with_noise, _with_an_extreme),
    *(_spliced, _disguised, _with_a_trailer, _chunks_shuffled, _nothing_but_magic, _noise),
)


# Bombs ----------------------------------------------------------------------------------------------------------------


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that ask for much memory or much time, by what they are."""
    for bits, kind, channels in ((8, 2, 3), (16, 6, 4), (8, 6, 4), (16, 0, 1), (16, 4, 2), (1, 0, 1), (8, 3, 1)):
        name = f"png of {channels} x {bits} bits, all zero"
        yield f"{name}, at the limit", png(1999, 1999, bits, kind, channels)
        yield f"{name}, above it", png(2100, 2100, bits, kind, channels)
    yield "png, as thin as it gets", png(16, LIMIT // 16, 8, 6, 4)
    for width, height in ((2**31 - 1, 2**31 - 1), (0, 16), (2**32 - 1, 16), (100_000, 1)):
        yield f"png that says it is {width}x{height}", _png(width, height, 8, 2, zlib.compress(b"\0" * 1000))
    text = zlib.compress(b"a" * 2**24, 9)
    inside = _chunk(b"zTXt", b"k\0\0" + text)
    yield "png with a text that unpacks to 16 MiB", png(SIDE, SIDE, 8, 2, 3, inside)
    little = _chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 2**20, 9))
    yield "png with 1,000 texts that unpack to 1 MiB each", png(SIDE, SIDE, 8, 2, 3, little * 1000)
    international = _chunk(b"iTXt", b"k\0\1\0\0\0" + text)
    yield "png with an international text of 16 MiB", png(SIDE, SIDE, 8, 2, 3, international)
    yield "png with a profile that unpacks to 16 MiB", png(SIDE, SIDE, 8, 2, 3, _chunk(b"iCCP", b"k\0\0" + text))
    profile = _chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(2**20), 9))
    yield "png with 5,000 profiles that unpack to 1 MiB each", png(SIDE, SIDE, 8, 2, 3, profile * 5000)
    yield "png with 100,000 texts", png(SIDE, SIDE, 8, 2, 3, _chunk(b"tEXt", b"k\0v") * 100_000)
    yield "png with 100,000 unknown chunks", png(SIDE, SIDE, 8, 2, 3, _chunk(b"quUx", b"") * 100_000)
    yield "png with 1,000,000 empty pieces of pixels", png(SIDE, SIDE, 8, 2, 3, _chunk(b"IDAT", b"") * 700_000)
    yield "png with 8 MiB of EXIF", png(SIDE, SIDE, 8, 2, 3, _chunk(b"eXIf", b"II*\0\x08\0\0\0" + b"\xff" * 2**23))
    yield "jpeg of 65535x65535", _resized_jpeg(65535, 65535)
    yield "jpeg of 2000x2000 with the data of 24x24", _resized_jpeg(2000, 2000)
    yield "jpeg with 10,000 comments", _with_segments(b"\xff\xfe\x00\x10" + b"c" * 14, 10_000)
    yield "jpeg with 150 EXIF segments", _with_segments(b"\xff\xe1\xff\xffExif\0\0" + b"\xff" * 65527, 150)
    yield "jpeg with 150 profile segments", _with_segments(b"\xff\xe2\xff\xffICC_PROFILE\0\1\1" + b"\xff" * 65519, 150)
    yield "jpeg with EXIF whose directories are a ring", _with_segments(_exif_ring(), 1)
    for scans in (90, 2000, 100_000):
        yield f"jpeg of 2000x2000 in {scans} scans", jpeg_of_scans(1992, scans)
    for side in (1999, 16383):
        yield f"webp whose canvas is {side}x{side}", _webp_canvas(side)
    yield "webp, animated, whose canvas is 16384x16384", _with_canvas(good()["webp, animated"], 16384)
    yield "webp, lossless, whose canvas is 16384x16384", _with_canvas(good()["webp, lossless"], 16384)
    yield "webp of 2000x2000, all black", _saved(Image.new("RGBA", (2000, 2000)), "WEBP", {"lossless": True})


def png(width: int, height: int, bits: int, kind: int, channels: int, before: bytes = b"") -> bytes:
    """A black PNG of this kind of colour, with chunks before its pixels."""
    packer, row = zlib.compressobj(9), bytes(1 + (width * channels * bits + 7) // 8)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return _png(width, height, bits, kind, packed, before)


def _png(width: int, height: int, bits: int, kind: int, packed: bytes, before: bytes = b"") -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    palette = _chunk(b"PLTE", bytes(768)) if kind == 3 else b""
    return MAGIC[0] + header + before + palette + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _resized_jpeg(width: int, height: int) -> bytes:
    data = good()["jpeg"]
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def _with_segments(segment: bytes, count: int) -> bytes:
    data = good()["jpeg"]
    return data[:2] + segment * count + data[2:]


def _exif_ring() -> bytes:
    """One directory with one entry, a pointer to itself, which is also the next one."""
    entry = struct.pack("<HHII", ExifTags.IFD.Exif, 4, 1, 8)
    directory = struct.pack("<H", 1) + entry + struct.pack("<I", 8)
    body = b"Exif\0\0II*\0\x08\0\0\0" + directory
    return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body


def jpeg_of_scans(side: int, scans: int) -> bytes:
    """A grey progressive JPEG, each of whose scans is 14 bytes and visits every block: one code says that up to 32,767
    blocks have nothing new."""
    # One code of one bit for each table. For DC it means "no difference", for AC "a run of 2^14 blocks is over".
    tables = b"\xff\xc4" + struct.pack(">HB", 20, 0x00) + bytes([1] + [0] * 15) + bytes([0])
    tables += b"\xff\xc4" + struct.pack(">HB", 20, 0x10) + bytes([1] + [0] * 15) + bytes([0xE0])
    quantisation = b"\xff\xdb" + struct.pack(">HB", 67, 0) + bytes([1]) * 64
    frame = b"\xff\xc2" + struct.pack(">HBHHBBBB", 11, 8, side, side, 1, 1, 0x11, 0)
    blocks = ((side + 7) // 8) ** 2
    first = b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0x00, 0, 0, 0x00) + bytes((blocks + 7) // 8)
    runs = -(-blocks // 2**14)
    bits = "".join("0" + "0" * 14 for _ in range(runs))  # the code, and 14 bits that say how much longer than 2^14
    body = int(bits, 2).to_bytes(-(-len(bits) // 8), "big")
    again = b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0x00, 1, 63, 0x00) + body
    return b"\xff\xd8" + quantisation + tables + frame + first + again * scans + b"\xff\xd9"


def _webp_canvas(side: int) -> bytes:
    """A canvas of this size with a picture of 24 pixels on it."""
    inside = good()["webp"][12:]
    header = b"VP8X" + struct.pack("<IB3x", 10, 0) + (side - 1).to_bytes(3, "little") * 2
    return b"RIFF" + struct.pack("<I", 4 + len(header) + len(inside)) + b"WEBP" + header + inside


def _with_canvas(webp: bytes, side: int) -> bytes:
    at = webp.index(b"VP8X") + 12
    return webp[:at] + (side - 1).to_bytes(3, "little") * 2 + webp[at + 6 :]
