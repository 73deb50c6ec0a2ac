"""One 3x3 convolution of the network, forward and backward, by the kernels that the device runs fastest.

The backward pass of a 3x3 convolution with stride 1, from the gradient of its output to that of its input, is the same
convolution with the weights flipped and the channels exchanged, so it can run on any kernel that is fast for the
forward pass. Activations are [B, C, H, W], channels_last.
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

__all__ = ["Autotuner", "CuDnn", "Kernel", "Library", "OneDnn", "can_pack"]

ONES = [1, 1]
CHANNELS_LAST = torch.channels_last


class Kernel(Protocol):
    """A convolution with its weights on the device, and one implementation of it."""

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output after the ReLU: relu(convolution(x) + bias)."""

    def linear(self, x: Tensor) -> Tensor:
        """The layer's output before the ReLU: convolution(x) + bias."""

    def backward(self, grad: Tensor) -> Tensor:
        """The gradient of x from ``grad``, that of convolution(x)."""

    def forward_pooled(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The convolution and then `ops.bias_relu_pool`; None where that is not the fastest way."""


def _flipped(weight: Tensor, precision: Precision) -> Tensor:
    """The weight of the backward pass as a forward convolution."""
    return weight.flip(2, 3).transpose(0, 1).to(precision.backward).contiguous(memory_format=CHANNELS_LAST)


class Library:
    """torch's own convolution, for any device and any type."""

    def __init__(self, convolution: Convolution, device: torch.device, precision: Precision) -> None:
        weight = convolution.weight.to(device)
        self.weight = weight.to(precision.forward).contiguous(memory_format=CHANNELS_LAST)
        self.back = _flipped(weight, precision)
        self.bias = convolution.bias.to(device, precision.forward)

    def forward(self, x: Tensor) -> Tensor:
        """See `Kernel.forward`."""
        return self.linear(x).relu_()

    def linear(self, x: Tensor) -> Tensor:
        """See `Kernel.linear`."""
        return F.conv2d(x, self.weight, self.bias, padding=1)

    def backward(self, grad: Tensor) -> Tensor:
        """See `Kernel.backward`."""
        return F.conv2d(grad, self.back, None, padding=1)

    def forward_pooled(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """See `Kernel.forward_pooled`."""
        return None


class OneDnn:
    """For a CPU: weights in oneDNN's own order, and the ReLU in the convolution's pass.

    1.2 times as fast as `Library`.
    """

    def __init__(self, convolution: Convolution, precision: Precision) -> None:
        self.weight = _pack(convolution.weight.to(precision.forward).contiguous(memory_format=CHANNELS_LAST))
        self.back = _pack(_flipped(convolution.weight, precision))
        self.bias = convolution.bias.to(precision.forward)

    def forward(self, x: Tensor) -> Tensor:
        """See `Kernel.forward`."""
        return _packed_convolution(x, self.weight, self.bias, "relu")

    def linear(self, x: Tensor) -> Tensor:
        """See `Kernel.linear`."""
        return _packed_convolution(x, self.weight, self.bias, "none")

    def backward(self, grad: Tensor) -> Tensor:
        """See `Kernel.backward`."""
        return _packed_convolution(grad, self.back, None, "none")

    def forward_pooled(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """See `Kernel.forward_pooled`."""
        return None


def _pack(weight: Tensor) -> Tensor:
    """The weight in oneDNN's own order, chosen for a 256 px picture; other sizes run on the same order."""
    size = [1, weight.shape[1], 256, 256]
    reorder = torch.ops.mkldnn._reorder_convolution_weight
    packed: Tensor = reorder(weight, ONES, ONES, ONES, 1, size)
    return packed


def _packed_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, then: str) -> Tensor:
    """A 3x3 convolution and ``then`` "relu" or "none", in one pass.

    The op is private to torch, like that of `_pack`; no other module uses them.
    """
    out: Tensor = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, ONES, ONES, ONES, 1, then, [], "")
    return out


def can_pack(device: torch.device) -> bool:
    """Whether torch has the two private ops above for this device, and they work."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        w = _pack(torch.ones(8, 8, 3, 3).contiguous(memory_format=CHANNELS_LAST))
        return bool(_packed_convolution(torch.ones(1, 8, 4, 4), w, None, "relu")[0, 0, 1, 1] == 72)
    except (AttributeError, RuntimeError):
        return False


class CuDnn:
    """For a GPU, in 16 bits: cuDNN's convolution without bias, then our own kernel for bias and ReLU.

    Released torch runs a convolution with a bias and a ReLU as three kernels, which costs 8 bytes per activation more
    than one kernel (torch's ConvShared.cpp). So this class runs the bare convolution and then `ops.bias_relu_`. torch's
    one-pass cudnn_convolution_relu is not used: it passes its uninitialised output to cuDNN as a summand of weight 0,
    so the result is NaN if that is read; it hides NaN from the divergence check; and it may run kernels that are not
    deterministic. The GPU check times it. There are two backward passes, and which one is faster depends on the layer,
    so `Autotuner` measures them:

        flipped  a forward convolution with flipped weights
        dgrad    cuDNN's own gradient of the input
    """

    def __init__(
        self, convolution: Convolution, device: torch.device, precision: Precision, autotuner: Autotuner
    ) -> None:
        weight = convolution.weight.to(device)
        self.weight = weight.to(precision.forward).contiguous(memory_format=CHANNELS_LAST)
        self.weight_back = weight.to(precision.backward).contiguous(memory_format=CHANNELS_LAST)
        self.back = _flipped(weight, precision)
        self.bias = convolution.bias.to(device)
        self.bias_16 = self.bias.to(precision.forward)
        self._autotuner = autotuner

    def forward(self, x: Tensor) -> Tensor:
        """See `Kernel.forward`."""
        out = self.bare(x)
        ops.bias_relu_(out, self.bias)
        return out

    def linear(self, x: Tensor) -> Tensor:
        """See `Kernel.linear`."""
        return F.conv2d(x, self.weight, self.bias_16, padding=1)

    def backward(self, grad: Tensor) -> Tensor:
        """See `Kernel.backward`."""
        return self._autotuner(tuple(self.weight.shape[:2]), {"flipped": self.flipped, "dgrad": self.dgrad}, grad)

    def forward_pooled(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """See `Kernel.forward_pooled`."""
        return ops.bias_relu_pool(self.bare(x), self.bias)

    def bare(self, x: Tensor) -> Tensor:
        """The convolution without bias and ReLU."""
        return F.conv2d(x, self.weight, None, padding=1)

    def flipped(self, grad: Tensor) -> Tensor:
        """`backward` as a forward convolution."""
        return F.conv2d(grad, self.back, None, padding=1)

    def dgrad(self, grad: Tensor) -> Tensor:
        """`backward` by cuDNN's own kernels, which need the input only for its shape."""
        b, _, h, w = grad.shape
        like = torch.empty(
            (b, self.weight.shape[1], h, w), dtype=grad.dtype, device=grad.device, memory_format=CHANNELS_LAST
        )
        out: Tensor = torch.ops.aten.convolution_backward(
            grad, like, self.weight_back, None, ONES, ONES, ONES, False, [0, 0], 1, [True, False, False]
        )[0]
        return out


class Autotuner:
    """Runs the fastest of several kernels that compute the same result: the fastest one measured, else the first.

    Kernels are measured once for each ``key``, a layer's channels. The picture's size is not part of the key: pictures
    have any size, and a service cannot stop for seconds at each new one. For the same reason cuDNN's own search
    (`torch.backends.cudnn.benchmark`) is off, and its heuristics choose the kernels.
    """

    REPEATS = 5

    def __init__(self) -> None:
        self.measuring = False  # set only while the host may wait for the device, so never during a graph capture
        self.milliseconds: dict[Hashable, dict[str, float]] = {}  # by key and kernel

    def __call__(self, key: Hashable, kernels: dict[str, Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
        """The result of the fastest of ``kernels`` for ``x``.

        Raises `RuntimeError` if, while measuring, none can run.
        """
        times = self.milliseconds.get(key)
        if times is None and self.measuring:
            times = self.milliseconds[key] = {name: self.measure(kernel, x) for name, kernel in kernels.items()}
            if not any(math.isfinite(time) for time in times.values()):
                raise RuntimeError(f"this version of cuDNN has none of the kernels {', '.join(kernels)} for {key}")
        chosen = next(iter(kernels)) if times is None else min(times, key=times.__getitem__)
        return kernels[chosen](x)

    def measure(self, kernel: Callable[[Tensor], Tensor], x: Tensor) -> float:
        """Milliseconds of the fastest of `REPEATS` calls; infinite if this version of cuDNN has no such kernel."""
        try:
            for _ in range(2):  # cuDNN builds its plan in the first call
                kernel(x)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return math.inf
        best = math.inf
        for _ in range(self.REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            kernel(x)
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end))
        return best
