"""max_pool and max_pool_bwd on the CPU against torch, their gradient, their registration and their argument checks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gramophone_server import ops
from tests.support.kernel_cases import by_kernels_and_library

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def relu_features(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).relu().to(dtype).contiguous(memory_format=LAYOUTS[layout])


@by_kernels_and_library
@types
@layouts
@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (2, 3, 7, 5), (1, 70, 6, 2), (2, 16, 31, 33)], ids=str)
def test_max_pool_matches_torch(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    features = relu_features(shape, dtype, layout)  # half of the values are zeros, so equal maxima are common
    pooled = ops.max_pool(features)
    assert torch.equal(pooled, F.max_pool2d(features, 2))
    assert pooled.is_contiguous(memory_format=LAYOUTS[layout])
    grad = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    leaf = features.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.max_pool2d(leaf, 2), leaf, grad)
    assert torch.equal(ops.max_pool_bwd(grad, features, pooled, False), expected)
    masked = torch.where(features > 0, expected, 0)
    assert torch.equal(ops.max_pool_bwd(grad, features, pooled, True), masked)


@by_kernels_and_library
@types
@layouts
def test_nan_is_not_hidden(dtype: torch.dtype, layout: str) -> None:
    features = relu_features((1, 4, 6, 6), dtype, layout)
    features[0, 2, 3, 3] = float("nan")
    pooled = ops.max_pool(features)
    assert pooled[0, 2, 1, 1].isnan() and pooled.isnan().sum() == 1
    assert ops.max_pool_bwd(torch.ones_like(pooled), features, pooled, True)[0, 2, 2:4, 2:4].sum() == 1


@by_kernels_and_library
def test_gradient() -> None:
    features = torch.randn(1, 2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(ops.max_pool, (features.requires_grad_(),))


@layouts
@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # read by opcheck
def test_registration(layout: str, requires_grad: bool) -> None:
    features = relu_features((2, 4, 6, 5), torch.float32, layout).requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.gramophone.max_pool.default, (features,))
    features = features.detach()
    pooled = ops.max_pool(features)
    torch.library.opcheck(torch.ops.gramophone.max_pool_bwd.default, (pooled, features, pooled, True))


def test_wrong_arguments_are_refused() -> None:
    features = torch.ones(2, 3, 4, 4)
    with pytest.raises(RuntimeError, match=r"max_pool: features must be at least 2x2 pixels, got \[1, 1, 1, 4\]"):
        ops.max_pool(torch.ones(1, 1, 1, 4))
    message = r"max_pool_bwd: pooled must be the result of max_pool for features \[2, 3, 4, 4\]"
    with pytest.raises(RuntimeError, match=message):
        ops.max_pool_bwd(features, features, features, True)
