"""From what a caller has (paths, bytes, PIL images, keyword arguments) to the `JobSpec` of a request."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, Unpack

from google.protobuf.duration_pb2 import Duration
from PIL import Image, ImageOps

from gramophone.recipe import InvalidRecipe, RecipeOverrides, Start
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.wire import overrides_to_message
from gramophone_client.errors import InvalidRequest
from gramophone_client.picture import Format

__all__ = ["FrameOptions", "ImageInput", "JobOptions", "Style", "Styles", "job_spec", "watch_request"]

ImageInput = str | os.PathLike[str] | bytes | Image.Image
"""A path, the bytes of a JPEG, PNG or WebP file, or a PIL image."""


class Style(NamedTuple):
    """A style image and its share in the blend, above 0 and at most 1000, relative to the others."""

    image: ImageInput
    weight: float = 1.0


Styles = ImageInput | Style | Sequence[ImageInput | Style]


@dataclass(frozen=True, kw_only=True)
class FrameOptions:
    """Which pictures a stream carries while the result forms.  FrameOptions(every_iterations=10, max_side=360)"""

    every_iterations: int = 0  # only every so many; 0: any
    min_interval_s: float = 0.0  # at most an hour; the server holds it at 0.1 s or more
    max_side: int = 0  # pixels; larger pictures are reduced, 0: none is
    format: Format = "jpeg"
    quality: int = 85  # of JPEG and WebP, 1 to 100


class JobOptions(RecipeOverrides, total=False):
    """What else a job can be told: the keyword arguments of `job_spec`, for the methods that pass them on."""

    preset: str
    seed: int | None
    start_image: ImageInput | None
    result_format: Format
    result_quality: int
    detach_grace: float | None


def job_spec(
    content: ImageInput,
    styles: Styles,
    *,
    frames: FrameOptions | None = None,
    preset: str = "fast",
    seed: int | None = None,
    start_image: ImageInput | None = None,
    result_format: Format = "png",
    result_quality: int = 95,
    detach_grace: float | None = None,
    **overrides: Unpack[RecipeOverrides],
) -> pb.JobSpec:
    """The message; reads files, so it may block.

    `seed` (0 to 2**64 - 1) fixes the noise; None lets the server choose one. The picture starts from `start_image`, if
    given. `result_quality`, 1 to 100, is that of JPEG and WebP. For `detach_grace` seconds the job goes on, or waits,
    with nobody watching; without, it stops at once. `overrides` are the fields of the recipe that differ from the
    preset.

    Raises `InvalidRequest` for an unknown preset or recipe field and for a value that its field cannot hold, OSError for
    a file that cannot be read. Everything else is the server's to judge.
    """
    if start_image is not None:
        overrides.setdefault("start", Start.IMAGE)
    with _as_invalid_request():
        spec = pb.JobSpec(
            recipe=overrides_to_message(overrides, preset),
            frames=_frame_options(frames) if frames is not None else None,
            result_format=f"IMAGE_FORMAT_{result_format.upper()}",
            result_quality=result_quality,
            seed=seed,
            detach_grace=_duration(detach_grace) if detach_grace is not None else None,
        )
    spec.content.CopyFrom(_source(content))
    for image, weight in _listed(styles):
        spec.styles.add(image=_source(image), weight=weight)
    if start_image is not None:
        spec.start_image.CopyFrom(_source(start_image))
    return spec


@contextmanager
def _as_invalid_request() -> Iterator[None]:
    try:
        yield
    except InvalidRecipe as error:
        raise InvalidRequest(str(error), violations=error.violations) from error
    except (ValueError, OverflowError) as error:  # protobuf, of a number that is too large or an unknown enum name
        raise InvalidRequest(f"the request cannot be said: {error}") from error


def watch_request(job_id: str, after_sequence: int, frames: FrameOptions | None) -> pb.WatchJobRequest:
    """The message that asks for what happens to a job. Raises `InvalidRequest` for a value that its field cannot hold."""
    with _as_invalid_request():
        return pb.WatchJobRequest(
            job_id=job_id,
            after_sequence=after_sequence,
            frames=_frame_options(frames) if frames is not None else None,
        )


def _frame_options(frames: FrameOptions) -> pb.FrameOptions:
    return pb.FrameOptions(
        every_iterations=frames.every_iterations,
        min_interval=_duration(frames.min_interval_s),
        max_side=frames.max_side,
        format=f"IMAGE_FORMAT_{frames.format.upper()}",
        quality=frames.quality,
    )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromTimedelta(timedelta(seconds=seconds))
    return duration


def _listed(styles: Styles) -> list[Style]:
    if isinstance(styles, Style):
        return [styles]
    if isinstance(styles, str | bytes | os.PathLike | Image.Image):
        return [Style(styles)]
    return [style if isinstance(style, Style) else Style(style) for style in styles]


def _source(image: ImageInput) -> pb.ImageSource:
    if isinstance(image, Image.Image):
        return pb.ImageSource(data=_as_png(image))
    if isinstance(image, bytes):
        return pb.ImageSource(data=image)
    return pb.ImageSource(data=Path(image).read_bytes())


def _as_png(image: Image.Image) -> bytes:
    upright = ImageOps.exif_transpose(image)
    if upright.mode not in {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}:  # the others are not PNG's
        upright = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
    out = io.BytesIO()
    upright.save(out, "png", compress_level=1)  # level 6 takes four times as long for a tenth less
    return out.getvalue()
