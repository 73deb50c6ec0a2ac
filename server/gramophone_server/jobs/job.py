"""One job: its phase, its events, its watchers."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Self

from torch import Tensor

from gramophone.recipe import Recipe
from gramophone_server.domain.events import (
    Accepted,
    Answer,
    Changed,
    Event,
    Finished,
    Frame,
    Paused,
    Picture,
    Progress,
    Resumed,
    Saved,
    SavedState,
    Waiting,
)
from gramophone_server.domain.job_state import JobState
from gramophone_server.errors import (
    Cancelled,
    Diverged,
    GramophoneError,
    JobControlled,
    TooManyWatchers,
)
from gramophone_server.images.codec import Encoding
from gramophone_server.jobs.event_log import EventLog
from gramophone_server.jobs.mailbox import CheckpointRule, FrameRule, Mailbox

if TYPE_CHECKING:
    from gramophone_server.jobs.registry import JobRegistry

__all__ = ["Job", "JobPhase", "JobSummary"]


class JobPhase(Enum):
    """Where a job is on its way; the names are the proto's."""

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
    resumed_at: int  # iterations that its checkpoint had behind it
    changed_at: int = 0  # the first iteration of the present recipe; 0: there was no other one

    @classmethod
    def of(cls, work: JobState) -> Self:
        """The plan of work that waits to begin, or to go on."""
        job = work.job
        return cls(work.recipe, job.style_weights, job.seed, *job.result_size, work.iterations, work.done)


class Job:
    """One job from its request to when it is forgotten. `JobRegistry.create` makes it; its maker must `watch` it at once.

    Other threads may read its attributes, whose changes are whole.
    """

    def __init__(self, jobs: JobRegistry, ordinal: int, request_id: str, grace_s: float, encoding: Encoding):
        self.id = str(uuid.uuid4())  # 122 bits from the system's source of randomness: nobody guesses it
        self.ordinal = ordinal  # of those that this process made
        self.request_id = request_id
        self.digest = b""  # of what was asked for; set before it is submitted
        self.grace_s = grace_s
        self.encoding = encoding  # of the result
        self.admitted: JobSummary | None = None
        self.plan: JobSummary | None = None  # as it is now
        self.state = JobPhase.QUEUED
        self.created_at = jobs.clock()
        self.started_at: float | None = None
        self.ended_at: float | None = None
        self.expires_at: float | None = None
        self.position = 0  # in the queue, while it is there; 0 is about to begin
        self.progress: Progress | None = None  # the newest
        self.result: Finished | None = None
        self.error: GramophoneError | None = None
        # Seconds from its request on. Its other times are counted from these, so that they stay in order, and true, when
        # somebody sets the machine's clock.
        self.waited_s: float | None = None  # until it began
        self.first_frame_s: float | None = None  # until somebody's first picture was taken
        self.lasted_s: float | None = None  # until it ended
        self._made_at = jobs.loop.time()
        self._jobs = jobs
        self._lock = threading.Lock()
        self._history = EventLog()
        self._watchers: tuple[Mailbox, ...] = ()  # replaced, never changed, so that the compute thread needs no lock
        self._controller: Mailbox | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def ended(self) -> bool:
        """Nothing more will happen to it."""
        return self.state in (JobPhase.SUCCEEDED, JobPhase.FAILED, JobPhase.CANCELLED)

    @property
    def bytes(self) -> int:
        """What its picture takes, at most: a PNG of noise is as large as its pixels."""
        return 3 * self.plan.width * self.plan.height if self.plan is not None and self._history.has_picture else 0

    # The event loop's side --------------------------------------------------------------------------------------------

    def admit(self, state: JobState) -> bool:
        """Records what the job will do, before it is submitted. Returns False if the job has ended already, because it was
        cancelled while its images were decoded: then it must not be submitted."""
        if self.ended:
            return False
        self.admitted = self.plan = JobSummary.of(state)
        return True

    def watch(
        self,
        frames: FrameRule | None = None,
        checkpoints: CheckpointRule | None = None,
        after: int = 0,
        *,
        controls: bool = False,
    ) -> Mailbox:
        """A watcher more, who has the events up to number `after` and gets what it missed, then what comes. One that
        `controls` the job keeps others from it until it leaves or gives control up.

        Raises `JobControlled` or `TooManyWatchers`, but neither once the job has ended.
        """
        with self._lock:
            # A frame that outlived the end is the last good picture, which everybody is told.
            missed = [
                (number, event)
                for number, event in self._history.after(after)
                if frames or self.ended or not isinstance(event, Frame)
            ]
            mailbox = Mailbox(self._jobs.loop, frames, checkpoints, missed)
            if self.ended:
                mailbox.end(self.error)
                return mailbox
            if controls and self._controller is not None:
                raise JobControlled(self.id)
            if len(self._watchers) >= self._jobs.limits.max_watchers:
                raise TooManyWatchers(self._jobs.limits.max_watchers)
            self._watchers += (mailbox,)
            if controls:
                self._controller = mailbox
        self.expire()
        return mailbox

    def give_up_control(self, mailbox: Mailbox) -> None:
        """The controller watches on as any other; from anybody else it is nothing."""
        if self._controller is mailbox:
            self._controller = None

    def leave(self, mailbox: Mailbox) -> None:
        """The watcher is gone. The last one to leave stops the job, now or after its grace; twice is once."""
        self.give_up_control(mailbox)
        with self._lock:
            if mailbox not in self._watchers:
                return
            self._watchers = tuple(other for other in self._watchers if other is not mailbox)
            if self._watchers:
                return
        if self.grace_s > 0:
            self.expire(self.grace_s, self.cancel)
        else:
            self.cancel()

    def answer(self, mailbox: Mailbox, answer: Answer) -> bool:
        """Tells one watcher what became of its command. False if the job has ended since something was taken for it:
        nothing comes behind the result."""
        with self._lock:
            if answer.taken is None:
                mailbox.put(0, answer)
            elif not self.ended:
                mailbox.put(self._history.next_number(), answer)
            else:
                return False
        return True

    def cancel(self) -> None:
        """Ends the job with `Cancelled`, at once for its watchers and within a slice (20 ms, or an iteration) for the engine. Does nothing
        to one that has ended."""
        self.fail(Cancelled())
        self._jobs.scheduler.withdraw(self)

    def expire(self, after_s: float = 0.0, then: Callable[[], None] | None = None) -> None:
        """Sets the job's timer in the place of the last one, or stops it."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.expires_at = None
        if then is not None:
            self._timer = self._jobs.loop.call_later(after_s, then)
            self.expires_at = self.created_at + self._age_s + after_s

    # The scheduler's side: see `scheduler.JobObserver` ---------------------------------------------------------------------

    @property
    def cancelled(self) -> bool:
        """Nobody wants it any more."""
        return self.state is JobPhase.CANCELLED

    def iterations_until_next_frame(self, iteration: int) -> int | None:
        """Iterations until somebody may want the picture."""
        steps = (mailbox.iterations_until_next_frame(iteration) for mailbox in self._watchers)
        return min((step for step in steps if step is not None), default=None)

    def started(self) -> None:
        """The engine begins, or goes on with a job that was paused."""
        with self._lock:
            if not self.ended:
                self.state, self.position = JobPhase.RUNNING, 0
                if self.started_at is None:
                    self.started_at, self.waited_s = self.created_at + self._age_s, self._age_s

    def publish(self, event: Event) -> None:
        """Tells all watchers, those to come included. What comes after the end is left out."""
        self._publish(event)

    def offer_frame(self, iteration: int, take: Callable[[], Callable[[], Tensor]]) -> None:
        """Takes the picture once for all watchers that are due one and have room for it; not at all if none is."""
        now = time.monotonic()
        wanting = [mailbox for mailbox in self._watchers if mailbox.wants_frame(iteration, now)]
        if wanting:
            self._publish(Frame(iteration, Picture(take())), wanting)  # takes milliseconds, so without the lock

    def offer_checkpoint(self, iteration: int, take: Callable[[bool], SavedState]) -> None:
        """Takes the state for all watchers that are due a checkpoint: once for those who want a light one, once for those
        who want a full one."""
        now = time.monotonic()
        wanting = [mailbox for mailbox in self._watchers if mailbox.wants_checkpoint(now)]
        for light in (True, False):
            if alike := [m for m in wanting if m.checkpoints is not None and m.checkpoints.light is light]:
                self._publish(Saved(iteration, take(light)), alike)

    def interrupted(self, iteration: int, picture: Picture, take: Callable[[bool], SavedState]) -> None:
        """Sends the picture and the state to every watcher, whatever it asked for: it has to go on without this server."""
        self._publish(Frame(iteration, picture))
        wanted = (mailbox.checkpoints for mailbox in self._watchers)
        light = all(checkpoints is None or checkpoints.light for checkpoints in wanted)
        self._publish(Saved(iteration, take(light)))

    def fail(self, error: GramophoneError) -> None:
        """Ends the job without a result."""
        with self._lock:
            if not self.ended:
                self.error = error
                self._end(JobPhase.CANCELLED if isinstance(error, Cancelled) else JobPhase.FAILED)

    def _publish(self, event: Event, watchers: Iterable[Mailbox] | None = None) -> None:
        """Tells the watchers, or all, and those to come."""
        with self._lock:
            if self.ended:
                return
            match event:
                case Waiting(position) if position == self.position:
                    return
                case Accepted(position) | Waiting(position):
                    self.position = position
                case Progress():
                    self.progress = event
                case Frame() if self.first_frame_s is None:
                    self.first_frame_s = self._age_s
                case Paused():
                    self.state = JobPhase.PAUSED
                case Resumed():
                    self.state = JobPhase.QUEUED  # others may have taken its place
                case Changed(iteration, recipe, iterations):
                    assert self.plan is not None, "a job has a plan before it has events"
                    self.plan = self.plan._replace(recipe=recipe, iterations=iterations, changed_at=iteration)
                case Finished():
                    self.result = event
            item = self._history.add(event)
            for mailbox in self._watchers if watchers is None else watchers:
                mailbox.put(*item)
            if isinstance(event, Finished):
                self._end(JobPhase.SUCCEEDED)

    @property
    def _age_s(self) -> float:
        return self._jobs.loop.time() - self._made_at

    def _end(self, state: JobPhase) -> None:
        self.state, self.ended_at, self.lasted_s = state, self.created_at + self._age_s, self._age_s
        if not isinstance(self.error, Diverged):
            self._history.forget_frame()
        for mailbox in self._watchers:
            mailbox.end(self.error)
        self._watchers, self._controller = (), None
        with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody looks for it
            self._jobs.loop.call_soon_threadsafe(self._jobs.keep, self)
