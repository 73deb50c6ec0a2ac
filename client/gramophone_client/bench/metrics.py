"""The metrics of a step that tables, pages and comparisons show, each with its name and unit."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from typing import NamedTuple

from gramophone_client.bench.arrivals import LoadProfile
from gramophone_client.bench.report import Report, Step

__all__ = ["METRICS", "Metric", "Pair", "format_number", "pairs"]


class Metric(NamedTuple):
    """One metric of a step. Its value is None if there was nothing to measure."""

    name: str
    unit: str
    value: Callable[[Step], float | None]
    more_is_better: bool | None = False  # None: neither more nor less is better


METRICS = (
    Metric("throughput", "jobs/s", lambda step: step.tally.jobs_per_s, True),
    Metric("work", "megapixel-iterations/s", lambda step: step.tally.megapixel_iterations_per_s, True),
    Metric("first frame p50", "s", lambda step: step.tally.first_frame_s.quantile(0.5)),
    Metric("first frame p95", "s", lambda step: step.tally.first_frame_s.quantile(0.95)),
    Metric("first frame p99", "s", lambda step: step.tally.first_frame_s.quantile(0.99)),
    Metric("result p50", "s", lambda step: step.tally.result_s.quantile(0.5)),
    Metric("result p95", "s", lambda step: step.tally.result_s.quantile(0.95)),
    Metric("result p99", "s", lambda step: step.tally.result_s.quantile(0.99)),
    Metric("result max", "s", lambda step: step.tally.result_s.quantile(1.0)),
    Metric("frame gap p50", "s", lambda step: step.tally.frame_gap_s.quantile(0.5)),
    Metric("frame gap p99", "s", lambda step: step.tally.frame_gap_s.quantile(0.99)),
    Metric("sent", "jobs/s", lambda step: step.tally.due / (step.tally.seconds or 1), None),
    Metric("jobs measured", "", lambda step: step.tally.ended, None),
    Metric("failed", "% of jobs", lambda step: 100 * step.tally.failed / (step.tally.ended or 1)),
    Metric("frames dropped", "", lambda step: step.tally.frames_dropped, None),
    Metric("received", "MB", lambda step: step.tally.bytes_received / 1e6, None),
    Metric("client CPU", "% of a core", lambda step: 100 * step.client_cpu, None),
)


class Pair(NamedTuple):
    """Two steps with the same load profile, from two reports."""

    before: Step
    after: Step

    def ratio(self, metric: Metric) -> float | None:
        """The value after divided by the value before; None if one is missing or the divisor is 0."""
        before, after = metric.value(self.before), metric.value(self.after)
        return after / before if before and after is not None else None


def pairs(before: Report, after: Report) -> list[Pair]:
    """Pairs the steps with equal load profiles. If a profile occurs several times, the steps are paired in order."""
    by_load: defaultdict[LoadProfile, deque[Step]] = defaultdict(deque)
    for step in after.steps:
        by_load[step.load].append(step)
    return [Pair(step, by_load[step.load].popleft()) for step in before.steps if by_load[step.load]]


def format_number(value: float | None) -> str:
    """Formats with three significant digits, and without an exponent from 0.0001 up; None becomes "-"."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
