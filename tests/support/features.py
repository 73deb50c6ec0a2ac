"""Objectives on a network, for tests of its forward and backward pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gramophone.recipe import LayerWeight, Recipe
from gramophone_server.domain.job_state import Shape
from gramophone_server.engine.objective import Objective
from gramophone_server.engine.style_targets import style_grams
from gramophone_server.network.features import VggFeatures

# The fields of a recipe for some choices of layers, by what is special about them.
LAYERS: dict[str, dict[str, Any]] = {
    "default": {},
    "style ends deepest": {"content_layers": (LayerWeight("relu2_1"),)},
    "content ends deepest": {
        "content_layers": (LayerWeight("relu5_3"),),
        "style_layers": (LayerWeight("relu3_1", 2.0),),
    },
    "conv layers": {
        "content_layers": (LayerWeight("conv4_2"),),
        "style_layers": (LayerWeight("conv1_1"), LayerWeight("relu1_2", 0.5), LayerWeight("conv3_1", 3.0)),
    },
    "one layer twice": {
        "content_layers": (LayerWeight("relu3_1"),),
        "style_layers": (LayerWeight("relu3_1"), LayerWeight("conv3_1")),
    },
    "content alone": {"beta": 0.0, "style_layers": ()},
    "style alone": {"alpha": 0.0, "content_layers": ()},
    "every layer": {
        "style_layers": tuple(
            LayerWeight(f"relu{b}_{n}", 0.3) for b, c in enumerate((2, 2, 4, 2), 1) for n in range(1, c + 1)
        ),
    },
}


def as_image(picture: Tensor) -> Tensor:
    """uint8 [3, H, W] -> float32 [1, 3, H, W] in [0, 1]."""
    return picture[None].float() / 255


def objective_of(
    features: VggFeatures, recipes: list[Recipe], contents: Tensor, styles: list[list[tuple[Tensor, float]]]
) -> Objective:
    """An objective with a slot for each recipe. ``contents``: float32 [B, 3, H, W] in [0, 1]. ``styles``: for each
    recipe its style images, float32 [1, 3, h, w], and their weights."""
    shape = Shape.of(recipes[0], *contents.shape[2:])
    objective = Objective(features, shape, len(recipes))
    for slot, recipe in enumerate(recipes):
        grams = [(style_grams(features, image, shape.style_layers, shape.pooling), w) for image, w in styles[slot]]
        objective.set_targets(slot, recipe, contents[slot : slot + 1], grams)
    return objective


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|, in float64."""
    return float((got.double() - expected).norm() / expected.norm())
