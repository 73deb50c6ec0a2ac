"""The steps of a bench against the fake service, and the live display."""

import asyncio
import dataclasses
import io
import math
import time
from collections import Counter

import grpc
import pytest
from rich.console import Console

from gramophone.options import INLINE_BYTES
from gramophone.recipe import Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client import AsyncGramophoneClient
from gramophone_client.bench import display, measure, run
from gramophone_client.bench.arrivals import ClosedLoop, OpenLoop
from gramophone_client.bench.measure import Recorder
from gramophone_client.bench.report import Step
from gramophone_client.bench.run import Bench, Pictures, Plan
from gramophone_client.bench.workload import InvalidWorkload, JobKind
from gramophone_client.errors import DeadlineExceededError
from gramophone_server import errors as server_errors
from tests.support.fake_service import HANG, accepted, encoded, frame, progress, refused, rpc_status

PICTURES = Pictures(encoded("red"), (encoded("yellow"),))
FULL = refused(server_errors.QueueFull(16, 16, retry_after_s=0.0))
FAST = JobKind(name="fast")


def make_plan(*loads, workload=(FAST,), **fields) -> Plan:
    defaults = {"warm_up_s": 0.0, "window_s": 60.0, "duration_s": 60.0, "deadline_s": 10.0}
    return Plan(loads=loads, workload=workload, pictures=lambda _: PICTURES, **defaults | fields)


async def run_plan(service, plan: Plan, clock=time.monotonic) -> list[Step]:
    async with AsyncGramophoneClient(service.target, max_retries=0) as client:
        bench = Bench(plan, clock=clock)
        await bench.run(client)
        return bench.steps


@pytest.fixture
def run_step(service, monkeypatch):
    """Runs the first step of a plan and interrupts it after a number of jobs, regardless of the time they take."""

    def run(plan: Plan, jobs: int = 6, clock=time.monotonic) -> Step:
        async def interrupted() -> list[Step]:
            record_end, task = Recorder.record_end, asyncio.current_task()

            def counting(self, number, sample):
                record_end(self, number, sample)
                if sum(map(Counter.total, self.timeline)) == jobs:
                    task.cancel()

            monkeypatch.setattr(Recorder, "record_end", counting)
            return await run_plan(service, plan, clock)

        (step,) = asyncio.run(interrupted())
        assert step.ending == "interrupted" and step.tally.ended >= jobs
        return step

    return run


@pytest.mark.parametrize("callers", [1, 3])
def test_a_closed_loop_keeps_as_many_jobs_as_it_has_callers(service, run_step, callers):
    step = run_step(make_plan(ClosedLoop(callers)))
    tally = step.tally
    assert tally.statuses == {"OK": tally.ended}
    assert (tally.frames, tally.frames_dropped) == (2 * tally.ended, 4 * tally.ended)
    assert tally.first_frame_s.count == tally.frame_gap_s.count == tally.result_s.count == tally.ended
    assert tally.bytes_received > 0 and tally.megapixel_iterations > 0
    assert step.server_before == step.server_after == (1, 0)
    assert step.unfinished <= callers
    assert sum(map(Counter.total, step.timeline)) == tally.ended


def test_steps_run_in_turn_for_their_duration(service):
    first, second = asyncio.run(run_plan(service, make_plan(ClosedLoop(1), OpenLoop(50.0), duration_s=0.1)))
    assert (first.load, first.ending) == (ClosedLoop(1), "time is up")
    assert (second.load, second.ending) == (OpenLoop(50.0), "time is up")
    assert second.began_s > first.began_s


def test_each_job_has_its_own_seed(service, run_step):
    run_step(make_plan(ClosedLoop(2)))
    seeds = [spec.seed for spec in service.specs]
    assert len(set(seeds)) == len(seeds) > 1
    assert service.specs[0].content.data == PICTURES.content


def test_a_step_ends_when_it_is_stable(service, monkeypatch):
    monkeypatch.setattr(measure, "TOLERANCE", math.inf)  # any three windows agree
    (step,) = asyncio.run(run_plan(service, make_plan(ClosedLoop(1), window_s=0.001)))
    assert step.ending == "stable"
    assert len(step.windows) == 3 and all(window.jobs >= 3 for window in step.windows)
    assert step.tally.ok == sum(window.jobs for window in step.windows)


def test_refusals_are_counted_by_reason_and_not_retried(service, run_step):
    service.scripts = [[FULL]]
    step = run_step(make_plan(ClosedLoop(2)))
    assert set(step.tally.statuses) == {"QUEUE_FULL"}
    assert step.tally.failed == step.tally.ended
    # One call per job, including the jobs in flight at the end.
    assert step.tally.ended <= len(service.specs) <= step.tally.ended + 2
    assert not step.tally.result_s.count


def test_unary_calls_are_not_retried_either(service, run_step):
    service.scripts = [[FULL]]
    run_step(make_plan(OpenLoop(100.0), workload=[JobKind(name="fast", frames=False)]))
    assert len(service.request_ids) == len(set(service.request_ids)) >= 6


def test_a_failure_without_a_reason_has_the_grpc_status(service, run_step):
    service.scripts = [[accepted(), frame(10), rpc_status(grpc.StatusCode.DEADLINE_EXCEEDED)]]
    step = run_step(make_plan(ClosedLoop(1)), jobs=1)
    assert set(step.tally.statuses) == {"DEADLINE_EXCEEDED"}
    assert step.tally.first_frame_s.count == 1  # the frame before the failure is counted


@pytest.mark.parametrize(("method", "frames"), [("stream", True), ("stylize", False)])
def test_the_deadline_of_a_kind_is_that_of_its_calls(run_step, monkeypatch, method, frames):
    call, timeouts = getattr(AsyncGramophoneClient, method), set()

    def recording(self, *args, timeout, **kwargs):
        timeouts.add(timeout)
        return call(self, *args, timeout=timeout, **kwargs)

    monkeypatch.setattr(AsyncGramophoneClient, method, recording)
    run_step(make_plan(ClosedLoop(1), workload=[JobKind(name="fast", frames=frames, deadline_s=40.0)]))
    assert timeouts == {40.0}


def test_the_unary_call_has_no_frames(service, run_step):
    step = run_step(make_plan(ClosedLoop(1), workload=[JobKind(name="fast", frames=False)]))
    assert step.tally.ok > 0 and step.tally.megapixel_iterations > 0
    assert step.tally.frames == 0 and not any(spec.HasField("frames") for spec in service.specs)


def test_the_options_of_a_kind_are_in_the_request(service, run_step):
    workload = [JobKind(name="small", preset="quality", overrides={"size": 64}, frame_every=3, frame_size=32)]
    step = run_step(make_plan(ClosedLoop(1), workload=workload))
    spec = service.specs[0]
    assert (spec.recipe.preset, spec.recipe.size) == (pb.PRESET_QUALITY, 64)
    assert (spec.frames.every_iterations, spec.frames.max_side) == (3, 32)
    assert list(step.tally.by_kind) == ["small"]


def test_jobs_are_cancelled_as_the_workload_requests(service, run_step):
    service.scripts = [[accepted(), progress(300), HANG]]  # a job that is not cancelled would hang
    step = run_step(make_plan(ClosedLoop(2), workload=[JobKind(name="fast", cancel=1.0)]))
    assert set(step.tally.statuses) == {"LEFT"}
    assert step.tally.failed == 0 and step.tally.megapixel_iterations > 0


def test_a_job_that_will_be_cancelled_is_streamed_even_without_frames(service, run_step):
    service.scripts = [[accepted(), progress(300), HANG]]
    step = run_step(make_plan(ClosedLoop(1), workload=[JobKind(name="fast", cancel=1.0, frames=False)]))
    assert set(step.tally.statuses) == {"LEFT"}
    assert not any(spec.HasField("frames") for spec in service.specs)


def test_an_open_loop_counts_from_the_schedule(service, run_step, monkeypatch):
    stream, blocked_s = AsyncGramophoneClient.stream, [0.0]

    def blocking(self, *args, **kwargs):
        blocked_s[0] = 0.3  # the first job blocks the sender while more jobs become due, every few milliseconds
        return stream(self, *args, **kwargs)

    monkeypatch.setattr(AsyncGramophoneClient, "stream", blocking)
    step = run_step(make_plan(OpenLoop(100.0)), clock=lambda: time.monotonic() + blocked_s[0])
    assert step.late_s > 0.1
    assert step.tally.result_s.max_s > 0.1  # although each job took only a few milliseconds after it was sent


def test_a_server_that_hangs_does_not_delay_the_steps(service, monkeypatch):
    server_info, timeouts = AsyncGramophoneClient.server_info, []

    async def hanging(self, *, timeout=10.0):
        timeouts.append(timeout)
        if len(timeouts) == 1:  # at the start of the bench
            return await server_info(self)
        await asyncio.sleep(timeout)
        raise DeadlineExceededError("no answer")

    monkeypatch.setattr(AsyncGramophoneClient, "server_info", hanging)
    monkeypatch.setattr(run, "SERVER_LOAD_TIMEOUT_S", 0.05)
    monkeypatch.setattr(measure, "TOLERANCE", math.inf)  # a step ends after nine jobs, however long they take
    steps = asyncio.run(run_plan(service, make_plan(ClosedLoop(1), ClosedLoop(2), window_s=0.001)))
    assert timeouts[1:] == [0.05] * 4
    assert [(step.server_before, step.server_after) for step in steps] == [(None, None)] * 2
    assert all("the server did not report its load before this step" in step.notes() for step in steps)
    assert all(step.tally.ok for step in steps)


@pytest.mark.parametrize("frames", [True, False])
def test_large_images_are_uploaded_by_the_first_jobs(service, run_step, frames):
    large = Pictures(encoded("red") + bytes(INLINE_BYTES), (encoded("yellow"),))
    kind = JobKind(name="large", frames=frames)
    plan = dataclasses.replace(make_plan(ClosedLoop(4), workload=(kind,)), pictures=lambda _: large)
    step = run_step(plan, jobs=12)
    assert step.tally.statuses == Counter(OK=step.tally.ended)
    assert service.uploads == 1


def test_an_invalid_job_ends_the_bench(service):
    service.scripts = [[refused(server_errors.InvalidRequest([Violation("spec.recipe.size", "must be at most 2048")]))]]
    with pytest.raises(InvalidWorkload, match=r"the server rejects the job 'fast' as invalid: .*must be at most 2048"):
        asyncio.run(run_plan(service, make_plan(ClosedLoop(2))))


@pytest.mark.parametrize("width", [30, 100])
def test_the_display_fits_the_console(service, monkeypatch, width):
    monkeypatch.setattr(display, "REFRESH_S", 0.01)
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=30, legacy_windows=False)

    async def show() -> None:
        async with AsyncGramophoneClient(service.target, max_retries=0) as client:
            bench = Bench(make_plan(ClosedLoop(1), OpenLoop(50.0), duration_s=0.3))
            async with display.live_display(bench, console):
                await bench.run(client)

    asyncio.run(show())
    out = console.file.getvalue()
    assert "step 1 of 2" in out and "step 2 of 2" in out
    assert ("result p50" in out) == (width == 100)


def test_there_is_no_display_without_a_terminal(service):
    console = Console(file=io.StringIO(), width=100)

    async def show() -> None:
        async with display.live_display(None, console):
            pass

    asyncio.run(show())
    assert console.file.getvalue() == ""
