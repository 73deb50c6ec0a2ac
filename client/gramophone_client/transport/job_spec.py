"""Builds the `JobSpec` of a request from what a caller gives: paths, bytes, PIL images, keyword arguments."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Unpack

from google.protobuf.duration_pb2 import Duration
from PIL import Image, ImageOps

from gramophone.recipe import InvalidRecipeError, RecipeOverrides, Start, Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.wire import overrides_to_message
from gramophone_client.errors import InvalidRequestError
from gramophone_client.types.options import (
    CheckpointOptions,
    FrameOptions,
    ImageInput,
    Style,
    Styles,
    UploadedImage,
)
from gramophone_client.types.picture import Format
from gramophone_client.types.updates import Checkpoint

__all__ = ["as_invalid_request", "image_bytes", "job_spec", "resumed_spec", "uploaded_images", "watch_request"]


def job_spec(
    content: ImageInput,
    styles: Styles,
    *,
    frames: FrameOptions | None = None,
    checkpoints: CheckpointOptions | None = None,
    preset: str | None = None,
    seed: int | None = None,
    start_image: ImageInput | None = None,
    result_format: Format = "png",
    result_quality: int = 95,
    detach_grace: float | None = None,
    resume: Checkpoint | bytes | str | os.PathLike[str] | None = None,
    **overrides: Unpack[RecipeOverrides],
) -> pb.JobSpec:
    """The message that describes a job. Reads files, so it may block.

    `preset` is "fast" by default. `seed` (0 to 2**64 - 1) fixes the noise; None lets the server choose one. The picture
    starts from `start_image`, if given. `result_quality`, 1 to 100, is that of JPEG and WebP. A job without a watcher
    continues, or waits, for `detach_grace` seconds; without `detach_grace` it stops at once. `overrides` are the fields
    of the recipe that differ from the preset.

    `resume`, a `Checkpoint` of a job with the same images, its bytes or a file of them, continues that job from there.
    It determines the recipe, the seed and the picture to start from, so none of them can be given with it.

    Raises `InvalidRequestError` for an unknown preset or recipe field and for a value that its field cannot hold,
    OSError for a file that cannot be read. The server checks everything else.
    """
    if resume is not None:
        _check_resumable(preset=preset, seed=seed, start_image=start_image, **overrides)
    if start_image is not None:
        overrides.setdefault("start", Start.IMAGE)
    with as_invalid_request():
        spec = pb.JobSpec(
            recipe=overrides_to_message(overrides, preset or "fast") if resume is None else None,
            frames=_frame_options(frames) if frames is not None else None,
            checkpoints=_checkpoint_options(checkpoints) if checkpoints is not None else None,
            result_format=f"IMAGE_FORMAT_{result_format.upper()}",
            result_quality=result_quality,
            seed=seed,
            detach_grace=_duration(detach_grace) if detach_grace is not None else None,
        )
    spec.content.CopyFrom(_image_source(content))
    for image, weight in _as_styles(styles):
        spec.styles.add(image=_image_source(image), weight=weight)
    if start_image is not None:
        spec.start_image.CopyFrom(_image_source(start_image))
    if resume is not None:
        spec.resume = _checkpoint_bytes(resume)
    return spec


def resumed_spec(spec: pb.JobSpec, seed: int, checkpoint: Checkpoint | None) -> pb.JobSpec:
    """The same job again: from the checkpoint, or from its start with the seed that it had."""
    resumed = pb.JobSpec()
    resumed.CopyFrom(spec)
    if checkpoint is not None:
        for name in ("recipe", "start_image", "seed"):
            resumed.ClearField(name)
        resumed.resume = checkpoint.data
    elif not resumed.HasField("resume"):
        resumed.seed = seed
    return resumed


def uploaded_images(
    content: ImageInput, styles: Styles, start_image: ImageInput | None = None
) -> tuple[UploadedImage, ...]:
    """The images of a job that its spec names by digest only. Their bytes are not in the spec."""
    images = (content, *(style.image for style in _as_styles(styles)), start_image)
    return tuple(image for image in images if isinstance(image, UploadedImage))


@contextmanager
def as_invalid_request() -> Iterator[None]:
    """Raises `InvalidRequestError` for values in the block that a message cannot hold."""
    try:
        yield
    except InvalidRecipeError as error:
        raise InvalidRequestError(str(error), violations=error.violations) from error
    except (ValueError, OverflowError) as error:  # protobuf: a number too large, an unknown enum name
        raise InvalidRequestError(f"a value does not fit into the request: {error}") from error


def watch_request(
    job_id: str, after_sequence: int, frames: FrameOptions | None, checkpoints: CheckpointOptions | None
) -> pb.WatchJobRequest:
    """The message that asks for a job's events. Raises `InvalidRequestError` for a value that its field cannot hold."""
    with as_invalid_request():
        return pb.WatchJobRequest(
            job_id=job_id,
            after_sequence=after_sequence,
            frames=_frame_options(frames) if frames is not None else None,
            checkpoints=_checkpoint_options(checkpoints) if checkpoints is not None else None,
        )


def image_bytes(image: ImageInput) -> bytes:
    """The bytes of an image file; reads the file, so it may block."""
    if isinstance(image, UploadedImage):
        return image.data
    if isinstance(image, Image.Image):
        return _as_png(image)
    return image if isinstance(image, bytes) else Path(image).read_bytes()


def _check_resumable(**options: object) -> None:
    """Raises `InvalidRequestError` if an option is set that the checkpoint determines."""
    names = [name for name, value in options.items() if value is not None]
    if names:
        rule = "cannot be given with resume: the job continues with the checkpoint's"
        violations = tuple(Violation(name, rule) for name in names)
        raise InvalidRequestError("; ".join(f"{name}: {rule}" for name in names), violations=violations)


def _checkpoint_bytes(resume: Checkpoint | bytes | str | os.PathLike[str]) -> bytes:
    if isinstance(resume, Checkpoint):
        return resume.data
    data = resume if isinstance(resume, bytes) else Path(resume).read_bytes()
    if not data:
        source = "the bytes are" if isinstance(resume, bytes) else f"{os.fspath(resume)} is"
        raise InvalidRequestError(f"resume: {source} empty, and not a checkpoint")
    return data


def _checkpoint_options(checkpoints: CheckpointOptions) -> pb.CheckpointOptions:
    return pb.CheckpointOptions(min_interval=_duration(checkpoints.every_s), light=checkpoints.light)


def _frame_options(frames: FrameOptions) -> pb.FrameOptions:
    return pb.FrameOptions(
        every_iterations=frames.every_iterations,
        min_interval=_duration(frames.min_interval_s),
        max_side=frames.max_side,
        format=f"IMAGE_FORMAT_{frames.format.upper()}",
        quality=frames.quality,
        max_in_flight=frames.max_in_flight,
    )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromTimedelta(timedelta(seconds=seconds))
    return duration


def _as_styles(styles: Styles) -> list[Style]:
    if isinstance(styles, Style):
        return [styles]
    if isinstance(styles, str | bytes | os.PathLike | Image.Image | UploadedImage):
        return [Style(styles)]
    return [style if isinstance(style, Style) else Style(style) for style in styles]


def _image_source(image: ImageInput) -> pb.ImageSource:
    if isinstance(image, UploadedImage):
        return pb.ImageSource(digest=image.digest)
    return pb.ImageSource(data=image_bytes(image))


def _as_png(image: Image.Image) -> bytes:
    upright = ImageOps.exif_transpose(image)
    if upright.mode not in {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}:  # PNG has no other modes
        upright = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
    out = io.BytesIO()
    upright.save(out, "png", compress_level=1)  # level 6 takes four times as long for a tenth less
    return out.getvalue()
