"""What happens to a job, and how it crosses from the compute thread to one watcher on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Hashable, Iterable
from dataclasses import dataclass, replace

from gramophone_server.domain.events import (
    Answer,
    Event,
    Frame,
    Progress,
    Saved,
    Waiting,
)
from gramophone_server.errors import GramophoneError

__all__ = ["CheckpointRule", "FrameRule", "Mailbox"]

LEAST_FRAME_INTERVAL_S = 0.1  # ten frames a second: a finer rhythm is not seen, and each costs a copy and an encoding
LEAST_CHECKPOINT_INTERVAL_S = 1.0  # each costs a copy of the job's state, some MB


# Of these only the newest matters to a reader that has fallen behind.
COALESCED = (Waiting, Progress, Frame, Saved)


@dataclass(frozen=True)
class FrameRule:
    """When a watcher wants to see the picture."""

    every_iterations: int = 1
    min_interval_s: float = LEAST_FRAME_INTERVAL_S
    max_in_flight: int = 0  # frames that it may not have acknowledged yet; 0: it acknowledges none


@dataclass(frozen=True)
class CheckpointRule:
    """When a watcher wants the job's state."""

    min_interval_s: float = LEAST_CHECKPOINT_INTERVAL_S
    light: bool = False


class Mailbox:
    """Events on their way from the compute thread to one watcher on the event loop, read in the order of their numbers.

    A newer event of the kinds in `COALESCED` replaces one that is unread, and no other is ever lost; nor is any of those
    that the watcher has missed, but for its frames.
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
        self._frame_due_at = self._checkpoint_due_at = 0.0
        self._lock = threading.Lock()
        # By kind what can be replaced, and the rest by a key of its own.
        self._unread: dict[Hashable, tuple[int, Event | Answer]] = {
            Frame if isinstance(event, Frame) else object(): (number, event) for number, event in missed
        }
        self._over = False
        self._error: GramophoneError | None = None
        self._dropped = 0  # frames, since the last one read
        self._in_flight: deque[int] = deque()  # numbers of the frames that were read and not acknowledged
        self._news = asyncio.Event()
        self._wake_is_due = False

    # What the job calls, on any thread; it never waits for the reader ---------------------------------------------------

    def put(self, number: int, event: Event | Answer) -> None:
        """Numbers never decrease from call to call."""
        kind = type(event) if isinstance(event, COALESCED) else object()
        with self._lock:
            replaced = self._unread.pop(kind, None)
            self._unread[kind] = (number, event)
            if kind is Frame:
                self._dropped += replaced is not None
        self._wake()

    def end(self, error: GramophoneError | None = None) -> None:
        """Ends the events after those that wait, with an error if there is one."""
        with self._lock:
            self._over, self._error = True, error
        self._wake()

    def iterations_until_next_frame(self, iteration: int) -> int | None:
        """Iterations from this one to the next whose picture may be wanted; None: none is wanted, or any will do."""
        every = 1 if self._frames is None else self._frames.every_iterations
        return None if every == 1 else every - iteration % every

    def wants_frame(self, iteration: int, now: float) -> bool:
        """Whether a frame is due and has room. One that is due and has none, because too many are unacknowledged, is counted
        as dropped; one that is unread makes room, so that a reader that comes back sees what is new."""
        rule = self._frames
        if rule is None or iteration % rule.every_iterations or now < self._frame_due_at:
            return False
        self._frame_due_at = now + max(rule.min_interval_s, LEAST_FRAME_INTERVAL_S)
        with self._lock:
            room = not 0 < rule.max_in_flight <= len(self._in_flight)
            self._dropped += not room
        return room

    def wants_checkpoint(self, now: float) -> bool:
        """Whether a checkpoint is due."""
        rule = self.checkpoints
        if rule is None or now < self._checkpoint_due_at:
            return False
        self._checkpoint_due_at = now + max(rule.min_interval_s, LEAST_CHECKPOINT_INTERVAL_S)
        return True

    # The reader's side ------------------------------------------------------------------------------------------------

    async def events(self) -> AsyncIterator[tuple[int, Event | Answer]]:
        """(number, event) in increasing order, for one reader; an answer without `taken` has no number of its own. Raises
        what `end` was given."""
        while True:
            with self._lock:
                item = self._next()
                over, error = self._over, self._error
                if item is None:
                    self._news.clear()
            if item is not None:
                yield item
            elif error is not None:
                raise error
            elif over:
                return
            else:
                await self._news.wait()

    def acknowledge(self, number: int) -> None:
        """The frames up to this one have arrived."""
        with self._lock:
            while self._in_flight and self._in_flight[0] <= number:
                self._in_flight.popleft()

    def _next(self) -> tuple[int, Event | Answer] | None:
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
            if self._wake_is_due:
                return  # one wake-up on its way to the loop is enough for any number of events
            self._wake_is_due = True
        with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody reads
            self._loop.call_soon_threadsafe(self._woken)

    def _woken(self) -> None:
        with self._lock:
            self._wake_is_due = False
            self._news.set()
