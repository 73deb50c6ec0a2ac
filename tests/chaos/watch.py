"""What must hold whatever happens to a server: health answers, and nothing of the past is left in the process."""

from __future__ import annotations

import asyncio
import gc
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

EVERY_S = 0.05
SETTLED_WITHIN_S = 30.0
REST_S = 2.0  # in which the tasks of calls that are over end
# Each of the two decoders and two encoders gets a thread of OpenMP's at its first large tensor, which a warm-up may not have
# shown it; and gRPC has a task for each call that it waits for. What leaks once a round is found all the same.
SPARE = {"threads": 4, "tasks": 2}
ANSWER_WITHIN_S = 5.0  # hundreds of times what it takes; a machine that is busy otherwise must not fail it


class Broken(Exception):
    """A rule was broken; the text says which and by what."""


@dataclass(frozen=True)
class Usage:
    """What a process holds."""

    descriptors: int
    threads: int
    resident_mib: float

    @classmethod
    def of(cls, pid: int) -> Self:
        """As it is now, by /proc."""
        with open(f"/proc/{pid}/statm") as file:
            pages = int(file.read().split()[1])
        resident = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        return cls(len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")), resident)


def scraped(url: str) -> dict[str, float]:
    """A server's metrics as they are now, by name and labels: 'gramophone_jobs{state="running"}'. Raises `Broken` if there are
    none, or if they cannot be read."""
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_WITHIN_S) as page:
            lines = page.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}
    except (OSError, HTTPException, ValueError) as error:
        raise Broken(f"{url}: {type(error).__name__}: {error}") from error


class Residue:
    """What a server holds without load, and must not exceed when its load has gone again."""

    def __init__(self, pid: int, metrics_url: str) -> None:
        self._pid, self._metrics_url = pid, metrics_url
        self.before: dict[str, float] = {}

    def now(self) -> dict[str, float]:
        """Jobs, tasks, descriptors and threads."""
        metrics, usage = scraped(self._metrics_url), Usage.of(self._pid)
        return {
            "jobs": sum(metrics[f'gramophone_jobs{{state="{state}"}}'] for state in ("queued", "running", "paused")),
            "tasks": metrics["gramophone_event_loop_tasks"],
            "descriptors": usage.descriptors,
            "threads": usage.threads,
        }

    async def rest(self) -> None:
        """Takes the least that it holds in the next moments, when there is no job any more, as the most."""
        await self.settled()
        self.before, end = await asyncio.to_thread(self.now), time.monotonic() + REST_S
        while time.monotonic() < end:
            await asyncio.sleep(0.1)
            now = await asyncio.to_thread(self.now)
            self.before = {name: min(n, now[name]) for name, n in self.before.items()}

    async def settled(self) -> dict[str, float]:
        """What it holds when nothing of the past is left. Raises `Broken` if something stays."""
        gc.collect()  # on this side, where tracebacks of errors hold calls, and these their connections
        end = time.monotonic() + SETTLED_WITHIN_S
        while left := self._left(now := await asyncio.to_thread(self.now)):
            if time.monotonic() > end:
                raise Broken(f"{', '.join(left)}, {SETTLED_WITHIN_S:g} s after the load has gone")
            await asyncio.sleep(0.1)
        return now

    def _left(self, now: dict[str, float]) -> list[str]:
        most = {"jobs": 0.0, **{name: n + SPARE.get(name, 0) for name, n in self.before.items() if name != "jobs"}}
        return [f"{now[name]:g} {name} instead of {n:g}" for name, n in most.items() if now[name] > n]


class Health:
    """Asks a server every 50 ms how it is, and scrapes its metrics every second, from threads of its own while the block
    lasts."""

    def __init__(self, address: str, metrics_url: str) -> None:
        self.latencies_ms: list[float] = []
        self.trouble = ""  # the first answer that was not SERVING in time
        self._address, self._metrics_url = address, metrics_url
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._kept, args=(ask,), name="health") for ask in (self._ask, self._probe)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def check(self) -> None:
        """Raises `Broken` if it did not answer once."""
        if self.trouble:
            raise Broken(f"health: {self.trouble}")

    def _kept(self, ask: Callable[[], None]) -> None:
        """What ends a thread is trouble, whatever it is: nobody would miss its questions."""
        try:
            ask()
        except Exception as error:  # noqa: BLE001 - that is the point
            told = str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}"
            self.trouble = self.trouble or told

    def _ask(self) -> None:
        with grpc.insecure_channel(self._address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while not self._over.wait(EVERY_S) and not self.trouble:
                before = time.perf_counter()
                try:
                    answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=ANSWER_WITHIN_S)
                except grpc.RpcError as error:
                    self.trouble = f"{error.code().name}: {error.details()}"
                else:
                    self.latencies_ms.append((time.perf_counter() - before) * 1000)
                    if answer.status != health_pb2.HealthCheckResponse.SERVING:
                        self.trouble = f"status {answer.status}"

    def _probe(self) -> None:
        while not self._over.wait(1.0) and not self.trouble:
            scraped(self._metrics_url)
            with urllib.request.urlopen(urljoin(self._metrics_url, "/healthz"), timeout=ANSWER_WITHIN_S):
                pass  # it raises unless that is 200
