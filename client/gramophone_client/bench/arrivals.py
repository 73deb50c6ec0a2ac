"""How jobs arrive: a fixed number at a time (closed loop), or a fixed rate regardless of the server (open loop)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["ClosedLoop", "LoadProfile", "OpenLoop", "poisson"]


@dataclass(frozen=True)
class ClosedLoop:
    """Each of `concurrency` callers sends its next job when its last one has ended."""

    concurrency: int  # 1 to 1024

    def __str__(self) -> str:
        return f"{self.concurrency} at a time"


@dataclass(frozen=True)
class OpenLoop:
    """Jobs arrive at random moments, as from many independent callers."""

    rate: float  # jobs per second, above 0, at most 1000

    def __str__(self) -> str:
        return f"{self.rate:g} jobs/s"


LoadProfile = ClosedLoop | OpenLoop


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Yields the arrival times of a Poisson process with `rate` arrivals per second, in seconds from its start.

    The times are a schedule from which latency is counted. A job that is sent late because earlier jobs kept the sender
    busy is therefore not measured too short (coordinated omission). The iterator has no end.
    """
    rng, time_s = random.Random(seed), 0.0
    while True:
        time_s += rng.expovariate(rate)
        yield time_s
