"""Measured speeds: how wide batches should be, how long a slice takes, and the costs that forecasts rest on."""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from gramophone_server.domain.job_state import Shape
from gramophone_server.scheduling.cost_model import EVIDENCE_EXPIRES_S, CostModel, Estimate
from gramophone_server.scheduling.evidence import Evidence, forget_least

__all__ = ["ThroughputModel"]

MIN_MEASUREMENTS = 3  # of each of two widths before they are compared
# Weight of the newest measurement: speeds change when other processes start or stop, and single iterations are noisy.
NEWEST_WEIGHT = 0.3
# Gains at which batches of twice the width are tried, and at which they are given up.
GAIN_TO_WIDEN, GAIN_TO_NARROW = 1.05, 0.97
# A longer iteration delays all other jobs, and keeps the device so busy that nothing is gained by a shared batch.
MAX_SHARED_S = 0.05
MAX_SHAPES = 256  # kept at the same time: clients choose any size; see `forget_least`


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
    evidence: Evidence = field(default_factory=Evidence)


class ThroughputModel:
    """Seconds per iteration, by the shape and the width of a batch, and the costs of everything else that a job needs.
    One thread writes those of the device, and another one those of the host; any thread reads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._shapes: dict[Shape, ShapeSpeeds] = {}
        # Beginnings differ by what is cached, and the host's work is on other threads: both say little of the device,
        # and one that takes long says nothing of another.
        self._iterations, self._turns = CostModel(clock), CostModel(clock)
        self._beginnings, self._host = CostModel(clock, has_drift=False), CostModel(clock, has_drift=False)
        self._clock = clock

    def __len__(self) -> int:
        """The number of shapes that are kept."""
        return len(self._shapes)

    def record(self, shape: Shape, slots: int, iterations: int, seconds: float) -> None:
        """Adds a measurement: ``iterations`` of a batch of ``slots`` took ``seconds``."""
        new, now = seconds / iterations, self._clock()
        if shape not in self._shapes:
            forget_least(self._shapes, MAX_SHAPES, now)
            self._shapes[shape] = ShapeSpeeds({slots: Speed(new)})
        speeds = self._shapes[shape]
        speeds.evidence.add(seconds, now)
        speed = speeds.by_width.setdefault(slots, Speed(new))
        if speed.measurements < 2:
            speed.mean_s = new
        else:
            speed.mean_s = NEWEST_WEIGHT * new + (1 - NEWEST_WEIGHT) * speed.mean_s
        self._iterations.record(
            _iteration_kind(shape),
            shape.width * shape.height * slots,
            seconds,
            width=slots,
            aspect=_aspect(shape),
            repeats=iterations,
        )
        speed.measurements += 1
        bisect.insort(speed.shortest_s, new)
        del speed.shortest_s[MIN_MEASUREMENTS:]

    def batch_seconds_per_iteration(self, shape: Shape, slots: int) -> float | None:
        """Seconds per iteration of a batch of this shape and width; None if it was never measured."""
        speed = self._speed(shape, slots)
        return None if speed is None else speed.mean_s

    def was_measured(self, shape: Shape) -> bool:
        """Whether just this shape was measured lately, at some width, and not only its first iteration."""
        speeds = self._shapes.get(shape)
        if speeds is None or self._clock() - speeds.evidence.measured_at > EVIDENCE_EXPIRES_S:
            return False
        return any(speed.measurements > 1 for speed in list(speeds.by_width.values()))

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

    # Costs ------------------------------------------------------------------------------------------------------------

    def record_beginning(self, shape: Shape, seconds: float) -> None:
        """The beginning of a job at a scale, its style targets and its join, took ``seconds`` of the device."""
        self._beginnings.record(_beginning_kind(shape), shape.width * shape.height, seconds)

    def record_turn(self, kind: str, pixels: float, seconds: float) -> None:
        """A turn of a job in no batch took ``seconds``: a "step" of a style image, of so many pixels, or a "join" with
        a picture of so many."""
        self._turns.record(kind, round(pixels), seconds)

    def record_decoding(self, image_pixels: int, seconds: float) -> None:
        """An image of so many pixels was decoded in ``seconds`` of a thread."""
        self._host.record("decoding", image_pixels, seconds)

    def record_delivery(self, kind: str, pixels: int, seconds: float) -> None:
        """A result of so many pixels was encoded, as ``kind``, in ``seconds`` of a thread."""
        self._host.record(("delivery", kind), pixels, seconds)

    def iteration(self, shape: Shape, slots: int) -> Estimate | None:
        """Seconds of an iteration of a batch; None if nothing was measured near by. So are the following ones."""
        pixels = shape.width * shape.height * slots
        return self._iterations.estimate(_iteration_kind(shape), pixels, width=slots, aspect=_aspect(shape))

    def beginning(self, shape: Shape) -> Estimate | None:
        """Seconds of the device until a job's first iteration at a scale."""
        return self._beginnings.estimate(_beginning_kind(shape), shape.width * shape.height)

    def decoding(self, image_pixels: int) -> Estimate | None:
        """Seconds to decode an image."""
        return self._host.estimate("decoding", image_pixels)

    def delivery(self, kind: str, pixels: int) -> Estimate | None:
        """Seconds to encode a result."""
        return self._host.estimate(("delivery", kind), pixels)

    def turn_s(self, kind: str, pixels: float) -> float:
        """Rough seconds of such a turn; 0 if none was measured."""
        return self._turns.rough_s(kind, round(pixels)) or 0.0

    def known_best_width(self, shape: Shape, jobs: int) -> int:
        """The width that `best_width` has returned for a shape, but no more than this many jobs fill: what a forecast
        may count on. Changes nothing, so any thread may ask."""
        speeds = self._shapes.get(shape)
        return 1 if speeds is None else min(speeds.best_width, 1 << (max(1, jobs).bit_length() - 1))

    def _speed(self, shape: Shape, slots: int) -> Speed | None:
        speeds = self._shapes.get(shape)
        return None if speeds is None else speeds.by_width.get(slots)


def _iteration_kind(shape: Shape) -> Hashable:
    """Everything that changes the time of an iteration, but its pixels and their aspect. Whether there is a running
    average does, but not which."""
    return shape._replace(height=0, width=0, average=float(shape.average > 0))


def _aspect(shape: Shape) -> float:
    return shape.height / shape.width


def _beginning_kind(shape: Shape) -> Hashable:
    return shape.style_layers, shape.pooling
