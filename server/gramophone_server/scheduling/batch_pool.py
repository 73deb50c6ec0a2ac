"""Assigns jobs to batches.

Jobs of one shape share batches. A batch is as wide as the measurements recommend, and the batches of a shape are
rebuilt when jobs join or end. What a job needs before it is in a batch is done in turns, like iterations: see `begin`.
Belongs to the compute thread.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from gramophone_server.config import Limits
from gramophone_server.domain.engine_api import BatchEngine, Beginning
from gramophone_server.domain.job import Report
from gramophone_server.domain.job_state import Shape
from gramophone_server.errors import OutOfDeviceMemory
from gramophone_server.scheduling.task import PooledBatch, Task
from gramophone_server.scheduling.throughput import ThroughputModel

__all__ = ["BatchPool", "OnIterations", "widths"]

log = logging.getLogger(__name__)

# Reports iterations of a batch: its shape, its width in slots, its jobs, iterations of each job, seconds in total.
OnIterations = Callable[[Shape, int, int, int, float], None]

# When batches are rebuilt, their jobs leave and join again, before anything else. This may take one part in so many of
# the time, however often jobs come and go.
REBUILD_PART = 10
# A job that needs more than this part of the device's memory leaves as much free, so that small jobs find room.
SMALL_JOB_PART = 16


class BatchPool:
    """The open batches of one engine. Calls ``on_iterations`` on the compute thread, after each slice. ``charge`` adds
    device seconds to what a job has used."""

    def __init__(
        self,
        engine: BatchEngine,
        throughput: ThroughputModel,
        charge: Callable[[Task, float], None],
        on_iterations: OnIterations = lambda *_: None,
        clock: Callable[[], float] = time.monotonic,
        max_parked_bytes: int = Limits.max_parked_bytes,
    ) -> None:
        self._engine, self._throughput, self._charge = engine, throughput, charge
        self._on_iterations = on_iterations
        self._clock = clock
        self._max_parked_bytes = max_parked_bytes
        self._batches: list[PooledBatch] = []
        self._batches_bytes = 0  # estimated
        self._missing: dict[Shape, Counter[int]] = {}  # widths of the batches that are to be opened
        # The widest batch that memory allowed, until no job of the shape is left.
        self._max_slots: dict[Shape, int] = {}
        # The allocator had no memory beside other jobs. Until a batch is closed, nothing more is begun.
        self._allocator_full = False
        self._refused: set[Task] = set()  # jobs that have met this
        self.moving: set[Task] = set()  # jobs that a rebuild has taken out of their batches
        self._rebuilt_at = -math.inf
        self._moved_s = 0.0  # that the jobs took since then to leave and to join again
        self._apart_bytes = 0  # of the tensors of jobs that are in no batch, on the device
        self._host_bytes = 0  # of those that have left the device for others, or are paused
        self._pass_bytes = 0  # of beginnings that are under way

    def __iter__(self) -> Iterator[PooledBatch]:
        return iter(self._batches)

    @property
    def bytes(self) -> int:
        """Estimated device memory, in bytes, of all open batches, of jobs between two of them, and of beginnings.
        Thread-safe."""
        return self._apart_bytes + self._pass_bytes + self._batches_bytes

    @property
    def allocator_full(self) -> bool:
        """Whether the allocator has no memory, whatever the estimates say."""
        return self._allocator_full

    @property
    def host_bytes(self) -> int:
        """Size of the states of jobs that have left the device for others, or are paused. Thread-safe."""
        return self._host_bytes

    @property
    def max_host_bytes(self) -> int:
        """Largest `host_bytes`. Thread-safe."""
        return min(self._max_parked_bytes, self._engine.memory_bytes // 2)

    def batch_bytes(self, batch: PooledBatch) -> int:
        """Estimated device memory of an open batch, in bytes."""
        return self._engine.batch_bytes(batch.shape, batch.slots)

    # Before a turn ---------------------------------------------------------------------------------------------------

    def plan(self, apart: Sequence[Task], paused_bytes: int = 0) -> dict[Task, Exception]:
        """Decides which batches the jobs need, and disbands those whose width is no longer the best. Returns the jobs
        that are lost by that, each with its error.

        ``apart``: the running jobs that are in no batch. ``paused_bytes``: size of the tensors of paused jobs.
        """
        self._host_bytes = paused_bytes + sum(task.state.bytes for task in apart if task.parked)
        self._apart_bytes = sum(task.state.bytes for task in apart if not task.parked)
        if self._engine.shares_host_memory:
            self._apart_bytes += self._host_bytes
        under_way = (task.beginning for task in apart)
        self._pass_bytes = sum(beginning.next_bytes for beginning in under_way if beginning and beginning.under_way)
        self.moving.intersection_update(apart)
        # By shapes and batches, not by jobs: this is done before each turn, and most jobs are in a batch.
        joining = Counter(task.state.shape for task in apart)
        batches: dict[Shape, list[PooledBatch]] = {shape: [] for shape in joining}
        for batch in self._batches:
            batches.setdefault(batch.shape, []).append(batch)
        self._max_slots = {shape: slots for shape, slots in self._max_slots.items() if shape in batches}
        self._missing = {}
        failed: dict[Task, Exception] = {}
        for shape, batches_of_shape in batches.items():
            failed |= self._plan(shape, joining[shape], batches_of_shape)
        for task in (*apart, *self.moving):
            if task.beginning is None and task not in failed:
                task.beginning = self._engine.begin(task.state)
        return failed

    def needs(self, task: Task) -> int:
        """Device memory, in bytes, that the next turn of a job in no batch needs and does not have yet."""
        beginning = _beginning(task)
        if beginning.next_pixels:
            needed = 0 if beginning.under_way else beginning.next_bytes
        else:
            needed = 0 if self._batch_with_slot(task.state.shape) else self._engine.batch_bytes(task.state.shape, 1)
        return max(needed, 1) if task in self._refused else needed

    def fits(self, needed: int, besides: int = 0) -> bool:
        """Whether the device has so much memory left, and ``besides`` as much for others, which is negative if others
        leave. It has whatever it takes if nothing else runs."""
        if not needed or not (self._batches or self._pass_bytes or besides > 0):
            return True
        if self._allocator_full and besides >= 0:
            return False
        memory = self._engine.memory_bytes
        limit = memory if needed * SMALL_JOB_PART <= memory else memory - memory // SMALL_JOB_PART
        return self.bytes + besides + min(needed, limit) <= limit

    # A turn ----------------------------------------------------------------------------------------------------------

    def begin(self, task: Task) -> None:
        """One turn of a job in no batch: a step of its beginning, or it joins a batch. The time that this takes counts
        as device time of the job. If memory runs out beside other jobs, it waits until a batch is closed; if there is
        no other job, and after any other exception, the job is lost, and the exception is raised."""
        started_at, shape = self._clock(), task.state.shape
        beginning = _beginning(task)
        pixels = beginning.next_pixels
        other_pass_bytes = self._pass_bytes - (beginning.next_bytes if beginning.under_way else 0)
        width = 1
        try:
            if pixels:
                beginning.advance()
                self._throughput.record_turn("step", pixels, self._clock() - started_at)
            else:
                batch = self._batch_with_slot(shape)
                if batch is None:
                    width = self._missing_width(shape)
                    batch = self._open(shape, width)
                width = batch.slots
                joining_at = self._clock()
                self._join(batch, task)
                self._throughput.record_turn("join", shape.width * shape.height, self._clock() - joining_at)
        except OutOfDeviceMemory:
            if width > 1:
                self._max_slots[shape] = width // 2
            elif not self._batches and not other_pass_bytes:
                raise
            else:
                self._allocator_full = True
                self._refused.add(task)
        finally:
            task.idle_since = self._clock()
            took_s = task.idle_since - started_at
            self._charge(task, took_s)
            task.begun_s += took_s
            if task.batch is not None or beginning.under_way:
                task.memory_short_since = None
            if task.batch is not None:
                task.parked = False
                task.join_s, task.used_before_batch_s = took_s, task.used_s
                if task.used_before_place_s is None:
                    task.used_before_place_s = task.used_s
                if task not in self.moving:
                    self._throughput.record_beginning(shape, task.begun_s)
                task.begun_s = 0.0
                if task in self.moving:
                    self._moved_s += took_s
                    self.moving.remove(task)

    def advance(self, batch: PooledBatch, iterations: int) -> tuple[dict[Task, Report], dict[Task, Exception]]:
        """Runs some iterations of all jobs in a batch; see `engine_api.Batch.advance`. If memory runs out, there are no
        reports and the batch is disbanded: the next one is half as wide, or waits until other jobs have ended. Also
        returns the jobs that are lost by that. After any other exception all jobs in the batch are lost; see
        `discard_batch`."""
        started_at, done = self._clock(), {slot: task.state.done for slot, task in batch.tasks.items()}
        try:
            reports = batch.engine_batch.advance(iterations)
        except OutOfDeviceMemory as error:
            is_single = batch.slots == 1
            if not is_single:
                self._max_slots[batch.shape] = batch.slots // 2
            is_alone = is_single and len(self._batches) == 1 and not self._pass_bytes
            failed: dict[Task, Exception] = dict.fromkeys(batch.tasks.values(), error) if is_alone else {}
            for task in batch.tasks.values():
                self._charge(task, (self._clock() - started_at) / len(batch.tasks))
            failed |= self._disband(batch)
            self._allocator_full = is_single
            return {}, failed
        took_s = self._clock() - started_at
        slot = next(iter(reports))
        completed = batch.tasks[slot].state.done - done[slot]
        self._throughput.record(batch.shape, batch.slots, completed, took_s)
        self._on_iterations(batch.shape, batch.slots, len(batch.tasks), completed, took_s)
        batch.idle_since = started_at + took_s
        for task in batch.tasks.values():
            self._charge(task, took_s / len(batch.tasks))
        return {batch.tasks[slot]: report for slot, report in reports.items()}, {}

    def detach(self, task: Task, *, to_host: bool = False) -> None:
        """Takes a job out of its batch, with its tensors, which counts as its device time. ``to_host``: they leave the
        device, also those of a job between two batches. If this raises `OutOfDeviceMemory`, the job stays in its
        batch."""
        task.beginning, task.begun_s = None, 0.0
        if to_host and task.batch is None:
            task.state.move_to_host()
        if task.batch is not None:
            started_at = self._clock()
            task.batch.engine_batch.leave(task.slot, to_host=to_host)
            self._release_slot(task)
            task.idle_since = self._clock()
            self._charge(task, task.idle_since - started_at)

    def discard(self, task: Task) -> None:
        """Takes a job that has ended, or is lost, out of its batch, and frees its tensors."""
        task.beginning = None
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

    def _plan(self, shape: Shape, joining: int, batches: Sequence[PooledBatch]) -> dict[Task, Exception]:
        """Disbands those ``batches`` of one shape whose width is no longer the best, and sets its missing widths.
        ``joining``: jobs of this shape in no batch."""
        jobs = joining + sum(len(batch.tasks) for batch in batches)
        if jobs == 1 and [batch.slots for batch in batches] == [1]:
            return {}
        max_width = self._max_width(shape, jobs)
        target_widths = widths(jobs, max_width)
        if sorted((batch.slots for batch in batches), reverse=True) == target_widths:
            return {}
        missing = Counter(target_widths)
        misfits = []
        for batch in sorted(batches, key=lambda batch: -len(batch.tasks)):
            if missing[batch.slots]:
                missing[batch.slots] -= 1
            else:
                misfits.append(batch)
        now = self._clock()
        if misfits and now < self._rebuilt_at + REBUILD_PART * self._moved_s:
            free = sum(batch.slots - len(batch.tasks) for batch in batches)
            self._missing[shape] = Counter(widths(max(0, joining - free), max_width))
            return {}
        failed: dict[Task, Exception] = {}
        if misfits:
            for batch in misfits:
                self.moving.update(batch.tasks.values())
                failed |= self._disband(batch)
            self._rebuilt_at, self._moved_s = now, self._clock() - now
        self._missing[shape] = +missing
        return failed

    def _max_width(self, shape: Shape, jobs: int) -> int:
        """The widest batch that is expected to be fast and fits the device; a power of two."""
        best, limit = self._throughput.best_width(shape, jobs), self._engine.max_slots(shape)
        width = min(best, self._max_slots.get(shape, best), 1 << (limit.bit_length() - 1))
        while width > 1 and self._engine.batch_bytes(shape, width) > self._engine.memory_bytes:
            width //= 2
        return width

    def _missing_width(self, shape: Shape) -> int:
        """The widest missing batch for which there is memory; 1 if there is none."""
        missing = sorted(self._missing.get(shape, Counter()).elements(), reverse=True)
        return next((width for width in missing if self.fits(self._engine.batch_bytes(shape, width))), 1)

    def _batch_with_slot(self, shape: Shape) -> PooledBatch | None:
        return next((batch for batch in self._batches if batch.shape == shape and batch.has_room), None)

    def _open(self, shape: Shape, slots: int) -> PooledBatch:
        """Opens a batch. Raises `OutOfDeviceMemory`."""
        batch = PooledBatch(self._engine.batch(shape, slots), idle_since=self._clock())
        self._batches.append(batch)
        self._batches_bytes += self.batch_bytes(batch)
        return batch

    def _join(self, batch: PooledBatch, task: Task) -> None:
        try:
            task.slot = batch.engine_batch.join(task.state, task.beginning)
        except BaseException:
            if not batch.tasks:
                self._close_batch(batch)
            raise
        task.batch, task.beginning = batch, None
        batch.tasks[task.slot] = task

    def _disband(self, batch: PooledBatch) -> dict[Task, Exception]:
        """Detaches all jobs in a batch, which closes it. A job that cannot be detached is lost, and returned."""
        failed: dict[Task, Exception] = {}
        for task in list(batch.tasks.values()):
            try:
                self.detach(task)
            except Exception as error:  # noqa: BLE001 - it is this job's alone, and the caller reports it
                failed[task] = error
                self.discard(task)
        return failed

    def _release_slot(self, task: Task) -> None:
        batch = task.batch
        assert batch is not None, "only a job in a batch has a slot"
        del batch.tasks[task.slot]
        task.batch = None
        if not batch.tasks:
            self._close_batch(batch)

    def _close_batch(self, batch: PooledBatch) -> None:
        self._allocator_full = False
        self._refused.clear()
        self._batches.remove(batch)
        self._batches_bytes -= self.batch_bytes(batch)
        try:
            batch.engine_batch.close()
        except Exception:  # the device has failed; its other batches must be closed, too
            log.exception("a batch could not be closed")


def _beginning(task: Task) -> Beginning:
    assert task.beginning is not None, "`plan` has set it"
    return task.beginning


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
