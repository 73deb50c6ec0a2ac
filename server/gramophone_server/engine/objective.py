"""The objective J of a batch at one scale: its targets and weights, and its value and gradient at given pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gramophone.recipe import Recipe
from gramophone_server import ops
from gramophone_server.domain.job_state import Shape
from gramophone_server.engine import losses
from gramophone_server.engine.style_targets import activation_gram_scale
from gramophone_server.network.features import VggFeatures

__all__ = ["Evaluation", "Objective"]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The terms of J and its gradient at one picture of each job."""

    terms: Tensor  # float32 [content layers + style layers + 1, B], each times its weight; the last is total variation
    grad: Tensor  # float32 [B, 3, H, W]


class Objective:
    """The objective of a batch of jobs of one shape at one scale.

    Targets and weights are tensors with an entry per slot, in buffers that `set_targets` and `set_weights` fill for one
    slot between two evaluations, so that a captured evaluation serves all jobs of the shape. An empty slot has weights
    of 0: its terms and its gradient are 0.
    """

    def __init__(self, features: VggFeatures, shape: Shape, jobs: int) -> None:
        self.features = features
        self.pooling = shape.pooling
        self.content_layers, self.style_layers = shape.content_layers, shape.style_layers
        height, width = shape.height, shape.width
        self.layers = (*self.content_layers, *self.style_layers)
        self.content_targets = [
            torch.zeros(
                (jobs, *features.shape(layer, height, width)), dtype=features.precision.forward, device=features.device
            ).contiguous(memory_format=torch.channels_last)
            for layer in self.content_layers
        ]
        shapes = [features.shape(layer, height, width) for layer in self.style_layers]
        self.pixels = [h * w for _, h, w in shapes]
        self.gram_scales = [
            activation_gram_scale(features, layer, n) for layer, n in zip(self.style_layers, self.pixels, strict=True)
        ]
        self.style_targets = [torch.zeros(jobs, c, c, device=features.device) for c, _, _ in shapes]
        self.content_weights = torch.zeros(len(self.content_layers), jobs, device=features.device)
        self.style_weights = torch.zeros(len(self.style_layers), jobs, device=features.device)
        self.tv_weights = torch.zeros(jobs, device=features.device)

    @torch.inference_mode()
    def set_targets(
        self, slot: int, recipe: Recipe, content: Tensor, styles: Sequence[tuple[Sequence[Tensor], float]]
    ) -> None:
        """Sets the targets and weights of a new job in ``slot``; other slots do not change.

        ``content``: float32 [1, 3, H, W] in [0, 1]. ``styles``: for each image its Gram matrices [C, C], one per style
        layer, and its weight; each target is their weighted mean.
        """
        if self.content_layers:
            activations = self.features.forward(content, self.content_layers, self.pooling)
            for layer, target in zip(self.content_layers, self.content_targets, strict=True):
                target[slot].copy_(activations[layer][0])
        total = sum(weight for _, weight in styles)
        for i, target in enumerate(self.style_targets):
            target[slot].zero_()
            for grams, weight in styles:
                target[slot].add_(grams[i], alpha=weight / total)
        self.set_weights(slot, recipe)

    @torch.inference_mode()
    def set_weights(self, slot: int, recipe: Recipe) -> None:
        """Sets the weights of the job in ``slot``, from the next evaluation on."""
        one, normalisation = slice(slot, slot + 1), recipe.normalisation
        contents = zip(self.content_weights, recipe.content_layers, self.content_targets, strict=True)
        for row, (layer, weight), target in contents:
            factor = losses.content_factor(normalisation, target[one], self.features.gain(layer))
            row[one] = factor * (recipe.alpha * weight)
        styles = zip(self.style_weights, recipe.style_layers, self.style_targets, self.pixels, strict=True)
        for row, (_, weight), target, pixels in styles:
            row[one] = losses.style_factor(normalisation, target[one], pixels) * (recipe.beta * weight)
        self.tv_weights[slot] = recipe.tv_weight

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Empties a slot."""
        for weights in (self.content_weights[:, slot], self.style_weights[:, slot], self.tv_weights[slot]):
            weights.zero_()

    @torch.inference_mode()
    def evaluate(self, image: Tensor) -> Evaluation:
        """The terms of J and its gradient at ``image``, float32 [B, 3, H, W] in [0, 1].

        Does not wait for the device.
        """
        rows, grad = self.network_terms(image)
        tv = ops.tv_(grad, image, self.tv_weights)
        return Evaluation(torch.cat([*rows, tv[None]]), grad)

    @torch.inference_mode()
    def network_terms(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """All terms but the total variation, and their gradient: `Evaluation.terms` in parts, without the last row."""
        activations = self.features.forward(image, self.layers, self.pooling)
        rows, diffs = [], {}
        if self.style_layers:
            style, differences = ops.style_fwd(
                [activations[layer] for layer in self.style_layers],
                self.style_targets,
                self.style_weights,
                self.gram_scales,
                self.features.tuning.persistent_style,
            )
            diffs = dict(zip(self.style_layers, differences, strict=True))
            rows.append(style)
        contents = dict(
            zip(self.content_layers, zip(self.content_targets, self.content_weights, strict=True), strict=True)
        )
        grad, content = self.features.backward(activations, diffs, contents)
        return [*(content[layer][None] for layer in self.content_layers), *rows], grad
