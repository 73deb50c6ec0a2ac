"""Adds up the measurements of jobs in windows of time, until three consecutive windows agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from gramophone.recipe import Recipe
from gramophone_client.bench.arrivals import ClosedLoop, LoadProfile
from gramophone_client.bench.histogram import Histogram

__all__ = ["LEFT", "OK", "Recorder", "Sample", "Tally", "megapixel_iterations"]

OK = "OK"
LEFT = "LEFT"  # cancelled by the bench, as requested by `cancel` in the workload

WINDOWS = 3  # consecutive windows that must agree
TOLERANCE = 0.1  # by which a window may differ from the mean of the three
MIN_JOBS_PER_KIND = 3  # in a window
MIN_OPEN_LOOP_JOBS = 10  # in a window of an open loop, where jobs arrive at random


@dataclass
class Sample:
    """The measurement of one job, from the time it was due to its end. Times are in seconds since the step's start."""

    kind: str
    due_s: float
    ended_s: float = 0.0
    status: str = OK  # or LEFT, or the service's error reason, or the gRPC status
    first_frame_s: float | None = None
    last_frame_s: float | None = None
    frame_gaps_s: list[float] = field(default_factory=list)
    frames: int = 0
    frames_dropped: int = 0  # replaced by newer frames before they were sent
    bytes_received: int = 0  # encoded pictures only
    megapixel_iterations: float = 0.0

    def frame(self, at_s: float, size: int, dropped: int) -> None:
        """Records a received frame of `size` bytes, and how many frames were dropped before it."""
        if self.last_frame_s is None:
            self.first_frame_s = at_s
        else:
            self.frame_gaps_s.append(at_s - self.last_frame_s)
        self.last_frame_s = at_s
        self.frames += 1
        self.frames_dropped += dropped
        self.bytes_received += size


@dataclass
class Tally:
    """Totals of the jobs that ended within a span of time. Latency counts from the time a job was due."""

    seconds: float = 0.0
    due: int = 0  # jobs that were due in this time; not necessarily the jobs that ended in it
    statuses: Counter[str] = field(default_factory=Counter)
    result_s: Histogram = field(default_factory=Histogram)  # latency of the jobs with status OK
    first_frame_s: Histogram = field(default_factory=Histogram)  # of all jobs that received a frame
    frame_gap_s: Histogram = field(default_factory=Histogram)
    by_kind: dict[str, Histogram] = field(default_factory=dict)  # as result_s, by kind of job
    failed_s: dict[str, Histogram] = field(default_factory=dict)  # time until the failure, by status
    frames: int = 0
    frames_dropped: int = 0
    bytes_received: int = 0
    megapixel_iterations: float = 0.0

    @property
    def ok(self) -> int:
        """Jobs with status OK."""
        return self.statuses[OK]

    @property
    def ended(self) -> int:
        """Jobs that have ended, however they ended."""
        return sum(self.statuses.values())

    @property
    def failed(self) -> int:
        """Jobs that ended with a status other than OK and LEFT."""
        return self.ended - self.ok - self.statuses[LEFT]

    @property
    def jobs_per_s(self) -> float:
        """Jobs with status OK per second."""
        return self.ok / self.seconds if self.seconds else 0.0

    @property
    def megapixel_iterations_per_s(self) -> float:
        """Megapixel-iterations of all jobs per second."""
        return self.megapixel_iterations / self.seconds if self.seconds else 0.0

    def add(self, sample: Sample) -> None:
        """Adds a job that has ended."""
        self.statuses[sample.status] += 1
        if sample.status == OK:
            self.result_s.record(sample.ended_s - sample.due_s)
            self.by_kind.setdefault(sample.kind, Histogram()).record(sample.ended_s - sample.due_s)
        elif sample.status != LEFT:
            self.failed_s.setdefault(sample.status, Histogram()).record(sample.ended_s - sample.due_s)
        if sample.first_frame_s is not None:
            self.first_frame_s.record(sample.first_frame_s - sample.due_s)
        for gap_s in sample.frame_gaps_s:
            self.frame_gap_s.record(gap_s)
        self.frames += sample.frames
        self.frames_dropped += sample.frames_dropped
        self.bytes_received += sample.bytes_received
        self.megapixel_iterations += sample.megapixel_iterations

    def merge(self, other: Tally) -> None:
        """Adds the totals of another span of time."""
        self.seconds += other.seconds
        self.due += other.due
        self.statuses += other.statuses
        self.result_s.merge(other.result_s)
        self.first_frame_s.merge(other.first_frame_s)
        self.frame_gap_s.merge(other.frame_gap_s)
        for ours, theirs in ((self.by_kind, other.by_kind), (self.failed_s, other.failed_s)):
            for name, histogram in theirs.items():
                ours.setdefault(name, Histogram()).merge(histogram)
        self.frames += other.frames
        self.frames_dropped += other.frames_dropped
        self.bytes_received += other.bytes_received
        self.megapixel_iterations += other.megapixel_iterations

    def as_json(self) -> dict[str, Any]:
        """The JSON form that `from_json` reads. The rates are for people who read the file."""
        return {
            "seconds": self.seconds,
            "jobs_per_s": self.jobs_per_s,
            "megapixel_iterations_per_s": self.megapixel_iterations_per_s,
            "due": self.due,
            "statuses": dict(sorted(self.statuses.items())),
            "result_s": self.result_s.as_json(),
            "first_frame_s": self.first_frame_s.as_json(),
            "frame_gap_s": self.frame_gap_s.as_json(),
            "by_kind": {kind: histogram.as_json() for kind, histogram in sorted(self.by_kind.items())},
            "failed_s": {status: histogram.as_json() for status, histogram in sorted(self.failed_s.items())},
            "frames": self.frames,
            "frames_dropped": self.frames_dropped,
            "bytes_received": self.bytes_received,
            "megapixel_iterations": self.megapixel_iterations,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Reads the output of `as_json`. Raises ValueError if a histogram is inconsistent."""
        return cls(
            seconds=data["seconds"],
            due=data["due"],
            statuses=Counter(data["statuses"]),
            result_s=Histogram.from_json(data["result_s"]),
            first_frame_s=Histogram.from_json(data["first_frame_s"]),
            frame_gap_s=Histogram.from_json(data["frame_gap_s"]),
            by_kind={kind: Histogram.from_json(histogram) for kind, histogram in data["by_kind"].items()},
            failed_s={status: Histogram.from_json(histogram) for status, histogram in data["failed_s"].items()},
            frames=data["frames"],
            frames_dropped=data["frames_dropped"],
            bytes_received=data["bytes_received"],
            megapixel_iterations=data["megapixel_iterations"],
        )


class Recorder:
    """Records the jobs of one step in windows. The first window is the warm-up and is not counted.

    A window ends with the first successful job after its minimum time, so that a rate is the number of jobs divided by
    the time they took, and not before it has a few jobs of each kind. The warm-up lasts until as many jobs have ended
    as there are callers, because the jobs that are sent together at the start wait for each other.
    """

    def __init__(self, load: LoadProfile, *, warm_up_s: float, window_s: float, kinds: int = 1) -> None:
        """`warm_up_s` and `window_s` are in seconds; `kinds` is the number of job kinds in the workload."""
        self.load = load
        self.windows: list[Tally] = []
        self.timeline: list[Counter[str]] = []  # statuses in each second of the step, including the warm-up
        self.in_flight: dict[int, float] = {}  # due time of each unfinished job, by its number
        self.late_s: float = 0.0  # longest delay between the due time of a job and its sending
        self.is_warm: bool = warm_up_s == 0
        self.is_stable: bool = False  # True if the last three windows agree
        self.current: Tally = Tally()
        self.is_closed: bool = isinstance(load, ClosedLoop)
        self.callers: int = load.concurrency if isinstance(load, ClosedLoop) else 1
        self._window_start_s = 0.0
        self._warm_up_s, self._window_s = warm_up_s, window_s
        self._fewest_jobs = max(MIN_JOBS_PER_KIND * kinds, 0 if self.is_closed else MIN_OPEN_LOOP_JOBS)

    def record_start(self, number: int, due_s: float, sent_s: float) -> None:
        """Records that the job with this number is sent."""
        self.in_flight[number] = due_s
        self.current.due += 1
        self.late_s = max(self.late_s, sent_s - due_s)

    def record_end(self, number: int, sample: Sample) -> None:
        """Records that the job has ended."""
        del self.in_flight[number]
        while len(self.timeline) <= sample.ended_s:
            self.timeline.append(Counter())
        self.timeline[int(sample.ended_s)][sample.status] += 1
        self.current.add(sample)
        seconds = sample.ended_s - self._window_start_s
        if sample.status != OK:
            return
        if not self.is_warm:
            if seconds < self._warm_up_s or self.current.ended < self.callers:
                return
        elif seconds < self._window_s or self.current.ok < self._fewest_jobs:
            return
        else:
            self.current.seconds = seconds
            self.windows.append(self.current)
            self.is_stable = self._is_stable()
        self.is_warm, self.current, self._window_start_s = True, Tally(), sample.ended_s

    def measured(self, now_s: float) -> Tally:
        """The last three windows if they agree; otherwise everything since the warm-up, or the warm-up itself."""
        total = Tally()
        for window in self.windows[-WINDOWS:] if self.is_stable else self.windows:
            total.merge(window)
        if not self.is_stable:
            total.merge(self.current)
            total.seconds += now_s - self._window_start_s
        return total

    def _is_stable(self) -> bool:
        """Whether the last three windows agree in median latency and in throughput.

        In an open loop the schedule determines the throughput. There, instead, unfinished jobs must not accumulate.
        """
        last = self.windows[-WINDOWS:]
        if len(last) < WINDOWS or not _agree([window.result_s.quantile(0.5) or 0.0 for window in last]):
            return False
        if self.is_closed:
            return _agree([window.jobs_per_s for window in last])
        due = sum(window.due for window in last)
        return due - sum(window.ended for window in last) <= max(1.0, TOLERANCE * due)


def _agree(values: Sequence[float]) -> bool:
    mean = sum(values) / len(values)
    return all(abs(value - mean) <= TOLERANCE * mean for value in values)


def megapixel_iterations(recipe: Recipe, width: int, height: int, planned: int, done: int) -> float:
    """The sum of the megapixels of the first `done` of a job's `planned` iterations.

    `width` and `height` are the size of the result in pixels. The server skips the coarsest scales of a thin picture.
    """
    sizes = recipe.scale_sizes()
    scales = [(size, recipe.coarse_iterations) for size in sizes[:-1]] + [(sizes[-1], recipe.iterations)]
    while len(scales) > 1 and sum(iterations for _, iterations in scales) > planned:
        del scales[0]
    total = 0.0
    for size, iterations in scales:
        done_at_scale = min(iterations, done)
        total += done_at_scale * width * height * (size / recipe.size) ** 2 / 1e6
        done -= done_at_scale
    return total
