"""What tests of the engine share, a network with VGG-19's line and few channels and small pictures; and those of the client, a
service that plays scripts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from gramophone.recipe import Optimiser, Recipe
from gramophone_server.engine import Engine
from gramophone_server.job import StyleJob
from gramophone_server.precision import MODES
from gramophone_server.vgg import BACKBONES, Convolution, Preprocessing, Vgg

if TYPE_CHECKING:
    from gramophone_client import GramophoneClient
    from tests.fake_service import FakeService

TINY_CHANNELS = (4, 6, 8, 8, 8)

torch.set_num_threads(1)  # for kernels this small a team of threads is slower, and much slower on a busy machine


def make_tiny_vgg(seed: int = 0, widths: Sequence[int] = TINY_CHANNELS) -> Vgg:
    """VGG-19's 16 convolutions with 4 to 8 channels, or other ``widths``, He-initialised."""
    generator = torch.Generator().manual_seed(seed)
    convolutions, channels = [], 3
    for block, count in enumerate(BACKBONES["vgg19"], 1):
        for number in range(1, count + 1):
            out = widths[block - 1]
            weight = torch.randn(out, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5
            bias = torch.randn(out, generator=generator) * 0.1
            convolutions.append(Convolution(f"{block}_{number}", weight, bias, block > 1 and number == 1))
            channels = out
    means = Preprocessing((2, 1, 0), 2.0, (0.8, 0.9, 1.0), (0.5, 1.0, 2.0))  # every part of it matters here
    return Vgg("vgg19", tuple(convolutions), means, "tiny")


@pytest.fixture(scope="session")
def tiny_vgg() -> Vgg:
    return make_tiny_vgg()


@pytest.fixture(scope="session")
def tiny_engine(tiny_vgg: Vgg) -> Engine:
    return Engine(tiny_vgg, torch.device("cpu"), MODES["fp32"])


def make_picture(seed: int, height: int = 40, width: int = 48) -> Tensor:
    """A smooth random picture, uint8 [3, height, width]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (smooth[0] * 255).round().to(torch.uint8)


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
    from tests.fake_service import serving

    with serving() as fake:
        yield fake


@pytest.fixture
async def client(service: FakeService) -> AsyncIterator[GramophoneClient]:
    """A client that talks to it."""
    from gramophone_client import GramophoneClient

    async with GramophoneClient(service.target, timeout_s=10) as connected:
        yield connected
