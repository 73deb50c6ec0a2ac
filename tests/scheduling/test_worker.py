"""Slices and commands of a worker, without an event loop or a wire, on a clock that only the fake engine moves."""

import math

import pytest

from gramophone.recipe import InvalidRecipeError, LayerWeight
from gramophone_server.domain.events import Changed, Finished, Frame, Progress, Saved, StopReason
from gramophone_server.errors import EngineFailed, InvalidRequest, OutOfDeviceMemory, ShuttingDown
from gramophone_server.scheduling.task import Task
from gramophone_server.scheduling.throughput import ThroughputModel
from gramophone_server.scheduling.worker import Worker
from tests.support.clock import ManualClock
from tests.support.engines import CHECKPOINTS, FakeEngine
from tests.support.specs import job_state

MAX_BYTES = 2**20


clock = ManualClock(reading_s=1e-6)


def fake_engine(**options):
    return FakeEngine(clock=clock, **options)


class Recorder:
    """An observer that records events, and when they came."""

    def __init__(self):
        self.events, self.at, self.error, self.cancelled = [], [], None, False
        self.starts, self.frames, self.every = 0, [], None
        self.frame_watchers, self.checkpoint_watchers, self.watchers = set(), {True: set(), False: set()}, []
        self.accepts_light_checkpoint = False

    def iterations_until_next_frame(self, iteration):
        return self.every

    def started(self):
        self.starts += 1

    def publish(self, event, watchers=None):
        self.events.append(event)
        self.watchers.append(watchers)
        self.at.append(clock.monotonic())

    def collect_frame_requests(self, iteration, now):
        self.frames.append(iteration)
        return self.frame_watchers

    def collect_checkpoint_requests(self, now, *, light):
        return self.checkpoint_watchers[light]

    def fail(self, error):
        assert self.error is None, "a job ends once"
        self.error = error

    @property
    def end(self):
        return self.events[-1] if isinstance(self.events[-1], Finished) else None


def task(iterations=10, **recipe):
    budget_ends_at = clock.monotonic() + recipe["time_budget"] if "time_budget" in recipe else math.inf
    return Task(state=job_state(iterations, **recipe), observer=Recorder(), budget_ends_at=budget_ends_at)


def worker_of(engine, *tasks):
    worker = Worker(engine, ThroughputModel(), MAX_BYTES, clock=clock)
    for one in tasks:
        worker.admit(one)
    return worker


def seat(worker, *tasks):
    """Steps until all tasks have joined a batch."""
    while not all(one.batch for one in tasks):
        worker.step(tasks)


def run_to_end(worker, tasks, max_steps=100_000):
    """Steps until all tasks have ended, as the compute thread does."""
    left = list(tasks)
    for _ in range(max_steps):
        if not left:
            return
        worker.step(left)
        left = [one for one in left if not one.ended]
    raise AssertionError(f"{len(left)} tasks have not ended after {max_steps} steps")


# Fairness -------------------------------------------------------------------------------------------------------------


def test_beside_a_large_job_a_small_one_has_its_first_picture_within_four_slices():
    """An iteration of 1024 x 512 px takes 31 ms, one of 128 x 64 px half of one."""
    engine = fake_engine(pixel_s=6e-8)
    large, small = task(1000, size=1024), task(1000, size=128)
    worker = worker_of(engine, large)
    for _ in range(20):
        worker.step([large])
    worker.admit(small)
    slices = 0
    while not small.observer.frames:
        worker.step([large, small])
        slices += 1
    assert slices <= 4
    before = small.state.done
    for _ in range(20):
        worker.step([large, small])
    assert small.state.done - before > 100 and small.used_s == pytest.approx(large.used_s, rel=0.2)


@pytest.mark.parametrize("speed", [{"pixel_s": 5e-7}, {"iteration_s": 0.001}], ids=["in turns", "in batches"])
def test_of_16_equal_jobs_the_first_and_the_last_finish_almost_together(speed):
    """500 iterations each, of a millisecond; the ends differ by less than a tenth of the total time."""
    tasks = [task(500) for _ in range(16)]
    start = clock.monotonic()
    run_to_end(worker_of(fake_engine(**speed), *tasks), tasks)
    ends = sorted(one.observer.at[-1] for one in tasks)
    assert all(one.observer.end.reason is StopReason.ITERATIONS_DONE for one in tasks)
    assert ends[-1] - ends[0] < 0.1 * (ends[-1] - start)


def test_a_late_job_has_neither_debt_nor_advantage():
    engine = fake_engine(pixel_s=5e-7)
    old = task(100_000)
    worker = worker_of(engine, old)
    for _ in range(10):
        worker.step([old])
    new = task(100_000)
    worker.admit(new)
    had = old.used_s
    seat(worker, old, new)
    assert new.used_s == pytest.approx(old.used_s, rel=0.2) and new.used_s > 0.9 * had > 0
    had, start = old.used_s, new.used_s
    for _ in range(20):
        worker.step([old, new])
    assert new.used_s - start == pytest.approx(old.used_s - had, rel=0.3)


def test_after_a_pause_a_job_owes_nothing_for_its_earlier_slices():
    old, new = task(100_000), task(100_000)
    worker = worker_of(fake_engine(pixel_s=5e-7), old)
    for _ in range(200):
        worker.step([old])
    worker.pause(old, 0)
    worker.admit(new)
    seat(worker, new)
    worker.admit(old)
    done = old.state.done
    for _ in range(6):
        worker.step([new, old])
    assert old.state.done > done


def test_a_job_that_waited_for_memory_does_not_catch_up():
    """The last job gets its batch when the first has ended; then it and the second share the device evenly."""
    engine = fake_engine(pixel_s=5e-7, memory_bytes=64 * 32 * 2200)
    first, second, last = task(2000), task(100_000, size=60), task(100_000, size=62)
    worker = worker_of(engine, first, second, last)
    tasks = [first, second, last]
    while not first.ended:
        worker.step(tasks)
    assert last.state.done == 0 and second.used_s > 0.5
    had = second.used_s
    for _ in range(40):
        worker.step([second, last])
    assert last.state.done > 0
    assert second.used_s - had > 0.3


def test_joining_a_batch_counts_as_device_time():
    """Each of many jobs of one iteration spends 0.5 s on the targets of its painting; a long job still has its half."""
    engine = fake_engine(pixel_s=5e-7)
    old = task(100_000)
    worker = worker_of(engine, old)
    for _ in range(10):
        worker.step([old])
    engine.join_s, start, had, short = 0.5, clock.monotonic(), old.used_s, None
    while clock.monotonic() < start + 10:
        if short is None or short.ended:
            short = task(1, size=60)
            worker.admit(short)
        worker.step([old, short])
    assert old.used_s - had > 0.4 * (clock.monotonic() - start)


def test_long_joins_alternate_with_iterations():
    engine = fake_engine(pixel_s=5e-7, join_s=0.1)
    old = task(100_000)
    worker = worker_of(engine, old)
    worker.step([old])
    others = [task(10, size=60) for _ in range(5)]
    for one in others:
        worker.admit(one)
    gaps, last, had = [], clock.monotonic(), old.state.done
    while not all(one.batch or one.ended for one in others):
        before = clock.monotonic()
        worker.step([old, *others])
        assert clock.monotonic() - before < 0.15
        if old.state.done > had:
            gaps.append(clock.monotonic() - last)
            last, had = clock.monotonic(), old.state.done
    assert max(gaps) < 0.25  # the first join was not measured yet, so two follow each other
    assert not any(one.memory_short for one in others)


def test_no_job_starves_among_many_shapes():
    tasks = [task(100_000, size=size) for size in (32, 48, 64, 96, 128, 192)]
    engine = fake_engine(pixel_s=2e-7)
    worker = worker_of(engine, *tasks)
    for _ in range(60):
        worker.step(tasks)
    used = [one.used_s for one in tasks]
    assert min(used) > 0.5 * max(used)
    assert [one.state.done for one in tasks] == sorted((one.state.done for one in tasks), reverse=True)


def test_a_slice_is_about_20_ms_and_ends_where_a_frame_is_wanted():
    engine = fake_engine(iteration_s=0.001)
    one = task(1000)
    worker = worker_of(engine, one)
    for _ in range(10):
        worker.step([one])
    assert [n for _, _, n in engine.slices[:1]] == [1]  # nothing was measured before
    assert all(10 <= n <= 20 for _, _, n in engine.slices[1:])
    one.observer.every = 3
    worker.step([one])
    assert engine.slices[-1][2] == 3


# Frames and checkpoints -----------------------------------------------------------------------------------------------


def test_one_picture_is_taken_for_all_watchers_that_want_it():
    engine = fake_engine(iteration_s=0.001)
    worker, one = started(engine=engine)
    assert engine.taken_at == []
    one.observer.frame_watchers = {"first", "second"}
    worker.step([one])
    assert len(engine.taken_at) == 1
    assert one.observer.watchers[-1] == {"first", "second"}
    frame = one.observer.events[-1]
    assert isinstance(frame, Frame) and frame.iteration == one.state.done == frame.picture.wait()[0, 0, 0]


def test_one_state_is_taken_for_each_kind_of_checkpoint_that_is_wanted():
    worker, one = started(engine=fake_engine(iteration_s=0.001))
    one.observer.checkpoint_watchers = {True: {"light"}, False: {"full", "full too"}}
    worker.step([one])
    (light, full), watchers = one.observer.events[-2:], one.observer.watchers[-2:]
    assert watchers == [{"light"}, {"full", "full too"}]
    assert (light.state.light, full.state.light) == (True, False)
    assert light.iteration == full.iteration == one.state.done


def test_no_checkpoint_is_sent_that_would_be_too_large():
    one = task(100)
    worker = Worker(fake_engine(), ThroughputModel(), CHECKPOINTS.size(one.state, light=True) // 2, clock=clock)
    worker.admit(one)
    seat(worker, one)
    one.observer.checkpoint_watchers = {True: {"light"}, False: {"full"}}
    worker.step([one])
    assert [type(event) for event in one.observer.events] == [Progress]


def test_a_full_checkpoint_that_would_be_too_large_is_a_light_one():
    one = task(100)
    worker = Worker(fake_engine(), ThroughputModel(), CHECKPOINTS.size(one.state) - 1, clock=clock)
    worker.admit(one)
    seat(worker, one)
    one.observer.checkpoint_watchers[False] = {"full"}
    worker.step([one])
    assert one.observer.events[-1].state.light


# Ends -----------------------------------------------------------------------------------------------------------------


def test_a_time_budget_ends_the_job_in_time_with_its_present_picture():
    one = task(100_000, time_budget=0.3)
    start = clock.monotonic()
    run_to_end(worker_of(fake_engine(iteration_s=0.002), one), [one])
    end = one.observer.end
    assert end.reason is StopReason.TIME_BUDGET and 0 < end.iterations < 150
    assert 0.29 < one.observer.at[-1] - start <= 0.3


def test_a_budget_that_is_over_before_the_start_still_allows_one_iteration():
    one = task(100, time_budget=0.001)
    clock.advance(0.01)
    run_to_end(worker_of(fake_engine(iteration_s=0.002), one), [one])
    assert one.observer.end.iterations == 1 and one.observer.end.reason is StopReason.TIME_BUDGET


@pytest.mark.parametrize("first", ["the large one", "the one with the budget"])
def test_a_time_budget_holds_beside_iterations_that_take_longer_than_it_has(first):
    """The large job's iterations, of 1024 x 512 px, take a second each."""
    engine = fake_engine(pixel_s=1 / (1024 * 512))
    large, small = task(1000, size=1024), task(100_000, size=64)
    worker = worker_of(engine, *((large,) if first == "the large one" else (small,)))
    for _ in range(3):
        worker.step([large if first == "the large one" else small])
    other = small if first == "the large one" else large
    had = max(large.used_s, small.used_s)
    budget_ends_at = clock.monotonic() + 3.5
    small.budget_ends_at = budget_ends_at
    worker.admit(other)
    tasks = [large, small]
    while not small.ended:
        worker.step([one for one in tasks if not one.ended])
    assert small.observer.end.reason is StopReason.TIME_BUDGET
    assert budget_ends_at - 1.1 < small.observer.at[-1] <= budget_ends_at
    assert 1.0 < small.used_s - had < 3.0  # and its share of the device, as far as possible


def test_a_stream_of_jobs_with_budgets_leaves_other_jobs_their_share():
    engine = fake_engine(pixel_s=1 / (1024 * 512))
    large = task(1000, size=1024)
    worker = worker_of(engine, large)
    for _ in range(3):
        worker.step([large])
    start, had, small = clock.monotonic(), large.used_s, None
    while clock.monotonic() < start + 120:  # newcomers have an advantage of `BURST_S`, once
        if small is None or small.ended:
            small = task(100_000)
            small.budget_ends_at = clock.monotonic() + 0.5
            worker.admit(small)
        worker.step([large, small])
    assert large.used_s - had > 0.3 * (clock.monotonic() - start)


def test_a_cancelled_job_ends_before_its_next_iteration():
    engine = fake_engine()
    one, other = task(1000), task(30)
    worker = worker_of(engine, one, other)
    worker.step([one, other])
    one.observer.cancelled = True
    done = one.state.done
    run_to_end(worker, [one, other])
    assert one.state.done == done and one.ended and other.observer.end is not None
    assert engine.closed == len(engine.batches)


@pytest.mark.parametrize("error", [RuntimeError("a kernel failed"), ZeroDivisionError()])
def test_a_failed_batch_loses_its_own_jobs_and_no_other(error):
    engine = fake_engine(fails_at=5, error=error)
    broken, other = task(30), task(4, size=48)
    run_to_end(worker_of(engine, broken, other), [broken, other])
    assert isinstance(broken.observer.error, EngineFailed) and other.observer.end is not None
    assert engine.closed == len(engine.batches)


def test_a_failed_device_loses_all_jobs_and_the_worker_continues():
    engine = fake_engine(memory_bytes=64 * 32 * 2200)
    tasks = [task(30), task(30, size=62), task(30, size=60)]
    worker = worker_of(engine, *tasks)
    seat(worker, *tasks[:2])
    worker.step(tasks)
    assert tasks[2].memory_short
    engine.close_error = RuntimeError("the device is gone")
    worker.fail_all(tasks, RuntimeError("the device is gone"))
    assert all(isinstance(one.observer.error, EngineFailed) and one.ended for one in tasks)
    engine.close_error, fresh = None, task(3)
    assert worker.memory.startable([fresh], 1, []) == [fresh]
    worker.admit(fresh)
    run_to_end(worker, [fresh])
    assert fresh.observer.end is not None


def test_a_job_too_large_for_the_device_ends_alone():
    engine = fake_engine(max_pixels=64 * 32)
    large, small = task(10, size=128), task(10)
    run_to_end(worker_of(engine, large, small), [large, small])
    assert isinstance(large.observer.error, OutOfDeviceMemory) and small.observer.end is not None


def test_when_memory_runs_out_jobs_wait_and_all_finish():
    """There is memory for one job of 64 x 32 px: first by the estimate, then by the allocator."""
    for engine in (fake_engine(memory_bytes=64 * 32 * 1000), fake_engine(max_pixels=64 * 32)):
        tasks = [task(10), task(10, size=60), task(10, size=62)]
        worker = worker_of(engine, *tasks)
        run_to_end(worker, tasks)
        assert all(one.observer.end is not None for one in tasks)


@pytest.mark.parametrize("light", [True, False])
def test_a_drained_job_sends_its_picture_and_its_state(light):
    one, fresh = task(100), task(100)
    one.observer.accepts_light_checkpoint = light
    worker = worker_of(fake_engine(), one)
    seat(worker, one)
    worker.step([one])
    for each in (one, fresh):
        worker.drain_task(each)
        assert isinstance(each.observer.error, ShuttingDown) and each.ended
        assert each.observer.error.retry_after_s == 1  # the process has ended by then
    frame, saved = one.observer.events[-2:]
    assert frame.iteration == saved.iteration == one.state.done and saved.state.light is light
    assert one.observer.watchers[-2:] == [None, None]  # all of them
    assert CHECKPOINTS.read(saved.state.write(), max_bytes=MAX_BYTES).restore(one.state.job).done == one.state.done
    assert not fresh.observer.events  # it has no picture yet


# Commands -------------------------------------------------------------------------------------------------------------


def started(iterations=100, engine=None, **recipe):
    one = task(iterations, **recipe)
    worker = worker_of(engine or fake_engine(), one)
    seat(worker, one)
    worker.step([one])
    return worker, one


def test_new_weights_hold_from_the_next_iteration():
    worker, one = started()
    assert worker.update(one, {"beta": 7.0}) == one.state.done + 1
    assert one.observer.events[-1] == Changed(one.state.done + 1, one.state.recipe, 100)
    run_to_end(worker, [one])
    report = next(event.report for event in reversed(one.observer.events) if isinstance(event, Progress))
    assert report.losses.style["relu1_1"] == pytest.approx(7.0 / report.iteration)


def test_layers_cannot_be_changed_and_the_job_is_unchanged():
    worker, one = started()
    before = one.state.recipe
    with pytest.raises(InvalidRecipeError) as caught:
        worker.update(one, {"style_layers": (LayerWeight("relu1_1", 1.0),)})
    (wrong,) = caught.value.violations
    assert wrong.field == "style_layers" and "must name the job's layers" in wrong.description
    assert one.state.recipe is before and not one.ended


def test_a_number_of_iterations_that_are_done_already_ends_the_job():
    worker, one = started()
    worker.update(one, {"iterations": one.state.done})
    assert one.ended and one.observer.end.reason is StopReason.ITERATIONS_DONE


def test_a_restored_job_cannot_end_before_it_has_a_picture_and_is_unchanged():
    worker, one = started()
    worker.pause(one, 0)
    resumed = Task(state=one.state, observer=Recorder())
    with pytest.raises(InvalidRequest, match="has not started yet"):
        worker.update(resumed, {"iterations": one.state.done})
    assert resumed.observer.events == [] and one.state.recipe.iterations == 100
    worker.admit(resumed)
    seat(worker, resumed)
    worker.step([resumed])
    assert resumed.observer.error is None and resumed.last_report is not None


def test_more_iterations_continue_from_the_present_one():
    worker, one = started(10)
    worker.update(one, {"iterations": 25})
    run_to_end(worker, [one])
    assert one.observer.end.iterations == 25


def test_a_deadline_that_was_promised_is_not_for_more_work_nor_for_a_job_that_pauses():
    worker, one = started(10)
    for iterations, deadline_at in ((5, 60.0), (6, math.inf)):
        one.deadline_at = 60.0
        worker.update(one, {"iterations": iterations})
        assert one.deadline_at == deadline_at
    one.deadline_at = 60.0
    worker.pause(one, 0)
    assert one.deadline_at == math.inf


def test_finish_ends_the_job_with_the_present_picture():
    worker, one = started()
    done = one.state.done
    worker.finish(one)
    assert one.observer.end.iterations == done and one.observer.end.reason is StopReason.FINISHED and one.ended


@pytest.mark.parametrize("light", [True, False])
def test_picture_and_state_are_of_the_reported_iteration(light):
    worker, one = started()
    frame = worker.frame(one)
    assert isinstance(frame, Frame) and frame.iteration == one.state.done
    saved = worker.checkpoint(one, light=light)
    assert isinstance(saved, Saved) and saved.state.light is light
    restored = CHECKPOINTS.read(saved.state.write(), max_bytes=MAX_BYTES).restore(one.state.job)
    assert restored.done == one.state.done == saved.iteration


@pytest.mark.parametrize(
    "command",
    [Worker.frame, lambda worker, one: worker.checkpoint(one, light=True), Worker.finish],
    ids=["frame", "checkpoint", "finish"],
)
def test_a_job_that_has_not_started_has_no_picture(command):
    one = task()
    worker = worker_of(fake_engine(), one)
    with pytest.raises(InvalidRequest, match="the job has not started yet; wait for its first progress"):
        command(worker, one)


def test_a_paused_job_keeps_picture_and_state_and_continues_from_there():
    worker, one = started()
    picture = worker.frame(one).picture
    worker.pause(one, 0)
    assert one.batch is None
    worker.update(one, {"beta": 3.0})
    assert (worker.frame(one).picture.wait() == picture.wait()).all()
    done = one.state.done
    worker.admit(one)
    seat(worker, one)
    worker.step([one])
    assert one.state.done > done and one.observer.starts == 2


def test_after_a_pause_a_job_has_no_place_any_more_that_it_got_as_a_short_one():
    worker, one = started()
    one.came_early = True
    worker.pause(one, 0)
    assert not one.came_early


def test_a_pause_does_not_count_in_the_speed_of_a_job():
    worker, one = started(1000, fake_engine(iteration_s=0.001))
    for _ in range(5):
        worker.step([one])
    worker.pause(one, 0)
    clock.advance(0.5)
    worker.admit(one)
    for _ in range(3):
        worker.step([one])
    (*_, last) = (event for event in one.observer.events if isinstance(event, Progress))
    assert last.iterations_per_second > 200  # with the pause included, about 180 iterations in 0.6 s


def test_progress_is_sent_ten_times_a_second_and_at_every_stop():
    worker, one = started(400, fake_engine(iteration_s=0.001))
    for _ in range(10):
        worker.step([one])
    reported = [event.report.iteration for event in one.observer.events if isinstance(event, Progress)]
    assert reported[0] == 1 and 2 <= len(reported) <= 4  # 0.2 s
    worker.pause(one, 0)
    assert one.observer.events[-1].report.iteration == one.state.done
    worker.admit(one)
    run_to_end(worker, [one])
    *_, progress, finished = one.observer.events
    assert progress.report.iteration == finished.iterations == 400
