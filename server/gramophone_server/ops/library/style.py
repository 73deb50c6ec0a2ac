"""The style terms, through torch's library; see `functional`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gramophone_server.ops.library.tensors import difference_type, sum_type

__all__ = [
    "gram",
    "style_bwd_",
    "style_fwd",
    "style_loss",
]


def gram(features: Tensor, scale: float) -> Tensor:
    """See `functional.gram`."""
    matrices = _summable(features)
    return torch.bmm(matrices, matrices.mT).mul_(scale)


def style_loss(features: Tensor, target: Tensor, weight: float, scale: float) -> tuple[Tensor, Tensor]:
    """See `functional.style_loss`."""
    difference = gram(features, scale) - target
    loss = weight * difference.square().sum((1, 2))
    return loss, (difference.detach() * (4 * weight * scale)).to(difference_type(features))


def style_fwd(
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Tensor,
    scales: Sequence[float],
    persistent: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """See `functional.style_fwd`. ``persistent`` has no meaning here."""
    losses, differences = [], []
    for f, target, weight, scale in zip(features, targets, weights, scales, strict=True):
        difference = gram(f, scale) - target
        losses.append(difference.square().sum((1, 2)) * weight)
        factor = (weight * (4 * scale)).view(-1, 1, 1)
        differences.append((difference.detach() * factor).to(difference_type(f)))
    return torch.stack(losses).to(weights.dtype), differences


def style_bwd_(grad: Tensor, features: Tensor, diff: Tensor | None, relu_mask: bool) -> None:
    """See `functional.style_bwd_`."""
    if diff is None:
        if relu_mask:
            grad.masked_fill_(features <= 0, 0)
        return
    total = torch.bmm(diff.to(sum_type(features)), _summable(features)).view(features.shape).add_(grad)
    if relu_mask:
        total.masked_fill_(features <= 0, 0)
    grad.copy_(total)


def _summable(features: Tensor) -> Tensor:
    """The features as matrices [B, C, pixels], in the type of their sums."""
    return features.flatten(2).to(sum_type(features))
