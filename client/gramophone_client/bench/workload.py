"""The workload of a bench: weighted kinds of jobs, from a TOML file or from flags, and the random choice among them.

An example of the file (`--mix`):

[[job]]
name = "thumbnail"
weight = 3          # three of these for each job of weight 1
size = 128          # any field of a recipe, or `preset`
iterations = 10
cancel = 0.1        # one in ten is cancelled before its end

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
from gramophone.recipe import FIELD_TYPES, InvalidRecipeError, LayerWeight, Recipe, RecipeOverrides

__all__ = ["InvalidWorkload", "JobKind", "PlannedJob", "planned_jobs", "read_workload"]


class InvalidWorkload(Exception):
    """A workload that cannot be used; the message names the job, the key, and the allowed values."""


@dataclass(frozen=True, kw_only=True)
class JobKind:
    """One kind of job."""

    name: str
    weight: float = 1.0  # relative frequency, above 0
    preset: str = "fast"
    overrides: RecipeOverrides = field(default_factory=RecipeOverrides)
    frames: bool = True  # True: the stream, with frames; False: the unary call
    frame_every: int = 0  # iterations between frames; 0: by time
    frame_size: int = 0  # longest side in pixels; 0: full size
    cancel: float = 0.0  # share of its jobs that are cancelled before their end, 0 to 1
    deadline_s: float | None = None  # of a job; None: the deadline of the bench

    def recipe(self) -> Recipe:
        """The complete recipe. Raises `InvalidRecipeError`."""
        return recipes.preset(self.preset, **self.overrides)


class PlannedJob(NamedTuple):
    """A job to send."""

    kind: JobKind
    cancel_at: float | None  # share of its iterations after which it is cancelled; None: it is not


def planned_jobs(workload: Sequence[JobKind], seed: int) -> Iterator[PlannedJob]:
    """Yields jobs in the proportions of the workload, without end. The same seed yields the same jobs."""
    rng = random.Random(seed)
    weights = [kind.weight for kind in workload]
    while True:
        (kind,) = rng.choices(workload, weights)
        is_cancelled, share = rng.random() < kind.cancel, rng.random()
        yield PlannedJob(kind, share if is_cancelled else None)


def read_workload(path: Path) -> list[JobKind]:
    """The kinds of jobs in a mix file. Raises `InvalidWorkload`, or OSError if the file cannot be read."""
    try:
        document = tomllib.loads(path.read_bytes().decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidWorkload(f"{path}: not TOML: {error}") from None
    if unknown := document.keys() - {"job"}:
        raise InvalidWorkload(
            f"{path}: {min(unknown)!r} is not a key of a mix file; allowed is [[job]], one for each kind of job"
        )
    tables = document.get("job")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise InvalidWorkload(f"{path}: a mix file needs at least one [[job]]")
    kinds = [_kind(table, number, f"{path}: job {number}") for number, table in enumerate(tables, 1)]
    names = [kind.name for kind in kinds]
    for name in names:
        if names.count(name) > 1:
            raise InvalidWorkload(f"{path}: two jobs have the name {name!r}; names must be unique")
    return kinds


def _kind(table: Mapping[str, Any], number: int, where: str) -> JobKind:
    options: dict[str, Any] = {"name": f"job {number}"}
    overrides: dict[str, Any] = {}
    for key, value in table.items():
        if key in JOB_KEYS:
            allowed, is_allowed = JOB_KEYS[key]
            if not is_allowed(value):
                raise InvalidWorkload(f"{where}: {key} must be {allowed}, got {value!r}")
            options[key] = value
        elif key in FIELD_TYPES:
            overrides[key] = _recipe_value(key, value, where)
        else:
            raise InvalidWorkload(
                f"{where}: {key!r} is not a key of a job; allowed are {', '.join(JOB_KEYS)}, "
                f"and the fields of a recipe: {', '.join(FIELD_TYPES)}"
            )
    kind = JobKind(**options, overrides=cast(RecipeOverrides, overrides))
    try:
        kind.recipe()
    except InvalidRecipeError as error:
        first = error.violations[0]
        raise InvalidWorkload(f"{where}: {first.field} {first.description}") from None
    return kind


def _recipe_value(key: str, value: Any, where: str) -> Any:
    kind = FIELD_TYPES[key]
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
    raise InvalidWorkload(f"{where}: {key} must be {allowed}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31


# For each key of a job: a description of the allowed values, and a function that checks a value.
JOB_KEYS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("a string of 1 to 40 characters", lambda value: isinstance(value, str) and 0 < len(value) <= 40),
    "weight": ("a number above 0", lambda value: _is_number(value) and value > 0),
    "preset": (f"one of {', '.join(recipes.PRESETS)}", lambda value: value in list(recipes.PRESETS)),
    "frames": ("true or false", lambda value: isinstance(value, bool)),
    "frame_every": ("a whole number of iterations, 0 or more", lambda value: _is_whole(value) and value >= 0),
    "frame_size": ("a whole number of pixels, 0 or more", lambda value: _is_whole(value) and value >= 0),
    "cancel": ("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1),
    "deadline_s": ("a number of seconds above 0", lambda value: _is_number(value) and value > 0),
}
