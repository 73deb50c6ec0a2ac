"""The GPU check's kernels: the machine's ceilings, the forms of each convolution, and the style op against torch's."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Switches, captured, milliseconds
from benchmarks.network import Shape, random_vgg, shapes
from benchmarks.section import Section
from gramophone_server import ops
from gramophone_server.network.convolutions import Autotuner, CuDnn
from gramophone_server.network.precision import MODES
from gramophone_server.network.vgg import OXFORD, Convolution

__all__ = ["ceilings", "convolutions", "style_op"]

LAST = torch.channels_last
Ways = dict[str, Callable[[], object]]


# Ceilings -------------------------------------------------------------------------------------------------------------


def ceilings(section: Section) -> None:
    """What the memory and the matrix units of this machine give."""
    section.attempt("copy", lambda: _copy(section), 2)
    for name in ("fp16", "bf16", "tf32", "fp32"):
        section.attempt(f"matmul {name}", functools.partial(_matmul, section, name), 2)
    section.attempt("graph launch", lambda: _graph_launch(section), 2)


def _copy(section: Section) -> None:
    n = 2**30 if section.device == "cuda" else 2**24  # bytes each way, far more than any L2
    source = torch.randint(0, 255, (n,), dtype=torch.uint8, device=section.device)
    target = torch.empty_like(source)
    (ms,) = section.timed({"": lambda: target.copy_(source)}).values()
    section.row(name="copy", unit="GB/s", rate=2 * n / ms / 1e6, ms=ms)


def _matmul(section: Section, name: str) -> None:
    n = 8192 if section.device == "cuda" else 256
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(name, torch.float32)
    # Random data: of zeros the same multiplication takes less power, and so runs faster.
    a, b = (torch.randn(n, n, device=section.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    with Switches(benchmark=False, conv_tf32=True, matmul_tf32=name == "tf32"):
        (ms,) = section.timed({"": lambda: torch.mm(a, b, out=out)}, least_ms=50).values()
    section.row(name=f"matmul {name}", unit="TFLOP/s", rate=2 * n**3 / ms / 1e9, ms=ms)


def _graph_launch(section: Section) -> None:
    """What launching a graph costs the host, which does not wait for it."""
    x = torch.zeros(8, device=section.device)
    replay = captured(lambda: x.add_(1), section.device)
    ms = min(milliseconds(replay, "cpu", 100) for _ in range(7))
    section.row(name="graph launch", unit="us", rate=ms * 1e3, ms=ms)


# Convolutions ---------------------------------------------------------------------------------------------------------


def convolutions(section: Section) -> None:
    """Every form of every convolution, there and back, for one picture."""
    weights = {c.name: c for c in random_vgg().convolutions}
    for size in (512, 1024):
        side = section.px(size)
        alike: dict[tuple[int, ...], list[Shape]] = {}
        for shape in shapes(side, side):
            alike.setdefault(shape[1:], []).append(shape)
        for same in alike.values():
            names = ", ".join(shape.name for shape in same)
            call = functools.partial(_convolution, section, weights[same[0].name], same[0], side, names)
            section.attempt(f"conv {names} at {side} px", call, 3)


def _convolution(section: Section, convolution: Convolution, shape: Shape, side: int, names: str) -> None:
    device = torch.device(section.device)
    generator = torch.Generator().manual_seed(0)
    x32 = torch.randn(1, shape.channels_in, shape.height, shape.width, generator=generator).relu().to(device)
    grad32 = torch.randn(1, shape.channels_out, shape.height, shape.width, generator=generator).to(device)
    weight32, bias32 = convolution.weight.to(device), convolution.bias.to(device)
    x = x32.to(torch.float16).contiguous(memory_format=LAST)
    grad = grad32.to(torch.bfloat16).contiguous(memory_format=LAST)
    first = shape.channels_in == 3
    there, back = (_edge if first else _inner)(section, convolution, x32 if first else x, grad)
    reference = F.conv2d(x32, weight32, bias32, padding=1).relu_()

    def textbook() -> Tensor:
        return F.conv2d(x32, weight32, bias32, padding=1).relu_()

    def textbook_back() -> Tensor:
        return _dgrad(grad32, x32, weight32)

    plain, exact = (Switches(benchmark=True, conv_tf32=tf32, matmul_tf32=False) for tf32 in (True, False))
    ways = {
        "there": {"nchw fp32 tf32 on": plain.around(textbook), "nchw fp32 tf32 off": exact.around(textbook), **there},
        "back": {"nchw fp32 tf32 on": plain.around(textbook_back), **back},
    }
    for way, forms in ways.items():
        # Searching from the first call on: cuDNN's plan for a shape stays what it was first.
        searching = {name: plain.around(form) for name, form in forms.items()}
        good = {name: form for name, form in searching.items() if _works(section, f"{names} {name}", form)}
        times = section.timed(good)
        for name, ms in times.items():
            section.row(
                name=name,
                way=way,
                layer=names,
                size=side,
                batch=1,
                ms=ms,
                ratio_vs_eager=ms / times["nchw fp32 tf32 on"],
                ratio_vs_floor=section.ratio_vs_floor(ms, shape.flops),
            )
        if "cudnn_convolution_relu" in good:
            _poisoned(names, good["cudnn_convolution_relu"], reference)


def _inner(section: Section, convolution: Convolution, x: Tensor, grad: Tensor) -> tuple[Ways, Ways]:
    """The forms of a convolution of 64 or more channels, in the engine's own types."""
    form = CuDnn(convolution, x.device, MODES["fp16"], Autotuner())
    there: Ways = {
        "F.conv2d, bias, relu_": lambda: form.linear(x).relu_(),
        "bare": lambda: form.bare(x),
    }
    if section.device == "cuda":
        bias, ones = form.bias.to(x.dtype), [1, 1]
        fused = torch.ops.aten.cudnn_convolution_relu
        there["cudnn_convolution_relu"] = lambda: fused(x, form.weight, bias, ones, ones, ones, 1)
    if has_kernel("bias_relu_", section.device):
        there["split: bare, bias_relu_"] = lambda: form.forward(x)
    if has_kernel("bias_relu_pool", section.device):
        there["bare, bias_relu_pool"] = lambda: form.forward_pooled(x)
    return there, {"flipped": lambda: form.flipped(grad), "convolution_backward": lambda: form.dgrad(grad)}


def _edge(section: Section, convolution: Convolution, image: Tensor, grad: Tensor) -> tuple[Ways, Ways]:
    """The forms of conv1_1, whose input has 3 channels: as it is, padded to 8, and our kernel with the normalisation."""
    weight = convolution.weight.to(image.device)
    bias = convolution.bias.to(image.device)
    x3, w3, x8, w8 = (
        t.to(torch.float16).contiguous(memory_format=LAST)
        for t in (image, weight, *(F.pad(t, (0, 0, 0, 0, 0, 5)) for t in (image, weight)))
    )
    back8 = w8.flip(2, 3).transpose(0, 1).to(torch.bfloat16).contiguous(memory_format=LAST)
    w3_back = weight.to(torch.bfloat16).contiguous(memory_format=LAST)
    bias16, like = bias.half(), x3.bfloat16()
    there: Ways = {
        "F.conv2d of 3 channels": lambda: F.conv2d(x3, w3, bias16, padding=1).relu_(),
        "F.conv2d of 8 channels": lambda: F.conv2d(x8, w8, bias16, padding=1).relu_(),
    }
    back: Ways = {
        "convolution_backward to 3": lambda: _dgrad(grad, like, w3_back),
        "flipped to 8": lambda: F.conv2d(grad, back8, None, padding=1),
    }
    columns = F.pad(weight.permute(0, 2, 3, 1).reshape(64, 27), (0, 5))
    columns_there, columns_back = columns.half(), columns.bfloat16()
    scale, shift, order = list(OXFORD.std), [-m for m in OXFORD.mean], list(OXFORD.channels)
    if has_kernel("first_layer", section.device):
        there["ops.first_layer"] = lambda: ops.first_layer(image, columns_there, bias, scale, shift, order)
    if has_kernel("first_layer_bwd", section.device):
        back["ops.first_layer_bwd"] = lambda: ops.first_layer_bwd(grad, columns_back, scale, order)
    return there, back


def _dgrad(grad: Tensor, like: Tensor, weight: Tensor) -> Tensor:
    out: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        grad, like, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False]
    )
    return out[0]


def _works(section: Section, what: str, form: Callable[[], object]) -> bool:
    """Whether this version of the library has the form; a form that it lacks is no failure of ours."""
    try:
        form()
        return True
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        section.left_out(what, str(error).strip().splitlines()[0][:200])
        return False


def _poisoned(names: str, fused: Callable[[], object], reference: Tensor) -> None:
    """Whether cuDNN's fused form reads its output's memory before it has written it: there is NaN in it."""
    for _ in range(3):
        poison = torch.full(reference.shape, math.nan, dtype=torch.float16, device=reference.device)
        del poison
        out = fused()
        assert isinstance(out, Tensor)
        apart = float((out.float() - reference).norm() / reference.norm())
        if not apart < 1e-2:
            raise RuntimeError(f"cudnn_convolution_relu of {names} is {apart:.1e} away from the convolution")


def has_kernel(op: str, device: str) -> bool:
    """Whether this build has the op for the device; on a GPU it must, so there the call may fail."""
    key = device.upper()
    return device == "cuda" or torch._C._dispatch_has_kernel_for_dispatch_key(f"gramophone::{op}", key)


# The style op ---------------------------------------------------------------------------------------------------------

STYLE_LAYERS = ("1_1", "2_1", "3_1", "4_1", "5_1")
WEIGHT = 1e-3
FAR = 2e-2  # of a gradient in bfloat16 from one in float32, relative
MOST_SETS = 64
L2_OF_H200 = 60 * 2**20  # bytes


def style_op(section: Section) -> None:
    """Loss and gradient of the style layers, with the gradient from above and the ReLU: ours against torch's."""
    for size in (512, 256, 1024):
        side = section.px(size)
        layers = [shape for shape in shapes(side, side) if shape.name in STYLE_LAYERS]
        for group in [*([layer] for layer in layers), layers]:
            name = f"relu{group[0].name}" if len(group) == 1 else "all five"
            call = functools.partial(_style, section, group, side, name)
            section.attempt(f"style {name} at {side} px", call, 3)


class StyleSet:
    """Features of some layers and what the style op needs with them."""

    def __init__(self, layers: Sequence[Shape], dtype: torch.dtype, device: str, seed: int) -> None:
        torch.manual_seed(seed)  # drawn where they are used: a set can have hundreds of megabytes
        shape = [(1, layer.channels_out, layer.height, layer.width) for layer in layers]
        self.features = [torch.randn(s, device=device).relu_().to(dtype).contiguous(memory_format=LAST) for s in shape]
        self.upstream = [torch.randn(s, device=device).to(torch.bfloat16).contiguous(memory_format=LAST) for s in shape]
        self.scales = [1 / (layer.height * layer.width) for layer in layers]
        self.targets = [1.5 * ops.gram(f, scale) for f, scale in zip(self.features, self.scales, strict=True)]
        self.weights = torch.full((len(layers), 1), WEIGHT, device=device)
        self.leaves = [f.detach().requires_grad_() for f in self.features]

    def ours(self) -> tuple[Tensor, list[Tensor]]:
        """`ops.style_fwd` and `ops.style_bwd_`, in place of the gradients from above."""
        losses, diffs = ops.style_fwd(self.features, self.targets, self.weights, self.scales)
        for grad, features, diff in zip(self.upstream, self.features, diffs, strict=True):
            ops.style_bwd_(grad, features, diff, True)
        return losses, self.upstream

    def loss(self, leaves: Sequence[Tensor]) -> Tensor:
        """bmm, subtract, square, sum."""
        total = torch.zeros((), device=self.weights.device)
        for leaf, target, scale in zip(leaves, self.targets, self.scales, strict=True):
            rows = leaf.flatten(2)
            total = total + WEIGHT * (torch.bmm(rows, rows.mT).float() * scale - target).square().sum()
        return total

    def torch_bare(self) -> tuple[Tensor, list[Tensor]]:
        """The loss and its gradient alone."""
        loss = self.loss(self.leaves)
        return loss, list(torch.autograd.grad(loss, self.leaves))

    def torch_whole(self) -> tuple[Tensor, list[Tensor]]:
        """What ours does: with the gradient from above and the ReLU's own backward."""
        loss, grads = self.torch_bare()
        masked = [
            torch.ops.aten.threshold_backward(grad + up, features, 0)
            for grad, up, features in zip(grads, self.upstream, self.features, strict=True)
        ]
        return loss, masked

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.features, *self.upstream))


def _style(section: Section, layers: Sequence[Shape], side: int, name: str) -> None:
    device = section.device
    one = StyleSet(layers, torch.bfloat16, device, 0)
    _agree(one)
    sets = 1
    if device == "cuda":  # so many that none is in the L2 when its turn comes again
        l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", L2_OF_H200)
        sets = min(MOST_SETS, math.ceil(3 * l2 / one.bytes))
    bf16 = [StyleSet(layers, torch.bfloat16, device, seed) for seed in range(sets)]

    def every(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        def call() -> None:
            for one_call in calls:
                one_call()

        return call

    ways: Ways = {
        "torch": every([s.torch_whole for s in bf16]),
        "torch graph": captured(every([s.torch_whole for s in bf16]), device),
        "torch graph, loss and gradient alone": captured(every([s.torch_bare for s in bf16]), device),
        "ours": every([s.ours for s in bf16]),
        "ours graph": captured(every([s.ours for s in bf16]), device),
    }
    if device == "cuda":  # features of the mode that `auto` takes there
        fp16 = [StyleSet(layers, torch.float16, device, seed) for seed in range(sets)]
        ways["ours graph, fp16 features"] = captured(every([s.ours for s in fp16]), device)
    times = {key: ms / sets for key, ms in section.timed(ways).items()}
    floor = _style_floor(section, layers)
    for key, ms in times.items():
        section.row(
            name=key,
            layer=name,
            size=side,
            batch=1,
            sets=sets,
            ms=ms,
            ratio_vs_eager=ms / times["torch"],
            ratio_vs_graph=ms / times["torch graph"],
            ratio_vs_floor=ms / floor if floor else None,
        )


def _style_floor(section: Section, layers: Sequence[Shape]) -> float | None:
    """The least milliseconds of both ways: F read once there; F and the gradient read and the gradient written back."""
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


def _agree(one: StyleSet) -> None:
    """Ours and torch's are the float32 result of the same features, to what 16 bits resolve."""
    exact = [f.float().requires_grad_() for f in one.features]
    loss = one.loss(exact)
    grads = torch.autograd.grad(loss, exact)
    wanted_loss = float(loss.detach())
    wanted = [torch.where(f > 0, g + up.float(), 0) for f, g, up in zip(one.features, grads, one.upstream, strict=True)]
    kept = [up.clone() for up in one.upstream]
    for who, way in (("torch", one.torch_whole), ("ours", one.ours)):
        losses, found = way()
        # torch rounds its Gram matrix to 8 bits, which is its own affair; what it must be is the same computation.
        loss_bound, bound = (1e-3, FAR) if who == "ours" else (0.1, 0.1)
        apart = abs(float(losses.detach().sum()) / wanted_loss - 1)
        if not apart < loss_bound:
            raise RuntimeError(f"{who}: the loss is {apart:.1e} from float32's; nothing was timed")
        for a, b in itertools.zip_longest(found, wanted):
            far = float((a.float() - b).norm() / b.norm())
            if not far < bound:
                raise RuntimeError(f"{who}: the gradient is {far:.1e} from float32's; nothing was timed")
    for up, was in zip(one.upstream, kept, strict=True):
        up.copy_(was)
