"""A place in the scheduler, as a value."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Reservation"]


@dataclass(frozen=True)
class Reservation:
    """A place for one job whose images are not decoded yet. See `Scheduler.reserve`, `submit` and `release`."""

    number: int
    owner: str = ""  # for whom it counts
