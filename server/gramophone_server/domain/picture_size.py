"""Sizes of pictures. Standard library only, for the processes that decode images."""

from __future__ import annotations

__all__ = ["MIN_SIDE", "fit"]

MIN_SIDE = 16  # of a picture in pixels; relu5_1, after four poolings, has one activation left


def fit(width: int, height: int, longest: int) -> tuple[int, int]:
    """(width, height) in pixels with the same proportions and the longest side ``longest``; each side is at least 1."""
    scale = longest / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))
