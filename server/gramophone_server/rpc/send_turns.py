"""Messages of streams take turns, so that a burst of them does not keep the event loop from everything else."""

from __future__ import annotations

import asyncio
from collections import deque

__all__ = ["SENDS_PER_TURN", "SendTurns"]

# Sending a frame of 64 KB takes the loop 0.3 ms or more. A batch of jobs publishes its frames together, so 300 watchers
# of it want to send at the same moment, and a health check needs about five turns of the loop.
SENDS_PER_TURN = 2


class SendTurns:
    """Lets `SENDS_PER_TURN` senders pass in each turn of the event loop, in the order of their arrival."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._left = SENDS_PER_TURN  # in this turn
        self._is_scheduled = False  # `_next_turn` is

    async def wait(self) -> None:
        """Returns in this turn, or in a later one if this one is used up."""
        if self._left > 0:
            self._left -= 1
            if not self._is_scheduled:
                self._is_scheduled = True
                asyncio.get_running_loop().call_soon(self._next_turn)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        await turn

    def _next_turn(self) -> None:
        self._left = SENDS_PER_TURN
        while self._waiting and self._left:
            turn = self._waiting.popleft()
            if not turn.done():  # its sender was cancelled
                turn.set_result(None)
                self._left -= 1
        self._is_scheduled = self._left < SENDS_PER_TURN
        if self._is_scheduled:
            asyncio.get_running_loop().call_soon(self._next_turn)
