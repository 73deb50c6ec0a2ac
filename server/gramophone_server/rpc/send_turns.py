"""Messages of streams take turns, so that a burst of them does not keep the event loop from everything else."""

from __future__ import annotations

import asyncio
from collections import deque

__all__ = ["TURN_BYTES", "SendTurns"]

# What may be sent in one turn of the event loop: two frames of 64 KB, which take it 0.3 ms each, or ten small messages.
# A batch of jobs publishes its frames together, so 300 watchers of it want to send at the same moment, and a health
# check needs about five turns.
TURN_BYTES = 2**17
MESSAGE_BYTES = 2**13  # that a message counts beside its own: it takes 0.06 ms if it has none


class SendTurns:
    """Lets senders pass in the order of their arrival, until `TURN_BYTES` are used up in this turn of the event loop;
    the last one may use more."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._left = TURN_BYTES  # in this turn
        self._is_scheduled = False  # `_next_turn` is

    async def wait(self, size: int) -> None:
        """Returns in this turn, or in a later one if this one is used up. ``size``: of the message, in bytes."""
        if self._left > 0:
            self._left -= MESSAGE_BYTES + size
            if not self._is_scheduled:
                self._is_scheduled = True
                asyncio.get_running_loop().call_soon(self._next_turn)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        await turn

    def _next_turn(self) -> None:
        self._left = TURN_BYTES
        while self._waiting and self._left > 0:
            size, turn = self._waiting.popleft()
            if not turn.done():  # its sender was cancelled
                turn.set_result(None)
                self._left -= MESSAGE_BYTES + size
        self._is_scheduled = self._left < TURN_BYTES
        if self._is_scheduled:
            asyncio.get_running_loop().call_soon(self._next_turn)
