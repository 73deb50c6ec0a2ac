"""Monitors a server process during a campaign: resources, leaks after the load has ended, and health checks."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import glob
import os
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from types import TracebackType
from typing import Self
from urllib.parse import urljoin

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

HEALTH_INTERVAL_S = 0.05
SETTLE_TIMEOUT_S = 30.0
BASELINE_S = 2.0  # how long the baseline is sampled; in this time the tasks of finished calls end
POLL_INTERVAL_S = 0.1
# Threads: each of the two decoders and the two encoders gets an OpenMP thread at its first large tensor, and asyncio's
# pool grows with its use to four more than there are cores; both may come after the warm-up. Tasks: gRPC has one for
# each call that it waits for. A leak of one per round is still found.
ALLOWED_GROWTH = {"threads": 8, "tasks": 2}
ANSWER_TIMEOUT_S = 5.0  # hundreds of times the usual duration, so that a busy machine does not fail the check


class RuleViolation(Exception):
    """The server broke a rule of the campaign; the message states which one and how."""


@dataclass(frozen=True)
class ProcessUsage:
    """The resources that a process holds."""

    descriptors: int
    threads: int
    resident_mib: float

    @classmethod
    def of(cls, pid: int) -> Self:
        """The current values from /proc. The memory of its children is part of it."""
        resident = sum(memory_of(each) for each in with_children(pid)) / 2**20
        return cls(len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")), resident)


def with_children(pid: int) -> list[int]:
    """The process and its children, for example the decoders of a server."""
    children = []
    for path in glob.glob(f"/proc/{pid}/task/*/children"):
        with contextlib.suppress(OSError), open(path) as file:  # OSError: the thread has ended
            children += [int(each) for each in file.read().split()]
    return [pid, *children]


def memory_of(pid: int, name: str = "VmRSS") -> int:
    """Memory of a process in bytes; "VmHWM": its peak. 0 if it has ended."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as file:
        return next((int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:")), 0)
    return 0


def scrape_metrics(url: str) -> dict[str, float]:
    """The current metrics of a server, by name and labels, for example 'gramophone_jobs{state="running"}'.

    Raises `RuleViolation` if there is no answer or it cannot be parsed.
    """
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_TIMEOUT_S) as page:
            lines = page.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}
    except (OSError, HTTPException, ValueError) as error:
        raise RuleViolation(f"{url}: {type(error).__name__}: {error}") from error


def open_jobs(metrics: dict[str, float]) -> float:
    """The number of jobs that have not ended, from the metrics."""
    return sum(metrics[f'gramophone_jobs{{state="{state}"}}'] for state in ("queued", "running", "paused"))


class LeakCheck:
    """Compares what an idle server holds before and after a load."""

    def __init__(self, pid: int, metrics_url: str) -> None:
        self._pid, self._metrics_url = pid, metrics_url
        self.baseline: dict[str, float] = {}

    def current(self) -> dict[str, float]:
        """The current number of open jobs, tasks, file descriptors and threads."""
        metrics, usage = scrape_metrics(self._metrics_url), ProcessUsage.of(self._pid)
        return {
            "jobs": open_jobs(metrics),
            "tasks": metrics["gramophone_event_loop_tasks"],
            "descriptors": usage.descriptors,
            "threads": usage.threads,
        }

    async def measure_baseline(self) -> None:
        """Waits until all jobs have ended, and sets the baseline to the minimum of the next 2 s."""
        await self.wait_until_settled()
        self.baseline, end = await asyncio.to_thread(self.current), time.monotonic() + BASELINE_S
        while time.monotonic() < end:
            await asyncio.sleep(POLL_INTERVAL_S)
            current = await asyncio.to_thread(self.current)
            self.baseline = {name: min(n, current[name]) for name, n in self.baseline.items()}

    async def wait_until_settled(self) -> dict[str, float]:
        """Waits until the server is back at its baseline; returns what it holds. Raises `RuleViolation` on a leak."""
        gc.collect()  # tracebacks in this process can hold calls, and calls hold connections
        end = time.monotonic() + SETTLE_TIMEOUT_S
        while leaks := self._leaks(current := await asyncio.to_thread(self.current)):
            if time.monotonic() > end:
                raise RuleViolation(f"{', '.join(leaks)}, {SETTLE_TIMEOUT_S:g} s after the end of the load")
            await asyncio.sleep(POLL_INTERVAL_S)
        return current

    def _leaks(self, current: dict[str, float]) -> list[str]:
        allowed = {name: n + ALLOWED_GROWTH.get(name, 0) for name, n in self.baseline.items()} | {"jobs": 0.0}
        return [f"{current[name]:g} {name} instead of {n:g}" for name, n in allowed.items() if current[name] > n]


class HealthProbe:
    """Checks the health of a server while the block lasts, from its own threads.

    It calls the gRPC health service every 50 ms, and reads the metrics and /healthz every second.
    """

    def __init__(self, address: str, metrics_url: str) -> None:
        self.latencies_ms: list[float] = []
        self.problem = ""  # the first answer that was late or not SERVING
        self._address, self._metrics_url = address, metrics_url
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self.guarded, args=(check,), name="health")
            for check in (self.check_grpc, self.check_http)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def check(self) -> None:
        """Raises `RuleViolation` if a check has failed."""
        if self.problem:
            raise RuleViolation(f"health: {self.problem}")

    def guarded(self, check: Callable[[], None]) -> None:
        """Runs a check. Any exception is a problem, because a thread that ended silently would look healthy."""
        try:
            check()
        except Exception as error:  # noqa: BLE001 - see above
            message = str(error) if isinstance(error, RuleViolation) else f"{type(error).__name__}: {error}"
            self.problem = self.problem or message

    def check_grpc(self) -> None:
        with grpc.insecure_channel(self._address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while not self._stop.wait(HEALTH_INTERVAL_S) and not self.problem:
                start = time.perf_counter()
                try:
                    answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=ANSWER_TIMEOUT_S)
                except grpc.RpcError as error:
                    self.problem = f"{error.code().name}: {error.details()}"
                else:
                    self.latencies_ms.append((time.perf_counter() - start) * 1000)
                    if answer.status != health_pb2.HealthCheckResponse.SERVING:
                        self.problem = f"status {answer.status}"

    def check_http(self) -> None:
        while not self._stop.wait(1.0) and not self.problem:
            scrape_metrics(self._metrics_url)
            with urllib.request.urlopen(urljoin(self._metrics_url, "/healthz"), timeout=ANSWER_TIMEOUT_S):
                pass  # raises HTTPError unless the status is 200
