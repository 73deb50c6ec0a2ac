"""A process that decodes images, one at a time, from its standard input to its standard output.

A decoder cannot be interrupted, it holds the interpreter for 100 ms where it copies 100 MB, and it takes hundreds of
megabytes for a moment. In a process of its own it can be ended at any moment, which gives all its memory back, and the
event loop of the server does not wait for it. `decoders` starts it and talks to it:

    python -P -m gramophone_server.images.decoder_process MAX_IMAGE_BYTES MAX_IMAGE_PIXELS

It answers with `READY`. Then each request is a `REQUEST` and the bytes of an image, and each reply a `REPLY` and a
body: the red, green and blue planes of the picture, or a text. It ends at the end of its input.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Sequence
from enum import IntEnum

from gramophone_server.config import DECODER_BYTES, DECODING_BYTES_PER_PIXEL, Limits
from gramophone_server.images.containers import UnusableImage
from gramophone_server.images.decoding import decode
from gramophone_server.images.shortages import Shortage

__all__ = ["READY", "REPLY", "REQUEST", "Outcome", "main"]

READY = b"R"
REQUEST = struct.Struct("<QI")  # bytes of the image; needed pixels of the longest side
REPLY = struct.Struct("<BIIQ")  # outcome; width, height; bytes of the body
# Of the address space, besides what an image takes: the interpreter, its libraries, the file, its stripped copy.
BASE_BYTES = 2**28
OOM_SCORE = 500  # of -1000 to 1000: without memory, the system ends a decoder before the server


class Outcome(IntEnum):
    """What a reply has."""

    DECODED = 0  # the planes
    UNUSABLE = 1  # why the file cannot be used
    SHORTAGE = 2  # what the machine lacks
    DEFECT = 3  # the traceback


def main(arguments: Sequence[str] = ()) -> None:
    """Serves requests until the end of the input."""
    max_image_bytes, max_image_pixels = map(int, arguments or sys.argv[1:])
    limits = Limits(max_image_bytes=max_image_bytes, max_image_pixels=max_image_pixels)
    # Ctrl-C and systemd's SIGTERM reach all processes of a server. It drains first, and ends its decoders at last.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _limit_memory(limits)
    requests, replies = os.fdopen(0, "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that nothing else is written between replies
    replies.write(READY)
    replies.flush()
    while len(head := requests.read(REQUEST.size)) == REQUEST.size:
        size, needed = REQUEST.unpack(head)
        for part in _reply(requests.read(size), limits, needed):
            replies.write(part)
        replies.flush()


def _reply(data: bytes, limits: Limits, needed: int) -> Sequence[bytes]:
    try:
        width, height, planes = decode(data, limits, needed)
    except UnusableImage as error:
        outcome, text = Outcome.UNUSABLE, str(error)
    except Shortage as error:
        outcome, text = Outcome.SHORTAGE, str(error)
    except Exception:  # noqa: BLE001 - the server logs it
        outcome, text = Outcome.DEFECT, traceback.format_exc()
    else:
        return REPLY.pack(Outcome.DECODED, width, height, sum(map(len, planes))), *planes
    body = text.encode()
    return REPLY.pack(outcome, 0, 0, len(body)), body


def _limit_memory(limits: Limits) -> None:
    """Makes the documented bound of a decoder's memory true for any file."""
    most = BASE_BYTES + 4 * limits.max_image_bytes
    most += DECODER_BYTES + DECODING_BYTES_PER_PIXEL * limits.max_image_pixels
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY or most < soft:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # on Linux
        file.write(str(OOM_SCORE))


if __name__ == "__main__":
    main()
