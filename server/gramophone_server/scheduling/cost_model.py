"""Measured costs, and estimates from them that know how sure they are.

A cost is the duration of one piece of work: an iteration of a batch, the beginning of a job, the decoding of an image.
Work of one kind has a fixed cost and a cost for each pixel. The kinds of one model run on one device, which becomes
slower and faster as a whole when other processes start or end. So the model has three parts, of logarithms of seconds:

    log seconds = log(fixed + slope * pixels)    of a kind, fitted to its points
                + residual                       of the measured points near by
                + drift                          of the device, now

The drift follows the last seconds, so that a change that one size shows holds for all sizes. For that a point must be
of work that always costs the same: pictures of as many pixels but another aspect are another point, because clients
choose the aspect, and would shift all estimates by what it changes. Work whose cost depends on more than that, as that
of a beginning on its paintings, has no drift.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from gramophone_server.scheduling.evidence import Evidence, forget_least

__all__ = ["EVIDENCE_EXPIRES_S", "NEAR_OCTAVES", "CostModel", "Estimate"]

# Only what was measured within this many octaves (factors of two) of pixels, and this many seconds, is evidence. A
# little more than one, because the scales of a recipe are an octave apart, and their sides are rounded.
NEAR_OCTAVES = 1.1
EVIDENCE_EXPIRES_S = 300.0
# The first measurement of a point includes one-time costs. The second one replaces it.
MIN_MEASUREMENTS = 2
# Until then a point takes the mean of its measurements, which has an error of 3 % then if one iteration has 15 %. From
# then on it is known well enough to show a change of the device, the drift.
MIN_DRIFT_MEASUREMENTS = 30
# Seconds of measured time in which the drift, and the cost of one point, follow a change. So of a lasting change of the
# device 3 % go to the point, and the rest to the drift.
DRIFT_S, POINT_S = 1.0, 30.0
# A longer surprise counts as this long (in logarithms: 28 %), so that one slow iteration does not look like a slow
# device; a device of half the speed is known after about six measurements.
LARGEST_SURPRISE = 0.25
# Standard deviations, in logarithms.
FLOOR_SPREAD = 0.01  # of the best estimate
USUAL_SPREAD = 0.02  # of one that was measured lately
OCTAVE_SPREAD, UNKNOWN_SLOPE_SPREAD = 0.1, 0.75  # for each octave of pixels away from a measurement
WIDTH_SPREAD = 0.05  # for each octave of batch width away from a measurement
# For each octave of the aspect away from a measurement: 1024 x 16 px take 1.2 to 1.4 times as long as 16 x 1024.
ASPECT_SPREAD = 0.03
AGE_SPREAD = 0.004  # for a second of age; grows with its root, as a random walk does: 3 % in a minute, 7 % in five
# A slope is known if the measured points span this factor of pixels.
SLOPE_SPAN = 1.5
FIRST_WEIGHT = 0.2  # of the newest in the mean of what first measurements take more
MAX_KINDS, MAX_POINTS = 64, 64  # clients choose recipes and sizes; see `forget_least`
MEMO_S = 0.2  # for which an estimate is kept


class Estimate(NamedTuple):
    """The estimated seconds of one piece of work."""

    seconds: float  # median
    spread: float  # standard deviation of its logarithm
    age_s: float  # of the newest measurement of the device
    nearest_pixels: int  # of the nearest measurement
    first_s: float  # in addition, for the first one: what first ones took more so far; 0 if it was measured before

    @property
    def low_s(self) -> float:
        """The least that it may be: one standard deviation less, beyond the one that the best estimates have."""
        return self.seconds * math.exp(-max(0.0, self.spread - USUAL_SPREAD))

    @property
    def high_s(self) -> float:
        """One standard deviation more."""
        return self.seconds * math.exp(self.spread)


@dataclass
class Point:
    """The measurements at one number of pixels, one width and one aspect."""

    pixels: int  # of the whole batch
    width: int  # slots of the batch
    aspect: float  # height / width of each picture
    log_s: float  # of the mean, without the drift
    scatter: float = 0.1  # mean absolute surprise
    measurements: int = 1
    evidence: Evidence = field(default_factory=Evidence)

    @property
    def measured_at(self) -> float:
        """When it was measured last."""
        return self.evidence.measured_at

    @property
    def variance(self) -> float:
        """Of `log_s`. Surprises of one slice are independent; at most those of the last `POINT_S` count."""
        return FLOOR_SPREAD**2 + self.scatter**2 / min(self.measurements, 100)


@dataclass
class Kind:
    """The points of one kind of work."""

    points: dict[tuple[int, int, float], Point] = field(default_factory=dict)
    evidence: Evidence = field(default_factory=Evidence)
    first_s: float = 0.0  # mean of what the first measurement of a point took more than the second
    firsts: int = 0


class CostModel:
    """Costs of the work of one device, by kind and pixels. One thread writes, any thread reads.

    ``has_drift``: whether work of one kind, pixels, width and aspect always costs the same on this device, so that a
    change is one of the device. Without, each point follows its own changes as fast, and shows nothing of the others.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, has_drift: bool = True) -> None:
        self._clock, self._has_drift = clock, has_drift
        self._kinds: dict[Hashable, Kind] = {}
        self._drift = 0.0
        self._measured_at = -math.inf
        self._memo: dict[tuple[Hashable, int, int, float], Estimate | None] = {}
        self._fits: dict[Hashable, tuple[float, float]] = {}
        self._memo_until = -math.inf

    def __len__(self) -> int:
        """The number of points that are kept."""
        return sum(len(kind.points) for kind in self._kinds.values())

    def record(
        self, kind: Hashable, pixels: int, seconds: float, *, width: int = 1, aspect: float = 1.0, repeats: int = 1
    ) -> None:
        """Adds a measurement: ``repeats`` pieces of work, of ``pixels`` in ``width`` parts, took ``seconds``.
        ``aspect``: height / width of a part."""
        if seconds <= 0 or pixels <= 0:
            return
        now, observed = self._clock(), math.log(seconds / repeats)
        known = self._kind(kind, now)
        points, key = known.points, (pixels, width, aspect)
        point = points.get(key)
        if point is None:
            forget_least(points, MAX_POINTS, now)
            points[key] = point = Point(pixels, width, aspect, observed - self._drift)
        elif point.measurements < MIN_MEASUREMENTS:
            extra_s = max(0.0, math.exp(point.log_s + self._drift) - math.exp(observed))
            known.firsts += 1
            known.first_s += max(1 / known.firsts, FIRST_WEIGHT) * (extra_s - known.first_s)
            point.log_s = observed - self._drift
            point.measurements += 1
        else:
            self._update(point, observed, seconds)
        self._measured_at = now
        known.evidence.add(seconds, now)
        point.evidence.add(seconds, now)
        if point.measurements <= MIN_MEASUREMENTS:
            self._memo_until = now  # something is known that was not

    def estimate(self, kind: Hashable, pixels: int, *, width: int = 1, aspect: float = 1.0) -> Estimate | None:
        """The estimate of a piece of work; None without a measurement near by, or only old ones. Parameters: as those
        of `record`."""
        now = self._clock()
        self._forget_old_estimates(now)
        memo, key = self._memo, (kind, pixels, width, aspect)
        if key not in memo:
            memo[key] = self._estimate(*key, now)
        return memo[key]

    def rough_s(self, kind: Hashable, pixels: int) -> float | None:
        """Seconds of a piece of work by all that was measured of its kind, however far away and long ago: for the order
        of turns, which needs a number. None before the first measurement."""
        of_kind = self._kinds.get(kind)
        if of_kind is None:
            return None
        self._forget_old_estimates(self._clock())
        if kind not in self._fits:
            self._fits[kind] = _fit(list(of_kind.points.values()))
        fixed, slope = self._fits[kind]
        return (fixed + slope * pixels) * math.exp(self._drift)

    def _forget_old_estimates(self, now: float) -> None:
        """Replaces the memos, because another thread may fill the old ones."""
        if now >= self._memo_until:
            self._memo, self._fits, self._memo_until = {}, {}, now + MEMO_S

    def _kind(self, kind: Hashable, now: float) -> Kind:
        if kind not in self._kinds:
            forget_least(self._kinds, MAX_KINDS, now)
            self._kinds[kind] = Kind()
        return self._kinds[kind]

    def _update(self, point: Point, observed: float, seconds: float) -> None:
        surprise = observed - point.log_s - self._drift
        point.measurements += 1
        bound = max(LARGEST_SURPRISE, 3 * point.scatter)
        expected_s = seconds * math.exp(min(0.0, bound - surprise))  # not longer than the bound allows
        surprise = min(bound, max(-bound, surprise))
        point.scatter += max(1 / point.measurements, 0.02) * (abs(surprise) - point.scatter)
        gain = 1 - math.exp(-expected_s / (POINT_S if self._has_drift else DRIFT_S))
        if point.measurements <= MIN_DRIFT_MEASUREMENTS:
            gain = max(gain, 1 / (point.measurements - 1))
        elif self._has_drift:
            self._drift += (1 - math.exp(-expected_s / DRIFT_S)) * surprise
        point.log_s += gain * surprise

    def _estimate(self, kind: Hashable, pixels: int, width: int, aspect: float, now: float) -> Estimate | None:
        of_kind = self._kinds.get(kind)
        if of_kind is None:
            return None
        known = [
            point
            for point in list(of_kind.points.values())  # a copy, because the other thread may add a point
            if point.measurements >= MIN_MEASUREMENTS and now - point.measured_at <= EVIDENCE_EXPIRES_S
        ]
        near = [point for point in known if abs(math.log2(pixels / point.pixels)) <= NEAR_OCTAVES]
        if not near:
            return None
        fixed, slope = _fit(known)
        span = max(point.pixels for point in known) / min(point.pixels for point in known)
        octave_spread = OCTAVE_SPREAD if span >= SLOPE_SPAN else UNKNOWN_SLOPE_SPREAD
        total = weighted = 0.0
        for point in near:
            distance = octave_spread * math.log2(pixels / point.pixels)
            other_width = WIDTH_SPREAD * math.log2(width / point.width)
            other_aspect = ASPECT_SPREAD * math.log2(aspect / point.aspect)
            age = AGE_SPREAD**2 * (now - point.measured_at)
            weight = 1 / (point.variance + distance**2 + other_width**2 + other_aspect**2 + age)
            total += weight
            weighted += weight * (point.log_s - math.log(fixed + slope * point.pixels))
        variance = 1 / total + FLOOR_SPREAD**2 + AGE_SPREAD**2 * min(EVIDENCE_EXPIRES_S, now - self._measured_at)
        log_s = math.log(fixed + slope * pixels) + weighted / total + self._drift
        nearest = min(near, key=lambda point: abs(math.log2(pixels / point.pixels)))
        first_s = 0.0 if (pixels, width, aspect) in of_kind.points else of_kind.first_s
        return Estimate(math.exp(log_s), math.sqrt(variance), now - self._measured_at, nearest.pixels, first_s)


def _fit(points: Iterable[Point]) -> tuple[float, float]:
    """The fixed cost and the cost of a pixel, neither negative, by least squares of relative errors. From one number of
    pixels alone, the fixed cost is 0."""
    ww = wx = xx = wy = xy = 0.0
    for point in points:
        inverse = math.exp(-point.log_s)
        weight = 1 / (point.variance + OCTAVE_SPREAD**2)
        a, b = inverse, inverse * point.pixels  # fixed * a + slope * b should be 1
        ww, wx, xx = ww + weight * a * a, wx + weight * a * b, xx + weight * b * b
        wy, xy = wy + weight * a, xy + weight * b
    determinant = ww * xx - wx * wx
    if determinant > 1e-9 * ww * xx:
        fixed, slope = (wy * xx - xy * wx) / determinant, (xy * ww - wy * wx) / determinant
        if fixed >= 0 and slope >= 0:
            return fixed, slope
        if slope < 0:
            return wy / ww, 0.0
    return 0.0, xy / xx
