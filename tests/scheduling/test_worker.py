"""The compute thread's turns: whose slice it is, and what controllers ask for, without an event loop or a wire."""

import math

import pytest

from gramophone.recipe import InvalidRecipe, LayerWeight
from gramophone_server.domain.commands import Done, Finish, Retune, TakeCheckpoint, TakePicture
from gramophone_server.domain.events import Changed, Finished, Frame, Progress, Saved, StopReason
from gramophone_server.errors import EngineFailed, InvalidRequest, OutOfDeviceMemory, ShuttingDown
from gramophone_server.scheduling import batch_pool
from gramophone_server.scheduling import worker as module
from gramophone_server.scheduling.throughput import ThroughputModel
from gramophone_server.scheduling.worker import Task, Worker
from tests.support import engines as fakes
from tests.support.clock import ManualClock
from tests.support.engines import CHECKPOINTS, FakeEngine
from tests.support.specs import job_state

MOST = 2**20


clock = ManualClock(reading_s=1e-6)  # moved by what engines sleep, so that nothing depends on the machine


@pytest.fixture(autouse=True)
def no_real_time(monkeypatch):
    for user in (batch_pool, module, fakes):
        monkeypatch.setattr(user, "time", clock)


class Heard:
    """A listener that writes down what it is told, and when."""

    def __init__(self):
        self.events, self.at, self.error, self.cancelled = [], [], None, False
        self.starts, self.frames, self.every = 0, [], None

    def iterations_until_next_frame(self, iteration):
        return self.every

    def started(self):
        self.starts += 1

    def publish(self, event):
        self.events.append(event)
        self.at.append(clock.monotonic())

    def offer_frame(self, iteration, take):
        self.frames.append(iteration)

    def offer_checkpoint(self, iteration, take):
        pass

    def interrupted(self, iteration, picture, take):
        self.events.append(take(False))

    def fail(self, error):
        assert self.error is None, "it ends once"
        self.error = error

    @property
    def end(self):
        return self.events[-1] if isinstance(self.events[-1], Finished) else None


def task(iterations=10, **recipe):
    budget_at = clock.monotonic() + recipe["time_budget"] if "time_budget" in recipe else math.inf
    return Task(work=job_state(iterations, **recipe), listener=Heard(), budget_at=budget_at)


def worker_of(engine, *tasks):
    worker = Worker(engine, ThroughputModel(), MOST)
    for one in tasks:
        worker.begin(one)
    return worker


def turns(worker, tasks, most=100_000):
    """Until all are over, as the scheduler does; returns those that were, in order."""
    left, over = list(tasks), []
    for _ in range(most):
        if not left:
            return over
        worker.turn(left)
        over += [one for one in left if one.over]
        left = [one for one in left if not one.over]
    raise AssertionError(f"{len(left)} are not over after {most} turns")


# Fairness -------------------------------------------------------------------------------------------------------------


def test_beside_a_large_job_a_small_one_has_its_first_picture_within_four_slices():
    """An iteration of 1024 x 512 px takes 31 ms, one of 128 x 64 px half of one."""
    engine = FakeEngine(pixel_s=6e-8)
    large, small = task(1000, size=1024), task(1000, size=128)
    worker = worker_of(engine, large)
    for _ in range(20):
        worker.turn([large])
    worker.begin(small)
    slices = 0
    while not small.listener.frames:
        worker.turn([large, small])
        slices += 1
    assert slices <= 4
    before = small.work.done
    for _ in range(20):
        worker.turn([large, small])
    assert small.work.done - before > 100 and small.used_s == pytest.approx(large.used_s, rel=0.2)


@pytest.mark.parametrize("pace", [{"pixel_s": 5e-7}, {"iteration_s": 0.001}], ids=["in turns", "in batches"])
def test_of_16_equal_jobs_the_first_and_the_last_finish_almost_together(pace):
    """Differing by less than a tenth of the time that all take. A millisecond an iteration, 500 each."""
    tasks = [task(500) for _ in range(16)]
    began = clock.monotonic()
    turns(worker_of(FakeEngine(**pace), *tasks), tasks)
    ends = sorted(one.listener.at[-1] for one in tasks)
    assert all(one.listener.end.reason is StopReason.ITERATIONS_DONE for one in tasks)
    assert ends[-1] - ends[0] < 0.1 * (ends[-1] - began)


def test_a_job_that_comes_late_has_neither_debt_nor_advantage():
    engine = FakeEngine(pixel_s=5e-7)
    old = task(100_000)
    worker = worker_of(engine, old)
    for _ in range(10):
        worker.turn([old])
    new = task(100_000)
    worker.begin(new)
    had = old.used_s
    worker.turn([old, new])  # in which both share a batch
    assert new.used_s == pytest.approx(old.used_s, abs=1e-4) and old.used_s > had > 0
    had, began = old.used_s, new.used_s
    for _ in range(20):
        worker.turn([old, new])
    assert new.used_s - began == pytest.approx(old.used_s - had, rel=0.3)


def test_a_job_that_stood_still_owes_nothing_for_what_it_had_before():
    old, new = task(100_000), task(100_000)
    worker = worker_of(FakeEngine(pixel_s=5e-7), old)
    for _ in range(200):
        worker.turn([old])
    worker.leave(old)
    worker.begin(new)
    worker.turn([new])
    worker.begin(old)
    done = old.work.done
    for _ in range(4):
        worker.turn([new, old])
    assert old.work.done > done


def test_a_job_that_waited_for_memory_does_not_make_up_for_it():
    """The first is gone when the last, which came with it, gets its lane; then that shares with the second evenly."""
    engine = FakeEngine(pixel_s=5e-7, memory_bytes=64 * 32 * 2000)
    first, second, last = task(2000), task(100_000, size=62), task(100_000, size=60)
    worker = worker_of(engine, first, second, last)
    tasks = [first, second, last]
    while not first.over:
        worker.turn(tasks)
    assert last.work.done == 0 and second.used_s > 0.5
    had = second.used_s
    for _ in range(40):
        worker.turn([second, last])
    assert last.work.done > 0
    assert second.used_s - had > 0.3


def test_a_beginning_is_paid_for_like_an_iteration():
    """Of paintings whose targets take 0.5 s: jobs of one iteration that begin one after the other leave the other its half."""
    engine = FakeEngine(pixel_s=5e-7)
    old = task(100_000)
    worker = worker_of(engine, old)
    for _ in range(10):
        worker.turn([old])
    engine.join_s, began, had, short = 0.5, clock.monotonic(), old.used_s, None
    while clock.monotonic() < began + 10:
        if short is None or short.over:
            short = task(1, size=60)
            worker.begin(short)
        worker.turn([old, short])
    assert old.used_s - had > 0.4 * (clock.monotonic() - began)


def test_beginnings_that_take_long_take_turns_with_iterations():
    engine = FakeEngine(pixel_s=5e-7, join_s=0.1)
    old = task(100_000)
    worker = worker_of(engine, old)
    worker.turn([old])
    others = [task(10, size=60) for _ in range(5)]
    for one in others:
        worker.begin(one)
    for n in range(1, 6):
        before = clock.monotonic()
        worker.turn([old, *others])
        assert clock.monotonic() - before < 0.15
        assert sum(one.lane is not None for one in others) == n
    assert not worker.short  # nobody waits for memory


def test_nobody_starves_among_many_shapes():
    tasks = [task(100_000, size=size) for size in (32, 48, 64, 96, 128, 192)]
    engine = FakeEngine(pixel_s=2e-7)
    worker = worker_of(engine, *tasks)
    for _ in range(60):
        worker.turn(tasks)
    used = [one.used_s for one in tasks]
    assert min(used) > 0.5 * max(used)
    assert [one.work.done for one in tasks] == sorted((one.work.done for one in tasks), reverse=True)


def test_a_slice_is_about_20_ms_and_no_longer_than_somebody_wants_pictures():
    engine = FakeEngine(iteration_s=0.001)
    one = task(1000)
    worker = worker_of(engine, one)
    for _ in range(10):
        worker.turn([one])
    assert [n for _, _, n in engine.slices[:1]] == [1]  # nothing was measured
    assert all(10 <= n <= 20 for _, _, n in engine.slices[1:])
    one.listener.every = 3
    worker.turn([one])
    assert engine.slices[-1][2] == 3


# Ends -----------------------------------------------------------------------------------------------------------------


def test_a_time_budget_ends_the_run_in_time_with_the_picture_so_far():
    one = task(100_000, time_budget=0.3)
    began = clock.monotonic()
    turns(worker_of(FakeEngine(iteration_s=0.002), one), [one])
    end = one.listener.end
    assert end.reason is StopReason.TIME_BUDGET and 0 < end.iterations < 150
    assert 0.29 < one.listener.at[-1] - began <= 0.3


def test_a_budget_that_is_over_before_the_job_begins_still_makes_one_iteration():
    one = task(100, time_budget=0.001)
    clock.advance(0.01)
    turns(worker_of(FakeEngine(iteration_s=0.002), one), [one])
    assert one.listener.end.iterations == 1 and one.listener.end.reason is StopReason.TIME_BUDGET


@pytest.mark.parametrize("began_first", ["the large one", "the one with the budget"])
def test_a_time_budget_holds_beside_iterations_that_take_longer_than_it_has(began_first):
    """Of 1024 x 512 px, a second each."""
    engine = FakeEngine(pixel_s=1 / (1024 * 512))
    large, small = task(1000, size=1024), task(100_000, size=64)
    worker = worker_of(engine, *((large,) if began_first == "the large one" else (small,)))
    for _ in range(3):
        worker.turn([large if began_first == "the large one" else small])
    other = small if began_first == "the large one" else large
    had = max(large.used_s, small.used_s)
    budget_at = clock.monotonic() + 3.5
    small.budget_at = budget_at
    worker.begin(other)
    tasks = [large, small]
    while not small.over:
        worker.turn([one for one in tasks if not one.over])
    assert small.listener.end.reason is StopReason.TIME_BUDGET
    assert budget_at - 1.1 < small.listener.at[-1] <= budget_at
    assert 1.0 < small.used_s - had < 3.0  # and it had its part, as far as that goes


def test_budgets_without_end_leave_others_their_part():
    engine = FakeEngine(pixel_s=1 / (1024 * 512))
    large = task(1000, size=1024)
    worker = worker_of(engine, large)
    for _ in range(3):
        worker.turn([large])
    began, had, small = clock.monotonic(), large.used_s, None
    while clock.monotonic() < began + 30:
        if small is None or small.over:
            small = task(100_000)
            small.budget_at = clock.monotonic() + 0.5
            worker.begin(small)
        worker.turn([large, small])
    assert large.used_s - had > 0.3 * (clock.monotonic() - began)


def test_who_was_cancelled_has_left_before_the_next_iteration():
    engine = FakeEngine()
    one, other = task(1000), task(30)
    worker = worker_of(engine, one, other)
    worker.turn([one, other])
    one.listener.cancelled = True
    done = one.work.done
    turns(worker, [one, other])
    assert one.work.done == done and one.over and other.listener.end is not None
    assert engine.closed == len(engine.batches)


@pytest.mark.parametrize("error", [RuntimeError("a kernel failed"), ZeroDivisionError()])
def test_a_broken_batch_loses_those_in_it_and_nobody_else(error):
    engine = FakeEngine(fails_at=5, error=error)
    broken, other = task(30), task(4, size=48)
    turns(worker_of(engine, broken, other), [broken, other])
    assert isinstance(broken.listener.error, EngineFailed) and other.listener.end is not None
    assert engine.closed == len(engine.batches)


def test_a_broken_device_loses_everybody_and_the_worker_goes_on():
    engine = FakeEngine(memory_bytes=64 * 32 * 2000)
    tasks = [task(30), task(30, size=62), task(30, size=60)]
    worker = worker_of(engine, *tasks)
    worker.turn(tasks)
    assert worker.short
    engine.close_error = RuntimeError("the device is gone")
    worker.lose(tasks, RuntimeError("the device is gone"))
    assert all(isinstance(one.listener.error, EngineFailed) and one.over for one in tasks)
    engine.close_error, fresh = None, task(3)
    assert worker.may_begin(fresh)
    worker.begin(fresh)
    turns(worker, [fresh])
    assert fresh.listener.end is not None


def test_who_waits_for_memory_lets_smaller_ones_begin_for_a_while():
    engine = FakeEngine(iteration_s=0.01, memory_bytes=128 * 64 * 1000 + 10 * 32 * 16 * 1000)
    running, large, small, too_large = task(5000, size=128), task(5, size=127), task(5, size=32), task(5, size=120)
    worker = worker_of(engine, running, large)
    worker.turn([running, large])
    assert worker.short and large.lane is None
    assert worker.may_begin(small) and not worker.may_begin(too_large)
    worker.begin(small)
    tasks = [running, large, small]
    while not small.over:
        worker.turn(tasks)
    assert large.work.done == 0 < running.work.done
    clock.advance(module.LET_BY_S)
    assert not worker.may_begin(task(5, size=32))
    running.listener.cancelled = True
    turns(worker, [running, large])
    assert large.listener.end is not None and worker.may_begin(too_large)


def test_a_job_too_large_for_the_device_ends_alone():
    engine = FakeEngine(most_pixels=64 * 32)
    large, small = task(10, size=128), task(10)
    turns(worker_of(engine, large, small), [large, small])
    assert isinstance(large.listener.error, OutOfDeviceMemory) and small.listener.end is not None


def test_where_memory_ends_somebody_waits_and_everybody_finishes():
    """Room for one job of 64 x 32 px and no more: the estimate says so, and then the device itself."""
    for engine in (FakeEngine(memory_bytes=64 * 32 * 1000), FakeEngine(most_pixels=64 * 32)):
        tasks = [task(10), task(10, size=60), task(10, size=62)]
        worker = worker_of(engine, *tasks)
        worker.turn(tasks)
        assert worker.short is (engine.memory_bytes < 2**40)
        turns(worker, tasks)
        assert all(one.listener.end is not None for one in tasks) and not worker.short


def test_a_server_that_goes_away_tells_picture_and_state():
    one, fresh = task(100), task(100)
    worker = worker_of(FakeEngine(), one)
    worker.turn([one])
    for each in (one, fresh):
        worker.interrupt(each)
        assert isinstance(each.listener.error, ShuttingDown) and each.over
        assert each.listener.error.retry_after_s == 1  # the process is gone by then
    state = one.listener.events[-1]
    assert CHECKPOINTS.read(state.write(), most_bytes=MOST).restore(one.work.job).done == one.work.done
    assert not fresh.listener.events  # it has no picture yet


# Commands -------------------------------------------------------------------------------------------------------------


def begun(iterations=100, engine=None, **recipe):
    one = task(iterations, **recipe)
    worker = worker_of(engine or FakeEngine(), one)
    worker.turn([one])
    return worker, one


def test_other_weights_hold_from_the_next_iteration():
    worker, one = begun()
    assert worker.do(one, Retune({"beta": 7.0})) == Done(one.work.done + 1)
    assert one.listener.events[-1] == Changed(one.work.done + 1, one.work.recipe, 100)
    turns(worker, [one])
    report = next(event.report for event in reversed(one.listener.events) if isinstance(event, Progress))
    assert report.losses.style["relu1_1"] == pytest.approx(7.0 / report.iteration)


def test_layers_cannot_be_changed_and_the_job_is_as_it_was():
    worker, one = begun()
    before = one.work.recipe
    with pytest.raises(InvalidRecipe) as caught:
        worker.do(one, Retune({"style_layers": (LayerWeight("relu1_1", 1.0),)}))
    (wrong,) = caught.value.violations
    assert wrong.field == "style_layers" and "must name the job's layers" in wrong.description
    assert one.work.recipe is before and not one.over


def test_no_more_iterations_than_were_done_is_the_end():
    worker, one = begun()
    worker.do(one, Retune({"iterations": one.work.done}))
    assert one.over and one.listener.end.reason is StopReason.ITERATIONS_DONE


def test_a_resumed_job_cannot_end_before_it_has_a_picture_and_is_as_it_was():
    worker, one = begun()
    worker.leave(one)
    resumed = Task(work=one.work, listener=Heard())
    with pytest.raises(InvalidRequest, match="has not begun yet"):
        worker.do(resumed, Retune({"iterations": one.work.done}))
    assert resumed.listener.events == [] and one.work.recipe.iterations == 100
    worker.begin(resumed)
    worker.turn([resumed])
    assert resumed.listener.error is None and resumed.report is not None


def test_more_iterations_go_on_where_the_job_stands():
    worker, one = begun(10)
    worker.do(one, Retune({"iterations": 25}))
    turns(worker, [one])
    assert one.listener.end.iterations == 25


def test_the_end_now_is_the_present_picture():
    worker, one = begun()
    done = one.work.done
    assert worker.do(one, Finish()) == Done(done)
    assert one.listener.end.iterations == done and one.listener.end.reason is StopReason.FINISHED and one.over


@pytest.mark.parametrize("light", [True, False])
def test_picture_and_state_are_of_the_iteration_that_is_told(light):
    worker, one = begun()
    picture = worker.do(one, TakePicture())
    assert picture.iteration == one.work.done and isinstance(picture.taken, Frame)
    state = worker.do(one, TakeCheckpoint(light))
    assert isinstance(state.taken, Saved)
    again = CHECKPOINTS.read(state.taken.state.write(), most_bytes=MOST).restore(one.work.job)
    assert again.done == one.work.done == state.iteration


@pytest.mark.parametrize("command", [TakePicture(), TakeCheckpoint(True), Finish()])
def test_who_has_not_begun_has_no_picture(command):
    one = task()
    worker = worker_of(FakeEngine(), one)
    with pytest.raises(InvalidRequest, match="the job has not begun yet; wait for its first progress"):
        worker.do(one, command)


def test_who_stands_still_keeps_picture_and_state_and_goes_on_where_it_was():
    worker, one = begun()
    picture = worker.do(one, TakePicture()).taken.picture
    worker.leave(one)
    assert one.lane is None
    worker.do(one, Retune({"beta": 3.0}))
    assert (worker.do(one, TakePicture()).taken.picture.wait() == picture.wait()).all()
    done = one.work.done
    worker.begin(one)
    worker.turn([one])
    assert one.work.done > done and one.listener.starts == 2


def test_the_speed_of_a_job_that_stood_still_is_that_of_its_iterations():
    worker, one = begun(1000, FakeEngine(iteration_s=0.001))
    for _ in range(5):
        worker.turn([one])
    worker.leave(one)
    clock.advance(0.5)
    worker.begin(one)
    for _ in range(3):
        worker.turn([one])
    (*_, last) = (event for event in one.listener.events if isinstance(event, Progress))
    assert last.iterations_per_second > 200  # with the pause it would be about 180 iterations in 0.6 s


def test_progress_is_told_ten_times_a_second_and_at_every_halt():
    worker, one = begun(400, FakeEngine(iteration_s=0.001))
    for _ in range(10):
        worker.turn([one])
    told = [event.report.iteration for event in one.listener.events if isinstance(event, Progress)]
    assert told[0] == 1 and 2 <= len(told) <= 4  # 0.2 s
    worker.leave(one)
    assert one.listener.events[-1].report.iteration == one.work.done
    worker.begin(one)
    turns(worker, [one])
    *_, progress, finished = one.listener.events
    assert progress.report.iteration == finished.iterations == 400
