"""Threads that encode pictures and write checkpoints: once for all calls that want the same, in turns."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

from gramophone_server.config import ENCODERS, QUICK_ENCODERS
from gramophone_server.images.threads import started_threads

__all__ = ["QUICK_S", "RESULTS_PART", "Encoders", "Shared"]

T = TypeVar("T")

QUICK_S = 0.05  # estimated seconds of the longest work that the quick thread does
RESULTS_PART = 0.8  # of the time, that results get at most while frames or checkpoints wait


class Shared(Generic[T]):
    """One piece of work, and its outcome, for all calls that use it. It is forgotten when the last of them has left."""

    def __init__(self, make: Callable[[], T], seconds: float) -> None:
        self.seconds = seconds  # as estimated
        self.is_long = seconds > QUICK_S
        self.outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.users = 0
        self.make: Callable[[], T] | None = make  # None: a thread has taken it, or nobody needs it
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
    """Threads for work that blocks or computes. Its methods belong to the event loop.

    Connections share the threads by the time that their work takes, as estimated. So one that wants a hundred pictures
    at once, or the largest ones, delays another by hardly more than what is being encoded. Work that several
    connections wait for is in the queue of each, is done in the turn that comes first, and counts only for the
    connection that had this turn: none has a disadvantage because others join. Results come first, because a job ends
    with them; frames and checkpoints, of which there are newer ones soon, get at least a fifth of the time.

    A thread takes its next work by itself, the best at that moment. Work longer than `QUICK_S` is done by at most
    `ENCODERS` threads at a time, so that one is free for what is quicker.
    """

    def __init__(self) -> None:
        self._threads = started_threads(ENCODERS + QUICK_ENCODERS, "encode")
        self._lock = threading.Lock()  # for everything below
        self._results, self._others = _Turns(), _Turns()
        self._owed_s = 0.0  # to the others, for the results that were done before them
        self._running = self._long = 0  # threads that do work, and those that do a long one
        self._closed = False

    @property
    def waiting(self) -> int:
        """The number of pieces of work that no thread has taken yet."""
        with self._lock:
            return len(self._results.works() | self._others.works())

    def close(self) -> None:
        """Stops the threads after what they do now."""
        with self._lock:
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
        seconds: float,
        is_result: bool = False,
    ) -> Iterator[Shared[T]]:
        """Joins those that use the outcome of ``make``, which are found in ``users`` by ``key``, for as long as the
        block runs. The first one starts the work, which takes about ``seconds``. When the last one leaves, the outcome
        is dropped, unless it is that of a result; work that still waits is not done."""
        work = users.get(key)
        if work is None:
            work = users[key] = Shared(make, seconds)
        work.users += 1
        turns = self._results if is_result else self._others
        with self._lock:
            if work.make is not None and connection not in work.connections:
                turns.add(work, connection)
                self._start_thread(asyncio.get_running_loop())
        try:
            yield work
        finally:
            work.users -= 1
            if not work.users:
                work.holds.close()
                if not (is_result and work.succeeded):
                    del users[key]
                    with self._lock:
                        turns.remove(work)
                        work.make = None  # it may hold a picture, or the state of a job

    def _start_thread(self, loop: asyncio.AbstractEventLoop) -> None:
        """Lets another thread work, if there may be one. The quick one only works while the others do long work: one
        more at any time would only take Python's lock from the event loop."""
        if self._running < ENCODERS + (QUICK_ENCODERS if self._long >= ENCODERS else 0) and not self._closed:
            self._running += 1
            self._threads.submit(self._work, loop)

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        """On a thread: does work until there is none that it may do."""
        while (taken := self._take(loop)) is not None:
            work, make = taken
            result: Any = None
            failure: BaseException | None = None
            try:
                result = make()
            except BaseException as error:  # noqa: BLE001 - for the calls that await the outcome
                failure = error
            del taken, make  # as above
            with self._lock:
                self._long -= work.is_long
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(_finish, work, result, failure)
            del work, result, failure

    def _take(self, loop: asyncio.AbstractEventLoop) -> tuple[Shared[Any], Callable[[], Any]] | None:
        with self._lock:
            is_surplus = self._running > ENCODERS and self._long < ENCODERS
            work = None if self._closed or is_surplus else self._next()
            if work is None:
                self._running -= 1
                return None
            self._long += work.is_long
            if self._long >= ENCODERS and self._has_quick():
                self._start_thread(loop)
            make, work.make = work.make, None
            assert make is not None, "work in a queue was not taken"
            return work, make

    def _has_quick(self) -> bool:
        return any(turns.first(with_long=False) for turns in (self._results, self._others))

    def _next(self) -> Shared[Any] | None:
        """The work whose turn it is, taken out of its queues."""
        with_long = self._long < ENCODERS
        result, other = self._results.first(with_long=with_long), self._others.first(with_long=with_long)
        if result is not None and (other is None or self._owed_s < other.work.seconds):
            if other is not None:
                self._owed_s += result.work.seconds * (1 - RESULTS_PART) / RESULTS_PART
            self._results.take(result)
            return result.work
        if other is not None:
            self._owed_s = max(0.0, self._owed_s - other.work.seconds)
            self._others.take(other)
            return other.work
        return None


def _finish(work: Shared[Any], result: Any, failure: BaseException | None) -> None:
    if failure is None:
        work.outcome.set_result(result)
    else:
        work.outcome.set_exception(failure)
        work.outcome.exception()  # keeps asyncio from logging an error that no call waited for


class _Turn(NamedTuple):
    """The first work of a queue."""

    end_s: float  # in virtual time
    number: int  # for equal ends
    connection: str
    work: Shared[Any]


class _Queue:
    """The work of one connection, long or quick."""

    def __init__(self, start_s: float) -> None:
        self.start_s = start_s  # in virtual time, of its first work
        self.works: dict[Shared[Any], None] = {}


class _Turns:
    """The queues of all connections, and whose turn is next.

    This is self-clocked fair queueing (Golestani: A Self-Clocked Fair Queueing Scheme for Broadband Applications,
    1994): work is done in the order in which it would end if all queues were served at equal speeds. Unlike in
    `FairQueue`, that is known only of the first work of each queue: by its turn, the rest may have left, or may have
    been done in the turn of another connection. A connection has two queues, so that its quick work is found behind any
    long one.
    """

    def __init__(self) -> None:
        self._queues: tuple[dict[str, _Queue], dict[str, _Queue]] = ({}, {})  # of quick and of long work
        # Heaps of the same. Each has the first work of each queue; what has become wrong is removed at its top.
        self._firsts: tuple[list[_Turn], list[_Turn]] = ([], [])
        self._now_s = 0.0  # virtual time: the end of what was taken last
        self._numbers = itertools.count()

    def works(self) -> set[Shared[Any]]:
        """All that waits."""
        return {work for queues in self._queues for queue in queues.values() for work in queue.works}

    def add(self, work: Shared[Any], connection: str) -> None:
        """It waits for the turn of this connection, too."""
        work.connections.add(connection)
        queues = self._queues[work.is_long]
        queue = queues.get(connection)
        if queue is None:
            queue = queues[connection] = _Queue(self._now_s)
        queue.works[work] = None
        if len(queue.works) == 1:
            self._push(connection, queue)

    def remove(self, work: Shared[Any]) -> None:
        """It waits for no turn any more."""
        queues = self._queues[work.is_long]
        for connection in work.connections:
            queue = queues[connection]
            was_first = next(iter(queue.works)) is work
            del queue.works[work]
            if not queue.works:
                del queues[connection]
            elif was_first:
                self._push(connection, queue)
        work.connections.clear()

    def first(self, *, with_long: bool) -> _Turn | None:
        """The work that is next; None if there is none. ``with_long``: it may be long."""
        turns = (self._first(is_long) for is_long in ((False, True) if with_long else (False,)))
        return min((turn for turn in turns if turn is not None), default=None)

    def take(self, turn: _Turn) -> None:
        """It is done now, and counts for this connection."""
        self._now_s = max(self._now_s, turn.end_s)
        self._queues[turn.work.is_long][turn.connection].start_s = turn.end_s
        self.remove(turn.work)

    def _first(self, is_long: bool) -> _Turn | None:
        queues, firsts = self._queues[is_long], self._firsts[is_long]
        while firsts:
            turn = firsts[0]
            queue = queues.get(turn.connection)
            if queue is not None and turn.work in queue.works and turn.end_s == queue.start_s + turn.work.seconds:
                return turn
            heapq.heappop(firsts)
        return None

    def _push(self, connection: str, queue: _Queue) -> None:
        work = next(iter(queue.works))
        queues, firsts = self._queues[work.is_long], self._firsts[work.is_long]
        heapq.heappush(firsts, _Turn(queue.start_s + work.seconds, next(self._numbers), connection, work))
        if len(firsts) > 2 * len(queues) + 64:  # those whose work has left may be behind all others
            firsts.clear()
            for other, each in queues.items():
                self._push(other, each)
