"""What happens to a job, and how it crosses from the compute thread to a reader on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

from torch import Tensor

from gramophone_server.errors import GramophoneError
from gramophone_server.job import Losses, Report

__all__ = ["Accepted", "Event", "Finished", "Frame", "Mailbox", "Progress"]

STALE_S = 1.0  # an unread frame older than this is replaced, so that a reader that comes back sees a recent picture


@dataclass(frozen=True)
class Accepted:
    """The job waits for `position` others."""

    position: int


@dataclass(frozen=True)
class Progress:
    """An iteration was done."""

    report: Report
    iterations_per_second: float  # over the present scale
    time_left_s: float


@dataclass(frozen=True, eq=False)
class Frame:
    """The picture after `iteration`, as a call that waits for it: uint8 [height, width, 3]. `dropped` frames were due
    since the last one."""

    iteration: int
    picture: Callable[[], Tensor]
    dropped: int = 0


@dataclass(frozen=True, eq=False)
class Finished:
    """The last picture, as in `Frame`, and the losses of the last iteration."""

    picture: Callable[[], Tensor]
    losses: Losses
    iterations: int
    elapsed_s: float  # from the first iteration to the last


Event = Accepted | Progress | Frame | Finished


class Mailbox:
    """Events on their way from the compute thread to one reader on the event loop.

    It has one slot per kind of event: a newer progress or frame replaces an unread one, while accepted and finished
    come once, so that they are never lost. Slots are read in the order of their numbers.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._slots: dict[type[Event], tuple[int, Event]] = {}
        self._error: GramophoneError | None = None
        self._numbers = itertools.count(1)
        self._dropped = 0  # frames, since the last one read
        self._frame_at = 0.0  # when the frame in its slot was put there
        self._news = asyncio.Event()
        self._wake_is_due = False

    def put(self, event: Event) -> None:
        """Called on any thread; never waits for the reader."""
        with self._lock:
            if isinstance(event, Frame):
                self._dropped += Frame in self._slots
                self._frame_at = time.monotonic()
            self._slots[type(event)] = (next(self._numbers), event)
        self._wake()

    def fail(self, error: GramophoneError) -> None:
        """Ends the events with an error, after those that wait."""
        with self._lock:
            self._error = error
        self._wake()

    def offer_frame(self, iteration: int, take: Callable[[], Callable[[], Tensor]]) -> None:
        """Puts a frame that is due, or only counts it, without taking the picture, while the last one is unread."""
        with self._lock:
            room = Frame not in self._slots or time.monotonic() - self._frame_at >= STALE_S
            self._dropped += not room
        if room:
            self.put(Frame(iteration, take()))

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(number, event) in increasing order, until `Finished`. Raises what `fail` was given."""
        while True:
            with self._lock:
                kind = min(self._slots, key=lambda kind: self._slots[kind][0], default=None)
                number, event = self._slots.pop(kind) if kind is not None else (0, None)
                error = self._error
                if isinstance(event, Frame):
                    event = replace(event, dropped=self._dropped)
                    self._dropped = 0
                if event is None:
                    self._news.clear()
            if event is not None:
                yield number, event
                if isinstance(event, Finished):
                    return
            elif error is not None:
                raise error
            else:
                await self._news.wait()

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
