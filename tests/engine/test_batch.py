"""Batches of the engine: jobs join, leave, are updated and go from scale to scale without an effect on other jobs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gramophone.recipe import InvalidRecipeError, LayerWeight, Normalisation, Optimiser, Start
from gramophone_server.domain.job import Report, StyleJob
from gramophone_server.domain.job_state import JobState
from gramophone_server.engine.engine import VggEngine
from gramophone_server.errors import OutOfDeviceMemory
from tests.support.engines import CHECKPOINTS
from tests.support.pictures import make_picture

MakeJob = Callable[..., StyleJob]
STATEFUL = [Optimiser.ADAM, Optimiser.LBFGS]
MAX_BYTES = 2**30


def run_alone(engine: VggEngine, state: JobState, slots: int, iterations: int = 10_000) -> list[Report]:
    """Runs up to ``iterations`` of a job alone in batches of ``slots``, and returns the report of each."""
    reports = []
    while iterations and not state.finished:
        batch = engine.batch(state.shape, slots)
        slot = batch.join(state)
        while iterations and state.iterations_left:
            reports.append(batch.advance()[slot])
            iterations -= 1
        batch.leave(slot)
        batch.close()
    return reports


def totals(reports: list[Report]) -> list[float]:
    return [report.losses.total for report in reports]


def image(state: JobState) -> Tensor:
    assert state.tensors is not None
    return state.tensors["image"]


def three(make_job: MakeJob, optimiser: Optimiser) -> list[StyleJob]:
    """Jobs of one shape that differ in everything else."""
    same = {"optimiser": optimiser, "average": 0.5, "size": 48}
    gatys = {"normalisation": Normalisation.GATYS, "alpha": 0.1, "beta": 2e4, "tv_weight": 9.0}
    return [
        make_job(content=1, style=2, smallest_size=34, iterations=9, coarse_iterations=4, **same),
        make_job(content=3, style=4, beta=9.0, step=0.01, iterations=14, start=Start.NOISE, seed=5, **same),
        replace(
            make_job(content=5, step=0.03, **gatys, **same),
            styles=(make_picture(6, 36, 36), make_picture(7, 50, 30)),
            style_weights=(1.0, 2.0),
        ),
    ]


@pytest.mark.parametrize("optimiser", Optimiser)
def test_jobs_that_join_and_leave_have_the_results_that_they_have_alone(
    tiny_engine: VggEngine, make_job: MakeJob, optimiser: Optimiser
) -> None:
    alone = [JobState(job) for job in three(make_job, optimiser)]
    alone_reports = [run_alone(tiny_engine, state, 3) for state in alone]
    single = [run_alone(tiny_engine, JobState(job), 1) for job in three(make_job, optimiser)]

    first, second, third = works = [tiny_engine.admit(job) for job in three(make_job, optimiser)]
    reports: dict[JobState, list[Report]] = {state: [] for state in works}
    reports[first] += run_alone(tiny_engine, first, 3, 4)  # its coarse scale
    batch = tiny_engine.batch(first.shape, 3)

    def advance(iterations: int) -> None:
        for _ in range(iterations):
            for slot, report in batch.advance().items():
                reports[batch.states[slot]].append(report)

    assert batch.join(second) == 0
    advance(3)
    assert batch.join(first) == 1  # after its coarse scale
    advance(4)
    assert batch.join(third) == 2
    advance(2)
    assert batch.leave(0) is second  # as a paused job does
    advance(3)
    assert batch.iterations_left(1) == 0
    batch.leave(1)
    batch.join(second)
    advance(5)
    for slot in (0, 2):
        batch.leave(slot)
    for mine, expected, narrow in zip(works, alone_reports, single, strict=True):
        assert mine.finished
        assert totals(reports[mine]) == totals(expected)
        assert totals(expected)[:4] == pytest.approx(totals(narrow)[:4], rel=1e-3)
    for mine, expected in zip(works, alone, strict=True):
        assert mine.tensors is not None and expected.tensors is not None
        assert all(torch.equal(mine.tensors[name], tensor) for name, tensor in expected.tensors.items())


def test_a_job_that_cannot_join_is_refused(tiny_engine: VggEngine, make_job: MakeJob) -> None:
    state = tiny_engine.admit(make_job(iterations=1))
    batch = tiny_engine.batch(state.shape, 1)
    with pytest.raises(ValueError, match="no job is in the batch"):
        batch.advance()
    batch.join(state)
    with pytest.raises(ValueError, match="the job is in a batch already"):
        batch.join(state)
    with pytest.raises(ValueError, match="all 1 slots are taken"):
        batch.join(tiny_engine.admit(make_job()))
    with pytest.raises(ValueError, match="the job's shape is"):
        batch.join(tiny_engine.admit(make_job(size=40)))
    batch.advance(5)
    with pytest.raises(ValueError, match="slot 0 has no iteration left at this scale: it must leave"):
        batch.advance()
    with pytest.raises(ValueError, match="the job has no iteration left"):
        tiny_engine.batch(state.shape, 1).join(batch.leave(0))
    with pytest.raises(ValueError, match="has 1 to 256 slots, got 0"):
        tiny_engine.batch(state.shape, 0)


@pytest.mark.parametrize("optimiser", STATEFUL)
def test_an_update_has_effect_from_the_iteration_that_is_returned(
    tiny_engine: VggEngine, make_job: MakeJob, optimiser: Optimiser
) -> None:
    changes: dict[str, Any] = {
        "alpha": 0.3, "beta": 8.0, "tv_weight": 0.0, "step": 0.01,
        "style_layers": tuple(LayerWeight(f"relu{i}_1", 0.5 * i) for i in range(1, 6)),
    }  # fmt: skip
    job, mate = make_job(optimiser=optimiser), make_job(content=3, style=4, optimiser=optimiser)
    tuned, untouched = tiny_engine.admit(job), tiny_engine.admit(mate)
    batch = tiny_engine.batch(tuned.shape, 2)
    batch.join(tuned)
    batch.join(untouched)
    before = [batch.advance() for _ in range(4)]
    kept = batch.copy(0)
    assert batch.update(0, **changes) == 5
    after = [batch.advance() for _ in range(6)]

    plain = run_alone(tiny_engine, JobState(job), 2)
    assert totals([reports[0] for reports in before]) == totals(plain[:4])
    assert after[0][0].losses.tv == 0 and plain[4].losses.tv > 0
    # A job with these weights from the start continues from the state of the first one before its update.
    other = replace(kept, job=replace(job, recipe=replace(job.recipe, **changes)), recipe=None)
    assert totals([reports[0] for reports in after]) == totals(run_alone(tiny_engine, other, 2))
    assert torch.equal(image(batch.leave(0)), image(other))
    assert totals([reports[1] for reports in before + after]) == totals(run_alone(tiny_engine, JobState(mate), 2))


def test_an_update_of_fixed_fields_or_with_invalid_values_is_refused(tiny_engine: VggEngine, make_job: MakeJob) -> None:
    state = tiny_engine.admit(make_job())
    batch = tiny_engine.batch(state.shape, 1)
    batch.join(state)
    for changes, message in (
        ({"optimiser": Optimiser.LBFGS}, "optimiser: cannot change after the job is accepted"),
        ({"beta": -1.0}, "beta: must be between 0 and 1e[+]15, got -1"),
        (
            {"content_layers": (LayerWeight("relu3_1"),)},
            "content_layers: must name the job's layers, relu4_2, got relu3_1",
        ),
    ):
        with pytest.raises(InvalidRecipeError, match=message):
            batch.update(0, **changes)  # type: ignore[arg-type]
    assert state.recipe == state.job.recipe


@pytest.mark.parametrize("done", [2, 4, 6])  # iterations: in the coarse scale, at its end, in the final one
@pytest.mark.parametrize("average", [0.0, 0.9])
@pytest.mark.parametrize("optimiser", STATEFUL)
def test_a_job_continues_from_a_full_checkpoint_bit_for_bit(
    tiny_engine: VggEngine, make_job: MakeJob, optimiser: Optimiser, average: float, done: int
) -> None:
    job = make_job(optimiser=optimiser, average=average, smallest_size=34, coarse_iterations=4, iterations=6)
    straight = JobState(job)
    expected = run_alone(tiny_engine, straight, 1)
    stopped = JobState(job)
    run_alone(tiny_engine, stopped, 1, done)
    data = CHECKPOINTS.write(stopped, max_bytes=MAX_BYTES)
    read = CHECKPOINTS.read(data, max_bytes=MAX_BYTES)
    assert read.recipe == job.recipe
    resumed = read.restore(
        make_job(optimiser=optimiser, average=average, smallest_size=34, coarse_iterations=4, iterations=6)
    )
    assert CHECKPOINTS.write(resumed, max_bytes=MAX_BYTES) == data
    reports = run_alone(tiny_engine, resumed, 1)
    assert reports == expected[done:]
    assert torch.equal(image(resumed), image(straight))


def test_a_job_continues_from_the_picture_of_a_light_checkpoint(tiny_engine: VggEngine, make_job: MakeJob) -> None:
    job = make_job(average=0.5, iterations=30)
    state = tiny_engine.admit(job)
    batch = tiny_engine.batch(state.shape, 1)
    batch.join(state)
    batch.advance(20)
    data = CHECKPOINTS.write(batch.copy(0), picture=batch.snapshot(0)(), max_bytes=MAX_BYTES)
    resumed = CHECKPOINTS.read(data, max_bytes=MAX_BYTES).restore(job)
    assert (resumed.done, resumed.gradients, resumed.iterations_left) == (20, 0, 10)
    again = tiny_engine.batch(resumed.shape, 1)
    again.join(resumed)
    assert torch.equal(again.picture(0), batch.picture(0))
    reports = [again.advance()[0] for _ in range(10)]
    assert reports[-1].iteration == 30 and resumed.finished
    # The first steps of Adam have the full length for any gradient, so they move a converged picture away at first.
    assert batch.advance(10)[0].losses.total < reports[-1].losses.total < reports[1].losses.total


def test_a_job_that_diverges_after_a_light_checkpoint_reports_the_iteration_of_the_job(
    tiny_engine: VggEngine, make_job: MakeJob
) -> None:
    job = make_job()
    state = JobState(job)
    run_alone(tiny_engine, state, 1, 6)
    data = CHECKPOINTS.write(state, picture=tiny_engine.picture(state)(), max_bytes=MAX_BYTES)
    resumed, healthy = CHECKPOINTS.read(data, max_bytes=MAX_BYTES).restore(job), JobState(make_job(content=3))
    batch = tiny_engine.batch(resumed.shape, 2)
    batch.join(resumed)
    batch.join(healthy)
    batch.advance()
    with torch.inference_mode():
        batch.runner.objective.style_weights[:, 0] = torch.nan
    assert [report.diverged_at for report in batch.advance(2).values()] == [8, None]
    left = batch.leave(0)
    assert left.diverged_at == 8 and image(left).isfinite().all()
    batch.join(left)  # it stays diverged
    batch.advance()
    assert torch.equal(batch.leave(0).tensors["image"], image(left))  # type: ignore[index]
    expected = run_alone(tiny_engine, JobState(make_job(content=3)), 2)
    assert totals(run_alone(tiny_engine, batch.leave(1), 2)) == totals(expected[4:])


def test_out_of_memory_leaves_all_jobs_at_their_last_whole_iteration(
    tiny_engine: VggEngine, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = totals(run_alone(tiny_engine, JobState(make_job()), 2))
    state, late = tiny_engine.admit(make_job()), tiny_engine.admit(make_job(content=3))
    batch = tiny_engine.batch(state.shape, 2)
    batch.join(state)
    reports = [batch.advance()[0] for _ in range(3)]
    evaluate, evaluations = batch.runner.objective.network_terms, itertools.count(1)

    def too_much(*_: Any, **__: Any) -> Tensor:
        return torch.empty(2**50)

    def evaluate_twice(pictures: Tensor) -> Any:
        return evaluate(pictures) if next(evaluations) < 3 else too_much()

    with monkeypatch.context() as patch:
        patch.setattr(tiny_engine.features, "forward", too_much)
        with pytest.raises(OutOfDeviceMemory, match="48x40"):
            batch.join(late)
        assert not late.joined and late.tensors is None and list(batch.states) == [0]
    with monkeypatch.context() as patch:
        patch.setattr(batch.runner.objective, "network_terms", evaluate_twice)
        with pytest.raises(OutOfDeviceMemory, match="48x40"):
            batch.advance(5)
    assert state.done == 5
    take = batch.runner.take
    with monkeypatch.context() as patch:
        patch.setattr(
            batch.runner, "take", lambda slot, to_cpu=False: take(slot, to_cpu=True) if to_cpu else too_much()
        )
        left = batch.leave(0)
    reports += run_alone(tiny_engine, left, 2)
    assert totals(reports) == expected[:3] + expected[5:]
