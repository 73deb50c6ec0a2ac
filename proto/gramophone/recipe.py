"""The recipe: all settings of the optimisation, their presets and their rules.

A recipe is one frozen value, shared by server and client. The proto's `Recipe` and the command line's flags mirror it
field for field. Defaults, ranges and help texts are defined only here. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, NamedTuple, TypedDict

__all__ = [
    "PRESETS",
    "InvalidRecipeError",
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
    """The divisor of a style layer's squared Gram difference. The formulas are in the server's `engine.losses`."""

    NONE = "none"
    GATYS = "gatys"
    ELEMENTS = "elements"
    RELATIVE = "relative"


class Pooling(StrEnum):
    """Pooling of the network: maximum, as trained, or average, rescaled to the magnitude that the next layer needs."""

    MAX = "max"
    AVERAGE = "average"


class Start(StrEnum):
    """The picture before the first iteration."""

    CONTENT = "content"
    NOISE = "noise"
    IMAGE = "image"


class Optimiser(StrEnum):
    """The update rule of the pixels."""

    GRADIENT_DESCENT = "gradient-descent"
    NORMALISED_DESCENT = "normalised-descent"
    ADAM = "adam"
    LBFGS = "lbfgs"


class LayerWeight(NamedTuple):
    """A layer of the network and its weight, 0 to 1e6."""

    layer: str
    weight: float = 1.0


class Range(NamedTuple):
    """The allowed values of a number, both ends included."""

    low: float
    high: float


class Violation(NamedTuple):
    """One invalid field of a request: its path, and the rule that its value breaks."""

    field: str
    description: str


class InvalidRecipeError(ValueError):
    """A recipe that breaks its rules. `violations` lists all of them."""

    def __init__(self, violations: Iterable[Violation]) -> None:
        self.violations = tuple(violations)
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in self.violations))


MAX_LAYERS = 16  # VGG-19 has 16 convolutions
MIN_SCALE = 16  # pixels; the network halves a picture four times
LAYER_WEIGHTS = Range(0, 1e6)


def _field(default: Any, help_text: str, allowed: Range | None = None) -> Any:
    return field(default=default, metadata={"help": help_text, "range": allowed})


def _layers(*names: str) -> tuple[LayerWeight, ...]:
    return tuple(LayerWeight(name) for name in names)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete recipe; the defaults are the preset `fast`.

    The constructor checks the ranges below and raises `InvalidRecipeError` with every violation. Layer names, the
    largest size and the largest number of iterations depend on the server, which checks them.
    """

    content_layers: tuple[LayerWeight, ...] = _field(
        _layers("relu4_2"), "layers whose activations are preserved, each with a weight"
    )
    style_layers: tuple[LayerWeight, ...] = _field(
        _layers("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"),
        "layers whose Gram matrices are matched, each with a weight",
    )
    alpha: float = _field(1.0, "weight of the content", Range(0, 1e15))
    beta: float = _field(3.0, "weight of the style: the strength of the painting", Range(0, 1e15))
    tv_weight: float = _field(
        1.0, "weight of the total variation (mean squared difference of neighbouring pixels)", Range(0, 1e15)
    )
    normalisation: Normalisation = _field(Normalisation.RELATIVE, "divisor of the layers' squared differences")
    pooling: Pooling = _field(Pooling.MAX, "pooling of the network")
    size: int = _field(512, "longest side of the result in pixels", Range(16, 16384))
    style_scale: float = _field(1.0, "longest side of the style images as a multiple of the picture's", Range(0.1, 4))
    start: Start = _field(Start.CONTENT, "the picture before the first iteration")
    optimiser: Optimiser = _field(Optimiser.LBFGS, "update rule of the pixels")
    step: float = _field(
        0.02,
        "step of the optimiser, in pixel values of 0 to 1 (with gradient-descent: the factor of the gradient)",
        Range(1e-12, 1e12),
    )
    iterations: int = _field(30, "iterations at the final size", Range(1, 100_000))
    coarse_iterations: int = _field(20, "iterations at each coarser scale", Range(1, 100_000))
    smallest_size: int = _field(
        128,
        "longest side of the coarsest scale in pixels, 16 or more; each next one is sqrt(2) larger; 0: final size only",
        Range(0, 16384),
    )
    average: float = _field(
        0.0,
        "decay of the running average of the iterates, which becomes the picture; 0: the last iterate",
        Range(0, 0.999),
    )
    time_budget: float = _field(
        0.0,
        "seconds after its acceptance at which the job ends with the picture so far; 0: no bound",
        Range(0, 86_400),
    )

    def __post_init__(self) -> None:
        violations = tuple(_violations(self))
        if violations:
            raise InvalidRecipeError(violations)

    def scale_sizes(self) -> tuple[int, ...]:
        """Longest sides of the scales in pixels, coarsest first; the last is `size`."""
        sizes = [self.size]
        while self.smallest_size and round(self.size / 2 ** (len(sizes) / 2)) >= self.smallest_size:
            sizes.append(round(self.size / 2 ** (len(sizes) / 2)))
        return tuple(reversed(sizes))

    def total_iterations(self) -> int:
        """Iterations over all scales. A very thin picture skips its smallest scales and takes fewer."""
        return self.iterations + self.coarse_iterations * (len(self.scale_sizes()) - 1)


def _violations(recipe: Recipe) -> Iterable[Violation]:
    for f in fields(recipe):
        value, allowed = getattr(recipe, f.name), f.metadata["range"]
        if allowed is not None and not allowed.low <= value <= allowed.high:  # false for NaN too
            yield Violation(f.name, f"must be between {allowed.low:g} and {allowed.high:g}, got {value:g}")
    if 0 < recipe.smallest_size < MIN_SCALE:
        yield Violation(
            "smallest_size",
            f"must be {MIN_SCALE} or more, or 0 to work at the final size only, got {recipe.smallest_size:g}",
        )
    for name, weight, weight_name in (("content_layers", recipe.alpha, "alpha"), ("style_layers", recipe.beta, "beta")):
        layers: tuple[LayerWeight, ...] = getattr(recipe, name)
        if len(layers) > MAX_LAYERS:
            yield Violation(name, f"must name at most {MAX_LAYERS} layers, got {len(layers)}")
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
    # A good picture in the fewest iterations. At 256 px, 47 evaluations reach a lower objective than 113 of Adam with
    # averaging (benchmarks/RESULTS.md).
    "fast": Recipe(),
    # The best picture: the same with more iterations, and from a coarser first scale, so that large shapes move too.
    "quality": Recipe(iterations=150, coarse_iterations=60, smallest_size=90),
    # The procedure of the textbooks. Two settings make it converge to a picture. The step is in units of the gradient's
    # own magnitude, because GATYS gradients differ by orders of magnitude between images. The weights are approximately
    # the inverse of each layer's ||A||^2 / (4 N^2) for a painting in the Oxford VGG-19, which ranges from 4e5 (relu1_1)
    # to 5e10 (relu4_1); with equal weights relu4_1 dominates and the noise stays. The average removes the zigzag of
    # plain descent.
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
    """Fields of a recipe that differ from its preset, as types of keyword arguments."""

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
    """Returns the named preset with some fields replaced.

    Raises `InvalidRecipeError` if the preset or a field does not exist, or if a value breaks a rule.
    """
    if name not in PRESETS:
        raise InvalidRecipeError([Violation("preset", f"must be one of {', '.join(PRESETS)}, got {name!r}")])
    unknown = overrides.keys() - {f.name for f in fields(Recipe)}
    if unknown:
        raise InvalidRecipeError(Violation(key, "is not a field of a recipe") for key in sorted(unknown))
    return replace(PRESETS[name], **overrides)
