"""From a request to a job that can be queued. Whatever is cheap to refuse is refused before any image is decoded."""

from __future__ import annotations

import asyncio
import hashlib
import math
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeVar

import torch
from torch import Tensor

from gramophone.recipe import InvalidRecipeError, Recipe, Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.wire import recipe_from_message
from gramophone_server.config import DECODERS, Limits
from gramophone_server.domain.checkpoint import Checkpoint, InvalidCheckpoint
from gramophone_server.domain.job import StyleJob
from gramophone_server.domain.job_state import JobState, Shape
from gramophone_server.domain.picture_size import MIN_SIDE
from gramophone_server.errors import ImageNotFound, InvalidRequest
from gramophone_server.images import codec, dimensions
from gramophone_server.images.upload_store import Hold, Upload, UploadStore
from gramophone_server.rpc.validation import check_result_size, check_resumed, check_spec, raise_violations
from gramophone_server.scheduling.reservation import Reservation
from gramophone_server.scheduling.scheduler import Scheduler

__all__ = ["Admission", "spec_digest"]

T = TypeVar("T")


@dataclass(eq=False)
class Source:
    """One image of a request."""

    field: str  # "spec.content"
    image: pb.ImageSource
    needed: int  # pixels of the longest side that the job uses
    uploaded: bytes = b""  # the encoded image, if the request names it by its digest

    @property
    def path(self) -> str:
        """The field that is set: "spec.content.data" or "spec.content.digest"."""
        return f"{self.field}.{self.image.WhichOneof('source')}"

    @cached_property
    def data(self) -> bytes:
        """The encoded image. The first access copies it out of its message, 0.2 ms/MiB, so not on the event loop."""
        return self.uploaded or self.image.data


class Admission:
    """Prepares the jobs of requests. It decodes on its own threads; everything else belongs to the event loop."""

    def __init__(self, scheduler: Scheduler, limits: Limits) -> None:
        self.uploads = UploadStore(limits.max_uploads_bytes)
        self._scheduler = scheduler
        self._limits = limits
        self._decoders = ThreadPoolExecutor(DECODERS, "decode")

    def close(self) -> None:
        """Stops the decoding threads."""
        self._decoders.shutdown(wait=False, cancel_futures=True)

    async def prepare(self, spec: pb.JobSpec, reservation: Reservation, deadline_at: float | None = None) -> JobState:
        """The state of a job before its first iteration, or as its checkpoint has it, with decoded images.

        ``deadline_at``, in seconds of the monotonic clock, is when the job must have ended.

        Raises `InvalidRequest` with every violation, including those of the images, `ImageNotFound`,
        `OutOfDeviceMemory`, `DeadlineUnattainable`. The last three are raised before decoding if nothing else is wrong.
        """
        with self.uploads.hold() as held:
            return await self._prepare(spec, held, reservation, deadline_at)

    async def _prepare(
        self, spec: pb.JobSpec, held: Hold, reservation: Reservation, deadline_at: float | None
    ) -> JobState:
        violations = list(check_spec(spec, self._limits, self._scheduler.engine.layers))
        checkpoint = held.find(spec.resume_digest) if spec.resume_digest else None
        recipe, saved = await self._recipe(spec, checkpoint, violations)
        sources, missing = self._sources(spec, recipe, held)
        if not violations:
            missing_checkpoint = spec.resume_digest if checkpoint is None else ""
            if missing or missing_checkpoint:
                raise ImageNotFound(*missing, checkpoint=missing_checkpoint)
            await self._require_capacity(recipe, saved, sources["spec.content"], reservation, deadline_at)
        decoded = await self._decode(sources, violations)
        raise_violations(violations)
        job = StyleJob(
            recipe=recipe,
            content=decoded["spec.content"],
            styles=tuple(decoded[f"spec.styles[{i}].image"] for i in range(len(spec.styles))),
            style_weights=tuple(style.weight if style.HasField("weight") else 1.0 for style in spec.styles),
            start=decoded.get("spec.start_image"),
            seed=saved.seed if saved else spec.seed if spec.HasField("seed") else secrets.randbits(64),
        )
        raise_violations(check_result_size(job))
        state = self._scheduler.engine.admit(job)
        return state if saved is None else await self._restore(saved, job, _resume_path(spec))

    async def digest(self, spec: pb.JobSpec) -> bytes:
        """See `spec_digest`."""
        return await self._in_thread(partial(spec_digest, spec))

    async def keep_upload(self, upload: Upload, owner: str) -> pb.UploadImageResponse:
        """Keeps an image or a checkpoint that has arrived completely. ``owner``: see `UploadStore.keep`.

        Raises `InvalidRequest` if no job could use it, and `ServerBusy`."""
        data = upload.data
        if upload.is_checkpoint:
            checkpoints, max_bytes = self._scheduler.engine.checkpoints, self._limits.max_checkpoint_bytes
            try:
                width, height = await self._in_thread(partial(checkpoints.picture_size, data, max_bytes=max_bytes))
            except InvalidCheckpoint as error:
                raise InvalidRequest([Violation("chunk", f"makes a checkpoint that {error}")]) from None
        else:
            width, height = await self._in_thread(partial(codec.size, data, "chunk", self._limits))
        self.uploads.keep(upload.digest, data, owner)
        return pb.UploadImageResponse(digest=upload.digest, width=width, height=height)

    async def _recipe(
        self, spec: pb.JobSpec, uploaded: bytes | None, violations: list[Violation]
    ) -> tuple[Recipe, Checkpoint | None]:
        """The recipe and the checkpoint, which may be uploaded. An invalid recipe adds to the violations and becomes
        the default one, which also stands for that of an upload that is missing."""
        path = _resume_path(spec)
        try:
            if not spec.HasField("resume") and uploaded is None:
                return recipe_from_message(spec.recipe), None  # `check_spec` reports what is wrong with it
            max_bytes = self._limits.max_checkpoint_bytes
            checkpoints = self._scheduler.engine.checkpoints
            saved = await self._in_thread(lambda: checkpoints.read(uploaded or spec.resume, max_bytes=max_bytes))
        except InvalidRecipeError:
            return Recipe(), None
        except InvalidCheckpoint as error:
            violations.append(Violation(path, str(error)))
            return Recipe(), None
        violations.extend(check_resumed(path, saved.recipe, self._limits, self._scheduler.engine.layers))
        return saved.recipe, saved

    def _sources(self, spec: pb.JobSpec, recipe: Recipe, held: Hold) -> tuple[dict[str, Source], list[str]]:
        """The images that are set and found, by field, and the digests of those that are not found."""
        needed = min(recipe.size, self._limits.max_size)
        needed_style = min(math.ceil(needed * recipe.style_scale), self._limits.max_size)
        fields = [Source("spec.content", spec.content, needed), Source("spec.start_image", spec.start_image, needed)]
        for i, style in enumerate(spec.styles[: self._limits.max_styles]):
            fields.append(Source(f"spec.styles[{i}].image", style.image, needed_style))
        sources: dict[str, Source] = {}
        missing: dict[str, None] = {}  # in the order of the fields, each once
        for source in fields:
            digest = source.image.digest
            if source.image.HasField("digest"):
                uploaded = held.find(digest)
                if uploaded is None:
                    missing[digest] = None
                    continue
                source.uploaded = uploaded
            if source.image.WhichOneof("source"):
                sources[source.field] = source
        return sources, list(missing)

    async def _require_capacity(
        self,
        recipe: Recipe,
        saved: Checkpoint | None,
        content: Source,
        reservation: Reservation,
        deadline_at: float | None,
    ) -> None:
        """Raises `OutOfDeviceMemory` and `DeadlineUnattainable`, estimated from the size in the content image's header.
        If the header has no size, or one that would be refused, the decoder reports it.

        A refusal takes 0.3 ms of the server's time from the start of the call; 1.1 ms with an image of 4.8 MB, of which
        0.8 ms copy its bytes, because protobuf cannot read the first 64 KiB alone."""

        def cost_if_it_fits() -> tuple[int, Shape] | None:
            cost = self._cost(recipe, saved, content)
            if cost is not None:
                self._scheduler.require_memory(cost[1])
            return cost

        cost = await self._in_thread(cost_if_it_fits)
        if cost is not None:
            left_s = math.inf if deadline_at is None else deadline_at - time.monotonic()
            self._scheduler.require_time(reservation, *cost, recipe.time_budget, left_s)

    def _cost(self, recipe: Recipe, saved: Checkpoint | None, content: Source) -> tuple[int, Shape] | None:
        """The pixel-iterations that a job has left, and its largest shape; None without a size in the header."""
        width, height = dimensions.size(content.data) or (0, 0)
        if min(width, height) < MIN_SIDE or width * height > self._limits.max_image_pixels:
            return None
        picture = torch.empty((3, height, width), dtype=torch.uint8, device="meta")  # has a shape and no memory
        job = StyleJob(recipe=recipe, content=picture, styles=(), style_weights=(), start=None, seed=0)
        state = JobState(job)
        if saved is not None:
            state.scale_index, state.done = saved.counts["scale_index"], saved.counts["done"]
        result_width, result_height = job.result_size
        if min(result_width, result_height) < MIN_SIDE or state.scale_index >= len(state.scales):
            return None
        return state.pixel_iterations_left, Shape.of(recipe, result_height, result_width)

    async def _decode(self, sources: Mapping[str, Source], violations: list[Violation]) -> dict[str, Tensor]:
        """The decoded images by field, without those that have violations."""

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

    async def _restore(self, saved: Checkpoint, job: StyleJob, path: str) -> JobState:
        """The state of the job in its checkpoint, which has this path. On a thread, because the images are hashed."""
        try:
            state = await self._in_thread(partial(saved.restore, job))
        except InvalidCheckpoint as error:
            raise InvalidRequest([Violation(path, str(error))]) from None
        if state.finished:
            finished = f"is of a job that has done all of its {state.iterations} iterations"
            description = f"{finished}, so there is nothing to resume; its picture is the result"
            raise InvalidRequest([Violation(path, description)])
        return state

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._decoders, function)


def spec_digest(spec: pb.JobSpec) -> bytes:
    """A digest of everything in a spec but its frame and checkpoint options. 0.5 ms/MiB, most of it without the GIL.

    An image or a checkpoint in the spec counts as one that is named by its digest: the bytes are the same.
    """
    reduced = pb.JobSpec()
    reduced.CopyFrom(spec)
    reduced.ClearField("frames")
    reduced.ClearField("checkpoints")
    # This is also much faster than serializing the bytes, which holds the GIL.
    for image in (reduced.content, reduced.start_image, *(style.image for style in reduced.styles)):
        if image.HasField("data"):
            image.digest = _digest(image.data)
    if reduced.HasField("resume"):
        reduced.resume_digest = _digest(reduced.resume)
        reduced.ClearField("resume")
    return hashlib.sha256(reduced.SerializeToString(deterministic=True)).digest()


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _resume_path(spec: pb.JobSpec) -> str:
    return "spec.resume" if spec.HasField("resume") else "spec.resume_digest"
