"""The device memory of an iteration, counted while it runs.

It runs on torch's meta device, where tensors have a shape and no memory. So the count follows every change of the code,
but it takes 20 ms of Python.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gramophone_server.domain.job_state import Shape
from gramophone_server.engine.graph_runner import GraphRunner
from gramophone_server.network.features import VggFeatures
from gramophone_server.network.precision import Precision
from gramophone_server.network.vgg import Vgg

__all__ = ["GRANULE", "AllocationCounter", "traced_bytes"]

META = torch.device("meta")
GRANULE = 512  # bytes; torch's allocator for GPUs rounds up to multiples of it


def traced_bytes(vgg: Vgg, shape: Shape, slots: int, precision: Precision, kernel: str) -> int:
    """Peak device memory in bytes of a batch and its iterations, by the ops that this process calls. The arguments are
    those of `memory_estimate.bytes_needed`, and workspaces are not counted."""
    features = VggFeatures(vgg, META, precision, kernel=kernel)
    with AllocationCounter() as allocations:
        runner = GraphRunner(features, shape, slots)
        runner.iterate(2)  # the second one starts with the tensors that the first one left
    peak: int = allocations.peak
    return peak


class AllocationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, counts the bytes of the tensors that were made since and are in use (`now`), and their `peak`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0  # bytes
        self._users: Counter[int] = Counter()  # Python tensors by storage
        self._bytes: dict[int, int] = {}  # by storage

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(leaf) for leaf in tree_leaves((args, kwargs))}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and id(leaf) not in given:
                self._count(leaf)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._bytes:
            self._bytes[key] = -(-storage.nbytes() // GRANULE) * GRANULE
            self.now += self._bytes[key]
            self.peak = max(self.peak, self.now)
        self._users[key] += 1
        weakref.finalize(tensor, self._dropped, key).atexit = False

    def _dropped(self, key: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.now -= self._bytes.pop(key)
