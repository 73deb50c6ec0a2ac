"""Inflates the gzip data of clients: within a size, in slices, and in turns of their connections."""

from __future__ import annotations

import asyncio
import zlib

from gramophone.recipe import Violation
from gramophone_server.errors import InvalidRequest
from gramophone_server.images.fair_queue import FairQueue
from gramophone_server.images.threads import started_threads

__all__ = ["GZIP_START", "Inflater"]

GZIP_START = b"\x1f\x8b"  # no message starts so: it would be field 3 of the wire type 7, which does not exist
GZIP_FORMAT = 31  # of zlib: a gzip header and a window of 32 KiB
# A slice ends at whichever comes first. Ordinary data takes 1 ms for so many bytes, the slowest kind, blocks without
# content that have Huffman codes of their own, 10 ms.
SLICE_BYTES = 2**17
SLICE_CONTENT_BYTES = 2**20  # 3 ms
# What has at most so many bytes, and content, is inflated on the event loop, in up to 0.5 ms.
QUICK_BYTES, QUICK_CONTENT_BYTES = 2**12, 2**16
# The fixed code of deflate has at most 9 bits for a byte, and stored blocks need less. What a compressor makes beyond
# that is a header, of 10 bytes in gRPC's libraries, and the ends of blocks.
MOST_BITS_PER_BYTE = 9
OVERHEAD_BYTES = 2**12
HELP = "compress the message as one gzip member, or send it uncompressed"


class Inflater:
    """The thread that inflates messages. Belongs to the event loop.

    Connections take turns at it, slice by slice: none waits behind the whole message of another, a short message comes
    before the next slices of long ones, and nothing is inflated for a call that has ended. A message and its content
    take at most twice the room of the message, as `memory_bound` assumes.
    """

    def __init__(self) -> None:
        self._thread = started_threads(1, "inflate")
        self._turns = FairQueue(1)

    @property
    def waiting(self) -> int:
        """The number of messages that wait for their turn."""
        return self._turns.waiting

    def close(self) -> None:
        """Stops the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def inflate(self, data: bytes, max_bytes: int, most: str, owner: str) -> bytes:
        """The content of a gzip file, at most ``max_bytes``. ``most`` says in an error which limit that is.

        Raises `InvalidRequest` if it is too large, damaged, has more than one part, or more bytes than a compressor
        would have made of that content.
        """
        message = _Message(data, max_bytes, most)
        content = None
        if len(data) <= QUICK_BYTES and max_bytes <= QUICK_CONTENT_BYTES:
            while content is None:
                content = message.inflate_slice()
            return content
        loop = asyncio.get_running_loop()
        work = min(len(data), SLICE_BYTES)
        while content is None:
            async with self._turns.place(owner, work):
                content = await loop.run_in_executor(self._thread, message.inflate_slice)
            work = SLICE_BYTES  # whichever limit ends the slice, so that few bytes of much content are not cheaper
        return content


class _Message:
    """A gzip file that is being inflated."""

    def __init__(self, data: bytes, max_bytes: int, most: str) -> None:
        self._data, self._max_bytes, self._most = data, max_bytes, most
        self._read = 0  # bytes of the file
        self._parts: list[bytes] = []
        self._size = 0  # of the content so far
        self._inflater = zlib.decompressobj(GZIP_FORMAT)

    def inflate_slice(self) -> bytes | None:
        """Inflates another slice. Returns the content after the last one. Raises `InvalidRequest`."""
        slice_ = self._data[self._read : self._read + SLICE_BYTES]
        most = min(SLICE_CONTENT_BYTES, self._max_bytes + 1 - self._size)
        try:
            part = self._inflater.decompress(slice_, most)
        except zlib.error as error:
            raise _refusal(f"is no valid gzip data ({error}); {HELP}") from None
        self._read += len(slice_) - len(self._inflater.unconsumed_tail) - len(self._inflater.unused_data)
        self._parts.append(part)
        self._size += len(part)
        is_whole = self._inflater.eof
        if self._size > self._max_bytes:
            raise _refusal(f"expands to more than {self._max_bytes} bytes, {self._most}")
        if is_whole and self._read < len(self._data):
            raise _refusal(f"is gzip data followed by {len(self._data) - self._read} further bytes; {HELP}")
        if not is_whole and self._read == len(self._data) and len(part) < most:
            raise _refusal(f"is gzip data that is cut off after {self._read} bytes; {HELP}")
        if self._read > self._size * MOST_BITS_PER_BYTE // 8 + OVERHEAD_BYTES:
            read = f"{self._read} bytes of gzip data with {self._size} bytes of content"
            raise _refusal(f"has {read}, more than a compressor makes of them; {HELP}")
        return b"".join(self._parts) if is_whole else None


def _refusal(description: str) -> InvalidRequest:
    return InvalidRequest([Violation("request", description)])
