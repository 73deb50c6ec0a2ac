"""Pictures to stylise."""

from __future__ import annotations

import torch
from torch import Tensor


def make_picture(seed: int, height: int = 40, width: int = 48) -> Tensor:
    """A smooth random picture, uint8 [3, height, width]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (smooth[0] * 255).round().to(torch.uint8)
