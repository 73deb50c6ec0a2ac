"""The style op by layer: ours against torch, forward and backward, at a 512 px picture.

    python -m benchmarks.ops --device cpu --json FILE

`torch` is what the textbook loop does for a style layer: reshape, matmul, subtract, square, sum, autograd, and then the
backward pass of the ReLU. `ours` is style_fwd and style_bwd_, which includes that of the ReLU. Both ratios are against
the float32 row. The two are checked against each other before they are timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.measure import Row, interleaved, machine, print_table, write_json
from gramophone_server import ops

LAYERS = {"relu1_1": (64, 1), "relu2_1": (128, 2), "relu3_1": (256, 4), "relu4_1": (512, 8), "relu5_1": (512, 16)}
WEIGHT = 1e-3


def ours(features: Tensor, target: Tensor, upstream: Tensor, scale: float) -> Callable[[], Tensor]:
    """A function that calls style_fwd, then style_bwd_ with the ReLU mask, and returns the gradient."""
    weights, grad = torch.full((1, 1), WEIGHT, device=features.device), torch.empty_like(features)

    def call() -> Tensor:
        _, (diff,) = ops.style_fwd([features], [target], weights, [scale])
        grad.copy_(upstream)
        ops.style_bwd_(grad, features, diff, True)
        return grad

    return call


def eager(features: Tensor, target: Tensor, upstream: Tensor, scale: float) -> Callable[[], Tensor]:
    """A function that does the same with autograd."""
    leaf = features.clone().requires_grad_()

    def call() -> Tensor:
        rows = leaf.reshape(leaf.shape[1], -1)
        loss = WEIGHT * ((rows @ rows.T).float() * scale - target[0]).square().sum()
        (grad,) = torch.autograd.grad(loss, leaf)
        return torch.ops.aten.threshold_backward(grad + upstream, features, 0)  # type: ignore[no-any-return]

    return call


def main() -> None:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", type=int, default=512, help="side of the picture in pixels")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", help="file for the rows")
    arguments = parser.parse_args()

    rows: list[Row] = []
    device = arguments.device
    for layer, (channels, stride) in LAYERS.items():
        side = arguments.size // stride
        generator = torch.Generator().manual_seed(channels)
        features = torch.randn(1, channels, side, side, generator=generator).relu().to(device)
        upstream = torch.randn(features.shape, generator=generator).to(device)
        scale = 1 / side**2
        target = ops.gram(features, scale) * 1.5
        variants: dict[str, Callable[[], object]] = {}
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            f = features.to(dtype).contiguous(memory_format=torch.channels_last)
            up = upstream.to(dtype).contiguous(memory_format=torch.channels_last)
            mine, theirs = ours(f, target, up, scale), eager(f.contiguous(), target, up.contiguous(), scale)
            error = float((mine().float() - theirs().float()).norm() / theirs().float().norm())
            if error > (1e-4 if dtype is torch.float32 else 2e-2):
                raise SystemExit(f"{layer} {name}: ours and torch differ by {error:.1e}; nothing was timed")
            variants |= {f"ours_{name}": mine, f"eager_{name}": theirs}
        times = interleaved(variants, arguments.repeats, device, 5.0 if device == "cuda" else 0.0)
        rows += [
            {"name": name, "layer": layer, "size": arguments.size, "ms": ms, "ratio_vs_eager": ms / times["eager_fp32"]}
            for name, ms in times.items()
        ]
    print_table(f"style loss of one layer, forward and backward with the ReLU mask\n{machine(device)}", rows)
    write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
