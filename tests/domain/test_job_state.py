"""A job on its way as a value, and as bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from gramophone.recipe import Optimiser
from gramophone_server.domain.engine_api import Batch, BatchEngine
from gramophone_server.domain.job import StyleJob, digest
from gramophone_server.domain.job_state import JobState
from gramophone_server.engine.batch import EngineBatch
from gramophone_server.engine.engine import VggEngine
from gramophone_server.engine.optimisers import layout
from gramophone_server.errors import InvalidRequest
from tests.support.engines import CHECKPOINTS, FakeBatch, FakeEngine
from tests.support.pictures import make_picture

MakeJob = Callable[..., StyleJob]
MOST = 2**24
PICTURE = make_picture(3, 40, 48).permute(1, 2, 0).contiguous()


@pytest.fixture
def state(make_job: MakeJob) -> JobState:
    """Three iterations into the second scale, with L-BFGS."""
    job = make_job(optimiser=Optimiser.LBFGS, average=0.0, smallest_size=34, coarse_iterations=4, iterations=6)
    tensors = {name: torch.zeros(like.shape, dtype=like.dtype) for name, like in layout(job.recipe, 40, 48).items()}
    tensors["image"] = torch.rand(3, 40, 48, generator=torch.Generator().manual_seed(0))
    return JobState(job, at=1, done=7, gradients=7, averaged=3, tensors=tensors)


def change(data: bytes, **fields: object) -> bytes:
    """The checkpoint with other fields in its header."""
    length = int.from_bytes(data[8:12], "little")
    header = json.dumps(json.loads(data[12 : 12 + length]) | fields).encode()
    return data[:8] + len(header).to_bytes(4, "little") + header + data[12 + length :]


def test_a_work_knows_its_scale(make_job: MakeJob) -> None:
    state = JobState(make_job(smallest_size=24, coarse_iterations=4, iterations=6))
    assert [scale[:2] for scale in state.scales] == [(24, 20), (34, 28), (48, 40)]
    assert (state.shape.width, state.iterations_left, state.iterations) == (24, 4, 14)
    assert state.pixels_left == 4 * 24 * 20 + 4 * 34 * 28 + 6 * 48 * 40
    state.advanced(3)
    assert (state.shape.width, state.iterations_left) == (24, 1)
    state.advanced(1)
    assert (state.at, state.shape.width, state.iterations_left) == (0, 34, 0)
    state.at = 2
    state.advanced(10)
    assert state.finished and state.pixels_left == 0 and state.shape.width == 48


@pytest.mark.parametrize(
    ("protocol", "implementations"), [(Batch, (EngineBatch, FakeBatch)), (BatchEngine, (VggEngine, FakeEngine))]
)
def test_the_fakes_know_what_the_engine_knows(protocol: type, implementations: tuple[type, ...]) -> None:
    methods = {name for name, value in vars(protocol).items() if not name.startswith("_") and callable(value)}
    assert methods
    for implementation in implementations:
        assert methods <= set(dir(implementation))


def test_a_fake_batch_takes_a_job_through_its_scales(make_job: MakeJob) -> None:
    engine = FakeEngine()
    state = engine.admit(make_job(smallest_size=34, coarse_iterations=4, iterations=6))
    seen = []
    while not state.finished:
        batch = engine.batch(state.shape, 2)
        slot = batch.join(state)
        while state.iterations_left:
            report = batch.advance(3)[slot]
            seen.append((report.iteration, report.width, int(batch.snapshot(slot)()[0, 0, 0])))
        assert batch.leave(slot) is state
    assert seen == [(3, 34, 3), (4, 34, 4), (7, 48, 7), (10, 48, 10)]


def test_a_digest_is_of_pixels_and_shape() -> None:
    picture = make_picture(1, 12, 20)
    assert digest(picture) == digest(picture.clone()) == digest(picture.permute(1, 2, 0).contiguous().permute(2, 0, 1))
    assert len({digest(p) for p in (picture, picture.view(3, 20, 12), 255 - picture)}) == 3


def test_a_checkpoint_is_what_was_written(state: JobState) -> None:
    read = CHECKPOINTS.read(CHECKPOINTS.write(state, most_bytes=MOST), most_bytes=MOST)
    again = read.restore(state.job)
    assert (again.at, again.done, again.gradients, again.averaged) == (1, 7, 7, 3)
    assert state.tensors is not None and again.tensors is not None
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in state.tensors.items())
    assert again.bytes == state.bytes


def test_the_sizes_that_are_stated(state: JobState) -> None:
    pixels = 40 * 48
    assert CHECKPOINTS.size(state) == pytest.approx(276 * pixels, rel=0.01)
    assert 0 < CHECKPOINTS.size(state, light=True) - 3 * pixels < 2000
    for picture in (None, PICTURE):
        data = CHECKPOINTS.write(state, picture=picture, most_bytes=MOST)
        assert len(data) == CHECKPOINTS.size(state, light=picture is not None)


def test_what_is_too_large_is_neither_written_nor_read(state: JobState) -> None:
    with pytest.raises(
        InvalidRequest,
        match=r"^checkpoint: of a 48x40 picture takes \d+ bytes, at most 9000 are allowed; a light one is",
    ):
        CHECKPOINTS.write(state, most_bytes=9000)
    data = CHECKPOINTS.write(state, picture=PICTURE, most_bytes=9000)
    with pytest.raises(InvalidRequest, match=f"^spec.resume: has {len(data)} bytes, at most 5000 are taken"):
        CHECKPOINTS.read(data, most_bytes=5000)
    with pytest.raises(ValueError, match="only a job that has started and is in no batch"):
        CHECKPOINTS.write(JobState(state.job), most_bytes=MOST)


def test_bytes_that_are_no_checkpoint_are_refused(state: JobState) -> None:
    data = CHECKPOINTS.write(state, most_bytes=MOST)
    light = CHECKPOINTS.write(state, picture=PICTURE, most_bytes=MOST)
    recipe = json.loads(data[12 : 12 + int.from_bytes(data[8:12], "little")])["recipe"]
    damaged = "is damaged: its header cannot be read"
    for bad, words in (
        (b"", "is not a checkpoint"),
        (b"\x89PNG" + data, "is not a checkpoint"),
        (data[:7] + b"\x02" + data[8:], "has version 02, this server reads version 01"),
        (data[:10], "is cut off or damaged: its header does not fit"),
        (data[:8] + b"\xff\xff\xff\xff" + data[12:], "is cut off or damaged: its header does not fit"),
        (data[:12] + b"[" * 400 + data[412:], damaged),
        (data[:-1], "cut off or damaged: .* do not make a 48x40 picture"),
        (light + b"\0", "cut off or damaged: 5761 bytes of tensors do not make a 48x40 picture"),
        (change(data, width=2**31 - 1, height=2**31 - 1), "do not make a 2147483647x2147483647 picture"),
        (change(data, kind="light"), "do not make a 48x40 picture"),
        (change(data, kind="pickle"), damaged),
        (change(data, done=-1), damaged),
        (change(data, done=1.5), damaged),
        (change(data, seed=2**64), damaged),
        (change(data, styles=3), damaged),
        (change(data, style_weights=[1.0, 1.0]), damaged),
        (change(data, style_weights=[0.0]), damaged),
        (change(data, style_weights=["1"]), damaged),
        (change(data, recipe=recipe | {"size": 10**400}), damaged),
        (change(data, recipe=recipe | {"beta": -1}), damaged),
        (change(data, recipe=recipe | {"extra": 1}), damaged),
        (change(data, recipe=recipe | {"optimiser": "adam"}), "do not make a 48x40 picture"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            CHECKPOINTS.read(bad, most_bytes=MOST)


def test_tensors_that_a_kernel_could_not_bear_are_refused(state: JobState) -> None:
    assert state.tensors is not None
    for name, value, words in (
        ("image", torch.nan, "image has values that are not finite"),
        ("last_good", 2.0, "last_good has values outside of 0 to 1"),
        ("history", torch.inf, "history has values that are not finite"),
        ("seen", -1, "it has more pairs than gradients"),
        ("seen", 8, "it has more pairs than gradients"),
    ):
        tensors = {key: tensor.clone() for key, tensor in state.tensors.items()}
        tensors[name].view(-1)[-1] = value
        with pytest.raises(InvalidRequest, match=words):
            CHECKPOINTS.read(CHECKPOINTS.write(replace(state, tensors=tensors), most_bytes=MOST), most_bytes=MOST)


def test_a_checkpoint_is_of_one_job(state: JobState, make_job: MakeJob) -> None:
    data = CHECKPOINTS.write(state, most_bytes=MOST)
    job = state.job

    def refusal(job: StyleJob, **fields: object) -> str:
        with pytest.raises(InvalidRequest) as raised:
            CHECKPOINTS.read(change(data, **fields), most_bytes=MOST).restore(job)
        return raised.value.violations[0].description

    def other(**recipe: object) -> StyleJob:
        return replace(job, recipe=replace(job.recipe, **recipe))  # type: ignore[arg-type]

    assert refusal(other(size=64)) == "is of a job with size 48, and this one has 64"
    assert refusal(other(style_layers=job.recipe.style_layers[:2])).endswith("this one has relu1_1, relu2_1")
    assert refusal(replace(job, styles=(make_picture(9),))) == "is of a job with other images"
    blend = replace(job, styles=2 * job.styles, style_weights=(2.0, 1.0))
    two = {"styles": [digest.hex() for digest in blend.style_digests], "style_weights": [1.0, 1.0]}
    assert refusal(blend, **two) == "is of a job with style weights 1, 1, and this one has 2, 1"
    scaled = CHECKPOINTS.read(change(data, **two | {"style_weights": [0.6, 0.3]}), most_bytes=MOST)
    assert scaled.restore(blend).done == 7  # the same proportions are the same blend
    assert refusal(job, at=5) == "is at iteration 7 of scale 5, which the job does not have"
    assert refusal(job, at=0) == "is at iteration 7 of scale 0, which the job does not have"
    assert refusal(job, done=4, at=0).startswith("has a 48x40 picture, and the job a 34x28 one")
    assert refusal(job, averaged=4) == "is damaged: its counts contradict each other"
    assert refusal(job, gradients=8) == "is damaged: its counts contradict each other"
    assert refusal(job, diverged_at=8) == "is damaged: its counts contradict each other"
    # What can change on the way may have changed, and a new acceptance has a new budget.
    again = CHECKPOINTS.read(data, most_bytes=MOST).restore(other(beta=8.0, step=0.1, iterations=9, time_budget=4.0))
    assert (again.recipe.beta, again.recipe.time_budget, again.iterations) == (8.0, 4.0, 13)
    assert refusal(other(iterations=2), at=1, done=7) == "is at iteration 7 of scale 1, which the job does not have"


def test_a_checkpoint_has_the_recipe_of_its_time_and_the_seed(state: JobState) -> None:
    state = replace(state, job=replace(state.job, seed=2**64 - 1))
    state.update(beta=8.0, iterations=20)
    read = CHECKPOINTS.read(CHECKPOINTS.write(state, most_bytes=MOST), most_bytes=MOST)
    assert (read.recipe, read.seed) == (state.recipe, 2**64 - 1)
    assert (read.recipe.beta, read.recipe.iterations) == (8.0, 20)
    # A job made of it, which has no start image to give, goes on to the retuned end.
    again = read.restore(replace(state.job, recipe=read.recipe))
    assert (again.iterations, again.pixels_left) == (state.iterations, state.pixels_left) == (24, 17 * 48 * 40)
