"""The way through the network and back, written by hand.

VGG is a line of convolutions, ReLUs and poolings with frozen weights, so there is no graph to build: the way there keeps
what the way back needs, and the way back walks the line in reverse and adds each layer's own gradient as it passes. An
iteration takes 0.34 to 0.44 of the textbook loop's time and about 0.75 of the same loop's in bfloat16 on a CPU without AMX
(benchmarks/RESULTS.md). Autograd is the reference in the tests.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from gramophone.recipe import Pooling
from gramophone_server import ops
from gramophone_server.vgg import Convolution, Vgg

__all__ = ["Chain", "Trace", "can_pack"]

# The weights behind a pooling were trained on maxima, which are larger than averages: by 1.2, 1.6, 1.4 and 2.0 (root mean
# square, the four poolings of the Oxford VGG-19 on three pictures). With this factor relu5_1 is 0.9 to 1.3 times the size
# that it has with maxima; with 2, which is right for independent values, it would be 3 to 4 times.
AVERAGE_GAIN = 1.5

ONES = [1, 1]


class _Packed:
    """One convolution in the form that the device runs fastest, there and back.

    The way back to the input of a 3x3 convolution with stride 1 is the same convolution with the kernels flipped and the
    channels exchanged, and as a forward convolution it can run on packed weights.
    """

    def __init__(self, convolution: Convolution, device: torch.device, dtype: torch.dtype, packed: bool) -> None:
        self.name = convolution.name
        self.pooled = convolution.pooled
        weight = convolution.weight.to(device, dtype).contiguous(memory_format=torch.channels_last)
        back = weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
        self.bias = convolution.bias.to(device, dtype)
        self.packed = packed
        self.weight, self.back = (_pack(weight), _pack(back)) if packed else (weight, back)

    def forward(self, x: Tensor, relu: bool) -> Tensor:
        if self.packed:
            return _packed_convolution(x, self.weight, self.bias, "relu" if relu else "none")
        out = F.conv2d(x, self.weight, self.bias, padding=1)
        return out.relu_() if relu else out

    def backward(self, grad: Tensor) -> Tensor:
        if self.packed:
            return _packed_convolution(grad, self.back, None, "none")
        return F.conv2d(grad, self.back, None, padding=1)


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
        w = _pack(torch.ones(8, 8, 3, 3).contiguous(memory_format=torch.channels_last))
        return bool(_packed_convolution(torch.ones(1, 8, 4, 4), w, None, "relu")[0, 0, 1, 1] == 72)
    except (AttributeError, RuntimeError):
        return False


@dataclass(eq=False)
class Trace:
    """What one pass left behind: activations [B, C, H, W] in the chain's type, channels_last."""

    pooling: Pooling
    after: dict[str, Tensor] = field(default_factory=dict)  # by convolution, behind its ReLU
    before: dict[str, Tensor] = field(default_factory=dict)  # in front of the ReLU, where someone asked
    pools: dict[str, Tensor] = field(default_factory=dict)  # the input of each convolution that has a pooling in front

    def __getitem__(self, layer: str) -> Tensor:
        """Activations of a layer such as "relu4_2" or "conv3_1"."""
        return (self.after if layer.startswith("relu") else self.before)[layer[4:]]


class Chain:
    """A network on a device, in one precision. Holds no state of a job, so all jobs share it."""

    def __init__(self, vgg: Vgg, device: torch.device, dtype: torch.dtype, *, packed: bool | None = None) -> None:
        self.device, self.dtype = device, dtype
        self.layers = vgg.layers
        packed = can_pack(device) if packed is None else packed
        self._line = [_Packed(c, device, dtype, packed) for c in vgg.convolutions]
        p = vgg.preprocessing
        self._order = list(p.channels)
        self._scale = torch.tensor([p.scale / s for s in p.std], device=device).view(1, 3, 1, 1)
        self._shift = torch.tensor([-m / s for m, s in zip(p.mean, p.std, strict=True)], device=device).view(1, 3, 1, 1)

    @torch.inference_mode()
    def forward(self, image: Tensor, layers: Collection[str], pooling: Pooling) -> Trace:
        """From ``image``, float32 [B, 3, H, W], RGB in [0, 1], to the deepest of ``layers``. H and W are at least 16."""
        trace = Trace(pooling)
        x = image[:, self._order] * self._scale + self._shift
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        deepest = max(self.layers.index(layer) for layer in layers)
        for convolution in self._line[: deepest // 2 + 1]:
            if convolution.pooled:
                x = trace.pools[convolution.name] = self._pool(x, pooling)
            if "conv" + convolution.name in layers:
                before = trace.before[convolution.name] = convolution.forward(x, relu=False)
                x = before.relu()
            else:
                x = convolution.forward(x, relu=True)
            trace.after[convolution.name] = x
        return trace

    @torch.inference_mode()
    def backward(self, trace: Trace, diffs: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> Tensor:
        """The gradient of the image, float32 [B, 3, H, W], from what the layers of a trace add to it.

        ``diffs`` by layer, [B, C, C]: its part is diff F, as `ops.style_bwd_` takes it. ``grads`` by layer, like the
        activations. A layer can have both.
        """
        touched = {*diffs, *grads}
        grad: Tensor | None = None
        masked = False  # the ReLU that grad has just reached is already in it
        names = list(trace.after)
        for i in reversed(range(len(names))):
            name, convolution = names[i], self._line[i]
            for layer, features in (("relu" + name, trace.after[name]), ("conv" + name, trace.before.get(name))):
                is_relu = layer.startswith("relu")
                if features is None or (grad is None and layer not in touched):
                    continue
                if layer in grads:
                    grad = grads[layer].clone() if grad is None else grad.add_(grads[layer])
                if grad is None:
                    grad = torch.zeros_like(features)
                if layer in diffs or (is_relu and not masked):
                    ops.style_bwd_(grad, features, diffs.get(layer), relu_mask=is_relu)
            masked = False
            if grad is None:
                continue
            grad = convolution.backward(grad)
            if convolution.pooled:
                below = trace.after[names[i - 1]]
                masked = trace.pooling is Pooling.MAX and "relu" + names[i - 1] not in touched
                grad = self._unpool(grad, below, trace.pools[name], trace.pooling, masked)
        assert grad is not None, "a trace ends at a layer that somebody asked for"
        back = torch.empty(grad.shape, dtype=torch.float32, device=self.device)
        back[:, self._order] = grad.float() * self._scale
        return back

    @staticmethod
    def _pool(x: Tensor, pooling: Pooling) -> Tensor:
        if pooling is Pooling.MAX:
            return ops.max_pool(x)
        return F.avg_pool2d(x, 2).mul_(AVERAGE_GAIN)

    @staticmethod
    def _unpool(grad: Tensor, features: Tensor, pooled: Tensor, pooling: Pooling, masked: bool) -> Tensor:
        if pooling is Pooling.MAX:
            return ops.max_pool_bwd(grad, features, pooled, masked)
        out: Tensor = torch.ops.aten.avg_pool2d_backward(
            grad * AVERAGE_GAIN, features, [2, 2], [2, 2], [0, 0], False, True, None
        )
        return out
