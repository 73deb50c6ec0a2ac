"""Files that a server keeps, so that jobs name them by digest instead of sending them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client.transport.connection import Connection
from gramophone_client.types.options import UploadedImage

__all__ = ["upload", "upload_once"]

# The server takes up to 1 MiB and ends an upload whose next chunk does not arrive within `max_idle_s`, 20 s by default:
# this size needs 13 KB/s. An upload takes 1.8 times as long in chunks of 64 KiB, and 0.9 times in chunks of 1 MiB.
CHUNK_BYTES = 256 * 1024


async def upload(
    connection: Connection,
    data: bytes,
    left_s: float,
    *,
    timeout_s: float | None = None,
    on_sent: Callable[[int], None] = lambda _: None,
) -> UploadedImage:
    """Sends an encoded image, or a checkpoint, in chunks within `left_s` seconds. Returns the value that names it.

    `timeout_s` is the caller's, of which `left_s` is left, for the message of an error. `on_sent` is called with the
    number of bytes of each chunk that the connection has taken.
    """

    async def chunks() -> AsyncGenerator[pb.UploadImageRequest, None]:
        for start in range(0, len(data), CHUNK_BYTES):
            chunk = data[start : start + CHUNK_BYTES]
            yield pb.UploadImageRequest(chunk=chunk)
            on_sent(len(chunk))

    with connection.errors_rebuilt(left_s if timeout_s is None else timeout_s):
        answer = await connection.start_with_stream("UploadImage", chunks(), left_s)
    return UploadedImage(digest=answer.digest, width=answer.width, height=answer.height, data=data)


async def upload_once(
    connection: Connection,
    digest: str,
    data: bytes,
    left_s: float,
    *,
    timeout_s: float,
    on_sent: Callable[[int], None],
) -> None:
    """As `upload`, unless another job of this client is uploading the same file: then waits until that is done."""
    under_way, clock = connection.uploads, asyncio.get_running_loop().time
    end_s = clock() + left_s
    while (other := under_way.get(digest)) is not None and not other.done() and clock() < end_s:
        await asyncio.wait([other], timeout=end_s - clock())
        if other.done() and not other.cancelled() and other.exception() is None:
            return
    left_s = max(0.0, end_s - clock())
    own = asyncio.create_task(upload(connection, data, left_s, timeout_s=timeout_s, on_sent=on_sent))
    under_way[digest] = own
    try:
        await own
    finally:
        if under_way.get(digest) is own:
            del under_way[digest]
