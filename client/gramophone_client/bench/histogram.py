"""A histogram of durations: quantiles of any number of durations in little memory.

The buckets are those of HdrHistogram: their width grows with the duration. The package hdrhistogram was not used
because it could not be installed beside torch: hdrhistogram 0.10.8 needs setuptools 83 at run time, torch 2.12 one
below 82.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Self

__all__ = ["Histogram"]

TICK_S = 1e-6
BUCKETS_LOG2 = 7  # log2 of the buckets per doubling; with 128 a quantile is at most 0.8 % too large


class Histogram:
    """Counts durations, with a resolution of one microsecond or 0.8 %, whichever is larger.

    A quantile is the upper end of its bucket, limited to the longest duration that was recorded.
    """

    def __init__(self) -> None:
        self.count: int = 0
        self.total_s: float = 0.0
        self.max_s: float = 0.0
        self._buckets: Counter[int] = Counter()

    def record(self, seconds: float) -> None:
        """Adds a duration. A negative one, from a clock that was set back, counts as 0."""
        seconds = max(0.0, seconds)
        self.count += 1
        self.total_s += seconds
        self.max_s = max(self.max_s, seconds)
        self._buckets[_bucket(round(seconds / TICK_S))] += 1

    def merge(self, other: Histogram) -> None:
        """Adds all durations of the other histogram."""
        self.count += other.count
        self.total_s += other.total_s
        self.max_s = max(self.max_s, other.max_s)
        self._buckets += other._buckets

    def quantile(self, share: float) -> float | None:
        """The shortest time in seconds that a `share` (0 to 1) of the durations does not exceed; None if empty."""
        rank = max(1, math.ceil(share * self.count))
        return next((seconds for seconds, seen in self.curve() if seen >= rank), None)

    def curve(self) -> Iterator[tuple[float, int]]:
        """Yields (upper end in seconds, cumulative count) of each bucket that is not empty, shortest first."""
        seen = 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            yield min(_upper_end(bucket) * TICK_S, self.max_s), seen

    def as_json(self) -> dict[str, Any]:
        """The JSON form that `from_json` reads. The quantiles are for people who read the file."""
        quantiles = {"p50": self.quantile(0.5), "p95": self.quantile(0.95), "p99": self.quantile(0.99)}
        buckets = [[bucket, self._buckets[bucket]] for bucket in sorted(self._buckets)]
        return {"count": self.count, **quantiles, "max": self.max_s, "total": self.total_s, "buckets": buckets}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Reads the output of `as_json`. Raises ValueError if the count differs from the sum of the buckets."""
        new = cls()
        new.count, new.total_s, new.max_s = data["count"], data["total"], data["max"]
        new._buckets = Counter(dict(data["buckets"]))
        if new.count != new._buckets.total():
            raise ValueError(f"a histogram of {new.count} durations has {new._buckets.total()} in its buckets")
        return new


def _bucket(ticks: int) -> int:
    """The bucket of a duration in ticks. Numbers below 256 have one each; larger ones share their 8 leading bits."""
    shift = max(0, ticks.bit_length() - BUCKETS_LOG2 - 1)
    return (shift << BUCKETS_LOG2) + (ticks >> shift)


def _upper_end(bucket: int) -> int:
    """The largest number of ticks in the bucket."""
    shift = max(0, (bucket >> BUCKETS_LOG2) - 1)
    return ((bucket - (shift << BUCKETS_LOG2) + 1) << shift) - 1
