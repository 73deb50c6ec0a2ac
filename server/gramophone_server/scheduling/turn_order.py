"""Whose turn is next: by their shares of the device, unless a deadline or a time budget would end in the meantime."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from gramophone_server.scheduling.fair_share import DeviceShares
from gramophone_server.scheduling.task import PooledBatch, Task
from gramophone_server.scheduling.throughput import ThroughputModel
from gramophone_server.scheduling.urgency import Urgency

__all__ = ["SLICE_S", "TurnOrder"]

# Length of a slice, if an iteration is not longer. Cancelling a job takes no longer than that, and the host waits for
# the GPU (30 us, for an iteration of 0.4 ms at 256 px) once per slice instead of after every iteration. A switch to
# another batch costs nothing, so longer slices gain nothing.
SLICE_S = 0.02


class TurnOrder:
    """Chooses among the jobs that can have a turn. Belongs to the compute thread.

    ``finish_within_budget`` ends a job whose time budget is used up, with its current picture if it has one.
    """

    def __init__(
        self,
        shares: DeviceShares[Task],
        throughput: ThroughputModel,
        finish_within_budget: Callable[[Task], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._shares, self._throughput, self._clock = shares, throughput, clock
        self._finish_within_budget = finish_within_budget
        self._urgency = Urgency()

    def next(self, ready: Iterable[Task]) -> Task | None:
        """The job of ``ready`` that would have had the least device time after its turn, see `DeviceShares.next`; or
        one whose deadline needs the turn, see `Urgency`. If that turn would last beyond the time budget of a job in
        another batch, that one goes first, unless the other has been idle for longer than its turn takes. A job whose
        budget does not last until its next picture ends now."""
        turns = self._turns(ready)
        while (task := self._shares.next(turns)) is not None:
            now = self._clock()
            task = self._urgency.first(turns, task, now, self._whole_turn_s(task, turns))
            batch = task.batch
            turn_s = self._whole_turn_s(task, turns)
            idle_since = task.idle_since if batch is None else batch.idle_since
            urgent = [t for t in turns if t.batch and t.budget_ends_at < now + max(turn_s, SLICE_S)]
            elsewhere = [other for other in urgent if other.batch is not batch]
            if elsewhere and now < idle_since + turn_s:
                return min(elsewhere, key=lambda other: other.budget_ends_at)
            iteration_s = 0.0 if batch is None else self._iteration_s(batch)
            for other in urgent:
                if other in elsewhere or other.budget_ends_at < now + iteration_s:
                    self._finish_within_budget(other)
                    if other.ended:
                        del turns[other]
            if task in turns:
                return task
        return None

    @property
    def credit_s(self) -> float:
        """Seconds that urgent jobs may take at once now; see `Urgency`. Thread-safe."""
        return self._urgency.credit_s

    def charge(self, seconds: float) -> None:
        """Counts the turn that `next` has chosen."""
        self._urgency.charge(seconds)

    def _turns(self, ready: Iterable[Task]) -> dict[Task, float]:
        """For each job the estimated seconds of its next turn that are charged to it; 0 if nothing was measured."""
        turns, of_batches = {}, dict[PooledBatch, float]()
        for task in ready:
            batch = task.batch
            if batch is None:
                turns[task] = self._beginning_s(task)
            else:
                if batch not in of_batches:
                    of_batches[batch] = self._slice_s(batch) / len(batch.tasks)
                turns[task] = of_batches[batch]
        return turns

    def _whole_turn_s(self, task: Task, turns: Mapping[Task, float]) -> float:
        """Estimated seconds of a job's next turn."""
        return turns[task] * (1 if task.batch is None else len(task.batch.tasks))

    def _beginning_s(self, task: Task) -> float:
        assert task.beginning is not None, "`BatchPool.plan` has set it"
        if pixels := task.beginning.next_pixels:
            return self._throughput.turn_s("step", pixels)
        return self._throughput.turn_s("join", task.state.shape.width * task.state.shape.height)

    def _slice_s(self, batch: PooledBatch) -> float:
        return max(self._iteration_s(batch), SLICE_S)

    def _iteration_s(self, batch: PooledBatch) -> float:
        return self._throughput.batch_seconds_per_iteration(batch.shape, batch.slots) or 0.0
