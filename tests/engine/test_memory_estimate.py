"""Estimates of the memory of a batch, counted on the meta device."""

from __future__ import annotations

import pytest
import torch

from gramophone.recipe import Optimiser, Recipe
from gramophone_server.domain.job_state import Shape
from gramophone_server.engine.memory_estimate import WORKSPACES, AllocationCounter, bytes_needed
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


def test_tensors_in_use_are_counted() -> None:
    with AllocationCounter() as allocations:
        a = torch.zeros(1024, device="meta")
        b = a + 1
        view = b[:10]
        assert (allocations.now, allocations.peak) == (8192, 8192)
        del a, b
        assert allocations.now == 4096  # the view keeps its storage
        del view
        c = torch.zeros(3, device="meta").add_(1)
        assert (allocations.now, allocations.peak) == (512, 8192)
        del c
    assert allocations.now == 0


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


def test_an_estimate_allocates_and_computes_nothing(wide_vgg: Vgg) -> None:
    assert needed(wide_vgg, size=16384, jobs=8) > 500 * 2**30


def test_an_estimate_is_cached(wide_vgg: Vgg) -> None:
    first = needed(wide_vgg, size=128)
    asked = bytes_needed.cache_info()
    assert needed(wide_vgg, size=128) == first
    again = bytes_needed.cache_info()
    assert (again.hits, again.misses) == (asked.hits + 1, asked.misses)
