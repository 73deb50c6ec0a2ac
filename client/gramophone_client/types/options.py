"""What a caller asks for beside the recipe."""

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
    """An image that `upload` has sent: usable wherever an image is, and jobs then carry its digest only.

    It holds the image's bytes, because a server may forget it, or another one take the job: then it is sent again.
    """

    digest: str
    width: int  # as it will be decoded, in pixels
    height: int
    data: bytes = field(repr=False)


ImageInput = str | os.PathLike[str] | bytes | Image.Image | UploadedImage
"""A path, the bytes of a JPEG, PNG or WebP file, a PIL image, or what `upload` returned."""


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
    # Frames on their way that have not arrived yet, 1 to 16; only for `control`. 0: as many as the connection holds
    max_in_flight: int = 0


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """How often a stream carries the job's state, from which it can go on, there or on another server."""

    every_s: float = 5.0  # at most an hour; the server holds it at 1 s or more
    # The picture and the iteration only: 3 bytes a pixel instead of 48 with Adam or 276 with L-BFGS, and the optimiser
    # begins anew. A full one goes on bit for bit; where it is larger than the server's limit, a light one comes instead.
    light: bool = True


class JobOptions(RecipeOverrides, total=False):
    """What else a job can be told: the keyword arguments of `job_spec`, for the methods that pass them on."""

    preset: str | None
    seed: int | None
    start_image: ImageInput | None
    result_format: Format
    result_quality: int
    detach_grace: float | None
    resume: Checkpoint | bytes | str | os.PathLike[str] | None
