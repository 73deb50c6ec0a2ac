"""Converts a recipe to command-line flags and back. Generated from the fields of `Recipe`, so that none is missing."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from enum import StrEnum
from typing import Any

from gramophone.recipe import (
    FIELD_TYPES,
    InvalidRecipeError,
    LayerWeight,
    Recipe,
    RecipeOverrides,
    field_help,
    field_value,
    preset_name,
)
from gramophone_client.console.arguments import number, whole_number

__all__ = ["GROUPS", "add_recipe_flags", "as_flags", "flag", "preset_argument", "recipe_overrides", "value_of"]

# The groups of the help, with the fields in the order of their importance.
GROUPS: Mapping[str, Sequence[str]] = {
    "recipe: strength": ("beta", "alpha", "tv_weight"),
    "recipe: scales": ("size", "iterations", "coarse_iterations", "smallest_size", "style_scale"),
    "recipe: optimiser": ("start", "optimiser", "step", "average", "time_budget"),
    "recipe: network": ("style_layers", "content_layers", "normalisation", "pooling"),
}


def flag(field: str) -> str:
    """The flag of a recipe's field."""
    return "--" + field.replace("_", "-")


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Adds one flag per field; without the flag, the field has the preset's value."""
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            kind = FIELD_TYPES[name]
            options: dict[str, Any]
            if kind in (int, float):
                options = {"type": whole_number if kind is int else number, "metavar": "N" if kind is int else "X"}
            elif isinstance(kind, type) and issubclass(kind, StrEnum):
                options = {"type": _checked(functools.partial(field_value, name)), "choices": list(kind)}
            else:
                options = {"type": _layers, "metavar": "LAYER:WEIGHT,..."}
            group.add_argument(flag(name), help=field_help(name).replace("%", "%%"), **options)


def preset_argument(text: str) -> str:
    """An argument type: the name of a preset."""
    return str(_checked(preset_name)(text))


def recipe_overrides(args: argparse.Namespace) -> RecipeOverrides:
    """The fields whose flags were given."""
    overrides = RecipeOverrides()
    for name in FIELD_TYPES:
        value = getattr(args, name)
        if value is not None:
            overrides[name] = value  # type: ignore[literal-required]
    return overrides


def value_of(field: str, text: str) -> Any:
    """Parses the value of a recipe's field. Raises argparse.ArgumentTypeError."""
    kind = FIELD_TYPES[field]
    if kind in (int, float):
        return (whole_number if kind is int else number)(text)
    return _layers(text) if not isinstance(kind, type) else _checked(functools.partial(field_value, field))(text)


def as_flags(recipe: Recipe) -> list[str]:
    """The flags for all fields of a recipe, independent of the presets."""
    return [word for field in fields(Recipe) for word in (flag(field.name), _shown(getattr(recipe, field.name)))]


def _checked(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Makes an argument type of a function that raises `InvalidRecipeError`."""

    def value(text: str) -> Any:
        try:
            return parse(text)
        except InvalidRecipeError as error:
            raise argparse.ArgumentTypeError(error.violations[0].description) from None

    return value


def _layers(text: str) -> tuple[LayerWeight, ...]:
    """Parses `relu1_1:1,relu2_1:0.5`; the default weight is 1, and an empty text has no layers."""
    layers = []
    for word in filter(None, text.split(",")):
        layer, _, weight = word.partition(":")
        try:
            layers.append(LayerWeight(layer.strip(), float(weight or 1)))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected LAYER:WEIGHT,... like relu1_1:1,relu2_1:0.5, got {word!r}"
            ) from None
    return tuple(layers)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(f"{layer}:{_shown(weight)}" for layer, weight in value)
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return str(value)
