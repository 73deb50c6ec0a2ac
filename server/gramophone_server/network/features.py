"""The network's forward and backward pass, written by hand.

VGG is a chain of convolutions, ReLUs and poolings with frozen weights, so no autograd graph is built: the forward pass
keeps what the backward pass needs, and the backward pass walks the layers in reverse order and adds the gradient of
each layer's own loss terms as it passes. An iteration takes 0.34 to 0.44 of the textbook loop's time, and about 0.75 of
the same loop's in bfloat16, on a CPU without AMX (benchmarks/RESULTS.md). The tests compare it with autograd in
float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gramophone.recipe import Pooling
from gramophone_server import ops
from gramophone_server.network.convolutions import Autotuner, CuDnn, Kernel, Library, OneDnn, can_pack
from gramophone_server.network.first_layer import FirstLayer, Normalisation, first_layer
from gramophone_server.network.precision import Precision
from gramophone_server.network.tuning import DEFAULT_TUNING, Tuning
from gramophone_server.network.vgg import Convolution, Vgg

__all__ = ["MAX_FP16_ACTIVATION", "Activations", "VggFeatures", "probe_images"]

# The weights after a pooling were trained on maxima, which are larger than averages: by 1.2, 1.6, 1.4 and 2.0 (root
# mean square, the four poolings of the Oxford VGG-19 on three pictures). With this factor relu5_1 is 0.9 to 1.3 times
# the size that it has with maxima; with 2, which is right for independent values, it would be 3 to 4 times.
AVERAGE_GAIN = 1.5

# The largest activation that a layer may have on `probe_images` in float16, whose largest number is 65504. The Oxford
# VGG-19 reaches 17,000 on photos and 37,000 on hard-edged blocks (relu4_2), so its layers are kept at down to 1/16 of
# their size.
MAX_FP16_ACTIVATION = 4096.0


@dataclass(eq=False)
class Activations:
    """The results of one forward pass that the backward pass needs.

    They are tensors [B, C, H, W], channels_last, in the precision's forward type, by the name of their convolution
    ("3_1").
    """

    pooling: Pooling
    relu: dict[str, Tensor] = field(default_factory=dict)  # the layer's output, unless it is in `codes`
    conv: dict[str, Tensor] = field(default_factory=dict)  # before the ReLU, of the layers requested as "conv3_1"
    pooled: dict[str, Tensor] = field(default_factory=dict)  # the input of each convolution that follows a pooling
    codes: dict[str, Tensor] = field(default_factory=dict)  # instead of `relu`, where ReLU and pooling were one kernel
    # (height, width) of each convolution, in forward order.
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __getitem__(self, layer: str) -> Tensor:
        """Activations of a layer such as "relu4_2" or "conv3_1"."""
        return (self.relu if layer.startswith("relu") else self.conv)[layer[4:]]

    def free(self, name: str) -> None:
        """Releases the tensors of one convolution."""
        for kept in (self.relu, self.conv, self.pooled, self.codes):
            kept.pop(name, None)


class _Layer(NamedTuple):
    """One convolution on the device."""

    name: str  # "3_1"
    pooled: bool  # whether a 2x2 pooling precedes it
    kernel: Kernel


class VggFeatures:
    """A network on a device, in one precision. It holds no state of a job, so all jobs share it.

    In float16 each layer's activations are kept smaller than they are, by the power of two that `gain` returns:
    relu(s x) = s relu(x), so this changes nothing else. `forward` returns, and `backward` takes, values in these units.
    """

    def __init__(
        self,
        vgg: Vgg,
        device: torch.device,
        precision: Precision,
        *,
        kernel: str | None = None,
        tuning: Tuning = DEFAULT_TUNING,
    ) -> None:
        """``kernel`` of the convolutions: "onednn", "cudnn" or "library"; None for the device's fastest."""
        self.device, self.precision, self.tuning = device, precision, tuning
        self.kernel = kernel or _fastest_kernel(device, precision)
        self.layers = vgg.layers
        p = vgg.preprocessing
        scale, shift = [p.scale / s for s in p.std], [-m / s for m, s in zip(p.mean, p.std, strict=True)]
        self._normalisation = Normalisation(scale, shift, list(p.channels))
        self._gains = {c.name: 1.0 for c in vgg.convolutions}
        convolutions = vgg.convolutions
        if precision.forward == torch.float16 and device.type != "meta":
            self._gains = _gains(vgg, device, self._normalised)
            convolutions = _rescaled(convolutions, self._gains)
        self.autotuner = Autotuner()
        self._layers = [_Layer(c.name, c.pooled, self.make_kernel(c)) for c in convolutions]
        self._channels = {c.name: c.weight.shape[0] for c in convolutions}
        self._first_layer = self._make_first_layer(convolutions[0])
        if device.type == "cuda" and self.kernel == "cudnn":
            self._autotune()

    def gain(self, layer: str) -> float:
        """The power of two by which the activations of ``layer`` are kept smaller than the network's."""
        return self._gains[layer[4:]]

    def shape(self, layer: str, height: int, width: int) -> tuple[int, int, int]:
        """(channels, height, width) of a layer's activations for a picture of ``height`` x ``width`` px."""
        name = layer[4:]
        for other, pooled, _ in self._layers:
            if pooled:
                height, width = height // 2, width // 2
            if other == name:
                break
        return self._channels[name], height, width

    def make_kernel(self, convolution: Convolution) -> Kernel:
        """The convolution on the device; called once for each when the network is built."""
        if self.kernel == "onednn":
            return OneDnn(convolution, self.precision)
        # cuDNN's tensor cores and the 16-byte loads of our kernels need multiples of 8 channels.
        wide = all(n % 8 == 0 for n in convolution.weight.shape[:2])
        if self.kernel == "cudnn" and wide:
            return CuDnn(convolution, self.device, self.precision, self.autotuner, self.tuning)
        return Library(convolution, self.device, self.precision)

    def forward(self, image: Tensor, layers: Collection[str], pooling: Pooling) -> Activations:
        """Activations of ``layers`` and of all layers before the deepest of them.

        ``image``: float32 [B, 3, H, W], RGB in [0, 1]; H and W are at least 16.
        """
        activations = Activations(pooling)
        with torch.inference_mode():
            for _ in self.steps(image, layers, activations):
                pass
        return activations

    def steps(self, image: Tensor, layers: Collection[str], activations: Activations) -> Iterator[str]:
        """As `forward`, one convolution at a time: fills ``activations`` and yields the name of each convolution when
        it is done. The caller may then free the tensors of all earlier convolutions that it does not need. It computes
        in inference mode."""
        pooling, used = activations.pooling, self._used(layers)
        x = image
        for i, (name, pooled, kernel) in enumerate(used):
            if pooled and used[i - 1].name not in activations.codes:
                x = activations.pooled[name] = self._pool(x, pooling)
            activations.sizes[name] = (x.shape[2], x.shape[3])
            conv_requested, relu_requested = "conv" + name in layers, "relu" + name in layers
            if i == 0 and self._first_layer is not None and not conv_requested:
                x = activations.relu[name] = self._first_layer.forward(x)
            elif conv_requested:
                x = activations.conv[name] = kernel.linear(self._input(x) if i == 0 else x)
                x = activations.relu[name] = x.relu()
            else:
                x = self._input(x) if i == 0 else x
                fused = None
                if pooling is Pooling.MAX and i + 1 < len(used) and used[i + 1].pooled and not relu_requested:
                    fused = kernel.forward_pooled(x)
                if fused is not None:
                    x, activations.codes[name] = fused
                else:
                    x = activations.relu[name] = kernel.forward(x)
            yield name

    def costs(self, layers: Collection[str], height: int, width: int) -> list[float]:
        """The share of each convolution in the multiplications of a forward pass, in the order of `steps`."""
        costs, channels = [], 3
        for name, *_ in self._used(layers):
            out, h, w = self.shape("relu" + name, height, width)
            costs.append(float(channels * out * h * w))
            channels = out
        return [cost / sum(costs) for cost in costs]

    def _used(self, layers: Collection[str]) -> list[_Layer]:
        deepest = max(self.layers.index(layer) for layer in layers)
        return self._layers[: deepest // 2 + 1]

    def _input(self, image: Tensor) -> Tensor:
        """An image as the first convolution takes it."""
        return self._normalised(image).to(self.precision.forward).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def backward(
        self, activations: Activations, diffs: Mapping[str, Tensor], contents: Mapping[str, tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the image's gradient from the layers' loss terms, and the content losses [B] by layer.

        ``diffs``: by layer [B, C, C], for which the gradient of the style term is diff F, as in `ops.style_bwd_`.
        ``contents``: by layer its target and weight, as in `ops.content_`. A layer can have both terms. The gradient is
        float32 [B, 3, H, W]. Uses the activations up.
        """
        terms = _LossTerms(diffs, contents, self.precision.backward)
        grad: Tensor | None = None  # None until the deepest layer with a term is reached
        masked = False  # the unpooling has applied the mask of the ReLU before it
        for index in reversed(range(len(activations.sizes))):
            layer = self._layers[index]
            grad = self._through_relu(grad, layer.name, activations, terms, masked)
            masked = False
            if grad is None:
                continue
            if index == 0:
                break
            grad = layer.kernel.backward(grad)
            if layer.pooled:
                grad, masked = self._through_pooling(grad, index, activations, terms)
            # The memory of the deeper layers is reused for the gradients that follow.
            activations.free(layer.name)
        assert grad is not None, "the activations end at a layer that has a term"
        return self._to_image(grad), terms.content_losses

    @staticmethod
    def _through_relu(
        grad: Tensor | None, name: str, activations: Activations, terms: _LossTerms, masked: bool
    ) -> Tensor | None:
        """The gradient of a convolution's output from that of its layer's output, with the layer's own terms."""
        # ReLU and pooling were one kernel, so their backward is one, too; there are no terms.
        if name in activations.codes:
            if grad is None:
                return None
            return ops.pool_codes_bwd(grad, activations.codes[name], *activations.sizes[name])
        grad = terms.add("relu" + name, activations.relu[name], grad, relu_mask=not masked)
        if name in activations.conv:
            grad = terms.add("conv" + name, activations.conv[name], grad, relu_mask=False)
        return grad

    def _through_pooling(
        self, grad: Tensor, index: int, activations: Activations, terms: _LossTerms
    ) -> tuple[Tensor, bool]:
        """The gradient of a pooling's input from that of its output, and whether the ReLU before it is masked.

        The kernel for maxima can apply the ReLU's mask as well. It must not if the layer before has a term, which is
        added to the gradient before the mask.
        """
        name, before = self._layers[index].name, self._layers[index - 1].name
        if before in activations.codes:  # unpooled by `_through_relu`
            return grad, False
        features, pooled = activations.relu[before], activations.pooled[name]
        if activations.pooling is Pooling.MAX:
            relu_mask = "relu" + before not in terms
            return ops.max_pool_bwd(grad, features, pooled, relu_mask), relu_mask
        like = features if features.dtype == grad.dtype else torch.empty_like(features, dtype=grad.dtype)
        out: Tensor = torch.ops.aten.avg_pool2d_backward(
            grad * AVERAGE_GAIN, like, [2, 2], [2, 2], [0, 0], False, True, None
        )
        return out, False

    @torch.inference_mode()
    def _autotune(self) -> None:
        """Times the kernels of each layer in one forward and backward pass at 512 px; takes half a second."""
        self.autotuner.measuring = True
        activations = self.forward(torch.rand(1, 3, 512, 512, device=self.device), {"relu5_1"}, Pooling.MAX)
        deepest = activations["relu5_1"]
        weight = torch.ones(1, device=self.device)
        self.backward(activations, {}, {"relu5_1": (torch.zeros_like(deepest), weight)})
        self.autotuner.measuring = False

    def _to_image(self, grad: Tensor) -> Tensor:
        """The image's gradient from that of conv1_1's output."""
        if self._first_layer is not None:
            return self._first_layer.backward(grad)
        grad = self._layers[0].kernel.backward(grad).float()
        back = torch.empty(grad.shape, dtype=torch.float32, device=self.device)  # contiguous, like the image
        scale, _, order = self._normalisation
        for c, channel in enumerate(order):
            torch.mul(grad[:, c], scale[c], out=back[:, channel])
        return back

    def _normalised(self, image: Tensor) -> Tensor:
        scale, shift, order = self._normalisation
        channels = [image[:, c] * s + t for c, s, t in zip(order, scale, shift, strict=True)]
        return torch.stack(channels, 1)

    def _make_first_layer(self, convolution: Convolution) -> FirstLayer | None:
        if self.kernel != "cudnn" or convolution.weight.shape[0] != 64:
            return None
        return first_layer(convolution, self._normalisation, self.device, self.precision, self.tuning)

    @staticmethod
    def _pool(x: Tensor, pooling: Pooling) -> Tensor:
        if pooling is Pooling.MAX:
            return ops.max_pool(x)
        return F.avg_pool2d(x, 2).mul_(AVERAGE_GAIN)


class _LossTerms:
    """The loss terms of one backward pass, by layer ("relu3_1", "conv3_1")."""

    def __init__(
        self,
        diffs: Mapping[str, Tensor],
        contents: Mapping[str, tuple[Tensor, Tensor]],
        dtype: torch.dtype,
    ) -> None:
        """``diffs`` and ``contents`` as in `VggFeatures.backward`, ``dtype`` of the gradient."""
        self._diffs, self._contents, self._dtype = diffs, contents, dtype
        self.content_losses: dict[str, Tensor] = {}  # [B] by layer, of the layers passed so far

    def __contains__(self, layer: str) -> bool:
        return layer in self._diffs or layer in self._contents

    def add(self, layer: str, features: Tensor, grad: Tensor | None, *, relu_mask: bool) -> Tensor | None:
        """Adds the gradients of the layer's terms to ``grad``, in place, and returns it; None means zeros.

        With ``relu_mask`` the result is 0 where ``features``, the output of a ReLU, are 0. The mask comes after all
        terms, so the op of the last term applies it; without a term it takes an op of its own.
        """
        has_style, has_content = layer in self._diffs, layer in self._contents
        if grad is None:
            if not has_style and not has_content:
                return None
            grad = torch.zeros_like(features, dtype=self._dtype)
        if has_content:
            target, weight = self._contents[layer]
            content_mask = relu_mask and not has_style
            self.content_losses[layer] = ops.content_(grad, features, target, weight, relu_mask=content_mask)
        if has_style or (relu_mask and not has_content):
            ops.style_bwd_(grad, features, self._diffs.get(layer), relu_mask=relu_mask)
        return grad


def _fastest_kernel(device: torch.device, precision: Precision) -> str:
    if device.type == "cuda":
        return "cudnn" if precision.forward.itemsize == 2 else "library"
    # oneDNN packs float16 only for the few CPUs that compute in it.
    return "onednn" if can_pack(device) and precision.forward != torch.float16 else "library"


def probe_images(device: torch.device) -> Tensor:
    """Images that drive the layers to their largest values, float32 [3, 3, 256, 256] in [0, 1].

    They are black and white noise in blocks of 1 px and of 8 px, and rings.
    """
    generator = torch.Generator().manual_seed(0)
    noise, blocks = ((torch.rand(3, 256 // n, 256 // n, generator=generator) > 0.5).float() for n in (1, 8))
    blocks = F.interpolate(blocks[None], scale_factor=8)[0]
    y, x = torch.meshgrid(torch.arange(-128.0, 128.0), torch.arange(-128.0, 128.0), indexing="ij")
    rings = (torch.sin((x.square() + y.square()) / 200) > 0).float().expand(3, -1, -1)
    return torch.stack([noise, blocks, rings]).to(device)


@torch.inference_mode()
def _gains(vgg: Vgg, device: torch.device, normalised: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """By convolution, the power of two by which its activations are divided to stay below `MAX_FP16_ACTIVATION`."""
    gains = {}
    x = normalised(probe_images(device))
    for convolution in vgg.convolutions:
        if convolution.pooled:
            x = F.max_pool2d(x, 2)
        x = F.relu(F.conv2d(x, convolution.weight.to(device), convolution.bias.to(device), padding=1))
        gains[convolution.name] = 2.0 ** max(0, math.ceil(math.log2(max(float(x.max()), 1.0) / MAX_FP16_ACTIVATION)))
    return gains


def _rescaled(convolutions: tuple[Convolution, ...], gains: Mapping[str, float]) -> tuple[Convolution, ...]:
    """The same network with every layer's activations divided by its gain."""
    out, gain_before = [], 1.0
    for c in convolutions:
        gain = gains[c.name]
        out.append(replace(c, weight=c.weight * (gain_before / gain), bias=c.bias / gain))
        gain_before = gain
    return tuple(out)
