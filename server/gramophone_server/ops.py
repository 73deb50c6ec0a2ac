"""The project's torch operators, one function per op of csrc/ops.cpp: docstring, fake kernel, gradient.

Features are [B, C, H, W] activations, contiguous or channels_last, of float32, float16 or bfloat16 (float64 for checks of
gradients). Sums, losses, targets and differences are float32 (float64 for float64). Jobs of a batch never mix. A Gram
matrix, a target and a difference are symmetric [B, C, C]; symmetry is taken for granted. Arguments that break a contract
raise RuntimeError with a sentence that names the op, the contract and what came.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gramophone_server import _C
from gramophone_server.errors import StartupError

__all__ = [
    "build_info",
    "gram",
    "max_pool",
    "max_pool_bwd",
    "require_kernels",
    "style_bwd_",
    "style_fwd",
    "style_loss",
]

OPS = ("gram", "gram_bwd", "style_loss", "style_fwd", "style_bwd", "style_bwd_", "max_pool", "max_pool_bwd")


def build_info() -> dict[str, Any]:
    """What the extension was compiled with and for: `compiler`, `cuda`, `cuda_architectures`, `cpu_features`."""
    return dict(_C.build_info())


def require_kernels(device_type: str) -> None:
    """Raises `StartupError` unless every op has a kernel for "cpu" or "cuda"."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device_type]
    missing = [op for op in OPS if not torch._C._dispatch_has_kernel_for_dispatch_key(f"gramophone::{op}", key)]
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


def _sum_type(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _new_square(features: Tensor) -> Tensor:
    b, c = features.shape[:2]
    return features.new_empty(b, c, c, dtype=_sum_type(features))


@torch.library.register_fake("gramophone::gram")
def _(features: Tensor, scale: float) -> Tensor:
    return _new_square(features)


@torch.library.register_fake("gramophone::gram_bwd")
def _(grad: Tensor, features: Tensor, scale: float) -> Tensor:
    return torch.empty_like(features)


@torch.library.register_fake("gramophone::style_loss")
def _(features: Tensor, target: Tensor, weight: float, scale: float) -> tuple[Tensor, Tensor]:
    return target.new_empty(features.shape[0]), _new_square(features)


@torch.library.register_fake("gramophone::style_fwd")
def _(
    features: list[Tensor], targets: list[Tensor], weights: Tensor, scales: list[float]
) -> tuple[Tensor, list[Tensor]]:
    return torch.empty_like(weights), [_new_square(f) for f in features]


@torch.library.register_fake("gramophone::style_bwd")
def _(features: Tensor, diff: Tensor, grad_loss: Tensor | None) -> Tensor:
    return torch.empty_like(features)


@torch.library.register_fake("gramophone::style_bwd_")
def _(grad: Tensor, features: Tensor, diff: Tensor | None, relu_mask: bool) -> None:
    return None


@torch.library.register_fake("gramophone::max_pool")
def _(features: Tensor) -> Tensor:
    b, c, h, w = features.shape
    layout = (
        torch.channels_last if features.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    )
    return features.new_empty(b, c, h // 2, w // 2).contiguous(memory_format=layout)


@torch.library.register_fake("gramophone::max_pool_bwd")
def _(grad: Tensor, features: Tensor, pooled: Tensor, relu_mask: bool) -> Tensor:
    return torch.empty_like(features)


def _keep_gram(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    features, ctx.scale = inputs
    ctx.save_for_backward(features)


def _gram_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (features,) = ctx.saved_tensors
    return torch.ops.gramophone.gram_bwd.default(grad, features, ctx.scale), None


def _keep_style_loss(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, diff = output
    ctx.mark_non_differentiable(diff)
    ctx.save_for_backward(inputs[0], diff)


def _style_loss_backward(ctx: Any, grad_loss: Tensor, grad_diff: Tensor) -> tuple[Tensor, None, None, None]:
    features, diff = ctx.saved_tensors
    return torch.ops.gramophone.style_bwd.default(features, diff, grad_loss.contiguous()), None, None, None


def _keep_style_fwd(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    features, *_ = inputs
    _, diffs = output
    ctx.layers = len(features)
    ctx.save_for_backward(*features, *diffs)


def _style_fwd_backward(ctx: Any, grad_losses: Tensor, grad_diffs: Any) -> tuple[Any, Any, None, None]:
    features, diffs = ctx.saved_tensors[: ctx.layers], ctx.saved_tensors[ctx.layers :]
    grads = [
        torch.ops.gramophone.style_bwd.default(f, d, g.contiguous())
        for f, d, g in zip(features, diffs, grad_losses, strict=True)
    ]
    return grads, [None] * ctx.layers, None, None


def _max_pool_backward(ctx: Any, grad: Tensor) -> Tensor:
    features, pooled = ctx.saved_tensors
    return torch.ops.gramophone.max_pool_bwd.default(grad, features, pooled, False)


def _keep_max_pool(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0], output)


torch.library.register_autograd("gramophone::gram", _gram_backward, setup_context=_keep_gram)
torch.library.register_autograd("gramophone::style_loss", _style_loss_backward, setup_context=_keep_style_loss)
torch.library.register_autograd("gramophone::style_fwd", _style_fwd_backward, setup_context=_keep_style_fwd)
torch.library.register_autograd("gramophone::max_pool", _max_pool_backward, setup_context=_keep_max_pool)
