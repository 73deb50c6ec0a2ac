"""Jobs on one compute thread, one after another, behind a bounded queue.

The event loop reserves places, submits jobs and withdraws them; the compute thread loads the engine, runs it and tells
the job's `Listener`. The two meet in a lock that neither holds for long, so the engine never waits for a reader and the
loop never waits for the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from torch import Tensor

from gramophone_server.errors import (
    Diverged,
    EngineFailed,
    GramophoneError,
    NotReady,
    OutOfDeviceMemory,
    QueueFull,
    ShuttingDown,
)
from gramophone_server.job import Run, StyleJob, ran_out_of_memory
from gramophone_server.mailbox import Accepted, Event, Finished, Frame, Picture, Progress, State, Waiting

__all__ = ["Engine", "Listener", "Place", "Scheduler"]

log = logging.getLogger(__name__)

# The longest that the engine is left alone: cancelling takes no longer, and a wait for the GPU (30 us of 0.4 ms at 256 px)
# comes once in so long instead of after every iteration.
SLICE_S = 0.02
GUESSED_RETRY_S = 5.0  # until the first iteration of this process has been measured


class Engine(Protocol):
    """What the scheduler needs of an engine, and what the server says about it."""

    @property
    def device_name(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def backbone(self) -> str: ...
    @property
    def weights_source(self) -> str: ...
    @property
    def layers(self) -> tuple[str, ...]: ...

    def start(self, jobs: Sequence[StyleJob]) -> Run: ...


class Listener(Protocol):
    """Whom a job is run for; see `jobs.Job`. Called on the compute thread and, for the queue, on the event loop, with
    the scheduler's lock held at times: it never waits and never calls back."""

    @property
    def cancelled(self) -> bool:
        """The job shall stop before its next iteration."""

    def most_at_once(self, iteration: int) -> int | None:
        """Iterations from this one to the next whose picture may be wanted, None if none will be."""

    def started(self) -> None:
        """The job waits no longer."""

    def publish(self, event: Event) -> None:
        """`Accepted` first, then `Waiting` and `Progress`, `Finished` last."""

    def offer_frame(self, iteration: int, take: Callable[[], Callable[[], Tensor]]) -> None:
        """Takes the picture if somebody wants it."""

    def offer_checkpoint(self, iteration: int, take: Callable[[bool], State]) -> None:
        """Takes the state if somebody wants it; `take` is told whether a light one will do."""

    def interrupted(self, iteration: int, picture: Picture, take: Callable[[bool], State]) -> None:
        """The server goes away with the job on its way: everybody gets the picture, and the state. `fail` follows."""

    def fail(self, error: GramophoneError) -> None:
        """The job has ended without a result."""


class Task(NamedTuple):
    """A job of the queue."""

    work: StyleJob
    listener: Listener


class Place:
    """Room for one job, held from before its images are decoded. Leaving the `with` block gives an unused one back."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._used = False

    def submit(self, work: StyleJob, listener: Listener) -> None:
        """Queues the job. Raises `ShuttingDown` if the drain time has run out meanwhile."""
        assert not self._used, "a place is for one job"
        self._scheduler._enqueue(Task(work, listener))
        self._used = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._used:
            self._scheduler._release()


class Scheduler:
    """Runs jobs on a compute thread of its own. Build it inside the event loop that will submit them.

    `load` builds and warms up the engine; it runs on the compute thread, because torch's thread pool belongs to the
    thread that first uses it.
    """

    def __init__(self, load: Callable[[], Engine], *, max_queued: int) -> None:
        self._load = load
        self._max_queued = max_queued
        self._loop = asyncio.get_running_loop()
        self._loaded: asyncio.Future[Engine] = self._loop.create_future()
        self._place_freed = asyncio.Event()
        self._thread = threading.Thread(target=self._compute, name="compute", daemon=True)
        # Everything below is guarded by the lock of this condition, which says that there is a job, or an end.
        self._work = threading.Condition()
        self._queue: deque[Task] = deque()
        self._running: Task | None = None
        self._places = 0  # reserved, queued and running jobs
        self._draining = False
        self._stopped = False
        self._pixels_left = 0  # of the running job, in pixel-iterations
        self._pixels_per_s = 0.0  # pixel-iterations per second at the last report; 0: not measured yet

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
        return int(self._running is not None)

    @property
    def queued(self) -> int:
        """Jobs that wait, or whose images are still being decoded."""
        return self._places - self.running

    def reserve(self) -> Place:
        """A place for a job. Raises `ShuttingDown`, `NotReady` or `QueueFull`."""
        with self._work:
            if self._draining:
                raise ShuttingDown
            _ = self.engine
            if self._places > self._max_queued:
                raise QueueFull(self.queued, self._max_queued, self._seconds_to_next_place())
            self._places += 1
        return Place(self)

    def withdraw(self, listener: Listener) -> None:
        """Takes a cancelled job out of the queue. One that runs is left to see that it is cancelled."""
        with self._work:
            task = next((task for task in self._queue if task.listener is listener), None)
            if task is None:
                return
            self._queue.remove(task)
            self._tell_positions()
        self._release()

    async def drain(self, within_s: float) -> None:
        """Takes no new jobs, and returns when all have ended or the time is over; see `stop`."""
        with self._work:
            self._draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while self._places:
                    self._place_freed.clear()
                    await self._place_freed.wait()

    def stop(self) -> None:
        """Ends every job with `ShuttingDown`, the running one after its present iteration, and then the thread."""
        with self._work:
            self._draining = self._stopped = True
            self._work.notify()

    def join(self, timeout_s: float) -> bool:
        """Waits for the compute thread to end after `stop`; whether it has. Blocks, so not on the event loop."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # The event loop's side of a job -----------------------------------------------------------------------------------

    def _enqueue(self, task: Task) -> None:
        with self._work:
            if self._stopped:
                raise ShuttingDown
            task.listener.publish(Accepted(position=len(self._queue) + self.running))
            self._queue.append(task)
            self._work.notify()

    def _tell_positions(self) -> None:
        """To those who wait, when somebody has left the queue. The lock is held."""
        for position, task in enumerate(self._queue, self.running):
            task.listener.publish(Waiting(position))

    def _release(self) -> None:
        with self._work:
            self._places -= 1
        with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits
            self._loop.call_soon_threadsafe(self._place_freed.set)

    def _seconds_to_next_place(self) -> float:
        if not self._pixels_per_s or self._running is None:
            return GUESSED_RETRY_S
        return max(1.0, self._pixels_left / self._pixels_per_s)

    # The compute thread -----------------------------------------------------------------------------------------------

    def _compute(self) -> None:
        try:
            engine = self._load()
        except Exception as error:  # noqa: BLE001 - whoever awaits `ready` gets it
            self._tell_loaded(lambda error=error: self._loaded.set_exception(error))  # type: ignore[misc]
            return
        self._tell_loaded(lambda: self._loaded.set_result(engine))
        while (task := self._next()) is not None:
            try:
                self._run(engine, task)
            except GramophoneError as error:
                task.listener.fail(_bare(error))
            except Exception as error:
                if ran_out_of_memory(error):
                    task.listener.fail(OutOfDeviceMemory(*task.work.result_size))
                else:
                    log.exception("the engine failed")
                    task.listener.fail(EngineFailed())
            finally:
                with self._work:
                    self._running = None
                del task  # its images, while the next one is awaited
                self._release()

    def _tell_loaded(self, tell: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits
            self._loop.call_soon_threadsafe(tell)

    def _next(self) -> Task | None:
        """The next job, or None when the thread shall end."""
        with self._work:
            while not self._queue and not self._stopped:
                self._work.wait()
            if self._stopped:
                for task in self._queue:
                    task.listener.fail(ShuttingDown())
                self._places -= len(self._queue)
                self._queue.clear()
                return None
            self._running = self._queue.popleft()
            self._pixels_left = sum(width * height * n for width, height, n in self._running.work.scales)
            self._running.listener.started()
            self._tell_positions()
            return self._running

    def _run(self, engine: Engine, task: Task) -> None:
        run = engine.start([task.work])
        try:
            self._follow(run, task.listener)
        finally:
            run.close()

    def _follow(self, run: Run, listener: Listener) -> None:
        started = scale_started = time.monotonic()
        scale, scale_iterations, iteration, per_s = (0, 0), 0, 0, 0.0
        while not run.finished:
            if listener.cancelled:
                return
            if self._stopped:
                raise ShuttingDown
            before = time.monotonic()
            at_once = max(1, int(per_s * SLICE_S))
            (report,) = run.advance(min(at_once, listener.most_at_once(iteration) or at_once))
            if report.diverged_at is not None:
                listener.publish(Frame(report.diverged_at - 1, Picture(run.snapshot(0))))
                raise Diverged(report.diverged_at)
            now = time.monotonic()
            if (report.width, report.height) != scale:
                scale, scale_iterations, scale_started = (report.width, report.height), 0, before
            scale_iterations += report.iteration - iteration
            iteration = report.iteration
            per_s = scale_iterations / max(now - scale_started, 1e-9)
            self._pixels_left = report.pixels_left
            self._pixels_per_s = per_s * report.width * report.height
            listener.publish(Progress(report, per_s, report.pixels_left / self._pixels_per_s))
            listener.offer_frame(report.iteration, lambda: run.snapshot(0))
        elapsed_s = time.monotonic() - started
        listener.publish(Finished(Picture(run.snapshot(0)), report.losses, report.iterations, elapsed_s))


def _bare(error: GramophoneError) -> GramophoneError:
    """The error without its traceback and causes, whose frames would keep a run's memory until the reader is gone."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
