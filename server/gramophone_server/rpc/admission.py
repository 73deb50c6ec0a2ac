"""From a request to a job that can be queued. Whatever is cheap to refuse is refused before any image is decoded."""

from __future__ import annotations

import hashlib
import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from gramophone.recipe import Recipe, Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.wire import recipe_from_message
from gramophone_server.config import Limits
from gramophone_server.domain.checkpoint import Checkpoint, InvalidCheckpoint
from gramophone_server.domain.job import StyleJob
from gramophone_server.domain.job_state import JobState, Shape
from gramophone_server.errors import ImageNotFound, InvalidRequest
from gramophone_server.images.containers import UnusableImage
from gramophone_server.images.decoders import Decoders
from gramophone_server.images.decoding import Header, read_header, upright_size
from gramophone_server.images.upload_store import Hold, StoredFile, Upload, UploadStore
from gramophone_server.rpc.byte_budget import ByteBudget
from gramophone_server.rpc.job_images import DecodedShare, JobImages, Source
from gramophone_server.rpc.responses import result_encoding
from gramophone_server.rpc.validation import check_result_size, check_resumed, check_spec, raise_violations
from gramophone_server.scheduling.reservation import Reservation
from gramophone_server.scheduling.scheduler import Scheduler

__all__ = ["Admission", "spec_digest"]

# Bytes of tensors for each byte of a checkpoint: a light one has a byte for a value of float32.
CHECKPOINT_BYTES = 4


class Admission:
    """Prepares the jobs of requests. Belongs to the event loop; what takes long is done on threads and in processes."""

    def __init__(self, scheduler: Scheduler, limits: Limits) -> None:
        self.uploads = UploadStore(limits.max_uploads_bytes)
        self._scheduler = scheduler
        self._limits = limits
        self._decoders = Decoders(limits)
        self._images = JobImages(limits, self._decoders, scheduler.retry_after_s)

    @property
    def decoded(self) -> ByteBudget:
        """The bytes of the decoded images of all jobs, and the room for those that are being decoded."""
        return self._images.budget

    @property
    def decoders(self) -> Decoders:
        """The threads and processes that decode the images."""
        return self._decoders

    def start(self) -> None:
        """Starts the processes that decode large images, so that the first ones do not wait for them."""
        self._decoders.start()

    def close(self) -> None:
        """Stops the threads and the processes."""
        self._decoders.close()

    async def prepare(
        self,
        spec: pb.JobSpec,
        reservation: Reservation,
        deadline_at: float | None = None,
        owner: str = "",
        size: int = 0,
    ) -> JobState:
        """The state of a job before its first iteration, or as its checkpoint has it, with decoded images.

        What is cheaper to find is refused first: the spec and the headers of the images, then the checkpoint, the
        device's memory and the time, the room for the pictures, and at last what only decoding shows. ``deadline_at``,
        in seconds of the monotonic clock, is when the job must have ended. ``owner``: the connection, whose turn it
        is to decode. ``size``: the bytes of the request.

        Raises `InvalidRequest` with all violations of the first of these groups that has any, `ImageNotFound`,
        `OutOfDeviceMemory`, `DeadlineUnattainable`, `ServerBusy`. If it is cancelled, decoding ends.
        """
        with self.uploads.hold(owner) as held, self._images.room(owner) as room:
            return await self._prepare(spec, held, room, reservation, deadline_at, owner, size)

    async def _prepare(
        self,
        spec: pb.JobSpec,
        held: Hold,
        room: DecodedShare,
        reservation: Reservation,
        deadline_at: float | None,
        owner: str,
        size: int,
    ) -> JobState:
        violations = list(check_spec(spec, self._limits, self._scheduler.engine.layers))
        sources, missing = self._sources(spec, held)
        resumes = spec.HasField("resume") or bool(spec.resume_digest)

        def read() -> JobState | None:
            violations.extend(self._images.read_headers(sources))
            if violations or missing or resumes:
                return None
            return self._expected_state(recipe_from_message(spec.recipe), None, sources)

        # Also with violations, so that those of the images come with them. Headers of uploads are known, so a request
        # of a few bytes causes no reading of megabytes.
        expected = await self._decoders.quickly(read, owner, size)
        raise_violations(violations)
        checkpoint = held.find(spec.resume_digest) if spec.resume_digest else None
        missing_checkpoint = spec.resume_digest if checkpoint is None else ""
        if missing or missing_checkpoint:
            keeps_none = not self._limits.max_uploads_bytes
            raise ImageNotFound(*missing, checkpoint=missing_checkpoint, keeps_none=keeps_none)
        saved = await self._read_checkpoint(spec, checkpoint, room, owner, size) if resumes else None
        if saved is not None:
            expected = await self._decoders.quickly(
                partial(self._expected_state, saved.recipe, saved, sources), owner, 0
            )
        assert expected is not None, "it is expected from a recipe or a checkpoint"
        self._require_time(spec, expected, sources, reservation, deadline_at, owner)
        recipe = expected.recipe
        room.take(self._images.decoded_bytes(sources, recipe))
        decoded = await self._images.decode(sources, recipe, owner)
        for field, image in decoded.items():
            self._scheduler.record_decoding(_pixels(sources[field]), image.seconds)
        content, start = decoded["spec.content"], decoded.get("spec.start_image")
        styles = [decoded[f"spec.styles[{i}].image"] for i in range(len(spec.styles))]
        job = StyleJob(
            recipe=recipe,
            content=content.picture,
            styles=tuple(style.picture for style in styles),
            style_weights=tuple(style.weight if style.HasField("weight") else 1.0 for style in spec.styles),
            start=start.picture if start is not None else None,
            seed=saved.seed if saved else spec.seed if spec.HasField("seed") else secrets.randbits(64),
        )
        job.set_digests(content.digest, tuple(style.digest for style in styles))
        pictures = (image.picture for image in decoded.values())
        room.keep_until_freed(job, sum(tensor.nbytes for tensor in (*pictures, *_tensors(saved))))
        raise_violations(check_result_size(job, self._limits))
        state = self._scheduler.engine.admit(job)
        return state if saved is None else self._restore(saved, job, _resume_path(spec))

    async def digest(self, spec: pb.JobSpec, owner: str, size: int) -> bytes:
        """See `spec_digest`. ``size``: the bytes of the request."""
        return await self._decoders.run(partial(spec_digest, spec), owner, size)

    async def keep_upload(self, upload: Upload, owner: str) -> pb.UploadImageResponse:
        """Keeps an image or a checkpoint that has arrived completely. ``owner``: see `UploadStore.keep`.

        Raises `InvalidRequest` if no job could use it, and `ServerBusy`."""
        data = upload.data

        def read_checkpoint() -> tuple[None, tuple[int, int]]:
            checkpoints, max_bytes = self._scheduler.engine.checkpoints, self._limits.max_checkpoint_bytes
            return None, checkpoints.picture_size(data, max_bytes=max_bytes)

        def read_image() -> tuple[Header, tuple[int, int]]:
            header = read_header(data, self._limits)
            return header, upright_size(data, header)

        read: Callable[[], tuple[Header | None, tuple[int, int]]]
        read = read_checkpoint if upload.is_checkpoint else read_image
        try:
            header, (width, height) = await self._decoders.quickly(read, owner, len(data))
        except InvalidCheckpoint as error:
            raise InvalidRequest([Violation("chunk", f"makes a checkpoint that {error}")]) from None
        except UnusableImage as error:
            raise InvalidRequest([Violation("chunk", str(error))]) from None
        self.uploads.keep(upload.digest, data, owner, header)
        return pb.UploadImageResponse(digest=upload.digest, width=width, height=height)

    async def _read_checkpoint(
        self, spec: pb.JobSpec, uploaded: StoredFile | None, room: DecodedShare, owner: str, request_size: int
    ) -> Checkpoint:
        """The checkpoint in the request of this size, or the uploaded one. Raises `InvalidRequest` and `ServerBusy`."""
        path = _resume_path(spec)
        # One in a message is copied out of it when it is read, 0.2 ms/MiB, so on a thread.
        read: Callable[[], bytes] = (lambda: spec.resume) if uploaded is None else (lambda: uploaded.data)
        size = await self._decoders.quickly(lambda: len(read()), owner, request_size if uploaded is None else 0)
        room.take(CHECKPOINT_BYTES * min(size, self._limits.max_checkpoint_bytes))
        checkpoints, max_bytes = self._scheduler.engine.checkpoints, self._limits.max_checkpoint_bytes
        try:
            saved = await self._decoders.run(lambda: checkpoints.read(read(), max_bytes=max_bytes), owner, size)
        except InvalidCheckpoint as error:
            raise InvalidRequest([Violation(path, str(error))]) from None
        raise_violations(check_resumed(path, saved.recipe, self._limits, self._scheduler.engine.layers))
        return saved

    def _sources(self, spec: pb.JobSpec, held: Hold) -> tuple[dict[str, Source], list[str]]:
        """The images that are set and found, by field, and the digests of those that are not found."""
        fields = [Source("spec.content", spec.content), Source("spec.start_image", spec.start_image)]
        for i, style in enumerate(spec.styles[: self._limits.max_styles]):
            fields.append(Source(f"spec.styles[{i}].image", style.image))
        sources: dict[str, Source] = {}
        missing: dict[str, None] = {}  # in the order of the fields, each once
        for source in fields:
            digest = source.image.digest
            if source.image.HasField("digest"):
                source.uploaded = held.find(digest)
                if source.uploaded is None:
                    missing[digest] = None
                    continue
                source.header = source.uploaded.header
            if source.image.WhichOneof("source"):
                sources[source.field] = source
        return sources, list(missing)

    def _require_time(
        self,
        spec: pb.JobSpec,
        expected: JobState,
        sources: Mapping[str, Source],
        reservation: Reservation,
        deadline_at: float | None,
        owner: str,
    ) -> None:
        """Raises `DeadlineUnattainable`. A refusal takes 0.3 ms of the server's time from the start of the call, and
        0.2 ms/MiB of the images to copy them out of the message and read their headers."""
        if expected.scale_index >= len(expected.scales):
            return  # its checkpoint does not fit it: `_restore` refuses it
        left_s = math.inf if deadline_at is None else deadline_at - time.monotonic()
        image_pixels = max(map(_pixels, sources.values()))  # they are decoded side by side
        result_kind = result_encoding(spec).format.name
        self._scheduler.require_time(reservation, expected, left_s, image_pixels, result_kind, owner)

    def _expected_state(self, recipe: Recipe, saved: Checkpoint | None, sources: Mapping[str, Source]) -> JobState:
        """The state that a job will have, without its images: for estimates, from the header of the content image.

        Raises `OutOfDeviceMemory`, and `InvalidRequest` if that image is too thin for the recipe. For a thread, because
        where ops run through torch's library, a shape that is seen for the first time takes 20 ms.
        """
        header = sources["spec.content"].header
        assert header is not None, "all headers are read, and valid"
        # Has a shape and no memory.
        picture = torch.empty((3, header.height, header.width), dtype=torch.uint8, device="meta")
        job = StyleJob(recipe=recipe, content=picture, styles=(), style_weights=(), start=None, seed=0)
        raise_violations(check_result_size(job, self._limits))
        state = JobState(job)
        if saved is not None:
            state.scale_index, state.done = saved.counts["scale_index"], saved.counts["done"]
        if state.scale_index < len(state.scales):
            width, height = job.result_size
            self._scheduler.require_memory(Shape.of(recipe, height, width), state.shape)
        return state

    def _restore(self, saved: Checkpoint, job: StyleJob, path: str) -> JobState:
        """The state of the job in its checkpoint, which has this path."""
        try:
            state = saved.restore(job)
        except InvalidCheckpoint as error:
            raise InvalidRequest([Violation(path, str(error))]) from None
        if state.finished:
            finished = f"is of a job that has done all of its {state.iterations} iterations"
            description = f"{finished}, so there is nothing to resume; its picture is the result"
            raise InvalidRequest([Violation(path, description)])
        return state


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


def _pixels(source: Source) -> int:
    header = source.header
    assert header is not None, "all headers are read, and valid"
    return header.pixels


def _tensors(saved: Checkpoint | None) -> Iterable[Tensor]:
    """The tensors of a checkpoint, each once."""
    return () if saved is None else {id(tensor): tensor for tensor in saved.tensors.values()}.values()


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _resume_path(spec: pb.JobSpec) -> str:
    return "spec.resume" if spec.HasField("resume") else "spec.resume_digest"
