"""Forecasts: what a job still needs of the device, when jobs start and end, and which deadlines can be promised.

The device is shared evenly, up to `MAX_URGENT_SHARE` of it is given to jobs whose deadlines need it (see `urgency`).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Hashable, Iterable, Sequence
from operator import attrgetter
from typing import NamedTuple

from gramophone_server.domain.job_state import JobState, Shape
from gramophone_server.scheduling.cost_model import Estimate
from gramophone_server.scheduling.fair_share import BURST_S
from gramophone_server.scheduling.throughput import ThroughputModel

__all__ = [
    "LONGEST_TURN_S",
    "MAX_URGENT_SHARE",
    "PROMISE_RESERVE",
    "TURN_S",
    "Forecast",
    "Forecaster",
    "Promise",
    "Work",
    "broken_promise",
    "even_sharing",
    "interruptions_s",
    "needs_promise",
    "sharing_by_owners",
]

# Of the device, for all jobs together whose deadlines need more than an even share. The others have a fifth of it.
MAX_URGENT_SHARE = 0.8
# Seconds that urgent jobs may take at once, however short the others' turns are: then others have their share.
LONGEST_TURN_S = 2.0
# Of the time to a deadline that was accepted: no later one may take it, because estimates are not better than this.
PROMISE_RESERVE = 0.04
# To decode or encode an ordinary image, and each pixel of it, the slower kinds included. Some take a thousand times as
# long, so those of one client say nothing of another's.
ORDINARY_S, ORDINARY_PIXEL_S = 0.01, 1.5e-7
# Iterations that an ordinary beginning takes, besides a turn: to join, and for style images of the picture's size, each
# of which takes about a third of one. Images of four times the side take 16 times as long, and those of one client say
# nothing of another's.
ORDINARY_JOIN, ORDINARY_STYLES = 2, 2
# Iterations that a style image of the picture's size takes if its targets are not cached. What all those of a job take
# beyond `ORDINARY_STYLES` counts, however little others' beginnings took: 19, for four images of four times the side.
STYLE_PART = 1 / 3
# A turn of another job, as it is under way when a job comes or its budget ends.
TURN_S = 0.02


class Work(NamedTuple):
    """What a job still needs, in seconds: of the device, if it shares batches with other jobs, and alone.

    The low values are the least that the measurements allow, and count nothing of what was not measured near by.
    """

    share_s: float  # device seconds
    alone_s: float  # from now to its end, if its batch has the device alone
    low_share_s: float
    low_alone_s: float
    spread: float  # relative standard deviation
    age_s: float  # of the device's newest measurement
    measured: int  # pixels of the nearest one to the last scale; 0: nothing was measured near by

    def within(self, seconds: float) -> Work:
        """What is done of it within so many seconds: of a job with a time budget."""
        limit_s = max(0.0, seconds)
        return self._replace(
            share_s=min(self.share_s, limit_s),
            alone_s=min(self.alone_s, limit_s),
            low_share_s=min(self.low_share_s, limit_s),
            low_alone_s=min(self.low_alone_s, limit_s),
        )


class _Styles(NamedTuple):
    """The style images of a job at one scale."""

    pixels: int  # of all together
    scale: float  # the recipe's


class Forecaster:
    """Estimates of work, from what ``throughput`` has measured. Any thread may use it."""

    def __init__(self, throughput: ThroughputModel) -> None:
        self._throughput = throughput

    def least_decoding_s(self, image_pixels: int) -> float:
        """The least seconds until an image is decoded; 0 if unknown."""
        return _least_of_contents_s(self._throughput.decoding(image_pixels), image_pixels) if image_pixels else 0.0

    def delivery_s(self, kind: str, pixels: int) -> float:
        """Estimated seconds to encode a result; 0 if unknown."""
        return _seconds(self._throughput.delivery(kind, pixels))

    def least_delivery_s(self, kind: str, pixels: int) -> float:
        """The least seconds to encode a result; 0 if unknown."""
        return _least_of_contents_s(self._throughput.delivery(kind, pixels), pixels)

    def work(
        self, state: JobState, jobs: int = 1, slots: int | None = None, *, budget_s: float = math.inf
    ) -> Work | None:
        """What a job still needs, but no more than is left of its time budget. ``jobs``: of its shape, itself included,
        that share its batch of ``slots``, or will share batches of the best width. None if one of its scales was not
        measured near by."""
        parts = self._parts(state, jobs, slots)
        known = [part for part in parts if part is not None]
        return _sum(known).within(budget_s) if len(known) == len(parts) else None

    def least(self, state: JobState, jobs: int = 1) -> Work:
        """As `work`, without the scales that were not measured near by."""
        return _sum([part for part in self._parts(state, jobs) if part is not None])

    def _parts(self, state: JobState, jobs: int, slots: int | None = None) -> list[Work | None]:
        """The work at each scale that is left, from the first."""
        parts = []
        done = state.done
        for index, (scale, shape) in enumerate(zip(state.scales, state.shapes, strict=True)):
            left = max(0, scale.iterations - done)
            done = max(0, done - scale.iterations)
            if left:
                begins = not state.joined or index > state.scale_index
                styles = _Styles(state.style_pixels[index], state.recipe.style_scale) if begins else None
                parts.append(self._part(shape, left, jobs, slots, styles))
        return parts

    def _part(self, shape: Shape, iterations: int, jobs: int, slots: int | None, styles: _Styles | None) -> Work | None:
        """The work at one scale; without a beginning if there are no ``styles``."""
        if slots is None:
            slots = jobs = self._throughput.known_best_width(shape, jobs)
        iteration = self._throughput.iteration(shape, slots)
        if iteration is None:
            return None
        beginning_s, low_beginning_s = iteration.first_s, iteration.first_s / 2
        if styles is not None:
            beginning = self._throughput.beginning(shape)
            passes = STYLE_PART * styles.pixels / (shape.width * shape.height)
            beginning_s += max(_seconds(beginning), (passes - ORDINARY_STYLES) * iteration.seconds / slots)
            if beginning is not None:
                ordinary = ORDINARY_JOIN + ORDINARY_STYLES * styles.scale**2
                low_beginning_s += min(beginning.low_s, TURN_S + ordinary * iteration.low_s)
        return Work(
            share_s=beginning_s + iterations * iteration.seconds / jobs,
            alone_s=beginning_s + iterations * iteration.seconds,
            low_share_s=low_beginning_s + iterations * iteration.low_s / jobs,
            low_alone_s=low_beginning_s + iterations * iteration.low_s,
            spread=math.expm1(iteration.spread),
            age_s=iteration.age_s,
            measured=iteration.nearest_pixels // slots,
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


def _least_of_contents_s(estimate: Estimate | None, pixels: int) -> float:
    return 0.0 if estimate is None else min(estimate.low_s, ORDINARY_S + ORDINARY_PIXEL_S * pixels)


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


def sharing_by_owners(others: Sequence[tuple[str, float]], own_s: float, owner: str) -> float:
    """Seconds until a job of ``own_s`` device seconds ends that has a place now.

    Owners share the device evenly, and so do the jobs of each, but one that has just come is `BURST_S` ahead.
    ``others``: the owners of the other jobs, and the device seconds that these need.
    """
    shared_s = max(0.0, own_s - BURST_S)
    all_own_s = own_s + sum(min(seconds, shared_s) for other, seconds in others if other == owner)
    by_owner: dict[str, float] = {}
    for other, seconds in others:
        if other != owner:
            by_owner[other] = by_owner.get(other, 0.0) + seconds
    shared_s = max(0.0, all_own_s - BURST_S)
    return all_own_s + sum(min(seconds, shared_s) for seconds in by_owner.values())


def needs_promise(deadline_at: float, budget_ends_at: float) -> bool:
    """Whether a job meets its deadline only if others leave it time. One whose time budget ends before that has no
    claim to the device until then: whatever it has by the end of its budget is its result."""
    return deadline_at < math.inf and deadline_at < budget_ends_at + TURN_S


class Promise(NamedTuple):
    """A deadline that was accepted, or is asked for."""

    left_s: float  # seconds from now
    work_s: float  # device seconds until then, if it shares batches
    alone_s: float  # seconds that its batch needs the device for it
    group: Hashable = None  # the jobs of a group share batches


def interruptions_s(urgent_s: float, credit_s: float) -> float:
    """Seconds that other jobs have at most until urgent ones have had ``urgent_s`` of the device, ``credit_s`` of it at
    once."""
    return (1 / MAX_URGENT_SHARE - 1) * max(0.0, urgent_s - credit_s)


def broken_promise(promises: Iterable[Promise], other_s: float, new: Promise, credit_s: float) -> float | None:
    """By how many seconds a new promise, or another one because of it, would be late, at worst. None if none would be.

    The jobs run in the order of their deadlines, and together have ``credit_s`` of the device and then
    `MAX_URGENT_SHARE` of it. The others need ``other_s`` device seconds; if they end before, the rest of the device is
    free, too. A promise that needs more than that share of the device was given because the rest was free. It refuses
    nobody: otherwise a job of 57 s with a deadline of 60 s would keep all others with deadlines away for so long.
    """
    worst: float | None = None
    before, total = _Urgent(), _Urgent()
    for promise in sorted((*promises, new), key=attrgetter("left_s")):
        total.add(promise)
        if promise is not new:
            before.add(promise)
            needed_s = before.seconds + interruptions_s(before.seconds, credit_s)
            if needed_s > promise.left_s or promise.left_s < new.left_s:
                continue
        late_s = total.seconds + min(other_s, interruptions_s(total.seconds, credit_s)) - promise.left_s
        if promise is not new:
            late_s += PROMISE_RESERVE * promise.left_s
        if late_s > 0:
            worst = max(late_s, worst or 0.0)
    return worst


class _Urgent:
    """Device seconds of promised work. The jobs of a group need at least as long as the longest of them."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._groups: dict[Hashable, tuple[float, float]] = {}  # sum of the shares, longest

    def add(self, promise: Promise) -> None:
        """One promise more."""
        sum_s, longest_s = self._groups.get(promise.group, (0.0, 0.0))
        group = sum_s + promise.work_s, max(longest_s, promise.alone_s)
        self.seconds += max(group) - max(sum_s, longest_s)
        self._groups[promise.group] = group
