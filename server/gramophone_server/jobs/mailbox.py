"""A watcher's mailbox: events cross in it from the compute thread to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from gramophone_server.domain.events import (
    Answer,
    Changed,
    Event,
    Frame,
    Paused,
    Progress,
    Resumed,
    Saved,
    Waiting,
)
from gramophone_server.errors import GramophoneError

__all__ = ["CheckpointRule", "FrameRule", "Mailbox"]

MIN_FRAME_INTERVAL_S = 0.1  # ten frames a second: more are not visible, and each costs a copy and an encoding
MIN_CHECKPOINT_INTERVAL_S = 1.0  # each costs a copy of the job's state, some MB

# What an event tells of. Of each, the newest unread event is enough: a `Changed` has the whole recipe.
SUBJECTS: dict[type[Event], type[Event]] = {
    Waiting: Waiting,
    Progress: Progress,
    Frame: Frame,
    Saved: Saved,
    Paused: Paused,
    Resumed: Paused,
    Changed: Changed,
}


@dataclass(frozen=True)
class FrameRule:
    """When a watcher receives frames."""

    every_iterations: int = 1
    min_interval_s: float = MIN_FRAME_INTERVAL_S
    max_in_flight: int = 0  # frames that were read but not acknowledged; 0: the watcher acknowledges none


@dataclass(frozen=True)
class CheckpointRule:
    """When a watcher receives checkpoints."""

    min_interval_s: float = MIN_CHECKPOINT_INTERVAL_S
    light: bool = False


class _Unread(NamedTuple):
    number: int
    event: Event | Answer
    since: float  # on the reader's clock: since when an event of this subject has been unread


class Mailbox:
    """Events for one watcher, in the order of their numbers. Any thread puts them in, one reader on the event loop
    takes them.

    A newer event replaces an unread one of the same subject, so that the mailbox is bounded however slow the reader is:
    two events of each subject, the acceptance, the result, an answer, and the events that the watcher has missed.

    The reader takes the events in rounds, one of each subject. What arrives of a subject that this round had already
    belongs to the next round. Without rounds, subjects with many events would keep others out: of progress and frames
    at ten a second, a reader of two events a second would get only progress, because that is always published first.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        frames: FrameRule | None = None,
        checkpoints: CheckpointRule | None = None,
        missed: Iterable[tuple[int, Event]] = (),
    ) -> None:
        self.checkpoints = checkpoints
        # Seconds for which the server has waited for this reader, so far; see `lag_s`.
        self.reader_clock: Callable[[], float] = lambda: 0.0
        self._loop = loop
        self._frames = frames
        self._frame_due_at = self._checkpoint_due_at = 0.0  # on the compute thread's clock
        self._lock = threading.Lock()
        # By subject, or by a key of its own, in the order of the numbers. Missed frames count as unread ones.
        self._round: dict[object, _Unread] = {
            Frame if isinstance(event, Frame) else object(): _Unread(number, event, 0.0) for number, event in missed
        }
        self._had: set[object] = set()  # subjects that the reader has taken in this round
        self._next_round: dict[object, _Unread] = {}
        self._taken_since = 0.0  # `since` of the event that was taken last
        self._ended = False
        self._error: GramophoneError | None = None
        self._dropped = 0  # frames, since the last one that was read
        self._in_flight: deque[int] = deque()  # numbers of the frames that were read but not acknowledged
        self._has_news = asyncio.Event()
        self._wake_scheduled = False

    @property
    def unread(self) -> int:
        """The number of events that the reader has not read yet."""
        return len(self._round) + len(self._next_round)

    # The job's side, on any thread; it never waits for the reader -----------------------------------------------------

    def put(self, number: int, event: Event | Answer) -> None:
        """Adds an event. Numbers never decrease from call to call."""
        subject = None if isinstance(event, Answer) else SUBJECTS.get(type(event))
        with self._lock:
            self._put(subject or object(), _Unread(number, event, self.reader_clock()))
        self._wake()

    def end(self, error: GramophoneError | None = None) -> None:
        """Ends the events after the unread ones, with an error if there is one."""
        with self._lock:
            self._ended, self._error = True, error
        self._wake()

    def iterations_until_next_frame(self, iteration: int) -> int | None:
        """Iterations until the next frame can be due. None if no frame is wanted, or the frame of any iteration."""
        every = 1 if self._frames is None else self._frames.every_iterations
        return None if every == 1 else every - iteration % every

    def wants_frame(self, iteration: int, now: float) -> bool:
        """Whether a frame of this iteration is due and has room; if it is due, the next one is due an interval later. A
        frame that is due but has no room, because too many are unacknowledged, counts as dropped. An unread frame takes
        no room, so that a reader that was slow continues with the newest."""
        rule = self._frames
        if rule is None or iteration % rule.every_iterations or now < self._frame_due_at:
            return False
        self._frame_due_at = now + max(rule.min_interval_s, MIN_FRAME_INTERVAL_S)
        with self._lock:
            has_room = not 0 < rule.max_in_flight <= len(self._in_flight)
            self._dropped += not has_room
        return has_room

    def wants_checkpoint(self, now: float) -> bool:
        """Whether a checkpoint is due; if it is, the next one is due an interval later."""
        rule = self.checkpoints
        if rule is None or now < self._checkpoint_due_at:
            return False
        self._checkpoint_due_at = now + max(rule.min_interval_s, MIN_CHECKPOINT_INTERVAL_S)
        return True

    def unread_numbers(self, kind: type[Frame | Saved], light: bool | None) -> set[int]:
        """The numbers of its unread frames, or of its unread checkpoints that are ``light`` or not."""
        with self._lock:
            unread = (events[kind] for events in (self._round, self._next_round) if kind in events)
            return {
                item.number for item in unread if not isinstance(item.event, Saved) or item.event.state.light is light
            }

    def renew(self, number: int, newest: int, event: Frame | Saved) -> None:
        """Replaces its unread frame or checkpoint ``number`` by a newer one, which has the number ``newest``. It only
        drops a frame if its watcher does not ask for the iteration of the newer one."""
        kind, rule = type(event), self._frames
        with self._lock:
            for events in (self._round, self._next_round):
                if kind not in events or events[kind].number != number:
                    continue
                old = events.pop(kind)
                self._dropped += kind is Frame
                fits = isinstance(event, Saved) or (rule is not None and event.iteration % rule.every_iterations == 0)
                if fits and kind not in self._next_round:
                    self._put(kind, _Unread(newest, event, old.since))

    # The reader's side, on the event loop -----------------------------------------------------------------------------

    async def read(self) -> tuple[int, Event | Answer] | None:
        """Waits for the next event and takes it: (number, event), in increasing order; an answer without ``output`` has
        no number of its own. None after the last one. Raises the error that `end` was given. For one reader."""
        while True:
            with self._lock:
                item = self._take_next()
                ended, error = self._ended, self._error
                if item is None:
                    self._has_news.clear()
            if item is not None:
                return item
            if error is not None:
                raise error
            if ended:
                return None
            await self._has_news.wait()

    def read_nowait(self) -> tuple[int, Event | Answer] | None:
        """The next unread (number, event), as `read` would return it; None if there is none now."""
        with self._lock:
            return self._take_next()

    def put_back(self, number: int, event: Event | Answer) -> None:
        """Puts the event back that was taken last, for a reader that cannot send it yet. If there is a newer one of its
        subject by now, that one takes its place."""
        subject: object = None if isinstance(event, Answer) else SUBJECTS.get(type(event))
        with self._lock:
            if isinstance(event, Frame):
                self._dropped += event.dropped
                if self._in_flight and self._in_flight[-1] == number:
                    self._in_flight.pop()
            self._had.discard(subject)
            if subject is not None and (subject in self._round or subject in self._next_round):
                self._dropped += subject is Frame
            else:
                back = {subject or object(): _Unread(number, event, self._taken_since)}
                self._round = back | self._round
        self._has_news.set()

    def acknowledge(self, number: int) -> None:
        """The frames up to this number have arrived."""
        with self._lock:
            while self._in_flight and self._in_flight[0] <= number:
                self._in_flight.popleft()

    def lag_s(self) -> float:
        """For how long the reader has kept an event waiting, the one that was taken last included: seconds on its own
        clock, `reader_clock`, which stands still while the server does not wait for it. An event that replaces an
        unread one has waited since that one came."""
        with self._lock:
            since = min(
                (unread.since for unread in (*self._round.values(), *self._next_round.values())), default=math.inf
            )
            return self.reader_clock() - min(since, self._taken_since)

    # With the lock ----------------------------------------------------------------------------------------------------

    def _put(self, subject: object, unread: _Unread) -> None:
        events = self._round
        if subject is Frame and subject in self._round and self._next_round.keys() <= {Progress}:
            # The newest picture is worth more than a report that came between two: a newer report follows it.
            self._next_round.clear()
        elif self._next_round or subject in self._had:
            events = self._next_round
        replaced = events.pop(subject, None)
        events[subject] = unread if replaced is None else unread._replace(since=replaced.since)
        if subject is Frame:
            self._dropped += replaced is not None

    def _take_next(self) -> tuple[int, Event | Answer] | None:
        if not self._round:
            self._round, self._next_round = self._next_round, {}
            self._had.clear()
            if not self._round:
                return None
        subject = next(iter(self._round))
        number, event, self._taken_since = self._round.pop(subject)
        if isinstance(subject, type):
            self._had.add(subject)
        if isinstance(event, Frame):
            event = replace(event, dropped=self._dropped)
            self._dropped = 0
            if self._frames is not None and self._frames.max_in_flight:
                self._in_flight.append(number)
        return number, event

    def _wake(self) -> None:
        with self._lock:
            if self._wake_scheduled:
                return  # one scheduled wake-up is enough for any number of events
            self._wake_scheduled = True
        with contextlib.suppress(RuntimeError):  # the loop is closed, so there is no reader
            self._loop.call_soon_threadsafe(self._on_wake)

    def _on_wake(self) -> None:
        with self._lock:
            self._wake_scheduled = False
            self._has_news.set()
