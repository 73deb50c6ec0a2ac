"""Estimates of the device memory of a batch, before the batch exists.

The estimate runs the iteration itself on torch's meta device, where tensors have a shape and no memory, and counts the
bytes of the tensors that are alive. So it follows every change of the code.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
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

__all__ = ["bytes_free", "bytes_needed"]

META = torch.device("meta")
GRANULE = 512  # bytes; torch's allocator for GPUs rounds up to multiples of it

# Bytes that the meta device does not see: partial sums of our own kernels (7 MB at 1024 px) and the workspaces of cuDNN
# and cuBLAS (cuBLAS: 32 MB on Hopper). Not measured yet: `make gpu-check` compares the estimate with the allocator's
# peak.
WORKSPACES = 48 * 2**20


def bytes_free(device: torch.device) -> int:
    """Free memory of the device in bytes; on a CPU, that of the computer or of its container, whichever is less."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # MemAvailable also counts the page cache, which the kernel would give up. There is none on other systems than
    # Linux.
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    with contextlib.suppress(OSError, ValueError):  # outside of a container, or in one without a limit ("max")
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return free


@lru_cache(1024)  # an estimate takes 20 ms of Python, and every request needs one
def bytes_needed(vgg: Vgg, shape: Shape, slots: int, precision: Precision, kernel: str) -> int:
    """Peak device memory in bytes of a batch of ``slots`` jobs and its iterations, without the network's weights.

    ``kernel`` as in `VggFeatures`; for a CPU it is "library", which takes as much as "onednn".
    """
    features = VggFeatures(vgg, META, precision, kernel=kernel)
    with AllocationCounter() as allocations:
        runner = GraphRunner(features, shape, slots)
        runner.iterate(2)  # the second one starts with the tensors that the first one left
    peak: int = allocations.peak
    return peak + (WORKSPACES if kernel == "cudnn" else 0)


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
