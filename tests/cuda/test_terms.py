"""The kernels of csrc/cuda/terms, in the emulator, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.support import emulated
from tests.support.kernel_cases import LAYOUTS, ROUNDING, error, layouts, normal, types


def content_case(shape: tuple[int, ...], dtype: torch.dtype, of_grad: torch.dtype, layout: str) -> tuple[Tensor, ...]:
    maps = [normal(*shape, seed=1).to(of_grad), *(normal(*shape, seed=s).relu().to(dtype) for s in (2, 3))]
    weight = torch.rand(shape[0], generator=torch.Generator().manual_seed(4))
    return *(m.contiguous(memory_format=LAYOUTS[layout]) for m in maps), weight


# One value; a rest of a group; groups of 16 bytes; several blocks of 8192 values and a rest.
@types
@layouts
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 17, 13), (3, 16, 8, 5), (2, 40, 24, 31)], ids=str)
def test_content_matches_the_definition(
    gpu: Any, shape: tuple[int, ...], dtype: torch.dtype, of_grad: torch.dtype, layout: str
) -> None:
    for mask in (False, True):
        grad, features, target, weight = content_case(shape, dtype, of_grad, layout)
        w, difference = weight.double(), features.double() - target.double()
        expected = grad.double() + 2 * w.view(-1, 1, 1, 1) * difference
        expected = torch.where(features <= 0, 0.0, expected) if mask else expected
        loss = gpu.content_(grad, features, target, weight, mask)
        assert loss.dtype == torch.float32
        assert error(loss, w * difference.square().sum((1, 2, 3))) < ROUNDING[torch.float32]
        assert error(grad, expected) < ROUNDING[of_grad]


def test_content_takes_arguments_of_different_layouts(gpu: Any) -> None:
    grad, features, target, weight = content_case((2, 8, 5, 6), torch.float16, torch.bfloat16, "channels_last")
    expected, contiguous = grad.clone(), grad.contiguous()
    loss = gpu.content_(expected, features, target, weight, True)
    assert torch.equal(gpu.content_(contiguous, features, target.contiguous(), weight, True), loss)
    assert torch.equal(contiguous, expected)


@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (2, 3, 5, 2), (1, 3, 2, 19), (3, 3, 33, 70)], ids=str)
def test_tv_matches_the_definition(gpu: Any, shape: tuple[int, ...]) -> None:
    image, grad = normal(*shape).float(), normal(*shape, seed=1).float()
    weight = torch.rand(shape[0], generator=torch.Generator().manual_seed(2))
    loss, by_image = reference.total_variation(image, weight)
    expected = grad.double() + by_image
    assert error(gpu.tv_(grad, image, weight), loss) < ROUNDING[torch.float32]
    assert error(grad, expected) < ROUNDING[torch.float32]


def test_terms_do_not_hide_nan(gpu: Any) -> None:
    grad, features, target, weight = content_case((2, 8, 6, 6), torch.float16, torch.bfloat16, "channels_last")
    features[0, 2, 3, 3] = float("nan")
    assert gpu.content_(grad, features, target, weight, True).isnan().tolist() == [True, False]
    assert grad[0, 2, 3, 3].isnan() and grad.isnan().sum() == 1
    image, grad = torch.zeros(2, 3, 6, 6), torch.zeros(2, 3, 6, 6)
    image[1, 0, 2, 2] = float("nan")
    assert gpu.tv_(grad, image, torch.ones(2)).isnan().tolist() == [False, True]
    assert grad.isnan().sum() == 5


def results(gpu: Any, jobs: slice) -> dict[str, Tensor]:
    """Both ops on these jobs of a batch of 3."""
    image = torch.rand(3, 3, 19, 37, generator=torch.Generator().manual_seed(5))[jobs]
    grad, features, target, weight = (
        t[jobs] for t in content_case((3, 64, 19, 37), torch.float16, torch.bfloat16, "channels_last")
    )
    out = {"grad": grad.clone(), "tv grad": torch.zeros_like(image)}
    out["content"] = gpu.content_(out["grad"], features, target, weight, True)
    out["tv"] = gpu.tv_(out["tv grad"], image, weight)
    return out


def test_results_do_not_depend_on_the_order_or_the_batch(gpu: Any, order: None) -> None:
    together, alone = results(gpu, slice(0, 3)), results(gpu, slice(1, 2))
    emulated.order(0)
    for name, expected in results(gpu, slice(0, 3)).items():
        assert torch.equal(together[name], expected), name
        assert torch.equal(alone[name], expected[1:2]), name


def checked(gpu: Any, fused: bool, bad: list[tuple[int, ...]], terms: Tensor) -> list[Tensor]:
    """The results of a batch of six, with values that are not finite at these places of the gradient."""
    image = torch.rand(6, 3, 23, 31, generator=torch.Generator().manual_seed(5))
    grad, weight = 1e30 * normal(6, 3, 23, 31, seed=1).float(), torch.arange(1, 7) / 7
    weight[4] = torch.inf  # so that its loss is not finite
    for n, place in enumerate(bad):
        grad[place] = (torch.nan, torch.inf, -torch.inf)[n % 3]
    terms, alive = terms.clone(), torch.tensor([True] * 5 + [False])
    diverged_at, count = torch.tensor([0, 0, 0, 0, 0, 3]), torch.tensor([0, 7, 8, 9, 10, 2**31])
    for _ in range(2):  # each call leaves valid counts
        if fused:
            gpu.tv_check_finite_(grad, image, weight, terms, alive, diverged_at, count)
        else:
            terms[-1] = gpu.tv_(grad, image, weight)
            gpu.check_finite_(terms, grad, alive, diverged_at, count)
    return [grad, terms, alive, diverged_at, count]


def test_the_fused_check_is_that_of_the_two_ops(gpu: Any, order: None) -> None:
    terms = 1e30 * normal(300, 6, seed=2).float()  # more rows than a block has threads
    terms[298, 3] = torch.nan
    bad = [(1, 0, 0, 0), (2, 2, 22, 30), (2, 1, 3, 4)]
    got, expected = (checked(gpu, fused, bad, terms) for fused in (True, False))
    for name, a, b in zip(("grad", "terms", "alive", "diverged_at", "count"), got, expected, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan()), name
    assert got[2].tolist() == [True, False, False, False, False, False]
    assert got[3].tolist() == [0, 8, 9, 10, 11, 3]
    assert got[4].tolist() == [2, 9, 10, 11, 12, 2**31 + 2]


def test_wrong_arguments_are_refused(gpu: Any) -> None:
    image = torch.ones(2, 3, 4, 4)
    with pytest.raises(RuntimeError, match=r"content_: target must be Float \[2, 3, 4, 4\] like features"):
        gpu.content_(image.clone(), image, image[:1], torch.ones(2), True)
    with pytest.raises(RuntimeError, match=r"tv_: image must be float32 on a GPU, got Double"):
        gpu.tv_(image.double(), image.double(), torch.ones(2))
    image, per_job = torch.ones(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)
    verdicts = torch.ones(2, dtype=torch.bool), per_job, per_job.clone()
    with pytest.raises(RuntimeError, match=r"tv_check_finite_: terms must have a row for the total variation"):
        gpu.tv_check_finite_(image.clone(), image, torch.ones(2), torch.ones(0, 2), *verdicts)
    with pytest.raises(RuntimeError, match=r"tv_check_finite_: weight must be float32 \[B\] = \[2\]"):
        gpu.tv_check_finite_(image.clone(), image, torch.ones(3), torch.ones(1, 2), *verdicts)
