"""Kernels in the GPU check: the machine's ceilings, the kernels of each convolution, and our style op against torch."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.network import Shape, random_vgg, shapes
from benchmarks.gpu.section import Section
from benchmarks.measure import Switches, captured, milliseconds
from gramophone_server import ops
from gramophone_server.network.convolutions import Autotuner, CuDnn
from gramophone_server.network.precision import MODES
from gramophone_server.network.vgg import OXFORD, Convolution

__all__ = ["brief_ceilings", "ceilings", "convolutions", "style_op"]

LAST = torch.channels_last
Kernels = dict[str, Callable[[], object]]  # calls by name


# Ceilings -------------------------------------------------------------------------------------------------------------


def ceilings(section: Section) -> None:
    """Measures the bandwidth of this machine's memory and the rates of its tensor cores."""
    section.attempt("copy", lambda: _copy(section), 2)
    for name in ("fp16", "bf16", "tf32", "fp32"):
        section.attempt(f"matmul {name}", functools.partial(_matmul, section, name), 2)
    section.attempt("graph launch", lambda: _graph_launch(section), 2)


def brief_ceilings(section: Section) -> None:
    """The two that the ratios to floors need: another call may run on another machine."""
    section.attempt("copy", lambda: _copy(section), 1)
    for name in ("fp16", "bf16"):
        section.attempt(f"matmul {name}", functools.partial(_matmul, section, name), 1)


def _copy(section: Section) -> None:
    n = 2**30 if section.device == "cuda" else 2**24  # bytes read and written, far more than any L2
    source = torch.randint(0, 255, (n,), dtype=torch.uint8, device=section.device)
    target = torch.empty_like(source)
    (ms,) = section.timed({"": lambda: target.copy_(source)}).values()
    section.row(name="copy", unit="GB/s", rate=2 * n / ms / 1e6, ms=ms)


def _matmul(section: Section, name: str) -> None:
    n = 8192 if section.device == "cuda" else 256
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(name, torch.float32)
    # Random data, because a multiplication of zeros takes less power and so runs faster.
    a, b = (torch.randn(n, n, device=section.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    with Switches(benchmark=False, conv_tf32=True, matmul_tf32=name == "tf32"):
        (ms,) = section.timed({"": lambda: torch.mm(a, b, out=out)}, least_ms=50).values()
    section.row(name=f"matmul {name}", unit="TFLOP/s", rate=2 * n**3 / ms / 1e9, ms=ms)


def _graph_launch(section: Section) -> None:
    """The host's time to launch a graph, without waiting for it."""
    x = torch.zeros(8, device=section.device)
    replay = captured(lambda: x.add_(1), section.device)
    ms = min(milliseconds(replay, "cpu", 100) for _ in range(7))
    section.row(name="graph launch", unit="us", rate=ms * 1e3, ms=ms)


# Convolutions ---------------------------------------------------------------------------------------------------------


def convolutions(section: Section) -> None:
    """Times every kernel of every convolution, forward and backward, for one picture."""
    weights = {c.name: c for c in random_vgg().convolutions}
    for size in section.few([512, 1024]):
        side = section.px(size)
        alike: dict[tuple[int, ...], list[Shape]] = {}
        for shape in shapes(side, side):
            alike.setdefault(shape[1:], []).append(shape)
        for same in alike.values():
            names = ", ".join(shape.name for shape in same)
            call = functools.partial(_convolution, section, weights[same[0].name], same[0], size, names)
            section.attempt(f"conv {names} at {size} px", call, 2)


def _convolution(section: Section, convolution: Convolution, shape: Shape, size: int, names: str) -> None:
    device = torch.device(section.device)
    generator = torch.Generator().manual_seed(0)
    x32 = torch.randn(1, shape.channels_in, shape.height, shape.width, generator=generator).relu().to(device)
    grad32 = torch.randn(1, shape.channels_out, shape.height, shape.width, generator=generator).to(device)
    weight32, bias32 = convolution.weight.to(device), convolution.bias.to(device)
    x = x32.to(torch.float16).contiguous(memory_format=LAST)
    grad = grad32.to(torch.bfloat16).contiguous(memory_format=LAST)
    first = shape.channels_in == 3
    forward, backward = (_first_layer if first else _inner_layer)(section, convolution, x32 if first else x, grad)
    reference = F.conv2d(x32, weight32, bias32, padding=1).relu_()

    def textbook() -> Tensor:
        return F.conv2d(x32, weight32, bias32, padding=1).relu_()

    def textbook_backward() -> Tensor:
        return _dgrad(grad32, x32, weight32)

    plain, exact = (Switches(benchmark=True, conv_tf32=tf32, matmul_tf32=False) for tf32 in (True, False))
    passes = {
        "forward": {
            "nchw fp32 tf32 on": plain.around(textbook),
            "nchw fp32 tf32 off": exact.around(textbook),
            **forward,
        },
        "backward": {"nchw fp32 tf32 on": plain.around(textbook_backward), **backward},
    }
    for way, kernels in passes.items():
        # Searching from the first call on, because cuDNN keeps its first plan for a shape.
        searching = {name: plain.around(kernel) for name, kernel in kernels.items()}
        good = {name: kernel for name, kernel in searching.items() if _works(section, f"{names} {name}", kernel)}
        times = section.timed(good)
        for name, ms in times.items():
            section.row(
                name=name,
                way=way,
                layer=names,
                size=size,
                batch=1,
                ms=ms,
                ratio_vs_eager=ms / times["nchw fp32 tf32 on"],
                ratio_vs_floor=section.ratio_vs_floor(ms, shape.flops),
            )
        if "cudnn_convolution_relu" in good:
            _require_no_stale_reads(names, good["cudnn_convolution_relu"], reference)


def _inner_layer(section: Section, convolution: Convolution, x: Tensor, grad: Tensor) -> tuple[Kernels, Kernels]:
    """The forward and backward kernels of a convolution of 64 or more channels, in the engine's own types."""
    kernel = CuDnn(convolution, x.device, MODES["fp16"], Autotuner())
    forward: Kernels = {
        "F.conv2d, bias, relu_": lambda: kernel.linear(x).relu_(),
        "bare": lambda: kernel.bare(x),
    }
    if section.device == "cuda":
        bias, ones = kernel.bias.to(x.dtype), [1, 1]
        fused = torch.ops.aten.cudnn_convolution_relu
        forward["cudnn_convolution_relu"] = lambda: fused(x, kernel.weight, bias, ones, ones, ones, 1)
    if has_kernel("bias_relu_", section.device):
        forward["split: bare, bias_relu_"] = lambda: kernel.forward(x)
    if has_kernel("bias_relu_pool", section.device):
        forward["bare, bias_relu_pool"] = lambda: kernel.forward_pooled(x)
    return forward, {"flipped": lambda: kernel.flipped(grad), "convolution_backward": lambda: kernel.dgrad(grad)}


def _first_layer(section: Section, convolution: Convolution, image: Tensor, grad: Tensor) -> tuple[Kernels, Kernels]:
    """The forward and backward kernels of conv1_1, whose input has 3 channels: torch's, torch's with the input padded
    to 8 channels, and ours with the normalisation."""
    weight = convolution.weight.to(image.device)
    bias = convolution.bias.to(image.device)
    x3, w3, x8, w8 = (
        t.to(torch.float16).contiguous(memory_format=LAST)
        for t in (image, weight, *(F.pad(t, (0, 0, 0, 0, 0, 5)) for t in (image, weight)))
    )
    back8 = w8.flip(2, 3).transpose(0, 1).to(torch.bfloat16).contiguous(memory_format=LAST)
    w3_back = weight.to(torch.bfloat16).contiguous(memory_format=LAST)
    bias16, like = bias.half(), x3.bfloat16()
    forward: Kernels = {
        "F.conv2d of 3 channels": lambda: F.conv2d(x3, w3, bias16, padding=1).relu_(),
        "F.conv2d of 8 channels": lambda: F.conv2d(x8, w8, bias16, padding=1).relu_(),
    }
    backward: Kernels = {
        "convolution_backward to 3": lambda: _dgrad(grad, like, w3_back),
        "flipped to 8": lambda: F.conv2d(grad, back8, None, padding=1),
    }
    columns = F.pad(weight.permute(0, 2, 3, 1).reshape(64, 27), (0, 5))
    columns_there, columns_back = columns.half(), columns.bfloat16()
    scale, shift, order = list(OXFORD.std), [-m for m in OXFORD.mean], list(OXFORD.channels)
    if has_kernel("first_layer", section.device):
        forward["ops.first_layer"] = lambda: ops.first_layer(image, columns_there, bias, scale, shift, order)
    if has_kernel("first_layer_bwd", section.device):
        backward["ops.first_layer_bwd"] = lambda: ops.first_layer_bwd(grad, columns_back, scale, order)
    return forward, backward


def _dgrad(grad: Tensor, like: Tensor, weight: Tensor) -> Tensor:
    out: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        grad, like, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False]
    )
    return out[0]


def _works(section: Section, what: str, kernel: Callable[[], object]) -> bool:
    """Whether this version of the library has the kernel. A kernel that it lacks is no failure of ours."""
    try:
        kernel()
        return True
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        section.left_out(what, str(error).strip().splitlines()[0][:200])
        return False


def _require_no_stale_reads(names: str, fused: Callable[[], object], reference: Tensor) -> None:
    """Raises `RuntimeError` if cuDNN's fused kernel reads the memory of its output before it has written it. That
    memory is filled with NaN first."""
    for _ in range(3):
        poison = torch.full(reference.shape, math.nan, dtype=torch.float16, device=reference.device)
        del poison
        out = fused()
        assert isinstance(out, Tensor)
        error = float((out.float() - reference).norm() / reference.norm())
        if not error < 1e-2:
            raise RuntimeError(f"cudnn_convolution_relu of {names} is {error:.1e} away from the convolution")


def has_kernel(op: str, device: str) -> bool:
    """Whether this build has the op for the device. On a GPU it must have it: True, and the call fails without it."""
    key = device.upper()
    return device == "cuda" or torch._C._dispatch_has_kernel_for_dispatch_key(f"gramophone::{op}", key)


# The style op ---------------------------------------------------------------------------------------------------------

STYLE_LAYERS = ("1_1", "2_1", "3_1", "4_1", "5_1")
WEIGHT = 1e-3
TOLERANCE = 2e-2  # relative error of a gradient in bfloat16 against float32
MAX_SETS = 64
L2_OF_H200 = 60 * 2**20  # bytes


def style_op(section: Section) -> None:
    """Times loss and gradient of the style layers, with the gradient of the deeper layers and the ReLU: ours against
    torch."""
    for size in section.few([512, 256, 1024]):
        side = section.px(size)
        layers = [shape for shape in shapes(side, side) if shape.name in STYLE_LAYERS]
        for group in [layers, *([layer] for layer in layers)]:  # the goals are for all five
            name = f"relu{group[0].name}" if len(group) == 1 else "all five"
            call = functools.partial(_style, section, group, size, name)
            section.attempt(f"style {name} at {size} px", call, 3)


class StyleSet:
    """Features of some layers, and the other inputs of the style op."""

    def __init__(self, layers: Sequence[Shape], dtype: torch.dtype, device: str, seed: int) -> None:
        torch.manual_seed(seed)  # random numbers are drawn on the device, because a set can have hundreds of megabytes
        shape = [(1, layer.channels_out, layer.height, layer.width) for layer in layers]
        self.features = [torch.randn(s, device=device).relu_().to(dtype).contiguous(memory_format=LAST) for s in shape]
        self.upstream = [torch.randn(s, device=device).to(torch.bfloat16).contiguous(memory_format=LAST) for s in shape]
        self.scales = [1 / (layer.height * layer.width) for layer in layers]
        self.targets = [1.5 * ops.gram(f, scale) for f, scale in zip(self.features, self.scales, strict=True)]
        self.weights = torch.full((len(layers), 1), WEIGHT, device=device)
        self.leaves = [f.detach().requires_grad_() for f in self.features]

    def ours(self) -> tuple[Tensor, list[Tensor]]:
        """`ops.style_fwd` and `ops.style_bwd_`, in place on the gradients of the deeper layers."""
        losses, diffs = ops.style_fwd(self.features, self.targets, self.weights, self.scales)
        for grad, features, diff in zip(self.upstream, self.features, diffs, strict=True):
            ops.style_bwd_(grad, features, diff, True)
        return losses, self.upstream

    def loss(self, leaves: Sequence[Tensor]) -> Tensor:
        """The style loss in torch: bmm, subtract, square, sum."""
        total = torch.zeros((), device=self.weights.device)
        for leaf, target, scale in zip(leaves, self.targets, self.scales, strict=True):
            rows = leaf.flatten(2)
            total = total + WEIGHT * (torch.bmm(rows, rows.mT).float() * scale - target).square().sum()
        return total

    def torch_bare(self) -> tuple[Tensor, list[Tensor]]:
        """The loss and its gradient, in torch."""
        loss = self.loss(self.leaves)
        return loss, list(torch.autograd.grad(loss, self.leaves))

    def torch_whole(self) -> tuple[Tensor, list[Tensor]]:
        """The same result as `ours`, in torch: adds the gradient of the deeper layers, and the ReLU's backward pass."""
        loss, grads = self.torch_bare()
        masked = [
            torch.ops.aten.threshold_backward(grad + up, features, 0)
            for grad, up, features in zip(grads, self.upstream, self.features, strict=True)
        ]
        return loss, masked

    @property
    def bytes(self) -> int:
        """Size of the features and of the gradients."""
        return sum(t.numel() * t.element_size() for t in (*self.features, *self.upstream))


def _style(section: Section, layers: Sequence[Shape], size: int, name: str) -> None:
    device = section.device
    one = StyleSet(layers, torch.bfloat16, device, 0)
    _require_agreement(one)
    sets = 1
    if device == "cuda":  # so many that a set is no longer in the L2 when it is used again
        l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", L2_OF_H200)
        sets = min(MAX_SETS, math.ceil(3 * l2 / one.bytes))
    bf16 = [StyleSet(layers, torch.bfloat16, device, seed) for seed in range(sets)]

    def every(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        def call() -> None:
            for one_call in calls:
                one_call()

        return call

    ways: Kernels = {
        "torch": every([s.torch_whole for s in bf16]),
        "torch graph": captured(every([s.torch_whole for s in bf16]), device),
        "torch graph, loss and gradient alone": captured(every([s.torch_bare for s in bf16]), device),
        "ours": every([s.ours for s in bf16]),
        "ours graph": captured(every([s.ours for s in bf16]), device),
    }
    if device == "cuda":  # features in the type of `--precision auto`
        fp16 = [StyleSet(layers, torch.float16, device, seed) for seed in range(sets)]
        ways["ours graph, fp16 features"] = captured(every([s.ours for s in fp16]), device)
    times = {key: ms / sets for key, ms in section.timed(ways).items()}
    floor = _style_floor(section, layers)
    for key, ms in times.items():
        section.row(
            name=key,
            layer=name,
            size=size,
            batch=1,
            sets=sets,
            ms=ms,
            ratio_vs_eager=ms / times["torch"],
            ratio_vs_graph=ms / times["torch graph"],
            ratio_vs_floor=ms / floor if floor else None,
        )


def _style_floor(section: Section, layers: Sequence[Shape]) -> float | None:
    """A lower bound in milliseconds, of forward (reads F once) and backward (reads F and the gradient, writes the
    gradient), None without the ceilings."""
    copy, matmul = section.rate("copy"), section.rate("matmul bf16")
    if not copy or not matmul:
        return None
    total = 0.0
    for layer in layers:
        values = layer.channels_out * layer.height * layer.width
        full = 2 * values * layer.channels_out  # FLOP of F F^T, of which half is needed, and of diff F
        total += max(2 * values / copy / 1e6, full / 2 / matmul / 1e9) + max(
            6 * values / copy / 1e6, full / matmul / 1e9
        )
    return total


def _require_agreement(one: StyleSet) -> None:
    """Raises `RuntimeError` unless ours and torch's results equal those in float32, as far as 16 bits allow."""
    exact = [f.float().requires_grad_() for f in one.features]
    loss = one.loss(exact)
    grads = torch.autograd.grad(loss, exact)
    expected_loss = float(loss.detach())
    expected = [
        torch.where(f > 0, g + up.float(), 0) for f, g, up in zip(one.features, grads, one.upstream, strict=True)
    ]
    kept = [up.clone() for up in one.upstream]
    for name, call in (("torch", one.torch_whole), ("ours", one.ours)):
        losses, found = call()
        # torch rounds its Gram matrix to 8 bits. Its bound only checks that it computes the same.
        loss_bound, bound = (1e-3, TOLERANCE) if name == "ours" else (0.1, 0.1)
        loss_error = abs(float(losses.detach().sum()) / expected_loss - 1)
        if not loss_error < loss_bound:
            raise RuntimeError(f"{name}: the loss is {loss_error:.1e} from that in float32; nothing was timed")
        for a, b in itertools.zip_longest(found, expected):
            error = float((a.float() - b).norm() / b.norm())
            if not error < bound:
                raise RuntimeError(f"{name}: the gradient is {error:.1e} from that in float32; nothing was timed")
    for up, was in zip(one.upstream, kept, strict=True):
        up.copy_(was)
