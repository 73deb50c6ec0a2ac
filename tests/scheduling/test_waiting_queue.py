import math

import pytest

from gramophone_server.domain.events import Accepted, Waiting
from gramophone_server.scheduling.task import Task
from gramophone_server.scheduling.throughput import ThroughputModel
from gramophone_server.scheduling.waiting_queue import REPORT_INTERVAL_S, WaitingQueue
from tests.support.clock import ManualClock
from tests.support.specs import job_state


class Recorder(list):
    """An observer that records its events."""

    def publish(self, event):
        self.append(event)


def waiting(latest_start_at=math.inf, remaining_s=None, iterations=10):
    return Task(
        state=job_state(iterations), observer=Recorder(), latest_start_at=latest_start_at, remaining_s=remaining_s
    )


def test_jobs_are_in_the_order_of_their_latest_starts_and_equals_in_that_of_arrival():
    queue = WaitingQueue(ThroughputModel(), 1)
    last, first, second, third = (waiting(at) for at in (math.inf, 1.0, 2.0, 2.0))
    for task in (last, first, second, third):
        queue.accept(task, [])
    assert list(queue) == [first, second, third, last]


def test_position_and_wait_are_those_of_even_sharing():
    """Two jobs run, and need 1 s and 3 s of the device: the first place is free after 2 s, the next after 4 s and, as
    the jobs that have started then need 1 s and 5 s, another after 6 s."""
    queue = WaitingQueue(ThroughputModel(), 2)
    running = [waiting(remaining_s=1.0), waiting(remaining_s=3.0)]
    first, second = waiting(remaining_s=1.0), waiting(remaining_s=5.0)
    queue.accept(first, running)
    queue.accept(second, running)
    assert first.observer == [Accepted(1, 2.0)]
    assert second.observer == [Accepted(2, 4.0)]
    assert queue.forecast(running).starts == (2.0, 4.0, 6.0)


def test_a_job_that_starts_at_once_has_position_0():
    queue = WaitingQueue(ThroughputModel(), 2)
    first, second = waiting(), waiting()
    for task in (first, second):
        queue.accept(task, [waiting()])
    assert first.observer == [Accepted(0, None)]
    assert second.observer == [Accepted(1, None)]


def test_a_job_that_came_before_the_first_measurement_is_in_later_forecasts():
    model = ThroughputModel()
    queue = WaitingQueue(model, 1)
    early = waiting(iterations=10)
    queue.accept(early, [])
    assert queue.forecast([]) is None
    model.record(early.state.shape, 1, 1, 0.5)
    assert queue.forecast([]).starts == (0.0, 5.0)


def test_a_resumed_job_receives_its_position():
    queue = WaitingQueue(ThroughputModel(), 1, ManualClock())
    task = waiting()
    queue.resume(task)
    queue.report_positions([waiting()])
    assert task.observer == [Waiting(1, None)]


def test_new_positions_are_reported_once_in_an_interval():
    clock = ManualClock(100.0)
    queue = WaitingQueue(ThroughputModel(), 1, clock)
    tasks = [waiting() for _ in range(5)]
    running = [waiting()]
    for task in tasks:
        queue.accept(task, running)
    last = tasks[-1].observer
    for task, after_s in zip(tasks[:4], (0.0, REPORT_INTERVAL_S / 2, REPORT_INTERVAL_S / 2, 200.0), strict=True):
        clock.advance(after_s)
        queue.remove(task)
        queue.report_positions(running)
        queue.report_positions(running)
    assert last == [Accepted(5, None), Waiting(4, None), Waiting(2, None), Waiting(1, None)]


def test_a_job_that_joins_at_the_end_moves_no_other():
    queue = WaitingQueue(ThroughputModel(), 1)
    first, second, urgent = waiting(5.0), waiting(5.0), waiting(1.0)
    for task in (first, second, urgent):
        queue.accept(task, [waiting()])
    assert first.observer == [Accepted(1, None), Waiting(2, None)]
    assert second.observer == [Accepted(2, None), Waiting(3, None)]
    assert urgent.observer[0] == Accepted(1, None)


def test_only_a_waiting_job_can_be_removed():
    with pytest.raises(ValueError):
        WaitingQueue(ThroughputModel(), 1).remove(waiting())
