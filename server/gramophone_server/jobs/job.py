"""One job: its phase, its events, its watchers."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import uuid
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple, Self

from gramophone.recipe import Recipe
from gramophone_server.config import UNREAD_CHECKPOINTS, UNREAD_FRAMES
from gramophone_server.domain.events import (
    Accepted,
    Answer,
    Changed,
    Event,
    Finished,
    Frame,
    Paused,
    Progress,
    Resumed,
    Saved,
    Waiting,
)
from gramophone_server.domain.job_state import JobState
from gramophone_server.domain.picture_size import most_encoded_bytes
from gramophone_server.errors import Cancelled, Diverged, GramophoneError, JobControlled, TooManyWatchers
from gramophone_server.images.codec import Encoding
from gramophone_server.jobs.event_log import EventLog
from gramophone_server.jobs.mailbox import CheckpointRule, FrameRule, Mailbox

__all__ = ["MAX_UNREAD", "Job", "JobPhase", "JobSummary"]


# Different frames, and different checkpoints of one kind, of one job that may wait for its watchers. More than one, so
# that a slow reader keeps its own although fast ones get newer ones.
MAX_UNREAD: dict[type[Event], int] = {Frame: UNREAD_FRAMES, Saved: UNREAD_CHECKPOINTS}


class JobPhase(Enum):
    """Where a job is in its life; the names are the proto's."""

    QUEUED = 1
    RUNNING = 2
    SUCCEEDED = 3
    FAILED = 4
    CANCELLED = 5
    PAUSED = 6


class JobSummary(NamedTuple):
    """What a job does, without its images."""

    recipe: Recipe
    style_weights: tuple[float, ...]
    seed: int
    width: int  # of the result, in pixels
    height: int
    iterations: int  # over all scales
    resumed_at: int  # iterations that its checkpoint had completed
    changed_at: int = 0  # the first iteration with the current recipe; 0: the recipe was never changed

    @classmethod
    def of(cls, state: JobState) -> Self:
        """The summary of a job that waits for its first iteration in this server."""
        job = state.job
        return cls(state.recipe, job.style_weights, job.seed, *job.result_size, state.iterations, state.done)


class Job:
    """One job, from its request until it is forgotten. `JobRegistry.create` makes it; the caller must `watch` it at
    once.

    Other threads may read its attributes: each changes in one assignment.

    ``max_watchers``: limit of watchers at the same time. ``withdraw`` takes the job out of the scheduler after
    `cancel`. ``on_end`` is called on ``loop`` after the end. ``clock`` returns seconds of the epoch; it is read once,
    so that all times of the job stay in order, and true, if the machine's clock is set later.
    """

    def __init__(
        self,
        ordinal: int,
        request_id: str,
        grace_s: float,
        encoding: Encoding,
        *,
        owner: str = "",
        max_watchers: int,
        withdraw: Callable[[Job], None],
        on_end: Callable[[Job], None],
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float],
    ) -> None:
        self.id = str(uuid.uuid4())  # 122 bits from the system's source of randomness, so it cannot be guessed
        self.ordinal = ordinal  # among the jobs of this process
        self.request_id = request_id
        self.digest = b""  # of the request; set before the job is submitted
        self.grace_s = grace_s  # for how long the job may have no watcher before it is cancelled
        self.encoding = encoding  # of the result
        self.owner = owner  # for whom it counts
        self.admitted_summary: JobSummary | None = None  # with the recipe of the request
        self.summary: JobSummary | None = None  # with the current recipe
        self.phase = JobPhase.QUEUED
        self.created_at = clock()
        self.started_at: float | None = None
        self.ended_at: float | None = None
        self.expires_at: float | None = None
        self.position = 0  # in the queue, while the job waits there; 0: it starts next
        self.progress: Progress | None = None  # the newest
        self.result: Finished | None = None
        self.error: GramophoneError | None = None
        # Seconds since the request.
        self.waited_s: float | None = None  # until the start
        self.first_frame_s: float | None = None  # until the first picture was taken, for any watcher
        self.duration_s: float | None = None  # until the end
        self._max_watchers = max_watchers
        self._withdraw = withdraw
        self._on_end = on_end
        self._loop = loop
        self._created_at_monotonic = loop.time()
        self._lock = threading.Lock()
        self._log = EventLog()
        # Replaced, never changed, so that the compute thread reads it without the lock.
        self._watchers: tuple[Mailbox, ...] = ()
        self._controller: Mailbox | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def ended(self) -> bool:
        """Whether the job has ended. No event follows."""
        return self.phase in (JobPhase.SUCCEEDED, JobPhase.FAILED, JobPhase.CANCELLED)

    @property
    def bytes(self) -> int:
        """Upper bound of the bytes that the job keeps: its log, and its picture, as pixels or encoded."""
        if self.summary is None or not self._log.has_picture:
            return self._log.recent_bytes
        return self._log.recent_bytes + most_encoded_bytes(self.summary.width, self.summary.height)

    @property
    def watchers(self) -> int:
        """The number of watchers now."""
        return len(self._watchers)

    @property
    def controlled(self) -> bool:
        """Whether one of the watchers controls the job."""
        return self._controller is not None

    @property
    def unread(self) -> int:
        """The number of events that their readers have not read yet, over all watchers."""
        return sum(mailbox.unread for mailbox in self._watchers)

    # The event loop's side --------------------------------------------------------------------------------------------

    def admit(self, state: JobState) -> bool:
        """Records what the job will do, before it is submitted. Returns False if the job has ended already, because it
        was cancelled while its images were decoded: then it must not be submitted."""
        if self.ended:
            return False
        self.admitted_summary = self.summary = JobSummary.of(state)
        return True

    def watch(
        self,
        frames: FrameRule | None = None,
        checkpoints: CheckpointRule | None = None,
        after: int = 0,
        *,
        controls: bool = False,
    ) -> Mailbox:
        """Adds a watcher, which receives the kept events after number ``after`` and then the new ones. A watcher that
        ``controls`` the job keeps other controllers out until it leaves or gives up control.

        Raises `JobControlled` or `TooManyWatchers`, but neither once the job has ended.
        """
        with self._lock:
            # A frame that is still in the log after the end is the last good picture, which every watcher receives.
            missed = [
                (number, event)
                for number, event in self._log.after(after)
                if frames or self.ended or not isinstance(event, Frame)
            ]
            mailbox = Mailbox(self._loop, frames, checkpoints, missed)
            if self.ended:
                mailbox.end(self.error)
                return mailbox
            if controls and self._controller is not None:
                raise JobControlled(self.id)
            if len(self._watchers) >= self._max_watchers:
                raise TooManyWatchers(self._max_watchers)
            self._watchers += (mailbox,)
            if controls:
                self._controller = mailbox
        self.clear_timer()
        return mailbox

    def give_up_control(self, mailbox: Mailbox) -> None:
        """Makes the controller an ordinary watcher. Does nothing for any other watcher."""
        if self._controller is mailbox:
            self._controller = None

    def leave(self, mailbox: Mailbox) -> None:
        """Removes a watcher, once. A job without watchers is cancelled, now or after its grace."""
        self.give_up_control(mailbox)
        with self._lock:
            if mailbox not in self._watchers:
                return
            self._watchers = tuple(other for other in self._watchers if other is not mailbox)
            if self._watchers:
                return
        if self.grace_s > 0:
            self.set_timer(self.grace_s, self.cancel)
        else:
            self.cancel()

    def answer(self, mailbox: Mailbox, answer: Answer) -> bool:
        """Sends the outcome of a command to the watcher that gave it. Returns False, and sends nothing, if the answer
        has a picture or a state and the job has ended meanwhile: nothing may follow the result."""
        with self._lock:
            if answer.output is None:
                mailbox.put(0, answer)
            elif not self.ended:
                mailbox.put(self._log.next_number(), answer)
            else:
                return False
        return True

    def cancel(self) -> None:
        """Ends the job with `Cancelled`: for its watchers at once, for the engine after its current slice (20 ms, or
        one iteration). Does nothing if the job has ended."""
        self.fail(Cancelled())
        self._withdraw(self)

    def set_timer(self, after_s: float, action: Callable[[], None]) -> None:
        """Calls ``action`` after ``after_s`` seconds. Replaces the timer that was set before."""
        self.clear_timer()
        self._timer = self._loop.call_later(after_s, action)
        self.expires_at = self.created_at + self._age_s + after_s

    def clear_timer(self) -> None:
        """Stops the job's timer."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.expires_at = None

    # The scheduler's side: see `task.JobObserver` ---------------------------------------------------------------------

    @property
    def cancelled(self) -> bool:
        """Whether the job has ended with `Cancelled`."""
        return self.phase is JobPhase.CANCELLED

    @property
    def accepts_light_checkpoint(self) -> bool:
        """Whether no watcher asks for full checkpoints."""
        rules = (mailbox.checkpoints for mailbox in self._watchers)
        return all(rule is None or rule.light for rule in rules)

    def iterations_until_next_frame(self, iteration: int) -> int | None:
        """Iterations until a frame can be due for any watcher; None: no watcher asks for certain iterations."""
        steps = (mailbox.iterations_until_next_frame(iteration) for mailbox in self._watchers)
        return min((step for step in steps if step is not None), default=None)

    def collect_frame_requests(self, iteration: int, now: float) -> set[object]:
        """The watchers for which a frame of this iteration is due, and that have room for it."""
        return {mailbox for mailbox in self._watchers if mailbox.wants_frame(iteration, now)}

    def collect_checkpoint_requests(self, now: float, *, light: bool) -> set[object]:
        """The watchers for which a checkpoint of this kind is due."""
        rules = ((mailbox, mailbox.checkpoints) for mailbox in self._watchers)
        of_kind = [mailbox for mailbox, rule in rules if rule is not None and rule.light is light]
        return {mailbox for mailbox in of_kind if mailbox.wants_checkpoint(now)}

    def started(self) -> None:
        """The job has left the queue, for the first time, after a pause, or with a new place."""
        with self._lock:
            if not self.ended:
                self.phase, self.position = JobPhase.RUNNING, 0
                if self.started_at is None:
                    self.started_at, self.waited_s = self.created_at + self._age_s, self._age_s

    def publish(self, event: Event, watchers: set[object] | None = None) -> None:
        """Logs an event and sends it to all watchers, or to ``watchers``. Does nothing if the job has ended."""
        with self._lock:
            if self.ended:
                return
            match event:
                case Waiting(position) if position == self.position and self.phase is not JobPhase.RUNNING:
                    return
                case Accepted(position) | Waiting(position):
                    self.phase, self.position = JobPhase.QUEUED, position
                case Progress():
                    self.progress = event
                case Frame() if self.first_frame_s is None:
                    self.first_frame_s = self._age_s
                case Paused():
                    self.phase = JobPhase.PAUSED
                case Resumed():
                    self.phase = JobPhase.QUEUED  # other jobs may run in its place
                case Changed(iteration, recipe, iterations):
                    assert self.summary is not None, "a job is admitted before it has events"
                    self.summary = self.summary._replace(recipe=recipe, iterations=iterations, changed_at=iteration)
                case Finished():
                    self.result = event
            item = self._log.add(event)
            for mailbox in self._watchers:
                if watchers is None or mailbox in watchers:
                    mailbox.put(*item)
            if isinstance(event, Frame | Saved):
                self._bound_unread(item[0], event)
            if isinstance(event, Finished):
                self._end(JobPhase.SUCCEEDED)

    def fail(self, error: GramophoneError) -> None:
        """Ends the job without a result. Does nothing if it has ended."""
        with self._lock:
            if not self.ended:
                self.error = error
                self._end(JobPhase.CANCELLED if isinstance(error, Cancelled) else JobPhase.FAILED)

    @property
    def _age_s(self) -> float:
        return self._loop.time() - self._created_at_monotonic

    def _bound_unread(self, newest: int, event: Frame | Saved) -> None:
        """Takes the oldest unread frames or checkpoints from slow readers, which would otherwise keep a different one
        each; they get the newest instead. Readers that keep the same one cost no more than one reader."""
        if len(self._watchers) == 1:
            return  # it has at most two
        light = event.state.light if isinstance(event, Saved) else None
        unread = set[int]().union(*(mailbox.unread_numbers(type(event), light) for mailbox in self._watchers))
        for number in sorted(unread)[: -MAX_UNREAD[type(event)]]:
            for mailbox in self._watchers:
                mailbox.renew(number, newest, event)

    def _end(self, phase: JobPhase) -> None:
        self.phase, self.ended_at, self.duration_s = phase, self.created_at + self._age_s, self._age_s
        if not isinstance(self.error, Diverged):
            self._log.forget_frame()
        for mailbox in self._watchers:
            mailbox.end(self.error)
        self._watchers, self._controller = (), None
        with contextlib.suppress(RuntimeError):  # the loop is closed, so no client can look for the job
            self._loop.call_soon_threadsafe(self._on_end, self)
