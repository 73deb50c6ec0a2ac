"""Images that a server keeps, so that jobs name them by digest instead of sending them."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TypeVar

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client.errors import ImageNotFoundError
from gramophone_client.transport.connection import Connection
from gramophone_client.types.options import UploadedImage

__all__ = ["upload", "with_uploads"]

CHUNK_BYTES = 256 * 1024  # the server accepts chunks of up to 1 MiB

T = TypeVar("T")


async def upload(connection: Connection, data: bytes, timeout_s: float | None) -> UploadedImage:
    """Sends an encoded image in chunks and returns the value that names it."""

    async def chunks() -> AsyncGenerator[pb.UploadImageRequest, None]:
        for start in range(0, len(data), CHUNK_BYTES):
            yield pb.UploadImageRequest(chunk=data[start : start + CHUNK_BYTES])

    timeout_s = connection.timeout_s if timeout_s is None else timeout_s
    with connection.errors_rebuilt(timeout_s):
        answer = await connection.call_streaming(connection.service.UploadImage, chunks(), timeout_s)
    return UploadedImage(digest=answer.digest, width=answer.width, height=answer.height, data=data)


async def with_uploads(
    connection: Connection, images: Sequence[UploadedImage], call: Callable[[float], Awaitable[T]], timeout_s: float
) -> T:
    """Makes a call with the seconds that are left of `timeout_s`. If the server no longer has one of the images,
    uploads all of them and makes the call once more."""
    end = time.monotonic() + timeout_s
    try:
        return await call(timeout_s)
    except ImageNotFoundError:
        if not images:
            raise
        for image in images:
            await upload(connection, image.data, max(0.0, end - time.monotonic()))
        return await call(max(0.0, end - time.monotonic()))
