"""The engine: a network on a device, and batches of same-shape jobs that it takes through their scales.

    engine = Engine.load(device="auto", precision="auto", weights="embedded", backbone="vgg19", threads=0)
    run = engine.start([job])
    while not run.finished:
        (report,) = run.advance()
    picture = run.picture(0)

One thread owns an engine and its runs. Nothing here knows of requests, queues or wires.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gramophone.recipe import Recipe, Start, Violation
from gramophone_server import ops
from gramophone_server.chain import Chain
from gramophone_server.errors import InvalidRequest, OutOfDeviceMemory, StartupError
from gramophone_server.job import SMALLEST_SIDE, Losses, Report, StyleJob, fit, ran_out_of_memory
from gramophone_server.memory import bytes_needed
from gramophone_server.precision import Precision, choose
from gramophone_server.snapshots import Snapshots
from gramophone_server.stage import Stage, Stages
from gramophone_server.vgg import Vgg, load_vgg

__all__ = ["Engine", "EngineRun", "cpu_name"]

log = logging.getLogger(__name__)

# Of the noise around mid-grey. White noise over the whole range takes hundreds of plain steps to be forgotten.
NOISE_SPREAD = 0.05

# cuDNN and torch count the elements of a tensor in 32 bits in places, and the widest activations are 64 per pixel.
MOST_ELEMENTS_CUDA = 2**31 - 1

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

    def __init__(
        self, vgg: Vgg, device: torch.device, precision: Precision, *, graphs: bool | None = None, note: str = ""
    ) -> None:
        """``graphs``: replay captured iterations; as a rule on a GPU, and only there. ``note`` goes with the device's
        name, such as the reason why it is not another one."""
        ops.require_kernels(device.type)
        self.device = device
        self.precision = precision.name
        self.backbone = vgg.backbone
        self.weights_source = vgg.source
        self.layers = vgg.layers
        self.chain = Chain(vgg, device, precision)
        self.stages = Stages(self.chain, graphs=device.type == "cuda" if graphs is None else graphs)
        self.snapshots = Snapshots(device)
        self._widest = vgg.convolutions[0].weight.shape[0]  # activations per pixel; every pooling quarters the pixels
        self._vgg = vgg
        self._note = note

    @classmethod
    def load(
        cls, *, device: str, precision: str, weights: str, backbone: str, threads: int, graphs: bool = True
    ) -> Engine:
        """Reads the weights and prepares the network.

        ``device``: "auto", "cpu" or "cuda". ``precision``: "auto", "fp32", "bf16", "tf32" or "fp16". ``weights`` and
        ``backbone``: see `load_vgg`. ``threads``: of the CPU's kernels, 0 for all cores. ``graphs``: on a GPU, replay
        captured iterations instead of launching every kernel. Raises `StartupError`.
        """
        if threads:
            torch.set_num_threads(threads)
        chosen, note = _device(device)
        mode = choose(precision, chosen)
        return cls(load_vgg(weights, backbone), chosen, mode, graphs=graphs and chosen.type == "cuda", note=note)

    @property
    def device_name(self) -> str:
        """For people: "cpu (AMD EPYC, 2 threads)"."""
        if self.device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(self.device)
            about = f"{torch.cuda.get_device_name(self.device)}, compute capability {major}.{minor}"
        else:
            about = f"{cpu_name()}, {torch.get_num_threads()} threads"
        return f"{self.device.type} ({about}{'; ' if self._note else ''}{self._note})"

    def start(self, jobs: Sequence[StyleJob]) -> EngineRun:
        """A run of ``jobs`` as one batch: same result size, same scales, same structure of recipe.

        Raises `ValueError` if they do not fit together, and `InvalidRequest` if the GPU's libraries could not count
        their activations.
        """
        width, height = jobs[0].result_size
        most = MOST_ELEMENTS_CUDA // (self._widest * len(jobs))
        if self.device.type == "cuda" and width * height > most:
            size = f"makes a {width}x{height} picture, of which the GPU's libraries take at most {most} pixels"
            raise InvalidRequest([Violation("spec.recipe.size", f"{size}; give a smaller one")])
        return EngineRun(self, jobs)

    def bytes_needed(self, job: StyleJob, jobs: int) -> int:
        """Bytes on the device that ``jobs`` such jobs as one batch take at their largest scale, without the network."""
        width, height = job.result_size
        form = "cudnn" if self.chain.form == "cudnn" else "library"
        return bytes_needed(self._vgg, job.recipe, height, width, jobs, self.chain.precision, form)

    def warm_up(self) -> None:
        """Two iterations of a small job, so that kernels are compiled and memory is mapped before the first caller."""
        noise = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        recipe = Recipe(size=64, smallest_size=0, iterations=2)
        run = self.start(
            [StyleJob(recipe=recipe, content=noise, styles=(noise,), style_weights=(1.0,), start=None, seed=0)]
        )
        while not run.finished:
            run.advance()
        run.picture(0)
        run.close()


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
        self._stage: Stage | None = None  # from the first scale on

    @property
    def finished(self) -> bool:
        """No iteration is left."""
        return self._done == self._iterations

    def advance(self, iterations: int = 1) -> tuple[Report, ...]:
        """Some iterations of every job; see `job.Run.advance`."""
        try:
            stage = self._present() if self._left else self._next_scale()
            n = min(iterations, self._left)
            stage.iterate(n)
            self._done += n
            self._left -= n
            self._pixels -= n * stage.width * stage.height
            return self._reports(stage)
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            raise OutOfDeviceMemory(*self._jobs[0].result_size) from error

    def picture(self, index: int) -> Tensor:
        """The present picture of one job; see `job.Run.picture`."""
        return self.snapshot(index)()

    def snapshot(self, index: int) -> Callable[[], Tensor]:
        """The present picture of one job, for later; see `job.Run.snapshot`."""
        stage = self._present() if self._stage is not None else self._next_scale()
        return self._engine.snapshots.take(self._pictures(stage)[index])

    def close(self) -> None:
        """Leaves the buffers to the next job; see `job.Run.close`."""
        if self._stage is not None:
            self._engine.stages.give_back(self._stage, self._recipe)
            self._stage = None
        self._done = self._iterations

    def _present(self) -> Stage:
        assert self._stage is not None, "the run is closed"
        return self._stage

    @torch.inference_mode()
    def _next_scale(self) -> Stage:
        self._at += 1
        width, height, self._left = self._scales[self._at]
        device = self._engine.device
        stage = self._engine.stages.take(self._recipe, len(self._jobs), height, width)
        contents = torch.cat([_resize(job.content.to(device), width, height) for job in self._jobs])
        longest = max(width, height)
        styles = [
            [
                (_resize(style.to(device), *_style_size(style, longest, job.recipe.style_scale)), weight)
                for style, weight in zip(job.styles, job.style_weights, strict=True)
            ]
            for job in self._jobs
        ]
        stage.objective.aim([job.recipe for job in self._jobs], contents, styles)
        if self._stage is None:
            image = torch.cat([_start(job, contents[i : i + 1], width, height) for i, job in enumerate(self._jobs)])
        else:
            image = F.interpolate(self._pictures(self._stage), (height, width), mode="bicubic").clamp_(0, 1)
        stage.begin(image, [job.recipe.step for job in self._jobs], self._stage)
        if self._stage is not None:
            self._engine.stages.give_back(self._stage, self._recipe)
        self._stage = stage
        return stage

    @torch.inference_mode()
    def _pictures(self, stage: Stage) -> Tensor:
        """The average of the iterates of this scale where the recipe has one, else the last iterate, and of a job that
        diverged the last good one. [B, 3, H, W]."""
        canvas, done = stage.canvas, self._scales[self._at].iterations - self._left
        if canvas.mean is None or not done:
            return canvas.image
        average = (canvas.mean / (1 - canvas.average**done)).clamp_(0, 1)  # without the zeros that it began with
        return torch.where(canvas.alive.view(-1, 1, 1, 1), average, canvas.image)

    @torch.inference_mode()
    def _reports(self, stage: Stage) -> tuple[Report, ...]:
        """One per job, as of the last iteration. The only place that waits for the device, and it does so once."""
        content, style = stage.objective.content_layers, stage.objective.style_layers
        read = torch.cat([stage.terms.double(), stage.canvas.diverged_at[None].double()]).T.tolist()
        reports = []
        for *column, tv, diverged_at in read:
            losses = Losses(
                content=dict(zip(content, column[: len(content)], strict=True)),
                style=dict(zip(style, column[len(content) :], strict=True)),
                tv=tv,
            )
            reports.append(
                Report(
                    self._done,
                    self._iterations,
                    stage.width,
                    stage.height,
                    losses,
                    self._pixels,
                    int(diverged_at) or None,
                )
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


def _device(name: str) -> tuple[torch.device, str]:
    """The device of that name, and with "auto" why it is not a GPU, if it is not. Raises `StartupError`."""
    if name not in ("auto", "cpu", "cuda"):
        raise StartupError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cpu":
        return torch.device("cpu"), ""
    missing = _missing_for_cuda()
    if missing is None:
        # The first process to ask gets the whole GPU as it is; which one is CUDA_VISIBLE_DEVICES' business.
        return torch.device("cuda", torch.cuda.current_device()), ""
    what, remedy = missing
    if name == "cuda":
        raise StartupError(f"device cuda is not possible: {what}; {remedy}, or run the server with --device cpu")
    log.info("on the CPU, because %s; for a GPU, %s", what, remedy)
    return torch.device("cpu"), f"not on a GPU: {what}"


def _missing_for_cuda() -> tuple[str, str] | None:
    """What keeps this process from a GPU, and what to do about it."""
    info = ops.build_info()
    if info["cuda"] is None:
        return "this build has no CUDA kernels", "build it where nvcc is, with GRAMOPHONE_CUDA=1"
    if not torch.cuda.is_available():
        return "no NVIDIA GPU with a working driver is visible", "check with nvidia-smi and CUDA_VISIBLE_DEVICES"
    major, minor = torch.cuda.get_device_capability()
    if not any(_runs_on(built, major, minor) for built in info["cuda_architectures"]):
        built_for = ", ".join(info["cuda_architectures"])
        return (
            f"the GPU has compute capability {major}.{minor} and this build has kernels for {built_for}",
            f"build it again with TORCH_CUDA_ARCH_LIST={major}.{minor}",
        )
    return None


def _runs_on(built: str, major: int, minor: int) -> bool:
    """Machine code runs on later GPUs of its major version, PTX on all later ones."""
    version, _, ptx = built.partition("+")
    built_major, built_minor = (int(n) for n in version.rstrip("af").split("."))
    if ptx:
        return (built_major, built_minor) <= (major, minor)
    return built_major == major and built_minor <= minor


def cpu_name() -> str:
    """The model of the CPU as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
