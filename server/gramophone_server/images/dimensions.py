"""The size of an encoded picture from its first bytes, for estimates before anything is decoded.

Pillow tells it too, but decompresses texts and profiles that stand before the pixels, and for WebP allocates the whole
canvas. This takes microseconds whatever the bytes are, so it can run on the event loop. It can show that a picture is too
large; whether it is one, and how large it really is, `images` says.
"""

from __future__ import annotations

import struct

__all__ = ["size"]

LOOKED_AT = 64 * 1024  # bytes; a photo has its size behind one EXIF segment of at most 64 KiB, and most behind far less
MOST_SEGMENTS = 64  # of a JPEG; a photo has some 20 before its size
FRAMES = frozenset(range(0xFFC0, 0xFFD0)) - {0xFFC4, 0xFFC8, 0xFFCC}  # JPEG's markers that begin a frame: SOF0 to SOF15


def size(data: bytes) -> tuple[int, int] | None:
    """(width, height) in pixels as the header has them, before EXIF turns the picture; None where it does not say."""
    head = data[:LOOKED_AT]
    try:
        if head.startswith(b"\x89PNG\r\n\x1a\n"):
            width, height = struct.unpack_from(">II", head, 16)
            return width, height
        if head.startswith(b"\xff\xd8"):
            return _jpeg(head)
        if head.startswith(b"RIFF") and head.startswith(b"WEBP", 8):
            return _webp(head)
    except struct.error:  # cut off
        pass
    return None


def _jpeg(head: bytes) -> tuple[int, int] | None:
    at = 2
    for _ in range(MOST_SEGMENTS):
        marker, length = struct.unpack_from(">HH", head, at)
        if marker in FRAMES:
            height, width = struct.unpack_from(">HH", head, at + 5)
            return width, height
        at += 2 + length
    return None


def _webp(head: bytes) -> tuple[int, int] | None:
    kind = head[12:16]
    if kind == b"VP8X":  # with transparency, a profile or EXIF: less one, in three bytes each
        low, high = struct.unpack_from("<IH", head, 24)
        return (low & 0xFFFFFF) + 1, (low >> 24 | high << 8) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", head, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":  # less one, in 14 bits each
        (bits,) = struct.unpack_from("<I", head, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return None
