"""What the event loop and the compute thread share: all tasks, reservations and pending commands, under one lock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from gramophone.recipe import Violation
from gramophone_server.config import Limits
from gramophone_server.errors import InvalidRequest
from gramophone_server.scheduling.command_queue import CommandQueue, PendingCommand
from gramophone_server.scheduling.reservation import Reservation
from gramophone_server.scheduling.task import JobObserver, Task
from gramophone_server.scheduling.throughput import ThroughputModel
from gramophone_server.scheduling.waiting_queue import Expected, WaitingQueue

__all__ = ["TaskTable"]


class TaskTable:
    """The state of a scheduler. A task is in one of `waiting`, `running` and `paused`.

    Each access holds `lock`, a reentrant condition that is notified when the compute thread has something to do. The
    exceptions: the compute thread reads `running` and `stopped` without it, since only it changes `running`, and
    `stopped` is set once; and any thread may read the lengths of `waiting`, `running` and `paused`.
    ``on_place_freed`` is called on any thread, under the lock, after a job has left the table or was paused.
    """

    def __init__(
        self,
        limits: Limits,
        throughput: ThroughputModel,
        on_place_freed: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lock = threading.Condition()
        self.reservations: set[Reservation] = set()  # not used yet
        self.waiting = WaitingQueue(throughput, limits.max_running, clock)
        self.running: list[Task] = []
        self.paused: list[Task] = []
        self.commands = CommandQueue()
        self.draining = False  # no more reservations
        self.stopped = False  # no more tasks and commands, and the compute thread ends
        self._on_place_freed = on_place_freed

    @property
    def queued(self) -> int:
        """The number of jobs that wait, or whose images are still being decoded."""
        with self.lock:
            return len(self.reservations) + len(self.waiting)

    @property
    def active(self) -> int:
        """The number of jobs that a drain waits for: reserved, waiting and running ones."""
        with self.lock:
            return len(self.reservations) + len(self.waiting) + len(self.running)

    @property
    def occupied_places(self) -> int:
        """The number of all jobs, active and paused ones. Each occupies a place."""
        with self.lock:
            return self.active + len(self.paused)

    def places_of(self, owner: str) -> int:
        """How many of these places an owner has."""
        with self.lock:
            return sum(each.owner == owner for each in (*self.reservations, *self.waiting, *self.running, *self.paused))

    @property
    def away(self) -> list[Task]:
        """The paused tasks, and those waiting ones that have run before: their states have left the device."""
        with self.lock:
            return [*self.paused, *(task for task in self.waiting if task.last_report is not None)]

    @property
    def places_taken(self) -> int:
        """How many of the ``max_running`` places are taken: running jobs, but not those that wait for memory."""
        with self.lock:
            return sum(not task.memory_short for task in self.running)

    def find(self, observer: JobObserver) -> Task:
        """The task of a job. Raises `InvalidRequest` if it has ended, or is not in the table."""
        with self.lock:
            tasks: tuple[Task, ...] = (*self.running, *self.waiting, *self.paused)
            found = next((task for task in tasks if task.observer is observer and not task.ended), None)
        if found is None:
            raise InvalidRequest([Violation("", "the job has ended, or its images are still being decoded")])
        return found

    def next_command(self) -> PendingCommand | None:
        """Takes the command that is to be executed now out of the table; None if there is none."""
        with self.lock:
            return self.commands.take(jobs_run=bool(self.running))

    def remove_command(self, pending: PendingCommand) -> None:
        """Removes a command for whose outcome nobody waits any more, if it was not taken before."""
        with self.lock:
            self.commands.remove(pending)

    def release(self, reservation: Reservation) -> None:
        """Gives back the place of a reservation, if it was not used or released before."""
        with self.lock:
            if reservation not in self.reservations:
                return
            self.reservations.remove(reservation)
            self.waiting.forget(reservation)
            self._on_place_freed()

    def use(self, reservation: Reservation) -> Expected | None:
        """Removes a reservation, whose task takes its place, and returns what was expected of it."""
        with self.lock:
            self.reservations.remove(reservation)
            return self.waiting.forget(reservation)

    def withdraw(self, observer: JobObserver) -> None:
        """Removes a job that waits or is paused."""
        with self.lock:
            groups = (self.waiting, self.paused)
            found = [(group, task) for group in groups for task in group if task.observer is observer]
            for group, task in found:
                group.remove(task)
                self.waiting.record_end(task)
            self.waiting.report_positions(self.running)
            if found:
                self._on_place_freed()

    def remove_ended(self) -> None:
        """Removes all tasks that have ended."""
        with self.lock:
            groups = (self.running, self.waiting, self.paused)
            ended = [(group, task) for group in groups for task in group if task.ended]
            for group, task in ended:
                group.remove(task)
                self.waiting.record_end(task)
            if ended:
                self._on_place_freed()

    def start(self, task: Task) -> None:
        """Moves a waiting task to the running ones."""
        with self.lock:
            self.waiting.remove(task)
            self.running.append(task)

    def put_back(self, task: Task) -> None:
        """Moves a running task back to the waiting ones, unless it has ended, or must end at the next step."""
        with self.lock:
            if not task.ended and not task.observer.cancelled:
                self.running.remove(task)
                self.waiting.put_back(task, self.running)

    def pause(self, task: Task, until: float) -> bool:
        """Moves a waiting or running task to the paused ones. Returns False if it was withdrawn or cancelled: a
        cancelled task must end at the next step, which does not look at paused tasks."""
        with self.lock:
            group = self.running if task in self.running else self.waiting
            if task not in group or task.observer.cancelled:
                return False
            group.remove(task)
            task.paused_until = until
            self.paused.append(task)
            self._on_place_freed()  # a drain does not wait for paused jobs
            return True

    def resume(self, task: Task) -> bool:
        """Moves a paused task back to the waiting ones. Returns False if it is not paused."""
        with self.lock:
            if task not in self.paused:
                return False
            self.paused.remove(task)
            self.waiting.resume(task)
            return True

    def stop(self) -> None:
        """Sets `stopped`, and wakes the compute thread."""
        with self.lock:
            self.draining = self.stopped = True
            self.lock.notify()
