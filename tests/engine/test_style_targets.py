"""The cache of style targets."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from gramophone.recipe import Pooling
from gramophone_server import ops
from gramophone_server.domain.job import StyleJob
from gramophone_server.domain.picture_size import style_size
from gramophone_server.engine import style_targets
from gramophone_server.engine.engine import VggEngine
from gramophone_server.engine.scales import resize
from gramophone_server.errors import OutOfDeviceMemory
from gramophone_server.network.precision import MODES
from tests.support.networks import TINY_CHANNELS, make_tiny_vgg
from tests.support.pictures import make_picture


def engine_with_cache(max_bytes: int) -> VggEngine:
    return VggEngine(make_tiny_vgg(), torch.device("cpu"), MODES["fp32"], style_cache_bytes=max_bytes)


def losses(engine: VggEngine, job: StyleJob) -> list[float]:
    """The objective at each iteration."""
    run = engine.run_batch([job])
    return [run.advance()[0].losses.total for _ in range(job.recipe.iterations)]


def test_the_gram_matrices_of_a_style_are_computed_once(make_job: Callable[..., StyleJob]) -> None:
    with_cache, without, small = (engine_with_cache(max_bytes) for max_bytes in (2**20, 0, 3000))
    job = replace(make_job(iterations=3), styles=(make_picture(6), make_picture(7)), style_weights=(1.0, 2.0))
    again = replace(job, styles=tuple(style.clone() for style in job.styles), style_weights=(5.0, 1.0), seed=3)
    results = [[losses(engine, j) for j in (job, again, job)] for engine in (with_cache, without, small)]
    assert results[0] == results[1] == results[2]
    assert results[0][0] == results[0][2] != results[0][1]
    one = sum(channels**2 for channels in TINY_CHANNELS) * 4  # bytes of a style
    assert with_cache.style_cache == (4, 2, 2 * one, 2**20)
    assert without.style_cache == (0, 6, 0, 0)
    assert small.style_cache.bytes == 2 * one <= 3000
    losses(with_cache, make_job(iterations=1, pooling=Pooling.AVERAGE))
    losses(with_cache, make_job(iterations=1, size=40))
    assert with_cache.style_cache.misses == 4


def steps_of(engine: VggEngine, job: StyleJob) -> tuple[style_targets.StyleBeginning, list[float]]:
    """The beginning of a job after its last step, and the pixels of each step."""
    beginning, pixels = engine.begin(engine.admit(job)), []
    while step := beginning.next_pixels:
        pixels.append(step)
        beginning.advance()
    return beginning, pixels


@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize("step_pixels", [1, 600, 2**17])
def test_a_beginning_in_steps_has_the_bits_of_one_forward_pass(
    make_job: Callable[..., StyleJob], monkeypatch: pytest.MonkeyPatch, pooling: Pooling, step_pixels: int
) -> None:
    monkeypatch.setattr(style_targets, "STEP_PIXELS", step_pixels)
    engine = engine_with_cache(0)
    job = replace(make_job(pooling=pooling), styles=(make_picture(6), make_picture(7)), style_weights=(1.0, 2.0))
    beginning, pixels = steps_of(engine, job)
    assert len(pixels) > 10 if step_pixels == 1 else len(pixels) >= 2
    layers = engine.admit(job).shape.style_layers
    seen = 0
    for style, grams in zip(job.styles, beginning.finish(), strict=True):
        image = resize(style, *style_size(style.shape[2], style.shape[1], job.recipe.size, 1.0))
        activations = engine.features.forward(image, layers, pooling)
        for layer, gram in zip(layers, grams, strict=True):
            scale = style_targets.activation_gram_scale(engine.features, layer, activations[layer][0, 0].numel())
            assert torch.equal(gram, ops.gram(activations[layer], scale)[0])
        seen += image.shape[2] * image.shape[3]
    assert sum(pixels) == pytest.approx(seen)


def test_a_job_that_begins_in_steps_beside_others_has_the_bits_of_one_that_does_not(
    make_job: Callable[..., StyleJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(style_targets, "STEP_PIXELS", 1)
    job = replace(make_job(iterations=3), styles=(make_picture(6), make_picture(7)), style_weights=(1.0, 2.0))
    expected = losses(engine_with_cache(0), job)
    engine = engine_with_cache(0)  # what is computed for a job stays with it
    state, other = engine.admit(job), engine.admit(make_job(iterations=100, seed=3))
    batch = engine.batch(state.shape, 2)
    batch.join(other)
    beginning = engine.begin(state)
    while beginning.next_pixels:
        beginning.advance()
        batch.advance()
    slot = batch.join(state, beginning)
    assert [batch.advance()[slot].losses.total for _ in range(3)] == expected


def test_a_cached_style_needs_no_step_and_no_memory(make_job: Callable[..., StyleJob]) -> None:
    engine = engine_with_cache(2**20)
    beginning, pixels = steps_of(engine, make_job())
    assert pixels and beginning.next_bytes == 0 and not beginning.under_way
    again = engine.begin(engine.admit(make_job(seed=9)))
    assert again.next_pixels == 0 and again.next_bytes == 0
    assert len(again.finish()) == 1 and engine.style_cache.hits == 1


def test_a_beginning_that_runs_out_of_memory_starts_its_style_anew(
    make_job: Callable[..., StyleJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(style_targets, "STEP_PIXELS", 1)
    engine = engine_with_cache(0)
    beginning = engine.begin(engine.admit(make_job()))
    beginning.advance()
    assert beginning.under_way and beginning.next_bytes > 0
    with monkeypatch.context() as broken:
        broken.setattr(ops, "gram", lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(OutOfDeviceMemory):
            while True:
                beginning.advance()
    assert not beginning.under_way
    expected = steps_of(engine, make_job())[0].finish()
    assert all(torch.equal(a, b) for a, b in zip(beginning.finish()[0], expected[0], strict=True))


def beginnings(engine: VggEngine, job: StyleJob, count: int) -> list[style_targets.StyleBeginning]:
    """Of so many jobs with the same styles."""
    return [engine.begin(engine.admit(replace(job, seed=seed))) for seed in range(count)]


@pytest.mark.parametrize("max_bytes", [2**20, 0])
def test_jobs_in_one_style_share_its_pass(
    make_job: Callable[..., StyleJob], monkeypatch: pytest.MonkeyPatch, max_bytes: int
) -> None:
    """They take turns at its steps, and each gets the same matrices, even if the cache keeps none."""
    monkeypatch.setattr(style_targets, "STEP_PIXELS", 1)
    job = replace(make_job(iterations=1), styles=(make_picture(6), make_picture(7)), style_weights=(1.0, 2.0))
    alone, steps = steps_of(engine_with_cache(2**20), job)
    engine = engine_with_cache(max_bytes)
    sharing, turns = beginnings(engine, job, 3), 0
    while any(beginning.next_pixels for beginning in sharing):
        for beginning in sharing:
            if pixels := beginning.next_pixels:
                assert pixels == steps[turns]
                beginning.advance()
                turns += 1
                assert sum(one.next_bytes > 0 for one in sharing if one.under_way) <= 1
    assert turns == len(steps) > 4
    assert engine.style_cache.misses == 2
    for beginning in sharing:
        for got, expected in zip(beginning.finish(), alone.finish(), strict=True):
            assert all(torch.equal(*both) for both in zip(got, expected, strict=True))


def test_a_pass_goes_on_without_the_job_that_began_it(
    make_job: Callable[..., StyleJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(style_targets, "STEP_PIXELS", 1)
    engine, job = engine_with_cache(2**20), make_job(iterations=1)
    first, second = beginnings(engine, job, 2)
    first.advance()
    assert second.next_bytes == 0 < first.next_bytes  # it is counted once
    second.advance()
    left = second.next_pixels
    del first
    assert second.next_pixels == left and second.next_bytes > 0
    second.finish()
    assert engine.style_cache.misses == 1


def test_a_pass_that_no_job_waits_for_is_freed_at_once(
    make_job: Callable[..., StyleJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its activations, a gigabyte at 2048 px, do not wait for the garbage collector."""
    monkeypatch.setattr(style_targets, "STEP_PIXELS", 1)
    engine = engine_with_cache(2**20)
    (beginning,) = beginnings(engine, make_job(iterations=1), 1)
    gc.collect()
    gc.disable()
    try:
        tensors = living_tensors()
        beginning.advance()
        assert living_tensors() > tensors
        del beginning
        assert living_tensors() <= tensors
    finally:
        gc.enable()


def living_tensors() -> int:
    return sum(type(one) is torch.Tensor for one in gc.get_objects())


def test_a_pass_that_ran_out_of_memory_begins_anew_for_every_job(
    make_job: Callable[..., StyleJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(style_targets, "STEP_PIXELS", 1)
    engine, job = engine_with_cache(2**20), make_job(iterations=1)
    first, second = beginnings(engine, job, 2)
    first.advance()
    second.advance()
    original = ops.gram
    monkeypatch.setattr(ops, "gram", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
    with pytest.raises(OutOfDeviceMemory):
        first.finish()
    monkeypatch.setattr(ops, "gram", original)
    results = second.finish(), first.finish()
    assert all(torch.equal(*both) for both in zip(*(grams[0] for grams in results), strict=True))
    assert engine.style_cache.misses == 1
