"""How fast iterations go, as measured, and what follows for those who wait."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from typing import NamedTuple

from gramophone_server.work import Shape, Work

__all__ = ["Forecast", "Pace", "forecast"]

ENOUGH = 3  # measurements before two widths are compared
NEWEST = 0.3  # weight of the newest measurement: speeds change when a neighbour comes, and single iterations are noisy


class Pace:
    """Seconds per iteration by shape and width of the batch. Written on one thread, read on any."""

    def __init__(self) -> None:
        self._measured: dict[tuple[Shape, int], float] = {}
        self._best: dict[tuple[Shape, int], list[float]] = {}  # the shortest few, shortest first
        self._widest: dict[Shape, int] = {}

    def note(self, shape: Shape, slots: int, iterations: int, seconds: float) -> None:
        """A batch of ``slots`` has taken so long for so many iterations."""
        new, old = seconds / iterations, self._measured.get((shape, slots))
        self._measured[shape, slots] = new if old is None else NEWEST * new + (1 - NEWEST) * old
        best = self._best.setdefault((shape, slots), [])
        bisect.insort(best, new)
        del best[ENOUGH:]
        self._widest[shape] = max(slots, self._widest.get(shape, 0))

    def iteration_s(self, shape: Shape, slots: int) -> float | None:
        """Seconds of an iteration of such a batch; None if there was none yet."""
        return self._measured.get((shape, slots))

    def knows(self, shape: Shape, slots: int) -> bool:
        """Enough was measured to judge this width."""
        return len(self._best.get((shape, slots), ())) == ENOUGH

    def gain(self, shape: Shape, slots: int) -> float | None:
        """How many times faster jobs are done in a batch of twice ``slots``; None until both are known. By the shortest
        times: what is longer was somebody else's doing."""
        if not (self.knows(shape, slots) and self.knows(shape, 2 * slots)):
            return None
        return 2 * self._best[shape, slots][0] / self._best[shape, 2 * slots][0]

    def job_s(self, shape: Shape) -> float | None:
        """Seconds of the device that an iteration of one job takes, in the widest batch so far; of a shape that never ran,
        in proportion to its pixels from the one that is nearest in size. None if nothing ever ran."""
        if shape in self._widest:
            return self._of(shape)
        pixels = shape.width * shape.height
        near = min(list(self._widest), key=lambda known: _apart(known.width * known.height, pixels), default=None)
        return None if near is None else self._of(near) * pixels / (near.width * near.height)

    def _of(self, shape: Shape) -> float:
        slots = self._widest[shape]
        return self._measured[shape, slots] / slots

    def left_s(self, work: Work) -> float | None:
        """Seconds of the device that the rest of a job takes; None if nothing ever ran."""
        total = 0.0
        done_before = work.done
        for width, height, iterations in work.scales:
            here = max(0, iterations - done_before)
            done_before = max(0, done_before - iterations)
            if here:
                each = self.job_s(Shape.of(work.recipe, height, width))
                if each is None:
                    return None
                total += here * each
        return total


class Forecast(NamedTuple):
    """What becomes of jobs that wait, in seconds from now."""

    begins: tuple[float, ...]  # of each that waits, and last of one who comes behind them
    end: float  # of that last one


def forecast(running: Iterable[float], ahead: Iterable[float], own: float, most: int) -> Forecast:
    """When jobs will begin and end if nobody else comes. ``running``, ``ahead`` (in their order) and ``own``, of one who
    comes behind them, are the seconds of the device that each needs; up to ``most`` share it evenly."""
    left = sorted(running)
    now, used, begins = 0.0, 0.0, []  # `used` by each of those that share; `left` counts from when nothing was
    for seconds in (*ahead, own):
        while len(left) >= most:
            first = left.pop(0)
            now += (first - used) * (len(left) + 1)
            used = first
        begins.append(now)
        bisect.insort(left, used + seconds)
    return Forecast(tuple(begins), now + sum(min(other - used, own) for other in left))


def _apart(a: int, b: int) -> float:
    return max(a, b) / min(a, b)
