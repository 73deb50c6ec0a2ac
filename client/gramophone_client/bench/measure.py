"""What jobs told, added up in windows of time, until three windows in a row agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from gramophone.recipe import Recipe
from gramophone_client.bench.arrivals import ClosedLoop, Load
from gramophone_client.bench.histogram import Histogram

__all__ = ["LEFT", "OK", "Recorder", "Sample", "Tally", "megapixel_iterations"]

OK = "OK"
LEFT = "LEFT"  # by us, as the mix's `cancel` asked

WINDOWS = 3  # in a row that have to agree
TOLERANCE = 0.1  # by which a window may differ from their mean
FEWEST_JOBS = 3  # of a window, for each kind
FEWEST_CHANCE_JOBS = 10  # of a window of an open loop, where chance says when they come


@dataclass
class Sample:
    """One job, from the moment that it was due to its end. Times are in seconds since its step began."""

    kind: str
    due_s: float
    ended_s: float = 0.0
    status: str = OK  # or LEFT, or a reason of the service, or gRPC's status
    first_frame_s: float | None = None
    last_frame_s: float | None = None
    frame_gaps_s: list[float] = field(default_factory=list)
    frames: int = 0
    frames_dropped: int = 0  # replaced by newer ones before they were sent
    bytes_received: int = 0  # of encoded pictures
    megapixel_iterations: float = 0.0

    def frame(self, at_s: float, size: int, dropped: int) -> None:
        """A frame of `size` bytes has come."""
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
    """What the jobs that ended within some time add up to. Latency is counted from the moment that a job was due."""

    seconds: float = 0.0
    due: int = 0  # jobs that were to be sent in this time, which need not be those that ended in it
    statuses: Counter[str] = field(default_factory=Counter)
    result_s: Histogram = field(default_factory=Histogram)  # of the jobs that are OK
    first_frame_s: Histogram = field(default_factory=Histogram)  # of all that had one
    frame_gap_s: Histogram = field(default_factory=Histogram)
    by_kind: dict[str, Histogram] = field(default_factory=dict)  # as result_s
    failed_s: dict[str, Histogram] = field(default_factory=dict)  # by status, until it was known
    frames: int = 0
    frames_dropped: int = 0
    bytes_received: int = 0
    megapixel_iterations: float = 0.0

    @property
    def ok(self) -> int:
        return self.statuses[OK]

    @property
    def ended(self) -> int:
        return sum(self.statuses.values())

    @property
    def failed(self) -> int:
        return self.ended - self.ok - self.statuses[LEFT]

    @property
    def jobs_per_s(self) -> float:
        return self.ok / self.seconds if self.seconds else 0.0

    @property
    def megapixel_iterations_per_s(self) -> float:
        return self.megapixel_iterations / self.seconds if self.seconds else 0.0

    def add(self, sample: Sample) -> None:
        """Counts a job that has ended."""
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
        """Counts what the other has counted too, as a time that follows this one."""
        self.seconds += other.seconds
        self.due += other.due
        self.statuses += other.statuses
        for mine, its in (
            (self.result_s, other.result_s),
            (self.first_frame_s, other.first_frame_s),
            (self.frame_gap_s, other.frame_gap_s),
        ):
            mine.merge(its)
        for ours, theirs in ((self.by_kind, other.by_kind), (self.failed_s, other.failed_s)):
            for name, histogram in theirs.items():
                ours.setdefault(name, Histogram()).merge(histogram)
        self.frames += other.frames
        self.frames_dropped += other.frames_dropped
        self.bytes_received += other.bytes_received
        self.megapixel_iterations += other.megapixel_iterations

    def as_json(self) -> dict[str, Any]:
        """For `from_json`, and with the rates that a reader wants."""
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
    def from_json(cls, told: Mapping[str, Any]) -> Self:
        """What `as_json` said. Raises ValueError if a histogram does not add up."""
        return cls(
            seconds=told["seconds"],
            due=told["due"],
            statuses=Counter(told["statuses"]),
            result_s=Histogram.from_json(told["result_s"]),
            first_frame_s=Histogram.from_json(told["first_frame_s"]),
            frame_gap_s=Histogram.from_json(told["frame_gap_s"]),
            by_kind={kind: Histogram.from_json(one) for kind, one in told["by_kind"].items()},
            failed_s={status: Histogram.from_json(one) for status, one in told["failed_s"].items()},
            frames=told["frames"],
            frames_dropped=told["frames_dropped"],
            bytes_received=told["bytes_received"],
            megapixel_iterations=told["megapixel_iterations"],
        )


class Recorder:
    """The jobs of one step, in windows. The first window is the warm-up and counts for nothing.

    A window ends with the first good job after its time, so that a rate is jobs over the time that they took, and not
    before it has a few of each kind; the warm-up lasts until as many jobs have ended as there are callers, since those
    that were sent together wait for each other.
    """

    def __init__(self, load: Load, *, warm_up_s: float, window_s: float, kinds: int = 1) -> None:
        """`warm_up_s` and `window_s` in seconds; `kinds` that the mix has."""
        self.load = load
        self.windows: list[Tally] = []
        self.timeline: list[Counter[str]] = []  # statuses of each second of the step, with the warm-up
        self.in_flight: dict[int, float] = {}  # when each was due, by number
        self.late_s = 0.0  # most that a job was sent after it was due
        self.is_warm = warm_up_s == 0
        self.is_stable = False  # the last three windows agree
        self.current = Tally()
        self.is_closed = isinstance(load, ClosedLoop)
        self.callers = load.concurrency if isinstance(load, ClosedLoop) else 1
        self._window_began_s = 0.0
        self._warm_up_s, self._window_s = warm_up_s, window_s
        self._fewest_jobs = max(FEWEST_JOBS * kinds, 0 if self.is_closed else FEWEST_CHANCE_JOBS)

    def send(self, number: int, due_s: float, sent_s: float) -> None:
        """The job of this number is on its way."""
        self.in_flight[number] = due_s
        self.current.due += 1
        self.late_s = max(self.late_s, sent_s - due_s)

    def add(self, number: int, sample: Sample) -> None:
        """The job has ended."""
        del self.in_flight[number]
        while len(self.timeline) <= sample.ended_s:
            self.timeline.append(Counter())
        self.timeline[int(sample.ended_s)][sample.status] += 1
        self.current.add(sample)
        seconds = sample.ended_s - self._window_began_s
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
        self.is_warm, self.current, self._window_began_s = True, Tally(), sample.ended_s

    def measured(self, now_s: float) -> Tally:
        """The last three windows if they agree; else all since the warm-up, or the warm-up if there is nothing else."""
        total = Tally()
        for window in self.windows[-WINDOWS:] if self.is_stable else self.windows:
            total.merge(window)
        if not self.is_stable:
            total.merge(self.current)
            total.seconds += now_s - self._window_began_s
        return total

    def _is_stable(self) -> bool:
        """Whether the last three windows agree in how long a job took, and in how many there were.

        In an open loop their number is the schedule's; there no jobs may pile up instead.
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
    """The work of the first `done` of a job's `planned` iterations: the megapixels of each, added up.

    `width` and `height` are those of the result in pixels; the server leaves out the coarsest scales of a thin picture.
    """
    sizes = recipe.scale_sizes()
    scales = [(size, recipe.coarse_iterations) for size in sizes[:-1]] + [(sizes[-1], recipe.iterations)]
    while len(scales) > 1 and sum(iterations for _, iterations in scales) > planned:
        del scales[0]
    work = 0.0
    for size, iterations in scales:
        here = min(iterations, done)
        work += here * width * height * (size / recipe.size) ** 2 / 1e6
        done -= here
    return work
