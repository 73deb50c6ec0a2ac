"""Durations in buckets that grow with their size: any quantile of any number of them, in little memory.

The layout is HdrHistogram's. Its package is not used because the two cannot be installed together: hdrhistogram 0.10.8
needs setuptools 83 at run time, torch 2.12 one below 82.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Self

__all__ = ["Histogram"]

TICK_S = 1e-6
STEPS_LOG2 = 7  # each doubling has 128 buckets, so a quantile is at most 0.8 % too large


class Histogram:
    """How often which duration was seen, from a microsecond upwards.

    A quantile is the upper end of the bucket where it lies, and never more than the longest duration.
    """

    def __init__(self) -> None:
        self.count = 0
        self.total_s = 0.0
        self.max_s = 0.0
        self._buckets: Counter[int] = Counter()

    def record(self, seconds: float) -> None:
        """Counts one duration; a negative one, of a clock that stepped back, as 0."""
        seconds = max(0.0, seconds)
        self.count += 1
        self.total_s += seconds
        self.max_s = max(self.max_s, seconds)
        self._buckets[_bucket(round(seconds / TICK_S))] += 1

    def merge(self, other: Histogram) -> None:
        """Counts what the other has counted too."""
        self.count += other.count
        self.total_s += other.total_s
        self.max_s = max(self.max_s, other.max_s)
        self._buckets += other._buckets

    def quantile(self, share: float) -> float | None:
        """Seconds that a `share` (0 to 1) of the durations does not exceed; None if there are none."""
        wanted = max(1, math.ceil(share * self.count))
        return next((seconds for seconds, seen in self.curve() if seen >= wanted), None)

    def curve(self) -> Iterator[tuple[float, int]]:
        """(seconds, durations up to there) of every bucket that is not empty, shortest first."""
        seen = 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            yield min(_upper_end(bucket) * TICK_S, self.max_s), seen

    def as_json(self) -> dict[str, Any]:
        """For `from_json`, and with the quantiles that a reader wants."""
        told = {"p50": self.quantile(0.5), "p95": self.quantile(0.95), "p99": self.quantile(0.99)}
        buckets = [[bucket, self._buckets[bucket]] for bucket in sorted(self._buckets)]
        return {"count": self.count, **told, "max": self.max_s, "total": self.total_s, "buckets": buckets}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Self:
        """What `as_json` said. Raises ValueError if it does not add up, of which a curve would be nonsense."""
        new = cls()
        new.count, new.total_s, new.max_s = told["count"], told["total"], told["max"]
        new._buckets = Counter(dict(told["buckets"]))
        if new.count != new._buckets.total():
            raise ValueError(f"a histogram of {new.count} durations has {new._buckets.total()} in its buckets")
        return new


def _bucket(ticks: int) -> int:
    """Small numbers have buckets of their own; of larger ones the leading bits name it."""
    shift = max(0, ticks.bit_length() - STEPS_LOG2 - 1)
    return (shift << STEPS_LOG2) + (ticks >> shift)


def _upper_end(bucket: int) -> int:
    shift = max(0, (bucket >> STEPS_LOG2) - 1)
    return ((bucket - (shift << STEPS_LOG2) + 1) << shift) - 1
