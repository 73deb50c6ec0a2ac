"""Places of running jobs, simulated: no time passes."""

import itertools
import math
import time
from collections import Counter

import pytest

from gramophone_server.scheduling.forecast import Work
from gramophone_server.scheduling.memory_turns import JOIN_PART
from gramophone_server.scheduling.place_turns import PATIENT_S, PLACE_TURN_S, Claims, exchange, in_order
from gramophone_server.scheduling.task import PATIENCE_S
from tests.support.simulation import ITERATION_S, Device, stream

LONG = 10**5
DEAREST = {"styles": (256,) * 4, "style_scale": 4.0}  # 52 s before the first iteration


def add(device, *tasks):
    for task in tasks:
        device.add(iter([(task, 0.0)]))


# Who gets a place ---------------------------------------------------------------------------------------------------


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


def test_short_jobs_of_many_connections_leave_a_long_one_its_part():
    device, numbers = Device(max_running=4), itertools.count()
    long = device.task("long", LONG)
    add(device, long)
    for _ in range(12):
        device.add(stream(device, lambda: f"connection {next(numbers)}", 20))
    device.run(lambda: False, 1000)
    assert long.state.done * ITERATION_S > 1000 / 13 / 2


def needs(seconds):
    """An estimate."""
    return Work(seconds, seconds, seconds, seconds, 0.0, 0.0, 1)


def short(device, owner, iterations=5):
    """A job that needs half a second of the device."""
    task = device.task(owner, iterations)
    task.remaining = needs(iterations * ITERATION_S)
    return task


def dear(device, owner):
    """A job of 52 s that seems to need half a second."""
    task = device.task(owner, 1, **DEAREST)
    task.remaining = needs(0.5)
    return task


def grow(device, tasks, iterations):
    """The clients of these jobs add so many iterations to those that have few left."""
    for task in tasks if iterations else ():
        state = task.state
        if task.last_report and not task.ended and 0 < state.iterations_left < 4:
            device.worker.update(task, {"iterations": state.done + iterations})


def one_after_the_other(device, clients, task):
    """Each of these clients sends one job after the other, each of them on a new connection."""
    numbers = itertools.count()

    def client():
        while True:
            yield task(f"connection {next(numbers)}"), 0.0

    for _ in range(clients):
        device.add(client())


@pytest.mark.parametrize("others", [8, 20])
def test_a_short_job_waits_for_no_turns_of_long_ones(others):
    device = Device(max_running=8, join_s=0.1)
    add(device, *(device.task(f"owner {n}", LONG, size=96) for n in range(others)))
    device.run(lambda: False, 300)
    slice_s = 8 * ITERATION_S * (96 / 64) ** 2  # of the others, in one batch
    took_s = [device.seconds(short(device, "victim"), 100) for _ in range(5)]
    assert max(took_s) < 9 * 5 * ITERATION_S + 6 * slice_s < 8 * PLACE_TURN_S / 2


@pytest.mark.parametrize("added", [0, 4, 1000], ids=["dear", "growing", "long soon"])
def test_a_short_job_waits_for_no_job_that_only_seems_to_be_short(added):
    device, false = Device(max_running=8, join_s=0.1), []
    add(device, *(device.task(f"owner {n}", LONG, size=96) for n in range(20)))
    device.run(lambda: False, 300)

    def task(owner):
        false.append(short(device, owner) if added else dear(device, owner))
        return false[-1]

    one_after_the_other(device, 3, task)
    device.run(lambda: grow(device, false, added), 60)
    slice_s = 8 * ITERATION_S * (96 / 64) ** 2  # of the others, in one batch
    for _ in range(6):
        victim = short(device, "victim")
        add(device, victim)
        device.run(lambda victim=victim: victim.ended or grow(device, false, added), 9 * 5 * ITERATION_S + 6 * slice_s)
        assert victim.ended


def test_a_short_job_waits_for_the_beginnings_of_long_ones_and_a_fifth_of_a_turn():
    device = Device(max_running=8, join_s=0.1)
    add(device, *(device.task(f"owner {n}", LONG, size=96) for n in range(8)))
    device.run(lambda: False, 6)
    assert device.seconds(short(device, "victim"), 100) < 0.75 * 8 * PLACE_TURN_S


def test_short_jobs_without_end_leave_long_ones_their_places():
    """Of twenty connections, one after the other, while eight places are taken."""
    device = Device(max_running=8, join_s=0.1)
    long = [device.task(f"owner {n}", LONG) for n in range(8)]
    add(device, *long)
    one_after_the_other(device, 20, lambda owner: short(device, owner))
    device.run(lambda: False, 1000)
    done = [task.state.done for task in long]
    assert min(done) > 0.6 * max(done) and sum(done) * ITERATION_S > 1000 * 8 / 28


@pytest.mark.parametrize("added", [0, 4, 1000], ids=["dear", "growing", "long soon"])
def test_jobs_that_only_seem_to_be_short_leave_long_ones_their_places(added):
    device, false = Device(max_running=8, join_s=0.1), []
    long = [device.task(f"owner {n}", LONG) for n in range(8)]
    add(device, *long)

    def task(owner):
        false.append(short(device, owner) if added else dear(device, owner))
        return false[-1]

    one_after_the_other(device, 20, task)
    device.run(lambda: grow(device, false, added), 1000)
    done = [task.state.done for task in long]
    assert min(done) > 0.6 * max(done) and sum(done) * ITERATION_S > 0.4 * 1000 * 8 / 28


@pytest.mark.parametrize("estimate", [None, needs(0.5)], ids=["not measured", "far too low"])
def test_connections_with_dear_beginnings_do_not_keep_all_places(estimate):
    device = Device(max_running=8)
    attackers = [device.task(f"attacker {n}", 10, **DEAREST) for n in range(8)]
    for task in attackers:
        task.remaining = estimate
    add(device, *attackers)
    device.run(lambda: False, 5)
    assert device.seconds(device.task("victim", 10), 500) < 8 * PLACE_TURN_S + 9 * 10 * ITERATION_S + 2


def test_jobs_with_few_iterations_to_which_some_are_added_do_not_keep_all_places():
    device = Device(max_running=8, join_s=0.1)
    attackers = [short(device, f"attacker {n}") for n in range(8)]
    add(device, *attackers)
    device.run(lambda: grow(device, attackers, 4), 30)
    victim = device.task("victim", 10)
    add(device, victim)
    device.run(lambda: victim.ended or grow(device, attackers, 4), 8 * PLACE_TURN_S + 9 * 20 * ITERATION_S)
    assert victim.ended and not any(task.ended for task in attackers)


# Who keeps one ------------------------------------------------------------------------------------------------------


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
    assert sorted(Counter(task.owner for task in device.running).values()) == [2, 3] and device.exchanges <= 5


def test_short_jobs_of_many_owners_do_not_take_turns():
    """That would cost more than it gives."""
    device = Device(iteration_s=0.002, pixel_s=1e-9)
    for n in range(4):
        for _ in range(3 + 4 * n):  # so that some have many more places
            device.add(stream(device, f"owner {n}", 50))
    device.run(lambda: False, 20)
    assert device.exchanges < 20 and device.waiting


@pytest.mark.parametrize("caches_styles", [True, False])
def test_a_job_with_a_dear_beginning_also_has_its_iterations(caches_styles):
    """Its beginning is no turn, and if it is interrupted it begins anew."""
    device = Device(max_running=2, caches_styles=caches_styles)
    dear = device.task("dear", 10, **DEAREST)
    add(device, dear, *(device.task(f"owner {n}", LONG) for n in range(3)))
    device.run(lambda: dear.ended, 300)
    assert dear.ended


@pytest.mark.parametrize("jobs", [2, 3])
def test_dear_jobs_of_one_owner_end_beside_clients_that_come_one_after_the_other(jobs):
    device, numbers = Device(max_running=2), itertools.count()
    dear = [device.task("dear", 10, **DEAREST) for _ in range(jobs)]
    add(device, *dear)
    for _ in range(4):
        device.add(stream(device, lambda: f"connection {next(numbers)}", 20))
    device.run(lambda: all(task.ended for task in dear), 600)
    assert all(task.ended for task in dear)


# Deadlines ----------------------------------------------------------------------------------------------------------


def test_a_job_whose_deadline_is_near_keeps_its_place():
    device = Device(max_running=2)
    hurried = [device.task("one", 300) for _ in range(2)]
    for task in hurried:
        task.deadline_at = device.clock.now + PATIENCE_S - 1
    add(device, *hurried, device.task("other", 10))
    device.run(lambda: False, PATIENT_S - 2)
    assert device.exchanges == 0 and device.running == hurried
    device.run(lambda: False, 4)  # but not both, if another owner has none
    assert device.exchanges == 1


@pytest.mark.parametrize(
    ("budget_s", "deadline_s"),
    [(500, math.inf), (500, 550), (math.inf, 500), (math.inf, 20)],
    ids=["time budget", "time budget before a deadline", "lost deadline", "deadline that has passed"],
)
def test_neither_a_time_budget_nor_a_lost_deadline_keeps_a_place(budget_s, deadline_s):
    """A client can set both to anything."""
    device = Device(max_running=2)
    attackers = [device.task("attacker", LONG) for _ in range(2)]
    for task in attackers:
        task.budget_ends_at, task.deadline_at = device.clock.now + budget_s, device.clock.now + deadline_s
    add(device, *attackers)
    device.run(lambda: False, 30)
    assert device.seconds(device.task("victim", 10), 100) < 4


def test_promises_are_kept_though_jobs_give_their_places_up():
    """In a batch of eight, a job needs eight times its share of the device."""
    device = Device(max_running=8, iteration_s=0.02, pixel_s=1e-9)
    tasks = [device.task("one", 5000) for _ in range(8)]
    add(device, *tasks)
    device.run(lambda: all(task.state.done >= 100 for task in tasks), 2000)
    needed_s = max(task.remaining.alone_s for task in tasks)
    for task in tasks:
        task.deadline_at = device.clock.now + 3 * needed_s
    add(device, *(device.task(f"other {n}", LONG) for n in range(7)))
    ended_at = {}

    def all_have_ended():
        for task in tasks:
            if task.ended:
                ended_at.setdefault(task, device.clock.now)
        return len(ended_at) == len(tasks)

    device.run(all_have_ended, 5000)
    assert device.exchanges >= 7
    assert all(ended_at[task] <= task.deadline_at for task in tasks)


def test_promises_are_kept_together():
    """Each alone could wait until its last moment, but not all of them."""
    device = Device(max_running=4)
    tasks = [device.task("one", 400, size=64 + 16 * n) for n in range(4)]
    add(device, *tasks)
    device.run(lambda: all(task.state.done >= 5 for task in tasks), 100)
    needed_s = sum(task.remaining.alone_s for task in tasks)
    for task in tasks:
        task.deadline_at = device.clock.now + 2.5 * needed_s
    add(device, *(device.task(f"other {n}", LONG, size=40) for n in range(3)))
    device.run(lambda: all(task.ended for task in tasks), 2.5 * needed_s)
    assert device.exchanges >= 3 and all(task.ended for task in tasks)


def test_jobs_take_turns_if_there_are_too_few_places_and_too_little_memory():
    """A job that finds no memory for its return waits for it in its turn."""
    device = Device(max_running=2, memory_bytes=2 * 1000 * 64 * 32)
    tasks = [device.task(f"owner {n}", LONG) for n in range(4)]
    add(device, *tasks)
    device.run(lambda: False, 600)
    done = [task.state.done for task in tasks]
    assert min(done) > 0.6 * max(done)


def test_a_job_returns_for_its_deadline_to_a_place_of_its_own_owner():
    device = Device(max_running=2)
    task, sibling = (device.task("one", 1000) for _ in range(2))
    add(device, task, sibling)
    device.run(lambda: False, 10)
    other = device.task("other", LONG)
    add(device, other)
    device.run(lambda: device.exchanges == 1, 100)
    away = next(each for each in (task, sibling) if each not in device.running)
    away.deadline_at = device.clock.now + 2.5 * away.remaining.alone_s
    device.run(lambda: away in device.running, 2.5 * away.remaining.alone_s)
    assert away in device.running and other in device.running and other.state.done


# The function by itself ---------------------------------------------------------------------------------------------


@pytest.fixture
def full():
    """A device whose places have two jobs of one owner."""
    device = Device(max_running=2)
    add(device, *(device.task("one", LONG) for _ in range(2)))
    device.run(lambda: False, 10)
    return device


def test_a_job_that_waits_for_memory_has_no_place_to_give(full):
    assert exchange(full.running, [full.task("other", 10)], full.clock.now)
    for task in full.running:
        task.memory_short_since = 0.0
    assert exchange(full.running, [full.task("other", 10)], full.clock.now) is None


def test_a_job_that_ends_soon_keeps_its_place_whatever_it_has_had_before(full):
    full.run(lambda: False, 20)
    for task in full.running:
        task.remaining = needs(0.5)
    assert exchange(full.running, [full.task("other", 10)], full.clock.now) is None


def test_a_short_job_that_waits_for_memory_keeps_no_other_from_an_early_place():
    device = Device(max_running=2)
    add(device, *(device.task(f"owner {n}", LONG) for n in range(2)))
    device.run(lambda: False, 5)
    early = short(device, "early")
    early.came_early = True
    running, waiting = [*device.running, early], [short(device, "other")]
    assert exchange(running, waiting, device.clock.now) is None
    early.memory_short_since = 0.0
    assert exchange(running, waiting, device.clock.now).is_early


def test_a_job_leaves_only_if_the_host_has_room_and_starts_only_if_the_device_has(full):
    second = full.running[1]
    one, two = full.task("other", 10), full.task("third", 10)
    due = exchange(full.running, [one, two], full.clock.now, lambda task: task is second, lambda task: task is two)
    assert due == (second, two, False, False)
    assert exchange(full.running, [one], full.clock.now, may_leave=lambda _: False) is None
    assert exchange(full.running, [one], full.clock.now, may_start=lambda _: False) is None


def test_free_places_go_first_to_owners_with_a_claim(full):
    """So a job does not wait behind the many short ones of another owner, which nobody displaces."""
    waiting = [full.task(owner, 10) for owner in ("one", "two", "one", "three", "two")]
    assert in_order(waiting, full.running) == [waiting[i] for i in (1, 3, 4, 0, 2)]
    assert in_order(waiting, full.running[:1]) == waiting


def test_claims_are_foreseen_one_after_the_other(full):
    add(full, *(full.task("one", LONG) for _ in range(2)))
    full.max_running = 4
    full.run(lambda: False, 10)
    claims = Claims(full.running, full.clock.now)
    assert [claims.take(owner) for owner in ("two", "one", "two", "three", "four")] == [True, False, False, True, True]
    assert claims.wait_s("two") == math.inf and claims.wait_s("five") == 4 * PLACE_TURN_S
    assert [claims.take(f"owner {n}") for n in range(10)] == [False] * 10
    assert claims.wait_s("owner 9") == 10 * PLACE_TURN_S


def test_a_look_at_a_long_queue_is_short():
    device = Device(max_running=256)
    add(device, *(device.task(f"owner {n}", LONG, size=16 + n) for n in range(256)))
    device.run(lambda: len(device.running) == 256, 1)
    waiting = [device.task(f"other {n}", 10) for n in range(1024)]
    took_s = []
    for _ in range(5):
        start = time.perf_counter()
        assert exchange(device.running, waiting, device.clock.now) is None
        took_s.append(time.perf_counter() - start)
    assert min(took_s) < 0.02
