"""Removes from an encoded picture everything but pixels and colours, so that a decoder sees nothing else.

Texts, EXIF, XMP, previews and unknown chunks are where a file of 10 MiB can cost gigabytes or minutes: Pillow reads
every entry of an EXIF directory, and a thousand entries may refer to the same 10 MiB; it inflates each of ten thousand
colour profiles of a PNG; it walks a million empty chunks in Python. So this module walks the file in a bounded number
of steps, drops these parts, and reads only the orientation from EXIF. Standard library only.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["StrippedImage", "UnusableImage", "strip"]

# A photo has about 20 JPEG segments before its pixels, and at most 400 with a large profile and XMP; a PNG of 10 MiB
# written by libpng has 1,300 chunks. A step of this walk takes 1 us, one of Pillow's 10 us.
MAX_PARTS = 16_384
# libjpeg processes the whole picture for each scan, 11 to 30 ms at 32 megapixels, even if the scan is short. An encoder
# writes 10 scans for a photo, and libjpeg's script for CMYK has 18.
MAX_SCANS = 32

ORIENTATION, SHORT = 0x0112, 3  # the EXIF tag and its type
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_KEPT = frozenset({b"IHDR", b"PLTE", b"tRNS", b"iCCP", b"IDAT", b"IEND"})
WEBP_KEPT = frozenset({b"VP8X", b"ICCP", b"ALPH", b"VP8 ", b"VP8L"})
# JPEG markers. Of the application segments, those of JFIF, ICC and Adobe define the colours.
APP_MARKERS, COMMENT = range(0xE0, 0xF0), 0xFE
APP_KEPT = ((0xE0, b"JFIF\0"), (0xE2, b"ICC_PROFILE\0"), (0xEE, b"Adobe"))
EXIF_APP, EXIF_START = 0xE1, b"Exif\0\0"
SOI, EOI, SOS, TEM = 0xD8, 0xD9, 0xDA, 0x01
MARKERS_WITHOUT_LENGTH = frozenset({TEM, SOI, *range(0xD0, 0xD8)})  # markers without a length
MARKER = re.compile(rb"\xff+([^\xff])", re.DOTALL)
# The end of a scan. Within it, FF 00 is a byte, and FF D0 to D7 are restarts.
SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)


class UnusableImage(ValueError):
    """A file cannot be used. The message continues a sentence that starts with the field's name: "is damaged"."""


class StrippedImage(NamedTuple):
    """An image file without its metadata."""

    data: bytes  # the file with pixels and colours only
    orientation: int  # EXIF orientation, 1 for upright
    frames: int  # more than 1: an animation


def strip(data: bytes) -> StrippedImage:
    """Removes the metadata of a JPEG, PNG or WebP file. Raises `UnusableImage` for other formats, for a file that takes
    too many steps, and for one that is truncated or damaged where the walk reads it."""
    try:
        if data.startswith(PNG_START):
            return _png(data)
        if data.startswith(b"\xff\xd8\xff"):
            return _jpeg(data)
        if data.startswith(b"RIFF") and data.startswith(b"WEBP", 8):
            return _webp(data)
    except struct.error:
        raise UnusableImage("is truncated or damaged; send the whole file again") from None
    raise UnusableImage("must be a JPEG, PNG or WebP image")


def _png(data: bytes) -> StrippedImage:
    kept, seen, orientation, frames = [PNG_START], set(), 1, 1
    for name, start, content_start, end in _chunks(data, len(PNG_START), ">I4s", 4, padded=False):
        if name == b"eXIf" and name not in seen:
            orientation = _orientation(data[content_start : end - 4])
        elif name == b"acTL" and name not in seen:
            (frames,) = struct.unpack_from(">I", data, content_start)
        elif name in PNG_KEPT and (name == b"IDAT" or name not in seen):
            kept.append(data[start:end])
        seen.add(name)
        if name == b"IEND":
            break
    return StrippedImage(b"".join(kept), orientation, frames)


def _webp(data: bytes) -> StrippedImage:
    kept, seen, orientation, frames = [b"WEBP"], set(), 1, 0
    whole = data[: 8 + struct.unpack_from("<I", data, 4)[0]]
    for name, start, content_start, end in _chunks(whole, 12, "<4sI", 0, padded=True):
        if name == b"EXIF" and name not in seen:
            orientation = _orientation(data[content_start:end].removeprefix(EXIF_START))
        elif name == b"ANMF":
            frames += 1
        elif name in WEBP_KEPT and name not in seen:
            kept.append(data[start : end + (end - start) % 2])  # sizes are even in a WebP
        seen.add(name)
    body = b"".join(kept)
    return StrippedImage(b"RIFF" + struct.pack("<I", len(body)) + body, orientation, max(frames, 1))


def _chunks(
    data: bytes, offset: int, head: str, tail_bytes: int, *, padded: bool
) -> Iterator[tuple[bytes, int, int, int]]:
    """Yields (name, start, start of the content, end) of each chunk from ``offset`` on. The last chunk may be
    truncated, which the decoder reports.

    ``head``: the struct format of a chunk's 8 bytes of name and size. ``tail_bytes``: those after the content.
    ``padded``: chunks start at even offsets.
    """
    for _ in range(MAX_PARTS):
        if offset >= len(data):
            return
        first, second = struct.unpack_from(head, data, offset)
        name, size = (first, second) if isinstance(first, bytes) else (second, first)
        end = offset + 8 + size + tail_bytes
        yield name, offset, offset + 8, end
        offset = end + (size % 2 if padded else 0)
    raise UnusableImage(f"has more than {MAX_PARTS} chunks; save it with an ordinary encoder")


def _jpeg(data: bytes) -> StrippedImage:
    kept, orientation, scans, offset = [b"\xff\xd8"], 1, 0, 2
    exif_seen = False
    for _ in range(MAX_PARTS):
        found = SCAN_END.search(data, offset) if scans else MARKER.match(data, offset)
        if found is None:
            if scans:  # truncated in its pixels, which the decoder reports
                kept.append(data[offset:])
                return StrippedImage(b"".join(kept), orientation, 1)
            break
        marker, start, marker_end = found.group()[-1], found.end() - 2, found.end()
        kept.append(data[offset:start] if scans else b"")
        if marker == EOI:
            kept.append(data[start:marker_end])
            return StrippedImage(b"".join(kept), orientation, 1)
        if marker in MARKERS_WITHOUT_LENGTH or marker == 0:  # some cameras write a meaningless FF 00 before a scan
            offset = marker_end
            continue
        (length,) = struct.unpack_from(">H", data, marker_end)
        offset = marker_end + max(length, 2)
        content = data[marker_end + 2 : offset]
        if marker == EXIF_APP and content.startswith(EXIF_START) and not exif_seen:
            exif_seen, orientation = True, _orientation(content[len(EXIF_START) :])
        is_metadata = marker in APP_MARKERS or marker == COMMENT
        if not is_metadata or any(marker == app and content.startswith(prefix) for app, prefix in APP_KEPT):
            kept.append(data[start:offset])
        if marker == SOS:
            scans += 1
            if scans > MAX_SCANS:
                raise UnusableImage(f"has more than {MAX_SCANS} scans; save it with an ordinary encoder")
    else:
        raise UnusableImage(f"has more than {MAX_PARTS} segments; save it with an ordinary encoder")
    raise UnusableImage("is truncated or damaged; send the whole file again")


def _orientation(exif: bytes) -> int:
    """The orientation in a TIFF directory. 1 if that is damaged, because the picture itself is still valid."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (offset,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, offset)
    except struct.error:
        return 1
    entries = exif[offset + 2 : offset + 2 + 12 * count]
    for tag, kind, number, value in struct.iter_unpack(f"{order}HHIH2x", entries[: len(entries) // 12 * 12]):
        if tag == ORIENTATION and kind == SHORT and number == 1:
            return value if 1 <= value <= 8 else 1
    return 1
