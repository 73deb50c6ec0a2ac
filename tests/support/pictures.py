"""Pictures to stylise."""

from __future__ import annotations

import io

import torch
from torch import Tensor


def make_picture(seed: int, height: int = 40, width: int = 48) -> Tensor:
    """A smooth random picture, uint8 [3, height, width]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (smooth[0] * 255).round().to(torch.uint8)


def png(width: int = 64, height: int = 32) -> bytes:
    """A red picture as a PNG file."""
    from PIL import Image  # not at the top: tests/gpu imports this module on machines without Pillow

    out = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(out, "PNG")
    return out.getvalue()
