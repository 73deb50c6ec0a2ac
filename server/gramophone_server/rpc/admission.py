"""From what a caller asks for to work that can be queued: what is cheap to refuse is refused before anything is decoded."""

from __future__ import annotations

import asyncio
import hashlib
import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeVar

import torch
from torch import Tensor

from gramophone.recipe import InvalidRecipe, Recipe, Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.wire import recipe_from_message
from gramophone_server.config import DECODERS, Limits
from gramophone_server.domain.checkpoint import Checkpoint
from gramophone_server.domain.job import SMALLEST_SIDE, StyleJob
from gramophone_server.domain.job_state import JobState, Shape
from gramophone_server.errors import ImageNotFound, InvalidRequest
from gramophone_server.images import codec, dimensions
from gramophone_server.images.upload_store import Upload, Uploads
from gramophone_server.rpc.validation import check_result, check_resumed, check_spec
from gramophone_server.scheduling.reservation import Reservation
from gramophone_server.scheduling.scheduler import Scheduler

__all__ = ["Admission", "refuse", "spec_digest"]

T = TypeVar("T")


@dataclass(eq=False)
class Source:
    """One image of a request."""

    field: str  # "spec.content"
    image: pb.ImageSource
    needed: int  # pixels of the longest side
    uploaded: bytes = b""

    @property
    def path(self) -> str:
        """Of what names the image: "spec.content.data" or "spec.content.digest"."""
        return f"{self.field}.{self.image.WhichOneof('source')}"

    @cached_property
    def data(self) -> bytes:
        """The encoded image. The first call copies it out of its message, 0.2 ms a MiB, so not on the event loop."""
        return self.uploaded or self.image.data


class Admission:
    """Makes work of requests, and decodes on threads of its own. Everything else belongs to the event loop."""

    def __init__(self, scheduler: Scheduler, limits: Limits) -> None:
        self.uploads = Uploads(limits.max_uploads_bytes)
        self._scheduler = scheduler
        self._limits = limits
        self._decoders = ThreadPoolExecutor(DECODERS, "decode")

    def close(self) -> None:
        """Gives the threads back."""
        self._decoders.shutdown(wait=False, cancel_futures=True)

    async def work(self, spec: pb.JobSpec, reservation: Reservation, deadline_at: float | None = None) -> JobState:
        """The work of a request that has a reservation, and must be done by ``deadline_at``, in seconds of the monotonic clock.

        Raises `InvalidRequest` with every violation, those of the images included, `ImageNotFound`,
        `OutOfDeviceMemory`, `DeadlineUnattainable`; where nothing but one of the last three is wrong, before it decodes.
        """
        violations = list(check_spec(spec, self._limits, self._scheduler.engine.layers))
        recipe, saved = await self._recipe(spec, violations)
        sources = self._sources(spec, recipe, violations)
        if not violations:
            await self._estimate(recipe, saved, sources["spec.content"], reservation, deadline_at)
        decoded = await self._decoded(sources, violations)
        refuse(violations)
        job = StyleJob(
            recipe=recipe,
            content=decoded["spec.content"],
            styles=tuple(decoded[f"spec.styles[{i}].image"] for i in range(len(spec.styles))),
            style_weights=tuple(s.weight if s.HasField("weight") else 1.0 for s in spec.styles),
            start=decoded.get("spec.start_image"),
            seed=saved.seed if saved else spec.seed if spec.HasField("seed") else secrets.randbits(64),
        )
        refuse(check_result(job))
        work = self._scheduler.engine.admit(job)
        return work if saved is None else await self._resumed(saved, job)

    async def digest(self, spec: pb.JobSpec) -> bytes:
        """What the request asks for, to know it again."""
        return await self._in_thread(partial(spec_digest, spec))

    async def kept(self, upload: Upload) -> pb.UploadImageResponse:
        """Keeps an image that has come in full. Raises `InvalidRequest` if it is none that a job could use."""
        data = upload.data
        width, height = await self._in_thread(partial(codec.size, data, "chunk", self._limits))
        self.uploads.keep(upload.digest, data)
        return pb.UploadImageResponse(digest=upload.digest, width=width, height=height)

    async def _recipe(self, spec: pb.JobSpec, violations: list[Violation]) -> tuple[Recipe, Checkpoint | None]:
        """The recipe, or the default one if it will not do, which is among the violations then."""
        try:
            if not spec.HasField("resume"):
                return recipe_from_message(spec.recipe), None  # `check_spec` has told what is wrong with it
            most_bytes = self._limits.max_checkpoint_bytes
            checkpoints = self._scheduler.engine.checkpoints
            saved = await self._in_thread(lambda: checkpoints.read(spec.resume, most_bytes=most_bytes))
        except InvalidRecipe:
            return Recipe(), None
        except InvalidRequest as error:
            violations.extend(error.violations)
            return Recipe(), None
        violations.extend(check_resumed(saved.recipe, self._limits, self._scheduler.engine.layers))
        return saved.recipe, saved

    def _sources(self, spec: pb.JobSpec, recipe: Recipe, violations: Sequence[Violation]) -> dict[str, Source]:
        """The images that are there, by field. Raises `ImageNotFound`, unless more than that is wrong."""
        needed = min(recipe.size, self._limits.max_size)
        needed_style = min(math.ceil(needed * recipe.style_scale), self._limits.max_size)
        named = [Source("spec.content", spec.content, needed), Source("spec.start_image", spec.start_image, needed)]
        for i, style in enumerate(spec.styles[: self._limits.max_styles]):
            named.append(Source(f"spec.styles[{i}].image", style.image, needed_style))
        sources = {}
        for source in named:
            if source.image.HasField("digest"):
                try:
                    source.uploaded = self.uploads.find(source.image.digest)
                except ImageNotFound:
                    if not violations:
                        raise
                    continue
            if source.image.WhichOneof("source"):
                sources[source.field] = source
        return sources

    async def _estimate(
        self,
        recipe: Recipe,
        saved: Checkpoint | None,
        content: Source,
        reservation: Reservation,
        deadline_at: float | None,
    ) -> None:
        """Raises `OutOfDeviceMemory` and `DeadlineUnattainable` by what the content image's header says of its size. One
        that says nothing, or nothing that would be taken, is for the decoder to judge.

        0.3 ms of the server's time from the call to its refusal, 1.1 ms with an image of 4.8 MB, of which 0.8 are the copy
        of its bytes: protobuf has no way to look at the first 64 KiB alone."""

        def outlined() -> tuple[int, Shape] | None:
            outline = self._outline(recipe, saved, content)
            if outline is not None:
                self._scheduler.require_memory(outline[1])
            return outline

        outline = await self._in_thread(outlined)
        if outline is not None:
            left_s = math.inf if deadline_at is None else deadline_at - time.monotonic()
            self._scheduler.require_time(reservation, *outline, recipe.time_budget, left_s)

    def _outline(self, recipe: Recipe, saved: Checkpoint | None, content: Source) -> tuple[int, Shape] | None:
        """The pixel-iterations that a job has left, and its largest shape; None where the header does not tell."""
        width, height = dimensions.size(content.data) or (0, 0)
        if min(width, height) < SMALLEST_SIDE or width * height > self._limits.max_image_pixels:
            return None
        picture = torch.empty((3, height, width), dtype=torch.uint8, device="meta")  # a size without pixels
        job = StyleJob(recipe=recipe, content=picture, styles=(), style_weights=(), start=None, seed=0)
        work = JobState(job) if saved is None else JobState(job, at=saved.counts["at"], done=saved.counts["done"])
        result_width, result_height = job.result_size
        if min(result_width, result_height) < SMALLEST_SIDE or work.at >= len(work.scales):
            return None
        return work.pixels_left, Shape.of(recipe, result_height, result_width)

    async def _decoded(self, sources: Mapping[str, Source], violations: list[Violation]) -> dict[str, Tensor]:
        """The pictures by field, but for those that have violations."""

        def decode(source: Source) -> Tensor:
            return codec.decode(source.data, source.path, self._limits, source.needed)

        decoding = (self._in_thread(partial(decode, source)) for source in sources.values())
        pictures = await asyncio.gather(*decoding, return_exceptions=True)
        decoded: dict[str, Tensor] = {}
        for field, picture in zip(sources, pictures, strict=True):
            if isinstance(picture, InvalidRequest):
                violations.extend(picture.violations)
            elif isinstance(picture, BaseException):
                raise picture
            else:
                decoded[field] = picture
        return decoded

    async def _resumed(self, saved: Checkpoint, job: StyleJob) -> JobState:
        """The job where the checkpoint has it. On a thread, since the images are hashed."""
        work = await self._in_thread(partial(saved.restore, job))
        if work.finished:
            done = (
                f"is of a job that has done all of its {work.iterations} iterations, so there is nothing to go on with"
            )
            raise InvalidRequest([Violation("spec.resume", f"{done}; its picture is the result")])
        return work

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._decoders, work)


def refuse(violations: Iterable[Violation]) -> None:
    """Raises `InvalidRequest` if there are any."""
    if violations := tuple(violations):
        raise InvalidRequest(violations)


def spec_digest(spec: pb.JobSpec) -> bytes:
    """Of everything but how the job is watched; 0.5 ms a MiB, most of it without the GIL."""
    same = pb.JobSpec()
    same.CopyFrom(spec)
    same.ClearField("frames")
    same.ClearField("checkpoints")
    # What is large is hashed by itself: to write it into one message takes longer than to hash it, and holds the GIL.
    for image in (same.content, same.start_image, *(style.image for style in same.styles)):
        if image.HasField("data"):
            image.data = hashlib.sha256(image.data).digest()
    if same.HasField("resume"):
        same.resume = hashlib.sha256(same.resume).digest()
    return hashlib.sha256(same.SerializeToString(deterministic=True)).digest()
