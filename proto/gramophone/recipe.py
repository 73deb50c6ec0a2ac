"""The recipe: everything a request can say about the optimisation, its presets and its rules.

One frozen value that server and client share. The proto's `Recipe` mirrors it field for field, and so do the flags of
the command line; defaults, ranges and help texts live here and nowhere else. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, NamedTuple, TypedDict

__all__ = [
    "PRESETS",
    "InvalidRecipe",
    "LayerWeight",
    "Normalisation",
    "Optimiser",
    "Pooling",
    "Range",
    "Recipe",
    "RecipeOverrides",
    "Start",
    "Violation",
    "preset",
]


class Normalisation(StrEnum):
    """What a style layer's squared Gram difference is divided by; `losses.py` of the server has the formulas."""

    NONE = "none"
    GATYS = "gatys"
    ELEMENTS = "elements"
    RELATIVE = "relative"


class Pooling(StrEnum):
    """Pooling of the network: maximum as trained, or average, rescaled to what the next layer was trained on."""

    MAX = "max"
    AVERAGE = "average"


class Start(StrEnum):
    """The picture before the first iteration."""

    CONTENT = "content"
    NOISE = "noise"
    IMAGE = "image"


class Optimiser(StrEnum):
    """How the pixels follow the gradient."""

    GRADIENT_DESCENT = "gradient-descent"
    NORMALISED_DESCENT = "normalised-descent"
    ADAM = "adam"
    LBFGS = "lbfgs"


class LayerWeight(NamedTuple):
    """A layer of the network and how much it counts, 0 to 1e6."""

    layer: str
    weight: float = 1.0


class Range(NamedTuple):
    """Both ends are allowed."""

    low: float
    high: float


class Violation(NamedTuple):
    """One thing that is wrong with a request: the path of the field and what must be different."""

    field: str
    description: str


class InvalidRecipe(ValueError):
    """A recipe that breaks its rules; `violations` has all of them."""

    def __init__(self, violations: Iterable[Violation]) -> None:
        self.violations = tuple(violations)
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in self.violations))


MOST_LAYERS = 16  # VGG-19 has 16 convolutions
SMALLEST_SCALE = 16  # pixels: the network halves a picture four times
LAYER_WEIGHTS = Range(0, 1e6)


def _said(default: Any, help_text: str, allowed: Range | None = None) -> Any:
    return field(default=default, metadata={"help": help_text, "range": allowed})


def _layers(*names: str) -> tuple[LayerWeight, ...]:
    return tuple(LayerWeight(name) for name in names)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete recipe; the defaults are the preset `fast`.

    Building one checks the ranges below and raises `InvalidRecipe` with every violation. Layer names, the largest size
    and the most iterations belong to a server, so they are checked there.
    """

    content_layers: tuple[LayerWeight, ...] = _said(
        _layers("relu4_2"), "layers whose activations are kept, each with a weight"
    )
    style_layers: tuple[LayerWeight, ...] = _said(
        _layers("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"),
        "layers whose Gram matrices are matched, each with a weight",
    )
    alpha: float = _said(1.0, "weight of the content", Range(0, 1e15))
    beta: float = _said(3.0, "weight of the style: the strength of the painting", Range(0, 1e15))
    tv_weight: float = _said(
        1.0, "weight of the total variation (mean squared difference of neighbouring pixels)", Range(0, 1e15)
    )
    normalisation: Normalisation = _said(Normalisation.RELATIVE, "what the layers' squared differences are divided by")
    pooling: Pooling = _said(Pooling.MAX, "pooling of the network")
    size: int = _said(512, "longest side of the result in pixels", Range(16, 16384))
    style_scale: float = _said(1.0, "longest side of the style images as a multiple of the picture's", Range(0.1, 4))
    start: Start = _said(Start.CONTENT, "the picture before the first iteration")
    optimiser: Optimiser = _said(Optimiser.LBFGS, "how the pixels follow the gradient")
    step: float = _said(
        0.02,
        "step of the optimiser, in pixel values of 0 to 1 (with gradient-descent: the factor of the gradient)",
        Range(1e-12, 1e12),
    )
    iterations: int = _said(30, "iterations at the final size", Range(1, 100_000))
    coarse_iterations: int = _said(20, "iterations at each coarser scale", Range(1, 100_000))
    smallest_size: int = _said(
        128,
        "longest side of the coarsest scale in pixels, 16 or more, each next is sqrt(2) larger; 0: final size only",
        Range(0, 16384),
    )
    average: float = _said(
        0.0,
        "decay of the running average of the iterates that becomes the picture; 0: the last iterate",
        Range(0, 0.999),
    )
    time_budget: float = _said(
        0.0,
        "seconds from its acceptance in which the job must end, if need be with the picture so far; 0: no bound",
        Range(0, 86_400),
    )

    def __post_init__(self) -> None:
        violations = tuple(_violations(self))
        if violations:
            raise InvalidRecipe(violations)

    def scale_sizes(self) -> tuple[int, ...]:
        """Longest sides of the scales in pixels, coarsest first; the last is `size`."""
        sizes = [self.size]
        while self.smallest_size and round(self.size / 2 ** (len(sizes) / 2)) >= self.smallest_size:
            sizes.append(round(self.size / 2 ** (len(sizes) / 2)))
        return tuple(reversed(sizes))

    def total_iterations(self) -> int:
        """Iterations over all scales; fewer for a picture so thin that its smallest scales are left out."""
        return self.iterations + self.coarse_iterations * (len(self.scale_sizes()) - 1)


def _violations(recipe: Recipe) -> Iterable[Violation]:
    for f in fields(recipe):
        value, allowed = getattr(recipe, f.name), f.metadata["range"]
        if allowed is not None and not allowed.low <= value <= allowed.high:  # false for NaN too
            yield Violation(f.name, f"must be between {allowed.low:g} and {allowed.high:g}, got {value:g}")
    if 0 < recipe.smallest_size < SMALLEST_SCALE:
        yield Violation(
            "smallest_size",
            f"must be {SMALLEST_SCALE} or more, or 0 to work at the final size only, got {recipe.smallest_size:g}",
        )
    for name, weight, weight_name in (("content_layers", recipe.alpha, "alpha"), ("style_layers", recipe.beta, "beta")):
        layers: tuple[LayerWeight, ...] = getattr(recipe, name)
        if len(layers) > MOST_LAYERS:
            yield Violation(name, f"must name at most {MOST_LAYERS} layers, got {len(layers)}")
            continue
        if weight > 0 and not layers:
            yield Violation(name, f"must name at least one layer unless {weight_name} is 0")
        if len({layer for layer, _ in layers}) < len(layers):
            yield Violation(name, "must name each layer once")
        for i, (_, layer_weight) in enumerate(layers):
            if not LAYER_WEIGHTS.low <= layer_weight <= LAYER_WEIGHTS.high:
                yield Violation(f"{name}[{i}].weight", f"must be between 0 and 1e+06, got {layer_weight:g}")
    if not (math.isnan(recipe.alpha) or math.isnan(recipe.beta)) and recipe.alpha <= 0 and recipe.beta <= 0:
        yield Violation("beta", "must be above 0 when alpha is 0: there is nothing to optimise")


PRESETS: Mapping[str, Recipe] = {
    # A good picture in the fewest iterations: with 47 evaluations' worth at 256 px it is past the objective that Adam with
    # averaging reaches with 113 (benchmarks/RESULTS.md).
    "fast": Recipe(),
    # The best picture: the same, further down, and from a coarser beginning, so that the large shapes move too.
    "quality": Recipe(iterations=150, coarse_iterations=60, smallest_size=90),
    # The classroom procedure. Two things make it arrive at a picture. The step is in units of the gradient's own size,
    # since GATYS gradients differ by orders of magnitude between images. And the weights are about the inverse of each
    # layer's ||A||^2 / (4 N^2) for a painting in the Oxford VGG-19, which spans 4e5 (relu1_1) to 5e10 (relu4_1): with
    # equal weights relu4_1 is all that counts and the noise stays. The average takes out the zigzag of plain descent.
    "textbook": Recipe(
        style_layers=(
            LayerWeight("relu1_1", 500),
            LayerWeight("relu2_1", 2),
            LayerWeight("relu3_1", 1),
            LayerWeight("relu4_1", 0.005),
            LayerWeight("relu5_1", 50),
        ),
        beta=60.0,
        tv_weight=3e11,
        normalisation=Normalisation.GATYS,
        start=Start.NOISE,
        optimiser=Optimiser.NORMALISED_DESCENT,
        step=0.01,
        iterations=300,
        smallest_size=0,
        average=0.9,
    ),
}


class RecipeOverrides(TypedDict, total=False):
    """Fields of a recipe that differ from its preset, for typed keyword arguments."""

    content_layers: tuple[LayerWeight, ...]
    style_layers: tuple[LayerWeight, ...]
    alpha: float
    beta: float
    tv_weight: float
    normalisation: Normalisation
    pooling: Pooling
    size: int
    style_scale: float
    start: Start
    optimiser: Optimiser
    step: float
    iterations: int
    coarse_iterations: int
    smallest_size: int
    average: float
    time_budget: float


def preset(name: str, /, **overrides: Any) -> Recipe:
    """The named preset with some fields replaced.

    Raises `InvalidRecipe` if there is no such preset, no such field, or a value breaks a rule.
    """
    if name not in PRESETS:
        raise InvalidRecipe([Violation("preset", f"must be one of {', '.join(PRESETS)}, got {name!r}")])
    unknown = overrides.keys() - {f.name for f in fields(Recipe)}
    if unknown:
        raise InvalidRecipe(Violation(key, "is not a field of a recipe") for key in sorted(unknown))
    return replace(PRESETS[name], **overrides)
