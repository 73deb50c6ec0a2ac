"""Removes from an encoded picture everything but pixels and colours, so that a decoder sees nothing else.

Texts, EXIF, XMP, previews and unknown chunks are where a file of 10 MiB can cost gigabytes or minutes: Pillow reads
every entry of an EXIF directory, and a thousand entries may refer to the same 10 MiB; it inflates each of ten thousand
colour profiles of a PNG; it walks a million empty chunks in Python. So this module drops these parts, and reads only
the orientation from EXIF. Standard library only.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

from gramophone_server.images.containers import (
    PNG_START,
    SOS,
    Chunk,
    UnusableImage,
    is_jpeg,
    is_png,
    is_webp,
    jpeg_segments,
    png_chunks,
    unpacked,
    webp_chunks,
)

__all__ = ["MAX_PROFILE_BYTES", "StrippedImage", "Survey", "strip", "survey"]

# Of an inflated colour profile of a PNG; those of JPEG and WebP are not compressed. A display's profile has 4 KB, one
# with fine tables 2 MB.
MAX_PROFILE_BYTES = 2**22

ORIENTATION, SHORT = 0x0112, 3  # the EXIF tag and its type
PNG_KEPT = frozenset({b"IHDR", b"PLTE", b"tRNS", b"iCCP", b"IDAT", b"IEND"})
WEBP_KEPT = frozenset({b"VP8X", b"ICCP", b"ALPH", b"VP8 ", b"VP8L"})
# JPEG markers. Of the application segments, those of JFIF, ICC and Adobe define the colours.
APP_MARKERS, COMMENT = range(0xE0, 0xF0), 0xFE
APP_KEPT = ((0xE0, b"JFIF\0"), (0xE2, b"ICC_PROFILE\0"), (0xEE, b"Adobe"))
EXIF_APP, EXIF_START = 0xE1, b"Exif\0\0"


class Survey(NamedTuple):
    """What a file says of its picture beside the pixels."""

    orientation: int  # EXIF orientation, 1 for upright
    frames: int  # more than 1: an animation


class StrippedImage(NamedTuple):
    """An image file without its metadata."""

    data: bytes  # the file with pixels and colours only
    orientation: int  # as in `Survey`
    frames: int


def survey(data: bytes) -> Survey:
    """The orientation and the number of frames of a JPEG, PNG or WebP file. It copies nothing, and does not look at the
    scans of a JPEG. Raises `UnusableImage` as `strip` does for what it walks through."""
    if is_jpeg(data):
        return Survey(_jpeg_orientation(data), 1)
    if is_png(data):
        return _png(data)[1]
    if is_webp(data):
        return _webp(data)[1]
    raise UnusableImage("must be a JPEG, PNG or WebP image")


def strip(data: bytes) -> StrippedImage:
    """Removes the metadata of a JPEG, PNG or WebP file. Raises `UnusableImage` for other formats, for a file that takes
    too many steps, for one that is truncated or damaged where the walk reads it, and for a PNG whose colour profile is
    too large."""
    if is_png(data):
        chunks, surveyed = _png(data)
        start = PNG_START
        for chunk in chunks:
            if chunk.name == b"iCCP":
                _check_profile(data, chunk)
        kept = [(chunk.start, chunk.end) for chunk in chunks]
    elif is_jpeg(data):
        start, kept, surveyed = b"\xff\xd8", _jpeg(data), Survey(_jpeg_orientation(data), 1)
    elif is_webp(data):
        chunks, surveyed = _webp(data)
        # Sizes are even in a WebP.
        kept = [(chunk.start, chunk.end + chunk.end % 2) for chunk in chunks]
        size = 4 + sum(min(end, len(data)) - start for start, end in kept)
        start = b"RIFF" + struct.pack("<I", size) + b"WEBP"
    else:
        raise UnusableImage("must be a JPEG, PNG or WebP image")
    view = memoryview(data)
    return StrippedImage(b"".join((start, *(view[at:end] for at, end in kept))), *surveyed)


def _png(data: bytes) -> tuple[list[Chunk], Survey]:
    """The chunks that are kept."""
    kept, seen, orientation, frames = [], set(), 1, 1
    for chunk in png_chunks(data):
        is_first = chunk.name not in seen
        seen.add(chunk.name)
        if chunk.name == b"eXIf" and is_first:
            orientation = _orientation(data[chunk.content : chunk.content_end])
        elif chunk.name == b"acTL" and is_first:
            (frames,) = unpacked(">I", data, chunk.content)
        elif chunk.name in PNG_KEPT and (chunk.name == b"IDAT" or is_first):
            kept.append(chunk)
    return kept, Survey(orientation, frames)


def _webp(data: bytes) -> tuple[list[Chunk], Survey]:
    """The chunks that are kept."""
    kept, seen, orientation, frames = [], set(), 1, 0
    for chunk in webp_chunks(data):
        is_first = chunk.name not in seen
        seen.add(chunk.name)
        if chunk.name == b"EXIF" and is_first:
            orientation = _orientation(data[chunk.content : chunk.content_end].removeprefix(EXIF_START))
        elif chunk.name == b"ANMF":
            frames += 1
        elif chunk.name in WEBP_KEPT and is_first:
            kept.append(chunk)
    return kept, Survey(orientation, max(frames, 1))


def _jpeg(data: bytes) -> list[tuple[int, int]]:
    """The start and the end of each part that is kept."""
    kept = []
    for marker, start, content, end in jpeg_segments(data):
        is_metadata = marker in APP_MARKERS or marker == COMMENT
        is_colours = any(marker == app and data.startswith(prefix, content) for app, prefix in APP_KEPT)
        if not is_metadata or is_colours:
            kept.append((start, end))
    return kept


def _jpeg_orientation(data: bytes) -> int:
    """The orientation in the first EXIF segment before the pixels, where decoders read it, too."""
    for marker, _, content, end in jpeg_segments(data):
        if marker == EXIF_APP and data.startswith(EXIF_START, content):
            return _orientation(data[content + len(EXIF_START) : end])
        if marker == SOS:
            break
    return 1


def _check_profile(data: bytes, chunk: Chunk) -> None:
    """Raises `UnusableImage` if a PNG's profile is too large. Its content is a name, a zero, the method of compression,
    and the compressed profile. One that is damaged is left to the decoder, which ignores it."""
    name_end = data.find(b"\0", chunk.content, chunk.content_end)
    if name_end < 0:
        return
    inflating = zlib.decompressobj()
    try:
        inflating.decompress(memoryview(data)[name_end + 2 : chunk.content_end], MAX_PROFILE_BYTES)
    except zlib.error:
        return
    if inflating.unconsumed_tail:
        raise UnusableImage(
            f"has a colour profile of {MAX_PROFILE_BYTES} bytes or more; "
            "convert the image to sRGB, or remove the profile"
        )


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
