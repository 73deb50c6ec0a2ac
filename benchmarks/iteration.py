"""One iteration: ours against the textbook PyTorch loop with the same weights, layers and objective.

    python -m benchmarks.iteration --device cpu --sizes 256,512 --json FILE

On a GPU, `python -m benchmarks.gpu.check --only ceilings,iteration` has more variants.

`eager_fp32` is the loop of tutorials: nn.functional, float32, channels first, autograd, torch.optim.Adam.
`autograd_bf16` is the same in bfloat16 and channels_last, the best that a few lines can do. `ours` is the server's
engine in its automatic precision, `ours_fp32` the same in float32. Square pictures, batch 1, Adam step included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import MAX_CALLS, Row, Switches, interleaved, machine, print_table, write_json
from gramophone.recipe import Recipe
from gramophone_server.domain.job import StyleJob
from gramophone_server.engine.engine import VggEngine
from gramophone_server.network.precision import choose_precision
from gramophone_server.network.vgg import Vgg, load_vgg

STYLE = {"1_1", "2_1", "3_1", "4_1", "5_1"}
CONTENT = "4_2"
PROFILED = 3  # steps
# torch's defaults, which the engine changes.
TORCHS_OWN = Switches(benchmark=False, conv_tf32=True, matmul_tf32=False)


def textbook_loss(
    vgg: Vgg, content: Tensor, style: Tensor, dtype: torch.dtype, layout: torch.memory_format
) -> Callable[[Tensor], Tensor]:
    """The textbook's objective as a function of images [B, 3, H, W] in [0, 1]; content and style have the same
    shape."""
    device = content.device
    layers = [
        (c, c.weight.to(device, dtype).contiguous(memory_format=layout), c.bias.to(device, dtype))
        for c in vgg.convolutions
    ]
    mean = torch.tensor(vgg.preprocessing.mean, device=device).view(1, 3, 1, 1)
    channels, scale = list(vgg.preprocessing.channels), vgg.preprocessing.scale

    def features(image: Tensor) -> dict[str, Tensor]:
        x = (image[:, channels] * scale - mean).to(dtype).contiguous(memory_format=layout)
        found = {}
        for c, weight, bias in layers:
            if c.pooled:
                x = F.max_pool2d(x, 2)
            x = found[c.name] = F.relu(F.conv2d(x, weight, bias, padding=1))
            if c.name == "5_1":
                break
        return found

    def gram(f: Tensor) -> Tensor:
        rows = f.flatten(2)
        return torch.bmm(rows, rows.mT).float() / rows.shape[2]

    def each(x: Tensor) -> Tensor:
        return x.square().flatten(1).sum(1)

    with torch.no_grad():
        kept = features(content)[CONTENT].float()
        targets = {name: gram(f) for name, f in features(style).items() if name in STYLE}
        kept_norm, norms = each(kept), {name: each(target) for name, target in targets.items()}

    def loss(image: Tensor) -> Tensor:
        found = features(image)
        total = (each(found[CONTENT].float() - kept) / kept_norm).sum()
        for name, target in targets.items():
            total = total + 3 * (each(gram(found[name]) - target) / norms[name]).sum()
        total = total + len(image) * (image[..., 1:] - image[..., :-1]).square().mean()
        return total + len(image) * (image[..., 1:, :] - image[..., :-1, :]).square().mean()

    return loss


def textbook_step(loss: Callable[[Tensor], Tensor], content: Tensor) -> Callable[[], Tensor]:
    """A function that makes a step of the textbook loop and returns the loss before it."""
    image = content.clone().requires_grad_()
    adam = torch.optim.Adam([image], lr=0.02)

    def step() -> Tensor:
        adam.zero_grad()
        value = loss(image)
        value.backward()  # type: ignore[no-untyped-call]
        adam.step()
        with torch.no_grad():
            image.clamp_(0, 1)
        return value.detach()

    return step


def textbook(
    vgg: Vgg, content: Tensor, style: Tensor, dtype: torch.dtype, layout: torch.memory_format
) -> Callable[[], object]:
    """A function that makes a step of the textbook loop on images [B, 3, H, W] in [0, 1], with torch's default
    switches."""
    with TORCHS_OWN:
        step = textbook_step(textbook_loss(vgg, content, style, dtype, layout), content)
    return TORCHS_OWN.around(step)


def jobs(content: Tensor, style: Tensor, recipe: Recipe) -> list[StyleJob]:
    """A job for each of the pictures [B, 3, H, W] in [0, 1]."""
    return [
        StyleJob(
            recipe=recipe,
            content=(one * 255).round().to("cpu", torch.uint8),
            styles=((other * 255).round().to("cpu", torch.uint8),),
            style_weights=(1.0,),
            start=None,
            seed=0,
        )
        for one, other in zip(content, style, strict=True)
    ]


def ours(vgg: Vgg, content: Tensor, style: Tensor, precision: str, iterations: int) -> Callable[[], object]:
    """A function that makes a step of the engine on the same images; it can be called ``iterations`` times."""
    recipe = Recipe(size=content.shape[3], smallest_size=0, iterations=iterations)
    engine = VggEngine(vgg, content.device, choose_precision(precision, content.device))
    tf32 = precision == "tf32"
    switches = Switches(benchmark=False, conv_tf32=tf32, matmul_tf32=tf32, deterministic=True)
    return switches.around(engine.run_batch(jobs(content, style, recipe)).advance)


def profiled(step: Callable[[], object]) -> list[Row]:
    """The five ops that take most of the time of a step, each with its share of the time of all ops."""
    with torch.profiler.profile() as profile:
        for _ in range(PROFILED):
            step()
    ops = sorted(profile.key_averages(), key=lambda op: op.self_cpu_time_total, reverse=True)
    total = sum(op.self_cpu_time_total for op in ops)
    return [{"op": op.key, "share": op.self_cpu_time_total / total} for op in ops[:5]]


def main() -> None:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sizes", default="256,512", help="sides in pixels, with commas")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="also print the ops that take most of our iteration")
    parser.add_argument("--json", help="file for the rows")
    arguments = parser.parse_args()

    device = torch.device(arguments.device)
    vgg = load_vgg("embedded")
    best = choose_precision("auto", device).name
    calls = 2 + arguments.repeats * MAX_CALLS if device.type == "cuda" else 1 + arguments.repeats
    iterations = calls + PROFILED * arguments.profile
    rows: list[Row] = []
    shares: list[Row] = []
    for size in map(int, arguments.sizes.split(",")):
        generator = torch.Generator().manual_seed(size)
        content, style = (torch.rand(1, 3, size // 8, size // 8, generator=generator) for _ in range(2))
        content, style = (
            F.interpolate(x, (size, size), mode="bicubic").clamp(0, 1).to(device) for x in (content, style)
        )
        first, last = torch.contiguous_format, torch.channels_last
        variants: dict[str, Callable[[], object]] = {
            "ours": ours(vgg, content, style, best, iterations),
            "ours_fp32": ours(vgg, content, style, "fp32", iterations),
            "eager_fp32": textbook(vgg, content, style, torch.float32, first),
            "autograd_bf16": textbook(vgg, content, style, torch.bfloat16, last),
        }
        times = interleaved(variants, arguments.repeats, device.type, 20.0 if device.type == "cuda" else 0.0)
        rows += [
            {"name": name, "size": size, "ms": ms, "ratio_vs_eager": ms / times["eager_fp32"]}
            for name, ms in times.items()
        ]
        if arguments.profile:
            for name in ("ours", "ours_fp32"):
                shares += [{"name": name, "size": size, **row} for row in profiled(variants[name])]
    print_table(f"one iteration, ours in {best}\n{machine(device.type)}", rows)
    if shares:
        print_table("the ops that take most of it", shares)
    write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
