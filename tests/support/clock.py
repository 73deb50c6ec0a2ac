"""Time in tests: a clock and an event loop whose time a test moves by hand, and a wait for a condition.

No test sleeps for a guessed duration. Code that reads a clock gets a ManualClock, code that sets timers a ManualLoop.
For what happens on a real thread or event loop, tests wait with `until`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

WITHIN_S = 30.0  # the longest wait; only a broken program or a very busy machine reaches it


async def until(condition: Callable[[], object]) -> None:
    """Waits until the condition holds. Raises TimeoutError after `WITHIN_S`."""
    async with asyncio.timeout(WITHIN_S):
        while not condition():
            await asyncio.sleep(0.001)


class ManualClock:
    """A clock that moves only when the test calls `advance`, or the code under test calls `sleep`.

    Calling it returns the monotonic time; `monotonic`, `time` and `sleep` are those of the module `time`. Each reading
    of the monotonic time takes `reading_s`, so that loops with a deadline end.
    """

    def __init__(self, now: float = 0.0, *, epoch_s: float = 0.0, reading_s: float = 0.0) -> None:
        self.now = now  # the monotonic clock, s
        self.epoch_s = epoch_s  # the wall clock is ahead of it by this
        self.reading_s = reading_s

    def __call__(self) -> float:
        return self.monotonic()

    def monotonic(self) -> float:
        self.now += self.reading_s
        return self.now

    def time(self) -> float:
        """The wall clock, in seconds since the epoch."""
        return self.epoch_s + self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def sleep(self, seconds: float) -> None:
        self.advance(seconds)


class ManualTimer:
    """What `call_later` returns."""

    def __init__(self, at: float, callback: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.at, self.callback, self.arguments = at, callback, arguments
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class ManualLoop:
    """The timers and callbacks of an event loop, which run when the test calls `advance`."""

    def __init__(self, clock: ManualClock | None = None) -> None:
        self.clock = clock or ManualClock()
        self._timers: list[ManualTimer] = []
        self._soon: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def time(self) -> float:
        return self.clock.now

    def call_later(self, after_s: float, callback: Callable[..., Any], *arguments: Any) -> ManualTimer:
        self._timers.append(ManualTimer(self.clock.now + after_s, callback, arguments))
        return self._timers[-1]

    def call_soon_threadsafe(self, callback: Callable[..., Any], *arguments: Any) -> None:
        self._soon.append((callback, arguments))

    @property
    def timers(self) -> list[ManualTimer]:
        """The timers that are set and not cancelled."""
        return [timer for timer in self._timers if not timer.cancelled]

    def advance(self, seconds: float = 0.0) -> None:
        """Runs callbacks and the timers of the next `seconds`, in order, each at its own time."""
        end = self.clock.now + seconds
        while True:
            while self._soon:
                callback, arguments = self._soon.pop(0)
                callback(*arguments)
            due = min((timer for timer in self.timers if timer.at <= end), key=lambda timer: timer.at, default=None)
            if due is None:
                break
            self._timers.remove(due)
            self.clock.now = due.at
            due.callback(*due.arguments)
        self.clock.now = end
