"""Ranges of a request's options that are not fields of its recipe. Standard library only."""

from __future__ import annotations

from gramophone.recipe import Range

__all__ = [
    "FRAMES_IN_FLIGHT",
    "FRAME_SIDE",
    "INLINE_BYTES",
    "INTERVAL_S",
    "MAX_DURATION_S",
    "MAX_INT32",
    "MAX_STYLE_WEIGHT",
    "MAX_UINT64",
    "MESSAGE_BYTES",
    "QUALITY",
]

FRAME_SIDE = Range(16, 16384)  # pixels; above the largest `max_size` that a server can have
FRAMES_IN_FLIGHT = Range(0, 16)  # unacknowledged frames; 0: as many as the connection holds
INTERVAL_S = Range(0, 3600)  # between two frames, or two checkpoints
QUALITY = Range(1, 100)  # of JPEG and WebP
MAX_STYLE_WEIGHT = 1000.0
# Bytes of a message from a client; each server sets its limit within this range.
MESSAGE_BYTES = Range(5 * 2**20, 256 * 2**20)
# Bytes of images and a checkpoint in one request of our clients. Every server takes them; what is more goes by upload.
INLINE_BYTES = 4 * 2**20
# What the messages can hold.
MAX_DURATION_S = 315_576_000_000  # a google.protobuf.Duration
MAX_INT32 = 2**31 - 1
MAX_UINT64 = 2**64 - 1
