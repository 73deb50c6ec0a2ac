"""Checkpoints as bytes: round trips, sizes, and bytes that are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from gramophone_server.domain.checkpoint import InvalidCheckpoint
from gramophone_server.domain.job import StyleJob
from gramophone_server.domain.job_state import JobState
from gramophone_server.errors import InvalidRequest
from tests.support.checkpoints import MAX_BYTES, header, lbfgs_state, with_fields
from tests.support.engines import CHECKPOINTS
from tests.support.pictures import make_picture

MakeJob = Callable[..., StyleJob]
PICTURE = make_picture(3, 40, 48).permute(1, 2, 0).contiguous()


@pytest.fixture
def state(make_job: MakeJob) -> JobState:
    return lbfgs_state(make_job)


def test_reading_returns_the_state_that_was_written(state: JobState) -> None:
    read = CHECKPOINTS.read(CHECKPOINTS.write(state, max_bytes=MAX_BYTES), max_bytes=MAX_BYTES)
    again = read.restore(state.job)
    assert (again.scale_index, again.done, again.gradients, again.averaged) == (1, 7, 7, 3)
    assert state.tensors is not None and again.tensors is not None
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in state.tensors.items())
    assert again.bytes == state.bytes


def test_a_checkpoint_has_the_stated_size(state: JobState) -> None:
    pixels = 40 * 48
    assert CHECKPOINTS.size(state) == pytest.approx(276 * pixels, rel=0.01)
    assert 0 < CHECKPOINTS.size(state, light=True) - 3 * pixels < 2000
    for picture in (None, PICTURE):
        data = CHECKPOINTS.write(state, picture=picture, max_bytes=MAX_BYTES)
        assert len(data) == CHECKPOINTS.size(state, light=picture is not None)


@pytest.mark.parametrize("light", [False, True])
def test_what_fits_is_known_without_the_images(state: JobState, light: bool) -> None:
    size = CHECKPOINTS.size(replace(state, job=replace(state.job)), light=light)
    fitting = [n for n in range(size - 10_000, size + 10_000) if CHECKPOINTS.fits(state, light=light, max_bytes=n)]
    assert size <= fitting[0] <= size + 8192
    assert "content_digest" not in vars(state.job), "it hashes an image, which belongs to the thread that writes"


def test_checkpoints_that_are_too_large_are_neither_written_nor_read(state: JobState) -> None:
    with pytest.raises(
        InvalidRequest,
        match=r"^checkpoint: of a 48x40 picture takes \d+ bytes, at most 9000 are allowed; a light one is",
    ):
        CHECKPOINTS.write(state, max_bytes=9000)
    data = CHECKPOINTS.write(state, picture=PICTURE, max_bytes=9000)
    with pytest.raises(InvalidCheckpoint, match=f"^has {len(data)} bytes, at most 5000 are allowed"):
        CHECKPOINTS.read(data, max_bytes=5000)
    with pytest.raises(ValueError, match="only a job that has started and is in no batch"):
        CHECKPOINTS.write(JobState(state.job), max_bytes=MAX_BYTES)


def test_bytes_that_are_not_a_checkpoint_are_refused(state: JobState) -> None:
    data = CHECKPOINTS.write(state, max_bytes=MAX_BYTES)
    light = CHECKPOINTS.write(state, picture=PICTURE, max_bytes=MAX_BYTES)
    recipe = header(data)["recipe"]
    assert isinstance(recipe, dict)
    damaged = "is damaged: its header cannot be read"
    for bad, message in (
        (b"", "is not a checkpoint"),
        (b"\x89PNG" + data, "is not a checkpoint"),
        (data[:7] + b"\x02" + data[8:], "has version 02, this server reads version 01"),
        (data[:10], "is cut off or damaged: its header does not fit"),
        (data[:8] + b"\xff\xff\xff\xff" + data[12:], "is cut off or damaged: its header does not fit"),
        (data[:12] + b"[" * 400 + data[412:], damaged),
        (data[:-1], "cut off or damaged: .* do not make a 48x40 picture"),
        (light + b"\0", "cut off or damaged: 5761 bytes of tensors do not make a 48x40 picture"),
        (with_fields(data, width=2**31 - 1, height=2**31 - 1), "do not make a 2147483647x2147483647 picture"),
        (with_fields(data, kind="light"), "do not make a 48x40 picture"),
        (with_fields(data, kind="pickle"), damaged),
        (with_fields(data, done=-1), damaged),
        (with_fields(data, done=1.5), damaged),
        (with_fields(data, seed=2**64), damaged),
        (with_fields(data, styles=3), damaged),
        (with_fields(data, style_weights=[1.0, 1.0]), damaged),
        (with_fields(data, style_weights=[0.0]), damaged),
        (with_fields(data, style_weights=["1"]), damaged),
        (with_fields(data, recipe=recipe | {"size": 10**400}), damaged),
        (with_fields(data, recipe=recipe | {"beta": -1}), damaged),
        (with_fields(data, recipe=recipe | {"extra": 1}), damaged),
        (with_fields(data, recipe=recipe | {"optimiser": "adam"}), "do not make a 48x40 picture"),
    ):
        with pytest.raises(InvalidCheckpoint, match=message):
            CHECKPOINTS.read(bad, max_bytes=MAX_BYTES)


def test_tensors_with_values_that_the_kernels_do_not_check_are_refused(state: JobState) -> None:
    assert state.tensors is not None
    for name, value, message in (
        ("image", torch.nan, "image has values that are not finite"),
        ("last_good", 2.0, "last_good has values outside of 0 to 1"),
        ("history", torch.inf, "history has values that are not finite"),
        ("seen", -1, "it has more pairs than gradients"),
        ("seen", 8, "it has more pairs than gradients"),
    ):
        tensors = {key: tensor.clone() for key, tensor in state.tensors.items()}
        tensors[name].view(-1)[-1] = value
        with pytest.raises(InvalidCheckpoint, match=message):
            CHECKPOINTS.read(
                CHECKPOINTS.write(replace(state, tensors=tensors), max_bytes=MAX_BYTES), max_bytes=MAX_BYTES
            )


def test_a_checkpoint_of_a_server_that_did_not_have_a_field_yet_can_be_read(state: JobState) -> None:
    data = CHECKPOINTS.write(state, max_bytes=MAX_BYTES)
    recipe = header(data)["recipe"]
    assert isinstance(recipe, dict)
    del recipe["style_scale"]
    read = CHECKPOINTS.read(with_fields(data, recipe=recipe), max_bytes=MAX_BYTES)
    assert read.recipe == state.recipe
    assert read.restore(state.job).done == state.done


def test_a_checkpoint_has_the_seed_and_the_updated_recipe(state: JobState) -> None:
    state = replace(state, job=replace(state.job, seed=2**64 - 1))
    state.update(beta=8.0, iterations=20)
    read = CHECKPOINTS.read(CHECKPOINTS.write(state, max_bytes=MAX_BYTES), max_bytes=MAX_BYTES)
    assert (read.recipe, read.seed) == (state.recipe, 2**64 - 1)
    assert (read.recipe.beta, read.recipe.iterations) == (8.0, 20)
    # A job with this recipe, without a start image, continues to the updated last iteration.
    again = read.restore(replace(state.job, recipe=read.recipe))
    assert (
        (again.iterations, again.pixel_iterations_left)
        == (state.iterations, state.pixel_iterations_left)
        == (24, 17 * 48 * 40)
    )
