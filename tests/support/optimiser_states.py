"""Arguments of the optimiser ops, for tests of the CPU's and the GPU's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

PAIRS = 10  # that L-BFGS keeps


def normal(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Normally distributed float32 values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_images(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """``image``, ``last_good`` and ``mean``, with values in [0, 1)."""
    image, last_good, mean = (torch.rand(shape, generator=torch.Generator().manual_seed(i)) for i in range(3))
    return image, last_good, mean


def empty_lbfgs_state(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The state of L-BFGS before its first step, in the order of the arguments of `ops.lbfgs_`."""
    jobs, double = shape[0], torch.float64
    return (
        torch.zeros(2, PAIRS, *shape),
        torch.zeros(shape),
        torch.zeros(jobs, 2 * PAIRS + 1, 2 * PAIRS + 1, dtype=double),
        torch.zeros(jobs, PAIRS, dtype=double),
        torch.zeros(jobs, dtype=double),
        torch.zeros(2, jobs, dtype=torch.int64),
    )


def all_alive(jobs: int) -> Tensor:
    """``alive`` of a batch in which no job has diverged."""
    return torch.ones(jobs, dtype=torch.bool)


def step_sizes(jobs: int, smallest: float = 0.01) -> Tensor:
    """``step``: another size for each job."""
    return smallest * torch.arange(1, jobs + 1)
