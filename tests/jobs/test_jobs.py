"""The registry and its jobs, on a clock and timers that the test moves by hand."""

import dataclasses
import types

import pytest
import torch

from gramophone.recipe import Recipe
from gramophone_server.config import Limits
from gramophone_server.domain.events import (
    Accepted,
    Answer,
    Changed,
    Finished,
    Frame,
    Paused,
    Picture,
    Progress,
    Resumed,
    Saved,
    SavedState,
    Waiting,
)
from gramophone_server.domain.job import Losses, Report, StyleJob
from gramophone_server.domain.job_state import JobState
from gramophone_server.errors import (
    Cancelled,
    Diverged,
    EngineFailed,
    JobControlled,
    JobNotFound,
    ShuttingDown,
    TooManyWatchers,
)
from gramophone_server.images.codec import Encoding, Format
from gramophone_server.jobs import job as job_module
from gramophone_server.jobs.event_log import LOG_LENGTH
from gramophone_server.jobs.job import JobPhase
from gramophone_server.jobs.mailbox import CheckpointRule, FrameRule
from gramophone_server.jobs.registry import JobRegistry
from tests.support.clock import ManualClock, ManualLoop

LOSSES = Losses(content={"relu4_2": 1.0}, style={"relu1_1": 2.0}, tv=0.5)


@pytest.fixture
def loop():
    return ManualLoop(ManualClock(1000.0, epoch_s=5000.0))


@pytest.fixture
def registry(loop):
    """Makes a registry with limits; its scheduler notes what was withdrawn."""

    def make(**limits):
        withdrawn = []
        scheduler = types.SimpleNamespace(withdrawn=withdrawn, withdraw=withdrawn.append)
        return JobRegistry(scheduler, Limits(**limits), loop=loop, clock=loop.clock.time)

    return make


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock of frames and checkpoints."""
    clock = ManualClock()
    monkeypatch.setattr(job_module, "time", clock)
    return clock


def work(width=64, height=32):
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    return JobState(
        StyleJob(
            recipe=Recipe(size=max(width, height), smallest_size=0, iterations=10),
            content=image,
            styles=(image,),
            style_weights=(1.0,),
            start=None,
            seed=1,
        )
    )


def create(jobs, request_id="", grace_s=0.0, **size):
    """A job that was accepted, and its first watcher."""
    job = jobs.create(request_id, grace_s, Encoding(Format.PNG, 0))
    watcher = job.watch()
    assert job.admit(work(**size))
    job.publish(Accepted(0))
    return job, watcher


def picture():
    return Picture(lambda: torch.zeros(32, 64, 3, dtype=torch.uint8))


def progress(iteration):
    return Progress(Report(iteration, 1000, 64, 32, LOSSES, 0), 10.0, 1.0)


def finished():
    return Finished(picture(), LOSSES, 10, 1.0)


def unread(watcher):
    """What the watcher could read now, as (number, event)."""
    items = []
    while (item := watcher._next()) is not None:
        items.append(item)
    return items


def numbers(watcher):
    return [number for number, _ in unread(watcher)]


def kinds(watcher):
    return [type(event).__name__ for _, event in unread(watcher)]


# What a watcher hears -------------------------------------------------------------------------------------------------


def test_every_watcher_hears_the_same_numbers(registry):
    job, first = create(registry())
    heard = unread(first)
    for iteration in (1, 2, 3):
        job.publish(progress(iteration))
        heard += unread(first)
    late = job.watch()
    job.publish(finished())
    assert heard + unread(first) == unread(late)
    assert [number for number, _ in heard] == [1, 2, 3, 4]


def test_the_log_is_bounded_and_what_a_job_is_stays_known(registry):
    job, _ = create(registry())
    for iteration in range(1, 3 * LOG_LENGTH + 1):
        job.publish(progress(iteration))
    items = unread(job.watch())
    assert len(items) == 1 + LOG_LENGTH
    assert items[0] == (1, Accepted(0))
    assert [event.report.iteration for _, event in items[1:]] == list(range(2 * LOG_LENGTH + 1, 3 * LOG_LENGTH + 1))


def test_a_watcher_gets_what_came_after_the_number_that_it_has(registry):
    job, _ = create(registry())
    for iteration in range(1, 6):
        job.publish(progress(iteration))
    assert numbers(job.watch()) == [1, 2, 3, 4, 5, 6]
    assert numbers(job.watch(after=4)) == [5, 6]
    assert numbers(job.watch(after=6)) == []
    ahead = job.watch(after=99)  # a number of some other job
    assert numbers(ahead) == []
    job.publish(finished())
    assert numbers(ahead) == [7]
    assert numbers(job.watch(after=6)) == [7]


def test_only_the_newest_frame_is_kept_and_only_for_who_wants_frames(registry, clock):
    job, first = create(registry())
    job.leave(job.watch())
    eye = job.watch(FrameRule())
    for iteration in (1, 2, 3):
        clock.advance(1.0)
        job.publish(progress(iteration))
        job.offer_frame(iteration, lambda: torch.zeros)
        unread(eye)
    frames = [event.iteration for _, event in unread(job.watch(FrameRule())) if isinstance(event, Frame)]
    assert frames == [3]
    assert "Frame" not in kinds(job.watch()) + kinds(first)
    job.publish(finished())
    assert "Frame" not in kinds(job.watch(FrameRule()))


def test_the_last_good_picture_outlives_a_divergence_for_everybody(registry, loop):
    job, watcher = create(registry())
    job.publish(Frame(3, picture()))
    job.fail(Diverged(4))
    loop.advance()
    assert kinds(watcher)[-1] == kinds(job.watch())[-1] == "Frame"


def test_one_picture_is_taken_for_all_who_are_due_one(registry, clock):
    job, blind = create(registry())
    even, third = job.watch(FrameRule(every_iterations=2)), job.watch(FrameRule(every_iterations=3))
    assert job.iterations_until_next_frame(0) == 2
    assert job.iterations_until_next_frame(4) == 2 and job.iterations_until_next_frame(5) == 1
    taken, seen = [], {"even": [], "third": []}

    def take():
        taken.append(iteration)
        return lambda: torch.zeros(32, 64, 3, dtype=torch.uint8)

    for iteration in range(1, 8):
        clock.advance(1.0)
        job.offer_frame(iteration, take)
        for name, watcher in (("even", even), ("third", third)):
            seen[name] += [(event.iteration, event.picture) for _, event in unread(watcher) if isinstance(event, Frame)]
    assert taken == [2, 3, 4, 6]
    assert [iteration for iteration, _ in seen["even"]] == [2, 4, 6]
    assert [iteration for iteration, _ in seen["third"]] == [3, 6]
    assert seen["even"][-1][1] is seen["third"][-1][1]
    assert kinds(blind) == ["Accepted"]


def test_nobody_who_looks_means_no_picture(registry):
    job, _ = create(registry())
    assert job.iterations_until_next_frame(0) is None
    job.offer_frame(1, lambda: pytest.fail("a picture was taken for nobody"))


def test_a_position_is_told_when_it_has_changed(registry):
    jobs = registry()
    job = jobs.create("", 0.0, Encoding(Format.PNG, 0))
    watcher = job.watch()
    job.publish(Accepted(2))
    for position in (2, 1, 1):
        job.publish(Waiting(position))
    assert unread(watcher) == [(1, Accepted(2)), (2, Waiting(1))]
    assert job.position == 1
    job.started()
    assert (job.position, job.state) == (0, JobPhase.RUNNING)


def test_nothing_happens_after_the_end(registry, loop):
    job, watcher = create(registry())
    job.cancel()
    job.publish(progress(1))
    job.publish(finished())
    job.offer_frame(1, lambda: pytest.fail("a picture was taken"))
    job.fail(EngineFailed())
    job.started()
    job.cancel()
    loop.advance()
    assert (job.state, job.result, job.started_at) == (JobPhase.CANCELLED, None, None)
    assert isinstance(job.error, Cancelled)
    assert kinds(watcher) == ["Accepted"]


def test_what_changes_a_job_is_never_lost(registry):
    job, watcher = create(registry())
    recipe = dataclasses.replace(job.plan.recipe, beta=7.0)
    told = [Paused(1), Resumed(1), Paused(1), Changed(2, recipe, 12), Changed(2, recipe, 13), Resumed(1)]
    for event in told:
        job.publish(progress(1))
        job.publish(event)
    job.publish(progress(2))
    items = unread(watcher)
    assert [event for _, event in items[1:]] == [*told, progress(2)]  # of the progress only the newest
    assert [number for number, _ in items] == sorted(number for number, _ in items)
    assert [event for _, event in unread(job.watch()) if type(event) is Paused] == [Paused(1)] * 2


def test_a_job_is_what_its_controller_has_made_of_it(registry, loop):
    job, _ = create(registry())
    job.started()
    job.publish(Paused(3))
    assert (job.state, job.ended) == (JobPhase.PAUSED, False)
    job.publish(Changed(4, dataclasses.replace(job.plan.recipe, beta=7.0), 25))
    assert (job.plan.recipe.beta, job.plan.iterations, job.plan.changed_at) == (7.0, 25, 4)
    assert (job.admitted.recipe.beta, job.admitted.iterations) == (3.0, 10)
    job.publish(Resumed(3))
    assert job.state is JobPhase.QUEUED  # others may be before it
    began_at = job.started_at
    loop.advance(5)
    job.started()
    assert (job.state, job.started_at) == (JobPhase.RUNNING, began_at)
    for iteration in range(LOG_LENGTH):
        job.publish(progress(iteration))
    assert kinds(job.watch())[:2] == ["Accepted", "Changed"]  # however long ago
    job.publish(Paused(300))
    job.cancel()
    assert job.state is JobPhase.CANCELLED


# Frames that are acknowledged -----------------------------------------------------------------------------------------


def see(job, clock, iteration):
    """Whether a picture was taken for somebody, a second later."""
    clock.advance(1.0)
    taken = []
    job.offer_frame(iteration, lambda: taken.append(iteration))
    return bool(taken)


def test_credit_bounds_the_frames_on_their_way(registry, clock):
    job, _ = create(registry())
    eye = job.watch(FrameRule(max_in_flight=2))
    frames = []

    def look(iteration):
        see(job, clock, iteration)
        frames.extend((number, e.iteration, e.dropped) for number, e in unread(eye) if isinstance(e, Frame))
        return [iteration for _, iteration, _ in frames]

    assert [look(iteration) for iteration in (1, 2, 3, 4)][-1] == [1, 2]
    eye.acknowledge(frames[0][0])
    eye.acknowledge(frames[0][0])  # twice is once
    assert [look(iteration) for iteration in (5, 6)][-1] == [1, 2, 5]
    assert frames[-1][2] == 2  # 3 and 4 were due
    eye.acknowledge(frames[-1][0])  # and all before
    assert [look(iteration) for iteration in (7, 8, 9)][-1] == [1, 2, 5, 7, 8]


def test_an_unread_frame_is_replaced_but_credit_is_for_what_was_read(registry, clock):
    job, _ = create(registry())
    eye = job.watch(FrameRule(max_in_flight=1))
    assert all(see(job, clock, iteration) for iteration in (1, 2, 3))
    (frame,) = [event for _, event in unread(eye) if isinstance(event, Frame)]
    assert (frame.iteration, frame.dropped) == (3, 2)
    assert not see(job, clock, 4)


def test_the_last_good_picture_needs_no_credit(registry, clock):
    job, _ = create(registry())
    eye = job.watch(FrameRule(max_in_flight=1))
    see(job, clock, 1)
    unread(eye)
    job.publish(Frame(2, picture()))
    assert kinds(eye) == ["Frame"]


# Checkpoints ----------------------------------------------------------------------------------------------------------


def save(job, clock, iteration, after_s):
    """Of which kinds the state was taken."""
    clock.advance(after_s)
    taken = []

    def take(light):
        taken.append(light)
        return SavedState(light, lambda: b"")

    job.offer_checkpoint(iteration, take)
    return taken


def test_the_state_is_taken_once_for_each_kind_that_somebody_is_due(registry, clock):
    job, blind = create(registry())
    assert save(job, clock, 1, 10) == []
    light, lighter = (job.watch(None, CheckpointRule(light=True)) for _ in range(2))
    full = job.watch(None, CheckpointRule(min_interval_s=3.0))
    assert sorted(save(job, clock, 2, 10)) == [False, True]
    assert save(job, clock, 3, 0.9) == []  # at most one a second
    assert save(job, clock, 4, 0.2) == [True]
    heard = [[(e.iteration, e.state) for _, e in unread(m) if isinstance(e, Saved)] for m in (light, lighter, full)]
    assert heard[0] == heard[1] != heard[2]
    assert [iteration for iteration, _ in heard[0]] == [4]  # the newest of two
    assert [(iteration, state.light) for iteration, state in heard[2]] == [(2, False)]
    assert save(job, clock, 5, 2.0) == [True, False]
    assert "Saved" not in kinds(blind) + kinds(job.watch(None, CheckpointRule()))  # too large to be remembered


@pytest.mark.parametrize(("rules", "light"), [([], True), ([True], True), ([True, False], False)])
def test_everybody_gets_the_picture_and_the_state_of_a_job_that_is_interrupted(registry, rules, light):
    job, watcher = create(registry())
    for rule in rules:
        job.watch(None, CheckpointRule(light=rule))
    unread(watcher)
    taken = []
    job.interrupted(5, picture(), lambda light: taken.append(light) or SavedState(light, lambda: b""))
    job.fail(ShuttingDown())
    assert taken == [light]
    assert [(type(event).__name__, event.iteration) for _, event in unread(watcher)] == [("Frame", 5), ("Saved", 5)]


def test_a_job_that_has_ended_is_not_interrupted(registry):
    job, watcher = create(registry())
    job.publish(finished())
    job.interrupted(5, picture(), lambda light: SavedState(light, lambda: b""))
    assert kinds(watcher) == ["Accepted", "Finished"]


# The controller -------------------------------------------------------------------------------------------------------


def test_a_job_has_one_controller_at_a_time(registry):
    job, maker = create(registry())
    first = job.watch(controls=True)
    with pytest.raises(JobControlled):
        job.watch(controls=True)
    job.give_up_control(maker)  # it has none
    job.leave(maker)
    with pytest.raises(JobControlled, match=f"job '{job.id}' already has a controller"):
        job.watch(controls=True)
    job.give_up_control(first)
    second = job.watch(controls=True)
    job.leave(second)
    third = job.watch(controls=True)
    job.give_up_control(first)
    with pytest.raises(JobControlled):
        job.watch(controls=True)
    job.publish(finished())
    assert kinds(job.watch(controls=True))[-1] == kinds(third)[-1] == "Finished"


def test_an_answer_is_for_one_alone_and_what_was_taken_has_a_number(registry):
    job, other = create(registry())
    controller = job.watch(controls=True)
    unread(other), unread(controller)
    taken = Frame(3, picture())
    assert job.answer(controller, Answer(8, 1))
    assert job.answer(controller, Answer(9, 3, taken=taken))
    job.publish(progress(4))
    assert [(n, getattr(e, "command_id", None)) for n, e in unread(controller)] == [(0, 8), (2, 9), (3, None)]
    assert numbers(other) == [3]
    assert numbers(job.watch()) == [1, 3]
    job.publish(finished())
    assert not job.answer(controller, Answer(10, 3, taken=taken))
    assert job.answer(controller, Answer(11, 4))


def test_a_job_has_so_many_watchers_at_most(registry):
    job, first = create(registry(max_watchers=2))
    second = job.watch()
    with pytest.raises(TooManyWatchers, match="the job already has 2 watchers"):
        job.watch()
    job.leave(second)
    second = job.watch()
    job.publish(finished())
    assert kinds(job.watch()) == kinds(first) == kinds(second)


# Watchers that leave --------------------------------------------------------------------------------------------------


def test_the_last_watcher_to_leave_stops_the_job(registry):
    jobs = registry()
    job, first = create(jobs)
    second = job.watch()
    job.leave(first)
    job.leave(first)  # twice is once
    assert not job.ended
    job.leave(second)
    assert job.cancelled and jobs.scheduler.withdrawn == [job]


def test_a_grace_is_waited_for_and_a_watcher_that_comes_back_ends_it(registry, loop):
    jobs = registry()
    job, watcher = create(jobs, grace_s=10.0)
    for _ in range(3):
        job.leave(watcher)
        assert job.expires_at == 5000 + loop.time() + 10
        loop.advance(9.0)
        assert not job.ended
        watcher = job.watch()
        assert job.expires_at is None and loop.timers == []
        loop.advance(20.0)
    job.leave(watcher)
    loop.advance(9.9)
    assert not job.ended
    loop.advance(0.2)
    assert job.cancelled
    assert jobs.find(job.id).expires_at == pytest.approx(5000 + loop.time() + 600, abs=1)


def test_a_job_that_ends_alone_is_kept_from_its_end(registry, loop):
    jobs = registry(max_kept_s=60)
    job, watcher = create(jobs, grace_s=10.0)
    job.leave(watcher)
    loop.advance(5)
    job.publish(finished())
    loop.advance(30)  # its grace is over, which is nothing to it
    assert job.state is JobPhase.SUCCEEDED and jobs.scheduler.withdrawn == []
    assert jobs.find(job.id) is job
    late = job.watch()
    assert kinds(late) == ["Accepted", "Finished"]
    job.leave(late)
    assert len(loop.timers) == 1
    loop.advance(30)
    with pytest.raises(JobNotFound):
        jobs.find(job.id)


# How long a job is kept -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "state"),
    [
        (lambda job: job.publish(finished()), JobPhase.SUCCEEDED),
        (lambda job: job.fail(EngineFailed()), JobPhase.FAILED),
        (lambda job: job.cancel(), JobPhase.CANCELLED),
    ],
    ids=["succeeded", "failed", "cancelled"],
)
def test_a_job_that_ended_is_kept_for_a_while(registry, loop, end, state):
    jobs = registry(max_kept_s=60)
    job, _ = create(jobs)
    loop.advance(1000)
    end(job)
    loop.advance()
    assert (job.state, job.ended_at, job.expires_at) == (state, 5000 + loop.time(), 5000 + loop.time() + 60)
    loop.advance(59)
    assert jobs.find(job.id) is job
    loop.advance(1.5)
    assert len(jobs) == 0 and loop.timers == []


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_clock_that_is_set_moves_none_of_a_jobs_times(registry, loop, hours):
    jobs = registry(max_kept_s=60)
    job, _ = create(jobs)
    loop.advance(1)
    job.started()
    loop.clock.epoch_s += hours * 3600
    loop.advance(2)
    job.publish(finished())
    loop.advance()
    assert (job.created_at, job.started_at, job.ended_at, job.expires_at) == (6000, 6001, 6003, 6063)
    loop.advance(59)
    assert jobs.find(job.id) is job
    assert create(jobs)[0].created_at == 5000 + hours * 3600 + loop.time()  # the next one goes by the clock as it is


def test_the_one_that_ended_first_makes_room(registry, loop):
    jobs = registry(max_kept=2)
    made = [create(jobs)[0] for _ in range(4)]
    running, *others = made
    for job in reversed(others):
        job.publish(finished())
        loop.advance()
    assert list(jobs.newest_first()) == [others[1], others[0], running]
    running.publish(finished())
    loop.advance()
    assert list(jobs.newest_first()) == [others[0], running]
    assert len(loop.timers) == 2


def test_room_is_counted_in_bytes_of_results_too(registry, loop):
    jobs = registry(max_kept_bytes=2 * 3 * 64 * 32)
    failed, _ = create(jobs)
    failed.fail(EngineFailed())  # has no picture, so it takes no room
    loop.advance()
    first, second, third = (create(jobs)[0] for _ in range(3))
    for job in (first, second):
        job.publish(finished())
        loop.advance()
    assert len(jobs) == 4
    third.publish(finished())
    loop.advance()
    assert set(jobs.newest_first()) == {second, third}


def test_a_result_larger_than_all_room_is_not_kept(registry, loop):
    jobs = registry(max_kept_bytes=100)
    job, watcher = create(jobs)
    job.publish(finished())
    loop.advance()
    assert len(jobs) == 0 and loop.timers == []
    assert kinds(watcher) == ["Accepted", "Finished"]  # who was there has it


def test_no_room_keeps_nothing(registry, loop):
    jobs = registry(max_kept=0)
    job, _ = create(jobs, request_id="r")
    job.publish(finished())
    loop.advance()
    assert len(jobs) == 0 and jobs.of_request("r") is None


def test_a_job_that_was_refused_is_not_kept(registry, loop):
    jobs = registry()
    job = jobs.create("r", 0.0, Encoding(Format.PNG, 0))
    job.watch()
    job.fail(EngineFailed())
    loop.advance()
    assert len(jobs) == 0 and jobs.of_request("r") is None and loop.timers == []


def test_a_closed_registry_has_no_job_and_no_timer(registry, loop):
    jobs = registry()
    ended, left, running = (create(jobs, grace_s=10.0) for _ in range(3))
    ended[0].publish(finished())
    left[0].leave(left[1])
    loop.advance()
    assert len(loop.timers) == 2
    jobs.close()
    running[0].publish(finished())  # the compute thread is a little late
    loop.advance(10_000)
    assert len(jobs) == 0 and loop.timers == []


# Request ids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failed", [True, False], ids=["failed", "cancelled"])
def test_a_job_without_a_result_gives_its_request_up(registry, loop, failed):
    jobs = registry(max_kept_s=60)
    job, _ = create(jobs, request_id="r")
    assert jobs.of_request("r") is job
    job.fail(EngineFailed() if failed else Cancelled())
    assert jobs.of_request("r") is None  # at once, not when the loop gets to it
    loop.advance(30)
    again, _ = create(jobs, request_id="r")
    assert jobs.of_request("r") is again and jobs.find(job.id) is job
    loop.advance(31)  # the first is forgotten, and takes nothing of the second along
    with pytest.raises(JobNotFound):
        jobs.find(job.id)
    assert jobs.of_request("r") is again


def test_a_request_finds_the_result_of_its_job_while_that_is_kept(registry, loop):
    jobs = registry(max_kept_s=60)
    job, _ = create(jobs, request_id="r")
    job.publish(finished())
    loop.advance(59)
    assert jobs.of_request("r") is job
    loop.advance(2)
    assert jobs.of_request("r") is None


def test_jobs_without_a_request_id_are_strangers(registry):
    jobs = registry()
    create(jobs)
    assert jobs.of_request("") is None


def test_pages_go_from_the_newest_to_the_oldest(registry):
    jobs = registry()
    made = [create(jobs)[0] for _ in range(4)]
    assert list(jobs.newest_first()) == made[::-1]
    assert list(jobs.newest_first(before=made[2].ordinal)) == [made[1], made[0]]
