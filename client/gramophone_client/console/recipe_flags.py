"""Converts a recipe to command-line flags and back. Generated from the fields of `Recipe`, so that none is missing."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import Field, fields
from enum import StrEnum
from typing import Any, get_type_hints

from gramophone.recipe import PRESETS, LayerWeight, Recipe, RecipeOverrides

__all__ = ["FIELD_TYPES", "add_recipe_flags", "as_flags", "flag", "recipe_overrides", "value_of"]

FIELD_TYPES: Mapping[str, Any] = get_type_hints(Recipe)


def flag(field: str) -> str:
    """The flag of a recipe's field."""
    return "--" + field.replace("_", "-")


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Adds one flag per field; without the flag, the field has the preset's value."""
    group = parser.add_argument_group("recipe", "Each flag overrides one field of the preset.")
    for field in fields(Recipe):
        kind = FIELD_TYPES[field.name]
        options: dict[str, Any]
        if kind in (int, float):
            options = {"type": kind, "metavar": "N" if kind is int else "X"}
        elif isinstance(kind, type) and issubclass(kind, StrEnum):
            options = {"choices": [str(choice) for choice in kind]}
        else:
            options = {"type": _layers, "metavar": "LAYER:WEIGHT,..."}
        group.add_argument(flag(field.name), help=_help(field), **options)


def recipe_overrides(args: argparse.Namespace) -> RecipeOverrides:
    """The fields whose flags were given."""
    overrides = RecipeOverrides()
    for name, kind in FIELD_TYPES.items():
        value = getattr(args, name)
        if value is not None:
            overrides[name] = kind(value) if isinstance(kind, type) else value  # type: ignore[literal-required]
    return overrides


def value_of(field: str, text: str) -> Any:
    """Parses the value of a recipe's field. Raises ValueError or argparse.ArgumentTypeError."""
    kind = FIELD_TYPES[field]
    return kind(text) if isinstance(kind, type) else _layers(text)


def as_flags(recipe: Recipe) -> list[str]:
    """The flags for all fields of a recipe, independent of the presets."""
    return [word for field in fields(Recipe) for word in (flag(field.name), _shown(getattr(recipe, field.name)))]


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


def _help(field: Field[Any]) -> str:
    text: str = field.metadata["help"]
    if allowed := field.metadata["range"]:
        text += f"; {allowed.low:g} to {allowed.high:g}"
    shown = {name: _shown(getattr(recipe, field.name)) for name, recipe in PRESETS.items()}
    if len(set(shown.values())) == 1:
        text += f" (default {shown['fast']})"
    else:
        text += f" (default {', '.join(f'{name} {value}' for name, value in shown.items())})"
    return text.replace("%", "%%")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(f"{layer}:{_shown(weight)}" for layer, weight in value)
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return str(value)
