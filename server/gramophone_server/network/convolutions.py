"""One 3x3 convolution of the network in the form that its device runs fastest, there and back.

The way back to the input of a 3x3 convolution with stride 1 is the same convolution with the kernels flipped and the
channels exchanged, so it can run on whatever is fast for the way there. Activations are [B, C, H, W], channels_last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gramophone_server import ops
from gramophone_server.network.precision import Precision
from gramophone_server.network.vgg import Convolution

__all__ = ["CuDnn", "Fastest", "Form", "Library", "OneDnn", "can_pack"]

ONES = [1, 1]
LAST = torch.channels_last


class Form(Protocol):
    """A convolution with its weights on the device."""

    def forward(self, x: Tensor) -> Tensor:
        """relu(convolution(x) + bias)."""

    def linear(self, x: Tensor) -> Tensor:
        """convolution(x) + bias."""

    def backward(self, grad: Tensor) -> Tensor:
        """The gradient of x from that of convolution(x)."""

    def forward_pooled(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """`ops.bias_relu_pool` behind the convolution, or None where that is not the fastest way."""


def _flipped(weight: Tensor, precision: Precision) -> Tensor:
    """The weight of the way back as a forward convolution."""
    return weight.flip(2, 3).transpose(0, 1).to(precision.backward).contiguous(memory_format=LAST)


class Library:
    """torch's own convolution: any device, any type."""

    def __init__(self, convolution: Convolution, device: torch.device, precision: Precision) -> None:
        weight = convolution.weight.to(device)
        self.weight = weight.to(precision.forward).contiguous(memory_format=LAST)
        self.back = _flipped(weight, precision)
        self.bias = convolution.bias.to(device, precision.forward)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu_()

    def linear(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=1)

    def backward(self, grad: Tensor) -> Tensor:
        return F.conv2d(grad, self.back, None, padding=1)

    def forward_pooled(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        return None


class OneDnn:
    """On a CPU: weights in oneDNN's own order, the ReLU in the convolution's pass. 1.2 times as fast as `Library`."""

    def __init__(self, convolution: Convolution, precision: Precision) -> None:
        self.weight = _pack(convolution.weight.to(precision.forward).contiguous(memory_format=LAST))
        self.back = _pack(_flipped(convolution.weight, precision))
        self.bias = convolution.bias.to(precision.forward)

    def forward(self, x: Tensor) -> Tensor:
        return _packed_convolution(x, self.weight, self.bias, "relu")

    def linear(self, x: Tensor) -> Tensor:
        return _packed_convolution(x, self.weight, self.bias, "none")

    def backward(self, grad: Tensor) -> Tensor:
        return _packed_convolution(grad, self.back, None, "none")

    def forward_pooled(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        return None


def _pack(weight: Tensor) -> Tensor:
    """The weight in oneDNN's own order, chosen for a 256 px picture; other sizes run on the same order."""
    size = [1, weight.shape[1], 256, 256]
    reorder = torch.ops.mkldnn._reorder_convolution_weight
    packed: Tensor = reorder(weight, ONES, ONES, ONES, 1, size)
    return packed


def _packed_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, then: str) -> Tensor:
    """3x3 convolution and what follows it in one pass. Private calls of torch: this file is their only user."""
    out: Tensor = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, ONES, ONES, ONES, 1, then, [], "")
    return out


def can_pack(device: torch.device) -> bool:
    """torch has the two private calls above for this device, and they work."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        w = _pack(torch.ones(8, 8, 3, 3).contiguous(memory_format=LAST))
        return bool(_packed_convolution(torch.ones(1, 8, 4, 4), w, None, "relu")[0, 0, 1, 1] == 72)
    except (AttributeError, RuntimeError):
        return False


class CuDnn:
    """On a GPU, in 16 bits: cuDNN's convolution, and our own pass for what it leaves apart.

    Released torch runs a convolution with a bias and a ReLU as three kernels, which costs 8 bytes per activation more than
    one (torch's ConvShared.cpp), so here it is the bare convolution and then `ops.bias_relu_`. torch's one-pass
    cudnn_convolution_relu is left alone: it hands cuDNN its uninitialised output as a summand of weight 0, which is NaN if
    that is read, hides NaN from the divergence check, and is not bound to deterministic kernels; the GPU check times it.
    There are two ways back, and which is faster depends on the layer, so `Fastest` measures them:

        flipped  a forward convolution with flipped kernels
        dgrad    cuDNN's own gradient of the input
    """

    def __init__(self, convolution: Convolution, device: torch.device, precision: Precision, fastest: Fastest) -> None:
        weight = convolution.weight.to(device)
        self.weight = weight.to(precision.forward).contiguous(memory_format=LAST)
        self.weight_back = weight.to(precision.backward).contiguous(memory_format=LAST)
        self.back = _flipped(weight, precision)
        self.bias = convolution.bias.to(device)
        self.bias_16 = self.bias.to(precision.forward)
        self._fastest = fastest

    def forward(self, x: Tensor) -> Tensor:
        out = self.bare(x)
        ops.bias_relu_(out, self.bias)
        return out

    def linear(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias_16, padding=1)

    def backward(self, grad: Tensor) -> Tensor:
        return self._fastest(tuple(self.weight.shape[:2]), {"flipped": self.flipped, "dgrad": self.dgrad}, grad)

    def forward_pooled(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        return ops.bias_relu_pool(self.bare(x), self.bias)

    def bare(self, x: Tensor) -> Tensor:
        """The convolution alone."""
        return F.conv2d(x, self.weight, None, padding=1)

    def flipped(self, grad: Tensor) -> Tensor:
        """`backward` as a forward convolution."""
        return F.conv2d(grad, self.back, None, padding=1)

    def dgrad(self, grad: Tensor) -> Tensor:
        """`backward` by cuDNN's own kernels, which want an input for its shape alone."""
        b, _, h, w = grad.shape
        like = torch.empty((b, self.weight.shape[1], h, w), dtype=grad.dtype, device=grad.device, memory_format=LAST)
        out: Tensor = torch.ops.aten.convolution_backward(
            grad, like, self.weight_back, None, ONES, ONES, ONES, False, [0, 0], 1, [True, False, False]
        )[0]
        return out


class Fastest:
    """Of several ways to the same result the one that was fastest when they were compared; else the first.

    A question is a layer's channels, without the picture's size: pictures come in any size, and a service
    cannot stop for seconds at each new one. For the same reason cuDNN's own search (`torch.backends.cudnn.benchmark`) is
    left off, and its heuristics choose the kernels.
    """

    REPEATS = 5

    def __init__(self) -> None:
        self.comparing = False  # set while the device may be waited for, so never while a graph is captured
        self.milliseconds: dict[Hashable, dict[str, float]] = {}  # by question and way

    def __call__(self, question: Hashable, ways: dict[str, Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
        """What the fastest of ``ways`` makes of ``x``."""
        times = self.milliseconds.get(question)
        if times is None and self.comparing:
            times = self.milliseconds[question] = {name: self._milliseconds(way, x) for name, way in ways.items()}
            if not any(math.isfinite(time) for time in times.values()):
                raise RuntimeError(f"this version of cuDNN has none of the forms {', '.join(ways)} for {question}")
        chosen = next(iter(ways)) if times is None else min(times, key=times.__getitem__)
        return ways[chosen](x)

    def _milliseconds(self, way: Callable[[Tensor], Tensor], x: Tensor) -> float:
        """The best of a few calls; infinite where this version of cuDNN has no such form."""
        try:
            for _ in range(2):  # the first lets cuDNN build its plan
                way(x)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return math.inf
        best = math.inf
        for _ in range(self.REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            way(x)
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end))
        return best
