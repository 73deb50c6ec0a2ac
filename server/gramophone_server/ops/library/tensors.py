"""Types and shapes that the families of ops share."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "difference_type",
    "per_job",
    "sum_type",
]


def sum_type(x: Tensor) -> torch.dtype:
    """The type of sums over ``x``: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def difference_type(features: Tensor) -> torch.dtype:
    """The type of a difference of Gram matrices."""
    return torch.bfloat16 if features.itemsize == 2 else features.dtype


def per_job(x: Tensor) -> Tensor:
    """``x`` [B], or images, as a factor of images [B, C, H, W]."""
    return x.view(-1, 1, 1, 1)
