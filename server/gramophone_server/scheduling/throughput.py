"""Measured speed of batches, and forecasts from it."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from gramophone_server.domain.job_state import JobState, Shape
from gramophone_server.scheduling.beginning_costs import BeginningCosts

__all__ = ["Forecast", "ThroughputModel", "forecast"]

MIN_MEASUREMENTS = 3  # of each of two widths before they are compared
# Weight of the newest measurement: speeds change when other processes start or stop, and single iterations are noisy.
NEWEST_WEIGHT = 0.3
# Gains at which batches of twice the width are tried, and at which they are given up.
GAIN_TO_WIDEN, GAIN_TO_NARROW = 1.05, 0.97
# A longer iteration delays all other jobs, and keeps the device so busy that nothing is gained by a shared batch.
MAX_SHARED_S = 0.05
MAX_SHAPES = 256  # kept at the same time: callers choose any size, and a forgotten shape is soon measured again


@dataclass
class Speed:
    """Seconds per iteration of batches of one shape and width."""

    # Running mean. The first measurement includes one-time costs, so the second one replaces it.
    mean_s: float
    measurements: int = 0
    # The `MIN_MEASUREMENTS` shortest measurements, shortest first.
    shortest_s: list[float] = field(default_factory=list)

    @property
    def is_comparable(self) -> bool:
        """There are enough measurements to compare this width with another."""
        return len(self.shortest_s) == MIN_MEASUREMENTS


@dataclass
class ShapeSpeeds:
    """The measured speeds of the batches of one shape."""

    by_width: dict[int, Speed] = field(default_factory=dict)
    best_width: int = 1  # of those that were measured


class ThroughputModel:
    """Seconds per iteration, by the shape and the width of a batch. One thread writes, any thread reads."""

    def __init__(self) -> None:
        self._shapes: dict[Shape, ShapeSpeeds] = {}
        self.beginnings, self.joins = BeginningCosts(), BeginningCosts()

    def __len__(self) -> int:
        """The number of shapes that are kept."""
        return len(self._shapes)

    def record(self, shape: Shape, slots: int, iterations: int, seconds: float) -> None:
        """Adds a measurement: ``iterations`` of a batch of ``slots`` took ``seconds``."""
        new = seconds / iterations
        if shape not in self._shapes:
            while len(self._shapes) >= MAX_SHAPES:
                del self._shapes[next(iter(self._shapes))]
            self._shapes[shape] = ShapeSpeeds({slots: Speed(new)})
        speed = self._shapes[shape].by_width.setdefault(slots, Speed(new))
        if speed.measurements < 2:
            speed.mean_s = new
        else:
            speed.mean_s = NEWEST_WEIGHT * new + (1 - NEWEST_WEIGHT) * speed.mean_s
        speed.measurements += 1
        bisect.insort(speed.shortest_s, new)
        del speed.shortest_s[MIN_MEASUREMENTS:]

    def batch_seconds_per_iteration(self, shape: Shape, slots: int) -> float | None:
        """Seconds per iteration of a batch of this shape and width; None if it was never measured."""
        speed = self._speed(shape, slots)
        return None if speed is None else speed.mean_s

    def best_width(self, shape: Shape, jobs: int) -> int:
        """Best batch width for this many jobs. Tries the next power of two until a measurement shows it is slower."""
        speeds = self._shapes.get(shape)
        width = 1 if speeds is None else speeds.best_width
        gain, gain_of_half = self.gain(shape, width), self.gain(shape, width // 2)
        speed = self._speed(shape, width)
        if width > 1 and gain_of_half is not None and gain_of_half < GAIN_TO_NARROW:
            width //= 2
        elif (
            width < jobs
            and speed is not None
            and speed.is_comparable
            and 2 * speed.mean_s <= MAX_SHARED_S
            and (gain is None or gain > GAIN_TO_WIDEN)
        ):
            width *= 2
        if speeds is not None and speed is not None:
            speeds.best_width = width
        return width

    def gain(self, shape: Shape, slots: int) -> float | None:
        """How many times faster jobs are done in batches of twice ``slots``; None until both widths are comparable.
        Compares the shortest times, because longer ones are due to other processes."""
        speed, speed_of_double = self._speed(shape, slots), self._speed(shape, 2 * slots)
        if speed is None or speed_of_double is None or not (speed.is_comparable and speed_of_double.is_comparable):
            return None
        return 2 * speed.shortest_s[0] / speed_of_double.shortest_s[0]

    def seconds_per_iteration(self, shape: Shape) -> float | None:
        """Device seconds per iteration of one job, in the widest batch that was measured. For a shape that never ran,
        scales the time of the shape nearest in size by the number of pixels. None if no job ever ran."""
        if (speeds := self._shapes.get(shape)) is not None:
            return _job_share(speeds)
        pixels = shape.width * shape.height
        nearest = min(
            list(self._shapes.items()),  # a copy, because the other thread may add a shape
            key=lambda item: _ratio(item[0].width * item[0].height, pixels),
            default=None,
        )
        if nearest is None:
            return None
        return _job_share(nearest[1]) * pixels / (nearest[0].width * nearest[0].height)

    def remaining_seconds(self, state: JobState) -> float | None:
        """Device seconds for the remaining iterations of a job; None if no job ever ran."""
        total_s = 0.0
        done_before = state.done
        for width, height, iterations in state.scales:
            left = max(0, iterations - done_before)
            done_before = max(0, done_before - iterations)
            if left:
                iteration_s = self.seconds_per_iteration(Shape.of(state.recipe, height, width))
                if iteration_s is None:
                    return None
                total_s += left * iteration_s
        return total_s

    def _speed(self, shape: Shape, slots: int) -> Speed | None:
        speeds = self._shapes.get(shape)
        return None if speeds is None else speeds.by_width.get(slots)


class Forecast(NamedTuple):
    """When waiting jobs will start and end, in seconds from now."""

    starts: tuple[float, ...]  # of each waiting job; the last one is that of a job that arrives now
    end: float  # of the job that arrives now


def forecast(running: Iterable[float], waiting: Iterable[float], own: float, max_running: int) -> Forecast:
    """When jobs will start and end if no more jobs arrive. Up to ``max_running`` jobs share the device evenly.

    ``running``, ``waiting`` (in queue order) and ``own`` are the device seconds that the running jobs, the waiting jobs
    and a job that arrives now need.
    """
    # Two clocks: `now` counts seconds, `share` the device seconds that each running job has received.
    now, share, starts = 0.0, 0.0, []
    ends = sorted(running)  # of the running jobs, on the clock `share`
    for seconds in (*waiting, own):
        while len(ends) >= max_running:
            first = ends.pop(0)
            now += (first - share) * (len(ends) + 1)
            share = first
        starts.append(now)
        bisect.insort(ends, share + seconds)
    return Forecast(tuple(starts), now + sum(min(other - share, own) for other in ends))


def _ratio(a: int, b: int) -> float:
    return max(a, b) / min(a, b)


def _job_share(speeds: ShapeSpeeds) -> float:
    """Seconds per iteration of one job in the widest batch."""
    slots = max(speeds.by_width)
    return speeds.by_width[slots].mean_s / slots
