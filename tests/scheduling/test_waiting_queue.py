import math

import pytest

from gramophone_server.domain.events import Accepted, Waiting
from gramophone_server.scheduling.throughput import ThroughputModel
from gramophone_server.scheduling.waiting_queue import TOLD_EVERY_S, WaitingQueue
from gramophone_server.scheduling.worker import Task
from tests.support.specs import job_state


class Heard(list):
    """A listener that writes down what it is told."""

    def publish(self, event):
        self.append(event)


def waiting(must_begin_at=math.inf, left_s=None, iterations=10):
    return Task(work=job_state(iterations), listener=Heard(), must_begin_at=must_begin_at, left_s=left_s)


def test_who_must_begin_earlier_is_before_who_came_earlier_and_equals_stay_in_order():
    line = WaitingQueue(ThroughputModel(), 1)
    last, first, second, third = (waiting(at) for at in (math.inf, 1.0, 2.0, 2.0))
    for task in (last, first, second, third):
        line.add(task)
    assert list(line) == [first, second, third, last]


def test_place_and_wait_are_those_of_even_sharing():
    """Two are worked on, with 1 s and 3 s of the device left: the first place is free after 2 s, the next after 4 and, with 1 s and
    5 s left then, another after 6."""
    line = WaitingQueue(ThroughputModel(), 2)
    running = [waiting(left_s=1.0), waiting(left_s=3.0)]
    first, second = waiting(left_s=1.0), waiting(left_s=5.0)
    line.accept(first, running)
    line.accept(second, running)
    assert first.listener == [Accepted(1, 2.0)]
    assert second.listener == [Accepted(2, 4.0)]
    assert line.forecast(running).begins == (2.0, 4.0, 6.0)


def test_a_free_place_is_place_0():
    line = WaitingQueue(ThroughputModel(), 2)
    first, second = waiting(), waiting()
    for task in (first, second):
        line.accept(task, [waiting()])
    assert first.listener == [Accepted(0, None)]
    assert second.listener == [Accepted(1, None)]


def test_who_came_before_anything_was_measured_is_reckoned_with_as_soon_as_something_was():
    pace = ThroughputModel()
    line = WaitingQueue(pace, 1)
    early = waiting(iterations=10)
    line.add(early)
    assert line.forecast([]) is None
    pace.note(early.work.shape, 1, 1, 0.5)
    assert line.forecast([]).begins == (0.0, 5.0)


def test_who_comes_back_hears_of_its_place():
    line = WaitingQueue(ThroughputModel(), 1)
    task = waiting()
    line.resume(task)
    line.tell([waiting()], 100.0)
    assert task.listener == [Waiting(1, None)]


def test_who_is_moved_is_told_once_in_a_while_and_then_the_newest_place():
    line = WaitingQueue(ThroughputModel(), 1)
    tasks = [waiting() for _ in range(5)]
    running = [waiting()]
    for task in tasks:
        line.accept(task, running)
    last = tasks[-1].listener
    for task, now in zip(tasks[:4], (100.0, 100.0 + TOLD_EVERY_S / 2, 100.0 + TOLD_EVERY_S, 300.0), strict=True):
        line.remove(task)
        line.tell(running, now)
        line.tell(running, now)
    assert last == [Accepted(5, None), Waiting(4, None), Waiting(2, None), Waiting(1, None)]


def test_who_comes_last_moves_nobody():
    line = WaitingQueue(ThroughputModel(), 1)
    first, second, urgent = waiting(5.0), waiting(5.0), waiting(1.0)
    for task in (first, second, urgent):
        line.accept(task, [waiting()])
    assert first.listener == [Accepted(1, None), Waiting(2, None)]
    assert second.listener == [Accepted(2, None), Waiting(3, None)]
    assert urgent.listener[0] == Accepted(1, None)


def test_only_who_waits_can_be_removed():
    with pytest.raises(ValueError):
        WaitingQueue(ThroughputModel(), 1).remove(waiting())
