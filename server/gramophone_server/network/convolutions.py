"""One 3x3 convolution of the network, forward and backward, by the kernels that the device runs fastest.

The backward pass of a 3x3 convolution with stride 1, from the gradient of its output to that of its input, is the same
convolution with the weights flipped and the channels exchanged, so it can run on any kernel that is fast for the
forward pass. Activations are [B, C, H, W], channels_last.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gramophone_server import ops
from gramophone_server.network.precision import Precision
from gramophone_server.network.tuning import DEFAULT_TUNING, MEASURED, Tuning
from gramophone_server.network.vgg import Convolution

log = logging.getLogger(__name__)

__all__ = ["Autotuner", "CuDnn", "Kernel", "Library", "OneDnn", "can_pack", "find_fault"]
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
    """For a GPU, in 16 bits: cuDNN's convolution, and bias and ReLU in one of several forms, as `Tuning` has it.

    Forward:

        split   the bare convolution, then our own kernel for bias and ReLU
        biased  torch's convolution with a bias, then torch's ReLU. Released torch runs these as three kernels, which
                costs 8 bytes per activation more than one kernel (torch's ConvShared.cpp)
        fused   torch's cudnn_convolution_relu, one pass. It passes its uninitialised output to cuDNN as a summand of
                weight 0, so the result is NaN if that is read; its ReLU may hide NaN from the divergence check; and
                torch does not ask for kernels that give the same bits in every run

    Backward:

        flipped  a forward convolution with flipped weights
        dgrad    cuDNN's own gradient of the input
    """

    def __init__(
        self,
        convolution: Convolution,
        device: torch.device,
        precision: Precision,
        autotuner: Autotuner,
        tuning: Tuning = DEFAULT_TUNING,
    ) -> None:
        weight = convolution.weight.to(device)
        self.weight = weight.to(precision.forward).contiguous(memory_format=CHANNELS_LAST)
        self.weight_back = weight.to(precision.backward).contiguous(memory_format=CHANNELS_LAST)
        self.back = _flipped(weight, precision)
        self.bias = convolution.bias.to(device)
        self.bias_16 = self.bias.to(precision.forward)
        self._autotuner = autotuner
        self._forward = tuning.forward_form(convolution.name)
        self._backward = tuning.backward_form(convolution.name)

    def forward(self, x: Tensor) -> Tensor:
        """See `Kernel.forward`."""
        forms = {"split": self.split, "biased": self.biased, "fused": self.fused}
        return self._run("forward", self._forward, forms, x, self.exact)

    def linear(self, x: Tensor) -> Tensor:
        """See `Kernel.linear`."""
        return F.conv2d(x, self.weight, self.bias_16, padding=1)

    def backward(self, grad: Tensor) -> Tensor:
        """See `Kernel.backward`."""
        forms = {"flipped": self.flipped, "dgrad": self.dgrad}
        return self._run("backward", self._backward, forms, grad, self.exact_backward)

    def forward_pooled(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """See `Kernel.forward_pooled`."""
        return ops.bias_relu_pool(self.bare(x), self.bias)

    def bare(self, x: Tensor) -> Tensor:
        """The convolution without bias and ReLU."""
        return F.conv2d(x, self.weight, None, padding=1)

    def split(self, x: Tensor) -> Tensor:
        """`forward` with our kernel for bias and ReLU."""
        out = self.bare(x)
        ops.bias_relu_(out, self.bias)
        return out

    def biased(self, x: Tensor) -> Tensor:
        """`forward` with the library's bias and ReLU."""
        return self.linear(x).relu_()

    def fused(self, x: Tensor) -> Tensor:
        """`forward` in one pass of cuDNN."""
        out: Tensor = torch.ops.aten.cudnn_convolution_relu(x, self.weight, self.bias_16, ONES, ONES, ONES, 1)
        return out

    def exact(self, x: Tensor) -> Tensor:
        """`forward` by the library in float32. In tf32 it is as exact, because 16-bit operands fit into tf32."""
        return F.conv2d(x.float(), self.weight.float(), self.bias, padding=1).relu_()

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

    def exact_backward(self, grad: Tensor) -> Tensor:
        """`backward` by the library in float32."""
        return F.conv2d(grad.float(), self.back.float(), None, padding=1)

    def _run(
        self,
        way: str,
        form: str,
        forms: Mapping[str, Callable[[Tensor], Tensor]],
        x: Tensor,
        exact: Callable[[Tensor], Tensor],
    ) -> Tensor:
        if form == MEASURED:
            return self._autotuner((way, *self.weight.shape[:2]), forms, x, exact)
        return forms[form](x)


# The largest relative error that a measured kernel may have. Rounding its output to bfloat16 makes 0.002, a wrong or
# missing product far more than this.
MAX_ERROR = 0.01
SMALLEST = torch.finfo(torch.float32).tiny  # so that zeros, the result of a dead layer, can be right


class Autotuner:
    """Runs the fastest of several kernels that compute the same result: the fastest one measured, else the first.

    A kernel is measured only if its result is right; one that is not is logged and never runs again. Kernels are
    measured once for each ``key``, a layer's channels. The picture's size is not part of the key: pictures have any
    size, and a service cannot stop for seconds at each new one. For the same reason cuDNN's own search
    (`torch.backends.cudnn.benchmark`) is off, and its heuristics choose the kernels.
    """

    REPEATS = 5

    def __init__(self) -> None:
        self.measuring = False  # set only while the host may wait for the device, so never during a graph capture
        # By key and kernel; infinite for a kernel that this version of cuDNN lacks or whose result is wrong.
        self.milliseconds: dict[Hashable, dict[str, float]] = {}
        self.faults: dict[Hashable, dict[str, str]] = {}  # of the kernels that are not used, by key and kernel

    def __call__(
        self,
        key: Hashable,
        kernels: Mapping[str, Callable[[Tensor], Tensor]],
        x: Tensor,
        exact: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The result of the fastest of ``kernels`` for ``x``. ``exact`` computes it in float32.

        Raises `RuntimeError` if, while measuring, none can run.
        """
        times = self.milliseconds.get(key)
        if times is None and self.measuring:
            expected = exact(x)
            times = self.milliseconds[key] = {}
            for name, kernel in kernels.items():
                fault = find_fault(kernel, x, expected)
                times[name] = math.inf if fault else self.measure(kernel, x)
                if fault:
                    self.faults.setdefault(key, {})[name] = fault
                    log.warning("convolution kernel %s for %s is not used: it %s", name, key, fault)
            if not any(math.isfinite(time) for time in times.values()):
                raise RuntimeError(f"no kernel of {', '.join(kernels)} computes the convolution {key}; see the log")
        chosen = next(iter(kernels)) if times is None else min(times, key=times.__getitem__)
        return kernels[chosen](x)

    def measure(self, kernel: Callable[[Tensor], Tensor], x: Tensor) -> float:
        """Milliseconds of the fastest of `REPEATS` calls, after at least two others."""
        best = math.inf
        for _ in range(self.REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            kernel(x)
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end))
        return best


def find_fault(kernel: Callable[[Tensor], Tensor], x: Tensor, expected: Tensor) -> str:
    """What is wrong with a kernel, "" for nothing: it cannot run, its result is not ``expected`` (float32), or it hides
    a NaN in ``x``.

    Before each call the memory that its result will probably get is filled with NaN, so that a kernel that reads it
    before it writes it is found.
    """
    try:
        for _ in range(3):
            poison = torch.empty_like(expected, dtype=x.dtype).fill_(math.nan)
            del poison
            error = float((kernel(x).float() - expected).norm() / expected.norm().clamp_min(SMALLEST))
            if not error <= MAX_ERROR:
                return f"is {error:.1e} away from the convolution in float32, the bound is {MAX_ERROR:g}"
        broken = x.clone()
        broken[0, 0, 0, 0] = math.nan
        if not bool(kernel(broken).isnan().any()):
            return "hides NaN, so that a job that diverges would not be stopped"
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as failure:
        return f"cannot run: {str(failure).strip().splitlines()[0][:200]}"
    return ""
