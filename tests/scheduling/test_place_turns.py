"""Places of running jobs, simulated: no time passes."""

import itertools
import math

import pytest

from gramophone_server.scheduling.memory_turns import JOIN_PART
from gramophone_server.scheduling.place_turns import PLACE_TURN_S, RETURN_S, exchange, has_claim, places_of
from gramophone_server.scheduling.task import PATIENCE_S
from tests.support.simulation import ITERATION_S, Device, stream

LONG = 10**5


def add(device, *tasks):
    for task in tasks:
        device.add(iter([(task, 0.0)]))


@pytest.mark.parametrize(("attackers", "each"), [(1, 16), (1, 64), (2, 8), (3, 12), (8, 2), (15, 4)])
def test_a_small_job_does_not_wait_for_places_that_others_keep(attackers, each):
    device = Device()
    add(device, *(device.task(f"attacker {n}", LONG, size=96) for n in range(attackers) for _ in range(each)))
    device.run(lambda: False, 60)
    turn_s = 16 * ITERATION_S * (96 / 64) ** 2  # of the others, in one batch
    for _ in range(3):
        assert device.seconds(device.task("victim", 20), 100) < (attackers + 1) * 20 * ITERATION_S + 4 * turn_s


def test_all_owners_have_their_part_if_there_are_more_of_them_than_places():
    device = Device(max_running=4)
    tasks = [device.task(f"owner {n}", LONG) for n in range(10)]
    add(device, *tasks)
    device.run(lambda: False, 1000)
    done = [task.state.done for task in tasks]
    assert min(done) > 0.7 * max(done) and device.exchanges < 1000 / PLACE_TURN_S + 10


def test_a_job_keeps_its_place_for_longer_if_it_takes_long_to_join():
    device = Device(max_running=2, join_s=2.0)
    add(device, *(device.task(f"owner {n}", LONG) for n in range(3)))
    device.run(lambda: False, 1000)
    assert 10 < device.exchanges < 1000 / (JOIN_PART * 2.0) + 4


def test_jobs_of_one_owner_do_not_take_turns():
    device = Device(max_running=4)
    tasks = [device.task("one", 100) for n in range(12)]
    add(device, *tasks)
    device.run(lambda: all(task.ended for task in tasks), 1000)
    assert device.exchanges == 0


def test_owners_with_about_as_many_places_do_not_take_turns():
    device = Device(max_running=5)
    add(device, *(device.task(f"owner {n % 2}", LONG) for n in range(10)))
    device.run(lambda: False, 300)
    places = places_of(device.running)
    assert sorted(places.values()) == [2, 3] and device.exchanges <= 5
    assert not has_claim("owner 0", places) and not has_claim("owner 1", places) and has_claim("owner 2", places)


def test_a_job_with_a_dear_beginning_has_it_also_if_others_wait_for_its_place():
    """A beginning that is interrupted begins anew."""
    device = Device(max_running=2)
    dear = device.task("dear", 10, (256,) * 4, style_scale=4.0)
    add(device, dear, *(device.task(f"owner {n}", LONG) for n in range(4)))
    device.run(lambda: dear.ended, 1000)
    assert dear.ended


def test_short_jobs_of_many_connections_leave_a_long_one_its_part():
    device, numbers = Device(max_running=4), itertools.count()
    long = device.task("long", LONG)
    add(device, long)
    for _ in range(12):
        device.add(stream(device, lambda: f"connection {next(numbers)}", 20))
    device.run(lambda: False, 1000)
    assert long.state.done * ITERATION_S > 1000 / 13 / 2


def test_a_job_whose_deadline_is_near_keeps_its_place():
    device = Device(max_running=2)
    hurried = [device.task("one", LONG) for _ in range(2)]
    for task in hurried:
        task.deadline_at = device.clock.now + PATIENCE_S - 1
    add(device, *hurried, device.task("other", 10))
    device.run(lambda: False, 30)
    assert device.exchanges == 0 and device.running == hurried


def test_a_job_that_gave_its_place_up_has_one_in_time_for_its_deadline():
    device = Device(max_running=2)
    task = device.task("one", LONG)
    add(device, task, device.task("one", LONG))
    device.run(lambda: False, 10)
    add(device, *(device.task(f"other {n}", LONG) for n in range(6)))
    device.run(lambda: task.gave_place_up, 100)
    assert task in device.waiting
    task.deadline_at = device.clock.now + RETURN_S + 5
    device.run(lambda: task in device.running, 10)
    assert task in device.running
    device.run(lambda: False, 20)
    assert task in device.running


def test_a_job_that_waits_for_memory_takes_no_place_and_gets_none():
    device = Device(max_running=2)
    tasks = [device.task("one", LONG) for _ in range(2)]
    add(device, *tasks)
    device.run(lambda: False, 10)
    waiting = device.task("other", 10)
    assert exchange(device.running, [waiting], device.clock.now).starting is waiting
    waiting.memory_short_since = 0.0
    assert exchange(device.running, [waiting], device.clock.now) is None
    for task in tasks:
        task.memory_short_since = 0.0
    assert places_of(tasks).total() == 0 and exchange(tasks, [device.task("other", 10)], math.inf) is None
