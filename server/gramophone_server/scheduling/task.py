"""A job in the scheduler, the batch that it is in, and the observer that receives its events."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

from gramophone_server.domain.engine_api import Batch, Beginning
from gramophone_server.domain.events import Event
from gramophone_server.domain.job import Report
from gramophone_server.domain.job_state import JobState, Shape
from gramophone_server.errors import GramophoneError
from gramophone_server.scheduling.forecast import Work, needs_promise

__all__ = ["PATIENCE_S", "JobObserver", "PooledBatch", "Task"]

# A job that has waited this long is overtaken by no job that comes now, however short the deadline or the time budget.
PATIENCE_S = 60.0
# Device seconds. A job that needs less ends soon, and to take its place would cost the device more than that gives.
SHORT_S = 1.0
# Device seconds that a job may have as a short one: a new estimate can be wrong by a factor of two. It can stay low for
# hours, too, if a client adds iterations whenever few are left.
MAX_SHORT_S = 2 * SHORT_S


class JobObserver(Protocol):
    """Receives a job's events; see `jobs.job.Job`. Called on the compute thread and, for the queue, on the event loop,
    sometimes under the scheduler's lock, so it must neither block nor call the scheduler.

    The worker asks which watchers want a frame (a checkpoint), takes one picture (state) for all of them, and publishes
    it.
    """

    @property
    def cancelled(self) -> bool:
        """Whether the job must stop before its next iteration."""

    @property
    def accepts_light_checkpoint(self) -> bool:
        """Whether a light checkpoint is enough for every watcher."""

    def iterations_until_next_frame(self, iteration: int) -> int | None:
        """Iterations from this one to the next whose frame may be requested; None: no slice has to end for a frame."""

    def collect_frame_requests(self, iteration: int, now: float) -> set[object]:
        """The watchers that want the frame of this iteration, for `publish`. Each call counts as the answer to their
        requests: the next frame is due an interval after ``now``."""

    def collect_checkpoint_requests(self, now: float, *, light: bool) -> set[object]:
        """The watchers that want a light (or else a full) checkpoint now; otherwise as `collect_frame_requests`."""

    def started(self) -> None:
        """The job has left the queue."""

    def publish(self, event: Event, watchers: set[object] | None = None) -> None:
        """Sends an event to all watchers, or to ``watchers``. `Accepted` is the first event, `Finished` the last."""

    def fail(self, error: GramophoneError) -> None:
        """The job has ended without a result."""


@dataclass(eq=False, kw_only=True)
class Task:
    """A job in the scheduler, from `Scheduler.submit` to its end. Times are seconds of the scheduler's clock.

    The compute thread owns it: no other thread changes a field, with one exception. While a thread holds the lock of
    the `TaskTable`, it may read the fields above "Batch" and `memory_short_since` of the tasks in the table, and set
    `remaining` if it is None. The compute thread updates `remaining` and `memory_short_since` without the lock, each in
    one assignment.
    """

    state: JobState
    observer: JobObserver
    owner: str = ""  # for whom it counts, and with whose jobs it shares the device: see `fair_share`
    budget_ends_at: float = math.inf  # end of the time budget: the job ends with a result by then
    deadline_at: float = math.inf  # when its last iteration must end, for its result to reach the client in time
    came_at: float = 0.0  # its arrival
    device_s: float = 0.0  # seconds that it has taken of the device
    used_as_short_s: float = 0.0  # of these, while it seemed short, or in a place that it got as a short one
    queued_at: float = 0.0  # its arrival, or when it gave its place up
    remaining: Work | None = None  # estimated, to the end; None: nothing was measured near its sizes yet
    estimated_at: float = -math.inf  # when `remaining` was updated last
    # Batch
    batch: PooledBatch | None = None  # None: in no batch
    slot: int = -1  # in the batch
    beginning: Beginning | None = None  # what it needs before it joins its next batch; None: not looked at yet
    # Device seconds: its beginnings and joins, its share of its batches' iterations, and its pictures and states. When
    # the job starts to compete, `fair_share` sets the counter to what the others have used.
    used_s: float = 0.0
    used_before_batch_s: float = 0.0  # `used_s` when it joined its batch
    begun_s: float = 0.0  # of its present beginning, so far
    join_s: float = 0.0  # of its last join
    idle_since: float = 0.0  # the end of its last turn, or its arrival
    # Place
    used_before_place_s: float | None = None  # `used_s` when it first joined a batch in its place
    gave_place_up: bool = False  # for another owner: it had one before, so its deadline was promised
    keeps_place: bool = False  # it has got one for its deadline, or until it has had a turn
    came_early: bool = False  # it has got one before its turn, because it is short
    # Memory
    memory_short_since: float | None = None  # since when it waits for device memory: in the queue, or without its batch
    parked: bool = False  # it has left the device for another job: its tensors are in the host's memory
    # Pause
    paused_until: float = 0.0
    # Progress
    started_at: float | None = None  # when the first slice started
    last_report: Report | None = None  # None: the job has no picture of this server's making yet
    last_sent_report: Report | None = None
    progress_due_at: float = 0.0
    measured_scale: int = -1  # index of the scale whose speed is measured; -1: none yet
    scale_started_at: float = 0.0
    iterations_before_scale: int = 0
    # End
    ended: bool = False  # the observer has received the end

    @property
    def memory_short(self) -> bool:
        """Whether it waits for device memory. Such a job takes no place of a running one."""
        return self.memory_short_since is not None

    @property
    def is_short(self) -> bool:
        """Whether it ends soon: it needs less than `SHORT_S` of the device, and has not had `MAX_SHORT_S` of it as a
        short job."""
        seems_short = self.remaining is not None and self.remaining.share_s < SHORT_S
        return seems_short and not self.had_time_of_short

    @property
    def had_time_of_short(self) -> bool:
        """Whether it has had `MAX_SHORT_S` of the device as a short job. From then on it is none."""
        return self.used_as_short_s >= MAX_SHORT_S

    def count(self, seconds: float) -> None:
        """Counts device time that it has taken."""
        self.device_s += seconds
        if self.is_short or self.came_early:
            self.used_as_short_s += seconds

    @property
    def has_promise(self) -> bool:
        """Whether others must leave it time for its deadline; see `needs_promise`."""
        return needs_promise(self.deadline_at, self.budget_ends_at)

    @property
    def is_kept_by_budget(self) -> bool:
        """Whether its time budget ends it before its deadline, with the picture that it has."""
        return not self.has_promise and self.last_report is not None

    @property
    def latest_start_at(self) -> float:
        """The latest start that still meets the deadline or the time budget, as far as is known, but not before the job
        was queued, nor later than `PATIENCE_S` after that. Waiting jobs start in this order."""
        remaining_s = 0.0 if self.remaining is None else self.remaining.share_s
        must_start_at = min(self.deadline_at, self.budget_ends_at) - remaining_s
        return min(self.queued_at + PATIENCE_S, max(self.queued_at, must_start_at))

    @property
    def last_shape(self) -> Shape:
        """The shape of the job at its last scale."""
        return self.state.shapes[-1]

    @property
    def pause_ends_at(self) -> float:
        """When a paused job must continue: at the end of its pause or of its time budget, whichever is first."""
        return min(self.paused_until, self.budget_ends_at)


@dataclass(eq=False)
class PooledBatch:
    """A batch of the engine, and the tasks in it by slot. Belongs to the compute thread."""

    engine_batch: Batch
    idle_since: float  # the end of its last slice, or when it was opened
    tasks: dict[int, Task] = field(default_factory=dict)

    @property
    def shape(self) -> Shape:
        """The shape of all jobs in the batch."""
        return self.engine_batch.shape

    @property
    def slots(self) -> int:
        """The number of slots, used or empty: the width of the batch."""
        return self.engine_batch.slots

    @property
    def has_room(self) -> bool:
        """Whether a slot is free."""
        return len(self.tasks) < self.slots
