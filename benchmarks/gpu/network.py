"""The network, its number of operations, and pictures, for measurements on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gramophone_server.errors import StartupError
from gramophone_server.network.vgg import BACKBONES, CHANNELS, OXFORD, Convolution, Vgg, load_vgg

__all__ = ["Shape", "flops", "network", "pictures", "random_vgg", "shapes", "smooth"]

DEEPEST = "5_1"  # the last convolution that the default recipe reaches


class Shape(NamedTuple):
    """One convolution of the network for one picture size."""

    name: str  # "1_1"
    channels_in: int
    channels_out: int
    height: int
    width: int

    @property
    def flops(self) -> int:
        """Floating-point operations of the forward pass: 2 * 9 * in * out per pixel. The backward pass to the input has
        as many."""
        return 18 * self.channels_in * self.channels_out * self.height * self.width


def shapes(height: int, width: int) -> Iterator[Shape]:
    """The convolutions of VGG-19 up to relu5_1."""
    channels = 3
    for block, count in enumerate(BACKBONES["vgg19"], 1):
        for number in range(1, count + 1):
            out = CHANNELS[block - 1]
            yield Shape(f"{block}_{number}", channels, out, height >> (block - 1), width >> (block - 1))
            channels = out
            if f"{block}_{number}" == DEEPEST:
                return


def flops(side: int, batch: int = 1) -> int:
    """Operations of the convolutions of one iteration on square pictures, forward and backward. The Gram matrices are 7
    % more."""
    return 2 * batch * sum(shape.flops for shape in shapes(side, side))


def random_vgg(seed: int = 0, narrower: int = 1) -> Vgg:
    """VGG-19 with He-initialised weights, which take as much time as the real ones.

    It has fewer channels by the factor ``narrower``, for dry runs.
    """
    generator = torch.Generator().manual_seed(seed)
    convolutions, channels = [], 3
    for block, count in enumerate(BACKBONES["vgg19"], 1):
        for number in range(1, count + 1):
            out = CHANNELS[block - 1] // narrower
            weight = torch.randn(out, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5
            convolutions.append(Convolution(f"{block}_{number}", weight, torch.zeros(out), block > 1 and number == 1))
            channels = out
    return Vgg("vgg19", tuple(convolutions), OXFORD, "random, He-initialised")


def network() -> tuple[Vgg, str]:
    """The network with the embedded weights, or with random ones if their package is missing, and a description."""
    try:
        return load_vgg("embedded"), "the Oxford VGG-19"
    except StartupError:
        return random_vgg(), "VGG-19 with random weights, because the package with the real ones is not installed"


def smooth(side: int, seed: int, batch: int = 1) -> Tensor:
    """Smooth random pictures in [0, 1], float32 [batch, 3, side, side]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, max(2, side // 8), max(2, side // 8), generator=generator)
    return F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)


def pictures(side: int, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """Content and style, float32 [batch, 3, side, side] in [0, 1], in steps of 1/255."""
    content, style = (((smooth(side, seed, batch) * 255).round() / 255).to(device) for seed in (1, 2))
    return content, style
