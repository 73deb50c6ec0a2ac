"""The CUDA kernels of the optimisers, in the emulator, against the CPU's kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gramophone_server import ops
from tests.support import emulated
from tests.support.optimiser_states import all_alive, empty_lbfgs_state, normal, random_images, step_sizes

# Multiples of tiles of 1024 values and of runs of four values; neither; jobs that start off a 16-byte boundary.
SHAPES = [(2, 3, 32, 64), (3, 3, 20, 23), (2, 3, 7, 9)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
STEPPERS = ("descent", "normalised", "adam", "lbfgs")


@pytest.fixture(autouse=True)
def ascending_order() -> Iterator[None]:
    emulated.order(0)
    yield
    emulated.order(0)


class Run:
    """A batch under one optimiser, on the CPU's ops or on the emulated ones."""

    def __init__(self, kind: str, shape: tuple[int, ...], on: Any, average: float = 0.9) -> None:
        self.kind, self.on, self.average, jobs = kind, on, average, shape[0]
        self.image, self.last_good, mean = random_images(shape)
        self.mean = mean if average else None
        self.step, self.alive = step_sizes(jobs, 0.02), all_alive(jobs)
        self.count, self.diverged_at = (torch.zeros(jobs, dtype=torch.int64) for _ in range(2))
        moments = (torch.zeros(shape), torch.zeros(shape))
        self.state = {"adam": moments, "lbfgs": empty_lbfgs_state(shape)}.get(kind, ())

    def step_(self, grad: Tensor) -> None:
        terms = torch.zeros(40, len(self.step))
        self.on.check_finite_(terms, grad, self.alive, self.diverged_at, self.count)
        canvas, decided = (self.image, self.last_good, self.mean), (self.alive, self.average)
        if self.kind == "adam":
            self.on.adam_(*canvas, *self.state, grad, self.step, self.count, *decided)
        elif self.kind == "lbfgs":
            self.on.lbfgs_(*canvas, *self.state, grad, self.step, *decided)
        else:
            self.on.descent_(*canvas, grad, self.step, *decided, self.kind == "normalised")

    @property
    def tensors(self) -> list[Tensor]:
        canvas = (self.image, self.last_good, *([] if self.mean is None else [self.mean]))
        return [*canvas, *self.state, self.alive, self.diverged_at, self.count]


def gradient(image: Tensor, seed: int, bad: bool = True) -> Tensor:
    """A gradient towards mid-grey, steeper at some pixels. The first job's is not finite from the fifth step on."""
    steep = 1 + 30 * torch.rand(image.shape[1:], generator=torch.Generator().manual_seed(99))
    grad = 1e-6 * (steep * (image - 0.5) + 0.1 * normal(seed, tuple(image.shape)))
    if bad and seed >= 4:
        grad[0, 1, 2, seed % 7] = (torch.nan, torch.inf)[seed % 2]
    return grad


@shapes
@pytest.mark.parametrize("kind", STEPPERS)
@pytest.mark.parametrize("average", [0.9, 0.0])
def test_steps_match_the_cpu(kind: str, shape: tuple[int, ...], average: float) -> None:
    """Until the ring of pairs has wrapped around. One job diverges."""
    cpu, gpu = Run(kind, shape, ops, average), Run(kind, shape, emulated.library(), average)
    for i in range(13 if kind == "lbfgs" else 6):
        grad = gradient(cpu.image, i)
        cpu.step_(grad)
        gpu.step_(grad)
        for a, b in zip(gpu.tensors, cpu.tensors, strict=True):
            scale = float(b.abs().max()) if b.is_floating_point() else 1.0
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * scale)
        if kind in ("descent", "adam"):  # no sums, and the same fma operations on both devices
            assert torch.equal(gpu.image, cpu.image)
        gpu.image.copy_(cpu.image)  # so that single steps are compared
    assert cpu.diverged_at.tolist() == [5] + [0] * (shape[0] - 1)


@pytest.mark.parametrize("kind", STEPPERS)
def test_results_do_not_depend_on_the_order_of_blocks_and_warps(kind: str) -> None:
    results = []
    for seed in (0, 1, 7):
        emulated.order(seed)
        run = Run(kind, (3, 3, 20, 23), emulated.library())
        for i in range(12 if kind == "lbfgs" else 3):
            run.step_(gradient(run.image, i))
        results.append(run.tensors)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kind", STEPPERS)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_a_job_does_not_depend_on_its_batch(kind: str, shape: tuple[int, ...]) -> None:
    """Nor on the alignment of its memory: jobs of 7 x 9 pixels do not all start at a multiple of 16 bytes."""
    both, alone = (Run(kind, shape, emulated.library()) for _ in range(2))
    for name in ("image", "last_good", "mean", "step", "alive", "count", "diverged_at"):
        setattr(alone, name, getattr(alone, name)[1:2].clone())
    alone.state = Run(kind, (1, *shape[1:]), emulated.library()).state
    for i in range(12 if kind == "lbfgs" else 6):
        grad = gradient(both.image, i)
        both.step_(grad)
        alone.step_(grad[1:2].clone())
        assert torch.equal(both.image[1:2], alone.image)


@pytest.mark.parametrize("kind", STEPPERS[1:])
def test_parts_of_several_tiles(kind: str) -> None:
    shape = (1, 3, 296, 297)  # 258 tiles, so that a part has two of them
    cpu, gpu = Run(kind, shape, ops), Run(kind, shape, emulated.library())
    for i in range(2):
        grad = gradient(cpu.image, i, bad=False)
        cpu.step_(grad)
        gpu.step_(grad)
    torch.testing.assert_close(gpu.image, cpu.image, rtol=0, atol=1e-6)


def test_check_finite_finds_values_that_are_not_finite_anywhere() -> None:
    shape = (6, 3, 32, 33)  # four parts
    grad, terms = 1e30 * normal(1, shape), 1e30 * normal(2, (300, 6))
    grad[1, 0, 0, 0], grad[2, 2, 31, 32], grad[2, 1, 3, 4] = torch.nan, torch.inf, -torch.inf
    terms[299, 3], terms[0, 4] = torch.nan, torch.inf
    for seed in (0, 1, 7):
        emulated.order(seed)
        alive, diverged_at = torch.tensor([True] * 5 + [False]), torch.tensor([0, 0, 0, 0, 0, 3])
        count = torch.tensor([0, 7, 8, 9, 10, 2**31])
        for _ in range(2):  # each call leaves a valid count
            emulated.library().check_finite_(terms, grad, alive, diverged_at, count)
        assert count.tolist() == [2, 9, 10, 11, 12, 2**31 + 2]
        assert alive.tolist() == [True, False, False, False, False, False]
        assert diverged_at.tolist() == [0, 8, 9, 10, 11, 3]
