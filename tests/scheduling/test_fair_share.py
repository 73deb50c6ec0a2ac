"""Shares of the device: the counters by themselves, and simulations of hours with many owners. No time passes."""

import itertools
import math
import random
from dataclasses import dataclass

import pytest

from gramophone_server.domain.job_state import JobState
from gramophone_server.errors import OutOfDeviceMemory
from gramophone_server.scheduling.fair_share import BURST_S, DeviceShares, FairShare
from gramophone_server.scheduling.task import Task
from tests.support.observers import Recorder
from tests.support.simulation import STEP_PIXELS, STYLE_PIXEL_S, Device, stream


@dataclass(eq=False)
class One:
    """A job or an owner with a counter."""

    owner: str = ""
    used_s: float = 0.0


# The counters ---------------------------------------------------------------------------------------------------------


def test_a_newcomer_is_owed_nothing_and_has_no_advantage():
    share, old, new = FairShare(), One(), One()
    share.arrive(old)
    share.charge(old, 100.0)
    share.arrive(new)
    assert new.used_s == old.used_s == 100.0


def test_a_newcomer_overtakes_a_long_turn_that_is_due_by_a_bounded_time():
    share, ones = FairShare(), [One() for _ in range(4)]
    for one in ones:
        share.arrive(one)
    for one in ones[1:]:
        share.charge(one, 40.0)  # the first is owed 30 s
    new = One()
    share.arrive(new)
    assert share.level_s == 30.0 and new.used_s == 30.0 - BURST_S


def test_who_comes_back_owes_what_it_used_until_the_others_have_had_as_much():
    share, dear, other = FairShare(), One(), One()
    for one in (dear, other):
        share.arrive(one)
    share.charge(dear, 10.0)
    share.leave(dear)
    share.arrive(dear)
    assert dear.used_s == 10.0
    share.leave(dear)
    share.charge(other, 50.0)
    share.arrive(dear)
    assert dear.used_s == other.used_s == 50.0


def test_owners_share_evenly_whatever_the_number_of_their_jobs():
    shares, many, few = DeviceShares(), [One("many") for _ in range(5)], One("few")
    for job in (*many, few):
        shares.arrive(job)
    for _ in range(1000):
        shares.charge(shares.next(dict.fromkeys((*many, few), 0.02)), 0.02)
    assert few.used_s == pytest.approx(10, abs=0.1)
    assert [job.used_s for job in many] == pytest.approx([2.0] * 5, abs=0.1)


def test_a_turn_waits_until_the_others_have_had_as_much_as_it_takes():
    shares, dear, small = DeviceShares(), One("dear"), One("small")
    for job in (dear, small):
        shares.arrive(job)
    order = []
    for _ in range(202):
        job = shares.next({dear: 1.0, small: 0.02})
        order.append(job)
        shares.charge(job, 1.0 if job is dear else 0.02)
    assert order.index(dear) in (49, 50, 51) and sum(job is dear for job in order) == 3


def test_owners_without_jobs_are_forgotten_when_the_others_have_had_as_much():
    shares, steady = DeviceShares(), One("steady")
    shares.arrive(steady)
    for n in range(1000):
        job = One(f"owner {n}")
        shares.arrive(job)
        shares.charge(job, 1.0)
        shares.leave(job)
        shares.charge(steady, 1.0)
    assert len(shares) < 5 and shares.competing == 1


def test_nobody_competes_at_first():
    assert DeviceShares().next({}) is None


# Simulations ----------------------------------------------------------------------------------------------------------

DEAREST = (1, (256,) * 4)
DEAREST_RECIPE = {"style_scale": 4.0}  # of a picture of 64 px


def alone(iterations):
    device = Device()
    return device.seconds(device.task("victim", iterations))


@pytest.mark.parametrize("attackers", [1, 2, 4, 8, 15])
@pytest.mark.parametrize("iterations", [10, 40, 200])
def test_a_small_job_keeps_its_part_of_the_device_beside_owners_of_the_dearest_beginnings(attackers, iterations):
    device = Device()
    for n in range(attackers):
        device.add(stream(device, f"attacker {n}", *DEAREST, idle_s=0.01 * n, **DEAREST_RECIPE))
    device.run(lambda: False, 100 + attackers)
    took_s = device.seconds(device.task("victim", iterations))
    step_s = STEP_PIXELS * STYLE_PIXEL_S
    assert took_s <= (attackers + 1) * alone(iterations) * 1.05 + 2 * step_s
    assert device.longest_step_s < step_s + 0.1


@pytest.mark.parametrize("hurried", [1, 2, 4])
@pytest.mark.parametrize("urgency", [1.05, 1.5, 3.0, 6.0])
@pytest.mark.parametrize("iterations", [10, 60])
def test_deadlines_of_owners_of_the_dearest_beginnings_take_nothing_from_a_small_job(hurried, urgency, iterations):
    """Some of four owners set deadlines so short that their jobs are urgent sooner or later."""
    device, needs_s = Device(), 4 * STYLE_PIXEL_S * 256**2
    for n in range(4):
        deadline_s = (lambda: needs_s * urgency) if n < hurried else (lambda: math.inf)
        attacker = f"attacker {n}"
        device.add(stream(device, attacker, *DEAREST, deadline_s=deadline_s, needs_s=needs_s, **DEAREST_RECIPE))
    device.run(lambda: False, 104)
    for _ in range(5):
        took_s = device.seconds(device.task("victim", iterations))
        assert took_s <= 5 * alone(iterations) * 1.05 + 2 * STEP_PIXELS * STYLE_PIXEL_S
        device.run(lambda: False, 23)


@pytest.mark.parametrize(
    "shape",
    [
        {"iterations": 1, "styles": (256,) * 4, "style_scale": 4.0},
        {"iterations": 1, "styles": (90,) * 2, "style_scale": 1.4},
        {"iterations": 1, "styles": (256,), "style_scale": 4.0, "smallest_size": 32, "coarse_iterations": 1},
        {"iterations": 3, "size": 512},
    ],
    ids=["dearest", "medium", "several scales", "long iterations"],
)
@pytest.mark.parametrize("new_connections", [False, True])
def test_four_owners_of_any_shape_leave_a_steady_one_its_fifth(shape, new_connections):
    """Even if each of their jobs is of a new connection."""
    device, numbers = Device(), itertools.count()
    shape = dict(shape)
    iterations, styles = shape.pop("iterations"), shape.pop("styles", (32,))
    victim = device.task("victim", 100_000)
    device.add(iter([(victim, 0.0)]))
    for n in range(4):
        owner = (lambda: f"connection {next(numbers)}") if new_connections else f"attacker {n}"
        device.add(stream(device, owner, iterations, styles, **shape))
    device.run(lambda: False, 100)
    had, start = victim.used_s, device.clock.now
    device.run(lambda: False, 500)
    assert victim.used_s - had > 0.19 * (device.clock.now - start)


def test_four_owners_who_cancel_each_dear_job_in_its_beginning_and_connect_anew_leave_a_steady_one_its_fifth():
    device, numbers = Device(), itertools.count()
    victim = device.task("victim", 100_000)
    device.add(iter([(victim, 0.0)]))
    for _ in range(4):
        device.add(stream(device, lambda: f"connection {next(numbers)}", *DEAREST, cancels_after=1.0, **DEAREST_RECIPE))
    device.run(lambda: False, 100)
    had, start = victim.used_s, device.clock.now
    device.run(lambda: False, 500)
    assert victim.used_s - had > 0.19 * (device.clock.now - start)


def test_one_owner_with_fifteen_streams_has_half_of_the_device():
    device = Device()
    victim = device.task("victim", 100_000)
    device.add(iter([(victim, 0.0)]))
    for _ in range(15):
        device.add(stream(device, "attacker", *DEAREST, **DEAREST_RECIPE))
    device.run(lambda: False, 500)
    assert victim.used_s > 0.48 * device.clock.now


def test_dear_beginnings_are_not_starved_by_streams_of_small_jobs():
    """Each of those is of a new connection, and done within the burst of a newcomer."""
    device, numbers = Device(), itertools.count()
    for _ in range(4):
        device.add(stream(device, lambda: f"connection {next(numbers)}", 20))
    device.run(lambda: False, 20)
    dear = device.task("dear", *DEAREST, **DEAREST_RECIPE)
    assert device.seconds(dear) < 5 * 52 * 1.1 + 5 * BURST_S


def test_jobs_that_join_and_end_all_the_time_do_not_make_others_rejoin_all_the_time():
    """An owner's jobs of the victim's shape come and go; joining takes 0.1 s."""
    device = Device(pixel_s=0.0, iteration_s=0.005, join_s=0.1)
    victims = [device.task(f"victim {n}", 100_000) for n in range(3)]
    for victim in victims:
        device.add(iter([(victim, 0.0)]))
    device.run(lambda: False, 20)
    for n in range(4):
        device.add(stream(device, f"attacker {n}", 3, idle_s=0.05))
    done, start = [victim.state.done for victim in victims], device.clock.now
    device.run(lambda: False, 100)
    speeds = [(v.state.done - n) / (device.clock.now - start) for v, n in zip(victims, done, strict=True)]
    assert min(speeds) > 200 / 7 * 0.85  # alone in a batch of one and with a seventh of the device: 29 a second


def test_a_mixed_half_hour_ends_and_is_fair(seed=7):
    """Jobs of random shapes, some of which are cancelled at random; each owner who always has a job gets its share."""
    device, dice = Device(), random.Random(seed)
    steady = [device.task(f"steady {n}", 100_000, size=size) for n, size in enumerate((64, 128, 48))]
    for task in steady:
        device.add(iter([(task, 0.0)]))

    def mixed(name):
        while True:
            styles = [dice.choice((32, 64, 200)) for _ in range(dice.randint(1, 4))]
            task = device.task(name, dice.randint(1, 200), styles, size=dice.choice((32, 64, 128)), style_scale=1.5)
            if dice.random() < 0.3:
                task.observer.cancel_at(device.clock.now + dice.expovariate(0.1))
            yield task, dice.expovariate(1.0)

    for n in range(5):
        device.add(mixed(f"mixed {n}"))
    device.run(lambda: False, 1800)
    used = [task.used_s for task in steady]
    assert min(used) > 0.95 * max(used) and min(used) > 1800 / 8 * 0.95


def test_a_style_that_was_seen_before_costs_nothing():
    device = Device()
    first = device.task("owner", *DEAREST, **DEAREST_RECIPE)
    assert device.seconds(first) > 50
    again = Task(state=JobState(first.state.job), observer=Recorder(device.clock), owner="other")
    assert device.seconds(again) < 1


def test_a_pause_or_a_drain_in_the_beginning_gives_it_up():
    device = Device()
    task = device.task("owner", *DEAREST, **DEAREST_RECIPE)
    device.add(iter([(task, 0.0)]))
    device.run(lambda: False, 5)
    assert task.beginning.under_way and task.state.done == 0
    device.worker.pause(task, 0)
    assert task.beginning is None
    device.worker.admit(task)
    device.run(lambda: task.ended)
    assert task.observer.end.iterations == 1
    other = device.task("owner", *DEAREST, **DEAREST_RECIPE)
    device.add(iter([(other, 0.0)]))
    device.run(lambda: False, 5)
    device.worker.drain_task(other)
    assert other.ended and other.beginning is None


def test_memory_that_runs_out_in_a_beginning_loses_the_job_only_if_it_is_alone():
    device = Device()
    steady = device.task("steady", 1000)
    dear = device.task("dear", *DEAREST, **DEAREST_RECIPE)
    for task in (steady, dear):
        device.add(iter([(task, 0.0)]))
    device.run(lambda: dear.beginning is not None and dear.beginning.under_way)
    device.engine.beginning_error = OutOfDeviceMemory(2048, 2048)
    device.run(lambda: False, 3)
    assert not dear.ended and dear.memory_short
    device.run(lambda: dear.ended and steady.ended)
    assert steady.observer.end is not None and isinstance(dear.observer.error, OutOfDeviceMemory)
