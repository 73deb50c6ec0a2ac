"""The cache of style targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from gramophone.recipe import Pooling
from gramophone_server.domain.job import StyleJob
from gramophone_server.engine.engine import VggEngine
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
