"""Registers the ops' meta kernels and gradients with torch. `functional` imports it.

A meta kernel computes the shape, type and layout of an op's results, for torch.compile and the meta device
(`engine.memory_estimate`). The ops that are useful with autograd have gradients; the engine does not use them.
"""

from typing import Any

import torch
from torch import Tensor

from gramophone_server import _C  # noqa: F401 - defines the ops

__all__: list[str] = []


def _sum_type(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _new_square(features: Tensor) -> Tensor:
    b, c = features.shape[:2]
    return features.new_empty(b, c, c, dtype=_sum_type(features))


def _new_difference(features: Tensor) -> Tensor:
    b, c = features.shape[:2]
    return features.new_empty(b, c, c, dtype=torch.bfloat16 if features.itemsize == 2 else features.dtype)


@torch.library.register_fake("gramophone::gram")
def _(features: Tensor, scale: float) -> Tensor:
    return _new_square(features)


@torch.library.register_fake("gramophone::gram_bwd")
def _(grad: Tensor, features: Tensor, scale: float) -> Tensor:
    return torch.empty_like(features)


@torch.library.register_fake("gramophone::style_loss")
def _(features: Tensor, target: Tensor, weight: float, scale: float) -> tuple[Tensor, Tensor]:
    return target.new_empty(features.shape[0]), _new_difference(features)


@torch.library.register_fake("gramophone::style_fwd")
def _(
    features: list[Tensor], targets: list[Tensor], weights: Tensor, scales: list[float], persistent: bool = False
) -> tuple[Tensor, list[Tensor]]:
    return torch.empty_like(weights), [_new_difference(f) for f in features]


@torch.library.register_fake("gramophone::style_bwd")
def _(features: Tensor, diff: Tensor, grad_loss: Tensor | None) -> Tensor:
    return torch.empty_like(features)


@torch.library.register_fake("gramophone::style_bwd_")
def _(grad: Tensor, features: Tensor, diff: Tensor | None, relu_mask: bool) -> None:
    return None


@torch.library.register_fake("gramophone::content_")
def _(grad: Tensor, features: Tensor, target: Tensor, weight: Tensor, relu_mask: bool) -> Tensor:
    return torch.empty_like(weight)


@torch.library.register_fake("gramophone::tv_")
def _(grad: Tensor, image: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(weight)


@torch.library.register_fake("gramophone::tv_check_finite_")
def _(*_: Any) -> None:
    return None


@torch.library.register_fake("gramophone::first_layer")
def _(image: Tensor, weight: Tensor, bias: Tensor, scale: list[float], shift: list[float], order: list[int]) -> Tensor:
    b, _, h, w = image.shape
    return weight.new_empty(b, weight.shape[0], h, w).contiguous(memory_format=torch.channels_last)


@torch.library.register_fake("gramophone::first_layer_bwd")
def _(grad: Tensor, weight: Tensor, scale: list[float], order: list[int]) -> Tensor:
    b, _, h, w = grad.shape
    return grad.new_empty(b, 3, h, w, dtype=torch.float32)


@torch.library.register_fake("gramophone::bias_relu_")
def _(features: Tensor, bias: Tensor) -> None:
    return None


@torch.library.register_fake("gramophone::bias_relu_pool")
def _(features: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    b, c, h, w = features.shape
    pooled = features.new_empty(b, c, h // 2, w // 2).contiguous(memory_format=torch.channels_last)
    return pooled, torch.empty_like(pooled, dtype=torch.uint8)


@torch.library.register_fake("gramophone::pool_codes_bwd")
def _(grad: Tensor, codes: Tensor, height: int, width: int) -> Tensor:
    b, c = grad.shape[:2]
    return grad.new_empty(b, c, height, width).contiguous(memory_format=torch.channels_last)


@torch.library.register_fake("gramophone::check_finite_")
def _(terms: Tensor, grad: Tensor, alive: Tensor, diverged_at: Tensor, count: Tensor) -> None:
    return None


@torch.library.register_fake("gramophone::descent_")
def _(*_: Any) -> None:
    return None


@torch.library.register_fake("gramophone::adam_")
def _(*_: Any) -> None:
    return None


@torch.library.register_fake("gramophone::lbfgs_")
def _(*_: Any) -> None:
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
    return torch.empty_like(features, dtype=grad.dtype)


def _save_gram(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    features, ctx.scale = inputs
    ctx.save_for_backward(features)


def _gram_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (features,) = ctx.saved_tensors
    return torch.ops.gramophone.gram_bwd.default(grad, features, ctx.scale), None


def _save_style_loss(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, diff = output
    ctx.mark_non_differentiable(diff)
    ctx.save_for_backward(inputs[0], diff)


def _style_loss_backward(ctx: Any, grad_loss: Tensor, grad_diff: Tensor) -> tuple[Tensor, None, None, None]:
    features, diff = ctx.saved_tensors
    return torch.ops.gramophone.style_bwd.default(features, diff, grad_loss.contiguous()), None, None, None


def _save_style_fwd(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    features, *_ = inputs
    _, diffs = output
    ctx.layers = len(features)
    ctx.save_for_backward(*features, *diffs)


def _style_fwd_backward(ctx: Any, grad_losses: Tensor, grad_diffs: Any) -> tuple[Any, Any, None, None, None]:
    features, diffs = ctx.saved_tensors[: ctx.layers], ctx.saved_tensors[ctx.layers :]
    grads = [
        torch.ops.gramophone.style_bwd.default(f, d, g.contiguous())
        for f, d, g in zip(features, diffs, grad_losses, strict=True)
    ]
    return grads, [None] * ctx.layers, None, None, None


def _max_pool_backward(ctx: Any, grad: Tensor) -> Tensor:
    features, pooled = ctx.saved_tensors
    return torch.ops.gramophone.max_pool_bwd.default(grad, features, pooled, False)


def _save_max_pool(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0], output)


torch.library.register_autograd("gramophone::gram", _gram_backward, setup_context=_save_gram)
torch.library.register_autograd("gramophone::style_loss", _style_loss_backward, setup_context=_save_style_loss)
torch.library.register_autograd("gramophone::style_fwd", _style_fwd_backward, setup_context=_save_style_fwd)
torch.library.register_autograd("gramophone::max_pool", _max_pool_backward, setup_context=_save_max_pool)
