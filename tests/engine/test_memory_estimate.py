"""Estimates of the memory of a batch."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from gramophone.recipe import Optimiser, Pooling, Recipe
from gramophone_server.domain.job_state import Shape
from gramophone_server.engine.memory_estimate import WORKSPACES, bytes_needed
from gramophone_server.engine.memory_trace import traced_bytes
from gramophone_server.network.precision import MODES
from gramophone_server.network.vgg import Vgg
from tests.support.networks import make_tiny_vgg

MIB = 2**20


@pytest.fixture(scope="module")
def wide_vgg() -> Vgg:
    return make_tiny_vgg(widths=(64, 128, 256, 512, 512))


def needed(vgg: Vgg, size: int = 512, jobs: int = 1, precision: str = "fp16", kernel: str = "cudnn", **recipe) -> int:
    shape = Shape.of(Recipe(size=size, **recipe), size, size)
    return bytes_needed(vgg, shape, jobs, MODES[precision], kernel)


def test_an_iteration_at_512_px_takes_as_much_as_its_largest_layers(wide_vgg: Vgg) -> None:
    """Counted by hand: in conv1_2's backward pass there are relu1_1 and two gradients of its size, 64 channels of 2
    bytes each; the codes of the pooling, 16 bytes per pixel; and the buffers of the picture, its last good one and
    Adam's two moments."""
    pixels = 512 * 512
    largest = (3 * 64 * 2 + 16) * pixels
    buffers = (4 * 12 + 16) * pixels  # and relu4_2's target, 512 channels of 2 bytes on a 64th of the pixels
    got = needed(wide_vgg, optimiser=Optimiser.ADAM, average=0.0) - WORKSPACES
    assert largest + buffers <= got <= 1.15 * (largest + buffers)


def test_the_estimate_grows_with_pixels_jobs_type_and_history(wide_vgg: Vgg) -> None:
    one = needed(wide_vgg, optimiser=Optimiser.ADAM) - WORKSPACES
    assert needed(wide_vgg, size=1024, optimiser=Optimiser.ADAM) - WORKSPACES == pytest.approx(4 * one, rel=0.05)
    assert needed(wide_vgg, jobs=4, optimiser=Optimiser.ADAM) - WORKSPACES == pytest.approx(4 * one, rel=0.02)
    assert needed(wide_vgg, precision="fp32", kernel="library", optimiser=Optimiser.ADAM) > 1.8 * one
    history = needed(wide_vgg, optimiser=Optimiser.LBFGS) - WORKSPACES - one
    # Ten pairs of float32 pictures, without Adam's moments.
    assert history == pytest.approx(20 * 12 * 512 * 512, rel=0.1)


def random_shape(random_: random.Random, layers: tuple[str, ...]) -> Shape:
    content, style = (random_.sample(layers, random_.choice((1, 2, 5, 16))) for _ in range(2))
    absent = random_.choice((content, style, [], []))
    return Shape(
        height=random_.randint(16, 300),
        width=random_.randint(16, 300),
        content_layers=() if absent is content else tuple(content),
        style_layers=() if absent is style else tuple(style),
        pooling=random_.choice(list(Pooling)),
        optimiser=random_.choice(list(Optimiser)),
        average=random_.choice((0.0, 0.9)),
    )


@pytest.mark.parametrize("kernel", ["library", "cudnn"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_an_estimate_is_the_peak_of_the_iteration(wide_vgg: Vgg, precision: str, kernel: str) -> None:
    """To the byte, for any layers and sizes, and for networks that our kernels and cuDNN's do not take."""
    random_ = random.Random(f"{precision} {kernel}")
    for vgg in (wide_vgg, make_tiny_vgg(), make_tiny_vgg(widths=(64, 12, 16, 20, 24))):
        for _ in range(8):
            arguments = vgg, random_shape(random_, vgg.layers), random_.choice((1, 3)), MODES[precision], kernel
            expected = traced_bytes(*arguments) + (WORKSPACES if kernel == "cudnn" else 0)
            assert bytes_needed(*arguments) == expected, arguments[1:]


class OpCounter(TorchDispatchMode):
    """While active, counts the calls of torch's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernel", ["library", "cudnn"])
def test_an_estimate_of_an_unseen_shape_calls_no_op(wide_vgg: Vgg, kernel: str) -> None:
    """Each costs 0.1 ms of Python. Requests choose sizes and layers, so each may bring shapes that no other has had."""
    layers = wide_vgg.layers
    with OpCounter() as counted:
        for size in (64, 65, 66):
            needed(wide_vgg, size=size, kernel=kernel, style_layers=layers[:16], content_layers=layers[16:])
    assert not counted.calls


def test_an_estimate_allocates_and_computes_nothing(wide_vgg: Vgg) -> None:
    assert needed(wide_vgg, size=16384, jobs=8) > 500 * 2**30


def test_an_estimate_is_cached(wide_vgg: Vgg) -> None:
    first = needed(wide_vgg, size=128)
    asked = bytes_needed.cache_info()
    assert needed(wide_vgg, size=128) == first
    again = bytes_needed.cache_info()
    assert (again.hits, again.misses) == (asked.hits + 1, asked.misses)
