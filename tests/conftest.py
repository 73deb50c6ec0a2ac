"""What tests of the engine share, a network with VGG-19's line and few channels and small pictures; and those of the client, a
service that plays scripts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from gramophone.recipe import Optimiser, Recipe
from gramophone_server.domain.job import StyleJob
from gramophone_server.engine.engine import VggEngine
from gramophone_server.network.precision import MODES
from gramophone_server.network.vgg import Vgg
from tests.support.networks import make_tiny_vgg
from tests.support.pictures import make_picture

if TYPE_CHECKING:
    from gramophone_client import GramophoneClient
    from tests.support.fake_service import FakeService

torch.set_num_threads(1)  # for kernels this small a team of threads is slower, and much slower on a busy machine


@pytest.fixture(scope="session")
def tiny_vgg() -> Vgg:
    return make_tiny_vgg()


@pytest.fixture(scope="session")
def tiny_engine(tiny_vgg: Vgg) -> VggEngine:
    return VggEngine(tiny_vgg, torch.device("cpu"), MODES["fp32"])


@pytest.fixture(scope="session")
def make_job() -> Callable[..., StyleJob]:
    """A small job; keyword arguments are fields of its recipe, but for content, style, start image and seed."""

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


# Their imports are inside, because a machine with a GPU runs the engine's tests without gRPC.


@pytest.fixture
def service() -> Iterator[FakeService]:
    """A fake service on the loopback."""
    from tests.support.fake_service import serving

    with serving() as fake:
        yield fake


@pytest.fixture
async def client(service: FakeService) -> AsyncIterator[GramophoneClient]:
    """A client that talks to it."""
    from gramophone_client import GramophoneClient

    async with GramophoneClient(service.target, timeout_s=10) as connected:
        yield connected
