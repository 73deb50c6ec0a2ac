"""A watcher's mailbox: events cross in it from the compute thread to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Hashable, Iterable
from dataclasses import dataclass, replace

from gramophone_server.domain.events import Answer, Event, Frame, Progress, Saved, Waiting
from gramophone_server.errors import GramophoneError

__all__ = ["CheckpointRule", "FrameRule", "Mailbox"]

MIN_FRAME_INTERVAL_S = 0.1  # ten frames a second: more are not visible, and each costs a copy and an encoding
MIN_CHECKPOINT_INTERVAL_S = 1.0  # each costs a copy of the job's state, some MB

# Kinds of which an unread event is replaced by a newer one: a slow reader needs only the newest.
COALESCED = (Waiting, Progress, Frame, Saved)


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


class Mailbox:
    """Events for one watcher, in the order of their numbers. Any thread puts them in, one reader on the event loop
    takes them.

    A newer event of the kinds in `COALESCED` replaces an unread one. No other event is lost, and none of those that the
    watcher has missed, except frames.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        frames: FrameRule | None = None,
        checkpoints: CheckpointRule | None = None,
        missed: Iterable[tuple[int, Event]] = (),
    ) -> None:
        self.checkpoints = checkpoints
        self._loop = loop
        self._frames = frames
        self._frame_due_at = self._checkpoint_due_at = 0.0  # on the compute thread's clock
        self._lock = threading.Lock()
        # Replaceable events by their kind, all others by a key of their own.
        self._unread: dict[Hashable, tuple[int, Event | Answer]] = {
            Frame if isinstance(event, Frame) else object(): (number, event) for number, event in missed
        }
        self._ended = False
        self._error: GramophoneError | None = None
        self._dropped = 0  # frames, since the last one that was read
        self._in_flight: deque[int] = deque()  # numbers of the frames that were read but not acknowledged
        self._has_news = asyncio.Event()
        self._wake_scheduled = False

    @property
    def unread(self) -> int:
        """The number of events that the reader has not read yet."""
        return len(self._unread)

    # The job's side, on any thread; it never waits for the reader -----------------------------------------------------

    def put(self, number: int, event: Event | Answer) -> None:
        """Adds an event. Numbers never decrease from call to call."""
        kind = type(event) if isinstance(event, COALESCED) else object()
        with self._lock:
            replaced = self._unread.pop(kind, None)
            self._unread[kind] = (number, event)
            if kind is Frame:
                self._dropped += replaced is not None
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

    # The reader's side, on the event loop -----------------------------------------------------------------------------

    async def events(self) -> AsyncIterator[tuple[int, Event | Answer]]:
        """Yields (number, event) in increasing order, for one reader; an answer without ``output`` has no number of its
        own. Raises the error that `end` was given."""
        while True:
            with self._lock:
                item = self._take_next()
                ended, error = self._ended, self._error
                if item is None:
                    self._has_news.clear()
            if item is not None:
                yield item
            elif error is not None:
                raise error
            elif ended:
                return
            else:
                await self._has_news.wait()

    def read_nowait(self) -> tuple[int, Event | Answer] | None:
        """The next unread (number, event), as `events` would yield it; None if there is none now."""
        with self._lock:
            return self._take_next()

    def acknowledge(self, number: int) -> None:
        """The frames up to this number have arrived."""
        with self._lock:
            while self._in_flight and self._in_flight[0] <= number:
                self._in_flight.popleft()

    def _take_next(self) -> tuple[int, Event | Answer] | None:
        if not self._unread:
            return None
        number, event = self._unread.pop(next(iter(self._unread)))
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
