"""Many jobs on one compute thread: admission, waiting, commands, draining.

The event loop calls the `Scheduler`, and a `ComputeThread` owns the engine; both share a `TaskTable`, which has all
tasks, reservations and pending commands under one lock that is never held while a slice runs. The event loop
adds reservations, tasks and commands to the table and withdraws cancelled tasks that do not run. The compute thread
moves tasks between waiting, running and paused, and removes those that have ended. Up to ``max_running`` jobs run side
by side, in slices of about 20 ms, and pending commands are executed between two slices (see `worker`). Events go to
each job's `JobObserver`, and the outcomes of commands to futures of the event loop.

The next turn is for the owner, and of its jobs for the one, who would have had the least device time after it,
together with the jobs that share its batch (see `fair_share`, `batch_pool`). This is weighted fair queueing: before an
iteration of a second for a job of 2048 px, the other jobs have slices for a second. Waiting jobs start in the order of
the latest time at which they must start to meet their deadlines.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from collections.abc import Callable

from gramophone_server.config import Limits
from gramophone_server.domain.commands import Command, Done
from gramophone_server.domain.engine_api import Engine
from gramophone_server.domain.job_state import JobState, Shape
from gramophone_server.errors import NotReady, OutOfDeviceMemory, QueueFull, ShuttingDown
from gramophone_server.scheduling.batch_pool import OnIterations
from gramophone_server.scheduling.command_queue import PendingCommand
from gramophone_server.scheduling.compute_thread import ComputeThread
from gramophone_server.scheduling.reservation import Reservation
from gramophone_server.scheduling.task import JobObserver, Task
from gramophone_server.scheduling.task_table import TaskTable
from gramophone_server.scheduling.throughput import ThroughputModel

__all__ = ["Scheduler"]


# Most of the places for jobs that one owner gets, of those that the others leave. A client alone has 70 of 80.
OF_ONE_OWNER = 7 / 8


class Scheduler:
    """Runs jobs on a compute thread. Build it inside the event loop that submits them; its methods belong to that loop.

    ``load`` builds and warms up the engine, on the compute thread. ``on_iterations`` is called on that thread after
    each slice. ``throughput`` is the model that forecasts use.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        limits: Limits,
        on_iterations: OnIterations = lambda *_: None,
        *,
        throughput: ThroughputModel | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._place_freed = asyncio.Event()
        self._reservation_numbers = itertools.count(1)
        # Not ``or``, because a model without measurements is false.
        self._throughput = ThroughputModel(clock) if throughput is None else throughput
        self._table = TaskTable(limits, self._throughput, self._notify_drain, clock)
        self._thread = ComputeThread(load, self._table, self._throughput, limits, on_iterations, clock)

    def start(self) -> None:
        """Starts the compute thread, which loads the engine first."""
        self._thread.start()

    async def ready(self) -> Engine:
        """Returns the engine when it is loaded and warm. Raises the error of loading it."""
        return await asyncio.shield(self._thread.loaded)

    # State ------------------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The engine. Raises `NotReady` until it is loaded."""
        loaded = self._thread.loaded
        if not loaded.done() or loaded.cancelled() or loaded.exception() is not None:
            raise NotReady
        return loaded.result()

    @property
    def running(self) -> int:
        """The number of jobs that share the device now. This count and the following ones are thread-safe."""
        return len(self._table.running)

    @property
    def paused(self) -> int:
        """The number of jobs that are paused."""
        return len(self._table.paused)

    @property
    def queued(self) -> int:
        """The number of jobs that wait, or whose images are still being decoded."""
        return self._table.queued

    @property
    def waiting(self) -> int:
        """The number of jobs that wait with decoded images."""
        return len(self._table.waiting)

    @property
    def pending_commands(self) -> int:
        """The number of commands that were not executed yet, and for whose outcomes their senders wait."""
        with self._table.lock:
            return len(self._table.commands)

    @property
    def batch_bytes(self) -> int:
        """Estimated device memory, in bytes, of the batches. Thread-safe."""
        return self._thread.batch_bytes

    @property
    def parked_bytes(self) -> int:
        """Bytes of the states of jobs that are paused or have left the device for others. Thread-safe."""
        return self._thread.parked_bytes

    @property
    def max_parked_bytes(self) -> int:
        """Largest `parked_bytes`: the setting, and at most half of the engine's memory. Thread-safe."""
        return self._thread.max_parked_bytes

    @property
    def step_s(self) -> float:
        """Seconds since the compute thread started its current step, of pending commands and one slice; 0 while it
        waits for work. Thread-safe."""
        return self._thread.step_s

    def estimated_wait_s(self) -> float | None:
        """Seconds until a job that arrives now would start; None if it must wait for one whose speed is not known."""
        with self._table.lock:
            predicted = self._table.waiting.forecast(self._table.running)
        return None if predicted is None else predicted.starts[-1]

    def retry_after_s(self) -> float:
        """Estimated seconds until a running job ends, which makes room for another one."""
        with self._table.lock:
            return self._table.waiting.retry_after_s(self._table.running)

    # One job ----------------------------------------------------------------------------------------------------------

    def reserve(self, owner: str = "") -> Reservation:
        """Reserves a place for one job. `submit` uses it, and `release` gives it back if it was not used. ``owner``:
        for whom it counts, and who gets at most `OF_ONE_OWNER` of the places that others leave. Raises `ShuttingDown`,
        `NotReady` or `QueueFull`."""
        table = self._table
        with table.lock:
            if table.draining:
                raise ShuttingDown
            _ = self.engine
            places, occupied = self._limits.max_running + self._limits.max_queued, table.occupied_places
            if occupied >= places:
                raise QueueFull(self.queued, self._limits.max_queued, self.retry_after_s(), self.paused)
            if occupied >= math.ceil(OF_ONE_OWNER * places):  # below that no owner has its part
                own = table.places_of(owner)
                if own >= math.ceil(OF_ONE_OWNER * (places - occupied + own)):
                    raise QueueFull(self.queued, self._limits.max_queued, self.retry_after_s(), self.paused, own)
            reservation = Reservation(next(self._reservation_numbers), owner)
            table.reservations.add(reservation)
        return reservation

    def release(self, reservation: Reservation) -> None:
        """Gives the place of a reservation back. Does nothing if it was used or released before."""
        self._table.release(reservation)

    def require_memory(self, *shapes: Shape) -> None:
        """Raises `OutOfDeviceMemory` if the device has too little memory even for this job alone. Thread-safe. Where
        ops run through torch's library, it blocks for 20 ms when it sees a shape for the first time, so it must not be
        called on the event loop.

        ``shapes``: of the job's last scale, and of its first one, so that `submit` need not estimate that."""
        engine = self.engine
        for shape in shapes:
            if engine.batch_bytes(shape, 1) > engine.memory_bytes:
                raise OutOfDeviceMemory(shape.width, shape.height)

    def require_time(
        self,
        reservation: Reservation,
        state: JobState,
        left_s: float,
        image_pixels: int = 0,
        result_kind: str = "",
        owner: str = "",
    ) -> None:
        """Raises `DeadlineUnattainable` if the job would not end within ``left_s`` seconds, or would make a job late
        whose deadline was accepted before: by what was measured near its sizes and lately, and even if everything takes
        the least time that this allows. Otherwise later forecasts include the job while its images are decoded, and
        its deadline is promised, unless its owner would be promised more of the device than `MAX_PROMISED_S`.

        ``state``: of the job, with or without images. ``image_pixels``: of its largest image, as it is sent.
        ``result_kind``: how its result will be encoded, as in `record_delivery`. ``owner``: as in `submit`.
        """
        with self._table.lock:
            running = self._table.running
            credit_s = self._thread.urgent_credit_s
            self._table.waiting.expect(reservation, running, state, left_s, image_pixels, result_kind, owner, credit_s)

    def record_decoding(self, image_pixels: int, seconds: float) -> None:
        """An image of so many pixels was decoded in ``seconds`` of a thread: deadlines allow for it."""
        self._throughput.record_decoding(image_pixels, seconds)

    def record_delivery(self, result_kind: str, pixels: int, seconds: float) -> None:
        """A result was encoded, as ``result_kind``, in ``seconds`` of a thread: deadlines allow for it."""
        self._throughput.record_delivery(result_kind, pixels, seconds)

    @property
    def deadline_probes(self) -> int:
        """The number of jobs that were accepted although they should be late, to see whether that is true."""
        return self._table.waiting.probes

    def submit(
        self,
        reservation: Reservation,
        state: JobState,
        observer: JobObserver,
        deadline_at: float | None = None,
        owner: str = "",
    ) -> None:
        """Queues a job, which takes the place of its reservation. ``deadline_at``: when the client stops waiting for
        the result, on the scheduler's clock. ``owner``: for whom it counts; jobs of one share its part of the device.
        Raises `ShuttingDown` after `stop`."""
        now = self._clock()
        task = Task(
            state=state,
            observer=observer,
            owner=owner,
            memory_short_since=None if self._thread.may_have_memory(state.shape) else now,
            budget_ends_at=now + state.recipe.time_budget if state.recipe.time_budget else math.inf,
            deadline_at=math.inf if deadline_at is None else deadline_at,
            queued_at=now,
        )
        table = self._table
        with table.lock:
            if table.stopped:
                raise ShuttingDown
            assert reservation in table.reservations, "a reservation is for one job"
            expected = table.use(reservation)
            if expected is not None:
                task.deadline_at = expected.deadline_at
            table.waiting.accept(task, table.running)
            table.lock.notify()

    def withdraw(self, observer: JobObserver) -> None:
        """Removes a cancelled job that waits or is paused. The compute thread removes a running one before a step."""
        self._table.withdraw(observer)

    def command(self, observer: JobObserver, command: Command) -> asyncio.Future[Done]:
        """Queues a command, which is executed between two slices: after the present one, unless commands have taken
        their part of the device's time; see `CommandQueue`. Its effect is published to the job's watchers. A future
        that is cancelled before takes the command back.

        Raises `InvalidRequest` if the job has ended or was not submitted yet. The future raises it, or
        `InvalidRecipeError`, if the command cannot be executed, with fields relative to the command, and `ShuttingDown`
        after `stop`."""
        done: asyncio.Future[Done] = self._loop.create_future()
        table = self._table
        with table.lock:
            if table.stopped:
                done.set_exception(ShuttingDown())
            else:
                pending = PendingCommand(table.find(observer).owner, observer, command, done)
                table.commands.add(pending)
                done.add_done_callback(lambda _: table.remove_command(pending))
                table.lock.notify()
        return done

    # The end ----------------------------------------------------------------------------------------------------------

    async def drain(self, within_s: float) -> None:
        """Refuses new jobs; returns when all but the paused jobs have ended, or after ``within_s``. See `stop`."""
        with self._table.lock:
            self._table.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while self._table.active:
                    self._place_freed.clear()
                    await self._place_freed.wait()

    def stop(self) -> None:
        """Ends every job with `ShuttingDown`, then the compute thread. Jobs that have started end after the current
        slice, and their watchers receive the picture and the state."""
        self._table.stop()

    async def ended(self) -> None:
        """Returns when the compute thread has ended all jobs: after `stop`, or because of a defect."""
        await asyncio.shield(self._thread.ended)

    def join(self, timeout_s: float) -> bool:
        """Waits for the compute thread to end after `stop`; returns whether it has. Blocks, so it must not be called on
        the event loop."""
        return self._thread.join(timeout_s)

    def _notify_drain(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, so no drain waits
            self._loop.call_soon_threadsafe(self._place_freed.set)
