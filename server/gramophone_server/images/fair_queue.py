"""Places that owners take in turns: one with much work does not delay one with little."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from collections import Counter
from collections.abc import AsyncIterator

__all__ = ["FairQueue"]


class FairQueue:
    """A number of places for work, which its owners share in proportion. Belongs to the event loop.

    This is fair queueing (Demers, Keshav, Shenker: Analysis and Simulation of a Fair Queueing Algorithm, 1989). Work is
    served in the order in which it would end if all owners were served at the same time at equal speeds. So a small
    piece of one owner does not wait for the many large ones of others, and yet every piece has its turn: each that is
    served moves the virtual time on, which is when later arrivals begin.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._time = 0.0  # virtual: the work that each of the waiting owners would have received so far
        self._ends: dict[str, float] = {}  # of each owner's last piece, in virtual time
        self._pieces: Counter[str] = Counter()  # waiting and served, by owner
        self._number_of_pieces = 0
        # A heap: end, number, work, granted. Some may have left, but no more than half of them.
        self._waiting: list[tuple[float, int, float, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    @property
    def free(self) -> int:
        """The number of places that no work has."""
        return self._free

    @property
    def waiting(self) -> int:
        """The number of pieces of work that wait for a place."""
        return sum(not granted.done() for *_, granted in self._waiting)

    @contextlib.asynccontextmanager
    async def place(self, owner: str, work: float) -> AsyncIterator[None]:
        """A place for a piece of ``work``, in any unit that is the same for all pieces; waits for its turn. A
        caller that is cancelled while it waits has left the queue."""
        end = max(self._time, self._ends.get(owner, 0.0)) + work
        self._ends[owner] = end
        self._pieces[owner] += 1
        self._number_of_pieces += 1
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (end, next(self._numbers), work, granted))
        try:
            self._grant()
            try:
                await granted
            except asyncio.CancelledError:
                if not granted.cancelled():  # it was granted at the same moment
                    self._free += 1
                raise
            try:
                yield
            finally:
                self._free += 1
        finally:
            self._number_of_pieces -= 1
            self._pieces[owner] -= 1
            if not self._pieces[owner]:
                del self._pieces[owner], self._ends[owner]
            self._grant()

    def _grant(self) -> None:
        if len(self._waiting) > 2 * self._number_of_pieces:  # those that have left may be behind all others
            self._waiting = [piece for piece in self._waiting if not piece[-1].done()]
            heapq.heapify(self._waiting)
        while self._free and self._waiting:
            _, _, work, granted = heapq.heappop(self._waiting)
            if not granted.done():
                self._free -= 1
                self._time += work / max(1, len(self._pieces))
                granted.set_result(None)
        if not self._pieces:
            self._time = 0.0
