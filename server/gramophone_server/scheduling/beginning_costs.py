"""Measured costs of the beginnings of jobs: device seconds per pixel of the style images, or of the picture that a job
joins a batch with."""

from __future__ import annotations

__all__ = ["BeginningCosts"]

NEWEST_WEIGHT = 0.3  # of a step's measurement


class BeginningCosts:
    """Device seconds by pixels. One thread writes, any thread reads."""

    def __init__(self) -> None:
        self._pixel_s: float | None = None

    def record(self, pixels: float, seconds: float) -> None:
        """Work for so many pixels took ``seconds``."""
        new = max(seconds, 0.0) / pixels
        self._pixel_s = new if self._pixel_s is None else NEWEST_WEIGHT * new + (1 - NEWEST_WEIGHT) * self._pixel_s

    def seconds(self, pixels: float) -> float | None:
        """Device seconds of work for so many pixels; None before the first measurement."""
        return None if self._pixel_s is None else self._pixel_s * pixels
