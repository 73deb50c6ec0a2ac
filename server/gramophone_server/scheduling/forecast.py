"""Forecasts: what a job still needs of the device, when jobs start and end, and which deadlines can be promised.

The device is shared evenly, up to `MAX_URGENT_SHARE` of it is given to jobs whose deadlines need it (see `urgency`).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gramophone_server.domain.job_state import JobState, Shape
from gramophone_server.scheduling.cost_model import Estimate
from gramophone_server.scheduling.fair_share import BURST_S
from gramophone_server.scheduling.throughput import ThroughputModel

__all__ = [
    "MAX_URGENT_SHARE",
    "Forecast",
    "Forecaster",
    "Promise",
    "Work",
    "broken_promise",
    "even_sharing",
    "sharing_by_callers",
]

# Of the device, for all jobs together whose deadlines need more than an even share. The others have a fifth of it.
MAX_URGENT_SHARE = 0.8
# Of the time to a deadline: estimates are not better than this, so a promise counts as broken only beyond it.
PROMISE_TOLERANCE = 0.02


class Work(NamedTuple):
    """What a job still needs, in seconds: of the device, if it shares batches with other jobs, and alone.

    The low values are the least that the measurements allow, and count nothing of what was not measured near by.
    """

    share_s: float  # device seconds
    alone_s: float  # from now to its end, if it, or the batch that it is in, has the device alone
    low_share_s: float
    low_alone_s: float
    spread: float  # relative standard deviation
    age_s: float  # of the device's newest measurement
    measured: int  # pixels of the nearest one to the last scale; 0: nothing was measured near by

    @property
    def high_s(self) -> float:
        """Device seconds, one standard deviation more than estimated."""
        return self.share_s * (1 + self.spread)


class Forecaster:
    """Estimates of work, from what ``throughput`` has measured. Any thread may use it."""

    def __init__(self, throughput: ThroughputModel) -> None:
        self._throughput = throughput

    def decoding_s(self, image_pixels: int) -> float:
        """Estimated seconds until a job whose images are to be decoded is submitted; 0 if unknown."""
        return _seconds(self._throughput.decoding(image_pixels)) if image_pixels else 0.0

    def delivery_s(self, kind: str, pixels: int) -> float:
        """Estimated seconds from a job's end to its response; 0 if unknown."""
        return _seconds(self._throughput.delivery(kind, pixels))

    def work(self, state: JobState, jobs: int = 1, slots: int | None = None) -> Work | None:
        """What a job still needs. ``jobs``: of its shape, itself included, that share its batch of ``slots``, or will
        share batches of the best width. None if one of its scales was not measured near by."""
        parts = self._parts(state, jobs, slots)
        known = [part for part in parts if part is not None]
        return _sum(known) if len(known) == len(parts) else None

    def least(self, state: JobState, jobs: int = 1) -> Work:
        """As `work`, without the scales that were not measured near by."""
        return _sum([part for part in self._parts(state, jobs) if part is not None])

    def _parts(self, state: JobState, jobs: int, slots: int | None = None) -> list[Work | None]:
        """The work at each scale that is left, from the first."""
        parts = []
        done = state.done
        for index, (width, height, iterations) in enumerate(state.scales):
            left = max(0, iterations - done)
            done = max(0, done - iterations)
            if left:
                begins = not state.joined or index > state.scale_index
                parts.append(self._part(Shape.of(state.recipe, height, width), left, jobs, slots, begins=begins))
        return parts

    def _part(self, shape: Shape, iterations: int, jobs: int, slots: int | None, *, begins: bool) -> Work | None:
        alone = self._throughput.iteration(shape, 1)
        in_batch = slots is not None
        if slots is None:
            slots = jobs = self._throughput.known_best_width(shape, jobs)
        shared = alone if slots == 1 else self._throughput.iteration(shape, slots)
        if alone is None or shared is None:
            return None
        beginning = self._throughput.beginning(shape) if begins else None
        beginning_s = _seconds(beginning) + alone.first_s
        low_beginning_s = (beginning.low_s if beginning else 0.0) + alone.first_s / 2
        return Work(
            share_s=beginning_s + iterations * shared.seconds / jobs,
            alone_s=beginning_s + iterations * (shared if in_batch else alone).seconds,
            low_share_s=low_beginning_s + iterations * shared.low_s / jobs,
            low_alone_s=low_beginning_s + iterations * min(alone.low_s, shared.low_s),
            spread=math.expm1(max(alone.spread, shared.spread)),
            age_s=max(alone.age_s, shared.age_s),
            measured=alone.nearest_pixels,
        )


def _sum(parts: Sequence[Work]) -> Work:
    if not parts:
        return Work(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0)
    share_s = sum(part.share_s for part in parts)
    return Work(
        share_s,
        sum(part.alone_s for part in parts),
        sum(part.low_share_s for part in parts),
        sum(part.low_alone_s for part in parts),
        sum(part.share_s * part.spread for part in parts) / share_s,  # the errors are those of one device: they add up
        max(part.age_s for part in parts),
        parts[-1].measured,
    )


def _seconds(estimate: Estimate | None) -> float:
    return 0.0 if estimate is None else estimate.seconds


class Forecast(NamedTuple):
    """When waiting jobs will start and end, in seconds from now."""

    starts: tuple[float, ...]  # of each waiting job; the last one is that of a job that arrives now
    end: float  # of the job that arrives now


def even_sharing(running: Iterable[float], waiting: Iterable[float], own: float, max_running: int) -> Forecast:
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


def sharing_by_callers(others: Sequence[tuple[str, float]], own_s: float, owner: str) -> float:
    """Seconds until a job of ``own_s`` device seconds ends that has a place now.

    Callers share the device evenly, and so do the jobs of each, but one that has just come is `BURST_S` ahead.
    ``others``: the callers of the other jobs, and the device seconds that these need.
    """
    shared_s = max(0.0, own_s - BURST_S)
    own_caller_s = own_s + sum(min(seconds, shared_s) for other, seconds in others if other == owner)
    by_owner: dict[str, float] = {}
    for other, seconds in others:
        if other != owner:
            by_owner[other] = by_owner.get(other, 0.0) + seconds
    shared_s = max(0.0, own_caller_s - BURST_S)
    return own_caller_s + sum(min(seconds, shared_s) for seconds in by_owner.values())


class Promise(NamedTuple):
    """A deadline that was accepted, or is asked for."""

    left_s: float  # seconds from now
    work_s: float  # device seconds until then


def broken_promise(promises: Iterable[Promise], other_s: float, new: Promise) -> float | None:
    """By how many seconds a new promise, or another one because of it, would be late, at worst. None if none would be.

    The jobs run in the order of their deadlines, and together have `MAX_URGENT_SHARE` of the device. The others need
    ``other_s`` device seconds; if they end before, the rest of the device is free, too. A promise that not even all of
    the device could keep is lost already.
    """
    worst: float | None = None
    total_s = 0.0
    for promise in sorted((*promises, new)):
        total_s += promise.work_s
        if promise < new or (promise is not new and total_s - new.work_s > promise.left_s):
            continue
        late_s = min(total_s / MAX_URGENT_SHARE, total_s + other_s) - promise.left_s
        if late_s > PROMISE_TOLERANCE * promise.left_s:
            worst = max(late_s, worst or 0.0)
    return worst
