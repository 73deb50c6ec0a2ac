"""The reference of the recipe, from `gramophone.recipe`, as Markdown."""

from __future__ import annotations

from dataclasses import Field, fields
from enum import Enum
from typing import Any

from docs_site.settings import number, prose
from gramophone.recipe import PRESETS, LayerWeight, Recipe

__all__ = ["fields_markdown", "presets_markdown"]


def fields_markdown() -> str:
    """Every field: its flag, its meaning, what it may be, and its default."""
    return "\n\n".join(_field(field) for field in fields(Recipe)) + "\n"


def _field(field: Field[Any]) -> str:
    text = prose(field.metadata["help"])
    allowed = field.metadata["range"]
    if allowed is not None:
        text += f" {number(allowed.low)} to {number(allowed.high)}."
    elif isinstance(field.default, Enum):
        text += f" One of {', '.join(f'`{choice.value}`' for choice in type(field.default))}."
    else:
        text += " Layers are named as in the literature; `GetServerInfo` lists them."
    return f"`{field.name}` · `--{field.name.replace('_', '-')}`\n: {text} Default: {_value(field.default)}."


def presets_markdown() -> str:
    """A table of the presets: one row for each field in which they differ."""
    rows = [f"| field | {' | '.join(f'`{name}`' for name in PRESETS)} |", f"|---{'|---' * len(PRESETS)}|"]
    for field in fields(Recipe):
        values = [getattr(recipe, field.name) for recipe in PRESETS.values()]
        if any(value != values[0] for value in values):
            rows.append(f"| `{field.name}` | {' | '.join(map(_value, values))} |")
    return "\n".join(rows) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, Enum):
        return f"`{value.value}`"
    if isinstance(value, tuple):
        return ", ".join(_layer(layer) for layer in value)
    return number(value)


def _layer(layer: LayerWeight) -> str:
    return f"`{layer.layer}`" + (f" {number(layer.weight)}" if layer.weight != 1 else "")
