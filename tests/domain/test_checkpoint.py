"""Which jobs a checkpoint can be restored to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from gramophone_server.domain.checkpoint import InvalidCheckpoint
from gramophone_server.domain.job import StyleJob
from gramophone_server.domain.job_state import JobState
from tests.support.checkpoints import MAX_BYTES, lbfgs_state, with_fields
from tests.support.engines import CHECKPOINTS
from tests.support.pictures import make_picture

MakeJob = Callable[..., StyleJob]


@pytest.fixture
def state(make_job: MakeJob) -> JobState:
    return lbfgs_state(make_job)


def test_a_checkpoint_is_restored_only_to_a_job_like_its_own(state: JobState, make_job: MakeJob) -> None:
    data = CHECKPOINTS.write(state, max_bytes=MAX_BYTES)
    job = state.job

    def refusal(job: StyleJob, **fields: object) -> str:
        with pytest.raises(InvalidCheckpoint) as raised:
            CHECKPOINTS.read(with_fields(data, **fields), max_bytes=MAX_BYTES).restore(job)
        return str(raised.value)

    def other(**recipe: object) -> StyleJob:
        return replace(job, recipe=replace(job.recipe, **recipe))  # type: ignore[arg-type]

    assert refusal(other(size=64)) == "is of a job with size 48, and this one has 64"
    assert refusal(other(style_layers=job.recipe.style_layers[:2])).endswith("this one has relu1_1, relu2_1")
    assert refusal(replace(job, styles=(make_picture(9),))) == "is of a job with other images"
    blend = replace(job, styles=2 * job.styles, style_weights=(2.0, 1.0))
    two = {"styles": [digest.hex() for digest in blend.style_digests], "style_weights": [1.0, 1.0]}
    assert refusal(blend, **two) == "is of a job with style weights 1, 1, and this one has 2, 1"
    scaled = CHECKPOINTS.read(with_fields(data, **two | {"style_weights": [0.6, 0.3]}), max_bytes=MAX_BYTES)
    assert scaled.restore(blend).done == 7  # the same proportions are the same blend
    assert refusal(job, at=5) == "is at iteration 7 of scale 5, which the job does not have"
    assert refusal(job, at=0) == "is at iteration 7 of scale 0, which the job does not have"
    assert refusal(job, done=4, at=0).startswith("has a 48x40 picture, and the job a 34x28 one")
    assert refusal(job, averaged=4) == "is damaged: its counts contradict each other"
    assert refusal(job, gradients=8) == "is damaged: its counts contradict each other"
    assert refusal(job, diverged_at=8) == "is damaged: its counts contradict each other"
    # The fields of an update and the time budget are those of the new job.
    again = CHECKPOINTS.read(data, max_bytes=MAX_BYTES).restore(
        other(beta=8.0, step=0.1, iterations=9, time_budget=4.0)
    )
    assert (again.recipe.beta, again.recipe.time_budget, again.iterations) == (8.0, 4.0, 13)
    assert refusal(other(iterations=2), at=1, done=7) == "is at iteration 7 of scale 1, which the job does not have"
