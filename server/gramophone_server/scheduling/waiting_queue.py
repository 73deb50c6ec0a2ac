"""Those who wait to begin: in which order, for how long by what was measured, and what they are told of it."""

from __future__ import annotations

import bisect
import time
from collections.abc import Iterable, Iterator, Sequence

from gramophone_server.domain.events import Accepted, Waiting
from gramophone_server.domain.job_state import Shape
from gramophone_server.errors import DeadlineUnattainable
from gramophone_server.scheduling.reservation import Reservation
from gramophone_server.scheduling.throughput import Forecast, ThroughputModel, forecast
from gramophone_server.scheduling.worker import Task

__all__ = ["WaitingQueue"]

GUESSED_S = 5.0  # until the first iteration of this process has been measured
TOLD_EVERY_S = 0.1  # nobody reads faster, and a thousand who wait need not hear of each of 300 jobs a second


class WaitingQueue:
    """Tasks in the order in which they must begin, to be done in time. Belongs to whoever holds the scheduler's lock.

    ``running``, where it is asked for, are those that are worked on; up to ``most_running`` are.
    """

    def __init__(self, pace: ThroughputModel, most_running: int) -> None:
        self._pace, self._most_running = pace, most_running
        self._tasks: list[Task] = []
        self._coming: dict[
            Reservation, float
        ] = {}  # whose images are being decoded: seconds of the device that each will need
        self._changed = False  # since they were told their places
        self._told_at = -TOLD_EVERY_S

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, task: Task) -> int:
        """Puts a task behind all that must begin before it; returns its index."""
        index = bisect.bisect(self._tasks, task.must_begin_at, key=lambda other: other.must_begin_at)
        self._tasks.insert(index, task)
        self._changed |= index + 1 < len(self._tasks)
        return index

    def resume(self, task: Task) -> None:
        """Adds one that was here before."""
        self.add(task)
        self._changed = True  # it has not heard of its place, as who is accepted has

    def accept(self, task: Task, running: Sequence[Task]) -> None:
        """Adds one that has just come, and tells it so."""
        index = self.add(task)
        task.listener.publish(Accepted(*self._outlook(running)[index]))
        self.tell(running)

    def remove(self, task: Task) -> None:
        """It waits no longer."""
        self._tasks.remove(task)
        self._changed = bool(self._tasks)

    def tell(self, running: Sequence[Task], now: float | None = None) -> None:
        """Their places to all who wait, if those have changed and the last time is long enough ago."""
        now = time.monotonic() if now is None else now
        if not self._changed or now < self._told_at + TOLD_EVERY_S:
            return
        self._changed, self._told_at = False, now
        for task, (position, wait_s) in zip(self._tasks, self._outlook(running), strict=True):
            if position:
                task.listener.publish(Waiting(position, wait_s))

    def expect(
        self,
        reservation: Reservation,
        running: Sequence[Task],
        pixels: int,
        shape: Shape,
        time_budget: float,
        left_s: float,
    ) -> None:
        """Includes the job of a reservation in forecasts until `forget`; see `Scheduler.require_time`, whose error it raises."""
        each_s = self._pace.job_s(shape)
        if each_s is None:
            return
        need_s = run_s = pixels * each_s / (shape.width * shape.height)
        seen = self.forecast(running, run_s)
        wait_s, end_s = (0.0, run_s) if seen is None else (seen.begins[-1], seen.end)
        if time_budget:
            run_s, end_s = min(run_s, time_budget), min(end_s, max(time_budget, wait_s))
        if end_s > left_s:
            raise DeadlineUnattainable(wait_s, max(run_s, end_s - wait_s), left_s)
        self._coming[reservation] = need_s

    def forget(self, reservation: Reservation) -> None:
        """The job has come, or will not."""
        self._coming.pop(reservation, None)

    def forecast(self, running: Sequence[Task], own_s: float = 0.0) -> Forecast | None:
        """For one who comes now and needs ``own_s`` seconds of the device, behind those who wait or are expected; None while
        nothing was measured."""
        return self._forecast(running, self._coming.values(), own_s)

    def next_place_s(self, running: Sequence[Task]) -> float:
        """Seconds until one of them ends, a second at least."""
        left = [task.left_s for task in running if task.left_s is not None]
        return max(1.0, min(left) * len(running)) if left else GUESSED_S  # they share the device

    def _forecast(self, running: Sequence[Task], coming: Iterable[float], own_s: float) -> Forecast | None:
        for task in (*running, *self._tasks):
            if task.left_s is None:  # it came before anything was measured
                task.left_s = self._pace.left_s(task.work)
        left = [task.left_s for task in running if task.left_s is not None]
        ahead = [task.left_s for task in self._tasks if task.left_s is not None]
        if len(left) < len(running) or len(ahead) < len(self._tasks):
            return None
        return forecast(left, (*ahead, *coming), own_s, self._most_running)

    def _outlook(self, running: Sequence[Task]) -> list[tuple[int, float | None]]:
        """Of each who waits: the place, 0 for who will begin at once, and seconds until it begins."""
        room = max(0, self._most_running - len(running))
        positions = [max(0, index + 1 - room) for index in range(len(self._tasks))]
        seen = self._forecast(running, (), 0.0) if positions else None
        begins = seen.begins[:-1] if seen is not None else (None,) * len(positions)
        return list(zip(positions, begins, strict=True))
