"""Images that are uploaded before the jobs that refer to them by digest. Used only on the event loop."""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict

from gramophone.recipe import Violation
from gramophone_server.config import Limits, env_variable
from gramophone_server.domain.engine_api import CacheCounts
from gramophone_server.errors import ImageNotFound, InvalidRequest

__all__ = ["MAX_CHUNK_BYTES", "Upload", "UploadStore"]

MAX_CHUNK_BYTES = 2**20  # bytes; hashing it takes 0.7 ms of the event loop


class Upload:
    """An image that is being uploaded in chunks. It is refused with the first chunk that makes it too large to keep."""

    def __init__(self, limits: Limits) -> None:
        """Raises `InvalidRequest` if the server keeps no images."""
        if not limits.max_uploads_bytes:
            raise _refusal(
                "cannot be kept: this server keeps no images "
                f"(server setting {env_variable('max_uploads_bytes')} is 0); send them with the job as `data`"
            )
        # Errors name the lower of two limits.
        self._setting = min("max_image_bytes", "max_uploads_bytes", key=lambda name: int(getattr(limits, name)))
        self._max_bytes = int(getattr(limits, self._setting))
        self._chunks = io.BytesIO()
        self._hash = hashlib.sha256()

    def add(self, chunk: bytes) -> None:
        """Adds the next chunk. Raises `InvalidRequest`."""
        if len(chunk) > MAX_CHUNK_BYTES:
            raise _refusal(
                f"has {len(chunk)} bytes, at most {MAX_CHUNK_BYTES} are allowed; send the image in smaller chunks"
            )
        received = self._chunks.tell() + len(chunk)
        if received > self._max_bytes:
            raise _refusal(
                f"makes an image of {received} bytes or more; at most {self._max_bytes} are allowed "
                f"(server setting {env_variable(self._setting)}); send a smaller or more compressed image"
            )
        self._chunks.write(chunk)
        self._hash.update(chunk)

    @property
    def digest(self) -> str:
        """The digest of the chunks so far, in the form of `ImageSource.digest`."""
        return f"sha256:{self._hash.hexdigest()}"

    @property
    def data(self) -> bytes:
        """The chunks so far."""
        return self._chunks.getvalue()


class UploadStore:
    """Encoded images by digest, up to a number of bytes. Evicts the least recently used ones."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._hits = self._misses = self._bytes = 0

    @property
    def counts(self) -> CacheCounts:
        """Hits and misses of `find`, and the bytes that are kept."""
        return CacheCounts(self._hits, self._misses, self._bytes, self._max_bytes)

    def keep(self, digest: str, data: bytes) -> None:
        """Keeps an image, or marks it as used if it is already kept."""
        if digest not in self._kept:
            self._kept[digest] = data
            self._bytes += len(data)
        self._kept.move_to_end(digest)
        while self._bytes > self._max_bytes:
            self._bytes -= len(self._kept.popitem(last=False)[1])

    def find(self, digest: str) -> bytes:
        """The image. Raises `ImageNotFound`."""
        if digest not in self._kept:
            self._misses += 1
            raise ImageNotFound(digest)
        self._hits += 1
        self._kept.move_to_end(digest)
        return self._kept[digest]


def _refusal(description: str) -> InvalidRequest:
    return InvalidRequest([Violation("chunk", description)])
