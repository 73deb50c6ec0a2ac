"""The project's torch operators, with one function per op of csrc/schemas.cpp.

B is the number of jobs in a batch. No op mixes the jobs of a batch.

- Features are activations [B, C, H, W], contiguous or channels_last, of type float32, float16 or bfloat16. float64 is
  supported for gradient checks.
- Sums, losses and targets are float32, or float64 for float64 features.
- A gradient has the type of its features. For float16 features it can also be bfloat16, whose range needs no loss
  scale.
- A difference is float32, but bfloat16 for 16-bit features: bfloat16 has the range of float32, and its rounding error
  is far below the resolution of the gradient of 16-bit features.
- A Gram matrix, a target and a difference are symmetric [B, C, C]. Symmetry is not checked.
- Images are float32 [B, 3, H, W], contiguous, RGB in [0, 1].

Every op raises RuntimeError for arguments of a wrong shape, type, layout or device. The message names the op, the
requirement and the value found.

A function calls the kernel of its op, or for the ops in `by_library` the version of `library`, which checks no
arguments. `self_test.choose_kernels` fills `by_library`, before an engine calls any op.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gramophone_server import _C
from gramophone_server.errors import StartupError
from gramophone_server.ops import meta_registrations  # noqa: F401 - registers meta kernels and gradients

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
    "tv_check_finite_",
]

OPS = (
    *("gram", "gram_bwd", "style_loss", "style_fwd", "style_bwd", "style_bwd_", "content_", "tv_"),
    "tv_check_finite_",
    *("max_pool", "max_pool_bwd"),
    *("check_finite_", "descent_", "adam_", "lbfgs_"),
)
# Ops without a CPU kernel. On a CPU oneDNN's convolutions do the same in one pass.
CUDA_OPS = ("first_layer", "first_layer_bwd", "bias_relu_", "bias_relu_pool", "pool_codes_bwd")

# What this process calls instead of a kernel, by op: functions of `library`.
by_library: dict[str, Callable[..., Any]] = {}


def _op(name: str) -> Callable[..., Any]:
    return by_library.get(name) or getattr(torch.ops.gramophone, name).default


def build_info() -> dict[str, Any]:
    """The compiler and the targets of the extension, and the instruction sets of this CPU.

    The keys are ``compiler``, ``cuda`` (version, or None without CUDA), ``cuda_architectures`` and ``cpu_features``.
    """
    return dict(_C.build_info())


def require_kernels(device_type: str) -> None:
    """Raises `StartupError` unless every op has a kernel for "cpu" or "cuda"."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device_type]
    required = OPS + (CUDA_OPS if key == "CUDA" else ())
    missing = [op for op in required if not torch._C._dispatch_has_kernel_for_dispatch_key(f"gramophone::{op}", key)]
    if missing:
        raise StartupError(
            f"this build of gramophone has no {key} kernel for {', '.join(missing)}; run the server with --device cpu, "
            f"or rebuild it on a machine with the {key} toolkit"
        )


def gram(features: Tensor, scale: float) -> Tensor:
    """Gram matrices [B, C, C] = scale * F F^T of ``features`` F [B, C, H, W], summed over pixels."""
    return _op("gram")(features, scale)


def style_loss(features: Tensor, target: Tensor, weight: float, scale: float) -> tuple[Tensor, Tensor]:
    """Style term of one layer, for use with autograd.

    ``features`` F is [B, C, H, W], ``target`` [B, C, C]. Returns ``loss`` [B] = weight * sum (G - target)^2 with
    G = gram(features, scale), and ``diff`` [B, C, C] = 4 * weight * scale * (G - target), for which dloss/dF = diff F.
    Autograd computes no gradient through ``diff`` and none for ``target``.
    """
    return _op("style_loss")(features, target, weight, scale)


def style_fwd(
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Tensor,
    scales: Sequence[float],
    persistent: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """Style terms of all layers and jobs at once.

    ``features`` and ``targets`` are [B, C, H, W] and [B, C, C] per layer. ``weights`` [layers, B] is a tensor on the
    same device, so that it can change without a new CUDA graph. ``scales`` has one number per layer. Returns the losses
    [layers, B] and per layer the difference [B, C, C] for `style_bwd_`, as in `style_loss`. With ``persistent`` as many
    thread blocks as a GPU runs at once share the work, instead of one for each piece; the results are the same bits.
    """
    return _op("style_fwd")(list(features), list(targets), weights, list(scales), persistent)


def style_bwd_(grad: Tensor, features: Tensor, diff: Tensor | None, relu_mask: bool) -> None:
    """Adds the style gradient of one layer in place: grad <- grad + diff F, and 0 where F <= 0 if ``relu_mask``.

    ``features`` F is [B, C, H, W]. ``grad`` is dJ/dF from the layers above, in the type of ``features`` (or bfloat16
    for float16) and for speed also in their layout. ``diff`` [B, C, C] comes from `style_fwd`; None only applies the
    mask. With ``relu_mask`` the features are a ReLU's output, and grad becomes the gradient of the ReLU's input.
    """
    _op("style_bwd_")(grad, features, diff, relu_mask)


def max_pool(features: Tensor) -> Tensor:
    """Maximum of 2x2 windows with stride 2: [B, C, H, W] -> [B, C, H // 2, W // 2]. H and W are at least 2.

    The result has the type and layout of ``features``. NaN in a window is its maximum.
    """
    return _op("max_pool")(features)


def max_pool_bwd(grad: Tensor, features: Tensor, pooled: Tensor, relu_mask: bool) -> Tensor:
    """Gradient of `max_pool` with respect to its features, [B, C, H, W] in the type of ``grad``.

    ``grad`` has the shape of ``pooled`` = max_pool(features). Of equal maxima the first pixel gets the gradient. With
    ``relu_mask`` the features are a ReLU's output, and the result is the gradient of the ReLU's input.
    """
    return _op("max_pool_bwd")(grad, features, pooled, relu_mask)


def content_(grad: Tensor, features: Tensor, target: Tensor, weight: Tensor, relu_mask: bool) -> Tensor:
    """Content term of one layer: returns its loss and adds its gradient to ``grad`` in place.

    The loss is float32 [B] = weight * sum (F - T)^2. The gradient: grad <- grad + 2 * weight * (F - T), and 0 where F
    <= 0 if ``relu_mask``, as in `style_bwd_`. ``features`` F and ``target`` T are [B, C, H, W] of the same type and,
    for speed, the same layout; ``weight`` is float32 [B].
    """
    return _op("content_")(grad, features, target, weight, relu_mask)


def tv_(grad: Tensor, image: Tensor, weight: Tensor) -> Tensor:
    """Total variation of the images: returns its loss and adds its gradient to ``grad`` in place.

    The loss is float32 [B] = weight * (mean of squared differences along x + mean of squared differences along y).
    ``image`` and ``grad`` are float32 [B, 3, H, W] with H and W at least 2, ``weight`` is float32 [B].
    """
    return _op("tv_")(grad, image, weight)


def tv_check_finite_(
    grad: Tensor,
    image: Tensor,
    weight: Tensor,
    terms: Tensor,
    alive: Tensor,
    diverged_at: Tensor,
    count: Tensor,
) -> None:
    """`tv_`, whose loss becomes the last row of ``terms``, and then `check_finite_`, in one pass over ``grad``.

    All results are those of the two ops, bit for bit. ``terms``, float32 [T, B], has at least one row.
    """
    _op("tv_check_finite_")(grad, image, weight, terms, alive, diverged_at, count)


def first_layer(
    image: Tensor, weight: Tensor, bias: Tensor, scale: Sequence[float], shift: Sequence[float], order: Sequence[int]
) -> Tensor:
    """relu(conv1_1(x)) with x[c] = image[order[c]] * scale[c] + shift[c], in one pass. CUDA only.

    ``image`` is float32 [B, 3, H, W]. The zero padding is that of x, not of the image. ``weight`` is float16 or
    bfloat16 [64, 32]: column 3 * (3 * dy + dx) + c has tap (dy, dx) of colour c, and the last 5 columns are zeros.
    ``bias`` is float32 [64]. Returns [B, 64, H, W] in the type of ``weight``, channels_last.
    """
    return _op("first_layer")(image, weight, bias, list(scale), list(shift), list(order))


def first_layer_bwd(grad: Tensor, weight: Tensor, scale: Sequence[float], order: Sequence[int]) -> Tensor:
    """Gradient of the image, float32 [B, 3, H, W], from the gradient of conv1_1's output. CUDA only.

    ``grad`` is float16 or bfloat16 [B, 64, H, W], channels_last. ``weight``, ``scale`` and ``order`` are as in
    `first_layer`, with ``weight`` in the type of ``grad``.
    """
    return _op("first_layer_bwd")(grad, weight, list(scale), list(order))


def bias_relu_(features: Tensor, bias: Tensor) -> None:
    """features <- max(features + bias, 0), in place; NaN stays NaN. CUDA only.

    ``features`` is float16 or bfloat16 [B, C, H, W], channels_last, with C a multiple of 8. ``bias`` is float32 [C].
    """
    _op("bias_relu_")(features, bias)


def bias_relu_pool(features: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """max_pool(relu(features + bias)) in one pass, and a code for `pool_codes_bwd` per pooled value. CUDA only.

    Arguments are as in `bias_relu_`, with H and W at least 2. Both results are [B, C, H // 2, W // 2], channels_last. A
    code is a uint8: bits 0 and 1 are the number of the maximum among the four pixels, row by row, the first of equal
    ones; bit 2 is set if the maximum is above 0 or NaN.
    """
    return _op("bias_relu_pool")(features, bias)


def pool_codes_bwd(grad: Tensor, codes: Tensor, height: int, width: int) -> Tensor:
    """Gradient of `bias_relu_pool` with respect to its features. CUDA only.

    ``grad`` is the gradient of the pooled values, float16 or bfloat16, channels_last. ``codes`` come from
    `bias_relu_pool`; ``height`` and ``width`` are those of its features. Returns [B, C, height, width] in the type of
    ``grad``, channels_last.
    """
    return _op("pool_codes_bwd")(grad, codes, height, width)


def check_finite_(terms: Tensor, grad: Tensor, alive: Tensor, diverged_at: Tensor, count: Tensor) -> None:
    """Counts an evaluation and stops the jobs whose objective or gradient is not finite. Works in place and per job.

    ``terms`` [T, B] and ``grad`` [B, 3, H, W] are float32. ``count``, int64 [B], increases by one. If a job that is
    alive has a value that is not finite, its ``alive`` (bool [B]) becomes False and its ``diverged_at`` (int64 [B]) the
    new count.
    """
    _op("check_finite_")(terms, grad, alive, diverged_at, count)


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

    The rest is the same for all optimisers. The result is clamped to [0, 1]. For a job that is alive, ``last_good``
    becomes the image before the step; for any other job, the image becomes ``last_good``. ``mean``, if it is not None,
    becomes average * mean + (1 - average) * image with the new image. ``image``, ``last_good``, ``mean`` and ``grad``
    are float32 [B, 3, H, W] and contiguous, ``step`` is float32 [B], ``alive`` bool [B].
    """
    _op("descent_")(image, last_good, mean, grad, step, alive, average, normalised)


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
    """A step of Adam, in place, with the constants and the formula of `optimisers.Adam`. The rest is as in `descent_`.

    ``first`` and ``second`` are the running moments of the gradient, float32 [B, 3, H, W]. ``count``, int64 [B], is the
    number of gradients per job, including this one.
    """
    _op("adam_")(image, last_good, mean, first, second, grad, step, count, alive, average)


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
    """A step of L-BFGS, in place, with the constants and the rules of `optimisers.LBFGS`. The rest is as in `descent_`.

    The state of the last P = 10 pairs, all zeros before the first step:

    - ``history`` float32 [2, P, B, 3, H, W]: s, the differences of images, and y, the differences of their gradients.
      Pair number i is in slot i % P.
    - ``before`` float32 [B, 3, H, W]: the previous gradient, of the image ``last_good``.
    - ``products`` float64 [B, 2 P + 1, 2 P + 1]: inner products of s by slot, y by slot and the gradient.
    - ``inverse`` float64 [B, P]: 1 / s.y, or 0 for a pair that is not used.
    - ``scale`` float64 [B]: s.y / y.y of the newest pair that is used.
    - ``seen`` int64 [2, B]: the number of pairs, and the number of gradients since ``before`` was last reset. The first
      of these gradients forms no pair.
    """
    _op("lbfgs_")(image, last_good, mean, history, before, products, inverse, scale, seen, grad, step, alive, average)
