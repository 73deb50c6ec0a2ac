"""How long things were measured, and which of them are forgotten when there is no room for more."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol, TypeVar

__all__ = ["Evidence", "forget_least"]

HALF_LIFE_S = 300.0  # after which a measurement counts half
# The part of all that was measured last, and so has a chance to be measured again.
NEWEST_PART = 1 / 4


@dataclass
class Evidence:
    """For how many seconds something was measured, older ones counting less."""

    seconds: float = 0.0
    measured_at: float = -math.inf

    def add(self, seconds: float, now: float) -> None:
        """Adds a measurement of so many seconds."""
        self.seconds = self.weight(now) + seconds
        self.measured_at = now

    def weight(self, now: float) -> float:
        """The seconds as they count now."""
        return self.seconds * 0.5 ** ((now - self.measured_at) / HALF_LIFE_S) if self.seconds else 0.0


class Measured(Protocol):
    """Something that is measured."""

    evidence: Evidence


K = TypeVar("K", bound=Hashable)
M = TypeVar("M", bound=Measured)


def forget_least(known: dict[K, M], most: int, now: float) -> None:
    """Makes room in ``known``, for at most ``most`` things, for one more: without those that were measured for the
    shortest time. Clients choose what is measured: with the oldest forgotten first, 70 jobs of 40 ms, each unlike the
    others, made the server forget all that it knew. Those measured last are kept in any case.
    """
    while len(known) >= most:
        by_age = sorted(known, key=lambda key: known[key].evidence.measured_at)
        older = by_age[: max(1, len(by_age) - int(NEWEST_PART * most))]
        del known[min(older, key=lambda key: known[key].evidence.weight(now))]
