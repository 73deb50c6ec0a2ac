"""Threads that encode pictures and write checkpoints: once for all calls that want the same, in turns."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, TypeVar

from gramophone_server.config import ENCODERS
from gramophone_server.images.threads import started_threads

__all__ = ["QUICK_AHEAD", "Encoders", "Shared"]

T = TypeVar("T")

# So many quick pieces, which take up to 50 ms, may wait behind the present one of each thread, which so finds its next
# one without waiting for the event loop: 64 clients of small jobs waited 174 ms for a picture, and 29 ms with them.
QUICK_AHEAD = 3


class Shared(Generic[T]):
    """One piece of work, and its outcome, for all calls that use it. It is forgotten when the last of them has left."""

    def __init__(self, make: Callable[[], T], *, quick: bool = False) -> None:
        self.quick = quick  # takes up to 50 ms
        self.outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.users = 0
        self.make: Callable[[], T] | None = make  # None: it was given to the threads
        self.connections: set[str] = set()  # in whose queues it waits
        self.holds = contextlib.ExitStack()  # closed when it has no users

    @property
    def succeeded(self) -> bool:
        """Whether there is an outcome."""
        outcome = self.outcome
        return outcome.done() and not outcome.cancelled() and outcome.exception() is None

    async def result(self) -> T:
        """Waits for the outcome."""
        return await asyncio.shield(self.outcome)  # others may wait for it, too


class Encoders:
    """Threads for work that blocks or computes. Belongs to the event loop.

    Each connection has a queue of its own, and they take turns: one that wants a hundred pictures at once delays
    another by at most the pictures that are being encoded and one more of each connection. Work that several wait
    for is done in the turn that comes first.
    """

    def __init__(self) -> None:
        self._threads = started_threads(ENCODERS, "encode")
        self._given = 0  # to the threads, and not done
        self._queues: dict[str, dict[Shared[Any], None]] = {}  # by connection, the one whose turn is next first
        self._closed = False

    @property
    def waiting(self) -> int:
        """The number of pieces of work that the threads were not given yet."""
        return len({work for queue in self._queues.values() for work in queue})

    def close(self) -> None:
        """Stops the threads."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)

    @contextlib.contextmanager
    def sharing(
        self,
        users: dict[Any, Any],
        key: Hashable,
        make: Callable[[], T],
        connection: str,
        *,
        keep: bool = False,
        quick: bool = False,
    ) -> Iterator[Shared[T]]:
        """Joins those that use the outcome of ``make``, which are found in ``users`` by ``key``, for as long as the
        block runs. The first one starts the work, which is ``quick`` if it takes up to 50 ms. When the last one leaves,
        the outcome is dropped, unless ``keep`` is set and there is one; work that still waits is not done."""
        work = users.get(key)
        if work is None:
            work = users[key] = Shared(make, quick=quick)
        work.users += 1
        if work.make is not None and connection not in work.connections:
            work.connections.add(connection)
            self._queues.setdefault(connection, {})[work] = None
            self._begin()
        try:
            yield work
        finally:
            work.users -= 1
            if not work.users:
                work.holds.close()
                if not (keep and work.succeeded):
                    del users[key]
                    self._withdraw(work)

    def _withdraw(self, work: Shared[Any]) -> None:
        for connection in work.connections:
            queue = self._queues[connection]
            del queue[work]
            if not queue:
                del self._queues[connection]
        work.connections.clear()

    def _begin(self) -> None:
        """Gives work to the threads that have none, and quick work ahead."""
        while self._queues and not self._closed:
            connection = next(iter(self._queues))
            work = next(iter(self._queues[connection]))
            if self._given >= (ENCODERS * (1 + QUICK_AHEAD) if work.quick else ENCODERS):
                break
            self._withdraw(work)
            if (queue := self._queues.pop(connection, None)) is not None:
                self._queues[connection] = queue  # behind the others
            make, work.make = work.make, None  # it may hold a picture, or the state of a job
            assert make is not None, "work in a queue was not begun"
            self._given += 1
            running = asyncio.get_running_loop().run_in_executor(self._threads, make)
            del make
            running.add_done_callback(functools.partial(self._done, work))

    def _done(self, work: Shared[Any], running: asyncio.Future[Any]) -> None:
        self._given -= 1
        if running.cancelled():
            work.outcome.cancel()
        elif (error := running.exception()) is not None:
            work.outcome.set_exception(error)
            work.outcome.exception()  # keeps asyncio from logging an error that no call waited for
        else:
            work.outcome.set_result(running.result())
        self._begin()
