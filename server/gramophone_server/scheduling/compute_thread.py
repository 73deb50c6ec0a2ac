"""The compute thread: loads the engine, waits for work, executes commands, runs slices."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any

from gramophone.recipe import InvalidRecipeError
from gramophone_server.config import Limits
from gramophone_server.domain.commands import (
    Command,
    Done,
    Finish,
    Pause,
    Resume,
    TakeCheckpoint,
    TakePicture,
    UpdateRecipe,
)
from gramophone_server.domain.engine_api import Engine
from gramophone_server.domain.events import Paused, Resumed
from gramophone_server.domain.job_state import Shape
from gramophone_server.errors import DeviceLost, EngineFailed, GramophoneError, ShuttingDown
from gramophone_server.scheduling.batch_pool import OnIterations
from gramophone_server.scheduling.command_queue import PendingCommand
from gramophone_server.scheduling.place_turns import exchange, in_order
from gramophone_server.scheduling.task import Task
from gramophone_server.scheduling.task_table import TaskTable
from gramophone_server.scheduling.throughput import ThroughputModel
from gramophone_server.scheduling.worker import Worker

__all__ = ["ComputeThread"]

log = logging.getLogger(__name__)


# Of the host's memory for states, left free by pauses: otherwise whoever pauses large jobs keeps others from places.
FOR_EXCHANGES = 1 / 4


class ComputeThread:
    """The thread that owns the engine and runs the tasks of a table. Build it inside the event loop that awaits its
    futures.

    ``load`` builds and warms up the engine. It runs on this thread, because torch's thread pool belongs to the thread
    that first uses it. ``on_iterations`` is called on this thread after each slice.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        table: TaskTable,
        throughput: ThroughputModel,
        limits: Limits,
        on_iterations: OnIterations = lambda *_: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.loaded: asyncio.Future[Engine] = loop.create_future()  # or the error of ``load``
        self.ended: asyncio.Future[None] = loop.create_future()  # after all tasks were ended
        self._load = load
        self._table = table
        self._throughput = throughput
        self._limits = limits
        self._on_iterations = on_iterations
        self._clock = clock
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._worker: Worker | None = None  # until the engine is loaded
        self._step_started_at: float | None = None  # None: the thread waits

    def start(self) -> None:
        """Starts the thread, which loads the engine first."""
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Blocks until the thread has ended, or for ``timeout_s``; returns whether it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def batch_bytes(self) -> int:
        """Estimated device memory, in bytes, of the batches. Thread-safe."""
        return self._worker.batch_bytes if self._worker is not None else 0

    @property
    def parked_bytes(self) -> int:
        """Bytes of the states of jobs that are paused or have left the device for others. Thread-safe."""
        return self._worker.parked_bytes if self._worker is not None else 0

    @property
    def max_parked_bytes(self) -> int:
        """Largest `parked_bytes`. Thread-safe."""
        return self._worker.max_parked_bytes if self._worker is not None else self._limits.max_parked_bytes

    @property
    def urgent_credit_s(self) -> float:
        """Seconds that jobs whose deadlines need it may take at once now. Thread-safe."""
        return self._worker.urgent_credit_s if self._worker is not None else 0.0

    def may_have_memory(self, shape: Shape) -> bool:
        """Whether the device has memory for one more job of this shape now. Thread-safe."""
        return self._worker is None or self._worker.may_have_memory(shape)

    @property
    def step_s(self) -> float:
        """Seconds since the current step started; 0 while the thread waits for work. Thread-safe."""
        started_at = self._step_started_at
        return 0.0 if started_at is None else self._clock() - started_at

    def _run(self) -> None:
        try:
            engine = self._load()
        except Exception as error:  # noqa: BLE001 - for the caller that awaits `loaded`
            _resolve(self.loaded, error)
            return
        worker = self._worker = Worker(
            engine,
            self._throughput,
            self._limits.max_checkpoint_bytes,
            self._on_iterations,
            self._clock,
            self._limits.max_parked_bytes,
        )
        _resolve(self.loaded, engine)
        try:
            self._run_steps(worker)
        except Exception:
            log.critical("the compute thread has ended by a defect", exc_info=True)
            self._table.stop()
        finally:
            self._end_all(worker)
            _resolve(self.ended, None)

    def _run_steps(self, worker: Worker) -> None:
        """Runs steps until the table is stopped. A step executes pending commands, and then runs one slice."""
        table = self._table
        while not table.stopped:
            self._step_started_at = None
            self._wait(worker)
            self._step_started_at = self._clock()
            self._execute_commands(worker)
            self._exchange_places(worker)
            with table.lock:
                away_bytes = sum(task.state.bytes for task in table.away)
            started_at = self._clock()
            try:
                worker.step(table.running, away_bytes)
            except DeviceLost:
                raise
            except Exception as error:  # noqa: BLE001 - a defect, but the thread must serve later jobs
                worker.fail_all(table.running, error)
            table.commands.earn(self._clock() - started_at)
            table.remove_ended()

    def _wait(self, worker: Worker) -> None:
        """Ends pauses that are over, starts waiting tasks, and returns when a task runs or a command is pending."""
        table = self._table
        with table.lock:
            while not table.stopped:
                now = self._clock()
                self._end_pauses(worker, now)
                table.remove_ended()
                self._start_waiting(worker)
                table.waiting.report_positions(table.running)
                if table.commands or table.running:
                    return
                next_pause_end = min((task.pause_ends_at for task in table.paused), default=None)
                table.lock.wait(None if next_pause_end is None else next_pause_end - now)

    # Two methods, because a thread that waits must not keep a task, and so its images, in a variable.

    def _end_pauses(self, worker: Worker, now: float) -> None:
        for task in [task for task in self._table.paused if task.pause_ends_at <= now]:
            if task.budget_ends_at > now or not worker.finish_within_budget(task):
                self._resume(task)
        for task in [task for task in self._table.waiting if task.gave_place_up and task.budget_ends_at <= now]:
            worker.finish_within_budget(task)

    def _start_waiting(self, worker: Worker) -> None:
        table = self._table
        free = self._limits.max_running - table.places_taken  # less than 0 if jobs have got their memory back
        for task in worker.memory.startable(in_order(table.waiting, table.running), free, table.running):
            worker.admit(task)
            table.start(task)

    def _exchange_places(self, worker: Worker) -> None:
        """Takes one place from the owner with most, if another one waits for it; see `place_turns`."""
        table = self._table
        with table.lock:
            if not table.waiting or table.places_taken < self._limits.max_running:
                return
            host_bytes = self._host_bytes()
            due = exchange(
                table.running,
                list(table.waiting),
                self._clock(),
                lambda task: worker.memory.has_host_memory(task, host_bytes),
                lambda task: worker.memory.may_take_place(task, table.running),
            )
        if due is None:
            return
        worker.give_place_up(due.leaving)  # copies tensors, so without the lock
        with table.lock:
            if due.starting in table.waiting:  # it has not left meanwhile
                due.starting.keeps_place, due.starting.came_early = due.to_stay, due.is_early
                worker.admit(due.starting)
                table.start(due.starting)
            table.put_back(due.leaving)

    def _host_bytes(self, leaving: Task | None = None) -> int:
        """The size of all states that have left the device, but that of ``leaving``. Those of checkpoints whose jobs
        have not run yet count as decoded images."""
        table = self._table
        parked = (task for task in table.running if task.parked)
        return sum(task.state.bytes for task in (*table.away, *parked) if task is not leaving)

    def _execute_commands(self, worker: Worker) -> None:
        """Executes the commands that may be executed now; only one if no job runs, because after it one may start."""
        table = self._table
        while not table.stopped and (pending := table.next_command()) is not None:
            started_at = self._clock()
            self._execute(worker, pending)
            if not table.running:
                return
            table.commands.charge(self._clock() - started_at)

    def _execute(self, worker: Worker, pending: PendingCommand) -> None:
        """Executes a command and resolves its future."""
        try:
            task = self._table.find(pending.observer)
            started_at = self._clock()
            try:
                outcome: Done | Exception = self._apply(worker, task, pending.command)
            finally:
                worker.charge(task, self._clock() - started_at)
        except (GramophoneError, InvalidRecipeError) as error:
            outcome = error
        except Exception:
            log.exception("a command failed")
            outcome = EngineFailed()
        _resolve(pending.done, outcome)
        self._table.remove_ended()

    def _apply(self, worker: Worker, task: Task, command: Command) -> Done:
        """The one place where commands take effect. All watchers receive an event, and who gave it also `Done`."""
        match command:
            case Pause():
                self._pause(worker, task)
                return Done(task.state.done + 1)
            case Resume():
                self._resume(task)
                return Done(task.state.done + 1)
            case UpdateRecipe(changes):
                promised = task.state.iterations
                first = worker.update(task, changes)
                if task.state.iterations > promised:
                    task.deadline_at = math.inf  # it was promised for fewer
                return Done(first)
            case TakePicture():
                return Done(task.state.done, worker.frame(task))
            case TakeCheckpoint(light):
                return Done(task.state.done, worker.checkpoint(task, light=light))
            case Finish():
                worker.finish(task)
                return Done(task.state.done)

    def _pause(self, worker: Worker, task: Task) -> None:
        with self._table.lock:
            if task in self._table.paused:
                return
            host_bytes = self._host_bytes(task) + int(FOR_EXCHANGES * worker.max_parked_bytes)
        worker.pause(task, host_bytes)  # copies tensors, so without the lock
        with self._table.lock:
            if self._table.pause(task, self._clock() + self._limits.max_paused_s):
                task.observer.publish(Paused(task.state.done))

    def _resume(self, task: Task) -> None:
        with self._table.lock:
            if self._table.resume(task):
                task.observer.publish(Resumed(task.state.done))

    def _end_all(self, worker: Worker) -> None:
        """After the last step: ends every task that is left, and fails every command."""
        table = self._table
        with table.lock:
            tasks = [*table.running, *table.paused, *table.waiting]
            while (pending := table.commands.take(jobs_run=False)) is not None:
                _resolve(pending.done, ShuttingDown())
        for task in tasks:
            worker.drain_task(task)
        table.remove_ended()


def _resolve(future: asyncio.Future[Any], outcome: object) -> None:
    """Gives a future of the event loop its result, or its exception, from another thread."""

    def resolve() -> None:
        if future.done():  # cancelled by its caller
            return
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    with contextlib.suppress(RuntimeError):  # the loop is closed, so there is no caller
        future.get_loop().call_soon_threadsafe(resolve)
