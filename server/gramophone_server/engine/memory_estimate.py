"""How much of the device's memory a batch takes, before it has any of it.

The iteration itself is run on torch's meta device, where tensors have a shape and no memory, and what would be alive is
counted. So the estimate follows the code, whatever is changed there.
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
GRANULE = 512  # bytes; torch's allocator for GPUs rounds up to it

# What the meta device does not see: partial sums of our own kernels (7 MB at 1024 px) and what cuDNN and cuBLAS take to
# work in (cuBLAS: 32 MB on Hopper). To be measured: `make gpu-check` compares the estimate with the allocator's peak.
WORKSPACES = 48 * 2**20


def bytes_free(device: torch.device) -> int:
    """Bytes of the device's memory that nobody uses; of the computer's, or of its container's, on a CPU."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(
        OSError, StopIteration
    ):  # not Linux; without what files are kept in, which it would give up
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    with contextlib.suppress(OSError, ValueError):  # in no container, or in one without a limit ("max")
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return free


@lru_cache(1024)  # 20 ms of Python each, which every request asks for
def bytes_needed(vgg: Vgg, shape: Shape, slots: int, precision: Precision, form: str) -> int:
    """Bytes on the device that an iteration of a batch of ``slots`` jobs takes at its peak, without the network's own
    weights. ``form`` as in `Chain`; on a CPU it is "library", which takes as much as oneDNN."""
    chain = VggFeatures(vgg, META, precision, form=form)
    with Alive() as alive:
        stage = GraphRunner(chain, shape, slots)
        stage.iterate(2)  # the second has what the first one left
    peak: int = alive.peak
    return peak + (WORKSPACES if form == "cudnn" else 0)


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors made while it is on and still in use, and the `peak` of that."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._users: Counter[int] = Counter()  # of a storage: tensors that Python knows
        self._bytes: dict[int, int] = {}

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
