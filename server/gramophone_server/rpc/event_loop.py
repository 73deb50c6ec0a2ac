"""The event loop of the server: asyncio's, with another way to handle the events of gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import time
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import Any

__all__ = ["ServerEventLoop", "call_after_events", "events_handled"]

TURN_S = 0.005  # that the events of one turn should take; everything else waits for them
MIN_EVENTS, FIRST_EVENTS, MAX_EVENTS = 4, 16, 32  # of one turn; the end of a call takes 0.2 to 0.9 ms


class ServerEventLoop(asyncio.SelectorEventLoop):
    """Takes all events of gRPC at once, and handles as many of them in each turn as take about `TURN_S`.

    gRPC's poller thread wakes the loop by one byte for each event, and gRPC 1.85 reads one byte in each turn of the
    loop, though it handles all events of that turn. So unread bytes pile up while messages are sent in bursts. At about
    280 bytes the socket is full, the poller blocks in its write, and each turn of the loop handles one event, in the
    order of all events: a health check beside 300 watchers then waited for 210 turns at each of its three steps. So
    the socket is emptied each time it is readable.

    An event completes a future, and so continues a task. 500 clients that leave together complete 2000 of them, and
    what the tasks then do in the same turn took 540 ms. So the callbacks of the futures wait for later turns if there
    are too many for one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._arrived: deque[tuple[Callable[..., object], tuple[Any, ...], Context | None]] = deque()
        self._events_per_turn = FIRST_EVENTS
        self._left = 0  # events that this turn may handle
        self._turn_began_at = 0.0

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:  # type: ignore[override]
        """Watches `fd` as asyncio does."""
        if isinstance(fd, socket.socket) and _is_of_grpc(callback):
            callback = functools.partial(self._take_events, fd, callback)
        super().add_reader(fd, callback, *args)

    def call_after_events(self, callback: Callable[[], object]) -> None:
        """Calls back when all events that have arrived by now are handled."""
        # In the next turn those are taken that the poller has already.
        self.call_soon(self.call_soon, self._call_in_order, callback)

    def _call_in_order(self, callback: Callable[[], object]) -> None:
        if self._arrived:
            self._arrived.append((callback, (), None))
        else:
            self.call_soon(callback)

    def _take_events(self, wakeups: socket.socket, complete_futures: Callable[..., Any]) -> None:
        """Reads all bytes before the events are taken. The poller writes a byte after it has queued the event, so no
        event is missed, and gRPC allows for an empty socket, because several loops may share it."""
        with contextlib.suppress(BlockingIOError):
            wakeups.recv(65536)
        is_first = not self._arrived  # otherwise `_handle_events` is scheduled
        self._left = FIRST_EVENTS if is_first else 0
        self.call_soon = self._take_event  # type: ignore[assignment,method-assign]  # futures call it
        try:
            complete_futures()
        finally:
            del self.call_soon
        if is_first and self._arrived:
            self._events_per_turn = FIRST_EVENTS
            self._schedule()

    def _take_event(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> None:
        if self._left > 0:
            self._left -= 1
            super().call_soon(callback, *args, context=context)
        else:
            self._arrived.append((callback, args, context))

    def _schedule(self) -> None:
        self._turn_began_at = time.monotonic()
        self.call_soon(self._handle_events)

    def _handle_events(self) -> None:
        """Adapts the number of events to the time of the last turn."""
        if time.monotonic() - self._turn_began_at > TURN_S:
            self._events_per_turn = max(MIN_EVENTS, self._events_per_turn // 2)
        else:
            self._events_per_turn = min(MAX_EVENTS, self._events_per_turn * 2)
        for _ in range(min(self._events_per_turn, len(self._arrived))):
            callback, args, context = self._arrived.popleft()
            self.call_soon(callback, *args, context=context)
        if self._arrived:
            self._schedule()


def call_after_events(callback: Callable[[], object]) -> None:
    """Calls back when all events of gRPC that have arrived by now are handled."""
    loop = asyncio.get_running_loop()
    if isinstance(loop, ServerEventLoop):
        loop.call_after_events(callback)
    else:  # asyncio's own, in tests: it handles in the next turn what has arrived
        loop.call_soon(loop.call_soon, loop.call_soon, callback)


async def events_handled() -> None:
    """Returns when all events of gRPC that have arrived by now are handled."""
    handled: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def report() -> None:
        if not handled.done():  # its caller was cancelled
            handled.set_result(None)

    call_after_events(report)
    await handled


def _is_of_grpc(callback: Callable[..., Any]) -> bool:
    """Whether this is gRPC's handler of its poller's events, which is bound to its event loop."""
    handler = callback.func if isinstance(callback, functools.partial) else callback
    return type(getattr(handler, "__self__", None)).__name__ == "PollerCompletionQueue"
