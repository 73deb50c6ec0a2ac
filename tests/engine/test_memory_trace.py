"""The memory of an iteration, counted on the meta device."""

from __future__ import annotations

import torch

from gramophone_server.engine.memory_trace import AllocationCounter


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
