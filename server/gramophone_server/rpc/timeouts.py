"""Many waits that end after the same time. Used only on the event loop."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

__all__ = ["PER_TURN", "Timeouts", "Timers"]

W = TypeVar("W", bound=Hashable)

# Waits that end in one turn of the event loop, with the call whose wait it was: 1 ms each. 600 that ended together
# stopped the loop for 540 ms.
PER_TURN = 8


class Timers(Protocol):
    """What is needed of an event loop."""

    def time(self) -> float: ...
    def call_later(self, after_s: float, callback: Callable[[], None], /) -> asyncio.TimerHandle: ...


class Timeouts(Generic[W]):
    """Waits that end `after_s` seconds after their start, unless they are stopped before. When they end, ``on_expired``
    is called, at most `PER_TURN` times in one turn of the event loop.

    There is one timer for all of them, because they end in the order of their starts.
    """

    def __init__(self, after_s: float, on_expired: Callable[[W], object], timers: Timers | None = None) -> None:
        """``timers``: for tests to replace; None: the running event loop."""
        self.after_s = after_s
        self._on_expired, self._timers = on_expired, timers
        self._waits: dict[W, float] = {}  # and when each ends, on the clock of the event loop
        self._timer: asyncio.TimerHandle | None = None

    def start(self, wait: W) -> None:
        """Adds a wait that begins now."""
        timers = self._timers or asyncio.get_running_loop()
        self._waits[wait] = timers.time() + self.after_s
        if self._timer is None:
            self._timer = timers.call_later(self.after_s, self._expire)

    def stop(self, wait: W) -> None:
        """Removes a wait. Nothing happens if it has ended or was never started."""
        self._waits.pop(wait, None)

    def close(self) -> None:
        """Forgets all waits."""
        self._waits.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _expire(self) -> None:
        timers = self._timers or asyncio.get_running_loop()
        now = timers.time()
        for wait, ends_at in list(itertools.islice(self._waits.items(), PER_TURN)):
            if ends_at > now:
                break
            del self._waits[wait]
            self._on_expired(wait)
        self._timer = None
        if self._waits:
            next_at = next(iter(self._waits.values()))
            self._timer = timers.call_later(max(0.0, next_at - now), self._expire)
