"""How fast iterations go, as measured, and what follows for those who wait."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from gramophone_server.domain.job_state import JobState, Shape

__all__ = ["Forecast", "ThroughputModel", "forecast"]

ENOUGH = 3  # measurements before two widths are compared
NEWEST = 0.3  # weight of the newest measurement: speeds change when a neighbour comes, and single iterations are noisy
PAYS, PAYS_NO_MORE = 1.05, 0.97  # gains at which a batch of twice the width is taken, and given up
# An iteration longer than this holds everybody up, and is so long that nothing is gained by sharing it.
LONGEST_SHARED_S = 0.05
MOST_SHAPES = 256  # that are remembered: callers choose sizes as they like, and one that comes again is soon measured


@dataclass
class Speed:
    """Of a batch, in seconds per iteration."""

    mean_s: float  # the newest counts most, and the first, with all that is made once, only until there is another
    measured: int = 0
    best_s: list[float] = field(default_factory=list)  # the shortest few, shortest first

    @property
    def known(self) -> bool:
        """Enough was measured to judge this width."""
        return len(self.best_s) == ENOUGH


class ThroughputModel:
    """Seconds per iteration by shape and width of the batch. Written on one thread, read on any."""

    def __init__(self) -> None:
        self._speeds: dict[Shape, dict[int, Speed]] = {}  # by width
        self._width: dict[Shape, int] = {}  # that pays, as far as is known

    def note(self, shape: Shape, slots: int, iterations: int, seconds: float) -> None:
        """A batch of ``slots`` has taken so long for so many iterations."""
        new = seconds / iterations
        if shape not in self._speeds:
            while len(self._speeds) >= MOST_SHAPES:
                oldest = next(iter(self._speeds))
                del self._speeds[oldest]
                self._width.pop(oldest, None)
            self._speeds[shape] = {slots: Speed(new)}
        speed = self._speeds[shape].setdefault(slots, Speed(new))
        speed.mean_s = new if speed.measured < 2 else NEWEST * new + (1 - NEWEST) * speed.mean_s
        speed.measured += 1
        bisect.insort(speed.best_s, new)
        del speed.best_s[ENOUGH:]

    def iteration_s(self, shape: Shape, slots: int) -> float | None:
        """Seconds of an iteration of such a batch; None if there was none yet."""
        speed = self._speeds.get(shape, {}).get(slots)
        return None if speed is None else speed.mean_s

    def width(self, shape: Shape, jobs: int) -> int:
        """Of the batches that so many jobs of a shape are best done in: one step wider than is known to pay, if it is not
        known not to."""
        width = self._width.get(shape, 1)
        gain, narrower = self.gain(shape, width), self.gain(shape, width // 2)
        speed = self._speeds.get(shape, {}).get(width)
        if width > 1 and narrower is not None and narrower < PAYS_NO_MORE:
            width //= 2
        elif (
            width < jobs
            and speed is not None
            and speed.known
            and 2 * speed.mean_s <= LONGEST_SHARED_S
            and (gain is None or gain > PAYS)
        ):
            width *= 2
        if speed is not None:
            self._width[shape] = width
        return width

    def gain(self, shape: Shape, slots: int) -> float | None:
        """How many times faster jobs are done in a batch of twice ``slots``; None until both are known. By the shortest
        times: what is longer was somebody else's doing."""
        speeds = self._speeds.get(shape, {})
        one, two = speeds.get(slots), speeds.get(2 * slots)
        if one is None or two is None or not (one.known and two.known):
            return None
        return 2 * one.best_s[0] / two.best_s[0]

    def job_s(self, shape: Shape) -> float | None:
        """Seconds of the device that an iteration of one job takes, in the widest batch so far; of a shape that never ran,
        in proportion to its pixels from the one that is nearest in size. None if nothing ever ran."""
        if (speeds := self._speeds.get(shape)) is not None:
            return _of_one(speeds)
        pixels = shape.width * shape.height
        near = min(  # of a copy, because another thread may write
            list(self._speeds.items()), key=lambda item: _apart(item[0].width * item[0].height, pixels), default=None
        )
        return None if near is None else _of_one(near[1]) * pixels / (near[0].width * near[0].height)

    def left_s(self, work: JobState) -> float | None:
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


def _of_one(speeds: dict[int, Speed]) -> float:
    slots = max(speeds)
    return speeds[slots].mean_s / slots
