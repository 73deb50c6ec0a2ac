"""The kernels compute the same bits every time, also in uninitialised memory, because sums have a fixed order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gramophone_server import ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

RUNS = 100
LAYERS = ((64, 250), (128, 125), (256, 62), (512, 31), (512, 15))  # channels and side, for a 250 px picture


def features(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    new = [torch.randn(2, c, side, side, device="cuda").relu_() for c, side in LAYERS]
    return [x.to(dtype).contiguous(memory_format=torch.channels_last) for x in new]


def poison() -> None:
    """Writes NaN to memory that the next tensors reuse."""
    torch.full((32 * 2**20,), torch.nan, device="cuda")
    for size in (2**10, 2**14, 2**18):
        [torch.full((size,), torch.nan, device="cuda") for _ in range(16)]


@pytest.mark.parametrize("before", [lambda: None, poison], ids=["as it is", "poisoned"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_style_op_has_the_same_bits_every_time(dtype: torch.dtype, before: Callable[[], None]) -> None:
    layers = features(dtype)
    scales = [1 / (side * side) for _, side in LAYERS]
    targets = [1.5 * ops.gram(f, scale) for f, scale in zip(layers, scales, strict=True)]
    weights = torch.full((len(layers), 2), 0.5, device="cuda")
    back = torch.bfloat16 if dtype == torch.float16 else dtype
    upstream = [
        torch.randn(f.shape, device="cuda").to(back).contiguous(memory_format=torch.channels_last) for f in layers
    ]

    def once() -> list[Tensor]:
        losses, diffs = ops.style_fwd(layers, targets, weights, scales)
        grads = [up.clone() for up in upstream]
        for grad, f, diff in zip(grads, layers, diffs, strict=True):
            ops.style_bwd_(grad, f, diff, True)
        return [losses, *diffs, *grads]

    expected = once()
    assert all(bool(x.isfinite().all()) for x in expected)
    for turn in range(RUNS):
        before()
        for mine, first in zip(once(), expected, strict=True):
            assert torch.equal(mine, first), f"run {turn} differs"


def test_the_other_sums_have_the_same_bits_every_time() -> None:
    torch.manual_seed(0)
    f = torch.randn(2, 512, 31, 31, device="cuda").half().contiguous(memory_format=torch.channels_last)
    image, weight = torch.rand(2, 3, 253, 251, device="cuda"), torch.ones(2, device="cuda")

    def once() -> list[Tensor]:
        grad, image_grad = torch.zeros_like(f, dtype=torch.bfloat16), torch.zeros_like(image)
        content = ops.content_(grad, f, f * 0.5, weight, True)
        return [content, grad, ops.tv_(image_grad, image, weight), image_grad]

    expected = once()
    for _ in range(RUNS):
        poison()
        assert all(torch.equal(mine, first) for mine, first in zip(once(), expected, strict=True))
