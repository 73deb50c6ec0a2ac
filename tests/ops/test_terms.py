"""content_ and tv_ on the CPU against float64 on the same, already rounded, inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gramophone_server import ops
from tests import reference
from tests.support.kernel_cases import by_kernels_and_library

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LOSS_ERROR = 2e-6
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# features, gradient
TYPES = [(t, t) for t in ROUNDING] + [(torch.float16, torch.bfloat16)]

types = pytest.mark.parametrize(("dtype", "of_grad"), TYPES, ids=str)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def content(grad: Tensor, features: Tensor, target: Tensor, weight: Tensor, mask: bool) -> tuple[Tensor, Tensor]:
    """The loss and the new gradient by the definition, in float64."""
    w, difference = weight.double(), features.double() - target.double()
    updated = grad.double() + 2 * w.view(-1, 1, 1, 1) * difference
    return w * difference.square().sum((1, 2, 3)), torch.where(features <= 0, 0.0, updated) if mask else updated


def content_case(shape: tuple[int, ...], dtype: torch.dtype, of_grad: torch.dtype, layout: str) -> tuple[Tensor, ...]:
    in_layout = LAYOUTS[layout]
    return (
        normal(*shape, seed=1).to(of_grad).contiguous(memory_format=in_layout),
        normal(*shape, seed=2).relu().to(dtype).contiguous(memory_format=in_layout),
        normal(*shape, seed=3).relu().to(dtype).contiguous(memory_format=in_layout),
        torch.rand(shape[0], generator=torch.Generator().manual_seed(4)),
    )


@by_kernels_and_library
@types
@layouts
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 17, 13), (3, 16, 24, 31), (1, 130, 20, 21)], ids=str)
@pytest.mark.parametrize("mask", [True, False], ids=["mask", "no mask"])
def test_content_matches_the_definition(
    shape: tuple[int, ...], dtype: torch.dtype, of_grad: torch.dtype, layout: str, mask: bool
) -> None:
    grad, features, target, weight = content_case(shape, dtype, of_grad, layout)
    loss, expected = content(grad, features, target, weight, mask)
    got = ops.content_(grad, features, target, weight, mask)
    assert got.dtype == torch.float32
    assert error(got, loss) < LOSS_ERROR
    assert error(grad, expected) < ROUNDING[of_grad]


@by_kernels_and_library
def test_content_takes_arguments_of_different_layouts() -> None:
    grad, features, target, weight = content_case((2, 5, 6, 7), torch.float32, torch.float32, "channels_last")
    grad, target = grad.contiguous(), normal(2, 5, 6, 14, seed=3).float()[..., ::2]
    loss, expected = content(grad, features, target, weight, True)
    assert error(ops.content_(grad, features, target, weight, True), loss) < LOSS_ERROR
    assert error(grad, expected) < ROUNDING[torch.float32]


@by_kernels_and_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (2, 3, 5, 2), (1, 3, 2, 19), (3, 3, 33, 70)], ids=str)
def test_tv_matches_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    image, grad = normal(*shape).to(dtype), normal(*shape, seed=1).to(dtype)
    weight = torch.rand(shape[0], generator=torch.Generator().manual_seed(2)).to(dtype)
    loss, by_image = reference.total_variation(image, weight)
    expected = grad.double() + by_image
    got = ops.tv_(grad, image, weight)
    assert got.dtype == dtype
    assert error(got, loss) < (1e-14 if dtype == torch.float64 else LOSS_ERROR)
    assert error(grad, expected) < ROUNDING[dtype]


@by_kernels_and_library
def test_the_gradient_of_tv_is_the_derivative_of_its_loss() -> None:
    image, weight = normal(2, 3, 4, 5), torch.tensor([0.7, 1.3], dtype=torch.float64)
    grad = torch.zeros_like(image)
    ops.tv_(grad, image, weight)
    for at in [(0, 0, 0, 0), (1, 2, 3, 4), (0, 1, 2, 2), (1, 0, 0, 3)]:
        step = torch.zeros_like(image)
        step[at] = 1e-6
        up, down = (ops.tv_(torch.zeros_like(image), image + s, weight).sum() for s in (step, -step))
        assert float((up - down) / 2e-6) == pytest.approx(float(grad[at]), rel=1e-6, abs=1e-8)


def test_terms_do_not_depend_on_the_run_the_threads_or_the_batch() -> None:
    case = content_case((2, 64, 63, 65), torch.bfloat16, torch.bfloat16, "channels_last")
    image, weight = torch.rand(2, 3, 90, 77, generator=torch.Generator().manual_seed(5)), torch.tensor([1.0, 3.0])

    def both(jobs: slice) -> list[Tensor]:
        grad, features, target, factor = (t[jobs].clone() for t in case)
        tv = torch.zeros_like(image[jobs])
        return [ops.content_(grad, features, target, factor, True), grad, ops.tv_(tv, image[jobs], weight[jobs]), tv]

    expected, before = both(slice(0, 2)), torch.get_num_threads()
    try:
        for threads in (1, 2, 2, 2):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(both(slice(0, 2)), expected, strict=True))
            assert all(torch.equal(a, b[1:]) for a, b in zip(both(slice(1, 2)), expected, strict=True))
    finally:
        torch.set_num_threads(before)


@by_kernels_and_library
def test_nan_is_not_hidden() -> None:
    grad, features, target, weight = content_case((2, 8, 6, 6), torch.bfloat16, torch.bfloat16, "channels_last")
    features[0, 2, 3, 3] = float("nan")
    loss = ops.content_(grad, features, target, weight, True)
    assert loss.isnan().tolist() == [True, False]
    assert grad[0, 2, 3, 3].isnan() and grad.isnan().sum() == 1
    image, grad = torch.zeros(2, 3, 6, 6), torch.zeros(2, 3, 6, 6)
    image[1, 0, 2, 2] = float("nan")
    assert ops.tv_(grad, image, torch.ones(2)).isnan().tolist() == [False, True]
    assert grad.isnan().sum() == 5


@by_kernels_and_library
def test_the_fused_check_is_that_of_the_two_ops() -> None:
    results = []
    for fused in (False, True):
        grad, image = (torch.rand(3, 3, 9, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
        grad[1, 2, 3, 4] = torch.inf
        terms, alive = torch.ones(4, 3), torch.ones(3, dtype=torch.bool)
        diverged_at, count = torch.zeros(3, dtype=torch.int64), torch.full((3,), 7)
        if fused:
            ops.tv_check_finite_(grad, image, torch.ones(3), terms, alive, diverged_at, count)
        else:
            terms[-1] = ops.tv_(grad, image, torch.ones(3))
            ops.check_finite_(terms, grad, alive, diverged_at, count)
        results.append((grad, terms, alive, diverged_at, count))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][3].tolist() == [0, 8, 0]


@layouts
def test_registration(layout: str) -> None:
    gramophone = torch.ops.gramophone
    for dtype, of_grad in TYPES:
        grad, features, target, weight = content_case((2, 8, 6, 5), dtype, of_grad, layout)
        torch.library.opcheck(gramophone.content_.default, (grad, features, target, weight, True))
    torch.library.opcheck(gramophone.tv_.default, (torch.rand(2, 3, 6, 5), torch.rand(2, 3, 6, 5), torch.rand(2)))
    per_job = (torch.ones(2, dtype=torch.bool), *(torch.zeros(2, dtype=torch.int64) for _ in range(2)))
    images = (torch.rand(2, 3, 6, 5), torch.rand(2, 3, 6, 5), torch.rand(2))
    torch.library.opcheck(gramophone.tv_check_finite_.default, (*images, torch.ones(4, 2), *per_job))


F4, W2, P = torch.ones(2, 3, 4, 4), torch.ones(2), torch.ones(2, 3, 4, 4)
REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
    "content of 3D": (lambda: ops.content_(F4, F4[0], F4, W2, True), r"content_: features must be \[B, C, H, W\]"),
    "target type": (
        lambda: ops.content_(F4.clone(), F4, F4.half(), W2, True),
        r"content_: target must be Float \[2, 3, 4, 4\] like features, got Half",
    ),
    "grad type": (
        lambda: ops.content_(F4.bfloat16(), F4, F4, W2, True),
        r"content_: grad must be Float .* like features, or BFloat16 if they are Half, got BFloat16",
    ),
    "grad shape": (
        lambda: ops.content_(F4[:1], F4, F4, W2, True),
        r"content_: grad must be .*got Float \[1, 3, 4, 4\]",
    ),
    "weight shape": (
        lambda: ops.content_(F4.clone(), F4, F4, W2[:1], True),
        r"content_: weight must be float32 \[B\] = \[2\], got Float \[1\]",
    ),
    "weight type": (
        lambda: ops.content_(F4.clone(), F4, F4, W2.double(), True),
        r"weight must be float32 .*got Double",
    ),
    "one row": (
        lambda: ops.tv_(P[:, :, :1], P[:, :, :1], W2),
        r"tv_: image must be float32 \[B, 3, H, W\] of at least 2x2 pixels and contiguous, got Float \[2, 3, 1, 4\]",
    ),
    "image layout": (
        lambda: ops.tv_(P.clone(), P.contiguous(memory_format=torch.channels_last), W2),
        r"tv_: image must be .* contiguous, got .* with strides",
    ),
    "image's grad": (lambda: ops.tv_(P.double(), P, W2), r"tv_: grad must be Float .* like image .*got Double"),
    "tv's weight": (lambda: ops.tv_(P.clone(), P, torch.ones(1, 2)), r"tv_: weight must be float32 \[B\] = \[2\]"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_wrong_arguments_are_refused(case: str) -> None:
    call, message = REFUSALS[case]
    with pytest.raises(RuntimeError, match=message):
        call()
