"""The size of an encoded picture from its first bytes, for estimates before it is decoded.

Pillow can report it, too, but it decompresses texts and profiles before the pixels, and allocates the whole canvas of a
WebP. This module takes microseconds for any bytes, so it can run on the event loop. It can show that a picture is too
large; `codec` decides whether it is a valid picture, and what its true size is.
"""

from __future__ import annotations

import struct

__all__ = ["size"]

# Bytes. The size of a photo follows one EXIF segment of at most 64 KiB, which is much shorter in most photos.
HEAD_BYTES = 64 * 1024
MAX_SEGMENTS = 64  # of a JPEG before its size; a photo has about 20
SOF_MARKERS = frozenset(range(0xFFC0, 0xFFD0)) - {0xFFC4, 0xFFC8, 0xFFCC}  # JPEG's start of frame, SOF0 to SOF15


def size(data: bytes) -> tuple[int, int] | None:
    """(width, height) in pixels in the header, before EXIF orientation; None if it has none."""
    head = data[:HEAD_BYTES]
    try:
        if head.startswith(b"\x89PNG\r\n\x1a\n"):
            width, height = struct.unpack_from(">II", head, 16)
            return width, height
        if head.startswith(b"\xff\xd8"):
            return _jpeg(head)
        if head.startswith(b"RIFF") and head.startswith(b"WEBP", 8):
            return _webp(head)
    except struct.error:  # truncated
        pass
    return None


def _jpeg(head: bytes) -> tuple[int, int] | None:
    offset = 2
    for _ in range(MAX_SEGMENTS):
        marker, length = struct.unpack_from(">HH", head, offset)
        if marker in SOF_MARKERS:
            height, width = struct.unpack_from(">HH", head, offset + 5)
            return width, height
        offset += 2 + length
    return None


def _webp(head: bytes) -> tuple[int, int] | None:
    kind = head[12:16]
    if kind == b"VP8X":  # with transparency, a profile or EXIF: size - 1, in three bytes each
        low, high = struct.unpack_from("<IH", head, 24)
        return (low & 0xFFFFFF) + 1, (low >> 24 | high << 8) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", head, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":  # size - 1, in 14 bits each
        (bits,) = struct.unpack_from("<I", head, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return None
