"""The engine: a network on a device, batches of same-shape jobs, and runs that take such jobs through their scales.

    engine = Engine.load(device="auto", precision="auto", weights="embedded", backbone="vgg19", threads=0)
    run = engine.start([job])
    while not run.finished:
        (report,) = run.advance()
    picture = run.picture(0)

Where jobs come and go, a scheduler holds batches itself: see `work`. One thread owns an engine and all it makes. Nothing here knows of requests, queues or wires.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gramophone.recipe import Recipe, Violation
from gramophone_server import ops
from gramophone_server.domain.engine_api import CacheCounts
from gramophone_server.domain.job import Report, StyleJob, ran_out_of_memory
from gramophone_server.domain.job_state import JobState, Shape
from gramophone_server.engine.batch import EngineBatch
from gramophone_server.engine.checkpoint_format import CheckpointFormat
from gramophone_server.engine.device_copy import DeviceToHostCopier
from gramophone_server.engine.graph_runner import GraphRunnerPool
from gramophone_server.engine.memory_estimate import bytes_free, bytes_needed
from gramophone_server.engine.optimisers import layout
from gramophone_server.engine.scales import shown
from gramophone_server.engine.style_targets import STYLE_CACHE_BYTES, StyleTargets
from gramophone_server.errors import InvalidRequest, OutOfDeviceMemory, StartupError
from gramophone_server.network.features import VggFeatures
from gramophone_server.network.precision import Precision, choose
from gramophone_server.network.vgg import Vgg, load_vgg

__all__ = ["EngineRun", "VggEngine", "cpu_name"]

log = logging.getLogger(__name__)

# cuDNN and torch count the elements of a tensor in 32 bits in places, and the widest activations are 64 per pixel.
MOST_ELEMENTS_CUDA = 2**31 - 1
MOST_SLOTS = 256  # of a batch of the smallest pictures; long before that a batch gains nothing by growing

MOST_OF_MEMORY = (
    0.8  # of what is free when the network is there; estimates are some percent off, and images are decoded
)

# What jobs of one run must have in common: the shape of every scale, and that they go from scale to scale together.
SHARED = (
    "pooling",
    "size",
    "optimiser",
    "iterations",
    "coarse_iterations",
    "smallest_size",
    "average",
)


class VggEngine:
    """A network on a device in one precision."""

    checkpoints = CheckpointFormat(layout)

    def __init__(
        self,
        vgg: Vgg,
        device: torch.device,
        precision: Precision,
        *,
        graphs: bool | None = None,
        note: str = "",
        style_cache_bytes: int = STYLE_CACHE_BYTES,
    ) -> None:
        """``graphs``: replay captured iterations; as a rule on a GPU, and only there. ``note`` goes with the device's
        name, such as the reason why it is not another one. ``style_cache_bytes``: on the device, for Gram matrices of
        style images; 0 keeps none."""
        ops.require_kernels(device.type)
        self.device = device
        self.precision = precision.name
        self.backbone = vgg.backbone
        self.weights_source = vgg.source
        self.layers = vgg.layers
        self.chain = VggFeatures(vgg, device, precision)
        self.stages = GraphRunnerPool(self.chain, graphs=device.type == "cuda" if graphs is None else graphs)
        self.targets = StyleTargets(self.chain, style_cache_bytes)
        self.snapshots = DeviceToHostCopier(device)
        self.memory_bytes = int(bytes_free(device) * MOST_OF_MEMORY)
        self._widest = vgg.convolutions[0].weight.shape[0]  # activations per pixel; every pooling quarters the pixels
        self._vgg = vgg
        self._note = note

    @classmethod
    def load(
        cls, *, device: str, precision: str, weights: str, backbone: str, threads: int, graphs: bool = True
    ) -> VggEngine:
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

    @property
    def style_cache(self) -> CacheCounts:
        """Of the cache of style targets."""
        return self.targets.counts

    def require_device(self) -> None:
        """Adds two numbers on the device; see `work.BatchEngine.require_device`."""
        torch.ones(1, device=self.device).add_(1).item()

    def admit(self, job: StyleJob) -> JobState:
        """A job that has not begun; see `work.BatchEngine.admit`."""
        work = JobState(job)
        width, height = job.result_size
        if not self.most_slots(Shape.of(job.recipe, height, width)):
            size = f"makes a {width}x{height} picture, of which the GPU's libraries take at most {self._most_pixels} pixels"
            raise InvalidRequest([Violation("spec.recipe.size", f"{size}; give a smaller one")])
        return work

    def picture(self, work: JobState) -> Callable[[], Tensor]:
        """The present picture of a job in no batch; see `work.BatchEngine.picture`."""
        if work.tensors is None:
            raise ValueError("only a job that has begun and is in no batch has a picture of its own")
        with torch.inference_mode():
            return self.snapshots.take(shown(work.tensors, work.recipe.average, work.averaged, not work.diverged_at))

    def batch(self, shape: Shape, slots: int) -> EngineBatch:
        """An empty batch; see `work.BatchEngine.batch`."""
        if not 0 < slots <= self.most_slots(shape):
            raise ValueError(f"a batch of this shape has 1 to {self.most_slots(shape)} slots, got {slots}")
        return EngineBatch(self.stages, self.targets, self.snapshots, shape, slots)

    def most_slots(self, shape: Shape) -> int:
        """How many jobs of a shape the GPU's libraries can count at once; see `work.BatchEngine.most_slots`."""
        if self.device.type != "cuda":
            return MOST_SLOTS
        return min(MOST_SLOTS, self._most_pixels // (shape.width * shape.height))

    def start(self, jobs: Sequence[StyleJob]) -> EngineRun:
        """A run of ``jobs`` as one batch: same result size, same scales, same structure of recipe.

        Raises `ValueError` if they do not fit together or are too many, and `InvalidRequest` if the GPU's libraries could
        not count the activations of one.
        """
        return EngineRun(self, [self.admit(job) for job in jobs])

    def bytes_needed(self, job: StyleJob, jobs: int) -> int:
        """Bytes on the device that ``jobs`` such jobs as one batch take at their largest scale, without the network."""
        width, height = job.result_size
        return self.batch_bytes(Shape.of(job.recipe, height, width), jobs)

    def batch_bytes(self, shape: Shape, slots: int) -> int:
        """Bytes on the device that a batch takes; see `work.BatchEngine.batch_bytes`."""
        form = "cudnn" if self.chain.form == "cudnn" else "library"
        return bytes_needed(self._vgg, shape, slots, self.chain.precision, form)

    @property
    def _most_pixels(self) -> int:
        return MOST_ELEMENTS_CUDA // self._widest

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
        self.batch_bytes(Shape.of(recipe, 64, 64), 1)  # the first estimate loads a second's worth of torch


class EngineRun:
    """Jobs on their way through the scales together; see `job.Run`."""

    def __init__(self, engine: VggEngine, works: Sequence[JobState]) -> None:
        for work in works[1:]:
            _must_share(works[0].job, work.job)
        self._engine = engine
        self._works = works
        self._batch: EngineBatch | None = None  # from the first scale on; its slots are the jobs in their order
        self._closed = False

    @property
    def finished(self) -> bool:
        """No iteration is left."""
        return self._closed or self._works[0].finished

    def advance(self, iterations: int = 1) -> tuple[Report, ...]:
        """Some iterations of every job; see `job.Run.advance`."""
        try:
            if not self._works[0].iterations_left:
                self._next_scale()
            return tuple(self.batch.advance(iterations).values())
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            raise OutOfDeviceMemory(*self._works[0].job.result_size) from error

    def picture(self, index: int) -> Tensor:
        """The present picture of one job; see `job.Run.picture`."""
        return self.batch.picture(index)

    def snapshot(self, index: int) -> Callable[[], Tensor]:
        """The present picture of one job, for later; see `job.Run.snapshot`."""
        return self.batch.snapshot(index)

    def close(self) -> None:
        """Leaves the buffers to the next job; see `job.Run.close`."""
        if self._batch is not None:
            self._batch.close()
            self._batch = None
        self._closed = True

    @property
    def batch(self) -> EngineBatch:
        """Of the present scale; the first time this is where the jobs begin."""
        assert not self._closed, "the run is closed"
        return self._batch or self._next_scale()

    def _next_scale(self) -> EngineBatch:
        if self._batch is not None:
            for slot in range(len(self._works)):
                self._batch.leave(slot)
            self._batch.close()
            self._batch = None
        batch = self._engine.batch(self._works[0].shape, len(self._works))
        for work in self._works:
            batch.join(work)
        self._batch = batch
        return batch


def _must_share(first: StyleJob, other: StyleJob) -> None:
    for name in SHARED:
        a, b = getattr(first.recipe, name), getattr(other.recipe, name)
        if a != b:
            raise ValueError(f"jobs of a run must have the same {name}, got {a} and {b}")
    for name in ("content_layers", "style_layers"):
        a, b = ([layer for layer, _ in getattr(job.recipe, name)] for job in (first, other))
        if a != b:
            raise ValueError(f"jobs of a run must have the same {name}, got {a} and {b}")
    if first.result_size != other.result_size:
        raise ValueError(f"jobs of a run must have one size, got {first.result_size} and {other.result_size}")


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
