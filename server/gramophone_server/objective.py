"""The objective of a batch at one scale: targets, weights, and J with its gradient at a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gramophone.recipe import Recipe
from gramophone_server import losses, ops
from gramophone_server.chain import Chain

__all__ = ["Evaluation", "Objective"]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """J and its gradient at one picture of each job."""

    terms: Tensor  # float32 [content layers + style layers + 1, B], each with its weight; the last is tv
    grad: Tensor  # float32 [B, 3, H, W]


class Objective:
    """What a batch of same-shape jobs is after at one scale.

    The recipes may differ in alpha, beta, tv_weight and layer weights: those are tensors, one entry per job, and can be
    changed between two evaluations. Everything else is taken from the first.
    """

    def __init__(
        self,
        chain: Chain,
        recipes: Sequence[Recipe],
        contents: Tensor,
        styles: Sequence[Sequence[tuple[Tensor, float]]],
    ) -> None:
        """``contents``: float32 [B, 3, H, W] in [0, 1]. ``styles``: per job, images [1, 3, h, w] and their weights."""
        self.chain = chain
        self.pooling = recipes[0].pooling
        self.content_layers = tuple(layer for layer, _ in recipes[0].content_layers)
        self.style_layers = tuple(layer for layer, _ in recipes[0].style_layers)
        self.layers = (*self.content_layers, *self.style_layers)
        normalisation = recipes[0].normalisation

        # One pass over the contents gives their activations and the number of pixels of each style layer.
        trace = chain.forward(contents, self.layers, self.pooling)
        self.content_targets = [trace[layer] for layer in self.content_layers]
        pixels = [trace[layer][0, 0].numel() for layer in self.style_layers]
        self.scales = [losses.gram_scale(n) for n in pixels]
        self.style_targets = self._grams(styles)

        def weights(values: Sequence[Any]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=contents.device)

        self.content_weights = weights([[r.alpha * w for _, w in r.content_layers] for r in recipes]).T.contiguous()
        self.style_weights = weights([[r.beta * w for _, w in r.style_layers] for r in recipes]).T.contiguous()
        for row, target in zip(self.content_weights, self.content_targets, strict=True):
            row *= losses.content_factor(normalisation, target)
        for row, target, n in zip(self.style_weights, self.style_targets, pixels, strict=True):
            row *= losses.style_factor(normalisation, target, n)
        self.tv_weights = weights([r.tv_weight for r in recipes])

    @torch.inference_mode()
    def evaluate(self, image: Tensor) -> Evaluation:
        """J and its gradient at ``image``, float32 [B, 3, H, W] in [0, 1]."""
        trace = self.chain.forward(image, self.layers, self.pooling)
        terms, grads, diffs = [], {}, {}
        for layer, target, weight in zip(self.content_layers, self.content_targets, self.content_weights, strict=True):
            loss, grads[layer] = losses.content_terms(trace[layer], target, weight)
            terms.append(loss[None])
        if self.style_layers:
            style, differences = ops.style_fwd(
                [trace[layer] for layer in self.style_layers], self.style_targets, self.style_weights, self.scales
            )
            diffs = dict(zip(self.style_layers, differences, strict=True))
            terms.append(style)
        grad = self.chain.backward(trace, diffs, grads)
        tv, tv_grad = losses.tv_terms(image, self.tv_weights)
        return Evaluation(torch.cat([*terms, tv[None]]), grad.add_(tv_grad))

    def _grams(self, styles: Sequence[Sequence[tuple[Tensor, float]]]) -> list[Tensor]:
        """Per style layer, each job's target: the weighted mean of its styles' Gram matrices, [B, C, C]."""
        if not self.style_layers:
            return []
        per_job = []
        for images in styles:
            total = sum(weight for _, weight in images)
            blend: list[Tensor] = []
            for image, weight in images:
                trace = self.chain.forward(image, self.style_layers, self.pooling)
                grams = [
                    ops.gram(trace[layer], weight / total * losses.gram_scale(trace[layer][0, 0].numel()))
                    for layer in self.style_layers
                ]
                blend = [a + b for a, b in zip(blend, grams, strict=True)] if blend else grams
            per_job.append(blend)
        return [torch.cat(of_layer) for of_layer in zip(*per_job, strict=True)]
