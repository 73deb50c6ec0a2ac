"""The images of a request: their headers, the room for their pictures, and the pictures."""

from __future__ import annotations

import asyncio
import contextlib
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from gramophone.recipe import Recipe, Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.config import Limits, env_variable
from gramophone_server.domain.job import StyleJob
from gramophone_server.errors import InvalidRequest, ServerBusy
from gramophone_server.images.containers import UnusableImage
from gramophone_server.images.decoders import DecodedImage, Decoders, EncodedImage
from gramophone_server.images.decoding import Header, read_header
from gramophone_server.images.upload_store import StoredFile
from gramophone_server.rpc.byte_budget import OF_ONE_CONNECTION, ByteBudget, Share

__all__ = ["DecodedShare", "JobImages", "Source"]


@dataclass(eq=False)
class Source:
    """One image of a request."""

    field: str  # "spec.content"
    image: pb.ImageSource
    uploaded: StoredFile | None = None  # if the request names it by its digest
    header: Header | None = None  # see `JobImages.read_headers`; that of an upload is known

    @property
    def path(self) -> str:
        """The field that is set: "spec.content.data" or "spec.content.digest"."""
        return f"{self.field}.{self.image.WhichOneof('source')}"

    def read(self) -> bytes:
        """The encoded image. Copies it out of its message, 0.2 ms/MiB, so not for the event loop."""
        return self.image.data if self.uploaded is None else self.uploaded.data

    def needed(self, recipe: Recipe, limits: Limits) -> int:
        """Pixels of the longest side that the job uses."""
        size = min(recipe.size, limits.max_size)
        is_style = self.field.startswith("spec.styles")
        return min(math.ceil(size * recipe.style_scale), limits.max_size) if is_style else size


class JobImages:
    """The images of all requests of a server. Its other methods than `read_headers` belong to the event loop.

    ``retry_after_s`` returns the seconds until a job probably ends, which makes room for the images of another one.
    """

    def __init__(self, limits: Limits, decoders: Decoders, retry_after_s: Callable[[], float]) -> None:
        self.budget = ByteBudget(limits.max_decoded_bytes, of_one=OF_ONE_CONNECTION)
        self._limits, self._decoders, self._retry_after_s = limits, decoders, retry_after_s

    def read_headers(self, sources: Mapping[str, Source]) -> list[Violation]:
        """Sets the header of each image that has a valid one; returns the violations of the others. For a thread."""
        violations = []
        for source in sources.values():
            if source.header is not None:
                continue
            try:
                source.header = read_header(source.read(), self._limits)
            except UnusableImage as error:
                violations.append(Violation(source.path, str(error)))
        return violations

    def decoded_bytes(self, sources: Mapping[str, Source], recipe: Recipe) -> int:
        """The bytes of the decoded images of a job, from their headers."""
        headers = ((source, source.header) for source in sources.values() if source.header is not None)
        return sum(header.decoded_bytes(source.needed(recipe, self._limits)) for source, header in headers)

    def room(self, owner: str) -> DecodedShare:
        """For the pictures of one job of ``owner``, in a `with` block."""
        return DecodedShare(self.budget, owner, self._retry_after_s)

    async def decode(self, sources: Mapping[str, Source], recipe: Recipe, owner: str) -> dict[str, DecodedImage]:
        """The pictures by field. Raises `InvalidRequest` with the violations of all images,
        `Shortage`, `EngineFailed`."""

        images = []
        for source in sources.values():
            assert source.header is not None, "all headers are read, and valid"
            images.append(EncodedImage(source.read, source.header, source.needed(recipe, self._limits)))
        outcomes = dict(zip(sources, await self._decoders.decode(images, owner), strict=True))
        violations = [
            Violation(sources[field].path, str(outcome))
            for field, outcome in outcomes.items()
            if isinstance(outcome, UnusableImage)
        ]
        if violations:
            raise InvalidRequest(violations)
        return {field: outcome for field, outcome in outcomes.items() if isinstance(outcome, DecodedImage)}


class DecodedShare:
    """The bytes of the pictures of one job. The `with` block gives them back, unless the job keeps them."""

    def __init__(self, budget: ByteBudget, owner: str, retry_after_s: Callable[[], float]) -> None:
        self._budget, self._owner, self._retry_after_s = budget, owner, retry_after_s
        self._share: Share | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._share is not None:
            self._share.give_back()

    def take(self, size: int) -> None:
        """Takes bytes, besides those that it has. Raises `InvalidRequest` if the job needs more than the whole budget,
        and `ServerBusy` if other jobs use it now."""
        needed = size if self._share is None else self._share.bytes + size
        setting = f"(server setting {env_variable('max_decoded_bytes')})"
        if needed > self._budget.max_bytes:
            description = (
                f"has images that take {needed} bytes once they are decoded; at most {self._budget.max_bytes} are "
                f"allowed {setting}; send fewer or smaller images, or ask for a smaller size"
            )
            raise InvalidRequest([Violation("spec", description)])
        if self._share is not None:  # all in one: its first bytes leave the second ones no less room
            self._share.give_back()
        self._share = self._budget.try_take(needed, self._owner)
        if self._share is None:
            fits = self._budget.used + needed <= self._budget.max_bytes
            whose, rest = ("this connection's", ", the rest is for others") if fits else ("its", "")
            used = self._budget.held(self._owner) if fits else self._budget.used
            raise ServerBusy(
                f"the decoded images of {whose} jobs take {used} of {self._budget.max_bytes} bytes {setting}{rest}, "
                f"and this job needs {needed}",
                self._retry_after_s(),
            )

    def keep_until_freed(self, job: StyleJob, size: int) -> None:
        """Shrinks to ``size`` bytes, and gives them back when the images of the job are freed, however it ends."""
        share, self._share = self._share, None
        assert share is not None, "it was taken before anything was decoded"
        share.shrink_to(size)
        loop = asyncio.get_running_loop()

        def give_back() -> None:  # on any thread
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the budget with it
                loop.call_soon_threadsafe(share.give_back)

        weakref.finalize(job, give_back).atexit = False
