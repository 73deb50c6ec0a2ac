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
    changed between two evaluations. Everything else is taken from the first. Targets and weights live in buffers that
    `aim` fills, so that a captured evaluation serves other jobs of the same shape.
    """

    def __init__(self, chain: Chain, recipe: Recipe, jobs: int, height: int, width: int) -> None:
        self.chain = chain
        self.pooling = recipe.pooling
        self.content_layers = tuple(layer for layer, _ in recipe.content_layers)
        self.style_layers = tuple(layer for layer, _ in recipe.style_layers)
        self.layers = (*self.content_layers, *self.style_layers)
        self.content_targets = [
            torch.zeros(
                (jobs, *chain.shape(layer, height, width)), dtype=chain.precision.forward, device=chain.device
            ).contiguous(memory_format=torch.channels_last)
            for layer in self.content_layers
        ]
        shapes = [chain.shape(layer, height, width) for layer in self.style_layers]
        self.pixels = [h * w for _, h, w in shapes]
        self.scales = [self._scale(layer, n) for layer, n in zip(self.style_layers, self.pixels, strict=True)]
        self.style_targets = [torch.zeros(jobs, c, c, device=chain.device) for c, _, _ in shapes]
        self.content_weights = torch.zeros(len(self.content_layers), jobs, device=chain.device)
        self.style_weights = torch.zeros(len(self.style_layers), jobs, device=chain.device)
        self.tv_weights = torch.zeros(jobs, device=chain.device)

    @torch.inference_mode()
    def aim(
        self, recipes: Sequence[Recipe], contents: Tensor, styles: Sequence[Sequence[tuple[Tensor, float]]]
    ) -> None:
        """Targets and weights for new jobs.

        ``contents``: float32 [B, 3, H, W] in [0, 1]. ``styles``: per job, images [1, 3, h, w] and their weights.
        """
        if self.content_layers:
            trace = self.chain.forward(contents, self.content_layers, self.pooling)
            for layer, target in zip(self.content_layers, self.content_targets, strict=True):
                target.copy_(trace[layer])
            del trace
        for job, images in enumerate(styles):
            self._aim_style(job, images)

        def fill(weights: Tensor, values: Sequence[Sequence[Any]]) -> None:
            weights.copy_(torch.tensor(values, dtype=torch.float32).T)

        normalisation = recipes[0].normalisation
        if self.content_layers:
            fill(self.content_weights, [[r.alpha * w for _, w in r.content_layers] for r in recipes])
        if self.style_layers:
            fill(self.style_weights, [[r.beta * w for _, w in r.style_layers] for r in recipes])
        for layer, row, target in zip(self.content_layers, self.content_weights, self.content_targets, strict=True):
            row *= losses.content_factor(normalisation, target, self.chain.gain(layer))
        for row, target, n in zip(self.style_weights, self.style_targets, self.pixels, strict=True):
            row *= losses.style_factor(normalisation, target, n)
        self.tv_weights.copy_(torch.tensor([r.tv_weight for r in recipes]))

    @torch.inference_mode()
    def evaluate(self, image: Tensor) -> Evaluation:
        """J and its gradient at ``image``, float32 [B, 3, H, W] in [0, 1]. Reads nothing back."""
        trace = self.chain.forward(image, self.layers, self.pooling)
        terms, diffs = [], {}
        if self.style_layers:
            style, differences = ops.style_fwd(
                [trace[layer] for layer in self.style_layers], self.style_targets, self.style_weights, self.scales
            )
            diffs = dict(zip(self.style_layers, differences, strict=True))
            terms.append(style)
        contents = dict(
            zip(self.content_layers, zip(self.content_targets, self.content_weights, strict=True), strict=True)
        )
        grad, content = self.chain.backward(trace, diffs, contents)
        tv = ops.tv_(grad, image, self.tv_weights)
        return Evaluation(torch.cat([*(content[layer][None] for layer in self.content_layers), *terms, tv[None]]), grad)

    def _scale(self, layer: str, pixels: int) -> float:
        return losses.gram_scale(pixels) * self.chain.gain(layer) ** 2

    def _aim_style(self, job: int, images: Sequence[tuple[Tensor, float]]) -> None:
        """Each style layer's target is the weighted mean of the styles' Gram matrices."""
        total = sum(weight for _, weight in images)
        for target in self.style_targets:
            target[job].zero_()
        for image, weight in images if self.style_layers else ():
            trace = self.chain.forward(image, self.style_layers, self.pooling)
            for layer, target in zip(self.style_layers, self.style_targets, strict=True):
                features = trace[layer]
                target[job] += ops.gram(features, weight / total * self._scale(layer, features[0, 0].numel()))[0]
