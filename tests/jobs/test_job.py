"""A job: its events, watchers, controller and timer, on a clock and timers that the test moves by hand."""

import dataclasses
import sys

import pytest

from gramophone_server.domain.events import (
    Accepted,
    Answer,
    Changed,
    Frame,
    Paused,
    Resumed,
    Saved,
    SavedState,
    Waiting,
)
from gramophone_server.domain.job import Losses, Report
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
from gramophone_server.jobs.event_log import LOG_BYTES, LOG_LENGTH
from gramophone_server.jobs.job import MAX_UNREAD, JobPhase
from gramophone_server.jobs.mailbox import CheckpointRule, FrameRule, Mailbox
from tests.support.jobs import create, finished, kinds, numbers, picture, progress, unread


def send_frame(job, iteration, now):
    """As the worker does. Returns whether a picture was taken."""
    watchers = job.collect_frame_requests(iteration, now)
    if watchers:
        job.publish(Frame(iteration, picture()), watchers)
    return bool(watchers)


# What a watcher receives ----------------------------------------------------------------------------------------------


def test_all_watchers_receive_the_same_numbers(registry):
    job, first = create(registry())
    received = unread(first)
    for iteration in (1, 2, 3):
        job.publish(progress(iteration))
        received += unread(first)
    late = job.watch()
    job.publish(finished())
    assert received + unread(first) == unread(late)
    assert [number for number, _ in received] == [1, 2, 3, 4]


def test_the_log_is_bounded_but_keeps_the_acceptance(registry):
    job, _ = create(registry())
    for iteration in range(1, 3 * LOG_LENGTH + 1):
        job.publish(progress(iteration))
    items = unread(job.watch())
    assert len(items) == 1 + LOG_LENGTH
    assert items[0] == (1, Accepted(0))
    assert [event.report.iteration for _, event in items[1:]] == list(range(2 * LOG_LENGTH + 1, 3 * LOG_LENGTH + 1))


def test_the_log_is_bounded_in_bytes_whatever_a_report_contains(registry):
    losses = Losses({f"relu{i}": 1.0 for i in range(16)}, {f"conv{i}": 1.0 for i in range(16)}, 0.5)
    job, _ = create(registry())
    empty = job.bytes
    for iteration in range(1, LOG_LENGTH + 1):
        job.publish(dataclasses.replace(progress(iteration), report=Report(iteration, 999, 64, 32, 1, 1, losses, 0)))
        assert job.bytes - empty <= LOG_BYTES
    items = unread(job.watch())
    assert [event.report.iteration for _, event in items[1:]] == list(
        range(LOG_LENGTH - len(items) + 2, LOG_LENGTH + 1)
    )
    assert LOG_BYTES // 4000 < len(items) < LOG_LENGTH
    kept = sum(sys.getsizeof(part) for part in (losses.content, losses.style)) + 32 * sys.getsizeof(1.0)
    assert len(items) * kept < LOG_BYTES


def test_a_watcher_receives_the_events_after_its_number(registry):
    job, _ = create(registry())
    for iteration in range(1, 6):
        job.publish(progress(iteration))
    assert numbers(job.watch()) == [1, 2, 3, 4, 5, 6]
    assert numbers(job.watch(after=4)) == [5, 6]
    assert numbers(job.watch(after=6)) == []
    ahead = job.watch(after=99)  # a number of another job
    assert numbers(ahead) == []
    job.publish(finished())
    assert numbers(ahead) == [7]
    assert numbers(job.watch(after=6)) == [7]


def test_only_the_newest_frame_is_kept_and_only_for_watchers_of_frames(registry):
    job, first = create(registry())
    job.leave(job.watch())
    viewer = job.watch(FrameRule())
    for iteration in (1, 2, 3):
        job.publish(progress(iteration))
        assert send_frame(job, iteration, now=iteration)
        unread(viewer)
    frames = [event.iteration for _, event in unread(job.watch(FrameRule())) if isinstance(event, Frame)]
    assert frames == [3]
    assert "Frame" not in kinds(job.watch()) + kinds(first)
    job.publish(finished())
    assert "Frame" not in kinds(job.watch(FrameRule()))


def test_the_last_good_picture_of_a_diverged_job_is_for_all_watchers(registry, loop):
    job, watcher = create(registry())
    job.publish(Frame(3, picture()))
    job.fail(Diverged(4))
    loop.advance()
    assert kinds(watcher)[-1] == kinds(job.watch())[-1] == "Frame"


def test_one_frame_is_for_all_watchers_for_which_it_is_due(registry):
    job, blind = create(registry())
    even, third = job.watch(FrameRule(every_iterations=2)), job.watch(FrameRule(every_iterations=3))
    assert job.iterations_until_next_frame(0) == 2
    assert job.iterations_until_next_frame(4) == 2 and job.iterations_until_next_frame(5) == 1
    sent, seen = [], {"even": [], "third": []}
    for iteration in range(1, 8):
        if send_frame(job, iteration, now=iteration):
            sent.append(iteration)
        for name, watcher in (("even", even), ("third", third)):
            seen[name] += [(event.iteration, event.picture) for _, event in unread(watcher) if isinstance(event, Frame)]
    assert sent == [2, 3, 4, 6]
    assert [iteration for iteration, _ in seen["even"]] == [2, 4, 6]
    assert [iteration for iteration, _ in seen["third"]] == [3, 6]
    assert seen["even"][-1][1] is seen["third"][-1][1]
    assert kinds(blind) == ["Accepted"]


def test_watchers_are_not_compared_with_each_other_to_send_a_frame(registry, monkeypatch):
    job, _ = create(registry(max_watchers=1024))
    viewers = [job.watch(FrameRule()) for _ in range(1000)]
    comparisons = []
    monkeypatch.setattr(Mailbox, "__eq__", lambda self, other: comparisons.append(other) or self is other)
    assert send_frame(job, 1, now=1.0)
    assert len(comparisons) < 1000, "with n watchers, n * n comparisons take 5 ms of the compute thread at 1000"
    assert all("Frame" in kinds(viewer) for viewer in viewers)


def test_without_viewers_no_frame_is_wanted(registry):
    job, _ = create(registry())
    assert job.iterations_until_next_frame(0) is None
    assert not job.collect_frame_requests(1, 100.0)


def test_a_position_is_sent_when_it_has_changed(registry):
    jobs = registry()
    job = jobs.create("", 0.0, Encoding(Format.PNG, 0))
    watcher = job.watch()
    job.publish(Accepted(2))
    for position in (2, 1, 1):
        job.publish(Waiting(position))
    assert unread(watcher) == [(1, Accepted(2)), (2, Waiting(1))]
    assert job.position == 1
    job.started()
    assert (job.position, job.phase) == (0, JobPhase.RUNNING)


def test_a_job_that_gives_its_place_up_is_queued_again(registry):
    jobs = registry()
    job = jobs.create("", 0.0, Encoding(Format.PNG, 0))
    watcher = job.watch()
    job.publish(Accepted(0))
    job.started()
    job.publish(Waiting(0))
    assert (job.position, job.phase) == (0, JobPhase.QUEUED)
    job.started()
    assert job.phase is JobPhase.RUNNING
    assert unread(watcher) == [(1, Accepted(0)), (2, Waiting(0))]


def test_nothing_changes_after_the_end(registry, loop):
    job, watcher = create(registry())
    job.cancel()
    job.publish(progress(1))
    job.publish(finished())
    assert not job.collect_frame_requests(1, 100.0)
    job.fail(EngineFailed())
    job.started()
    job.cancel()
    loop.advance()
    assert (job.phase, job.result, job.started_at) == (JobPhase.CANCELLED, None, None)
    assert isinstance(job.error, Cancelled)
    assert kinds(watcher) == ["Accepted"]


def test_a_slow_watcher_gets_the_newest_state_of_a_job_and_a_later_one_its_history(registry):
    job, watcher = create(registry())
    recipe = dataclasses.replace(job.summary.recipe, beta=7.0)
    changes = [Paused(1), Resumed(1), Paused(1), Changed(2, recipe, 12), Changed(2, recipe, 13), Resumed(1)]
    for event in changes:
        job.publish(progress(1))
        job.publish(event)
    job.publish(progress(2))
    items = unread(watcher)
    assert [event for _, event in items[1:]] == [Changed(2, recipe, 13), Resumed(1), progress(2)]
    assert [number for number, _ in items] == sorted(number for number, _ in items)
    assert [event for _, event in unread(job.watch()) if type(event) is Paused] == [Paused(1)] * 2


def test_phase_and_summary_follow_the_controller(registry, loop):
    job, _ = create(registry())
    job.started()
    job.publish(Paused(3))
    assert (job.phase, job.ended) == (JobPhase.PAUSED, False)
    job.publish(Changed(4, dataclasses.replace(job.summary.recipe, beta=7.0), 25))
    assert (job.summary.recipe.beta, job.summary.iterations, job.summary.changed_at) == (7.0, 25, 4)
    assert (job.admitted_summary.recipe.beta, job.admitted_summary.iterations) == (3.0, 10)
    job.publish(Resumed(3))
    assert job.phase is JobPhase.QUEUED  # other jobs may run in its place
    started_at = job.started_at
    loop.advance(5)
    job.started()
    assert (job.phase, job.started_at) == (JobPhase.RUNNING, started_at)
    for iteration in range(LOG_LENGTH):
        job.publish(progress(iteration))
    assert kinds(job.watch())[:2] == ["Accepted", "Changed"]  # however old they are
    job.publish(Paused(300))
    job.cancel()
    assert job.phase is JobPhase.CANCELLED


# Frames that are acknowledged -----------------------------------------------------------------------------------------


def test_unacknowledged_frames_are_bounded(registry):
    job, _ = create(registry())
    viewer = job.watch(FrameRule(max_in_flight=2))
    frames = []

    def look(iteration):
        send_frame(job, iteration, now=iteration)
        frames.extend((number, e.iteration, e.dropped) for number, e in unread(viewer) if isinstance(e, Frame))
        return [iteration for _, iteration, _ in frames]

    assert [look(iteration) for iteration in (1, 2, 3, 4)][-1] == [1, 2]
    viewer.acknowledge(frames[0][0])
    viewer.acknowledge(frames[0][0])  # has no effect
    assert [look(iteration) for iteration in (5, 6)][-1] == [1, 2, 5]
    assert frames[-1][2] == 2  # 3 and 4 were due
    viewer.acknowledge(frames[-1][0])  # and all before
    assert [look(iteration) for iteration in (7, 8, 9)][-1] == [1, 2, 5, 7, 8]


def test_an_unread_frame_is_replaced_and_is_not_in_flight(registry):
    job, _ = create(registry())
    viewer = job.watch(FrameRule(max_in_flight=1))
    assert all(send_frame(job, iteration, now=iteration) for iteration in (1, 2, 3))
    (frame,) = [event for _, event in unread(viewer) if isinstance(event, Frame)]
    assert (frame.iteration, frame.dropped) == (3, 2)
    assert not send_frame(job, 4, now=4)


def test_the_last_good_picture_comes_even_if_frames_are_unacknowledged(registry):
    job, _ = create(registry())
    viewer = job.watch(FrameRule(max_in_flight=1))
    send_frame(job, 1, now=1)
    unread(viewer)
    job.publish(Frame(2, picture()))
    assert kinds(viewer) == ["Frame"]


# Checkpoints ----------------------------------------------------------------------------------------------------------


def send_checkpoints(job, iteration, now):
    """As the worker does. Returns of which kinds a state was taken."""
    sent = []
    for light in (True, False):
        if watchers := job.collect_checkpoint_requests(now, light=light):
            job.publish(Saved(iteration, SavedState(light, lambda: b"", 0)), watchers)
            sent.append(light)
    return sent


def test_one_state_of_each_kind_is_for_all_watchers_for_which_it_is_due(registry):
    job, blind = create(registry())
    assert send_checkpoints(job, 1, now=10.0) == []
    light, lighter = (job.watch(None, CheckpointRule(light=True)) for _ in range(2))
    full = job.watch(None, CheckpointRule(min_interval_s=3.0))
    assert sorted(send_checkpoints(job, 2, now=20.0)) == [False, True]
    assert send_checkpoints(job, 3, now=20.9) == []  # at most one a second
    assert send_checkpoints(job, 4, now=21.1) == [True]
    received = [[(e.iteration, e.state) for _, e in unread(m) if isinstance(e, Saved)] for m in (light, lighter, full)]
    assert received[0] == received[1] != received[2]
    assert [iteration for iteration, _ in received[0]] == [4]  # the newest of two
    assert [(iteration, state.light) for iteration, state in received[2]] == [(2, False)]
    assert send_checkpoints(job, 5, now=23.1) == [True, False]
    assert "Saved" not in kinds(blind) + kinds(job.watch(None, CheckpointRule()))  # too large for the log


@pytest.mark.parametrize(("rules", "light"), [([], True), ([True], True), ([True, False], False)])
def test_a_light_checkpoint_is_enough_unless_a_watcher_wants_full_ones(registry, rules, light):
    job, _ = create(registry())
    for rule in rules:
        job.watch(None, CheckpointRule(light=rule))
    assert job.accepts_light_checkpoint is light


def test_events_without_a_choice_of_watchers_are_for_all_of_them(registry):
    """As the picture and the state of a job that the server ends when it stops."""
    job, watcher = create(registry())
    unread(watcher)
    job.publish(Frame(5, picture()))
    job.publish(Saved(5, SavedState(True, lambda: b"", 0)))
    job.fail(ShuttingDown())
    assert [(type(event).__name__, event.iteration) for _, event in unread(watcher)] == [("Frame", 5), ("Saved", 5)]


def test_a_job_that_has_ended_receives_no_picture_and_no_state(registry):
    job, watcher = create(registry())
    job.publish(finished())
    job.publish(Frame(5, picture()))
    job.publish(Saved(5, SavedState(True, lambda: b"", 0)))
    assert kinds(watcher) == ["Accepted", "Finished"]


# Pictures and states that slow watchers keep --------------------------------------------------------------------------


def unread_events(watchers, kind):
    return {id(getattr(e, "picture", None) or e.state) for w in watchers for _, e in unread(w) if isinstance(e, kind)}


def test_slow_watchers_keep_few_different_frames_and_each_gets_one(registry):
    job, _ = create(registry())
    job.publish(progress(1))
    slow = [job.watch(FrameRule(every_iterations=every)) for every in (1, 2, 3, 5, 7, 11, 13, 17, 19, 23)]
    for watcher in slow:
        unread(watcher)
    for iteration in range(1, 24):
        send_frame(job, iteration, now=float(iteration))
    assert 2 <= len(unread_events(slow, Frame)) <= MAX_UNREAD[Frame]


def test_a_frame_that_a_slow_watcher_lost_is_counted_and_the_next_comes(registry):
    job, _ = create(registry())
    watchers = [job.watch(FrameRule(every_iterations=every)) for every in (7, 11, 13)]
    for iteration in range(1, 15):
        send_frame(job, iteration, now=float(iteration))
    assert [kinds(watcher).count("Frame") for watcher in watchers] == [1, 0, 1]  # 11 was the oldest
    send_frame(job, 22, now=22.0)
    (frame,) = [event for _, event in unread(watchers[1]) if isinstance(event, Frame)]
    assert (frame.iteration, frame.dropped) == (22, 1)


@pytest.mark.parametrize("light", [False, True])
def test_slow_watchers_keep_few_different_states_and_each_gets_one(registry, light):
    job, _ = create(registry())
    slow = [job.watch(None, CheckpointRule(min_interval_s=3600.0, light=light)) for _ in range(8)]
    other = job.watch(None, CheckpointRule(light=not light))
    due = iter(range(8))
    for watcher in slow:  # each at another time
        state = SavedState(light, bytes, 0)
        job.publish(Saved(next(due), state), {watcher})
    job.publish(Saved(100, SavedState(not light, bytes, 0)), {other})
    received = [[event for _, event in unread(watcher) if isinstance(event, Saved)] for watcher in (*slow, other)]
    assert [len(events) for events in received] == [1] * 9
    assert len({id(events[0].state) for events in received[:8]}) <= MAX_UNREAD[Saved]
    assert all(events[0].state.light is light for events in received[:8]) and received[8][0].iteration == 100


# The controller -------------------------------------------------------------------------------------------------------


def test_a_job_has_one_controller_at_a_time(registry):
    job, maker = create(registry())
    first = job.watch(controls=True)
    with pytest.raises(JobControlled):
        job.watch(controls=True)
    job.give_up_control(maker)  # it has no control
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


def test_an_answer_is_for_one_watcher_and_has_a_number_if_it_has_a_picture(registry):
    job, other = create(registry())
    controller = job.watch(controls=True)
    unread(other), unread(controller)
    taken = Frame(3, picture())
    assert job.answer(controller, Answer(8, 1))
    assert job.answer(controller, Answer(9, 3, output=taken))
    job.publish(progress(4))
    assert [(n, getattr(e, "command_id", None)) for n, e in unread(controller)] == [(0, 8), (2, 9), (3, None)]
    assert numbers(other) == [3]
    assert numbers(job.watch()) == [1, 3]
    job.publish(finished())
    assert not job.answer(controller, Answer(10, 3, output=taken))
    assert job.answer(controller, Answer(11, 4))


def test_the_number_of_watchers_is_bounded(registry):
    job, first = create(registry(max_watchers=2))
    second = job.watch()
    with pytest.raises(TooManyWatchers, match="the job already has 2 watchers"):
        job.watch()
    job.leave(second)
    second = job.watch()
    job.publish(finished())
    assert kinds(job.watch()) == kinds(first) == kinds(second)


# Watchers that leave --------------------------------------------------------------------------------------------------


def test_the_job_is_cancelled_when_its_last_watcher_leaves(registry, withdrawn):
    jobs = registry()
    job, first = create(jobs)
    second = job.watch()
    job.leave(first)
    job.leave(first)  # has no effect
    assert not job.ended
    job.leave(second)
    assert job.cancelled and withdrawn == [job]


def test_a_job_without_watchers_runs_for_its_grace_and_a_new_watcher_ends_the_grace(registry, loop):
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


def test_a_job_that_ends_without_watchers_is_kept_from_its_end(registry, loop, withdrawn):
    jobs = registry(max_kept_s=60)
    job, watcher = create(jobs, grace_s=10.0)
    job.leave(watcher)
    loop.advance(5)
    job.publish(finished())
    loop.advance(30)  # its grace has no effect after its end
    assert job.phase is JobPhase.SUCCEEDED and withdrawn == []
    assert jobs.find(job.id) is job
    late = job.watch()
    assert kinds(late) == ["Accepted", "Finished"]
    job.leave(late)
    assert len(loop.timers) == 1
    loop.advance(30)
    with pytest.raises(JobNotFound):
        jobs.find(job.id)
