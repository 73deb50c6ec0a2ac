"""The way through the network and back, written by hand.

VGG is a line of convolutions, ReLUs and poolings with frozen weights, so there is no graph to build: the way there keeps
what the way back needs, and the way back walks the line in reverse and adds each layer's own gradient as it passes. An
iteration takes 0.34 to 0.44 of the textbook loop's time and about 0.75 of the same loop's in bfloat16 on a CPU without AMX
(benchmarks/RESULTS.md). Autograd is the reference in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gramophone.recipe import Pooling
from gramophone_server import ops
from gramophone_server.network.convolutions import CuDnn, Fastest, Form, Library, OneDnn, can_pack
from gramophone_server.network.precision import Precision
from gramophone_server.network.vgg import Convolution, Vgg

__all__ = ["Activations", "VggFeatures"]

# The weights behind a pooling were trained on maxima, which are larger than averages: by 1.2, 1.6, 1.4 and 2.0 (root mean
# square, the four poolings of the Oxford VGG-19 on three pictures). With this factor relu5_1 is 0.9 to 1.3 times the size
# that it has with maxima; with 2, which is right for independent values, it would be 3 to 4 times.
AVERAGE_GAIN = 1.5

# What the activations of a layer may reach on `_probes` in float16, whose end is 65504. The Oxford VGG-19 reaches 17,000
# on photos and 37,000 on hard-edged blocks (relu4_2), so its layers are kept at up to 1/16 of their size.
LARGEST_FP16 = 4096.0


@dataclass(eq=False)
class Activations:
    """What one pass left behind: activations [B, C, H, W] in the chain's type, channels_last."""

    pooling: Pooling
    after: dict[str, Tensor] = field(default_factory=dict)  # by convolution, behind its ReLU
    before: dict[str, Tensor] = field(default_factory=dict)  # in front of the ReLU, where someone asked
    pools: dict[str, Tensor] = field(default_factory=dict)  # the input of each convolution that has a pooling in front
    codes: dict[str, Tensor] = field(default_factory=dict)  # in place of `after`, of the convolutions pooled at once
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)  # (height, width) by convolution

    def __getitem__(self, layer: str) -> Tensor:
        """Activations of a layer such as "relu4_2" or "conv3_1"."""
        return (self.after if layer.startswith("relu") else self.before)[layer[4:]]


class VggFeatures:
    """A network on a device, in one precision. Holds no state of a job, so all jobs share it.

    In float16 the layers are kept smaller than they are, by powers of two that `gain` tells: relu(s x) = s relu(x), so
    that changes nothing else. What leaves the chain, or comes into it, is in kept units.
    """

    def __init__(self, vgg: Vgg, device: torch.device, precision: Precision, *, form: str | None = None) -> None:
        """``form`` of the convolutions: "onednn", "cudnn" or "library"; None for what the device runs fastest."""
        self.device, self.precision = device, precision
        self.form = form or _fastest_form(device, precision)
        self.layers = vgg.layers
        p = vgg.preprocessing
        self._order = list(p.channels)
        self._scale = [p.scale / s for s in p.std]
        self._shift = [-m / s for m, s in zip(p.mean, p.std, strict=True)]
        self._gains = {c.name: 1.0 for c in vgg.convolutions}
        convolutions = vgg.convolutions
        if precision.forward == torch.float16 and device.type != "meta":
            self._gains = _gains(vgg, device, self._normalised)
            convolutions = _rescaled(convolutions, self._gains)
        self.fastest = Fastest()  # the forms chosen on a GPU, for those who want to see them
        self._line = [(c.name, c.pooled, self._convolution(c)) for c in convolutions]
        self._channels = {c.name: c.weight.shape[0] for c in convolutions}
        self._edge = self._first_layer(convolutions[0])
        if device.type == "cuda" and self.form == "cudnn":
            self._compare_forms()

    def gain(self, layer: str) -> float:
        """How many times smaller than the network's the activations of ``layer`` are kept: a power of two."""
        return self._gains[layer[4:]]

    def shape(self, layer: str, height: int, width: int) -> tuple[int, int, int]:
        """(channels, height, width) of a layer's activations for a picture of ``height`` x ``width``."""
        name = layer[4:]
        for other, pooled, _ in self._line:
            if pooled:
                height, width = height // 2, width // 2
            if other == name:
                break
        return self._channels[name], height, width

    @torch.inference_mode()
    def forward(self, image: Tensor, layers: Collection[str], pooling: Pooling) -> Activations:
        """From ``image``, float32 [B, 3, H, W], RGB in [0, 1], to the deepest of ``layers``. H and W are at least 16."""
        trace = Activations(pooling)
        deepest = max(self.layers.index(layer) for layer in layers)
        line = self._line[: deepest // 2 + 1]
        x = image
        for i, (name, pooled, form) in enumerate(line):
            if pooled and line[i - 1][0] not in trace.codes:
                x = trace.pools[name] = self._pool(x, pooling)
            trace.sizes[name] = (x.shape[2], x.shape[3])
            wanted = "conv" + name in layers, "relu" + name in layers
            if i == 0 and self._edge is not None and not wanted[0]:
                x = trace.after[name] = self._edge.forward(x)
                continue
            if i == 0:
                x = self._normalised(x).to(self.precision.forward).contiguous(memory_format=torch.channels_last)
            if wanted[0]:
                trace.before[name] = form.linear(x)
                x = trace.after[name] = trace.before[name].relu()
                continue
            if pooling is Pooling.MAX and i + 1 < len(line) and line[i + 1][1] and not wanted[1]:
                at_once = form.forward_pooled(x)
                if at_once is not None:
                    x, trace.codes[name] = at_once
                    continue
            x = trace.after[name] = form.forward(x)
        return trace

    @torch.inference_mode()
    def backward(
        self, trace: Activations, diffs: Mapping[str, Tensor], contents: Mapping[str, tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient of the image, float32 [B, 3, H, W], from what the layers of a trace add to it.

        ``diffs`` by layer, [B, C, C]: its part is diff F, as `ops.style_bwd_` takes it. ``contents`` by layer: target and
        weight, as `ops.content_` takes them; the losses [B] that it returns come second. A layer can have both. The trace
        is used up.
        """
        losses: dict[str, Tensor] = {}
        grad: Tensor | None = None
        masked = False  # the ReLU that grad has just reached is already in it
        for i in reversed(range(len(trace.sizes))):
            name, pooled, form = self._line[i]
            if name in trace.codes:
                if grad is not None:
                    grad = ops.pool_codes_bwd(grad, trace.codes[name], *trace.sizes[name])
            else:
                for layer, features in (("relu" + name, trace.after[name]), ("conv" + name, trace.before.get(name))):
                    touched = layer in diffs or layer in contents
                    if features is None or (grad is None and not touched):
                        continue
                    if grad is None:
                        grad = torch.zeros_like(features, dtype=self.precision.backward)
                    mask = layer.startswith("relu") and not masked
                    if layer in contents:
                        last = layer not in diffs
                        losses[layer] = ops.content_(grad, features, *contents[layer], relu_mask=mask and last)
                    if layer in diffs or (mask and layer not in contents):
                        ops.style_bwd_(grad, features, diffs.get(layer), relu_mask=mask)
            masked = False
            if grad is None:
                continue
            if i == 0:
                break
            grad = form.backward(grad)
            if pooled and (below := trace.after.get(self._line[i - 1][0])) is not None:
                lower = "relu" + self._line[i - 1][0]
                masked = trace.pooling is Pooling.MAX and lower not in diffs and lower not in contents
                grad = self._unpool(grad, below, trace.pools[name], trace.pooling, masked)
            # What lies deeper is needed no more, and its memory is what the next gradients go into.
            for kept in (trace.after, trace.before, trace.pools, trace.codes):
                kept.pop(name, None)
        assert grad is not None, "a trace ends at a layer that somebody asked for"
        return self._to_image(grad), losses

    @torch.inference_mode()
    def _compare_forms(self) -> None:
        """One way there and back at 512 px, each form of each layer timed; half a second."""
        self.fastest.comparing = True
        trace = self.forward(torch.rand(1, 3, 512, 512, device=self.device), {"relu5_1"}, Pooling.MAX)
        deepest = trace["relu5_1"]
        weight = torch.ones(1, device=self.device)
        self.backward(trace, {}, {"relu5_1": (torch.zeros_like(deepest), weight)})
        self.fastest.comparing = False

    def _to_image(self, grad: Tensor) -> Tensor:
        """The image's gradient from that of conv1_1's output."""
        if self._edge is not None:
            return self._edge.backward(grad)
        grad = self._line[0][2].backward(grad).float()
        back = torch.empty(grad.shape, dtype=torch.float32, device=self.device)  # contiguous, like the image
        for c, channel in enumerate(self._order):
            torch.mul(grad[:, c], self._scale[c], out=back[:, channel])
        return back

    def _normalised(self, image: Tensor) -> Tensor:
        channels = [image[:, c] * s + t for c, s, t in zip(self._order, self._scale, self._shift, strict=True)]
        return torch.stack(channels, 1)

    def _convolution(self, convolution: Convolution) -> Form:
        if self.form == "onednn":
            return OneDnn(convolution, self.precision)
        wide = all(n % 8 == 0 for n in convolution.weight.shape[:2])  # cuDNN's tensor cores, and 16 bytes in our passes
        if self.form == "cudnn" and wide:
            return CuDnn(convolution, self.device, self.precision, self.fastest)
        return Library(convolution, self.device, self.precision)

    def _first_layer(self, convolution: Convolution) -> _FirstLayer | None:
        if self.form != "cudnn" or convolution.weight.shape[0] != 64:
            return None
        return _FirstLayer(convolution, self.device, self.precision, self._scale, self._shift, self._order)

    @staticmethod
    def _pool(x: Tensor, pooling: Pooling) -> Tensor:
        if pooling is Pooling.MAX:
            return ops.max_pool(x)
        return F.avg_pool2d(x, 2).mul_(AVERAGE_GAIN)

    @staticmethod
    def _unpool(grad: Tensor, features: Tensor, pooled: Tensor, pooling: Pooling, masked: bool) -> Tensor:
        if pooling is Pooling.MAX:
            return ops.max_pool_bwd(grad, features, pooled, masked)
        like = features if features.dtype == grad.dtype else torch.empty_like(features, dtype=grad.dtype)
        out: Tensor = torch.ops.aten.avg_pool2d_backward(
            grad * AVERAGE_GAIN, like, [2, 2], [2, 2], [0, 0], False, True, None
        )
        return out


def _fastest_form(device: torch.device, precision: Precision) -> str:
    if device.type == "cuda":
        return "cudnn" if precision.forward.itemsize == 2 else "library"
    # oneDNN packs float16 only for the few CPUs that compute in it.
    return "onednn" if can_pack(device) and precision.forward != torch.float16 else "library"


class _FirstLayer:
    """conv1_1 between the image and its 64 maps, with the normalisation, in one pass each way.

    For three channels the library's convolutions pad to 8 or more, and their output is the largest of the network.
    """

    def __init__(
        self,
        convolution: Convolution,
        device: torch.device,
        precision: Precision,
        scale: list[float],
        shift: list[float],
        order: list[int],
    ) -> None:
        columns = convolution.weight.permute(0, 2, 3, 1).reshape(64, 27)  # [out, 3 * (3 * dy + dx) + channel]
        padded = F.pad(columns, (0, 5)).to(device)
        self.weight, self.back = padded.to(precision.forward), padded.to(precision.backward)
        self.bias = convolution.bias.to(device)
        self._scale, self._shift, self._order = scale, shift, order

    def forward(self, image: Tensor) -> Tensor:
        return ops.first_layer(image, self.weight, self.bias, self._scale, self._shift, self._order)

    def backward(self, grad: Tensor) -> Tensor:
        return ops.first_layer_bwd(grad, self.back, self._scale, self._order)


def _probes(device: torch.device) -> Tensor:
    """Pictures that drive the layers to their largest values: black and white noise in blocks of 1 and 8 px, and rings."""
    generator = torch.Generator().manual_seed(0)
    noise, blocks = ((torch.rand(3, 256 // n, 256 // n, generator=generator) > 0.5).float() for n in (1, 8))
    blocks = F.interpolate(blocks[None], scale_factor=8)[0]
    y, x = torch.meshgrid(torch.arange(-128.0, 128.0), torch.arange(-128.0, 128.0), indexing="ij")
    rings = (torch.sin((x.square() + y.square()) / 200) > 0).float().expand(3, -1, -1)
    return torch.stack([noise, blocks, rings]).to(device)


@torch.inference_mode()
def _gains(vgg: Vgg, device: torch.device, normalised: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Per convolution, the power of two that its activations are divided by to stay under `LARGEST_FP16`."""
    gains = {}
    x = normalised(_probes(device))
    for convolution in vgg.convolutions:
        if convolution.pooled:
            x = F.max_pool2d(x, 2)
        x = F.relu(F.conv2d(x, convolution.weight.to(device), convolution.bias.to(device), padding=1))
        gains[convolution.name] = 2.0 ** max(0, math.ceil(math.log2(max(float(x.max()), 1.0) / LARGEST_FP16)))
    return gains


def _rescaled(convolutions: tuple[Convolution, ...], gains: Mapping[str, float]) -> tuple[Convolution, ...]:
    """The same network with every layer's activations divided by its gain."""
    out, below = [], 1.0
    for c in convolutions:
        gain = gains[c.name]
        out.append(replace(c, weight=c.weight * (below / gain), bias=c.bias / gain))
        below = gain
    return tuple(out)
