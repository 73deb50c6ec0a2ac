"""Images that were sent ahead of the jobs that name them by digest. Belongs to the event loop."""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict

from gramophone.recipe import Violation
from gramophone_server.config import Limits, variable
from gramophone_server.domain.engine_api import CacheCounts
from gramophone_server.errors import ImageNotFound, InvalidRequest

__all__ = ["LARGEST_CHUNK", "Upload", "Uploads"]

LARGEST_CHUNK = 2**20  # bytes: what is hashed on the event loop in one go, 0.7 ms


class Upload:
    """One image on its way, in pieces. What cannot become an image that is kept is refused at its first byte too many."""

    def __init__(self, limits: Limits) -> None:
        """Raises `InvalidRequest` where no images are kept."""
        if not limits.max_uploads_bytes:
            raise _refusal(
                f"cannot be kept: this server keeps no images (server setting {variable('max_uploads_bytes')} is 0); "
                "send them with the job as `data`"
            )
        # Of two limits the tighter one is told.
        self._setting = min("max_image_bytes", "max_uploads_bytes", key=lambda name: int(getattr(limits, name)))
        self._most_bytes = int(getattr(limits, self._setting))
        self._pieces = io.BytesIO()
        self._told = hashlib.sha256()

    def add(self, chunk: bytes) -> None:
        """The next piece. Raises `InvalidRequest`."""
        if len(chunk) > LARGEST_CHUNK:
            raise _refusal(f"has {len(chunk)} bytes, a piece at most {LARGEST_CHUNK}; send the image in smaller ones")
        received = self._pieces.tell() + len(chunk)
        if received > self._most_bytes:
            raise _refusal(
                f"makes an image of {received} bytes or more; at most {self._most_bytes} are taken "
                f"(server setting {variable(self._setting)}); send a smaller or more compressed image"
            )
        self._pieces.write(chunk)
        self._told.update(chunk)

    @property
    def digest(self) -> str:
        """Of the pieces so far, as `ImageSource.digest`."""
        return f"sha256:{self._told.hexdigest()}"

    @property
    def data(self) -> bytes:
        """The pieces so far."""
        return self._pieces.getvalue()


class Uploads:
    """Encoded images by digest, at most so many bytes of them; the least recently used goes first."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._hits = self._misses = self._bytes = 0

    @property
    def counts(self) -> CacheCounts:
        """What the store has done and holds; a hit is an image that was asked for and there."""
        return CacheCounts(self._hits, self._misses, self._bytes, self._most_bytes)

    def keep(self, digest: str, data: bytes) -> None:
        """Keeps an image, or notes that it was used if it is there already."""
        if digest not in self._kept:
            self._kept[digest] = data
            self._bytes += len(data)
        self._kept.move_to_end(digest)
        while self._bytes > self._most_bytes:
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
