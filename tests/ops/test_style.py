"""The style ops on the CPU against float64, their gradients, their registration and their argument checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gramophone_server import ops
from gramophone_server.errors import StartupError
from tests import reference
from tests.support.kernel_cases import by_kernels_and_library

# Relative error of the whole tensor against float64 on the same, already rounded, inputs. Sums are float32 for every
# type of features, so only 16-bit outputs have the rounding error of their type.
SUM_ERROR = 1e-5
OUTPUT_ERROR = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}
DIFFERENCE_ERROR = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 4e-3}  # bfloat16 rounds by 2^-8
GRADIENTS_OF = [  # the types of features and gradient
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float16, torch.bfloat16),
]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# 1x1 pixels and one channel; odd numbers of channels and part of a tile; one tile of 256 pixels, and one pixel more;
# several slices of 4096 pixels; block rows of 64 channels with a rest.
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 17, 13),
    (1, 64, 16, 16),
    (1, 64, 257, 1),
    (2, 16, 96, 97),
    (1, 130, 20, 21),
    (1, 512, 5, 4),
]

types = pytest.mark.parametrize("dtype", OUTPUT_ERROR, ids=str)
layouts = pytest.mark.parametrize("layout", LAYOUTS)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def relu_features(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).relu().to(dtype).contiguous(memory_format=LAYOUTS[layout])


def symmetric(batch: int, channels: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    half = torch.randn(batch, channels, channels, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return half + half.mT


def difference(batch: int, channels: int, features: torch.dtype) -> Tensor:
    return symmetric(batch, channels).to(torch.float32 if features is torch.float32 else torch.bfloat16)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-30))


@by_kernels_and_library
@types
@layouts
@shapes
def test_gram_matches_the_definition(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    features = relu_features(shape, dtype, layout)
    got = ops.gram(features, 0.25)
    assert got.dtype == torch.float32
    assert error(got, reference.gram(features, 0.25)) < SUM_ERROR


@types
@layouts
def test_gram_is_symmetric_to_the_last_bit(dtype: torch.dtype, layout: str) -> None:
    got = ops.gram(relu_features((2, 3, 17, 13), dtype, layout), 0.25)
    assert torch.equal(got, got.mT)


@by_kernels_and_library
@types
@layouts
@shapes
def test_style_fwd_matches_the_definition(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    features = relu_features(shape, dtype, layout)
    other = relu_features((shape[0], 5, 3, 2), dtype, layout, seed=3)
    targets = [symmetric(shape[0], shape[1]), symmetric(shape[0], 5)]
    weights = torch.rand(2, shape[0], generator=torch.Generator().manual_seed(2))
    losses, diffs = ops.style_fwd([features, other], targets, weights, [0.5, 2.0])
    for f, a, w, scale, loss, diff in zip([features, other], targets, weights, [0.5, 2.0], losses, diffs, strict=True):
        d = reference.gram(f, scale) - a.double()
        assert error(loss, w.double() * d.square().sum((1, 2))) < SUM_ERROR
        assert error(diff, 4 * scale * w.double().view(-1, 1, 1) * d) < DIFFERENCE_ERROR[dtype]
        assert diff.dtype == difference(1, 1, dtype).dtype


@by_kernels_and_library
@pytest.mark.parametrize("dtype, grad_type", GRADIENTS_OF, ids=str)
@layouts
@shapes
@pytest.mark.parametrize("relu_mask", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize("size", [1.0, 1e-9, None], ids=["diff of 1", "diff of 1e-9", "no diff"])
def test_style_bwd_matches_the_definition(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    grad_type: torch.dtype,
    layout: str,
    relu_mask: bool,
    size: float | None,
) -> None:
    features = relu_features(shape, dtype, layout)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(grad_type)
    grad = grad.contiguous(memory_format=LAYOUTS[layout])
    if size == 1e-9 and grad_type is not torch.float16:
        grad.zero_()  # so that a lost difference would be noticed
    diff = None if size is None else size * difference(*shape[:2], dtype)
    expected = reference.style_bwd(grad, features, diff, relu_mask)
    ops.style_bwd_(grad, features, diff, relu_mask)
    assert error(grad, expected) < OUTPUT_ERROR[grad_type]


@by_kernels_and_library
def test_layouts_can_be_mixed() -> None:
    features = relu_features((2, 8, 9, 11), torch.float32, "channels_last")
    strided = torch.randn(2, 8, 9, 22)[..., ::2]  # in neither layout
    for f, g in (
        (features, strided),
        (strided.relu(), torch.randn(2, 8, 9, 11)),
        (features[:, :, 1:], strided[:, :, 1:]),
    ):
        diff, grad = symmetric(2, 8), g.clone()
        assert error(ops.gram(f, 1.0), reference.gram(f, 1.0)) < SUM_ERROR
        ops.style_bwd_(grad, f, diff, True)
        assert error(grad, reference.style_bwd(g, f, diff, True)) < OUTPUT_ERROR[torch.float32]
    before = strided.clone()
    ops.style_bwd_(strided, features, None, True)  # written through the view
    assert torch.equal(strided, torch.where(features > 0, before, 0))


@pytest.mark.parametrize("threads", [1, 2])
def test_sums_do_not_depend_on_the_run_or_the_threads(threads: int) -> None:
    features = relu_features((2, 64, 130, 70), torch.bfloat16, "channels_last")
    expected = ops.gram(features, 1.0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(20):
            assert torch.equal(ops.gram(features, 1.0), expected)
    finally:
        torch.set_num_threads(before)


def test_jobs_of_a_batch_do_not_mix() -> None:
    alone = relu_features((1, 16, 20, 30), torch.bfloat16, "channels_last")
    other = relu_features((1, 16, 20, 30), torch.bfloat16, "channels_last", seed=9) * 1000
    both = torch.cat([other, alone]).contiguous(memory_format=torch.channels_last)
    assert torch.equal(ops.gram(both, 1.0)[1:], ops.gram(alone, 1.0))
    diff = difference(2, 16, torch.bfloat16)
    grad, grad_alone = torch.zeros_like(both), torch.zeros_like(alone)
    ops.style_bwd_(grad, both, diff, True)
    ops.style_bwd_(grad_alone, alone, diff[1:], True)
    assert torch.equal(grad[1:], grad_alone)


@by_kernels_and_library
@types
@layouts
def test_nan_is_not_hidden(dtype: torch.dtype, layout: str) -> None:
    features = relu_features((1, 4, 6, 6), dtype, layout)
    features[0, 2, 3, 3] = float("nan")
    assert ops.gram(features, 1.0)[0, 2].isnan().all()
    losses, diffs = ops.style_fwd([features], [symmetric(1, 4)], torch.ones(1, 1), [1.0])
    assert losses.isnan().all() and diffs[0][0, 2].isnan().all()
    grad = torch.zeros_like(features)
    ops.style_bwd_(grad, features, difference(1, 4, dtype), True)
    assert grad[0, 2, 3, 3].isnan()


def doubles(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


GRADIENTS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "gram": (lambda x: ops.gram(x, 0.3), (doubles(2, 3, 2, 3),)),
    "style_loss": (
        lambda x: ops.style_loss(x, symmetric(2, 3, dtype=torch.float64), 0.7, 0.3)[0],
        (doubles(2, 3, 2, 3),),
    ),
    "style_fwd": (
        lambda x, y: ops.style_fwd(
            [x, y],
            [symmetric(2, 3, dtype=torch.float64), symmetric(2, 4, dtype=torch.float64)],
            torch.tensor([[1.0, 2.0], [3.0, 0.5]], dtype=torch.float64),
            [0.3, 0.2],
        )[0],
        (doubles(2, 3, 2, 3), doubles(2, 4, 1, 2)),
    ),
}


@by_kernels_and_library
@pytest.mark.parametrize("op", GRADIENTS)
def test_gradient(op: str) -> None:
    function, inputs = GRADIENTS[op]
    assert torch.autograd.gradcheck(function, inputs)


@by_kernels_and_library
def test_difference_of_style_loss_is_its_gradient() -> None:
    features = relu_features((2, 5, 4, 3), torch.float32, "contiguous").requires_grad_()
    loss, diff = ops.style_loss(features, symmetric(2, 5), 0.7, 0.3)
    (grad,) = torch.autograd.grad(loss.sum(), features)
    assert error(grad, torch.einsum("bij,bjhw->bihw", diff.double(), features.detach().double())) < SUM_ERROR
    assert not diff.requires_grad


@layouts
def test_gradients_have_the_layout_of_the_features(layout: str) -> None:
    features = relu_features((2, 5, 4, 3), torch.float32, layout).requires_grad_()
    for loss in (ops.gram(features, 0.5).sum(), ops.style_loss(features, symmetric(2, 5), 0.7, 0.3)[0].sum()):
        (grad,) = torch.autograd.grad(loss, features)
        assert grad.stride() == features.stride()


@layouts
@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # read by opcheck
def test_registration(layout: str, requires_grad: bool) -> None:
    # The backward ops have no gradients of their own.
    f = relu_features((2, 4, 6, 5), torch.float32, layout).requires_grad_(requires_grad)
    a, weights = symmetric(2, 4), torch.rand(1, 2)
    gramophone = torch.ops.gramophone
    cases: list[tuple[Any, tuple[Any, ...]]] = [
        (gramophone.gram, (f, 0.5)),
        (gramophone.style_loss, (f, a, 0.5, 0.5)),
        (gramophone.style_fwd, ([f], [a], weights, [0.5])),
    ]
    f = f.detach()
    cases += [
        (gramophone.gram_bwd, (a, f, 0.5)),
        (gramophone.style_bwd, (f, a, torch.rand(2))),
        (gramophone.style_bwd_, (torch.rand_like(f), f, a, True)),
        (gramophone.style_bwd_, (torch.rand_like(f), f, None, True)),
        (gramophone.style_fwd, ([f.half()], [a], weights, [0.5])),
        (gramophone.style_bwd_, (torch.rand_like(f).bfloat16(), f.half(), a.bfloat16(), True)),
    ]
    for op, arguments in cases:
        torch.library.opcheck(op.default, arguments)


F4 = torch.ones(2, 3, 4, 4)
A3 = torch.ones(2, 3, 3)
REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
    "gram of 3D": (
        lambda: ops.gram(torch.ones(2, 3, 4), 1.0),
        r"gram: features must be \[B, C, H, W\], got 3D \[2, 3, 4\]",
    ),
    "gram of nothing": (
        lambda: ops.gram(torch.ones(2, 3, 0, 4), 1.0),
        r"gram: features must not be empty, got \[2, 3, 0, 4\]",
    ),
    "gram of integers": (lambda: ops.gram(F4.int(), 1.0), r"gram: features must be float32.*, got Int"),
    "target shape": (
        lambda: ops.style_loss(F4, A3[:1], 1.0, 1.0),
        r"style_loss: target must be \[2, 3, 3\].*got \[1, 3, 3\]",
    ),
    "target type": (lambda: ops.style_loss(F4, A3.half(), 1.0, 1.0), r"style_loss: target must be Float.*got Half"),
    "no layers": (
        lambda: ops.style_fwd([], [], torch.ones(0, 2), []),
        r"style_fwd: features must have at least one layer",
    ),
    "targets missing": (
        lambda: ops.style_fwd([F4], [], torch.ones(1, 2), [1.0]),
        r"one target and one scale per layer.*got 0 and 1",
    ),
    "weights shape": (
        lambda: ops.style_fwd([F4], [A3], torch.ones(2, 1), [1.0]),
        r"weights must be \[layers, B\] = \[1, 2\], got \[2, 1\]",
    ),
    "mixed batch": (
        lambda: ops.style_fwd([F4, F4[:1]], [A3, A3[:1]], torch.ones(2, 2), [1.0, 1.0]),
        r"all layers must have the same batch, got 2 and 1",
    ),
    "grad type": (
        lambda: ops.style_bwd_(F4.half(), F4, A3, True),
        r"style_bwd_: grad must be Float .* like features, got Half",
    ),
    "grad type of float16": (
        lambda: ops.style_bwd_(F4.clone(), F4.half(), A3.bfloat16(), True),
        r"style_bwd_: grad must be Half or BFloat16 .* for features of Half, got Float",
    ),
    "diff type": (
        lambda: ops.style_bwd_(F4.half(), F4.half(), A3, True),
        r"style_bwd_: diff must be BFloat16 for features of Half, got Float",
    ),
    "diff shape": (lambda: ops.style_bwd_(F4.clone(), F4, A3[:, :2], True), r"style_bwd_: diff must be \[2, 3, 3\]"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_wrong_arguments_are_refused(case: str) -> None:
    call, message = REFUSALS[case]
    with pytest.raises(RuntimeError, match=message):
        call()


def test_build_info_and_missing_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    info = ops.build_info()
    assert info["compiler"]
    assert (info["cuda"] is None) == (info["cuda_architectures"] == [])
    assert set(info["cpu_features"]) <= {"avx2", "avx512f", "avx512_bf16"}
    ops.require_kernels("cpu")
    if info["cuda"] is not None:
        ops.require_kernels("cuda")
    monkeypatch.setattr(ops.functional, "OPS", ("gram", "first_layer"))
    with pytest.raises(StartupError, match=r"no CPU kernel for first_layer; .*--device cpu"):
        ops.require_kernels("cpu")
