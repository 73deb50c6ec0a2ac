"""Calls every op with small shapes, for compute-sanitizer: python tests/gpu/small_shapes.py cuda style layers

Sides that are no multiples of a tile, all types, several jobs, one pixel. Prints "all small shapes ran" at the end, or
how many ran until the time was up: a tool that is killed reports nothing.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from gramophone.recipe import Optimiser
from gramophone_server import ops
from gramophone_server.engine.optimisers import Canvas, make_stepper

LAST = torch.channels_last
HALVES = (torch.float16, torch.bfloat16)
SIDES = ((1, 1), (2, 2), (5, 3), (17, 31))


class Time:
    """When to stop, and how many shapes ran until then."""

    until = float("inf")  # by `time.monotonic`
    is_up = False
    count = 0


def in_time(*axes: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """`itertools.product`, until the time is up."""
    for values in itertools.product(*axes):
        Time.is_up = Time.is_up or time.monotonic() > Time.until
        if Time.is_up:
            return
        Time.count += 1
        yield values


def back_type(dtype: torch.dtype, device: str) -> torch.dtype:
    """The type of a gradient. The CPU tests have no bfloat16 gradients of float16 features."""
    return torch.bfloat16 if dtype == torch.float16 and device == "cuda" else dtype


def style(device: str) -> None:
    for dtype, layout, (h, w), c in in_time(
        (*HALVES, torch.float32), (LAST, torch.contiguous_format), SIDES, (3, 8, 64, 128, 256, 512)
    ):
        features = torch.rand(2, c, h, w, device=device).to(dtype).contiguous(memory_format=layout)
        grad = torch.rand(2, c, h, w, device=device).to(back_type(dtype, device)).contiguous(memory_format=layout)
        target = ops.gram(features, 0.5)
        weights = torch.ones(1, 2, device=device)
        _, (diff,) = ops.style_fwd([features], [target], weights, [1.0])
        ops.style_bwd_(grad, features, diff, True)
        ops.style_bwd_(grad, features, None, True)
        ops.content_(grad, features, features.flip(0).contiguous(memory_format=layout), weights[0], True)
        ops.style_loss(features, target, 1.0, 1.0)
    features = [torch.rand(2, c, s, s, device=device).to(HALVES[0]).contiguous(memory_format=LAST) for c, s in SEVERAL]
    targets = [ops.gram(f, 1.0) for f in features]
    weights = torch.ones(len(features), 2, device=device)
    for persistent in (False, True):
        ops.style_fwd(features, targets, weights, [1.0] * len(features), persistent)


SEVERAL = ((64, 40), (128, 20), (256, 10), (512, 5), (512, 2))


def layers(device: str) -> None:
    for dtype, (h, w), c in in_time((*HALVES, torch.float32), SIDES[1:], (3, 8, 64)):
        features = torch.rand(2, c, h, w, device=device).to(dtype).contiguous(memory_format=LAST)
        pooled = ops.max_pool(features)
        ops.max_pool_bwd(pooled.to(back_type(dtype, device)), features, pooled, True)
    if device != "cuda":
        return  # the CPU has no kernels for the rest
    for dtype, (h, w), c in in_time(HALVES, SIDES[1:], (8, 64, 512)):
        features = torch.rand(2, c, h, w, device=device).to(dtype).contiguous(memory_format=LAST)
        bias = torch.rand(c, device=device)
        pooled, codes = ops.bias_relu_pool(features, bias)
        ops.pool_codes_bwd(pooled.to(torch.bfloat16), codes, h, w)
        ops.bias_relu_(features, bias)
    for dtype, (h, w) in in_time(HALVES, SIDES):
        weight, bias = torch.rand(64, 32, device=device).to(dtype), torch.rand(64, device=device)
        image = torch.rand(2, 3, h, w, device=device)
        ops.first_layer(image, weight, bias, [1.0, 2.0, 3.0], [0.1, 0.2, 0.3], [2, 1, 0])
        grad = torch.rand(2, 64, h, w, device=device).to(torch.bfloat16).contiguous(memory_format=LAST)
        ops.first_layer_bwd(grad, weight.bfloat16(), [1.0, 2.0, 3.0], [2, 1, 0])


def optimisers(device: str) -> None:
    for ((h, w),) in in_time((*SIDES[1:], (16, 65))):
        image, last, mean, grad = (torch.rand(3, 3, h, w, device=device) for _ in range(4))
        ops.tv_(grad, image, torch.ones(3, device=device))
        alive = torch.tensor([True, True, False], device=device)
        count, at = (torch.zeros(3, dtype=torch.int64, device=device) for _ in range(2))
        terms = torch.rand(7, 3, device=device)
        terms[2, 1] = torch.nan
        ops.check_finite_(terms, grad, alive, at, count)
        ops.tv_check_finite_(grad, image, torch.ones(3, device=device), terms, alive, at, count)
        for optimiser, average in itertools.product(Optimiser, (0.0, 0.9)):
            canvas = Canvas(
                image=image.clone(),
                last_good=last.clone(),
                mean=mean.clone() if average else None,
                average=average,
                step=torch.full((3,), 0.02, device=device),
                count=count,
                alive=alive,
                diverged_at=at,
            )
            stepper = make_stepper(optimiser, canvas)
            for _ in range(12):  # L-BFGS keeps ten pairs
                grad = torch.rand_like(grad)
                ops.check_finite_(terms, grad, alive, at, count)
                stepper.step_(grad)


FAMILIES = {"style": style, "layers": layers, "optimisers": optimisers}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", choices=["cuda", "cpu"])
    parser.add_argument("families", nargs="*", default=list(FAMILIES), help="style, layers, optimisers; all of them")
    parser.add_argument("--until", type=float, default=Time.until, help="when to stop, by Python's monotonic clock")
    arguments = parser.parse_args()
    Time.until = arguments.until
    for name in arguments.families:
        FAMILIES[name](arguments.device)
    if arguments.device == "cuda":
        torch.cuda.synchronize()
    print(f"the time was up after {Time.count} small shapes" if Time.is_up else "all small shapes ran")
