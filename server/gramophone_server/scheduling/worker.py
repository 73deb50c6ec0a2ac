"""The compute thread's side of the jobs that are worked on: a slice of one lane at a time, and what controllers ask for."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from gramophone.recipe import Violation
from gramophone_server.domain.commands import Command, Done, Finish, Retune, TakeCheckpoint, TakePicture
from gramophone_server.domain.engine_api import BatchEngine
from gramophone_server.domain.events import (
    Changed,
    Event,
    Finished,
    Frame,
    Picture,
    Progress,
    Saved,
    SavedState,
    StopReason,
)
from gramophone_server.domain.job import Report, ran_out_of_memory
from gramophone_server.domain.job_state import Shape
from gramophone_server.errors import (
    DeviceLost,
    Diverged,
    EngineFailed,
    GramophoneError,
    InvalidRequest,
    OutOfDeviceMemory,
    ShuttingDown,
)
from gramophone_server.scheduling.batch_pool import BatchPool, Iterated, PooledBatch, Seat
from gramophone_server.scheduling.throughput import ThroughputModel

__all__ = ["JobObserver", "Task", "Worker"]

log = logging.getLogger(__name__)

# The longest that the engine is left alone, if an iteration is not longer: cancelling takes no longer, and a wait for the
# GPU (30 us of 0.4 ms at 256 px) comes once in so long instead of after every iteration. Going from one lane to another
# costs nothing, so nothing is gained by longer slices.
SLICE_S = 0.02
# As often as frames come. 256 jobs that tell of every slice are 12,000 messages a second, and a core writes some 5,000.
PROGRESS_EVERY_S = 0.1
LET_BY_S = 10.0  # who waits for memory lets smaller ones begin; then it has those end who are there
GONE_AFTER_S = 1.0  # a server that interrupts its jobs, so that who looks for it then finds another one


class JobObserver(Protocol):
    """Whom a job is run for; see `jobs.Job`. Called on the compute thread and, for the queue, on the event loop, with
    the scheduler's lock held at times: it never waits and never calls back."""

    @property
    def cancelled(self) -> bool:
        """The job shall stop before its next iteration."""

    def iterations_until_next_frame(self, iteration: int) -> int | None:
        """Iterations from this one to the next whose picture may be wanted, None if any will do."""

    def started(self) -> None:
        """The job waits no longer."""

    def publish(self, event: Event) -> None:
        """`Accepted` first, then `Waiting` and `Progress`, `Finished` last."""

    def offer_frame(self, iteration: int, take: Callable[[], Callable[[], Tensor]]) -> None:
        """Takes the picture if somebody wants it."""

    def offer_checkpoint(self, iteration: int, take: Callable[[bool], SavedState]) -> None:
        """Takes the state if somebody wants it; `take` is told whether a light one will do."""

    def interrupted(self, iteration: int, picture: Picture, take: Callable[[bool], SavedState]) -> None:
        """The server goes away with the job on its way: everybody gets the picture, and the state. `fail` follows."""

    def fail(self, error: GramophoneError) -> None:
        """The job has ended without a result."""


@dataclass(eq=False, kw_only=True)
class Task(Seat):
    """A job and whom it is run for. Times are the monotonic clock's seconds."""

    listener: JobObserver
    budget_at: float = math.inf  # the result shall be there, whatever it is by then
    must_begin_at: float = math.inf  # to be done in time, by what was estimated when it came
    left_s: float | None = None  # of the device, to the end; None: nothing was measured yet
    begun_at: float | None = None
    paused_until: float = 0.0
    over: bool = False  # its listener has heard the end
    report: Report | None = None  # the newest; None: it has no picture of its own yet
    told: Report | None = None  # the newest that its listener has heard of
    progress_due_at: float = 0.0
    scale_began_at: float = 0.0  # the present one, and the iterations done before it
    scale_began_behind: int = 0
    scale_at: int = -1

    @property
    def stands_until(self) -> float:
        """Of one that is paused: then its pause is over, or its time."""
        return min(self.paused_until, self.budget_at)


class Worker:
    """Works on tasks in slices. Belongs to the compute thread; who is worked on is the scheduler's business."""

    def __init__(
        self,
        engine: BatchEngine,
        pace: ThroughputModel,
        most_checkpoint_bytes: int,
        iterated: Iterated = lambda *_: None,
    ) -> None:
        self._engine, self._pace = engine, pace
        self._lanes = BatchPool(engine, pace, iterated)
        self._most_checkpoint_bytes = most_checkpoint_bytes
        self._short_since: float | None = None  # somebody waits for memory

    @property
    def batch_bytes(self) -> int:
        """That the batches take on the device, as estimated. For any thread."""
        return self._lanes.bytes

    @property
    def short(self) -> bool:
        """Somebody waits for memory."""
        return self._short_since is not None

    def may_begin(self, task: Task) -> bool:
        """Whether there is room for a task more. While somebody waits for memory, only those may begin who fit beside
        everybody, and not for long, or what it waits for would never be free."""
        if self._short_since is None:
            return True
        return self._lanes.fits(task.work.shape, 1) and time.monotonic() < self._short_since + LET_BY_S

    def begin(self, task: Task) -> None:
        """A task more. It has neither an advantage over the others nor a debt to them."""
        task.apart = True
        task.listener.started()

    def leave(self, task: Task) -> None:
        """A task less, which can begin again. Raises `OutOfDeviceMemory`, and the task is over."""
        if task.report is not task.told:
            self._tell(task)
        task.scale_at = -1  # its speed is measured anew then
        try:
            self._lanes.leave(task)
        except OutOfDeviceMemory as error:
            self._fail(task, error)
            raise

    def turn(self, tasks: Sequence[Task], beside_bytes: int = 0) -> None:
        """One slice, for the task that has had the least of the device and those in its lane. Those that are `over` then
        have been told. ``beside_bytes``: on the device, of jobs that stand still. Raises `DeviceLost`."""
        for task in tasks:
            if task.listener.cancelled:
                self._end(task)
        left = [task for task in tasks if not task.over]
        now = time.monotonic()
        failed = self._lanes.arrange(left, beside_bytes, now + SLICE_S)
        for seat, error in failed.items():
            self._fail(seat, error)
        if failed:
            self._require_device()
        if not self._lanes.short:
            self._short_since = None
        elif self._short_since is None:
            self._short_since = now
        if (lane := self._next(left)) is not None:
            self._advance(lane)

    def end_in_time(self, task: Task) -> bool:
        """Ends a task whose time budget is used up with the picture that it has; False if it has none yet."""
        if task.report is None:
            return False
        try:
            self._finish(task, StopReason.TIME_BUDGET)
        except Exception as error:  # noqa: BLE001 - `_fail` logs what is not ours
            self._fail(task, error)
        return True

    def lose(self, tasks: Sequence[Task], error: Exception) -> None:
        """Ends everybody, after an error that is nobody's own. Raises `DeviceLost`."""
        for lane in list(self._lanes):
            self._lanes.lose(lane)
        self._short_since = None  # or nobody would begin, and no turn be had
        for task in tasks:
            self._fail(task, error)
        self._require_device()

    def do(self, task: Task, command: Command) -> Done:
        """Carries out a command between two slices, for a task that is worked on or not. Raises `InvalidRequest` and
        `InvalidRecipe`; the task is as it was then."""
        work = task.work
        match command:
            case Retune(changes):
                lane = task.lane
                if changes.get("iterations") == work.iterations_at_final_scale and task.report is None:
                    _must_have_begun(task)  # to end, it needs a picture
                first = work.update(**changes) if lane is None else lane.batch.update(task.slot, **changes)
                task.listener.publish(Changed(first, work.recipe, work.iterations))
                self._count(task)
                if work.finished:
                    self._finish(task, StopReason.ITERATIONS_DONE)
                elif not work.iterations_left:
                    self._lanes.leave(task)
                return Done(first)
            case TakePicture():
                return Done(work.done, Frame(work.done, Picture(self._picture(task))))
            case TakeCheckpoint(light):
                _must_have_begun(task)
                self._engine.checkpoints.require_room(work, light=light, most_bytes=self._most_checkpoint_bytes)
                return Done(work.done, Saved(work.done, self._state(task, light)))
            case Finish():
                self._finish(task, StopReason.FINISHED)
                return Done(work.done)
        raise AssertionError(f"{command} is the scheduler's to do")

    def interrupt(self, task: Task) -> None:
        """Ends a task with its present picture and state, because the server goes away."""
        try:
            if task.report is not None:
                picture = Picture(self._picture(task))
                task.listener.interrupted(task.work.done, picture, lambda light: self._state(task, light))
        except Exception:
            log.exception("the picture of an interrupted job could not be taken")
        task.listener.fail(ShuttingDown(GONE_AFTER_S))
        self._end(task)

    # One slice --------------------------------------------------------------------------------------------------------

    def _next(self, tasks: Sequence[Task]) -> PooledBatch | None:
        """The lane of the task that has had the least of the device. If its slice would use up somebody's time budget, that
        one goes first, as long as the lane has not stood still for longer than its slice takes; else it ends now."""
        while seated := [(task, task.lane) for task in tasks if task.lane is not None and not task.over]:
            poorest, lane = min(seated, key=lambda one: one[0].used_s)
            each_s, now = self._pace.iteration_s(lane.shape, lane.slots) or 0.0, time.monotonic()
            takes_s = max(each_s, SLICE_S)
            pressed = [one for one in seated if one[0].budget_at < now + takes_s]
            elsewhere = [one for one in pressed if one[1] is not lane]
            if elsewhere and now < lane.stands_since + takes_s:
                return min(elsewhere, key=lambda one: one[0].budget_at)[1]
            for task, its_lane in pressed:
                if its_lane is not lane or task.budget_at < now + each_s:
                    self.end_in_time(task)
            if not poorest.over:
                return lane
        return None

    def _advance(self, lane: PooledBatch) -> None:
        tasks: list[Task] = [seat for seat in lane.seats.values() if isinstance(seat, Task)]
        now = time.monotonic()
        for task in tasks:
            if task.begun_at is None:
                task.begun_at = now
            if task.scale_at != task.work.at:
                task.scale_at, task.scale_began_at, task.scale_began_behind = task.work.at, now, task.work.done
        each_s = self._pace.iteration_s(lane.shape, lane.slots)
        try:
            reports = self._lanes.advance(lane, _slice(tasks, now, each_s))
        except Exception as error:  # noqa: BLE001 - `_fail` logs what is not ours
            self._lanes.lose(lane)
            for task in tasks:
                self._fail(task, error)
            return self._require_device()
        each_s = self._pace.iteration_s(lane.shape, lane.slots) or 0.0
        for task in tasks:
            if task in reports:
                try:
                    self._told(task, reports[task], each_s)
                except Exception as error:  # noqa: BLE001 - `_fail` logs what is not ours
                    self._fail(task, error)

    def _require_device(self) -> None:
        """After a failure: it may have been the device, and then whoever comes would only fail as well."""
        try:
            self._engine.require_device()
        except Exception as error:
            raise DeviceLost("the device fails at an addition") from error

    def _told(self, task: Task, report: Report, each_s: float) -> None:
        work, listener, now = task.work, task.listener, time.monotonic()
        task.report = report
        if report.diverged_at is not None:
            listener.publish(Frame(report.diverged_at - 1, Picture(self._picture(task))))
            raise Diverged(report.diverged_at)
        self._count(task)
        if now >= task.progress_due_at or work.finished:
            self._tell(task)
        listener.offer_frame(work.done, lambda: self._picture(task))
        if work.finished:
            self._finish(task, StopReason.ITERATIONS_DONE)
        elif now + each_s > task.budget_at:
            self._finish(task, StopReason.TIME_BUDGET)
        else:
            if self._engine.checkpoints.size(work, light=True) <= self._most_checkpoint_bytes:
                listener.offer_checkpoint(work.done, lambda light: self._state(task, light))
            if not work.iterations_left:
                self._lanes.leave(task)

    def _tell(self, task: Task) -> None:
        report, now = task.report, time.monotonic()
        assert report is not None, "a task that has begun has a report"
        task.told, task.progress_due_at = report, now + PROGRESS_EVERY_S
        per_s = (task.work.done - task.scale_began_behind) / max(now - task.scale_began_at, 1e-9)
        left_s = report.pixels_left / (per_s * report.width * report.height)
        task.listener.publish(Progress(report, per_s, left_s))

    def _finish(self, task: Task, reason: StopReason) -> None:
        picture, report, begun_at = self._picture(task), task.report, task.begun_at
        assert report is not None and begun_at is not None, "a task with a picture has begun"
        elapsed_s = time.monotonic() - begun_at
        task.listener.publish(Finished(Picture(picture), report.losses, task.work.done, elapsed_s, reason))
        self._end(task)

    def _count(self, task: Task) -> None:
        """What is left, by the newest speed."""
        width, height, _ = task.work.scales[task.work.at]
        each_s = self._pace.job_s(Shape.of(task.work.recipe, height, width))
        if each_s is not None:
            task.left_s = task.work.pixels_left * each_s / (width * height)

    def _picture(self, task: Task) -> Callable[[], Tensor]:
        _must_have_begun(task)
        if task.lane is not None:
            return task.lane.batch.snapshot(task.slot)
        return self._engine.picture(task.work)

    def _state(self, task: Task, light: bool) -> SavedState:
        """A light one where a full one would be too large."""
        checkpoints, most_bytes = self._engine.checkpoints, self._most_checkpoint_bytes
        if light or checkpoints.size(task.work) > most_bytes:
            picture, work = self._picture(task), replace(task.work, tensors=None)
            return SavedState(True, lambda: checkpoints.write(work, picture=picture(), most_bytes=most_bytes))
        work = replace(task.work) if task.lane is None else task.lane.batch.copy(task.slot)
        return SavedState(False, lambda: checkpoints.write(work, most_bytes=most_bytes))

    def _fail(self, seat: Seat, error: Exception) -> None:
        assert isinstance(seat, Task)
        if isinstance(error, GramophoneError):
            seat.listener.fail(_bare(error))
        elif ran_out_of_memory(error):
            seat.listener.fail(OutOfDeviceMemory(*seat.work.job.result_size))
        else:
            log.error("the engine failed", exc_info=error)
            seat.listener.fail(EngineFailed())
        self._end(seat)

    def _end(self, task: Task) -> None:
        self._lanes.drop(task)
        task.over = True


def _slice(tasks: list[Task], now: float, each_s: float | None) -> int:
    """Iterations until the next look at everything else."""
    if each_s is None:
        return 1
    most = max(1, int(SLICE_S / each_s))
    for task in tasks:
        most = min(most, task.listener.iterations_until_next_frame(task.work.done) or most)
        if task.budget_at < math.inf:
            most = min(most, max(1, int((task.budget_at - now) / each_s)))
    return most


def _must_have_begun(task: Task) -> None:
    if task.report is None:
        raise InvalidRequest([Violation("", "the job has not begun yet; wait for its first progress")])


def _bare(error: GramophoneError) -> GramophoneError:
    """The error without its traceback and causes, whose frames would keep a batch's memory until the reader is gone."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
