"""The waiting queue: order, estimated wait, and position updates."""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from gramophone_server.domain.events import Accepted, Waiting
from gramophone_server.domain.job_state import Shape
from gramophone_server.errors import DeadlineUnattainable
from gramophone_server.scheduling.reservation import Reservation
from gramophone_server.scheduling.task import Task
from gramophone_server.scheduling.throughput import Forecast, ThroughputModel, forecast

__all__ = ["REPORT_INTERVAL_S", "WaitingQueue"]

DEFAULT_RETRY_S = 5.0  # until the first iteration of this process has been measured
# No client reads faster, and a thousand waiting jobs need no update for each of 300 jobs that start in a second.
REPORT_INTERVAL_S = 0.1


class WaitingQueue:
    """The waiting tasks, in the order of `Task.latest_start_at`; among equals in the order of arrival.

    Guarded by the lock of the `TaskTable`. The parameter ``running`` of its methods has the running tasks, of which
    there are at most ``max_running``.
    """

    def __init__(
        self, throughput: ThroughputModel, max_running: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._throughput, self._max_running, self._clock = throughput, max_running, clock
        self._tasks: list[Task] = []
        # For each job whose images are still being decoded, the device seconds that it needs.
        self._expected: dict[Reservation, float] = {}
        self._positions_changed = False  # since the last report
        self._next_report_at = 0.0

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def accept(self, task: Task, running: Sequence[Task]) -> None:
        """Adds a new task and publishes `Accepted` to it."""
        index = self._insert(task)
        task.observer.publish(Accepted(*self._outlook(running)[index]))
        self.report_positions(running)

    def resume(self, task: Task) -> None:
        """Adds a task whose pause has ended. The next report includes its position."""
        self._insert(task)
        self._positions_changed = True

    def remove(self, task: Task) -> None:
        """Removes a task. Raises `ValueError` if it does not wait."""
        self._tasks.remove(task)
        self._positions_changed = bool(self._tasks)

    def report_positions(self, running: Sequence[Task]) -> None:
        """Publishes `Waiting` to the waiting tasks, if a position has changed and the last report is at least
        `REPORT_INTERVAL_S` ago. A task that will start next receives none."""
        now = self._clock()
        if not self._positions_changed or now < self._next_report_at:
            return
        self._positions_changed, self._next_report_at = False, now + REPORT_INTERVAL_S
        for task, (position, wait_s) in zip(self._tasks, self._outlook(running), strict=True):
            if position:
                task.observer.publish(Waiting(position, wait_s))

    def expect(
        self,
        reservation: Reservation,
        running: Sequence[Task],
        pixel_iterations: int,
        shape: Shape,
        time_budget: float,
        left_s: float,
    ) -> None:
        """Includes the job of a reservation in forecasts until `forget`. Parameters and error: see
        `Scheduler.require_time`."""
        iteration_s = self._throughput.seconds_per_iteration(shape)
        if iteration_s is None:
            return
        device_s = run_s = pixel_iterations * iteration_s / (shape.width * shape.height)
        predicted = self.forecast(running, run_s)
        wait_s, end_s = (0.0, run_s) if predicted is None else (predicted.starts[-1], predicted.end)
        if time_budget:
            run_s, end_s = min(run_s, time_budget), min(end_s, max(time_budget, wait_s))
        if end_s > left_s:
            raise DeadlineUnattainable(wait_s, max(run_s, end_s - wait_s), left_s)
        self._expected[reservation] = device_s

    def forget(self, reservation: Reservation) -> None:
        """Removes the job of a reservation, which was used or released, from forecasts."""
        self._expected.pop(reservation, None)

    def forecast(self, running: Sequence[Task], own_s: float = 0.0) -> Forecast | None:
        """The forecast for a job that arrives now, after all waiting and expected ones, and needs ``own_s`` device
        seconds. None until a speed has been measured."""
        return self._forecast(running, self._expected.values(), own_s)

    def retry_after_s(self, running: Sequence[Task]) -> float:
        """Estimated seconds until a running job ends; at least one second."""
        remaining = [task.remaining_s for task in running if task.remaining_s is not None]
        # The jobs share the device.
        return max(1.0, min(remaining) * len(running)) if remaining else DEFAULT_RETRY_S

    def _insert(self, task: Task) -> int:
        index = bisect.bisect(self._tasks, task.latest_start_at, key=lambda other: other.latest_start_at)
        self._tasks.insert(index, task)
        self._positions_changed |= index + 1 < len(self._tasks)
        return index

    def _forecast(self, running: Sequence[Task], expected: Iterable[float], own_s: float) -> Forecast | None:
        for task in (*running, *self._tasks):
            if task.remaining_s is None:  # it arrived before a speed was measured
                task.remaining_s = self._throughput.remaining_seconds(task.state)
        running_s = [task.remaining_s for task in running if task.remaining_s is not None]
        waiting_s = [task.remaining_s for task in self._tasks if task.remaining_s is not None]
        if len(running_s) < len(running) or len(waiting_s) < len(self._tasks):
            return None
        return forecast(running_s, (*waiting_s, *expected), own_s, self._max_running)

    def _outlook(self, running: Sequence[Task]) -> list[tuple[int, float | None]]:
        """For each waiting task: its position, 0 if it will start at once, and the seconds until it starts."""
        free = max(0, self._max_running - sum(not task.memory_short for task in running))
        # A job that waits for memory does not start at once, though a place is free.
        positions = [max(int(task.memory_short), index + 1 - free) for index, task in enumerate(self._tasks)]
        predicted = self._forecast(running, (), 0.0) if positions else None
        starts = predicted.starts[:-1] if predicted is not None else (None,) * len(positions)
        return list(zip(positions, starts, strict=True))
