"""The state of a job, and its way through the scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gramophone_server.domain.job import Losses, StyleJob
from gramophone_server.domain.job_state import JobState
from tests.support.engines import FakeEngine
from tests.support.pictures import make_picture

MakeJob = Callable[..., StyleJob]


def test_the_shape_and_the_iterations_left_are_those_of_the_next_iteration(make_job: MakeJob) -> None:
    state = JobState(make_job(smallest_size=24, coarse_iterations=4, iterations=6))
    assert [scale[:2] for scale in state.scales] == [(24, 20), (34, 28), (48, 40)]
    assert (state.shape.width, state.iterations_left, state.iterations) == (24, 4, 14)
    assert state.pixel_iterations_left == 4 * 24 * 20 + 4 * 34 * 28 + 6 * 48 * 40
    state.count_iterations(3)
    assert (state.shape.width, state.iterations_left) == (24, 1)
    state.count_iterations(1)
    assert (state.scale_index, state.shape.width, state.iterations_left) == (0, 34, 0)
    state.scale_index = 2
    state.count_iterations(10)
    assert state.finished and state.pixel_iterations_left == 0 and state.shape.width == 48


def test_style_images_have_their_pixels_at_each_scale(make_job: MakeJob) -> None:
    styles = (make_picture(1, 20, 40), make_picture(2, 200, 200))
    job = replace(
        make_job(smallest_size=24, coarse_iterations=4, style_scale=2.0), styles=styles, style_weights=(1.0, 1.0)
    )
    assert job.style_sizes(24) == [(48, 24), (48, 48)]
    assert JobState(job).style_pixels == tuple(3 * (2 * side) ** 2 // 2 for side in (24, 34, 48))


def test_a_job_goes_through_its_scales_in_one_batch_after_another(make_job: MakeJob) -> None:
    engine = FakeEngine()
    state = engine.admit(make_job(smallest_size=34, coarse_iterations=4, iterations=6))
    seen = []
    while not state.finished:
        batch = engine.batch(state.shape, 2)
        slot = batch.join(state)
        while state.iterations_left:
            report = batch.advance(3)[slot]
            seen.append((report.iteration, report.width, report.scale, int(batch.snapshot(slot)()[0, 0, 0])))
            assert report.scales == 2
        assert batch.leave(slot) is state
    assert seen == [(3, 34, 1, 3), (4, 34, 1, 4), (7, 48, 2, 7), (10, 48, 2, 10)]


def test_a_report_counts_the_scales_that_the_job_really_has(make_job: MakeJob) -> None:
    # A picture three times as wide as high is 11 px high at its recipe's first scale, which is left out.
    job = replace(
        make_job(size=96, smallest_size=34, coarse_iterations=4, iterations=6), content=make_picture(1, 20, 60)
    )
    state = JobState(job)
    assert (len(state.recipe.scale_sizes()), len(state.scales)) == (4, 3)
    state.count_iterations(4)
    state.update(iterations=9)
    report = state.report(Losses({}, {}, 0.0))
    assert (report.scale, report.scales, report.iterations) == (1, 3, 17)
    state.scale_index = 2
    assert state.report(Losses({}, {}, 0.0)).scale == 3
