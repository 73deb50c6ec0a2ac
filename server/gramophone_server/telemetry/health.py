"""How the process is at this moment: for probes in a word, for Prometheus in gauges."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gramophone_server.errors import NotReady
from gramophone_server.images.upload_store import Uploads
from gramophone_server.scheduling.scheduler import Scheduler
from gramophone_server.telemetry.metrics import Metrics

__all__ = ["Vitals"]

PULSE_S = 0.25
# A turn of the compute thread is a slice of 20 ms or one iteration, and before that perhaps the targets of four paintings:
# 2048 px on two cores come to two minutes.
LONGEST_TURN_S = 300.0
LONGEST_LAG_S = 30.0


class Vitals(Collector):
    """Reads what others keep, so it costs nothing until somebody asks. `collect` and the answers are for any thread."""

    def __init__(self, scheduler: Scheduler, uploads: Uploads, metrics: Metrics, version: str) -> None:
        self.draining = False
        self._scheduler, self._uploads, self._metrics = scheduler, uploads, metrics
        self._version = version
        self._tasks = 0
        self._pulse_at = time.monotonic()
        metrics.registry.register(self)

    async def watch(self) -> None:
        """Feels the event loop's pulse, for as long as it is let."""
        while True:
            due = time.monotonic() + PULSE_S
            await asyncio.sleep(PULSE_S)
            self._pulse_at = time.monotonic()
            self._tasks = len(asyncio.all_tasks())
            self._metrics.loop_was_late(max(0.0, self._pulse_at - due))

    def illness(self) -> str:
        """Why the process should be started anew; empty if it is well."""
        lag_s = time.monotonic() - self._pulse_at - PULSE_S
        if lag_s > LONGEST_LAG_S:
            return f"the event loop has stood still for {lag_s:.0f} s"
        if self._scheduler.turn_s > LONGEST_TURN_S:
            return f"the compute thread has been in one iteration for {self._scheduler.turn_s:.0f} s"
        return ""

    def absence(self) -> str:
        """Why no jobs should be sent here; empty if they may come."""
        if self.draining:
            return "shutting down"
        try:
            _ = self._scheduler.engine
        except NotReady:
            return "loading the network"
        return self.illness()

    def collect(self) -> Iterator[Metric]:
        """The gauges, and the counters that the caches keep."""
        scheduler = self._scheduler
        jobs = GaugeMetricFamily("gramophone_jobs", "jobs that are here, by state", labels=["state"])
        for state in ("queued", "running", "paused"):
            jobs.add_metric([state], getattr(scheduler, state))
        yield jobs
        yield _gauge("gramophone_event_loop_tasks", "tasks of the event loop", self._tasks)
        yield _gauge(
            "gramophone_engine_heartbeat_seconds",
            "how long the compute thread has been in its present turn, 0 while it waits for jobs",
            scheduler.turn_s,
        )
        yield _gauge("gramophone_ready", "1 if jobs may be sent here", not self.absence())
        wait_s = scheduler.estimated_wait_s()
        if wait_s is not None:
            yield _gauge("gramophone_estimated_wait_seconds", "until a job that came now would begin", wait_s)
        try:
            engine = scheduler.engine
        except NotReady:
            return
        build = GaugeMetricFamily(
            "gramophone_build_info", "1, for its labels", labels=["version", "device", "precision", "backbone"]
        )
        build.add_metric([self._version, engine.device_name, engine.precision, engine.backbone], 1)
        yield build
        memory = GaugeMetricFamily("gramophone_device_memory_bytes", "that batches have, and may have", labels=["kind"])
        memory.add_metric(["batches"], scheduler.batch_bytes)
        memory.add_metric(["limit"], engine.memory_bytes)
        yield memory
        hits = CounterMetricFamily("gramophone_cache_hits", "what was asked for and there", labels=["cache"])
        misses = CounterMetricFamily("gramophone_cache_misses", "what was asked for and not there", labels=["cache"])
        held = GaugeMetricFamily("gramophone_cache_bytes", "that a cache holds", labels=["cache"])
        for name, counts in (("styles", engine.style_cache), ("uploads", self._uploads.counts)):
            hits.add_metric([name], counts.hits)
            misses.add_metric([name], counts.misses)
            held.add_metric([name], counts.bytes)
        yield from (hits, misses, held)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=float(value))
