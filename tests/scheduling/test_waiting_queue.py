import math
import random
import re
from collections import Counter

import pytest

from gramophone.recipe import Pooling
from gramophone_server.domain.events import Accepted, Waiting
from gramophone_server.errors import DeadlineUnattainable
from gramophone_server.scheduling.fair_share import BURST_S
from gramophone_server.scheduling.forecast import Work
from gramophone_server.scheduling.place_turns import PLACE_TURN_S
from gramophone_server.scheduling.reservation import Reservation
from gramophone_server.scheduling.task import PATIENCE_S, Task
from gramophone_server.scheduling.throughput import ThroughputModel
from gramophone_server.scheduling.waiting_queue import (
    MAX_PROMISED_S,
    PROBE_AFTER_REFUSALS,
    PROBE_AFTER_S,
    REPORT_INTERVAL_S,
    WaitingQueue,
)
from tests.support.clock import ManualClock
from tests.support.specs import job_state


class Recorder(list):
    """An observer that records its events."""

    def publish(self, event):
        self.append(event)


def work(seconds):
    return Work(seconds, seconds, seconds, seconds, 0.0, 0.0, 64 * 32)


def waiting(deadline_at=math.inf, remaining_s=None, iterations=10, **fields):
    remaining = None if remaining_s is None else work(remaining_s)
    return Task(
        state=job_state(iterations), observer=Recorder(), deadline_at=deadline_at, remaining=remaining, **fields
    )


def queue_with(iteration_s=None, max_running=1):
    """A queue, its clock, and its model, in which an iteration of 64x32 px takes `iteration_s`."""
    clock = ManualClock()
    throughput = ThroughputModel(clock)
    if iteration_s is not None:
        measure(throughput, iteration_s)
    return WaitingQueue(throughput, max_running, clock), clock, throughput


def measure(throughput, iteration_s, times=10, state=None):
    for _ in range(times):
        throughput.record((state or job_state()).shape, 1, 1, iteration_s)


# Order and positions --------------------------------------------------------------------------------------------------


def test_jobs_are_in_the_order_of_their_latest_starts_and_equals_in_that_of_arrival():
    queue, _, _ = queue_with()
    last, first, second, third = (waiting(at) for at in (math.inf, 1.0, 2.0, 2.0))
    for task in (last, first, second, third):
        queue.accept(task, [])
    assert list(queue) == [first, second, third, last]


def test_no_stream_of_short_deadlines_or_budgets_overtakes_a_job_for_longer_than_its_patience():
    queue, _, _ = queue_with()
    patient = waiting()
    queue.accept(patient, [])
    for queued_at in range(0, 100, 10):
        queue.accept(waiting(queued_at + 0.1, queued_at=queued_at), [])
        queue.accept(waiting(queued_at=queued_at, budget_ends_at=queued_at + 0.1), [])
    before = list(queue)[: list(queue).index(patient)]
    assert before and all(task.queued_at <= PATIENCE_S for task in before)


def test_a_job_that_needs_hours_does_not_start_before_those_that_came_earlier():
    queue, _, _ = queue_with(1000.0)
    first, long, hopeless = waiting(50.0, 1.0), waiting(queued_at=51.0), waiting(60.0, queued_at=51.0)
    for task in (first, long, hopeless):
        queue.accept(task, [])
    assert next(iter(queue)) is first and long.remaining.share_s > 9000 and list(queue)[-1] is long


def test_a_job_that_came_before_its_speed_was_known_gets_its_place_when_it_is():
    queue, _, throughput = queue_with()
    short, long = waiting(30.0, iterations=1), waiting(31.0, iterations=20)
    for task in (short, long):
        queue.accept(task, [waiting()])
    assert list(queue) == [short, long]
    measure(throughput, 1.0)
    queue.accept(waiting(), [waiting()])
    assert list(queue)[:2] == [long, short]


def test_a_job_whose_owner_has_no_place_waits_for_a_turn_and_not_for_the_end_of_others():
    queue, _, throughput = queue_with(max_running=2)
    measure(throughput, 1.0)
    running = [waiting(remaining_s=5000.0, owner=owner) for owner in ("one", "two")]
    same, other = waiting(owner="one"), waiting(owner="three")
    for task in (same, other):
        queue.accept(task, running)
    assert same.observer == [Accepted(1, pytest.approx(10_000, rel=0.01))]
    assert other.observer == [Accepted(2, 2 * PLACE_TURN_S)]


def test_a_job_starts_at_once_if_another_owner_has_two_places_more():
    queue, _, throughput = queue_with(max_running=2)
    measure(throughput, 1.0)
    running = [waiting(remaining_s=5000.0, owner="one") for _ in range(2)]
    first, second = waiting(owner="two"), waiting(owner="two")
    for task in (first, second):
        queue.accept(task, running)
    assert first.observer == [Accepted(0, 0.0)]
    assert second.observer[0].position == 2


@pytest.mark.parametrize("deadline_s", [100.0, 3600.0])
def test_a_deadline_is_not_refused_for_places_that_its_owner_will_get(deadline_s):
    queue, _, throughput = queue_with(max_running=2)
    measure(throughput, 1.0)
    running = [waiting(remaining_s=5000.0, owner="one") for _ in range(2)]
    ask = Asking(queue)
    assert ask(deadline_s, running, owner="two", iterations=10) is None
    assert ": 10000." in str(ask(deadline_s, running, owner="one", iterations=10))


def test_position_and_wait_are_those_of_even_sharing():
    """Two jobs run, and need 1 s and 3 s of the device: the first place is free after 2 s, the next after 4 s and, as
    the jobs that have started then need 1 s and 5 s, another after 6 s."""
    queue, _, throughput = queue_with(max_running=2)
    running = [waiting(remaining_s=1.0), waiting(remaining_s=3.0)]
    measure(throughput, 1.0)
    first, second = waiting(iterations=1), waiting(iterations=5)
    queue.accept(first, running)
    queue.accept(second, running)
    assert first.observer == [Accepted(1, 2.0)]
    assert second.observer == [Accepted(2, pytest.approx(4.0, rel=0.01))]
    assert queue.forecast(running).starts == pytest.approx((2.0, 4.0, 6.0), rel=0.01)


def test_a_job_that_starts_at_once_has_position_0():
    queue, _, _ = queue_with(max_running=2)
    first, second = waiting(), waiting()
    for task in (first, second):
        queue.accept(task, [waiting()])
    assert first.observer == [Accepted(0, 0.0)]
    assert second.observer == [Accepted(1, None)]


def test_a_job_that_came_before_the_first_measurement_is_in_later_forecasts():
    queue, _, throughput = queue_with()
    early = waiting(iterations=10)
    queue.accept(early, [])
    assert queue.forecast([]) is None
    measure(throughput, 0.5)
    assert queue.forecast([]).starts == pytest.approx((0.0, 5.0), rel=0.01)


def test_a_resumed_job_receives_its_position():
    queue, _, _ = queue_with()
    task = waiting()
    queue.resume(task)
    queue.report_positions([waiting()])
    assert task.observer == [Waiting(1, None)]


def test_new_positions_are_reported_once_in_an_interval():
    queue, clock, _ = queue_with()
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
    queue, _, _ = queue_with()
    first, second, urgent = waiting(5.0), waiting(5.0), waiting(1.0)
    for task in (first, second, urgent):
        queue.accept(task, [waiting()])
    assert first.observer == [Accepted(1, None), Waiting(2, None)]
    assert second.observer == [Accepted(2, None), Waiting(3, None)]
    assert urgent.observer[0] == Accepted(1, None)


def test_only_a_waiting_job_can_be_removed():
    with pytest.raises(ValueError):
        queue_with()[0].remove(waiting())


# Deadlines ------------------------------------------------------------------------------------------------------------


class Asking:
    """Asks a queue for jobs with deadlines."""

    def __init__(self, queue, image_pixels=0):
        self.queue, self.image_pixels, self.numbers = queue, image_pixels, iter(range(1, 10**6))

    def __call__(self, left_s, running=(), owner="", **recipe):
        """Whether a job is accepted; it is released at once."""
        reservation = Reservation(next(self.numbers))
        try:
            state = job_state(**recipe)
            self.queue.expect(reservation, running, state, left_s, self.image_pixels, "PNG", owner, 2.0)
        except DeadlineUnattainable as error:
            return error
        self.queue.forget(reservation)
        return None


def test_only_a_deadline_that_no_measurement_allows_is_refused():
    queue, _, _ = queue_with(1.0, max_running=4)
    ask = Asking(queue)
    assert ask(9.0, iterations=10) is not None and ask(10.5, iterations=10) is None
    assert ask(math.inf, iterations=10**3) is None


@pytest.mark.parametrize("recipe", [{"size": 128}, {"size": 32}, {"pooling": Pooling.AVERAGE}, {}], ids=str)
def test_without_evidence_every_deadline_is_accepted(recipe):
    queue, clock, _ = queue_with(1.0)
    if not recipe:  # the only measurement has expired
        clock.advance(301)
    assert Asking(queue)(0.1, iterations=1000, **recipe) is None


def test_a_refusal_says_what_was_measured_and_how_sure_it_is():
    queue, _, _ = queue_with(1.0)
    refusal = Asking(queue)(60.0, [waiting(remaining_s=100.0)], iterations=10)
    assert "at least 110.0 s: 100.0 s until its turn, 10.0 s for its iterations, " in str(refusal)
    assert "measured at about 2048 pixels, less the uncertainty of 2 %); the call ends in 60.0 s" in str(refusal)
    assert refusal.retry_after_s == pytest.approx(100.0, rel=0.01)
    alone = Asking(queue)(5.0, iterations=10)
    assert alone.retry_after_s is None  # it takes longer by itself


def test_time_that_looks_ample_is_so_at_a_closer_look(monkeypatch):
    """With jobs and deadlines by chance: what is accepted without a closer look is accepted by it, too."""
    chance, outcomes = random.Random(1), Counter()
    quick_look = WaitingQueue.time_is_ample

    def asked(tasks, expected, closely, **question):
        """Whether a job is accepted, and whether its time looked ample."""
        looks = []
        look = lambda *arguments: looks.append(quick_look(*arguments)) or (looks[-1] and not closely)
        monkeypatch.setattr(WaitingQueue, "time_is_ample", look)
        queue, _, _ = queue_with(1.0, max_running=4)
        for number, deadline_s in enumerate(expected):
            queue.expect(Reservation(-number), [], job_state(), deadline_s, 0, "PNG", f"expected {number}", 2.0)
        for task in tasks[4:]:
            queue.resume(task)
        return Asking(queue)(running=tasks[:4], **question) is None, looks[-1]

    for _ in range(2000):
        tasks = []
        for _ in range(chance.choice([0, 1, 2, 6])):
            needs_s = chance.choice([0.1, 1.0, 10.0])
            deadline_at = chance.choice([math.inf, needs_s * chance.uniform(0.5, 20)])
            tasks.append(waiting(deadline_at, needs_s, owner=chance.choice("ab")))
        expected = [math.inf] * chance.choice([0, 0, 1, 3])
        question = {"left_s": 2 ** chance.uniform(0, 7), "owner": chance.choice("ab")}
        question |= {"iterations": chance.randint(1, 30), "time_budget": chance.choice([0.0, 5.0])}
        is_ample = asked(tasks, expected, closely=False, **question)[1]
        is_accepted = asked(tasks, expected, closely=True, **question)[0]
        assert is_accepted or not is_ample
        outcomes[is_ample, is_accepted] += 1
    assert outcomes[True, True] > 200 and outcomes[False, True] > 200 and outcomes[False, False] > 200


def test_a_time_budget_ends_a_job_before_its_deadline():
    queue, _, _ = queue_with(1.0)
    ask = Asking(queue)
    assert ask(9.0, iterations=1000, time_budget=5.0) is None
    assert ask(4.0, iterations=1000, time_budget=5.0) is not None
    assert ask(60.0, [waiting(remaining_s=100.0)], iterations=1, time_budget=0.5) is not None  # however short it is


def test_a_promise_is_kept_against_later_jobs():
    queue, _, _ = queue_with(1.0, max_running=4)
    ask = Asking(queue)
    promised = waiting(20.0, 15.0)
    assert ask(3.0, iterations=2) is None
    refusal = str(ask(12.0, [promised], iterations=6))
    assert "would take at least 6.00 s of the device (" in refusal and "; 15.0 s of it are promised to jobs " in refusal
    assert "this job or one of these would be 1.80 s late; the call ends in 12.0 s" in refusal
    assert ask(100.0, [promised], iterations=10) is None  # after the promised one
    assert ask(12.0, [waiting(math.inf, 15.0)], iterations=6) is None  # no promise


@pytest.mark.parametrize("is_decoded", [True, False])
@pytest.mark.parametrize(
    ("budget_s", "are_accepted"), [(math.inf, False), (60.0, False), (59.0, True), (1.0, True)], ids=str
)
def test_a_job_whose_time_budget_ends_before_its_deadline_takes_no_deadline_from_others(
    is_decoded, budget_s, are_accepted
):
    """It wants 47.5 s of the 60 s until its deadline. If its time budget ends it before, it needs none of them."""
    queue, _, _ = queue_with(0.1, max_running=4)
    running = [waiting(60.0, min(47.5, budget_s), owner="greedy", budget_ends_at=budget_s)]
    if not is_decoded:
        running, time_budget = [], 0.0 if budget_s == math.inf else budget_s
        state = job_state(475, time_budget=time_budget)
        queue.expect(Reservation(0), [], state, 60.0, 0, "PNG", "greedy", 2.0)
    answers = [Asking(queue)(left_s, running, "another", iterations=105) for left_s in (16.0, 30.0, 50.0)]
    assert [answer is None for answer in answers] == [are_accepted] * 3


def test_a_job_that_needs_almost_all_of_the_device_takes_no_deadline_from_others():
    """It was accepted because the device was free. That refused others, the smallest ones too, for a minute."""
    queue, _, _ = queue_with(0.1, max_running=4)
    for needed_s in (50.0, 57.0, 59.0):
        greedy = waiting(60.0, needed_s, owner="greedy")
        assert [Asking(queue)(left_s, [greedy], "another", iterations=5) for left_s in (2.0, 5.0, 10.0)] == [None] * 3


# The most that an owner is promised ---------------------------------------------------------------------------------


def promised(queue, left_s, iterations, owner="one", **recipe):
    """Whether a deadline that is accepted is also promised."""
    reservation, state = Reservation(0, owner), job_state(iterations, **recipe)
    queue.expect(reservation, [], state, left_s, 0, "PNG", owner, 2.0)
    return queue.forget(reservation).deadline_at < math.inf


def test_a_deadline_is_promised_if_its_job_needs_minutes_however_far_ahead_it_is():
    queue, _, _ = queue_with(1.0, max_running=4)
    within = int(MAX_PROMISED_S) - 10
    assert promised(queue, 86_400.0, within) and not promised(queue, 86_400.0, within + 20)
    assert promised(queue, 86_400.0, 10**4, time_budget=100.0) and not promised(queue, 86_400.0, 10**4)


def test_what_one_owner_is_promised_adds_up():
    queue, _, _ = queue_with(1.0, max_running=4)
    queue.expect(Reservation(1), [], job_state(100), 86_400.0, 0, "PNG", "one", 2.0)
    queue.accept(waiting(86_400.0, iterations=100, owner="one"), [])
    for iterations, owner, is_promised in ((90, "one", True), (110, "one", False), (110, "two", True)):
        assert promised(queue, 86_400.0, iterations, owner) == is_promised


def test_what_an_unknown_job_needs_is_no_more_than_the_time_to_its_deadline():
    queue, _, _ = queue_with()
    assert promised(queue, MAX_PROMISED_S - 1, 10**5) and not promised(queue, MAX_PROMISED_S + 1, 10)
    queue.expect(Reservation(1), [], job_state(), MAX_PROMISED_S - 60, 0, "PNG", "one", 2.0)
    assert promised(queue, 59.0, 10) and not promised(queue, 61.0, 10) and promised(queue, 61.0, 10, "two")


def test_a_deadline_of_days_takes_none_from_others():
    """It was accepted because nobody else was there, and then refused all short ones that would have made it late."""
    queue, _, _ = queue_with(0.1, max_running=16)
    queue.expect(Reservation(0), [], job_state(10**5), 10**4 / 0.79, 0, "PNG", "days", 2.0)
    queue.accept(waiting(iterations=10**5, owner="patient"), [])
    assert Asking(queue)(10.0, owner="another", iterations=10) is None
    assert Asking(queue)(600.0, owner="another", iterations=1500) is None


def test_a_deadline_that_cannot_be_promised_is_refused_if_an_even_share_does_not_keep_it():
    queue, _, _ = queue_with(1.0, max_running=16)
    others = [waiting(remaining_s=10**5, owner=f"owner {number}") for number in range(3)]
    ask = Asking(queue)
    least_s = 4 * 400 - 3 * BURST_S
    assert ask(0.98 * least_s, others, "one", iterations=400) is not None
    assert ask(1.02 * least_s, others, "one", iterations=400) is None
    assert ask(0.98 * (4 * 200 - 3 * BURST_S), others, "one", iterations=200) is None  # promised


def test_jobs_of_one_owner_share_what_is_the_owners():
    queue, _, _ = queue_with(1.0, max_running=32)
    ask, others = Asking(queue), [waiting(remaining_s=1000.0, owner="busy") for _ in range(10)]
    assert ask(60.0, others, "another", iterations=30) is None
    assert ask(60.0, others, "busy", iterations=30) is not None


def test_after_a_slow_minute_a_job_is_let_through_and_shows_that_it_is_over():
    queue, clock, throughput = queue_with(10.0)
    ask = Asking(queue)
    assert ask(60.0, iterations=10) is not None
    clock.advance(PROBE_AFTER_S)
    assert ask(60.0, iterations=10) is None and queue.probes == 1
    assert ask(60.0, iterations=10) is not None  # one, not all
    measure(throughput, 1.0, times=30)  # what it measured
    clock.advance(1.0)
    assert ask(60.0, iterations=10) is None and queue.probes == 1


def test_of_many_refusals_one_is_let_through():
    """It is judged by its neighbours, which are measured all the time. One whose own size is measured shows nothing."""
    queue, _, throughput = queue_with(10.0)
    ask = Asking(queue)
    refused = 0
    while ask(60.0, iterations=10, size=80) is not None:
        measure(throughput, 10.0, times=1)
        refused += 1
        assert ask(60.0, iterations=10) is not None
    assert 2 * refused >= PROBE_AFTER_REFUSALS and queue.probes == 1


def test_a_measurement_of_another_aspect_is_one_of_a_neighbour():
    queue, _, throughput = queue_with()
    shape = job_state().shape
    ask = Asking(queue)
    for _ in range(2 * PROBE_AFTER_REFUSALS):
        for _ in range(2):
            throughput.record(shape._replace(height=shape.width, width=shape.height), 1, 1, 10.0)
        if ask(60.0, iterations=10) is None:
            break
    assert queue.probes == 1


PARTS = {
    "decoding": " to decode its images",
    "turn": " until its turn",
    "others": " for the jobs beside it",
    "delivery": " to encode and send its result",
}


@pytest.mark.parametrize("part", PARTS)
def test_a_refusal_names_every_part_of_the_time_that_it_counts(part):
    """They add up to more than the time that is left; with a second more the job is accepted."""
    queue, clock, throughput = queue_with(max_running=1)
    size, image_pixels, running = 2048, 0, []
    if part == "decoding":
        image_pixels = 20_000_000
        for _ in range(3):
            throughput.record_decoding(image_pixels, 1.0)
    elif part == "delivery":
        for _ in range(3):
            throughput.record_delivery("PNG", 2048 * 1024, 0.3)
    elif part == "turn":
        running = [waiting(remaining_s=1.0, owner="another")]
    else:
        for _ in range(60):
            clock.advance(1.0)
            come_and_go(queue, 0.02)
    measure(throughput, 0.1, state=job_state(size=size))
    ask, needed = Asking(queue, image_pixels), {"size": size, "iterations": 100}
    refusal = ask(10.1, running, **needed)
    assert {name for name, words in PARTS.items() if words in str(refusal)} == {part, "delivery"}
    assert " for its iterations" in str(refusal) and total_of(refusal) > 10.1
    assert ask(11.2, running, **needed) is None


UNITS = {"s": 1.0, "ms": 0.001}
PART = re.compile(r"([\d.]+) (m?s) (?:to|until|for)")


def total_of(refusal):
    """The seconds of all parts that a refusal names, which must be the sum that it names."""
    total = sum(float(number) * UNITS[unit] for number, unit in PART.findall(str(refusal)))
    number, unit = re.search(r"at least ([\d.]+) (m?s):", str(refusal)).groups()
    assert total == pytest.approx(float(number) * UNITS[unit], rel=0.01)
    return total


def come_and_go(queue, device_s):
    """A job comes, takes so much of the device and ends."""
    task = waiting()
    queue.accept(task, [])
    queue.remove(task)
    task.device_s = device_s
    queue.record_end(task)


def test_slow_images_of_one_client_refuse_no_deadline_of_another():
    """Whatever decoding and encoding took, more than for ordinary images is not counted."""
    queue, _, throughput = queue_with(0.01)
    for _ in range(50):
        throughput.record_decoding(1_000_000, 60.0)
        throughput.record_delivery("PNG", 64 * 32, 60.0)
    assert Asking(queue, 1_000_000)(1.0, iterations=10) is None


def test_dear_beginnings_of_one_client_refuse_no_deadline_of_another_but_its_own():
    """Style images of four times the side take 16 times as long."""
    queue, _, throughput = queue_with(0.01)
    for _ in range(50):
        throughput.record_beginning(job_state().shape, 60.0)
    ask = Asking(queue)
    assert ask(0.25, iterations=10) is None and ask(0.15, iterations=10) is not None
    assert ask(0.4, iterations=10, style_scale=4.0) is not None


def test_many_short_jobs_of_another_client_refuse_no_deadline():
    queue, clock, throughput = queue_with(1.0)
    ask = Asking(queue)
    assert ask(60.0, iterations=50) is None
    for _ in range(40):
        clock.advance(0.02)
        come_and_go(queue, 0.02)
    assert ask(60.0, iterations=50) is None
    for _ in range(40):
        clock.advance(1.0)
        come_and_go(queue, 1.0)
    measure(throughput, 1.0)
    clock.advance(1.0)
    assert "for the jobs beside it" in str(ask(60.0, iterations=50))  # they need a fifth of the device


def test_the_deadline_of_a_job_leaves_time_to_encode_its_result():
    queue, clock, throughput = queue_with(1.0)
    for _ in range(3):
        throughput.record_delivery("PNG", 64 * 32, 5.0)
    reservation = Reservation(1)
    queue.expect(reservation, [], job_state(), 30.0, 0, "PNG", "", 2.0)
    assert queue.forget(reservation).deadline_at == pytest.approx(clock.now + 25.0, abs=0.01)
    assert queue.forget(reservation) is None
