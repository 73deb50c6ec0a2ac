"""How a picture was made, read from what the server noted in it."""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from gramophone.recipe import LayerWeight, Recipe
from gramophone_client.types.picture import note_of

__all__ = ["NoNote", "Note", "read_note"]


class NoNote(ValueError):
    """The file is not a picture, or carries no recipe."""


class Note(NamedTuple):
    """What a picture was made with, apart from the images."""

    recipe: Recipe
    seed: int
    style_weights: tuple[float, ...]
    iterations: int | None = None  # that were done, over all scales; None: the server did not say
    changed_at: int = 0  # the first iteration of this recipe; 0: the job had no other one


def read_note(path: str | os.PathLike[str]) -> Note:
    """The recipe and seed of a result. Raises `NoNote` if the file has none, OSError if it cannot be read."""
    try:
        with Image.open(path) as image:
            text = note_of(image)
    except UnidentifiedImageError:
        raise NoNote(f"{os.fspath(path)}: is not a picture") from None
    if not text:
        raise NoNote(f"{os.fspath(path)}: has no recipe in it; only results of a gramophone server do")
    try:
        said = json.loads(text)
        fields: dict[str, Any] = dict(said["recipe"])
        for name in fields.keys() & {"content_layers", "style_layers"}:
            fields[name] = tuple(LayerWeight(layer, weight) for layer, weight in fields[name])
        done = said.get("iterations")
        return Note(
            Recipe(**fields),
            int(said["seed"]),
            tuple(said["style_weights"]),
            None if done is None else int(done),
            int(said.get("changed_at", 0)),
        )
    except (KeyError, TypeError, ValueError) as error:  # InvalidRecipe is a ValueError
        raise NoNote(f"{os.fspath(path)}: its recipe is not one that this version knows ({error})") from error
