"""The content term and the total variation, through torch's library; see `functional`."""

from __future__ import annotations

import torch
from torch import Tensor

from gramophone_server.ops.library.optimisers import check_finite_
from gramophone_server.ops.library.tensors import per_job, sum_type

__all__ = [
    "content_",
    "tv_",
    "tv_check_finite_",
]


def content_(grad: Tensor, features: Tensor, target: Tensor, weight: Tensor, relu_mask: bool) -> Tensor:
    """See `functional.content_`."""
    sums = sum_type(features)
    difference = features.to(sums) - target.to(sums)
    loss = weight * difference.square().sum((1, 2, 3))
    total = difference.mul_(per_job(2 * weight.to(sums))).add_(grad)
    if relu_mask:
        total.masked_fill_(features <= 0, 0)
    grad.copy_(total)
    return loss.to(weight.dtype)


def tv_(grad: Tensor, image: Tensor, weight: Tensor) -> Tensor:
    """See `functional.tv_`."""
    loss = torch.zeros_like(weight)
    for axis in (3, 2):
        n = image.shape[axis] - 1
        change = image.narrow(axis, 1, n) - image.narrow(axis, 0, n)
        mean = weight / change[0].numel()
        loss += mean * change.square().sum((1, 2, 3))
        change.mul_(per_job(2 * mean))
        grad.narrow(axis, 1, n).add_(change)
        grad.narrow(axis, 0, n).sub_(change)
    return loss


def tv_check_finite_(
    grad: Tensor,
    image: Tensor,
    weight: Tensor,
    terms: Tensor,
    alive: Tensor,
    diverged_at: Tensor,
    count: Tensor,
) -> None:
    """See `functional.tv_check_finite_`."""
    terms[-1] = tv_(grad, image, weight)
    check_finite_(terms, grad, alive, diverged_at, count)
