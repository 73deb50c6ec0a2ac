"""conv1_1 on a GPU, with the normalisation of the image and the ReLU, by our own kernels or by cuDNN's.

Its three channels are too few for the tensor cores' tiles and its output is the largest of the network, so on a GPU it
differs from the other convolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gramophone_server import ops
from gramophone_server.network.precision import Precision
from gramophone_server.network.tuning import Tuning
from gramophone_server.network.vgg import Convolution

__all__ = ["FirstLayer", "Normalisation", "first_layer"]

PADDED = 8  # channels: tensor cores take multiples of 8


class Normalisation(NamedTuple):
    """The network's input from an image in [0, 1]: channel c is image[order[c]] * scale[c] + shift[c]."""

    scale: list[float]
    shift: list[float]
    order: list[int]


class FirstLayer(NamedTuple):
    """conv1_1 with everything around it."""

    # The layer's output after the ReLU, of an image, float32 [B, 3, H, W] in [0, 1].
    forward: Callable[[Tensor], Tensor]
    # The image's gradient, float32, from that of the convolution's output.
    backward: Callable[[Tensor], Tensor]


def first_layer(
    convolution: Convolution, normalisation: Normalisation, device: torch.device, precision: Precision, tuning: Tuning
) -> FirstLayer:
    """The first layer as ``tuning`` has it. ``convolution`` has 3 input and 64 output channels."""
    arguments = (convolution, normalisation, device, precision)
    forward = _Padded(*arguments).forward if tuning.padded_forward else _Own(*arguments).forward
    backward = _Padded(*arguments).backward if tuning.padded_backward else _Own(*arguments).backward
    return FirstLayer(forward, backward)


class _Own:
    """Our own kernels, one each way. For three channels the library's convolutions pad to 8 or more."""

    def __init__(
        self, convolution: Convolution, normalisation: Normalisation, device: torch.device, precision: Precision
    ) -> None:
        columns = convolution.weight.permute(0, 2, 3, 1).reshape(64, 27)  # [out, 3 * (3 * dy + dx) + channel]
        padded = F.pad(columns, (0, 5)).to(device)
        self.weight, self.back = padded.to(precision.forward), padded.to(precision.backward)
        self.bias = convolution.bias.to(device)
        self._normalisation = normalisation

    def forward(self, image: Tensor) -> Tensor:
        return ops.first_layer(image, self.weight, self.bias, *self._normalisation)

    def backward(self, grad: Tensor) -> Tensor:
        scale, _, order = self._normalisation
        return ops.first_layer_bwd(grad, self.back, scale, order)


class _Padded:
    """cuDNN's convolution, with image and weights padded to 8 channels.

    The channels are those of the image, so that its planes are normalised where they are: the weights are in the
    image's order instead.
    """

    def __init__(
        self, convolution: Convolution, normalisation: Normalisation, device: torch.device, precision: Precision
    ) -> None:
        channel = [normalisation.order.index(colour) for colour in range(3)]  # the network's channel of each colour
        weight = F.pad(convolution.weight[:, channel], (0, 0, 0, 0, 0, PADDED - 3)).to(device)
        back = weight.flip(2, 3).transpose(0, 1)
        self.weight = weight.to(precision.forward).contiguous(memory_format=torch.channels_last)
        self.back = back.to(precision.backward).contiguous(memory_format=torch.channels_last)
        self.bias = convolution.bias.to(device)
        scale, shift = torch.tensor([normalisation.scale, normalisation.shift], device=device)[:, channel]
        self._scale, self._shift = scale.view(1, 3, 1, 1), shift.view(1, 3, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        b, _, h, w = image.shape
        x = torch.empty(
            (b, PADDED, h, w), dtype=self.weight.dtype, device=image.device, memory_format=torch.channels_last
        ).zero_()
        torch.addcmul(self._shift, image, self._scale, out=x[:, :3])
        out = F.conv2d(x, self.weight, None, padding=1)
        ops.bias_relu_(out, self.bias)
        return out

    def backward(self, grad: Tensor) -> Tensor:
        padded = F.conv2d(grad, self.back, None, padding=1)
        b, _, h, w = grad.shape
        image_grad = torch.empty((b, 3, h, w), device=grad.device)
        return torch.mul(padded[:, :3], self._scale, out=image_grad)
