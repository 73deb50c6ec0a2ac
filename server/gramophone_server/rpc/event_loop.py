"""The event loop of the server: asyncio's, with a faster path for the events of gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import Callable
from typing import Any

__all__ = ["ServerEventLoop"]


class ServerEventLoop(asyncio.SelectorEventLoop):
    """Empties the socket through which gRPC's poller thread wakes the loop, each time it is readable.

    The poller writes one byte for each event, and gRPC 1.85 reads one byte in each turn of the loop, though it handles
    all events of that turn. So unread bytes pile up while messages are sent in bursts. At about 280 bytes the socket is
    full, the poller blocks in its write, and each turn of the loop handles one event, in the order of all events: a
    health check beside 300 watchers then waited for 210 turns at each of its three steps.
    """

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:  # type: ignore[override]
        """Watches `fd` as asyncio does."""
        if isinstance(fd, socket.socket) and _is_of_grpc(callback):
            callback = functools.partial(_emptied, fd, callback)
        super().add_reader(fd, callback, *args)


def _is_of_grpc(callback: Callable[..., Any]) -> bool:
    """Whether this is gRPC's handler of its poller's events, which is bound to its event loop."""
    handler = callback.func if isinstance(callback, functools.partial) else callback
    return type(getattr(handler, "__self__", None)).__name__ == "PollerCompletionQueue"


def _emptied(wakeups: socket.socket, handle_events: Callable[..., Any]) -> None:
    """Reads all bytes before the events are handled. The poller writes a byte after it has queued the event, so no
    event is missed, and gRPC allows for an empty socket, because several loops may share it."""
    with contextlib.suppress(BlockingIOError):
        wakeups.recv(65536)
    handle_events()
