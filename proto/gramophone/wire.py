"""Converts a recipe to its message and back, field by field and by name, so that no side repeats the list of fields."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from enum import StrEnum
from typing import Any

from gramophone import recipe as recipes
from gramophone.recipe import FIELD_TYPES, InvalidRecipeError, LayerWeight, Recipe, Violation
from gramophone.v1 import style_transfer_pb2 as pb

__all__ = ["layers_to_message", "overrides_to_message", "recipe_from_message", "recipe_to_message"]


def recipe_to_message(recipe: Recipe) -> pb.Recipe:
    """Returns the message of a recipe, with every field set."""
    return overrides_to_message({f.name: getattr(recipe, f.name) for f in fields(recipe)})


def overrides_to_message(overrides: Mapping[str, Any], preset: str | None = None) -> pb.Recipe:
    """Returns a message that names the preset, if given, and sets only the given fields of `Recipe`.

    The preset and the fields must exist. Values have the exact types of `Recipe`; their ranges are not checked.
    """
    message = pb.Recipe()
    if preset is not None:
        message = pb.Recipe(preset=f"PRESET_{preset.upper()}")
    for name, value in overrides.items():
        if _is_enum(name):
            setattr(message, name, _numbers(name).Value(_prefix(name) + value.name))
        elif name.endswith("_layers"):
            getattr(message, name).CopyFrom(layers_to_message(value))  # an empty list is sent, too
        else:
            setattr(message, name, value)
    return message


def recipe_from_message(message: pb.Recipe) -> Recipe:
    """Returns the message's preset with the fields that the message sets.

    Raises `InvalidRecipeError` with every violation.
    """
    violations = []
    name = "fast"
    if message.preset not in pb.Preset.values():
        violations.append(Violation("preset", f"is an unknown value {message.preset}"))
    elif message.preset:
        name = pb.Preset.Name(message.preset).removeprefix("PRESET_").lower()
    overrides: dict[str, Any] = {}
    for key in FIELD_TYPES:
        value = getattr(message, key)
        if _is_enum(key):
            if value not in _numbers(key).values():
                violations.append(Violation(key, f"is an unknown value {value}"))
            elif value:
                overrides[key] = FIELD_TYPES[key][_numbers(key).Name(value).removeprefix(_prefix(key))]
        elif message.HasField(key):
            overrides[key] = (
                tuple(LayerWeight(l.layer, l.weight) for l in value.layers) if key.endswith("_layers") else value
            )
    try:
        recipe = recipes.preset(name, **overrides)
    except InvalidRecipeError as error:
        raise InvalidRecipeError([*violations, *error.violations]) from None
    if violations:
        raise InvalidRecipeError(violations)
    return recipe


def layers_to_message(layers: Iterable[LayerWeight]) -> pb.LayerWeights:
    """Returns the message of a list of layers."""
    return pb.LayerWeights(layers=[pb.LayerWeight(layer=layer, weight=weight) for layer, weight in layers])


def _is_enum(name: str) -> bool:
    return isinstance(FIELD_TYPES[name], type) and issubclass(FIELD_TYPES[name], StrEnum)


def _numbers(name: str) -> Any:
    return getattr(pb, FIELD_TYPES[name].__name__)


def _prefix(name: str) -> str:
    return f"{FIELD_TYPES[name].__name__.upper()}_"
