"""The time of a GPU check. Its processes share it, because the monotonic clock is the machine's."""

from __future__ import annotations

import time
from typing import NamedTuple

__all__ = ["Clock"]


class Clock(NamedTuple):
    """A time limit, from a moment on."""

    began: float  # by `time.monotonic`
    seconds: float

    @property
    def used(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    @property
    def left(self) -> float:
        """Seconds until the limit, at least 0."""
        return max(0.0, self.seconds - self.used)

    def __str__(self) -> str:
        return f"{self.used:3.0f} s used, {self.left:3.0f} s left"
