"""The project's torch operators, one function per op of csrc/ops.cpp, with its contract.

Features are [B, C, H, W] activations, contiguous or channels_last, of float32, float16 or bfloat16 (float64 for checks of
gradients). Sums, losses and targets are float32 (float64 for float64). A gradient has the type of its features, or
bfloat16 where they are float16: its range needs no loss scale. A difference is float32 too, but bfloat16 for 16-bit
features: it has float32's range, and its rounding is far below what the gradient of 16-bit features resolves. Jobs of a
batch never mix. A Gram matrix, a target and a difference are symmetric [B, C, C]; symmetry is taken for granted. Arguments
that break a contract raise RuntimeError with a sentence that names the op, the contract and what came.

Images are float32 [B, 3, H, W], contiguous, RGB in [0, 1]; what has one entry per job is [B].
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gramophone_server import _C
from gramophone_server.errors import StartupError
from gramophone_server.ops import meta_registrations  # noqa: F401 - tells torch their shapes and gradients

__all__ = [
    "adam_",
    "bias_relu_",
    "bias_relu_pool",
    "build_info",
    "check_finite_",
    "content_",
    "descent_",
    "first_layer",
    "first_layer_bwd",
    "gram",
    "lbfgs_",
    "max_pool",
    "max_pool_bwd",
    "pool_codes_bwd",
    "require_kernels",
    "style_bwd_",
    "style_fwd",
    "style_loss",
    "tv_",
]

OPS = (
    *("gram", "gram_bwd", "style_loss", "style_fwd", "style_bwd", "style_bwd_", "content_", "tv_"),
    *("max_pool", "max_pool_bwd"),
    *("check_finite_", "descent_", "adam_", "lbfgs_"),
)
# What oneDNN has in its convolutions on a CPU.
CUDA_OPS = ("first_layer", "first_layer_bwd", "bias_relu_", "bias_relu_pool", "pool_codes_bwd")


def build_info() -> dict[str, Any]:
    """What the extension was compiled with and for: `compiler`, `cuda`, `cuda_architectures`, `cpu_features`."""
    return dict(_C.build_info())


def require_kernels(device_type: str) -> None:
    """Raises `StartupError` unless every op has a kernel for "cpu" or "cuda"."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device_type]
    wanted = OPS + (CUDA_OPS if key == "CUDA" else ())
    missing = [op for op in wanted if not torch._C._dispatch_has_kernel_for_dispatch_key(f"gramophone::{op}", key)]
    if missing:
        raise StartupError(
            f"this build of gramophone has no {key} kernel for {', '.join(missing)}; run the server with --device cpu, "
            f"or build it again where the {key} toolkit is installed"
        )


def gram(features: Tensor, scale: float) -> Tensor:
    """Gram matrices scale * F F^T of ``features`` [B, C, H, W] -> [B, C, C], summed over pixels."""
    return torch.ops.gramophone.gram.default(features, scale)


def style_loss(features: Tensor, target: Tensor, weight: float, scale: float) -> tuple[Tensor, Tensor]:
    """Style term of one layer, for use under autograd.

    Returns ``loss`` [B] = weight * sum (G - target)^2 with G = gram(features, scale), and ``diff`` [B, C, C] =
    4 * weight * scale * (G - target), for which dloss/dF = diff F. No gradient flows through ``diff`` or to ``target``.
    """
    return torch.ops.gramophone.style_loss.default(features, target, weight, scale)


def style_fwd(
    features: Sequence[Tensor], targets: Sequence[Tensor], weights: Tensor, scales: Sequence[float]
) -> tuple[Tensor, list[Tensor]]:
    """Style terms of all layers and jobs at once.

    ``features`` and ``targets``: per layer [B, C, H, W] and [B, C, C]. ``weights``: [layers, B] on the device, so that
    they can change without anything being built again. ``scales``: one per layer. Returns losses [layers, B] and, per
    layer, the difference that `style_bwd_` takes, as in `style_loss`.
    """
    return torch.ops.gramophone.style_fwd.default(list(features), list(targets), weights, list(scales))


def style_bwd_(grad: Tensor, features: Tensor, diff: Tensor | None, relu_mask: bool) -> None:
    """One layer's step of the way back, in place: grad <- (grad + diff F), and 0 where F <= 0 if ``relu_mask``.

    ``grad`` is dJ/dF [B, C, H, W] as it came from above, of the type and, for speed, the layout of ``features``.
    ``diff`` [B, C, C] comes from `style_fwd`; None only masks. With ``relu_mask``, features are a ReLU's output and grad
    becomes the gradient of its input.
    """
    torch.ops.gramophone.style_bwd_.default(grad, features, diff, relu_mask)


def max_pool(features: Tensor) -> Tensor:
    """2x2 maximum with stride 2: [B, C, H, W] -> [B, C, H // 2, W // 2]. H and W are at least 2."""
    return torch.ops.gramophone.max_pool.default(features)


def max_pool_bwd(grad: Tensor, features: Tensor, pooled: Tensor, relu_mask: bool) -> Tensor:
    """Gradient of `max_pool` from ``grad``, shaped like ``pooled`` = max_pool(features); ties go to the first pixel.

    With ``relu_mask``, ``features`` are a ReLU's output and the gradient is that of its input.
    """
    return torch.ops.gramophone.max_pool_bwd.default(grad, features, pooled, relu_mask)


def content_(grad: Tensor, features: Tensor, target: Tensor, weight: Tensor, relu_mask: bool) -> Tensor:
    """Content term of one layer: returns its loss [B] = weight * sum (F - T)^2, float32, and adds its gradient, in place:
    grad <- grad + 2 * weight * (F - T), and 0 where F <= 0 if ``relu_mask``, as in `style_bwd_`.

    ``features`` and ``target`` T are of one type and layout, ``weight`` is float32 [B].
    """
    return torch.ops.gramophone.content_.default(grad, features, target, weight, relu_mask)


def tv_(grad: Tensor, image: Tensor, weight: Tensor) -> Tensor:
    """Total variation: returns weight * (mean of squared differences along x + the same along y), [B], and adds its
    gradient to ``grad``, float32 like ``image``, in place. H and W are at least 2."""
    return torch.ops.gramophone.tv_.default(grad, image, weight)


def first_layer(
    image: Tensor, weight: Tensor, bias: Tensor, scale: Sequence[float], shift: Sequence[float], order: Sequence[int]
) -> Tensor:
    """relu(conv1_1(x)) with x[c] = image[order[c]] * scale[c] + shift[c], in one pass; zero padding of x, not of image.

    ``weight`` is float16 or bfloat16 [64, 32]: column 3 * (3 * dy + dx) + c of the 3x3 kernels, and 5 columns of zeros.
    ``bias`` is float32 [64]. Returns [B, 64, H, W] in the weight's type, channels_last. CUDA only.
    """
    return torch.ops.gramophone.first_layer.default(image, weight, bias, list(scale), list(shift), list(order))


def first_layer_bwd(grad: Tensor, weight: Tensor, scale: Sequence[float], order: Sequence[int]) -> Tensor:
    """The gradient of the image, float32 [B, 3, H, W], from that of conv1_1's output, [B, 64, H, W] in 16 bits and
    channels_last. ``weight`` as in `first_layer`, in the type of ``grad``. CUDA only."""
    return torch.ops.gramophone.first_layer_bwd.default(grad, weight, list(scale), list(order))


def bias_relu_(features: Tensor, bias: Tensor) -> None:
    """features <- max(features + bias, 0), in place; NaN stays NaN. ``features`` [B, C, H, W] in 16 bits, channels_last,
    C a multiple of 8; ``bias`` float32 [C]. CUDA only."""
    torch.ops.gramophone.bias_relu_.default(features, bias)


def bias_relu_pool(features: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """max_pool(relu(features + bias)) in one pass, and per pooled value a code of one byte, for `pool_codes_bwd`: bits 0
    and 1 say which of the four pixels it is (row by row, ties to the first), bit 2 that it is above 0 (or NaN).

    Arguments as in `bias_relu_`, H and W at least 2. Both results are [B, C, H // 2, W // 2], channels_last. CUDA only.
    """
    return torch.ops.gramophone.bias_relu_pool.default(features, bias)


def pool_codes_bwd(grad: Tensor, codes: Tensor, height: int, width: int) -> Tensor:
    """The gradient of a convolution's output from ``grad``, that of the pooled values, through pooling and ReLU.

    ``codes`` come from `bias_relu_pool`, ``height`` and ``width`` are its input's. Returns [B, C, height, width] like grad,
    channels_last. CUDA only.
    """
    return torch.ops.gramophone.pool_codes_bwd.default(grad, codes, height, width)


def check_finite_(terms: Tensor, grad: Tensor, alive: Tensor, diverged_at: Tensor, count: Tensor) -> None:
    """Counts an evaluation and stops the jobs whose objective or gradient is not finite, in place and per job.

    ``terms`` [T, B] and ``grad`` [B, 3, H, W] are float32. ``count`` int64 [B] goes up by one. Where an alive job has a
    value that is not finite, ``alive`` (bool [B]) becomes False and ``diverged_at`` (int64 [B]) the new count.
    """
    torch.ops.gramophone.check_finite_.default(terms, grad, alive, diverged_at, count)


def descent_(
    image: Tensor,
    last_good: Tensor,
    mean: Tensor | None,
    grad: Tensor,
    step: Tensor,
    alive: Tensor,
    average: float,
    normalised: bool,
) -> None:
    """A step of gradient descent, in place: image <- image - step * grad, or step * grad / rms(grad) if ``normalised``.

    What all steps share: the result is clamped to [0, 1]. A job that is not ``alive`` gets its ``last_good`` image
    instead; of one that is, ``last_good`` becomes the image before the step. ``mean``, if there is one, becomes
    average * mean + (1 - average) * image with the new image. Images, grad and mean are float32 [B, 3, H, W] and
    contiguous, ``step`` float32 [B], ``alive`` bool [B].
    """
    torch.ops.gramophone.descent_.default(image, last_good, mean, grad, step, alive, average, normalised)


def adam_(
    image: Tensor,
    last_good: Tensor,
    mean: Tensor | None,
    first: Tensor,
    second: Tensor,
    grad: Tensor,
    step: Tensor,
    count: Tensor,
    alive: Tensor,
    average: float,
) -> None:
    """A step of Adam, in place, with the constants and the formula of `optimisers.Adam`; the rest as in `descent_`.

    ``first`` and ``second`` are the running moments of the gradient, ``count`` int64 [B] the number of gradients that each
    job has seen, this one included.
    """
    torch.ops.gramophone.adam_.default(image, last_good, mean, first, second, grad, step, count, alive, average)


def lbfgs_(
    image: Tensor,
    last_good: Tensor,
    mean: Tensor | None,
    history: Tensor,
    before: Tensor,
    products: Tensor,
    inverse: Tensor,
    scale: Tensor,
    seen: Tensor,
    grad: Tensor,
    step: Tensor,
    alive: Tensor,
    average: float,
) -> None:
    """A step of L-BFGS, in place, with the constants and the decisions of `optimisers.LBFGS`; the rest as in `descent_`.

    The memory of the last P = 10 pairs; all of it zeros at first:

    - ``history`` float32 [2, P, B, 3, H, W]: s, the differences of pictures, and y, those of their gradients, in a ring:
      pair number i is in slot i % P.
    - ``before`` [B, 3, H, W]: the gradient before. The picture that it was of is ``last_good``.
    - ``products`` float64 [B, 2 P + 1, 2 P + 1]: dot products of s by slot, y by slot and the gradient.
    - ``inverse`` float64 [B, P]: 1 / s.y, or 0 for a pair that is left out. ``scale`` float64 [B]: s.y / y.y of the
      newest pair that is not.
    - ``seen`` int64 [2, B]: pairs, and gradients since ``before`` was last forgotten; the first of these forms no pair.
    """
    torch.ops.gramophone.lbfgs_.default(
        image, last_good, mean, history, before, products, inverse, scale, seen, grad, step, alive, average
    )
