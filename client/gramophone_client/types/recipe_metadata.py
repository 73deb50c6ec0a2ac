"""The recipe of a picture, read from the metadata that the server wrote into it."""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from gramophone.recipe import LayerWeight, Recipe
from gramophone_client.types.picture import metadata_of

__all__ = ["ImageRecipe", "NoRecipeError", "recipe_of"]


class NoRecipeError(ValueError):
    """The file is not a picture, or has no recipe in it."""


class ImageRecipe(NamedTuple):
    """The recipe, seed and style weights that a picture was made with."""

    recipe: Recipe
    seed: int
    style_weights: tuple[float, ...]
    iterations: int | None = None  # completed, over all scales; None if the picture does not have it
    changed_at: int = 0  # the first iteration with this recipe; 0: the recipe was never changed


def recipe_of(path: str | os.PathLike[str]) -> ImageRecipe:
    """The recipe and seed of a result. Raises `NoRecipeError` if the file has none, OSError if it cannot be read."""
    try:
        with Image.open(path) as image:
            text = metadata_of(image)
    except UnidentifiedImageError:
        raise NoRecipeError(f"{os.fspath(path)}: is not a picture") from None
    if not text:
        raise NoRecipeError(f"{os.fspath(path)}: has no recipe in it; only results of a gramophone server do")
    try:
        metadata = json.loads(text)
        fields: dict[str, Any] = dict(metadata["recipe"])
        for name in fields.keys() & {"content_layers", "style_layers"}:
            fields[name] = tuple(LayerWeight(layer, weight) for layer, weight in fields[name])
        iterations = metadata.get("iterations")
        return ImageRecipe(
            Recipe(**fields),
            int(metadata["seed"]),
            tuple(metadata["style_weights"]),
            None if iterations is None else int(iterations),
            int(metadata.get("changed_at", 0)),
        )
    except (KeyError, TypeError, ValueError) as error:  # InvalidRecipeError is a ValueError
        raise NoRecipeError(f"{os.fspath(path)}: this version does not know its recipe ({error})") from error
