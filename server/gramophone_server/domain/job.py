"""What the engine is given and what it tells: plain values that scheduler and servicer can hold without knowing how a
picture is made."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gramophone.recipe import Recipe

__all__ = ["SMALLEST_SIDE", "Losses", "Report", "Run", "Scale", "StyleJob", "digest", "fit", "ran_out_of_memory"]

SMALLEST_SIDE = 16  # pixels: four poolings leave one activation for relu5_1


class Scale(NamedTuple):
    """One size of the picture on its way, in pixels, and the iterations at it."""

    width: int
    height: int
    iterations: int


def fit(width: int, height: int, longest: int) -> tuple[int, int]:
    """(width, height) in pixels with the longest side at `longest` and the proportions kept, each side at least 1."""
    scale = longest / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def digest(image: Tensor) -> bytes:
    """sha256 of a uint8 image on the CPU and its shape; 2 ms for a megapixel."""
    image = image.contiguous()
    told = hashlib.sha256(repr(tuple(image.shape)).encode())
    told.update((ctypes.c_ubyte * image.numel()).from_address(image.data_ptr()))
    return told.digest()


@dataclass(frozen=True, eq=False, kw_only=True)
class StyleJob:
    """One picture to make. Images are uint8 [3, height, width], RGB, on the CPU; content at any size."""

    recipe: Recipe
    content: Tensor
    styles: tuple[Tensor, ...]
    style_weights: tuple[float, ...]  # one per style, above 0; only their proportions matter
    start: Tensor | None  # with Start.IMAGE, else None
    seed: int  # of the noise, 0 to 2**64 - 1

    @property
    def result_size(self) -> tuple[int, int]:
        """(width, height) of the finished picture in pixels."""
        return fit(self.content.shape[2], self.content.shape[1], self.recipe.size)

    @property
    def scales(self) -> tuple[Scale, ...]:
        """Coarsest first; the last is the result's. Those whose shorter side would be below `SMALLEST_SIDE` are left
        out, so a thin picture has fewer than its recipe names."""
        _, height, width = self.content.shape
        *coarse, final = (fit(width, height, longest) for longest in self.recipe.scale_sizes())
        kept = [Scale(*size, self.recipe.coarse_iterations) for size in coarse if min(size) >= SMALLEST_SIDE]
        return (*kept, Scale(*final, self.recipe.iterations))

    @cached_property
    def content_digest(self) -> bytes:
        """Of the decoded content image; computed once."""
        return digest(self.content)

    @cached_property
    def style_digests(self) -> tuple[bytes, ...]:
        """Of the decoded style images; computed once."""
        return tuple(digest(style) for style in self.styles)


@dataclass(frozen=True)
class Losses:
    """The terms of the objective, each with its weight in it: `total` is their sum."""

    content: Mapping[str, float]  # by layer
    style: Mapping[str, float]  # by layer
    tv: float

    @property
    def total(self) -> float:
        return sum(self.content.values()) + sum(self.style.values()) + self.tv


@dataclass(frozen=True)
class Report:
    """One iteration of one job, done."""

    iteration: int  # 1 to `iterations`, counted over all scales
    iterations: int
    width: int  # of the present scale, in pixels
    height: int
    losses: Losses  # at the picture before this iteration's step
    pixels_left: int  # pixel-iterations still to do: the sum of width x height over the iterations left
    diverged_at: int | None = None  # the iteration whose loss was not finite; the job stands still since then


class Run(Protocol):
    """A batch of same-shape jobs on its way. Belongs to one thread."""

    @property
    def finished(self) -> bool:
        """No iteration is left."""

    def advance(self, iterations: int = 1) -> tuple[Report, ...]:
        """Does so many iterations of every job, but none beyond the present scale, and reports each job as of the last,
        in the order they were given. The device is waited for once, at the end.

        A job that diverges does not disturb the others; `picture` gives its last good one. Raises
        `errors.OutOfDeviceMemory`.
        """

    def picture(self, index: int) -> Tensor:
        """The present picture of one job at the present scale: uint8 [height, width, 3], RGB, a copy on the CPU."""

    def snapshot(self, index: int) -> Callable[[], Tensor]:
        """`picture`, begun now and finished by whoever calls the result, on any thread: the run does not wait for the
        copy, and may go on at once."""

    def close(self) -> None:
        """Gives back what the run holds, for the next one. Nothing can be asked of it afterwards."""


# In what torch raises as a plain RuntimeError: its allocator for the CPU, and cuDNN when no workspace could be had.
MEMORY_ENDED = ("DefaultCPUAllocator", "unable to find an engine to execute")


def ran_out_of_memory(error: Exception) -> bool:
    """Whether an exception is Python's, the device's or the CPU allocator's way to say that memory has ended."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, MemoryError | torch.OutOfMemoryError) or any(words in str(at) for words in MEMORY_ENDED):
            return True
        at = at.__cause__ or at.__context__  # a capture that runs out of memory ends in an error of its own
    return False
