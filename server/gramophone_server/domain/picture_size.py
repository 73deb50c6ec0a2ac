"""Sizes of pictures. Standard library only, for the processes that decode images."""

from __future__ import annotations

__all__ = ["MIN_SIDE", "fit", "most_encoded_bytes", "style_size"]

MIN_SIDE = 16  # of a picture in pixels; relu5_1, after four poolings, has one activation left


def fit(width: int, height: int, longest: int) -> tuple[int, int]:
    """(width, height) in pixels with the same proportions and the longest side ``longest``; each side is at least 1."""
    scale = longest / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def most_encoded_bytes(width: int, height: int) -> int:
    """Upper bound of the bytes of an encoded picture, its metadata included. The largest measured one, black and white
    noise as WebP of quality 100, has 3.2 bytes per pixel; the metadata are a recipe of at most 6 KB."""
    return width * height * 33 // 10 + 16 * 1024


def style_size(width: int, height: int, longest: int, scale: float) -> tuple[int, int]:
    """(width, height) in pixels at which the network sees a style image of ``width`` x ``height`` px.

    ``longest``: longest side of the picture in pixels. ``scale``: the recipe's ``style_scale``.
    """
    width, height = fit(width, height, round(longest * scale))
    return max(width, MIN_SIDE), max(height, MIN_SIDE)
