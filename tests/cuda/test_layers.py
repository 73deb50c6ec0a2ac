"""The kernels of csrc/cuda/layers, in the emulator, against float64 and the CPU's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gramophone_server import ops
from gramophone_server.ops import library
from tests.support import emulated
from tests.support.kernel_cases import LAYOUTS, ROUNDING, error, layouts, normal, types

LAST = torch.channels_last
SIXTEEN = (torch.float16, torch.bfloat16)
SCALE, SHIFT, ORDER = [0.5, 2.0, -1.5], [-0.2, 0.3, 0.1], [2, 0, 1]

sixteen = pytest.mark.parametrize("dtype", SIXTEEN, ids=str)


@pytest.fixture(params=["kernels", "library"])
def layers(request: pytest.FixtureRequest, gpu: Any) -> Any:
    """The ops by the kernels under test, and through torch's library."""
    return gpu if request.param == "kernels" else library


def same(got: Tensor, expected: Tensor) -> bool:
    return got.dtype == expected.dtype and bool(got.eq(expected).logical_or(got.isnan() & expected.isnan()).all())


def weights(dtype: torch.dtype) -> Tensor:
    return F.pad(normal(64, 27, seed=3) / 4, (0, 5)).to(dtype)


def kernels(weight: Tensor) -> Tensor:
    """The kernels [64, 3, 3, 3] in float64, from the weight that `first_layer` takes."""
    return weight[:, :27].double().view(64, 3, 3, 3).permute(0, 3, 1, 2)


# Pooling --------------------------------------------------------------------------------------------------------------


@types
@layouts
@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (2, 3, 7, 5), (1, 16, 6, 2), (3, 8, 9, 35), (1, 264, 5, 3)], ids=str)
def test_max_pool_matches_the_cpu(
    layers: Any, shape: tuple[int, ...], dtype: torch.dtype, of_grad: torch.dtype, layout: str
) -> None:
    # Many zeros, so many equal maxima.
    features = normal(*shape).relu().to(dtype).contiguous(memory_format=LAYOUTS[layout])
    pooled = layers.max_pool(features)
    assert pooled.is_contiguous(memory_format=LAYOUTS[layout])
    assert same(pooled, ops.max_pool(features)) and torch.equal(pooled, F.max_pool2d(features, 2))
    grad = normal(*pooled.shape, seed=1).to(of_grad)
    for mask in (False, True):
        got = layers.max_pool_bwd(grad, features, pooled, mask)
        assert got.is_contiguous(memory_format=LAYOUTS[layout])
        assert same(got, ops.max_pool_bwd(grad, features, pooled, mask))


@layouts
def test_max_pool_of_nan_matches_the_cpu(layers: Any, layout: str) -> None:
    features = normal(1, 8, 6, 6).to(torch.bfloat16).contiguous(memory_format=LAYOUTS[layout])
    features[0, 2, 3, 3] = features[0, 2, 2, 3] = features[0, 5, 0, 0] = float("nan")
    pooled = layers.max_pool(features)
    assert pooled.isnan().sum() == 2 and same(pooled, ops.max_pool(features))
    grad = torch.ones_like(pooled)
    assert same(layers.max_pool_bwd(grad, features, pooled, True), ops.max_pool_bwd(grad, features, pooled, True))


def test_max_pool_of_an_unaligned_view(layers: Any) -> None:
    memory = normal(8 * 4 * 4 + 1).to(torch.float16)
    features = memory[1:].view(1, 4, 4, 8).permute(0, 3, 1, 2)  # dense, but not at a multiple of 16 bytes
    assert torch.equal(layers.max_pool(features), F.max_pool2d(features, 2))


MAPS = [(1, 8, 2, 2), (2, 24, 7, 5), (1, 64, 9, 33), (3, 512, 2, 3)]


def biased_case(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return normal(*shape).to(dtype).contiguous(memory_format=LAST), normal(shape[1], seed=1).float()


@sixteen
@pytest.mark.parametrize("shape", [*MAPS, (1, 8, 1, 1), (2, 264, 33, 1)], ids=str)
def test_bias_relu_rounds_once(layers: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    features, bias = biased_case(shape, dtype)
    expected = (features.float() + bias.view(1, -1, 1, 1)).to(dtype).relu()
    layers.bias_relu_(features, bias)
    assert torch.equal(features, expected)


@sixteen
@pytest.mark.parametrize("of_grad", SIXTEEN, ids=str)
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_pooling_by_codes_is_pooling_of_the_map(
    layers: Any, shape: tuple[int, ...], dtype: torch.dtype, of_grad: torch.dtype
) -> None:
    features, bias = biased_case(shape, dtype)
    features = (features * 2).round() / 2  # many equal maxima above 0, too
    bias = (bias * 2).round() / 2
    pooled, codes = layers.bias_relu_pool(features, bias)
    layers.bias_relu_(features, bias)
    assert torch.equal(pooled, F.max_pool2d(features, 2))
    assert codes.dtype == torch.uint8 and codes.is_contiguous(memory_format=LAST)
    assert torch.equal((codes & 4) > 0, pooled > 0)
    grad = normal(*pooled.shape, seed=2).to(of_grad).contiguous(memory_format=LAST)
    got = layers.pool_codes_bwd(grad, codes, *shape[2:])
    assert got.dtype == of_grad and got.is_contiguous(memory_format=LAST)
    leaf = features.double().requires_grad_()
    (expected,) = torch.autograd.grad(F.max_pool2d(leaf, 2), leaf, grad.double())
    assert torch.equal(got.double(), torch.where(features > 0, expected, 0))


@sixteen
def test_biased_pooling_does_not_hide_nan(layers: Any, dtype: torch.dtype) -> None:
    features, bias = biased_case((2, 8, 5, 6), dtype)
    features[1, 3, 2, 1] = float("nan")
    pooled, codes = layers.bias_relu_pool(features, bias)
    assert pooled[1, 3, 1, 0].isnan() and pooled.isnan().sum() == 1 and codes[1, 3, 1, 0] == 4 + 1
    grad = torch.ones_like(pooled)
    assert layers.pool_codes_bwd(grad, codes, 5, 6)[1, 3, 2:4, :2].tolist() == [[0, 1], [0, 0]]
    layers.bias_relu_(features, bias)
    assert features[1, 3, 2, 1].isnan() and features.isnan().sum() == 1


@sixteen
def test_a_sum_that_rounds_to_zero_is_masked(layers: Any, dtype: torch.dtype) -> None:
    features, bias = torch.zeros(1, 8, 2, 2, dtype=dtype).contiguous(memory_format=LAST), torch.full((8,), 1e-42)
    pooled, codes = layers.bias_relu_pool(features, bias)
    assert not pooled.any() and not codes.any()


# The first layer ------------------------------------------------------------------------------------------------------

# Smaller than a tile of 8 or 16 by 32, as large, and larger by one; one row; one column; more tiles than blocks.
SIZES = [(1, 1, 1), (2, 5, 33), (1, 8, 32), (3, 17, 31), (1, 1, 70), (1, 40, 1), (1, 49, 65)]
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


def first_case(size: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, height, width = size
    image = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(5))
    return image, weights(dtype), normal(64, seed=6).float()


@sixteen
@sizes
def test_first_layer_is_the_convolution(layers: Any, size: tuple[int, ...], dtype: torch.dtype) -> None:
    image, weight, bias = first_case(size, dtype)
    got = layers.first_layer(image, weight, bias, SCALE, SHIFT, ORDER)
    assert got.dtype == dtype and got.is_contiguous(memory_format=LAST)
    x = torch.stack([image[:, o] * s + t for o, s, t in zip(ORDER, SCALE, SHIFT, strict=True)], 1).to(dtype)
    expected = F.conv2d(x.double(), kernels(weight), bias.double(), padding=1).relu()
    assert error(got, expected) < ROUNDING[dtype]


@sixteen
@sizes
def test_first_layer_bwd_is_its_gradient(layers: Any, size: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, height, width = size
    grad, weight = normal(batch, 64, height, width).to(dtype).contiguous(memory_format=LAST), weights(dtype)
    image = torch.zeros(batch, 3, height, width, dtype=torch.float64, requires_grad=True)
    x = torch.stack([image[:, o] * s + t for o, s, t in zip(ORDER, SCALE, SHIFT, strict=True)], 1)
    (expected,) = torch.autograd.grad(F.conv2d(x, kernels(weight), padding=1), image, grad.double())
    got = layers.first_layer_bwd(grad, weight, SCALE, ORDER)
    assert got.dtype == torch.float32 and got.is_contiguous()
    assert error(got, expected) < ROUNDING[torch.float32]


@sixteen
def test_first_layer_does_not_hide_or_spread_nan(layers: Any, dtype: torch.dtype) -> None:
    image, weight, bias = first_case((2, 12, 40), dtype)
    image[1, 1, 6, 33] = float("nan")
    alive = torch.zeros(2, 12, 40, dtype=torch.bool)
    alive[1, 5:8, 32:35] = True
    out = layers.first_layer(image, weight, bias, SCALE, SHIFT, ORDER)
    assert torch.equal(out.isnan().all(1), alive) and torch.equal(out.isnan().any(1), alive)
    grad = torch.zeros_like(out)
    grad[1, 50, 6, 33] = float("nan")
    back = layers.first_layer_bwd(grad, weight, SCALE, ORDER)
    assert torch.equal(back.isnan().all(1), alive) and torch.equal(back.isnan().any(1), alive)


# All of them ----------------------------------------------------------------------------------------------------------


def all_results(gpu: Any, jobs: slice) -> dict[str, Tensor]:
    """Every op of this file on the given jobs of a batch of 3."""
    image = torch.rand(3, 3, 19, 37, generator=torch.Generator().manual_seed(5))[jobs]
    features, bias = biased_case((3, 64, 19, 37), torch.float16)
    features = features[jobs]
    grad = normal(3, 64, 19, 37, seed=1).bfloat16().contiguous(memory_format=LAST)[jobs]
    out = {"layer": gpu.first_layer(image, weights(torch.float16), bias, SCALE, SHIFT, ORDER)}
    out["image"] = gpu.first_layer_bwd(grad, weights(torch.bfloat16), SCALE, ORDER)
    out["pooled"], out["codes"] = gpu.bias_relu_pool(features, bias)
    back = normal(3, 64, 9, 18).bfloat16().contiguous(memory_format=LAST)[jobs]
    out["spread"] = gpu.pool_codes_bwd(back, out["codes"], 19, 37)
    out["relu"] = features.clone()
    gpu.bias_relu_(out["relu"], bias)
    out["pool"] = gpu.max_pool(out["relu"])
    out["unpooled"] = gpu.max_pool_bwd(back, out["relu"], out["pool"], True)
    return out


def test_results_do_not_depend_on_the_order_or_the_batch(gpu: Any, order: None) -> None:
    together, alone = all_results(gpu, slice(0, 3)), all_results(gpu, slice(1, 2))
    emulated.order(0)
    for name, expected in all_results(gpu, slice(0, 3)).items():
        assert torch.equal(together[name], expected), name
        assert torch.equal(alone[name], expected[1:2]), name


def half(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.float16).contiguous(memory_format=LAST)


def codes(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.uint8).contiguous(memory_format=LAST)


H8, B8, IMAGE, W64 = half(2, 8, 4, 4), torch.ones(8), torch.ones(2, 3, 4, 4), torch.ones(64, 32, dtype=torch.float16)
COLOURS = ([1.0] * 3, [0.0] * 3, [0, 1, 2])
REFUSALS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "pool of one row": (lambda gpu: gpu.max_pool(IMAGE[:, :, :1]), r"max_pool: features must be at least 2x2 pixels"),
    "grad of a pool": (
        lambda gpu: gpu.max_pool_bwd(half(2, 3, 2, 2), IMAGE, torch.ones(2, 3, 2, 2), True),
        r"max_pool_bwd: grad must be Float .* like pooled, or BFloat16 if pooled is Half, got Half",
    ),
    "float32": (
        lambda gpu: gpu.bias_relu_(H8.float(), B8),
        r"bias_relu_: features must be float16 or bfloat16, got Float",
    ),
    "contiguous": (
        lambda gpu: gpu.bias_relu_(H8.contiguous(), B8),
        r"bias_relu_: features must be .* channels_last, .*got \[2, 8, 4, 4\] with strides \[128, 16, 4, 1\]",
    ),
    "channels": (lambda gpu: gpu.bias_relu_pool(half(2, 12, 4, 4), B8), r"bias_relu_pool: .*C a multiple of 8, got"),
    "alignment": (
        lambda gpu: gpu.bias_relu_(half(1, 1, 1, 9).flatten()[1:].view(1, 8, 1, 1), B8),
        r"bias_relu_: tensors must start at a multiple of 16 bytes, got one of \[1, 8, 1, 1\] at a storage offset of 1",
    ),
    "bias": (lambda gpu: gpu.bias_relu_(H8, B8.half()), r"bias_relu_: bias must be float32 \[8\], got Half \[8\]"),
    "one column": (lambda gpu: gpu.bias_relu_pool(half(2, 8, 4, 1), B8), r"bias_relu_pool: .*at least 2x2 pixels"),
    "codes": (
        lambda gpu: gpu.pool_codes_bwd(H8, codes(2, 8, 4, 3), 8, 8),
        r"pool_codes_bwd: codes must be uint8 \[2, 8, 4, 4\] like grad .*got Byte \[2, 8, 4, 3\]",
    ),
    "height": (
        lambda gpu: gpu.pool_codes_bwd(H8, codes(2, 8, 4, 4), 10, 8),
        r"pool_codes_bwd: grad must have half of 10x8 pixels, rounded down, got \[2, 8, 4, 4\]",
    ),
    "image type": (
        lambda gpu: gpu.first_layer(IMAGE.half(), W64, torch.ones(64), *COLOURS),
        r"first_layer: image must be float32 \[B, 3, H, W\], .*got Half",
    ),
    "weight": (
        lambda gpu: gpu.first_layer(IMAGE, W64[:, :27], torch.ones(64), *COLOURS),
        r"first_layer: weight must be float16 or bfloat16 \[64, 32\] and contiguous, got Half \[64, 27\]",
    ),
    "order": (
        lambda gpu: gpu.first_layer(IMAGE, W64, torch.ones(64), [1.0] * 3, [0.0] * 3, [0, 1, 1]),
        r"first_layer: order must be a permutation of 0, 1 and 2, got \[0, 1, 1\]",
    ),
    "scale": (
        lambda gpu: gpu.first_layer_bwd(half(2, 64, 4, 4), W64, [1.0], [0, 1, 2]),
        r"first_layer_bwd: scale must have 3 entries, got 1",
    ),
    "grad of the first": (
        lambda gpu: gpu.first_layer_bwd(half(2, 64, 4, 4), W64.bfloat16(), [1.0] * 3, [0, 1, 2]),
        r"first_layer_bwd: grad must be BFloat16 \[B, 64, H, W\] like weight, got Half",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_wrong_arguments_are_refused(gpu: Any, case: str) -> None:
    if emulated.ON_GPU and case == "alignment":
        pytest.skip("the copy on the GPU is aligned")
    call, message = REFUSALS[case]
    with pytest.raises(RuntimeError, match=message):
        call(gpu)
