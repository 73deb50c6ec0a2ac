"""The waiting queue: order, estimated wait, position updates, and which deadlines are accepted."""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gramophone_server.domain.events import Accepted, Waiting
from gramophone_server.domain.job_state import JobState, Shape
from gramophone_server.errors import DeadlineUnattainable
from gramophone_server.scheduling.arrivals import Arrivals
from gramophone_server.scheduling.forecast import (
    PROMISE_RESERVE,
    TURN_S,
    Forecast,
    Forecaster,
    Promise,
    Work,
    broken_promise,
    even_sharing,
    needs_promise,
    sharing_by_owners,
)
from gramophone_server.scheduling.place_turns import Claims
from gramophone_server.scheduling.reservation import Reservation
from gramophone_server.scheduling.task import Task
from gramophone_server.scheduling.throughput import ThroughputModel

__all__ = ["MAX_PROMISED_S", "PROBE_AFTER_REFUSALS", "PROBE_AFTER_S", "REPORT_INTERVAL_S", "Expected", "WaitingQueue"]

DEFAULT_RETRY_S = 5.0  # until the first iteration of this process has been measured
# No client reads faster, and a thousand waiting jobs need no update for each of 300 jobs that start in a second.
REPORT_INTERVAL_S = 0.1
# Of the jobs that would be refused, one is accepted if nothing was measured for so many seconds, or after so many
# refusals if its own size was not measured: its iterations show whether the refusals are right.
PROBE_AFTER_S, PROBE_AFTER_REFUSALS = 30.0, 200
# Of its time under even sharing, a job can be sure of this one if its deadline is promised: others run after it then.
EVEN_TOLERANCE = 0.85
# Device seconds that are promised to one owner, for all its deadlines together. Beside many others, who come later, it
# has them within 375 s, with four fifths of the device. Without this, a deadline of days left others a fifth for days.
MAX_PROMISED_S = 300.0
# From the response to its client.
TRANSIT_S = 0.003


@dataclass(frozen=True)
class Expected:
    """A job whose images are being decoded."""

    owner: str
    work: Work | None
    deadline_at: float  # when its last iteration must end; inf: whenever, or nothing is promised
    has_promise: bool  # see `needs_promise`
    shape: Shape


class _Asked(NamedTuple):
    """A deadline that is asked for, and the least seconds of what the job needs besides the device."""

    owner: str
    state: JobState
    left_s: float
    decoding_s: float
    delivery_s: float
    credit_s: float
    can_be_promised: bool  # else it has its even share

    @property
    def ends_in_s(self) -> float:
        """When its last iteration must end."""
        return self.left_s - self.delivery_s


class _Job(NamedTuple):
    owner: str
    work: Work | None
    promised_at: float  # its deadline, if others must leave it time for that; else inf
    shape: Shape


class WaitingQueue:
    """The waiting tasks, in the order of `Task.latest_start_at`; among equals in the order of arrival.

    Guarded by the lock of the `TaskTable`. The parameter ``running`` of its methods has the running tasks, of which
    there are at most ``max_running``.
    """

    def __init__(
        self, throughput: ThroughputModel, max_running: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.probes = 0  # jobs that were accepted although they should be late
        self._throughput, self._forecaster = throughput, Forecaster(throughput)
        self._max_running, self._clock = max_running, clock
        self._tasks: list[Task] = []
        self._expected: dict[Reservation, Expected] = {}
        self._positions_changed = False  # since the last report
        self._next_report_at = 0.0
        self._probed_at = -math.inf
        self._refused_since_probe = 0
        self._arrivals = Arrivals()

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def accept(self, task: Task, running: Sequence[Task]) -> None:
        """Adds a new task and publishes `Accepted` to it."""
        self._estimate(running)
        task.remaining = self._work(task, self._jobs_of(task.last_shape, running) + 1)
        index = self._insert(task)
        task.came_at = self._clock()
        self._arrivals.came(task.came_at)
        task.observer.publish(Accepted(*self._outlook(running)[index]))
        self.report_positions(running)

    def resume(self, task: Task) -> None:
        """Adds a task whose pause has ended. The next report includes its position."""
        self._insert(task)
        self._positions_changed = True

    def put_back(self, task: Task, running: Sequence[Task]) -> None:
        """Adds a task that has given its place up, and publishes `Waiting` to it."""
        # Its batch may have another width when it returns.
        task.remaining = self._work(task, self._jobs_of(task.last_shape, running) + 1) or task.remaining
        index = self._insert(task)
        position, wait_s = self._outlook(running)[index]
        task.observer.publish(Waiting(max(1, position), wait_s))

    def remove(self, task: Task) -> None:
        """Removes a task. Raises `ValueError` if it does not wait."""
        self._tasks.remove(task)
        self._positions_changed = bool(self._tasks)

    def record_end(self, task: Task) -> None:
        """A task has ended, in whatever way."""
        self._arrivals.ended(task, self._clock())

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

    # Deadlines --------------------------------------------------------------------------------------------------------

    def expect(
        self,
        reservation: Reservation,
        running: Sequence[Task],
        state: JobState,
        left_s: float,
        image_pixels: int,
        result_kind: str,
        owner: str,
        credit_s: float,
    ) -> None:
        """Includes the job of a reservation in forecasts until `forget`. ``credit_s``: seconds that urgent jobs may
        take at once now. Other parameters, and the error: see `Scheduler.require_time`."""
        now, shape = self._clock(), state.shapes[-1]
        jobs = self._jobs_of(shape, running) + 1
        self._estimate(running)
        result_pixels, is_probe = shape.width * shape.height, False
        budget_s = state.recipe.time_budget or math.inf
        work = self._forecaster.work(state, jobs, budget_s=budget_s)
        needed_s = min(budget_s, left_s, math.inf if work is None else work.share_s)
        can_be_promised = self._promised_s(running, owner, now) + needed_s <= MAX_PROMISED_S
        if left_s < math.inf:
            least = self._forecaster.least(state, jobs)
            decoding_s = self._forecaster.least_decoding_s(image_pixels)
            least_delivery_s = self._forecaster.least_delivery_s(result_kind, result_pixels) + TRANSIT_S
            asked = _Asked(owner, state, left_s, decoding_s, least_delivery_s, credit_s, can_be_promised)
            error = self._late(running, asked, least)
            if error is not None:
                if not self._may_probe(least, shape, now):
                    self._refused_since_probe += 1
                    raise error
                self.probes += 1
                self._probed_at, self._refused_since_probe, is_probe = now, 0, True
        delivery_s = self._forecaster.delivery_s(result_kind, result_pixels) + TRANSIT_S
        deadline_at = now + left_s - delivery_s if can_be_promised and not is_probe else math.inf
        has_promise = needs_promise(deadline_at, now + budget_s)
        self._expected[reservation] = Expected(owner, work, deadline_at, has_promise, shape)

    def forget(self, reservation: Reservation) -> Expected | None:
        """Removes the job of a reservation from forecasts, and returns what was expected of it."""
        return self._expected.pop(reservation, None)

    def _late(self, running: Sequence[Task], asked: _Asked, least: Work) -> DeadlineUnattainable | None:
        """The reason to refuse a job: even if all takes the ``least`` time that the measurements allow, it ends late,
        or another one does whose deadline was promised. None if it can be accepted."""
        if not least.low_share_s:
            return None  # nothing was measured near by
        now, state, ends_in_s = self._clock(), asked.state, asked.ends_in_s
        budget_s, alone_s = state.recipe.time_budget or math.inf, least.low_alone_s
        until_turn_s = TURN_S / 2 if running else 0.0
        others_s = self._arrivals.interruptions_s(alone_s, asked.credit_s, (*running, *self._tasks), now)
        if self.time_is_ample(running, now, ends_in_s, asked.decoding_s + until_turn_s + least.alone_s + others_s):
            return None
        wait_s, shared_end_s = self._outcome(running, asked.owner, now + ends_in_s, least)
        tolerance = EVEN_TOLERANCE if asked.can_be_promised else 1.0
        run_s = max(alone_s + others_s, tolerance * shared_end_s - wait_s)
        wait_s += until_turn_s
        # A time budget ends a job at its last iteration within it, but lets it have one.
        first_s = alone_s / max(1, state.iterations - state.done)
        run_s = min(run_s, max(budget_s - first_s - wait_s, first_s))
        if asked.decoding_s + wait_s + run_s > ends_in_s:
            own_s = min(run_s, alone_s)
            return DeadlineUnattainable(
                wait_s,
                own_s,
                asked.left_s,
                decoding_s=asked.decoding_s,
                others_s=run_s - own_s,
                delivery_s=asked.delivery_s,
                measured=least.measured,
                spread=least.spread,
            )
        if not asked.can_be_promised or not needs_promise(ends_in_s, asked.decoding_s + budget_s):
            return None  # it takes no time from others, or ends in time whoever has the device
        jobs = [job for job in self._jobs(running) if job.work is not None]
        promises = [
            Promise(job.promised_at - now, job.work.share_s, job.work.alone_s, job.shape)
            for job in jobs
            if job.work is not None and job.promised_at < math.inf
        ]
        unpromised_s = sum(job.work.share_s for job in jobs if job.work is not None and job.promised_at == math.inf)
        within_budget = least.within(budget_s)
        own = Promise(ends_in_s, within_budget.low_share_s, within_budget.low_alone_s, state.shapes[-1])
        late_s = broken_promise(promises, unpromised_s, own, asked.credit_s)
        if late_s is None:
            return None
        promised_s = sum(promise.work_s for promise in promises)
        return DeadlineUnattainable(
            late_s, own.alone_s, asked.left_s, measured=least.measured, spread=least.spread, promised_s=promised_s
        )

    def time_is_ample(self, running: Sequence[Task], now: float, ends_in_s: float, own_s: float) -> bool:
        """Whether this job and all others would meet their deadlines even one after another, in whatever order. Then
        no closer look is needed, which takes 0.4 ms beside 60 jobs."""
        needed_s, first_at = own_s, now + ends_in_s
        for task in (*running, *self._tasks):
            needed_s += 0.0 if task.remaining is None else task.remaining.alone_s
            first_at = min(first_at, task.deadline_at)
        for job in self._expected.values():
            needed_s += 0.0 if job.work is None else job.work.alone_s
            first_at = min(first_at, job.deadline_at)
        return needed_s <= (1 - PROMISE_RESERVE) * (first_at - now)

    def _may_probe(self, least: Work, shape: Shape, now: float) -> bool:
        is_old = least.age_s >= PROBE_AFTER_S and now >= self._probed_at + PROBE_AFTER_S
        is_by_neighbours = not self._throughput.was_measured(shape)
        return is_old or (is_by_neighbours and self._refused_since_probe >= PROBE_AFTER_REFUSALS)

    # Forecasts --------------------------------------------------------------------------------------------------------

    def forecast(self, running: Sequence[Task]) -> Forecast | None:
        """The forecast for a job that arrives now, after all waiting and expected ones. None if the speed of one of
        them was not measured."""
        self._estimate(running)
        works = [task.remaining for task in self._tasks] + [expected.work for expected in self._expected.values()]
        return self._forecast(running, works)

    def retry_after_s(self, running: Sequence[Task]) -> float:
        """Estimated seconds until a running job ends; at least one second."""
        remaining = [task.remaining.share_s for task in running if task.remaining is not None]
        # The jobs share the device.
        return max(1.0, min(remaining) * len(running)) if remaining else DEFAULT_RETRY_S

    def _insert(self, task: Task) -> int:
        index = bisect.bisect(self._tasks, task.latest_start_at, key=_latest_start_at)
        self._tasks.insert(index, task)
        self._positions_changed |= index + 1 < len(self._tasks)
        return index

    def _estimate(self, running: Sequence[Task]) -> None:
        """Estimates the tasks that arrived before a speed near theirs was measured, and orders the queue by that."""
        unknown = [task for task in (*running, *self._tasks) if task.remaining is None]
        for task in unknown:
            task.remaining = self._work(task)
        if any(task.remaining is not None for task in unknown):
            before = list(self._tasks)
            self._tasks.sort(key=_latest_start_at)
            self._positions_changed |= before != self._tasks

    def _work(self, task: Task, jobs: int = 1) -> Work | None:
        """What a task in the queue needs."""
        return self._forecaster.work(task.state, jobs, budget_s=task.budget_ends_at - self._clock())

    def _jobs_of(self, shape: Shape, running: Sequence[Task]) -> int:
        """How many jobs of a shape run or will run."""
        count = sum(task.last_shape == shape for task in (*running, *self._tasks))
        return min(self._max_running, count + sum(job.shape == shape for job in self._expected.values()))

    def _jobs(self, running: Sequence[Task]) -> list[_Job]:
        """All jobs, as far as promises are concerned."""
        jobs = [
            _Job(task.owner, task.remaining, task.deadline_at if task.has_promise else math.inf, task.last_shape)
            for task in (*running, *self._tasks)
        ]
        return jobs + [
            _Job(job.owner, job.work, job.deadline_at if job.has_promise else math.inf, job.shape)
            for job in self._expected.values()
        ]

    def _promised_s(self, running: Sequence[Task], owner: str, now: float) -> float:
        """Device seconds that are promised to an owner; at most those until the deadline, if they are not known."""
        promised = [job for job in self._jobs(running) if job.owner == owner and job.promised_at < math.inf]
        return sum(max(0.0, job.promised_at - now) if job.work is None else job.work.share_s for job in promised)

    def _outcome(self, running: Sequence[Task], owner: str, must_end_at: float, own: Work) -> tuple[float, float]:
        """The least seconds until a job that must end then starts, and until it ends, by even sharing."""

        def seconds(work: Work | None) -> float:
            return 0.0 if work is None else work.low_share_s

        latest_start_at = must_end_at - own.low_share_s
        before = [
            (task.owner, seconds(task.remaining)) for task in self._tasks if task.latest_start_at <= latest_start_at
        ]
        before += [(job.owner, seconds(job.work)) for job in self._expected.values()]
        with_place = [(task.owner, seconds(task.remaining)) for task in running]
        by_jobs = even_sharing(
            [other_s for _, other_s in with_place],
            [other_s for _, other_s in before],
            own.low_share_s,
            self._max_running,
        )
        wait_s = by_jobs.starts[-1]
        if wait_s:
            claims = Claims(running, self._clock())
            for other, _ in before:
                claims.take(other)
            wait_s = 0.0 if claims.take(owner) else min(wait_s, claims.wait_s(owner))
        end_s = wait_s + sharing_by_owners((*with_place, *before), own.low_share_s, owner)
        if wait_s:  # the others have had a part of that by then
            end_s = min(end_s, by_jobs.end)
        return wait_s, max(end_s, wait_s + own.low_alone_s)

    def _forecast(self, running: Sequence[Task], waiting: Sequence[Work | None]) -> Forecast | None:
        """None if a job that arrives now must wait, and the speed of one of the others is not known."""
        works = [task.remaining for task in running]
        if len(works) + len(waiting) < self._max_running:
            return Forecast((0.0,) * (len(waiting) + 1), 0.0)
        if any(work is None for work in (*works, *waiting)):
            return None
        running_s, waiting_s = ([work.share_s for work in group if work is not None] for group in (works, waiting))
        return even_sharing(running_s, waiting_s, 0.0, self._max_running)

    def _outlook(self, running: Sequence[Task]) -> list[tuple[int, float | None]]:
        """For each waiting task: its position, 0 if it will start at once, and the seconds until it starts. None for
        those that wait for memory: how long the jobs that have it stay is not forecast."""
        free = max(0, self._max_running - sum(not task.memory_short for task in running))
        short_since = [task.memory_short_since for task in self._tasks]
        # They get it in the order in which they came to wait for it, together with running jobs that have left it.
        turns = sorted(since for since in (*short_since, *(t.memory_short_since for t in running)) if since is not None)
        predicted = self._forecast(running, [task.remaining for task in self._tasks]) if self._tasks else None
        starts = predicted.starts[:-1] if predicted is not None else (None,) * len(self._tasks)
        claims = Claims(running, self._clock())
        outlook: list[tuple[int, float | None]] = []
        for index, (since, start) in enumerate(zip(short_since, starts, strict=True)):
            position = max(0, index + 1 - free)
            if since is not None:  # it does not start at once, though a place is free
                outlook.append((max(position, bisect.bisect_left(turns, since) + 1), None))
            elif not position or claims.take(owner := self._tasks[index].owner):
                outlook.append((0, 0.0))
            else:
                outlook.append((position, None if start is None else min(start, claims.wait_s(owner))))
        return outlook


def _latest_start_at(task: Task) -> float:
    return task.latest_start_at
