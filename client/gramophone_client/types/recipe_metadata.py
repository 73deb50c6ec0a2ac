"""How a picture was made, read from what the server noted in it."""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from gramophone.recipe import LayerWeight, Recipe
from gramophone_client.types.picture import metadata_of

__all__ = ["ImageRecipe", "NoRecipe", "recipe_of"]


class NoRecipe(ValueError):
    """The file is not a picture, or carries no recipe."""


class ImageRecipe(NamedTuple):
    """What a picture was made with, apart from the images."""

    recipe: Recipe
    seed: int
    style_weights: tuple[float, ...]
    iterations: int | None = None  # that were done, over all scales; None: the server did not say
    changed_at: int = 0  # the first iteration of this recipe; 0: the job had no other one


def recipe_of(path: str | os.PathLike[str]) -> ImageRecipe:
    """The recipe and seed of a result. Raises `NoRecipe` if the file has none, OSError if it cannot be read."""
    try:
        with Image.open(path) as image:
            text = metadata_of(image)
    except UnidentifiedImageError:
        raise NoRecipe(f"{os.fspath(path)}: is not a picture") from None
    if not text:
        raise NoRecipe(f"{os.fspath(path)}: has no recipe in it; only results of a gramophone server do")
    try:
        metadata = json.loads(text)
        fields: dict[str, Any] = dict(metadata["recipe"])
        for name in fields.keys() & {"content_layers", "style_layers"}:
            fields[name] = tuple(LayerWeight(layer, weight) for layer, weight in fields[name])
        done = metadata.get("iterations")
        return ImageRecipe(
            Recipe(**fields),
            int(metadata["seed"]),
            tuple(metadata["style_weights"]),
            None if done is None else int(done),
            int(metadata.get("changed_at", 0)),
        )
    except (KeyError, TypeError, ValueError) as error:  # InvalidRecipe is a ValueError
        raise NoRecipe(f"{os.fspath(path)}: its recipe is not one that this version knows ({error})") from error
