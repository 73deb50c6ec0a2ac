"""Networks, engines and jobs for the tests that need a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.network import random_vgg
from gramophone.recipe import Optimiser, Recipe
from gramophone_server.domain.job import Report, StyleJob
from gramophone_server.engine.batch_run import BatchRun
from gramophone_server.engine.engine import VggEngine
from gramophone_server.network.precision import choose_precision
from gramophone_server.network.vgg import Vgg
from tests.support.networks import make_tiny_vgg
from tests.support.pictures import make_picture

CUDA = torch.device("cuda")
# Measured times of the convolutions' kernels, by network and precision.
MILLISECONDS: dict[tuple[str, str], dict[Hashable, dict[str, float]]] = {}


@functools.cache
def network(name: str) -> Vgg:
    """ "tiny" uses the library's convolutions. "vgg" runs as for users: cuDNN and the project's kernels."""
    if name == "tiny":
        return make_tiny_vgg()
    vgg = random_vgg()
    # The real network takes values of 0 to 255. With random weights the activations of every layer have such a range.
    return replace(vgg, preprocessing=replace(vgg.preprocessing, scale=2.0, mean=(0.8, 0.9, 1.0)))


@functools.cache
def engine(name: str, precision: str, *, graphs: bool = True, device: str = "cuda") -> VggEngine:
    """The engine that all tests of a file share, because capturing graphs takes long.

    Not for tf32, which sets switches of the whole process.
    """
    return fresh_engine(name, precision, graphs=graphs, device=device)


def fresh_engine(name: str, precision: str, *, graphs: bool = True, device: str = "cuda") -> VggEngine:
    """An engine of its own for a test."""
    target = torch.device(device)
    new = VggEngine(network(name), target, choose_precision(precision, target), graphs=graphs and device == "cuda")
    # The kernels of a convolution are about equally fast but round differently. All engines share the measured times,
    # so that they choose the same kernels.
    autotuner = new.features.autotuner
    autotuner.milliseconds = MILLISECONDS.setdefault((name, precision), autotuner.milliseconds)
    return new


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
    """Finishes the run and returns its reports. Calls ``then`` after each of them."""
    reports = []
    while not run.finished:
        reports.append(run.advance(at_once))
        then()
    return reports


def totals(reports: list[tuple[Report, ...]], index: int = 0) -> list[float]:
    """The total losses of the job at ``index``."""
    return [report[index].losses.total for report in reports]
