"""The engine: a network on a device, and batches of same-shape jobs that it takes through their scales.

    engine = Engine.load(device="auto", precision="auto", weights="embedded", backbone="vgg19", threads=0)
    run = engine.start([job])
    while not run.finished:
        (report,) = run.advance()
    picture = run.picture(0)

One thread owns an engine and its runs. Nothing here knows of requests, queues or wires.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gramophone.recipe import Recipe, Start
from gramophone_server import ops
from gramophone_server.chain import Chain
from gramophone_server.errors import OutOfDeviceMemory, StartupError
from gramophone_server.job import SMALLEST_SIDE, Losses, Report, StyleJob, fit, ran_out_of_memory
from gramophone_server.objective import Objective
from gramophone_server.optimisers import make_stepper
from gramophone_server.vgg import Vgg, load_vgg

__all__ = ["Engine", "EngineRun", "cpu_name"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Of the noise around mid-grey. White noise over the whole range takes hundreds of plain steps to be forgotten.
NOISE_SPREAD = 0.05

# What jobs of one batch must have in common; the rest are tensors with an entry per job.
SHARED = (
    "normalisation",
    "pooling",
    "size",
    "optimiser",
    "iterations",
    "coarse_iterations",
    "smallest_size",
    "average",
)


class Engine:
    """A network on a device in one precision."""

    def __init__(self, vgg: Vgg, device: torch.device, precision: str) -> None:
        ops.require_kernels(device.type)
        self.device = device
        self.precision = precision
        self.backbone = vgg.backbone
        self.weights_source = vgg.source
        self.layers = vgg.layers
        self.chain = Chain(vgg, device, DTYPES[precision])

    @classmethod
    def load(cls, *, device: str, precision: str, weights: str, backbone: str, threads: int) -> Engine:
        """Reads the weights and prepares the network.

        ``device``: "auto", "cpu" or "cuda". ``precision``: "auto", "fp32", "bf16", "tf32" or "fp16". ``weights`` and
        ``backbone``: see `load_vgg`. ``threads``: of the CPU's kernels, 0 for all cores. Raises `StartupError`.
        """
        if threads:
            torch.set_num_threads(threads)
        chosen = _device(device)
        return cls(load_vgg(weights, backbone), chosen, _precision(precision, chosen))

    @property
    def device_name(self) -> str:
        """For people: "cpu (AMD EPYC, 2 threads)"."""
        return f"cpu ({cpu_name()}, {torch.get_num_threads()} threads)"

    def start(self, jobs: Sequence[StyleJob]) -> EngineRun:
        """A run of ``jobs`` as one batch: same result size, same scales, same structure of recipe.

        Raises `ValueError` if they do not fit together.
        """
        return EngineRun(self, jobs)

    def warm_up(self) -> None:
        """Two iterations of a small job, so that kernels are compiled and memory is mapped before the first caller."""
        noise = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        recipe = Recipe(size=64, smallest_size=0, iterations=2)
        run = self.start(
            [StyleJob(recipe=recipe, content=noise, styles=(noise,), style_weights=(1.0,), start=None, seed=0)]
        )
        while not run.finished:
            run.advance()


class EngineRun:
    """A batch on its way through the scales; see `job.Run`."""

    def __init__(self, engine: Engine, jobs: Sequence[StyleJob]) -> None:
        first = jobs[0]
        for job in jobs[1:]:
            _must_share(first, job)
        self._engine = engine
        self._jobs = jobs
        self._recipe = first.recipe
        self._scales = first.scales
        self._iterations = sum(n for _, _, n in self._scales)
        self._pixels = sum(w * h * n for w, h, n in self._scales)  # pixel-iterations left
        self._done = 0
        self._at = -1  # index of the present scale
        self._left = 0  # iterations left at it
        self._step = torch.tensor([job.recipe.step for job in jobs], device=engine.device)
        self._stepper = make_stepper(self._recipe.optimiser, self._step)
        # Per job and on the device, so that one that diverges is held without anything being read back.
        self._alive = torch.ones(len(jobs), dtype=torch.bool, device=engine.device)
        self._diverged_at = torch.zeros(len(jobs), dtype=torch.int64, device=engine.device)  # 0: has not
        # From the first scale on: float32 [B, 3, height, width], and the terms of the last evaluation.
        self._image = self._last_good = self._mean = self._terms = torch.empty(0)
        self._kept = 1.0  # how much of the average is still the zeros that it began with

    @property
    def finished(self) -> bool:
        """No iteration is left."""
        return self._done == self._iterations

    def advance(self, iterations: int = 1) -> tuple[Report, ...]:
        """Some iterations of every job; see `job.Run.advance`."""
        try:
            if not self._left:
                self._next_scale()
            for _ in range(min(iterations, self._left)):
                self._iterate()
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            raise OutOfDeviceMemory(*self._jobs[0].result_size) from error
        return self._reports()

    def picture(self, index: int) -> Tensor:
        """The present picture of one job; see `job.Run.picture`."""
        if not self._image.numel():
            self._next_scale()
        image = self._picture()[index]
        return image.mul(255).round_().to(torch.uint8).permute(1, 2, 0).contiguous().cpu()

    @torch.inference_mode()
    def _iterate(self) -> None:
        evaluation = self._objective.evaluate(self._image)
        self._terms = evaluation.terms
        self._done += 1
        finite = evaluation.terms.isfinite().all(0) & evaluation.grad.isfinite().flatten(1).all(1)
        self._diverged_at = torch.where(self._alive & ~finite, self._done, self._diverged_at)
        self._alive = self._alive & finite
        alive = self._alive.view(-1, 1, 1, 1)
        following = self._stepper.proposal(self._image, evaluation.grad).clamp_(0, 1)
        self._last_good = torch.where(alive, self._image, self._last_good)
        self._image = torch.where(alive, following, self._last_good)
        if self._recipe.average:
            self._mean.lerp_(self._image, 1 - self._recipe.average)
            self._kept *= self._recipe.average
        width, height, _ = self._scales[self._at]
        self._left -= 1
        self._pixels -= width * height

    @torch.inference_mode()
    def _next_scale(self) -> None:
        self._at += 1
        width, height, self._left = self._scales[self._at]
        device = self._engine.device
        contents = torch.cat([_resize(job.content.to(device), width, height) for job in self._jobs])
        longest = max(width, height)
        styles = [
            [
                (_resize(style.to(device), *_style_size(style, longest, job.recipe.style_scale)), weight)
                for style, weight in zip(job.styles, job.style_weights, strict=True)
            ]
            for job in self._jobs
        ]
        self._objective = Objective(self._engine.chain, [job.recipe for job in self._jobs], contents, styles)
        if self._at == 0:
            self._image = torch.cat(
                [_start(job, contents[i : i + 1], width, height) for i, job in enumerate(self._jobs)]
            )
        else:
            self._image = F.interpolate(self._picture(), (height, width), mode="bicubic").clamp_(0, 1)
            self._stepper = self._stepper.resampled(height, width)
        self._last_good = self._image
        self._mean = torch.zeros_like(self._image)
        self._kept = 1.0

    def _picture(self) -> Tensor:
        """The average of the iterates of this scale where the recipe has one, else the last iterate, and of a job that
        diverged the last good one. [B, 3, H, W]."""
        if not self._recipe.average or self._kept == 1.0:
            return self._image
        average = (self._mean / (1 - self._kept)).clamp_(0, 1)
        return torch.where(self._alive.view(-1, 1, 1, 1), average, self._image)

    def _reports(self) -> tuple[Report, ...]:
        """One per job, as of the last iteration. The only place that waits for the device."""
        width, height, _ = self._scales[self._at]
        content, style = self._objective.content_layers, self._objective.style_layers
        reports = []
        for column, diverged_at in zip(self._terms.T.tolist(), self._diverged_at.tolist(), strict=True):
            losses = Losses(
                content=dict(zip(content, column[: len(content)], strict=True)),
                style=dict(zip(style, column[len(content) : -1], strict=True)),
                tv=column[-1],
            )
            reports.append(
                Report(self._done, self._iterations, width, height, losses, self._pixels, diverged_at or None)
            )
        return tuple(reports)


def _must_share(first: StyleJob, other: StyleJob) -> None:
    for name in SHARED:
        a, b = getattr(first.recipe, name), getattr(other.recipe, name)
        if a != b:
            raise ValueError(f"jobs of a batch must have the same {name}, got {a} and {b}")
    for name in ("content_layers", "style_layers"):
        a, b = ([layer for layer, _ in getattr(job.recipe, name)] for job in (first, other))
        if a != b:
            raise ValueError(f"jobs of a batch must have the same {name}, got {a} and {b}")
    if first.result_size != other.result_size:
        raise ValueError(f"jobs of a batch must have one size, got {first.result_size} and {other.result_size}")


def _resize(image: Tensor, width: int, height: int) -> Tensor:
    """uint8 [3, h, w] -> float32 [1, 3, height, width] in [0, 1], bicubic with antialiasing."""
    x = image[None].float() / 255
    if (width, height) == (image.shape[2], image.shape[1]):
        return x
    return F.interpolate(x, (height, width), mode="bicubic", antialias=True).clamp_(0, 1)


def _style_size(style: Tensor, longest: int, scale: float) -> tuple[int, int]:
    width, height = fit(style.shape[2], style.shape[1], round(longest * scale))
    return max(width, SMALLEST_SIDE), max(height, SMALLEST_SIDE)


def _start(job: StyleJob, content: Tensor, width: int, height: int) -> Tensor:
    """[1, 3, height, width]. Noise is drawn on the CPU, so that a seed means the same picture on every device."""
    match job.recipe.start:
        case Start.CONTENT:
            return content.clone()
        case Start.NOISE:
            generator = torch.Generator().manual_seed(job.seed % 2**63)
            noise = torch.randn((1, 3, height, width), generator=generator)
            return (0.5 + NOISE_SPREAD * noise).clamp_(0, 1).to(content.device)
        case Start.IMAGE:
            if job.start is None:
                raise ValueError("start is image, but the job has none")
            return _resize(job.start.to(content.device), width, height)


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise StartupError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda":
        ops.require_kernels("cuda")
    return torch.device("cpu")


def _precision(name: str, device: torch.device) -> str:
    if name == "auto":
        return "bf16" if _multiplies_bf16() else "fp32"
    if name not in DTYPES:
        raise StartupError(f"precision on {device.type} must be auto, {' or '.join(DTYPES)}, got {name!r}")
    return name


def _multiplies_bf16() -> bool:
    """The CPU has AMX or AVX512-BF16; without either bf16 is slower than fp32."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def cpu_name() -> str:
    """The model of the CPU as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
