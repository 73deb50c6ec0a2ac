"""Who has the device's memory: jobs that do not fit beside each other take turns.

The job that has waited longest for memory gets it next. Jobs that have used the device for a while since they joined
their batches make room for it: their tensors move to the host's memory, and they wait in turn. Meanwhile smaller jobs
start, as far as they do not take what the waiting job will get.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from gramophone.recipe import Violation
from gramophone_server.config import env_variable
from gramophone_server.domain.engine_api import BatchEngine
from gramophone_server.errors import InvalidRequest
from gramophone_server.scheduling.batch_pool import BatchPool
from gramophone_server.scheduling.task import PooledBatch, Task

__all__ = ["JOIN_PART", "MEMORY_TURN_S", "MemoryTurns"]

# Device seconds for which a job keeps its memory while others wait for it, and at least so many times the time that it
# took to join: that is what a turn costs.
MEMORY_TURN_S, JOIN_PART = 5.0, 10


class MemoryTurns:
    """Decides which jobs may use the memory of a pool. Belongs to the compute thread.

    ``park`` moves a job from its batch to the host's memory.
    """

    def __init__(
        self,
        engine: BatchEngine,
        pool: BatchPool,
        park: Callable[[Task], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self._pool, self._park, self._clock = engine, pool, park, clock
        self._outside: list[Task] = []  # that wait in the queue, because they would not fit
        self._first: Task | None = None  # the job that has waited longest, of those that can have memory
        self._reserved = 0  # bytes that it needs besides those that others will leave to it

    def startable(self, waiting: Iterable[Task], places: int, running: Sequence[Task]) -> list[Task]:
        """The waiting jobs that may start now, at most ``places``, in the order of ``waiting``."""
        starting: list[Task] = []
        outside: list[Task] = []
        if not running:
            self._first = None  # nothing takes memory that would be kept for it
        pending = self._pending([task for task in running if task.batch is None])
        for task in waiting:
            if len(starting) >= places:
                # It has its turn for memory, also without a place.
                if task.memory_short and (not self.may_start(task, pending) or task.memory_short):
                    outside.append(task)
                continue
            if self.may_start(task, pending):
                starting.append(task)
                pending += self._seat_bytes(task)
            else:
                outside.append(task)
                self._wait(task)
        self._outside = outside
        return starting

    def may_start(self, task: Task, pending: int = 0) -> bool:
        """Whether a waiting job has the memory to start, or will have it when its turn comes, beside ``pending`` bytes
        of others that start."""
        needed = self._seat_bytes(task)
        if task is self._first and not self._pool.fits(needed, pending):
            return self._victims(task, needed, self._after_their_turn()) is not None
        if not self._may_have(task, needed, pending):
            return False
        if task is not self._first:
            task.memory_short_since = None
        return True

    def may_take_place(self, task: Task, running: Sequence[Task]) -> bool:
        """As `may_start`, of a waiting job that would take the place of another one. If not, it waits for memory in its
        turn."""
        if self.may_start(task, self._pending([other for other in running if other.batch is None])):
            return True
        self._wait(task)
        return False

    def with_memory(self, apart: Sequence[Task]) -> list[Task]:
        """Of the running jobs in no batch, those that have the memory for their next turn. Makes room for the one that
        has waited longest."""
        short = sorted(
            (task for task in (*apart, *self._outside) if task.memory_short),
            key=lambda task: task.memory_short_since or 0.0,
        )
        inside, pending = set(apart), self._pending(apart)
        self._first, self._reserved = None, 0
        for task in short:
            needed = self._pool.needs(task) if task in inside else self._seat_bytes(task)
            if self._pool.fits(needed, 0 if task in inside else pending):
                self._first, self._reserved = task, needed
                break
            victims = self._victims(task, needed, self._after_their_turn()) if task in inside else None
            if victims is not None:
                for victim in [task for batch in victims for task in batch.tasks.values()]:
                    self._park(victim)
                self._first, self._reserved = task, needed
                break
            later = self._victims(task, needed, list(self._pool))
            if later is not None:
                self._first, self._reserved = task, needed - sum(self._gain(batch) for batch in later)
                break
        having = []
        for task in apart:
            if self._may_have(task, self._pool.needs(task)):
                having.append(task)
            else:
                self._wait(task)
        return having

    def require_host_memory(self, task: Task, host_bytes: int) -> None:
        """Raises `InvalidRequest` if the host has no memory for the state of a job that is to be paused, beside the
        ``host_bytes`` of others."""
        if not self.has_host_memory(task, host_bytes):
            needed, most = self._leaving_bytes(task), self._pool.max_host_bytes
            room = max(0, most - host_bytes)
            others = ", or resume or end another paused job" if needed <= most else ""
            description = (
                f"the job's state takes {needed} bytes, and the server keeps {room} more beside the device (server "
                f"setting {env_variable('max_parked_bytes')}); take a checkpoint and end this one{others}"
            )
            raise InvalidRequest([Violation("", description)])

    def has_host_memory(self, task: Task, host_bytes: int) -> bool:
        """Whether the host has memory for the state of a job that leaves the device, beside those of others."""
        return task.parked or self._leaving_bytes(task) <= max(0, self._pool.max_host_bytes - host_bytes)

    def _leaving_bytes(self, task: Task) -> int:
        return task.state.bytes if task.batch is None else self._engine.state_bytes(task.state)

    def _may_have(self, task: Task, needed: int, pending: int = 0) -> bool:
        if task is self._first or self._first is None or not needed:
            return self._pool.fits(needed, pending)
        return self._pool.fits(needed, pending) and self._pool.fits(needed, pending + self._reserved)

    def _pending(self, apart: Sequence[Task]) -> int:
        """Bytes that jobs have been started for, and do not have yet."""
        return sum(self._seat_bytes(task) for task in apart if not task.memory_short)

    def _wait(self, task: Task) -> None:
        if task.memory_short_since is None:
            task.memory_short_since = self._clock()

    def _seat_bytes(self, task: Task) -> int:
        return self._engine.batch_bytes(task.state.shape, 1)

    def _gain(self, batch: PooledBatch) -> int:
        """Bytes of the device that its jobs leave."""
        kept = self._state_bytes(batch) if self._engine.shares_host_memory else 0
        return self._pool.batch_bytes(batch) - kept

    def _state_bytes(self, batch: PooledBatch) -> int:
        return sum(self._engine.state_bytes(task.state) for task in batch.tasks.values())

    def _after_their_turn(self) -> list[PooledBatch]:
        """The batches whose jobs have all used the device for long enough."""
        return [batch for batch in self._pool if all(_had_its_turn(task) for task in batch.tasks.values())]

    def _victims(self, task: Task, needed: int, batches: Sequence[PooledBatch]) -> list[PooledBatch] | None:
        """Of ``batches``, those that leave so much memory to a job; None if all together do not, or the host has no
        room for their tensors."""
        chosen: list[PooledBatch] = []
        gained = 0
        for batch in sorted(batches, key=_held_s, reverse=True):
            if self._gain(batch) > 0:
                chosen.append(batch)
                gained += self._gain(batch)
                if self._pool.fits(needed, -gained):
                    break
        else:
            return None
        for batch in chosen[:-1]:  # those that the last ones made superfluous
            if self._pool.fits(needed, self._gain(batch) - gained):
                chosen.remove(batch)
                gained -= self._gain(batch)
        host_bytes = self._pool.host_bytes - (task.state.bytes if task.parked else 0)
        host_bytes += sum(self._state_bytes(batch) for batch in chosen)
        return chosen if host_bytes <= self._pool.max_host_bytes else None


def _had_its_turn(task: Task) -> bool:
    return task.used_s - task.used_before_batch_s >= max(MEMORY_TURN_S, JOIN_PART * task.join_s)


def _held_s(batch: PooledBatch) -> float:
    """Device seconds that the jobs of a batch have used since they joined it."""
    return min(task.used_s - task.used_before_batch_s for task in batch.tasks.values())
