"""Slow and simple float64 versions of what the server computes. They use no kernels of the project and no batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gramophone.recipe import Normalisation, Pooling, Recipe
from gramophone_server.network.vgg import Vgg


def gram(features: Tensor, scale: float) -> Tensor:
    """scale * F F^T of each job, by the definition."""
    matrix = features.double().reshape(features.shape[0], features.shape[1], -1)
    return torch.einsum("bip,bjp->bij", matrix, matrix) * scale


def style_bwd(grad: Tensor, features: Tensor, diff: Tensor | None, relu_mask: bool) -> Tensor:
    """grad + D F, and 0 where F <= 0 if ``relu_mask``."""
    total = grad.double()
    if diff is not None:
        total = total + torch.einsum("bij,bjhw->bihw", diff.double(), features.double())
    return torch.where(features <= 0, 0.0, total) if relu_mask else total


def activations(vgg: Vgg, image: Tensor, pooling: Pooling, dtype: torch.dtype = torch.float64) -> Mapping[str, Tensor]:
    """Every layer of the network at ``image`` [1, 3, H, W] in [0, 1], with autograd, each rounded to ``dtype``."""
    p = vgg.preprocessing
    x = image.double()[:, list(p.channels)] * p.scale
    x = (x - torch.tensor(p.mean).double().view(1, 3, 1, 1)) / torch.tensor(p.std).double().view(1, 3, 1, 1)
    x = x.to(dtype)
    layers = {}
    for convolution in vgg.convolutions:
        if convolution.pooled:
            x = F.max_pool2d(x, 2) if pooling is Pooling.MAX else 1.5 * F.avg_pool2d(x, 2)
        x = layers["conv" + convolution.name] = F.conv2d(
            x, convolution.weight.to(dtype), convolution.bias.to(dtype), padding=1
        )
        x = layers["relu" + convolution.name] = F.relu(x)
    return layers


def terms(
    vgg: Vgg,
    image: Tensor,
    content: Tensor,
    styles: Sequence[tuple[Tensor, float]],
    recipe: Recipe,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Each term of J at ``image``, as in the papers. The styles may differ from the image in size."""

    def layers(x: Tensor) -> Mapping[str, Tensor]:
        return {name: f.double() for name, f in activations(vgg, x, recipe.pooling, dtype).items()}

    made, kept = layers(image), layers(content)
    total_weight = sum(weight for _, weight in styles)
    out = {}
    for layer, weight in recipe.content_layers:
        squares = (made[layer] - kept[layer]).square().sum()
        match recipe.normalisation:
            case Normalisation.NONE | Normalisation.GATYS:
                term = squares / 2
            case Normalisation.ELEMENTS:
                term = squares / made[layer].numel()
            case Normalisation.RELATIVE:
                term = squares / kept[layer].square().sum()
        out["content " + layer] = recipe.alpha * weight * term
    for layer, weight in recipe.style_layers:
        _, n, height, width = made[layer].shape
        m = height * width
        target = torch.zeros(n, n).double()
        for style, share in styles:
            f = layers(style)[layer][0].reshape(n, -1)
            target += share / total_weight * (f @ f.T) * (m / f.shape[1])  # scaled to m pixels
        f = made[layer][0].reshape(n, m)
        squares = (f @ f.T - target).square().sum()
        match recipe.normalisation:
            case Normalisation.NONE:
                term = squares
            case Normalisation.GATYS:
                term = squares / (4 * n**2 * m**2)
            case Normalisation.ELEMENTS:
                term = ((f @ f.T - target) / (n * m)).square().mean()
            case Normalisation.RELATIVE:
                term = squares / target.square().sum()
        out["style " + layer] = recipe.beta * weight * term
    x = image.double()
    variation = (x[..., 1:] - x[..., :-1]).square().mean() + (x[..., 1:, :] - x[..., :-1, :]).square().mean()
    out["tv"] = recipe.tv_weight * variation
    return out


def gradient(
    vgg: Vgg,
    image: Tensor,
    content: Tensor,
    styles: Sequence[tuple[Tensor, float]],
    recipe: Recipe,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """(terms [T], dJ/dimage) by autograd; the network in ``dtype``, everything around it in float64."""
    x = image.double().requires_grad_()
    values = torch.stack(list(terms(vgg, x, content, styles, recipe, dtype).values()))
    (grad,) = torch.autograd.grad(values.sum(), x)
    return values.detach(), grad


def total_variation(image: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight * (mean of squared differences along x + along y), [B], and its gradient by autograd."""
    x = image.double().clone().requires_grad_()
    across, down = x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]
    loss = weight.double() * (across.square().mean((1, 2, 3)) + down.square().mean((1, 2, 3)))
    (grad,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), grad
