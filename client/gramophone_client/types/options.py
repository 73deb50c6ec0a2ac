"""What a caller asks for: images, styles, frames, checkpoints, and the options of a job."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from PIL import Image

from gramophone.recipe import RecipeOverrides
from gramophone_client.types.picture import Format
from gramophone_client.types.updates import Checkpoint

__all__ = ["CheckpointOptions", "FrameOptions", "ImageInput", "JobOptions", "Style", "Styles", "UploadedImage"]


@dataclass(frozen=True, kw_only=True)
class UploadedImage:
    """An image that `upload` has sent. It can be used in place of any image, and jobs then contain its digest only.

    It holds the image's bytes, so that the client can upload it again if the server has evicted it or another server
    gets the job.
    """

    digest: str
    width: int  # of the decoded image, in pixels
    height: int
    data: bytes = field(repr=False)


ImageInput = str | os.PathLike[str] | bytes | Image.Image | UploadedImage
"""A path, the bytes of a JPEG, PNG or WebP file, a PIL image, or a value that `upload` returned."""


class Style(NamedTuple):
    """A style image and its weight in the blend, relative to the other styles: above 0 and at most 1000."""

    image: ImageInput
    weight: float = 1.0


Styles = ImageInput | Style | Sequence[ImageInput | Style]
"""One or several style images. An image without a weight has weight 1."""


@dataclass(frozen=True, kw_only=True)
class FrameOptions:
    """Which intermediate pictures a stream sends, and how they are encoded.

    FrameOptions(every_iterations=10, max_side=360)
    """

    every_iterations: int = 0  # a frame only every so many iterations; 0: after any iteration
    min_interval_s: float = 0.0  # between two frames, at most an hour; the server raises it to at least 0.1 s
    max_side: int = 0  # pixels; larger pictures are reduced; 0: no picture is
    format: Format = "jpeg"
    quality: int = 85  # of JPEG and WebP, 1 to 100
    # Frames in flight without an acknowledgement, 1 to 16; only for `control`. 0: as many as the connection holds
    max_in_flight: int = 0


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """How often a stream sends the job's state, from which the job can continue on any server."""

    every_s: float = 5.0  # at most an hour; the server raises it to at least 1 s
    # Only the picture and the iteration: 3 bytes per pixel instead of 48 with Adam or 276 with L-BFGS, but the
    # optimiser restarts. A job continues from a full checkpoint bit for bit. The server sends a light one in place of a
    # full one that is larger than its limit.
    light: bool = True


class JobOptions(RecipeOverrides, total=False):
    """The options of a job that are not its images: the keyword arguments of `job_spec`, which explains them, and the
    fields of a recipe."""

    preset: str | None
    seed: int | None
    start_image: ImageInput | None
    result_format: Format
    result_quality: int
    detach_grace: float | None
    resume: Checkpoint | bytes | str | os.PathLike[str] | None
