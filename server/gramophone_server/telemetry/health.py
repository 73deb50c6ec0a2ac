"""The current state of the process: as a sentence for probes, as gauges for Prometheus."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gramophone_server.domain.engine_api import CacheCounts, Engine
from gramophone_server.errors import NotReady
from gramophone_server.telemetry.metrics import Metrics

__all__ = ["HealthMonitor", "Usage"]

HEARTBEAT_S = 0.25
# A step of the compute thread is one turn: a slice of 20 ms or one iteration, a convolution of a style image, or a job
# that joins a batch. At 2048 px on two cores an iteration takes half a minute.
MAX_STEP_S = 300.0
MAX_LAG_S = 30.0


class ObservedScheduler(Protocol):
    """What the monitor reads from the scheduler; see `Scheduler`."""

    @property
    def engine(self) -> Engine: ...
    @property
    def queued(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def paused(self) -> int: ...
    @property
    def batch_bytes(self) -> int: ...
    @property
    def step_s(self) -> float: ...
    def estimated_wait_s(self) -> float | None: ...
    @property
    def deadline_probes(self) -> int: ...


class ObservedCache(Protocol):
    """What the monitor reads from the store of uploads."""

    @property
    def counts(self) -> CacheCounts: ...


class Usage(NamedTuple):
    """How much of a limit is used, in bytes or places."""

    used: int
    limit: int


class HealthMonitor(Collector):
    """Reads the state of other parts when a probe or a scrape asks for it. All methods but `watch` are thread-safe.

    `dropped_lines` returns how many lines could not be written, by the name of the log; `budgets` the bytes of each
    budget; `places` the places of connections, calls and others. `max_step_s` and `clock`, which is monotonic and in
    seconds, are for tests to replace.
    """

    def __init__(
        self,
        scheduler: ObservedScheduler,
        uploads: ObservedCache,
        metrics: Metrics,
        version: str,
        *,
        dropped_lines: Callable[[], Mapping[str, int]] = dict,
        budgets: Callable[[], Mapping[str, Usage]] = dict,
        places: Callable[[], Mapping[str, Usage]] = dict,
        max_step_s: float = MAX_STEP_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.draining = False
        self._scheduler, self._uploads, self._metrics = scheduler, uploads, metrics
        self._version = version
        self._dropped_lines, self._budgets, self._places = dropped_lines, budgets, places
        self._longest_step_s = max_step_s
        self._clock = clock
        self._tasks = 0
        self._heartbeat_at = clock()
        metrics.registry.register(self)

    async def watch(self) -> None:
        """Measures the lag of the event loop, until it is cancelled."""
        while True:
            due = self._clock() + HEARTBEAT_S
            await asyncio.sleep(HEARTBEAT_S)
            self._heartbeat_at = self._clock()
            self._tasks = len(asyncio.all_tasks())
            self._metrics.observe_loop_lag(max(0.0, self._heartbeat_at - due))

    def liveness_problem(self) -> str:
        """Why the process should be restarted; empty if it is alive."""
        lag_s = self._clock() - self._heartbeat_at - HEARTBEAT_S
        if lag_s > MAX_LAG_S:
            return f"the event loop has not run for {lag_s:.0f} s"
        if self._scheduler.step_s > self._longest_step_s:
            return f"the compute thread has been in one iteration for {self._scheduler.step_s:.0f} s"
        return ""

    def readiness_problem(self) -> str:
        """Why no jobs should be sent to this server; empty if it accepts them."""
        if self.draining:
            return "shutting down"
        try:
            _ = self._scheduler.engine
        except NotReady:
            return "loading the network"
        return self.liveness_problem()

    def collect(self) -> Iterator[Metric]:
        """The gauges, and the counters of the caches."""
        scheduler = self._scheduler
        jobs = GaugeMetricFamily("gramophone_jobs", "jobs of the scheduler, by state", labels=["state"])
        for state in ("queued", "running", "paused"):
            jobs.add_metric([state], getattr(scheduler, state))
        yield jobs
        yield _gauge("gramophone_event_loop_tasks", "tasks of the event loop", self._tasks)
        yield _gauge(
            "gramophone_engine_heartbeat_seconds",
            "duration so far of the compute thread's current step, 0 while it waits for jobs",
            scheduler.step_s,
        )
        dropped = CounterMetricFamily(
            "gramophone_log_lines_dropped", "lines of a log that nobody read in time, or without room", labels=["log"]
        )
        for name, number in self._dropped_lines().items():
            dropped.add_metric([name], number)
        yield dropped
        for name, text, usages in (
            ("budget_bytes", "bytes of what clients make the server keep, and their limits", self._budgets()),
            ("places", "connections, calls and decoders in use, and their limits", self._places()),
        ):
            usage = GaugeMetricFamily(f"gramophone_{name}", text, labels=["of", "kind"])
            for of, (used, limit) in usages.items():
                usage.add_metric([of, "used"], used)
                usage.add_metric([of, "limit"], limit)
            yield usage
        yield _gauge("gramophone_ready", "1 if the server accepts jobs", not self.readiness_problem())
        wait_s = scheduler.estimated_wait_s()
        if wait_s is not None:
            yield _gauge("gramophone_estimated_wait_seconds", "until a job that arrives now would start", wait_s)
        probes = CounterMetricFamily(
            "gramophone_deadline_probes", "jobs accepted although they should be late, to see whether that is true"
        )
        probes.add_metric([], scheduler.deadline_probes)
        yield probes
        try:
            engine = scheduler.engine
        except NotReady:
            return
        build = GaugeMetricFamily(
            "gramophone_build_info", "1, for its labels", labels=["version", "device", "precision", "backbone"]
        )
        build.add_metric([self._version, engine.device_name, engine.precision, engine.backbone], 1)
        yield build
        yield _gauge(
            "gramophone_library_ops",
            "ops that run through torch's library, because their kernel is wrong on this device or on request",
            len(engine.kernels.by_library),
        )
        memory = GaugeMetricFamily(
            "gramophone_device_memory_bytes", "device memory of the batches, and its limit", labels=["kind"]
        )
        memory.add_metric(["batches"], scheduler.batch_bytes)
        memory.add_metric(["limit"], engine.memory_bytes)
        yield memory
        hits = CounterMetricFamily("gramophone_cache_hits", "lookups that found an entry", labels=["cache"])
        misses = CounterMetricFamily("gramophone_cache_misses", "lookups that found none", labels=["cache"])
        held = GaugeMetricFamily("gramophone_cache_bytes", "bytes that a cache holds", labels=["cache"])
        for name, counts in (("styles", engine.style_cache), ("uploads", self._uploads.counts)):
            hits.add_metric([name], counts.hits)
            misses.add_metric([name], counts.misses)
            held.add_metric([name], counts.bytes)
        yield from (hits, misses, held)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=float(value))
