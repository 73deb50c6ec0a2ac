"""The parts of an encoded picture: the chunks of a PNG or WebP, the segments and scans of a JPEG.

A walk takes a bounded number of steps, and none holds the interpreter for more than 2 ms, whatever the bytes are.
Standard library only.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

__all__ = [
    "EOI",
    "MAX_HEAD_PARTS",
    "MAX_PARTS",
    "MAX_SCANS",
    "PNG_START",
    "SCAN",
    "SOS",
    "Chunk",
    "Segment",
    "UnusableImage",
    "is_jpeg",
    "is_png",
    "is_webp",
    "jpeg_segments",
    "png_chunks",
    "unpacked",
    "webp_chunks",
]

# A PNG of 10 MiB written by libpng has 1,300 chunks. A step of this walk takes 1 us, one of Pillow's 10 us.
MAX_PARTS = 16_384
# Before the pixels. A photo has about 20 JPEG segments there, and at most 400 with a large profile and XMP.
MAX_HEAD_PARTS = 1024
# libjpeg processes the whole picture for each scan, 11 to 30 ms at 32 megapixels, even if the scan is short. An encoder
# writes 10 scans for a photo, and libjpeg's script for CMYK has 18.
MAX_SCANS = 32
# Bytes of a scan that are searched at a time. A search holds the interpreter: 2 ms for these, and 75 ms for 10 MiB.
SLICE_BYTES = 2**18
# Any number of FF may precede a marker. Comparing 10 MiB of them in such blocks takes 1 ms, and a search 75 ms.
FILLS = [b"\xff" * size for size in (4096, 256, 16, 1)]

PNG_START = b"\x89PNG\r\n\x1a\n"
# JPEG markers
SOI, EOI, SOS, TEM = 0xD8, 0xD9, 0xDA, 0x01
MARKERS_WITHOUT_LENGTH = frozenset({TEM, SOI, *range(0xD0, 0xD8)})
SCAN = -1  # instead of a marker: the pixels of a scan
# The end of a scan. Within it, FF 00 is a byte, and FF D0 to D7 are restarts.
SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)


class UnusableImage(ValueError):
    """A file cannot be used. The message continues a sentence that starts with the field's name: "is damaged"."""


class Chunk(NamedTuple):
    """A chunk of a PNG or WebP. The last one of a file may be truncated, so that it ends behind the data."""

    name: bytes
    start: int
    content: int  # where its content starts
    content_end: int
    end: int


class Segment(NamedTuple):
    """A segment of a JPEG. The last one of a file may be truncated, so that it ends behind the data."""

    marker: int  # or `SCAN`
    start: int
    content: int  # where its content starts
    end: int


def is_png(data: bytes) -> bool:
    """Whether the file begins as a PNG does."""
    return data.startswith(PNG_START)


def is_jpeg(data: bytes) -> bool:
    """Whether the file begins as a JPEG does."""
    return data.startswith(b"\xff\xd8\xff")


def is_webp(data: bytes) -> bool:
    """Whether the file begins as a WebP does."""
    return data.startswith(b"RIFF") and data.startswith(b"WEBP", 8)


def png_chunks(data: bytes) -> Iterator[Chunk]:
    """Yields the chunks of a PNG, up to IEND. Raises `UnusableImage` if they are too many or damaged."""
    for chunk in _chunks(data, len(PNG_START), len(data), ">I4s", checksum_bytes=4, alignment=1):
        yield chunk
        if chunk.name == b"IEND":
            return


def webp_chunks(data: bytes) -> Iterator[Chunk]:
    """Yields the chunks of a WebP. Raises `UnusableImage` if they are too many or damaged."""
    (size,) = unpacked("<I", data, 4)
    return _chunks(data, 12, min(8 + size, len(data)), "<4sI", checksum_bytes=0, alignment=2)


def _chunks(data: bytes, at: int, data_end: int, head: str, *, checksum_bytes: int, alignment: int) -> Iterator[Chunk]:
    """Yields the chunks between two offsets. ``head``: the struct format of a chunk's 8 bytes of name and size."""
    for _ in range(MAX_PARTS):
        if at >= data_end:
            return
        if at + 8 > data_end:
            raise _damaged()
        first, second = unpacked(head, data, at)
        name, size = (first, second) if isinstance(first, bytes) else (second, first)
        content_end = at + 8 + size
        yield Chunk(name, at, at + 8, content_end, content_end + checksum_bytes)
        at = content_end + checksum_bytes
        at += at % alignment
    raise UnusableImage(f"has more than {MAX_PARTS} chunks; save it with an ordinary encoder")


def jpeg_segments(data: bytes) -> Iterator[Segment]:
    """Yields the segments of a JPEG, up to EOI, and the pixels of each scan after its SOS. Without those before EOI
    that have no length and no meaning.

    A scan is searched for its end when the next segment is asked for. Raises `UnusableImage` if the segments, those
    before the first scan, or the scans are too many, or if segments before the first scan are damaged.
    """
    at, scans = 2, 0
    for number in range(MAX_PARTS):
        if scans:
            start = _scan_end(data, at)
            yield Segment(SCAN, at, at, len(data) if start is None else start)
            if start is None:  # truncated in its pixels, which the decoder reports
                return
        else:
            if number == MAX_HEAD_PARTS:
                raise UnusableImage(
                    f"has more than {MAX_HEAD_PARTS} segments before its pixels; save it with an ordinary encoder"
                )
            fill_end = _fill_end(data, at)
            if fill_end == at or fill_end == len(data):
                raise _damaged()
            start = fill_end - 1
        marker, content = data[start + 1], start + 2
        if marker == EOI:
            yield Segment(EOI, start, content, content)
            return
        if marker in MARKERS_WITHOUT_LENGTH or marker == 0:  # some cameras write a meaningless FF 00 before a scan
            at = content
            continue
        (length,) = unpacked(">H", data, content)
        at = content + max(length, 2)
        yield Segment(marker, start, content + 2, at)
        if marker == SOS:
            scans += 1
            if scans > MAX_SCANS:
                raise UnusableImage(f"has more than {MAX_SCANS} scans; save it with an ordinary encoder")
    raise UnusableImage(f"has more than {MAX_PARTS} segments; save it with an ordinary encoder")


def _fill_end(data: bytes, at: int) -> int:
    """Where the bytes FF that start at an offset end."""
    for fill in FILLS:
        while data.startswith(fill, at):
            at += len(fill)
    return at


def _scan_end(data: bytes, start: int) -> int | None:
    """Where the pixels of a scan end; None if they do not. Other threads may run after each slice."""
    for at in range(start, len(data), SLICE_BYTES):
        found = SCAN_END.search(data, at, at + SLICE_BYTES + 1)
        if found is not None:
            return found.start()
    return None


def unpacked(format: str, data: bytes, at: int) -> tuple[Any, ...]:
    """The values at an offset, see `struct`. Raises `UnusableImage` behind the end of the data."""
    try:
        return struct.unpack_from(format, data, at)
    except struct.error:
        raise _damaged() from None


def _damaged() -> UnusableImage:
    return UnusableImage("is truncated or damaged; send the whole file again")
