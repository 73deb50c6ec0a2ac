"""What a caller asks for: images, styles, frames, checkpoints, and the options of a job."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, SupportsFloat, SupportsIndex, TypeAlias, TypedDict

from PIL import Image

from gramophone.recipe import Layers, PresetName, RecipeOverrides
from gramophone.values import own_values, shown
from gramophone_client.types.picture import Format
from gramophone_client.types.updates import Checkpoint

__all__ = [
    "OPTIONS",
    "Array",
    "BinaryFile",
    "Changes",
    "CheckpointOptions",
    "FileInput",
    "FrameOptions",
    "ImageInput",
    "JobOptions",
    "Option",
    "Style",
    "Styles",
    "UploadedImage",
]


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


class BinaryFile(Protocol):
    """A file that is open for reading bytes. It is read once, from its current position to its end."""

    def read(self) -> bytes:
        """All bytes from the current position on."""


class Array(Protocol):
    """An array of numpy, or of another package with numpy's interface."""

    @property
    def __array_interface__(self) -> dict[str, Any]: ...


FileInput: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryFile
"""A file: its path, its bytes, or the file itself, open for reading bytes."""

ImageInput: TypeAlias = FileInput | Array | Image.Image | UploadedImage
"""A JPEG, PNG or WebP file (its path, its bytes, or an open file), a uint8 array of shape (H, W), (H, W, 1), (H, W, 3)
in the order red, green, blue, or (H, W, 4) with transparency, a PIL image, or a value that `upload` returned."""


class Style(NamedTuple):
    """A style image and its weight in the blend, relative to the other styles: above 0 and at most 1000."""

    image: ImageInput
    weight: float = 1.0

    def __repr__(self) -> str:
        is_short = isinstance(self.image, str | os.PathLike | UploadedImage)
        return f"Style({repr(self.image) if is_short else shown(self.image)}, weight={self.weight!r})"


Styles: TypeAlias = (
    ImageInput | Style | tuple[ImageInput, SupportsFloat] | Sequence[ImageInput | tuple[ImageInput, SupportsFloat]]
)
"""One or several style images, each alone or in a `Style`, or another pair, with its weight. An image without a weight
has weight 1."""


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

    def __repr__(self) -> str:
        return own_values(self)


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """How often a stream sends the job's state, from which the job can continue on any server."""

    every_s: float = 5.0  # at most an hour; the server raises it to at least 1 s
    # Only the picture and the iteration: 3 bytes per pixel instead of 48 with Adam or 276 with L-BFGS, but the
    # optimiser restarts. A job continues from a full checkpoint bit for bit. The server sends a light one in place of a
    # full one that is larger than its limit.
    light: bool = True

    def __repr__(self) -> str:
        return own_values(self)


class JobOptions(RecipeOverrides, total=False):
    """The options of a job that are not its images: the keyword arguments that `OPTIONS` explains, and the fields of a
    recipe."""

    preset: PresetName | str | None  # the names are for editors
    seed: int | SupportsIndex | None
    start_image: ImageInput | None
    result_format: Format
    result_quality: int | SupportsIndex
    detach_grace: float | None
    resume: Checkpoint | FileInput | None


class Option(NamedTuple):
    """The default and the meaning of an option that is not a field of a recipe."""

    default: Any
    help: str


OPTIONS: Mapping[str, Option] = {
    "preset": Option("fast", "the recipe, whose fields the other options override: fast, quality or textbook"),
    "seed": Option(None, "seed of the noise, 0 to 2**64-1; None: chosen by the server"),
    "start_image": Option(None, "picture to start from"),
    "result_format": Option("png", "encoding of the result: jpeg, png or webp"),
    "result_quality": Option(95, "quality of a JPEG or WebP result, 1 to 100"),
    "detach_grace": Option(
        None, "seconds for which the job continues, or waits, without a client that watches it; None: 0"
    ),
    "resume": Option(
        None,
        "a Checkpoint of a job with the same images, its bytes or a file of them; it has the recipe, the seed and the "
        "picture to start from, so these cannot be given with it",
    ),
}


class Changes(TypedDict, total=False):
    """The fields of a recipe that a running job's controller can change, in the forms of `RecipeOverrides`."""

    alpha: float | SupportsFloat
    beta: float | SupportsFloat
    tv_weight: float | SupportsFloat
    step: float | SupportsFloat
    content_layers: Layers  # all layers of the job, in the order of its recipe
    style_layers: Layers
    iterations: int | SupportsIndex  # at the final size, including those that are done there
