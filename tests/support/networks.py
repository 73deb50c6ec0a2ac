"""A network with VGG-19's layers and few channels, for tests of the engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gramophone_server.network.vgg import BACKBONES, Convolution, Preprocessing, Vgg

TINY_CHANNELS = (4, 6, 8, 8, 8)


def make_tiny_vgg(seed: int = 0, widths: Sequence[int] = TINY_CHANNELS) -> Vgg:
    """VGG-19's 16 convolutions with He-initialised random weights; `widths` are the channels of each block."""
    generator = torch.Generator().manual_seed(seed)
    convolutions, channels = [], 3
    for block, count in enumerate(BACKBONES["vgg19"], 1):
        for number in range(1, count + 1):
            out = widths[block - 1]
            weight = torch.randn(out, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5
            bias = torch.randn(out, generator=generator) * 0.1
            convolutions.append(Convolution(f"{block}_{number}", weight, bias, block > 1 and number == 1))
            channels = out
    # Not the identity in any part, so that a mistake in each of them shows.
    preprocessing = Preprocessing((2, 1, 0), 2.0, (0.8, 0.9, 1.0), (0.5, 1.0, 2.0))
    return Vgg("vgg19", tuple(convolutions), preprocessing, "tiny")
