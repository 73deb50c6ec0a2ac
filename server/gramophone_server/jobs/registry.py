"""Jobs as their callers know them: found by id or by request, watched by any number, kept for a while after their end.

Who owns what: the scheduler tells a `Job`, its `JobObserver`, what happens. The job numbers the event, keeps it in its log
and puts it into the mailbox of each watcher, all under a lock that nobody holds for long. The registry `JobRegistry` and every
timer belong to the event loop. A job has one timer at most: until it is stopped because nobody watches it, or, when it
has ended, until it is forgotten.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

from gramophone_server.config import Limits
from gramophone_server.errors import (
    JobNotFound,
)
from gramophone_server.images.codec import Encoding
from gramophone_server.jobs.job import Job, JobPhase
from gramophone_server.scheduling.scheduler import Scheduler

__all__ = ["JobRegistry"]


class JobRegistry:
    """The jobs of one server: those under way, and for a bounded while those that have ended.

    `ended` hears of each job's end, on the event loop. `loop` (its timers) and `clock` (seconds of the epoch) are for tests to
    replace.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        limits: Limits,
        ended: Callable[[Job], None] = lambda job: None,
        loop: asyncio.AbstractEventLoop | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.scheduler = scheduler
        self.loop = loop or asyncio.get_running_loop()
        self.clock = clock
        self.limits = limits
        self._hear_of_end = ended
        self._created = 0
        self._jobs: dict[str, Job] = {}  # by id, oldest first
        self._requests: dict[str, Job] = {}  # by request_id
        self._ended: dict[str, Job] = {}  # by id, the one that ended first first

    def __len__(self) -> int:
        return len(self._jobs)

    def create(self, request_id: str, grace_s: float, encoding: Encoding) -> Job:
        """A job that has no work yet; see `Job.submit`."""
        self._created += 1
        job = Job(self, self._created, request_id, grace_s, encoding)
        self._jobs[job.id] = job
        if request_id:
            self._requests[request_id] = job
        return job

    def find(self, job_id: str) -> Job:
        """Raises `JobNotFound`."""
        try:
            return self._jobs[job_id]
        except KeyError:
            raise JobNotFound(job_id) from None

    def of_request(self, request_id: str) -> Job | None:
        """The job that this request made, unless it failed or was cancelled: then a retry begins anew."""
        job = self._requests.get(request_id)
        return None if job is None or job.state in (JobPhase.FAILED, JobPhase.CANCELLED) else job

    def newest_first(self, before: int | None = None) -> Iterator[Job]:
        """All jobs, or those older than the one with this ordinal."""
        return (job for job in reversed(self._jobs.values()) if before is None or job.ordinal < before)

    def keep(self, job: Job) -> None:
        """Keeps a job that has ended as long as there is room and time for it. One that was refused is not kept."""
        self._hear_of_end(job)
        if job.plan is None or job.id not in self._jobs:  # the registry was closed
            self._forget(job)
            return
        self._ended[job.id] = job
        job.expire(self.limits.max_kept_s, lambda: self._forget(job))
        held = sum(ended.bytes for ended in self._ended.values())
        for ended in list(self._ended.values()):
            if len(self._ended) <= self.limits.max_kept and held <= self.limits.max_kept_bytes:
                break
            held -= ended.bytes
            self._forget(ended)

    def close(self) -> None:
        """Forgets every job and stops its timer."""
        for job in list(self._jobs.values()):
            self._forget(job)

    def _forget(self, job: Job) -> None:
        job.expire()
        self._jobs.pop(job.id, None)
        self._ended.pop(job.id, None)
        if self._requests.get(job.request_id) is job:
            del self._requests[job.request_id]
