"""The recipe: all settings of the optimisation, their presets and their rules.

A recipe is one frozen value, shared by server and client. The proto's `Recipe` and the command line's flags mirror it
field for field. Defaults, ranges and help texts are defined only here. Standard library only.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, SupportsFloat, SupportsIndex, TypedDict, get_type_hints

from gramophone.values import MisfitError, choice, did_you_mean, number, own_values, shown, shown_number, whole_number

__all__ = [
    "FIELD_TYPES",
    "OTHER_NAMES",
    "PRESETS",
    "InvalidRecipeError",
    "LayerWeight",
    "Layers",
    "Normalisation",
    "Optimiser",
    "Pooling",
    "PresetName",
    "Range",
    "Recipe",
    "RecipeOverrides",
    "Start",
    "Violation",
    "field_help",
    "field_value",
    "preset",
    "preset_name",
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
        self.violations: tuple[Violation, ...] = tuple(violations)
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in self.violations))


if not TYPE_CHECKING:  # unseen by type checkers, which would accept any name otherwise

    def __getattr__(name: str) -> object:
        if name != "InvalidRecipe":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        warnings.warn("InvalidRecipe is deprecated; write InvalidRecipeError", DeprecationWarning, stacklevel=2)
        return InvalidRecipeError


# What other programs call the fields and their values. An unknown name is refused with ours as a proposal.
OTHER_NAMES: Mapping[str, str] = {
    "lr": "step",
    "learning_rate": "step",
    "step_size": "step",
    "style_weight": "beta",
    "style_strength": "beta",
    "strength": "beta",
    "content_weight": "alpha",
    "tv": "tv_weight",
    "total_variation": "tv_weight",
    "total_variation_weight": "tv_weight",
    "normalization": "normalisation",
    "optimizer": "optimiser",
    "iter": "iterations",
    "max_iter": "iterations",
    "max_iterations": "iterations",
    "n_iter": "iterations",
    "num_iterations": "iterations",
    "num_steps": "iterations",
    "steps": "iterations",
    "epochs": "iterations",
    "image_size": "size",
    "max_size": "size",
    "width": "size",
    "init": "start",
    "pool": "pooling",
    "ema": "average",
    "max_time": "time_budget",
}
OTHER_VALUES: Mapping[str, str] = {
    "avg": "average",
    "mean": "average",
    "gd": "gradient-descent",
    "sgd": "gradient-descent",
    "l_bfgs": "lbfgs",
    "random": "noise",
}
MAX_LAYERS = 16  # VGG-19 has 16 convolutions
MIN_SCALE = 16  # pixels; the network halves a picture four times
MAX_LAYER_NAME = 32  # characters; a name has 7
LAYER_WEIGHTS = Range(0, 1e6)


def _field(default: Any, help_text: str, allowed: Range | None = None) -> Any:
    return field(default=default, metadata={"help": help_text, "range": allowed})


def _layers(*names: str) -> tuple[LayerWeight, ...]:
    return tuple(LayerWeight(name) for name in names)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete recipe; the defaults are the preset `fast`.

    The constructor takes all forms of values that `RecipeOverrides` names and keeps their exact types. It checks the
    ranges below and raises `InvalidRecipeError` with every violation. Layer names, the largest size and the largest
    number of iterations depend on the server, which checks them.
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
        violations: list[Violation] = []
        for f in fields(self):
            try:
                object.__setattr__(self, f.name, field_value(f.name, getattr(self, f.name)))  # the class is frozen
            except InvalidRecipeError as error:
                violations += error.violations
        violations += _joint_violations(self, {v.field.partition("[")[0] for v in violations})
        if violations:
            raise InvalidRecipeError(violations)

    def __repr__(self) -> str:
        """Only the fields that differ from the preset `fast`."""
        return own_values(self)

    def scale_sizes(self) -> tuple[int, ...]:
        """Longest sides of the scales in pixels, coarsest first; the last is `size`."""
        sizes = [self.size]
        while self.smallest_size and round(self.size / 2 ** (len(sizes) / 2)) >= self.smallest_size:
            sizes.append(round(self.size / 2 ** (len(sizes) / 2)))
        return tuple(reversed(sizes))

    def total_iterations(self) -> int:
        """Iterations over all scales. A very thin picture skips its smallest scales and takes fewer."""
        return self.iterations + self.coarse_iterations * (len(self.scale_sizes()) - 1)


def _joint_violations(recipe: Recipe, wrong: set[str]) -> Iterable[Violation]:
    """Violations of the rules for several fields, those in `wrong` aside."""
    for name, weight_name in (("content_layers", "alpha"), ("style_layers", "beta")):
        if not {name, weight_name} & wrong and getattr(recipe, weight_name) > 0 and not getattr(recipe, name):
            yield Violation(name, f"must name at least one layer unless {weight_name} is 0")
    if not {"alpha", "beta"} & wrong and recipe.alpha == 0 and recipe.beta == 0:
        yield Violation("beta", "must be above 0 when alpha is 0: there is nothing to optimise")


def field_value(name: str, value: Any) -> Any:
    """The exact value of one field of a recipe, from any form that `RecipeOverrides` names for it.

    Raises `InvalidRecipeError` with every violation of the field's own rules.
    """
    kind, allowed = FIELD_TYPES[name], RANGES[name]
    if value is None:
        raise InvalidRecipeError([Violation(name, "must not be None; leave it out for the value of the preset")])
    if name.endswith("_layers"):
        return _layer_weights(name, value)
    try:
        if kind in (int, float):
            exact: Any = whole_number(value) if kind is int else number(value)
        else:
            exact = kind(choice(value, kind, OTHER_VALUES))
    except MisfitError as error:
        raise InvalidRecipeError([Violation(name, str(error))]) from None
    if allowed is not None and not allowed.low <= exact <= allowed.high:  # false for NaN too
        rule = f"must be between {allowed.low:g} and {allowed.high:g}, got {shown_number(exact)}"
        raise InvalidRecipeError([Violation(name, rule)])
    if name == "smallest_size" and 0 < exact < MIN_SCALE:
        rule = f"must be {MIN_SCALE} or more, or 0 to work at the final size only, got {exact}"
        raise InvalidRecipeError([Violation(name, rule)])
    return exact


def _layer_weights(name: str, value: Any) -> tuple[LayerWeight, ...]:
    items = list(value.items()) if isinstance(value, Mapping) else value
    if isinstance(items, str | bytes | LayerWeight) or not isinstance(items, Sequence):
        hint = f"; write [{value!r}]" if isinstance(value, str) and len(value) <= MAX_LAYER_NAME else ""
        rule = f'must be layers, like {{"relu1_1": 1.0}} or ["relu1_1"], got {shown(value)}{hint}'
        raise InvalidRecipeError([Violation(name, rule)])
    if len(items) > MAX_LAYERS:
        raise InvalidRecipeError([Violation(name, f"must name at most {MAX_LAYERS} layers, got {len(items)}")])
    violations, layers = [], []
    for i, item in enumerate(items):
        match item:
            case str() as layer:
                weight: Any = 1.0
            case (str() as layer, weight):
                pass
            case _:
                rule = f'must be the name of a layer or a pair like ("relu1_1", 1.0), got {shown(item)}'
                violations.append(Violation(f"{name}[{i}]", rule))
                continue
        try:
            weight = number(weight)
            if not LAYER_WEIGHTS.low <= weight <= LAYER_WEIGHTS.high:
                raise MisfitError(f"must be between 0 and 1e+06, got {weight:g}")
            layers.append(LayerWeight(str(layer), weight))
        except MisfitError as error:
            violations.append(Violation(f"{name}[{i}].weight", str(error)))
            layers.append(LayerWeight(str(layer), 0.0))
    if len({layer for layer, _ in layers}) < len(layers):
        violations.insert(0, Violation(name, "must name each layer once"))
    if violations:
        raise InvalidRecipeError(violations)
    return tuple(layers)


FIELD_TYPES: Mapping[str, Any] = get_type_hints(Recipe)
RANGES: Mapping[str, Range | None] = {f.name: f.metadata["range"] for f in fields(Recipe)}

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


PresetName = Literal["fast", "quality", "textbook"]

Layers = Mapping[str, SupportsFloat] | Sequence[str | tuple[str, SupportsFloat]]
"""Layers and their weights: {"relu1_1": 1.0}, `LayerWeight`s or other pairs, or names alone, whose weight is 1."""


class RecipeOverrides(TypedDict, total=False):
    """Fields of a recipe that differ from its preset, as types of keyword arguments. Numbers of numpy fit, too."""

    content_layers: Layers
    style_layers: Layers
    alpha: float | SupportsFloat
    beta: float | SupportsFloat
    tv_weight: float | SupportsFloat
    normalisation: Normalisation | Literal["none", "gatys", "elements", "relative"]
    pooling: Pooling | Literal["max", "average"]
    size: int | SupportsIndex
    style_scale: float | SupportsFloat
    start: Start | Literal["content", "noise", "image"]
    optimiser: Optimiser | Literal["gradient-descent", "normalised-descent", "adam", "lbfgs"]
    step: float | SupportsFloat
    iterations: int | SupportsIndex
    coarse_iterations: int | SupportsIndex
    smallest_size: int | SupportsIndex
    average: float | SupportsFloat
    time_budget: float | SupportsFloat


def preset(name: str, /, **overrides: Any) -> Recipe:
    """Returns the named preset with some fields replaced, in any form that `RecipeOverrides` names.

    Raises `InvalidRecipeError` with every violation: an unknown preset, an unknown field, a value that breaks a rule.
    """
    violations: list[Violation] = []
    try:
        base = PRESETS[preset_name(name)]
    except InvalidRecipeError as error:
        violations += error.violations
        base = PRESETS["fast"]
    for key in sorted(overrides.keys() - FIELD_TYPES.keys()):
        hint = did_you_mean(key, FIELD_TYPES, OTHER_NAMES)
        violations.append(Violation(key, f"is not a field of a recipe{hint}"))
    try:
        recipe = replace(base, **{key: value for key, value in overrides.items() if key in FIELD_TYPES})
    except InvalidRecipeError as error:
        raise InvalidRecipeError([*violations, *error.violations]) from None
    if violations:
        raise InvalidRecipeError(violations)
    return recipe


def preset_name(name: Any) -> str:
    """The name, if it is one of a preset. Raises `InvalidRecipeError`."""
    if isinstance(name, str) and name in PRESETS:
        return name
    hint = did_you_mean(name, PRESETS, {}) if isinstance(name, str) else ""
    raise InvalidRecipeError([Violation("preset", f"must be one of {', '.join(PRESETS)}, got {shown(name)}{hint}")])


def field_help(name: str) -> str:
    """One line about a field of a recipe: its meaning and unit, its range, its value in the presets."""
    metadata = next(f.metadata for f in fields(Recipe) if f.name == name)
    text: str = metadata["help"]
    if allowed := metadata["range"]:
        text += f"; {allowed.low:g} to {allowed.high:g}"
    defaults = [_short(getattr(PRESETS["fast"], name))]
    for other, recipe in PRESETS.items():
        if (value := _short(getattr(recipe, name))) != defaults[0]:
            defaults.append(f"{other} {value}")
    return f"{text} (default {', '.join(defaults)})"


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(f"{layer}:{_short(weight)}" for layer, weight in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
