"""Data types, memory layouts and random tensors for tests of the kernels, and the tolerances of each type."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
ROUNDING = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# features, gradient
TYPES = [(t, t) for t in ROUNDING] + [(torch.float16, torch.bfloat16)]

types = pytest.mark.parametrize(("dtype", "of_grad"), TYPES, ids=str)
# For tests of what an op computes: once by the kernels, and once by torch's library.
by_kernels_and_library = pytest.mark.usefixtures("implementation")
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normally distributed float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(got: Tensor, expected: Tensor) -> float:
    """The relative error, by norms."""
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-30))
