"""How jobs arrive: so many at a time, or so many a second whatever the server does."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["ClosedLoop", "Load", "OpenLoop", "poisson"]


@dataclass(frozen=True)
class ClosedLoop:
    """Each of `concurrency` callers sends its next job when it has the last one's answer."""

    concurrency: int  # 1 to 1024

    def __str__(self) -> str:
        return f"{self.concurrency} at a time"


@dataclass(frozen=True)
class OpenLoop:
    """Jobs come at random moments, as from many callers who do not know of each other."""

    rate: float  # jobs per second, above 0, at most 1000

    def __str__(self) -> str:
        return f"{self.rate:g} jobs/s"


Load = ClosedLoop | OpenLoop


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Moments of a Poisson process with `rate` arrivals a second, in seconds from its beginning, without end.

    They are a schedule: latency is counted from them, so that a job that could not be sent in time, because the jobs
    before it kept the sender busy, is not measured too short (coordinated omission).
    """
    dice, at = random.Random(seed), 0.0
    while True:
        at += dice.expovariate(rate)
        yield at
