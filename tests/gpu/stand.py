"""What the tests on a GPU share: networks, engines and jobs of theirs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.network import random_vgg
from gramophone.recipe import Optimiser, Recipe
from gramophone_server.domain.job import Report, StyleJob
from gramophone_server.engine.batch_run import BatchRun
from gramophone_server.engine.engine import VggEngine
from gramophone_server.network.precision import choose
from gramophone_server.network.vgg import Vgg
from tests.support.networks import make_tiny_vgg
from tests.support.pictures import make_picture

CUDA = torch.device("cuda")
FORMS: dict[tuple[str, str], dict[Hashable, dict[str, float]]] = {}  # by network and precision


@functools.cache
def network(name: str) -> Vgg:
    """ "tiny" takes the library's convolutions, "vgg" the ones that a user gets: cuDNN with our kernels around it."""
    if name == "tiny":
        return make_tiny_vgg()
    vgg = random_vgg()
    # Pictures of 0 to 255 in the real one; random weights keep that size in every layer.
    return replace(vgg, preprocessing=replace(vgg.preprocessing, scale=2.0, mean=(0.8, 0.9, 1.0)))


@functools.cache
def engine(name: str, precision: str, *, graphs: bool = True, device: str = "cuda") -> VggEngine:
    """One for all tests of a file: capturing is what takes time here. Not for tf32, whose switches are the
    process's."""
    return fresh_engine(name, precision, graphs=graphs, device=device)


def fresh_engine(name: str, precision: str, *, graphs: bool = True, device: str = "cuda") -> VggEngine:
    where = torch.device(device)
    made = VggEngine(network(name), where, choose(precision, where), graphs=graphs and device == "cuda")
    # Which form of a convolution is faster is decided by a hair and rounds differently; here all engines take the same.
    made.features.autotuner.milliseconds = FORMS.setdefault((name, precision), made.features.autotuner.milliseconds)
    return made


def job(*, side: int = 64, content: int = 1, style: int = 2, seed: int = 0, **recipe: Any) -> StyleJob:
    small = {"optimiser": Optimiser.ADAM, "size": side, "smallest_size": 0, "iterations": 12, "coarse_iterations": 5}
    return StyleJob(
        recipe=Recipe(**{**small, **recipe}),
        content=make_picture(content, side, side),
        styles=(make_picture(style, 48, 48),),
        style_weights=(1.0,),
        start=None,
        seed=seed,
    )


def finish(run: BatchRun, at_once: int = 1, then: Callable[[], object] = lambda: None) -> list[tuple[Report, ...]]:
    """The reports of the whole run; ``then`` is called after each."""
    reports = []
    while not run.finished:
        reports.append(run.advance(at_once))
        then()
    return reports


def totals(reports: list[tuple[Report, ...]], index: int = 0) -> list[float]:
    return [report[index].losses.total for report in reports]
