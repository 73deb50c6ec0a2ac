"""Estimates of the device memory of a batch, before the batch exists.

They are arithmetic, 0.1 ms for a shape that no batch had before: requests choose their sizes and layers, so each may
bring one. It follows `GraphRunner`, `VggFeatures` and the ops step by step, and the tests hold it equal to what
`memory_trace` counts while the iteration runs.
"""

from __future__ import annotations

import contextlib
import os
from functools import lru_cache
from pathlib import Path

import torch

from gramophone.recipe import Optimiser, Pooling
from gramophone_server.domain.job_state import Shape
from gramophone_server.engine.memory_trace import GRANULE, traced_bytes
from gramophone_server.engine.optimisers import LBFGS
from gramophone_server.network.precision import Precision
from gramophone_server.network.vgg import Vgg
from gramophone_server.ops import functional

__all__ = ["bytes_free", "bytes_needed"]

# Bytes that are not in tensors: partial sums of our own kernels (7 MB at 1024 px) and the workspaces of cuDNN and
# cuBLAS (cuBLAS: 32 MB on Hopper). Not measured yet: `make gpu-check` compares the estimate with the allocator's peak.
WORKSPACES = 48 * 2**20
FLOAT, DOUBLE, LONG, BOOL, CODE = 4, 8, 8, 1, 1  # bytes of an element


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


@lru_cache(1024)  # the scheduler asks for the same ones all the time
def bytes_needed(vgg: Vgg, shape: Shape, slots: int, precision: Precision, kernel: str) -> int:
    """Peak device memory in bytes of a batch of ``slots`` jobs and its iterations, without the network's weights.

    ``kernel`` as in `VggFeatures`; for a CPU it is "library", which takes as much as "onednn".
    """
    if functional.by_library:  # their temporary tensors are the library's affair, so they are counted, in 20 ms
        peak = traced_bytes(vgg, shape, slots, precision, kernel)
    else:
        peak = _Iteration(vgg, shape, slots, precision, kernel).peak
    return peak + (WORKSPACES if kernel == "cudnn" else 0)


class _Iteration:
    """The tensors of an iteration, taken and freed in its order: the bytes in use, and their `peak`.

    A tensor is its size in bytes here. The methods have the names of the code that they follow in their docstrings.
    """

    def __init__(self, vgg: Vgg, shape: Shape, slots: int, precision: Precision, kernel: str) -> None:
        self.peak = self._now = 0
        self._shape, self._slots = shape, slots
        self._forward, self._backward = precision.forward.itemsize, precision.backward.itemsize
        self._mixed = precision.forward != precision.backward
        self._requested = {*shape.content_layers, *shape.style_layers}
        self._index = {kind + c.name: i for i, c in enumerate(vgg.convolutions) for kind in ("conv", "relu")}
        deepest = max(map(self._index.__getitem__, self._requested))
        self._layers = vgg.convolutions[: deepest + 1]
        self._channels = [c.weight.shape[0] for c in self._layers]
        self._inputs = [c.weight.shape[1] for c in self._layers]
        self._pixels: list[int] = []  # of all jobs, by layer
        height, width = shape.height, shape.width
        for layer in self._layers:
            if layer.pooled:
                height, width = height // 2, width // 2
            self._pixels.append(slots * height * width)
        self._own_first = kernel == "cudnn" and self._channels[0] == 64
        fuses = kernel == "cudnn" and shape.pooling is Pooling.MAX
        # By layer: whether its ReLU and the pooling after it are one kernel, which keeps codes instead of the output.
        self._coded = [fuses and self._fuses_pooling(i) for i in range(len(self._layers))]
        self._kept = [0] * len(self._layers)  # bytes for the backward pass, by layer
        self._buffers()
        self._forward_pass()
        self._style_terms()
        self._backward_pass()

    def _fuses_pooling(self, i: int) -> bool:
        name = self._layers[i].name
        pooled = i + 1 < len(self._layers) and self._layers[i + 1].pooled
        wide = self._channels[i] % 8 == self._inputs[i] % 8 == 0
        return pooled and wide and self._requested.isdisjoint(("conv" + name, "relu" + name))

    def _take(self, elements: int, itemsize: int) -> int:
        size = -(-elements * itemsize // GRANULE) * GRANULE
        self._now += size
        self.peak = max(self.peak, self._now)
        return size

    def _free(self, *tensors: int) -> None:
        self._now -= sum(tensors)

    def _buffers(self) -> None:
        """What a `GraphRunner` holds: targets, weights, pictures and the optimiser's state."""
        shape, slots = self._shape, self._slots
        content, style = len(shape.content_layers), len(shape.style_layers)
        for layer in shape.content_layers:
            self._take(self._map(self._index[layer]), self._forward)
        for layer in shape.style_layers:
            self._take(slots * self._channels[self._index[layer]] ** 2, FLOAT)
        for rows in (content, style, 1, content + style + 1):  # weights, and the terms of the last evaluation
            self._take(rows * slots, FLOAT)
        for itemsize in (FLOAT, LONG, BOOL, LONG):  # step, count, alive, diverged_at
            self._take(slots, itemsize)
        image = 3 * self._pixels[0]
        moments = {Optimiser.ADAM: 2, Optimiser.LBFGS: 1}.get(shape.optimiser, 0)
        for _ in range(2 + (shape.average != 0) + moments):
            self._take(image, FLOAT)
        if shape.optimiser is Optimiser.LBFGS:
            vectors = 2 * LBFGS.PAIRS + 1
            self._take(2 * LBFGS.PAIRS * image, FLOAT)
            for elements in (vectors**2, LBFGS.PAIRS, 1):  # products, inverse, scale
                self._take(slots * elements, DOUBLE)
            self._take(2 * slots, LONG)

    def _map(self, i: int) -> int:
        """Elements of the output of a layer."""
        return self._channels[i] * self._pixels[i]

    def _forward_pass(self) -> None:
        """See `VggFeatures.steps`."""
        pooled = 0  # the output of a kernel that keeps codes: the only input of a layer that is kept nowhere
        is_input = False  # of this layer. Layers computed without a ReLU leave it to a later one to drop
        for i, layer in enumerate(self._layers):
            if layer.pooled and not self._coded[i - 1]:
                self._keep(i, self._channels[i - 1] * self._pixels[i], self._forward)
            is_linear = "conv" + layer.name in self._requested
            network_input = self._network_input() if i == 0 and (is_linear or not self._own_first) else 0
            if not is_linear and not is_input:
                self._free(pooled)
                pooled = 0
            if self._coded[i]:
                output = self._take(self._map(i), self._forward)
                next_pooled = self._take(self._channels[i] * self._pixels[i + 1], self._forward)
                self._keep(i, self._channels[i] * self._pixels[i + 1], CODE)
                self._free(output, network_input, pooled)
                pooled = next_pooled
            else:
                self._keep(i, self._map(i), self._forward)
                self._free(network_input)
                if is_linear:
                    self._keep(i, self._map(i), self._forward)  # the ReLU's output
                else:
                    self._free(pooled)
                    pooled = 0
            is_input = self._coded[i]
        self._free(pooled)

    def _keep(self, i: int, elements: int, itemsize: int) -> None:
        """Takes a tensor of a layer that the backward pass needs."""
        self._kept[i] += self._take(elements, itemsize)

    def _network_input(self) -> int:
        """See `VggFeatures._input`: the normalised channels, their stack, its type, its layout."""
        pixels = self._pixels[0]
        channels = []
        for _ in range(3):
            scaled = self._take(pixels, FLOAT)
            channels.append(self._take(pixels, FLOAT))
            self._free(scaled)
        stack = self._take(3 * pixels, FLOAT)
        self._free(*channels)
        if self._forward != FLOAT:
            converted = self._take(3 * pixels, self._forward)
            self._free(stack)
            stack = converted
        network_input = self._take(3 * pixels, self._forward)
        self._free(stack)
        return network_input

    def _style_terms(self) -> None:
        """See `ops.style_fwd`: the losses, and a difference of Gram matrices for each layer."""
        layers = self._shape.style_layers
        self._take(len(layers) * self._slots, FLOAT)
        for layer in layers:
            self._take(self._slots * self._channels[self._index[layer]] ** 2, min(self._forward, FLOAT))

    def _backward_pass(self) -> None:
        """See `VggFeatures.backward`."""
        grad = 0
        for i in reversed(range(len(self._layers))):
            name, elements = self._layers[i].name, self._map(i)
            if self._coded[i]:
                grad = self._replace(grad, elements)
            elif not grad:
                grad = self._take(elements, self._backward)
            for layer in ("relu" + name, "conv" + name):
                if layer in self._shape.content_layers:
                    self._take(self._slots, FLOAT)  # its loss
            if i == 0:
                break
            grad = self._replace(grad, self._inputs[i] * self._pixels[i])
            if self._layers[i].pooled and not self._coded[i - 1]:
                grad = self._through_pooling(grad, i)
            self._free(self._kept[i])
        image = 3 * self._pixels[0]
        if not self._own_first:  # the gradient of the network's input, and in float32
            grad = self._take(image, self._backward)
            if self._backward != FLOAT:
                self._replace(grad, image, FLOAT)
        self._take(image, FLOAT)

    def _through_pooling(self, grad: int, i: int) -> int:
        """The gradient of a pooling's input. That of averages takes ``grad`` times their gain, and a tensor in the type
        of gradients for the shape."""
        temporary = []
        if self._shape.pooling is Pooling.AVERAGE:
            if self._mixed:
                temporary.append(self._take(self._map(i - 1), self._backward))
            temporary.append(self._take(self._inputs[i] * self._pixels[i], self._backward))
        grad = self._replace(grad, self._map(i - 1))
        self._free(*temporary)
        return grad

    def _replace(self, tensor: int, elements: int, itemsize: int = 0) -> int:
        """Takes a tensor, of the type of gradients, and frees another."""
        new = self._take(elements, itemsize or self._backward)
        self._free(tensor)
        return new
