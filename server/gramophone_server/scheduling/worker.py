"""Runs the jobs on the compute thread, one slice of one batch at a time, and executes commands between slices."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from gramophone.recipe import Violation
from gramophone_server.config import Limits
from gramophone_server.domain.engine_api import BatchEngine
from gramophone_server.domain.events import Changed, Finished, Frame, Picture, Progress, Saved, SavedState, StopReason
from gramophone_server.domain.job import Report, ran_out_of_memory
from gramophone_server.domain.job_state import RecipeUpdate, Shape
from gramophone_server.errors import (
    DeviceLost,
    Diverged,
    EngineFailed,
    GramophoneError,
    InvalidRequest,
    OutOfDeviceMemory,
    ShuttingDown,
)
from gramophone_server.scheduling.batch_pool import BatchPool, OnIterations
from gramophone_server.scheduling.fair_share import DeviceShares
from gramophone_server.scheduling.forecast import Forecaster
from gramophone_server.scheduling.memory_turns import MemoryTurns
from gramophone_server.scheduling.task import PooledBatch, Task
from gramophone_server.scheduling.throughput import ThroughputModel
from gramophone_server.scheduling.turn_order import SLICE_S, TurnOrder

__all__ = ["Worker"]

log = logging.getLogger(__name__)

# The same as the interval of frames. 256 jobs with a message after every slice would send 12,000 a second; a core
# writes about 5,000.
PROGRESS_INTERVAL_S = 0.1
# Between two estimates of a task, for each task in its batch: an estimate takes about 15 us, so all of them at most
# 1.5 % of the compute thread's time.
ESTIMATE_INTERVAL_S = 0.001
# After this time a client retries an interrupted job: this process has ended by then, and another server takes the job.
RETRY_INTERRUPTED_S = 1.0


class Worker:
    """Runs tasks in slices. Belongs to the compute thread; its caller decides which tasks run."""

    def __init__(
        self,
        engine: BatchEngine,
        throughput: ThroughputModel,
        max_checkpoint_bytes: int,
        on_iterations: OnIterations = lambda *_: None,
        clock: Callable[[], float] = time.monotonic,
        max_parked_bytes: int = Limits.max_parked_bytes,
    ) -> None:
        self._engine, self._throughput, self._clock = engine, throughput, clock
        self._shares: DeviceShares[Task] = DeviceShares()
        self._pool = BatchPool(engine, throughput, self.charge, on_iterations, clock, max_parked_bytes)
        self.memory = MemoryTurns(engine, self._pool, self._park, clock)
        self._order = TurnOrder(self._shares, throughput, self.finish_within_budget, clock)
        self._forecaster = Forecaster(throughput)
        self._max_checkpoint_bytes = max_checkpoint_bytes

    @property
    def batch_bytes(self) -> int:
        """Estimated device memory, in bytes, of the batches and of the jobs waiting to join one. Thread-safe."""
        return self._pool.bytes

    @property
    def parked_bytes(self) -> int:
        """Size of the states of jobs that are paused or have left the device for others. Thread-safe."""
        return self._pool.host_bytes

    @property
    def max_parked_bytes(self) -> int:
        """Largest `parked_bytes`: the setting, and at most half of the engine's memory. Thread-safe."""
        return self._pool.max_host_bytes

    @property
    def urgent_credit_s(self) -> float:
        """Seconds that jobs whose deadlines need it may take at once now. Thread-safe."""
        return self._order.credit_s

    def may_have_memory(self, shape: Shape) -> bool:
        """Whether the device has memory for one more job of this shape now. Thread-safe."""
        return self._pool.fits(self._engine.batch_bytes(shape, 1))

    def admit(self, task: Task) -> None:
        """Adds a job. It is owed nothing of what the others used before: see `fair_share`."""
        task.idle_since = self._clock()
        task.observer.started()

    def pause(self, task: Task, host_bytes: int) -> None:
        """Takes a task out of its batch, into the host's memory; it can be admitted again, without a promise. Raises
        `InvalidRequest` if the states of other jobs, with ``host_bytes``, leave no room there. If memory runs out, the
        job fails, and `OutOfDeviceMemory` is raised."""
        self.memory.require_host_memory(task, host_bytes)
        try:
            self._leave(task)
        except OutOfDeviceMemory as error:
            self._fail(task, error)
            raise
        self._shares.leave(task)
        task.memory_short_since, task.came_early, task.deadline_at = None, False, math.inf  # promised if it goes on

    def give_place_up(self, task: Task) -> None:
        """Takes a task out of its batch, into the host's memory, for another owner. If that fails, so does the job."""
        self._leave_or_fail(task)
        self._shares.leave(task)
        task.gave_place_up, task.keeps_place, task.came_early, task.queued_at = True, False, False, self._clock()

    def step(self, tasks: Sequence[Task], paused_bytes: int = 0) -> None:
        """Runs one turn: of the task that would have had the least device time after it. That is a step of its
        beginning, or its join, or a slice, with the tasks that share its batch. Tasks that end in it are marked as
        `ended`, and their observers are notified.

        ``paused_bytes``: size of the tensors of paused jobs. Raises `DeviceLost`.
        """
        for task in tasks:
            if task.observer.cancelled:
                self._end(task)
        self._fail_each(self._pool.plan(_apart(tasks), paused_bytes))
        having = dict.fromkeys(self.memory.with_memory(_apart(tasks)))
        for task in _apart(tasks):  # a job in a batch competes already
            (self._shares.arrive if task in having else self._shares.leave)(task)
        ready = [task for task in tasks if not task.ended and (task.batch is not None or task in having)]
        moving = next((task for task in having if task in self._pool.moving), None)
        chosen = moving or self._order.next(ready)
        if chosen is None:
            return
        started_at = self._clock()
        if chosen.batch is not None:
            self._advance(chosen.batch)
        else:
            try:
                self._pool.begin(chosen)
            except Exception as error:  # noqa: BLE001 - `_fail` logs an unexpected one
                self._fail_each({chosen: error})
        if moving is None:
            self._order.charge(self._clock() - started_at)

    def finish_within_budget(self, task: Task) -> bool:
        """Ends a task whose time budget is used up, with its current picture. Returns False if it has none yet."""
        if task.last_report is None:
            return False
        try:
            self._finish(task, StopReason.TIME_BUDGET)
        except Exception as error:  # noqa: BLE001 - `_fail` logs an unexpected one
            self._fail(task, error)
        return True

    def fail_all(self, tasks: Sequence[Task], error: Exception) -> None:
        """Ends all tasks, after an error that belongs to none of them, and closes all batches. Raises `DeviceLost`."""
        for batch in list(self._pool):
            self._pool.discard_batch(batch)
        for task in tasks:
            self._fail(task, error)
        self._require_device()

    def drain_task(self, task: Task) -> None:
        """Ends a task because the server stops. Its watchers receive the current picture and state, so that they can
        continue on another server."""
        try:
            if task.last_report is not None:
                done, observer = task.state.done, task.observer
                observer.publish(self.frame(task))
                observer.publish(Saved(done, self._saved_state(task, light=observer.accepts_light_checkpoint)))
        except Exception:
            log.exception("the picture of an interrupted job could not be taken")
        task.observer.fail(ShuttingDown(RETRY_INTERRUPTED_S))
        self._end(task)

    # Commands, between two slices, for a task in a batch or not. A command that raises `InvalidRequest` or
    # `InvalidRecipeError` has not changed the task.

    def update(self, task: Task, changes: RecipeUpdate) -> int:
        """Changes the recipe; returns the first iteration with the new one. If no iteration is left, the job ends with
        its current picture, so before it has one that is an `InvalidRequest`. Raises `InvalidRecipeError`."""
        state, batch, before = task.state, task.batch, task.state.iterations
        if changes.get("iterations") == state.iterations_at_final_scale and task.last_report is None:
            _require_picture(task)
        first = state.update(**changes) if batch is None else batch.engine_batch.update(task.slot, **changes)
        if state.iterations > before:
            task.deadline_at = math.inf  # it was promised for less work
        task.observer.publish(Changed(first, state.recipe, state.iterations))
        self._update_remaining(task)
        if state.finished:
            self._finish(task, StopReason.ITERATIONS_DONE)
        elif not state.iterations_left:
            self._pool.detach(task)
        return first

    def charge(self, task: Task, seconds: float) -> None:
        """Counts device time of a job: its turns, its share of those of its batch, and its commands and pictures."""
        task.count(seconds)
        self._shares.charge(task, seconds)

    def frame(self, task: Task) -> Frame:
        """The current picture. Raises `InvalidRequest` if there is none yet."""
        return Frame(task.state.done, self._shared_picture(task))

    def checkpoint(self, task: Task, *, light: bool) -> Saved:
        """The current state. Raises `InvalidRequest` if there is none yet, or it is larger than the server allows."""
        _require_picture(task)
        self._engine.checkpoints.require_room(task.state, light=light, max_bytes=self._max_checkpoint_bytes)
        return Saved(task.state.done, self._saved_state(task, light=light))

    def finish(self, task: Task) -> None:
        """Ends the job; the current picture is its result. Raises `InvalidRequest` if there is none yet."""
        self._finish(task, StopReason.FINISHED)

    # One slice --------------------------------------------------------------------------------------------------------

    def _advance(self, batch: PooledBatch) -> None:
        """Runs one slice of a batch and reports it."""
        tasks = list(batch.tasks.values())
        now = self._clock()
        for task in tasks:
            if task.started_at is None:
                task.started_at = now
            if task.measured_scale != task.state.scale_index:
                task.measured_scale, task.scale_started_at = task.state.scale_index, now
                task.iterations_before_scale = task.state.done
        iteration_s = self._throughput.batch_seconds_per_iteration(batch.shape, batch.slots)
        try:
            reports, failed = self._pool.advance(batch, _slice_iterations(tasks, now, iteration_s))
        except Exception as error:  # noqa: BLE001 - `_fail` logs an unexpected one
            self._pool.discard_batch(batch)
            return self._fail_each(dict.fromkeys(tasks, error))
        self._fail_each(failed)
        iteration_s = self._throughput.batch_seconds_per_iteration(batch.shape, batch.slots) or 0.0
        for task in tasks:
            if task in reports:
                started_at = self._clock()
                try:
                    self._process_report(task, reports[task], iteration_s)
                except Exception as error:  # noqa: BLE001 - `_fail` logs an unexpected one
                    self._fail(task, error)
                if not task.ended:
                    self.charge(task, self._clock() - started_at)

    def _leave(self, task: Task) -> None:
        """Takes a task out of its batch, into the host's memory. Raises `OutOfDeviceMemory`."""
        if task.last_report is not task.last_sent_report:
            self._send_progress(task)
        task.measured_scale = -1  # so that its speed is measured anew
        task.used_before_place_s = None
        self._pool.detach(task, to_host=True)

    def _park(self, task: Task) -> None:
        """Takes a task out of its batch, because another one has waited for its memory."""
        self._leave_or_fail(task)
        task.parked, task.memory_short_since = True, self._clock()

    def _leave_or_fail(self, task: Task) -> None:
        try:
            self._leave(task)
        except Exception as error:  # noqa: BLE001 - `_fail` logs an unexpected one
            self._fail_each({task: error})

    def _fail_each(self, errors: Mapping[Task, Exception]) -> None:
        for task, error in errors.items():
            self._fail(task, error)
        if errors:
            self._require_device()

    def _require_device(self) -> None:
        """Raises `DeviceLost` if a failure was the device's, because then all later jobs would fail, too."""
        try:
            self._engine.require_device()
        except Exception as error:
            raise DeviceLost("the device fails at an addition") from error

    def _process_report(self, task: Task, report: Report, iteration_s: float) -> None:
        """After a slice: sends progress, frames and checkpoints that are due, and ends the job or its scale.

        ``iteration_s``: estimated seconds of the next iteration.
        """
        state, observer, now = task.state, task.observer, self._clock()
        task.last_report = report
        if report.diverged_at is not None:
            observer.publish(Frame(report.diverged_at - 1, self._shared_picture(task)))
            raise Diverged(report.diverged_at)
        self._update_remaining(task)
        if now >= task.progress_due_at or state.finished:
            self._send_progress(task)
        if watchers := observer.collect_frame_requests(state.done, now):
            observer.publish(self.frame(task), watchers)
        if state.finished:
            self._finish(task, StopReason.ITERATIONS_DONE)
        elif now + iteration_s > task.budget_ends_at:
            self._finish(task, StopReason.TIME_BUDGET)
        else:
            for light in (True, False):
                watchers = observer.collect_checkpoint_requests(now, light=light)
                if watchers and self._engine.checkpoints.fits(state, light=True, max_bytes=self._max_checkpoint_bytes):
                    observer.publish(Saved(state.done, self._saved_state(task, light=light)), watchers)
            if not state.iterations_left:
                self._pool.detach(task)

    def _send_progress(self, task: Task) -> None:
        report, now = task.last_report, self._clock()
        assert report is not None, "a task that was in a slice has a report"
        task.last_sent_report, task.progress_due_at = report, now + PROGRESS_INTERVAL_S
        iterations_per_s = (task.state.done - task.iterations_before_scale) / max(now - task.scale_started_at, 1e-9)
        left_s = report.pixel_iterations_left / (iterations_per_s * report.width * report.height)
        task.observer.publish(Progress(report, iterations_per_s, left_s))

    def _finish(self, task: Task, reason: StopReason) -> None:
        picture, report, started_at = self._shared_picture(task), task.last_report, task.started_at
        assert report is not None and started_at is not None, "a task with a picture was in a slice"
        elapsed_s = self._clock() - started_at
        task.observer.publish(Finished(picture, report.losses, task.state.done, elapsed_s, reason))
        self._end(task)

    def _update_remaining(self, task: Task) -> None:
        """Estimates the remaining work from the newest speeds."""
        now, batch = self._clock(), task.batch
        jobs, slots = (1, 1) if batch is None else (len(batch.tasks), batch.slots)
        if task.remaining is None or now >= task.estimated_at + jobs * ESTIMATE_INTERVAL_S:
            work = self._forecaster.work(task.state, jobs, slots, budget_s=task.budget_ends_at - now)
            task.remaining, task.estimated_at = work, now

    def _picture(self, task: Task) -> Callable[[], Tensor]:
        """A function that returns the current picture. Raises `InvalidRequest` if there is none yet."""
        _require_picture(task)
        if task.batch is not None:
            return task.batch.engine_batch.snapshot(task.slot)
        return self._engine.picture(task.state)

    def _shared_picture(self, task: Task) -> Picture:
        """The current picture, for any number of watchers. Raises `InvalidRequest` if there is none yet."""
        width, height, _ = task.state.scales[task.state.scale_index]
        return Picture(self._picture(task), width, height)

    def _saved_state(self, task: Task, *, light: bool) -> SavedState:
        """The current state; a light one if a full one would be too large."""
        checkpoints, max_bytes = self._engine.checkpoints, self._max_checkpoint_bytes
        light = light or not checkpoints.fits(task.state, max_bytes=max_bytes)
        most_bytes = checkpoints.most_bytes(task.state, light=light)
        if light:
            picture = self._picture(task)
            state = replace(task.state, job=task.state.job.without_images(), tensors=None)
            return SavedState(
                True, lambda: checkpoints.write(state, picture=picture(), max_bytes=max_bytes), most_bytes
            )
        state = replace(task.state) if task.batch is None else task.batch.engine_batch.copy(task.slot)
        state.job = state.job.without_images()  # a client that does not read its checkpoint must not keep the images
        return SavedState(False, lambda: checkpoints.write(state, max_bytes=max_bytes), most_bytes)

    def _fail(self, task: Task, error: Exception) -> None:
        if isinstance(error, GramophoneError):
            task.observer.fail(_without_traceback(error))
        elif ran_out_of_memory(error):
            task.observer.fail(OutOfDeviceMemory(*task.state.job.result_size))
        else:
            log.error("the engine failed", exc_info=error)
            task.observer.fail(EngineFailed())
        self._end(task)

    def _end(self, task: Task) -> None:
        self._shares.leave(task)
        self._pool.discard(task)
        task.ended = True


def _apart(tasks: Iterable[Task]) -> list[Task]:
    """The jobs that are in no batch."""
    return [task for task in tasks if task.batch is None and not task.ended]


def _slice_iterations(tasks: list[Task], now: float, iteration_s: float | None) -> int:
    """Iterations of a slice: about `SLICE_S` long, not beyond the next frame of any task, nor beyond a time budget."""
    if iteration_s is None:
        return 1
    count = max(1, int(SLICE_S / iteration_s))
    for task in tasks:
        count = min(count, task.observer.iterations_until_next_frame(task.state.done) or count)
        if task.budget_ends_at < math.inf:
            count = min(count, max(1, int((task.budget_ends_at - now) / iteration_s)))
    return count


def _require_picture(task: Task) -> None:
    if task.last_report is None:
        raise InvalidRequest([Violation("", "the job has not started yet; wait for its first progress")])


def _without_traceback(error: GramophoneError) -> GramophoneError:
    """The error without traceback and causes. Their frames would keep a batch's memory until the error is read."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
