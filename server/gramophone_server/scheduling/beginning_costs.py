"""Measured costs of the beginnings of jobs: device seconds per pixel of the style images, or of the picture that a job
joins a batch with."""

from __future__ import annotations

import math

__all__ = ["BeginningCosts"]

MEMORY_S = 10.0  # after so many seconds of measurements an earlier one has a third of its weight


class BeginningCosts:
    """Device seconds by pixels. One thread writes, any thread reads."""

    def __init__(self) -> None:
        # Sums, so that many small measurements, most of whose time is not for pixels, do not outweigh a large one.
        self._pixels = self._seconds = 0.0

    def record(self, pixels: float, seconds: float) -> None:
        """Work for so many pixels took ``seconds``."""
        kept = math.exp(-seconds / MEMORY_S)
        self._pixels, self._seconds = kept * self._pixels + pixels, kept * self._seconds + seconds

    def seconds(self, pixels: float) -> float | None:
        """Device seconds of work for so many pixels; None before the first measurement."""
        return self._seconds / self._pixels * pixels if self._pixels else None
