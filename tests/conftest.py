"""Fixtures for the tests of the engine: a network with VGG-19's layers and few channels, and small jobs.

Machines with a GPU may have only torch and pytest: import no gRPC here, nor in what tests/gpu and tests/cuda import.
"""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gramophone.recipe import Optimiser, Recipe
from gramophone_server.domain.job import StyleJob
from gramophone_server.engine.engine import VggEngine
from gramophone_server.network.precision import MODES
from gramophone_server.network.vgg import Vgg
from gramophone_server.ops import functional
from tests.support.networks import make_tiny_vgg
from tests.support.pictures import make_picture

# A script's shell lets what it starts in the background ignore SIGINT, and Python and its children keep that.
# Tests that interrupt something would fail, and a bench that one of them interrupts would fill 8 GB of memory.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # more threads make kernels this small slower, and much slower on a busy machine


@pytest.fixture(autouse=True, scope="module")
def give_memory_back() -> Iterator[None]:
    """Returns what a module has freed to the system. glibc keeps it, 900 MB after tests/network and tests/engine."""
    yield
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


@pytest.fixture
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """No op runs through torch's library, and those that a test replaces do so only until its end."""
    monkeypatch.setattr(functional, "by_library", {})


@pytest.fixture(scope="session")
def tiny_vgg() -> Vgg:
    return make_tiny_vgg()


@pytest.fixture(scope="session")
def tiny_engine(tiny_vgg: Vgg) -> VggEngine:
    return VggEngine(tiny_vgg, torch.device("cpu"), MODES["fp32"])


@pytest.fixture(scope="session")
def make_job() -> Callable[..., StyleJob]:
    """Makes small jobs. Keyword arguments are fields of the recipe, except content, style, start image and seed.

    `content` and `style` are seeds of random pictures.
    """

    def make(
        *, content: int = 1, style: int = 2, start_image: Tensor | None = None, seed: int = 0, **recipe: Any
    ) -> StyleJob:
        small = {"optimiser": Optimiser.ADAM, "average": 0.97, "size": 48, "smallest_size": 0, "iterations": 10}
        fields = {**small, "coarse_iterations": 4, **recipe}
        return StyleJob(
            recipe=Recipe(**fields),
            content=make_picture(content),
            styles=(make_picture(style, 36, 36),),
            style_weights=(1.0,),
            start=start_image,
            seed=seed,
        )

    return make
