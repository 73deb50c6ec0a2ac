"""Pooling, and the layers with bias, ReLU and pooling in one pass, through torch's library; see `functional`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gramophone_server.ops.library.tensors import sum_type

__all__ = [
    "bias_relu_",
    "bias_relu_pool",
    "first_layer",
    "first_layer_bwd",
    "max_pool",
    "max_pool_bwd",
    "pool_codes_bwd",
]

UNMASKED = 4  # the bit of a code of `bias_relu_pool` that is set if the maximum is above 0 or NaN
CHANNELS_LAST = torch.channels_last


def max_pool(features: Tensor) -> Tensor:
    """See `functional.max_pool`."""
    pixels = _windows(features)
    pooled = torch.maximum(torch.maximum(pixels[0], pixels[1]), torch.maximum(pixels[2], pixels[3]))
    return pooled.contiguous(memory_format=_layout(features))


def max_pool_bwd(grad: Tensor, features: Tensor, pooled: Tensor, relu_mask: bool) -> Tensor:
    """See `functional.max_pool_bwd`."""
    out = torch.zeros_like(features, dtype=grad.dtype)
    left = ~(pooled <= 0) if relu_mask else torch.ones_like(pooled, dtype=torch.bool)  # not given to a pixel yet
    for pixel, share in zip(_windows(features)[:3], _windows(out)[:3], strict=True):
        taken = left & (pixel == pooled)
        share.copy_(torch.where(taken, grad, 0))
        left &= ~taken
    _windows(out)[3].copy_(torch.where(left, grad, 0))  # no other pixel is equal, or the maximum is NaN
    return out


def first_layer(
    image: Tensor, weight: Tensor, bias: Tensor, scale: Sequence[float], shift: Sequence[float], order: Sequence[int]
) -> Tensor:
    """See `functional.first_layer`."""
    sums = sum_type(weight)
    x = torch.stack([image[:, o] * s + t for o, s, t in zip(order, scale, shift, strict=True)], 1).to(weight.dtype)
    out = F.conv2d(x.to(sums), _kernels(weight), bias.to(sums), padding=1)
    return _relu(out.to(weight.dtype)).contiguous(memory_format=CHANNELS_LAST)


def first_layer_bwd(grad: Tensor, weight: Tensor, scale: Sequence[float], order: Sequence[int]) -> Tensor:
    """See `functional.first_layer_bwd`."""
    back = F.conv2d(grad.to(sum_type(weight)), _kernels(weight).flip(2, 3).transpose(0, 1), None, padding=1)
    out = torch.empty_like(back, memory_format=torch.contiguous_format)
    for channel, (o, s) in enumerate(zip(order, scale, strict=True)):
        torch.mul(back[:, channel], s, out=out[:, o])
    return out


def bias_relu_(features: Tensor, bias: Tensor) -> None:
    """See `functional.bias_relu_`."""
    features.copy_(_biased_relu(features, bias))


def bias_relu_pool(features: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """See `functional.bias_relu_pool`."""
    first, *others = _windows(_biased_relu(features, bias))
    pooled = first.contiguous(memory_format=CHANNELS_LAST)
    codes = torch.zeros_like(pooled, dtype=torch.uint8)
    for number, pixel in enumerate(others, 1):
        larger = (pixel > pooled) | pixel.isnan()
        pooled = torch.where(larger, pixel, pooled)
        codes = torch.where(larger, number, codes)
    codes = torch.where(pooled <= 0, codes, codes | UNMASKED)
    return pooled.contiguous(memory_format=CHANNELS_LAST), codes.contiguous(memory_format=CHANNELS_LAST)


def pool_codes_bwd(grad: Tensor, codes: Tensor, height: int, width: int) -> Tensor:
    """See `functional.pool_codes_bwd`."""
    b, c = grad.shape[:2]
    out = grad.new_zeros(b, c, height, width).contiguous(memory_format=CHANNELS_LAST)
    for number, share in enumerate(_windows(out)):
        share.copy_(torch.where(codes == (UNMASKED | number), grad, 0))
    return out


def _layout(features: Tensor) -> torch.memory_format:
    return CHANNELS_LAST if features.is_contiguous(memory_format=CHANNELS_LAST) else torch.contiguous_format


def _windows(x: Tensor) -> list[Tensor]:
    """Views [B, C, H // 2, W // 2] of the four pixels of each 2x2 window, row by row."""
    height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    return [x[:, :, dy:height:2, dx:width:2] for dy in (0, 1) for dx in (0, 1)]


def _kernels(weight: Tensor) -> Tensor:
    """The convolution's kernels [64, 3, 3, 3], in the type of sums, from the ``weight`` of `functional.first_layer`."""
    return weight[:, :27].reshape(-1, 3, 3, 3).permute(0, 3, 1, 2).to(sum_type(weight))


def _relu(x: Tensor) -> Tensor:
    return x.masked_fill_(x <= 0, 0)  # NaN stays NaN


def _biased_relu(features: Tensor, bias: Tensor) -> Tensor:
    """relu(features + bias), rounded once."""
    sums = sum_type(features)
    return _relu((features.to(sums) + bias.to(sums).view(1, -1, 1, 1)).to(features.dtype))
