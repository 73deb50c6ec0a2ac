"""How long a client may take to read what it is sent."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from gramophone_server.rpc.event_loop import call_after_events

__all__ = ["LINK_BYTES_PER_S", "READING_S", "SendTimeout"]

# A message may take a second for so many bytes without counting as lag: a slow link is no slow reader.
LINK_BYTES_PER_S = 16 * 1024
# A client may take this long to read a message if others wait for its bytes, or for the place of a controller: 12 MB at
# 2.5 MB/s.
READING_S = 5.0


class SendTimeout:
    """Calls ``on_expired`` if a client does not read: if one message takes longer than ``max_s`` seconds, or if the
    client lags by as much.

    It checks ten times in that period: a timer for each message was 5 % of the cost of sending it.
    """

    def __init__(self, max_s: float, on_expired: Callable[[], None]) -> None:
        # For how long the client has kept an event waiting, on the clock `blocked_s`.
        self.lag_s: Callable[[], float] = lambda: 0.0
        self._max_s, self._on_expired = max_s, on_expired
        self._since = math.inf  # on the monotonic clock
        self._lags_from = math.inf  # `_since`, and the time for the bytes of the message
        self._blocked_s = 0.0  # by earlier messages
        self._closed = False
        self._next_check: asyncio.TimerHandle | None = None

    def begin(self, size: int) -> None:
        """A message of so many bytes is given to gRPC."""
        self._since = time.monotonic()
        self._lags_from = self._since + size / LINK_BYTES_PER_S
        if self._next_check is None:
            self._check()

    def end(self) -> None:
        """gRPC has taken the message."""
        self._blocked_s, self._since, self._lags_from = self.blocked_s(), math.inf, math.inf

    def blocked_s(self) -> float:
        """Seconds for which the server has waited for the client to read, beyond the time for the bytes."""
        return self._blocked_s + max(0.0, time.monotonic() - self._lags_from)

    def close(self) -> None:
        """Stops the checks."""
        self._closed = True
        if self._next_check is not None:
            self._next_check.cancel()

    def _check(self) -> None:
        if self._is_late():
            call_after_events(self._expire)
        elif not self._closed:
            self._next_check = asyncio.get_running_loop().call_later(self._max_s / 10, self._check)

    def _expire(self) -> None:
        """Checks again, because the client may have read long ago: if the server itself was late, it learns so only
        now."""
        if self._is_late():
            if not self._closed:
                self._on_expired()
        else:
            self._check()

    def _is_late(self) -> bool:
        is_sending = self._since < math.inf
        return is_sending and (time.monotonic() - self._since >= self._max_s or self.lag_s() >= self._max_s)
