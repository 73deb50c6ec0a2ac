"""Assigns jobs to batches.

Jobs of one shape share batches. A batch is as wide as the measurements recommend, and the batches of a shape are
rebuilt when jobs join or end. Belongs to the compute thread.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence

from gramophone_server.domain.engine_api import BatchEngine
from gramophone_server.domain.job import Report
from gramophone_server.domain.job_state import Shape
from gramophone_server.errors import OutOfDeviceMemory
from gramophone_server.scheduling.task import PooledBatch, Task
from gramophone_server.scheduling.throughput import ThroughputModel

__all__ = ["BatchPool", "OnIterations", "widths"]

log = logging.getLogger(__name__)

# Reports iterations of a batch: its shape, its width in slots, its jobs, iterations of each job, seconds in total.
OnIterations = Callable[[Shape, int, int, int, float], None]


class BatchPool:
    """The open batches of one engine. Calls ``on_iterations`` on the compute thread, after each slice."""

    def __init__(
        self,
        engine: BatchEngine,
        throughput: ThroughputModel,
        on_iterations: OnIterations = lambda *_: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.memory_short = False  # at least one job waits for device memory
        self._engine, self._throughput = engine, throughput
        self._on_iterations = on_iterations
        self._clock = clock
        self._batches: list[PooledBatch] = []
        # The widest batch that memory allowed, until the pool is empty.
        self._max_slots: dict[Shape, int] = {}
        # A batch of one slot ran out of memory beside others. Until a batch is closed, no other one is opened.
        self._allocator_full = False
        self._failed: dict[Task, Exception] = {}  # jobs that the next return of `assign` reports
        self._parked_bytes = 0  # of the tensors of jobs that are in no batch
        self._assign_until = math.inf

    def __iter__(self) -> Iterator[PooledBatch]:
        return iter(self._batches)

    @property
    def bytes(self) -> int:
        """Estimated device memory, in bytes, of all open batches and of jobs waiting to join one. Thread-safe."""
        return self._parked_bytes + sum(
            self._engine.batch_bytes(batch.shape, batch.slots) for batch in list(self._batches)
        )

    def fits(self, shape: Shape, slots: int) -> bool:
        """Whether the device has memory for one more batch."""
        if self._allocator_full:
            return False
        return self.bytes + self._engine.batch_bytes(shape, slots) <= self._engine.memory_bytes

    def assign(self, tasks: Sequence[Task], paused_bytes: int = 0, until: float = math.inf) -> dict[Task, Exception]:
        """Assigns each job to a batch. Jobs that do not fit in memory, or are not assigned before ``until``, stay
        unassigned and are tried again next time: joining a batch can take as long as an iteration, or as the
        computation of the job's style targets. At least one job is tried in any case. Returns the jobs that are lost,
        each with its error: `OutOfDeviceMemory` for a job that does not fit even alone.

        ``paused_bytes``: size of the tensors that paused jobs hold on the device.
        """
        self._parked_bytes = paused_bytes + sum(task.state.bytes for task in tasks if task.batch is None)
        was_short, self.memory_short = self.memory_short, False
        self._assign_until = math.inf  # until one job is assigned
        by_shape: dict[Shape, list[Task]] = defaultdict(list)
        for task in tasks:
            by_shape[task.state.shape if task.batch is None else task.batch.shape].append(task)
        for shape, tasks_of_shape in by_shape.items():
            self._assign(shape, tasks_of_shape, until)
        for task in tasks:
            task.newly_arrived |= task.batch is None
        # If the time ran out, jobs that were short of memory before may not have been tried.
        self.memory_short |= was_short and self._clock() >= until
        if not self._batches:
            self._max_slots.clear()
        failed, self._failed = self._failed, {}
        return failed

    def advance(self, batch: PooledBatch, iterations: int) -> dict[Task, Report]:
        """Runs some iterations of all jobs in a batch; see `engine_api.Batch.advance`. If memory runs out, there are no
        reports and the batch is disbanded: the next one is half as wide, or waits until other jobs have ended. After
        any other exception all jobs in the batch are lost; see `discard_batch`."""
        started_at, done = self._clock(), {slot: task.state.done for slot, task in batch.tasks.items()}
        try:
            reports = batch.engine_batch.advance(iterations)
        except OutOfDeviceMemory as error:
            is_single = batch.slots == 1
            if not is_single:
                self._max_slots[batch.shape] = batch.slots // 2
            elif len(self._batches) == 1:
                self._failed |= dict.fromkeys(batch.tasks.values(), error)
            self._disband(batch)
            self._allocator_full = is_single
            return {}
        took_s = self._clock() - started_at
        slot = next(iter(reports))
        completed = batch.tasks[slot].state.done - done[slot]
        self._throughput.record(batch.shape, batch.slots, completed, took_s)
        self._on_iterations(batch.shape, batch.slots, len(batch.tasks), completed, took_s)
        batch.idle_since = started_at + took_s
        for task in batch.tasks.values():
            task.used_s += took_s / len(batch.tasks)
        return {batch.tasks[slot]: report for slot, report in reports.items()}

    def detach(self, task: Task) -> None:
        """Takes a job out of its batch, with its tensors. If this raises `OutOfDeviceMemory`, the job stays there."""
        if task.batch is not None:
            task.batch.engine_batch.leave(task.slot)
            self._release_slot(task)

    def discard(self, task: Task) -> None:
        """Takes a job that has ended, or is lost, out of its batch, and frees its tensors."""
        if task.batch is not None:
            try:
                task.batch.engine_batch.drop(task.slot)
            except Exception:
                log.exception("a job could not be taken out of its batch")
            self._release_slot(task)

    def discard_batch(self, batch: PooledBatch) -> None:
        """Closes a batch that has failed. The jobs in it are unassigned, and their tensors are lost."""
        for task in batch.tasks.values():
            task.batch = None
        batch.tasks.clear()
        self._close_batch(batch)

    def _assign(self, shape: Shape, tasks: list[Task], until: float) -> None:
        """Assigns the jobs of one shape. Disbands its batches whose width is no longer the best."""
        target_widths = widths(len(tasks), self._max_width(shape, len(tasks)))
        batches = [batch for batch in self._batches if batch.shape == shape]
        open_widths = sorted((batch.slots for batch in batches), reverse=True)
        if all(task.batch for task in tasks) and open_widths == target_widths:
            return
        missing = Counter(target_widths)
        for batch in sorted(batches, key=lambda batch: -len(batch.tasks)):
            if missing[batch.slots]:
                missing[batch.slots] -= 1
            else:
                self._disband(batch)
        for task in tasks:
            if task.batch is not None or task in self._failed:
                continue
            if self._clock() >= self._assign_until:
                return
            try:
                self._place(self._batch_with_room(shape, missing), task)
                self._assign_until = until
            except OutOfDeviceMemory as error:
                if target_widths[0] > 1:
                    self._max_slots[shape] = target_widths[0] // 2
                    self._assign(shape, tasks, until)
                elif not self._batches:
                    self._failed[task] = error
                else:
                    self.memory_short = True
                    self._allocator_full |= not isinstance(error, _EstimateTooLarge)
                return  # jobs without a batch wait until another one has ended
            except Exception as error:  # noqa: BLE001 - it is this job's alone, and the caller of `assign` reports it
                self._failed[task] = error

    def _max_width(self, shape: Shape, jobs: int) -> int:
        """The widest batch that is expected to be fast and fits the device; a power of two."""
        best, limit = self._throughput.best_width(shape, jobs), self._engine.max_slots(shape)
        width = min(best, self._max_slots.get(shape, best), 1 << (limit.bit_length() - 1))
        while width > 1 and self._engine.batch_bytes(shape, width) > self._engine.memory_bytes:
            width //= 2
        return width

    def _batch_with_room(self, shape: Shape, missing: Counter[int]) -> PooledBatch:
        """A batch with a free slot; opens one of the ``missing`` widths if there is none. Raises
        `OutOfDeviceMemory`."""
        batch = next((batch for batch in self._batches if batch.shape == shape and batch.has_room), None)
        if batch is not None:
            return batch
        slots = max(missing.elements(), default=1)
        missing[slots] -= 1
        if self._batches and not self.fits(shape, slots):
            raise _EstimateTooLarge(shape.width, shape.height)
        batch = PooledBatch(self._engine.batch(shape, slots), idle_since=self._clock())
        self._batches.append(batch)
        return batch

    def _place(self, batch: PooledBatch, task: Task) -> None:
        """Puts a job into a batch. The time that this takes counts as device time of the job."""
        started_at = self._clock()
        try:
            task.slot = batch.engine_batch.join(task.state)
        except BaseException:
            if not batch.tasks:
                self._close_batch(batch)
            raise
        if task.newly_arrived:
            competing = [other.used_s for other_batch in self._batches for other in other_batch.tasks.values()]
            task.used_s, task.newly_arrived = min(competing, default=task.used_s), False
        task.used_s += self._clock() - started_at
        task.batch = batch
        batch.tasks[task.slot] = task

    def _disband(self, batch: PooledBatch) -> None:
        """Detaches all jobs in a batch, which closes it. A job that cannot be detached fails."""
        for task in list(batch.tasks.values()):
            try:
                self.detach(task)
            except Exception as error:  # noqa: BLE001 - it is this job's alone, and the caller of `assign` reports it
                self._failed[task] = error
                self.discard(task)

    def _release_slot(self, task: Task) -> None:
        batch = task.batch
        assert batch is not None, "only a job in a batch has a slot"
        del batch.tasks[task.slot]
        task.batch = None
        if not batch.tasks:
            self._close_batch(batch)

    def _close_batch(self, batch: PooledBatch) -> None:
        self._allocator_full = False
        self._batches.remove(batch)
        try:
            batch.engine_batch.close()
        except Exception:  # the device has failed; its other batches must be closed, too
            log.exception("a batch could not be closed")


class _EstimateTooLarge(OutOfDeviceMemory):
    """The estimate exceeds the memory; nothing was allocated."""


def widths(jobs: int, widest: int) -> list[int]:
    """Widths of the batches for this many jobs, widest first: powers of two up to ``widest``, with at most a quarter of
    the slots empty."""
    result = []
    while jobs > 0:
        width = min(widest, 1 << (jobs - 1).bit_length())
        if 4 * (width - jobs) > width:
            width //= 2
        result.append(width)
        jobs -= width
    return result
