"""A scheduler with its compute thread, and jobs with one watcher."""

from __future__ import annotations

import asyncio
import contextlib
import time
import types
from collections.abc import AsyncIterator, Callable
from typing import Any

from gramophone_server.config import Limits
from gramophone_server.domain.job_state import JobState
from gramophone_server.images.codec import Encoding, Format
from gramophone_server.jobs.mailbox import FrameRule
from gramophone_server.jobs.registry import JobRegistry
from gramophone_server.scheduling.reservation import Reservation
from gramophone_server.scheduling.scheduler import Scheduler
from gramophone_server.scheduling.throughput import ThroughputModel
from tests.support.clock import WITHIN_S
from tests.support.engines import FakeEngine
from tests.support.jobs import events_of
from tests.support.specs import job_state


@contextlib.asynccontextmanager
async def scheduling(
    engine: FakeEngine,
    max_running: int = 1,
    throughput: ThroughputModel | None = None,
    clock: Callable[[], float] = time.monotonic,
    **limits: Any,
) -> AsyncIterator[Scheduler]:
    """A scheduler whose engine is loaded. Keyword arguments are limits."""
    limit = Limits(max_running=max_running, **limits)
    scheduler = Scheduler(lambda: engine, limit, throughput=throughput, clock=clock)
    scheduler.start()
    await scheduler.ready()
    try:
        yield scheduler
    finally:
        scheduler.stop()
        engine.go.set()
        assert await asyncio.to_thread(scheduler.join, WITHIN_S)


def submit(
    scheduler: Scheduler,
    job: JobState | None = None,
    frames: FrameRule | None = None,
    reservation: Reservation | None = None,
    deadline_at: float | None = None,
    owner: str = "",
) -> types.SimpleNamespace:
    """A job with one watcher."""
    job, reservation = job or job_state(), reservation or scheduler.reserve()
    observer = JobRegistry(scheduler.withdraw, Limits()).create("", 0.0, Encoding(Format.PNG, 0))
    watcher = observer.watch(frames)
    assert observer.admit(job)
    try:
        scheduler.submit(reservation, job, observer, deadline_at, owner)
    finally:
        scheduler.release(reservation)
    return types.SimpleNamespace(
        state=job, events=lambda: events_of(watcher), cancel=observer.cancel, observer=observer
    )


async def kinds(job: types.SimpleNamespace) -> list[str]:
    """The kinds of all events of a job. Raises its error."""
    return [type(event).__name__ async for _, event in job.events()]
