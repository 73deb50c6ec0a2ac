"""The engine's input and output as plain values, which the scheduler and the servicer can hold without an engine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from gramophone.recipe import Recipe
from gramophone_server.domain.byte_copies import memory_of
from gramophone_server.domain.picture_size import MIN_SIDE, fit, style_size

__all__ = ["Losses", "Report", "Scale", "StyleJob", "digest", "ran_out_of_memory"]


class Scale(NamedTuple):
    """One size of a job's picture in pixels, and the iterations at it."""

    width: int
    height: int
    iterations: int


def digest(image: Tensor) -> bytes:
    """The sha256 of a uint8 image on the CPU and its shape; takes 2 ms for a megapixel."""
    image = image.contiguous()
    sha256 = hashlib.sha256(repr(tuple(image.shape)).encode())
    sha256.update(memory_of(image))
    return sha256.digest()


@dataclass(frozen=True, eq=False, kw_only=True)
class StyleJob:
    """One picture to make. Images are uint8 [3, height, width], RGB, on the CPU, of any size."""

    recipe: Recipe
    content: Tensor
    styles: tuple[Tensor, ...]
    style_weights: tuple[float, ...]  # one per style, greater than 0; only their proportions matter
    start: Tensor | None  # the first picture, with Start.IMAGE; else None
    seed: int  # of the noise, 0 to 2**64 - 1

    @property
    def result_size(self) -> tuple[int, int]:
        """(width, height) of the finished picture in pixels."""
        return fit(self.content.shape[2], self.content.shape[1], self.recipe.size)

    @property
    def scales(self) -> tuple[Scale, ...]:
        """The scales, coarsest first; the last is the result's.

        Coarse scales whose shorter side would be less than `MIN_SIDE` are left out, so a thin picture can have
        fewer scales than its recipe.
        """
        _, height, width = self.content.shape
        *coarse, final = (fit(width, height, longest) for longest in self.recipe.scale_sizes())
        coarse_scales = [Scale(*size, self.recipe.coarse_iterations) for size in coarse if min(size) >= MIN_SIDE]
        return (*coarse_scales, Scale(*final, self.recipe.iterations))

    def style_sizes(self, longest_side: int) -> list[tuple[int, int]]:
        """(width, height) at which the network sees each style image, for a picture with this longest side; pixels."""
        scale = self.recipe.style_scale
        return [style_size(style.shape[2], style.shape[1], longest_side, scale) for style in self.styles]

    @cached_property
    def content_digest(self) -> bytes:
        """The `digest` of the decoded content image; computed once."""
        return digest(self.content)

    @cached_property
    def style_digests(self) -> tuple[bytes, ...]:
        """The `digest` of each decoded style image; computed once."""
        return tuple(digest(style) for style in self.styles)

    def set_digests(self, content: bytes, styles: tuple[bytes, ...]) -> None:
        """Sets the digests of the images, which were computed on another thread."""
        self.__dict__.update(content_digest=content, style_digests=styles)

    def without_images(self) -> StyleJob:
        """The job with the sizes and digests of its images, but not their pixels: enough to write a checkpoint."""
        content, *styles = (torch.empty_like(image, device="meta") for image in (self.content, *self.styles))
        job = replace(self, content=content, styles=tuple(styles), start=None)
        job.set_digests(self.content_digest, self.style_digests)
        return job


@dataclass(frozen=True)
class Losses:
    """The terms of the objective, each times its weight."""

    content: Mapping[str, float]  # by layer
    style: Mapping[str, float]  # by layer
    tv: float

    @property
    def total(self) -> float:
        """The objective: the sum of the terms."""
        return sum(self.content.values()) + sum(self.style.values()) + self.tv


@dataclass(frozen=True)
class Report:
    """One completed iteration of one job."""

    iteration: int  # 1 to `iterations`, counted over all scales
    iterations: int
    width: int  # of the current scale, in pixels
    height: int
    scale: int  # the current one, 1 to `scales`, coarsest first
    scales: int
    losses: Losses  # at the picture before this iteration's step
    pixel_iterations_left: int  # pixel-iterations still to do: the sum of width x height over the iterations left
    diverged_at: int | None = None  # the iteration whose loss was not finite; the picture does not change after it


# Parts of the messages of torch's plain RuntimeErrors: of its allocator for the CPU, and of cuDNN without a workspace.
OUT_OF_MEMORY_MESSAGES = (
    "DefaultCPUAllocator",
    "unable to find an engine to execute",
    "out of memory",  # of CUDA itself, for instance when it loads a kernel
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def ran_out_of_memory(error: Exception) -> bool:
    """Whether the exception was caused by running out of memory.

    Python, the device's or the CPU's allocator, CUDA, cuDNN or cuBLAS may have failed to get memory.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError | torch.OutOfMemoryError) or any(
            message in str(cause) for message in OUT_OF_MEMORY_MESSAGES
        ):
            return True
        cause = cause.__cause__ or cause.__context__  # a capture that runs out of memory raises another error
    return False
