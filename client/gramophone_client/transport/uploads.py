"""Images that a server keeps, so that jobs name them by digest instead of sending them."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client.transport.connection import Connection
from gramophone_client.types.options import UploadedImage

__all__ = ["upload"]

CHUNK_BYTES = 256 * 1024  # the server accepts chunks of up to 1 MiB


async def upload(connection: Connection, data: bytes, timeout_s: float) -> UploadedImage:
    """Sends an encoded image in chunks and returns the value that names it."""

    async def chunks() -> AsyncGenerator[pb.UploadImageRequest, None]:
        for start in range(0, len(data), CHUNK_BYTES):
            yield pb.UploadImageRequest(chunk=data[start : start + CHUNK_BYTES])

    with connection.errors_rebuilt(timeout_s):
        answer = await connection.start_with_stream("UploadImage", chunks(), timeout_s)
    return UploadedImage(digest=answer.digest, width=answer.width, height=answer.height, data=data)
