"""Bad image files: damaged ones, ones with false headers, and ones that decode to far more than their size."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable, Mapping
from functools import cache

from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP")
SIZE = (24, 16)  # pixels of an ordinary picture
LARGE = 10 * 2**20 - 8192  # bytes; just below the default limit of a server


def chunk(name: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def segment(marker: int, data: bytes = b"") -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(data)) + data


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def png(width: int, height: int, depth: int, colour: int, pixels: bytes, *chunks: bytes) -> bytes:
    """Builds a PNG without Pillow. ``pixels`` are the rows with their filter bytes, not yet deflated."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", zlib.compress(pixels, 9)) + chunk(b"IEND")


def in_png(*chunks: bytes) -> bytes:
    return png(*SIZE, 8, 2, bytes(73 * 16), *chunks)


def in_jpeg(*segments: bytes) -> bytes:
    data = encoded(Image.new("RGB", SIZE, "red"), "JPEG")
    return data[:2] + b"".join(segments) + data[2:]


def in_webp(*chunks: tuple[bytes, bytes]) -> bytes:
    """A WebP with these chunks after its pixels."""
    pixels = encoded(Image.new("RGB", SIZE, "red"), "WEBP")[12:]
    extended = struct.pack("<4sIB3x", b"VP8X", 10, 0x0C) + bytes([SIZE[0] - 1, 0, 0, SIZE[1] - 1, 0, 0])
    parts = (struct.pack("<4sI", name, len(data)) + data + bytes(len(data) % 2) for name, data in chunks)
    body = b"WEBP" + extended + pixels + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


@cache
def valid_pictures() -> tuple[bytes, ...]:
    """Small pictures of every format and mode that Pillow writes, with metadata."""
    noise = Image.effect_noise((40, 24), 80)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    result = [
        encoded(noise.convert(mode), format, exif=exif)
        for format, modes in (("JPEG", ("L", "RGB", "CMYK")), ("PNG", ("1", "L", "LA", "P", "RGB", "RGBA")))
        for mode in modes
    ]
    result += [
        encoded(noise.convert(mode), "WEBP", exif=exif, lossless=l) for mode in ("RGB", "RGBA") for l in (True, False)
    ]
    result.append(encoded(noise.convert("RGB"), "JPEG", progressive=True, comment=b"x" * 99))
    result.append(png(16, 16, 16, 6, bytes(129 * 16), chunk(b"tEXt", b"a\0b"), chunk(b"gAMA", bytes(4))))
    result.append(encoded(noise, "PNG", save_all=True, append_images=[noise.rotate(180)]))
    result.append(encoded(noise, "GIF"))
    return tuple(result)


def exif_bomb(kind: bytes = b"MM\0*") -> bytes:
    """An EXIF directory with 400 entries that each refer to nearly all of 10 MiB."""
    entries = b"".join(struct.pack(">HHII", 0x8000 + i, 7, LARGE - 9000, 8) for i in range(400))
    return (kind + struct.pack(">IH", 8, 400) + entries).ljust(LARGE - 8500, b"x")


def program_profile(steps: int) -> bytes:
    """An ICC colour profile with a program of this number of steps."""
    piece = b"parf" + struct.pack(">4xHH4f", 0, 0, 1.5, 1, 0, 0)
    curve = b"curf" + struct.pack(">4xHHf", 2, 0, 0.5) + piece * 2
    curves = b"cvst" + struct.pack(">4xHH6I", 3, 3, *(36, len(curve)) * 3) + curve
    program = b"mpet" + struct.pack(">4xHHI", 3, 3, steps)
    program += struct.pack(">II", 16 + 8 * steps, len(curves)) * steps + curves
    head = struct.pack(">I4xI4s4s4s12x4s28xiii48x", 144 + len(program), 0x04200000, b"mntr", b"RGB ", b"XYZ ", b"acsp",
                       0xF6D6, 0x10000, 0xD32D)  # fmt: skip
    return head + struct.pack(">I4sII", 1, b"D2B0", 144, len(program)) + program


def many_scans(width: int, height: int, scans: int) -> bytes:
    data = encoded(Image.new("RGB", (width, height), "red"), "JPEG", progressive=True, subsampling=0, quality=1)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * scans + data[-2:]


def many_codes() -> bytes:
    """A lossless WebP of one megapixel in which each of 65,536 blocks has its own Huffman codes, which is the maximum.

    From its 295 KB, libwebp makes 350 MiB of tables. Its bits are written from the lowest one up.
    """

    def number(value: int, bits: int) -> str:
        return f"{value:0{bits}b}"[::-1]

    one_symbol = "1000"  # a code with the single symbol 0, which takes no bits

    def bytes_code(others: int) -> str:
        """256 symbols of 8 bits and ``others`` without a code. The code of the lengths is 1 bit each for 0 and 8."""
        lengths = {2: 1, 11: 1}  # by position in the order that the format defines
        return (
            "0"
            + number(12 - 4, 4)
            + "".join(number(lengths.get(i, 0), 3) for i in range(12))
            + "0"
            + "1" * 256
            + "0" * others
        )

    head = number(0x2F, 8) + number(1023, 14) * 2 + "0" + "000"  # 1024 x 1024, no alpha, version 0
    codes = "0" + "0" + "1" + number(0, 3)  # no transform, no cache, codes per block of 4 x 4
    image = "0" + bytes_code(24) + bytes_code(0) + one_symbol * 3
    image += "".join(f"{green:08b}{red:08b}" for red in range(256) for green in range(256))
    bits = head + codes + image + one_symbol * 5 * 65_536
    data = int(bits[::-1], 2).to_bytes(len(bits) // 8 + 1, "little")
    data += bytes(len(data) % 2)
    return b"RIFF" + struct.pack("<I", 12 + len(data)) + b"WEBPVP8L" + struct.pack("<I", len(data)) + data


def _flat(format: str, mode: str, side: int, **options: object) -> bytes:
    return encoded(Image.new(mode, (side, side)), format, **options)


MEGABYTE = zlib.compress(bytes(2**20), 9)

# Each takes much more time or memory to decode than its size suggests. Some have 32 megapixels, the default limit of a
# server.
BOMBS: Mapping[str, Callable[[], bytes]] = {
    "png-declares-4-gigapixels": lambda: png(65535, 65535, 8, 6, b""),
    "png-declares-2e62-pixels": lambda: png(2**31 - 1, 2**31 - 1, 8, 6, b""),
    "png-of-400-megapixels": lambda: png(20_000, 20_000, 1, 0, bytes(2501 * 20_000)),
    "png-of-32-megapixels": lambda: png(5656, 5656, 8, 6, bytes((5656 * 4 + 1) * 5656)),
    "png-of-32-megapixels-of-16-bits": lambda: png(5656, 5656, 16, 6, bytes((5656 * 8 + 1) * 5656)),
    "png-of-32-megapixels-with-a-key": lambda: png(
        5656, 5656, 8, 3, bytes(5657 * 5656), chunk(b"PLTE", bytes(768)), chunk(b"tRNS", bytes(9))
    ),
    "png-thin": lambda: png(2_000_000, 16, 8, 6, bytes(8_000_001 * 16)),
    "png-inflates-beyond-its-size": lambda: png(16, 16, 8, 2, bytes(200 * 2**20)),
    "png-texts": lambda: in_png(*[chunk(b"zTXt", b"a\0\0" + MEGABYTE)] * 9000),
    "png-international-texts": lambda: in_png(*[chunk(b"iTXt", b"a\0\1\0\0\0" + MEGABYTE)] * 9000),
    "png-profiles": lambda: in_png(*[chunk(b"iCCP", b"a\0\0" + MEGABYTE)] * 9000),
    "png-profile": lambda: in_png(chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**30), 9))),
    "png-empty-texts": lambda: in_png(chunk(b"tEXt") * (LARGE // 12)),
    "png-private-chunks": lambda: in_png(chunk(b"prVt") * (LARGE // 12)),
    "png-empty-pixels": lambda: in_png(chunk(b"IDAT") * (LARGE // 12)),
    "png-exif": lambda: in_png(chunk(b"eXIf", exif_bomb())),
    "png-animation": lambda: in_png(chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))),
    "png-profile-is-a-program": lambda: in_png(chunk(b"iCCP", b"a\0\0" + zlib.compress(program_profile(30_000)))),
    "jpeg-declares-4-gigapixels": lambda: in_jpeg(segment(0xC0, struct.pack(">BHHB", 8, 65535, 65535, 3) + bytes(9))),
    "jpeg-of-32-megapixels": lambda: _flat("JPEG", "CMYK", 5656, progressive=True, quality=1),
    "jpeg-300-scans": lambda: many_scans(5600, 5700, 300),
    "jpeg-segments": lambda: in_jpeg(segment(0xFE) * (LARGE // 4)),
    "jpeg-padding": lambda: in_jpeg(b"\xff" * LARGE),
    "jpeg-exif": lambda: in_jpeg(*[segment(0xE1, b"Exif\0\0" + exif_bomb()[: 2**16 - 9])] * 159),
    "jpeg-profile-pieces": lambda: in_jpeg(*[segment(0xE2, b"ICC_PROFILE\0\1\1")] * 16_000),
    "jpeg-profile-is-a-program": lambda: in_jpeg(*_pieces(program_profile(150_000))),
    "webp-declares-4-gigapixels": lambda: in_webp()[:24] + b"\xff\xff\0\xff\xff\0" + in_webp()[30:],
    "webp-of-32-megapixels": lambda: _flat("WEBP", "RGBA", 5656, lossless=True, method=0, quality=0),
    "webp-lossy-of-32-megapixels": lambda: _flat("WEBP", "RGB", 5656, method=0),
    "webp-codes": many_codes,
    "webp-exif": lambda: in_webp((b"EXIF", exif_bomb())),
    "webp-chunks": lambda: in_webp(*[(b"ABCD", b"")] * (LARGE // 8)),
    "webp-profile-is-a-program": lambda: encoded(
        Image.new("RGB", (16, 16)), "WEBP", icc_profile=program_profile(150_000)
    ),
    "webp-animation": lambda: in_webp(*[(b"ANMF", bytes(16))] * 10_000),
    "polyglot-png-jpeg": lambda: in_png() + in_jpeg(),
    "polyglot-jpeg-zip": lambda: in_jpeg(segment(0xFE, b"PK\3\4" + bytes(60_000))) + b"PK\5\6" + bytes(18),
    "polyglot-gif": lambda: b"GIF89a" + in_png(),
    "tiff": lambda: encoded(Image.new("RGB", (16, 16)), "TIFF"),
    "postscript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\n" + b"showpage\n" * 1000,
}  # fmt: skip


def _pieces(profile: bytes) -> list[bytes]:
    parts = [profile[at : at + 65_000] for at in range(0, len(profile), 65_000)]
    return [segment(0xE2, b"ICC_PROFILE\0" + bytes([i, len(parts)]) + part) for i, part in enumerate(parts, 1)]


def damaged(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """``data`` with random accidental and malicious damage; at most twice as long. It may be spliced with ``other``."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(result) + 1)
        end = min(len(result), at + rng.choice((1, 2, 4, 16, 64)))
        match rng.randrange(9):
            case 0 if at < len(result):
                result[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(result):
                result[at] = rng.choice((0x00, 0x01, 0x7F, 0x80, 0xFE, 0xFF))
            case 2:
                del result[at:]
            case 3:
                del result[at:end]
            case 4:
                result[at:at] = result[at:end]
            case 5:
                result[at:end] = rng.randbytes(end - at)
            case 6:
                result[at:end] = rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\x80\0\0\0"))
            case 7 if other:
                result[at:] = other[rng.randrange(len(other)) :]
            case 8 if len(result) > 12:  # changes four bytes as a number, because they may be a length
                at = rng.randrange(len(result) - 4)
                value = int.from_bytes(result[at : at + 4]) + rng.choice((-1, 1, 255, 65536))
                result[at : at + 4] = (value % 2**32).to_bytes(4)
    return bytes(result[: max(2 * len(data), 64)])
