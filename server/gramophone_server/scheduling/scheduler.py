"""Many jobs on one compute thread: who may come, who waits, whose turn it is.

The event loop reserves places, submits jobs and sends commands; the compute thread runs the engine and tells each job's
`JobObserver`. They meet in a lock that neither holds for long.

Up to `max_running` jobs are worked on side by side, in slices of about 20 ms (see `worker`). The next slice is for the
job that has had least of the device's time, together with whoever shares its batch (see `lanes`). That is what deficit
round robin comes to, without rounds: a job of 2048 px whose iteration takes a second is followed by a second's worth of
slices for others. Those who wait begin in the order of the time at which they must, to be done by their deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from gramophone.recipe import InvalidRecipe, Violation
from gramophone_server.config import Limits
from gramophone_server.domain.commands import Command, Done, Pause, Resume
from gramophone_server.domain.engine_api import Engine
from gramophone_server.domain.events import Paused, Resumed
from gramophone_server.domain.job_state import JobState, Shape
from gramophone_server.errors import (
    DeviceLost,
    EngineFailed,
    GramophoneError,
    InvalidRequest,
    NotReady,
    OutOfDeviceMemory,
    QueueFull,
    ShuttingDown,
)
from gramophone_server.scheduling.batch_pool import Iterated
from gramophone_server.scheduling.reservation import Reservation
from gramophone_server.scheduling.throughput import ThroughputModel
from gramophone_server.scheduling.waiting_queue import WaitingQueue
from gramophone_server.scheduling.worker import JobObserver, Task, Worker

__all__ = ["Scheduler"]

log = logging.getLogger(__name__)

PATIENCE_S = 600.0  # of a job without a deadline: whoever must be done earlier goes first, for so long


class PendingCommand(NamedTuple):
    """A command on its way to the compute thread."""

    listener: JobObserver
    command: Command
    done: asyncio.Future[Done]


class Scheduler:
    """Runs jobs on a compute thread of its own. Build it inside the event loop that will submit them.

    `load` builds and warms up the engine; it runs on the compute thread, because torch's thread pool belongs to the
    thread that first uses it. `iterated` hears of what it does, on that thread.
    """

    def __init__(self, load: Callable[[], Engine], limits: Limits, iterated: Iterated = lambda *_: None) -> None:
        self._load = load
        self._iterated = iterated
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._loaded: asyncio.Future[Engine] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._place_freed = asyncio.Event()
        self._thread = threading.Thread(target=self._compute, name="compute", daemon=True)
        self._pace = ThroughputModel()
        self._worker: Worker | None = None  # once the engine is there
        self._turn_began_at: float | None = None  # None: the compute thread waits
        # Everything below is guarded by the lock of this condition, which says that there is something to do.
        self._news = threading.Condition()
        self._line = WaitingQueue(self._pace, limits.max_running)
        self._paused: list[Task] = []
        self._running: list[Task] = []
        self._orders: deque[PendingCommand] = deque()
        self._places = 0  # reserved, queued, paused and running jobs
        self._reservations: set[Reservation] = set()  # that are not used yet
        self._reserved = itertools.count(1)
        self._draining = False
        self._stopped = False

    def start(self) -> None:
        """Starts the compute thread, which starts to load the engine."""
        self._thread.start()

    async def ready(self) -> Engine:
        """The engine, once it is warm. Raises what loading it raised."""
        return await asyncio.shield(self._loaded)

    @property
    def engine(self) -> Engine:
        """The engine. Raises `NotReady` while it is being loaded."""
        if not self._loaded.done() or self._loaded.cancelled() or self._loaded.exception() is not None:
            raise NotReady
        return self._loaded.result()

    @property
    def running(self) -> int:
        """Jobs that are being worked on."""
        return len(self._running)

    @property
    def paused(self) -> int:
        """Jobs that stand still."""
        return len(self._paused)

    @property
    def queued(self) -> int:
        """Jobs that wait, or whose images are still being decoded."""
        return max(0, self._places - self.running - self.paused)

    @property
    def batch_bytes(self) -> int:
        """That the batches of those jobs take on the device, as estimated."""
        return self._worker.batch_bytes if self._worker is not None else 0

    @property
    def turn_s(self) -> float:
        """Seconds since the compute thread was last seen, 0 while it waits for jobs. A turn is a slice and what was ordered."""
        began_at = self._turn_began_at
        return 0.0 if began_at is None else time.monotonic() - began_at

    def estimated_wait_s(self) -> float | None:
        """Seconds until a job that came now would begin; None while nothing was measured."""
        with self._news:
            seen = self._line.forecast(self._running)
        return None if seen is None else seen.begins[-1]

    def reserve(self) -> Reservation:
        """Reserves a place for one job; `submit` uses it, and `release` gives it back if it was not used. Raises
        `ShuttingDown`, `NotReady` or `QueueFull`."""
        with self._news:
            if self._draining:
                raise ShuttingDown
            _ = self.engine
            if self._places >= self._limits.max_running + self._limits.max_queued:
                retry_s = self._line.next_place_s(self._running)
                raise QueueFull(self.queued, self._limits.max_queued, retry_s, self.paused)
            self._places += 1
            reservation = Reservation(next(self._reserved))
            self._reservations.add(reservation)
        return reservation

    def release(self, reservation: Reservation) -> None:
        """Gives the place of a reservation back. Does nothing if it was used or released before."""
        with self._news:
            if reservation not in self._reservations:
                return
            self._reservations.remove(reservation)
            self._line.forget(reservation)
        self._release(1)

    def require_time(
        self, reservation: Reservation, pixels: int, shape: Shape, time_budget: float, left_s: float
    ) -> None:
        """Raises `DeadlineUnattainable` if the job would not end within ``left_s`` seconds, by the speed measured so far and
        after all jobs that came before it. Otherwise later forecasts include the job while its images are decoded.

        ``pixels``: its pixel-iterations; ``shape``: of its last scale; ``time_budget``: of its recipe.
        """
        with self._news:
            self._line.expect(reservation, self._running, pixels, shape, time_budget, left_s)

    def submit(
        self, reservation: Reservation, state: JobState, observer: JobObserver, deadline_at: float | None = None
    ) -> None:
        """Queues the job of a reservation, which is used up. ``deadline_at``: when no client wants the result any more, on
        the monotonic clock. Raises `ShuttingDown` after `stop`."""
        now = time.monotonic()
        budget_at = now + state.recipe.time_budget if state.recipe.time_budget else math.inf
        left_s = self._pace.left_s(state)
        end_at = min(math.inf if deadline_at is None else deadline_at, budget_at, now + PATIENCE_S)
        task = Task(
            work=state, listener=observer, budget_at=budget_at, must_begin_at=end_at - (left_s or 0.0), left_s=left_s
        )
        with self._news:
            if self._stopped:
                raise ShuttingDown
            assert reservation in self._reservations, "a reservation is for one job"
            self._reservations.remove(reservation)
            self._line.forget(reservation)
            self._line.accept(task, self._running)
            self._news.notify()

    def require_memory(self, shape: Shape) -> None:
        """Raises `OutOfDeviceMemory` if the device has too little even for this job alone. Blocks for 20 ms when it sees a
        shape for the first time."""
        engine = self.engine
        if engine.batch_bytes(shape, 1) > engine.memory_bytes:
            raise OutOfDeviceMemory(shape.width, shape.height)

    def withdraw(self, listener: JobObserver) -> None:
        """Takes a cancelled job out of those that wait or stand still. One that runs is left to see that it is cancelled."""
        with self._news:
            places: tuple[WaitingQueue | list[Task], ...] = (self._line, self._paused)
            found = [(tasks, task) for tasks in places for task in tasks if task.listener is listener]
            for tasks, task in found:
                tasks.remove(task)
            self._line.tell(self._running)
        self._release(len(found))

    def command(self, listener: JobObserver, command: Command) -> asyncio.Future[Done]:
        """Has a command done to a job before its next slice. The future ends in `InvalidRequest` or `InvalidRecipe` if that
        is impossible, with fields relative to the command, and in `ShuttingDown`."""
        done: asyncio.Future[Done] = self._loop.create_future()
        with self._news:
            if self._stopped:
                done.set_exception(ShuttingDown())
            else:
                self._orders.append(PendingCommand(listener, command, done))
                self._news.notify()
        return done

    async def drain(self, within_s: float) -> None:
        """Takes no new jobs, and returns when all but the paused have ended or the time is over; see `stop`."""
        with self._news:
            self._draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while self._places > self.paused:
                    self._place_freed.clear()
                    await self._place_freed.wait()

    def stop(self) -> None:
        """Ends every job with `ShuttingDown`, those on their way after the present slice and with their picture and state,
        and then the thread."""
        with self._news:
            self._draining = self._stopped = True
            self._news.notify()

    async def ended(self) -> None:
        """Returns when the compute thread has ended its work: after `stop`, or by a defect, after which no job can come."""
        await asyncio.shield(self._ended)

    def join(self, timeout_s: float) -> bool:
        """Waits for the compute thread to end after `stop`; whether it has. Blocks, so not on the event loop."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # The queue --------------------------------------------------------------------------------------------------------

    def _release(self, places: int) -> None:
        with self._news:
            self._places -= places
        with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits
            self._loop.call_soon_threadsafe(self._place_freed.set)

    # The compute thread -----------------------------------------------------------------------------------------------

    def _compute(self) -> None:
        try:
            engine = self._load()
        except Exception as error:  # noqa: BLE001 - whoever awaits `ready` gets it
            self._call(partial(_answer, self._loaded, error))
            return
        worker = self._worker = Worker(engine, self._pace, self._limits.max_checkpoint_bytes, self._iterated)
        self._call(partial(_answer, self._loaded, engine))
        try:
            self._work(worker)
        except Exception:
            log.critical("the compute thread has ended by a defect", exc_info=True)
            self.stop()
        finally:
            self._end_all(worker)
            self._call(partial(_answer, self._ended, None))

    def _work(self, worker: Worker) -> None:
        while not self._stopped:
            self._turn_began_at = None
            self._wait(worker)
            self._turn_began_at = time.monotonic()
            while self._orders and not self._stopped:
                self._carry_out(worker, self._orders.popleft())
            try:
                worker.turn(self._running, sum(task.work.bytes for task in self._paused))
            except DeviceLost:
                raise
            except Exception as error:  # noqa: BLE001 - a defect; the thread must live on for whoever comes next
                worker.lose(self._running, error)
            self._sweep()

    def _wait(self, worker: Worker) -> None:
        """Until there is something to do."""
        with self._news:
            while not self._stopped:
                now = time.monotonic()
                for task in [task for task in self._paused if task.stands_until <= now]:
                    if task.budget_at > now or not worker.end_in_time(task):
                        self._resume(task)
                self._sweep()
                room = self._limits.max_running - len(self._running)
                for task in list(itertools.islice(filter(worker.may_begin, self._line), room)):
                    self._line.remove(task)
                    worker.begin(task)
                    self._running.append(task)
                self._line.tell(self._running)
                if self._orders or self._running:
                    return
                until = min((task.stands_until for task in self._paused), default=None)
                self._news.wait(None if until is None else until - now)

    def _carry_out(self, worker: Worker, order: PendingCommand) -> None:
        listener, command, answer = order
        try:
            with self._news:
                tasks = (*self._running, *self._line, *self._paused)
                task = next((task for task in tasks if task.listener is listener and not task.over), None)
            if task is None:
                raise InvalidRequest([Violation("", "the job has ended, or its images are still being decoded")])
            match command:
                case Pause():
                    done = self._pause(worker, task)
                case Resume():
                    with self._news:
                        if task in self._paused:
                            self._resume(task)
                    done = Done(task.work.done + 1)
                case _:
                    done = worker.do(task, command)
            self._call(partial(_answer, answer, done))
        except Exception as error:
            told = error if isinstance(error, GramophoneError | InvalidRecipe) else EngineFailed()
            if told is not error:
                log.error("a command failed", exc_info=error)
            self._call(partial(_answer, answer, told))
        self._sweep()

    def _pause(self, worker: Worker, task: Task) -> Done:
        done = Done(task.work.done + 1)
        if task in self._paused:
            return done
        worker.leave(task)
        with self._news:
            here = self._running if task in self._running else self._line
            # It may have been withdrawn; and one that was cancelled while it ran ends at the next turn, which those that
            # stand still do not see.
            if task in here and not task.listener.cancelled:
                here.remove(task)
                task.paused_until = time.monotonic() + self._limits.max_paused_s
                self._paused.append(task)
                task.listener.publish(Paused(task.work.done))
                self._call(self._place_freed.set)  # a drain does not wait for those who stand still
        return done

    def _resume(self, task: Task) -> None:
        """Back to those who wait, where it begins before whoever came later. The lock is held."""
        self._paused.remove(task)
        self._line.resume(task)
        task.listener.publish(Resumed(task.work.done))

    def _sweep(self) -> None:
        """Frees the places of those who are over."""
        with self._news:
            over = 0
            for tasks in (self._running, self._line, self._paused):
                for task in [task for task in tasks if task.over]:
                    tasks.remove(task)
                    over += 1
        if over:
            self._release(over)

    def _end_all(self, worker: Worker) -> None:
        with self._news:
            tasks = [*self._running, *self._paused, *self._line]
            orders, self._orders = self._orders, deque()
        for order in orders:
            self._call(partial(_answer, order.done, ShuttingDown()))
        for task in tasks:
            worker.interrupt(task)
        self._sweep()

    def _call(self, tell: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits
            self._loop.call_soon_threadsafe(tell)


def _answer(future: asyncio.Future[Any], answer: object) -> None:
    if not future.done():  # whoever asked may have gone
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
