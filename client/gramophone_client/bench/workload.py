"""The jobs of a bench: kinds with weights, from a TOML file or from flags, and the seeded choice among them.

[[job]]
name = "thumbnail"
weight = 3          # three of these for each job of weight 1
size = 128          # any field of a recipe, or `preset`
iterations = 10
cancel = 0.1        # one in ten is left before its end

[[job]]
preset = "quality"
style_layers = { relu1_1 = 1, relu3_1 = 0.5 }
frames = false      # the unary call
deadline_s = 300
"""

from __future__ import annotations

import math
import random
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, cast

from gramophone import recipe as recipes
from gramophone.recipe import InvalidRecipe, LayerWeight, Recipe, RecipeOverrides
from gramophone_client.console.recipe_flags import TYPES

__all__ = ["BadMix", "Draw", "Kind", "draws", "read_mix"]


class BadMix(Exception):
    """A mix that cannot be used; the text names the job, the key, and what is allowed."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of job."""

    name: str
    weight: float = 1.0  # how often it comes, relative to the others; above 0
    preset: str = "fast"
    overrides: RecipeOverrides = field(default_factory=RecipeOverrides)
    frames: bool = True  # streamed with frames; else the unary call
    frame_every: int = 0  # iterations; 0: by time
    frame_size: int = 0  # longest side in pixels; 0: as they are
    cancel: float = 0.0  # share of its jobs that are left before their end, 0 to 1
    deadline_s: float | None = None  # of a job; None: the bench's

    def recipe(self) -> Recipe:
        """Complete. Raises `InvalidRecipe`."""
        return recipes.preset(self.preset, **self.overrides)


class Draw(NamedTuple):
    """The next job."""

    kind: Kind
    leave_at: float | None  # share of its iterations after which it is left; None: never


def draws(mix: Sequence[Kind], seed: int) -> Iterator[Draw]:
    """Jobs in the proportions of the mix, without end; the same for the same seed."""
    dice = random.Random(seed)
    weights = [kind.weight for kind in mix]
    while True:
        (kind,) = dice.choices(mix, weights)
        leaves, share = dice.random() < kind.cancel, dice.random()
        yield Draw(kind, share if leaves else None)


def read_mix(path: Path) -> list[Kind]:
    """The kinds of a mix file. Raises `BadMix`, or OSError if there is none."""
    try:
        told = tomllib.loads(path.read_bytes().decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadMix(f"{path}: not TOML: {error}") from None
    if unknown := told.keys() - {"job"}:
        raise BadMix(f"{path}: {min(unknown)!r} is not a key of a mix; allowed is [[job]], one for each kind")
    tables = told.get("job")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise BadMix(f"{path}: a mix needs at least one [[job]]")
    kinds = [_kind(table, number, f"{path}: job {number}") for number, table in enumerate(tables, 1)]
    names = [kind.name for kind in kinds]
    for name in names:
        if names.count(name) > 1:
            raise BadMix(f"{path}: two jobs are called {name!r}; give each a name of its own")
    return kinds


def _kind(table: Mapping[str, Any], number: int, where: str) -> Kind:
    said: dict[str, Any] = {"name": f"job {number}"}
    overrides: dict[str, Any] = {}
    for key, value in table.items():
        if key in OF_A_KIND:
            allowed, is_allowed = OF_A_KIND[key]
            if not is_allowed(value):
                raise BadMix(f"{where}: {key} must be {allowed}, got {value!r}")
            said[key] = value
        elif key in TYPES:
            overrides[key] = _recipe_value(key, value, where)
        else:
            raise BadMix(
                f"{where}: {key!r} is not a key of a job; allowed are {', '.join(OF_A_KIND)}, "
                f"and of a recipe {', '.join(TYPES)}"
            )
    kind = Kind(**said, overrides=cast(RecipeOverrides, overrides))
    try:
        kind.recipe()
    except InvalidRecipe as error:
        first = error.violations[0]
        raise BadMix(f"{where}: {first.field} {first.description}") from None
    return kind


def _recipe_value(key: str, value: Any, where: str) -> Any:
    kind = TYPES[key]
    if kind is int and _is_whole(value):
        return value
    if kind is float and _is_number(value):
        return float(value)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        allowed = f"one of {', '.join(kind)}"
        if value in list(kind):
            return kind(value)
    elif kind in (int, float):
        allowed = "a whole number" if kind is int else "a number"
    else:
        allowed = "a table of layers and weights like { relu1_1 = 1, relu2_1 = 0.5 }"
        if isinstance(value, dict) and all(_is_number(weight) for weight in value.values()):
            return tuple(LayerWeight(layer, float(weight)) for layer, weight in value.items())
    raise BadMix(f"{where}: {key} must be {allowed}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31


# What each key of a job must be, in words, and whether a value is.
OF_A_KIND: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("a text of 1 to 40 characters", lambda value: isinstance(value, str) and 0 < len(value) <= 40),
    "weight": ("a number above 0", lambda value: _is_number(value) and value > 0),
    "preset": (f"one of {', '.join(recipes.PRESETS)}", lambda value: value in list(recipes.PRESETS)),
    "frames": ("true or false", lambda value: isinstance(value, bool)),
    "frame_every": ("a whole number of iterations, 0 or more", lambda value: _is_whole(value) and value >= 0),
    "frame_size": ("a whole number of pixels, 0 or more", lambda value: _is_whole(value) and value >= 0),
    "cancel": ("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1),
    "deadline_s": ("a number of seconds above 0", lambda value: _is_number(value) and value > 0),
}
