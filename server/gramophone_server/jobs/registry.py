"""The jobs of a server: found by id or by request, watched by any number of clients, kept for a while after their end.

The scheduler publishes events to a `Job`, its `JobObserver`. The job numbers each event, adds it to its log and puts it
into the mailbox of each watcher, all under a lock that is held for microseconds. The `JobRegistry` and all timers
belong to the event loop. A job has at most one timer: while it runs without watchers, until it is stopped; after its
end, until it is forgotten.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator

from gramophone_server.config import Limits
from gramophone_server.errors import JobNotFound
from gramophone_server.images.codec import Encoding
from gramophone_server.jobs.job import Job, JobPhase

__all__ = ["JobRegistry"]


class JobRegistry:
    """The jobs of one server: those that have not ended and, within limits of number, bytes and time, those that have.

    ``withdraw`` takes a cancelled job out of the scheduler. ``on_end`` is called on the event loop at each job's end.
    ``loop`` runs the timers and ``clock`` returns seconds of the epoch; tests replace them.
    """

    def __init__(
        self,
        withdraw: Callable[[Job], None],
        limits: Limits,
        on_end: Callable[[Job], None] = lambda job: None,
        loop: asyncio.AbstractEventLoop | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._withdraw = withdraw
        self._limits = limits
        self._on_end = on_end
        self._loop = loop or asyncio.get_running_loop()
        self._clock = clock
        self.kept_bytes = 0  # of the results and events of jobs that have ended and are still kept
        self._created = 0
        self._jobs: dict[str, Job] = {}  # by id, oldest first
        self._by_request: dict[str, Job] = {}  # by request_id
        self._ended: dict[Job, int] = {}  # with their bytes, in the order of their ends
        # The number and the bytes of these, by host and by owner. They are counted, not added up, because each end asks
        # for them.
        self._numbers, self._bytes = _Amounts(), _Amounts()

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def request_ids(self) -> int:
        """The number of request ids whose jobs can be found."""
        return len(self._by_request)

    @property
    def ended(self) -> int:
        """The number of jobs that have ended and are still kept."""
        return len(self._ended)

    def create(self, request_id: str, grace_s: float, encoding: Encoding, owner: str = "") -> Job:
        """Creates a job whose images are not known yet; see `Job.admit`. ``owner``: for whom it counts."""
        self._created += 1
        job = Job(
            self._created,
            request_id,
            grace_s,
            encoding,
            owner=owner,
            max_watchers=self._limits.max_watchers,
            withdraw=self._withdraw,
            on_end=self._keep,
            loop=self._loop,
            clock=self._clock,
        )
        self._jobs[job.id] = job
        if request_id:
            self._by_request[request_id] = job
        return job

    def find(self, job_id: str) -> Job:
        """The job of this id. Raises `JobNotFound`."""
        try:
            return self._jobs[job_id]
        except KeyError:
            raise JobNotFound(job_id) from None

    def find_by_request(self, request_id: str) -> Job | None:
        """The job that this request created, unless it failed or was cancelled: then a retry creates a new job."""
        job = self._by_request.get(request_id)
        return None if job is None or job.phase in (JobPhase.FAILED, JobPhase.CANCELLED) else job

    def newest_first(self, before: int | None = None) -> Iterator[Job]:
        """All jobs, or those older than the job with the ordinal ``before``."""
        return (job for job in reversed(self._jobs.values()) if before is None or job.ordinal < before)

    def close(self) -> None:
        """Forgets every job and stops its timer."""
        for job in list(self._jobs.values()):
            self._forget(job)

    def _keep(self, job: Job) -> None:
        """Keeps a job that has ended, within the limits of number, bytes and time. A refused job is not kept.

        Where there are too many, the owner of most, or of most bytes, loses its oldest, of the host whose owners have
        most. So one who runs many jobs, on as many connections as it likes, does not remove the results of other hosts.
        """
        self._on_end(job)
        if job.summary is None or job.id not in self._jobs:  # refused, or the registry was closed
            self._forget(job)
            return
        self._ended[job] = size = job.bytes
        self._count(job, 1, size)
        job.set_timer(self._limits.max_kept_s, lambda: self._forget(job))
        while len(self._ended) > self._limits.max_kept:
            self._forget(self._oldest_of(self._numbers.largest_owners()))
        while self.kept_bytes > self._limits.max_kept_bytes:
            self._forget(self._oldest_of(self._bytes.largest_owners()))

    def _oldest_of(self, owners: Container[str]) -> Job:
        return next(job for job in self._ended if job.owner in owners)

    def _forget(self, job: Job) -> None:
        job.clear_timer()
        self._jobs.pop(job.id, None)
        if job in self._ended:
            self._count(job, -1, -self._ended.pop(job))
        if self._by_request.get(job.request_id) is job:
            del self._by_request[job.request_id]

    def _count(self, job: Job, number: int, size: int) -> None:
        self.kept_bytes += size
        self._bytes.add(job.owner, size)
        self._numbers.add(job.owner, number)


class _Amounts:
    """What owners have, and what all owners of a host have together. An owner is the address of a connection, whose
    part before the last colon is that of its host."""

    def __init__(self) -> None:
        self._of_owners, self._of_hosts = Counter[str](), Counter[str]()

    def add(self, owner: str, amount: int) -> None:
        """Adds to what an owner has."""
        for amounts, name in ((self._of_owners, owner), (self._of_hosts, _host(owner))):
            amounts[name] += amount
            if not amounts[name]:
                del amounts[name]

    def largest_owners(self) -> set[str]:
        """The owners that have most, of the hosts that have most."""
        of_host = max(self._of_hosts.values())
        theirs = {owner: own for owner, own in self._of_owners.items() if self._of_hosts[_host(owner)] == of_host}
        most = max(theirs.values())
        return {owner for owner, own in theirs.items() if own == most}


def _host(owner: str) -> str:
    return owner.rpartition(":")[0]
